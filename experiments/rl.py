"""What does each of RL's stages change, and what are the filter and a start from DPD worth?

    python -m experiments.rl --seeds 3           # after speedrun.sh; 53 minutes on 2 cores

The three stages one after another; then the first stage alone: without the filter of problems, and
from SFT, for as long as DPD and the stage take together. All at the recipe's rate, which was chosen
on the dev split. See experiments/runner.py.
"""
import json

import common
from common import UserError
from configs.tiny import rl as RECIPE
from experiments import runner
from experiments.runner import NO_RATE, SPEEDRUN, Experiment, Run, Train, speedrun_verifier
from experiments.stats import compare, compare_stages, compare_tasks, select_task

STAGES = {"dpd": "DPD", "STEM": "STEM", "coding": "coding", "preference": "preference"}
ARMS = {  # arm -> (what it is, phase it starts from, steps of its stage as a multiple, settings)
    "dpd": ("the DPD checkpoint, not trained", "distill", 0, {"filter_samples": 0}),
    "sft": ("the SFT checkpoint, not trained", "sft", 0, {"filter_samples": 0}),
    "a": ("RL from DPD", "distill", 1, {}),
    "b": ("RL from DPD, without the filter", "distill", 1, {"filter_samples": 0}),
    "c": ("RL from SFT, longer by the time of DPD", "sft", 2, {}),
}
PAIRS = [("a", "dpd"), ("a", "b"), ("c", "sft"), ("a", "c")]


class RlRun(Run):
    phase = "rl"

    def settings(self) -> dict[str, object]:
        _, source, multiple, arm_settings = ARMS[self.arm]
        stages = [json.loads(stage) for stage in self.stages]
        stages[0]["steps"] = max(1, multiple * stages[0]["steps"])
        settings = {"init_from": str(SPEEDRUN / source),
                    "rl.reward_model": str(SPEEDRUN / "reward"),
                    "rl.verifier": speedrun_verifier(RECIPE),
                    "rl.lr": self.lr or NO_RATE, "rl.seed": self.seed, "rl.stages": stages,
                    "rl.prompts": [], "rl.eval_tasks": []}
        for key, value in arm_settings.items():
            settings[f"rl.{key}"] = value
        return settings


def run_arms(seeds: int, scale: float, train: Train) -> list[dict]:
    """Runs the experiment; returns all results."""
    if not (SPEEDRUN / "reward").is_dir():
        raise UserError("there is no out/tiny/reward: run `bash speedrun.sh` first")
    stages = []
    for stage in RECIPE["stages"]:
        steps = max(1, round(stage["steps"] * scale))
        stages.append(json.dumps(stage | dict(steps=steps)))
    chain, first = tuple(stages), tuple(stages[:1])
    runs = []
    for seed in range(seeds):
        runs.append(RlRun("rl", "stages", "a", seed, RECIPE["lr"], "test", chain))
    for arm in "cb":
        for seed in range(seeds):
            runs.append(RlRun("rl", "arms", arm, seed, RECIPE["lr"], "test", first))
    starts = train([RlRun("rl", "arms", arm, 0, 0.0, "test", first) for arm in ("dpd", "sft")])
    results = []
    for start in starts:  # not trained, so the same for every seed
        results += [start | {"seed": seed} for seed in range(seeds)]
    return results + train(runs)


def make_tables(results: list[dict]) -> str:
    """Markdown of all results."""
    ends = [r for r in results if r["arm"] == "dpd"] + collect_stage_ends(results)
    arm_rows = [r for r in results if r["table"] == "arms"]
    arm_rows += [r | {"arm": "a"} for r in ends if r["arm"] == "STEM"]  # the chains' beginnings
    names = {arm: what for arm, (what, *_) in ARMS.items()}
    math_rows = [select_task(r, "math") for r in arm_rows]
    parts = ["### after each stage", compare_stages(ends, STAGES),
             "### the first stage alone, in mathematics", compare(math_rows, names, PAIRS),
             "### the first stage alone, by task", compare_tasks(arm_rows, names)]
    return "\n\n".join(parts)


def collect_stage_ends(results: list[dict]) -> list[dict]:
    """The results at the end of each stage of the chains; the arm of each is its stage's name."""
    ends = []
    for chain in results:
        if chain["table"] == "stages":
            for name, scores in chain["stages"].items():
                ends.append(chain | scores | {"arm": name})
    return ends


EXPERIMENT = Experiment("rl", "configs/tiny_rl.py", run_arms, make_tables)


def main():
    runner.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    common.cli(main)
