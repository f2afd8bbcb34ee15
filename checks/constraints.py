"""IFEval as its paper scores it, by prompt and by constraint, strictly and loosely; and what a run
changed in it.

    python -m checks.constraints out/before out/after [--write]

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
import torch

import common
from checks.bench import describe_origin
from common import UserError
from data.sets import ifeval
from data.tasks import registry
from experiments import results

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


def score_runs(runs: list[dict[tuple, Verdict]]) -> dict[str, list[tuple[float, float]]]:
    """(mean, standard error) of each run by each score; behind them of the last less the first.

    runs: of the same responses.
    """
    found = {}
    for title, score in SCORES.items():
        for how in ("strict", "loose"):
            pairs = []
            for run in runs:
                pairs.append([score(run[key], how) for key in sorted(runs[0])])
            kept, asked = np.moveaxis(np.array(pairs), 2, 0)  # each (runs, prompts)
            cells = [mean_and_error(of_run, asked[0]) for of_run in kept]
            if len(runs) > 1:
                cells.append(mean_and_error(kept[-1] - kept[0], asked[0]))
            found[f"{title}, {how}"] = cells
    return found


def score_types(runs: list[dict[tuple, Verdict]]) -> dict[str, tuple[int, list[float]]]:
    """Of each type: how often it was asked for, and the share that each run kept, strictly."""
    kept = defaultdict(lambda: [[] for _ in runs])
    for i, run in enumerate(runs):
        for verdict in run.values():
            for name, is_kept in zip(verdict.names, verdict.strict):
                kept[name][i].append(is_kept)
    found = {}
    for name, of_runs in sorted(kept.items()):
        shares = [float(np.mean(of_run)) if of_run else float("nan") for of_run in of_runs]
        found[name] = len(of_runs[0]), shares
    return found


def print_task(scores: dict, types: dict) -> None:
    for title, cells in scores.items():
        print(f"{title:21}" + "".join(f"{mean:9.3f} ±{error:.3f}" for mean, error in cells))
    for name, (n_asked, shares) in types.items():
        print(f"{name:46}{n_asked:5}" + "".join(f"{share:9.3f}" for share in shares))
    print()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="that evaluate.py has scored")
    parser.add_argument("--write", action="store_true", help="append to results/constraints.jsonl")
    args = parser.parse_args()
    found = [read_verdicts(folder) for folder in args.runs]
    tasks = set.intersection(*map(set, found))
    if not tasks:
        raise UserError(f"the runs share no task of {', '.join(FAMILIES)}")
    heads = [folder.name for folder in args.runs]
    if len(heads) > 1:
        heads.append("difference")
    record = {}
    for task in sorted(tasks):
        shared = set.intersection(*(set(verdicts[task]) for verdicts in found))
        runs = []
        for verdicts in found:
            runs.append({key: verdicts[task][key] for key in shared})
        scores, types = score_runs(runs), score_types(runs)
        print(f"{task}, {len(runs[0])} responses: {', '.join(heads)}")
        print_task(scores, types)
        record[task] = dict(responses=len(runs[0]), scores=scores, types=types)
    if args.write:
        evaluated = [json.loads((folder / "evaluate.json").read_text()) for folder in args.runs]
        origin = describe_origin("checks.constraints", 0, torch.device("cpu"))
        settings = [run["settings"] for run in evaluated]
        results.append("constraints", origin | dict(
            config=common.hash_json(settings), runs=heads, settings=settings, tasks=record))


if __name__ == "__main__":
    common.cli(main)
