"""IFEval as its paper scores it, by prompt and by constraint, strictly and loosely; and what a run
changed in it.

    python -m checks.constraints out/before out/after

Folders of runs in which evaluate.py has left evaluate.json and evaluate.jsonl, of tasks `ifeval`
or `constraints…`, on the same problems. The files of the tasks must still be there. Differences
are paired by prompt; ± is a standard error over prompts (arXiv 2311.07911, section 2.2). The
second table has each type of constraint, strictly: what was learned, and what was not.
"""
import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from common import UserError
from data.sets import ifeval
from data.tasks import registry

FAMILIES = ("ifeval", "constraints")


@dataclass
class Verdict:
    """Of a response: which of its prompt's constraints are kept."""
    names: list[str]
    strict: list[bool]
    loose: list[bool]


def read_verdicts(folder: Path) -> dict[str, dict[tuple, Verdict]]:
    """{task: {(problem, sample): verdict}} of what evaluate.py has left in a folder."""
    try:
        settings = json.loads((folder / "evaluate.json").read_text())["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} has no evaluate.json of evaluate.py: {error}") from None
    problems, verdicts = {}, {}
    for task in settings["tasks"]:
        if task.partition("=")[0].startswith(FAMILIES):
            family = registry.family(task)
            problems[task] = family.problems(
                settings["split"], settings["n_problems"], settings["seed"])
            verdicts[task] = {}
    for line in (folder / "evaluate.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["task"] in problems:
            problem = problems[row["task"]][row["problem"]]
            text = row["response"] or ""
            verdicts[row["task"]][problem.key, row["sample"]] = Verdict(
                problem.extra["instructions"],
                ifeval.followed(problem, text),
                ifeval.followed(problem, text, loose=True))
    return verdicts


def by_prompt(verdict: Verdict, how: str) -> tuple[int, int]:
    """(kept, asked): one for the prompt as a whole."""
    return int(all(getattr(verdict, how))), 1


def by_constraint(verdict: Verdict, how: str) -> tuple[int, int]:
    return sum(getattr(verdict, how)), len(verdict.names)


SCORES = {"by prompt": by_prompt, "by constraint": by_constraint}


def mean_and_error(kept: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """The share that is kept of all that is asked, and its standard error over prompts."""
    mean = kept.sum() / asked.sum()
    spread = (kept - mean * asked).std(ddof=1)
    return float(mean), float(spread * len(kept) ** 0.5 / asked.sum())


def score_rows(runs: list[dict[tuple, Verdict]]) -> list[str]:
    """A line for each score: of each run, and of the last less the first."""
    shared = sorted(set.intersection(*map(set, runs)))
    lines = []
    for title, score in SCORES.items():
        for how in ("strict", "loose"):
            pairs = []
            for run in runs:
                pairs.append([score(run[key], how) for key in shared])
            kept, asked = np.moveaxis(np.array(pairs), 2, 0)  # each (runs, prompts)
            cells = [mean_and_error(of_run, asked[0]) for of_run in kept]
            if len(runs) > 1:
                cells.append(mean_and_error(kept[-1] - kept[0], asked[0]))
            texts = [f"{mean:9.3f} ±{error:.3f}" for mean, error in cells]
            lines.append(f"{title:14}{how:7}" + "".join(texts))
    return lines


def type_rows(runs: list[dict[tuple, Verdict]]) -> list[str]:
    """A line for each type: how often it was asked for, and the share of each run, strictly."""
    kept = defaultdict(lambda: [[] for _ in runs])
    for i, run in enumerate(runs):
        for verdict in run.values():
            for name, is_kept in zip(verdict.names, verdict.strict):
                kept[name][i].append(is_kept)
    lines = []
    for name, of_runs in sorted(kept.items()):
        shares = [float(np.mean(of_run)) if of_run else float("nan") for of_run in of_runs]
        lines.append(f"{name:46}{len(of_runs[0]):5}" + "".join(f"{share:9.3f}" for share in shares))
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="that evaluate.py has scored")
    folders = parser.parse_args().runs
    found = [read_verdicts(folder) for folder in folders]
    tasks = set.intersection(*map(set, found))
    if not tasks:
        raise UserError(f"the runs share no task of {', '.join(FAMILIES)}")
    heads = [folder.name for folder in folders]
    if len(folders) > 1:
        heads.append("difference")
    for task in sorted(tasks):
        runs = [verdicts[task] for verdicts in found]
        print(f"{task}, {len(runs[0])} responses: {', '.join(heads)}")
        print("\n".join(score_rows(runs) + type_rows(runs)), end="\n\n")


if __name__ == "__main__":
    common.cli(main)
