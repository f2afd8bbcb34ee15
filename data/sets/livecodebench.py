"""LiveCodeBench (arXiv 2403.07974), code generation: contest problems, judged by running their tests in the sandbox.

By the schema of livecodebench/code_generation_lite: public_test_cases is JSON, private_test_cases JSON or a pickled
string of JSON, by zlib and base64, and a list of {"input", "output", "testtype": "stdin" or "functional"}. A program
that reads stdin is compared by what it prints, line by line, as text or as decimal numbers; a method of LeetCode's
class Solution, named in metadata's func_name, by what it returns (its arguments are the JSON values of the input's
lines). Prompts, imports and comparison are those of the official lcb_runner, as is the limit of 6 seconds a test.
"""
import base64
import io
import json
import pickle
import re
import zlib
from decimal import Decimal, InvalidOperation

from data.verify import sandbox
from data.tasks.problem import Problem
from data.sets.programs import extract_program

LIMITS = sandbox.Limits(seconds=6.0, memory=1 << 30)
LARGEST = 1 << 30       # bytes of the tests of one problem
LEVELS = {"easy": 1, "medium": 2, "hard": 3}
STDIN = ("Read the inputs from stdin, solve the problem and write the answer to stdout (do not directly test on the "
         "sample inputs). Enclose your code within delimiters as follows.\n```python\n# YOUR CODE HERE\n```")
METHOD = ("You will use the following starter code to write the solution to the problem and enclose your code within "
          "delimiters.\n```python\n{}\n```")
MODULES = ("string re datetime collections heapq bisect copy math random statistics itertools functools operator io "
           "sys json builtins typing").split()
IMPORTS = "\n".join([*(f"from {name} import *" for name in MODULES), *(f"import {name}" for name in MODULES),
                     "sys.setrecursionlimit(50000)"])


# ---- records

class _Plain(pickle.Unpickler):
    """Of builtin plain data alone: nothing that a pickle could import and call."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} in a pickle of text")


def cases_of(text: str | list) -> list[dict]:
    """Test cases in any of their forms; ValueError for what is none of them."""
    try:
        if isinstance(text, str) and not text.lstrip().startswith("["):
            inflate = zlib.decompressobj()
            packed = inflate.decompress(base64.b64decode(text, validate=True), LARGEST)
            if not inflate.eof:
                raise ValueError("cut off, or too large")
            text = _Plain(io.BytesIO(packed)).load()
        tests = json.loads(text) if isinstance(text, (str, bytes)) else text
        assert all(isinstance(test[key], str) for test in tests for key in ("input", "output", "testtype"))
    except Exception as error:                  # a torn pickle raises almost anything
        raise ValueError(f"tests cannot be read: {type(error).__name__}") from None
    return tests


def read(record: dict) -> Problem:
    """Private tests stay packed until they are run: unpacked, those of a release take gigabytes."""
    question, starter = record["question_content"].strip(), (record["starter_code"] or "").strip()
    packed = [record["public_test_cases"], record["private_test_cases"]]
    tests = [test for text in packed for test in cases_of(text)]
    metadata = record["metadata"]
    name = (json.loads(metadata or "{}") if isinstance(metadata, str) else metadata or {}).get("func_name", "")
    kinds = {test["testtype"] for test in tests}
    if kinds != ({"functional"} if name else {"stdin"}):
        raise ValueError(f"tests of kind {', '.join(sorted(kinds)) or 'none'}" + " with" * bool(name) + " func_name")
    asked = f"### Question:\n{question}\n\n### Format: {METHOD.format(starter) if starter else STDIN}"
    return Problem("", question, asked, (), "", LEVELS.get(record.get("difficulty"), 0),
                   {"packed": packed, "function": name, "helpers": IMPORTS, "reply": "```python\n{}\n```"})


# ---- the reward

def reward(problem: Problem, response: str) -> float | None:
    """1.0 if the program of the response passes all tests, else 0.0; None: could not be scored."""
    program, function = extract_program(response, problem), problem.extra["function"]
    if program is None:
        return 0.0
    if function and re.search(r"^class +Solution\b", program, re.M):
        program += f"\ndef _method(*arguments): return Solution().{function}(*arguments)\n"
        function = "_method"
    for packed in problem.extra["packed"]:
        for test in cases_of(packed):
            passed = passes_tests(sandbox.shared(), program, function, test)
            if not passed:
                return None if passed is None else 0.0
    return 1.0


def passes_tests(box: sandbox.Sandbox, program: str, function: str, test: dict) -> bool | None:
    if function:
        arguments = [json.loads(line) for line in test["input"].split("\n")]
        result, wanted = box.call(program, function, [arguments], LIMITS), json.loads(test["output"])
        right = result.status == "ok" and result.values[0] in (
            wanted, tuple(wanted) if isinstance(wanted, list) else wanted)
    else:
        result = box.run(program, test["input"], LIMITS)
        right = result.status == "ok" and same_output(result.stdout, test["output"])
    return None if result.status == "broken" else right


def same_output(printed: str, wanted: str) -> bool:
    """Whether the lines are the same, without spaces at their ends; a line of numbers may be spelt in another way."""
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (printed, wanted)]
    return len(lines[0]) == len(lines[1]) and all(a == b or _same_numbers(a, b) for a, b in zip(*lines))


def _same_numbers(one: str, other: str) -> bool:
    try:
        return list(map(Decimal, one.split())) == list(map(Decimal, other.split()))
    except InvalidOperation:
        return False
