"""Prepares the corpus: `python -m data.corpus configs/tiny.py` makes the tokenizer and every pool's shards.

Layout under out/<run>/data/: tokenizer.json, and for each pool a folder with train_00000.bin …, val_00000.bin … and
manifest.json. A shard is a 64-byte header (`HEADER`), the documents' ends (uint64, counted in tokens), then the tokens:
`<s> text <|endoftext|>` for each document, as uint16 where the vocabulary has at most 65,536 ids, else as uint32.

The documents of a pool are a deterministic stream, so a manifest rewritten after each shard is all the state there is:
a killed run skips the documents that its whole shards hold and goes on, to the same bytes as an unbroken run.
The report (arXiv 2512.06266, section 2) describes neither its shards nor a held-out set: our choice.
"""
import ast
import functools
import glob
import gzip
import hashlib
import json
import os
import shutil
import struct
import sys
import sysconfig
import tempfile
import tokenize
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

import common
import data.tasks
from common import UserError
from data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer


@dataclass
class CorpusConfig:
    """Pools and how they are cut. A source of a pool is one of
    {"path": file, folder or glob, "column": "text"}    .txt (one document), .jsonl, .parquet, or one of them + .gz
    {"stdlib": megabytes}                               text of the running Python: manual, docstrings, sources
    {"pages": n, "families": {name: weight}, "corrupt": share of faulty ones, "seed": s}    pages of data/tasks
    """
    pools: dict = field(default_factory=dict)  # pool name -> list of its sources
    folder: str = ""               # where tokenizer and shards lie, for runs that share them (default: out/<run>/data)
    path: str = ""                 # own data: a file, folder or glob that becomes the only pool, "text"
    column: str = "text"           # where .jsonl and .parquet hold the text
    val_fraction: float = 0.02     # share of the documents held out (of a .txt file: its end)
    shard_tokens: int = 20_000_000  # tokens in a shard; one shard a split is held in memory
    on_bad_line: str = "skip"      # "skip" malformed lines (counted, the first ones shown) or "stop" at the first
    threads: int = 4               # that tokenize


# ---------------------------------------------------------------------------------------------------------------------
# Sources: where documents come from, always in the same order

@dataclass
class Notes:
    """What was left out of a pool."""
    stop: bool           # at the first bad line
    quiet: bool = False
    bad: int = 0
    empty: int = 0
    first: str = ""      # the first bad line

    def bad_line(self, where: str, what: str) -> None:
        if self.stop:
            raise UserError(f"{where}: {what} (corpus.on_bad_line=skip leaves such lines out)")
        self.bad += 1
        self.first = self.first or f"{where}: {what}"
        if self.bad <= 3 and not self.quiet:
            tqdm.write(f"bad line {where}: {what}", file=sys.stderr)


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


def _read_file(path: Path, column: str, notes: Notes) -> Iterator[str]:
    """The texts of one file."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as f:
            if _kind(path) == ".txt":
                yield _decode(f.read(), path, notes)
            elif _kind(path) == ".jsonl":
                yield from _read_jsonl(f, path, column, notes)
            else:
                yield from _read_parquet(f, path, column, notes)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _decode(text: bytes, path: Path, notes: Notes) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        notes.bad_line(f"{path}:{line}", "not UTF-8; such bytes become U+FFFD")
        return text.decode("utf-8-sig", errors="replace")


def _read_jsonl(f: Iterable[bytes], path: Path, column: str, notes: Notes) -> Iterator[str]:
    seen = False  # a whole record
    for number, line in enumerate(f, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            notes.bad_line(f"{path}:{number}", f"not JSON: {error}")
            continue
        if isinstance(record, dict) and isinstance(record.get(column), str):
            # Broken escapes leave lone surrogates, which are no text.
            yield record[column].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        elif isinstance(record, dict) and column not in record and not seen:  # a wrong setting, not a bad line
            raise UserError(_no_column(f"{path}:{number}", column, record))
        elif line.strip():
            notes.bad_line(f"{path}:{number}", f"{column!r} is missing or not text")
        seen = seen or isinstance(record, dict)


def _read_parquet(f, path: Path, column: str, notes: Notes) -> Iterator[str]:
    with tempfile.TemporaryFile() as plain:
        if path.suffix.lower() == ".gz":  # a Parquet file is read from its end
            shutil.copyfileobj(f, plain)
            f = plain
        table = pyarrow.parquet.ParquetFile(f, buffer_size=1 << 20)
        if column not in table.schema_arrow.names:
            raise UserError(_no_column(path, column, table.schema_arrow.names))
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield text
                else:
                    notes.bad_line(f"{path}:{number}", f"{column!r} is {type(text).__name__}, not text")


def _no_column(where: Path | str, column: str, names: Iterable[str]) -> str:
    return f"{where}: no column {column!r}; set corpus.column (or the source's \"column\") to one of {', '.join(names)}"


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
    n, share = source["pages"], source.get("corrupt", 0.0)
    good, bad = (data.tasks.documents(source["families"], n, source.get("seed", 0), corrupt=c) for c in (False, True))
    if share in (0, 1):
        yield from bad if share else good
    else:
        for i, twins in enumerate(zip(good, bad)):
            yield twins[int((i + 1) * share) > int(i * share)]


def _texts(source: dict, column: str, notes: Notes) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a whole .txt file) for each document of a source."""
    if "path" in source:
        for path in find_files(source["path"]):
            for text in _read_file(path, source.get("column", column), notes):
                yield text, _kind(path) == ".txt"
    elif "stdlib" in source:
        left = source["stdlib"] * 1e6
        for text in _stdlib_texts():
            left -= len(text.encode("utf-8", "replace"))
            if left < 0:
                return
            yield text, False
    else:
        yield from ((text, False) for text in _pages(source))


def documents(sources: list[dict], cfg: CorpusConfig, notes: Notes) -> Iterator[tuple[str, str]]:
    """(split, text) of a pool. The text's hash decides the split, so that no copy of a held-out document is trained."""
    trained = False
    for source in sources:
        for text, whole_file in _texts(source, cfg.column, notes):
            if not text:
                notes.empty += 1
            elif whole_file:
                cut = len(text) - int(len(text) * cfg.val_fraction)
                trained = True
                yield "train", text[:cut]
                if text[cut:]:
                    yield "val", text[cut:]
            else:
                digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
                held_out = int.from_bytes(digest[:8]) < cfg.val_fraction * 2**64
                trained = trained or not held_out
                yield "val" if held_out else "train", text
    if not trained:
        raise UserError(f"no documents to train on in {sources}: {notes.empty} empty, {notes.bad} bad lines"
                        + (f", the first {notes.first}" if notes.first else ""))


def pools_of(cfg: CorpusConfig) -> dict[str, list[dict]]:
    """The pools of a config, checked; the user's own path replaces them all."""
    pools = {"text": [{"path": cfg.path}]} if cfg.path else cfg.pools
    if not pools:
        raise UserError("the corpus is empty: give corpus.pools, or your own text by --corpus.path=FILE")
    if not 0 <= cfg.val_fraction < 1 or cfg.shard_tokens < 1 or cfg.threads < 1:
        raise UserError("corpus: val_fraction must be in [0, 1), shard_tokens and threads at least 1")
    if cfg.on_bad_line not in ("skip", "stop"):
        raise UserError(f"corpus.on_bad_line is {cfg.on_bad_line!r}; it must be 'skip' or 'stop'")
    kinds = [{"path", "column"}, {"stdlib"}, {"pages", "families", "corrupt", "seed"}]
    for name, source in ((name, source) for name, sources in pools.items() for source in sources):
        if len({"path", "stdlib", "pages"} & set(source)) != 1 or not any(set(source) <= kind for kind in kinds):
            raise UserError(f"pool {name!r}: {source} must have \"path\" (and column), \"stdlib\", "
                            f"or \"pages\" (and families, corrupt, seed)")
        known = data.tasks.PAGES
        names = {family.partition(":")[0] for family in source.get("families", ())}
        if "pages" in source and (not names or names - set(known)):
            raise UserError(f"pool {name!r}: the families of {source} must be some of {', '.join(known)}")
    return pools


# ---------------------------------------------------------------------------------------------------------------------
# Shards

HEADER = struct.Struct("<8sIIQQQ16s8x")  # magic, version, bytes a token, n_vocab, n_documents, n_tokens, tokenizer hash
MAGIC, VERSION = b"nbgshard", 1


@dataclass(frozen=True)
class Shard:
    """One shard file. Nothing is read before `ends` or `tokens` is asked for."""
    path: Path
    n_documents: int
    n_tokens: int
    dtype: str  # "<u2" or "<u4"

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """(n_documents,) uint64, memory-mapped: one past the last token of each document."""
        return np.memmap(self.path, "<u8", "r", HEADER.size, (self.n_documents,))

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) uint16 or uint32, memory-mapped."""
        return np.memmap(self.path, self.dtype, "r", HEADER.size + 8 * self.n_documents, (self.n_tokens,))


def read_pool(folder: Path, split: str, tokenizer_hash: str,
              command: str = "python -m data.corpus CONFIG") -> list[Shard]:
    """The shards of a pool's split ("train" or "val"), checked without reading them through.

    command: what makes the pool if there is none yet. Raises UserError that names the file and the command to run.
    """
    manifest = _read_manifest(folder)
    if not manifest:
        raise UserError(f"no data in {folder}: prepare it with `{command}`")
    again = f"make it again with `{manifest['command']}`"
    if not manifest["complete"]:
        raise UserError(f"{folder} is not finished: `{manifest['command']}` goes on with it")
    if manifest["tokenizer"] != tokenizer_hash:
        raise UserError(f"{folder} was made with tokenizer {manifest['tokenizer']}, not {tokenizer_hash}: {again}")
    shards = []
    for entry in manifest["shards"]:
        if entry["split"] == split:
            path = folder / entry["file"]
            if fault := _fault(path, entry):
                raise UserError(f"{path} {fault}: {again}")
            with open(path, "rb") as f:
                magic, version, width, _, n_documents, n_tokens, made_by = HEADER.unpack(f.read(HEADER.size))
            found = magic, version, n_documents, n_tokens, made_by
            if found != (MAGIC, VERSION, entry["documents"], entry["tokens"], tokenizer_hash.encode()):
                raise UserError(f"{path} has a header unlike its manifest: delete it, then {again}")
            shards.append(Shard(path, n_documents, n_tokens, f"<u{width}"))
    return shards


def verify(folder: Path) -> int:
    """Reads every shard of a pool against its checksum; returns their number. UserError names one that differs."""
    manifest = _read_manifest(folder)
    if not manifest:
        raise UserError(f"no data in {folder}: nothing to verify")
    for entry in tqdm(manifest["shards"], desc=f"verify {folder.name}", unit="shard"):
        path = folder / entry["file"]
        fault = _fault(path, entry)
        if not fault:
            with open(path, "rb") as f:
                fault = hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"] and "differs from its checksum"
        if fault:
            raise UserError(f"{path} {fault}: delete it, then make it again with `{manifest['command']}`")
    return len(manifest["shards"])


def _fault(path: Path, entry: dict) -> str:
    """What is wrong with a shard's file at a glance: "" if nothing."""
    size = path.stat().st_size if path.is_file() else None
    if size == entry["bytes"]:
        return ""
    return "is missing" if size is None else f"is truncated ({size} bytes of {entry['bytes']})"


def _read_manifest(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'manifest.json'} cannot be read ({error}): delete it, prepare again") from None


def _write(path: Path, *parts) -> None:
    """Writes a file aside, flushes it to the disk, renames it: whole or absent, also when the disk is full."""
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as f:
            for part in parts:
                f.write(part)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror}; mend it and run again, nothing is lost") from None


class _Open:
    """A shard that is being filled."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.dtype = tokenizer, "<u2" if tokenizer.n_vocab <= 65536 else "<u4"
        self.documents, self.ends, self.text_bytes = [], [], 0
        self.n_tokens = 0

    def add(self, text: str, ids: np.ndarray) -> None:
        document = np.empty(len(ids) + 2, self.dtype)
        document[0], document[1:-1], document[-1] = self.tokenizer.bos, ids, self.tokenizer.eot
        self.n_tokens += len(document)
        self.documents.append(document)
        self.ends.append(self.n_tokens)
        self.text_bytes += len(text.encode("utf-8", "replace"))

    def write(self, path: Path, split: str) -> dict:
        """Writes the shard; returns its entry in the manifest."""
        header = HEADER.pack(MAGIC, VERSION, int(self.dtype[2]), self.tokenizer.n_vocab, len(self.ends), self.n_tokens,
                             self.tokenizer.hash.encode())
        parts = [header, np.array(self.ends, "<u8"), *self.documents]
        _write(path, *parts)
        checksum = hashlib.sha256()
        for part in parts:
            checksum.update(part)
        return {"file": path.name, "split": split, "documents": len(self.ends), "tokens": self.n_tokens,
                "text_bytes": self.text_bytes, "bytes": path.stat().st_size, "sha256": checksum.hexdigest()}


def _state(sources: list[dict]) -> list:
    """What the sources' text depends on beside their settings; changes of it re-make the pool."""
    state = []
    for source in sources:
        if "path" in source:
            state += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in find_files(source["path"])]
        elif "stdlib" in source:
            state.append(sys.version)
        else:
            code = sorted(Path(data.tasks.__file__).parent.glob("*.py"))
            state.append([path.read_text(encoding="utf-8") for path in code if not path.name.startswith("test_")])
    return state


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _batches(stream: Iterator[tuple[str, str]], skip: dict[str, int], bar: tqdm) -> Iterator[list[tuple[str, str]]]:
    """Documents in batches that are worth the threads, without the first skip[split] of each split."""
    batch, size = [], 0
    for split, text in stream:
        n = len(text.encode("utf-8", "replace"))
        bar.update(n)
        if skip[split]:
            skip[split] -= 1
            continue
        batch.append((split, text))
        size += n
        if size > 4e6 or len(batch) == 4096:
            yield batch
            batch, size = [], 0
    yield batch


def prepare_pool(folder: Path, sources: list[dict], tokenizer: Tokenizer, cfg: CorpusConfig, command: str) -> dict:
    """Makes a pool's shards, or goes on with them, or does nothing where they are whole; returns the manifest."""
    name = folder.name
    settings = _hash([VERSION, tokenizer.hash, sources, _state(sources),
                      cfg.column, cfg.val_fraction, cfg.shard_tokens, cfg.on_bad_line])
    manifest = _read_manifest(folder)
    if manifest and manifest["settings"] != settings:
        print(f"pool {name}: settings, sources or tokenizer changed; it is made again")
        manifest = None
    if manifest is None:
        for path in [folder / "manifest.json", *folder.glob("train_*.bin"), *folder.glob("val_*.bin")]:
            path.unlink(missing_ok=True)  # the manifest first: shards are never without their own
        manifest = {"settings": settings, "tokenizer": tokenizer.hash, "complete": False, "shards": []}
    for path in folder.glob("*.tmp"):
        path.unlink()
    whole, broken = [], set()
    for entry in manifest["shards"]:  # of each split, those before the first fault
        if _fault(folder / entry["file"], entry):
            broken.add(entry["split"])
        if entry["split"] not in broken:
            whole.append(entry)
    if manifest["complete"] and not broken:
        print(f"pool {name}: ready, nothing to do")
        return manifest
    if whole:
        print(f"pool {name}: goes on after {len(whole)} whole shards")
    manifest |= {"complete": False, "shards": whole, "command": command}

    shards = {split: _Open(tokenizer) for split in ("train", "val")}
    counts = {split: sum(entry["split"] == split for entry in whole) for split in shards}
    skip = {split: sum(entry["documents"] for entry in whole if entry["split"] == split) for split in shards}
    notes = Notes(cfg.on_bad_line == "stop")

    def close(split: str) -> None:
        path = folder / f"{split}_{counts[split]:05d}.bin"
        manifest["shards"].append(shards[split].write(path, split))
        manifest["shards"].sort(key=lambda entry: entry["file"])
        _write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        counts[split] += 1
        shards[split] = _Open(tokenizer)

    with tqdm(desc=f"pool {name}", unit="B", unit_scale=True) as bar:
        for batch in _batches(documents(sources, cfg, notes), skip, bar):
            for (split, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch], cfg.threads)):
                shards[split].add(text, ids)
                if shards[split].n_tokens >= cfg.shard_tokens:
                    close(split)
    for split in shards:
        if shards[split].ends:
            close(split)
    manifest |= {"complete": True, "bad_lines": notes.bad, "empty_documents": notes.empty}
    _write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer, and the command

def prepare_tokenizer(folder: Path, tokenizer_cfg: TokenizerConfig, cfg: CorpusConfig) -> Tokenizer:
    """The run's tokenizer.json: trained on a sample of all pools alike, or taken from tokenizer.path."""
    path, pools = folder / "tokenizer.json", pools_of(cfg)
    given = Tokenizer.load(tokenizer_cfg.path) if tokenizer_cfg.path else None
    settings = given.hash if given else _hash([asdict(tokenizer_cfg), cfg.column, cfg.val_fraction, pools,
                                               [_state(sources) for sources in pools.values()]])
    manifest = _read_manifest(folder)
    if manifest and path.is_file():
        if manifest["settings"] == settings and (made := Tokenizer.load(path)).hash == manifest["hash"]:
            print(f"tokenizer {path}: ready, nothing to do")
            return made
        print(f"tokenizer {path}: settings or sources changed; it is made again")
    tokenizer = given or train_tokenizer(tqdm(_sample(pools, cfg), desc="tokenizer", unit=" documents"), tokenizer_cfg)
    _write(path, tokenizer.json.encode())
    _write(folder / "manifest.json", json.dumps({"settings": settings, "hash": tokenizer.hash}).encode())
    return tokenizer


def _sample(pools: dict[str, list[dict]], cfg: CorpusConfig) -> Iterator[str]:
    """Training documents, the next always from the pool that has given the fewest characters so far."""
    streams = {name: documents(sources, cfg, Notes(stop=False, quiet=True)) for name, sources in pools.items()}
    given = dict.fromkeys(pools, 0)
    while streams:
        name = min(streams, key=given.get)
        split, text = next(streams[name], ("end", ""))
        if split == "end":
            del streams[name]
        elif split == "train":
            given[name] += len(text)
            yield text


def prepare(folder: Path, tokenizer_cfg: TokenizerConfig, cfg: CorpusConfig, command: str) -> dict[str, dict]:
    """Makes all that is not there yet under folder (out/<run>/data); returns each pool's manifest."""
    tokenizer = prepare_tokenizer(folder, tokenizer_cfg, cfg)
    pools = pools_of(cfg)
    return {name: prepare_pool(folder / name, pools[name], tokenizer, cfg, command) for name in pools}


def data_folder(cfg) -> Path:
    """Where a run's tokenizer and shards lie; cfg: what common.load_config gives."""
    return Path(cfg.corpus.folder) if cfg.corpus.folder else cfg.out / "data"


def print_table(manifests: dict[str, dict]) -> None:
    print(f"{'pool':12} {'split':5} {'documents':>12} {'tokens':>16} {'bytes/token':>11} {'shards':>6}")
    for name, manifest in manifests.items():
        for split in ("train", "val"):
            rows = [entry for entry in manifest["shards"] if entry["split"] == split]
            n, tokens, size = (sum(row[key] for row in rows) for key in ("documents", "tokens", "text_bytes"))
            print(f"{name:12} {split:5} {n:12,} {tokens:16,} {size / max(tokens, 1):11.3f} {len(rows):6}")
        if manifest["bad_lines"] or manifest["empty_documents"]:
            print(f"{name:12} bad lines: {manifest['bad_lines']}, empty documents: {manifest['empty_documents']}")


def main() -> None:
    cfg = common.load_config(__doc__, flags={"verify": "only read every shard against its checksum"},
                             tokenizer=TokenizerConfig, corpus=CorpusConfig)
    folder, command = data_folder(cfg), "python -m data." + cfg.command.replace(".py", "", 1)
    if cfg.verify:
        for name in pools_of(cfg.corpus):
            print(f"pool {name}: {verify(folder / name)} shards equal their checksums")
    else:
        print_table(prepare(folder, cfg.tokenizer, cfg.corpus, command))


if __name__ == "__main__":
    common.cli(main)
