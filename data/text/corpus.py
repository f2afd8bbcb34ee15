"""Prepares the corpus: `python -m data.text.corpus configs/tiny.py` makes tokenizer and shards.

A pool's sources are cut into pieces: a range of a large file, a file, or several small ones. Who is
free reads, tokenizes and writes the next one, a process of this machine or, with --engine=ray, of a
Ray cluster. The pool is the union of its pieces in their order, whoever made them and whenever: the
same bytes from any number of processes and machines. Its layout: data/text/shards.py.

The documents of a piece are a deterministic stream, so a manifest rewritten after each shard is all
the state there is. It says where in the sources the batch began that the last shard ended in, and
how many of its documents the shards hold: a killed run reads at most one batch and one file again,
and comes to the same bytes as an unbroken run.
"""
from settings import load_config

import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path

import numpy as np

import common
from common import UserError, progress_bar
from data import tasks
from data.engine import Engine, connect
from data.filter import dedup
from data.text.shards import (
    VERSION,
    CorpusConfig,
    PieceWriter,
    check_shard,
    data_folder,
    invalid_file_reason,
    n_bytes,
    read_manifest,
    write_whole,
)
from data.text.sources import (
    COUNTS,
    ReadPosition,
    find_files,
    invalid_reason,
    licence,
    parts,
    text_columns,
    texts,
)
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

# --------------------------------------------------------------------------------------------------
# Documents: the text's split

def documents(sources: list[dict], cfg: CorpusConfig, share: float, position: ReadPosition,
              duplicates: np.ndarray | None = None) -> Iterator[list[tuple[str, str]]]:
    """[(split, text)] of each document of a pool after `position`, which moves along.

    Two for a .txt file, whose end is held out, else one: the text's hash decides the split, so that
    no copy of a held-out document is trained in its pool (in one that holds out less, it may be).
    share: that is held out. duplicates: of each document, in order, whether it is left out because
    another one stays.
    """
    for text, is_whole_file in texts(sources, position, cfg.column, cfg.megabytes or inf):
        if duplicates is not None and duplicates[position.number - 1]:
            position.count("duplicates")
        elif is_whole_file:
            yield _split_file(text, share)
        else:
            yield [(_split_by_hash(text, share), text)]


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
    unknown = sorted(set(cfg.dedup) - set(pools))
    if unknown:
        raise UserError(f"corpus.dedup names {unknown[0]!r}; the pools are {', '.join(pools)}")
    for name, sources in pools.items():
        for source in sources:
            reason = invalid_reason(source)
            if reason:
                raise UserError(f"pool {name!r}: {reason}")
    return pools


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
            state += find_files(source["path"])
        elif "stdlib" in source:
            state.append(sys.version)
        elif "pages" in source:
            code = sorted(Path(tasks.__file__).parent.glob("*.py"))
            state.append([path.read_text(encoding="utf-8") for path in code
                          if not path.name.startswith("test_")])
    return state


# --------------------------------------------------------------------------------------------------
# Batches

BATCH_DOCUMENTS, BATCH_BYTES = 4096, 4e6  # of a batch that is tokenized together


@dataclass
class _Batch:
    """Documents that are tokenized together."""
    position: dict   # asdict() of the ReadPosition before them
    skipped: int = 0  # documents after that position which whole shards hold already
    documents: list[tuple[str, str, str]] = field(default_factory=list)  # (split, text, file)
    text_bytes: int = 0


def _batches(stream: Iterator[list[tuple[str, str]]], position: ReadPosition,
             skip: int) -> Iterator[_Batch]:
    """A piece's documents in batches, without the first `skip`; the last batch may be empty."""
    batch = _Batch(asdict(position))
    for document in stream:
        for split, text in document:
            if batch.skipped < skip:
                batch.skipped += 1
            else:
                batch.documents.append((split, text, position.file))
                batch.text_bytes += n_bytes(text)
        is_full = len(batch.documents) >= BATCH_DOCUMENTS or batch.text_bytes > BATCH_BYTES
        if is_full:
            yield batch
        if is_full or (not batch.documents and batch.skipped == skip):
            batch = _Batch(asdict(position))
            skip = 0
    yield batch


# --------------------------------------------------------------------------------------------------
# Pieces

LEAST_BYTES = 16e6     # of a piece: little text stays together, also where shards are small
DOCUMENT_BYTES = 4000  # about, of a document of the web


@dataclass
class Piece:
    """What one process reads, tokenizes and writes: parts of a pool's sources, in their order."""
    folder: Path
    sources: list[dict] = field(default_factory=list)  # each with its "parts"
    bytes: int = 0                # of the sources, about
    settings: str = ""            # hash of all that decides the piece's content
    share: float = 0.0            # of the documents that is held out
    duplicates: tuple[Path, int] | None = None  # the file that marks them, the piece's first one
    tokenizer: tuple[Path, str] | None = None   # its file, and the name of its end of documents


def cut(folder: Path, sources: list[dict], cfg: CorpusConfig) -> list[Piece]:
    """The pieces of a pool, each about a shard, whatever machines there are.

    A source of which only the beginning is taken is read by one process: where it ends is known
    only to one who has read it.
    """
    largest = max(LEAST_BYTES, BYTES_PER_TOKEN * cfg.shard_tokens)
    pieces = []
    for source in sources:
        limit = _limit(source, cfg)
        columns = text_columns({"column": cfg.column} | source)
        needed = [*columns, *source.get("keep", ())]
        all_parts = parts(source, largest if limit == inf else inf, needed)
        groups = [[part] for part in all_parts] if limit == inf else [all_parts]
        for group in groups:
            size = min(limit, sum(largest if part.bytes is None else part.bytes for part in group))
            if not pieces or pieces[-1].bytes + size > largest:
                pieces.append(Piece(folder / f"{len(pieces):05d}"))
            piece = pieces[-1]
            piece.bytes += int(size)
            piece.sources.append(source | {"parts": group})
    return pieces


def _limit(source: dict, cfg: CorpusConfig) -> float:
    """Bytes of a source's text that are taken, about; inf: all."""
    megabytes = min(cfg.megabytes or inf, source.get("megabytes", inf))
    return min(1e6 * megabytes, DOCUMENT_BYTES * source.get("documents", inf))


def prepare_piece(piece: Piece, cfg: CorpusConfig) -> dict:
    """The manifest of a piece, whose shards are made, or gone on with."""
    tokenizer = _load_tokenizer(*piece.tokenizer)
    manifest = read_manifest(piece.folder)
    if manifest is None or manifest["settings"] != piece.settings:
        manifest = {"settings": piece.settings, "complete": False, "shards": []}
    if _is_whole(piece.folder, manifest):
        return manifest
    position, skip = _resume(piece.folder, manifest)
    position.stop = cfg.on_bad_line == "stop"
    position.quiet = piece.folder.name != "00000"  # a pool's first piece shows what is bad
    manifest["complete"] = False
    duplicates = None
    if piece.duplicates:
        path, first = piece.duplicates
        duplicates = np.load(path, mmap_mode="r")[first:]
    writer = PieceWriter(piece.folder, tokenizer, manifest)
    stream = documents(piece.sources, cfg, piece.share, position, duplicates)
    for batch in _batches(stream, position, skip):
        n_written = batch.skipped  # documents after the batch's position
        batch_ids = tokenizer.encode_batch([text for _, text, _ in batch.documents])
        for (split, text, file), ids in zip(batch.documents, batch_ids):
            n_written += 1
            writer.shards[split].add(text, ids, file)
            if writer.shards[split].n_tokens >= cfg.shard_tokens:
                writer.close_shards(place=batch.position, skip=n_written)
    writer.close_shards(complete=True, place=asdict(position), skip=0)
    return manifest


@functools.cache  # one a process
def _load_tokenizer(path: Path, eot: str) -> Tokenizer:
    return Tokenizer.load(path, eot)


def _faulty_shards(folder: Path, entries: list[dict]) -> list[dict]:
    """Those of a manifest's shards that are missing or truncated."""
    return [entry for entry in entries if invalid_file_reason(folder / entry["file"], entry)]


def _is_whole(folder: Path, manifest: dict) -> bool:
    return manifest["complete"] and not _faulty_shards(folder, manifest["shards"])


def _resume(folder: Path, manifest: dict) -> tuple[ReadPosition, int]:
    """Where in the sources to go on, and how many documents from there on the shards hold.

    Where a shard is faulty, the manifest keeps those before it.
    """
    faulty = _faulty_shards(folder, manifest["shards"])
    if faulty:
        first = faulty[0]["number"]
        manifest["shards"] = [entry for entry in manifest["shards"] if entry["number"] < first]
    elif "place" in manifest:
        return ReadPosition(**manifest["place"]), manifest["skip"]
    n_documents = sum(entry["documents"] for entry in manifest["shards"])
    return ReadPosition(), n_documents  # past those documents, from the beginning


# --------------------------------------------------------------------------------------------------
# Pools, from their sources to their shards

@dataclass
class Pool:
    name: str
    folder: Path
    sources: list[dict]
    settings: str   # hash of all that decides its content
    tokenizer: str  # hash
    pieces: list[Piece] = field(default_factory=list)


def prepare_pools(folder: Path, tokenizer: tuple[Path, str], cfg: CorpusConfig, command: str,
                  engine: Engine) -> dict[str, dict]:
    """The manifest of each pool, whose shards are made, or gone on with, or left as they are."""
    pools = _pools(folder, tokenizer, cfg)
    manifests = {pool.name: read_manifest(pool.folder) for pool in pools}
    todo, changed = [], []
    for pool in pools:
        manifest = manifests[pool.name]
        if manifest and manifest["settings"] != pool.settings:
            print(f"pool {pool.name}: settings, sources or tokenizer changed; it is made again")
            changed.append(pool)
        elif manifest and _is_whole(pool.folder, manifest):
            print(f"pool {pool.name}: ready, nothing to do")
            continue
        todo.append(pool)
    if not todo:  # then no hub is asked
        return manifests
    to_read = [pool for pool in pools if pool in todo or pool.name in cfg.dedup]
    _cut_into_pieces(to_read, tokenizer, cfg)
    if cfg.dedup:
        mark_duplicates(folder / "duplicates", pools, cfg, engine)
    for pool in changed:  # only now: a hub that does not answer costs no shards
        _empty(pool.folder)
    made = _make(todo, cfg, command, engine)
    for pool in todo:
        manifests[pool.name] = _join(pool, [made[piece.folder] for piece in pool.pieces], command)
    return manifests


def _pools(folder: Path, tokenizer: tuple[Path, str], cfg: CorpusConfig) -> list[Pool]:
    """The pools of a config, with the hash of all that decides their content; no hub is asked."""
    tokenizer_hash = _load_tokenizer(*tokenizer).hash
    pools = []
    for name, sources in checked_pools(cfg).items():
        settings = [VERSION, tokenizer_hash, sources, _state(sources), cfg.column, cfg.megabytes,
                    held_out_share(sources, cfg), cfg.shard_tokens, cfg.on_bad_line]
        pools.append(Pool(name, folder / name, sources, _hash(settings), tokenizer_hash))
    by_name = {pool.name: pool for pool in pools}
    others = [by_name[name].settings for name in cfg.dedup]
    for name in cfg.dedup:
        by_name[name].settings = _hash([by_name[name].settings, others])
    return pools


def _cut_into_pieces(pools: list[Pool], tokenizer: tuple[Path, str], cfg: CorpusConfig) -> None:
    """Lists the files of the pools' sources, and cuts these into pieces."""
    for pool in pools:
        for source in pool.sources:
            if "hf" in source:
                declared = licence(source) or "its card names none"
                print(f"pool {pool.name}: {source['hf']}, licence: {declared}")
        pool.pieces = cut(pool.folder, pool.sources, cfg)
        for piece in pool.pieces:
            names = [str(part) for source in piece.sources for part in source["parts"]]
            piece.settings = _hash([pool.settings, names])
            piece.share = held_out_share(pool.sources, cfg)
            piece.tokenizer = tokenizer


def _make(pools: list[Pool], cfg: CorpusConfig, command: str,
          engine: Engine) -> dict[Path, dict]:
    """{folder: manifest} of all pieces of the pools; those that are not whole are made."""
    made, todo = {}, []
    for pool in pools:
        for piece in pool.pieces:
            manifest = read_manifest(piece.folder)
            is_same = manifest and manifest["settings"] == piece.settings
            if is_same and _is_whole(piece.folder, manifest):
                made[piece.folder] = manifest
                continue
            if is_same and manifest["shards"]:
                print(f"pool {pool.name}: piece {piece.folder.name} goes on after "
                      f"{len(manifest['shards'])} whole shards")
            for path in piece.folder.glob("*.tmp"):
                path.unlink()
            todo.append(piece)
        _write_manifest(pool, command, complete=False, shards=[])
    sizes = [piece.bytes for piece in todo]
    for piece, manifest in engine.map(prepare_piece, todo, "corpus", sizes, cfg=cfg):
        made[piece.folder] = manifest
    return made


def _join(pool: Pool, made: list[dict], command: str) -> dict:
    """The pool's manifest, which it writes: the union of its pieces'."""
    places = [manifest["place"] for manifest in made]
    lost = dict.fromkeys(("bad", "empty", "left_out", "duplicates"), 0)
    for place in places:
        for kind in lost:
            lost[kind] += place[kind]
    shards = []
    for piece, manifest in zip(pool.pieces, made):
        for entry in manifest["shards"]:
            entry = entry | {"file": f"{piece.folder.name}/{entry['file']}"}
            del entry["files"]
            shards.append(entry)
    if not any(entry["split"] == "train" for entry in shards):
        bad_lines = [place["first"] for place in places if place["first"]]
        raise UserError(f"no documents to train on in {pool.sources}: {lost['empty']} empty, "
                        f"{lost['bad']} bad lines, {lost['left_out']} outside of \"keep\""
                        + "".join(f"; {line}" for line in bad_lines[:1]))
    return _write_manifest(pool, command, complete=True, shards=shards, lost=lost,
                           files=_files_of(made))


def _files_of(made: list[dict]) -> dict[str, dict]:
    """{file: its counts, tokens and first bad line}, of the manifests of pieces; a large file is
    in several."""
    files = {}
    for manifest in made:
        for name, counts in manifest["place"]["files"].items():
            empty = dict.fromkeys((*COUNTS, "tokens"), 0) | {"first": ""}
            total = files.setdefault(name, empty)
            total["first"] = total["first"] or counts.get("first", "")
            for kind in COUNTS:
                total[kind] += counts.get(kind, 0)
        for entry in manifest["shards"]:
            for name, n_tokens in entry["files"].items():
                files[name]["tokens"] += n_tokens
    return files


def _write_manifest(pool: Pool, command: str, **state) -> dict:
    manifest = {"settings": pool.settings, "tokenizer": pool.tokenizer, "command": command} | state
    write_whole(pool.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _empty(folder: Path) -> None:
    """Deletes a pool's files."""
    (folder / "manifest.json").unlink(missing_ok=True)  # first: no shards without their own
    for path in [*folder.glob("train_*.bin"), *folder.glob("val_*.bin")]:  # of older versions
        path.unlink()
    for path in folder.glob("[0-9]*"):
        shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------
# Duplicates across sources and pools

def mark_duplicates(folder: Path, pools: list[Pool], cfg: CorpusConfig, engine: Engine) -> None:
    """Tells the pieces of the pools that cfg.dedup names which of their documents stay elsewhere.

    Each piece is signed, then all signatures are looked at together, in the order of cfg.dedup.
    """
    by_name = {pool.name: pool for pool in pools}
    pieces = [piece for name in cfg.dedup for piece in by_name[name].pieces]
    made_by = _hash([dedup.SCHEME, *(piece.settings for piece in pieces)])
    folder = folder / made_by
    sizes = [piece.bytes for piece in pieces]
    items = list(enumerate(pieces))
    for _ in engine.map(sign_piece, items, "sign", sizes, cfg=cfg, folder=folder):
        pass
    firsts = dedup.merge(folder, len(pieces), engine)
    for piece, first in zip(pieces, firsts):
        piece.duplicates = (folder / dedup.DUPLICATES, int(first))


def sign_piece(item: tuple[int, Piece], cfg: CorpusConfig, folder: Path) -> None:
    """Writes the signatures of a piece's documents, if they are not there."""
    number, piece = item
    position = ReadPosition(quiet=True, stop=cfg.on_bad_line == "stop")
    stream = texts(piece.sources, position, cfg.column, cfg.megabytes or inf)
    dedup.sign((text for text, _ in stream), folder, number)


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
    manifest = read_manifest(folder)
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
    write_whole(path, tokenizer.json.encode())
    manifest = {"settings": settings, "hash": tokenizer.hash}
    write_whole(folder / "manifest.json", json.dumps(manifest).encode())
    return tokenizer


def _sample(pools: dict[str, list[dict]], cfg: CorpusConfig) -> Iterator[str]:
    """Training texts, the next always from the pool that has given the fewest characters so far."""
    streams = {}
    for name, sources in pools.items():
        share = held_out_share(sources, cfg)
        in_parts = [source for piece in cut(Path(name), sources, cfg) for source in piece.sources]
        streams[name] = documents(in_parts, cfg, share, ReadPosition(quiet=True))
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


def prepare(folder: Path, tokenizer_cfg: TokenizerConfig, cfg: CorpusConfig, command: str,
            engine: str = "processes") -> dict[str, dict]:
    """Each pool's manifest, after all is made that is not there yet under folder."""
    if engine == "ray":
        connect()  # what is wrong with the cluster shows before a tokenizer is trained
    prepare_tokenizer(folder, tokenizer_cfg, cfg)
    tokenizer = (folder / "tokenizer.json", tokenizer_cfg.eot)
    _load_tokenizer.cache_clear()  # it may be another one than this process knows
    return prepare_pools(folder, tokenizer, cfg, command, Engine(engine, cfg.workers))


def verify(folder: Path, engine: Engine = Engine()) -> int:
    """Reads every shard of a pool against its checksum; returns their number.

    UserError names one that differs.
    """
    manifest = read_manifest(folder)
    if not manifest:
        raise UserError(f"no data in {folder}: nothing to verify")
    if not manifest["complete"]:
        raise UserError(f"{folder} is not finished: `{manifest['command']}` goes on with it")
    entries = manifest["shards"]
    sizes = [entry["bytes"] for entry in entries]
    for entry, reason in engine.map(check_shard, entries, f"verify {folder.name}", sizes,
                                    folder=folder):
        if reason:
            raise UserError(f"{folder / entry['file']} {reason}: delete it, then make it again "
                            f"with `{manifest['command']}`")
    return len(entries)


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
        lost = manifest["lost"]
        if any(lost.values()):
            print(f"{name:12} {_left_out(lost)}")
    for name, manifest in manifests.items():
        _print_files(name, manifest.get("files", {}))  # of older versions it has none


MOST_FILES = 30  # that are shown of a pool


def _print_files(pool: str, files: dict[str, dict]) -> None:
    """Prints a pool's files, those that lost something first; nothing of one that is whole."""
    lossy = {name for name, counts in files.items() if _n_left_out(counts)}
    if len(files) < 2 and not lossy:
        return
    print(f"\n{'documents':>12} {'tokens':>16}  file of pool {pool}")
    order = sorted(files, key=lambda name: name not in lossy)
    for name in order[:MOST_FILES]:
        counts = files[name]
        n_documents = counts["documents"] - counts["duplicates"]
        print(f"{n_documents:12,} {counts['tokens']:16,}  {name}")
        if name in lossy:
            print(f"{'':31}left out: {_left_out(counts)}")
        if counts["first"]:
            print(f"{'':31}first bad line: {counts['first']}")
    if len(files) > MOST_FILES:
        print(f"{'':31}… and {len(files) - MOST_FILES} more files")


def _n_left_out(counts: dict[str, int]) -> int:
    return sum(counts[kind] for kind in COUNTS[1:])


def _left_out(counts: dict[str, int]) -> str:
    """What was left out, and why."""
    return (f"bad lines: {counts['bad']}, empty documents: {counts['empty']}, "
            f"outside of \"keep\": {counts['left_out']}, duplicates: {counts['duplicates']}")


def main() -> None:
    flags = {"verify": "only read every shard against its checksum"}
    config = load_config(__doc__, flags=flags, options=("run", "engine"),
                         tokenizer=TokenizerConfig, corpus=CorpusConfig)
    folder = data_folder(config)
    command = "python -m data.text." + config.command.replace(".py", "", 1)
    if config.verify:
        engine = Engine(config.engine, config.corpus.workers)
        for name in checked_pools(config.corpus):
            print(f"pool {name}: {verify(folder / name, engine)} shards equal their checksums")
    else:
        common.lock_folder(folder)
        manifests = prepare(folder, config.tokenizer, config.corpus, command, config.engine)
        print_table(manifests)


if __name__ == "__main__":
    common.cli(main)
