"""The losses from hidden states against their definitions in float64, and their kernels as check.py
checks them."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import cross_entropy
from kernels.cross_entropy import (
    linear_cross_entropy,
    linear_logprobs,
    linear_logprobs_entropy,
    linear_logprobs_kl,
    linear_topk_kl,
    teacher_topk,
)
from kernels.test_kernels import assert_same, rand
from kernels.tools import check

BACK_ENDS = ["torch", "triton"]
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(params=[300, 127, 1], ids="N={}".format)
def problem(request, monkeypatch):
    """hidden (N, C), weight (V, C), targets (N,), in three chunks of 128 at N = 300."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)
    N, C, V = request.param, 12, 37
    hidden, weight = rand(N, C).requires_grad_(), rand(V, C).requires_grad_()
    assert len(cross_entropy._chunks(hidden, weight)) == -(-N // 128)
    return hidden, weight, torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))


def test_linear_cross_entropy(problem):
    hidden, weight, targets = problem
    for scale in (
        1.0,
        0.125,
    ):  # the gradient is made in the forward pass: what comes after must still scale it
        assert_same(
            linear_cross_entropy(hidden, weight, targets) * scale,
            F.cross_entropy(hidden @ weight.T, targets, reduction="sum") * scale,
            (hidden, weight),
        )


@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_ignored_targets_count_nothing(problem, ignore_index):
    hidden, weight, targets = problem
    targets = torch.where(torch.arange(len(targets)) % 3 == 1, ignore_index, targets)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=ignore_index)
    assert_same(
        linear_cross_entropy(hidden, weight, targets, ignore_index), plain, (hidden, weight)
    )
    all_ignored = linear_cross_entropy(
        hidden, weight, torch.full_like(targets, ignore_index), ignore_index
    )
    assert all_ignored == 0 and not torch.autograd.grad(all_ignored, weight)[0].any()


def test_cross_entropy_of_one_needed_gradient(problem):
    """A frozen input gets none, the other is right."""
    hidden, weight, targets = problem
    for frozen in (0, 1):
        inputs = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, weight))]
        plain = F.cross_entropy(inputs[0] @ inputs[1].T, targets, reduction="sum")
        assert_same(linear_cross_entropy(*inputs, targets), plain, [inputs[1 - frozen]])
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), plain)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_linear_logprobs(problem, temperature):
    hidden, weight, targets = problem
    plain = (hidden @ weight.T / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours = linear_logprobs(hidden, weight, targets, temperature)
    assert_same(ours, plain, (hidden, weight), rand(len(targets)))  # another weight for each token
    assert_same(ours.exp().sum(), plain.exp().sum(), (hidden, weight))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_losses_of_lower_types(problem, dtype, tolerance):
    """fp32 results whatever the inputs; gradients in the inputs' type."""
    hidden, weight, targets = problem
    inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    plain = (wide[0] @ wide[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for ours in (linear_cross_entropy(*inputs, targets), -linear_logprobs(*inputs, targets).sum()):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), -plain.sum(), rtol=tolerance, atol=tolerance)
        grads, exact = (
            torch.autograd.grad(ours, inputs),
            torch.autograd.grad(-plain.sum(), wide, retain_graph=True),
        )
        for d_ours, d_plain in zip(grads, exact):
            assert d_ours.dtype == dtype
            assert (d_ours.double() - d_plain).norm() < tolerance * d_plain.norm()


# ---- entropy and divergences, in float64


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_linear_logprobs_entropy(problem, temperature):
    hidden, weight, targets = problem
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    plain = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    ours = linear_logprobs_entropy(hidden, weight, targets, temperature)
    d = rand(len(targets) + 1)[1:], rand(len(targets) + 2)[2:]
    for i in (0, 1):  # each alone, and both together in a product of the two
        assert_same(ours[i], plain[i], (hidden, weight), d[i])
    assert_same(
        (ours[0].exp() * ours[1]).sum(), (plain[0].exp() * plain[1]).sum(), (hidden, weight)
    )
    assert torch.equal(ours[0], linear_logprobs(hidden, weight, targets, temperature))


def linear_kl(
    hidden, weight, teacher_hidden, teacher_weight, beta=0.0, temperature=1.0, kernels="auto"
):
    """The divergence of linear_logprobs_kl alone."""
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    return linear_logprobs_kl(
        hidden, weight, targets, teacher_hidden, teacher_weight, beta, temperature, kernels
    )[1]


def plain_kl(hidden, weight, teacher_hidden, teacher_weight, beta, temperature):
    """The definition, in probabilities."""
    q = (hidden @ weight.T / temperature).softmax(-1)
    p = (teacher_hidden @ teacher_weight.T / temperature).softmax(-1).detach()
    m = beta * p + (1 - beta) * q
    kl = lambda a, b: (a * (a / b).log()).sum(-1)
    return {0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_linear_kl(problem, beta, temperature):
    hidden, weight, _ = problem
    teacher = (
        rand(len(hidden), 5).requires_grad_(),
        rand(len(weight), 5).requires_grad_(),
    )  # of another width
    ours = linear_kl(hidden, weight, *teacher, beta, temperature)
    plain = plain_kl(hidden, weight, *teacher, beta, temperature)
    assert_same(ours, plain, (hidden, weight), rand(len(hidden) + 1)[1:])
    assert torch.autograd.grad(ours.sum(), teacher, allow_unused=True) == (None, None)


@pytest.mark.parametrize("beta", BETAS)
def test_linear_kl_is_what_trl_computes(problem, beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    hidden, weight, _ = problem
    teacher = rand(len(hidden), 5), rand(len(weight), 5)
    logits = (hidden @ weight.T)[None], (teacher[0] @ teacher[1].T)[None]
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        *logits, beta=beta, temperature=2.0, reduction="sum"
    )
    assert_same(linear_kl(hidden, weight, *teacher, beta, 2.0).sum(), theirs, (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_linear_logprobs_kl(problem, beta, temperature):
    """Each result alone, and both in a product of the two."""
    hidden, weight, targets = problem
    teacher = rand(len(hidden), 5).requires_grad_(), rand(len(weight), 5).requires_grad_()
    ours = linear_logprobs_kl(hidden, weight, targets, *teacher, beta, temperature)
    plain = (
        (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0],
        plain_kl(hidden, weight, *teacher, beta, temperature),
    )
    assert torch.equal(ours[0], linear_logprobs(hidden, weight, targets))
    for i in (0, 1):
        assert_same(ours[i], plain[i], (hidden, weight), rand(len(targets) + 1 + i)[1 + i :])
    assert_same(
        (ours[0].exp() * ours[1].square()).sum(),
        (plain[0].exp() * plain[1].square()).sum(),
        (hidden, weight),
    )
    assert torch.autograd.grad(ours[1].sum(), teacher, allow_unused=True) == (None, None)


@pytest.mark.parametrize("kernels", BACK_ENDS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_linear_logprobs_kl_of_lower_types(dtype, tolerance, kernels):
    inputs = small(dtype, N=5)
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]
    for beta in (0.0, 0.5, 1.0):
        ours, plain = (
            linear_logprobs_kl(*inputs, beta, 2.0, kernels),
            linear_logprobs_kl(*wide, beta, 2.0),
        )
        for x, exact in zip(ours, plain):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.double(), exact, rtol=tolerance, atol=tolerance)
        d = [
            torch.autograd.grad((x[0].exp() * x[1].square()).sum(), y[:2])
            for x, y in ((ours, inputs), (plain, wide))
        ]
        for d_ours, d_plain in zip(*d):
            assert d_ours.dtype == dtype
            assert (d_ours.double() - d_plain).norm() < tolerance * d_plain.norm()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_linear_logprobs_kl_is_what_torch_and_trl_compute(problem, beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    hidden, weight, targets = problem
    teacher = rand(len(hidden), 5), rand(len(weight), 5)
    logits = hidden @ weight.T
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        logits[None],
        (teacher[0] @ teacher[1].T)[None],
        beta=beta,
        temperature=2.0,
        reduction="none",
    )[0].sum(-1)
    logprobs, divergence = linear_logprobs_kl(hidden, weight, targets, *teacher, beta, 2.0)
    assert_same(
        divergence.square().sum() - 0.3 * logprobs.sum(),
        theirs.square().sum() + 0.3 * F.cross_entropy(logits, targets, reduction="sum"),
        (hidden, weight),
    )


def plain_topk_kl(hidden, weight, ids, logprobs):
    """The definition, over k + 1 buckets."""
    q = (hidden @ weight.T).softmax(-1)
    is_tail = torch.ones_like(q).scatter(1, ids, 0)
    q = torch.cat((q.gather(1, ids), (q * is_tail).sum(-1, keepdim=True)), 1)
    p = torch.cat((logprobs.exp(), 1 - logprobs.exp().sum(-1, keepdim=True)), 1)
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


@pytest.mark.parametrize("k", [1, 5, 36])
def test_linear_topk_kl(problem, k):
    hidden, weight, _ = problem
    teacher = rand(len(hidden), 5), rand(len(weight), 5)
    ids, logprobs = teacher_topk(*teacher, k)
    ours, plain = (f(hidden, weight, ids, logprobs) for f in (linear_topk_kl, plain_topk_kl))
    assert_same(ours, plain, (hidden, weight), rand(len(hidden) + 1)[1:])
    assert_same(ours.square().sum(), plain.square().sum(), (hidden, weight))


def test_linear_topk_kl_of_all_tokens_is_the_kl(problem):
    hidden, weight, _ = problem
    teacher = rand(len(hidden), 5), rand(len(weight), 5)
    ours = linear_topk_kl(hidden, weight, *teacher_topk(*teacher, len(weight)))
    assert_same(
        ours, linear_kl(hidden, weight, *teacher), (hidden, weight), rand(len(hidden) + 1)[1:]
    )


def test_linear_topk_kl_bounds_the_kl_from_below(problem):
    """The more tokens are known, the higher; 0 of the teacher itself."""
    hidden, weight, _ = problem
    teacher = rand(len(hidden), 5), rand(len(weight), 5)
    each = [
        linear_topk_kl(hidden, weight, *teacher_topk(*teacher, k)) for k in (1, 2, 4, 8, 16, 32, 36)
    ]
    for smaller, larger in zip(
        [torch.zeros(len(hidden)), *each], [*each, linear_kl(hidden, weight, *teacher)]
    ):
        assert (smaller <= larger + 1e-12).all()
    assert (each[0] < each[-1] - 1e-3).any()
    assert linear_topk_kl(hidden, weight, *teacher_topk(hidden, weight, 4)).abs().max() < 1e-12


def test_gradcheck_of_linear_topk_kl():
    hidden, weight, *_, teacher_hidden, teacher_weight = small(torch.float64)
    for k in (1, 3, 70):
        top = teacher_topk(teacher_hidden, teacher_weight, k)
        assert torch.autograd.gradcheck(lambda h, w: linear_topk_kl(h, w, *top), (hidden, weight))
        assert torch.autograd.gradcheck(
            lambda h, w: linear_topk_kl(h, w, top[0], top[1] + 0.5), (hidden, weight)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_linear_topk_kl_stays_finite(dtype):
    """Of a teacher without a tail, or sure of one token, and a student that is sure of one, of
    either side."""
    hidden, weight, *_, teacher_hidden, teacher_weight = small(dtype)
    for scale, k in itertools.product((0.0, 1.0, 1e4), (1, 3, 69, 70)):
        ids, logprobs = teacher_topk(teacher_hidden * scale, teacher_weight, k)
        for given, student in itertools.product(
            (logprobs, logprobs.half(), logprobs + 0.01), (1e-30, 1, 1e4, 1e8)
        ):
            out = linear_topk_kl(hidden * student, weight, ids, given)
            assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert out.isfinite().all()
            for d in torch.autograd.grad(out.sum(), (hidden, weight)):
                assert d.dtype == dtype and d.isfinite().all()


@pytest.mark.parametrize("tail", [-5.0, -300.0])
def test_linear_topk_kl_worked_by_hand(tail):
    """Teacher 1/2, of one token of three; the student's others have e^tail each, which fp32 has not
    at -300."""
    hidden, ids = torch.tensor([[0.0, tail, tail]]).requires_grad_(), torch.tensor([[0]])
    out = linear_topk_kl(hidden, torch.eye(3), ids, torch.tensor([[0.5]]).log())
    total = math.log1p(2 * math.exp(tail))
    torch.testing.assert_close(out, torch.tensor([total + (-tail - math.log(2)) / 2 - math.log(2)]))
    share = math.exp(tail - total) - 0.25
    torch.testing.assert_close(
        torch.autograd.grad(out, hidden)[0], torch.tensor([[-2 * share, share, share]])
    )


def test_teacher_topk(problem):
    hidden, weight, _ = problem
    expected = (hidden @ weight.T).log_softmax(-1).topk(4)
    ids, logprobs = teacher_topk(hidden, weight, 4)
    assert torch.equal(ids, expected.indices) and not logprobs.requires_grad
    torch.testing.assert_close(logprobs, expected.values.detach())
    for dtype in (torch.float32, torch.bfloat16):
        near = [x.detach().to(dtype) for x in (hidden, weight)]
        ids, logprobs = teacher_topk(*near, 4)
        assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
        exact = (near[0].double() @ near[1].double().T).log_softmax(-1).topk(4).values
        torch.testing.assert_close(
            logprobs.double(), exact, atol=6e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
        )


@pytest.mark.parametrize("kernels", BACK_ENDS)
def test_linear_kl_worked_by_hand(kernels):
    """Teacher (1/2, 1/2), student (1/4, 3/4): their mixture at beta 1/2 is (3/8, 5/8)."""
    eye, teacher, student = (
        torch.eye(2),
        torch.tensor([[0.5, 0.5]]).log(),
        torch.tensor([[0.25, 0.75]]).log(),
    )
    expected = {
        0: math.log(4 / 3) / 2,
        1: math.log(27 / 16) / 4,
        0.5: (math.log(16 / 15) / 2 + (math.log(2 / 3) + 3 * math.log(6 / 5)) / 4) / 2,
    }
    for beta, nats in expected.items():
        for temperature in (1.0, 2.0):
            ours = linear_kl(
                student * temperature, eye, teacher * temperature, eye, beta, temperature, kernels
            )
            torch.testing.assert_close(ours, torch.tensor([nats]))


@pytest.mark.parametrize("kernels", BACK_ENDS)
@pytest.mark.parametrize("beta", BETAS)
def test_no_divergence_of_a_distribution_from_itself(beta, kernels):
    hidden, weight = (rand(n, 8, dtype=torch.float32).requires_grad_() for n in (3, 100))
    ours = linear_kl(hidden, weight, hidden, weight, beta, 0.7, kernels)
    assert ours.abs().max() < 1e-7
    for grad in torch.autograd.grad(ours.sum(), (hidden, weight)):
        assert grad.abs().max() < 2e-6


# ---- the kernels


@pytest.mark.parametrize("part", [slice(1, None, 2), pytest.param(slice(None, None, 2),
                                                                   marks=pytest.mark.long)])
def test_kernels_agree_with_pytorch(part, monkeypatch):
    """Half of the cases, both types and strided ones among them; the others in the long tests."""
    cases = check.loss_cases(cross_entropy.BLOCK)
    monkeypatch.setattr(check, "loss_cases", lambda block: cases[part])
    findings = list(check.check_cross_entropy(cross_entropy))
    assert len(findings) > 80 and not [f for f in findings if not f.ok]


def losses(hidden, weight, targets, teacher_hidden, teacher_weight, kernels):
    """Every public loss, each made non-linear, in one number."""
    logprobs, entropy = linear_logprobs_entropy(hidden, weight, targets, 0.7, kernels)
    also, divergence = linear_logprobs_kl(
        hidden, weight, targets, teacher_hidden, teacher_weight, 0.5, 2.0, kernels
    )
    topk_kl = linear_topk_kl(hidden, weight, *teacher_topk(teacher_hidden, teacher_weight, 3))
    return (
        linear_cross_entropy(hidden, weight, targets, 3, kernels) / 7
        + (also.exp() * divergence).sum()
        + topk_kl.square().sum()
        + linear_logprobs(hidden, weight, targets, 1.3, kernels).exp().sum()
        + (logprobs.exp() * entropy).sum()
        + sum(
            linear_kl(hidden, weight, teacher_hidden, teacher_weight, beta, 2.0, kernels)
            .square()
            .sum()
            for beta in (0.0, 0.5, 1.0)
        )
    )


def small(dtype=torch.float32, N=4):
    hidden, weight = (
        rand(N, 6, dtype=dtype).requires_grad_(),
        rand(70, 6, dtype=dtype).requires_grad_(),
    )
    return (
        hidden,
        weight,
        torch.tensor([2, 3, 0, 69] * N)[:N],
        rand(N, 5, dtype=dtype),
        rand(70, 5, dtype=dtype),
    )


@pytest.mark.parametrize("kernels", BACK_ENDS)
@pytest.mark.parametrize("wrap", ["compiled", "recomputed", "no chunk"])
def test_losses_elsewhere(wrap, kernels):
    """Under torch.compile, without a graph break; under activation checkpointing; of no tokens."""
    tensors = small(N=0 if wrap == "no chunk" else 4)
    run = {
        "compiled": torch.compile(losses, fullgraph=True, backend="aot_eager"),
        "no chunk": losses,
        "recomputed": lambda *args: checkpoint(losses, *args, use_reentrant=False),
    }[wrap]
    assert_same(run(*tensors, kernels), losses(*tensors, "torch"), tensors[:2])


@pytest.mark.parametrize("by_triton", [False, True], ids=BACK_ENDS)
@pytest.mark.parametrize("needed", [
    [True, True],
    pytest.param([False, True], marks=pytest.mark.long),
    pytest.param([True, False], marks=pytest.mark.long),
    [False, False],
], ids=str)
def test_operators_are_what_they_are_registered_as(needed, by_triton):
    hidden, weight, targets, *teacher = small()
    hidden, weight = (x.detach().requires_grad_(need) for x, need in zip((hidden, weight), needed))
    d = rand(2, 4, dtype=torch.float32) if any(needed) else None
    top = teacher_topk(*teacher, 3)
    for op, args in (
        (cross_entropy.cross_entropy_op, (targets, -100, by_triton, needed)),
        (cross_entropy.logprobs_op, (targets, 0.7, True, by_triton, None, [False, False])),
        (cross_entropy.logprobs_op, (targets, 0.7, True, by_triton, d, needed)),
        (cross_entropy.logprobs_op, (targets, 0.7, False, by_triton, None, [False, False])),
        (
            cross_entropy.logprobs_kl_op,
            (targets, *teacher, 0.5, 0.7, by_triton, None, [False, False]),
        ),
        (cross_entropy.logprobs_kl_op, (targets, *teacher, 0.5, 0.7, by_triton, d, needed)),
        (cross_entropy.topk_kl_op, (*top, None, [False, False])),
        (cross_entropy.topk_kl_op, (*top, d if d is None else d[:1], needed)),
    ):
        torch.library.opcheck(op, (hidden, weight, *args))
        *_, d_hidden, d_weight = op(hidden, weight, *args)
        assert [d_hidden.numel() > 0, d_weight.numel() > 0] == args[
            -1
        ]  # a frozen input costs no product


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("kernels", BACK_ENDS)
def test_nan_shows_and_finite_logits_make_none(kernels):
    """A token's NaN makes its own results NaN, so that training can skip the step. What is finite
    stays finite."""
    hidden, weight, targets, *teacher = small()
    calls = [
        lambda h: linear_logprobs(h, weight, targets, 1.0, kernels),
        lambda h: linear_logprobs_entropy(h, weight, targets, 1.0, kernels)[1],
        *(lambda h, b=b: linear_kl(h, weight, *teacher, b, 1.0, kernels) for b in BETAS),
        lambda h: torch.stack(
            linear_logprobs_kl(h, weight, targets, *teacher, 0.5, 2.0, kernels)
        ).sum(0),
        lambda h: linear_topk_kl(h, weight, *teacher_topk(*teacher, 3)),
    ]
    bad = hidden.detach().clone()
    bad[1, 2] = float("nan")
    for call in calls:
        assert call(bad).isnan().tolist() == [False, True, False, False]
        for scale in (1e4, 1e8, 1e-30):
            out = call(hidden * scale)
            assert out.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (hidden, weight)))
    one = torch.zeros(1, 70)
    one[0, 5] = float("nan")  # one logit of many
    for d in (None, torch.ones(2, 1)):
        assert (
            cross_entropy.logprobs_rows(
                one.clone(), torch.tensor([0]), True, d, kernels == "triton"
            )
            .isnan()
            .all()
        )
        assert (
            cross_entropy.kl_rows(
                one.clone(),
                torch.zeros(1, 70),
                0.5,
                None if d is None else d[0],
                kernels == "triton",
            )
            .isnan()
            .all()
        )


def test_logits_whose_rows_lie_far_apart():
    """Offsets pass 2^31; in 32 bits the program would crash, so it is one of its own."""
    script = """
import torch
from kernels import cross_entropy
V, stride = 100, 2**30  # rows 0 to 4, of memory that is mapped when it is touched
far = torch.empty(4 * stride + V, dtype=torch.bfloat16).as_strided((5, V), (stride, 1))
near, other = (torch.randn(5, V).bfloat16() for _ in range(2))
targets, d = torch.arange(5) * 7, torch.randn(2, 5)
def results(rows):
    yield cross_entropy.logprobs_rows(rows.copy_(near), targets, True, d, True)
    yield rows.clone()
    yield cross_entropy.kl_rows(rows.copy_(near), other, 0.5, d[0], True)
    yield rows.clone()
    yield cross_entropy.kl_rows(other.clone(), rows.copy_(near), 0.5, d[0], True)
for a, b in zip(results(far), results(near.clone()), strict=True):
    assert torch.equal(a, b)
print("right")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "right\n", (done.returncode, done.stderr)


# ---- gradients made in the forward pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_cross_entropy_scales_its_gradients_with_one_rounding(dtype):
    """Twice, if the graph is kept; and by a factor that bf16 cannot hold."""
    hidden, weight, targets, *_ = small(dtype)
    loss = linear_cross_entropy(hidden, weight, targets)
    unscaled = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for factor in (1 / 3, 1.001):
        for d, scaled in zip(
            unscaled,
            torch.autograd.grad(
                loss, (hidden, weight), torch.full_like(loss, factor), retain_graph=True
            ),
        ):
            assert torch.equal(scaled, (d * torch.full_like(loss, factor)[None]).to(dtype))


def test_cross_entropy_without_gradients_makes_none(monkeypatch):
    def gradients(work, hidden, weight, needed):
        assert needed == [False, False]
        return over_chunks(work, hidden, weight, needed)

    over_chunks = cross_entropy.over_chunks
    monkeypatch.setattr(cross_entropy, "over_chunks", gradients)
    hidden, weight, targets, *_ = small()
    linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize(
    "loss",
    [linear_cross_entropy, lambda *args: linear_logprobs(*args).sum()],
    ids=["cross entropy", "logprobs"],
)
def test_weight_gradients_of_many_chunks_add_up_in_fp32(monkeypatch, loss):
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)
    N = 128 * 100
    hidden = (rand(N, 4) + 3).bfloat16()  # means far from 0: a bf16 sum would stop growing
    weight, targets = (
        rand(7, 4, dtype=torch.bfloat16).requires_grad_(),
        torch.zeros(N, dtype=torch.int64),
    )
    ours = torch.autograd.grad(loss(hidden, weight, targets), weight)[0].double()
    wide = weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(loss(hidden.double(), wide, targets), wide)[0]
    assert (ours - exact).norm() < 4e-3 * exact.norm()  # the last rounding alone is 2e-3


def test_double_backward_is_refused_not_wrong():
    hidden, weight, targets, *teacher = small()
    for out in (
        linear_cross_entropy(hidden, weight, targets),
        linear_logprobs(hidden, weight, targets).exp().sum(),
        linear_kl(hidden, weight, *teacher).square().sum(),
        linear_logprobs_kl(hidden, weight, targets, *teacher)[1].square().sum(),
        linear_topk_kl(hidden, weight, *teacher_topk(*teacher, 3)).square().sum(),
    ):
        with pytest.raises(RuntimeError):
            (grad,) = torch.autograd.grad(
                out, hidden, torch.ones((), requires_grad=True), create_graph=True
            )
            torch.autograd.grad(grad.sum(), weight)
