"""Runnable items: worked critiques, right responses that pass, text that is no equation, hostile
responses."""

import random
import re
import time

import pytest

from data.refine import practice
from data.refine.checklist import (
    compose_steps,
    find_equations,
    find_examples,
    find_false_step,
    leads_to,
    normalize_operators,
    runnable_items,
)
from data.refine.refinement import visible_text
from data.tasks import code, registry
from data.tasks.pages import FAMILIES
from data.tasks.problem import to_chat
from data.verify import sandbox

TEXT = {  # an instruction of each kind
    "math": "Mia has 45 pens. She loses 8. Tom brings 3 more. How many pens does Mia have now?",
    "form": "Ben runs 12 miles. He runs 7 more. What is the total? Name the person. Give the unit. "
    "Begin with So. "
    "End with an exclamation mark. Use at most 5 words.",
    "code": "Write f(x): reverse the list. Example: f([1, 2]) = [2, 1].",
    "tools": "Tools: taxi(people, city), move(count, item). I am 41 years old. "
    "Call a taxi for 3 people to Oslo.",
}
CALL = '{"name": "taxi", "arguments": {"people": 3, "city": "Oslo"}}'


def critiques(instruction, response):
    return [said for item in runnable_items(instruction) if (said := item.check(response))]


@pytest.mark.parametrize(
    "family, response, said",
    [
        ("math", "45 - 8 = 37. 37 + 3 = 40.\nAnswer: 40", []),
        ("math", "45 - 8 = 36. 36 + 3 = 39.\nAnswer: 39", ["Step 1 is wrong: 45 - 8 is not 36."]),
        (
            "math",
            "45 - 8 = 37. 37 + 3 = 41. 41 + 3 = 45.\nAnswer: 45",
            ["Step 2 is wrong: 37 + 3 is not 41."],
        ),
        (
            "math",
            "45 - 8 = 37. 38 + 3 = 41.\nAnswer: 41",
            ["Step 2 uses 38, which is neither given nor derived."],
        ),
        ("math", "45 - 8 = 37. 37 + 3 = 40.\nAnswer: 37", ["The answer is not the last result."]),
        (
            "math",
            "3 - 45 = -42. -42 + 8 = -34.\nAnswer: -35",
            ["The answer is not the last result."],
        ),
        ("math", "Answer: 40", []),
        ("form", "12 + 7 = 19.\nAnswer: So Ben runs 19 miles!", []),
        ("form", "12 + 7 = 19.\nAnswer: Ben runs 19 miles!", ["It does not begin with So."]),
        (
            "form",
            "12 + 7 = 19.\nAnswer: So it is just about 19.",
            [
                "It does not name Ben.",
                "It does not give the unit miles.",
                "It does not end with an exclamation mark.",
                "It has 6 words, not at most 5.",
            ],
        ),
        ("code", "a = x[::-1].\nAnswer: return x[::-1]", []),
        ("code", "Answer: sorted(x)", ["f([1, 2]) gives [1, 2], not [2, 1]."]),
        ("code", "Answer: return y", ["f([1, 2]) fails: NameError: name 'y' is not defined."]),
        ("code", "Answer: [2, 1] if x else 10 ** 5000", []),
        ("code", "Answer: 10 ** 5000", ["f([1, 2]) gives a huge number, not [2, 1]."]),
        ("code", "I do not know.", ["There is no program."]),
        ("code", "So:\n```python\ndef f(x):\n    return x[::-1]\n```\nDone.", []),
        (
            "code",
            "```python\nimport nothing\ndef f(x):\n    return x[::-1]\n```",
            ["f([1, 2]) fails: ModuleNotFoundError: No module named 'nothing'."],
        ),
        ("tools", f"The tool is taxi.\nAnswer: {CALL}", []),
        ("tools", "Answer: taxi", ["The answer is no JSON call."]),
        (
            "tools",
            "Answer: " + CALL.replace("}}", '}, "more": 1}'),
            ["The answer is no JSON call."],
        ),
        ("tools", "Answer: " + CALL.replace("taxi", "bus"), ["bus is not offered."]),
        (
            "tools",
            "Answer: " + CALL.replace("city", "town"),
            ["The arguments of taxi are people, city."],
        ),
        ("tools", "Answer: " + CALL.replace("Oslo", "Rome"), ["Rome is not in the request."]),
        ("tools", "Answer: " + CALL.replace("Oslo", "Osl"), ["Osl is not in the request."]),
    ],
)
def test_critiques(family, response, said):
    assert critiques(TEXT[family], response) == said


@pytest.mark.parametrize(
    "text, found",
    [  # left side, and whether it is true
        ("12 × 7 = 84", {"12 * 7": True}),
        ("84 ÷ 7 = 13", {"84 / 7": False}),
        ("$12 + $7 = $19$", {"12 + 7": True}),
        ("1,200 + 1 = 1,201", {"1,200 + 1": True}),
        ("0.5 + 0.25 = 0.75", {"0.5 + 0.25": True}),
        ("2 + 3 * 4 = 14; 2 + 3 + 4 = 10", {"2 + 3 * 4": True, "2 + 3 + 4": False}),
        ("7 / 0 = 0", {"7 / 0": False}),
        ("10 / 3 = 3.33", {"10 / 3": True}),
        ("10 / 3 = 3.34", {"10 / 3": False}),
        ("10 / 3 = 3", {"10 / 3": False}),
        ("0.5 + 0.25 = 0.8", {"0.5 + 0.25": False}),
        ("- 3 + 4 = 7\n* 3 x 4 = 12", {"3 + 4": True, "3 * 4": True}),
        ("3 \\times 4 = 12", {"3 * 4": True}),
        ("n = 12 + 7 = 19.", {"12 + 7": True}),
        *[
            (text, {})
            for text in (  # of these no part is judged: it may be a part of something else
                "x + 3 * 4 = 10",
                "2^3 + 1 = 9",
                "(1 + 2) * 2 = 6",
                "5 + 10 = 12 + 3",
                "1/2 + 1/3 = 5/6",
                "3 1/2 + 1 = 4.5",
                "20 + 5% = 21",
                "50 + 50 = 100%",
                "3 + 4 = 7x",
                "3 + 4 = 7 + x",
                "v % 2 == 0",
                "a[1] - 2 = 3",
                "6! / 2 = 360",
                "12 + 7 = ?",
                "2 * (3 + 4) = 14",
                "9" * 20 + " + 1 = 1",
            )
        ],
    ],
)
def test_equations(text, found):
    assert {
        equation.left: equation.true for equation in find_equations(normalize_operators(text))
    } == found


def test_a_false_equation_is_named_without_its_right_result():
    rng = random.Random(0)
    for _ in range(300):
        a, b, slip = rng.randint(100, 999), rng.randint(100, 999), rng.randint(1, 9)
        sign = rng.choice("+-*")
        right = eval(f"{a} {sign} {b}")  # our own text
        instruction, chain = f"There are {a} and {b}.", f"{a} {sign} {b} = {right + slip}."
        (said,) = critiques(instruction, chain)
        assert (
            said
            == find_false_step(instruction, chain)
            == f"Step 1 is wrong: {a} {sign} {b} is not {right + slip}."
        )
        assert not re.search(rf"(?<!\d){abs(right)}(?!\d)", said) and not critiques(
            instruction, chain.replace(f"= {right + slip}", f"= {right}")
        )


def test_numbers_that_the_instruction_writes_in_words_may_be_used():
    chain = "45 * 2 = 90. 90 - 7 = 83."
    assert (
        find_false_step("Mia has 45 pens. Tom has more.", chain)
        == "Step 1 uses 2, which is neither given nor derived."
    )
    assert (
        find_false_step("Mia has 45 pens. Tom has twice as many.", chain)
        == find_false_step("Mia has pens.", chain)
        == ""
    )
    assert (
        find_false_step("Mia has 45 pens and 2.", chain)
        == "Step 2 uses 7, which is neither given nor derived."
    )
    assert find_false_step("Say 5, 7 and 3.", "5 + 7 = 12 + 3 = 15.") == ""


@pytest.mark.parametrize("family", ["math", "code", "tools", "form", "recall"])
def test_right_responses_pass(family):
    for problem in FAMILIES[family].problems("train", 30 if family == "code" else 210, 11):
        response = practice.to_response(problem)
        chain, _, content = visible_text(response, thoughts=True).rpartition("\n")
        assert (
            runnable_items(problem.question)
            and critiques(problem.question, f"{chain}\n{content}") == []
        )
        assert (
            critiques(problem.question, content) == []
            and find_false_step(problem.question, chain) == ""
        )
        assert family == "recall" or leads_to(problem.question, chain, content) is True
    asked = [item.text for item in runnable_items(problem.question)]  # of level 3
    assert len(asked) == {"math": 3, "code": 1, "tools": 1, "form": 6, "recall": 3}[family]


def test_chains_of_other_problems_lead_elsewhere():
    """A chain and a solution of different problems: only where both come to the same."""
    for family in ("math", "code", "tools", "form"):
        problems = [p for p in FAMILIES[family].problems("train", 300, 12) if p.level == 2]
        for one, other in zip(problems, problems[1:]):
            content = to_chat(other)[-1]["content"]
            wrong = leads_to(one.question, " ".join(one.steps), content)
            assert wrong in ((True,) if registry.reward(one, content) else (False, None)), (
                one,
                other,
            )
            if family == "code":
                assert find_false_step(one.question, " ".join(other.steps)) or code._same(
                    *[
                        code.run(
                            code.ast.parse(p.answer[7:], mode="eval").body,
                            find_examples(one.question)[0].arguments[0],
                        )
                        for p in (one, other)
                    ]
                )


@pytest.mark.parametrize(
    "family, chain, solution, expected",
    [
        ("math", "45 - 8 = 37.", "Answer: 37", True),
        ("math", "45 - 8 = 37.", "Answer: 40", False),
        ("math", "It is 40.", "Answer: 40", None),
        ("math", "45 - 8 = 37.", "Answer: no", False),
        ("math", "So the answer is 1/2.", "It is \\boxed{0.5}", True),
        ("math", "", "", None),
        ("code", "a = sorted(x). b = a[::-1].", "Answer: return sorted(x)[::-1]", True),
        ("code", "a = x[::-1]. b = a[:2].", "Answer: x[::-1]", False),  # both keep the example
        ("code", "a = x[::-1].", "Answer: exit()", None),
        ("code", "Reverse it.", "Answer: x[::-1]", None),
        ("tools", "The tool is taxi. people = 3. city = Oslo.", f"Answer: {CALL}", True),
        ("tools", "The tool is taxi. people = 4. city = Oslo.", f"Answer: {CALL}", False),
        ("tools", "The tool is taxi. people = 3. city = Oslo.", "Answer: taxi", False),
        ("tools", "people = 3. city = Oslo.", f"Answer: {CALL}", None),
    ],
)
def test_leads_to(family, chain, solution, expected):
    assert leads_to(TEXT[family], chain, solution) is expected


def test_steps_that_double_each_time_stay_short():
    chain = " ".join(f"{b} = {a} + {a}." for a, b in zip("xabcdefghijklmn", "abcdefghijklmno"))
    assert (
        compose_steps("a = x[1:]. b = a + a.") == "(x[1:]) + (x[1:])"
        and len(compose_steps(chain)) < 2000
    )
    assert leads_to(TEXT["code"], chain, "Answer: x") is None and find_false_step(
        TEXT["code"], chain
    )


@pytest.mark.parametrize(
    "family, chain, said",
    [
        ("code", "a = sorted(x).", "f([1, 2]) gives [1, 2], not [2, 1]."),
        ("code", "Reverse it.", ""),
        ("code", "a = x[0]. b = a[::-1].", "f([1, 2]) fails: ValueError: not a list."),
        ("tools", "The tool is move. count = 3. item = Oslo.", ""),
        ("tools", "people = 3.", ""),
        ("tools", "The tool is bus. people = 3.", "bus is not offered."),
        ("tools", "The tool is taxi. people = 3. city = Rome.", "Rome is not in the request."),
        ("math", "45 - 8 = 37. 37 + 9 = 41.", "Step 2 uses 9, which is neither given nor derived."),
    ],
)
def test_false_steps(family, chain, said):
    assert find_false_step(TEXT[family], chain) == said


def test_doctests_in_the_sandbox():
    """As HumanEval writes them: each example counts, values by type; only literals are examples."""
    instruction = '''Complete this:\n\n```python
def half(x, y=2):
    """Divide.
    >>> half(4)
    2.0
    >>> half(9, 3)
    3.0
    >>> half(other)
    1
    >>> print(1)
    """
```'''
    assert [(e.call, e.arguments, e.result) for e in find_examples(instruction)] == [
        ("half(4)", [4], 2.0),
        ("half(9, 3)", [9, 3], 3.0),
    ]
    program = "Here:\n```python\ndef half(x, y=2):\n    return x / y\n```\n"
    assert critiques(instruction, program) == []
    assert critiques(instruction, program.replace("/ y", "/ 2")) == [
        "half(9, 3) gives 4.5, not 3.0."
    ]
    assert critiques(instruction, program.replace("/ y", "// y")) == ["half(4) gives 2, not 2.0."]


def test_a_failure_of_the_sandbox_says_nothing_of_the_program(monkeypatch):
    (item,) = runnable_items(TEXT["code"])
    monkeypatch.setattr(sandbox.Sandbox, "call", lambda *_: sandbox.Result("broken"))
    assert item.check("Answer: x") is None


def test_responses_that_mean_harm():
    """Random pieces of what is parsed, and texts that make slow parsers slow: nothing raises or
    hangs."""
    rng, start = random.Random(1), time.process_time()
    pieces = [
        "3",
        " ",
        "\n",
        "+",
        "=",
        ".",
        "Answer:",
        "return x",
        "```python\n",
        "def f(x):",
        "[",
        "{",
        '"name"',
        "a = ",
        "The tool is taxi. ",
        "\0",
        "\ud800",
        "é",
        "<think>",
        "</think>",
        "9" * 30,
        "-",
        "/ 0",
        "²",
    ]
    long = [
        "9" * 10**5,
        "a" * 10**5,
        "a = " * 25_000,
        "1 + " * 25_000 + "= 1",
        "= " * 50_000,
        "[" * 10**5,
        '{"a":' * 20_000,
        "1" + " " * 10**5,
        ". " * 50_000,
        "a = x" + "." * 10**5,
        "Answer: 1" + "0" * 480,
    ]
    garbage = ["".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(300)] + long
    for family, instruction in TEXT.items():
        items = [
            item for item in runnable_items(instruction) if family != "code"
        ]  # test_critiques has the sandbox
        for text in garbage[: 300 if family == "form" else None]:
            assert all(isinstance(item.check(text), str) for item in items) and isinstance(
                find_false_step(instruction, text), str
            )
            assert leads_to(instruction, text, text) in (True, False, None)
    (item,) = runnable_items(TEXT["code"])
    assert all(isinstance(item.check(text), str) for text in garbage[:20] + long)
    assert time.process_time() - start < 10
