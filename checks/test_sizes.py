"""The sizes and the memory that checks.sizes prints."""

import sys

import pytest

from checks import sizes
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
    counts = count_parameters(meta_model(TINY))
    inside = 2 * (8 * 32 + 3 * 48) + 4 * 6 * 8
    whole, shared = (
        list(sizes.training_memory_gb(TINY, gpus, 100, False).values()) for gpus in (1, 4)
    )
    assert whole[0] * 1e9 == pytest.approx(16 * counts["total"]) and whole[0] == 4 * shared[0]
    assert whole[1:] == shared[1:]  # only what is sharded becomes less
    assert whole[2] * 1e9 == pytest.approx(100 * 3 * inside)
    assert whole[3] * 1e9 == pytest.approx(6 * 100 * 64 + 4 * 64 * 32)
    recomputed = list(sizes.training_memory_gb(TINY, 1, 100, True).values())
    assert recomputed[2] * 1e9 == pytest.approx(100 * (2 * 32 * 3 + inside))
    del whole[2], recomputed[2]
    assert whole == recomputed
