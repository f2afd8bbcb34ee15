"""Ranks that end at different times wait for each other, and nothing of hours is lost.

    python -m checks.waiting                    # ten minutes, nearly all of it asleep
    python -m checks.waiting --sleep=20 --minutes=0.15

Miniature runs (checks/mini.py) on two ranks. In each kind of work that is not a step one rank
sleeps longer than the time-out of training: all survive. Then SIGTERM in the second piece of the
work that is kept as it comes: the run leaves at once; started again it samples no piece twice, and
one process finds what two have found.
"""
import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

import common
import distill
import evaluate
import rl
import sft
from checks import mini_rl
from checks.mini import ROOT, Mini

KINDS = {  # what is done -> the script, the folder where it keeps what it has, options
    "filter": ("rl", "rl/filter", []),
    "rollouts": ("rl", "rl/sampled", ["--rl.filter_samples=0"]),
    "evaluation in a phase": ("rl", "rl/evaluate", ["--rl.filter_samples=0"]),
    "evaluation": ("evaluate", "evaluate", []),
    "DPD samples": ("distill", "distill/samples", []),
    "SFT preparation": ("sft", "", []),
}
KEPT = ("filter", "evaluation", "DPD samples")  # in which a signal comes to the second piece
CONFIG = mini_rl.CONFIG + """
distill = dict(teacher="out/base/pretrain", problems=dict(math=20), n_samples=2, max_rows=8,
               max_new_tokens=8, context=192)
sft = dict(lr=1e-3, batch_tokens=1536, pools=dict(math=[dict(path="talks.jsonl")]), compare=False,
           stages=[dict(name="cold start", lr=[1, 1], context=192, epochs=dict(math=1))])
evaluate = dict(tasks=["math"], n_problems=24, k=2, max_rows=2, max_new_tokens=8,
                checkpoint="out/base/pretrain")
"""
OPTIONS = ["--rl.max_rows=2", "--rl.prompts=[]",
           "--rl.stages=[{'name': 'STEM', 'problems': {'math': 10}, 'steps': 1}]"]
MAINS = {"rl": rl.main, "evaluate": evaluate.main, "distill": distill.main, "sft": sft.main}


def main():
    if sys.argv[1:2] == ["work"]:
        return work(sys.argv[2], *map(float, sys.argv[3:6]), sys.argv[6:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleep", type=float, default=90.0, help="seconds that a rank is late")
    parser.add_argument("--minutes", type=float, default=0.5, help="the time-out of training")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mini = prepare(Path(folder))
        for kind in KINDS:
            seconds = survive(mini, kind, args.sleep, args.minutes)
            print(f"{kind}: one of two ranks slept {args.sleep:.0f} s, all ended after "
                  f"{seconds:.0f} s", flush=True)
        for kind in KEPT:
            seconds, n_before, n = leave_and_go_on(mini, kind)
            print(f"{kind}: SIGTERM was obeyed after {seconds:.1f} s; {n_before} of {n} results "
                  "were kept, none was made twice, and one process finds the same", flush=True)


def prepare(folder: Path) -> Mini:
    """A folder with a checkpoint to start from, and conversations."""
    mini = Mini(folder)
    mini.prepare("--corpus.folder=data")
    mini.pretrain("--run=base", "--pretrain.eval_problems=0", "--evaluate.tasks=[]")
    (folder / "waiting.py").write_text(CONFIG)
    talk = ('{"messages": [{"role": "user", "content": "1 + 1?"}, '
            '{"role": "assistant", "content": "2"}]}\n')
    (folder / "talks.jsonl").write_text(talk * 40)
    return mini


def command(
    kind: str, run: str, sleep: float = 0.0, minutes: float = 10.0, pause: float = 0.0
) -> list[str]:
    script, _, options = KINDS[kind]
    flags = [] if script in ("rl", "evaluate") else ["--prepare"]
    if script != "evaluate":  # whose checkpoint stands in its section
        flags.append("--init_from=out/base/pretrain")
    return ["-m", "checks.waiting", "work", kind, str(sleep), str(minutes), str(pause),
            "waiting.py", f"--name={run}", *OPTIONS, *options, *flags]


def survive(mini: Mini, kind: str, sleep: float, minutes: float) -> float:
    """Seconds of a run of two ranks, one of which sleeps once."""
    started = time.time()
    mini.run(*command(kind, f"late {kind}", sleep, minutes), ranks=2)
    assert time.time() - started > sleep
    return time.time() - started


def leave_and_go_on(mini: Mini, kind: str) -> tuple[float, int, int]:
    """Seconds until a run left after SIGTERM, results that it had kept, and those in the end."""
    process = mini.popen(*command(kind, f"stopped {kind}", pause=4.0), ranks=2)
    while process.poll() is None and not read_kept(mini, kind, f"stopped {kind}"):
        time.sleep(0.05)
    sent = time.time()
    process.send_signal(signal.SIGTERM)
    process.communicate()  # also torchrun's workers have ended when all pipes are closed
    seconds = time.time() - sent
    before = read_kept(mini, kind, f"stopped {kind}")
    mini.run(*command(kind, f"stopped {kind}"), ranks=2)
    mini.run(*command(kind, f"alone {kind}"))
    ours = read_kept(mini, kind, f"stopped {kind}")
    assert 0 < len(before) < len(ours) and set(before) < set(ours)
    assert seconds < 10 and len(ours) == len(set(ours))
    assert sorted(ours) == sorted(read_kept(mini, kind, f"alone {kind}"))
    return seconds, len(before), len(ours)


def read_kept(mini: Mini, kind: str, run: str) -> list[str]:
    """The lines of all ranks, each behind what it is of."""
    lines = []
    for path in (mini.folder / "out" / run / KINDS[kind][1]).glob("*.jsonl"):
        name = path.name.rsplit(".", 2)[0]
        lines += [f"{name} {line}" for line in path.read_text().splitlines()]
    return lines


def work(kind: str, sleep: float, minutes: float, pause: float, argv: list[str]) -> None:
    """A phase in which one rank sleeps once in a kind of work.

    minutes: the time-out of training; pause: seconds after each piece.
    """
    script, folder, _ = KINDS[kind]
    mini_rl.toy(setattr)
    join, keep_lines, prepare_pool = common.init_distributed, common.keep_lines, sft.prepare
    naps = [sleep]

    def keep_late(path: Path, rows: list[dict]) -> None:
        if str(path.parent).endswith(folder) and path.name.endswith(".1.jsonl"):
            time.sleep(naps.pop() if naps else 0.0)
        keep_lines(path, rows)
        if str(path.parent).endswith(folder):
            time.sleep(pause)

    def prepare_late(*arguments, **options):
        time.sleep(sleep)
        return prepare_pool(*arguments, **options)

    common.init_distributed = lambda dtype, *_: join(dtype, minutes=minutes)
    common.keep_lines, sft.prepare = keep_late, prepare_late
    sys.argv = [str(ROOT / f"{script}.py"), *argv]
    common.cli(MAINS[script])


if __name__ == "__main__":
    main()
