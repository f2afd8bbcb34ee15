"""The task families: answers found a second way, splits that never meet, judges that nobody can
cheat or stop.
"""

import hashlib
import json
import re
import time
from dataclasses import replace
from itertools import islice

import pytest

from data.tasks import code, math, pages, recall, registry
from data.tasks.pages import FAMILIES
from data.tasks.problem import (
    assign_split,
    distinct,
    document_prompt,
    seeded_rng,
    to_chat,
    to_document,
)

ALL = {**dict.fromkeys(FAMILIES, 1.0), "drills": 1.0}
families = pytest.mark.parametrize("family", FAMILIES)


def gold(problem):
    return to_document(problem).removeprefix(document_prompt(problem))


# ---- every answer follows from the question, by another way than the generator's


def from_question(problem):
    """The answer, read off the question's text alone."""
    text = problem.question
    if problem.family == "math":
        total = None
        for sentence in re.findall(r"[^.?]+[.?]", text)[:-1]:
            numbers = [int(number) for number in re.findall(r"\d+", sentence)]
            if total is None:
                total = numbers[0] * (numbers[1] if "bags" in sentence else 1)
            else:
                total += numbers[0] if re.search("buys|finds|brings", sentence) else -numbers[0]
        return str(total)
    if problem.family == "tools":
        values = problem.answer
        call = json.loads(values)
        offered = re.search(rf"\b{call['name']}\((.*?)\)", text)[1].split(", ")
        request = text.split("). ", 1)[1]
        assert list(call["arguments"]) == offered and all(
            str(v) in request for v in call["arguments"].values()
        )
        assert problem.level == 3 or re.findall(r"\d+", request) == [
            str(next(iter(call["arguments"].values())))
        ]
        return values
    if problem.family == "form":
        a, b = map(int, re.findall(r"\d+", text)[:2])
        name, verb, unit = re.match(r"(\w+) (\w+) \d+ (\w+)", text).groups()
        opener = re.search(r"Begin with (\w+)\.", text)
        reply = f"{name} {verb} {a + b}" if "Name the person." in text else f"the total is {a + b}"
        reply = f"{opener[1]} {reply}" if opener else reply[0].upper() + reply[1:]
        reply += f" {unit}" * ("Give the unit." in text) + ("!" if "exclamation" in text else ".")
        most = re.search(r"at most (\d+) words", text)
        assert not most or len(reply.split()) <= int(most[1])
        return reply
    if problem.family == "recall":
        name = re.search(r"What is the key of (\w+)\?", text)[1]
        return re.findall(rf"The key of {name} is (\d+)\.", text)[0]
    return problem.answer  # code: see test_known_programs


@families
def test_answers_follow_from_the_questions(family):
    for problem in FAMILIES[family].problems("train", 600, 3):
        assert from_question(problem) == problem.answer


def test_math_steps_are_true_and_chained():
    for problem in math.problems("dev", 300, 0):
        before = None
        for step in problem.steps:
            a, sign, b, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)\.", step).groups()
            assert eval(f"{a} {sign} {b}") == int(result) <= 99 and before in (
                None,
                a,
            )  # our own text
            before = result
        assert before == problem.answer and len(problem.steps) == problem.level


def test_known_programs():
    """The stated program, run by Python itself, agrees with the evaluator on every test, and with
    steps and example.
    """
    for problem in code.problems("train", 600, 1):
        scope = {}
        exec(f"def f(x):\n    {problem.answer}", scope)  # our own text
        example, result = re.search(r"Example: f\((.*)\) = (.*)\.$", problem.question).groups()
        steps = {"x": json.loads(example)}
        exec("\n".join(step.removesuffix(".") for step in problem.steps), {}, steps)
        assert (
            scope["f"](json.loads(example)) == json.loads(result) == steps["abc"[problem.level - 1]]
        )
        tree = code.ast.parse(problem.answer.removeprefix("return "), mode="eval").body
        for x, wanted in problem.extra["tests"]:
            assert scope["f"](x) == code.run(tree, x) == wanted and type(code.run(tree, x)) is type(
                wanted
            )


def test_every_operation_matters():
    """A program with an operation left out fails the hidden tests; each operation is in a few
    hundred problems.
    """
    operations = set()
    for problem in code.problems("train", 600, 2):
        names = dict(zip("abc", (re.sub(r"^[abc] = |\.$", "", step) for step in problem.steps)))
        for left_out in names:
            expression = "x"
            for name, before in zip(names, "xab"):
                if name != left_out:
                    expression = re.sub(rf"\b{before}\b", lambda _: expression, names[name])
            assert code.reward(problem, f"Answer: return {expression}") == 0.0
        phrases = re.search(r"f\(x\): (.*)\. Example", problem.question)[1].split(", then ")
        operations |= {re.sub(r"\d+", "", phrase) for phrase in phrases}
    assert len(operations) == len(code.LIST_OPERATIONS) + len(code.NUMBER_OPERATIONS) == 20


def test_drills_hold_every_digit_fact():
    pages = math.drills(0, 50)
    facts = set(re.findall(r"\d+ [-+*] \d+ = \d+", " ".join(pages)))
    for a in range(10):
        for b in range(10):
            assert {f"{a} + {b} = {a + b}", f"{a + b} - {b} = {a}", f"{a} * {b} = {a * b}"} <= facts
    assert all(eval(fact.replace("=", "==")) for fact in facts) and math.drills(0, 60)[:50] == pages


# ---- rewards


@families
def test_rewards(family):
    problems = FAMILIES[family].problems("test", 512, 0)
    assert len({problem.key for problem in problems}) == 512
    assert all(sum(problem.level == level for problem in problems) >= 120 for level in (1, 2, 3))
    for problem in problems[:100]:
        reply = to_chat(problem)[-1]
        for right in (
            gold(problem),
            to_document(problem),
            reply["content"],
            problem.answer,
            f"<think>\nAnswer: 1\n</think>\n\n{reply['content']}\n",
            gold(problem) + "\nProblem: x\nAnswer: 1\n",
        ):
            assert registry.reward(problem, right) == 1.0, right
        for wrong in (
            "",
            "\n",
            "Answer:",
            "Answer: \x00",
            "é" * 1000,
            f"<think>{gold(problem)}",
            gold(problem) + "Answer: no",
            f"Answer: {problem.answer} {problem.answer}",
            "Answer: 7 or 8",
            "9" * 100_000,
            "." * 1_000_000,
            "[" * 100_000,
            '{"name": ' * 50,
        ):
            assert registry.reward(problem, wrong) == 0.0, wrong[:100]
    others = [
        registry.reward(problem, gold(other))
        for problem, other in zip(problems, problems[3:] + problems[:3])
    ]
    assert sum(others) / len(others) < 0.05


def test_tool_calls_are_compared_by_meaning():
    problem = FAMILIES["tools"].problems("train", 1, 0)[0]
    call = json.loads(problem.answer)
    number = next(iter(call["arguments"]))
    turned = {"arguments": dict(reversed(call["arguments"].items())), "name": call["name"]}
    assert (
        registry.reward(
            problem, f"Answer: {json.dumps(turned, indent=None, separators=(',', ':'))}"
        )
        == 1.0
    )
    for change in (
        {number: float(call["arguments"][number])},
        {number: str(call["arguments"][number])},
        {"more": 1},
    ):
        wrong = {**call, "arguments": {**call["arguments"], **change}}
        assert registry.reward(problem, f"Answer: {json.dumps(wrong)}") == 0.0


@pytest.mark.parametrize(
    "constraint, value, right, wrong",
    [
        ("name", "Mia", "Mia reads 19.", "She reads 19."),
        ("name", "Mia", "So Mia reads 19!", "Miami reads 19!"),
        ("unit", "pages", "The total is 19 pages.", "The total is 19."),
        ("mark", "a full stop", "It is 19.", "It is 19"),
        ("mark", "an exclamation mark", "It is 19!", "It is 19."),
        ("opener", "So", "So it is 19", "It is 19 so"),
        ("words", 3, "It is 19.", "It is surely 19."),
        ("words", 9, "It is 19.", "It is 19. It is."),  # two sentences
        ("words", 9, "It is 19.", "It is 18 or 19."),  # two numbers
        ("words", 9, "It is 19.", "It is -19."),
    ],
)
def test_form_constraints(constraint, value, right, wrong):
    extra = {"number": 19, "constraints": {constraint: value}}
    problem = replace(FAMILIES["form"].problems("train", 1, 0)[0], extra=extra)
    assert registry.reward(problem, f"Work: 12 + 7 = 19.\nAnswer: {right}\n") == 1.0
    assert registry.reward(problem, f"Work: 12 + 7 = 19.\nAnswer: {wrong}\n") == 0.0


ATTACKS = [
    "__import__('os').system('touch /tmp/owned')",
    "x.__class__",
    "x.sort()",
    "eval('x')",
    "open('/')",
    "f(x)",
    "f'{x}'",
    "9**9**9",
    "[0]*10**9",
    "x*10**9",
    "'a'*10**9",
    "999999 * 999999 * 999999",
    "9" * 190,
    "1e400",
    "1 // 0",
    "x[99]",
    "x[::0]",
    "sum(range(10**9))",
    "[v for v in iter(int, 1)]",
    "(lambda: x)()",
    "sorted(x, key=print)",
    "y := x",
    "*x",
    "await x",
    "x; x",
    "(" * 90 + "x" + ")" * 90,
    "-" * 190 + "1",
    "min(" * 40 + "x" + ")" * 40,
    "[" * 100,
    "x[" * 60,
    "x" * 10**6,
    "max([" * 9 + "v" + " for v in x])" * 9,
    "[[[[v for v in x] for v in x] for v in x] for v in x]",
    "[[a for v in x] for a in [[b for v in x] for b in x]]",
    "max([v for v in x if v > 99])",
    "{v for v in x}",
    "(v for v in x)",
    "[v async for v in x]",
    "[v > 3 for v in x]",
    "x == x",
    "True",
    "None",
    "x if x else x",
    "list(x)",
    "len(len)",
    "0x1for x in x",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("error")
def test_no_program_escapes_the_evaluator(attack):
    """Every one scores 0 at once, also where only a result is wanted that the attack might give by
    chance.
    """
    start = time.process_time()
    for problem in code.problems("train", 30, 0):
        for response in (f"Answer: return {attack}", attack):
            assert code.reward(problem, response) == 0.0
    assert time.process_time() - start < 5


def test_only_whole_numbers_and_lists_of_them_are_results():
    problem = code.problems("train", 1, 0)[0]
    for wanted, right, wrong in (
        (
            1,
            ("x[0]", "len(x) - 1", "-(0 - 1)"),
            ("x[0] == 1", "True", "1.0", "[1]", "x[:1]", "1" + " * 1" * 60),
        ),
        (
            [1, 0],
            ("[v % 2 for v in x]", "[2 - v for v in x]"),
            ("[v < 2 for v in x]", "[v % 2 async for v in x]", "[1, 0]", "x"),
        ),
    ):
        problem = replace(problem, extra={"tests": [[[1, 2], wanted]]})
        assert all(code.reward(problem, f"Answer: {answer}") == 1.0 for answer in right)
        assert all(code.reward(problem, f"Answer: {answer}") == 0.0 for answer in wrong)
    for expression, error in (
        ("1000001 * 1", "small"),
        ("max([" * 4 + "v" + " for v in x])" * 4, "work"),
    ):
        with pytest.raises(ValueError, match=error):
            code.run(code.ast.parse(expression, mode="eval").body, [1] * 8)


# ---- splits, corruption, streams


@families
def test_splits_are_disjoint_and_fit_the_shares(family):
    keys = {
        split: {p.key for p in FAMILIES[family].problems(split, 300, 0)}
        for split in ("train", "dev", "test")
    }
    assert all(assign_split(key) == split for split in keys for key in keys[split])
    assert (
        not keys["train"] & keys["test"]
        and not keys["dev"] & keys["test"]
        and not keys["train"] & keys["dev"]
    )
    shares = [assign_split(f"{family} {i}") for i in range(5000)]
    assert (
        abs(shares.count("test") / 5000 - 0.1) < 0.02
        and abs(shares.count("dev") / 5000 - 0.1) < 0.02
    )
    with pytest.raises(ValueError, match="'valid'"):
        FAMILIES[family].problems("valid", 1, 0)


def test_an_exhausted_space_ends():
    one = math.problems("train", 1, 0)[0]
    assert distinct(lambda rng, level: one, "train", 5, 0) == [one]


def test_no_held_out_prompt_in_the_stream():
    made = list(pages.documents(ALL, 10_000, 0))
    asked = {page.split("\n")[0] for page in made}
    for family, module in FAMILIES.items():
        held_out = module.problems("dev", 512, 0) + module.problems("test", 512, 0)
        assert not asked & {document_prompt(p).split("\n")[0] for p in held_out}
        seen = asked & {
            document_prompt(p).split("\n")[0] for p in module.problems("train", 1500, 0)
        }
        assert (
            seen or family == "recall"
        )  # it can find something; recall's space is too large for that


@families
@pytest.mark.parametrize("kind", pages.CORRUPTIONS)
def test_corruption_plants_the_named_fault(family, kind):
    rng, scores = seeded_rng("test"), []
    for problem in FAMILIES[family].problems("train", 90, 0):
        page, twin = to_document(problem), pages.corrupt(problem, kind, rng)
        assert twin != page
        if kind == "missing question":
            assert problem.question not in twin and page.endswith(twin)
        elif kind == "shuffled steps":
            assert sorted(twin.split()) == sorted(page.split())
        elif kind == "off-topic" or problem.question in twin:
            assert problem.question in twin
            scores.append(registry.reward(problem, twin))
    assert not scores or sum(scores) / len(scores) < 0.03


def test_stream_is_lazy_repeatable_and_mixed():
    made = list(islice(pages.documents(ALL, 10**12, 5), 3000))
    assert made == list(pages.documents(ALL, 3000, 5)) != list(pages.documents(ALL, 3000, 6))
    heads = {"drills": "Facts:", "tools": "Problem: Tools:", "code": "Problem: Write f(x):"}
    for head in heads.values():
        assert abs(sum(page.startswith(head) for page in made) / 3000 - 1 / 6) < 0.03
    twins = list(pages.documents(ALL, 3000, 5, corrupt=True))
    assert all(page != twin for page, twin in zip(made, twins))  # the same pages, each with a fault
    assert (
        sum(page.split("\n")[0] == twin.split("\n")[0] for page, twin in zip(made, twins)) > 1200
    )  # same question
    with pytest.raises(ValueError, match="sums"):
        next(pages.documents({"sums": 1.0}, 1, 0))


def test_recall_keeps_the_asked_distance():
    for length in (0, 3, 20):
        for problem in recall.problems("test", 60, 0, filler=(length, length)):
            told = problem.question.index(f"is {problem.answer}.") + len(f"is {problem.answer}.")
            between = problem.question[told:].count(".")
            assert between == max(length, problem.level - 1) == problem.extra["distance"]


GOLDEN = {
    "math": "b1f0689bca80",
    "code": "198678eec483",
    "tools": "7b10166bf77c",
    "form": "9a765aeb83ce",
    "recall": "d69ef80f6bee",
}


@families
def test_problems_never_change(family):
    """Splits and scores are comparable between machines and Python versions only while this holds.
    """
    text = "".join(map(to_document, FAMILIES[family].problems("test", 30, 0)))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == GOLDEN[family]
