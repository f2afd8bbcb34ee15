"""Pre-training by its real commands: schedule, resume, world sizes, signals, bad steps, bad
input."""
from settings import load_config

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import common
import loop
import pretrain
from conftest import ROOT, Mini
from data.text.mixture import IGNORE, Batch, plan_stages
from model import ModelConfig, Transformer, init_weights
from pretrain import PretrainConfig, StageConfig
from schedule import Stage, learning_rate


def metrics(mini, run):
    return common.read_metrics(mini.folder / "out" / run / "pretrain")


def losses(mini, run):
    return [line["loss"] for line in metrics(mini, run) if "loss" in line]


def weights(mini, run):
    """The weights of a run's newest checkpoint, read back by hf.load (checksums and all)."""
    import hf
    model, _ = hf.load(str(mini.folder / "out" / run / "pretrain"))
    return model.state_dict()


@pytest.fixture(scope="module")
def whole(mini):
    """The run that the others are compared with."""
    return mini.pretrain("--run=whole")


# ---- schedule

@pytest.mark.parametrize("curve, expected", [
    ("linear", [3.5, 3.0, 2.5, 2.0]),
    ("1-sqrt", [4 - 2 * 0.5, 4 - 2 * math.sqrt(0.5), 4 - 2 * math.sqrt(0.75), 2.0]),
    ("cosine", [3 + math.cos(math.pi / 4), 3.0, 3 - math.cos(math.pi / 4), 2.0]),
    ("exponential", [4 * 0.5 ** 0.25, 4 * 0.5 ** 0.5, 4 * 0.5 ** 0.75, 2.0]),
])
def test_decay_curves_by_hand(curve, expected):
    """Four steps from 4 to 2."""
    stages = [
        StageConfig("a", [0, 1], 16, tokens=64, mixture={"p": 1}),
        StageConfig("b", [1, 0.5], 16, 64, {"p": 1}, curve=curve),
    ]
    plans = plan_stages(stages, {"p": 1000}, 16)
    assert [learning_rate(4.0, plans[1], step) for step in range(4, 8)] == pytest.approx(expected)
    assert [learning_rate(4.0, plans[0], step) for step in range(4)] == pytest.approx([1, 2, 3, 4])


def test_report_schedule_of_3b():
    """arXiv 2512.06266: 0.1T, 12.4T, 6.5T, 4T; 4.5e-4 to 1.5e-6; one epoch of each pool, then a
    second of high."""
    cfg = load_config("", [str(ROOT / "configs/3b.py")], pretrain=PretrainConfig)
    p = cfg.pretrain
    plans = plan_stages(p.stages, p.pool_tokens, p.batch_tokens)
    assert [sum(plan.tokens.values()) / 1e12 for plan in plans] == [0.1, 12.4, 6.5, 4.0]
    warmup, diversity, high, decay = plans
    assert {k: warmup.tokens[k] + diversity.tokens[k] for k in ("high", "medium")} == {
        "high": 6.5e12,
        "medium": 6e12,
    }
    assert set(high.tokens) == {"high"} and decay.context == 65536
    rate = lambda i, step: learning_rate(p.lr, plans[i], step)
    assert (
        rate(0, warmup.end_step - 1)
        == rate(1, diversity.first_step)
        == rate(2, high.end_step - 1)
        == 4.5e-4
    )
    assert rate(3, decay.end_step - 1) == pytest.approx(1.5e-6)


# ---- gradients

def test_accumulation_does_not_change_the_gradient():
    """1 x 8 rows = 8 x 1 accumulated, with documents of uneven lengths: one denominator for all."""
    rng = torch.Generator().manual_seed(0)
    model = Transformer(ModelConfig(2, 32, 48, 2, 1, 16, vocab_size=64)).double()
    init_weights(model, 0)
    tokens = torch.randint(64, (8, 16), generator=rng)
    targets = torch.where(
        torch.rand(8, 16, generator=rng) < torch.linspace(0, 0.9, 8)[:, None],
        IGNORE,
        tokens.roll(-1, 1),
    )
    batch = Batch(tokens.numpy(), targets.numpy(), torch.zeros(8, 16, dtype=torch.int32).numpy())
    d = common.Dist(0, 1, torch.device("cpu"), None)
    gradients = []
    for micro in (0, 16):
        model.zero_grad()
        loss, n = pretrain.train_step(
            model, batch, PretrainConfig(stages=[], batch_tokens=128, micro_tokens=micro), d
        )
        gradients.append([p.grad.clone() for p in model.parameters()])
        logits = model(tokens) @ model.lm_head.weight.T
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
        )
        assert loss == pytest.approx(expected.item(), abs=1e-6) and n == (targets != IGNORE).sum()
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_two_ranks_take_the_same_steps(mini, whole):
    """Same global batch: same losses to 1e-4; saved at 2 ranks, resumed at 1, and back."""
    reference = losses(mini, "whole")
    for run, first, then in (("to1", 2, 0), ("to2", 0, 2)):
        leave_early(mini, run, ranks=first)
        assert losses(mini, run) == pytest.approx(reference, abs=1e-4)
        output = mini.pretrain(f"--run={run}", ranks=then)
        assert re.search(r"going on from .*step_0*12 ", output)
        assert losses(mini, run) == pytest.approx(reference, abs=1e-4)
    for name, tensor in weights(mini, "whole").items():
        torch.testing.assert_close(weights(mini, "to2")[name], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.long
def test_two_replicas_of_two_shards_take_the_same_steps(mini, whole):
    mini.pretrain("--run=hsdp", "--pretrain.shard_size=2", ranks=4)
    assert losses(mini, "hsdp") == pytest.approx(losses(mini, "whole"), abs=1e-4)


def leave_early(mini, run, ranks=0, last=12):
    """A run whose checkpoints after step `last` are gone: what a machine that died then leaves
    behind."""
    mini.pretrain(f"--run={run}", "--pretrain.save_every=4", "--pretrain.keep=99", ranks=ranks)
    for path in common.list_checkpoints(mini.folder / "out" / run / "pretrain"):
        if int(path.name[5:]) > last:
            shutil.rmtree(path)


def test_micro_batches_and_bfloat16_and_recompute(mini, whole):
    """FSDP's mixed precision, activation checkpointing and accumulation give about the same losses
    on one process."""
    mini.pretrain(
        "--run=bf16",
        "--pretrain.dtype=bfloat16",
        "--pretrain.recompute=true",
        "--pretrain.micro_tokens=128",
    )
    assert losses(mini, "bf16") == pytest.approx(losses(mini, "whole"), abs=0.05)
    assert losses(mini, "bf16") != losses(mini, "whole")


# ---- resume

@pytest.mark.parametrize("last", [12, 28])
def test_resume_is_exact_to_the_bit(mini, whole, last):
    """In the stable stage, and in the decay, which inherits the RoPE base that the stable stage
    set."""
    shutil.rmtree(mini.folder / "out/resumed", ignore_errors=True)
    leave_early(mini, "resumed", last=last)
    mini.pretrain("--run=resumed")
    assert losses(mini, "resumed") == losses(mini, "whole")
    for name, tensor in weights(mini, "whole").items():
        assert torch.equal(weights(mini, "resumed")[name], tensor), name
    assert "nothing to do" in mini.pretrain("--run=resumed")


@pytest.mark.parametrize("number, "
                         "ranks", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_leaves(mini, whole, number, ranks):
    run = f"signal{int(number)}-{ranks}"
    process = mini.popen(
        str(ROOT / "pretrain.py"),
        "mini.py",
        "--corpus.folder=data",
        f"--name={run}",
        "--pretrain.log_every=1",
        "--pretrain.save_every=1000",
        "--pretrain.keep=0",  # the newest checkpoint stays in any case
        ranks=ranks,
    )
    for line in process.stdout:
        if line.startswith("step      9"):
            process.send_signal(number)
            break
    output = process.communicate(timeout=60)[0]
    at = int(re.search(r"stopped by signal at step (\d+)", output)[1])
    assert process.returncode == (1 if ranks else 128 + number)  # torchrun says 1, whatever its
                                                                 # workers say
    assert f"(step {at})" in mini.pretrain(f"--run={run}", ranks=ranks)
    assert losses(mini, run) == pytest.approx(losses(mini, "whole"), abs=1e-4 if ranks else 0)


def test_a_second_start_is_told_who_has_the_folder(mini, whole):
    process = mini.popen(str(ROOT / "pretrain.py"), "mini.py", "--corpus.folder=data",
                         "--name=twice", "--pretrain.log_every=1")
    for line in process.stdout:
        if line.startswith("step      2"):
            process.send_signal(signal.SIGSTOP)
            break
    output = mini.pretrain("--run=twice", code=2).splitlines()[-1]
    assert output.startswith("error: out/twice/pretrain is in use by process ")
    assert f" {process.pid} on " in output and "choose another --run" in output
    process.send_signal(signal.SIGCONT)
    assert "Traceback" not in process.communicate(timeout=60)[0]
    assert losses(mini, "twice") == losses(mini, "whole")


def test_a_folder_that_vanishes_is_made_again(tmp_path, capsys):
    """Metrics go on, and the line says what happened where they cannot."""
    metrics = common.Metrics(common.Dist(0, 1, torch.device("cpu"), None), tmp_path / "run", 0)
    metrics.write(step=0)
    shutil.rmtree(tmp_path / "run")
    metrics.write(step=1)
    assert [line["step"] for line in common.read_metrics(tmp_path / "run")] == [1]
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("in the way")
    metrics.write(step=2)
    metrics.write(step=3)
    assert capsys.readouterr().out.count("could not be written") == 1
    (tmp_path / "run").unlink()
    metrics.write(step=4)
    assert [line["step"] for line in common.read_metrics(tmp_path / "run")] == [2, 3, 4]


def test_damaged_checkpoint_is_passed_over(mini, whole):
    leave_early(mini, "flip")
    newest = common.list_checkpoints(mini.folder / "out/flip/pretrain")[0]
    victim = next(newest.glob("__0_*"))
    content = bytearray(victim.read_bytes())
    content[1000] ^= 4
    victim.write_bytes(content)
    output = mini.pretrain("--run=flip")
    assert "damaged checkpoint" in output and victim.name in output
    assert losses(mini, "flip") == losses(mini, "whole")


def test_branch_shares_the_trunk(mini, whole):
    """A decay from the stable checkpoint at step 14: the trunk's steps are not repeated, the rate
    falls from there."""
    mini.pretrain("--run=trunk", "--pretrain.keep=99")
    trunk = "out/trunk/pretrain/step_00000014"
    output = mini.pretrain("--run=branch", f"--pretrain.branch_from={trunk}")
    assert "step 14" in output
    lines = [line for line in metrics(mini, "branch") if "loss" in line]
    assert lines[0]["step"] == 14 and {line["stage"] for line in lines} == {"decay"}
    assert lines[-1]["lr"] == pytest.approx(5e-4) and lines[0]["lr"] < 5e-3


def test_other_stages_do_not_go_on_from_a_checkpoint(mini, whole):
    output = mini.pretrain("--run=whole", "--scale=3", code=2)
    assert "trained with other stages" in output
    output = mini.pretrain("--run=whole", "--model.n_layers=1", "--model.ffn_size=32", code=2)
    assert "trained with other model.n_layers, model.ffn_size" in output
    # the seed orders each pool; the mixture of a stage says how much of each was read so far
    leave_early(mini, "early")
    assert "batch size or seed" in mini.pretrain("--run=early", "--pretrain.seed=1", code=2)
    config = load_config("", [str(mini.folder / "mini.py")], pretrain=PretrainConfig)
    stages = [dataclasses.asdict(stage) for stage in config.pretrain.stages]
    stages[1]["mixture"] = dict(high=3, medium=1)
    output = mini.pretrain("--run=early", f"--pretrain.stages={stages}", code=2)
    assert "trained with other stages, data" in output
    assert "settings that have changed since: grad_clip" in mini.pretrain(
        "--run=whole", "--pretrain.grad_clip=2.0"
    )


def test_no_space_left_while_saving(mini, whole, tmp_path):
    """A disk with room for two checkpoints: later saves fail and say so, the run goes on from what
    is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        small = Mini(disk)
        command = ["--run=full", f"--corpus.folder={mini.folder / 'data'}", "--pretrain.keep=9"]
        output = small.pretrain(*command, code=2)
        assert "could not be written (no space left, or a limit of the file system: " in output
        assert "Traceback" not in output
        assert output.count("error: ") == 1 and "make room and run the same command again" in output
        kept = common.list_checkpoints(disk / "out/full/pretrain")
        assert (
            kept
            and common.find_checkpoint(common.Dist(0, 1, torch.device("cpu"), None), kept[0].parent)
            == kept[0]
        )
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert f"(step {int(kept[0].name[5:])})" in small.pretrain(*command)
        assert losses(small, "full") == losses(mini, "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- steps that are no numbers

def poisoned(mini, run, *options, code=0):
    """A run in which the loss of step 5 is NaN."""
    step, real = [0], pretrain.linear_cross_entropy

    def loss(*arguments, **options):
        step[0] += torch.is_grad_enabled()
        return real(*arguments, **options) * (math.nan if step[0] == 6 else 1)

    with mock.patch.object(pretrain, "linear_cross_entropy", loss):
        return mini.pretrain(f"--run={run}", *options, code=code)


def test_nan_never_enters_the_weights(mini, whole):
    output = poisoned(mini, "skip")
    assert re.search(r"step 5: loss nan.*data/\w+/00000/train_0000\d.bin", output)
    line = [line for line in metrics(mini, "skip") if "loss" in line][5]
    assert not line["finite"] and all(
        math.isfinite(x) for i, x in enumerate(losses(mini, "skip")) if i != 5
    )
    assert losses(mini, "skip")[:5] == losses(mini, "whole")[:5]
    assert "error: step 5: loss nan" in poisoned(
        mini, "stop", "--pretrain.on_nonfinite=stop", code=2
    )


# ---- what a user sees

def test_output_and_files(mini, whole):
    for expected in (
        "learning rate",
        "held-out high: loss",
        "bits per byte",
        "end of stage decay",
        "tokens/s",
        "MFU n/a",
        "loader alone",
        "avg@k",
    ):
        assert expected in whole
    folder = mini.folder / "out/whole/pretrain"
    assert losses(mini, "whole")[-1] < losses(mini, "whole")[0] - 1
    stage_ends = [
        json.loads((p / "meta.json").read_text())["stage"]
        for p in reversed(common.list_checkpoints(folder))
    ]
    assert list(dict.fromkeys(stage_ends)) == ["warmup", "stable", "decay"]
    last = [line for line in metrics(mini, "whole") if "validation" in line][-1]
    assert set(last["validation"]) == {"high", "medium"} and set(last["scores"]) == {"math"}


def test_a_batch_without_a_target_has_no_gradient():
    """A stage's last batch may hold the last token of a document alone: nothing follows it."""
    model = Transformer(ModelConfig(1, 32, 48, 2, 1, 16, vocab_size=64))
    init_weights(model, 0)
    batch = Batch(np.zeros((1, 8), np.int64), np.full((1, 8), IGNORE, np.int64),
                  np.arange(8, dtype=np.int32)[None])
    alone = common.Dist(0, 1, torch.device("cpu"), None)
    stage = pretrain.StageConfig("s", [1, 1], 8, tokens=8, mixture={"p": 1})
    assert pretrain.train_step(model, batch, stage, alone) == (0.0, 0)
    assert common.clip_grad_norm(model, 1.0) == 0.0


def test_the_plan_is_of_the_corpus_where_there_is_one(mini, whole):
    """pool_tokens only stands in for it."""
    estimates = "--pretrain.pool_tokens={'high': 10, 'medium': 10}"
    prepared = mini.pretrain("--plan", estimates)
    assert prepared == mini.pretrain("--plan") and "stands in" not in prepared
    elsewhere = mini.pretrain("--plan", estimates, "--corpus.folder=nowhere")
    assert "pretrain.pool_tokens stands in for the corpus: no data in nowhere" in elsewhere


def test_plan_needs_no_data(mini):
    output = mini.run(
        str(ROOT / "pretrain.py"),
        str(ROOT / "configs/3b.py"),
        "--plan",
        "--pretrain.total_tokens=10e9",
    )
    assert "e+10 tokens" in output or "1e+10 tokens" in output
    assert re.search(r"\nwarmup +477 ", output)  # not 0.4 % of 2,385 steps
    assert "high 100% (to 2.00)" not in output and "6.55e+04" not in output and "65,536" in output


@pytest.mark.parametrize("options, message", [
    (["--pretrain.lrr=1"], "unknown key 'lrr'; did you mean 'lr'"),
    (["--pretrain.batch_tokens=big"],
     "batch_tokens must be a whole number of at least 1, not 'big'"),
    (["--model.vocab_size=5000"], "tokenizer has 400 ids but model.vocab_size is 5000"),
    (["--corpus.folder=nowhere"], "no data in nowhere: prepare it with `python -m "
                                  "data.text.corpus mini.py"),
    (["--pretrain.batch_tokens=80"], "no multiple of its context"),
    (["--pretrain.dtype=float16"], "pretrain.dtype must be one of"),
    (["--model.kernels=cuda"], "model.kernels must be one of 'auto', 'triton', 'torch', not "
                               "'cuda'"),
    (["--init_from=nowhere"], "nowhere"),
    (["--pretrain.branch_from=out/whole/pretrain"], "branch_from must be one checkpoint"),
])
def test_bad_input_is_one_line(mini, options, message):
    output = mini.pretrain("--run=bad", *options, code=2)
    assert message in output and "Traceback" not in output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1


@pytest.mark.parametrize("damage, "
                         "message", [("missing", "is missing"), ("truncated", "is truncated")])
def test_damaged_shards_are_named(mini, tmp_path, damage, message):
    shutil.copytree(mini.folder / "data", tmp_path / "data")
    shard = tmp_path / "data/medium/00000/train_00000.bin"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    output = mini.pretrain("--run=bad", f"--corpus.folder={tmp_path / 'data'}", code=2)
    assert f"{shard} {message}" in output and "Traceback" not in output


def test_when_a_checkpoint_is_due():
    """By steps, before an evaluation, at the end of the stage, and by the clock."""
    cfg = PretrainConfig(stages=[], batch_tokens=8, save_every=5, save_minutes=1.0, eval_every=4)
    one = common.Dist(0, 1, torch.device("cpu"), None)
    run = loop.Run("pretrain", SimpleNamespace(track=[]), cfg, one, None, None)
    stage = Stage(name="only", first_step=0, n_steps=9)
    assert [step for step in range(1, 10) if run.save_is_due(step, stage)] == [4, 5, 8, 9]
    run.saved_at -= 61
    assert run.save_is_due(1, stage)
    cfg.save_minutes = 0.0
    assert not run.save_is_due(1, stage)
