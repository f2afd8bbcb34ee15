"""The kernels against their definitions in float64, values and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels.attention as attention_module
from kernels.attention import attention
from kernels.rmsnorm import add_rms_norm, rms_norm


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same(ours, plain, inputs, d_out=None):
    """Equal values, and equal gradients of the inputs for a gradient d_out of the result."""
    torch.testing.assert_close(ours, plain)
    for pair in zip(
        *(torch.autograd.grad(y, inputs, d_out, retain_graph=True) for y in (ours, plain))
    ):
        torch.testing.assert_close(*pair)


def plain_attention(q, k, v, doc_start=None):
    """The definition, one query and head at a time."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            begin, end = (0 if doc_start is None else int(doc_start[b, t])), S - T + t + 1
            for h in range(H):
                keys, values = k[b, begin:end, h // (H // K)], v[b, begin:end, h // (H // K)]
                out[b, t, h] = ((keys @ q[b, t, h]) / D**0.5).softmax(0) @ values
    return out


DOCS = torch.tensor([[0, 0, 0, 3, 4, 4, 4], [0, 1, 1, 1, 1, 1, 6]], dtype=torch.int32)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (5, 1), (6, 3)], ids=str)
@pytest.mark.parametrize(
    "T, docs",
    [(7, None), (7, DOCS), (3, None), (3, DOCS[:, 4:]), (1, None), (1, DOCS[:, 6:])],
    ids=["T=S", "T=S docs", "T<S", "T<S docs", "T=1", "T=1 docs"],
)
def test_attention(heads, T, docs):
    """T < S: the queries are the last T positions, as when a cache holds the others."""
    (H, K), B, S, D = heads, 2, 7, 4
    inputs = [
        x.requires_grad_()
        for x in (rand(B, T, H, D), rand(B, S, K, D), rand(B, S + 1, K, D)[:, 1:])
    ]
    d_out = rand(B, T, H, D + 1)[..., 1:]
    assert_same(attention(*inputs, docs), plain_attention(*inputs, docs), inputs, d_out)


@pytest.mark.parametrize("T", [97, 80], ids=["T=S, a block of one query", "T<S"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_attention_in_blocks(T, dtype):
    """Documents longer than a block, shorter ones, and padding, whose tokens see themselves."""
    S = 97
    lengths = [[60, 20, 17], [3, 40, 46] + [1] * 8]
    starts = [np.repeat(np.cumsum([0, *row[:-1]]), row)[S - T :] for row in lengths]
    docs = torch.from_numpy(np.array(starts)).int()
    inputs = [rand(2, n, heads, 4).requires_grad_() for n, heads in ((T, 4), (S, 2), (S, 2))]
    d_out = rand(2, T, 4, 4)
    if dtype == torch.float64:
        assert_same(attention(*inputs, docs), plain_attention(*inputs, docs), inputs, d_out)
        return
    near = [x.detach().to(dtype).requires_grad_() for x in inputs]
    ours, plain = attention(*near, docs), plain_attention(*inputs, docs)
    found = torch.autograd.grad(ours, near, d_out.to(dtype))
    for a, b in zip((ours, *found), (plain, *torch.autograd.grad(plain, inputs, d_out))):
        torch.testing.assert_close(a.double(), b, atol=0.05, rtol=0.05)


def test_a_block_reads_only_its_keys(monkeypatch):
    sizes = []

    def attend(q, k, v, starts):
        sizes.append((q.shape[1], k.shape[1], int(starts.min())))
        return q

    monkeypatch.setattr(attention_module, "plain_attention", attend)
    docs = torch.tensor([[0] * 50 + [50] * 28, [0] * 30 + [30] * 48]).int()
    attention(rand(2, 78, 4, 4), rand(2, 78, 2, 4), rand(2, 78, 2, 4), docs)
    assert sizes == [(32, 32, 0), (32, 64, 0), (14, 48, 0)]  # the last from key 30 on
    sizes.clear()
    docs = torch.zeros(1, 1000).int()
    attention(rand(1, 1000, 4, 4), rand(1, 1000, 2, 4), rand(1, 1000, 2, 4), docs)
    assert [n for n, _, _ in sizes] == [63] * 15 + [55]


def test_attention_in_bfloat16_stays_near():
    q, k, v = rand(2, 7, 4, 8), rand(2, 7, 2, 8), rand(2, 7, 2, 9)[..., 1:]
    for docs in (None, DOCS):
        ours = attention(*(x.bfloat16() for x in (q, k, v)), docs)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(
            ours.double(), plain_attention(q, k, v, docs), atol=0.03, rtol=0.03
        )


@pytest.mark.parametrize("T, docs", [(7, None), (7, DOCS), (3, None), (1, DOCS[:, 6:])], ids=str)
def test_gradients_of_attention_in_bfloat16_stay_near(T, docs):
    """On a CPU another way than in fp32: the products in the open."""
    inputs, d_out = (
        [rand(2, n, heads, 8).requires_grad_() for n, heads in ((T, 4), (7, 2), (7, 2))],
        rand(2, T, 4, 8),
    )
    near = [x.detach().bfloat16().requires_grad_() for x in inputs]
    found = torch.autograd.grad(attention(*near, docs), near, d_out.bfloat16())
    for ours, plain in zip(
        found, torch.autograd.grad(plain_attention(*inputs, docs), inputs, d_out)
    ):
        torch.testing.assert_close(ours.double(), plain, atol=0.05, rtol=0.05)


def test_rms_norm():
    x, residual, weight = (
        rand(3, 5, 16).requires_grad_(),
        rand(3, 5, 17)[..., 1:],
        rand(16).requires_grad_(),
    )
    for eps in (1e-5, 0.5):
        assert_same(
            rms_norm(x, weight, eps),
            F.rms_norm(x, (16,), weight, eps),
            (x, weight),
            rand(3, 5, 18)[..., 2:],
        )
    residual.requires_grad_()
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, x + residual)
    plain = torch.cat(
        (F.rms_norm(x + residual, (16,), weight, 1e-5), x + residual), -1
    )  # both results have a gradient
    assert_same(torch.cat((normed, total), -1), plain, (x, residual, weight), rand(3, 5, 32))


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_rms_norm_of_two_types(dtypes):
    x, weight = (
        rand(3, 5, 16, dtype=dtypes[0]).requires_grad_(),
        rand(16, dtype=dtypes[1]).requires_grad_(),
    )
    y = rms_norm(x, weight, 1e-5)
    dx, d_weight = torch.autograd.grad(y.float().sum(), (x, weight))
    assert y.dtype == torch.float32 and dx.dtype == x.dtype and d_weight.dtype == weight.dtype


def test_rms_norm_keeps_its_statistics_in_fp32():
    x = (100 * rand(4, 512)).bfloat16()
    ours = rms_norm(x, torch.ones(512, dtype=torch.bfloat16), 1e-5)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, F.rms_norm(x.float(), (512,), eps=1e-5).bfloat16())
