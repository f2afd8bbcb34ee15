"""LiveCodeBench (arXiv 2403.07974), code generation: contest problems, judged by their tests.

By the schema of livecodebench/code_generation_lite: public_test_cases is JSON, private_test_cases
JSON or a pickled string of JSON, by zlib and base64, and a list of {"input", "output", "testtype":
"stdin" or "functional"}. The tests run in the sandbox. A program that reads stdin is compared by
what it prints, line by line, as text or as decimal numbers; a method of LeetCode's class Solution,
named in metadata's func_name, by what it returns (its arguments are the JSON values of the input's
lines). Prompts, imports and comparison are those of the official lcb_runner, as are the limits of 6
seconds per test and of 50,000 digits of a number as text.

Decimal numbers are equal if they are exactly: "3.0" for "3", but never "0.333333" for
"0.333333333333", nor one float for another that is near. That is the official rule.
"""
import base64
import json
import re
import zlib
from decimal import Decimal, InvalidOperation

from data.sets.programs import extract_program
from data.tasks.problem import Problem
from data.verify import sandbox
from untrusted import Unpickler

LIMITS = sandbox.Limits(seconds=6.0, memory=1 << 30)
LARGEST = 1 << 30       # bytes of the tests of one problem
LEVELS = {"easy": 1, "medium": 2, "hard": 3}
STDIN = """Read the inputs from stdin, solve the problem and write the answer to stdout (do not \
directly test on the sample inputs). Enclose your code within delimiters as follows.
```python
# YOUR CODE HERE
```"""
METHOD = """You will use the following starter code to write the solution to the problem and \
enclose your code within delimiters.
```python
{}
```"""
MODULES = ("string re datetime collections heapq bisect copy math random statistics itertools "
           "functools operator io sys json builtins typing").split()
STARS = [f"from {name} import *" for name in MODULES]
NAMES = [f"import {name}" for name in MODULES]
LIMITS_OF_PYTHON = ["sys.setrecursionlimit(50000)", "sys.set_int_max_str_digits(50000)"]
IMPORTS = "\n".join([*STARS, *NAMES, *LIMITS_OF_PYTHON])


# ---- records

def read_cases(text: str | list) -> list[dict]:
    """Test cases in any of their forms; ValueError for what is none of them."""
    try:
        if isinstance(text, str) and not text.lstrip().startswith("["):
            text = _unpack(text)
        cases = json.loads(text) if isinstance(text, (str, bytes)) else text
        for case in cases:
            for key in ("input", "output", "testtype"):
                assert isinstance(case[key], str)
    except Exception as error:                  # a torn pickle raises almost anything
        raise ValueError(f"tests cannot be read: {type(error).__name__}") from None
    return cases


def _unpack(text: str) -> object:
    inflate = zlib.decompressobj()
    packed = inflate.decompress(base64.b64decode(text, validate=True), LARGEST)
    if not inflate.eof:
        raise ValueError("cut off, or too large")
    return Unpickler(packed).load()  # of text alone


def read(record: dict) -> Problem:
    """Private tests stay packed until they are run: unpacked, those of a release take gigabytes."""
    question = record["question_content"].strip()
    starter = (record["starter_code"] or "").strip()
    packed = [record["public_test_cases"], record["private_test_cases"]]
    kinds = {case["testtype"] for text in packed for case in read_cases(text)}
    metadata = record["metadata"] or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    name = metadata.get("func_name", "")
    if name and kinds != {"functional"}:
        raise ValueError(f"tests of kind {_list_kinds(kinds)} with func_name")
    if not name and kinds != {"stdin"}:
        raise ValueError(f"tests of kind {_list_kinds(kinds)} without func_name")
    form = METHOD.format(starter) if starter else STDIN
    prompt = f"### Question:\n{question}\n\n### Format: {form}"
    level = LEVELS.get(record.get("difficulty"), 0)
    extra = {"packed": packed, "function": name, "helpers": IMPORTS,
             "reply": "```python\n{}\n```"}
    return Problem("", question, prompt, (), "", level, extra)


def _list_kinds(kinds: set[str]) -> str:
    return ", ".join(sorted(kinds)) or "none"


# ---- the reward

def reward(problem: Problem, response: str) -> float | None:
    """1.0 if the program of the response passes all tests, else 0.0; None: could not be scored."""
    program = extract_program(response, problem)
    if program is None:
        return 0.0
    function = problem.extra["function"]
    if function and re.search(r"^class +Solution\b", program, re.M):
        program += f"\ndef _method(*arguments): return Solution().{function}(*arguments)\n"
        function = "_method"
    for packed in problem.extra["packed"]:
        for case in read_cases(packed):
            passed = passes_test(sandbox.shared(), program, function, case)
            if passed is None:
                return None
            if not passed:
                return 0.0
    return 1.0


def passes_test(box: sandbox.Sandbox, program: str, function: str, case: dict) -> bool | None:
    """Whether the program passes one test; None if that cannot be said."""
    if function:
        arguments = [read_json(line) for line in case["input"].split("\n")]
        expected = read_json(case["output"])
        result = box.call(program, function, [arguments], LIMITS)
        passed = result.status == "ok" and _same_value(result.values[0], expected)
    else:
        result = box.run(program, case["input"], LIMITS)
        passed = result.status == "ok" and same_output(result.stdout, case["output"])
    return None if result.status == "broken" else passed


def read_json(text: str) -> object:
    """A JSON value; whole numbers of any length, which int() alone does not read here."""
    return json.loads(text, parse_int=_read_int)


def _read_int(digits: str) -> int:
    return int(Decimal(digits))


def _same_value(value: object, expected: object) -> bool:
    """A tuple may stand for a list, which is all that JSON has."""
    if value == expected:
        return True
    return isinstance(expected, list) and value == tuple(expected)


def same_output(printed: str, expected: str) -> bool:
    """Whether the lines are the same, without spaces at their ends.

    A line of numbers may be spelt in another way.
    """
    printed_lines = [line.strip() for line in printed.strip().split("\n")]
    expected_lines = [line.strip() for line in expected.strip().split("\n")]
    if len(printed_lines) != len(expected_lines):
        return False
    for one, other in zip(printed_lines, expected_lines):
        if one != other and not _same_numbers(one, other):
            return False
    return True


def _same_numbers(one: str, other: str) -> bool:
    try:
        return list(map(Decimal, one.split())) == list(map(Decimal, other.split()))
    except InvalidOperation:
        return False
