"""Exact and near duplicates, and overlap with evaluation sets: all on hashed words, so that memory stays small.

Near duplicates by MinHash (Broder 1997) with banding: BANDS * ROWS minima over the hashes of a document's 5-word runs,
and two documents are near duplicates where all minima of a band agree. With a share s of common runs that happens with
the chance 1 - (1 - s^ROWS)^BANDS: 0.05 at s = .5, 0.56 at .7, 0.92 at .8, 0.999 at .9. The report (arXiv 2512.06266)
does not say how it removed duplicates: our choice.

A machine signs a shard at a time; `duplicates` then looks at all signatures, a slice of the hash range at a time.
"""
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from zlib import crc32

import numpy as np

BANDS, ROWS, RUN = 14, 8, 5  # RUN: words of a run
COLUMNS = BANDS + 1          # of a signature: the bands and the exact hash
GRAM = 13                    # words in a row that an evaluation set may not share (GPT-3, arXiv 2005.14165)
PIECE = 1 << 20              # characters of a document that are looked at together: a bound on memory

# Words, signs, and each character of scripts that put no space between words.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]|[^\w\s]")
_ODD = np.uint64(0x9E3779B97F4A7C15)
_rng = np.random.default_rng(20251206)
_A, _B = (_rng.integers(1, 2**64, BANDS * ROWS, dtype=np.uint64) for _ in range(2))
_A |= np.uint64(1)


def tokens(text: str) -> list[str]:
    """Lower-case words and signs."""
    return _TOKEN.findall(text.lower())


def count(text: str) -> int:
    """Number of tokens, without holding them all."""
    return sum(len(tokens(text[first:first + PIECE])) for first in range(0, len(text), PIECE))


def hashes(tokens: list[str]) -> np.ndarray:
    """(n,) uint64: a hash of each token, the same on every machine."""
    return _mix(np.fromiter((crc32(t.encode("utf-8", "replace")) for t in tokens), np.uint64, len(tokens)))


def _mix(x: np.ndarray) -> np.ndarray:
    """Spreads bits (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def runs(words: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all runs of n words: (len(words) - n + 1,) uint64, empty where there are fewer words."""
    x = words[:max(0, len(words) - n + 1)]
    for i in range(1, n):
        x = x * _ODD + words[i:i + len(x)]
    return _mix(x) if n > 1 else x


def pieces(text: str, overlap: int = 2000) -> Iterator[np.ndarray]:
    """Hashed words (no signs) of a text, PIECE characters at a time, each overlapping the one before."""
    for first in range(0, max(1, len(text)), PIECE):
        found = tokens(text[max(0, first - overlap):first + PIECE])
        yield hashes([t for t in found if t[0].isalnum()])


def signature(text: str) -> np.ndarray:
    """(COLUMNS,) uint64: hashes of the bands, and last one of all words (exact but for case, signs and spaces)."""
    minima, whole = np.full(BANDS * ROWS, 2**64 - 1, np.uint64), hashlib.blake2b(digest_size=8)
    for words in pieces(text, overlap=0):
        whole.update(words.tobytes())
        shingles = runs(words, RUN)
        for first in range(0, len(shingles), 2048):  # a table that stays in the cache
            minima = np.minimum(minima, (shingles[first:first + 2048, None] * _A + _B).min(0))
    exact = np.frombuffer(whole.digest(), np.uint64)
    if minima[0] == 2**64 - 1:  # shorter than a run: near is exact
        minima[:] = exact
    bands = np.stack([runs(band, ROWS)[0] + np.uint64(i) for i, band in enumerate(minima.reshape(BANDS, ROWS))])
    return np.concatenate([bands, exact])


def duplicates(files: list[Path], out: Path, slice_size: int = 1 << 24) -> np.ndarray:
    """(documents,) uint8, on the disk at `out`: 0 for a document to keep, 1 near, 2 exact duplicate of an earlier one.

    files: one .npy of signatures (documents, COLUMNS) a shard; the order of shards and documents says which is earlier.
    Each column is cut by hash into slices of about slice_size values, so that memory does not grow with the corpus.
    """
    shards = [np.load(path, mmap_mode="r") for path in files]
    firsts = np.cumsum([0] + [len(shard) for shard in shards])
    found = np.lib.format.open_memmap(out, "w+", np.uint8, (int(firsts[-1]),))
    n_slices = max(1, -(-int(firsts[-1]) // slice_size))
    for column in range(COLUMNS):
        for part in range(n_slices):
            values, places = [], []
            for first, shard in zip(firsts, shards):
                column_values = np.ascontiguousarray(shard[:, column])
                mine = np.flatnonzero(column_values % np.uint64(n_slices) == part)
                values.append(column_values[mine])
                places.append(mine + first)
            values, places = np.concatenate(values), np.concatenate(places)
            order = np.argsort(values, kind="stable")
            again = np.flatnonzero(values[order][1:] == values[order][:-1]) + 1
            again = places[order][again]
            found[again] = np.maximum(found[again], 2 if column == COLUMNS - 1 else 1)
    found.flush()
    return found


class Contamination:
    """Whether a document shares a run of GRAM words with an evaluation set.

    An item of fewer words is looked for as a whole, down to 8 words; still shorter ones say nothing and are counted.
    """

    def __init__(self, items: Iterable[str]):
        grams, self.n_items, self.too_short = {}, 0, 0
        for text in items:
            for words in pieces(text):
                self.n_items += 1
                n = min(GRAM, len(words))
                self.too_short += n < 8
                if n >= 8:
                    grams.setdefault(n, []).append(runs(words, n))
        self.grams = {n: np.unique(np.concatenate(found)) for n, found in grams.items()}

    def __call__(self, text: str) -> bool:
        for words in pieces(text) if self.grams else ():
            for n, known in self.grams.items():
                run = runs(words, n)
                at = np.searchsorted(known, run)
                if (known[np.minimum(at, len(known) - 1)] == run).any():
                    return True
        return False
