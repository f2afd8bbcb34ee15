"""Prepares the corpus: `python -m data.text.corpus configs/tiny.py` makes the tokenizer and every pool's shards.

Layout under out/<run>/data/: tokenizer.json, and for each pool a folder with train_00000.bin …, val_00000.bin … and
manifest.json. A shard is a 64-byte header (`HEADER`), the documents' ends (uint64, counted in tokens), then the tokens:
`<s> text <|endoftext|>` for each document, as uint16 where the vocabulary has at most 65,536 ids, else as uint32.

The documents of a pool are a deterministic stream, so a manifest rewritten after each shard is all the state there is.
It says where in the sources the batch began that the last shard ended in, and how many of its documents the shards
hold: a killed run reads at most one batch and one file again, and comes to the same bytes as an unbroken run.
The report (arXiv 2512.06266, section 2) describes neither its shards nor a held-out set: our choice.
"""
import functools
import hashlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from data import tasks
from common import UserError
from data.text.sources import find_files, invalid_reason, licence, ReadPosition, texts
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from progress import progress_bar


@dataclass
class CorpusConfig:
    pools: dict = field(default_factory=dict)  # pool name -> list of its sources, see data/text/sources.py
    folder: str = ""               # where tokenizer and shards lie, for runs that share them (default: out/<run>/data)
    path: str = ""                 # own data: a file, folder or glob that becomes the only pool, "text"
    column: str = "text"           # where records hold the text, for sources that do not say it
    megabytes: float = 0.0         # of text from each source at most, its beginning (0: all); a source can have its own
    val_fraction: float = 0.02     # share of the documents held out (of a .txt file: its end)
    shard_tokens: int = 20_000_000  # tokens in a shard; one shard a split is held in memory
    on_bad_line: str = "skip"      # "skip" malformed lines (counted, the first ones shown) or "stop" at the first
    threads: int = 4               # that tokenize


# ---------------------------------------------------------------------------------------------------------------------
# Documents: the text's split

def documents(sources: list[dict], cfg: CorpusConfig, place: ReadPosition) -> Iterator[list[tuple[str, str]]]:
    """[(split, text)] of each document of a pool after `place`, which moves along: two for a .txt file, else one.

    The text's hash decides the split, so that no copy of a held-out document is trained.
    """
    trained = place != ReadPosition(place.stop, place.quiet)  # one that goes on has shards
    for text, whole_file in texts(sources, place, cfg.column, cfg.megabytes or inf):
        if whole_file:
            cut = len(text) - int(len(text) * cfg.val_fraction)
            trained = True
            yield [("train", text[:cut]), ("val", text[cut:])] if text[cut:] else [("train", text)]
        else:
            digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            held_out = int.from_bytes(digest[:8]) < cfg.val_fraction * 2**64
            trained = trained or not held_out
            yield [("val" if held_out else "train", text)]
    if not trained:
        raise UserError(f"no documents to train on in {sources}: {place.empty} empty, {place.bad} bad lines, "
                        f"{place.left_out} outside of \"keep\"" + (f"; {place.first}" if place.first else ""))


def pools_of(cfg: CorpusConfig) -> dict[str, list[dict]]:
    """The pools of a config, checked; the user's own path replaces them all."""
    pools = {"text": [{"path": cfg.path}]} if cfg.path else cfg.pools
    if not pools:
        raise UserError("the corpus is empty: give corpus.pools, or your own text by --corpus.path=FILE")
    if not 0 <= cfg.val_fraction < 1 or cfg.shard_tokens < 1 or cfg.threads < 1:
        raise UserError("corpus: val_fraction must be in [0, 1), shard_tokens and threads at least 1")
    if cfg.on_bad_line not in ("skip", "stop"):
        raise UserError(f"corpus.on_bad_line is {cfg.on_bad_line!r}; it must be 'skip' or 'stop'")
    for name, source in ((name, source) for name, sources in pools.items() for source in sources):
        if wrong := invalid_reason(source):
            raise UserError(f"pool {name!r}: {wrong}")
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
              command: str = "python -m data.text.corpus CONFIG") -> list[Shard]:
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
    for entry in progress_bar(manifest["shards"], desc=f"verify {folder.name}", unit="shard"):
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
    """What the sources' text depends on beside their settings; changes of it re-make the pool. The hub is not asked."""
    state = []
    for source in sources:
        if "path" in source:
            state += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in find_files(source["path"])]
        elif "stdlib" in source:
            state.append(sys.version)
        elif "pages" in source:
            code = sorted(Path(tasks.__file__).parent.glob("*.py"))
            state.append([path.read_text(encoding="utf-8") for path in code if not path.name.startswith("test_")])
    return state


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


BATCH = 4096, 4e6  # documents, and bytes of text: either is worth the threads


def _batches(stream: Iterator[list[tuple[str, str]]], place: ReadPosition, skip: int, bar: tqdm) -> Iterator[tuple]:
    """(place before it, documents after that place which are skipped, [(split, text)]) of each batch."""
    before, skipped, batch, size = asdict(place), 0, [], 0
    for document in stream:
        for split, text in document:
            n = len(text.encode("utf-8", "replace"))
            bar.update(n)
            if skipped < skip:
                skipped += 1
            else:
                batch.append((split, text))
                size += n
        if len(batch) >= BATCH[0] or size > BATCH[1]:
            yield before, skipped, batch
            batch, size = [], 0
        if not batch and skipped == skip:
            before, skip, skipped = asdict(place), 0, 0
    yield before, skipped, batch


def prepare_pool(folder: Path, sources: list[dict], tokenizer: Tokenizer, cfg: CorpusConfig, command: str) -> dict:
    """Makes a pool's shards, or goes on with them, or does nothing where they are whole; returns the manifest."""
    name = folder.name
    settings = _hash([VERSION, tokenizer.hash, sources, _state(sources),
                      cfg.column, cfg.megabytes, cfg.val_fraction, cfg.shard_tokens, cfg.on_bad_line])
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
    faulty = [entry["number"] for entry in manifest["shards"] if _fault(folder / entry["file"], entry)]
    if manifest["complete"] and not faulty:
        print(f"pool {name}: ready, nothing to do")
        return manifest
    whole = [entry for entry in manifest["shards"] if not faulty or entry["number"] < min(faulty)]
    if whole:
        print(f"pool {name}: goes on after {len(whole)} whole shards")
    place, skip = ReadPosition(), sum(entry["documents"] for entry in whole)
    if "place" in manifest and not faulty:  # else past those documents from the beginning
        place, skip = ReadPosition(**manifest["place"]), manifest["skip"]
    place.stop = cfg.on_bad_line == "stop"
    manifest |= {"complete": False, "shards": whole, "command": command}
    for source in sources:
        if "hf" in source:
            print(f"pool {name}: {source['hf']}, licence: {licence(source) or 'its card names none'}")
    shards = {split: _Open(tokenizer) for split in ("train", "val")}

    def close(**state) -> None:
        """Writes what there is of both splits, so that one place in the sources stands for all that is written."""
        number = manifest["shards"][-1]["number"] + 1 if manifest["shards"] else 0
        for split in shards:
            if shards[split].ends:
                entry = shards[split].write(folder / f"{split}_{number:05d}.bin", split)
                manifest["shards"].append(entry | {"number": number})
                shards[split] = _Open(tokenizer)
        manifest.update(state)
        _write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())

    with progress_bar(desc=f"pool {name}", unit="B", unit_scale=True) as bar:
        for before, n, batch in _batches(documents(sources, cfg, place), place, skip, bar):
            for (split, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch], cfg.threads)):
                n += 1
                shards[split].add(text, ids)
                if shards[split].n_tokens >= cfg.shard_tokens:
                    close(place=before, skip=n)
    close(complete=True, place=asdict(place), skip=0)
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer, and the command

def prepare_tokenizer(folder: Path, tokenizer_cfg: TokenizerConfig, cfg: CorpusConfig) -> Tokenizer:
    """The run's tokenizer.json: trained on a sample of all pools alike, or taken from tokenizer.path."""
    path, pools = folder / "tokenizer.json", pools_of(cfg)
    given = Tokenizer.load(tokenizer_cfg.path) if tokenizer_cfg.path else None
    settings = given.hash if given else _hash([asdict(tokenizer_cfg), cfg.column, cfg.megabytes, cfg.val_fraction,
                                               pools, [_state(sources) for sources in pools.values()]])
    manifest = _read_manifest(folder)
    if manifest and path.is_file():
        if manifest["settings"] == settings and (made := Tokenizer.load(path)).hash == manifest["hash"]:
            print(f"tokenizer {path}: ready, nothing to do")
            return made
        print(f"tokenizer {path}: settings or sources changed; it is made again")
    tokenizer = given or train_tokenizer(progress_bar(_sample(pools, cfg), desc="tokenizer", unit=" documents"), tokenizer_cfg)
    _write(path, tokenizer.json.encode())
    _write(folder / "manifest.json", json.dumps({"settings": settings, "hash": tokenizer.hash}).encode())
    return tokenizer


def _sample(pools: dict[str, list[dict]], cfg: CorpusConfig) -> Iterator[str]:
    """Training documents, the next always from the pool that has given the fewest characters so far."""
    streams = {name: documents(sources, cfg, ReadPosition(quiet=True)) for name, sources in pools.items()}
    given = dict.fromkeys(pools, 0)
    while streams:
        name = min(streams, key=given.get)
        document = next(streams[name], None)
        if document is None:
            del streams[name]
        elif document[0][0] == "train":
            given[name] += len(document[0][1])
            yield document[0][1]


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
        lost = manifest["place"]
        if lost["bad"] or lost["empty"] or lost["left_out"]:
            print(f"{name:12} bad lines: {lost['bad']}, empty documents: {lost['empty']}, "
                  f"outside of \"keep\": {lost['left_out']}")


def main() -> None:
    cfg = common.load_config(__doc__, flags={"verify": "only read every shard against its checksum"},
                             tokenizer=TokenizerConfig, corpus=CorpusConfig)
    folder, command = data_folder(cfg), "python -m data.text." + cfg.command.replace(".py", "", 1)
    if cfg.verify:
        for name in pools_of(cfg.corpus):
            print(f"pool {name}: {verify(folder / name)} shards equal their checksums")
    else:
        print_table(prepare(folder, cfg.tokenizer, cfg.corpus, command))


if __name__ == "__main__":
    common.cli(main)
