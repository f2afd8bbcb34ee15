"""Exact and near duplicates, and overlap with evaluation sets, all on hashed words: little memory.

Near duplicates by MinHash (Broder 1997) with banding: BANDS * ROWS minima over the hashes of a
document's 5-word runs, and two documents are near duplicates where all minima of a band agree. With
a share s of common runs that happens with the chance 1 - (1 - s^ROWS)^BANDS: 0.05 at s = .5, 0.56
at .7, 0.92 at .8, 0.999 at .9. The report (arXiv 2512.06266) does not say how it removed
duplicates: our choice.

A piece of the documents is signed at a time (`sign`). `merge` then looks at all signatures, and
whoever is free takes one slice of the hash range of one column of them: memory does not grow with
the corpus, and of each two duplicates the one of the lower number stays.
"""
import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from zlib import crc32

import numpy as np

from data.engine import Engine

BANDS, ROWS = 14, 8
SCHEME = "minima of 32 bits"  # names the folder of signatures: another way of signing, another name
RUN = 5                      # words of a run
COLUMNS = BANDS + 1          # of a signature: the bands and the exact hash
GRAM = 13                    # words in a row that an evaluation set may not share (GPT-3, arXiv
#                              2005.14165)
SHORTEST = 8                 # words of an item that is looked for
PIECE = 1 << 20              # characters of a document that are looked at together: bounds memory
NEAR, EXACT = 1, 2           # kinds of duplicate

# Words, signs, and each character of scripts that put no space between words.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]|[^\w\s]")

# h(x) = _A * x + _B is another hash function in each of the BANDS * ROWS. They have 32 bits, as the
# processor multiplies and compares eight such numbers at once, and of 64 bits one.
_ODD = np.uint64(0x9E3779B97F4A7C15)
_rng = np.random.default_rng(20251206)
_A = _rng.integers(1, 2**32, (BANDS * ROWS, 1), dtype=np.uint32)
_B = _rng.integers(1, 2**32, (BANDS * ROWS, 1), dtype=np.uint32)
_A |= np.uint32(1)
TABLE = 2048                 # runs that are hashed together: the table stays in the cache


def tokens(text: str) -> list[str]:
    """Lower-case words and signs."""
    return _TOKEN.findall(text.lower())


def count(text: str) -> int:
    """Number of tokens, without holding them all."""
    return sum(len(tokens(text[first:first + PIECE])) for first in range(0, len(text), PIECE))


def hashes(tokens: list[str]) -> np.ndarray:
    """(n,) uint64: a hash of each token, the same on every machine."""
    checksums = (crc32(token.encode("utf-8", "replace")) for token in tokens)
    return _mix(np.fromiter(checksums, np.uint64, len(tokens)))


def _mix(x: np.ndarray) -> np.ndarray:
    """Spreads bits (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def runs(words: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all runs of n words, (len(words) - n + 1,) uint64; empty where words are fewer.

    words: uint64; further dimensions stay.
    """
    if n == 1:
        return words
    x = words[:max(0, len(words) - n + 1)]
    for i in range(1, n):
        x = x * _ODD + words[i:i + len(x)]
    return _mix(x)


def pieces(text: str, overlap: int = 2000) -> Iterator[np.ndarray]:
    """Hashed words (no signs) of a text, PIECE characters at a time.

    Each piece overlaps the one before by so many characters.
    """
    for first in range(0, max(1, len(text)), PIECE):
        piece = text[max(0, first - overlap):first + PIECE]
        yield hashes([token for token in tokens(piece) if token[0].isalnum()])


def signature(text: str) -> np.ndarray:
    """(COLUMNS,) uint64: hashes of the bands, then one of all words.

    The last is exact but for case, signs and spaces.
    """
    largest = np.iinfo(np.uint32).max
    minima = np.full(BANDS * ROWS, largest, np.uint32)
    whole = hashlib.blake2b(digest_size=8)
    for words in pieces(text, overlap=0):
        whole.update(words.tobytes())
        shingles = (runs(words, RUN) >> np.uint64(32)).astype(np.uint32)
        for first in range(0, len(shingles), TABLE):
            table = _A * shingles[first:first + TABLE]  # (BANDS * ROWS, runs)
            table += _B
            np.minimum(minima, table.min(1), out=minima)
    exact = np.frombuffer(whole.digest(), np.uint64)
    if (minima == largest).all():  # shorter than a run: near is exact
        bands = np.repeat(exact, BANDS)
    else:
        bands = minima.reshape(BANDS, ROWS).astype(np.uint64)
        bands = runs(bands.T, ROWS)[0] + np.arange(BANDS, dtype=np.uint64)
    return np.concatenate([bands, exact])


# --------------------------------------------------------------------------------------------------
# Duplicates among all documents, whose numbers count through all pieces in their order

SLICE = 1 << 24             # values of a column that are looked at together
DUPLICATES = "duplicates.npy"


def sign(documents: Iterable[str], folder: Path, number: int) -> None:
    """Writes the signatures of a piece's documents to <folder>/<number>, if they are not there.

    values.npy is (COLUMNS, documents) uint64, each column sorted, so that a slice of the hash range
    lies together; documents.npy (COLUMNS, documents) uint32 says whose they are.
    """
    path = folder / f"{number:05d}"
    if (path / "values.npy").is_file():
        return
    signatures = np.array([signature(text) for text in documents], np.uint64)
    columns = signatures.reshape(-1, COLUMNS).T
    order = np.argsort(columns, axis=1, kind="stable")
    _save(path / "documents.npy", order.astype(np.uint32))
    _save(path / "values.npy", np.take_along_axis(columns, order, axis=1))  # last: the mark


def unsigned(folder: Path, n_pieces: int) -> list[int]:
    """Numbers of the pieces that sign() has not written."""
    return [number for number in range(n_pieces)
            if not (folder / f"{number:05d}" / "values.npy").is_file()]


def _save(path: Path, array: np.ndarray) -> None:
    """Writes a .npy, whole or absent; two may write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.tmp.npy")
    np.save(aside, array)
    aside.replace(path)


def merge(folder: Path, n_pieces: int, engine: Engine, slice_size: int = SLICE) -> np.ndarray:
    """Writes <folder>/DUPLICATES, (documents,) uint8: 0, or NEAR or EXACT duplicate of an earlier.

    Returns the number of each piece's first document, and that of all documents.
    """
    counts = [_columns(folder, number)[0].shape[1] for number in range(n_pieces)]
    firsts = np.cumsum([0, *counts])
    n_documents = int(firsts[-1])
    if (folder / DUPLICATES).is_file():
        return firsts
    _save(folder / "firsts.npy", firsts)
    n_slices = max(1, -(-n_documents // slice_size))
    slices = [(column, part) for column in range(COLUMNS) for part in range(n_slices)]
    sizes = [8 * n_documents // n_slices for _ in slices]
    for _ in engine.map(find_repeated, slices, "merge", sizes, folder=folder, n_slices=n_slices):
        pass
    aside = folder / "duplicates.tmp.npy"
    kinds = np.lib.format.open_memmap(aside, "w+", np.uint8, (n_documents,))
    for column, part in slices:
        again = np.load(_repeated_file(folder, column, part))
        kind = EXACT if column == COLUMNS - 1 else NEAR
        kinds[again] = np.maximum(kinds[again], kind)
    kinds.flush()
    aside.replace(folder / DUPLICATES)
    return firsts


def _columns(folder: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """What sign() wrote of a piece, memory-mapped."""
    names = ("values.npy", "documents.npy")
    return tuple(np.load(folder / f"{number:05d}" / name, mmap_mode="r") for name in names)


def _repeated_file(folder: Path, column: int, part: int) -> Path:
    return folder / "repeated" / f"{column:02d}_{part:05d}.npy"


def find_repeated(item: tuple[int, int], folder: Path, n_slices: int) -> None:
    """Writes the numbers of the documents whose value in a column an earlier document has, too.

    item: the column, and the slice of its hash range.
    """
    column, part = item
    path = _repeated_file(folder, column, part)
    if path.is_file():
        return
    low, high = (part * 2**64 // n_slices, (part + 1) * 2**64 // n_slices - 1)
    values, numbers = [], []
    firsts = np.load(folder / "firsts.npy")
    for number, first in enumerate(firsts[:-1]):
        all_values, documents = _columns(folder, number)
        begin = np.searchsorted(all_values[column], np.uint64(low), "left")
        end = np.searchsorted(all_values[column], np.uint64(high), "right")
        values.append(all_values[column, begin:end])
        numbers.append(documents[column, begin:end] + first)
    values, numbers = np.concatenate(values), np.concatenate(numbers)
    in_order = np.lexsort((numbers, values))
    values, numbers = values[in_order], numbers[in_order]
    again = np.flatnonzero(values[1:] == values[:-1]) + 1
    _save(path, numbers[again])


class Contamination:
    """Whether a document shares a run of GRAM words with an evaluation set.

    An item of fewer words is looked for as a whole, down to SHORTEST words; still shorter ones say
    nothing and are counted.
    """

    def __init__(self, items: Iterable[str]):
        self.n_items = 0
        self.too_short = 0
        by_length = {}  # words of a run -> hashes of the runs of each item
        for text in items:
            for words in pieces(text):
                self.n_items += 1
                n = min(GRAM, len(words))
                if n < SHORTEST:
                    self.too_short += 1
                else:
                    by_length.setdefault(n, []).append(runs(words, n))
        self.grams = {n: np.unique(np.concatenate(hashed)) for n, hashed in by_length.items()}

    def __call__(self, text: str) -> bool:
        if not self.grams:
            return False
        for words in pieces(text):
            for n, known in self.grams.items():
                hashed = runs(words, n)
                at = np.searchsorted(known, hashed)
                nearest = known[np.minimum(at, len(known) - 1)]
                if (nearest == hashed).any():
                    return True
        return False
