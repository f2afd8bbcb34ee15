"""Word problems of one to three steps with numbers up to 99, and drills of the facts that their arithmetic rests on.

Key: the worked equations, so a held-out problem is one whose chain of equations is in no training problem; names, nouns
and verbs do not count. Level: the number of steps. Drills may share operands with held-out problems: they teach to
calculate.
"""
import random
from collections.abc import Iterator
from itertools import islice

from data.tasks.problem import (
    between,
    distinct,
    final_answer,
    only_number,
    pick,
    Problem,
    seeded_rng,
    same_number,
    shuffled,
)

NAMES = {"Mia": "She", "Tom": "He", "Eva": "She", "Ben": "He", "Lea": "She", "Sam": "He"}
NOUNS = ("apples", "books", "pens", "coins", "cards", "stones")
GAINS = ("{she} buys {n} more.", "{she} finds {n} more.", "{friend} brings {n} more.")
LOSSES = ("{she} loses {n}.", "{she} sells {n}.", "{she} gives {n} to {friend}.")
LARGEST_START, LARGEST_CHANGE, LARGEST_RESULT = 90, 9, 99
BAGS = 0.25                     # share of the problems that begin with a multiplication


def make(rng: random.Random, level: int) -> Problem:
    name, friend = shuffled(rng, list(NAMES))[:2]
    noun, steps = pick(rng, NOUNS), []
    if rng.random() < BAGS:
        bags, each = between(rng, 2, 9), between(rng, 2, 9)
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
            story.append(pick(rng, events).format(she=NAMES[name], friend=friend, n=change))
            steps.append(f"{total} {sign} {change} = {result}.")
            total = result
    question = " ".join([*story, f"How many {noun} does {name} have now?"])
    return Problem("math", f"math {' '.join(steps)}", question, tuple(steps), str(total), level)


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


same = same_number


def reward(problem: Problem, response: str) -> float:
    """1.0 if the answer holds one number and it is the right one; a unit or a full stop beside it does no harm."""
    return float(only_number(final_answer(response)) == problem.answer)


# Every sum and product of two digits and every difference that undoes a sum: what carrying and borrowing are made of.
FACTS = [fact for a in range(10) for b in range(10)
         for fact in (f"{a} + {b} = {a + b}.", f"{a + b} - {b} = {a}.", f"{a} * {b} = {a * b}.")]


def drill_stream(rng: random.Random) -> Iterator[str]:
    """Endless drills: six digit facts, all of FACTS once in each 50 drills, and two facts as problems need them."""
    while True:
        deck = shuffled(rng, FACTS)
        while deck:
            small, deck = deck[:6], deck[6:]
            a, b = between(rng, 2, LARGEST_RESULT - LARGEST_CHANGE), between(rng, 2, LARGEST_CHANGE)
            yield f"Facts: {' '.join(small)} {a} + {b} = {a + b}. {a + b} - {b} = {a}.\n"


def drills(seed: int, n: int) -> list[str]:
    return list(islice(drill_stream(seeded_rng("drills", seed)), n))
