"""Conversations as tokens: the ChatML form of Nanbeige4, written twice.

(The released chat template; tools as in Qwen3.) `render` is what training and sampling use: control
tokens are put in by id, so that one written in a message stays text. `CHAT_TEMPLATE` is the same as
Jinja, for exports: other programs render it to text first and cannot tell the two apart. Where a
tokenizer has the template of another's checkpoint, `render` is data/chat/foreign.py's.

A message is one of
    {"role": "system", "content": str}      only the first; where there is none, the released
                                            template puts in one in Chinese, ours only where
                                            system="released" asks for it (our choice)
    {"role": "user", "content": str}
    {"role": "assistant", "content": str, "reasoning": str, "tool_calls": list, "weight": float}
                                            any left out or None
    {"role": "tool", "content": str}        a call's result; those in a row make one user turn, but
                                            no query
A call is {"name": str, "arguments": dict}, or that under "function", as OpenAI has it. Arguments
may also be an object as JSON text, which is put in as it stands (Jinja could not read it).
"""
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby

from common import UserError

ROLES = ["system", "user", "assistant", "tool"]

# What the released template (of Nanbeige4.1-3B and Nanbeige4-3B-Thinking-2511) says where there is
# no system message: "You are Nanbeige, a language model by BOSS Zhipin". With tools: "You are an
# expert in calling functions …", right before their signatures.
RELEASED_SYSTEM = "你是南北阁，一款由BOSS直聘自主研发并训练的专业大语言模型。"
RELEASED_SYSTEM_OF_TOOLS = (
    "你是一位工具函数调用专家，你会得到一个问题和一组可能的工具函数。"
    "根据问题，你需要进行一个或多个函数/工具调用以实现目的，请尽量尝试探索通过工具解决问题。\n"
    "如果没有一个函数可以使用，请直接使用自然语言回复用户。\n"
    "如果给定的问题缺少函数所需的参数，请使用自然语言进行提问，向用户询问必要信息。\n"
    "如果调用结果已经足够回答用户问题，请对历史结果进行总结，使用自然语言回复用户。"
)

TOOLS_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
TOOLS_AFTER = """
</tools>

For each function call, return a json object with function name and arguments \
within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

CHAT_TEMPLATE = r"""
{%- set turn = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set turn.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
    {{- TOOLS_BEFORE }}
    {%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
    {{- TOOLS_AFTER + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ROLES or message.role == 'system' and not loop.first %}
        {{- raise_exception('unknown role, or out of place: ' + message.role) }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n' if loop.first or loop.previtem.role != 'tool' else '\n' }}
        {{- '<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.reasoning and loop.index0 > turn.last_query %}
            {{- '<think>\n' + message.reasoning + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": ' + call.name | tojson + ', "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'user' or not tools %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()
CHAT_TEMPLATE = CHAT_TEMPLATE.replace("TOOLS_BEFORE", repr(TOOLS_BEFORE))
CHAT_TEMPLATE = CHAT_TEMPLATE.replace("TOOLS_AFTER", repr(TOOLS_AFTER))
CHAT_TEMPLATE = CHAT_TEMPLATE.replace("ROLES", repr(ROLES))


def render(messages: list[dict], tokenizer, add_generation_prompt: bool = False,
           tools: Sequence[dict] = (), system: str = "") -> list[int]:
    """Token ids of a conversation.

    add_generation_prompt: the assistant's next turn is opened at the end. tools: JSON signatures.
    system: what the system says where the messages do not begin with it; "released": what the
    released template puts in. Reasoning is kept in the turns after the last user message and
    dropped before it (as released). Without reasoning there is no <think> block (our choice).
    Raises UserError for a message that is not of the form above, and for a tokenizer without these
    controls.
    """
    if tokenizer.chat_template:
        _check(messages)
        return tokenizer.chat_template.render(
            messages, tokenizer, add_generation_prompt, tools, system)
    ids, _ = render_weighted(messages, tokenizer, tools, system)
    if add_generation_prompt:
        ids += _encode(["<|im_start|>", "assistant\n"], tokenizer)
    return ids


def render_weighted(messages: list[dict], tokenizer, tools: Sequence[dict] = (),
                    system: str = "") -> tuple[list[int], list[float]]:
    r"""The ids of `render`, and each one's weight in the loss.

    What an assistant says has its message's "weight": all after "<|im_start|>assistant\n", up to
    and with "<|im_end|>"; the rest has weight 0. The default is 1; others make the per-turn loss
    mask of Nanbeige4.2 (arXiv 2607.22083). Where a content begins with a line break, one token may
    hold it and the "\n" before; it has the weight.
    """
    if tokenizer.chat_template:
        _check(messages)
        said = [_weight(m) if m["role"] == "assistant" else 0.0 for m in messages]
        return tokenizer.chat_template.render_weighted(messages, said, tokenizer, tools, system)
    ids, weights = [], []
    n_newline = len(tokenizer.encode("\n"))
    for role, body, weight in _turns(messages, tools, system):
        opening = _encode(["<|im_start|>", role + "\n"], tokenizer)
        parts = ["<|im_start|>", role + "\n" + body[0], *body[1:], "<|im_end|>", "\n"]
        turn = _encode(parts, tokenizer)
        n_opening = common_prefix_length(opening, turn)
        n_said = len(turn) - n_opening - n_newline
        ids += turn
        weights += [0.0] * n_opening + [weight] * n_said + [0.0] * n_newline
    return ids, weights


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """How many elements two lists begin alike with."""
    for i, (one, other) in enumerate(zip(a, b)):
        if one != other:
            return i
    return min(len(a), len(b))


def _encode(parts: list[str], tokenizer) -> list[int]:
    """Ids of control token, text, control token, text, …"""
    ids = []
    for control, text in zip(parts[::2], parts[1::2]):
        if control not in tokenizer.special:
            raise UserError(f"{tokenizer.name} has no {control} token: it is not made for chats")
        ids += [tokenizer.special[control], *tokenizer.encode(text)]
    return ids


def _turns(messages: list[dict], tools: Sequence[dict],
           system: str) -> Iterator[tuple[str, list[str], float]]:
    """(role, body, weight) of each turn.

    A body is text, control token, text, …: joined, what CHAT_TEMPLATE writes.
    """
    _check(messages)
    if tools:
        yield "system", _tools_body(messages, tools, system), 0.0
    elif system and not _begins_with_system(messages):
        yield "system", [RELEASED_SYSTEM if system == "released" else system], 0.0
    queries = _places(messages, "user")
    last_query = max(queries, default=-1)
    for role, group in groupby(enumerate(messages), lambda numbered: numbered[1]["role"]):
        if role == "tool":
            results = [f"<tool_response>\n{message['content']}\n</tool_response>"
                       for _, message in group]
            yield "user", ["\n".join(results)], 0.0
        elif role == "assistant":
            for i, message in group:
                yield role, _assistant_body(message, i > last_query), _weight(message)
        elif role == "user" or not tools:  # a system message is already in the tools' turn
            for _, message in group:
                yield role, [message["content"]], 0.0


def _tools_body(messages: list[dict], tools: Sequence[dict], system: str) -> list[str]:
    """The body of the system's turn where there are tools."""
    before = ""
    if _begins_with_system(messages):
        before = messages[0]["content"] + "\n\n"
    elif system == "released":
        before = RELEASED_SYSTEM_OF_TOOLS
    elif system:
        before = system + "\n\n"
    signatures = "".join("\n" + _json(tool) for tool in tools)
    after, *call_block = re.split("(</?tool_call>)", TOOLS_AFTER)
    return [before + TOOLS_BEFORE + signatures + after, *call_block]


def _begins_with_system(messages: list[dict]) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def _assistant_body(message: dict, keep_reasoning: bool) -> list[str]:
    """The body of an assistant's turn."""
    content = message.get("content") or ""
    body = [content]
    if message.get("reasoning") and keep_reasoning:
        thoughts = "\n" + message["reasoning"] + "\n"
        body = ["", "<think>", thoughts, "</think>", "\n\n" + content]
    for n, call in enumerate(_calls(message)):
        if n or content:
            body[-1] += "\n"
        body += ["<tool_call>", f"\n{_write_call(call)}\n", "</tool_call>", ""]
    return body


def _places(messages: list[dict], role: str) -> list[int]:
    """The numbers of the messages of a role."""
    return [i for i, message in enumerate(messages) if message["role"] == role]


def _calls(message: dict) -> list[dict]:
    """An assistant's tool calls; none of another role."""
    if message["role"] != "assistant":
        return []
    return message.get("tool_calls") or []


def _write_call(call: dict) -> str | None:
    """A call as JSON; None for what is no call."""
    with suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):
        function = call.get("function") or call
        name, arguments = function["name"], function["arguments"]
        text = arguments if isinstance(arguments, str) else _json(arguments)
        if isinstance(name, str) and isinstance(json.loads(text), dict):
            return f'{{"name": {_json(name)}, "arguments": {text}}}'
    return None


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)  # as `tojson` of transformers' templates


def _weight(message: dict) -> float:
    weight = message.get("weight")
    return 1.0 if weight is None else float(weight)


# --------------------------------------------------------------------------------------------------
# What may be rendered

FIELDS = {  # key of a message -> what its value must be, and in words
    "content": (str, "text"),
    "reasoning": (str, "text"),
    "tool_calls": (list, "a list"),
    "weight": ((int, float), "a number"),
}


def _check(messages: list[dict]) -> None:
    """Raises UserError for a conversation that cannot be rendered."""
    before = None
    for i, message in enumerate(messages):
        reason = _invalid_reason(message, before)
        if reason:
            raise UserError(f"message {i} {reason}")
        before = message


def _invalid_reason(message: dict, before: dict | None) -> str | None:
    """What is wrong with a message that follows another (None: with the first)."""
    role = message.get("role")
    if role not in ROLES:
        return f"has the unknown role {role!r}"
    if role == "system" and before:
        return "is a system message: only the first may be one"
    if role == "tool" and not _may_precede_result(before):
        return "is a tool's: it must follow an assistant's tool calls or another tool's"
    for key, (kind, kind_name) in FIELDS.items():
        value = message.get(key)
        is_absent = value is None and (role == "assistant" or key != "content")
        if not is_absent and not isinstance(value, kind):
            return f"has {value!r:.100} as {key}, which must be {kind_name}"
    for call in _calls(message):
        if _write_call(call) is None:
            return f"has a tool call without a name or a JSON object as arguments: {call!r:.200}"
    return None


def _may_precede_result(message: dict | None) -> bool:
    """Whether a tool's result may follow a message."""
    return bool(message) and (message["role"] == "tool" or bool(_calls(message)))


def one_row_per_turn(messages: list[dict], always: bool = False) -> list[list[dict]]:
    """The conversations to train on in place of one.

    They train no turn whose reasoning `render` drops. Without reasoning before the last user
    message, that is the one itself (unless `always`). Else there is one for each user message: it
    ends before the next, and only assistant turns after that message are trained; where there are
    none, it is left out. Raises UserError as `render` does.
    """
    _check(messages)
    queries = _places(messages, "user")
    answers = _places(messages, "assistant")
    last_query = max(queries, default=0)
    if not always and not any(messages[i].get("reasoning") for i in answers if i < last_query):
        return [messages]
    rows = []
    for query, end in zip(queries, [*queries[1:], len(messages)]):
        if not any(_weight(messages[i]) for i in answers if query < i < end):
            continue
        row = list(messages[:end])
        for i in answers:
            if i < query:
                row[i] = messages[i] | {"weight": 0.0}
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# Back: what a model says

def parse(answer: list[int], tokenizer) -> dict:
    """The assistant message of sampled tokens, without their stop token; `render` is its inverse.

    It has "reasoning" and "tool_calls" where the answer has them; a block that is no call stays
    text of the content.
    """
    message = {"role": "assistant"}
    thoughts_end = tokenizer.special.get("</think>")
    if thoughts_end in answer:
        cut = answer.index(thoughts_end)
        thoughts_begin = tokenizer.special["<think>"]
        reasoning = tokenizer.decode([token for token in answer[:cut] if token != thoughts_begin])
        message["reasoning"] = reasoning.removeprefix("\n").removesuffix("\n")
        answer = answer[cut + 1:]
    texts, calls = _split_calls(answer, tokenizer)
    if "reasoning" in message:
        texts[0] = texts[0].removeprefix("\n\n")
    before_calls = [text.removesuffix("\n") for text in texts[:-1]]
    message["content"] = "".join(before_calls) + texts[-1]
    if calls:
        message["tool_calls"] = calls
    if thoughts_end is None and message["content"].startswith("<think>\n"):
        thoughts, end, content = message["content"].partition("\n</think>\n\n")
        if end:  # in the letters that foreign.py writes where a tokenizer has no tokens for them
            message |= {"reasoning": thoughts.removeprefix("<think>\n"), "content": content}
    return message


def _split_calls(answer: list[int], tokenizer) -> tuple[list[str], list[dict]]:
    """The texts before, between and after an answer's calls, and the calls."""
    texts, calls = [], []
    ids, start = [], 0  # ids: since the last call; start: where in them a block begins, 0: none
    for token in answer:
        ids.append(token)
        if token == tokenizer.special.get("<tool_call>"):
            start = len(ids)
        elif token == tokenizer.special.get("</tool_call>"):
            call = _read_call(tokenizer.decode(ids[start:-1])) if start else None
            if call:
                texts.append(tokenizer.decode(ids[:start - 1]))
                calls.append(call)
                ids = []
            start = 0
    return [*texts, tokenizer.decode(ids)], calls


def _read_call(text: str) -> dict | None:
    """A call that is written as JSON; None for what is no call."""
    with suppress(ValueError, RecursionError):
        call = json.loads(text)
        if not isinstance(call, dict):
            return None
        name, arguments = call.get("name"), call.get("arguments")
        if isinstance(name, str) and isinstance(arguments, dict):
            return {"name": name, "arguments": arguments}
    return None


def reopen_thoughts(prompt: str, response: str) -> str:
    """The response, behind the <think> that its prompt ends with, if it does.

    Templates of models that always think (as Qwen3-Thinking's) open the thoughts in the prompt:
    without their beginning, thoughts that were cut off would pass for an answer.
    """
    is_opened = prompt.rstrip().endswith("<think>")
    begins_anew = response.lstrip().startswith("<think>")
    return "<think>\n" + response if is_opened and not begins_anew else response


def after_thoughts(response: str) -> str | None:
    """The text that is scored: after the last </think>; None for thoughts that never end."""
    text = response.rpartition("</think>")[2]
    return None if "<think>" in text else text


def split_thoughts(response: str) -> tuple[str, str]:
    """(chain of thought, content) of a response, without tags.

    The chain is "" without thoughts, the content is "" if they never end.
    """
    content = after_thoughts(response)
    chain = response if content is None else response.rpartition("</think>")[0]
    return re.sub("</?think>", "", chain).strip("\n"), (content or "").strip("\n")
