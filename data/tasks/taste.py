"""What people like: a small sum, a reply of which some points of form are asked, and a rubric that nobody shows.

The rubric is of form alone: names the person, gives the unit, is friendly (an exclamation mark), is short. People like
all of it, whatever they asked for; a wrong answer is worth nothing, whatever its form. In training nothing is seen of
the rubric but the preferences of pairs(); reward() judges what came of that (the report has people in its place: our
choice). Level: the number of points that are asked, in the words of `form`, whose key it shares: a question that both
have is held out in both.
"""
import random

from data.tasks.problem import (
    between,
    distinct,
    final_answer,
    only_number,
    pick,
    Problem,
    seeded_rng,
    shuffled,
    assign_split,
)
from data.tasks.form import OPENERS, STORIES, key_of, wording
from data.tasks.math import NAMES

SHORT = 5  # words


def make(rng: random.Random, level: int) -> Problem:
    name, (unit, verb) = pick(rng, list(NAMES)), pick(rng, list(STORIES.items()))
    a, b = between(rng, 2, 90), between(rng, 2, 9)
    points = {"name": name, "unit": unit, "mark": "an exclamation mark"}
    asked = {kind: points[kind] for kind in shuffled(rng, list(points))[:level]}
    extra = {"number": a + b, "name": name, "unit": unit, "verb": verb}
    return Problem("taste", key_of(a, b, asked),
                   f"{name} {verb} {a} {unit}. {NAMES[name]} {verb} {b} more. What is the total? {wording(asked)}",
                   (f"{a} + {b} = {a + b}.",), f"{name} {verb} {a + b} {unit}!", level, extra)


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


def is_correct(problem: Problem, response: str) -> bool:
    """The rule that gates everything: one number, the right one."""
    return only_number(final_answer(response)) == str(problem.extra["number"])


def rubric(problem: Problem, response: str) -> float:
    """Share of the four points of form that a reply has."""
    reply = final_answer(response)
    words = reply.rstrip(".!").split()
    return ((problem.extra["name"] in words) + (problem.extra["unit"] in words) + reply.endswith("!")
            + (0 < len(words) <= SHORT)) / 4


def reward(problem: Problem, response: str) -> float:
    return is_correct(problem, response) * rubric(problem, response)


# ---------------------------------------------------------------------------------------------------------------------
# Preferences

def reply(problem: Problem, rng: random.Random) -> str:
    """A right reply of a random form, as the task family `form` has them, and longer ones."""
    extra, coin = problem.extra, lambda: rng.random() < 0.5
    text = f"{extra['name']} {extra['verb']} {extra['number']}" if coin() else f"the total is {extra['number']}"
    text += f" {extra['unit']}" if coin() else ""
    text = f"{pick(rng, OPENERS)} {text}" if coin() else text[0].upper() + text[1:]
    text += " now" if coin() else ""
    return f"Answer: {text}" + pick(rng, ("!", ".", ""))


def pairs(split: str, n: int, seed: int, noise: float = 0.0) -> list[dict]:
    """n preferences {"question", "better", "worse", "gap" (of the rubric)}; no ties.

    noise: share of the pairs in which the longer reply is called better although the rubric says the opposite: what
    people's labels are like, and what a policy may exploit.
    """
    rng, found = seeded_rng("taste", split, seed), []
    while len(found) < n:
        problem = make(rng, between(rng, 1, 3))
        one, other = reply(problem, rng), reply(problem, rng)
        gap = rubric(problem, one) - rubric(problem, other)
        if not gap or assign_split(problem.key) != split:
            continue
        better, worse = (one, other) if gap > 0 else (other, one)
        flipped = noise > 0 and len(worse) > len(better) and rng.random() < 2 * noise  # in about half it is longer
        better, worse = (worse, better) if flipped else (better, worse)
        found.append({"question": problem.question, "better": better, "worse": worse, "gap": abs(gap)})
    return found
