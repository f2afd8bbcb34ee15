"""The tables of a run, from what its phases wrote.

A table is a list of rows, the first of them its head; a cell is a text, or a pair of a text and a
remark on it.
"""
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np

import common
from common import UserError
from experiments import results
from experiments.all import EXPERIMENTS
from loop import PLAN, task_title, with_error
from report.plots import read_newest_meta

PHASES = ("pretrain", "sft", "distill", "rl")  # what is evaluated, in order
UNITS = {                                      # of the pipeline's steps, in order
    "pretrain": "tokens",
    "refine": "tokens written",
    "sft": "trained tokens",
    "distill": "tokens of answers",
    "reward": "verdicts",
    "rl": "tokens of rollouts",
}
MAX_HISTORIES = 20_000   # read of each set of instructions
MAX_CHARACTERS = 2_000   # shown of a text


# --------------------------------------------------------------------------------------------------
# Reading

def load_json(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def load_lines(path: Path) -> list[dict]:
    """The first lines of a JSONL file; [] where there is none."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in islice(f, MAX_HISTORIES)]


def phase_title(phase: str, stage: str) -> str:
    """What tables call the end of a phase; RL has one for each of its stages."""
    return f"rl: {stage}" if phase == "rl" else phase


def read_scores(out: Path) -> dict[str, dict]:
    """{phase, or stage of RL: {task: score}}, as each was evaluated at its end."""
    scores = {}
    for phase in PHASES:
        for line in common.read_metrics(out / phase):
            if line.get("scores"):
                by_task = {task_title(task): score for task, score in line["scores"].items()}
                scores[phase_title(phase, line["stage"])] = by_task
    return scores


# --------------------------------------------------------------------------------------------------
# Accuracy

def accuracy_rows(scores: dict[str, dict], gains: bool = False) -> list[list]:
    """Accuracy of each task after each phase: what was gained, and what forgotten.

    scores: as read_scores() has them. gains: with the change from the row above as a remark.
    """
    tasks = {}  # in order, each once
    for by_task in scores.values():
        tasks |= dict.fromkeys(by_task)
    rows = [["after", *tasks, "problems"]]
    above = {}
    for phase, by_task in scores.items():
        cells = []
        for task in tasks:
            cell = with_error(by_task[task]) if task in by_task else ""
            if gains:
                cell = cell, describe_change(above.get(task), by_task.get(task))
            cells.append(cell)
        n_problems = next(iter(by_task.values()))["n"]
        rows.append([phase, *cells, str(n_problems)])
        above |= by_task
    return rows


def describe_change(before: dict | None, after: dict | None) -> str:
    """From one score to another, with the standard errors of both added in quadrature."""
    if before is None or after is None:
        return ""
    change = after["avg"] - before["avg"]
    error = math.hypot(after["stderr"], before["stderr"])
    return f"{change:+.3f} ±{error:.3f}"


def stage_rows(folder: Path) -> list[list[str]]:
    """Held-out loss and accuracy at each evaluation of pre-training; [] before the first."""
    evaluations = [line for line in common.read_metrics(folder) if "validation" in line]
    if not evaluations:
        return []
    pools = list(evaluations[-1]["validation"])
    tasks = list(evaluations[-1]["scores"])
    titles = [task_title(task) for task in tasks]
    rows = [["end of", "steps", "minutes", *(f"bpb {pool}" for pool in pools), *titles]]
    for line in evaluations:
        row = [line["stage"], str(line["step"] + 1), f"{line['seconds'] / 60:.1f}"]
        for pool in pools:
            row.append(f"{line['validation'][pool]['bits_per_byte']:.3f}")
        for task in tasks:
            row.append(with_error(line["scores"][task]) if task in line["scores"] else "")
        rows.append(row)
    return rows


def teacher_rows(folder: Path) -> list[list[str]]:
    """Accuracy of the teacher that distill.py asked."""
    rows = [["task", "accuracy"]]
    for task, score in load_json(folder / "teacher.json").items():
        if "avg" in score:
            rows.append([task, with_error(score)])
    return rows


def verdict_rows(folder: Path) -> list[list[str]]:
    """How often the reward model was right on held-out pairs."""
    rows = [["", "share"]]
    for key, value in load_json(folder / "held_out.json").items():
        rows.append([key, f"{value:,}" if key == "pairs" else f"{value:.3f}"])
    return rows


# --------------------------------------------------------------------------------------------------
# Cost

def shorten(n: float) -> str:
    """A count in few characters: 950, 1.29k, 3.20M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def describe_cost(folder: Path, unit: str = "trained tokens") -> str:
    """Steps, tokens and time of a phase's training so far; "" before it begins."""
    steps = [line for line in common.read_metrics(folder) if "loss" in line]
    if not steps:
        return ""
    tokens = sum(line["tokens"] for line in steps)
    minutes = steps[-1]["seconds"] / 60
    return f"{len(steps):,} steps, {shorten(tokens)} {unit}, {minutes:.1f} min"


def describe_progress(folder: Path) -> str:
    """How far an unfinished phase is, how fast, and how long still; "" for any other."""
    steps = [line for line in common.read_metrics(folder) if "loss" in line]
    n_steps = load_json(folder / PLAN).get("steps", 0)
    if not steps or steps[-1]["step"] + 1 >= n_steps:
        return ""
    done = steps[-1]["step"] + 1
    recent = steps[-50:]  # stages differ in speed
    before = recent[0]["seconds"] if len(recent) > 1 else 0.0
    seconds = (recent[-1]["seconds"] - before) / max(1, len(recent) - 1)
    speed = np.mean([line["tokens_per_s"] for line in recent])
    silence = time.time() - (folder / "metrics.jsonl").stat().st_mtime
    left = describe_time((n_steps - done) * seconds)
    return (f"step {done:,} of {n_steps:,} ({done / n_steps:.0%}), {shorten(speed)} tokens/s; "
            f"steps for {left} still; its last line is {describe_time(silence)} old")


def describe_time(seconds: float) -> str:
    """A time in the unit that suits it: 12 s, 3.5 min, 2.1 h, 4.0 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def describe_pipeline(out: Path) -> list[tuple[str, str, str, dict[str, str]]]:
    """(phase, its cost or "" where it has not run, its progress, costs of its helpers), in order.

    Progress is that of a phase that is not done. Helpers are models that were trained for a phase:
    {name: cost}.
    """
    costs = {phase: describe_cost(out / phase, unit) for phase, unit in UNITS.items()}
    usage = load_json(out / "refine/report.json").get("usage")
    if usage:
        tokens = sum(n for key, n in usage.items() if key.endswith(" written"))
        costs["refine"] = f"{shorten(tokens)} {UNITS['refine']}"
    writers, teachers = {}, {}
    for path in sorted(out.glob("*/sft/metrics.jsonl")):
        name = path.parent.parent.name
        helpers = teachers if name == "teacher" else writers
        helpers[name] = describe_cost(path.parent)
    helpers = {"refine": writers, "distill": teachers}
    return [(phase, cost, describe_progress(out / phase), helpers.get(phase, {}))
            for phase, cost in costs.items()]


# --------------------------------------------------------------------------------------------------
# Refinement

def describe_refinement(folder: Path) -> dict:
    """Tables of how drafts were mended, and an example of each set; {} before refine.py has run."""
    report = load_json(folder / "report.json")
    if not report:
        return {}
    names = list(report["sets"])
    counts = defaultdict(Counter)
    examples = []
    for name in names:
        histories = load_lines(folder / "history" / f"{name}.jsonl")
        count_attempts(counts, name, histories)
        records = load_lines(folder / f"{name}.jsonl")
        kept = {record["number"]: record for record in records}
        example = find_example(name, histories, kept)
        if example:
            examples.append(example)
    return dict(
        results=set_rows(report["sets"]),
        usage=usage_rows(report["usage"]),
        trial=trial_rows(report.get("trial") or {}),
        rounds=round_rows(names, counts),
        examples=examples[:3])


def set_rows(sets: dict[str, dict]) -> list[list[str]]:
    """A column for each set of instructions."""
    keys = {}  # in order, each once
    for column in sets.values():
        keys |= dict.fromkeys(column)
    rows = [["", *sets]]
    for key in keys:
        cells = [format_number(column[key]) if key in column else "" for column in sets.values()]
        rows.append([key, *cells])
    return rows


def format_number(value: int | float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def usage_rows(usage: dict[str, int]) -> list[list[str]]:
    """usage: {"WRITER ROLE requests": n, "WRITER ROLE written": tokens}."""
    roles = dict.fromkeys(key.rpartition(" ")[0] for key in usage)
    rows = [["writer and role", "requests", "tokens written"]]
    for role in roles:
        n_requests = usage.get(f"{role} requests", 0)
        n_written = usage.get(f"{role} written", 0)
        rows.append([role, f"{n_requests:,}", f"{n_written:,}"])
    return rows


def trial_rows(shares: dict[str, dict[str, float]]) -> list[list[str]]:
    """A column for each model that was tried, a row for each role; [] without a trial."""
    if not shares:
        return []
    rows = [["role", *next(iter(shares.values()))]]
    for role, by_model in shares.items():
        rows.append([role, *(f"{share:.2f}" for share in by_model.values())])
    return rows


def count_attempts(counts: dict[tuple, Counter], name: str, histories: list[dict]) -> None:
    """Adds up attempts, their scores and passes in counts[round, name of the set]."""
    for case in histories:
        for attempt in case["attempts"]:
            passed = not attempt["failed"]
            counts[attempt["round"], name].update(n=1, score=attempt["score"], passed=passed)


def round_rows(names: list[str], counts: dict[tuple, Counter]) -> list[list]:
    """The share of each round's responses that passed; counts: as count_attempts() makes them."""
    rows = [["round", *names]]
    for turn in sorted({turn for turn, _ in counts}):
        row = [str(turn) if turn else "0 (drafts)"]
        for name in names:
            count = counts.get((turn, name))
            if count:
                share = f"{count['passed'] / count['n']:.2f}"
                score = count["score"] / count["n"]
                row.append((share, f"of {count['n']:,}; mean score {score:.2f}"))
            else:
                row.append("")
        rows.append(row)
    return rows


def best_attempt(case: dict, turn: int) -> dict:
    """The attempt of a round that has the highest score."""
    attempts = [attempt for attempt in case["attempts"] if attempt["round"] == turn]
    return max(attempts, key=lambda attempt: attempt["score"])


def find_example(name: str, histories: list[dict], kept: dict[int, dict]) -> dict:
    """The case of a set that one revision raised most, as it went; {} without any.

    kept: {number: conversation} of the cases whose reconstruction was kept; others are no example.
    """
    def is_revised_once(case: dict) -> bool:
        return case["number"] in kept and case["attempts"][case["best"]]["round"] == 1

    def gain(case: dict) -> float:
        return best_attempt(case, 1)["score"] - best_attempt(case, 0)["score"]

    def describe_writer(attempt: dict) -> str:
        return f"{attempt['writer']}, score {attempt['score']:.2f}"

    cases = [case for case in histories if is_revised_once(case)]
    if not cases:
        return {}
    case = max(cases, key=gain)
    draft, revision = best_attempt(case, 0), best_attempt(case, 1)
    record = kept[case["number"]]
    critiques = []
    for failure in draft["failed"]:
        critiques.append(f"{failure['item']} {failure['critique']} ({failure['by']})")
    chain = record["messages"][-1].get("reasoning", "")
    parts = [("Instruction", "", case["instruction"][-1]["content"]),
             ("Draft", describe_writer(draft), draft["response"]),
             ("Critique", "", "\n".join(critiques)),
             ("Revision", describe_writer(revision), revision["response"]),
             ("Reconstructed chain", record["summary"], chain)]
    shown = []
    for title, note, text in parts:
        shown.append((title, note[:MAX_CHARACTERS], text[:MAX_CHARACTERS]))
    return dict(title=name, parts=shown)


# --------------------------------------------------------------------------------------------------
# RL

def rl_rows(folder: Path) -> list[list[str]]:
    """What each stage of RL was like, in its first tenth and its last; [] before the first step."""
    steps = [line for line in common.read_metrics(folder) if "reward" in line]
    if not steps:
        return []
    keep_between = read_newest_meta(folder).get("rl", {}).get("keep_between", (0, 1))
    rows = [["stage", "steps", "problems kept", "reward", "entropy (nats per token)",
             "tokens per response", "cut off"]]
    for stage in dict.fromkeys(line["stage"] for line in steps):
        stage_steps = [line for line in steps if line["stage"] == stage]
        rows.append([
            stage,
            f"{len(stage_steps):,}",
            count_kept_problems(folder, stage, keep_between),
            first_and_last(stage_steps, "reward", ".3f"),
            first_and_last(stage_steps, "entropy", ".3f"),
            first_and_last(stage_steps, "length", ".1f"),
            first_and_last(stage_steps, "truncated", ".1%")])
    return rows


def count_kept_problems(folder: Path, stage: str, keep_between: tuple[float, float]) -> str:
    """How many of a stage's problems the filter kept: those with a mean reward in between."""
    files = folder.glob(f"filter/{stage.replace(' ', '_')}-*.jsonl")  # a file for each rank
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    name = newest.name.rsplit(".", 2)[0]
    kept = {row["number"]: row["mean"] for row in common.read_kept_lines(newest.parent, name)}
    means = [mean for mean in kept.values() if mean is not None]
    low, high = keep_between
    n_kept = sum(low < mean < high for mean in means)
    return f"{n_kept:,} of {len(means):,}"


def first_and_last(steps: list[dict], key: str, form: str) -> str:
    """Means over the first tenth of the steps and over the last."""
    n = max(1, len(steps) // 10)
    first = mean_of_numbers(line.get(key) for line in steps[:n])
    last = mean_of_numbers(line.get(key) for line in steps[-n:])
    return f"{first:{form}} → {last:{form}}"


def mean_of_numbers(values: Iterable) -> float:
    """The mean without None and nan; nan where nothing is left."""
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan


# --------------------------------------------------------------------------------------------------
# Experiments, and how all was made

def read_experiments() -> list[dict]:
    """The recorded tables of each experiment, as blocks; those that cannot be read say so."""
    experiments = []
    for name, experiment in EXPERIMENTS.items():
        if not results.results_path(name).is_file():
            continue
        try:
            blocks = split_blocks(experiment.tables(results.read(name)))
        except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            blocks = [("text", f"results/{name}.jsonl cannot be shown: {error!r}")]
        experiments.append(dict(name=name, blocks=blocks))
    return experiments


def split_blocks(markdown: str) -> list[tuple]:
    """The parts of what an experiment prints: ("heading" or "text", text), ("table", rows)."""
    blocks = []
    for part in markdown.split("\n\n"):
        if part.startswith("|"):
            blocks.append(("table", parse_table(part)))
        elif part.startswith("### "):
            blocks.append(("heading", part[4:]))
        else:
            blocks.append(("text", part))
    return blocks


def parse_table(markdown: str) -> list[list[str]]:
    """The rows of a table in Markdown, without the line under its head."""
    rows = []
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        is_rule = all(cell and not cell.strip("-:") for cell in cells)
        if not is_rule:
            rows.append(cells)
    return rows


def origin_rows(out: Path) -> list[list[str]]:
    """How each phase says that it was made, oldest first."""
    keys = ["commit", "config", "machine", "command"]
    rows = [["phase", "step", "seed", *keys]]
    paths = sorted(out.rglob("metrics.jsonl"), key=os.path.getmtime)
    for folder in (path.parent for path in paths):
        meta = read_newest_meta(folder)
        if meta:
            seed = meta[meta["phase"]]["seed"]
            cells = [meta.get(key, "") for key in keys]
            rows.append([str(folder.relative_to(out)), str(meta["step"]), str(seed), *cells])
    return rows


def describe_settings(out: Path) -> dict[str, str]:
    """{phase: its settings, one a line}, as its newest checkpoint has them."""
    texts = {}
    for phase in UNITS:
        settings = read_newest_meta(out / phase).get(phase)
        if settings:
            texts[phase] = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    return texts
