"""Conversations as tokens: the ChatML form of Nanbeige4 (released chat template; tools as in Qwen3), written twice.

`render` is what training and sampling use: control tokens are put in by id, so that one written in a message stays
text. `CHAT_TEMPLATE` is the same as Jinja, for exports: other programs render it to text first and cannot tell the two
apart. A message is one of
    {"role": "system", "content": str}  only the first; where there is none, the released template puts in one in
                                        Chinese, ours does not (our choice)
    {"role": "user", "content": str}
    {"role": "assistant", "content": str, "reasoning": str, "tool_calls": list, "weight": float}    any left out or None
    {"role": "tool", "content": str}    a call's result; those in a row make one user turn, but no query
A call is {"name": str, "arguments": dict}, or that under "function", as OpenAI has it. Arguments may also be an object
as JSON text, which is put in as it stands (Jinja could not read it).
"""
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby

from common import UserError

TOOLS_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
TOOLS_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
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
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] or message.role == 'system' and not loop.first %}
        {{- raise_exception('unknown role, or out of place: ' + message.role) }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n' if loop.first or loop.previtem.role != 'tool' else '\n' }}
        {{- '<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
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
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'user' or not tools %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip().replace("TOOLS_BEFORE", repr(TOOLS_BEFORE)).replace("TOOLS_AFTER", repr(TOOLS_AFTER))


def render(messages: list[dict], tokenizer, add_generation_prompt: bool = False,
           tools: Sequence[dict] = ()) -> list[int]:
    """Token ids of a conversation; with add_generation_prompt the assistant's next turn is opened at the end.

    tools: JSON signatures. Reasoning is kept in the turns after the last user message and dropped before it (as
    released). Without reasoning there is no <think> block (our choice). Raises UserError for a message that is not of
    the form above, and for a tokenizer without these controls.
    """
    ids, _ = render_weighted(messages, tokenizer, tools)
    return ids + _encode(["<|im_start|>", "assistant\n"], tokenizer) if add_generation_prompt else ids


def render_weighted(messages: list[dict], tokenizer, tools: Sequence[dict] = ()) -> tuple[list[int], list[float]]:
    r"""The ids of `render`, and each one's weight in the loss: on what an assistant says its message's "weight".

    That is all after "<|im_start|>assistant\n", up to and with "<|im_end|>"; the rest has weight 0. The default is 1;
    others make the per-turn loss mask of Nanbeige4.2 (arXiv 2607.22083). Where a content begins with a line break, one
    token may hold it and the "\n" before; it has the weight.
    """
    ids, weights, newline = [], [], tokenizer.encode("\n")
    for role, body, weight in _turns(messages, tools):
        opening = _encode(["<|im_start|>", role + "\n"], tokenizer)
        turn = _encode(["<|im_start|>", role + "\n" + body[0], *body[1:], "<|im_end|>", "\n"], tokenizer)
        given = next((i for i, (a, b) in enumerate(zip(opening, turn)) if a != b), len(opening))
        ids += turn
        weights += [0.0] * given + [weight] * (len(turn) - given - len(newline)) + [0.0] * len(newline)
    return ids, weights


def _encode(parts: list[str], tokenizer) -> list[int]:
    """Ids of control token, text, control token, text, …"""
    ids = []
    for control, text in zip(parts[::2], parts[1::2]):
        if control not in tokenizer.special:
            raise UserError(f"{tokenizer.name} has no {control} token: it is not made for chats")
        ids += [tokenizer.special[control], *tokenizer.encode(text)]
    return ids


def _turns(messages: list[dict], tools: Sequence[dict]) -> Iterator[tuple[str, list[str], float]]:
    """(role, body, weight) of each turn. A body is text, control token, text, …: joined, what CHAT_TEMPLATE writes."""
    _check(messages)
    if tools:
        system = "".join(message["content"] + "\n\n" for message in messages[:1] if message["role"] == "system")
        signatures = "".join("\n" + _json(tool) for tool in tools)
        after, *block = re.split("(</?tool_call>)", TOOLS_AFTER)
        yield "system", [system + TOOLS_BEFORE + signatures + after, *block], 0.0
    last_query = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for role, group in groupby(enumerate(messages), lambda numbered: numbered[1]["role"]):
        if role == "tool":
            results = [f"<tool_response>\n{message['content']}\n</tool_response>" for _, message in group]
            yield "user", ["\n".join(results)], 0.0
        elif role == "assistant":
            yield from ((role, _said(message, i > last_query), _weight(message)) for i, message in group)
        elif role == "user" or not tools:  # a system message is already in the tools' turn
            yield from ((role, [message["content"]], 0.0) for _, message in group)


def _said(message: dict, keep_reasoning: bool) -> list[str]:
    """The body of an assistant's turn."""
    body = [message.get("content") or ""]
    if message.get("reasoning") and keep_reasoning:
        body = ["", "<think>", "\n" + message["reasoning"] + "\n", "</think>", "\n\n" + body[0]]
    for n, call in enumerate(_calls(message)):
        body[-1] += "\n" if n or message.get("content") else ""
        body += ["<tool_call>", f"\n{_write_call(call)}\n", "</tool_call>", ""]
    return body


def _calls(message: dict) -> list[dict]:
    return message["role"] == "assistant" and message.get("tool_calls") or []


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
    return 1.0 if message.get("weight") is None else float(message["weight"])


def _check(messages: list[dict]) -> None:
    for i, message in enumerate(messages):
        if fault := _fault(message, messages[i - 1] if i else None):
            raise UserError(f"message {i} {fault}")


def _fault(message: dict, before: dict | None) -> str | None:
    """What is wrong with a message that follows another (None: with the first)."""
    role = message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        return f"has the unknown role {role!r}"
    if role == "system" and before:
        return "is a system message: only the first may be one"
    if role == "tool" and not (before and (before["role"] == "tool" or _calls(before))):
        return "is a tool's: it must follow an assistant's tool calls or another tool's"
    for key, kind, name in (("content", str, "text"), ("reasoning", str, "text"), ("tool_calls", list, "a list"),
                            ("weight", (int, float), "a number")):
        value, optional = message.get(key), role == "assistant" or key != "content"
        if not (isinstance(value, kind) or value is None and optional):
            return f"has {value!r:.100} as {key}, which must be {name}"
    for call in _calls(message):
        if _write_call(call) is None:
            return f"has a tool call without a name or a JSON object as arguments: {call!r:.200}"
    return None


def one_row_a_turn(messages: list[dict]) -> list[list[dict]]:
    """The conversations to train on in place of one, so that no turn is trained whose reasoning `render` drops.

    Without reasoning before the last user message, that is the one itself. Else there is one for each user message: it
    ends before the next, and only assistant turns after that message are trained; where there are none, it is left out.
    Raises UserError as `render` does.
    """
    _check(messages)
    queries = [i for i, message in enumerate(messages) if message["role"] == "user"]
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(messages[i].get("reasoning") for i in said if i < max(queries, default=0)):
        return [messages]
    rows = []
    for query, end in zip(queries, [*queries[1:], len(messages)]):
        if any(_weight(messages[i]) for i in said if query < i < end):
            rows.append([message | {"weight": 0.0} if message["role"] == "assistant" and i < query else message
                         for i, message in enumerate(messages[:end])])
    return rows


def parse(answer: list[int], tokenizer) -> dict:
    """The assistant message that sampled tokens say (without their stop token): what `render` is the inverse of.

    It has "reasoning" and "tool_calls" where the answer has them; a block that is no call stays text of the content.
    """
    message, end = {"role": "assistant"}, tokenizer.special.get("</think>")
    if end in answer:
        cut = answer.index(end)
        reasoning = [token for token in answer[:cut] if token != tokenizer.special["<think>"]]
        message["reasoning"] = tokenizer.decode(reasoning).removeprefix("\n").removesuffix("\n")
        answer = answer[cut + 1:]
    texts, calls = _split_calls(answer, tokenizer)
    if "reasoning" in message:
        texts[0] = texts[0].removeprefix("\n\n")
    message["content"] = "".join(text.removesuffix("\n") for text in texts[:-1]) + texts[-1]
    return message | ({"tool_calls": calls} if calls else {})


def _split_calls(answer: list[int], tokenizer) -> tuple[list[str], list[dict]]:
    """The texts before, between and after an answer's calls, and the calls."""
    texts, calls, text, start = [], [], [], 0  # text: ids since the last call; start: where in it a block begins
    for token in answer:
        text.append(token)
        if token == tokenizer.special.get("<tool_call>"):
            start = len(text)
        elif token == tokenizer.special.get("</tool_call>"):
            if start and (call := _read_call(tokenizer.decode(text[start:-1]))):
                texts.append(tokenizer.decode(text[:start - 1]))
                calls.append(call)
                text = []
            start = 0
    return [*texts, tokenizer.decode(text)], calls


def _read_call(text: str) -> dict | None:
    with suppress(ValueError, RecursionError):
        call = json.loads(text)
        if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict):
            return {"name": call["name"], "arguments": call["arguments"]}
    return None


def after_thoughts(response: str) -> str | None:
    """What is judged: the text after the last </think>; None for thoughts that never end."""
    text = response.rpartition("</think>")[2]
    return None if "<think>" in text else text
