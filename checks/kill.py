"""Kills pre-training at random moments, saving included, and compares where it ends: `python -m checks.kill`.

A miniature run saves after every step, so about half the kills fall into a save. Each killed run is started again and
must end with the very weights and losses of a run that was never killed. About five minutes on one core.
"""
import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

import common
import hf
from conftest import ROOT, Mini


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=0, help="processes under torchrun (0: one, without)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        mini = Mini(Path(folder))
        mini.prepare("--corpus.folder=data")
        options = ["--pretrain.save_every=1", "--pretrain.log_every=1"]
        process = start(mini, "whole", options, args.ranks)
        started = time.time()
        while "100%" not in process.stdout.readline():  # the last step
            pass
        duration = time.time() - started
        process.communicate()
        expected, losses = outcome(mini, "whole")
        in_save = 0
        for i in range(args.kills):
            run = f"killed{i}"
            process = start(mini, run, options, args.ranks)
            time.sleep(rng.uniform(0, duration))
            process.kill()  # SIGKILL; torchrun's workers die with their agent's pipes or are waited for below
            process.communicate()
            phase = mini.folder / "out" / run / "pretrain"
            saving = bool(list(phase.glob(".step_*.tmp")))
            in_save += saving
            at = common.checkpoints(phase)
            mini.pretrain(f"--run={run}", *options, ranks=args.ranks)
            weights, repeated = outcome(mini, run)
            same = repeated == losses and all(torch.equal(weights[name], expected[name]) for name in expected)
            after = at[0].name if at else "no checkpoint"
            print(f"run {i:2}: killed in a {'save' if saving else 'step'} after {after}, then "
                  + ("the same to the bit" if same else "DIFFERENT"), flush=True)
            assert same
    print(f"{args.kills} runs killed, {in_save} of them while saving; all ended with the weights of a run never killed")


def start(mini: Mini, run: str, options: list[str], ranks: int):
    """Starts a run and comes back when training begins."""
    process = mini.popen(str(ROOT / "pretrain.py"), "mini.py", "--corpus.folder=data", f"--name={run}", *options,
                         ranks=ranks)
    for line in process.stdout:
        if line.startswith("loader alone"):
            return process
    raise AssertionError("the run ended before training began")


def outcome(mini: Mini, run: str) -> tuple[dict, list[float]]:
    """Final weights and the losses of all steps."""
    folder = mini.folder / "out" / run / "pretrain"
    model, _ = hf.load(str(folder))
    return model.state_dict(), [line["loss"] for line in common.read_metrics(folder) if "loss" in line]


if __name__ == "__main__":
    main()
