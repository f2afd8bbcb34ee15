"""Prepares the corpus: `python -m data.text.corpus configs/tiny.py` makes tokenizer and shards.

Layout under out/<run>/data/: tokenizer.json, and for each pool a folder with train_00000.bin …,
val_00000.bin … and manifest.json. A shard is a 64-byte header (`HEADER`), the documents' ends
(uint64, counted in tokens), then the tokens: `<s> text <|endoftext|>` for each document, as uint16
where the vocabulary has at most 65,536 ids, else as uint32.

The documents of a pool are a deterministic stream, so a manifest rewritten after each shard is all
the state there is. It says where in the sources the batch began that the last shard ended in, and
how many of its documents the shards hold: a killed run reads at most one batch and one file again,
and comes to the same bytes as an unbroken run. The report (arXiv 2512.06266, section 2) describes
neither its shards nor a held-out set: our choice.
"""
from settings import (
    Bounds,
    FractionBelow1,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Sources,
    load_config,
)

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
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

import common
from common import UserError
from data import tasks
from data.text.sources import ReadPosition, find_files, invalid_reason, licence, texts
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from progress import progress_bar


@dataclass
class CorpusConfig:
    pools: dict[str, Sources] = field(default_factory=dict)  # pool name -> its sources, see
                                                             # data/text/sources.py
    folder: str = ""               # of tokenizer and shards, for runs that share them (default:
                                   # out/<run>/data)
    path: str = ""                 # own data: file, folder or glob that becomes the only pool, text
    column: str = "text"           # where records hold the text, for sources that do not say it
    megabytes: NonNegativeFloat = 0.0  # of text from each source at most, its beginning (0: all); a
                                       # source can have its own
    val_fraction: FractionBelow1 = 0.02  # share of the documents held out (of a .txt file: its end)
    val_tokens: NonNegativeInt = 0  # … or a larger share, so that a pool whose size `megabytes`
                                    # tells holds out about so many
    shard_tokens: PositiveInt = 20_000_000  # tokens per shard; one shard per split is held in
                                            # memory
    on_bad_line: Literal["skip", "stop"] = "skip"  # at malformed lines (they are counted, the first
                                                   # ones shown)
    threads: Annotated[int, Bounds(1, 1000)] = 4   # that tokenize


# --------------------------------------------------------------------------------------------------
# Documents: the text's split

def documents(sources: list[dict], cfg: CorpusConfig,
              position: ReadPosition) -> Iterator[list[tuple[str, str]]]:
    """[(split, text)] of each document of a pool after `position`, which moves along.

    Two for a .txt file, whose end is held out, else one: the text's hash decides the split, so that
    no copy of a held-out document is trained.
    """
    share = held_out_share(sources, cfg)
    beginning = ReadPosition(stop=position.stop, quiet=position.quiet)
    any_trained = position != beginning  # one that goes on has shards
    for text, is_whole_file in texts(sources, position, cfg.column, cfg.megabytes or inf):
        if is_whole_file:
            parts = _split_file(text, share)
        else:
            parts = [(_split_by_hash(text, share), text)]
        any_trained = any_trained or parts[0][0] == "train"
        yield parts
    if not any_trained:
        first_bad_line = f"; {position.first}" if position.first else ""
        raise UserError(f"no documents to train on in {sources}: {position.empty} empty, "
                        f"{position.bad} bad lines, {position.left_out} outside of \"keep\""
                        + first_bad_line)


BYTES_PER_TOKEN = 4  # about, of English text


def held_out_share(sources: list[dict], cfg: CorpusConfig) -> float:
    """The share of a pool that is held out: val_fraction, or more where the pool is a small part of
    its sources."""
    megabytes = [source.get("megabytes", cfg.megabytes) for source in sources]
    if not all(megabytes):  # one is taken whole, and nobody knows how much that is
        return cfg.val_fraction
    tokens = sum(megabytes) * 1e6 / BYTES_PER_TOKEN
    return max(cfg.val_fraction, min(0.1, cfg.val_tokens / tokens))


def _split_file(text: str, val_fraction: float) -> list[tuple[str, str]]:
    """[("train", beginning), ("val", end)] of a file's text; without an end where that is empty."""
    cut = len(text) - int(len(text) * val_fraction)
    if cut == len(text):
        return [("train", text)]
    return [("train", text[:cut]), ("val", text[cut:])]


def _split_by_hash(text: str, val_fraction: float) -> str:
    """ "val" for a share of all texts, the same ones on every machine, else "train"."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    is_held_out = int.from_bytes(digest[:8]) < val_fraction * 2**64
    return "val" if is_held_out else "train"


def checked_pools(cfg: CorpusConfig) -> dict[str, list[dict]]:
    """The pools of a config, checked; the user's own path replaces them all."""
    pools = {"text": [{"path": cfg.path}]} if cfg.path else cfg.pools
    if not pools:
        raise UserError("the corpus is empty: give corpus.pools, or your own text by "
                        "--corpus.path=FILE")
    for name, sources in pools.items():
        for source in sources:
            reason = invalid_reason(source)
            if reason:
                raise UserError(f"pool {name!r}: {reason}")
    return pools


# --------------------------------------------------------------------------------------------------
# Shards: reading

MAGIC, VERSION = b"nbgshard", 1
# magic, version, bytes per token, n_vocab, n_documents, n_tokens, tokenizer hash
HEADER = struct.Struct("<8sIIQQQ16s8x")


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
        offset = HEADER.size + 8 * self.n_documents
        return np.memmap(self.path, self.dtype, "r", offset, (self.n_tokens,))


def read_pool(folder: Path, split: str, tokenizer_hash: str,
              command: str = "python -m data.text.corpus CONFIG") -> list[Shard]:
    """The shards of a pool's split ("train" or "val"), checked without reading them through.

    command: what makes the pool if there is none yet. Raises UserError that names the file and the
    command to run.
    """
    manifest = _read_manifest(folder)
    if not manifest:
        raise UserError(f"no data in {folder}: prepare it with `{command}`")
    again = f"make it again with `{manifest['command']}`"
    if not manifest["complete"]:
        raise UserError(f"{folder} is not finished: `{manifest['command']}` goes on with it")
    if manifest["tokenizer"] != tokenizer_hash:
        raise UserError(f"{folder} was made with tokenizer {manifest['tokenizer']}, not "
                        f"{tokenizer_hash}: {again}")
    entries = [entry for entry in manifest["shards"] if entry["split"] == split]
    return [_open_shard(folder / entry["file"], entry, tokenizer_hash, again) for entry in entries]


def _open_shard(path: Path, entry: dict, tokenizer_hash: str, again: str) -> Shard:
    """The shard of a manifest's entry; UserError where its size or header is another."""
    reason = _invalid_file_reason(path, entry)
    if reason:
        raise UserError(f"{path} {reason}: {again}")
    with open(path, "rb") as f:
        header = HEADER.unpack(f.read(HEADER.size))
    magic, version, token_bytes, _, n_documents, n_tokens, made_by = header
    expected = MAGIC, VERSION, entry["documents"], entry["tokens"], tokenizer_hash.encode()
    if (magic, version, n_documents, n_tokens, made_by) != expected:
        raise UserError(f"{path} has a header unlike its manifest: delete it, then {again}")
    return Shard(path, n_documents, n_tokens, f"<u{token_bytes}")


def verify(folder: Path) -> int:
    """Reads every shard of a pool against its checksum; returns their number.

    UserError names one that differs.
    """
    manifest = _read_manifest(folder)
    if not manifest:
        raise UserError(f"no data in {folder}: nothing to verify")
    for entry in progress_bar(manifest["shards"], desc=f"verify {folder.name}", unit="shard"):
        path = folder / entry["file"]
        reason = _invalid_file_reason(path, entry)
        if not reason:
            with open(path, "rb") as f:
                checksum = hashlib.file_digest(f, "sha256").hexdigest()
            if checksum != entry["sha256"]:
                reason = "differs from its checksum"
        if reason:
            raise UserError(f"{path} {reason}: delete it, then make it again with "
                            f"`{manifest['command']}`")
    return len(manifest["shards"])


def _invalid_file_reason(path: Path, entry: dict) -> str:
    """What is wrong with a shard's file at a glance: "" if nothing."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"is truncated ({size} bytes of {entry['bytes']})"
    return ""


def _read_manifest(folder: Path) -> dict | None:
    """What manifest.json of a folder holds; None where there is no such file."""
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, prepare again") from None


# --------------------------------------------------------------------------------------------------
# Shards: writing

def _write(path: Path, *parts) -> None:
    """Writes a file aside, flushes it to the disk, renames it: whole or absent.

    Also when the disk is full; UserError then.
    """
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
        raise UserError(f"{path} cannot be written: {error.strerror}; mend it and run again, "
                        "nothing is lost") from None


class _OpenShard:
    """A shard that is being filled."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = "<u2" if tokenizer.n_vocab <= 65536 else "<u4"
        self.documents: list[np.ndarray] = []
        self.ends: list[int] = []
        self.n_tokens = 0
        self.text_bytes = 0

    def add(self, text: str, ids: np.ndarray) -> None:
        """Appends a document: its text, which is only counted, and its token ids."""
        document = np.empty(len(ids) + 2, self.dtype)
        document[0] = self.tokenizer.bos
        document[1:-1] = ids
        document[-1] = self.tokenizer.eot
        self.n_tokens += len(document)
        self.documents.append(document)
        self.ends.append(self.n_tokens)
        self.text_bytes += _n_bytes(text)

    def write(self, path: Path, split: str) -> dict:
        """Writes the shard; returns its entry in the manifest."""
        token_bytes = int(self.dtype[2])
        header = HEADER.pack(MAGIC, VERSION, token_bytes, self.tokenizer.n_vocab, len(self.ends),
                             self.n_tokens, self.tokenizer.hash.encode())
        parts = [header, np.array(self.ends, "<u8"), *self.documents]
        _write(path, *parts)
        checksum = hashlib.sha256()
        for part in parts:
            checksum.update(part)
        return {
            "file": path.name,
            "split": split,
            "documents": len(self.ends),
            "tokens": self.n_tokens,
            "text_bytes": self.text_bytes,
            "bytes": path.stat().st_size,
            "sha256": checksum.hexdigest(),
        }


class _PoolWriter:
    """A pool's shards, one of each split being filled, and its manifest."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, manifest: dict):
        self.folder, self.tokenizer, self.manifest = folder, tokenizer, manifest
        self.shards = {split: _OpenShard(tokenizer) for split in ("train", "val")}

    def close_shards(self, **state) -> None:
        """Writes what there is of both splits, then the manifest with this state.

        Of both, so that one position in the sources stands for all that is written.
        """
        entries = self.manifest["shards"]
        number = entries[-1]["number"] + 1 if entries else 0
        for split, shard in self.shards.items():
            if shard.ends:
                entry = shard.write(self.folder / f"{split}_{number:05d}.bin", split)
                entries.append(entry | {"number": number})
                self.shards[split] = _OpenShard(self.tokenizer)
        self.manifest.update(state)
        _write(self.folder / "manifest.json", json.dumps(self.manifest, indent=1).encode())


def _n_bytes(text: str) -> int:
    """Length of a text in UTF-8."""
    return len(text.encode("utf-8", "replace"))


def _hash(value: object) -> str:
    """16 hex digits of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _state(sources: list[dict]) -> list:
    """What the sources' text depends on beside their settings; a change of it re-makes the pool.

    The hub is not asked.
    """
    state = []
    for source in sources:
        if "path" in source:
            for path in find_files(source["path"]):
                state.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
        elif "stdlib" in source:
            state.append(sys.version)
        elif "pages" in source:
            code = sorted(Path(tasks.__file__).parent.glob("*.py"))
            state.append([path.read_text(encoding="utf-8") for path in code
                          if not path.name.startswith("test_")])
    return state


# --------------------------------------------------------------------------------------------------
# A pool, from its sources to its shards

BATCH_DOCUMENTS, BATCH_BYTES = 4096, 4e6  # either is worth the threads that tokenize a batch


@dataclass
class _Batch:
    """Documents that are tokenized together."""
    position: dict   # asdict() of the ReadPosition before them
    skipped: int = 0  # documents after that position which whole shards hold already
    documents: list[tuple[str, str]] = field(default_factory=list)  # (split, text)
    text_bytes: int = 0


def _batches(stream: Iterator[list[tuple[str, str]]], position: ReadPosition, skip: int,
             bar: tqdm) -> Iterator[_Batch]:
    """A pool's documents in batches, without the first `skip`; the last batch may be empty."""
    batch = _Batch(asdict(position))
    for parts in stream:
        for split, text in parts:
            n_bytes = _n_bytes(text)
            bar.update(n_bytes)
            if batch.skipped < skip:
                batch.skipped += 1
            else:
                batch.documents.append((split, text))
                batch.text_bytes += n_bytes
        is_full = len(batch.documents) >= BATCH_DOCUMENTS or batch.text_bytes > BATCH_BYTES
        if is_full:
            yield batch
        if is_full or (not batch.documents and batch.skipped == skip):
            batch = _Batch(asdict(position))
            skip = 0
    yield batch


def prepare_pool(folder: Path, sources: list[dict], tokenizer: Tokenizer, cfg: CorpusConfig,
                 command: str) -> dict:
    """The manifest of a pool, whose shards are made, or gone on with, or left as they are."""
    name = folder.name
    share = held_out_share(sources, cfg)
    settings = _hash([VERSION, tokenizer.hash, sources, _state(sources), cfg.column, cfg.megabytes,
                      share, cfg.shard_tokens, cfg.on_bad_line])
    manifest = _read_manifest(folder)
    if manifest and manifest["settings"] != settings:
        print(f"pool {name}: settings, sources or tokenizer changed; it is made again")
        manifest = None
    if manifest is None:
        manifest = _empty_pool(folder, settings, tokenizer)
    for path in folder.glob("*.tmp"):
        path.unlink()
    faulty = [entry["number"] for entry in manifest["shards"]
              if _invalid_file_reason(folder / entry["file"], entry)]
    if manifest["complete"] and not faulty:
        print(f"pool {name}: ready, nothing to do")
        return manifest

    position, skip = _resume(manifest, faulty)
    position.stop = cfg.on_bad_line == "stop"
    manifest |= {"complete": False, "command": command}
    if manifest["shards"]:
        print(f"pool {name}: goes on after {len(manifest['shards'])} whole shards")
    for source in sources:
        if "hf" in source:
            declared = licence(source) or "its card names none"
            print(f"pool {name}: {source['hf']}, licence: {declared}")
    pool = _PoolWriter(folder, tokenizer, manifest)
    with progress_bar(desc=f"pool {name}", unit="B", unit_scale=True) as bar:
        for batch in _batches(documents(sources, cfg, position), position, skip, bar):
            n_written = batch.skipped  # documents after the batch's position
            batch_ids = tokenizer.encode_batch([text for _, text in batch.documents], cfg.threads)
            for (split, text), ids in zip(batch.documents, batch_ids):
                n_written += 1
                pool.shards[split].add(text, ids)
                if pool.shards[split].n_tokens >= cfg.shard_tokens:
                    pool.close_shards(place=batch.position, skip=n_written)
    pool.close_shards(complete=True, place=asdict(position), skip=0)
    return manifest


def _empty_pool(folder: Path, settings: str, tokenizer: Tokenizer) -> dict:
    """Deletes a pool's files; returns a manifest without shards."""
    (folder / "manifest.json").unlink(missing_ok=True)  # first: no shards without their own
    for path in [*folder.glob("train_*.bin"), *folder.glob("val_*.bin")]:
        path.unlink(missing_ok=True)
    return {"settings": settings, "tokenizer": tokenizer.hash, "complete": False, "shards": []}


def _resume(manifest: dict, faulty: list[int]) -> tuple[ReadPosition, int]:
    """Where in the sources to go on, and how many documents from there on the shards hold.

    faulty: numbers of shards that must be made again. The manifest keeps those before them.
    """
    if faulty:
        first = min(faulty)
        manifest["shards"] = [entry for entry in manifest["shards"] if entry["number"] < first]
    elif "place" in manifest:
        return ReadPosition(**manifest["place"]), manifest["skip"]
    n_documents = sum(entry["documents"] for entry in manifest["shards"])
    return ReadPosition(), n_documents  # past those documents, from the beginning


# --------------------------------------------------------------------------------------------------
# The tokenizer, and the command

def prepare_tokenizer(folder: Path, tokenizer_cfg: TokenizerConfig, cfg: CorpusConfig) -> Tokenizer:
    """The run's tokenizer.json: trained on a sample of all pools, or taken from tokenizer.path."""
    path = folder / "tokenizer.json"
    pools = checked_pools(cfg)
    existing = None
    if tokenizer_cfg.path:
        existing = Tokenizer.load(tokenizer_cfg.path, tokenizer_cfg.eot)
        settings = existing.hash
    else:
        states = [_state(sources) for sources in pools.values()]
        settings = _hash([asdict(tokenizer_cfg), cfg.column, cfg.megabytes, cfg.val_fraction,
                          pools, states])
    manifest = _read_manifest(folder)
    if manifest and path.is_file():
        if manifest["settings"] == settings:
            tokenizer = Tokenizer.load(path, tokenizer_cfg.eot)
            if tokenizer.hash == manifest["hash"]:
                print(f"tokenizer {path}: ready, nothing to do")
                return tokenizer
        print(f"tokenizer {path}: settings or sources changed; it is made again")
    tokenizer = existing
    if tokenizer is None:
        sample = progress_bar(_sample(pools, cfg), desc="tokenizer", unit=" documents")
        tokenizer = train_tokenizer(sample, tokenizer_cfg)
    _write(path, tokenizer.json.encode())
    manifest = {"settings": settings, "hash": tokenizer.hash}
    _write(folder / "manifest.json", json.dumps(manifest).encode())
    return tokenizer


def _sample(pools: dict[str, list[dict]], cfg: CorpusConfig) -> Iterator[str]:
    """Training texts, the next always from the pool that has given the fewest characters so far."""
    streams = {name: documents(sources, cfg, ReadPosition(quiet=True))
               for name, sources in pools.items()}
    n_characters = dict.fromkeys(pools, 0)
    while streams:
        name = min(streams, key=n_characters.get)
        parts = next(streams[name], None)
        if parts is None:
            del streams[name]
            continue
        split, text = parts[0]
        if split == "train":
            n_characters[name] += len(text)
            yield text


def prepare(folder: Path, tokenizer_cfg: TokenizerConfig, cfg: CorpusConfig,
            command: str) -> dict[str, dict]:
    """Each pool's manifest, after all is made that is not there yet under folder."""
    tokenizer = prepare_tokenizer(folder, tokenizer_cfg, cfg)
    return {name: prepare_pool(folder / name, sources, tokenizer, cfg, command)
            for name, sources in checked_pools(cfg).items()}


def data_folder(config) -> Path:
    """Where a run's tokenizer and shards lie; config: what load_config gives."""
    if config.corpus.folder:
        return Path(config.corpus.folder)
    return config.out / "data"


def print_table(manifests: dict[str, dict]) -> None:
    """Prints documents, tokens and bytes per token of each pool, and what was left out."""
    print(f"{'pool':12} {'split':5} {'documents':>12} {'tokens':>16} {'bytes/token':>11} "
          f"{'shards':>6}")
    for name, manifest in manifests.items():
        for split in ("train", "val"):
            entries = [entry for entry in manifest["shards"] if entry["split"] == split]
            n_documents = sum(entry["documents"] for entry in entries)
            n_tokens = sum(entry["tokens"] for entry in entries)
            bytes_per_token = sum(entry["text_bytes"] for entry in entries) / max(n_tokens, 1)
            print(f"{name:12} {split:5} {n_documents:12,} {n_tokens:16,} {bytes_per_token:11.3f} "
                  f"{len(entries):6}")
            if not entries and split == "val":
                print(f"note: pool {name} holds nothing out, and so has no held-out loss: raise "
                      "corpus.val_fraction or val_tokens")
        lost = manifest["place"]
        if lost["bad"] or lost["empty"] or lost["left_out"]:
            print(f"{name:12} bad lines: {lost['bad']}, empty documents: {lost['empty']}, "
                  f"outside of \"keep\": {lost['left_out']}")


def main() -> None:
    flags = {"verify": "only read every shard against its checksum"}
    config = load_config(__doc__, flags=flags, options=("run",), tokenizer=TokenizerConfig,
                         corpus=CorpusConfig)
    folder = data_folder(config)
    command = "python -m data.text." + config.command.replace(".py", "", 1)
    if config.verify:
        for name in checked_pools(config.corpus):
            print(f"pool {name}: {verify(folder / name)} shards equal their checksums")
    else:
        common.lock_folder(folder)
        print_table(prepare(folder, config.tokenizer, config.corpus, command))


if __name__ == "__main__":
    common.cli(main)
