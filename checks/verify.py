"""How often the verifier errs on real golds: rewritings that are right, and answers that are wrong.

    python -m checks.verify --gsm8k=FOLDER --math500=FILE [--write]     # four minutes on 2 cores

Every gold is compared with itself, rewritten in several ways, and with answers that are wrong:
another problem's, one more, another sign, a changed digit, a hedge, a word that is no unit. A kind
of rewriting counts only where it changes the text. Every GSM8K gold is also written in the twelve
forms of NATURAL, and so is another problem's. Last, golds of both sets are held against each
other's forms: no answer may please two golds that are not equal.
"""
import argparse
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

import common
from data.sets import public
from data.tasks.problem import Problem
from data.verify import answers
from experiments import results

WHOLE = re.compile(r"-?[0-9]+")
FRACTION = re.compile(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}")
N_CROSSED = 40          # golds of each set that are held against all of each other's forms
N_PLAIN = 20_000        # answers whose speed is measured


# ---- rewritings that are right

def decimal(gold: str) -> str:
    """An exact decimal for a fraction, a fraction or a point for a number; else the same text."""
    if match := FRACTION.fullmatch(gold):
        value = Fraction(int(match[2]), int(match[3]))
        exact = f"{float(value):.9f}".rstrip("0")
        return match[1] + exact if Fraction(exact) == value else gold
    return gold + ".0" if WHOLE.fullmatch(gold) else gold


def without_left(gold: str) -> str:
    return gold.replace("\\frac", "\\dfrac").replace("\\left(", "(").replace("\\right)", ")")


def fraction(gold: str) -> str:
    if WHOLE.fullmatch(gold):
        return f"\\frac{{{2 * int(gold)}}}{{2}}"
    return FRACTION.sub(r"\1\2/\3", gold) if FRACTION.fullmatch(gold) else gold


def as_text(gold: str) -> str:
    if re.fullmatch("[A-Za-z ]+", gold):
        return f"\\text{{{gold}}}"
    return f"\\mathbf{{{gold}}}" if gold.isdigit() else gold


def if_whole(write: Callable[[str], str]) -> Callable[[str], str]:
    """A rewriting of whole numbers alone; of all else the same text."""
    return lambda gold: write(gold) if WHOLE.fullmatch(gold) else gold


RIGHT = {
    "itself": lambda gold: gold,
    "in a box": lambda gold: f"so it is \\boxed{{{gold}}}.",
    "words around it": lambda gold: f"The answer is ${gold}$.",
    "spaces": lambda gold: "  " + re.sub("([=+()])", r" \1 ", gold) + " ",
    "\\dfrac, \\left": without_left,
    "decimal": decimal,
    "fraction": fraction,
    "unit": if_whole(lambda gold: f"{gold} \\text{{ apples}}"),
    "thousands": if_whole(lambda gold: f"{int(gold):,}"),
    "\\text": as_text,
}


# ---- natural forms of a number

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
FULL_WIDTH = str.maketrans("0123456789-.", "０１２３４５６７８９－．")
NO_NOUNS = {"is", "was", "has", "does", "less", "plus", "minus", "as", "his", "its", "this",
            "equals", "across", "towards", "besides"}


def in_words(number: int) -> str:
    """Below a billion: 'two thousand three hundred five'."""
    for scale, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= scale:
            rest = f" {in_words(number % scale)}" if number % scale else ""
            return f"{in_words(number // scale)} {name}{rest}"
    if number < 20:
        return ONES[number]
    rest = f"-{ONES[number % 10]}" if number % 10 else ""
    return TENS[number // 10] + rest


def noun(problem: Problem) -> str:
    """What the gold counts: the word in the plural that follows it in the work, else 'items'."""
    after = re.findall(rf"(?<![0-9.,]){re.escape(problem.answer)} ([a-z]+s)\b",
                       " ".join(problem.steps))
    words = [word for word in after if word not in NO_NOUNS]
    return words[-1] if words else "items"


def with_commas(number: str) -> str:
    return f"{int(number):,}.00" if WHOLE.fullmatch(number) else number


def words_or_digits(number: str) -> str:
    return in_words(int(number)).capitalize() if number.isdigit() else number


NATURAL = {     # of a number and what it counts
    "box": lambda number, things: f"So in total it is \\boxed{{{number}}}.",
    "box with noun": lambda number, things: f"\\boxed{{{number} \\text{{ {things}}}}}",
    "sentence": lambda number, things: f"The answer is {number} {things}, altogether.",
    "bold heading": lambda number, things: f"**Final Answer**\n{number}",
    "heading": lambda number, things: f"### Answer\n\n**{number}**",
    "####": lambda number, things: f"#### {number}",
    "Chinese": lambda number, things: f"答案：{number}。",
    "dollars": lambda number, things: f"The final answer is **${number}**.",
    "text in a box": lambda number, things: f"\\boxed{{\\text{{The answer is {number}}}}}",
    "1,234.00": lambda number, things: f"Answer: \\({with_commas(number)}\\)",
    "words": lambda number, things: f"The answer is: {words_or_digits(number)}!",
    "full width": lambda number, things: f"\\boxed{{{number.translate(FULL_WIDTH)}}}",
}


# ---- answers that are wrong

def digit_changed(gold: str, rng: random.Random) -> str:
    digits = list(re.finditer("[0-9]", gold))
    if not digits:
        return gold
    at = rng.choice(digits).start()
    return gold[:at] + str((int(gold[at]) + rng.randint(1, 9)) % 10) + gold[at + 1:]


def one_more(gold: str) -> str:
    return str(int(gold) + 1) if WHOLE.fullmatch(gold) else f"{gold}+1"


def other_sign(gold: str) -> str:
    if gold == "0":
        return gold
    return gold[1:] if gold.startswith("-") else f"-{gold}"


def no_unit(gold: str, rng: random.Random) -> str:
    """Of '(C)' it would be another wording, and 0 million is 0."""
    return f"{gold} {rng.choice(NO_UNITS)}" if re.search("[1-9]", gold) else gold


def hundredth(gold: str) -> str:
    return str(Fraction(int(gold), 100)) if WHOLE.fullmatch(gold) and gold != "0" else gold


NO_UNITS = ("wrong", "tripled", "halved", "kilo", "dozen", "hundred", "approx", "xyz", "pairs",
            "million", "and a half", "thirds", "...", ",", "%%", "or so", "万", "左右")
WRONG = {
    "another problem's": lambda gold, other, rng: other,
    "one more": lambda gold, other, rng: one_more(gold),
    "another sign": lambda gold, other, rng: other_sign(gold),
    "a digit changed": lambda gold, other, rng: digit_changed(gold, rng),
    "hedged": lambda gold, other, rng: f"{gold} or {other}",
    "two in one box": lambda gold, other, rng: f"{gold}, {other}",
    "two boxes": lambda gold, other, rng: f"\\boxed{{{other}}} or \\boxed{{{gold}}}",
    "a ratio": lambda gold, other, rng: f"{other} to {gold}",
    "question mark": lambda gold, other, rng: f"{gold}?",
    "no unit": lambda gold, other, rng: no_unit(gold, rng),
    "a hundredth": lambda gold, other, rng: hundredth(gold),
}


# ---- trials

class Trial(NamedTuple):
    kind: str
    gold: str
    response: str
    expected: float


def response(text: str) -> str:
    is_whole = "\\boxed" in text or "answer is" in text
    return text if is_whole else f"\\boxed{{{text}}}"


def rewritten(golds: list[str]) -> list[Trial]:
    trials = []
    for gold in golds:
        for kind, rewrite in RIGHT.items():
            text = rewrite(gold)
            if text != gold or kind == "itself":
                trials.append(Trial(kind, gold, response(text), 1.0))
    return trials


def changed(golds: list[str], rng: random.Random) -> list[Trial]:
    """Wrong answers. One that happens to be equal is no trial: 0.5 for 1/2 as another problem's,
    or the sign of what has none; Fraction and the text decide.
    """
    trials = []
    for gold in golds:
        other = rng.choice(golds)
        if plain(other) == plain(gold):
            continue
        for kind, change in WRONG.items():
            text = change(gold, other, rng)
            if plain(text) != plain(gold):
                trials.append(Trial(kind, gold, response(text), 0.0))
    return trials


def natural(problems: list[Problem], rng: random.Random) -> list[Trial]:
    """Each gold in the twelve forms, and another problem's."""
    trials = []
    for problem in problems:
        other = rng.choice(problems)
        for kind, write in NATURAL.items():
            right = write(problem.answer, noun(problem))
            trials.append(Trial(f"natural: {kind}", problem.answer, right, 1.0))
            if plain(other.answer) != plain(problem.answer):
                wrong = write(other.answer, noun(other))
                trials.append(Trial(f"another's, {kind}", problem.answer, wrong, 0.0))
    return trials


def crossed(sets: dict[str, list[Problem]], rng: random.Random) -> list[Trial]:
    """Golds of all sets against the forms of the others."""
    chosen = []
    for problems in sets.values():
        unique = {plain(problem.answer): problem for problem in problems}
        chosen += rng.sample(list(unique.values()), N_CROSSED)
    trials = []
    for problem in chosen:
        answer = problem.answer
        texts = [rewrite(answer) for rewrite in RIGHT.values()]
        texts += [write(answer, noun(problem)) for write in NATURAL.values()]
        for other in chosen:
            if plain(other.answer) != plain(answer):
                for text in texts:
                    trials.append(Trial("crossed", other.answer, written(text), 0.0))
    return trials


def written(text: str) -> str:
    return text if "nswer" in text or "答案" in text or "####" in text else response(text)


def plain(text: str) -> object:
    match = re.fullmatch(r"(?:x *= *)?\\?\$?(-?[0-9,]+(?:\.[0-9]+)?)(?:\\?%)?", text.strip())
    return Fraction(match[1].replace(",", "")) if match else re.sub(r"\s", "", text)


# ---- what comes out

def judge(trial: Trial) -> float | None:
    return answers.reward(trial.gold, trial.response)


def measure(trials: list[Trial], pool: ThreadPoolExecutor) -> tuple[Counter, Counter]:
    """Trials and errors of each kind; prints those that went wrong."""
    counts = Counter(trial.kind for trial in trials)
    errors = Counter()
    for trial, verdict in zip(trials, pool.map(judge, trials)):
        if verdict != trial.expected:
            errors[trial.kind] += 1
            if errors[trial.kind] <= 10:
                print("   ", *map(repr, trial), verdict, sep="  ")
    return counts, errors


def report(name: str, trials: list[Trial], pool: ThreadPoolExecutor, golds: int) -> dict:
    """A table's lines, and the line for the results file."""
    counts, errors = measure(trials, pool)
    right = {trial.kind for trial in trials if trial.expected == 1.0}
    for kind in counts:
        what = "right, taken for wrong" if kind in right else "wrong, taken for right"
        print(f"| {name} | {what} | {kind} | {errors[kind]} | {counts[kind]} |")
    refused, n_right = errors_among(right, errors, counts)
    accepted, n_wrong = errors_among(counts.keys() - right, errors, counts)
    print(f"{name}: {refused} of {n_right} right ones refused, {accepted} of {n_wrong} wrong ones "
          "accepted")
    return dict(set=name, golds=golds, trials=counts, errors=errors, right=n_right, refused=refused,
                wrong=n_wrong, accepted=accepted)


def errors_among(kinds: Iterable[str], errors: Counter, counts: Counter) -> tuple[int, int]:
    n_errors = sum(errors[kind] for kind in kinds)
    return n_errors, sum(counts[kind] for kind in kinds)


def plain_answers_per_second() -> float:
    """By one thread, in a second of processor time."""
    plain_answers = [
        (str(i), f"<think>hm</think> So it is \\boxed{{{i}.0}}.") for i in range(N_PLAIN)
    ]
    began = time.thread_time()
    for pair in plain_answers:
        assert answers.reward(*pair) == 1.0
    return N_PLAIN / (time.thread_time() - began)


def load(gsm8k: str, math500: str) -> dict[str, list[Problem]]:
    sets = {"GSM8K": [], "MATH-500": list(public.load("math500", math500, ""))}
    for split in ("train", "test"):
        path = Path(gsm8k) / f"{split}.jsonl"
        sets["GSM8K"] += public.load("gsm8k", str(path), "")
    return sets


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", metavar="FOLDER", required=True,
                        help="with train.jsonl and test.jsonl")
    parser.add_argument("--math500", metavar="FILE", required=True)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    started = time.time()
    sets = load(args.gsm8k, args.math500)
    rng = random.Random(0)
    lines = []
    with ThreadPoolExecutor(2) as pool:
        for name, problems in sets.items():
            golds = [problem.answer for problem in problems]
            trials = rewritten(golds) + changed(golds, rng)
            lines.append(report(name, trials, pool, len(golds)))
        lines.append(report("GSM8K, natural forms", natural(sets["GSM8K"], rng), pool,
                            len(sets["GSM8K"])))
        lines.append(report("both, crossed", crossed(sets, rng), pool, 2 * N_CROSSED))
    cost = answers.shared().cost
    per_second = plain_answers_per_second()
    print(f"{per_second:.0f} plain answers a second, one thread; {cost}")
    if args.write:
        meta = dict(
            commit=common.current_commit(),
            command="python -m checks.verify --gsm8k=… --math500=… --write",
            seed=0,
            machine=common.describe_machine(torch.device("cpu")),
            seconds=time.time() - started,
            per_second=per_second,
            symbolic=vars(cost),
        )
        results.append("verify", *(meta | line for line in lines))


if __name__ == "__main__":
    common.cli(main)
