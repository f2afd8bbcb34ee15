"""Task families: generated problems with worked steps that a program can judge; and their pages.

They are the textbook pages of the embedded corpus and, held out, the test of every phase. A family
is a module with `make(rng, level)`, `problems(split, n, seed)` and `reward(problem, response)`; the
page, the prompt, the chat form and the corrupted twin follow from the fields of a `Problem` alone.
The report trains on 15 % synthetic text and does not describe it (arXiv 2512.06266, section 2):
families, wording and levels are our choice. The wording is narrow on purpose: a model of a million
parameters is fluent only in a narrow language (TinyStories, arXiv 2305.07759).
"""
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from data.tasks import code, form, math, recall, tools
from data.tasks.problem import (
    PAGES,
    Problem,
    assign_split,
    between,
    pick,
    seeded_rng,
    shuffled,
    to_document,
)

FAMILIES = {"math": math, "code": code, "tools": tools, "form": form, "recall": recall}

# ---- corrupted twins: the same page with one planted fault, for a pool of known lower quality

CORRUPTIONS = ("wrong result", "shuffled steps", "missing question", "off-topic")


def corrupt(problem: Problem, kind: str, rng: random.Random) -> str:
    """The document of the problem with a fault of one of the CORRUPTIONS.

    So the label is known, and the subject unchanged.
    """
    if kind == "missing question":
        return to_document(problem).removeprefix(f"Problem: {problem.question}\n")
    if kind == "shuffled steps":
        return to_document(_shuffle_steps(problem, rng))
    if kind == "wrong result":
        return to_document(_change_result(problem, rng))
    if kind == "off-topic":
        other = _draw_other(problem, rng)
        return to_document(replace(problem, steps=other.steps, answer=other.answer))
    raise ValueError(f"unknown corruption {kind!r}; there are {', '.join(CORRUPTIONS)}")


def _shuffle_steps(problem: Problem, rng: random.Random) -> Problem:
    """In another order; a single step, or else the question, stands backwards."""
    steps = problem.steps
    if len(steps) > 1:
        while steps == problem.steps:
            steps = tuple(shuffled(rng, steps))
        return replace(problem, steps=steps)
    if " " in "".join(steps):
        return replace(problem, steps=(_backwards(steps[0]),))
    return replace(problem, question=_backwards(problem.question))


def _change_result(problem: Problem, rng: random.Random) -> Problem:
    """With another last number; an answer without a number becomes that of another problem."""
    numbers = re.findall(r"\d+", problem.answer)
    if not numbers:
        return replace(problem, answer=_draw_other(problem, rng).answer)
    old = numbers[-1]
    new = str(int(old) + between(rng, 1, 9))
    last_steps = [_replace_last(step, old, new) for step in problem.steps[-1:]]
    return replace(
        problem,
        steps=(*problem.steps[:-1], *last_steps),
        answer=_replace_last(problem.answer, old, new))


def _draw_other(problem: Problem, rng: random.Random) -> Problem:
    """A training problem of the same family and level with another answer."""
    while True:
        other = training_problem(problem.family, problem.level, rng)
        if other.answer != problem.answer:
            return other


def _replace_last(text: str, number: str, new: str) -> str:
    return re.sub(rf"(.*)\b{number}\b", rf"\g<1>{new}", text, count=1, flags=re.DOTALL)


def _backwards(text: str) -> str:
    return " ".join(reversed(text.split()))


# ---- the stream of training pages

def documents(families: dict[str, float], n: int, seed: int, corrupt: bool = False
              ) -> Iterator[str]:
    """n pages, families (any of PAGES) drawn by weight, never a dev or test problem; lazy.

    With `corrupt` the i-th page is the corrupted twin of the i-th page without it: two pools of one
    distribution.
    """
    unknown = {family.partition(":")[0] for family in families} - set(PAGES)
    if unknown:
        known = ", ".join(PAGES)
        raise ValueError(f"unknown task families {sorted(unknown)}; there are {known}")
    rng = seeded_rng("documents", seed)
    faults_rng = seeded_rng("faults", seed)
    drills = math.drill_stream(seeded_rng("drills", seed))
    for _ in range(n):
        family = _draw_family(families, rng)
        if family == "drills":
            drill = next(drills)
            yield _corrupt_drill(drill, faults_rng) if corrupt else drill
        else:
            problem = training_problem(family, between(rng, 1, 3), rng)
            yield _corrupt_problem(problem, faults_rng) if corrupt else to_document(problem)


def _draw_family(families: dict[str, float], rng: random.Random) -> str:
    point = rng.random() * sum(families.values())
    for family, weight in families.items():
        point -= weight
        if point < 0:
            break
    return family


def training_problem(family: str, level: int, rng: random.Random) -> Problem:
    """A problem that is not held out.

    family: "recall:9-24" for passkeys with so many sentences between the key and the question.
    """
    name, _, span = family.partition(":")
    if span:
        make = partial(recall.make, filler=tuple(map(int, span.split("-"))))
    else:
        make = FAMILIES[name].make
    while True:
        problem = make(rng, level)
        if assign_split(problem.key) == "train":
            return problem


def _corrupt_problem(problem: Problem, rng: random.Random) -> str:
    return corrupt(problem, pick(rng, CORRUPTIONS), rng)


def _corrupt_drill(drill: str, rng: random.Random) -> str:
    """All of its results are wrong."""
    def change(fact: re.Match) -> str:
        return f"= {int(fact[1]) + between(rng, 1, 9)}"

    return re.sub(r"= (\d+)", change, drill)
