"""Where documents come from, always in the same order: files, Hugging Face data sets, and what this Python brings.

A source is one of
    {"path": file, folder or glob}      .txt (one document), .jsonl, .parquet, or one of them + .gz
    {"hf": name, "config", "split", "data_dir", "data_files", "revision"}   a data set of the hub, streamed (or a folder
                                        laid out like one); split is "train" if not given, a revision pins the data
    {"stdlib": megabytes}               text of the running Python: manual, docstrings, sources
    {"pages": n, "families": {name: weight}, "corrupt": share of faulty ones, "seed": s}    pages of data/tasks
A path or hf source may have
    "column": "text"                    where the text is; of several, [a, b], a blank line comes between
    "keep": {column: [lowest, highest]} only records that lie in it (None: no bound): a score that a data set brings
                                        cuts it into pools of graded quality
and any source "documents": n or "megabytes": n, which takes its beginning only.

A source is read shard by shard (its files), a shard record by record, so two numbers say where one stands.
"""
import ast
import functools
import glob
import gzip
import hashlib
import json
import shutil
import sys
import sysconfig
import tempfile
import time
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import inf
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from common import UserError
from data.tasks.registry import PAGES

HF_OPTIONS = ("config", "split", "data_dir", "data_files", "revision")  # as `datasets` has them
KINDS = {"path": ("column", "keep"), "hf": (*HF_OPTIONS, "column", "keep"), "stdlib": (),
         "pages": ("families", "corrupt", "seed")}
RETRIES = 5  # of a broken stream, after 2, 4, 8 … seconds without a record; `datasets` itself has tried each 20 times
HINTS = {  # word of an error of `datasets` -> what to do
    "gated": ". Accept its terms at https://huggingface.co/datasets/{0}, then `hf auth login`",
    "scripts": ", as {0} is one: convert it elsewhere to .parquet or .jsonl, then give {{\"path\": folder}}",
    "reach": ". Offline? Fetch it elsewhere with `hf download --repo-type=dataset {0} --local-dir=FOLDER`, then give "
             "{{\"path\": FOLDER}}",
}


@dataclass
class ReadPosition:
    """How far a pool's sources have been read, and what was left out. Its asdict() is JSON, at which one goes on."""
    stop: bool = False   # at the first bad line
    quiet: bool = False
    source: int = 0      # number of the source,
    shard: int = 0       # of its shard,
    record: int = 0      # and of the last line or row of that which was read, from 1
    documents: int = 0   # that the source has given
    bytes: int = 0       # of their text
    bad: int = 0         # lines that the pool's sources have lost so far: malformed
    empty: int = 0       # without text
    left_out: int = 0    # outside of "keep"
    first: str = ""      # the first bad line

    def bad_line(self, where: str, what: str) -> None:
        if self.stop:
            raise UserError(f"{where}: {what} (corpus.on_bad_line=skip leaves such lines out)")
        self.bad += 1
        self.first = self.first or f"{where}: {what}"
        if self.bad <= 3 and not self.quiet:
            tqdm.write(f"bad line {where}: {what}", file=sys.stderr)


def invalid_reason(source: dict) -> str:
    """Why a source is not one of those above; "" if it is."""
    kinds = KINDS.keys() & source
    if len(kinds) != 1 or source.keys() - kinds - {*KINDS[min(kinds)], "documents", "megabytes"}:
        return (f"{source} must have one of " + ", ".join(f"\"{kind}\" (may have {', '.join(more) or 'no more'})"
                for kind, more in KINDS.items()) + "; and may have documents or megabytes")
    if not all(isinstance(bounds, (list, tuple)) and len(bounds) == 2 for bounds in source.get("keep", {}).values()):
        return f"keep of {source} must be {{column: [lowest, highest]}}; either may be None"
    names = {family.partition(":")[0] for family in source.get("families", ())}
    if "pages" in source and (not names or names - set(PAGES)):
        return f"the families of {source} must be some of {', '.join(PAGES)}"
    return ""


def texts(sources: list[dict], place: ReadPosition, column: str, megabytes: float = inf) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a whole .txt file) of each document after `place`, which moves along.

    column: where a source names none. megabytes: limit of each source, beside its own.
    """
    while place.source < len(sources):
        yield from _texts({"column": column} | sources[place.source], place, megabytes)
        place.source += 1
        place.shard = place.record = place.documents = place.bytes = 0


def _texts(source: dict, place: ReadPosition, megabytes: float) -> Iterator[tuple[str, bool]]:
    most = 1e6 * min(megabytes, source.get("megabytes", inf), source.get("stdlib", inf))
    names, parts = text_columns(source), shards(source)
    needed = [*names, *source.get("keep", ())]
    while place.shard < len(parts):
        part = parts[place.shard]
        where = f"{source['hf']}, shard {part}" if "hf" in source else part
        whole_file, known = "path" in source and _kind(part) == ".txt", place.record > 0
        for place.record, record in read(source, part, place.record, needed, place.bad_line):
            if place.documents >= source.get("documents", inf):
                return
            missing = [name for name in needed if name not in record]
            if missing and not known:  # a wrong setting, not a bad line
                raise UserError(f"{where}:{place.record}: no column {missing[0]!r}; set corpus.column (or the source's "
                                f"\"column\" or \"keep\") to one of {', '.join(record)}")
            known, text = True, [record.get(name) for name in names]
            if missing or not all(isinstance(value, str) for value in text):
                place.bad_line(f"{where}:{place.record}", f"{' or '.join(missing or names)} is missing or not text")
            elif not kept(record, source):
                place.left_out += 1
            elif not any(text):
                place.empty += 1
            else:
                text = "\n\n".join(text)
                place.documents += 1
                place.bytes += len(text.encode("utf-8", "replace"))
                if place.bytes > most:
                    return
                yield text, whole_file
        place.shard += 1
        place.record = 0


def text_columns(source: dict) -> list[str]:
    column = source.get("column", "text")
    return [column] if isinstance(column, str) else list(column)


def kept(record: dict, source: dict) -> bool:
    """Whether a record lies within the source's "keep"; one without a value does not."""
    try:
        return all((value := record.get(column)) is not None and (low is None or low <= value)
                   and (high is None or value <= high) for column, (low, high) in source.get("keep", {}).items())
    except TypeError as error:
        raise UserError(f"keep of {source} is of another type than its column: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Shards and records, of any source

def shards(source: dict) -> list:
    """The parts of a source that are read one after the other: files of a path, numbers of a data set's files."""
    if "path" in source:
        return find_files(source["path"])
    return list(range(_stream(source).num_shards if "hf" in source else 1))


def records(source: dict, shard: Path | int | None = None) -> Iterator[dict]:
    """Whole records, all columns, of one of shards(source) or of all, but bad lines and those outside of "keep".

    A source without columns gives {column: text}. Limits are not looked at.
    """
    for part in shards(source) if shard is None else [shard]:
        yield from (record for _, record in read(source, part) if kept(record, source))


def read(source: dict, shard: Path | int, skip: int = 0, columns: list[str] | None = None,
         bad_line: Callable = lambda where, what: None) -> Iterator[tuple[int, dict]]:
    """(number from 1, record) of a shard's lines or rows after the first `skip`.

    columns: those needed; a format that can reads no other (None: all). bad_line: called with (where, what).
    """
    column = text_columns(source)[0]
    if "path" in source:
        yield from _read_file(shard, column, skip, columns, bad_line)
    elif "hf" in source:
        yield from _read_stream(source, shard, skip, columns)
    else:
        made = _pages(source) if "pages" in source else _stdlib_texts()
        yield from islice(((number, {column: text}) for number, text in enumerate(made, 1)), skip, None)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def _kind(path: Path) -> str | None:
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    return kind if kind in (".txt", ".jsonl", ".parquet") else None


def find_files(where: str) -> list[Path]:
    """Sorted .txt, .jsonl, .parquet files (or .gz of them) of a file name, folder or glob; UserError for none."""
    path = Path(where).expanduser()
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True) or [path])
    files = sorted(p for p in found if p.is_file() and _kind(p))
    if not files:
        raise UserError(f"no .txt, .jsonl or .parquet file (or .gz of one) at {where}")
    return files


def _read_file(path: Path, column: str, skip: int, columns: list[str] | None, bad_line: Callable) -> Iterator:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as f:
            if _kind(path) == ".jsonl":
                yield from _read_jsonl(f, path, skip, bad_line)
            elif _kind(path) == ".parquet":
                yield from _read_parquet(f, path, skip, columns)
            elif not skip:
                yield 1, {column: _decode(f.read(), path, bad_line)}
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _decode(text: bytes, path: Path, bad_line: Callable) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        bad_line(f"{path}:{line}", "not UTF-8; such bytes become U+FFFD")
        return text.decode("utf-8-sig", errors="replace")


def _read_jsonl(f: Iterable[bytes], path: Path, skip: int, bad_line: Callable) -> Iterator[tuple[int, dict]]:
    for number, line in islice(enumerate(f, 1), skip, None):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            bad_line(f"{path}:{number}", f"not JSON: {error}")
            continue
        if isinstance(record, dict):  # broken escapes leave lone surrogates, which are no text
            yield number, {name: value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                           if isinstance(value, str) else value for name, value in record.items()}
        elif line.strip():
            bad_line(f"{path}:{number}", "not a record")


def _read_parquet(f, path: Path, skip: int, columns: list[str] | None) -> Iterator[tuple[int, dict]]:
    with tempfile.TemporaryFile() as plain:
        if path.suffix.lower() == ".gz":  # a Parquet file is read from its end
            shutil.copyfileobj(f, plain)
            f = plain
        table = pyarrow.parquet.ParquetFile(f, buffer_size=1 << 20)
        found = set(columns or ()) <= set(table.schema_arrow.names)  # else a whole record shows what there is
        batches = table.iter_batches(batch_size=1024, columns=columns if found else None)
        yield from islice(enumerate((record for batch in batches for record in batch.to_pylist()), 1), skip, None)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face data sets

def _stream(source: dict, columns: list[str] | None = None):
    return _open(json.dumps({key: source[key] for key in ("hf", *HF_OPTIONS) if key in source}), tuple(columns or ()))


@functools.cache  # the list of a data set's files is asked for once, not once a shard
def _open(source: str, columns: tuple[str, ...]):
    """A data set as a stream of Arrow tables, of these columns where its format can read some alone."""
    options = json.loads(source)
    path, split = options.pop("hf"), options.pop("split", "train")
    import datasets  # takes a second, which only those who stream wait
    try:
        builder = datasets.load_dataset_builder(path, options.pop("config", None), **options)
        stream = builder.as_streaming_dataset(split=split)
        if columns and hasattr(builder.config, "columns") and set(columns) <= set(stream.column_names or ()):
            builder.config.columns = list(columns)  # Parquet: embeddings and the like stay where they are
            stream = builder.as_streaming_dataset(split=split)
        return stream.with_format("arrow")
    except Exception as error:  # what can go wrong has no common base
        what = " ".join(str(error).split())[:300].rstrip(".")
        hint = next((hint for word, hint in HINTS.items() if word in what), "")
        raise UserError(f"data set {path}: {what}" + hint.format(path)) from None


def _read_stream(source: dict, shard: int, skip: int, columns: list[str] | None) -> Iterator[tuple[int, dict]]:
    from datasets.utils.file_utils import CONNECTION_ERRORS_TO_RETRY
    stream, tries, where = _stream(source, columns), 0, f"data set {source['hf']}, shard {shard}"
    while True:
        try:
            for table in stream.shard(num_shards=stream.num_shards, index=shard).skip(skip).iter(batch_size=1000):
                for record in table.to_pylist():
                    skip, tries = skip + 1, 0
                    yield skip, record
            return
        except (OSError, *CONNECTION_ERRORS_TO_RETRY) as error:
            what, tries = f"{where} broke off after record {skip} ({type(error).__name__})", tries + 1
            if tries > RETRIES:
                raise UserError(f"{what}; run again, and it goes on") from None
            tqdm.write(f"{what}; trying again in {2 ** tries} s", file=sys.stderr)
            time.sleep(2 ** tries)
        except (ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None


def licence(source: dict) -> str:
    """The licence that an hf source's card declares, "" for none."""
    _stream(source)  # says what is wrong where there is no such data set
    from huggingface_hub import DatasetCard
    card = Path(source["hf"]) / "README.md"
    try:
        declared = DatasetCard.load(card if card.is_file() else source["hf"]).data.to_dict()
    except (OSError, ValueError):
        return ""
    return str(declared.get("license_name") or declared.get("license") or "")


# ---------------------------------------------------------------------------------------------------------------------
# What this Python brings

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def _stdlib_texts() -> Iterator[str]:
    """Prose first (licence, language reference, docstrings), then the sources. What a Python lacks is left out."""
    if (STDLIB / "LICENSE.txt").is_file():
        yield (STDLIB / "LICENSE.txt").read_text(encoding="utf-8")
    try:
        from pydoc_data.topics import topics
        yield from (topics[name] for name in sorted(topics))
    except ImportError:
        pass
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [path.relative_to(STDLIB) for path in STDLIB.rglob("*.py")]
    files = [path for path in files if not skipped & set(path.parts)]
    files.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())  # so that a part is a fair sample
    for path in files:
        yield from _docstrings(path)
    yield from filter(None, map(_source, files))


def _source(path: Path) -> str:
    try:
        with tokenize.open(STDLIB / path) as f:
            return f.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


@functools.cache  # parsing costs more than all else here, and the tokenizer's sample reads them too
def _docstrings(path: Path) -> list[str]:
    """Each docstring of a module under the name of what it describes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old modules
            nodes = ast.walk(ast.parse(_source(path)))
    except (SyntaxError, ValueError):
        return []
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    nodes = [n for n in nodes if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    return [f"{module}.{getattr(n, 'name', '')}".strip(".") + f"\n\n{text}\n"
            for n in nodes if (text := ast.get_docstring(n))]


def _pages(source: dict) -> Iterator[str]:
    """Textbook pages; the faulty ones, each the twin of the page that it replaces, are spread evenly over them."""
    from data.tasks import pages  # the families, which only those load who make pages of them

    n, share = source["pages"], source.get("corrupt", 0.0)
    good, bad = (pages.documents(source["families"], n, source.get("seed", 0), corrupt=c) for c in (False, True))
    if share in (0, 1):
        yield from bad if share else good
    else:
        for i, twins in enumerate(zip(good, bad)):
            yield twins[int((i + 1) * share) > int(i * share)]
