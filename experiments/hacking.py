"""What becomes of a policy whose judge has a weakness: `python -m experiments.hacking`, after speedrun.sh; 14 minutes.

The last stage of rl.py, from the DPD checkpoint, longer and at a higher rate, with five judges: the pairwise reward
model and a Bradley-Terry model (from the same checkpoint and pairs), each trained on labels that follow the hidden
rubric, and on labels of which 15 % favour the longer reply where the rubric likes the shorter one; and the rubric
itself, which no real run has: the upper bound. What the judge says (the win rate against the reference) is beside what
the rubric says, of rollouts and held out, over the steps.
"""
import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean

from experiments import runner
import common
from report import plots
from experiments import results
from common import UserError

STEPS, EVERY = 50, 10
JUDGES = {  # name -> reward.kind, share of labels that favour length; none: the rubric is the reward
    "pairwise, clean labels": ("pairwise", 0.0),
    "pairwise, labels that favour length": ("pairwise", 0.15),
    "Bradley-Terry, clean labels": ("bradley_terry", 0.0),
    "Bradley-Terry, labels that favour length": ("bradley_terry", 0.15),
    "the rubric itself": None,
}


def folder_of(judge: str) -> str:
    return "hacking/" + judge.replace(", ", "-").replace(" ", "_")


def run(script: str, name: str, settings: dict) -> None:
    runner.call([f"{script}.py", "configs/tiny.py", f"--run={name}", "--init_from=out/tiny/distill"],
                Path("out") / name / "log.txt", settings)


def train_judge(judge: str) -> None:
    if JUDGES[judge]:
        kind, noise = JUDGES[judge]
        run("reward", folder_of(judge), {"reward.kind": kind,
                                         "reward.preferences": [dict(taste=3000, noise=noise, seed=6)]})


def train_policy(judge: str, seed: int) -> list[dict]:
    """Trains a policy; what judge and rubric say of it, after each tenth step: lines of results/hacking.jsonl."""
    stage = dict(name="preference", problems=dict(taste=600), steps=STEPS, temperature=1.0, lr=[2, 2],
                 reward="pairwise" if JUDGES[judge] else "verified")
    name, judge_folder = f"{folder_of(judge)}/{seed}", Path("out") / folder_of(judge) / "reward"
    folder = Path("out") / name / "rl"
    run("rl", name, {"rl.stages": [stage], "rl.seed": seed, "rl.eval_every": EVERY, "evaluate.tasks": ["taste"],
                     "rl.judge": str(judge_folder)})
    lines = common.read_metrics(folder)
    held_out = {line["step"] + 1: line["scores"]["taste"]["avg"] for line in lines if line.get("scores")}
    rows = [dict(judge=judge, step=0, held_out=json.loads((folder / "before.json").read_text())["taste"]["avg"])]
    if JUDGES[judge]:
        rows[0]["accuracy"] = json.loads((judge_folder / "held_out.json").read_text())["accuracy"]
    steps = [line for line in lines if "reward" in line]
    for at in range(EVERY, STEPS + 1, EVERY):
        shown = [key for key in ("win_rate", "rubric", "reward", "length") if key in steps[0]]
        rows.append(dict(judge=judge, step=at, held_out=held_out[at])
                    | {key: mean(line[key] for line in steps[at - EVERY:at]) for key in shown})
    meta = common.read_meta(common.list_checkpoints(folder)[0])
    for row in rows:
        results.record("hacking", meta, **row)
    return rows


def draw(rows: list[dict], path: Path) -> Path:
    """What judge and rubric say over the steps: a line a judge, the mean over seeds; dots: each seed."""
    figure, axes = plots.new_figure(2)
    for judge, color in zip(JUDGES, (plots.COLORS[i] for i in (0, 0, 1, 1, 2))):
        for axis, key in zip(axes, ("win_rate", "held_out")):
            mine = [row for row in rows if row["judge"] == judge and key in row]
            at = sorted({row["step"] for row in mine})
            axis.plot(at, [mean(row[key] for row in mine if row["step"] == step) for step in at], color=color, lw=1.4,
                      ls="--" if "favour" in judge else "-", label=judge)
            axis.plot([row["step"] for row in mine], [row[key] for row in mine], ".", color=color, ms=3)
    axes[0].set(ylabel="what the judge says\n(win rate)")
    axes[1].set(ylabel="what the rubric says\n(held out)", xlabel="step")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return plots.save_figure(figure, path)


def table(rows: list[dict]) -> str:
    """Markdown: means over seeds at each tenth step; the end of each seed."""
    steps = range(EVERY, STEPS + 1, EVERY)
    lines = [f"| judge | its accuracy | win rate, steps {' '.join(map(str, steps))} | rubric held out, steps 0 "
             f"{' '.join(map(str, steps))} | its end, each seed | tokens, first and last |", "|---" * 6 + "|"]
    for judge in JUDGES:
        mine = [row for row in rows if row["judge"] == judge]
        at = lambda step, key: mean(row[key] for row in mine if row["step"] == step)
        cells = [f"{at(0, 'accuracy'):.3f}" if JUDGES[judge] else "",
                 " ".join(f"{at(step, 'win_rate'):.3f}" for step in steps) if JUDGES[judge] else "",
                 " ".join(f"{at(step, 'held_out'):.3f}" for step in (0, *steps)),
                 " ".join(f"{row['held_out']:.3f}" for row in mine if row["step"] == STEPS),
                 f"{at(EVERY, 'length'):.1f} {at(STEPS, 'length'):.1f}"]
        lines.append(f"| {judge} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="policies of each judge: seeds 0, 1, … (default 3)")
    parser.add_argument("--show", action="store_true", help="print the table of the recorded results, and stop")
    args = parser.parse_args()
    if args.show:
        return print(table([json.loads(line) for line in Path("results/hacking.jsonl").read_text().splitlines()]))
    if not Path("out/tiny/distill").is_dir():
        raise UserError("there is no out/tiny/distill: run `bash speedrun.sh` first")
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train_judge, JUDGES))
        found = pool.map(lambda pair: train_policy(*pair), product(JUDGES, range(args.seeds)))
        rows = [row for each in found for row in each]
    print(table(rows))
    print("picture:", draw(rows, Path("out/hacking/hacking.png")))


if __name__ == "__main__":
    common.cli(main)
