"""Task families: generated problems with worked steps, whose answers a program can judge.

They are the textbook pages of the embedded corpus and, held out, the test of every phase. A family is a module with
`make(rng, level)`, `problems(split, n, seed)` and `reward(problem, response)`; the page, the prompt, the chat form and
the corrupted twin follow from the fields of a `Problem` alone and are here. The report trains on 15 % synthetic text
and does not describe it (arXiv 2512.06266, section 2): families, wording and levels are our choice. The wording is
narrow on purpose: a model of a million parameters is fluent only in a narrow language (TinyStories, arXiv 2305.07759).

All randomness is drawn from `random.Random(seed).random()`, the one method whose numbers Python promises to keep.
"""
import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial


@dataclass(frozen=True)
class Problem:
    family: str
    key: str                    # what makes two problems the same; its hash decides the split
    question: str
    steps: tuple[str, ...]      # the work, a sentence each; empty where there is nothing to work out
    answer: str                 # one line
    level: int                  # 1 easy .. 3 hard
    extra: dict = field(default_factory=dict, hash=False)   # what the reward needs beside the answer; fit for JSON


def split_of(key: str) -> str:
    """'train' (80 % of all keys), 'dev' or 'test' (10 % each): the same on every machine and in every run."""
    bucket = hashlib.sha256(key.encode()).digest()[0] * 10 // 256
    return {0: "test", 1: "dev"}.get(bucket, "train")


# ---- draws

def rng_of(*parts: str | int) -> random.Random:
    """A generator of its own for each purpose, so that one stream never shifts another."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def between(rng: random.Random, low: int, high: int) -> int:
    """A whole number, both ends included."""
    return low + int(rng.random() * (high - low + 1))


def pick(rng: random.Random, items: Sequence):
    return items[between(rng, 0, len(items) - 1)]


def shuffled(rng: random.Random, items: Sequence) -> list:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def distinct(make: Callable[[random.Random, int], Problem], split: str, n: int, seed: int) -> list[Problem]:
    """n problems of the split with n different keys, levels 1, 2, 3, 1, 2, ...

    An exhausted level gives way to the next, and where no more are found the list is shorter.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'dev' or 'test'")
    rng, found, level, missed = rng_of("problems", split, seed), {}, 0, 0
    while len(found) < n and missed < 3:
        level, missed = level % 3 + 1, missed + 1
        for _ in range(1000):
            problem = make(rng, level)
            if split_of(problem.key) == split and problem.key not in found:
                found[problem.key], missed = problem, 0
                break
    return list(found.values())


# ---- the forms of a problem

def prompt(problem: Problem) -> str:
    """The document up to where the model must go on; a set may bring its own."""
    return problem.extra.get("prompt") or f"Problem: {problem.question}\n" + ("Work:" if problem.steps else "Answer:")


def document(problem: Problem) -> str:
    """A page for pre-training: 'Problem: ...', 'Work: ...' and 'Answer: ...', a line each."""
    if problem.answer.startswith(prompt(problem).strip()):  # HumanEval's solution goes on from its prompt
        return f"{problem.answer}\n"
    work = f" {' '.join(problem.steps)}\nAnswer:" if problem.steps else ""
    return f"{prompt(problem)}{work} {problem.answer}\n"


def chat(problem: Problem) -> list[dict]:
    """Messages for fine-tuning: the question; the work as reasoning, the answer line (or a set's reply) as content."""
    content = problem.extra.get("reply", "Answer: {}").replace("{}", problem.answer)
    return [{"role": "user", "content": problem.question},
            {"role": "assistant", "reasoning": " ".join(problem.steps), "content": content}]


def as_reply(page: str) -> str:
    """A page from behind 'Work:' on in the form of a chat reply: the work as thoughts, the answer after them."""
    work, _, answer = page.partition("\nAnswer:")
    return f"<think>\n{work.strip()}\n</think>\n\nAnswer: {answer.strip()}"


def after_thoughts(response: str) -> str | None:
    """What is judged: the text after the last </think>; None for thoughts that never end."""
    text = response.rpartition("</think>")[2]
    return None if "<think>" in text else text


def final_answer(response: str) -> str:
    """What a response offers as its answer: the line after the last 'Answer:', or its last line if there is none.

    A base model that runs on into a next problem is judged on its own; thoughts that never end hold no answer, and a
    line of more than 500 characters is none.
    """
    text = (after_thoughts(response) or "").split("\nProblem:")[0]
    lines = [line for line in text.rpartition("Answer:")[2].splitlines() if line.strip()]
    line = lines[0 if "Answer:" in text else -1].strip() if lines else ""
    return line if len(line) <= 500 else ""


def only_number(text: str) -> str | None:
    """The number of a plain sentence that holds just one: '19', '19 apples.', 'Mia has 19.'; None for other text."""
    match = re.fullmatch(r"[A-Za-z, ]*(-?[0-9]+)[A-Za-z, ]*[.!]?", text)
    return match and match[1]


def same_number(answer: str, other: str) -> bool:
    """Whether two answers hold the same number, or are the same text."""
    return (only_number(answer) or answer) == (only_number(other) or other)


def family(spec: str):
    """What has `problems(split, n, seed)` and `reward(problem, response)`: one of FAMILIES, or a public set (sets.py),
    "gsm8k" from the hub or "gsm8k=FILE". Where its answers can be compared, as for a vote, it has `same` as well."""
    if spec in FAMILIES or spec == "taste":
        return FAMILIES.get(spec, taste)
    from data.tasks import sets  # verifier and sandbox, which generated problems do without
    return sets.family(spec)


def reward(problem: Problem, response: str) -> float | None:
    """1.0 for a right response (the text after the prompt, or a chat reply), else 0.0; None: could not be scored."""
    return family(problem.family).reward(problem, response)


def rewards(problems: Sequence[Problem], responses: Sequence[str]) -> list[float | None]:
    """The reward of each response, several at a time: programs wait for the sandbox."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(reward, problems, responses))


# ---- corrupted twins: the same page with one planted fault, for a pool of known lower quality

CORRUPTIONS = ("wrong result", "shuffled steps", "missing question", "off-topic")


def corrupt(problem: Problem, kind: str, rng: random.Random) -> str:
    """The document of the problem with a fault of one of the CORRUPTIONS: the label is known, the subject unchanged."""
    steps, answer = list(problem.steps), problem.answer
    if kind == "missing question":
        return document(problem).removeprefix(f"Problem: {problem.question}\n")
    if kind == "shuffled steps" and len(steps) > 1:
        while steps == list(problem.steps):
            steps = shuffled(rng, steps)
    elif kind == "shuffled steps":              # a single step, or else the question, stands backwards
        if " " not in "".join(steps):
            return document(replace(problem, question=_backwards(problem.question)))
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
    return document(replace(problem, steps=tuple(steps), answer=answer))


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
    total, rng, faults = sum(families.values()), rng_of("documents", seed), rng_of("faults", seed)
    drills = math.drill_stream(rng_of("drills", seed))
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
            yield page if family == "drills" else document(page)


def training_problem(family: str, level: int, rng: random.Random) -> Problem:
    name, _, span = family.partition(":")  # "recall:9-24": so many sentences between key and question
    make = partial(recall.make, filler=tuple(map(int, span.split("-")))) if span else FAMILIES[name].make
    while split_of((problem := make(rng, level)).key) != "train":
        pass
    return problem


def _faulty(page: Problem | str, rng: random.Random) -> str:
    if isinstance(page, Problem):
        return corrupt(page, pick(rng, CORRUPTIONS), rng)
    return re.sub(r"= (\d+)", lambda fact: f"= {int(fact[1]) + between(rng, 1, 9)}", page)     # a drill: all wrong


from data.tasks import code, form, math, recall, taste, tools   # noqa: E402  (they need the names above)

FAMILIES = {"math": math, "code": code, "tools": tools, "form": form, "recall": recall}
PAGES = (*FAMILIES, "drills")  # what documents() can make
