"""Synthetic code problems: what is kept holds, what is wrong is thrown out, with and without a
writer.
"""

import json

import pytest

from data.sets import synthesize, synthetic
from data.sets.programs import mutants
from data.sets.synthesize import SynthesizeConfig, invalid_reason, standalone_functions
from data.tasks import code, registry
from data.tasks.problem import seeded_rng, to_chat
from data.verify import jail
from data.verify.sandbox import Sandbox


@pytest.fixture(scope="module")
def box():
    with Sandbox() as box:
        yield box


FILES = ("forward.jsonl", "backward.jsonl", "programs.jsonl", "counts.json")


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_by_grammar(tmp_path, box):
    """Both ways, each of the kept passes its tests and its mutants do not; a second run writes the
    same bytes.
    """
    cfg = SynthesizeConfig(n=9, conversations=3)
    counts = synthesize.run(cfg, tmp_path)
    texts = [(tmp_path / name).read_text() for name in FILES]
    assert synthesize.read_counts(cfg, tmp_path) == counts
    assert synthesize.read_counts(SynthesizeConfig(n=10, conversations=3), tmp_path) is None
    assert counts.keys() == {"forward", "backward"}
    for way, ends in counts.items():
        records = read_lines(tmp_path / f"{way}.jsonl")
        assert ends["made"] == 9 == ends["kept"] + sum(ends["refused"].values())
        assert len(records) == ends["kept"] == sum(ends["splits"].values()) >= 4
        for record in records:
            check_kept(synthetic.read(record), record["solution"])
            inputs, results = zip(*record["tests"])
            space = {}
            exec(record["solution"], space)  # our own text
            assert [space["f"](*jail.decode(a)) for a in inputs] == [
                jail.decode(value) for value in results
            ]
    synthesize.run(cfg, tmp_path)
    assert [(tmp_path / name).read_text() for name in FILES] == texts


def test_a_refused_draft_is_in_the_way_of_no_later_one(tmp_path, monkeypatch):
    """The second of three drafts of the same problem is the first that holds."""
    draft = dict(key="k", question="q", name="f", solution="def f(x):\n    return x", tests=[])
    ends = ["a wrong variant passes", "", ""]
    monkeypatch.setattr(synthesize, "draw_drafts", lambda cfg, box: {"forward": [draft] * 3})
    monkeypatch.setattr(synthesize, "check", lambda drafts, way, cfg, box: ends)
    monkeypatch.setattr(synthesize, "to_conversation", lambda record: {})
    counts = synthesize.run(SynthesizeConfig(n=3), tmp_path)
    assert counts["forward"]["made"] == 3 and counts["forward"]["kept"] == 1
    assert counts["forward"]["refused"] == {"a wrong variant passes": 1, "made before": 1}


def check_kept(problem, solution):
    """The known solution earns the reward, fenced as SFT has it; wrong ones and cheats do not."""
    _, reply = to_chat(problem)
    assert synthetic.reward(problem, reply["content"]) == 1.0
    assert synthetic.reward(problem, f"<think>so</think>Here:\n```python\n{solution}```") == 1.0
    for wrong in (
        *mutants(solution, seeded_rng("test"), 3),
        "def f(x): return None",
        "import os\nos._exit(0)",
        "def f(x):\n    class E(int): __eq__ = lambda s, o: True\n    return E()",
    ):
        assert synthetic.reward(problem, f"```python\n{wrong}\n```") == 0.0
    assert synthetic.reward(problem, f"<think>{solution}") == 0.0


def test_splits(tmp_path, box):
    """By a hash of the problem: what `code` holds out is held out forward, and one program's
    examples never stand on two sides. SFT gets training problems alone.
    """
    counts = synthesize.run(SynthesizeConfig(n=36, conversations=99), tmp_path)
    by_split = {}
    for way in ("forward", "backward"):
        family = registry.family(f"synthetic={tmp_path / way}.jsonl")
        for split in ("train", "dev", "test"):
            by_split[way, split] = family.problems(split, 99, 0)
            assert len(by_split[way, split]) == counts[way]["splits"].get(split, 0)
    wordings = {split: set() for split in ("train", "dev", "test")}
    for split in wordings:
        wordings[split] = {p.question.partition(". Example")[0] for p in by_split["forward", split]
                           if p.level > 1}
        for problem in code.problems(split, 200, 0):
            if problem.level > 1:
                wordings[split].add(problem.question.partition(". Example")[0].replace(
                    "Write f(x)", "Write a program f(x)"))
    assert not wordings["train"] & wordings["dev"] and not wordings["train"] & wordings["test"]
    programs = {split: {p.answer for p in by_split["backward", split]} for split in wordings}
    assert not programs["train"] & programs["dev"] and not programs["train"] & programs["test"]

    asked = [line["messages"][0]["content"] for line in read_lines(tmp_path / "programs.jsonl")]
    training = [p.question for way in ("forward", "backward") for p in by_split[way, "train"]]
    assert sorted(asked) == sorted(training) and len(set(asked)) == len(asked)
    assert len(by_split["forward", "dev"]) > 0 and len(by_split["backward", "dev"]) > 0


def test_no_grammar_says_more_than_it_does(box):
    """An else does something else."""
    for i in range(20):
        draft = synthesize.backward_by_grammar(seeded_rng("words", i), 3, box)
        lines = [line.split(": ")[-1] for line in draft["solution"].splitlines()[4:6]]
        assert lines[0] != lines[1], draft["solution"]


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
    counts = synthesize.run(cfg, tmp_path)
    for way in ("forward", "backward"):
        assert counts[way]["made"] == counts[way]["kept"] == 1 and not counts[way]["refused"]
        [record] = read_lines(tmp_path / f"{way}.jsonl")
        assert record["name"] == "total" and "second" not in record
        check_kept(synthetic.read(record), record["solution"])
    assert "squares" in (tmp_path / "forward.jsonl").read_text()
    table = synthesize.format_counts(counts)
    assert [line.split()[:3] for line in table.splitlines()[1:]] == [
        ["forward", "1", "1"], ["backward", "1", "1"]]
