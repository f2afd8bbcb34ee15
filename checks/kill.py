"""Kills a phase at random moments, saving included, and compares where it ends: `python -m checks.kill --phase=rl`.

A miniature run saves after every step, so many kills fall into a save. Each killed run is started again and must end
with the very weights and losses of a run that was never killed. Five to ten minutes on one core. The miniature of RL
has two stages with their filters, two updates a batch, a KL term and a pairwise judge; since its model can do nothing,
rewards are of a text's length (test_rl.toy).
"""
import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

import common
import hf
import test_rl
from conftest import ROOT, Mini

BEGINS = {"pretrain": "loader alone", "rl": "before, in chat form"}  # the line after which training begins


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phase", choices=BEGINS, default="pretrain")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=0, help="processes under torchrun (0: one, without)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        mini = Mini(Path(folder))
        mini.prepare("--corpus.folder=data")
        command = [str(ROOT / "pretrain.py"), "mini.py", "--corpus.folder=data", "--pretrain.save_every=1",
                   "--pretrain.log_every=1"]
        if args.phase == "rl":
            mini.pretrain("--run=base", "--pretrain.eval_problems=0", "--evaluate.tasks=[]")
            (mini.folder / "mini_rl.py").write_text(test_rl.CONFIG)
            (mini.folder / "toy.py").write_text(test_rl.TOY)
            command = ["toy.py", "mini_rl.py", "--init_from=out/base/pretrain", "--rl.log_every=1"]
        process = start(mini, args.phase, command, "whole", args.ranks)
        started = time.time()
        while "100%" not in process.stdout.readline():  # the last step
            pass
        duration = time.time() - started
        process.communicate()
        expected, losses = outcome(mini, args.phase, "whole")
        in_save = 0
        for i in range(args.kills):
            run = f"killed{i}"
            process = start(mini, args.phase, command, run, args.ranks)
            time.sleep(rng.uniform(0, duration))
            process.kill()  # SIGKILL; torchrun's workers die with their agent's pipes or are waited for below
            process.communicate()
            folder_of_run = mini.folder / "out" / run / args.phase
            saving = bool(list(folder_of_run.glob(".step_*.tmp")))
            in_save += saving
            at = common.list_checkpoints(folder_of_run)
            mini.run(*command, f"--name={run}", ranks=args.ranks)
            weights, repeated = outcome(mini, args.phase, run)
            same = repeated == losses and all(torch.equal(weights[name], expected[name]) for name in expected)
            after = at[0].name if at else "no checkpoint"
            print(f"run {i:2}: killed in a {'save' if saving else 'step'} after {after}, then "
                  + ("the same to the bit" if same else "DIFFERENT"), flush=True)
            assert same
    print(f"{args.kills} runs killed, {in_save} of them while saving; all ended with the weights of a run never killed")


def start(mini: Mini, phase: str, command: list[str], run: str, ranks: int):
    """Starts a run and comes back when training begins."""
    process = mini.popen(*command, f"--name={run}", ranks=ranks)
    for line in process.stdout:
        if line.startswith(BEGINS[phase]):
            return process
    raise AssertionError("the run ended before training began")


def outcome(mini: Mini, phase: str, run: str) -> tuple[dict, list[float]]:
    """Final weights and the losses of all steps."""
    folder = mini.folder / "out" / run / phase
    model, _ = hf.load(str(folder))
    return model.state_dict(), [line["loss"] for line in common.read_metrics(folder) if "loss" in line]


if __name__ == "__main__":
    main()
