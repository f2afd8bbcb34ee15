"""What is each part of Dual Preference Distillation's loss worth?

    python -m experiments.dpd --seeds 3          # after speedrun.sh; 70 minutes on 2 cores

The arms train on the same pairs for as many steps from the same SFT checkpoint, with other parts of
the loss; each takes the rate that is the best for it. Those with a plus start from SFT that took
several times as long, on pairs of their own. See experiments/runner.py.
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import common
from common import UserError
from configs.tiny import sft as SFT_RECIPE
from experiments import results, runner
from experiments.runner import (
    NO_RATE,
    SPEEDRUN,
    Experiment,
    Run,
    Train,
    call,
    evaluate_checkpoint,
)
from experiments.stats import (
    best_rates,
    compare,
    compare_tasks,
    describe_difference,
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
    "sft+": ("longer SFT, not trained", dict(epochs=0.01)),
    "a+": ("from longer SFT: more SFT, on the teacher's answers", NONE | dict(nll=1.0)),
    "e+": ("from longer SFT: full DPD", dict(dpo=0.1, kl_chosen=1.0, kl_rejected=1.0)),
}
PAIRS = [("e", "sft"), ("e", "a"), ("e", "b"), ("e", "c"), ("e", "d"), ("e", "f"), ("e", "g"),
         ("d", "c"), ("f", "c"), ("sft+", "sft"), ("e+", "sft+"), ("a+", "sft+"), ("e+", "a+")]
RATES = {  # arm -> those that the sweep tries: (a) and (c) hardly differ between theirs, DPO alone
           # does harm at all; (a+) and (e+) take the rates of (a) and (e)
    "a": (2.5e-4, 5e-4, 1e-3), "b": (2.5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3), "c": (2.5e-4, 5e-4, 1e-3),
    "d": (2.5e-4, 1e-3), "e": (2.5e-4, 1e-3), "f": (2.5e-4, 1e-3), "g": (2.5e-4, 1e-3),
}
LENGTHS = (1, 2, 4)     # of SFT, in the speedrun's tokens; the longer one that is the best on the
                        # dev split is the start of (sft+), (a+), (e+)
STUDENT = SPEEDRUN / "sft"
TEACHER = SPEEDRUN / "teacher" / "sft"
SAMPLES = "out/dpd/samples"
LIKELIHOODS = {  # of the metrics -> what the table calls it
    "student_chosen": "log p(y+)", "student_rejected": "log p(y-)", "margin": "margin",
    "accuracy": "pairs in order", "kl_chosen": "KL on y+", "kl_rejected": "KL on y-",
}


@dataclass(frozen=True)
class DpdRun(Run):
    student: Path = STUDENT
    phase = "distill"

    def settings(self) -> dict[str, object]:
        source = TEACHER if self.arm == "teacher" else self.student
        settings = {"init_from": str(source), "distill.teacher": str(TEACHER),
                    "distill.lr": self.lr or NO_RATE, "distill.seed": self.seed,
                    "distill.compare": False, "distill.samples": SAMPLES,
                    "distill.keep": 1, "distill.prompts": []}
        if self.lr == 0:  # no samples of its own
            settings["distill.problems"] = {}
            pairs = pairs_run(self.seed, self.student)
            settings["distill.pairs"] = f"out/{pairs}/distill/pairs.jsonl"
        _, arm_settings = ARMS[self.arm]
        for key, value in arm_settings.items():
            settings[f"distill.{key}"] = value
        return settings


# --------------------------------------------------------------------------------------------------
# What the arms start from

def train_longer(length: int) -> dict:
    """SFT with `length` times the speedrun's tokens; its result on the dev split."""
    name = f"dpd/sft{length}x"
    folder = STUDENT
    log = Path("out", name, "log.txt")
    if length > 1:
        folder = Path("out", name, "sft")
        stages = []
        for stage in SFT_RECIPE["stages"]:
            stages.append(stage | dict(trained_tokens=length * stage["trained_tokens"]))
        call(["sft.py", "configs/tiny.py", f"--run={name}",
              f"--init_from={SPEEDRUN / 'pretrain'}", f"--sft.data={SPEEDRUN / 'refine'}"], log,
             {"sft.stages": stages, "sft.compare": False, "sft.prompts": [], "evaluate.tasks": [],
              "sft.eval_tasks": []})
    scores = evaluate_checkpoint(EXPERIMENT.config, name, "dev", folder, log)
    meta = common.read_meta(common.list_checkpoints(folder)[0])
    return results.describe_run(meta) | dict(
        table="longer", arm=f"{length}x", split="dev", checkpoint=str(folder), **scores)


def pairs_run(seed: int, student: Path) -> str:
    """The run that makes a student's pairs of a seed."""
    return f"dpd/pairs{seed}" if student == STUDENT else f"dpd/pairs{seed}-longer"


def prepare(seed: int, student: Path) -> None:
    """Makes the problems, samples and pairs of a seed, which are the same for all its arms."""
    name = pairs_run(seed, student)
    call(["distill.py", "configs/tiny.py", f"--run={name}", f"--init_from={student}",
          "--prepare", f"--distill.teacher={TEACHER}", f"--distill.seed={seed}",
          f"--distill.samples={SAMPLES}"], Path("out", f"{name}.log"))


# --------------------------------------------------------------------------------------------------
# The runs and their tables

def run_arms(seeds: int, scale: float, train: Train) -> list[dict]:
    """Runs the experiment; returns all results. scale does nothing: the pairs set the steps."""
    if not TEACHER.is_dir():
        raise UserError("there is no out/tiny/teacher: run `bash speedrun.sh` first")
    with ThreadPoolExecutor(2) as pool:  # each command has one thread
        first = pool.map(lambda seed: prepare(seed, STUDENT), (100, *range(seeds)))
        lengths = list(pool.map(train_longer, LENGTHS))
        longer = Path(max(lengths[1:], key=lambda result: result["avg"])["checkpoint"])
        list(first)  # wait: the pairs of longer SFT read the teacher's samples
        list(pool.map(lambda seed: prepare(seed, longer), range(seeds)))
    sweep = []
    for arm, arm_rates in RATES.items():
        for lr in arm_rates:
            sweep.append(DpdRun("dpd", "sweep", arm, 100, lr, "dev", ()))
    sweep = train(sweep)
    rates = best_rates(sweep) | {"sft": 0.0, "teacher": 0.0, "sft+": 0.0}
    rates |= {"a+": rates["a"], "e+": rates["e"]}
    runs = []
    for seed in range(seeds):
        for arm in ARMS:
            student = longer if arm.endswith("+") else STUDENT
            runs.append(DpdRun("dpd", "arms", arm, seed, rates[arm], "test", (), student))
    return lengths + sweep + train(runs)


def make_tables(results: list[dict]) -> str:
    """Markdown of all results."""
    rows = [r for r in results if r["table"] == "arms"]
    trained = {r["arm"] for r in rows}
    arms = {arm: what for arm, (what, _) in ARMS.items() if arm in trained}
    pairs = [pair for pair in PAIRS if trained.issuperset(pair)]
    lengths = [r for r in results if r["table"] == "longer"]
    return "\n\n".join([
        describe_rates(results),
        "### SFT for longer, dev split", tabulate_lengths(lengths),
        "### the same pairs and steps", compare(rows, arms, pairs),
        "### by task", compare_tasks(rows, arms),
        "### where the answers' likelihoods end", tabulate_likelihoods(rows)])


def tabulate_lengths(results: list[dict]) -> str:
    """Markdown: what SFT with more tokens comes to, on the same data."""
    lines = [header("SFT's tokens", "accuracy", "gain on the row above", "95 % over problems")]
    previous = None
    for result in results:
        gain, interval = "", ""
        if previous:
            gain, interval, *_ = describe_difference([result], [previous])
        lines.append(row(result["arm"], f"{result['avg']:.3f}", gain, interval))
        previous = result
    return "\n".join(lines)


def tabulate_likelihoods(results: list[dict]) -> str:
    """Markdown: where a run's last ten steps have the answers, in nats per token; and its cost."""
    lines = [header("arm", *LIKELIHOODS.values(), "seconds")]
    for arm in dict.fromkeys(r["arm"] for r in results):
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
