"""Kills a phase at random moments, saving included, and compares where it ends.

    python -m checks.kill --kills=20
    python -m checks.kill --phase=rl --kills=5 --ranks=2

A miniature run (checks/mini.py) saves after every step, so many kills fall into a save. Each killed
run is started again and must end with the very weights and losses of a run that was never killed.
Five to ten minutes on one core. The miniature of RL has two stages with their filters, two updates
per batch, a KL term and a pairwise judge; since its model can do nothing, rewards are of a text's
length (checks/mini_rl.py).
"""
import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import hf
from checks import mini_rl
from checks.mini import ROOT, Mini

FIRST_LINES = {"pretrain": "loader alone", "rl": "before, in chat form"}  # training begins after it


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=FIRST_LINES, default="pretrain")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=0,
                        help="processes under torchrun (0: one, without)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    n_in_save = 0
    with tempfile.TemporaryDirectory() as folder:
        phase = prepare(Path(folder), args.phase, args.ranks)
        seconds = run_whole(phase)
        expected_weights, expected_losses = read_outcome(phase, "whole")
        for i in range(args.kills):
            run = f"killed{i}"
            in_save, last_checkpoint = kill_after(phase, run, rng.uniform(0, seconds))
            n_in_save += in_save
            phase.mini.run(*phase.command, f"--name={run}", ranks=phase.ranks)

            weights, losses = read_outcome(phase, run)
            same = losses == expected_losses and equal_weights(weights, expected_weights)
            moment = "save" if in_save else "step"
            verdict = "the same to the bit" if same else "DIFFERENT"
            print(f"run {i:2}: killed in a {moment} after {last_checkpoint}, then {verdict}",
                  flush=True)
            assert same
    print(f"{args.kills} runs killed, {n_in_save} of them while saving; "
          "all ended with the weights of a run never killed")


@dataclass
class Phase:
    """The phase that is killed, in the folder of a miniature run."""
    name: str
    mini: Mini
    command: list[str]
    ranks: int

    def folder(self, run: str) -> Path:
        return self.mini.folder / "out" / run / self.name


def prepare(folder: Path, name: str, ranks: int) -> Phase:
    """Makes the data; for RL also the checkpoint that it starts from."""
    mini = Mini(folder)
    mini.prepare("--corpus.folder=data")
    if name == "pretrain":
        command = [str(ROOT / "pretrain.py"), "mini.py", "--corpus.folder=data",
                   "--pretrain.save_every=1", "--pretrain.log_every=1"]
    else:
        mini.pretrain("--run=base", "--pretrain.eval_problems=0", "--evaluate.tasks=[]")
        (folder / "mini_rl.py").write_text(mini_rl.CONFIG)
        command = ["-m", "checks.mini_rl", "mini_rl.py", "--init_from=out/base/pretrain",
                   "--rl.log_every=1"]
    return Phase(name, mini, command, ranks)


def run_whole(phase: Phase) -> float:
    """Seconds from the first step to the last of the run "whole", which nothing kills."""
    process = start(phase, "whole")
    started = time.time()
    while "100%" not in process.stdout.readline():  # the last step
        pass
    seconds = time.time() - started
    process.communicate()
    return seconds


def kill_after(phase: Phase, run: str, seconds: float) -> tuple[bool, str]:
    """Starts a run and kills it; whether that was in a save, and the last whole checkpoint."""
    process = start(phase, run)
    time.sleep(seconds)
    process.kill()  # SIGKILL
    process.communicate()  # also torchrun's workers have ended when all pipes are closed
    in_save = any(phase.folder(run).glob(".step_*.tmp"))
    checkpoints = common.list_checkpoints(phase.folder(run))
    return in_save, checkpoints[0].name if checkpoints else "no checkpoint"


def start(phase: Phase, run: str):
    """Starts a run and comes back when training begins."""
    process = phase.mini.popen(*phase.command, f"--name={run}", ranks=phase.ranks)
    for line in process.stdout:
        if line.startswith(FIRST_LINES[phase.name]):
            return process
    raise AssertionError("the run ended before training began")


def read_outcome(phase: Phase, run: str) -> tuple[dict, list[float]]:
    """Final weights and the losses of all steps."""
    folder = phase.folder(run)
    model, _ = hf.load(str(folder))
    losses = [line["loss"] for line in common.read_metrics(folder) if "loss" in line]
    return model.state_dict(), losses


def equal_weights(weights: dict, expected: dict) -> bool:
    return all(torch.equal(weights[name], expected[name]) for name in expected)


if __name__ == "__main__":
    main()
