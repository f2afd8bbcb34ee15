"""Lets the disk get full in the midst of each phase: what was saved is whole, and the run goes on.

    python -m checks.full_disk         # a few minutes on one core
    python -m checks.full_disk rl      # of these phases

Once a miniature run (checks.mini_phases) has its first checkpoint, the system refuses it files
beyond SIZE bytes, as a full disk does (RLIMIT_FSIZE: "File too large"). The run must say what it
could not write, in lines and not in a traceback, and its last checkpoint must load. The same
command, with room again, goes on from there to the end.
"""
import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

import common
import hf
from checks import mini_phases, warm
from checks.mini import Mini

SIZE = 4096


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(mini_phases.PHASES)}; else all")
    phases = parser.parse_args().phases or mini_phases.PHASES
    if unknown := [phase for phase in phases if phase not in mini_phases.PHASES]:
        parser.error(f"there is no phase {unknown[0]!r}")
    with tempfile.TemporaryDirectory() as folder:
        mini = Mini(Path(folder))
        mini_phases.prepare(mini)
        mini.prepare("--corpus.folder=data")
        mini.pretrain("--run=base", "--pretrain.eval_problems=0", "--evaluate.tasks=[]")
        for phase in phases:
            print(f"{phase:9} {fill(mini, phase)}", flush=True)


def fill(mini: Mini, phase: str) -> str:
    """Runs a phase on a disk that gets full, then with room; how it went."""
    command = ["-m", "checks.mini_phases", *mini_phases.command(phase, "full"),
               f"--{phase}.save_every=1", f"--{phase}.prompts=[]", "--evaluate.tasks=[]"]
    folder = mini.folder / "out/full" / phase
    process = warm.start(command, mini.folder)
    while not common.list_checkpoints(folder) and process.poll() is None:
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SIZE, resource.RLIM_INFINITY))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "could not be written" in output or "File too large" in output, output
    error = output.strip().rpartition("\n")[2]
    assert error.endswith("make room and run the same command again"), output
    one_process = common.Dist(0, 1, torch.device("cpu"), None)
    last = common.find_checkpoint(one_process, folder)
    hf.load(str(last))
    output = mini.run(*command)
    assert f"going on from {last.relative_to(mini.folder)}" in output, output
    return f"{error}\n          {last.name} loaded, and the run went on from it to its end"


if __name__ == "__main__":
    main()
