"""Task families: generated problems with worked steps, whose answers a program can judge; and pages made of them.

They are the textbook pages of the embedded corpus and, held out, the test of every phase. A family is a module with
`make(rng, level)`, `problems(split, n, seed)` and `reward(problem, response)`; the page, the prompt, the chat form and
the corrupted twin follow from the fields of a `Problem` alone. The report trains on 15 % synthetic text and does not
describe it (arXiv 2512.06266, section 2): families, wording and levels are our choice. The wording is narrow on
purpose: a model of a million parameters is fluent only in a narrow language (TinyStories, arXiv 2305.07759).
"""
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from data.tasks import code, form, math, recall, tools
from data.tasks.problem import Problem, between, pick, seeded_rng, shuffled, assign_split, to_document

FAMILIES = {"math": math, "code": code, "tools": tools, "form": form, "recall": recall}
PAGES = (*FAMILIES, "drills")  # what documents() can make

# ---- corrupted twins: the same page with one planted fault, for a pool of known lower quality

CORRUPTIONS = ("wrong result", "shuffled steps", "missing question", "off-topic")


def corrupt(problem: Problem, kind: str, rng: random.Random) -> str:
    """The document of the problem with a fault of one of the CORRUPTIONS: the label is known, the subject unchanged."""
    steps, answer = list(problem.steps), problem.answer
    if kind == "missing question":
        return to_document(problem).removeprefix(f"Problem: {problem.question}\n")
    if kind == "shuffled steps" and len(steps) > 1:
        while steps == list(problem.steps):
            steps = shuffled(rng, steps)
    elif kind == "shuffled steps":              # a single step, or else the question, stands backwards
        if " " not in "".join(steps):
            return to_document(replace(problem, question=_backwards(problem.question)))
        steps = [_backwards(steps[0])]
    elif kind == "wrong result" and (numbers := re.findall(r"\d+", answer)):
        old, new = numbers[-1], str(int(numbers[-1]) + between(rng, 1, 9))
        answer = _replace_last(answer, old, new)
        steps[-1:] = [_replace_last(step, old, new) for step in steps[-1:]]
    elif kind in ("off-topic", "wrong result"):  # an answer without a number becomes that of another problem
        while (other := training_problem(problem.family, problem.level, rng)).answer == answer:
            pass
        steps, answer = list(other.steps) if kind == "off-topic" else steps, other.answer
    else:
        raise ValueError(f"unknown corruption {kind!r}; there are {', '.join(CORRUPTIONS)}")
    return to_document(replace(problem, steps=tuple(steps), answer=answer))


def _replace_last(text: str, number: str, new: str) -> str:
    return re.sub(rf"(.*)\b{number}\b", rf"\g<1>{new}", text, count=1, flags=re.DOTALL)


def _backwards(text: str) -> str:
    return " ".join(reversed(text.split()))


# ---- the stream of training pages

def documents(families: dict[str, float], n: int, seed: int, corrupt: bool = False) -> Iterator[str]:
    """n pages, families (any of PAGES) drawn by weight, never a dev or test problem; lazy, so n may be huge.

    With `corrupt` the i-th page is the corrupted twin of the i-th page without it: two pools of one distribution.
    """
    if unknown := {family.partition(":")[0] for family in families} - set(PAGES):
        raise ValueError(f"unknown task families {sorted(unknown)}; there are {', '.join(PAGES)}")
    total, rng, faults = sum(families.values()), seeded_rng("documents", seed), seeded_rng("faults", seed)
    drills = math.drill_stream(seeded_rng("drills", seed))
    for _ in range(n):
        point = rng.random() * total
        for family, weight in families.items():
            point -= weight
            if point < 0:
                break
        page = next(drills) if family == "drills" else training_problem(family, between(rng, 1, 3), rng)
        if corrupt:
            yield _faulty(page, faults)
        else:
            yield page if family == "drills" else to_document(page)


def training_problem(family: str, level: int, rng: random.Random) -> Problem:
    name, _, span = family.partition(":")  # "recall:9-24": so many sentences between key and question
    make = partial(recall.make, filler=tuple(map(int, span.split("-")))) if span else FAMILIES[name].make
    while assign_split((problem := make(rng, level)).key) != "train":
        pass
    return problem


def _faulty(page: Problem | str, rng: random.Random) -> str:
    if isinstance(page, Problem):
        return corrupt(page, pick(rng, CORRUPTIONS), rng)
    return re.sub(r"= (\d+)", lambda fact: f"= {int(fact[1]) + between(rng, 1, 9)}", page)     # a drill: all wrong
