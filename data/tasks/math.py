"""Word problems of one to three steps with numbers up to 99, and drills of the facts behind them.

Key: the worked equations, so a held-out problem is one whose chain of equations is in no training
problem; names, nouns and verbs do not count. Level: the number of steps. Drills may share operands
with held-out problems: they teach to calculate.
"""
import random
from collections.abc import Iterator
from itertools import islice

from data.tasks.problem import (
    Problem,
    answer_line,
    between,
    distinct,
    only_number,
    pick,
    same_number,
    seeded_rng,
    shuffled,
)

NAMES = {"Mia": "She", "Tom": "He", "Eva": "She", "Ben": "He", "Lea": "She", "Sam": "He"}
NOUNS = ("apples", "books", "pens", "coins", "cards", "stones")
GAINS = ("{she} buys {n} more.", "{she} finds {n} more.", "{friend} brings {n} more.")
LOSSES = ("{she} loses {n}.", "{she} sells {n}.", "{she} gives {n} to {friend}.")
LARGEST_START, LARGEST_CHANGE, LARGEST_RESULT = 90, 9, 99
BAGS = 0.25     # share of the problems that begin with a multiplication


def make(rng: random.Random, level: int) -> Problem:
    name, friend = shuffled(rng, list(NAMES))[:2]
    noun = pick(rng, NOUNS)
    steps = []
    if rng.random() < BAGS:
        bags = between(rng, 2, 9)
        each = between(rng, 2, 9)
        total = bags * each
        story = [f"{name} has {bags} bags with {each} {noun} each."]
        steps.append(f"{bags} * {each} = {total}.")
    else:
        total = between(rng, 2, LARGEST_START)
        story = [f"{name} has {total} {noun}."]

    while len(steps) < level:
        sign, events = pick(rng, (("+", GAINS), ("-", LOSSES)))
        change = between(rng, 2, LARGEST_CHANGE)
        result = total + change if sign == "+" else total - change
        if 0 <= result <= LARGEST_RESULT:
            event = pick(rng, events)
            story.append(event.format(she=NAMES[name], friend=friend, n=change))
            steps.append(f"{total} {sign} {change} = {result}.")
            total = result

    question = " ".join([*story, f"How many {noun} does {name} have now?"])
    key = f"math {' '.join(steps)}"
    return Problem("math", key, question, tuple(steps), str(total), level)


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


same = same_number


def reward(problem: Problem, response: str) -> float:
    """1.0 if the answer holds one number, the right one; a unit beside it does no harm."""
    return float(only_number(answer_line(response)) == problem.answer)


# ---- drills

def _digit_facts() -> list[str]:
    """Every sum and product of two digits and every difference that undoes a sum.

    What carrying and borrowing are made of.
    """
    facts = []
    for a in range(10):
        for b in range(10):
            facts += [f"{a} + {b} = {a + b}.", f"{a + b} - {b} = {a}.", f"{a} * {b} = {a * b}."]
    return facts


FACTS = _digit_facts()


def drill_stream(rng: random.Random) -> Iterator[str]:
    """Endless drills: six digit facts each, and two facts as problems need them.

    Each 50 drills have all of FACTS once.
    """
    while True:
        deck = shuffled(rng, FACTS)
        while deck:
            digit_facts, deck = deck[:6], deck[6:]
            a = between(rng, 2, LARGEST_RESULT - LARGEST_CHANGE)
            b = between(rng, 2, LARGEST_CHANGE)
            sum_fact = f"{a} + {b} = {a + b}."
            difference_fact = f"{a + b} - {b} = {a}."
            yield f"Facts: {' '.join(digit_facts)} {sum_fact} {difference_fact}\n"


def drills(seed: int, n: int) -> list[str]:
    return list(islice(drill_stream(seeded_rng("drills", seed)), n))
