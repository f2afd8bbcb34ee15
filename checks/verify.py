"""How often the verifier errs on real golds: rewritings that are right, and answers that are wrong.

    python -m checks.verify --gsm8k=FOLDER --math500=FILE [--write]     # half a minute on 2 cores

Every gold is compared with itself, rewritten in several ways, and with answers that are wrong:
another problem's, one more, another sign, a changed digit, a hedge, another unit. A kind of
rewriting counts only where it changes the text.
"""
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import torch

import common
from data.sets import public
from data.verify import answers
from experiments import results

WHOLE = re.compile(r"-?[0-9]+")
FRACTION = re.compile(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}")


def decimal(gold: str) -> str:
    """An exact decimal for a fraction, a fraction or a point for a number; else the same text."""
    if match := FRACTION.fullmatch(gold):
        value = Fraction(int(match[2]), int(match[3]))
        exact = f"{float(value):.9f}".rstrip("0")
        return match[1] + exact if Fraction(exact) == value else gold
    return gold + ".0" if WHOLE.fullmatch(gold) else gold


RIGHT = {
    "itself": lambda g: g,
    "in a box": lambda g: f"so it is \\boxed{{{g}}}.",
    "words around it": lambda g: f"The answer is ${g}$.",
    "spaces": lambda g: "  " + re.sub("([=+()])", r" \1 ", g) + " ",
    "\\dfrac, \\left": lambda g: (
        g.replace("\\frac", "\\dfrac").replace("\\left(", "(").replace("\\right)", ")")
    ),
    "decimal": decimal,
    "fraction": lambda g: (
        f"\\frac{{{2 * int(g)}}}{{2}}"
        if WHOLE.fullmatch(g)
        else FRACTION.sub(r"\1\2/\3", g)
        if FRACTION.fullmatch(g)
        else g
    ),
    "unit": lambda g: f"{g} \\text{{ apples}}" if WHOLE.fullmatch(g) else g,
    "thousands": lambda g: f"{int(g):,}" if WHOLE.fullmatch(g) else g,
    "\\text": lambda g: (
        f"\\text{{{g}}}"
        if re.fullmatch("[A-Za-z ]+", g)
        else f"\\mathbf{{{g}}}"
        if g.isdigit()
        else g
    ),
}


def digit_changed(gold: str, rng: random.Random) -> str:
    digits = list(re.finditer("[0-9]", gold))
    if not digits:
        return gold
    at = rng.choice(digits).start()
    return gold[:at] + str((int(gold[at]) + rng.randint(1, 9)) % 10) + gold[at + 1:]


WRONG = {
    "another problem's": lambda g, other, rng: other,
    "one more": lambda g, other, rng: f"{g}+1" if not WHOLE.fullmatch(g) else str(int(g) + 1),
    "another sign": lambda g, other, rng: (
        g[1:] if g.startswith("-") else f"-{g}" if g != "0" else g
    ),
    "a digit changed": lambda g, other, rng: digit_changed(g, rng),
    "hedged": lambda g, other, rng: f"{g} or {other}",
    "two boxes in one": lambda g, other, rng: f"{g}, {other}",
    "question mark": lambda g, other, rng: f"{g}?",
    "per cent": lambda g, other, rng: (
        str(Fraction(int(g), 100)) if WHOLE.fullmatch(g) and g != "0" else g
    ),
}


def judge(gold: str, answer: str) -> float | None:
    return answers.reward(
        gold, answer if "\\boxed" in answer or "answer is" in answer else f"\\boxed{{{answer}}}"
    )


def measure(
    golds: list[str], rng: random.Random, pool: ThreadPoolExecutor
) -> tuple[dict, dict, list]:
    """Errors and trials of each kind, and what went wrong. A wrong answer that happens to be equal
    is no trial: 0.5 for 1/2 as another problem's, or the sign of what has none; Fraction and the
    text decide."""
    trials, errors, told = Counter(), Counter(), []
    rewritings = []
    for gold in golds:
        for kind, rewrite in RIGHT.items():
            text = rewrite(gold)
            if text != gold or kind == "itself":
                rewritings.append((kind, gold, text))
    wrong = []
    for gold in golds:
        other = rng.choice(golds)
        for kind, change in WRONG.items():
            text = change(gold, other, rng)
            if plain(text) != plain(gold) and plain(other) != plain(gold):
                wrong.append((kind, gold, text))
    for kinds, wanted in ((rewritings, 1.0), (wrong, 0.0)):
        verdicts = pool.map(lambda trial: judge(*trial[1:]), kinds)
        for (kind, gold, text), verdict in zip(kinds, verdicts):
            trials[kind] += 1
            if verdict != wanted:
                errors[kind] += 1
                told.append((kind, gold, text, verdict))
    return trials, errors, told


def plain(text: str) -> object:
    match = re.fullmatch(r"(?:x *= *)?\\?\$?(-?[0-9,]+(?:\.[0-9]+)?)(?:\\?%)?", text.strip())
    return Fraction(match[1].replace(",", "")) if match else re.sub(r"\s", "", text)


def main():
    folders = dict(
        a.removeprefix("--").split("=", 1) for a in sys.argv if a.startswith("--") and "=" in a
    )
    if not {"gsm8k", "math500"} <= folders.keys():
        raise common.UserError("give --gsm8k=FOLDER (train.jsonl, test.jsonl) and --math500=FILE")
    started = time.time()
    both = [str(Path(folders["gsm8k"]) / f"{split}.jsonl") for split in ("train", "test")]
    golds = {"GSM8K": [], "MATH-500": []}
    for path in both:
        golds["GSM8K"] += [problem.answer for problem in public.load("gsm8k", path, "")]
    for problem in public.load("math500", folders["math500"], ""):
        golds["MATH-500"].append(problem.answer)
    lines = []
    with ThreadPoolExecutor(2) as pool:
        for name, answers in golds.items():
            trials, errors, told = measure(answers, random.Random(0), pool)
            for kinds, what in (
                (WRONG, "wrong, taken for right"),
                (RIGHT, "right, taken for wrong"),
            ):
                for kind in kinds:
                    print(f"| {name} | {what} | {kind} | {errors[kind]} | {trials[kind]} |")
            for line in told[:40]:
                print("   ", *line, sep="  ")
            lines.append(dict(set=name, golds=len(answers), trials=trials, errors=errors))
    plain_answers = [
        (str(i), f"<think>hm</think> So it is \\boxed{{{i}.0}}.") for i in range(20_000)
    ]
    began = time.time()
    assert all(answers.reward(*pair) == 1.0 for pair in plain_answers)
    per_second = len(plain_answers) / (time.time() - began)
    print(f"{per_second:.0f} plain answers a second, one thread")
    if "--write" in sys.argv:
        meta = dict(
            commit=common.current_commit(),
            command="python -m checks.verify --gsm8k=… --math500=… --write",
            seed=0,
            machine=common.describe_machine(torch.device("cpu")),
            seconds=time.time() - started,
            per_second=per_second,
        )
        results.append("verify", *(meta | line for line in lines))


if __name__ == "__main__":
    common.cli(main)
