"""Passkeys: a key told early in a document and asked for at its end; what a long context is for.

Key: the person and the passkey. Level: the number of persons whose keys are told; the one asked for
is told first, so that the number of sentences between it and the question is exactly what `filler`
asks for (about eight words each).
"""
import random
from functools import partial

from data.tasks.problem import (
    Problem,
    answer_line,
    between,
    distinct,
    only_number,
    pick,
    same_number,
    shuffled,
)

NAMES = ("Mia", "Tom", "Eva", "Ben", "Lea", "Sam")
SUBJECTS = ("The old dog", "The small bird", "The brown horse", "The quiet child", "The tall man",
            "The young cat")
VERBS = ("sleeps", "waits", "plays", "rests", "sings", "walks")
PLACES = ("near the river", "behind the house", "under the tree", "in the garden", "by the road",
          "on the hill")
FILLER = (2, 6)     # the least and the most sentences between the key and the question


def make(rng: random.Random, level: int, filler: tuple[int, int] = FILLER) -> Problem:
    names = shuffled(rng, NAMES)[:level]
    keys = [str(between(rng, 1000, 9999)) for _ in names]
    first_key, *other_keys = [f"The key of {name} is {key}." for name, key in zip(names, keys)]
    # the other persons' keys are part of what lies between
    distance = max(between(rng, *filler), len(other_keys))
    sentences = [_draw_sentence(rng) for _ in range(distance - len(other_keys))]
    between_them = shuffled(rng, other_keys + sentences)
    opening = _draw_sentence(rng)
    question = " ".join([opening, first_key, *between_them, f"What is the key of {names[0]}?"])
    return Problem(
        family="recall",
        key=f"recall {names[0]} {keys[0]}",
        question=question,
        steps=(),
        answer=keys[0],
        level=level,
        extra={"distance": distance})


def _draw_sentence(rng: random.Random) -> str:
    return f"{pick(rng, SUBJECTS)} {pick(rng, VERBS)} {pick(rng, PLACES)}."


def problems(split: str, n: int, seed: int, filler: tuple[int, int] = FILLER) -> list[Problem]:
    """As in every family; `filler`: fewest and most sentences between the key and the question."""
    return distinct(partial(make, filler=filler), split, n, seed)


same = same_number


def reward(problem: Problem, response: str) -> float:
    """1.0 if the answer holds one number and it is the passkey."""
    return float(only_number(answer_line(response)) == problem.answer)
