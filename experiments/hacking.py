"""What becomes of a policy whose judge has a weakness?

    python -m experiments.hacking                # after speedrun.sh; 14 minutes on 2 cores

The last stage of rl.py, from the DPD checkpoint, at a rate that does not fall and without a KL
term, with five judges: the pairwise reward model and a Bradley-Terry model (from the same
checkpoint and pairs), each trained on labels that follow the hidden rubric, and on labels of which
15 % favour the longer reply where the rubric likes the shorter one; and the rubric itself, which no
real run has: the upper bound. What the judge says (the win rate against the reference) is beside
what the rubric says, of rollouts and held out, over the steps.
"""
import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import common
from common import UserError
from experiments import results, runner
from report import plots

N_STEPS = 50
EVERY = 10  # steps from one evaluation to the next
MEASURED = range(EVERY, N_STEPS + 1, EVERY)
SOURCE = Path("out/tiny/distill")
JUDGES = {  # name -> reward.kind, share of labels that favour length; None: reward by the rubric
    "pairwise, clean labels": ("pairwise", 0.0),
    "pairwise, labels that favour length": ("pairwise", 0.15),
    "Bradley-Terry, clean labels": ("bradley_terry", 0.0),
    "Bradley-Terry, labels that favour length": ("bradley_terry", 0.15),
    "the rubric itself": None,
}
COLOR = {"pairwise": plots.COLORS[0], "bradley_terry": plots.COLORS[1], "rubric": plots.COLORS[2]}


# --------------------------------------------------------------------------------------------------
# Training

def run_name(judge: str) -> str:
    """The run of a judge; those of its policies have the seed behind a slash."""
    return "hacking/" + judge.replace(", ", "-").replace(" ", "_")


def call_phase(phase: str, run: str, settings: dict) -> None:
    runner.call([f"{phase}.py", "configs/tiny.py", f"--run={run}", f"--init_from={SOURCE}"],
                Path("out") / run / "log.txt", settings)


def train_judge(judge: str) -> None:
    if JUDGES[judge] is None:
        return
    kind, noise = JUDGES[judge]
    preferences = [dict(taste=3000, noise=noise, seed=6)]
    call_phase("reward", run_name(judge),
               {"reward.kind": kind, "reward.preferences": preferences})


def train_policy(judge: str, seed: int) -> list[dict]:
    """Trains a policy; returns the rows of measure_policy, with how it was made."""
    reward = "pairwise" if JUDGES[judge] else "verified"
    stage = dict(name="preference", problems=dict(taste=600), steps=N_STEPS, temperature=1.0,
                 reward=reward)
    judge_folder = Path("out") / run_name(judge) / "reward"
    run = f"{run_name(judge)}/{seed}"
    call_phase("rl", run, {
        "rl.stages": [stage], "rl.seed": seed, "rl.eval_every": EVERY,
        "evaluate.tasks": ["taste"], "rl.eval_tasks": [], "rl.reward_model": str(judge_folder)})
    folder = Path("out") / run / "rl"
    rows = measure_policy(judge, folder)
    if JUDGES[judge]:
        held_out = json.loads((judge_folder / "held_out.json").read_text())
        rows[0]["accuracy"] = held_out["accuracy"]
    made = results.describe_run(common.read_meta(common.list_checkpoints(folder)[0]))
    return [made | row for row in rows]


def measure_policy(judge: str, folder: Path) -> list[dict]:
    """What judge and rubric say of a policy: a row before the first step, and one each EVERY steps.

    held_out: the rubric, on held-out problems after the step; the others: means over the EVERY
    steps before.
    """
    before = json.loads((folder / "before.json").read_text())
    rows = [dict(judge=judge, step=0, held_out=before["taste"]["avg"])]
    metrics = common.read_metrics(folder)
    held_out = {}
    for line in metrics:
        if line.get("scores"):
            held_out[line["step"] + 1] = line["scores"]["taste"]["avg"]
    steps = [line for line in metrics if "reward" in line]
    keys = [key for key in ("win_rate", "rubric", "reward", "length") if key in steps[0]]
    for step in MEASURED:
        row = dict(judge=judge, step=step, held_out=held_out[step])
        for key in keys:
            row[key] = mean(line[key] for line in steps[step - EVERY:step])
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# Table and picture

def mean_at(rows: list[dict], step: int, key: str) -> float:
    """The mean over seeds."""
    return mean(row[key] for row in rows if row["step"] == step)


def make_table(rows: list[dict]) -> str:
    """Markdown: means over seeds at each tenth step; the end of each seed."""
    steps = " ".join(map(str, MEASURED))
    lines = [f"| judge | its accuracy | win rate, steps {steps} | rubric held out, steps 0 {steps} "
             "| its end, each seed | tokens, first and last |",
             "|---" * 6 + "|"]
    for judge in JUDGES:
        judged = [row for row in rows if row["judge"] == judge]
        accuracy, win_rates = "", ""
        if JUDGES[judge]:
            accuracy = f"{mean_at(judged, 0, 'accuracy'):.3f}"
            win_rates = join_means(judged, "win_rate", MEASURED)
        held_out = join_means(judged, "held_out", [0, *MEASURED])
        ends = [f"{row['held_out']:.3f}" for row in judged if row["step"] == N_STEPS]
        first = mean_at(judged, EVERY, "length")
        last = mean_at(judged, N_STEPS, "length")
        lines.append(f"| {judge} | {accuracy} | {win_rates} | {held_out} | {' '.join(ends)} "
                     f"| {first:.1f} {last:.1f} |")
    return "\n".join(lines)


def join_means(rows: list[dict], key: str, steps) -> str:
    return " ".join(f"{mean_at(rows, step, key):.3f}" for step in steps)


def plot_judges(rows: list[dict], path: Path) -> Path:
    """What judge and rubric say over the steps: a line per judge, the mean over seeds."""
    figure, axes = plots.new_figure(2)
    for judge in JUDGES:
        kind, _ = JUDGES[judge] or ("rubric", 0.0)
        style = "--" if "favour" in judge else "-"
        for axis, key in zip(axes, ("win_rate", "held_out")):
            judged = [row for row in rows if row["judge"] == judge and key in row]
            row_steps = [row["step"] for row in judged]
            steps = sorted(set(row_steps))
            means = [mean_at(judged, step, key) for step in steps]
            values = [row[key] for row in judged]
            axis.plot(steps, means, color=COLOR[kind], lw=1.4, ls=style, label=judge)
            axis.plot(row_steps, values, ".", color=COLOR[kind], ms=3)
    axes[0].set(ylabel="what the judge says\n(win rate)")
    axes[1].set(ylabel="what the rubric says\n(held out)", xlabel="step")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return plots.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.hacking", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3,
                        help="policies of each judge: seeds 0, 1, … (default 3)")
    parser.add_argument("--show", action="store_true",
                        help="print the table of the recorded results, and stop")
    args = parser.parse_args()
    if args.show:
        lines = Path("results/hacking.jsonl").read_text().splitlines()
        print(make_table([json.loads(line) for line in lines]))
        return
    if not SOURCE.is_dir():
        raise UserError(f"there is no {SOURCE}: run `bash speedrun.sh` first")
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    policies = [(judge, seed) for judge in JUDGES for seed in range(args.seeds)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train_judge, JUDGES))
        rows = []
        for found in pool.map(lambda policy: train_policy(*policy), policies):
            rows += found
    print(make_table(rows))
    results.replace("hacking", rows)
    print("picture:", plot_judges(rows, Path("out/hacking/hacking.png")))


if __name__ == "__main__":
    common.cli(main)
