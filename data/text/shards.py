"""Shards: what data.text.corpus makes and training reads.

Layout under out/<run>/data/: tokenizer.json, and for each pool a folder with manifest.json, which
lists the shards in their order, and a folder for each piece of the pool, 00000/train_00000.bin …,
val_00000.bin …. A shard is a 64-byte header (`HEADER`), the documents' ends (uint64, counted in
tokens), then the tokens: `<s> text <|endoftext|>` for each document, as uint16 where the vocabulary
has at most 65,536 ids, else as uint32. The report (arXiv 2512.06266, section 2) describes neither
its shards nor a held-out set: our choice.
"""
from settings import (
    Bounds,
    FractionBelow1,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Sources,
)

import functools
import hashlib
import json
import os
import secrets
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from common import UserError
from data.text.tokenizer import Tokenizer


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
    dedup: list[str] = field(default_factory=list)  # pools, the first of which keeps its copy of a
                                   # document that several hold, exactly or nearly; in a pool the
                                   # first source does
    workers: Annotated[int, Bounds(0, 1000)] = 0  # processes (0: one a core, fewer for little text)


def data_folder(config) -> Path:
    """Where a run's tokenizer and shards lie; config: what load_config gives."""
    if config.corpus.folder:
        return Path(config.corpus.folder)
    return config.out / "data"


# --------------------------------------------------------------------------------------------------
# Reading

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
    manifest = read_manifest(folder)
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
    reason = invalid_file_reason(path, entry)
    if reason:
        raise UserError(f"{path} {reason}: {again}")
    with open(path, "rb") as f:
        header = HEADER.unpack(f.read(HEADER.size))
    magic, version, token_bytes, _, n_documents, n_tokens, made_by = header
    expected = MAGIC, VERSION, entry["documents"], entry["tokens"], tokenizer_hash.encode()
    if (magic, version, n_documents, n_tokens, made_by) != expected:
        raise UserError(f"{path} has a header unlike its manifest: delete it, then {again}")
    return Shard(path, n_documents, n_tokens, f"<u{token_bytes}")


def check_shard(entry: dict, folder: Path) -> str:
    """What is wrong with the shard of a manifest's entry, which is read through: "" if nothing."""
    path = folder / entry["file"]
    reason = invalid_file_reason(path, entry)
    if reason:
        return reason
    with open(path, "rb") as f:
        checksum = hashlib.file_digest(f, "sha256").hexdigest()
    return "" if checksum == entry["sha256"] else "differs from its checksum"


def invalid_file_reason(path: Path, entry: dict) -> str:
    """What is wrong with a shard's file at a glance: "" if nothing."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"is truncated ({size} bytes of {entry['bytes']})"
    return ""


def read_manifest(folder: Path) -> dict | None:
    """What manifest.json of a folder holds; None where there is no such file."""
    path = folder / "manifest.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, prepare again") from None


# --------------------------------------------------------------------------------------------------
# Writing

def write_whole(path: Path, *parts) -> None:
    """Writes a file aside, flushes it to the disk, renames it: whole or absent.

    Also when the disk is full; UserError then.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # two may write it at once
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


class OpenShard:
    """A shard that is being filled."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = "<u2" if tokenizer.n_vocab <= 65536 else "<u4"
        self.documents: list[np.ndarray] = []
        self.ends: list[int] = []
        self.n_tokens = 0
        self.text_bytes = 0
        self.files = Counter()  # tokens of each file that the documents are from

    def add(self, text: str, ids: np.ndarray, file: str) -> None:
        """Appends a document: its text, which is only counted, its token ids, and where it is
        from."""
        document = np.empty(len(ids) + 2, self.dtype)
        document[0] = self.tokenizer.bos
        document[1:-1] = ids
        document[-1] = self.tokenizer.eot
        self.n_tokens += len(document)
        self.files[file] += len(document)
        self.documents.append(document)
        self.ends.append(self.n_tokens)
        self.text_bytes += n_bytes(text)

    def write(self, path: Path, split: str) -> dict:
        """Writes the shard; returns its entry in the manifest."""
        token_bytes = int(self.dtype[2])
        header = HEADER.pack(MAGIC, VERSION, token_bytes, self.tokenizer.n_vocab, len(self.ends),
                             self.n_tokens, self.tokenizer.hash.encode())
        parts = [header, np.array(self.ends, "<u8"), *self.documents]
        write_whole(path, *parts)
        checksum = hashlib.sha256()
        for part in parts:
            checksum.update(part)
        return {
            "file": path.name,
            "split": split,
            "documents": len(self.ends),
            "tokens": self.n_tokens,
            "text_bytes": self.text_bytes,
            "files": self.files,
            "bytes": path.stat().st_size,
            "sha256": checksum.hexdigest(),
        }


class PieceWriter:
    """A piece's shards, one of each split being filled, and its manifest."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, manifest: dict):
        self.folder, self.tokenizer, self.manifest = folder, tokenizer, manifest
        self.shards = {split: OpenShard(tokenizer) for split in ("train", "val")}

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
                self.shards[split] = OpenShard(self.tokenizer)
        self.manifest.update(state)
        write_whole(self.folder / "manifest.json", json.dumps(self.manifest, indent=1).encode())


def n_bytes(text: str) -> int:
    """Length of a text in UTF-8."""
    return len(text.encode("utf-8", "replace"))
