"""All phases by the sections of configs/3b.py, on two processes, with a small model and small data.

All else is as configured: bfloat16, recomputation, stages, sampling, filter and judge. Compiling
alone would take minutes.
"""
import json
import math

import pytest

import common
from checks import mini_phases
from conftest import ROOT, Mini

CONFIG = f"""
import runpy
from mini import *

_large = runpy.run_path({str(ROOT / "configs/3b.py")!r})
_small = dict(compile=False, save_every=1, log_every=1, prompts=[])

_phases = ("pretrain", "sft", "distill", "reward", "rl")
for _name in _phases:
    assert (_large[_name]["dtype"], _large[_name]["compile"]) == ("bfloat16", True)
assert _large["distill"]["recompute"] is True
pretrain, sft, distill, reward, rl = (_large[name] | _small for name in _phases)
pretrain |= dict(
    batch_tokens=512, micro_tokens=128, eval_every=0, eval_tokens=100, pool_tokens={{}},
    stages=[stage | dict(tokens=512, context=stage["context"] // 1024 or 1, micro_tokens=128,
                         least_steps=0, mixture=dict(high=1)) for stage in pretrain["stages"]])
_chats = [dict(path="talks.jsonl")]
_cold_start, _overall = sft["stages"]
sft |= dict(
    pools=dict.fromkeys(sft["pools"], _chats), batch_tokens=2048, micro_tokens=512,
    stages=[_cold_start | dict(epochs=dict(math=1), context=256),
            _overall | dict(conversations=20, context=512)])
distill |= dict(
    teacher="out/3b/pretrain", teacher_system="", problems={{}}, pairs="pairs.jsonl",
    context=256, batch_pairs=4, epochs=0.4)
reward |= dict(preferences=[dict(taste=40)], held_out=[dict(taste=10)], context=256, batch_pairs=20)
_stages = [stage | dict(steps=1, problems=problems) for stage, problems in zip(
    rl["stages"], (dict(math=4), dict(code=4), dict(taste=4)))]
rl |= dict(
    stages=_stages, verifier=dict(model=dict(checkpoint="out/3b/pretrain", max_new_tokens=8)),
    group_size=4, batch_groups=2, context=256, max_new_tokens=12, filter_samples=2,
    keep_between=[-1, 2], eval_every=0)
evaluate = dict(tasks=["math"], n_problems=4, k=1, max_new_tokens=8)
"""
SCRIPT = """
import functools, sys
import common, distill, pretrain, reward, rl, sft
common.init_distributed = functools.cache(common.init_distributed)  # one group for all phases
for phase in (pretrain, sft, distill, reward, rl):
    sys.argv = [phase.__name__ + ".py", "small_3b.py", "--name=3b", "--corpus.folder=data"]
    phase.main()
common.cli(int)
"""


@pytest.fixture(scope="module")
def run(mini: Mini) -> tuple[Mini, str]:
    """What all phases print, one after the other."""
    mini_phases.prepare(mini)  # talks.jsonl and pairs.jsonl
    (mini.folder / "small_3b.py").write_text(CONFIG)
    (mini.folder / "phases.py").write_text(SCRIPT)
    return mini, mini.run("phases.py", ranks=2)


def steps(mini: Mini, phase: str) -> list[dict]:
    lines = (mini.folder / f"out/3b/{phase}/metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_all_phases_end(run):
    mini, output = run
    assert output.count("2 process(es) on cpu, bfloat16") == 5
    for phase in ("pretrain", "sft", "distill", "reward", "rl"):
        assert common.list_checkpoints(mini.folder / "out/3b" / phase)
        found = steps(mini, phase)
        assert found and all(line["finite"] for line in found), phase
    assert len(steps(mini, "rl")) == 3 and {line["stage"] for line in steps(mini, "sft")} == {
        "cold start", "overall"}


def test_dpd_starts_from_equal_models(run):
    # On a CPU attention rounds otherwise with gradients.
    assert steps(run[0], "distill")[0]["dpo"] == pytest.approx(math.log(2), abs=2e-3)
