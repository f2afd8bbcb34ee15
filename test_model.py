"""The model's sizes, initial weights and recomputation. That it computes Llama is test_hf.py's."""
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels.cross_entropy import linear_cross_entropy
from model import (
    KVCache,
    ModelConfig,
    Transformer,
    count_parameters,
    flops_per_token,
    init_weights,
    meta_model,
)

NANBEIGE = ModelConfig(
    n_layers=32,
    hidden_size=2560,
    ffn_size=10496,
    n_heads=20,
    n_kv_heads=4,
    head_dim=128,
    vocab_size=166144,
)  # configs/3b.py, by hand
TINY = ModelConfig(
    n_layers=3, hidden_size=32, ffn_size=48, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=64
)


def test_parameter_counts_of_the_released_model():
    counts = count_parameters(meta_model(NANBEIGE))
    assert counts["total"] == 3_933_637_120
    assert counts["total"] - counts["embedding"] - counts["lm_head"] == 3_082_979_840
    assert counts["attention"] + counts["mlp"] + counts["norms"] - 2560 == 32 * 96_343_040
    assert sum(counts.values()) == 2 * counts["total"]  # the parts are all there is


def test_parameter_counts_of_tied_embeddings():
    tied = count_parameters(meta_model(dataclasses.replace(TINY, tie_embeddings=True)))
    untied = count_parameters(meta_model(TINY))
    assert tied["lm_head"] == 0 and untied["lm_head"] == 64 * 32
    assert untied["total"] - tied["total"] == 64 * 32
    assert sum(tied.values()) == 2 * tied["total"]


def test_flops_a_token():
    assert flops_per_token(NANBEIGE, 4096) == pytest.approx(23.1e9, rel=0.003)
    context = 16
    model = Transformer(TINY)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        logits = model(torch.zeros(1, context, dtype=torch.int64)) @ model.lm_head.weight.T
        logits.sum().backward()
    ours = context * flops_per_token(TINY, context)
    # the plain attention makes six products of whole T x T squares, forward and backward; we count
    # their causal halves
    square = 2 * context**2 * TINY.n_layers * TINY.n_heads * TINY.head_dim
    assert counted.get_total_flops() == ours + 6 * square / 2


def test_init_is_normal_and_does_not_depend_on_assign():
    model, collected = Transformer(TINY), []
    init_weights(model, seed=3)
    init_weights(meta_model(TINY), 3, lambda parameter, full: collected.append(full))
    for parameter, full in zip(model.parameters(), collected, strict=True):
        assert torch.equal(parameter, full)
        if parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(TINY.init_std, rel=0.1)
    other = Transformer(TINY)
    init_weights(other, seed=4)
    assert not torch.equal(other.embed_tokens.weight, model.embed_tokens.weight)
    matrices = [
        p for p in model.parameters() if p.shape == model.layers[0].mlp.up_proj.weight.shape
    ]
    assert len({p.flatten()[0].item() for p in matrices}) == len(matrices)  # no two are alike


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied_when_memory_comes(tied):
    """Module.to_empty() alone would make two parameters of the shared one."""
    model = meta_model(dataclasses.replace(TINY, tie_embeddings=tied)).to_empty(device="cpu")
    init_weights(model, 0)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    assert len(list(model.parameters())) == len(list(meta_model(model.cfg).parameters()))


def test_recomputation_gives_the_same_gradients():
    model, tokens = (
        Transformer(TINY),
        torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0)),
    )
    init_weights(model, 0)
    doc_start = torch.where(torch.arange(19) < 8, 0, 8).int().expand(2, 19)
    gradients, forwards = [], []
    model.layers[1].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    for recompute in (False, True):
        for block in model.layers:
            block.recompute = recompute
        model.zero_grad()
        hidden = model(tokens[:, :-1], doc_start)
        linear_cross_entropy(
            hidden.flatten(0, 1), model.lm_head.weight, tokens[:, 1:].flatten()
        ).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(forwards) == 1 + 2  # it was recomputed
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with torch.no_grad():
        model(tokens)
    assert len(forwards) == 4


def test_rows_move_in_the_cache():
    """Two rows change places and go on, as long as each is by then; a third one is left behind."""
    model, tokens = (
        Transformer(TINY),
        torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(0)),
    )
    init_weights(model, 0)
    cache = KVCache(TINY, 0, 10, "cpu", torch.float32)
    with torch.no_grad():
        model(tokens[:, :6], cache=cache)
        cache.lengths = [6, 6, 4]
        cache.copy(cache, [(2, 0), (0, 1)])
        cache.lengths = [4, 6]
        for t in range(4):
            column = torch.stack([tokens[2, 4 + t], tokens[0, 6 + t]])
            hidden = model.decode(column[:, None], cache.next_step())
            for row, length, now in ((2, 4, hidden[:1]), (0, 6, hidden[1:])):
                alone = model(tokens[row : row + 1, : length + t + 1])[:, -1:]
                torch.testing.assert_close(now, alone)
    assert cache.lengths == [8, 10]


def test_positions_restart_in_each_document(monkeypatch):
    """RoPE is relative, so only rounding would show it: it is asked directly."""
    model, asked = Transformer(TINY), []
    rotary = model.rotary
    monkeypatch.setattr(
        model, "rotary", lambda positions: asked.append(positions) or rotary(positions)
    )
    model(
        torch.zeros(1, 6, dtype=torch.int64), torch.tensor([[0, 0, 2, 3, 3, 3]], dtype=torch.int32)
    )
    cache = KVCache(TINY, 0, 5, "cpu", torch.float32)
    with torch.no_grad():
        model(torch.zeros(2, 3, dtype=torch.int64), cache=cache)
        cache.lengths = [3, 1]
        model.decode(torch.zeros(2, 1, dtype=torch.int64), cache.next_step())
    assert [positions.tolist() for positions in asked] == [
        [[0, 1, 0, 0, 1, 2]],
        [0, 1, 2],
        [[3], [1]],
    ]


def test_positions_far_away_are_exact():
    """Angles are made in fp32 whatever the weights' type: at 100,000 bf16 could not tell positions
    apart."""
    model = meta_model(dataclasses.replace(TINY, rope_theta=5e6)).bfloat16()
    positions = torch.tensor([0, 1, 65_535, 100_001])
    cos, sin = model.rotary(positions)
    angles = positions[:, None].double() * 5e6 ** -(torch.arange(0, 8, 2).double() / 8)
    assert cos.shape == (4, 1, 4) and cos.dtype == torch.float32
    assert (cos[:, 0] - angles.cos()).abs().max() < 0.01 and (
        sin[:, 0] - angles.sin()
    ).abs().max() < 0.01


def test_steps_of_any_length_share_graphs():
    """A graph for the first shape, for one row and for several, and then none for each new one."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = Transformer(TINY)
    init_weights(model, 0)
    for block in model.layers:
        block.compile(backend=counter)

    def train(rows, length):
        doc_start = torch.where(torch.arange(length) < 8, 0, 8).int().expand(rows, length)
        model(torch.zeros(rows, length, dtype=torch.int64), doc_start).sum().backward()

    for shape in ((2, 64), (3, 96), (1, 128), (1, 160)):
        train(*shape)
    graphs = counter.frame_count
    for shape in ((1, 96), (2, 160), (5, 224), (1, 1024), (4, 32)):
        train(*shape)
    assert counter.frame_count == graphs <= 4
    torch._dynamo.reset()
