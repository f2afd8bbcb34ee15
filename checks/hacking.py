"""What becomes of a policy whose judge has a weakness: `python -m checks.hacking`, after speedrun.sh; 6 minutes.

The last stage of rl.py, from the DPD checkpoint, with two judges: one trained on labels that follow the hidden rubric,
one on labels of which 15 % favour the longer reply where the rubric likes the shorter one. What the judge says (the win
rate against the reference) is beside what the rubric says, of rollouts and held out, over the steps.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import common
import plots
import report
from common import UserError
from conftest import ROOT

NOISES, STEPS, EVERY = (0.0, 0.15), 50, 10


def run(script: str, *options: str) -> None:
    subprocess.run([sys.executable, ROOT / script, "configs/tiny.py", *options], check=True)


def tell(noise: float, out: Path) -> list[dict]:
    """Trains a judge and a policy; what both say of each tenth step."""
    name = f"--run=hacking/{noise}"
    run("reward.py", name, "--init_from=out/tiny/distill",
        f"--reward.preferences=[{{'taste': 3000, 'noise': {noise}, 'seed': 6}}]")
    stage = dict(name="preference", problems=dict(taste=600), steps=STEPS, reward="pairwise", temperature=1.0,
                 lr=[2, 2])
    run("rl.py", name, "--init_from=out/tiny/distill", f"--rl.stages=[{stage}]", f"--rl.eval_every={EVERY}",
        "--evaluate.tasks=['taste']")
    lines = common.read_metrics(out / "rl")
    held_out = {line["step"]: line["scores"]["taste"]["avg"] for line in lines if line.get("scores")}
    before = json.loads((out / "rl/before.json").read_text())["taste"]["avg"]
    steps = [line for line in lines if "win_rate" in line]
    mean = lambda key, at: sum(line[key] for line in steps[at - EVERY:at]) / EVERY
    rows = [dict(noise=noise, step=0, held_out=before)] + [
        dict(noise=noise, step=at, held_out=held_out[at - 1], win_rate=mean("win_rate", at), rubric=mean("rubric", at),
             length=mean("length", at)) for at in range(EVERY, STEPS + 1, EVERY)]
    meta = common.read_meta(common.checkpoints(out / "rl")[0])
    for row in rows:
        report.record("hacking", meta, **row)
    return rows


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not Path("out/tiny/distill").is_dir():
        raise UserError("there is no out/tiny/distill: run `bash speedrun.sh` first")
    rows = [row for noise in NOISES for row in tell(noise, Path(f"out/hacking/{noise}"))]
    print("| labels that favour length | step | win rate | rubric | held out | tokens |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = (f"{row[key]:.3f}" if key in row else "" for key in ("win_rate", "rubric", "held_out", "length"))
        print(f"| {row['noise']:.0%} | {row['step']} | {' | '.join(cells)} |")
    print("pictures:", *(plots.plot_rl(Path(f"out/hacking/{noise}/rl")) for noise in NOISES))


if __name__ == "__main__":
    common.cli(main)
