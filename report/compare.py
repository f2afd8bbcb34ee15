"""Runs side by side: `python -m report --compare out/a out/b …` writes out/compare-a-b.html.

Their curves laid over each other, the settings that differ, and the scores at the end of each phase
with what sets each run apart from the first: on the same problems, where both kept the reward of
each of them (problems.jsonl of a phase; runs from before that file are compared without).
"""
import io
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import common
from common import UserError
from evaluate import rewards_by_problem
from loop import PAIRED_REWARDS, align, task_title, with_error
from report.page import as_address, render
from report.plots import color_at, read_newest_meta, set_log_scale, simplify
from report.tables import (
    PHASES,
    UNITS,
    describe_cost,
    describe_progress,
    load_json,
    phase_title,
)

CURVES = {  # of metrics.jsonl, in the pictures of each phase; held-out loss and accuracy come after
    "pretrain": ("loss", "lr", "grad_norm"),
    "sft": ("loss", "lr", "grad_norm"),
    "distill": ("dpo", "kl_chosen", "kl_rejected", "margin", "student_chosen", "student_rejected"),
    "reward": ("loss", "lr"),
    "rl": ("reward", "win_rate", "entropy", "length", "truncated", "groups_with_signal"),
}
MAX_WIDTH = 60      # characters of a setting that are shown
MIN_PROBLEMS = 30   # with fewer a standard error says little

Runs = dict[str, Path]  # {name: folder}


def compare(arguments: list[str]) -> None:
    """Prints the scores and the settings that differ, and writes the page."""
    runs = find_runs(arguments)
    scores = score_tables(runs)
    settings = setting_rows(runs)
    for title, rows in scores.items():
        print(f"{title}\n{align([as_texts(row) for row in rows])}\n")
    print(align(settings))
    pictures = {}
    for phase in CURVES:
        picture = plot_curves(phase, runs)
        if picture:
            pictures[phase] = as_address(picture)
    first = next(iter(runs.values()))
    path = first.parent / f"compare-{'-'.join(runs)}"[:100]
    path = path.with_name(path.name + ".html")
    render("compare.html", path, runs=list(runs), scores=scores, settings=settings,
           pictures=pictures, costs=cost_rows(runs))
    print(f"\npage: {path}")


def find_runs(arguments: list[str]) -> Runs:
    """The folders by their names; where two are called alike, by their paths."""
    folders = [Path(argument) for argument in arguments]
    if len(folders) < 2:
        raise UserError("--compare takes the folders of two runs or more: out/a out/b")
    traces = [*(f"{phase}/metrics.jsonl" for phase in UNITS), "evaluate.json"]
    for folder in folders:
        if not any((folder / trace).is_file() for trace in traces):
            raise UserError(f"{folder} is no run: it has no {{{','.join(UNITS)}}}/metrics.jsonl, "
                            "nor evaluate.json")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder).replace("/", "_") for folder in folders]
    return dict(zip(names, folders))


def as_texts(row: list[str | tuple[str, str]]) -> list[str]:
    """The cells, each with its remark."""
    return [cell if isinstance(cell, str) else "  ".join(cell) for cell in row]


# --------------------------------------------------------------------------------------------------
# Scores

def read_ends(out: Path) -> dict[str, tuple[dict, dict]]:
    """{end of a phase, or stage of RL: (score of each task, {task: rewards by problem})}."""
    ends = {}
    for phase in PHASES:
        kept = common.read_metrics(out / phase, PAIRED_REWARDS)
        rewards = {line["step"]: line["rewards"] for line in kept}
        for line in common.read_metrics(out / phase):
            if line.get("scores"):
                title = f"after {phase_title(phase, line['stage'])}"
                ends[title] = line["scores"], rewards.get(line["step"], {})
    evaluated = load_json(out / "evaluate.json")
    if evaluated:
        by_task = {task: {"rows": []} for task in evaluated["scores"]}
        for row in common.read_metrics(out, "evaluate.jsonl"):
            by_task.setdefault(row["task"], {"rows": []})["rows"].append(row)
        ends["by evaluate.py"] = evaluated["scores"], rewards_by_problem(by_task)
    return ends


def score_tables(runs: Runs) -> dict[str, list[list]]:
    """{end of a phase: table}, a row a task: the scores, and each run less the first."""
    ends = {name: read_ends(folder) for name, folder in runs.items()}
    tables = {}
    for title in dict.fromkeys(title for by_title in ends.values() for title in by_title):
        found = {name: ends[name][title] for name in runs if title in ends[name]}
        first, *others = found
        rows = [["task", *found, *(f"{name} - {first}" for name in others)]]
        for task in dict.fromkeys(task for scores, _ in found.values() for task in scores):
            scores = {name: by_task.get(task) for name, (by_task, _) in found.items()}
            rewards = {name: by_task.get(task, {}) for name, (_, by_task) in found.items()}
            cells = [with_error(score) if score else "" for score in scores.values()]
            for name in others:
                cells.append(describe_difference(
                    scores[name], scores[first], rewards[name], rewards[first]))
            rows.append([task_title(task), *cells])
        tables[title] = rows
    return tables


def describe_difference(one: dict | None, other: dict | None, rewards: dict[str, float],
                        other_rewards: dict[str, float]) -> str | tuple[str, str]:
    """A score less another one, ± its standard error over problems, and what that says.

    Paired by problem where both runs had the same ones. One run each says nothing of seeds.
    """
    if not one or not other:
        return ""
    shared = sorted(rewards.keys() & other_rewards.keys())
    if len(shared) > 1:
        differences = np.array([rewards[key] - other_rewards[key] for key in shared])
        change = float(differences.mean())
        error = float(differences.std(ddof=1)) / len(shared) ** 0.5
        n_problems = len(shared)
        how = f"paired, {n_problems} problems"
    else:
        change = one["avg"] - other["avg"]
        error = math.hypot(one["stderr"], other["stderr"])
        n_problems = min(one["n"], other["n"])
        how = f"not paired, {one['n']} and {other['n']} problems"
    verdict = "not shown"
    if abs(change) > 1.96 * error and n_problems >= MIN_PROBLEMS:
        verdict = "better" if change > 0 else "worse"
    return f"{change:+.3f} ±{error:.3f}", f"{verdict}; {how}"


# --------------------------------------------------------------------------------------------------
# Settings and cost

def setting_rows(runs: Runs) -> list[list[str]]:
    """The settings in which the newest checkpoints of a phase differ, a row each."""
    rows = [["setting", *runs]]
    for phase in UNITS:
        metas = {name: read_newest_meta(folder / phase) for name, folder in runs.items()}
        settings = {name: flatten(meta, phase) for name, meta in metas.items() if meta}
        keys = dict.fromkeys(key for values in settings.values() for key in values)
        for key in keys:
            values = [settings[name].get(key, "–") for name in settings]
            if len(set(values)) > 1:
                by_run = {name: settings.get(name, {}).get(key, "–") for name in runs}
                rows.append([key, *(shorten(value) for value in by_run.values())])
    return rows


def flatten(meta: dict, phase: str) -> dict[str, str]:
    """{"sft.stages.decay.lr": "[1, 0.1]", …}: what a checkpoint says of how it was made."""
    values = {}

    def add(name: str, value) -> None:
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            for i, item in enumerate(value):
                add(f"{name}.{item.get('name', i)}", item)
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}.{key}", item)
        else:
            values[name] = value if isinstance(value, str) else json.dumps(value)

    add(phase, meta.get(phase, {}))
    for key in ("model", "tokenizer", "world", "machine", "commit"):
        add(f"{phase}: {key}", meta.get(key, ""))
    return values


def shorten(text: str) -> str:
    return text if len(text) <= MAX_WIDTH else text[:MAX_WIDTH] + "…"


def cost_rows(runs: Runs) -> list[list]:
    """Steps, tokens and minutes of each phase, and how far it is where it is not done."""
    rows = [["phase", *runs]]
    for phase, unit in UNITS.items():
        costs = [describe_cost(folder / phase, unit) for folder in runs.values()]
        if any(costs):
            progress = [describe_progress(folder / phase) for folder in runs.values()]
            rows.append([phase, *zip(costs, progress)])
    return rows


# --------------------------------------------------------------------------------------------------
# Curves

def read_curves(folder: Path) -> dict[str, tuple[list, list, list]]:
    """{what: (steps, values, standard errors or [])} of a phase."""
    curves = {}

    def add(name: str, step: int, value: float | None, error: float | None = None) -> None:
        if value is None:
            return
        x, y, errors = curves.setdefault(name, ([], [], []))
        x.append(step)
        y.append(value)
        if error is not None:
            errors.append(error)

    for line in common.read_metrics(folder):
        for key in CURVES[folder.name]:
            add(key, line["step"], line.get(key))
        for pool, loss in line.get("validation", {}).items():
            add(f"held-out loss, {pool}", line["step"], loss["loss"])
        for task, score in line.get("scores", {}).items():
            add(f"accuracy, {task_title(task)}", line["step"], score["avg"], score["stderr"])
    return curves


def plot_curves(phase: str, runs: Runs) -> bytes:
    """A PNG: a panel for each curve of a phase, all runs in it; b"" where fewer than two ran."""
    curves = {}
    for name, folder in runs.items():
        if describe_cost(folder / phase):
            curves[name] = read_curves(folder / phase)
    if len(curves) < 2:
        return b""
    panels = list(dict.fromkeys(panel for found in curves.values() for panel in found))
    n_rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(n_rows, 2, figsize=(9, 0.4 + 1.9 * n_rows), squeeze=False,
                                constrained_layout=True)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for panel, axis in zip(panels, axes.flat):
        simplify(axis)
        axis.set_title(panel, fontsize=9)
        if "loss" in panel:
            set_log_scale(axis)
        for i, name in enumerate(runs):
            if panel in curves.get(name, {}):
                width = 1 + 0.8 * (len(runs) - 1 - i)  # the first ones show under equal ones
                draw_curve(axis, *curves[name][panel], color_at(i), width)
    handles = [plt.Line2D([], [], color=color_at(i), label=name) for i, name in enumerate(runs)]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    return picture.getvalue()


def draw_curve(axis, x: list, y: list, errors: list, color: str, width: float) -> None:
    """Points with their errors; or each step faintly, and on it the mean over a fiftieth of all."""
    if errors or len(x) < 50:
        axis.errorbar(x, y, errors or None, fmt="o-", ms=3, lw=width, capsize=3, color=color)
        return
    axis.plot(x, y, color=color, lw=0.6, alpha=0.25)
    n = len(x) // 50
    smooth = np.convolve(np.array(y, dtype=float), np.ones(n) / n, mode="valid")
    axis.plot(x[n // 2:n // 2 + len(smooth)], smooth, color=color, lw=width)
