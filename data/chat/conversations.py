"""Any SFT data set as tokenized conversations: normalized, rendered, kept with their loss weights.

A source is a path or hf source of data/text/sources.py, whose "column" may be [prompt, response]. A
record may be in the form of OpenAI, ShareGPT or Alpaca, or a pair, of texts or of messages (TRL):
`normalize` makes that of data/chat/template.py of all of them.

A pool is a folder: tokens.bin (uint32), weights.bin (float16: each token's weight in the loss, 0 to
1), ends.bin (int64: one past the last token of each row) and manifest.json. It is made aside and
renamed: whole or absent. The report (arXiv 2512.06266, SFT) names neither its data sets nor their
form: our choice.
"""
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np

from common import UserError, progress_bar, write_atomic
from data.chat import template
from data.chat.template import one_row_per_turn, render_weighted
from data.text.sources import (
    ReadPosition,
    find_files,
    invalid_reason,
    is_arrow,
    kept,
    parts,
    read,
)

MAX_CHARACTERS = 1_000_000  # of a message: a longer one is no conversation, and would take minutes
BATCH = 256                 # conversations that wait for the threads

ROLES = {  # what a message's "role" (OpenAI) or "from" (ShareGPT) may be -> ours
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
PAIRS = [  # columns that are a prompt and its response
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("problem", "solution"),
    ("problem", "generated_solution"),
    ("input", "output"),
]


# --------------------------------------------------------------------------------------------------
# Records. ValueErrors say what is wrong with one.

def normalize(record: dict, columns: list[str] | None = None) -> dict:
    """{"messages", "tools"} of a record in any of the forms.

    columns: [prompt, response], if its keys do not tell. A system prompt may stand beside the
    messages, as "system". Raises ValueError that says what is wrong, with the number of the
    message, from 0. The order of tool calls and results is left to data/chat/template.py.
    """
    raw_messages = _raw_messages(record, columns)
    first = raw_messages[0]
    if record.get("system") and isinstance(first, dict):
        if _first(first, "role", "from") != "system":
            raw_messages = [{"role": "system", "content": record["system"]}, *raw_messages]
    messages = []
    for i, raw in enumerate(raw_messages):
        try:
            message = _message(raw)
            if i and message["role"] == "system":
                raise ValueError("is a system message, which must be the first")
        except ValueError as error:
            raise ValueError(f"message {i} {error}") from None
        messages.append(message)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant turn")
    if messages[-1]["role"] == "user":
        raise ValueError("the conversation ends with the user")
    return {"messages": messages, "tools": _objects(record.get("tools") or [], "tools")}


def _raw_messages(record: dict, columns: list[str] | None) -> list:
    """The messages as the record has them, at least one."""
    if columns:
        return _raw_pair(record, [tuple(columns)], " and ".join(columns))
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            raw = _json(record[key], key)
            if not isinstance(raw, list) or not raw:
                raise ValueError(f"{key} is no list of messages")
            return raw
    if record.get("instruction") is None or record.get("output") is None:
        return _raw_pair(record, PAIRS, "known form of a conversation")
    prompt = record["instruction"]
    if record.get("input"):
        prompt = f"{prompt}\n\n{record['input']}"
    return _two_turns(prompt, record["output"])


def _raw_pair(record: dict, pairs: list[tuple[str, str]], wanted: str) -> list[dict]:
    """The messages of a record that has one of the pairs of columns; wanted: their name."""
    columns = {key for key, value in record.items() if value is not None}  # Arrow: None is absent
    for prompt, response in pairs:
        if prompt in columns and response in columns:
            return _two_turns(record[prompt], record[response])
    raise ValueError(f"no {wanted} in the columns {', '.join(sorted(columns))}"[:300])


def _two_turns(prompt: object, response: object) -> list[dict]:
    """The messages of a prompt and its response: texts, or lists of messages, as TRL has them.

    What assistants say in the prompt is not trained, unless it has a weight of its own.
    """
    before = [{"role": "user", "content": prompt}]
    after = [{"role": "assistant", "content": response}]
    if isinstance(prompt, list):
        before = [raw | {"weight": _first(raw, "weight") or 0.0} if isinstance(raw, dict) else raw
                  for raw in prompt]
    if isinstance(response, list):
        after = response
    return before + after


def _message(raw: dict) -> dict:
    """A message in our form; the errors read on after its number."""
    if not isinstance(raw, dict):
        raise ValueError("is no JSON object")
    role = _first(raw, "role", "from")
    content = _joined(_first(raw, "content", "value"))
    if str(role) not in ROLES:
        raise ValueError(f"has the unknown role {role!r:.40}")
    message = {"role": ROLES[role]}
    if role == "function_call":
        message |= _assistant(raw, "", _calls(content))
    elif message["role"] == "assistant":
        message |= _assistant(raw, content, _calls(raw.get("tool_calls")))
    elif isinstance(content, str):
        message["content"] = content
    else:
        raise ValueError("has content that is no text")
    size = sum(len(str(message.get(key, ""))) for key in ("content", "reasoning", "tool_calls"))
    if size > MAX_CHARACTERS:
        raise ValueError(f"has {size:,} characters")
    return message


def _joined(content: object) -> object:
    """The text of a content that is a list of parts, one below the other, as vLLM joins them."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"has a part that is no text: {kind!r:.40}")
        texts.append(text)
    return "\n".join(texts)


def _assistant(raw: dict, content: str | None, calls: list[dict]) -> dict:
    """What an assistant's message has beside its role.

    Thoughts may be in its content, as <think>…</think>; the first tag is missing where a chat
    template has written it.
    """
    if content is None and calls:
        content = ""
    reasoning = _first(raw, "reasoning", "reasoning_content") or ""
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise ValueError("has content or reasoning that is no text")
    if content.lstrip().startswith("<think>") or _ends_thoughts(content):
        thoughts, content = _split_thoughts(content)
        reasoning = reasoning or thoughts
    if not content.strip() and not calls:
        raise ValueError("is an assistant's, and empty")
    fields = {"content": content}
    reasoning = reasoning.strip("\n")
    if reasoning:
        fields["reasoning"] = reasoning
    if calls:
        fields["tool_calls"] = calls
    weight = _first(raw, "weight")
    if weight is not None:
        if not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
            raise ValueError(f"has the weight {weight!r:.40}, which is no number from 0 to 1")
        fields["weight"] = float(weight)
    return fields


def _ends_thoughts(content: str) -> bool:
    """Whether thoughts end that have not begun: at a line's beginning or end, for a text may be
    about the tag."""
    thoughts, tag, answer = content.partition("</think>")
    if not tag or "<think>" in thoughts:
        return False
    rest, line_break, _ = answer.partition("\n")
    return thoughts.endswith("\n") or bool(line_break) and not rest.strip()


def _split_thoughts(content: str) -> tuple[str, str]:
    """(thoughts, answer) of a content that begins with thoughts."""
    content = content.lstrip().removeprefix("<think>")
    thoughts, end, answer = content.partition("</think>")
    if not end:  # an answer that was cut off: it would teach never to stop
        raise ValueError("has thoughts that never end")
    answer = answer.lstrip("\n")
    tagged = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", answer, re.DOTALL)  # AM-DeepSeek-R1
    if tagged:
        answer = tagged[1].strip("\n")
    return thoughts, answer


def _calls(value: object) -> list[dict]:
    """[{"name", "arguments": dict}] of one call or a list of them.

    Plain or in OpenAI's form, maybe as JSON text.
    """
    calls = []
    for call in _objects(value or [], "tool calls", "has "):
        function = call.get("function") or call
        fields = function if isinstance(function, dict) else {}
        name = fields.get("name")
        arguments = _json(fields.get("arguments"), "a tool call's arguments", "has ")
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            raise ValueError("has a tool call without a name, "
                             "or whose arguments are no JSON object")
        calls.append({"name": name, "arguments": arguments})
    return calls


def _objects(value: object, what: str, has: str = "") -> list[dict]:
    """A list of JSON objects (or one of them), given as such or as JSON text, whole or each."""
    value = _json(value, what, has)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        value = [_json(item, what, has) for item in value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{has}{what} that are no list of JSON objects")
    return value


def _json(value: object, what: str, has: str = "") -> object:
    """The value; of a text, what it says as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{has}{what} that are no JSON: {value!r:.60}") from None


def _first(raw: dict, *keys: str) -> object:
    """The first of these fields that is there, else None."""
    return next((raw[key] for key in keys if raw.get(key) is not None), None)


def read_conversations(sources: list[dict], position: ReadPosition,
                       bad_line: Callable) -> Iterator[tuple[str, dict]]:
    """("file:line", normalized conversation) of each record.

    bad_line(where, what) is called for each bad one. A source's "documents" counts good ones;
    position counts what "keep" leaves out.
    """
    for source in sources:
        conversations = _read_source(source, position, bad_line)
        yield from islice(conversations, source.get("documents"))


def _read_source(source: dict, position: ReadPosition,
                 bad_line: Callable) -> Iterator[tuple[str, dict]]:
    for part in parts(source):
        for number, record in read(source, part, bad_line=bad_line):
            if not kept(record, source):
                position.left_out += 1
                continue
            if is_arrow(source, part):
                record = without_padding(record)
            try:
                conversation = normalize(record, source.get("column"))
            except ValueError as error:
                bad_line(f"{part}:{number}", str(error))
                continue
            yield f"{part}:{number}", conversation


def without_padding(value: object) -> object:
    """A value without the fields that are None, at any depth.

    All objects of a column of Arrow have the same fields, so each call of any tool those of every
    tool: None where they are not its own.
    """
    if isinstance(value, dict):
        return {key: without_padding(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_padding(item) for item in value]
    return value


# --------------------------------------------------------------------------------------------------
# Pools

@dataclass
class Pool:
    """Tokenized conversations, one after the other."""
    tokens: np.ndarray   # (tokens,) uint32, memory-mapped
    weights: np.ndarray  # (tokens,) float16, memory-mapped: each token's weight in the loss
    ends: np.ndarray     # (conversations,) int64: one past the last token of each

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(conversations,) int64: tokens of each."""
        return np.diff(self.ends, prepend=0)

    @functools.cached_property
    def trained(self) -> np.ndarray:
        """(conversations,) int64: trained tokens of each, of weight above 0. Reads all weights."""
        counts = []
        for i in range(len(self.ends)):
            _, weights = self.conversation(i)
            counts.append(np.count_nonzero(weights))
        return np.array(counts, np.int64)

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights of the i-th."""
        part = slice(self.ends[i] - self.lengths[i], self.ends[i])
        return self.tokens[part], self.weights[part]


FILES = {  # name of a file -> its numbers' type, and what of the manifest says how many
    "tokens": ("<u4", "tokens"),
    "weights": ("<f2", "tokens"),
    "ends": ("<i8", "rows"),
}


def prepare(folder: Path, name: str, sources: list[dict], tokenizer, *,
            on_bad_line: str = "skip") -> Pool:
    """The pool folder/name, made if it is not there or made of something else.

    That is: of other sources, files, tokenizer or code. on_bad_line: "skip" (counted, the first
    ones shown) or "stop". A row is a conversation or a prefix of it (see
    template.one_row_per_turn); what has no trained token is left out. Only one process at a time
    may call it.
    """
    if on_bad_line not in ("skip", "stop"):
        raise UserError(f"on_bad_line is {on_bad_line!r}; it must be 'skip' or 'stop'")
    for source in sources:
        reason = invalid_reason(source) or _no_conversations_reason(source)
        if reason:
            raise UserError(f"pool {name!r}: {reason}")
    made_of = _ingredients(sources, tokenizer, on_bad_line)
    manifest = _read_manifest(folder / name)
    ready = "ready, "
    if manifest.get("made_of") != made_of:
        ready = ""
        manifest = _make(folder, name, sources, tokenizer, on_bad_line == "stop", made_of)
    print(f"pool {name}: {ready}{manifest['rows']:,} rows of {manifest['conversations']:,} "
          f"conversations, {manifest['tokens']:,} tokens, {manifest['trained']:,} of them trained; "
          f"{_describe_losses(manifest)}")
    return read_pool(folder / name, tokenizer.hash)


def _no_conversations_reason(source: dict) -> str:
    """Why a source of data/text/sources.py is none of conversations; "" if it is."""
    if not {"path", "hf"} & source.keys() or "megabytes" in source:
        return f"{source} must be a path or an hf source, whose beginning is given as documents"
    column = source.get("column", ["prompt", "response"])
    is_list = isinstance(column, (list, tuple))
    if not is_list or [type(name) for name in column] != [str, str]:
        return f"column of {source} must be [prompt, response]"
    return ""


def _ingredients(sources: list[dict], tokenizer, on_bad_line: str) -> dict:
    """All that decides a pool's content, as JSON gives it back."""
    files = []
    for source in sources:
        if "path" in source:
            files += find_files(source["path"])
    code = [Path(file).read_bytes() for file in (__file__, template.__file__)]
    made_of = {
        "sources": sources,
        "tokenizer": tokenizer.hash,
        "on_bad_line": on_bad_line,
        "files": files,
        "code": [sha256(text).hexdigest() for text in code],
    }
    if tokenizer.chat_template:
        for name in ("foreign.py", "template_rules.py"):
            text = Path(template.__file__).with_name(name).read_bytes()
            made_of["code"].append(sha256(text).hexdigest())
        made_of["chat_template"] = asdict(tokenizer.chat_template)
    return json.loads(json.dumps(made_of))


def _make(folder: Path, name: str, sources: list[dict], tokenizer, stop: bool,
          made_of: dict) -> dict:
    """Writes a pool and returns its manifest. The old one stays until the new one is whole."""
    if tokenizer.chat_template is None:
        tokenizer.im_start, tokenizer.im_end  # where these are missing it fails here, not on each
                                              # line
    position = ReadPosition()

    def bad_line(where: str, what: str) -> None:
        if stop:
            raise UserError(f"pool {name!r}: {where}: {what} "
                            "(on_bad_line=skip leaves such lines out)")
        position.bad_line(where, what)

    aside = folder / f"{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    conversations = read_conversations(sources, position, bad_line)
    manifest = _write_rows(aside, _tokenize(conversations, tokenizer, bad_line), f"pool {name}")
    manifest |= {
        "bad": position.bad,
        "first_bad": position.first,
        "left_out": position.left_out,
        "made_of": made_of,
    }
    if not manifest["rows"]:
        raise UserError(f"pool {name!r} has no conversation to train on: "
                        f"{_describe_losses(manifest)}; of {sources}")
    write_atomic(aside / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(aside, folder / name)
    return manifest


def _write_rows(folder: Path, conversations: Iterator[list[tuple]], title: str) -> dict[str, int]:
    """Writes a pool's arrays, and counts. conversations: the rows of each; title: of the bar."""
    count = dict.fromkeys(("conversations", "rows", "tokens", "trained", "untrained"), 0)
    with (open(folder / "tokens.bin", "wb") as tokens_file,
          open(folder / "weights.bin", "wb") as weights_file,
          open(folder / "ends.bin", "wb") as ends_file,
          progress_bar(desc=title, unit=" conversations") as bar):
        for rows in conversations:
            bar.update()
            count["conversations"] += 1
            count["untrained"] += not rows
            for tokens, weights in rows:
                count["rows"] += 1
                count["tokens"] += len(tokens)
                count["trained"] += int(np.count_nonzero(weights))
                tokens_file.write(tokens)
                weights_file.write(weights)
                ends_file.write(np.array(count["tokens"], "<i8"))
        for file in (tokens_file, weights_file, ends_file):
            file.flush()
            os.fsync(file.fileno())
    return count


def _tokenize(conversations: Iterator[tuple[str, dict]], tokenizer,
              bad_line: Callable) -> Iterator[list[tuple]]:
    """The trained rows [(tokens, weights)] of each conversation, in order; several at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while batch := list(islice(conversations, BATCH)):
            jobs = [threads.submit(_trained_rows, conversation, tokenizer)
                    for _, conversation in batch]
            for (where, _), job in zip(batch, jobs):
                try:
                    yield job.result()
                except UserError as error:
                    bad_line(where, str(error))


def _trained_rows(conversation: dict, tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weights) of each row of a conversation in which a token is trained."""
    rows = []
    theirs = tokenizer.chat_template
    forgets_turns = theirs is not None and not theirs.keeps_turns
    for messages in one_row_per_turn(conversation["messages"], forgets_turns):
        ids, weights = render_weighted(messages, tokenizer, conversation["tools"])
        weights = np.array(weights, "<f2")
        if weights.any():
            rows.append((np.array(ids, "<u4"), weights))
    return rows


def _describe_losses(manifest: dict) -> str:
    """What a pool's sources have lost, in words."""
    text = f"bad lines: {manifest['bad']:,}"
    if manifest["bad"]:
        text += f" (the first: {manifest['first_bad']})"
    if manifest["untrained"]:
        text += f", conversations without a trained token: {manifest['untrained']:,}"
    if manifest["left_out"]:
        text += f", outside of \"keep\": {manifest['left_out']:,}"
    return text


def _read_manifest(folder: Path) -> dict:
    """A pool's manifest; {} where there is none or a file is not whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for file, (kind, size) in FILES.items():
            n_bytes = np.dtype(kind).itemsize * manifest[size]
            if (folder / f"{file}.bin").stat().st_size != n_bytes:
                return {}
    except (OSError, ValueError, KeyError, TypeError):  # also one that older code wrote
        return {}
    return manifest


def read_pool(folder: Path, tokenizer_hash: str) -> Pool:
    """Opens a pool that `prepare` made.

    UserError if there is no whole one, or if it is another tokenizer's.
    """
    manifest = _read_manifest(folder)
    if not manifest:
        raise UserError(f"no whole pool of conversations in {folder}: prepare it again")
    made_by = manifest["made_of"]["tokenizer"]
    if made_by != tokenizer_hash:
        raise UserError(f"{folder} was made with tokenizer {made_by}, not {tokenizer_hash}: "
                        "prepare it again")
    arrays = {}
    for file, (kind, _) in FILES.items():
        memory_map = np.memmap(folder / f"{file}.bin", kind, "r")
        arrays[file] = np.asarray(memory_map)  # plain arrays are sliced faster
    return Pool(**arrays)
