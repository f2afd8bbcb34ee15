"""Does it help to order data by quality, when rate, tokens and documents are the same?

    python -m experiments.fg_wsd --seeds 5       # 33 minutes on 2 cores; see experiments/runner.py

Five arms of pre-training, each with pools by the true label and with pools by our filter. All take
the rate that is the best for (b), so that (a) has no advantage by the sweep.
"""
import json
from pathlib import Path

import numpy as np

import common
from experiments import runner
from experiments.labels import DIMENSIONS, labelled_pages
from experiments.runner import Experiment, Run, Train, call
from experiments.stats import best_rates, compare
from report import plots
from report.plots import plt

ARMS = {
    "a": "FG-WSD: high + medium, then high",
    "b": "the same documents, shuffled",
    "c": "WSD: high and medium 1:1 throughout",
    "d": "the same documents, quality changes with the rate",
    "e": "the same documents, high first",
}
TABLES = {"pools by the true label": "true", "pools by the filter": "filter"}  # title -> table
POOL_PREFIX = {"true": "", "filter": "filtered "}                              # of its pools' names
STEPS = dict(warmup=30, diversity=290, quality=166, decay=102)  # as the report's 12.5T : 6.5T : 4T
BATCH = 2048  # tokens of a step
UNIT = 256    # tokens; a stage takes whole units of each pool
RATES = (2e-3, 4e-3, 8e-3)


class PretrainRun(Run):
    phase = "pretrain"

    def settings(self) -> dict[str, object]:
        return {"corpus.folder": f"out/{self.experiment}/data",
                "pretrain.lr": self.lr, "pretrain.seed": self.seed,
                "pretrain.stages": [json.loads(stage) for stage in self.stages]}


# --------------------------------------------------------------------------------------------------
# The arms' stages

def make_stages(arm: str, scale: float = 1.0, prefix: str = "") -> tuple[str, ...]:
    """An arm's table of stages, each as JSON. prefix: of the pools' names.

    All share steps, rate and context; what differs is the units of each pool. (b), (d) and (e)
    take exactly (a)'s tokens of each pool, so its documents, as often.
    """
    units = count_units(scale)
    n_medium = (units["warmup"] + units["diversity"]) // 2  # units of medium quality in (a)
    if arm == "e":
        n_mixed = 2 * n_medium  # units of the 1:1 part, which comes last here
        units = dict(
            warmup=units["warmup"],
            quality=sum(units.values()) - n_mixed - units["warmup"],
            diversity=n_mixed - units["decay"],
            decay=units["decay"])
    medium = split_medium(arm, units, n_medium)
    table = []
    for (name, n), m in zip(units.items(), medium):
        tokens = {f"{prefix}high": int(n - m) * UNIT, f"{prefix}medium": int(m) * UNIT}
        mixture = {pool: n_tokens for pool, n_tokens in tokens.items() if n_tokens}
        stage = dict(name=name, tokens=n * UNIT, lr=[1, 1], context=128, mixture=mixture)
        if name == "warmup":
            stage["lr"] = [0, 1]
        if name == "decay":
            stage |= dict(lr=[1, 1 / 300], curve="1-sqrt", context=256, rope_theta=40_000.0)
        table.append(json.dumps(stage))
    return tuple(table)


def count_units(scale: float) -> dict[str, int]:
    """Units of UNIT tokens in each stage."""
    units = {}
    for name, steps in STEPS.items():
        units[name] = max(1, round(steps * scale)) * BATCH // UNIT
    return units


def split_medium(arm: str, units: dict[str, int], n_medium: int) -> np.ndarray:
    """Units of medium quality in each stage, (stages,) int; they sum to n_medium, but for (c)."""
    ends = np.cumsum(list(units.values()))
    if arm == "a":
        taken = [units["warmup"] / 2, n_medium, n_medium, n_medium]  # up to the end of each stage
    elif arm == "b":
        taken = n_medium * ends / ends[-1]
    elif arm == "c":
        taken = ends / 2
    elif arm == "d":
        taken = n_medium * np.minimum(ends / ends[-2], 1)
    else:
        taken = [0, 0, units["diversity"] / 2, n_medium]
    return np.diff(np.round(taken).astype(int), prepend=0)


# --------------------------------------------------------------------------------------------------
# The runs

def prepare() -> None:
    """Makes the labelled pages, the filter, and the four pools, once."""
    labels = Path("out/fg_wsd/labels.jsonl")
    if not labels.is_file():
        labels.parent.mkdir(parents=True, exist_ok=True)
        texts, grades, _ = labelled_pages(4000, seed=7, families=("code",))
        lines = []
        for text, grade in zip(texts, grades.tolist()):
            lines.append(json.dumps({"text": text, "tags": dict(zip(DIMENSIONS, grade))}) + "\n")
        common.write_atomic(labels, "".join(lines))
    for script in ("data/filter/quality.py", "data/text/corpus.py"):
        call([script, "configs/fg_wsd.py"], Path("out/fg_wsd/data.log"))
    clean = read_filter_counts(shard=0)
    corrupted = read_filter_counts(shard=1)
    high, medium = clean["high"]["documents"], clean["medium"]["documents"]
    wrong = corrupted["high"]["documents"]
    print(f"the filter's high pool is to {high / (high + wrong):.0%} clean, and has "
          f"{high / (high + medium):.0%} of the clean pages that are no duplicates")


def read_filter_counts(shard: int) -> dict[str, dict]:
    """What the filter made of a shard of pages, by quality; shard 0 is clean, 1 is corrupted."""
    path = Path(f"out/fg_wsd/quality/classified/{shard:05d}.json")
    return json.loads(path.read_text())["table"]


def run_arms(seeds: int, scale: float, train: Train) -> list[dict]:
    """Runs the experiment; returns all results."""
    prepare()
    sweep_stages = make_stages("b", scale)
    sweep = train([PretrainRun("fg_wsd", "sweep", "b", 100, lr, "dev", sweep_stages)
                   for lr in RATES])
    lr = best_rates(sweep)["b"]
    runs = []
    for table, prefix in POOL_PREFIX.items():
        for seed in range(seeds):
            for arm in "abdec":  # (c) begins as (a): by its turn that part is there
                stages = make_stages(arm, scale, prefix)
                runs.append(PretrainRun("fg_wsd", table, arm, seed, lr, "test", stages))
    results = train(runs)
    print("picture:", plot_arms(Path("out/fg_wsd/fg_wsd.png"), results))
    return sweep + results


# --------------------------------------------------------------------------------------------------
# Tables and picture

def make_tables(results: list[dict]) -> str:
    """Markdown of all results."""
    sweep = [r for r in results if r["table"] == "sweep"]
    tried = ", ".join(f"{r['lr']:g}: {r['avg']:.3f}" for r in sweep)
    best = best_rates(sweep)["b"]
    text = f"rate of (b) on the dev split, seed 100: {tried}; all arms take {best:g}"
    pairs = [("a", other) for other in "bcde"]
    for title, table in TABLES.items():
        rows = [r for r in results if r["table"] == table]
        text += f"\n\n### {title}\n\n{compare(rows, ARMS, pairs)}"
    return text


def plot_arms(path: Path, results: list[dict]) -> Path:
    """What each arm reads over its tokens, and its accuracy: a dot a seed, a bar the mean."""
    figure, axes = plt.subplots(len(ARMS), 1 + len(TABLES), figsize=(10, 6), sharex="col",
                                constrained_layout=True, width_ratios=[1.4] + [1] * len(TABLES))
    limit = 1.1 * max(r["avg"] for r in results)
    for (arm, text), (data, *scores) in zip(ARMS.items(), axes):
        plot_stages(data, arm)
        data.set_title(f"({arm}) {text}", fontsize=9, loc="left")
        for axis, table in zip(scores, TABLES.values()):
            rows = [r for r in results if r["table"] == table and r["arm"] == arm]
            accuracies = [r["avg"] for r in rows]
            axis.barh(0, np.mean(accuracies), color=plots.COLORS[0], alpha=0.5, height=0.6)
            axis.plot(accuracies, np.zeros(len(accuracies)), "k.")
            axis.set(xlim=(0, limit or 1), ylim=(-0.6, 0.6), yticks=[])
    labels = ["million tokens (blue: high quality; line: rate)"]
    labels += [f"accuracy, {title}" for title in TABLES]
    for axis, label in zip(axes[-1], labels):
        axis.set_xlabel(label, fontsize=9)
    return plots.save_figure(figure, path)


def plot_stages(axis, arm: str) -> None:
    """The share of high quality in each stage of an arm, and the rate, over its tokens."""
    table = [json.loads(stage) for stage in make_stages(arm)]
    ends = np.cumsum([0] + [stage["tokens"] for stage in table]) / 1e6
    high = [stage["mixture"].get("high", 0) / stage["tokens"] for stage in table]
    axis.stairs(np.ones(len(high)), ends, fill=True, color="0.85")
    axis.stairs(high, ends, fill=True, color=plots.COLORS[0])
    x = np.linspace(0, 1, 50)[1:]
    tokens = np.concatenate([[0, ends[1]], [ends[3]], ends[3] + x * (ends[4] - ends[3])])
    rate = np.concatenate([[0, 1], [1], 1 - np.sqrt(x)])
    axis.plot(tokens, rate, color="black", lw=1)
    axis.set(ylim=(0, 1.05), xlim=(0, ends[-1]), yticks=[])


EXPERIMENT = Experiment("fg_wsd", "configs/fg_wsd.py", run_arms, make_tables)


def main():
    runner.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    common.cli(main)
