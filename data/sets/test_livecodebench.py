"""LiveCodeBench: rows of the published schema, private tests in each of their forms, right and
wrong programs.
"""

import base64
import json
import pickle
import zlib
from dataclasses import replace

import pytest

from common import UserError
from data.sets import livecodebench, public
from data.sets.livecodebench import read, read_cases, same_output
from data.tasks import registry


def packed(tests: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def case(given: str, wanted: str, kind: str) -> dict:
    return dict(input=given, output=wanted, testtype=kind)


COMMON = dict(
    question_title="Sum",
    platform="x",
    question_id="1",
    contest_id="2",
    contest_date="2024-01-01T00:00:00",
)
STDIN = COMMON | dict(
    question_content="Add the numbers.",
    starter_code="",
    difficulty="easy",
    metadata="{}",
    public_test_cases=json.dumps([case("2\n1 2\n", "3\n", "stdin")]),
    private_test_cases=packed(
        [case("3\n1 2 3\n", "6", "stdin"), case("1\n0.5\n", "0.50", "stdin")]
    ),
)
METHOD = COMMON | dict(
    question_content="Reverse it.",
    difficulty="hard",
    metadata=json.dumps(dict(func_name="turn")),
    starter_code="class Solution:\n    def turn(self, nums: List[int], k: int) -> List[int]:\n"
    "        ",
    public_test_cases=json.dumps([case("[1, 2]\n0", "[2, 1]", "functional")]),
    private_test_cases=packed(
        [case("[]\n5", "[]", "functional"), case("[1, 2, 3]\n1", "[3, 2, 1]", "functional")]
    ),
)


def block(code: str) -> str:
    return f"<think>hm</think>So:\n```python\n{code}\n```"


@pytest.mark.parametrize(
    "code, wanted",
    [
        ("input()\nprint(sum(map(float, input().split())))", 1.0),  # 3.0 for 3 is the same number
        (
            "_, *x = sys.stdin.read().split()\nt = sum(float(v) for v in x)\nprint(f'  {t:.2f}  ')",
            1.0,
        ),
        ("print(3)", 0.0),
        ("while True: pass", 0.0),
        ("", 0.0),
        ("import os; os._exit(0)", 0.0),
    ],
)
def test_programs_that_read_stdin(code, wanted, monkeypatch):
    problem = read(STDIN)
    assert (
        problem.level == 1
        and "Add the numbers." in problem.question
        and "stdin" in problem.question
    )
    monkeypatch.setattr(livecodebench, "LIMITS", replace(livecodebench.LIMITS, seconds=0.5))
    assert livecodebench.reward(problem, block(code)) == wanted


@pytest.mark.parametrize(
    "code, wanted",
    [
        (
            "class Solution:\n    def turn(self, nums: List[int], k: int) -> List[int]:\n"
            "        return nums[::-1]",
            1.0,
        ),
        (
            "class Solution:\n    def turn(self, nums, k):\n        return tuple(reversed(nums))",
            1.0,
        ),
        ("def turn(nums, k): return nums[::-1]", 1.0),
        ("class Solution:\n    def turn(self, nums, k): return nums", 0.0),
        ("class Solution:\n    def turn(self, nums): return nums[::-1]", 0.0),
        ("class Solution:\n    def other(self, nums, k): return nums[::-1]", 0.0),
    ],
)
def test_methods(code, wanted):
    problem = read(METHOD)
    assert problem.level == 3 and "class Solution" in problem.question
    assert livecodebench.reward(problem, block(code)) == wanted


def test_numbers_of_many_digits():
    """50,000 are the official runner's limit; Python's own is 4,300."""
    power = "1" + "0" * 49_000
    printed = [case("49000\n", power + "\n", "stdin")]
    problem = read(STDIN | dict(public_test_cases=json.dumps(printed), private_test_cases="[]"))
    assert livecodebench.reward(problem, block("print(10 ** int(input()))")) == 1.0
    assert livecodebench.reward(problem, block("print(1 + 10 ** int(input()))")) == 0.0
    returned = [case(f"[{power}]\n0", f"[{power}]", "functional")]
    problem = read(METHOD | dict(public_test_cases=json.dumps(returned), private_test_cases="[]"))
    assert livecodebench.reward(problem, block("def turn(nums, k): return nums[::-1]")) == 1.0
    assert livecodebench.reward(problem, block("def turn(nums, k): return [nums[0] + 1]")) == 0.0


def test_forms_of_the_private_tests():
    tests = [case("1", "2", "stdin")]
    assert read_cases(tests) == read_cases(json.dumps(tests)) == read_cases(packed(tests)) == tests


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was obeyed')",)


def test_a_pickle_is_never_obeyed():
    for evil in (
        pickle.dumps(Bomb()),
        pickle.dumps(Bomb(), 0),
        pickle.dumps([Bomb()]),
        pickle.dumps(print),
    ):
        with pytest.raises(ValueError, match="tests cannot be read: UnpicklingError"):
            read_cases(base64.b64encode(zlib.compress(evil)).decode())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[1]",
        '[{"input": 1}]',
        base64.b64encode(b"no zlib").decode(),
        packed(5),
        packed([case("1", "2", "stdin")])[:-8],
        base64.b64encode(zlib.compress(b"(l")).decode(),
    ],
)
def test_broken_tests_are_no_problem(text):
    with pytest.raises(ValueError, match="tests cannot be read"):
        read_cases(text)


def test_too_large(monkeypatch):
    monkeypatch.setattr(livecodebench, "LARGEST", 1000)
    with pytest.raises(ValueError, match="tests cannot be read"):
        read_cases(packed([case("1" * 2000, "2", "stdin")]))


def test_as_a_set(tmp_path, capsys):
    public.load.cache_clear()
    path = tmp_path / "a.jsonl"
    rows = [
        STDIN,
        METHOD,
        METHOD | dict(question_content="No.", metadata="{}"),
        STDIN | dict(question_content="Bad.", private_test_cases="x"),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = registry.family(f"livecodebench={path}").problems("test", 9, 0)
    assert len(found) == 2 and all(json.loads(json.dumps(p.extra)) == p.extra for p in found)
    assert (
        "1 tests of kind functional" in (said := capsys.readouterr().err)
        and "1 tests cannot be read" in said
    )
    path.write_text(json.dumps(dict(question_content="x")) + "\n")
    public.load.cache_clear()
    with pytest.raises(
        UserError, match="no column 'starter_code' for livecodebench; found question_content"
    ):
        registry.family(f"livecodebench={path}").problems("test", 9, 0)


@pytest.mark.parametrize(
    "printed, wanted, equal",
    [
        ("1 2\n3", "1 2 \n3\n", True),
        ("1.0", "1", True),
        ("1e0 2", "1 2.00", True),
        ("1\n2", "1 2", False),
        ("a", "A", False),
        ("1", "", False),
        ("", "", True),
        ("0.1", "0.1000001", False),
        ("0.333333", "0.333333333333", False),  # the official rule: exact
        ("9" * 5000 + ".0", "9" * 5000, True),
        ("1e999999999", "1", False),
        ("YES 1", "YES 1.0", False),
    ],
)
def test_what_is_printed(printed, wanted, equal):
    assert same_output(printed, wanted) is equal
