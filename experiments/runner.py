"""What the experiments share: trains the arms side by side, each run once; records the results.

    python -m experiments.fg_wsd --seeds 5       # writes results/fg_wsd.jsonl and prints the tables
    python -m experiments.sft_data --seeds 3     # after speedrun.sh: refinement and reconstruction
    python -m experiments.dpd --seeds 3          # after speedrun.sh: the parts of DPD's loss
    python -m experiments.rl --seeds 3           # after speedrun.sh: RL's stages, filter and start
    python -m experiments.stem --seeds 3         # after speedrun.sh: rules with a verifier or alone
    python -m experiments.fg_wsd --scale 0.02 --seeds 1      # a try of the machinery, in minutes
    python -m experiments.fg_wsd --show          # the tables of results/fg_wsd.jsonl, without a run

An arm is a config with other settings. The protocol: the sweep is run on the dev split with seed
100; then all is frozen and seeds 0, 1, 2, … are run once on the test split, and what comes out is
reported. A gain is claimed only where the paired 95 % interval over problems excludes 0 and all
seeds agree in sign.

A run is kept under out/<name>/runs/ by the hash of its settings, the code and the data: nothing
runs twice, and a killed experiment goes on. Arms that begin alike share that part.
"""
from settings import read_config_file

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TextIO

import numpy as np
from tqdm import tqdm

import common
from common import UserError, progress_bar
from experiments import results

ROOT = Path(__file__).parent.parent
SPEEDRUN = Path("out/tiny")  # the run whose phases sft_data, dpd and rl start from
NO_RATE = 1e-30  # of an arm that is not trained (lr 0): a phase asks for a rate above 0; this one
                 # changes no weight


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation."""
    experiment: str
    table: str                 # which of the experiment's tables it belongs to; "sweep"
    arm: str
    seed: int
    lr: float
    split: str
    stages: tuple[str, ...]    # each as JSON, so that equal beginnings are equal text
    phase: ClassVar[str]       # the script that trains it

    def settings(self) -> dict[str, object]:
        """What the run sets beside the experiment's config: {"section.key": value}."""
        raise NotImplementedError

    def folder(self, version: str) -> Path:
        text = json.dumps([self.settings(), self.split, version])
        key = hashlib.sha256(text.encode()).hexdigest()[:10]
        name = f"{self.table}-{self.arm}-{self.seed}-{key}"
        return Path("out") / self.experiment / "runs" / name


Train = Callable[[list[Run]], list[dict]]  # trains and evaluates runs; returns their results


@dataclass(frozen=True)
class Experiment:
    """What main() needs of an experiment."""
    name: str                                       # of out/<name>/ and results/<name>.jsonl
    config: str
    run: Callable[[int, float, Train], list[dict]]  # seeds, scale, train -> all results
    tables: Callable[[list[dict]], str]             # all results, of now or recorded -> Markdown


def speedrun_verifier(recipe: dict) -> dict:
    """The rl.verifier of a recipe, with the speedrun's model."""
    model = recipe["verifier"]["model"] | {"checkpoint": str(SPEEDRUN / "verifier" / "sft")}
    return recipe["verifier"] | {"model": model}


# --------------------------------------------------------------------------------------------------
# Scripts

def call(command: list[str], log: Path, settings: dict[str, object] = {}) -> None:
    """Runs a script of ours, its output in a file; UserError with the last lines where it fails.

    command: the script's path from the repository's root, then its arguments.
    """
    options = []
    for key, value in settings.items():
        text = value if isinstance(value, str) else repr(value)
        options.append(f"--{key}={text}")
    script, *arguments = [*command, *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        code = run_script([str(ROOT / script), *arguments], output)
    if code:
        last_lines = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise UserError(f"`{shlex.join([script, *arguments])}` failed with exit code "
                        f"{code}; {log} ends with: {' / '.join(last_lines)}")


def run_script(command: list[str], output: TextIO) -> int:
    """Runs a Python script with its arguments, to its end; the exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], stdout=output, stderr=output, env=environment).returncode


def hash_code_and_data(config: str, name: str, phase: str) -> str:
    """Hash of all that a run depends on beside its settings: the code, the config with what it
    imports, the data, and the speedrun's checkpoints, which runs start from or ask."""
    program = (f"import sys, {phase}, evaluate\n"
               "for module in [*sys.modules.values()]: print(getattr(module, '__file__', None))")
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                             check=True, cwd=ROOT)
    modules = map(Path, set(process.stdout.splitlines()))
    code = sorted(path for path in modules if ROOT in path.parents)
    hashes = [json.dumps(read_config_file(Path(config)), default=str)]
    hashes += [hash_file(path) for path in code]
    if phase != "pretrain":
        for meta in sorted(SPEEDRUN.glob("**/step_*/meta.json")):
            if meta.relative_to(SPEEDRUN).parts[0] != "rl":  # which no run starts from
                hashes.append(common.read_meta(meta.parent)["files"])  # with their checksums
    folder = Path("out", name)
    for manifest in sorted(folder.glob("data/*/manifest.json")):
        shards = json.loads(manifest.read_text())["shards"]
        hashes += [shard["sha256"] for shard in shards]
    conversations = folder.glob("arms/**/*.jsonl")
    pairs = folder.glob("pairs*/distill/pairs.jsonl")
    hashes += [hash_file(path) for path in sorted([*conversations, *pairs])]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------------------
# One run

def finish(run: Run, config: str, version: str, others: list[tuple[Run, Path]]) -> dict:
    """Trains and evaluates a run, as far as it is not done; returns its result.

    A result is one line of results/<name>.jsonl. others: the experiment's runs and their folders.
    """
    folder = run.folder(version)
    result_file = folder / "result.json"
    if not result_file.is_file():
        inherit(run, folder, others)
        name = str(folder.relative_to("out"))
        settings = run.settings() | {"evaluate.tasks": []}
        call([f"{run.phase}.py", config, f"--run={name}"], folder / "log.txt", settings)
        result = evaluate_run(run, config, folder)
        remove_checkpoints(run, folder)
        common.write_atomic(result_file, json.dumps(result))
    return json.loads(result_file.read_text()) | {"code": version}


def inherit(run: Run, folder: Path, others: list[tuple[Run, Path]]) -> None:
    """Copies the checkpoint at which a finished run parts from this one, if there is one.

    pretrain.py goes on from there.
    """
    if run.phase != "pretrain" or (folder / "pretrain").exists():
        return
    longest, source = 0, None
    for other, other_folder in others:
        is_done = (other_folder / "result.json").is_file()
        if is_done and (other.lr, other.seed) == (run.lr, run.seed):
            shared = count_shared_stages(run, other)
            checkpoint = find_stage_end(run, other_folder, shared)
            if checkpoint and shared > longest:
                longest, source = shared, checkpoint
    if source:
        unfinished = folder / "pretrain.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a copy that was killed
        shutil.copytree(source, unfinished / source.name)
        unfinished.rename(folder / "pretrain")


def count_shared_stages(run: Run, other: Run) -> int:
    """How many stages two runs have in common, from the first."""
    count = 0
    for one, two in zip(run.stages, other.stages):
        if one != two:
            break
        count += 1
    return count


def find_stage_end(run: Run, folder: Path, n_stages: int) -> Path | None:
    """The checkpoint at the end of the first stages, in the folder of a run that shares these."""
    if n_stages == 0:
        return None
    name = json.loads(run.stages[n_stages - 1])["name"]
    for path in common.list_checkpoints(folder / "pretrain"):
        meta = common.read_meta(path)
        if meta["stage"] == name and meta["keep"]:
            return path
    return None


def evaluate_run(run: Run, config: str, folder: Path) -> dict:
    """The result of a trained run, from its checkpoints and its metrics."""
    phase_folder = folder / run.phase
    name = str(folder.relative_to("out"))
    log = folder / "log.txt"
    stages = {}
    if run.phase == "rl" and len(run.stages) > 1:  # each stage's end is a checkpoint that is kept
        for path in reversed(common.list_checkpoints(phase_folder)):
            meta = common.read_meta(path)
            if meta["keep"]:
                scores = evaluate_checkpoint(config, f"{name}/{path.name}", run.split, path, log)
                stages[meta["stage"]] = scores
    if stages:
        scores = list(stages.values())[-1]
    else:
        scores = evaluate_checkpoint(config, name, run.split, phase_folder, log)
    meta = common.read_meta(common.list_checkpoints(phase_folder)[0])
    result = results.describe_run(meta) | dict(
        table=run.table, arm=run.arm, seed=run.seed, split=run.split, lr=run.lr, **scores)
    if stages:
        result["stages"] = stages
    metrics = common.read_metrics(phase_folder)
    if run.phase == "distill":
        result["last"] = average_last_steps(metrics)
    held_out = [line["validation"] for line in metrics if "validation" in line]
    if held_out:
        first_pool = next(iter(held_out[-1].values()))
        result["bits_per_byte"] = first_pool["bits_per_byte"]
    return result


def evaluate_checkpoint(config: str, name: str, split: str, checkpoint: Path, log: Path) -> dict:
    """Scores of a checkpoint: avg, k, problems, correct, tasks.

    correct: the sum of the rewards of each problem's k samples, problems in order of their names.
    tasks: {task: its average}.
    """
    call(["evaluate.py", config, f"--run={name}", f"--evaluate.split={split}",
          f"--evaluate.checkpoint={checkpoint}"], log)
    lines = Path("out", name, "evaluate.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    correct = {}
    for row in rows:
        key = f"{row['task']} {row['problem']}"
        correct[key] = correct.get(key, 0) + (row["reward"] or 0)
    k = len(rows) // len(correct)
    tasks = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        rewards = [reward for key, reward in correct.items() if key.split()[0] == task]
        tasks[task] = float(np.mean(rewards)) / k
    return dict(avg=sum(correct.values()) / len(rows), k=k, problems=len(correct),
                correct=[correct[key] for key in sorted(correct)], tasks=tasks)


def average_last_steps(metrics: list[dict], n: int = 10) -> dict[str, float]:
    """Means over the last n steps of a phase, of what its last step measured."""
    steps = [line for line in metrics if "loss" in line][-n:]
    measured = [key for key, value in steps[-1].items() if isinstance(value, float)]
    means = {}
    for key in measured:
        means[key] = float(np.mean([line[key] for line in steps]))
    return means


def remove_checkpoints(run: Run, folder: Path) -> None:
    """Removes what nothing needs again: the ends of pre-training's stages stay, for arms alike."""
    for path in common.list_checkpoints(folder / run.phase):
        if run.phase != "pretrain" or not common.read_meta(path)["keep"]:
            shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------
# All runs of an experiment

class Trainer:
    """Trains and evaluates lists of runs, `jobs` of them side by side, under one progress bar."""

    def __init__(self, experiment: Experiment, jobs: int):
        self.experiment = experiment
        self.jobs = jobs
        self.bar = progress_bar(unit=" runs")

    def train(self, runs: list[Run]) -> list[dict]:
        """The runs' results, in their order."""
        version = hash_code_and_data(self.experiment.config, self.experiment.name, runs[0].phase)
        folders = [(run, run.folder(version)) for run in runs]
        self.bar.total = (self.bar.total or 0) + len(runs)

        def train_one(run: Run) -> dict:
            result = finish(run, self.experiment.config, version, folders)
            tqdm.write(f"{run.table:7} ({run.arm}) seed {run.seed:3} lr {run.lr:g}: "
                       f"accuracy {result['avg']:.3f}, {result['seconds']:.0f} s")
            self.bar.update()
            return result

        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(train_one, runs))


def main(experiment: Experiment, doc: str):
    """The command of an experiment. doc: its module's docstring, for --help."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{experiment.name}",
                                     description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, … (default 3)")
    parser.add_argument("--jobs", type=int, default=2,
                        help="runs side by side, a thread each (default 2)")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens every stage alike")
    parser.add_argument("--show", action="store_true",
                        help="print the tables of the recorded results, and stop")
    args = parser.parse_args()
    if args.show:
        print(experiment.tables(results.read(experiment.name)))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    started = time.time()
    trainer = Trainer(experiment, args.jobs)
    lines = experiment.run(args.seeds, args.scale, trainer.train)
    print(f"\n{experiment.tables(lines)}")
    if args.scale == 1:
        results.replace(experiment.name, lines)
    trainer.bar.close()
    print(f"\n{len(lines)} runs, {(time.time() - started) / 60:.1f} minutes")
