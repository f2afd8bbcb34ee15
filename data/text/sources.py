"""Where documents come from, always in the same order: files, Hugging Face data sets, this Python.

A source is one of
    {"path": file, folder or glob}      .txt or .md (one document), .jsonl, .parquet, .arrow, .json
                                        (an array, or lines; of a folder, only where it has nothing
                                        else), or one of them + .gz or .zst; here, or at an address
                                        of another store, s3://bucket/folder, gs://…,
                                        hf://datasets/NAME/…, https://…
    {"hf": name, "config", "split", "data_dir", "data_files", "revision"}
                                        a data set of the hub, streamed (or a folder laid out like
                                        one); split is "train" if not given, a revision pins the
                                        data
    {"stdlib": megabytes}               text of the running Python: manual, docstrings, sources
    {"pages": n, "families": {name: weight}, "corrupt": share of faulty ones, "seed": s}
                                        pages of data/tasks
A path or hf source may have
    "column": "text"                    where the text is; of several, [a, b], a blank line comes
                                        between
    "keep": {column: [lowest, highest]} only records that lie in it (None: no bound): a score that
                                        a data set brings cuts it into pools of graded quality
and any source "documents": n or "megabytes": n, which takes its beginning only.

A source is read part by part (its files, or ranges of a large one), a part record by record, so two
numbers say where one stands. What lies elsewhere is fetched in ranges, again where one fails.
Credentials are those of the store's own environment variables (AWS_ACCESS_KEY_ID …, HF_TOKEN).
"""
import ast
import functools
import glob
import gzip
import hashlib
import io
import json
import re
import sys
import sysconfig
import tempfile
import time
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from tqdm import tqdm

from common import UserError
from data.tasks.problem import PAGES
from data.text import decoding
from untrusted import printable

HF_OPTIONS = ("config", "split", "data_dir", "data_files", "revision")  # as `datasets` has them
KINDS = {  # kind of source -> its own settings
    "path": ("column", "keep"),
    "hf": (*HF_OPTIONS, "column", "keep"),
    "stdlib": (),
    "pages": ("families", "corrupt", "seed"),
}
MOST_SHOWN = 20  # files of which the first bad line is shown at once
COUNTS = ("documents", "bad", "empty", "left_out", "duplicates")  # of a file
# Of a broken connection, after 2, 4, 8 … seconds. `datasets` itself has tried each 20 times.
RETRIES = 5
HINTS = {  # word of an error of `datasets` -> what to do
    "gated": ". Accept its terms at https://huggingface.co/datasets/{0}, then `hf auth login`",
    "scripts": ", as {0} is one: convert it elsewhere to .parquet or .jsonl, then give "
               "{{\"path\": folder}}",
    "reach": ". Offline? Fetch it elsewhere with "
             "`hf download --repo-type=dataset {0} --local-dir=FOLDER`, then give "
             "{{\"path\": FOLDER}}",
}


@dataclass(frozen=True)
class Part:
    """What of a source is read in one go: a file, a range of a large one, or all that is made."""
    name: str                 # the file's path or address; of other sources, what errors call it
    bytes: int | None = None  # about; None where nobody knows
    number: int = 0           # of the range, from 0,
    of: int = 1               # of so many in the file
    stream: object = None     # a file of a data set, as `datasets` streams it

    def __str__(self):
        return self.name if self.of == 1 else f"{self.name} (part {self.number + 1} of {self.of})"


@dataclass
class ReadPosition:
    """How far a pool's sources have been read, and what was left out.

    Its asdict() is JSON, from which reading goes on.
    """
    stop: bool = False   # at the first bad line
    quiet: bool = False  # shows no bad line
    source: int = 0      # number of the source,
    part: int = 0        # of its part,
    record: int = 0      # and of the last line or row of that which was read, from 1
    documents: int = 0   # that the source has given,
    bytes: int = 0       # of their text
    number: int = 0      # documents that all sources have given
    bad: int = 0         # lines that the pool's sources have lost so far: malformed
    empty: int = 0       # without text
    left_out: int = 0    # outside of "keep"
    duplicates: int = 0  # of documents that stay elsewhere
    first: str = ""      # the first bad line
    file: str = ""       # the one that is read
    files: dict = field(default_factory=dict)  # of each file, the counts that are not 0 of these
                                               # (COUNTS), and its first bad line

    def count(self, what: str) -> None:
        """Adds one to a count of the file that is read, and to that of all."""
        if what != "documents":  # which are a source's
            setattr(self, what, getattr(self, what) + 1)
        counts = self.files.setdefault(self.file, {})
        counts[what] = counts.get(what, 0) + 1

    def bad_line(self, where: str, what: str) -> None:
        """Counts a bad line of FILE:LINE; shows the first three, and the first of each file.

        UserError where one must stop.
        """
        if self.stop:
            raise UserError(f"{where}: {what} (corpus.on_bad_line=skip leaves such lines out)")
        self.first = self.first or f"{where}: {what}"
        self.count("bad")
        counts = self.files[self.file]
        is_first = "first" not in counts and len(self.files) <= MOST_SHOWN
        counts.setdefault("first", f"{where.removeprefix(self.file).strip(' :')}: {what}")
        if (self.bad <= 3 or is_first) and not self.quiet:
            tqdm.write(f"bad line {where}: {what}", file=sys.stderr)


def invalid_reason(source: dict) -> str:
    """Why a source is not one of those above; "" if it is."""
    kinds = KINDS.keys() & source
    known = {"documents", "megabytes"}.union(*(KINDS[kind] for kind in kinds))
    if len(kinds) != 1 or source.keys() - kinds - known:
        described = [f"\"{kind}\" (may have {', '.join(settings) or 'no more'})"
                     for kind, settings in KINDS.items()]
        return (f"{source} must have one of {', '.join(described)}; "
                "and may have documents or megabytes")
    if re.search("://[^/@]*:[^/@]*@", source.get("path", "")):
        return ("a source's path holds a password: credentials belong into the environment "
                "variables of its store")
    for bounds in source.get("keep", {}).values():
        if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
            return f"keep of {source} must be {{column: [lowest, highest]}}; either may be None"
    if "pages" in source:
        names = {family.partition(":")[0] for family in source.get("families", ())}
        if not names or names - set(PAGES):
            return f"the families of {source} must be some of {', '.join(PAGES)}"
    return ""


# --------------------------------------------------------------------------------------------------
# Documents of a pool

def texts(sources: list[dict], position: ReadPosition, column: str,
          megabytes: float = inf) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a whole .txt file) of each document after `position`, which moves along.

    column: where a source names none. megabytes: limit of each source, beside its own.
    """
    while position.source < len(sources):
        source = {"column": column} | sources[position.source]
        yield from _texts_of_source(source, position, megabytes)
        position.source += 1
        position.part = position.record = position.documents = position.bytes = 0


def _texts_of_source(source: dict, position: ReadPosition,
                     megabytes: float) -> Iterator[tuple[str, bool]]:
    """The texts() of one source, up to its limits."""
    max_documents = source.get("documents", inf)
    max_bytes = 1e6 * min(megabytes, source.get("megabytes", inf), source.get("stdlib", inf))
    columns = text_columns(source)
    needed = [*columns, *source.get("keep", ())]
    all_parts = parts(source, columns=needed)
    while position.part < len(all_parts):
        part = all_parts[position.part]
        position.file = part.name
        is_whole_file = "path" in source and _file_kind(part.name) in WHOLE
        columns_known = position.record > 0
        for number, record in read(source, part, position.record, needed, position.bad_line):
            position.record = number
            if position.documents >= max_documents:
                return
            if not columns_known:
                _check_columns(record, needed, f"{part}:{number}")
                columns_known = True
            text = _text_of_record(source, part, record, position)
            if text is None:
                continue
            position.documents += 1
            position.bytes += len(text.encode("utf-8", "replace"))
            if position.bytes > max_bytes:
                return
            position.number += 1
            position.count("documents")
            yield text, is_whole_file
        position.part += 1
        position.record = 0


def _text_of_record(source: dict, part: Part, record: dict,
                    position: ReadPosition) -> str | None:
    """A record's text; None, counted in `position`, if it has none or "keep" leaves it out."""
    columns = text_columns(source)
    missing = [name for name in [*columns, *source.get("keep", ())] if name not in record]
    values = [record.get(name) for name in columns]
    if missing or not all(isinstance(value, str) for value in values):
        wrong = " or ".join(missing or columns)
        position.bad_line(f"{part}:{position.record}", f"{wrong} is missing or not text")
        return None
    if not kept(record, source):
        position.count("left_out")
        return None
    if not any(values):
        position.count("empty")
        return None
    return "\n\n".join(values)


def _check_columns(record: dict, needed: list[str], where: str) -> None:
    """UserError where a file's first record lacks a column: a wrong setting, not a bad line."""
    missing = [name for name in needed if name not in record]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r}; set corpus.column (or the source's "
                        f"\"column\" or \"keep\") to one of {', '.join(record)}")


def text_columns(source: dict) -> list[str]:
    """Names of the columns that hold the text."""
    column = source.get("column", "text")
    return [column] if isinstance(column, str) else list(column)


def kept(record: dict, source: dict) -> bool:
    """Whether a record lies within the source's "keep"; one without a value does not."""
    try:
        for column, (low, high) in source.get("keep", {}).items():
            value = record.get(column)
            if value is None:
                return False
            if low is not None and not low <= value:  # nan lies nowhere
                return False
            if high is not None and not value <= high:
                return False
    except TypeError as error:
        raise UserError(f"keep of {source} is of another type than its column: "
                        f"{error}") from None
    return True


# --------------------------------------------------------------------------------------------------
# Parts and records, of any source

def parts(source: dict, largest: float = inf, columns: Iterable[str] = ()) -> list[Part]:
    """What of a source is read one after the other; those it names itself, if it does ("parts").

    largest: bytes from which a file is cut into ranges, where its format can be read from within.
    columns: those needed, of a data set.
    """
    if "parts" in source:
        return source["parts"]
    if "path" in source:
        return [part for file in find_files(source["path"]) for part in _ranges(file, largest)]
    if "hf" in source:
        files = _files_of(_stream(source, columns))
        return [Part(f"{source['hf']}, shard {i}", stream=file) for i, file in enumerate(files)]
    if "pages" in source:
        return [Part("pages", bytes=PAGE_BYTES * source["pages"])]
    return [Part("the standard library", bytes=int(1e6 * source["stdlib"]))]


def is_arrow(source: dict, part: Part) -> bool:
    """Whether a source's records come from Arrow, whose objects all have the same fields."""
    return "hf" in source or _file_kind(part.name) in (".parquet", ".arrow")


def _ranges(file: "File", largest: float) -> list[Part]:
    """A file whole, or in equal ranges of `largest` bytes or somewhat less."""
    is_uncut = _is_packed(file.address) or _file_kind(file.address) in UNCUT
    if file.bytes is None or is_uncut:
        return [Part(file.address, file.bytes)]
    n = max(1, -int(-file.bytes // largest))
    return [Part(file.address, file.bytes // n, i, n) for i in range(n)]


def records(source: dict, part: Part | None = None) -> Iterator[dict]:
    """Whole records, all columns, of one of parts(source) or of all.

    Without bad lines and those outside of "keep". A source without columns gives {column: text}.
    Limits are not looked at.
    """
    for each in parts(source) if part is None else [part]:
        for _, record in read(source, each):
            if kept(record, source):
                yield record


def ignore_bad_line(where: str, what: str) -> None:
    """The `bad_line` of one who does not count them."""


def read(source: dict, part: Part, skip: int = 0, columns: list[str] | None = None,
         bad_line: Callable[[str, str], None] = ignore_bad_line) -> Iterator[tuple[int, dict]]:
    """(number from 1, record) of a part's lines or rows after the first `skip`.

    columns: those needed; a format that can reads no other (None: all). bad_line: called with
    (where, what).
    """
    column = text_columns(source)[0]
    if "path" in source:
        yield from _read_file(part, column, skip, columns, bad_line)
    elif "hf" in source:
        yield from _read_stream(part, skip)
    else:
        generated = _pages(source) if "pages" in source else _stdlib_texts()
        for number, text in islice(enumerate(generated, 1), skip, None):
            yield number, {column: text}


# --------------------------------------------------------------------------------------------------
# Files, here or in another store

class File(NamedTuple):
    """A file that was found."""
    address: str  # a path, or PROTOCOL://…
    bytes: int | None  # None where its server does not say
    version: str  # another one where its content may be another: time of change, or the store's tag


WHOLE = (".txt", ".md")  # a document each
KINDS_OF_FILES = (*WHOLE, ".jsonl", ".parquet", ".arrow", ".json")
UNCUT = (".arrow", ".json")  # are read from their beginning
PACKED = (".gz", ".zst")
# Unpacked, a file that must be held whole may have so many times its bytes, or so many at least.
MOST_UNPACKED, MOST_SMALL = 100, 256 << 20
BLANKS = re.compile(r"[\s,]*")
DAMAGE = (OSError, EOFError, zlib.error)  # what unpacking says
VERSION_KEYS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "last_commit")


def _file_kind(address: str) -> str | None:
    """One of KINDS_OF_FILES, also of a .gz or .zst; None for any other file."""
    path = Path(address.lower())
    kind = Path(path.stem).suffix if _is_packed(address) else path.suffix
    return kind if kind in KINDS_OF_FILES else None


def _is_packed(address: str) -> bool:
    return address.lower().endswith(PACKED)


def find_files(where: str) -> list[File]:
    """Sorted files of a name, folder, glob or address, each one of KINDS_OF_FILES or packed.

    A README.md beside a folder's records is the card of a data set, and left out, as is a .json
    beside other files, which describes them. UserError for none.
    """
    if "://" in where:
        files = _retried(where, lambda: _find_elsewhere(where))
    else:
        path = Path(where).expanduser()
        if path.is_dir():
            candidates = path.rglob("*")
        else:
            names = glob.glob(str(path), recursive=True) or [path]  # may hold a glob's signs
            candidates = map(Path, names)
        found = sorted(path for path in candidates if path.is_file() and _file_kind(path.name))
        files = [File(str(path), path.stat().st_size, str(path.stat().st_mtime_ns))
                 for path in found]
    is_folder = not _file_kind(where) and "*" not in where
    if is_folder and any(_file_kind(file.address) not in WHOLE for file in files):
        files = [file for file in files if Path(file.address).name != "README.md"]
    if is_folder and any(_file_kind(file.address) != ".json" for file in files):
        files = [file for file in files if _file_kind(file.address) != ".json"]
    if not files:
        raise UserError(f"no {', '.join(KINDS_OF_FILES)} file (or {' or '.join(PACKED)} of one) at "
                        f"{where}")
    return files


def _find_elsewhere(where: str) -> list[File]:
    """The find_files() of an address: one listing of its store."""
    store, path = _open_store(where)
    if "*" in path:
        found = store.glob(path, detail=True)
    elif _file_kind(path):
        found = {path: store.info(path)}
    else:
        found = store.find(path, detail=True)
    files = []
    for name in sorted(filter(_file_kind, found)):
        info = found[name]
        version = str([str(info[key]) for key in VERSION_KEYS if key in info])
        files.append(File(store.unstrip_protocol(name), info["size"], version))
    return files


def _open_store(address: str) -> tuple:
    """(fsspec's file system, path in it) of an address."""
    try:
        return fsspec.url_to_fs(address)
    except (ImportError, ValueError) as error:  # it says which package is missing
        raise UserError(f"{address} cannot be read: {_one_line(error)}") from None


def _retried(what: str, call: Callable) -> object:
    """What call() returns, tried again with pauses where a connection fails; UserError in the
    end."""
    for tries in range(RETRIES + 1):
        try:
            return call()
        except UserError:
            raise
        except FileNotFoundError as error:
            cause = error.__cause__  # over HTTP fsspec says so of every failure
            if cause is None or getattr(cause, "status", 0) == 404:
                raise UserError(f"{what} is not there") from None
            reason = f"{type(cause).__name__}: {_one_line(cause)}"
        except PermissionError as error:
            raise UserError(f"{what} may not be read: {_one_line(error)}; credentials are those of "
                            "the store's own environment variables") from None
        except Exception as error:  # each store has its own
            reason = f"{type(error).__name__}: {_one_line(error)}"
        if tries < RETRIES:
            tqdm.write(f"{what}: {reason}; trying again in {2 ** (tries + 1)} s", file=sys.stderr)
            time.sleep(2 ** (tries + 1))
    raise UserError(f"{what} broke off ({reason}); run again, and it goes on")


def open_file(address: str) -> BinaryIO:
    """A file's bytes, here or elsewhere, from any place of it."""
    if "://" not in address:
        return open(address, "rb")
    return io.BufferedReader(_Elsewhere(address), FETCHED_BYTES)


FETCHED_BYTES = 1 << 22  # at once, of a file elsewhere


class _Elsewhere(io.RawIOBase):
    """A file of another store, fetched in ranges: a connection that is cut costs one of them."""

    def __init__(self, address: str):
        self.address = address
        self.store, self.path = _open_store(address)
        self.size = _retried(address, lambda: self.store.info(self.path))["size"]
        if self.size is None:
            raise UserError(f"{address}: its server says no size; fetch it yourself")
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        buffer[:end - self.position] = _retried(self.address, lambda: self._fetch(end))
        n_read = end - self.position
        self.position = end
        return n_read

    def _fetch(self, end: int) -> bytes:
        data = self.store.cat_file(self.path, start=self.position, end=end)
        wanted = end - self.position
        if len(data) > wanted:
            raise UserError(f"{self.address}: its server serves no ranges; fetch it yourself")
        if len(data) < wanted:
            raise OSError(f"{len(data)} bytes in place of {wanted}")
        return data


def _unpacked(stored: BinaryIO, part: Part) -> BinaryIO:
    """A file's bytes, unpacked as they are read."""
    if part.name.lower().endswith(".gz"):
        return gzip.open(stored)
    if part.name.lower().endswith(".zst"):
        return io.BufferedReader(pyarrow.CompressedInputStream(stored, "zstd"))
    return stored


def _pieces_of_whole(f: BinaryIO, part: Part, n_stored: int) -> Iterator[bytes]:
    """All bytes of a file in pieces; UserError for a packed one that has no end."""
    most = max(MOST_SMALL, MOST_UNPACKED * n_stored) if _is_packed(part.name) else inf
    n_bytes = 0
    while piece := f.read(1 << 24):
        n_bytes += len(piece)
        if n_bytes > most:
            raise UserError(f"{part} unpacks to more than {most / 1e6:,.0f} MB, {MOST_UNPACKED} "
                            "times its size: unpack it yourself if that is what it is")
        yield piece


def _read_file(part: Part, column: str, skip: int, columns: list[str] | None,
               bad_line: Callable) -> Iterator[tuple[int, dict]]:
    """The read() of one file, or of a range of it."""
    try:
        with open_file(part.name) as stored:
            n_stored = stored.seek(0, io.SEEK_END)
            stored.seek(0)
            f = _unpacked(stored, part)
            kind = _file_kind(part.name)
            if kind == ".jsonl":
                lines = _until_damage(_lines(f, part, n_stored), part, bad_line)
                yield from _read_jsonl(lines, part, skip, bad_line)
            elif kind == ".json":
                yield from _read_json(f, part, n_stored, skip, bad_line)
            elif kind == ".parquet":
                yield from _read_parquet(f, part, n_stored, skip, columns, bad_line)
            elif kind == ".arrow":
                yield from _read_arrow(f, part, skip, bad_line)
            elif skip == 0:
                if part.of == 1:
                    pieces = _pieces_of_whole(decoding.as_utf8(f), part, n_stored)
                else:
                    pieces = _only_lines(_lines(f, part, n_stored), part, bad_line)
                pieces = _until_damage(pieces, part, bad_line)
                text = _decode(b"".join(pieces), part, bad_line)
                if text is not None:
                    yield 1, {column: text}
    except (OSError, EOFError, ValueError, zlib.error, pyarrow.ArrowException) as error:
        reason = printable(str(error)) or type(error).__name__
        raise UserError(f"{part.name} cannot be read: {reason}") from None


def _lines(f: BinaryIO, part: Part, n_stored: int) -> Iterator[bytes | None]:
    """The lines that begin in a part's range of a file, as decoding.lines() gives them.

    A file in UTF-16 or UTF-32 is not cut: its first part has all of it.
    """
    if part.of == 1 or decoding.encoding_of(f.peek(1024)[:1024]) != "utf-8":
        if part.number == 0:
            yield from decoding.lines(decoding.as_utf8(f))
        return
    first, end = (n_stored * i // part.of for i in (part.number, part.number + 1))
    f.seek(max(0, first - 1))
    lines = decoding.lines(f)
    if first:
        next(lines, None)  # the rest of one that began before
    while f.tell() < end:
        yield next(lines)


def _only_lines(lines: Iterator[bytes | None], part: Part,
                bad_line: Callable) -> Iterator[bytes]:
    """The lines of a text, without those that are too long."""
    for number, line in enumerate(lines, 1):
        if line is None:
            bad_line(f"{part}:{number}", f"longer than {decoding.MOST_LINE >> 20} MB")
        else:
            yield line


def _until_damage(lines: Iterator[bytes | None], part: Part,
                  bad_line: Callable) -> Iterator[bytes | None]:
    """The lines, or pieces, of a file; of a packed one that is cut off or torn, those before that
    place."""
    number = 0
    try:
        for line in lines:
            number += 1
            yield line
    except DAMAGE as error:
        if not _is_packed(part.name) or getattr(error, "errno", None):  # of a disk or a network
            raise
        reason = printable(str(error)) or type(error).__name__
        bad_line(f"{part}:{number + 1}", f"the file is cut off or torn here: {reason}")


def _decode(text: bytes, part: Part, bad_line: Callable) -> str | None:
    """The text of a whole file; None, a bad line, for one in an encoding that is not known."""
    try:
        decoded, problem = decoding.decode(text)
    except ValueError as error:
        decoded, problem = None, str(error)
    if problem:
        line, _, what = problem.removeprefix("line ").partition(": ")
        bad_line(f"{part}:{line}", what)
    return decoded


def _read_jsonl(lines: Iterator[bytes | None], part: Part, skip: int,
                bad_line: Callable) -> Iterator[tuple[int, dict]]:
    """Numbers and records of lines after the first `skip`; blank lines are no bad ones."""
    for number, line in islice(enumerate(lines, 1), skip, None):
        if line is None:
            bad_line(f"{part}:{number}", f"longer than {decoding.MOST_LINE >> 20} MB")
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad_line(f"{part}:{number}", f"not JSON: {error}")
            continue
        if not isinstance(record, dict):
            bad_line(f"{part}:{number}", "not a record")
            continue
        yield number, _of_text(record)


def _of_text(record: dict) -> dict:
    """A record of JSON whose texts are texts."""
    for name, value in record.items():
        if isinstance(value, str):
            record[name] = _without_surrogates(value)
    return record


def _read_json(f: BinaryIO, part: Part, n_stored: int, skip: int,
               bad_line: Callable) -> Iterator[tuple[int, dict]]:
    """Numbers and records of a .json: an array, or lines. What follows a malformed element of an
    array is lost."""
    f = decoding.as_utf8(f)
    pieces = _until_damage(_pieces_of_whole(f, part, n_stored), part, bad_line)
    text, problem = decoding.decode(b"".join(pieces))
    if problem:
        bad_line(str(part), problem)
    start = _after_blanks(text, 0)
    if text[start:start + 1] != "[":
        lines = (line.encode("utf-8", "surrogatepass") for line in text.split("\n"))
        yield from _read_jsonl(lines, part, skip, bad_line)
        return
    decoder, place, number = json.JSONDecoder(), start + 1, 0
    while (place := _after_blanks(text, place)) < len(text) and text[place] != "]":
        number += 1
        try:
            record, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            bad_line(f"{part}:{number}", f"not JSON: {error}")
            return
        if number <= skip:
            continue
        if isinstance(record, dict):
            yield number, _of_text(record)
        else:
            bad_line(f"{part}:{number}", "not a record")
    if place >= len(text):
        bad_line(f"{part}:{number + 1}", "the file is cut off here: its array has no end")


def _after_blanks(text: str, place: int) -> int:
    """The place of the next element of an array, or of its end."""
    return BLANKS.match(text, place).end()


def _read_arrow(f: BinaryIO, part: Part, skip: int,
                bad_line: Callable) -> Iterator[tuple[int, dict]]:
    """Numbers and records of an Arrow file, or of a stream, which `datasets` writes."""
    if f.peek(6)[:6] == b"ARROW1" and not _is_packed(part.name):
        file = pyarrow.ipc.open_file(f)
        batches = (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(f))
    number = 0
    try:
        for batch in batches:
            for first in range(0, batch.num_rows, 1024):
                for record in batch.slice(first, 1024).to_pylist():
                    number += 1
                    if number > skip:
                        yield number, record
    except (*DAMAGE, pyarrow.ArrowException) as error:
        reason = printable(str(error)) or type(error).__name__
        bad_line(f"{part}:{number + 1}", f"the file is cut off or torn here: {reason}")


def _without_surrogates(text: str) -> str:
    """The text with U+FFFD for lone surrogates: broken JSON escapes, which are no text."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(f: BinaryIO, part: Part, n_stored: int, skip: int, columns: list[str] | None,
                  bad_line: Callable) -> Iterator[tuple[int, dict]]:
    """Numbers and records of rows after the first `skip`: of the part's share of row groups."""
    with tempfile.TemporaryFile() as unpacked:
        if _is_packed(part.name):  # a Parquet file is read from its end
            unpacked.writelines(_pieces_of_whole(f, part, n_stored))
            f = unpacked
        table = pyarrow.parquet.ParquetFile(f, buffer_size=FETCHED_BYTES)
        if columns and not set(columns) <= set(table.schema_arrow.names):
            columns = None  # a whole record shows what there is
        first, end = (table.num_row_groups * i // part.of for i in (part.number, part.number + 1))
        batches = table.iter_batches(_rows_at_once(table), list(range(first, end)), columns)
        rows = (record for batch in batches for record in batch.to_pylist())
        for number, record in islice(enumerate(rows, 1), skip, None):
            lengths = [len(value) for value in record.values() if isinstance(value, (str, bytes))]
            if max(lengths, default=0) > decoding.MOST_LINE:
                bad_line(f"{part}:{number}", f"longer than {decoding.MOST_LINE >> 20} MB")
                continue
            yield number, record


def _rows_at_once(table: pyarrow.parquet.ParquetFile) -> int:
    """Rows that are unpacked together: 1,024, or fewer where the file says that they are large."""
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(1024, int(decoding.MOST_LINE / max(1, largest))))


# --------------------------------------------------------------------------------------------------
# Hugging Face data sets

def _stream(source: dict, columns: Iterable[str] = ()):
    """A source's data set as a stream of Arrow tables, see _open."""
    options = {key: source[key] for key in ("hf", *HF_OPTIONS) if key in source}
    return _open(json.dumps(options), tuple(columns))


def _files_of(stream) -> list:
    """A stream of each file of a data set. By halves, for each cut takes time with all files."""
    if stream.num_shards == 1:
        return [stream]
    files = []
    for i in range(2):
        files += _files_of(stream.shard(num_shards=2, index=i))
    return files


@functools.cache  # the list of a data set's files is asked for once
def _open(source: str, columns: tuple[str, ...]):
    """A data set as a stream of Arrow tables, of these columns where its format can read some.

    source: its "hf" and HF_OPTIONS, as JSON.
    """
    options = json.loads(source)
    path = options.pop("hf")
    split = options.pop("split", "train")
    import datasets  # takes a second, which only those who stream wait
    try:
        builder = datasets.load_dataset_builder(path, options.pop("config", None), **options)
        stream = builder.as_streaming_dataset(split=split)
        can_choose = columns and hasattr(builder.config, "columns")
        if can_choose and set(columns) <= set(stream.column_names or ()):
            builder.config.columns = list(columns)  # Parquet: embeddings and the like stay there
            stream = builder.as_streaming_dataset(split=split)
        return stream.with_format("arrow")
    except Exception as error:  # what can go wrong has no common base
        what = _one_line(error).rstrip(".")
        hint = next((hint for word, hint in HINTS.items() if word in what), "")
        raise UserError(f"data set {path}: {what}" + hint.format(path)) from None


def _one_line(error: Exception) -> str:
    """The first 300 characters of an error's message, in one line."""
    return " ".join(str(error).split())[:300]


def _read_stream(part: Part, skip: int) -> Iterator[tuple[int, dict]]:
    """The read() of a data set's file; a connection that breaks is taken up again."""
    from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY  # takes a second to load
    where = f"data set {part}"
    tries = 0
    while True:
        try:
            for table in part.stream.skip(skip).iter(batch_size=1000):
                for record in table.to_pylist():
                    skip += 1
                    tries = 0
                    yield skip, record
            return
        except (OSError, *CONNECTION_ERRORS_TO_RETRY) as error:
            what = f"{where} broke off after record {skip} ({type(error).__name__})"
            tries += 1
            if tries > RETRIES:
                raise UserError(f"{what}; run again, and it goes on") from None
            tqdm.write(f"{what}; trying again in {2 ** tries} s", file=sys.stderr)
            time.sleep(2 ** tries)
        except (ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{where} cannot be read: {_one_line(error)}") from None


def licence(source: dict) -> str:
    """The licence that an hf source's card declares, "" for none."""
    _stream(source)  # says what is wrong where there is no such data set
    from huggingface_hub import DatasetCard  # takes a second to load
    card = Path(source["hf"]) / "README.md"
    try:
        declared = DatasetCard.load(card if card.is_file() else source["hf"]).data.to_dict()
    except (OSError, ValueError):
        return ""
    return str(declared.get("license_name") or declared.get("license") or "")


# --------------------------------------------------------------------------------------------------
# What this Python brings

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PAGE_BYTES = 300  # of a textbook page, about
NO_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # folders left out


def _stdlib_texts() -> Iterator[str]:
    """Prose first (licence, language reference, docstrings), then the sources.

    What a Python lacks is left out.
    """
    if (STDLIB / "LICENSE.txt").is_file():
        yield (STDLIB / "LICENSE.txt").read_text(encoding="utf-8")
    try:
        from pydoc_data.topics import topics  # not every Python brings it
        for name in sorted(topics):
            yield topics[name]
    except ImportError:
        pass
    files = [path.relative_to(STDLIB) for path in STDLIB.rglob("*.py")]
    files = [path for path in files if not NO_SOURCES & set(path.parts)]
    files.sort(key=_hash_of_path)  # so that a part is a fair sample
    for path in files:
        yield from _docstrings(path)
    for path in files:
        source = _source(path)
        if source:
            yield source


def _hash_of_path(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode()).digest()


def _source(path: Path) -> str:
    """The text of a module of the standard library, "" if it cannot be read."""
    try:
        with tokenize.open(STDLIB / path) as f:
            return f.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


@functools.cache  # parsing costs more than all else here; the tokenizer's sample reads them too
def _docstrings(path: Path) -> list[str]:
    """Each docstring of a module under the name of what it describes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            tree = ast.parse(_source(path))
    except (SyntaxError, ValueError):
        return []
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                name = f"{module}.{getattr(node, 'name', '')}".strip(".")
                docstrings.append(f"{name}\n\n{text}\n")
    return docstrings


def _pages(source: dict) -> Iterator[str]:
    """Textbook pages, some replaced by their faulty twins, which are spread evenly over all."""
    from data.tasks import pages  # all families of problems, which few sources need

    n = source["pages"]
    share = source.get("corrupt", 0.0)
    seed = source.get("seed", 0)
    clean = pages.documents(source["families"], n, seed, corrupt=False)
    faulty = pages.documents(source["families"], n, seed, corrupt=True)
    if share in (0, 1):
        yield from faulty if share else clean
        return
    for i, (page, twin) in enumerate(zip(clean, faulty)):
        is_faulty = int((i + 1) * share) > int(i * share)
        yield twin if is_faulty else page
