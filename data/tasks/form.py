"""A small sum, and constraints on the form of the reply that a program can check (after IFEval, arXiv 2311.07911).

Key: the sum and its constraints. Level: the number of constraints. The reply is one sentence; the reward asks for the
right number and for every constraint, and gives nothing for a part. The units differ from the nouns of
data/tasks/math.py, so that neither family shows the other's held-out problems.
"""
import random

from data.tasks.problem import between, distinct, final_answer, only_number, pick, Problem, shuffled
from data.tasks.math import NAMES

STORIES = {"pages": "reads", "miles": "runs", "hours": "works", "euros": "saves"}
OPENERS = ("So", "Now", "Then")
MARKS = {"a full stop": ".", "an exclamation mark": "!"}
CONSTRAINTS = {                                 # kind: (wording, what holds for a reply that keeps it)
    "name": ("Name the person.", lambda reply, name: name in reply.split()),
    "unit": ("Give the unit.", lambda reply, unit: unit in reply.rstrip(".!").split()),
    "mark": ("End with {}.", lambda reply, mark: reply.endswith(MARKS[mark])),
    "opener": ("Begin with {}.", lambda reply, opener: reply.split()[0].rstrip(",") == opener),
    "words": ("Use at most {} words.", lambda reply, most: len(reply.split()) <= most),
}


def make(rng: random.Random, level: int) -> Problem:
    name, (unit, verb) = pick(rng, list(NAMES)), pick(rng, list(STORIES.items()))
    a, b = between(rng, 2, 90), between(rng, 2, 9)
    kinds = shuffled(rng, list(CONSTRAINTS))[:level]
    values = {"name": name, "unit": unit, "mark": pick(rng, list(MARKS)), "opener": pick(rng, OPENERS)}
    reply = f"{name} {verb} {a + b}" if "name" in kinds else f"the total is {a + b}"
    reply = f"{values['opener']} {reply}" if "opener" in kinds else reply[0].upper() + reply[1:]
    reply += (f" {unit}" if "unit" in kinds else "") + (MARKS[values["mark"]] if "mark" in kinds else ".")
    values["words"] = len(reply.split()) + between(rng, 0, 2)
    asked = {kind: values[kind] for kind in kinds}
    return Problem("form", key_of(a, b, asked),
                   f"{name} {verb} {a} {unit}. {NAMES[name]} {verb} {b} more. What is the total? {wording(asked)}",
                   (f"{a} + {b} = {a + b}.",), reply, level, {"number": a + b, "constraints": asked})


def key_of(a: int, b: int, asked: dict) -> str:
    """Of the sum a + b and its constraints {kind: value}."""
    return f"form {a} + {b} {sorted(asked.items())}"


def wording(asked: dict) -> str:
    """How the constraints {kind: value} are asked for."""
    return " ".join(CONSTRAINTS[kind][0].format(value) for kind, value in asked.items())


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


def reward(problem: Problem, response: str) -> float:
    """1.0 if the reply is one sentence with the right number, and no other, that keeps every constraint."""
    reply = final_answer(response)
    return float(only_number(reply) == str(problem.extra["number"])
                 and all(CONSTRAINTS[kind][1](reply, value) for kind, value in problem.extra["constraints"].items()))
