"""Synthetic code problems: what is kept holds, what is wrong is thrown out, with and without a
writer.
"""

import json
from collections import Counter

import pytest

from data.sets import synthesize, synthetic
from data.sets.programs import mutants
from data.sets.synthesize import SynthesizeConfig, invalid_reason, standalone_functions
from data.tasks.problem import seeded_rng
from data.verify import jail
from data.verify.sandbox import Sandbox


@pytest.fixture(scope="module")
def box():
    with Sandbox() as box:
        yield box


def test_by_grammar(tmp_path, box):
    """Both ways, each of the kept passes its tests and its mutants do not; a second run writes the
    same bytes.
    """
    ends = synthesize.run(SynthesizeConfig(n=12), tmp_path)
    lines = (tmp_path / "synthetic.jsonl").read_text()
    drafts = [json.loads(line) for line in lines.splitlines()]
    assert Counter(draft["way"] for draft in drafts) == {
        way: ends[way, "kept"] for way in ("forward", "backward")
    }
    assert min(ends["forward", "kept"], ends["backward", "kept"]) >= 4 and ends.total() == 24
    for draft in drafts:
        problem = synthetic.read(draft)
        assert (
            synthetic.reward(problem, f"<think>so</think>Here:\n```python\n{draft['solution']}```")
            == 1.0
        )
        for wrong in (
            *mutants(draft["solution"], seeded_rng("test"), 3),
            "def f(x): return None",
            "import os\nos._exit(0)",
            "def f(x):\n    class E(int): __eq__ = lambda s, o: True\n    return E()",
        ):
            assert synthetic.reward(problem, f"```python\n{wrong}\n```") == 0.0
        assert synthetic.reward(problem, f"<think>{draft['solution']}") == 0.0
        inputs, results = zip(*draft["tests"])
        space = {}
        exec(draft["solution"], space)  # our own text
        assert [space["f"](*jail.decode(a)) for a in inputs] == [
            jail.decode(value) for value in results
        ]
    synthesize.run(SynthesizeConfig(n=12), tmp_path)
    assert (tmp_path / "synthetic.jsonl").read_text() == lines


def test_faults(box):
    def draft(**changes):
        tests = [[jail.encode(([n],)), n % 3] for n in range(-2, 9)]
        return dict(solution="def f(x):\n    return x[0] % 3\n", name="f", tests=tests) | changes

    rng = seeded_rng("faults")
    assert invalid_reason(draft(), 2, rng, box) == ""
    assert (
        invalid_reason(draft(tests=draft()["tests"][:3]), 2, rng, box)
        == "fewer than 4 usable tests"
    )
    assert (
        invalid_reason(draft(solution="def f(x): return x[0] // 3"), 2, rng, box)
        == "the known solution fails"
    )
    assert (
        invalid_reason(draft(solution="def f(x):\n    while True: pass"), 2, rng, box)
        == "the known solution fails"
    )
    assert (
        invalid_reason(draft(second="def f(x): return x[0]"), 2, rng, box)
        == "a second solution fails"
    )
    assert invalid_reason(draft(second="def f(x): return (x[0] - 3) % 3"), 2, rng, box) == ""
    assert invalid_reason(draft(), 99, rng, box) == "too few wrong variants"
    weak = [[jail.encode(([0],)), 0]] * 4  # 0 is 0 by other programs too
    assert invalid_reason(draft(tests=weak), 3, rng, box) == "a wrong variant passes"


def test_standalone_functions():
    files = [
        "import os\ndef short(x): return x\n\ndef good(a, b=2):\n    c = a\n    d = b\n"
        "    return c + d\n",
        "def no_result(x):\n    y = x\n    z = y\n    print(z)\n\n@wraps\ndef decorated(x):\n"
        "    y = x\n    z = y\n    return z\n",
        "def ( broken",
    ]
    assert [text.splitlines()[0] for text in standalone_functions(iter(files))] == [
        "def good(a, b=2):"
    ]


def scripted(conversations, on_result):
    """A writer that knows one exercise: the sum of squares above a bound."""

    def answer(text):
        if "ends backwards" in text or "Write one programming exercise about bad" in text:
            return None
        if text.startswith("Write one programming exercise"):
            exercise = "Write total(x, least): the sum of the squares of the numbers of x above it."
            return f"<think>sum?</think>{exercise}"
        if "a list of at least eight tests" in text:
            tests = [[[list(range(n)), 1], sum(v * v for v in range(n) if v > 1)] for n in range(8)]
            return "Sure:\n```json\n" + json.dumps(tests) + "\n```"
        if "lists of arguments" in text:
            return "```json\n" + json.dumps([[list(range(n)), n // 2] for n in range(9)]) + "\n```"
        if "Write the exercise whose solution" in text:
            assert "total([], 0) = 0" in text
            return "Write total(x, least), the sum of v * v over the v of x with v > least."
        if "Answer with one ```python block" in text:
            solution = "def total(x, least):\n    return sum(v * v for v in x if v > least)\n"
            return f"```python\n{solution}```"
        raise AssertionError(text)

    texts = [conversation and answer(conversation[0]["content"]) for conversation in conversations]
    for i, text in enumerate(texts):
        on_result(i, text)
    return texts


def test_by_a_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "http_llm", lambda cfg: scripted)
    code = (
        "def total(x, least):\n    s = 0\n    for v in x:\n        if v > least:\n"
        "            s += v ** 2\n    return s\n\n"
        "def broken(x, least):\n    y = x\n    z = y\n    return z.missing\n"
    )
    (tmp_path / "code.jsonl").write_text(json.dumps({"text": code}) + "\n")
    cfg = SynthesizeConfig(
        n=2,
        variants=3,
        writer={"url": "http://localhost:1/v1"},
        topics=["sums", "bad"],
        functions=[{"path": str(tmp_path / "code.jsonl")}],
    )
    ends = synthesize.run(cfg, tmp_path)
    assert ends["forward", "kept"] == 1 and ends["backward", "kept"] == 1 and ends.total() == 2, (
        ends
    )
    drafts = [json.loads(line) for line in (tmp_path / "synthetic.jsonl").read_text().splitlines()]
    assert [d["way"] for d in drafts] == ["forward", "backward"] and all(
        d["name"] == "total" for d in drafts
    )
    assert "squares" in drafts[0]["question"] and "second" not in drafts[0]
