"""Duplicates and overlap against plain set arithmetic."""

import random

import numpy as np

from data.engine import Engine
from data.filter import dedup


def words(rng: random.Random, n: int) -> list[str]:
    return [f"w{int(rng.random() * 5000)}" for _ in range(n)]


def shingles(text: list[str]) -> set:
    return {tuple(text[i : i + dedup.RUN]) for i in range(len(text) - dedup.RUN + 1)}


def changed(rng: random.Random, text: list[str], share: float) -> list[str]:
    """The text with words replaced until about `share` of its runs are common to both."""
    other = list(text)
    while len(shingles(text) & shingles(other)) / len(shingles(text) | shingles(other)) > share:
        other[int(rng.random() * len(other))] = "new"
    return other


def test_near_duplicates_are_found_as_often_as_the_formula_says():
    rng = random.Random(0)
    for share in (0.5, 0.7, 0.9):
        found, expected = 0, []
        for _ in range(300):
            text = words(rng, 150)
            other = changed(rng, text, share)
            s = len(shingles(text) & shingles(other)) / len(shingles(text) | shingles(other))
            expected.append(1 - (1 - s**dedup.ROWS) ** dedup.BANDS)
            a, b = (dedup.signature(" ".join(t)) for t in (text, other))
            found += bool((a[:-1] == b[:-1]).any())
        p = np.mean(expected)
        assert abs(found / 300 - p) < 4 * (p * (1 - p) / 300) ** 0.5 + 0.01, (share, found / 300, p)


def test_signature_is_of_the_least_hashes(monkeypatch):
    """The same in whole numbers of Python, also where the runs are hashed in several tables."""
    monkeypatch.setattr(dedup, "TABLE", 7)
    text = " ".join(words(random.Random(3), 60))
    runs = [int(x) >> 32 for x in dedup.runs(dedup.hashes(text.split()), dedup.RUN)]
    minima = []
    for a, b in zip(dedup._A[:, 0].tolist(), dedup._B[:, 0].tolist()):
        minima.append(min((a * x + b) % 2**32 for x in runs))
    bands = np.array(minima, np.uint64).reshape(dedup.BANDS, dedup.ROWS)
    expected = [int(dedup.runs(band, dedup.ROWS)[0]) + i for i, band in enumerate(bands)]
    assert dedup.signature(text)[:-1].tolist() == [value % 2**64 for value in expected]


def test_runs_are_hashes_of_the_very_words():
    h = dedup.hashes("a b c a b c".split())
    three = dedup.runs(h, 3)
    assert len(three) == 4 and three[0] == three[3] and len(set(three.tolist())) == 3
    assert dedup.runs(h, 7).tolist() == [] and (dedup.runs(h, 1) == h).all()
    assert dedup.tokens("Zwölf 中文 x_1, don't!") == [
        "zwölf",
        "中",
        "文",
        "x_1",
        ",",
        "don",
        "'",
        "t",
        "!",
    ]


def test_a_long_text_is_read_in_pieces(monkeypatch):
    text = " ".join(words(random.Random(1), 4000))
    whole = dedup.Contamination([text[9000:9200]])
    monkeypatch.setattr(dedup, "PIECE", 1000)
    assert whole(text)  # also where a run lies across two pieces
    assert not whole(text[:8900])
    assert (dedup.signature(text) == dedup.signature(text)).all()


def test_duplicates_keep_the_first_in_order(tmp_path):
    rng = random.Random(2)
    a, b, c = (" ".join(words(rng, 60)) for _ in range(3))
    texts = [[a, b, "x"], [], [b.upper() + "!", c, "x", a + " and a tail"]]
    for slice_size in (1 << 24, 2):  # one slice, and several
        folder = tmp_path / str(slice_size)
        for number, piece in enumerate(texts):
            assert number in dedup.unsigned(folder, 3)
            dedup.sign(piece, folder, number)
        firsts = dedup.merge(folder, 3, Engine(workers=1), slice_size)
        assert firsts.tolist() == [0, 3, 3, 7] and not dedup.unsigned(folder, 3)
        assert np.load(folder / dedup.DUPLICATES).tolist() == [0, 0, 0, 2, 0, 2, 1]


def test_contamination():
    item = "a train leaves at nine and needs two hours for the first eighty miles of its way"
    found = dedup.Contamination(
        [item, "seven words are too few to say", "eight words are just enough to say something"]
    )
    assert found.n_items == 3 and found.too_short == 1
    assert found(
        "It is said: A TRAIN leaves, at nine and needs two hours for the first eighty miles. So?"
    )
    assert not found(
        "a train leaves at nine and needs two hours for the last eighty miles of its way"
    )
    assert (
        found("here eight words are just enough to say something too")
        and not found("")
        and not found("short")
    )
    assert not dedup.Contamination([])("anything at all")
