"""A checkpoint's own chat template: Jinja, rendered in a sandbox (template_rules.py).

Such a template makes a text of a conversation, in which control tokens stand by their names. Where
the assistant begins is found by writing what comes before, with its turn opened; it ends with the
first token that ends an answer. A control token's name that a message holds stays text, as in our
own form: it is marked before the template sees it.
"""
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import untrusted
from common import UserError
from data.chat import template_rules
from data.chat.template import common_prefix_length
from untrusted import printable

TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token")   # names of tokens that a template may use
REASONING = ("reasoning_content", "thinking", "reasoning")  # what templates call the thoughts
MARK = "\ufdd0"           # no character of any text: behind the first sign of a name that is text
PROBE = "zebra"

RULES = Path(template_rules.__file__)
TRIAL_MEMORY = 1 << 30  # bytes that the process that tries a template may take
TRIAL_SECONDS = 5       # … of CPU time: the longest of TRL's templates does with 0.02 s


@dataclass
class ChatTemplate:
    texts: dict[str, str]   # name -> Jinja: "default"; maybe "tool_use", for who has tools
    tokens: dict[str, str]  # of TOKENS, those that the tokenizer has -> what they are
    where: str              # the file, for messages

    def write(self, messages: list[dict], tools: Sequence[dict] = (),
              add_generation_prompt: bool = False) -> str:
        """The text of a conversation in OpenAI's form; UserError where the template refuses it."""
        name = "tool_use" if tools and "tool_use" in self.texts else "default"
        try:
            conversation = dict(messages=messages, tools=list(tools) or None,
                                add_generation_prompt=add_generation_prompt)
            return template_rules.write(self.texts[name], conversation, self.tokens)
        except Exception as error:  # Jinja's, its author's, and all that Python has
            reason = printable(str(error) or type(error).__name__)
            raise UserError(f"the chat template {self.where} fails: {reason}") from None

    def render(self, messages: list[dict], tokenizer, add_generation_prompt: bool = False,
               tools: Sequence[dict] = (), system: str = "") -> list[int]:
        """Token ids of a conversation, as data/chat/template.py's."""
        said, tools = self._conversation(messages, tools, system, tokenizer)
        text = self.write(said, tools, add_generation_prompt)
        return _encode(text, [], tokenizer)[0]

    def render_weighted(self, messages: list[dict], weights: list[float], tokenizer,
                        tools: Sequence[dict] = (),
                        system: str = "") -> tuple[list[int], list[float]]:
        """The ids of `render`, and each one's weight: that of its message, from the first token
        after the opened turn to the one that ends it.

        weights: of the messages. UserError where the tokens of a message that is trained cannot be
        found.
        """
        said, tools = self._conversation(messages, tools, system, tokenizer)
        n_before = len(said) - len(messages)  # a system turn
        text = self.write(said, tools)
        spans = []
        for i, weight in enumerate(weights):
            if weight:
                start, end = _find_turn(self, text, said, i + n_before, tools, tokenizer)
                spans.append((start, end, weight))
        return _encode(text, spans, tokenizer)

    @functools.cached_property
    def reads_reasoning(self) -> bool:
        """Whether thoughts have a field of their own; else they stand in the content."""
        answer = {"role": "assistant", "content": "1"} | dict.fromkeys(REASONING, PROBE)
        try:
            return PROBE in self.write([{"role": "user", "content": "1"}, answer])
        except UserError:
            return False

    @functools.cached_property
    def keeps_turns(self) -> bool:
        """Whether an answer stays as it was when the conversation goes on."""
        turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": PROBE}]
        try:
            alone, whole = self.write(turn), self.write(turn + turn)
        except UserError:
            return True
        end = alone.rfind(PROBE) + len(PROBE)
        return whole.startswith(alone[:end])

    def _conversation(self, messages: list[dict], tools: Sequence[dict], system: str,
                      tokenizer) -> tuple[list[dict], list[dict]]:
        """Messages of data/chat/template.py and tools, in OpenAI's form and marked."""
        if system not in ("", "released") and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        pattern = _control_pattern(tokenizer)
        queries = [i for i, message in enumerate(messages) if message["role"] == "user"]
        last_query = max(queries, default=-1)
        said = []
        for i, message in enumerate(messages):
            content = _marked(message.get("content") or "", pattern)
            new = {"role": message["role"], "content": content}
            if message["role"] == "assistant":
                reasoning = _marked(message.get("reasoning") or "", pattern)
                if reasoning and self.reads_reasoning:
                    new |= dict.fromkeys(REASONING, reasoning)
                elif reasoning and i > last_query:
                    new["content"] = f"<think>\n{reasoning}\n</think>\n\n{new['content']}"
                calls = [_call(call) for call in message.get("tool_calls") or []]
                if calls:
                    new["tool_calls"] = _marked(calls, pattern)
            said.append(new)
        return said, _marked(list(tools), pattern)


@functools.lru_cache(8)
def try_templates(template_json: str) -> str:
    """Why the texts and tokens of a ChatTemplate cannot be used, as far as a process of its own
    finds out in little time; "" for no reason."""
    return untrusted.call_apart(RULES, template_json, TRIAL_MEMORY, TRIAL_SECONDS)


# --------------------------------------------------------------------------------------------------
# A conversation as templates take it

def tokens_of(*configs: dict) -> dict[str, str]:
    """{name of TOKENS: the token}, as a folder's configs say; of two the later config counts."""
    tokens = {}
    for config in configs:
        for key in TOKENS:
            token = config.get(key)
            if isinstance(token, dict):  # an AddedToken
                token = token.get("content")
            if isinstance(token, str):
                tokens[key] = token
    return tokens


def _call(call: dict) -> dict:
    """A tool call in OpenAI's form, with arguments as an object."""
    function = call.get("function") or call
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _control_pattern(tokenizer) -> re.Pattern:
    """Finds the control tokens of a text, the longer one where two begin alike."""
    return _any_of(tuple(tokenizer.special))


@functools.lru_cache(8)  # some tokenizers have thousands
def _any_of(names: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _marked(value, pattern: re.Pattern):
    """A JSON value with a mark in each control token's name."""
    if isinstance(value, str):
        value = value.replace(MARK, "\N{REPLACEMENT CHARACTER}")
        if not pattern.search(value):
            return value
        return re.sub(f"(?={pattern.pattern})(.)", rf"\1{MARK}", value, flags=re.DOTALL)
    if isinstance(value, list):
        return [_marked(item, pattern) for item in value]
    if isinstance(value, dict):
        return {_marked(key, pattern): _marked(item, pattern) for key, item in value.items()}
    return value


# --------------------------------------------------------------------------------------------------
# Tokens

def _find_turn(chat: ChatTemplate, text: str, said: list[dict], i: int, tools: list[dict],
               tokenizer) -> tuple[int, int]:
    """Where in a conversation's text the i-th message, an assistant's, begins and ends."""
    before = chat.write(said[:i], tools, add_generation_prompt=True)
    alone = chat.write(said[:i + 1], tools)
    start = len(before)
    end = _first_stop(text, start, tokenizer)
    turn = text[start:end]
    calls = [call["function"]["name"] for call in said[i].get("tool_calls", ())]
    parts = [said[i]["content"], said[i].get("reasoning", ""), *calls]
    missing = [part for part in parts if part.strip() not in turn]
    reason = ""
    if not alone.startswith(before):
        reason = "does not write an answer as it opens one"
    elif not _first_stop(alone, start, tokenizer):
        stop_ids = tokenizer.stop_ids
        ends = [name for name, token in tokenizer.special.items() if token in stop_ids]
        reason = f"ends an answer with none of {printable(', '.join(ends))}"
    elif not text.startswith(before):
        reason = "writes what came before an answer in another form where a conversation goes on"
    elif missing:
        reason = f"leaves out {printable(missing[0].strip(), 40)!r}"
    if reason:
        raise UserError(f"{chat.where} {reason}: the tokens of message {i} cannot be found "
                        "(tokenizer.chat_template=ours trains in our own form)")
    return start, end


def _first_stop(text: str, start: int, tokenizer) -> int:
    """The end of the first token that ends an answer; 0: there is none."""
    for control in _control_pattern(tokenizer).finditer(text, start):
        if tokenizer.special[control[0]] in tokenizer.stop_ids:
            return control.end()
    return 0


def _encode(text: str, spans: list[tuple[int, int, float]],
            tokenizer) -> tuple[list[int], list[float]]:
    """Ids of a marked text, and weights: that of each span (start, end, weight) in it, else 0.

    A span ends behind a control token. A token that holds a span's first sign belongs to it.
    """
    ids, weights = [], []
    for start, piece in _pieces(text, tokenizer):
        tokens = _encode_piece(start, piece, tokenizer)
        of_piece = [0.0] * len(tokens)
        for first, end, weight in spans:
            if start < end and first < start + len(piece):
                n = 0
                if first > start:
                    opening = _encode_piece(start, piece[:first - start], tokenizer)
                    n = common_prefix_length(opening, tokens)
                of_piece[n:] = [weight] * (len(tokens) - n)
        ids += tokens
        weights += of_piece
    return ids, weights


def _pieces(text: str, tokenizer) -> Iterator[tuple[int, str]]:
    """(where it begins, piece): control tokens, and the texts between them.

    What a control token takes of the blanks beside it ("lstrip", "rstrip") is in no piece.
    """
    start, strips = 0, False
    for control in [*_control_pattern(tokenizer).finditer(text), None]:
        piece = text[start:control.start() if control else None]
        if strips:
            start += len(piece) - len(piece.lstrip())
            piece = piece.lstrip()
        if control:
            strips_before, strips = tokenizer.strips.get(control[0], (False, False))
            piece = piece.rstrip() if strips_before else piece
        if piece:
            yield start, piece
        if control:
            yield control.start(), control[0]
            start = control.end()


def _encode_piece(start: int, piece: str, tokenizer) -> list[int]:
    if piece in tokenizer.special:
        return [tokenizer.special[piece]]
    return tokenizer.encode(piece.replace(MARK, ""), begins=start == 0)
