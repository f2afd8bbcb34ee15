"""The benchmark of training steps: its lines, its options; a contestant that runs out of memory."""
from settings import load_config

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import common
from checks import bench, peers
from checks.mini import Mini
from model import ModelConfig, Transformer, flops_per_token
from pretrain import PretrainConfig


@pytest.fixture
def config(tmp_path):
    """A config and no data: random tokens need none."""
    return Mini(tmp_path)


def load(config, *options):
    cfg = load_config(
        "", [str(config.folder / "mini.py"), *options], model=ModelConfig, pretrain=PretrainConfig
    )
    cfg.model.vocab_size = 448
    return cfg


def test_it_prints_and_appends_a_line_a_contestant(config):
    results = config.folder / "results" / "bench.jsonl"
    results.parent.mkdir()
    results.write_text('{"older": 1}\n')
    output = config.run(
        "-m", "checks.bench", "mini.py", "--micro_batches=2", "--write", "--pretrain.seed=3"
    )
    older, *lines = map(json.loads, results.read_text().splitlines())
    assert older == {"older": 1} and [line["context"] for line in lines] == [32, 64]
    for line in lines:
        assert line["tokens"] == 2 * 512 and line["seed"] == 3
        assert line["command"].startswith("python -m checks.bench mini.py --micro_batches=2")
        assert (
            line["tokens_per_s"] == pytest.approx(1024 / line["seconds"])
            and line["config"]
            and line["machine"]
        )
        if not torch.cuda.is_available():
            assert line["kernels"] == "torch" and line["mfu"] is None
            assert (
                f"{line['tokens_per_s']:,.0f}    n/a" in output
                and "Triton would run in its interpreter" in output
            )


@pytest.mark.parametrize(
    "option, said",
    [
        ("--rounds=3", "unknown option"),
        ("--peers", "unknown option"),
        ("--pretrain.lrr=1", "lrr"),
        ("--micro_batches=0", "micro_batches"),
        ("--micro_batches=", "micro_batches"),
    ],
)
def test_wrong_options(config, monkeypatch, option, said):
    monkeypatch.setattr(sys, "argv", ["bench.py", str(config.folder / "mini.py"), option])
    with pytest.raises(common.UserError, match=said):
        bench.main()


def test_out_of_memory_ends_one_contestant(config, monkeypatch):
    """The others go on, with a model built anew."""
    built, trainer = [], bench.Trainer(load(config), common.init_distributed("float32"))
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
        triton, plain = bench.race_kernels(trainer, context, 1, ["triton", "torch"])
        assert (
            triton["error"].startswith("OutOfMemoryError: CUDA out of memory")
            and "seconds" not in triton
        )
        assert plain["seconds"] > 0 and plain["tokens"] == 512
    assert len(built) == 3  # once, and after each lack of memory


def test_a_step_is_a_step_of_training(config):
    """Weights move, micro-batches only split the work, gradients are gone."""
    weights = []
    for micro_tokens in (0, 128):
        cfg, d = (
            load(config, f"--pretrain.micro_tokens={micro_tokens}"),
            common.init_distributed("float32"),
        )
        model, optimizer = bench.build(cfg, d)
        before = model.lm_head.weight.detach().clone()
        batch = bench.random_batch(16, 32, 448, seed=0)
        bench.step(model, optimizer, batch, cfg.pretrain, d)
        assert not torch.equal(before, model.lm_head.weight) and all(
            p.grad is None for p in model.parameters()
        )
        weights.append(model.lm_head.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)
    assert (
        batch.doc_start.shape == (16, 32)
        and batch.doc_start.dtype == "int32"
        and batch.doc_start.any()
    )


# --------------------------------------------------------------------------------------------------
# checks.peers

MINI = ModelConfig(2, 32, 48, 4, 2, 8, vocab_size=64)


def test_peers_have_the_same_sizes_and_the_products_are_all_there_are():
    ours, theirs = Transformer(MINI), peers.llama(MINI)
    assert sum(x.numel() for x in ours.parameters()) == sum(x.numel() for x in theirs.parameters())
    B, T = 3, 16
    with FlopCounterMode(display=False) as counted:
        peers.products(MINI, B, T, torch.float32)()
    square = (
        6 * 2 * B * T * T * MINI.n_layers * MINI.n_heads * MINI.head_dim
    )  # flops_per_token counts the causal half
    assert counted.get_total_flops() == B * T * flops_per_token(MINI, T) + square / 2


def test_a_peers_step_is_a_step_of_training():
    step = peers.their_step(MINI, 2, 16, torch.float32, compile=False, fused=True)
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.01


def test_peers_race(monkeypatch, capsys, tmp_path):
    """All lines, on the screen and in the file; compiled contestants stand in as eager ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "SHAPES", {"small": (MINI, 2, 16)})
    monkeypatch.setattr(peers, "NEW", 3)
    monkeypatch.setattr(peers, "TURN", 1e-4)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--write"])
    peers.main()
    lines = list(map(json.loads, open("results/bench.jsonl")))
    assert [sum(line["shape"] == shape for line in lines) for shape in ("small", "generation")] == [
        13,
        6,
    ]
    for line in lines:
        assert (
            line["command"] == "python -m checks.peers --write"
            and line["machine"]
            and line["torch"]
        )
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
    output = capsys.readouterr().out
    assert (
        output.count(" x transformers") == 7 + 6
        and "our best, over transformers as it comes" in output
    )


def test_peers_ratios():
    line = lambda who, dtype, compile, speed: dict(
        shape="char", contestant=who, dtype=dtype, compile=compile, tokens_per_s=speed
    )
    found = peers.ratios(
        [
            line("ours", "float32", False, 6),
            line("ours", "bfloat16", False, 8),
            line("ours", "float32", True, 12),
            line("ours", "bfloat16", True, 9),
            line("transformers", "float32", False, 5),
            line("transformers", "bfloat16", False, 4),
            line("transformers, all bf16", "bfloat16", False, 10),
            line("transformers", "float32", True, 8),
            line("transformers", "bfloat16", True, 9),
            line("transformers, AdamW's default", "float32", False, 3),
            line("products", "float32", False, 99),
        ]
    )
    assert found == {
        "eager, float32": 6 / 5,
        "eager, bfloat16": 8 / 10,
        "eager, the best of each": 8 / 10,
        "compiled, float32": 12 / 8,
        "compiled, bfloat16": 9 / 9,
        "compiled, the best of each": 12 / 9,
        "our best, over transformers as it comes": 12 / 3,
    }


def test_peers_profile():
    shares = peers.profile(peers.our_step(MINI, 2, 16, "float32", False))
    assert sum(shares.values()) == pytest.approx(1) and all(share > 0 for share in shares.values())


def test_peers_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(common.UserError, match="requirements-dev.txt"):
        peers.llama(MINI)
    monkeypatch.setattr(sys, "argv", ["peers.py", "--writ"])  # no short forms
    with pytest.raises(SystemExit):
        peers.main()
