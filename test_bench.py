"""The benchmark of training steps: its lines, its options, and a contestant that runs out of memory."""
import json
import sys

import pytest
import torch

import bench
import common
from conftest import ROOT, Mini
from model import ModelConfig
from pretrain import PretrainConfig


@pytest.fixture
def config(tmp_path):
    """A config and no data: random tokens need none."""
    return Mini(tmp_path)


def load(config, *options):
    cfg = common.load_config("", [str(config.folder / "mini.py"), *options], model=ModelConfig, pretrain=PretrainConfig)
    cfg.model.vocab_size = 448
    return cfg


def test_it_prints_and_appends_a_line_a_contestant(config):
    results = config.folder / "results" / "bench.jsonl"
    results.parent.mkdir()
    results.write_text('{"older": 1}\n')
    output = config.run(str(ROOT / "bench.py"), "mini.py", "--micro_batches=2", "--write", "--pretrain.seed=3")
    older, *lines = map(json.loads, results.read_text().splitlines())
    assert older == {"older": 1} and [line["context"] for line in lines] == [32, 64]
    for line in lines:
        assert line["tokens"] == 2 * 512 and line["seed"] == 3 and "--micro_batches=2" in line["command"]
        assert line["tokens_per_s"] == pytest.approx(1024 / line["seconds"]) and line["config"] and line["machine"]
        if not torch.cuda.is_available():
            assert line["kernels"] == "torch" and line["mfu"] is None
            assert f"{line['tokens_per_s']:,.0f}    n/a" in output and "Triton would run in its interpreter" in output


@pytest.mark.parametrize("option, said", [
    ("--rounds=3", "unknown option"), ("--pretrain.lrr=1", "lrr"), ("--micro_batches=0", "micro_batches"),
    ("--micro_batches=", "micro_batches")])
def test_wrong_options(config, monkeypatch, option, said):
    monkeypatch.setattr(sys, "argv", ["bench.py", str(config.folder / "mini.py"), option])
    with pytest.raises(common.UserError, match=said):
        bench.main()


def test_out_of_memory_ends_one_contestant(config, monkeypatch):
    """The others go on, with a model built anew."""
    cfg, d, built, trainer = load(config), common.init_distributed("float32"), [], []
    build, step = bench.build, bench.step

    def limited(model, optimizer, batch, p, d):
        assert p.micro_tokens == batch.tokens.size  # one micro-batch
        assert {m.kernels for m in model.modules() if hasattr(m, "kernels")} == {model.cfg.kernels}
        if model.cfg.kernels == "triton":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        step(model, optimizer, batch, p, d)

    monkeypatch.setattr(bench, "build", lambda *args: built.append(1) or build(*args))
    monkeypatch.setattr(bench, "step", limited)
    monkeypatch.setattr(bench, "TURN", 1e-3)
    for context in (32, 64):
        triton, plain = bench.race_kernels(cfg, trainer, context, 1, ["triton", "torch"], d)
        assert triton["error"].startswith("OutOfMemoryError: CUDA out of memory") and "seconds" not in triton
        assert plain["seconds"] > 0 and plain["tokens"] == 512
    assert len(built) == 3  # once, and after each lack of memory


def test_a_step_is_a_step_of_training(config):
    """Weights move, micro-batches only split the work, gradients are gone."""
    weights = []
    for micro_tokens in (0, 128):
        cfg, d = load(config, f"--pretrain.micro_tokens={micro_tokens}"), common.init_distributed("float32")
        model, optimizer = bench.build(cfg, d)
        before = model.lm_head.weight.detach().clone()
        batch = bench.random_batch(16, 32, 448, seed=0)
        bench.step(model, optimizer, batch, cfg.pretrain, d)
        assert not torch.equal(before, model.lm_head.weight) and all(p.grad is None for p in model.parameters())
        weights.append(model.lm_head.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)
    assert batch.doc_start.shape == (16, 32) and batch.doc_start.dtype == "int32" and batch.doc_start.any()
