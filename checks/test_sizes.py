"""The sizes and the memory that checks.sizes prints."""
from settings import load_config

import json
import sys

import pytest

from checks import sizes
from conftest import ROOT
from model import ModelConfig, count_parameters, meta_model

TINY = ModelConfig(
    n_layers=3, hidden_size=32, ffn_size=48, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=64
)


def test_what_a_user_sees(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checks.sizes", "configs/3b.py"])
    sizes.main()
    output = capsys.readouterr().out
    assert output.startswith(
        "3b: 32 layers, width 2560, ffn 10496, 20 query and 4 key/value heads of 128, "
    )
    assert "\n  total          3,933,637,120  100.0%\n" in output
    assert "\n  not embeddings 3,082,979,840\n" in output
    assert "\nKV cache: 65,536 bytes a token in bf16; " in output
    assert output.count("will it fit?") == 3 and output.count("a GPU of 80 GB") == 3
    assert "\n  context   4,096      23.062 GFLOP\n" in output


def test_memory_by_hand():
    n = count_parameters(meta_model(TINY))["total"]
    of_block = 2 * (4 * 32 + (2 * 4 + 2 * 2) * 8 + 4 * 48)
    whole, shared = (
        list(sizes.training_memory_gb(TINY, gpus, 1000, False).values()) for gpus in (1, 4)
    )
    assert whole[0] * 1e9 == pytest.approx(12 * n) and whole[0] == 4 * shared[0]
    assert whole[1:] == shared[1:]  # only what is sharded becomes less
    assert whole[2] * 1e9 == pytest.approx(4 * n)
    loss = 2 * 1000 * 64 + 6 * 64 * 32
    backward = 1000 * 2 * (32 + 2 * 48) + 2 * 64 * 32
    assert whole[3] * 1e9 == pytest.approx(1000 * 3 * of_block + max(loss, backward))
    recomputed = list(sizes.training_memory_gb(TINY, 1, 1000, True).values())
    assert recomputed[3] * 1e9 == pytest.approx(1000 * (2 * 32 * 3 + of_block) + backward)
    del whole[3], recomputed[3]
    assert whole == recomputed


def test_the_formula_agrees_with_the_steps_that_were_run():
    """To 10 %, at 3B, 4K and 64K, on 8 and 64 GPUs (of 64 each has one row of 64K in a step)."""
    config = load_config("", [str(ROOT / "configs/3b.py")], model=ModelConfig)
    lines = (ROOT / "results/memory.jsonl").read_text().splitlines()
    measured = {line["gpus"]: line["gb"] for line in map(json.loads, lines) if line["run"] == "3b"}
    assert {8, 64} <= measured.keys()
    for gpus, gb in measured.items():
        for name, micro_tokens, recompute in (
            ("pretrain, 4,096", 2**14, False), ("pretrain, 65,536", 2**16, True)
        ):
            n_passes = 2**22 // gpus // micro_tokens
            parts = sizes.training_memory_gb(
                config.model, gpus, micro_tokens, recompute, n_passes)
            assert sum(parts.values()) == pytest.approx(gb[name], rel=0.1), (gpus, name)
