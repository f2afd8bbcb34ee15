"""HumanEval, MBPP and KodCode: rows of the sets' own form, judged in the real sandbox."""

import ast
import random
import sys
import time

import pytest

from data.sets import programs
from data.sets.programs import (
    PYTEST,
    extract_program,
    humaneval,
    kodcode,
    mbpp,
    mutants,
    reward,
    run_tests,
)
from data.tasks.problem import seeded_rng, to_document
from data.verify import sandbox

PROMPT = '''from typing import List


def double(x: int) -> int:
    return x * 2


def below(numbers: List[int], limit: int) -> List[int]:
    """ Numbers whose double is below the limit.
    >>> below([1, 5], 4)
    [1]
    """
'''
BODY = """    found = []
    for number in numbers:
        if double(number) < limit:
            found.append(number)
    return found
"""
HUMANEVAL = dict(
    task_id="HumanEval/0",
    prompt=PROMPT,
    entry_point="below",
    canonical_solution=BODY,
    test="""

METADATA = {}


def check(candidate):
    assert candidate([1, 5], 4) == [1]
    assert candidate([2, 3], 4) == []
    assert candidate([3, 1, 3], 100) == [double(3) // 2, 1, 3], "order"
""",
)
SANITIZED = dict(
    source_file="x",
    task_id=2,
    prompt="Write a function to add numbers up to n.",
    test_imports=["import sys"],
    code="import math\ndef total(n):\n  result = 0\n  for i in range(n + 1):\n    result += i\n"
    "  return result ",
    test_list=[
        "assert total(3) == 6",
        "assert total(10) == 55 == int(math.pow(55, 1))",
        "assert total(0) == 0 < sys.maxsize",
    ],
)
FULL = dict(
    text="Write a function to find the longer chain of pairs.",
    task_id=601,
    challenge_test_list=[],
    test_setup_code="",
    code="class Pair(object): \r\n\tdef __init__(self, a, b): \r\n\t\tself.a = a \r\n"
    "\t\tself.b = b \r\n"
    "def spread(pairs): \r\n\treturn max(p.b for p in pairs) - min(p.a for p in pairs)",
    test_list=[
        "assert spread([Pair(5, 24), Pair(15, 25)]) == 20",
        "assert spread([Pair(1, 2)]) == 1",
    ],
)
KODCODE = dict(
    question_id="x",
    question="Halve the numbers.",
    gpt_difficulty="medium",
    test_info=[
        dict(function_name="halve", function_declaration="def halve(numbers):", docstring="")
    ],
    solution="def halve(numbers):\n    if not isinstance(numbers, list):\n"
    "        raise TypeError('a list, please')\n"
    "    return [number / 2 for number in numbers]",
    test="""import pytest
from solution import halve

def test_some():
    assert halve([2, 0.6]) == pytest.approx([1, 0.3])

def test_none():
    assert halve([]) == []

def test_error():
    with pytest.raises(TypeError, match="list") as info:
        halve("no")
    assert "please" in str(info.value)

if __name__ == "__main__":
    pytest.main()
""",
)
SETS = {
    "humaneval": humaneval(HUMANEVAL),
    "sanitized": mbpp(SANITIZED),
    "full": mbpp(FULL),
    "kodcode": kodcode(KODCODE),
}
every_set = pytest.mark.parametrize("name", SETS)


@pytest.fixture(scope="module")
def box():
    with sandbox.Sandbox(limits=sandbox.Limits(seconds=0.5)) as box:
        yield box


def without_bodies(code: str) -> str:
    tree = programs.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def fenced(code: str) -> str:
    thoughts = "<think>\nHm,\n```python\nx\n```\nno.\n</think>\n"
    return f"{thoughts}Here it is:\n```python\n{code}\n```\nGood luck."


# ---- problems


def test_questions_show_what_to_define():
    assert (
        SETS["humaneval"].question
        == f"Complete this Python function:\n\n```python\n{PROMPT.strip()}\n```"
    )
    assert SETS["sanitized"].question.endswith(
        "up to n.\nYour code should pass this test:\nassert total(3) == 6"
    )
    assert SETS["kodcode"].question == "Halve the numbers.\n\nDefine:\ndef halve(numbers):"
    assert SETS["kodcode"].level == 2
    assert kodcode(KODCODE | {"test_info": None}).question.endswith("Define:\nhalve")
    assert {name: problem.extra["names"] for name, problem in SETS.items()} == {
        "humaneval": ["below"],
        "sanitized": ["total"],
        "full": ["Pair", "spread"],
        "kodcode": ["halve"],
    }


HALVE = "from solution import halve\n"


@pytest.mark.parametrize(
    "read, record, change, error",
    [
        (humaneval, HUMANEVAL, {"entry_point": "above"}, "does not define"),
        (humaneval, HUMANEVAL, {"canonical_solution": "    return ("}, "never closed"),
        (mbpp, SANITIZED, {"test_list": []}, "no tests"),
        (mbpp, SANITIZED, {"test_list": ["assert True"]}, "does not define"),
        (kodcode, KODCODE, {"solution": "def other(): pass"}, "does not define"),
        (kodcode, KODCODE, {"test": HALVE + "assert halve([]) == []"}, "no functions"),
        (
            kodcode,
            KODCODE,
            {"test": HALVE + "class TestIt:\n    def test_a(): halve([])"},
            "no functions",
        ),
        (kodcode, KODCODE, {"test": HALVE + "def test_a(tmp_path): halve([])"}, "parameters"),
        (
            kodcode,
            KODCODE,
            {"test": HALVE + "from pytest import mark\ndef test_a(): pass"},
            "pytest.mark",
        ),
        (
            kodcode,
            KODCODE,
            {
                "test": HALVE
                + "import pytest\n@pytest.fixture\ndef x(): pass\ndef test_a(): halve([])"
            },
            "pytest.fixture",
        ),
        (
            kodcode,
            KODCODE,
            {"test": "from solution import *\ndef test_a(): halve([])"},
            "does not define",
        ),
    ],
)
def test_records_that_cannot_be_judged_are_refused(read, record, change, error):
    with pytest.raises((ValueError, SyntaxError), match=error):
        read(record | change)


def test_solution_as_a_module():
    problem = kodcode(
        KODCODE | {"test": "import solution\ndef test_a(): assert solution.halve([4]) == [2]"}
    )
    assert problem.extra["names"] == ["halve"] and reward(problem, fenced(problem.answer)) == 1.0


@pytest.mark.parametrize(
    "wanted",
    [1, 0.1 + 0.2, 1e9, 0.0, float("inf"), float("nan"), [0.1, 1], (0.1,), {"a": 0.1}, {}, "a"],
)
def test_the_stand_in_for_pytest_is_like_it(wanted, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", pytest)  # and put back in the end
    exec(PYTEST, scope := {})
    values = [
        1,
        1 + 9e-7,
        1 + 2e-6,
        0.3,
        1e9 + 999,
        1e9 + 1001,
        1e-13,
        1e-11,
        float("inf"),
        -float("inf"),
        float("nan"),
        [0.1, 1 + 1e-9],
        [0.1],
        [0.1 + 1e-9],
        (0.1 + 1e-9,),
        {"a": 0.1 + 1e-9},
        {"a": 0.2},
        {"b": 0.1},
        {},
        [],
        "a",
    ]
    for value in values:
        if type(value) is type(wanted) or {type(value), type(wanted)} == {int, float}:
            assert (value == scope["approx"](wanted)) == (value == pytest.approx(wanted)), value


def test_the_stand_in_for_raises_is_like_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", pytest)
    exec(PYTEST, scope := {})
    with scope["raises"]((KeyError, ValueError), match="^b.d$") as info:
        raise ValueError("bad")
    assert info.type is ValueError and str(info.value) == "bad" and info.match("a")
    for expected, match, raised in ((KeyError, "", ValueError), (ValueError, "good", ValueError)):
        with pytest.raises(raised):
            with scope["raises"](expected, match=match):
                raise raised("bad")
    with pytest.raises(AssertionError, match="nothing"):
        with scope["raises"](ValueError):
            pass
    with pytest.raises(AssertionError, match="why"):
        scope["fail"]("why")


# ---- programs of responses

CODE = """def below(numbers, limit):
    return [number for number in numbers if double(number) < limit]"""
WRONG = "def below(numbers, limit):\n    return [7]"


LISTED = CODE.replace("\n", "\n   ")
FORMS = (  # where people and models put a program
    "CODE\n```",
    "CODE```",
    "CODE\n```\nIt keeps what is below.",
    "CODE\n~~~",
    "CODE\n```\n\nTry it:\n```python\nbelow([1], 2)\n```",
    "CODE\n[/PYTHON]",
    "[PYTHON]\nCODE\n[/PYTHON]",
    "[PYTHON]CODE[/PYTHON]",
    "[PYTHON]\nCODE",
    "[PYTHON]\n```python\nCODE\n```\n[/PYTHON]",
    "1. Here:\n   ```python\n   LISTED\n   ```",
    "1. Here:\n\n   ```python\nCODE\n   ```\n2. Done",
    "1. ```python\n   LISTED\n   ```",
    "- ```python\nCODE\n```",
    "    ```python\n   LISTED\n    ```",
    "\t```python\nCODE\n\t```",
    "~~~python\nCODE\n~~~",
    "~~~~ {.python}\nCODE\n~~~~\nmore",
    "````python\nCODE\n````",
    "````\nCODE\n# ```\n````",
    "Here it is: ```python\nCODE\n```",
    "Use `below`: ```\nCODE\n```",
    "```python\nCODE```\nThat is all.",
    "```python\nCODE\n``` That is all.",
    "```python\r\nCODE\r\n```\r\n",
    "```python\nCODE\n```python\nbelow([1], 2)\n```",
    "See ```below(x)```:\n```python\nCODE\n```",
    "```{python}\nCODE\n```",
    "```PYTHON3\nCODE\n```",
    "Wow~~~\n```python\nCODE\n```",
    '```python\nCODE\n\ndef more():\n    """\n    ```\n    f(1)\n    ```\n    """\n```\nThat.',
    "```python\nx = None\n```\nNo:\n```\nCODE\n```",
)
NO_PROGRAM = (
    "Here it is: ```python",
    "```python\n```",
    "The function `below` keeps numbers: ```below([1], 2)``` gives [1].",
    "~~~",
    "[PYTHON][/PYTHON]",
    "[/PYTHON]",
    "[PYTHON]I cannot.[/PYTHON]",
    f"```java\n{CODE}\n```",
    f"```text\n{CODE}\n```",
    f"<think>\n[PYTHON]\n{CODE}\n[/PYTHON]",
)


@pytest.mark.parametrize(
    "response, right",
    [
        (BODY, 1),
        ("\n" + BODY, 1),
        (BODY + "\n\ndef more():\n    return 1 +", 1),
        (BODY + "\n# tests\n)", 1),
        (BODY + "\nassert below(", 1),
        (BODY + "\nprint(below(", 1),
        (BODY + "\nif True", 1),
        (BODY + "\nclass X(", 1),
        (BODY + "\ndef below(numbers, limit):\n    return [7]", 1),
        (BODY.replace("<", "<="), 0),
        ("    pass", 0),
        ("", 0),
        ("I cannot.", 0),
        (CODE, 1),
        (f"Answer: {CODE}", 1),
        (f"Problem: x\nAnswer: {CODE}\nProblem: y\nAnswer: z", 1),
        (PROMPT + BODY, 1),
        (fenced(CODE), 1),
        (fenced(PROMPT + BODY), 1),
        (fenced(BODY), 1),
        (fenced(WRONG), 0),
        (fenced("from __future__ import annotations\n" + CODE), 1),
        (f"```\n{CODE}\n```", 1),
        (f"``` py\n{CODE}\n```", 1),
        (f"```Python\n{CODE}", 1),
        (f"```python a=b\n{CODE}\n```", 1),
        (f"```python\n{CODE}\n```\nRun it:\n```bash\npython x.py\n```", 1),
        (f"```bash\npip install x\n```\nthen\n```python\n{CODE}\n```", 1),
        (f"```python\n{CODE}\n```\nUse it:\n```python\nbelow([1], 2)\n```", 1),
        (f"```python\n{WRONG}\n```\nNo, better:\n```python\n{CODE}\n```", 1),
        (f"```python\n{CODE}\n```\nNo, better:\n```python\n{WRONG}\n```", 0),
        (f"```python\n{CODE}\n```\n```\nbelow = no\n```", 1),
        *[(form.replace("CODE", CODE).replace("LISTED", LISTED), 1) for form in FORMS],
        (f"```python\n{CODE}\n```\n\n[PYTHON]\n{WRONG}\n[/PYTHON]", 1),
        (f"[PYTHON]\n{CODE}\n[/PYTHON]\n[PYTHON]\n{WRONG}\n[/PYTHON]", 0),
        (f"```python\n{WRONG}\n```\n~~~\n{CODE}\n~~~", 0),
        ("```python\ndef below(numbers, limit):\n```\n```python\n    return [7]\n```", 0),
        *[(reply, 0) for reply in NO_PROGRAM],
        (f"<think>\n```python\n{CODE}\n```", 0),
        (f"<think>a</think>b<think>\n```python\n{CODE}\n```", 0),
        (f"<think>\n```python\n{CODE}\n```\n</think>\nI do not know.", 0),
        ("```" + "a" * 100_000, 0),
        ("```\n" * 30_000, 0),
        ("<think>" * 30_000, 0),
        ("\ud800 \x00", 0),
    ],
)
def test_where_the_program_of_a_response_is(response, right):
    assert reward(SETS["humaneval"], response) == right


@pytest.mark.parametrize(
    "text",
    [
        "```" + "a" * 100_000,
        "```\n" * 30_000,
        "```python\nx\n" * 10_000,
        "x```\n" * 10_000,
        "1. ```" * 30_000,
        "`" * 100_000,
        "~~~a\n" * 10_000,
        "[PYTHON]" * 30_000,
        "[PYTHON][/PYTHON]" * 30_000,
        "\n" * 100_000,
        "<think>" * 30_000,
        "Answer:\n" * 30_000,
        "def " * 30_000,
        " " * 100_000,
    ],
)
def test_no_response_takes_long_to_read(text):
    start = time.thread_time()
    extract_program(text, SETS["humaneval"])
    extract_program(text, SETS["kodcode"])
    assert time.thread_time() - start < 5  # takes half a second; as n² it would take minutes


def test_a_page_holds_the_program_once():
    """HumanEval's prompt is the beginning of its solution."""
    page = to_document(SETS["humaneval"])
    assert (
        page.startswith(PROMPT.strip())
        and page.count("def below") == 1
        and page.endswith(BODY.strip() + "\n")
    )
    assert to_document(SETS["sanitized"]).startswith("Problem: ")


def test_a_base_models_answer_for_the_other_sets():
    problem = SETS["sanitized"]
    for response in (f" {problem.answer}\nProblem: next\nAnswer: x", f"Answer: {problem.answer}"):
        assert reward(problem, response) == 1.0
    assert extract_program("<think> no end", problem) is None


# ---- rewards


@every_set
def test_right_and_wrong_programs(name):
    problem = SETS[name]
    assert reward(problem, fenced(problem.answer)) == 1.0
    assert reward(problem, fenced(without_bodies(problem.answer))) == 0.0
    wrong = mutants(problem.answer, seeded_rng("test"), 6)
    assert wrong and sum(reward(problem, fenced(mutant)) for mutant in wrong) < len(wrong) / 3


TRUE = """class E:
    def __eq__(s, o): return True
    def __lt__(s, o): return True
    __hash__ = None
"""
CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "exit later": "import os\ndef {0}(*a): os._exit(0)",
    "always equal": TRUE + "def {0}(*a): return E()",
    "always equal list": "class E(list):\n    def __eq__(s, o): return True\n"
    "def {0}(*a): return E()",
    "say passed": "def {0}(*a):\n    print('passed')\n    return 'passed'",
    "say it everywhere": "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n"
    "    except OSError: pass",
    "endless": "def {0}(*a):\n    while True: pass",
    "no assertions": "import builtins\nbuiltins.AssertionError = AssertionError = ValueError\n"
    "def {0}(*a): return 1",
    "own check": "def check(candidate): pass\ndef double(x): return x * 2\ndef {0}(*a): return 1",
    "own pytest": "import sys, types\nsys.modules['pytest'] = types.SimpleNamespace(approx=lambda "
    "x: x)\n"
    "def {0}(*a): return 1",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_are_worth_nothing(cheat, box):
    for problem in SETS.values():
        program = extract_program(fenced(CHEATS[cheat].format(problem.extra["names"][-1])), problem)
        assert run_tests(program, problem, box) == 0.0
        assert cheat == "endless" or reward(problem, fenced(program)) == 0.0


class BrokenBox:
    def test(self, *_):
        return sandbox.Result("broken")


def test_a_broken_sandbox_says_nothing_about_a_program(monkeypatch):
    monkeypatch.setattr(sandbox, "shared", BrokenBox)
    assert reward(SETS["sanitized"], fenced(SETS["sanitized"].answer)) is None
    assert reward(SETS["sanitized"], "<think>") == 0.0
    assert run_tests(SETS["full"].answer, SETS["full"], BrokenBox()) is None


def test_known_solutions_and_lax_tests(box):
    """A problem is sound if its own solution passes, and one without bodies does not."""
    good = SETS["kodcode"]
    wrong = kodcode(KODCODE | {"solution": "def halve(numbers): return numbers"})
    lax = kodcode(KODCODE | {"test": HALVE + "def test_a(): halve([])"})
    missing = kodcode(KODCODE | {"solution": "import no_such_package\n" + KODCODE["solution"]})
    problems = [wrong, good, lax, missing]
    assert [run_tests(p.answer, p, box) for p in problems] == [0.0, 1.0, 1.0, 0.0]
    assert [run_tests(without_bodies(p.answer), p, box) for p in problems] == [0.0, 0.0, 1.0, 0.0]


# ---- wrong programs

EVERYTHING = '''def f(x, y=True):
    """ Stays: 1 """
    total = 1.5
    for i in range(2, x):
        total += i
        print(total)
    while x < 3 and y:
        break
    else:
        return
    return [total - 1 if x in (4,) else 'a']
'''
KINDS = [
    "y=False",
    "total = 2.5",
    "range(3, x)",
    "range(2, x - 1)",
    "total -= i",
    "x >= 3",
    "x < 4",
    "x < 3 or y",
    "while not (x < 3 and y)",
    "total + 1",
    "total - 2",
    "not in (4,)",
    "(5,)",
    "if not x in",
    "[[total - 1",
    '"""\n    pass\n    for',
    "        pass\n        print",
    "        pass\n    while",
    "        pass\n    else",
]


def test_mutants_are_of_every_kind_and_valid():
    original = ast.unparse(ast.parse(EVERYTHING))
    found = mutants(EVERYTHING, random.Random(0), 1000)
    for kind in KINDS:
        assert kind not in original and sum(kind in mutant for mutant in found) == 1, kind
    assert sum(mutant.endswith("return") for mutant in found) == 1
    assert len(found) == len(set(found)) == len(KINDS) + 1 and original not in found
    assert all("Stays: 1" in mutant and compile(mutant, "x", "exec") for mutant in found)


def test_mutants_repeat_with_the_seed_and_are_as_many_as_asked():
    some = mutants(EVERYTHING, seeded_rng("a"), 5)
    assert len(some) == 5 and some == mutants(EVERYTHING, seeded_rng("a"), 5)
    assert some != mutants(EVERYTHING, seeded_rng("b"), 5)
    assert mutants("def f(x):\n    y = x", seeded_rng("a"), 5) == ["def f(x):\n    pass"]
    assert mutants("def f(x):\n    'only a docstring'", seeded_rng("a"), 5) == []
    assert mutants("x = 1e17", seeded_rng("a"), 5) == ["pass"]  # 1e17 + 1 is the same number
    inner = """def f():
    a = b = 0
    def g():
        nonlocal a
        a = 1
    g()
    return a"""
    assert all(compile(mutant, "x", "exec") for mutant in mutants(inner, seeded_rng("a"), 50))


def test_trusted_code_is_only_parsed_here():
    with pytest.raises(SyntaxError):
        programs.parse("return 1")
    assert programs.parse("import sys\nsys.exit('run')\nx = '\\d'")
