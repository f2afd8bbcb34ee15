"""What is each part of Dual Preference Distillation's loss worth?

    python -m experiments.dpd --seeds 3          # after speedrun.sh; 50 minutes on 2 cores

The arms train on the same pairs for as many steps from the same SFT checkpoint, with other parts of
the loss; each takes the rate that is the best for it. See experiments/runner.py.
"""
from pathlib import Path

import common
from common import UserError
from experiments import runner
from experiments.runner import SPEEDRUN, Experiment, Run, Train, call
from experiments.stats import (
    best_rates,
    compare,
    compare_tasks,
    describe_rates,
    header,
    mean,
    row,
)

NONE = dict(dpo=0.0, kl_chosen=0.0, kl_rejected=0.0)
ARMS = {  # arm -> (what it is, settings)
    "sft": ("the SFT checkpoint, not trained", dict(epochs=0.01)),
    "teacher": ("the teacher", dict(epochs=0.01)),
    "a": ("more SFT, on the teacher's answers", NONE | dict(nll=1.0)),
    "b": ("DPO alone", NONE | dict(dpo=0.1)),
    "c": ("distillation on y+ alone", NONE | dict(kl_chosen=1.0)),
    "d": ("distillation on y+ and y-", NONE | dict(kl_chosen=1.0, kl_rejected=1.0)),
    "e": ("full DPD: DPO, distillation on y+ and y-",
          dict(dpo=0.1, kl_chosen=1.0, kl_rejected=1.0)),
    "f": ("DPO, distillation on y+", NONE | dict(dpo=0.1, kl_chosen=1.0)),
    "g": ("distillation on fresh samples of the student (GKD)",
          NONE | dict(kl_rejected=1.0, refresh_every=1, negatives="any")),
}
TRAINED_ARMS = [arm for arm in ARMS if arm not in ("sft", "teacher")]
PAIRS = [("e", "sft"), ("e", "a"), ("e", "b"), ("e", "c"), ("e", "d"), ("e", "f"), ("e", "g"),
         ("d", "c"), ("f", "c")]
RATES = (5e-5, 2.5e-4, 5e-4, 1e-3, 2e-3)
STUDENT = SPEEDRUN / "sft"
TEACHER = SPEEDRUN / "teacher" / "sft"
SAMPLES = "out/dpd/samples"
LIKELIHOODS = {  # of the metrics -> what the table calls it
    "student_chosen": "log p(y+)", "student_rejected": "log p(y-)", "margin": "margin",
    "accuracy": "pairs in order", "kl_chosen": "KL on y+", "kl_rejected": "KL on y-",
}


class DpdRun(Run):
    phase = "distill"

    def settings(self) -> dict[str, object]:
        source = TEACHER if self.arm == "teacher" else STUDENT
        settings = {"init_from": str(source), "distill.teacher": str(TEACHER),
                    "distill.lr": self.lr, "distill.seed": self.seed,
                    "distill.compare": False, "distill.samples": SAMPLES,
                    "distill.keep": 1, "distill.prompts": []}
        if self.lr == 0:  # no samples of its own
            settings["distill.problems"] = {}
            settings["distill.pairs"] = f"out/dpd/pairs{self.seed}/distill/pairs.jsonl"
        _, arm_settings = ARMS[self.arm]
        for key, value in arm_settings.items():
            settings[f"distill.{key}"] = value
        return settings


def prepare(seed: int) -> None:
    """Makes the problems, samples and pairs of a seed, which are the same for all arms."""
    call(["distill.py", "configs/tiny.py", f"--run=dpd/pairs{seed}", f"--init_from={STUDENT}",
          "--prepare", f"--distill.teacher={TEACHER}", f"--distill.seed={seed}",
          f"--distill.samples={SAMPLES}"], Path("out/dpd/pairs.log"))


def run_arms(seeds: int, scale: float, train: Train) -> list[dict]:
    """Runs the experiment; returns all results. scale does nothing: the pairs set the steps."""
    if not TEACHER.is_dir():
        raise UserError("there is no out/tiny/teacher: run `bash speedrun.sh` first")
    for seed in (100, *range(seeds)):
        prepare(seed)
    sweep = []
    for lr in RATES:
        for arm in TRAINED_ARMS:
            sweep.append(DpdRun("dpd", "sweep", arm, 100, lr, "dev", ()))
    sweep = train(sweep)
    rates = best_rates(sweep) | {"sft": 0.0, "teacher": 0.0}
    runs = []
    for seed in range(seeds):
        for arm in ARMS:
            runs.append(DpdRun("dpd", "arms", arm, seed, rates[arm], "test", ()))
    return sweep + train(runs)


def make_tables(results: list[dict]) -> str:
    """Markdown of all results."""
    rows = [r for r in results if r["table"] == "arms"]
    arms = {arm: what for arm, (what, _) in ARMS.items()}
    return "\n\n".join([
        describe_rates(results),
        "### the same pairs and steps", compare(rows, arms, PAIRS),
        "### by task", compare_tasks(rows, arms),
        "### where the answers' likelihoods end", tabulate_likelihoods(rows)])


def tabulate_likelihoods(results: list[dict]) -> str:
    """Markdown: where a run's last ten steps have the answers, in nats per token; and its cost."""
    lines = [header("arm", *LIKELIHOODS.values(), "seconds")]
    for arm in ARMS:
        rows = [r for r in results if r["arm"] == arm]
        last = [r["last"] for r in rows]
        cells = [f"{mean(last, key):.3f}" if key in last[0] else "" for key in LIKELIHOODS]
        lines.append(row(f"({arm})", *cells, f"{mean(rows, 'seconds'):.0f}"))
    return "\n".join(lines)


EXPERIMENT = Experiment("dpd", "configs/tiny_dpd.py", run_arms, make_tables)


def main():
    runner.main(EXPERIMENT, __doc__)


if __name__ == "__main__":
    common.cli(main)
