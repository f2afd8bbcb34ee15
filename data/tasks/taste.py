"""What people like: a small sum, a reply whose form is partly asked for, and a hidden rubric.

The rubric is of form alone: names the person, gives the unit, is friendly (an exclamation mark), is
short. People like all of it, whatever they asked for; a wrong answer is worth nothing, whatever its
form. Training sees nothing of the rubric but the preferences of pairs(); reward() judges what came
of that (the report has people in its place: our choice). Level: the number of points that are asked
for, in the words of `form`, whose key it shares: a question that both have is held out in both.
"""
import random

from data.tasks.form import OPENERS, STORIES, make_key, make_question
from data.tasks.math import NAMES
from data.tasks.problem import (
    Problem,
    answer_line,
    assign_split,
    between,
    distinct,
    only_number,
    pick,
    seeded_rng,
    shuffled,
)

SHORT = 5   # words


def make(rng: random.Random, level: int) -> Problem:
    name = pick(rng, list(NAMES))
    unit, verb = pick(rng, list(STORIES.items()))
    a = between(rng, 2, 90)
    b = between(rng, 2, 9)
    points = {"name": name, "unit": unit, "mark": "an exclamation mark"}
    kinds = shuffled(rng, list(points))[:level]
    constraints = {kind: points[kind] for kind in kinds}
    return Problem(
        family="taste",
        key=make_key(a, b, constraints),
        question=make_question(name, verb, unit, a, b, constraints),
        steps=(f"{a} + {b} = {a + b}.",),
        answer=f"{name} {verb} {a + b} {unit}!",
        level=level,
        extra={"number": a + b, "name": name, "unit": unit, "verb": verb})


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


def is_correct(problem: Problem, response: str) -> bool:
    """The rule that gates everything: one number, the right one."""
    return only_number(answer_line(response)) == str(problem.extra["number"])


def rubric(problem: Problem, response: str) -> float:
    """Share of the four points of form that a reply has."""
    reply = answer_line(response)
    words = reply.rstrip(".!").split()
    points = [
        problem.extra["name"] in words,
        problem.extra["unit"] in words,
        reply.endswith("!"),
        0 < len(words) <= SHORT,
    ]
    return sum(points) / len(points)


def reward(problem: Problem, response: str) -> float:
    """The share of the rubric's points, 0.0 for a wrong answer."""
    return rubric(problem, response) if is_correct(problem, response) else 0.0


# ---- preferences

def reply(problem: Problem, rng: random.Random) -> str:
    """A right reply of a random form, as the task family `form` has them, and longer ones."""
    def coin() -> bool:
        return rng.random() < 0.5

    extra = problem.extra
    if coin():
        text = f"{extra['name']} {extra['verb']} {extra['number']}"
    else:
        text = f"the total is {extra['number']}"
    if coin():
        text += f" {extra['unit']}"
    if coin():
        text = f"{pick(rng, OPENERS)} {text}"
    else:
        text = text[0].upper() + text[1:]
    if coin():
        text += " now"
    return f"Answer: {text}{pick(rng, ('!', '.', ''))}"


def pairs(split: str, n: int, seed: int, noise: float = 0.0) -> list[dict]:
    """n preferences {"question", "better", "worse", "gap" (of the rubric)}; no ties.

    noise: share of the pairs in which the longer reply is called better although the rubric says
    the opposite: what people's labels are like, and what a policy may exploit.
    """
    rng = seeded_rng("taste", split, seed)
    preferences = []
    while len(preferences) < n:
        problem = make(rng, between(rng, 1, 3))
        one = reply(problem, rng)
        other = reply(problem, rng)
        gap = rubric(problem, one) - rubric(problem, other)
        if gap == 0 or assign_split(problem.key) != split:
            continue
        better, worse = (one, other) if gap > 0 else (other, one)
        # in about half of the pairs the worse one is longer
        if noise > 0 and len(worse) > len(better) and rng.random() < 2 * noise:
            better, worse = worse, better
        preferences.append({
            "question": problem.question, "better": better, "worse": worse, "gap": abs(gap)})
    return preferences
