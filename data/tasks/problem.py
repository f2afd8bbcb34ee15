"""A generated problem: its fields, its page, its prompt and its chat form; and the draws that problems are made with.

All randomness is drawn from `random.Random(seed).random()`, the one method whose numbers Python promises to keep.
"""
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data.chat.template import after_thoughts


@dataclass(frozen=True)
class Problem:
    family: str
    key: str                    # what makes two problems the same; its hash decides the split
    question: str
    steps: tuple[str, ...]      # the work, a sentence each; empty where there is nothing to work out
    answer: str                 # one line
    level: int                  # 1 easy .. 3 hard
    extra: dict = field(default_factory=dict, hash=False)   # what the reward needs beside the answer; fit for JSON


def assign_split(key: str) -> str:
    """'train' (80 % of all keys), 'dev' or 'test' (10 % each): the same on every machine and in every run."""
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
    return items[between(rng, 0, len(items) - 1)]


def shuffled(rng: random.Random, items: Sequence) -> list:
    return [item for _, item in sorted((rng.random(), item) for item in items)]


def distinct(make: Callable[[random.Random, int], Problem], split: str, n: int, seed: int) -> list[Problem]:
    """n problems of the split with n different keys, levels 1, 2, 3, 1, 2, ...

    An exhausted level gives way to the next, and where no more are found the list is shorter.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'dev' or 'test'")
    rng, found, level, missed = seeded_rng("problems", split, seed), {}, 0, 0
    while len(found) < n and missed < 3:
        level, missed = level % 3 + 1, missed + 1
        for _ in range(1000):
            problem = make(rng, level)
            if assign_split(problem.key) == split and problem.key not in found:
                found[problem.key], missed = problem, 0
                break
    return list(found.values())


# ---- the forms of a problem

def document_prompt(problem: Problem) -> str:
    """The document up to where the model must go on; a set may bring its own."""
    return problem.extra.get("prompt") or f"Problem: {problem.question}\n" + ("Work:" if problem.steps else "Answer:")


def to_document(problem: Problem) -> str:
    """A page for pre-training: 'Problem: ...', 'Work: ...' and 'Answer: ...', a line each."""
    if problem.answer.startswith(document_prompt(problem).strip()):  # HumanEval's solution goes on from its prompt
        return f"{problem.answer}\n"
    work = f" {' '.join(problem.steps)}\nAnswer:" if problem.steps else ""
    return f"{document_prompt(problem)}{work} {problem.answer}\n"


def to_chat(problem: Problem) -> list[dict]:
    """Messages for fine-tuning: the question; the work as reasoning, the answer line (or a set's reply) as content."""
    content = problem.extra.get("reply", "Answer: {}").replace("{}", problem.answer)
    return [{"role": "user", "content": problem.question},
            {"role": "assistant", "reasoning": " ".join(problem.steps), "content": content}]


def as_reply(page: str) -> str:
    """A page from behind 'Work:' on in the form of a chat reply: the work as thoughts, the answer after them."""
    work, _, answer = page.partition("\nAnswer:")
    return f"<think>\n{work.strip()}\n</think>\n\nAnswer: {answer.strip()}"


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
