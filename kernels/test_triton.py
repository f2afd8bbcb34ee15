"""The Triton kernels against PyTorch in float64: on a GPU as they are, elsewhere in Triton's
interpreter."""

import itertools
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from kernels import INTERPRETED, attention, rmsnorm, tl, triton
from kernels.attention import backward_op, decode_op, forward_op
from kernels.cross_entropy import linear_cross_entropy
from kernels.tools import check
from kernels.tools.check import DEVICE, documents, rand
from kernels.tools.guards import guards
from model import ModelConfig, Transformer, init_weights

long = pytest.mark.long
interpreted = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")


@pytest.mark.parametrize(
    "part, module, seed",
    [
        (check.masks, attention, 0),
        pytest.param(check.masks, attention, 1, marks=long),
        (check.layouts, attention, 0),
        (check.decoding, attention, 0),
        pytest.param(check.decoding, attention, 1, marks=long),
        (check.visits, attention, 0),
        (check.specialized, attention, 0),
        pytest.param(check.specialized, attention, 1, marks=long),
        (check.check_rms_norm, rmsnorm, 0),
        (check.check_rms_norm, rmsnorm, 1),
        (check.check_rms_norm, rmsnorm, 2),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_kernels_are_right(part, module, seed, monkeypatch):
    monkeypatch.setattr(check, "SEED", seed)
    findings = list(part(module))
    assert findings and not [str(f) for f in findings if not f.ok]


@pytest.mark.parametrize("family", ["attention", "rms_norm"])
def test_the_command_checks_a_family(family, monkeypatch, capsys):
    """A few findings of it are enough here."""
    first = check.masks if family == "attention" else check.check_rms_norm
    few = lambda module: itertools.islice(first(module), 6)
    monkeypatch.setitem(check.CHECKS, family, few)
    monkeypatch.setattr(sys, "argv", ["check.py", family])
    with pytest.raises(SystemExit) as leave:
        check.main()
    output = capsys.readouterr().out
    assert leave.value.code == 0 and "cases, all right" in output
    assert output.count("\nok    ") == output.count("\n") - 2


def test_the_command_says_what_is_wrong(monkeypatch, capsys):
    wrong = [check.Finding("a case: out 0", error, 2.0) for error in (1.0, float("nan"), 1.5)]
    monkeypatch.setitem(check.CHECKS, "attention", lambda module: wrong)
    monkeypatch.setattr(sys, "argv", ["check.py", "attention"])
    with pytest.raises(SystemExit) as leave:
        check.main()
    output = capsys.readouterr().out
    assert leave.value.code == 1 and "WRONG a case " in output and "1 cases, 1 wrong" in output


def test_the_same_bits_every_time():
    docs = documents(2, 40, 40, [[7, 16], [30]])
    q, k, v, do = (rand(2, 40, n, 16, dtype=torch.bfloat16, seed=n) for n in (4, 2, 2, 4))
    o, lse = forward_op(q, k, v, docs, 0.25)
    for first, second in zip(*(backward_op(do, q, k, v, docs, o, lse, 0.25) for _ in range(2))):
        assert torch.equal(first, second)


def operators() -> dict:
    docs = documents(1, 18, 18, [[5]])
    q, k, v = (rand(1, 18, n, 16, seed=n).requires_grad_() for n in (2, 1, 1))
    o, lse = (t.detach() for t in forward_op(q, k, v, docs, 0.25))
    x, residual, weight = (
        rand(3, 24).requires_grad_(),
        rand(3, 24, seed=1).requires_grad_(),
        rand(24).requires_grad_(),
    )
    rstd = torch.ones(3, device=DEVICE)
    return {
        "attention": (forward_op, (q, k, v, docs, 0.25)),
        "attention without documents": (forward_op, (q, k, v, None, 0.25)),
        "attention, backward": (
            backward_op,
            (*(t.detach() for t in (o, q, k, v)), docs, o, lse, 0.25),
        ),
        "decoding": (decode_op, (q[:, :1].detach(), k.detach(), v.detach(), None, 0.25)),
        "decoding by length": (decode_op, (
            q[:, :1].detach(), k.detach(), v.detach(), None, 0.25,
            torch.tensor([7], dtype=torch.int32, device=DEVICE))),
        "rms_norm": (rmsnorm.forward_op, (x, None, weight, 1e-5)),
        "add_rms_norm": (rmsnorm.forward_op, (x, residual, weight, 1e-5)),
        "rms_norm, backward": (
            rmsnorm.backward_op,
            (x.detach(), residual.detach(), x.detach(), weight.detach(), rstd),
        ),
    }


@pytest.mark.parametrize("name", operators())
def test_operators_keep_torchs_rules(name):
    """Schema, fake tensors, autograd and tracing, by PyTorch's own checker."""
    op, args = operators()[name]
    torch.library.opcheck(op, args)


# --------------------------------------------------------------------------------------------------
# The whole model

TINY = dict(
    n_layers=2,
    hidden_size=64,
    ffn_size=96,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    vocab_size=50,
    init_std=0.2,
)


def loss_and_gradients(kernels: str, recompute: bool = False, compiled: bool = False):
    model = Transformer(ModelConfig(**TINY, kernels=kernels)).to(DEVICE)
    init_weights(model, 0)
    for block in model.layers:
        block.recompute = recompute
        if compiled:
            block.compile(fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    tokens = torch.randint(50, (2, 34), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    hidden = model(tokens[:, :-1], documents(2, 33, 33, [[9, 16], [1, 2, 30]]))
    loss = linear_cross_entropy(
        hidden.flatten(0, 1), model.lm_head.weight, tokens[:, 1:].flatten(), kernels=kernels
    )
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("options", [
    {"recompute": True, "compiled": True},
    pytest.param({"recompute": True}, marks=long),
    pytest.param({}, marks=long),
], ids=str)
def test_the_models_gradients_are_those_without_kernels(options):
    """Packed documents, fp32, to 1e-4; under activation checkpointing and torch.compile, without a
    graph break."""
    loss, gradients = loss_and_gradients("triton", **options)
    plain_loss, plain_gradients = loss_and_gradients("torch")
    torch.testing.assert_close(loss, plain_loss, atol=1e-4, rtol=1e-5)
    for ours, plain in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
        assert plain.abs().max() > 1e-3


SHARDED = """
import torch, common
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig, init_weights, meta_model
losses = []
for kernels in ("triton", "torch"):
    d = common.init_distributed("float32")
    cfg = ModelConfig(2, 32, 48, 4, 2, 16, vocab_size=50, init_std=0.2, kernels=kernels)
    model = common.shard_model(meta_model(cfg), d, "float32", False)
    init_weights(model, 0, common.assign)
    tokens = torch.randint(50, (1, 18), generator=torch.Generator().manual_seed(d.rank))
    hidden = model(tokens[:, :-1], torch.tensor([[0] * 7 + [7] * 10], dtype=torch.int32))
    loss = linear_cross_entropy(
        hidden.flatten(0, 1), model.lm_head.weight, tokens[:, 1:].flatten(), kernels=kernels)
    loss.backward()
    losses.append((loss.item(), common.clip_grad_norm(model, 1.0)))
(a, b), (c, e) = losses
assert abs(a - c) < 1e-4 and abs(b - e) < 1e-4 * e and e > 1, losses
print(f"rank {d.rank} done\\n", end="")
common.cli(lambda: None)
"""


@interpreted
def test_kernels_beside_fsdp(mini):
    (mini.folder / "kernels_sharded.py").write_text(SHARDED)
    output = mini.run("kernels_sharded.py", ranks=2)
    assert "rank 0 done" in output and "rank 1 done" in output


def test_sampling_with_kernels_is_sampling_without():
    """Prompts of unequal lengths; then a token at a time against the cache."""
    from generate import sample

    answers = []
    for kernels in ("triton", "torch"):
        model = Transformer(ModelConfig(**TINY, kernels=kernels)).to(DEVICE)
        init_weights(model, 0)
        answers.append(
            sample(model, [[1, 2, 3, 4, 5], [6], [7, 8]], n=2, max_new_tokens=6, temperature=0)
        )
    for with_kernels, without in zip(*([s for group in a for s in group] for a in answers)):
        assert with_kernels.tokens == without.tokens
        assert with_kernels.logprobs == pytest.approx(without.logprobs, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# Memory

FAR_APART = """
import torch
from kernels import attention, rmsnorm
device = "cuda" if torch.cuda.is_available() else "cpu"
# On the CPU only the pages touched are there.
far = torch.empty(3 * 2**30 + 64, dtype=torch.bfloat16, device=device)
def apart(x):  # rows (the dimension after the batch) 2^30 elements apart
    y = far.as_strided(x.shape, (0, 2**30, *x.stride()[2:]))
    return y.copy_(x)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 3, 2, 16, device=device).bfloat16() for _ in range(3))
near = attention.attention(q, k, v, kernels="triton")
o, lse = attention.forward_op(q, k, v, None, 0.25)
exact = attention.backward_op(q, q, k, v, None, o, lse, 0.25)
for i in range(3):
    args = [q, k, v]
    args[i] = apart(args[i])
    assert torch.equal(attention.attention(*args, kernels="triton"), near)
    for a, b in zip(attention.backward_op(q, *args, None, o, lse, 0.25), exact):
        assert torch.equal(a, b)
x, w = torch.randn(3, 32, device=device).bfloat16(), torch.ones(32, device=device).bfloat16()
y = far.as_strided((3, 32), (2**30, 1)).copy_(x)
assert torch.equal(rmsnorm.rms_norm(y, w, 1e-5, "triton"), rmsnorm.rms_norm(x, w, 1e-5, "triton"))
print("right")
"""


def test_rows_beyond_2_to_the_31_elements():
    """In a process of its own: with 32-bit offsets it would die."""
    done = subprocess.run(
        [sys.executable, "-c", FAR_APART], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "right" in done.stdout, done.stderr[-2000:]


@interpreted
def test_the_guards_see_what_is_outside():
    @triton.jit
    def copy(X, Y, n_load, n_store, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(Y + i, tl.load(X + i, mask=i < n_load, other=0.0), mask=i < n_store)

    x, y = torch.ones(24)[::2], torch.zeros(16)
    with guards():
        copy[(1,)](x[:8], y[:8], 8, 8, 16)
        assert y[:8].isnan().any()  # between the elements of x there is NaN
        for n_load, n_store in ((16, 8), (8, 16)):
            with pytest.raises(Exception, match="outside of every tensor"):
                copy[(1,)](torch.ones(8), torch.zeros(8), n_load, n_store, 16)


@interpreted
def test_bfloat16_in_the_interpreter_is_that_of_a_gpu():
    @triton.jit
    def multiply(X, W, Y, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at = i[:, None] * BLOCK + i[None, :]
        tl.store(Y + at, tl.dot(tl.load(X + at), tl.load(W + at)).to(tl.bfloat16))

    @triton.jit
    def add(X, W, Y, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(Y + i, tl.load(X + i) + tl.load(W + i))

    x, w, y = (rand(16, 16, dtype=torch.bfloat16, seed=i) for i in range(3))
    multiply[(1,)](x, w, y, 16)
    torch.testing.assert_close(y, (x.float() @ w.float()).bfloat16(), atol=2**-7, rtol=2**-8)
    # ties go to even; then tiny, not a number, and past the range
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1e-40, float("nan"), 3.4e38])
    rounded = torch.tensor([1.0, 1 + 2**-6, -1e-40, float("nan"), 3.4e38]).bfloat16()
    from kernels.interpreter import _convert

    bits = _convert(halfway.numpy(), tl.float32, tl.bfloat16, None)
    assert torch.equal(torch.from_numpy(bits.view("int16"))[:3], rounded.view(torch.int16)[:3])
    assert torch.from_numpy(bits.view("int16")).view(torch.bfloat16)[3].isnan()
    assert torch.equal(
        torch.from_numpy(bits.view("int16")).view(torch.bfloat16)[4], halfway[4].bfloat16()
    )
    with pytest.raises(Exception, match="cast to tl.float32 first"):
        add[(1,)](x.flatten(), w.flatten(), y.flatten(), 16)
