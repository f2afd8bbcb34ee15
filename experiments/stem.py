"""What does RL gain by an agentic verifier, where rules cannot read the golds of most problems?

    python -m experiments.stem --seeds 3         # after speedrun.sh

The STEM stage of configs/tiny.py from the DPD checkpoint, at the recipe's rate, with the verifier
and with rules alone, to which no answer to `phrases` is right: the filter leaves only problems of
`math`. Measured is the accuracy in `math`, whose answers a rule knows: the same kind of questions.
See experiments/runner.py.
"""
import json

import common
from common import UserError
from configs.tiny import rl as RECIPE
from experiments import runner
from experiments.runner import NO_RATE, SPEEDRUN, Experiment, Run, Train, speedrun_verifier
from experiments.stats import compare, compare_tasks, select_task

ARMS = {  # arm -> (what it is, whether it has the verifier, steps as a multiple)
    "start": ("the DPD checkpoint, not trained", False, 0),
    "verifier": ("rules, and the verifier for what they leave open", True, 1),
    "rules": ("rules alone", False, 1),
}
PAIRS = [("verifier", "start"), ("rules", "start"), ("verifier", "rules")]
PROBLEMS = dict(math=200, phrases=1400)  # of few a rule can read the gold


class StemRun(Run):
    phase = "rl"

    def settings(self) -> dict[str, object]:
        _, has_verifier, multiple = ARMS[self.arm]
        [stage] = map(json.loads, self.stages)
        stage["steps"] = max(1, multiple * stage["steps"])
        settings = {"init_from": str(SPEEDRUN / "distill"), "rl.lr": self.lr or NO_RATE,
                    "rl.seed": self.seed, "rl.stages": [stage],
                    "rl.prompts": [], "rl.eval_tasks": [],
                    "rl.verifier": speedrun_verifier(RECIPE) if has_verifier else {}}
        if multiple == 0:
            settings["rl.filter_samples"] = 0
        return settings


def run_arms(seeds: int, scale: float, train: Train) -> list[dict]:
    """Runs the experiment; returns all results."""
    if not (SPEEDRUN / "verifier").is_dir():
        raise UserError("there is no out/tiny/verifier: run `bash speedrun.sh` first")
    stage = RECIPE["stages"][0] | dict(problems=PROBLEMS)
    stages = (json.dumps(stage | dict(steps=max(1, round(stage["steps"] * scale)))),)
    runs = []
    for arm in ("verifier", "rules"):
        for seed in range(seeds):
            runs.append(StemRun("stem", "arms", arm, seed, RECIPE["lr"], "test", stages))
    [start] = train([StemRun("stem", "arms", "start", 0, 0.0, "test", stages)])
    starts = [start | {"seed": seed} for seed in range(seeds)]  # not trained: the same for all
    return starts + train(runs)


def make_tables(results: list[dict]) -> str:
    """Markdown of all results."""
    arm_rows = [row for row in results if row["table"] == "arms"]
    names = {arm: what for arm, (what, *_) in ARMS.items()}
    math_rows = [select_task(row, "math") for row in arm_rows]
    return "\n\n".join([
        "### in mathematics", compare(math_rows, names, PAIRS),
        "### by task", compare_tasks(arm_rows, names)])


EXPERIMENT = Experiment("stem", "configs/tiny_rl.py", run_arms, make_tables)


def main():
    runner.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    common.cli(main)
