"""Any SFT data set as tokenized conversations: normalized, rendered with their loss mask, kept as a pool on disk.

A source is a path or hf source of data/text/sources.py, whose "column" may be [prompt, response]. A record may be in the
form of OpenAI, ShareGPT or Alpaca, or a pair: `normalize` makes that of data/chat/template.py of all of them.

A pool is a folder: tokens.bin (uint32), weights.bin (float16: each token's weight in the loss, 0 to 1), ends.bin
(int64: one past the last token of each row) and manifest.json. It is made aside and renamed: whole or absent.
The report (arXiv 2512.06266, SFT) names neither its data sets nor their form: our choice.
"""
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np

from common import UserError, write_atomic
from data.chat import template
from data.chat.template import one_row_per_turn, render_weighted
from data.text.sources import find_files, invalid_reason, kept, ReadPosition, read, shards
from progress import progress_bar

MAX_CHARACTERS = 1_000_000  # of a message: such a one is no conversation, and would take minutes
BATCH = 256                 # conversations that wait for the threads

# What a message's "role" (OpenAI) or "from" (ShareGPT) may be.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool",
         "observation": "tool", "function_response": "tool"}
PAIRS = [("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("problem", "solution"),
         ("problem", "generated_solution"), ("input", "output")]


# ---------------------------------------------------------------------------------------------------------------------
# Records

def normalize(record: dict, columns: list[str] | None = None) -> dict:
    """{"messages", "tools"} of a record in any of the forms; columns: [prompt, response], if its keys do not tell.

    A system prompt may stand beside the messages, as "system". Raises ValueError that says what is wrong, with the
    number of the message, from 0. The order of tool calls and results is left to data/chat/template.py.
    """
    raw, messages = _raw_messages(record, columns), []
    if record.get("system") and isinstance(raw[0], dict) and _first(raw[0], "role", "from") != "system":
        raw = [{"role": "system", "content": record["system"]}, *raw]
    for i, message in enumerate(raw):
        try:
            messages.append(_message(message))
            if i and messages[-1]["role"] == "system":
                raise ValueError("is a system message, which must be the first")
        except ValueError as error:
            raise ValueError(f"message {i} {error}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("there is no assistant turn")
    if messages[-1]["role"] == "user":
        raise ValueError("the conversation ends with the user")
    return {"messages": messages, "tools": _objects(record.get("tools") or [], "tools")}


def _raw_messages(record: dict, columns: list[str] | None) -> list:
    """The messages as the record has them, at least one."""
    has = {key for key, value in record.items() if value is not None}  # Arrow gives absent fields as None
    for key in ("messages", "conversations"):
        if key in has and not columns:
            raw = _json(record[key], key)
            if not isinstance(raw, list) or not raw:
                raise ValueError(f"{key} is no list of messages")
            return raw
    if {"instruction", "output"} <= has and not columns:
        prompt, answer = record["instruction"], record["output"]
        if record.get("input"):
            prompt = f"{prompt}\n\n{record['input']}"
    else:
        pair = next((pair for pair in ([columns] if columns else PAIRS) if has.issuperset(pair)), None)
        if not pair:
            wanted = " and ".join(columns or ["known form of a conversation"])
            raise ValueError(f"no {wanted} in the columns {', '.join(sorted(has))}"[:300])
        prompt, answer = record[pair[0]], record[pair[1]]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _message(raw: dict) -> dict:
    """A message in our form; the errors read on after its number."""
    if not isinstance(raw, dict):
        raise ValueError("is no JSON object")
    role, content = (_first(raw, *keys) for keys in (("role", "from"), ("content", "value")))
    if str(role) not in ROLES:
        raise ValueError(f"has the unknown role {role!r:.40}")
    message = {"role": ROLES[role]}
    if message["role"] == "assistant":
        calls = content if role == "function_call" else raw.get("tool_calls")
        message |= _assistant(raw, "" if role == "function_call" else content, _calls(calls))
    elif isinstance(content, str):
        message["content"] = content
    else:
        raise ValueError("has content that is no text")
    size = sum(len(str(message.get(key, ""))) for key in ("content", "reasoning", "tool_calls"))
    if size > MAX_CHARACTERS:
        raise ValueError(f"has {size:,} characters")
    return message


def _assistant(raw: dict, content: str | None, calls: list[dict]) -> dict:
    """What an assistant's message has beside its role. Thoughts may be in its content, as <think>…</think>."""
    content = "" if content is None and calls else content
    reasoning, weight = _first(raw, "reasoning", "reasoning_content") or "", _first(raw, "weight")
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise ValueError("has content or reasoning that is no text")
    if content.lstrip().startswith("<think>"):
        thoughts, end, content = content.lstrip().removeprefix("<think>").partition("</think>")
        if not end:  # an answer that was cut off: it would teach never to stop
            raise ValueError("has thoughts that never end")
        reasoning, content = reasoning or thoughts, content.lstrip("\n")
        if answer := re.fullmatch(r"\s*<answer>(.*)</answer>\s*", content, re.DOTALL):  # AM-DeepSeek-R1
            content = answer[1].strip("\n")
    if not content.strip() and not calls:
        raise ValueError("is an assistant's, and empty")
    fields = {"content": content, "reasoning": reasoning.strip("\n"), "tool_calls": calls}
    fields = {key: value for key, value in fields.items() if value or key == "content"}
    if weight is None:
        return fields
    if not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise ValueError(f"has the weight {weight!r:.40}, which is no number from 0 to 1")
    return fields | {"weight": float(weight)}


def _calls(value: object) -> list[dict]:
    """[{"name", "arguments": dict}] of one call or a list of them, plain or in OpenAI's form, maybe as JSON text."""
    calls = []
    for call in _objects(value or [], "tool calls", "has "):
        call = call.get("function") or call
        name, arguments = (call.get(key) if isinstance(call, dict) else None for key in ("name", "arguments"))
        arguments = _json(arguments, "a tool call's arguments", "has ")
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            raise ValueError("has a tool call without a name, or whose arguments are no JSON object")
        calls.append({"name": name, "arguments": arguments})
    return calls


def _objects(value: object, what: str, has: str = "") -> list[dict]:
    """A list of JSON objects (or one of them), given as such or as JSON text."""
    value = _json(value, what, has)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{has}{what} that are no list of JSON objects")
    return value


def _json(value: object, what: str, has: str = "") -> object:
    """The value, or if it is text what that says as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError(f"{has}{what} that are no JSON: {value!r:.60}") from None


def _first(raw: dict, *keys: str) -> object:
    """The first of these fields that is there, else None."""
    return next((raw[key] for key in keys if raw.get(key) is not None), None)


def conversations(sources: list[dict], place: ReadPosition, bad_line: Callable) -> Iterator[tuple[str, dict]]:
    """("file:line", normalized conversation) of each record; bad_line(where, what) is called for each bad one.

    A source's "documents" counts good ones. place counts what "keep" leaves out.
    """
    def of_source(source: dict) -> Iterator[tuple[str, dict]]:
        for shard in shards(source):
            file = f"{source['hf']}, shard {shard}" if "hf" in source else shard
            for number, record in read(source, shard, bad_line=bad_line):
                if not kept(record, source):
                    place.left_out += 1
                    continue
                try:
                    yield f"{file}:{number}", normalize(record, source.get("column"))
                except ValueError as error:
                    bad_line(f"{file}:{number}", str(error))

    for source in sources:
        yield from islice(of_source(source), source.get("documents"))


# ---------------------------------------------------------------------------------------------------------------------
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
        """(conversations,) int64: tokens of each whose weight is above 0. Reads all the weights once."""
        return np.array([np.count_nonzero(self.conversation(i)[1]) for i in range(len(self.ends))], np.int64)

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights of the i-th."""
        part = slice(self.ends[i] - self.lengths[i], self.ends[i])
        return self.tokens[part], self.weights[part]


FILES = {"tokens": ("<u4", "tokens"), "weights": ("<f2", "tokens"), "ends": ("<i8", "rows")}  # type, size in manifest


def prepare(folder: Path, name: str, sources: list[dict], tokenizer, *, on_bad_line: str = "skip") -> Pool:
    """The pool folder/name, made if it is not there, or if sources, files, tokenizer or this code have changed.

    on_bad_line: "skip" (counted, the first ones shown) or "stop". A row is a conversation or a prefix of it (see
    chat.one_row_per_turn); what has no trained token is left out. Only one process at a time may call it.
    """
    if on_bad_line not in ("skip", "stop"):
        raise UserError(f"on_bad_line is {on_bad_line!r}; it must be 'skip' or 'stop'")
    for source in sources:
        if wrong := invalid_reason(source) or _fault(source):
            raise UserError(f"pool {name!r}: {wrong}")
    files = [path for source in sources if "path" in source for path in find_files(source["path"])]
    made_of = json.loads(json.dumps({
        "sources": sources, "tokenizer": tokenizer.hash, "on_bad_line": on_bad_line,
        "files": [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "code": [sha256(Path(file).read_bytes()).hexdigest() for file in (__file__, template.__file__)]}))
    manifest = _manifest(folder / name)
    ready = manifest.get("made_of") == made_of
    if not ready:
        manifest = _make(folder, name, sources, tokenizer, on_bad_line == "stop", made_of)
    print(f"pool {name}: {'ready, ' * ready}{manifest['rows']:,} rows of {manifest['conversations']:,} conversations, "
          f"{manifest['tokens']:,} tokens, {manifest['trained']:,} of them trained; {_lost(manifest)}")
    return read_pool(folder / name, tokenizer.hash)


def _fault(source: dict) -> str:
    """Why a source of data/text/sources.py is none of conversations; "" if it is."""
    column = source.get("column", ["prompt", "response"])
    if not {"path", "hf"} & source.keys() or "megabytes" in source:
        return f"{source} must be a path or an hf source, whose beginning is given as documents"
    if not isinstance(column, (list, tuple)) or [type(name) for name in column] != [str, str]:
        return f"column of {source} must be [prompt, response]"
    return ""


def _make(folder: Path, name: str, sources: list[dict], tokenizer, stop: bool, made_of: dict) -> dict:
    """Writes a pool and returns its manifest. The old one stays until the new one is whole."""
    tokenizer.im_start, tokenizer.im_end  # a tokenizer that is not made for chats says so here, not on each line
    aside, place = folder / f"{name}.tmp", ReadPosition()
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    count = dict.fromkeys(("conversations", "rows", "tokens", "trained", "untrained"), 0)

    def bad_line(where: str, what: str) -> None:
        if stop:
            raise UserError(f"pool {name!r}: {where}: {what} (on_bad_line=skip leaves such lines out)")
        place.bad_line(where, what)

    with (open(aside / "tokens.bin", "wb") as tokens, open(aside / "weights.bin", "wb") as weights,
          open(aside / "ends.bin", "wb") as ends, progress_bar(desc=f"pool {name}", unit=" conversations") as bar):
        for rows in _tokenized(conversations(sources, place, bad_line), tokenizer, bad_line):
            bar.update()
            count["conversations"] += 1
            count["untrained"] += not rows
            for row_tokens, row_weights in rows:
                count["rows"] += 1
                count["tokens"] += len(row_tokens)
                count["trained"] += int(np.count_nonzero(row_weights))
                tokens.write(row_tokens)
                weights.write(row_weights)
                ends.write(np.array(count["tokens"], "<i8"))
        for file in (tokens, weights, ends):
            file.flush()
            os.fsync(file.fileno())
    manifest = count | {"bad": place.bad, "first_bad": place.first, "left_out": place.left_out, "made_of": made_of}
    if not count["rows"]:
        raise UserError(f"pool {name!r} has no conversation to train on: {_lost(manifest)}; of {sources}")
    write_atomic(aside / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(aside, folder / name)
    return manifest


def _tokenized(stream: Iterator[tuple[str, dict]], tokenizer, bad_line: Callable) -> Iterator[list[tuple]]:
    """The trained rows [(tokens, weights)] of each conversation, in order; several are tokenized at a time."""
    def rows(conversation: dict) -> list[tuple]:
        rendered = [render_weighted(messages, tokenizer, conversation["tools"])
                    for messages in one_row_per_turn(conversation["messages"])]
        rows = [(np.array(ids, "<u4"), np.array(weights, "<f2")) for ids, weights in rendered]
        return [(tokens, weights) for tokens, weights in rows if weights.any()]

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while batch := list(islice(stream, BATCH)):
            jobs = [threads.submit(rows, conversation) for _, conversation in batch]
            for (where, _), job in zip(batch, jobs):
                try:
                    yield job.result()
                except UserError as error:
                    bad_line(where, str(error))


def _lost(manifest: dict) -> str:
    return (f"bad lines: {manifest['bad']:,}" + f" (the first: {manifest['first_bad']})" * bool(manifest["bad"])
            + f", conversations without a trained token: {manifest['untrained']:,}" * bool(manifest["untrained"])
            + f", outside of \"keep\": {manifest['left_out']:,}" * bool(manifest["left_out"]))


def _manifest(folder: Path) -> dict:
    """A pool's manifest; {} where there is none or a file is not whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        whole = all((folder / f"{file}.bin").stat().st_size == np.dtype(kind).itemsize * manifest[size]
                    for file, (kind, size) in FILES.items())
    except (OSError, ValueError):
        return {}
    return manifest if whole else {}


def read_pool(folder: Path, tokenizer_hash: str) -> Pool:
    """Opens a pool that `prepare` made. UserError if there is no whole one, or if it is another tokenizer's."""
    manifest = _manifest(folder)
    if not manifest:
        raise UserError(f"no whole pool of conversations in {folder}: prepare it again")
    if (made_by := manifest["made_of"]["tokenizer"]) != tokenizer_hash:
        raise UserError(f"{folder} was made with tokenizer {made_by}, not {tokenizer_hash}: prepare it again")
    return Pool(**{file: np.asarray(np.memmap(folder / f"{file}.bin", kind, "r"))  # plain arrays are sliced faster
                   for file, (kind, _) in FILES.items()})
