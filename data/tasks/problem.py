"""A generated problem: its fields, its page, its prompt, its chat form; and the draws that make it.

All randomness is drawn from `random.Random(seed).random()`, the one method whose numbers Python
promises to keep.
"""
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data.chat.template import after_thoughts

FAMILIES = ("math", "code", "tools", "form", "recall")  # of generated problems: data.tasks.<name>
GENERATED = (*FAMILIES, "taste", "phrases")  # all that registry.family() finds beside public sets
PAGES = (*FAMILIES, "drills")  # what data.tasks.pages makes pages of


@dataclass(frozen=True)
class Problem:
    family: str
    key: str                    # what makes two problems the same; its hash decides the split
    question: str
    steps: tuple[str, ...]      # the work, a sentence each; empty if there is nothing to work out
    answer: str                 # one line
    level: int                  # 1 easy .. 3 hard
    # what the reward needs beside the answer; fit for JSON
    extra: dict = field(default_factory=dict, hash=False)


class OpenAnswer(NamedTuple):
    """A final answer that no rule can hold against the gold answer: a verifier is for it."""
    gold: str
    answer: str


def assign_split(key: str) -> str:
    """'train' (80 % of all keys), 'dev' or 'test' (10 % each): the same on every machine."""
    bucket = hashlib.sha256(key.encode()).digest()[0] * 10 // 256
    return {0: "test", 1: "dev"}.get(bucket, "train")


# ---- draws

def seeded_rng(*parts: str | int) -> random.Random:
    """A generator of its own for each purpose, so that one stream never shifts another."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def between(rng: random.Random, low: int, high: int) -> int:
    """A whole number, both ends included."""
    return low + int(rng.random() * (high - low + 1))


def pick(rng: random.Random, items: Sequence):
    """One of the items, each as likely as the others."""
    return items[between(rng, 0, len(items) - 1)]


def shuffled(rng: random.Random, items: Sequence) -> list:
    """The items in random order; they must be comparable, for the sake of equal draws."""
    keyed = [(rng.random(), item) for item in items]
    return [item for _, item in sorted(keyed)]


def distinct(make: Callable[[random.Random, int], Problem], split: str, n: int,
             seed: int) -> list[Problem]:
    """n problems of the split with n different keys, levels 1, 2, 3, 1, 2, ...

    A level in which 1,000 draws bring nothing new gives way to the next; where all three do, the
    list is shorter.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'dev' or 'test'")
    rng = seeded_rng("problems", split, seed)
    problems = {}
    level = 0
    exhausted_levels = 0
    while len(problems) < n and exhausted_levels < 3:
        level = level % 3 + 1
        exhausted_levels += 1
        for _ in range(1000):
            problem = make(rng, level)
            if assign_split(problem.key) == split and problem.key not in problems:
                problems[problem.key] = problem
                exhausted_levels = 0
                break
    return list(problems.values())


# ---- the forms of a problem

def document_prompt(problem: Problem) -> str:
    """The document up to where the model must go on; a set may bring its own."""
    if problem.extra.get("prompt"):
        return problem.extra["prompt"]
    next_part = "Work:" if problem.steps else "Answer:"
    return f"Problem: {problem.question}\n{next_part}"


def to_document(problem: Problem) -> str:
    """A page for pre-training: 'Problem: ...', 'Work: ...' and 'Answer: ...', a line each."""
    prompt = document_prompt(problem)
    if problem.answer.startswith(prompt.strip()):   # HumanEval's solution goes on from its prompt
        return f"{problem.answer}\n"
    if problem.steps:
        work = " ".join(problem.steps)
        return f"{prompt} {work}\nAnswer: {problem.answer}\n"
    return f"{prompt} {problem.answer}\n"


def to_chat(problem: Problem) -> list[dict]:
    """Messages for fine-tuning: the question; the work as reasoning, the answer as content.

    The content is the answer line, or what a set has as its form of a reply.
    """
    reply_form = problem.extra.get("reply", "Answer: {}")
    reply = {
        "role": "assistant",
        "reasoning": " ".join(problem.steps),
        "content": reply_form.replace("{}", problem.answer),
    }
    return [{"role": "user", "content": problem.question}, reply]


def as_reply(page: str) -> str:
    """A page from behind 'Work:' on as a chat reply: the work as thoughts, then the answer."""
    work, _, answer = page.partition("\nAnswer:")
    return f"<think>\n{work.strip()}\n</think>\n\nAnswer: {answer.strip()}"


def answer_line(response: str) -> str:
    """What a response offers as its answer: the line after the last 'Answer:', or its last line.

    A base model that runs on into a next problem is judged on its own; thoughts that never end
    hold no answer, and a line of more than 500 characters is none.
    """
    text = (after_thoughts(response) or "").split("\nProblem:")[0]
    _, marker, rest = text.rpartition("Answer:")
    lines = [line for line in rest.splitlines() if line.strip()]
    if not lines:
        return ""
    line = lines[0] if marker else lines[-1]
    line = line.strip()
    return line if len(line) <= 500 else ""


def only_number(text: str) -> str | None:
    """The number of a plain sentence that holds just one, else None.

    '19' of '19', '19 apples.' and 'Mia has 19.'.
    """
    match = re.fullmatch(r"[A-Za-z, ]*(-?[0-9]+)[A-Za-z, ]*[.!]?", text)
    return match and match[1]


def same_number(answer: str, other: str) -> bool:
    """Whether two answers hold the same number, or are the same text."""
    return (only_number(answer) or answer) == (only_number(other) or other)
