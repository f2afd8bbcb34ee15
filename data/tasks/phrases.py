"""Word problems of `math` whose gold answer is a phrase: "4 less than twenty-five" for 21.

Rules and math-verify cannot read such golds: they leave every number open, and the agentic
verifier decides (data/verify/agentic.py); with rules alone no answer is right. As in public sets,
where golds come in any wording, the question does not tell. Key and split follow the equations, as
in `math`. Which phrases there are is our choice.
"""
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from data.tasks import math
from data.tasks.problem import OpenAnswer, Problem, between, only_number, pick, seeded_rng
from data.verify import answers

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SPELLINGS = ("digits", "words")


def spell(n: int) -> str:
    """A number from 0 to 99 in words."""
    if n < 20:
        return ONES[n]
    tens = TENS[n // 10 - 2]
    return tens if n % 10 == 0 else f"{tens}-{ONES[n % 10]}"


# ---- forms: each a wording of two operands or one, the code that means the same, and operands of a
# given value. No wording has "and" or "or" in it: to the rules these make two answers of one.

@dataclass(frozen=True)
class Form:
    wording: str                        # with {a} and maybe {b}
    code: str                           # the same in Python, operands in the same order
    # (rng, value) -> operands that give the value; None where there are none
    operands: Callable[[random.Random, int], tuple[int, ...] | None]


def _parts_of_sum(rng: random.Random, value: int) -> tuple[int, int] | None:
    if value < 4:
        return None
    a = between(rng, 2, min(9, value - 2))
    return a, value - a


def _parts_of_difference(rng: random.Random, value: int) -> tuple[int, int] | None:
    a = between(rng, 2, 9)
    return (a, value + a) if value + a <= 99 else None


def _factors(rng: random.Random, value: int) -> tuple[int, int] | None:
    divisors = [a for a in range(2, 10) if value % a == 0 and 2 <= value // a <= 99]
    if not divisors:
        return None
    a = pick(rng, divisors)
    return a, value // a


def _part(k: int) -> Callable:
    """The operand that k times gives the value."""
    def operand(rng: random.Random, value: int) -> tuple[int] | None:
        return (value // k,) if value % k == 0 and value >= 2 * k else None

    return operand


def _multiple(k: int) -> Callable:
    """The operand that divided by k gives the value."""
    def operand(rng: random.Random, value: int) -> tuple[int] | None:
        return (k * value,) if 2 <= value and k * value <= 99 else None

    return operand


FORMS = {
    "more": Form("{a} more than {b}", "{a} + {b}", _parts_of_sum),
    "less": Form("{a} less than {b}", "-{a} + {b}", _parts_of_difference),
    "plus": Form("{a} plus {b}", "{a} + {b}", _parts_of_sum),
    "times": Form("{a} times {b}", "{a} * {b}", _factors),
    "twice": Form("twice {a}", "2 * {a}", _part(2)),
    "double": Form("the double of {a}", "2 * {a}", _part(2)),
    "triple": Form("the triple of {a}", "3 * {a}", _part(3)),
    "half": Form("half of {a}", "{a} / 2", _multiple(2)),
    "third": Form("a third of {a}", "{a} / 3", _multiple(3)),
    "quarter": Form("a quarter of {a}", "{a} / 4", _multiple(4)),
}
# a form with its operands spelled so is in no transcript that a verifier learns from
HELD_OUT = {
    ("less", ("words", "words")),
    ("times", ("words", "words")),
    ("plus", ("digits", "digits")),
    ("half", ("words",)),
}


@dataclass(frozen=True)
class Phrase:
    text: str
    code: str           # Python for its value
    value: int
    form: str           # a key of FORMS
    spelling: tuple[str, ...]   # of each operand, one of SPELLINGS


def draw_phrase(rng: random.Random, value: int, held_out: bool | None = None) -> Phrase:
    """A phrase for a number from 2 to 99. held_out: True for HELD_OUT alone, False for the rest."""
    while True:
        name = pick(rng, list(FORMS))
        operands = FORMS[name].operands(rng, value)
        if operands is None:
            continue
        spelling = tuple(pick(rng, SPELLINGS) for _ in operands)
        if held_out is None or held_out == ((name, spelling) in HELD_OUT):
            return make_phrase(name, spelling, operands, value)


def make_phrase(
    name: str, spelling: tuple[str, ...], operands: tuple[int, ...], value: int
) -> Phrase:
    written = []
    for operand, spelled in zip(operands, spelling):
        written.append(spell(operand) if spelled == "words" else str(operand))
    text = FORMS[name].wording.format(**dict(zip("ab", written)))
    code = FORMS[name].code.format(**dict(zip("ab", operands)))
    return Phrase(text, code, value, name, spelling)


# ---- the family

def problems(split: str, n: int, seed: int) -> list[Problem]:
    """Other problems than those of `math` with this seed, of the same split by their equations."""
    rng = seeded_rng("phrases", split, seed)
    rephrased = []
    for problem in math.problems(split, n + n // 2, seed + 1_000_000):
        value = int(problem.answer)
        if 2 <= value <= 99 and len(rephrased) < n:
            gold = draw_phrase(rng, value).text
            key = problem.key.replace("math", "phrases", 1)
            extra = {"value": problem.answer}
            rephrased.append(
                replace(problem, family="phrases", key=key, answer=gold, extra=extra))
    return rephrased


def judge(problem: Problem, response: str) -> float | None | OpenAnswer:
    """What rules and math-verify say; a number they leave open."""
    return answers.judge(problem.answer, response)


def reward(problem: Problem, response: str) -> float | None:
    """By rules alone, which cannot read the gold: 0.0 but for a copy of it."""
    return answers.reward(problem.answer, response)


def truth(problem: Problem, response: str) -> float:
    """1.0 if the answer is the number that the gold means: for reports, no reward uses it."""
    answer = answers.final_answer(response) or ""
    return float(only_number(answer) == problem.extra["value"])
