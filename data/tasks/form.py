"""A small sum, and constraints on the form of the reply that a program can check.

After IFEval (arXiv 2311.07911). Key: the sum and its constraints. Level: the number of constraints.
The reply is one sentence; the reward asks for the right number and for every constraint, and gives
nothing for a part. The units differ from the nouns of data/tasks/math.py, so that neither family
shows the other's held-out problems.
"""
import random

from data.tasks.math import NAMES
from data.tasks.problem import Problem, answer_line, between, distinct, only_number, pick, shuffled

STORIES = {"pages": "reads", "miles": "runs", "hours": "works", "euros": "saves"}
OPENERS = ("So", "Now", "Then")
MARKS = {"a full stop": ".", "an exclamation mark": "!"}
CONSTRAINTS = {     # kind: (wording, what holds for a reply that keeps it)
    "name": ("Name the person.", lambda reply, name: name in reply.split()),
    "unit": ("Give the unit.", lambda reply, unit: unit in reply.rstrip(".!").split()),
    "mark": ("End with {}.", lambda reply, mark: reply.endswith(MARKS[mark])),
    "opener": ("Begin with {}.", lambda reply, opener: reply.split()[0].rstrip(",") == opener),
    "words": ("Use at most {} words.", lambda reply, most: len(reply.split()) <= most),
}


def make(rng: random.Random, level: int) -> Problem:
    name = pick(rng, list(NAMES))
    unit, verb = pick(rng, list(STORIES.items()))
    a = between(rng, 2, 90)
    b = between(rng, 2, 9)
    kinds = shuffled(rng, list(CONSTRAINTS))[:level]
    values = {"name": name, "unit": unit}
    values["mark"] = pick(rng, list(MARKS))
    values["opener"] = pick(rng, OPENERS)

    reply = f"{name} {verb} {a + b}" if "name" in kinds else f"the total is {a + b}"
    if "opener" in kinds:
        reply = f"{values['opener']} {reply}"
    else:
        reply = reply[0].upper() + reply[1:]
    if "unit" in kinds:
        reply += f" {unit}"
    reply += MARKS[values["mark"]] if "mark" in kinds else "."
    values["words"] = len(reply.split()) + between(rng, 0, 2)

    constraints = {kind: values[kind] for kind in kinds}
    return Problem(
        family="form",
        key=make_key(a, b, constraints),
        question=make_question(name, verb, unit, a, b, constraints),
        steps=(f"{a} + {b} = {a + b}.",),
        answer=reply,
        level=level,
        extra={"number": a + b, "constraints": constraints})


def make_key(a: int, b: int, constraints: dict) -> str:
    """The key of the sum a + b with its constraints {kind: value}."""
    return f"form {a} + {b} {sorted(constraints.items())}"


def make_question(name: str, verb: str, unit: str, a: int, b: int, constraints: dict) -> str:
    """The story of the sum, and how the constraints {kind: value} are asked for."""
    story = f"{name} {verb} {a} {unit}. {NAMES[name]} {verb} {b} more. What is the total?"
    wordings = [CONSTRAINTS[kind][0].format(value) for kind, value in constraints.items()]
    return " ".join([story, *wordings])


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


def reward(problem: Problem, response: str) -> float:
    """1.0 if the reply is one sentence with the right number alone, and keeps every constraint."""
    reply = answer_line(response)
    if only_number(reply) != str(problem.extra["number"]):
        return 0.0
    for kind, value in problem.extra["constraints"].items():
        _, is_kept = CONSTRAINTS[kind]
        if not is_kept(reply, value):
            return 0.0
    return 1.0
