"""The report of a run: its tables on the screen, its pictures, and a page: out/<run>/report.html.

    python -m report configs/tiny.py           # at any time: what is not there yet is left out
    python -m report --compare out/a out/b …   # runs side by side: out/compare-a-b.html

Of a run that is not done it says how far it is, how fast, and how long still. Pictures are written
beside what they are of: out/<run>/<phase>/loss.png, out/<run>/phases.png and
out/<run>/pretrain/plan.png. The page is report/page.html, filled in by report/page.py.
"""
from settings import load_config

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import pretrain
from common import UserError
from data.text.mixture import MixtureStage
from data.text.shards import CorpusConfig
from data.text.tokenizer import TokenizerConfig
from evaluate import EvaluateConfig
from experiments import results
from loop import align, gain_table
from model import ModelConfig
from report import plots
from report.compare import compare
from report.page import write_page
from report.tables import (
    PHASES,
    UNITS,
    accuracy_rows,
    describe_cost,
    describe_progress,
    load_json,
    read_scores,
    stage_rows,
)

PLOT = {"distill": plots.plot_distill, "rl": plots.plot_rl}  # other phases: plots.plot_run


# --------------------------------------------------------------------------------------------------
# Pictures

def draw_pictures(config: SimpleNamespace) -> dict[str, Path]:
    """Draws the pictures of the phases that have begun, and of the plan: {name: path}."""
    out = config.out
    pictures = {}
    plan = draw_plan(config)
    if plan:
        pictures["plan"] = plan
    for phase in UNITS:
        if describe_cost(out / phase):
            plot = PLOT.get(phase, plots.plot_run)
            pictures[phase] = plot(out / phase)
    scores = read_scores(out)
    if scores:
        pictures["phases"] = plots.plot_phases(out / "phases.png", scores, config.run)
    return pictures


def draw_plan(config: SimpleNamespace) -> Path | None:
    """Draws what the stages of pre-training do; None where config or data do not say it."""
    try:
        pretrain_config = read_pretrain_config(config)
        plan = make_plan(pretrain_config)
    except UserError as error:
        if plots.read_newest_meta(config.out / "pretrain"):
            print(f"no picture of the plan: {error}")
        return None
    return plots.plot_plan(config.out / "pretrain/plan.png", pretrain_config, plan)


def read_pretrain_config(config: SimpleNamespace) -> SimpleNamespace:
    """The config of pre-training, by the command that trained the run; before it, by our own."""
    meta = plots.read_newest_meta(config.out / "pretrain")
    _, *arguments = shlex.split(meta.get("command", config.command))
    return load_config(
        pretrain.__doc__, arguments, flags={"plan": "", "record": ""}, model=ModelConfig,
        tokenizer=TokenizerConfig, corpus=CorpusConfig, pretrain=pretrain.PretrainConfig,
        evaluate=EvaluateConfig)


def make_plan(config: SimpleNamespace) -> list[MixtureStage]:
    """The stages in steps: with the sizes of the prepared pools, or else the config's estimates."""
    stages = pretrain.read_stages(config)
    pool_sizes, _ = pretrain.known_pool_sizes(config, stages)
    return pretrain.make_plan(config, stages, pool_sizes)


# --------------------------------------------------------------------------------------------------
# Tables and records

def print_tables(out: Path, evaluated: dict[str, list[dict]]) -> None:
    """Accuracy after all phases, then what each phase measured itself."""
    scores = read_scores(out)
    if scores:
        print(align(accuracy_rows(scores)))
    for phase in evaluated:
        if phase == "pretrain":
            table = align(stage_rows(out / phase))
        else:
            table = gain_table(out / phase)
        print(f"\n{phase}\n{table}")


def record(out: Path, phase: str, evaluations: list[dict]) -> None:
    """Appends the last evaluation of a phase to results/<phase>.jsonl."""
    folder = out / phase
    name, result = phase, {}
    for key in ("validation", "scores"):
        if key in evaluations[-1]:
            result[key] = evaluations[-1][key]
    for key in ("before", "teacher"):
        contents = load_json(folder / f"{key}.json")
        if contents:
            result[key] = contents
    if phase == "rl":
        name = "rl_run"  # results/rl.jsonl is of experiments/rl.py
        scored = [line for line in evaluations if line["scores"]]
        result["stages"] = {line["stage"]: line["scores"] for line in scored}
    meta = common.read_meta(common.list_checkpoints(folder)[0])
    results.record(name, meta, **result)


def record_costs(out: Path) -> None:
    """Appends what each phase of a speedrun from nothing took to results/speedrun.jsonl.

    phases: {name: seconds that passed, and seconds of CPU time (user and system)}.
    """
    costs = out / "costs.txt"
    if not costs.is_file():
        return
    phases = {}
    for line in costs.read_text().splitlines():
        seconds, cpu_seconds, name = line.split(maxsplit=2)
        phases[name] = {"seconds": int(seconds), "cpu_seconds": int(cpu_seconds)}
    seconds = sum(phase["seconds"] for phase in phases.values())
    cpu_seconds = sum(phase["cpu_seconds"] for phase in phases.values())
    made = results.describe_run(common.read_meta(common.list_checkpoints(out / "pretrain")[0]))
    results.append("speedrun", made | {
        "command": "bash speedrun.sh", "seconds": seconds,
        "cpu_minutes": round(cpu_seconds / 60, 1), "phases": phases})


def main():
    if sys.argv[1:2] == ["--compare"]:
        return compare(sys.argv[2:])
    flags = {"record": "append last evaluations to results/<phase>.jsonl (rl: rl_run), and what "
                       "speedrun.sh took to results/speedrun.jsonl"}
    config = load_config(__doc__, flags=flags, options=("run",), evaluate=EvaluateConfig)
    evaluated = {}
    for phase in PHASES:
        lines = [line for line in common.read_metrics(config.out / phase) if "scores" in line]
        if lines:
            evaluated[phase] = lines
    pictures = draw_pictures(config)
    if not evaluated and not pictures:
        raise UserError(f"no evaluation in {config.out}/*/metrics.jsonl yet")
    for phase in UNITS:
        progress = describe_progress(config.out / phase)
        if progress:
            print(f"{phase} is not done: {progress}")
    print_tables(config.out, evaluated)
    if config.record:
        for phase, lines in evaluated.items():
            record(config.out, phase, lines)
        record_costs(config.out)
    print("\npictures:", *pictures.values())
    print(f"page: {write_page(config, pictures)}")


if __name__ == "__main__":
    common.cli(main)
