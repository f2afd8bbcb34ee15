"""Losses from hidden states and the output matrix, without the (N, V) logits.

At V = 166144 the fp32 logits of 4096 tokens are 2.7 GB, and autograd holds them more than once. So
tokens go through in chunks: a chunk's logits, what is needed of them, the next chunk. The matrix
products are PyTorch's. What lies between them, sums over each row of logits and the gradient that
takes the row's place, is plain PyTorch, or a Triton program a row that goes through the vocabulary
in blocks and holds nothing of the logits' size beside them.

Shapes: N tokens (B * T), R of them in a chunk, C width, V vocabulary. Statistics and the weight's
gradient add up in fp32, or float64 for float64. `python -m kernels.tools.check cross_entropy`
checks the kernels, `python -m kernels.tools.memory` shows the memory.
"""
import math
from functools import partial
from typing import Callable

import torch
from torch import Tensor

from kernels import INTERPRETED, tl, triton, use_triton

CHUNK = 1 << 21  # logits held at once on the CPU: 8 MB in fp32, about what stays in its caches
CHUNK_GPU = 1 << 28  # 1 GB: chunks large enough that a matrix product fills the device
BLOCK_GPU = 4096  # logits of a row that a program holds at once
BLOCK = 64 if INTERPRETED else BLOCK_GPU  # the checks need several blocks


def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100,
        kernels: str = "auto", token_weights: Tensor | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats; a scalar, fp32.

    hidden (N, C), weight (V, C), targets (N,) int64. Tokens whose target is ignore_index do not
    count, others as token_weights (N,) fp32 says (None: 1 each). The sum, not the mean: the caller
    divides by the global number of trained tokens, over ranks and micro-batches alike.
    """
    needed = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    by_triton = use_triton(hidden, kernels)
    loss, _, _ = cross_entropy_op(
        hidden, weight, targets, ignore_index, by_triton, needed, token_weights)
    return loss


def linear_logprobs(
        hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
        kernels: str = "auto") -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[target] of each token: (N,) fp32, in nats.

    hidden (N, C), weight (V, C), targets (N,) int64, all valid.
    """
    by_triton = use_triton(hidden, kernels)
    results, _, _ = logprobs_op(
        hidden, weight, targets, temperature, False, by_triton, None, [False, False])
    return results[0]


def linear_logprobs_entropy(
        hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
        kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """(linear_logprobs, entropy of each token's distribution): both (N,) fp32, in nats.

    Both at the temperature.
    """
    by_triton = use_triton(hidden, kernels)
    results, _, _ = logprobs_op(
        hidden, weight, targets, temperature, True, by_triton, None, [False, False])
    return results[0], results[1]


def linear_logprobs_kl(
        hidden: Tensor, weight: Tensor, targets: Tensor,
        teacher_hidden: Tensor, teacher_weight: Tensor,
        beta: float = 0.0, temperature: float = 1.0,
        kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """(linear_logprobs at temperature 1, divergence at the given one): both (N,) fp32, in nats.

    The divergence says how far each token's student distribution q is from the teacher's p, over
    all of V: q of hidden (N, C) and weight (V, C), p of teacher_hidden (N, any) and teacher_weight
    (V, any), both with logits divided by the temperature; no factor of its square. The teacher gets
    no gradient. beta = 0: KL(p || q), forward. beta = 1: KL(q || p), reverse. Between:
    beta KL(p || m) + (1 - beta) KL(q || m) of the mixture m = beta p + (1 - beta) q, the
    generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649) as TRL writes it.

    For losses that need both of the same tokens: one product makes the student's logits for the
    two, and their gradients share the products that follow.
    """
    assert 0 <= beta <= 1, beta
    by_triton = use_triton(hidden, kernels)
    results, _, _ = logprobs_kl_op(
        hidden, weight, targets, teacher_hidden, teacher_weight, beta, temperature, by_triton,
        None, [False, False])
    return results[0], results[1]


def linear_topk_kl(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Forward KL(p || q) from a teacher known by its k most likely tokens: (N,) fp32, in nats.

    hidden (N, C), weight (V, C); ids (N, k) int64, distinct in a row; logprobs (N, k), any float
    type: those of ids under the teacher's whole softmax. What they leave of 1 is the probability of
    one bucket of all other tokens. To merge tokens cannot raise a divergence (data-processing
    inequality), so this is a lower bound of the full KL, and >= 0. Cut off at k the sum can be
    negative, and renormalised it would teach that the other tokens cannot occur. Plain PyTorch
    only: for a teacher that is served elsewhere, or whose answers are kept on disk.
    """
    results, _, _ = topk_kl_op(hidden, weight, ids, logprobs, None, [False, False])
    return results[0]


@torch.no_grad()
def teacher_topk(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids (N, k) int64, logprobs (N, k) fp32) of the k likeliest tokens, the first the likeliest.

    In nats, of the whole softmax of hidden (N, C) @ weight.T (C, V): what linear_topk_kl takes.
    """
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    logprobs = hidden.new_empty(len(hidden), k, dtype=wide_type(hidden))
    for rows in _chunks(hidden, weight):
        logits = logits_of(hidden[rows], weight, 1.0)
        top, ids[rows] = logits.topk(k)
        logprobs[rows] = top - logits.to(logprobs.dtype).logsumexp(-1, keepdim=True)
    return ids, logprobs


# --------------------------------------------------------------------------------------------------
# Chunks of tokens, and the matrix products

def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of tokens whose logits are about a chunk.

    In multiples of 128, or the matrix products starve.
    """
    chunk = CHUNK_GPU if hidden.is_cuda else CHUNK
    size = 128 * max(1, chunk // (128 * weight.shape[0]))
    return [slice(i, i + size) for i in range(0, hidden.shape[0], size)]


def over_chunks(
        work: Callable[[slice], Tensor], hidden: Tensor, weight: Tensor,
        needed: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of (hidden, weight), empty where not needed.

    work: makes the gradient of a slice of the logits, (R, V).
    """
    need_hidden, need_weight = needed
    d_hidden, d_weight = hidden.new_empty(0), weight.new_empty(0)
    if need_hidden:
        d_hidden = torch.empty_like(hidden)
    if need_weight:
        d_weight = torch.zeros_like(weight, dtype=wide_type(weight))
    for rows in _chunks(hidden, weight):
        d_logits = work(rows)
        if need_hidden:
            d_hidden[rows] = d_logits @ weight
        if need_weight:
            add_product(d_weight, d_logits.T, hidden[rows])
        del d_logits  # before the next chunk's logits are made
    return d_hidden, d_weight.to(weight.dtype)


def logits_of(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """hidden @ weight.T / temperature (R, V), in hidden's type. The product itself scales, before
    its one rounding."""
    return torch.addmm(hidden.new_empty(()), hidden, weight.T, beta=0, alpha=1 / temperature)


def wide_logits_of(hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
    """logits_of in fp32 where a GPU can, for what decides log-probabilities: bf16 has a resolution
    of 0.125 at 16, so that sampler and trainer would differ by hundredths of a nat per token."""
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32).div_(temperature)
    return logits_of(hidden, weight, temperature)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b as one product: no second (V, C), and the total is read and written once.

    A GPU's product adds bf16 factors up into an fp32 total and never rounds to bf16; a CPU's
    cannot.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def wide_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------
# What lies between the products, in plain PyTorch, or the launch of a kernel

def logprobs_rows(
        logits: Tensor, targets: Tensor, with_entropy: bool, d: Tensor | None,
        by_triton: bool) -> Tensor:
    """(1, R): log p[target] of the rows of logits (R, V); (2, R) with_entropy: and their entropy H.

    With d, the gradient of these, that of the logits takes their place: d log p[target] / d logits
    = onehot - p, and dH / d logits = -p (log p + H).
    """
    results = logits.new_empty(1 + with_entropy, len(logits), dtype=wide_type(logits))
    if by_triton:
        results[0] = logits.gather(1, targets[:, None])[:, 0]
        logprobs_kernel[(len(logits),)](
            logits, targets, results, d, logits.stride(0), logits.shape[1],
            WITH_ENTROPY=with_entropy, **launch(logits))
        return results
    if d is not None:  # nobody reads the results again, and an entropy that only the log shows has
                       # no gradient
        with_entropy = with_entropy and bool(d[1].any())
    # Few passes over the logits, and in place: on a CPU they take as long as the product.
    z = logits.to(results.dtype)
    z -= z.amax(-1, keepdim=True)
    results[0] = z.gather(1, targets[:, None])[:, 0]
    p = z.exp() if with_entropy else z.exp_()
    total = p.sum(-1)
    log_total = total.log()
    results[0] -= log_total
    if with_entropy:
        # Finite, for 0 * log 0 to be 0; torch.special.entr is slow.
        z.clamp_(min=-1e30)
        results[1] = log_total - torch.linalg.vecdot(p, z) / total
    if d is not None:
        d_logprob = d[0, :, None]
        factor = d_logprob
        if with_entropy:
            log_p = z.sub_(log_total[:, None])
            factor = log_p.add_(results[1, :, None]).mul_(d[1, :, None]).add_(d_logprob)
        gradient = p.mul_(-factor / total[:, None])
        logits.copy_(gradient.scatter_add_(1, targets[:, None], d_logprob))
    return results


def kl_rows(
        q: Tensor, p: Tensor, beta: float, d_divergence: Tensor | None, by_triton: bool) -> Tensor:
    """Divergence D of each row of student logits q from teacher logits p (R, V): (R,).

    With d_divergence (R,), the gradient of the student's logits takes their place: s - q sum(s),
    where s = q dD/dq.
    """
    if by_triton:
        divergence = q.new_empty(len(q), dtype=torch.float32)
        kl_kernel[(len(q),)](
            q, p, divergence, d_divergence, q.stride(0), p.stride(0), q.shape[1],
            BETA=beta, **launch(q))
        return divergence
    log_q, log_p = (x.to(wide_type(q)).log_softmax(-1) for x in (q, p))
    parts, s = kl_terms(log_q, log_p, beta)
    if d_divergence is not None:
        q.copy_((s - log_q.exp() * s.sum(-1, keepdim=True)) * d_divergence[:, None])
    return parts.sum(-1)


def kl_terms(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Each token's part of D, and q dD/dq up to a multiple of q, which the gradient of the logits
    does not see."""
    q, p = log_q.exp(), log_p.exp()
    if beta == 0:
        return p * (log_p - log_q), -p
    if beta == 1:
        return q * (log_q - log_p), q * (log_q - log_p)
    log_m = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
    s = (1 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + s, s


def topk_kl_rows(logits: Tensor, ids: Tensor, logprobs: Tensor, d: Tensor | None) -> Tensor:
    """linear_topk_kl of each row of the student's logits (R, V): (R,).

    It is the full KL from a teacher that shares its tail out as the student does. So is the
    gradient, q - p of that p, which takes the logits' place with d (R,), the gradient of the
    results.
    """
    log_q = logits.to(wide_type(logits)).log_softmax(-1)
    tail = log_q.scatter(1, ids, float("-inf"))
    # Not log(1 - the others' sum): this keeps its digits near 0, and below.
    log_q_tail = tail.logsumexp(-1, keepdim=True)
    p = logprobs.to(log_q.dtype).exp()
    p_tail = (1 - p.sum(-1, keepdim=True)).clamp(min=0)
    p_tail *= ids.shape[1] < logits.shape[1]  # no tail, no mass, though rounding may leave some
    buckets = torch.cat((p, p_tail), 1)
    finite = log_q_tail.clamp(min=torch.finfo(log_q.dtype).min)  # for 0 * log 0 to be 0
    log_q_buckets = torch.cat((log_q.gather(1, ids), finite), 1)
    if d is not None:
        p_full = tail.softmax(-1).mul_(p_tail).scatter_(1, ids, p)
        total = buckets.sum(-1, keepdim=True)  # 1, or above it by the rounding of logprobs
        logits.copy_(log_q.exp_().mul_(total).sub_(p_full).mul_(d[:, None]))
    return (torch.xlogy(buckets, buckets) - buckets * log_q_buckets).sum(-1)


# --------------------------------------------------------------------------------------------------
# Triton: a program a row

def launch(logits: Tensor) -> dict:
    """Block and warps: 16 logits a thread."""
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    return dict(BLOCK=block, num_warps=max(1, block // 512))


@triton.jit
def at(X, stride, column):
    """Where the columns of the program's row are. Its offset may pass 2^31."""
    return X + tl.program_id(0).to(tl.int64) * stride + column


@triton.jit
def minus(X, top, stride, column, V):
    """The row's logits less top, in fp32; from V on, and at the least, -1e30: finite, for 0 * log 0
    to be 0."""
    x = tl.load(at(X, stride, column), mask=column < V, other=float("-inf")).to(tl.float32) - top
    return tl.where(x < -1e30, -1e30, x)  # not tl.maximum: on a GPU it hides NaN


@triton.jit
def row_sums(X, stride, V, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """(top, log total, entropy) of the program's row in one pass; a logit x has log p = x - top -
    log total.

    top is the largest x, total the sum of e^(x - top), weighted that of (x - top) e^(x - top): of
    those seen so far.
    """
    top, total, weighted = -1e30, 0.0, 0.0
    for start in tl.range(0, V, BLOCK):
        x = minus(X, 0.0, stride, start + tl.arange(0, BLOCK), V)
        new_top = tl.maximum(top, tl.max(x, 0))
        # Relative to the new top, what came before is less by -drop.
        x, drop = x - new_top, top - new_top
        if WITH_ENTROPY:
            weighted = (tl.exp(drop) * weighted + drop * tl.exp(drop) * total
                        + tl.sum(x * tl.exp(x), 0))
        total = tl.exp(drop) * total + tl.sum(tl.exp(x), 0)
        top = new_top
    return top, tl.log(total), tl.log(total) - weighted / total


@triton.jit
def logprobs_kernel(
        X, TARGETS, RESULTS, D, stride, V, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """See logprobs_rows. RESULTS (1 or 2, R): the target's logit becomes its log p; entropy."""
    row, R = tl.program_id(0), tl.num_programs(0)
    top, log_total, entropy = row_sums(X, stride, V, WITH_ENTROPY, BLOCK)
    tl.store(RESULTS + row, tl.load(RESULTS + row) - top - log_total)
    if WITH_ENTROPY:
        tl.store(RESULTS + R + row, entropy)
    if D is not None:
        target = tl.load(TARGETS + row)
        for start in tl.range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            log_p = minus(X, top, stride, column, V) - log_total
            d = tl.load(D + row) * (tl.where(column == target, 1.0, 0.0) - tl.exp(log_p))
            if WITH_ENTROPY:
                d -= tl.load(D + R + row) * tl.exp(log_p) * (log_p + entropy)
            tl.store(at(X, stride, column), d.to(X.dtype.element_ty), mask=column < V)


@triton.jit
def kl_kernel(
        Q, P, DIVERGENCE, D, stride_q, stride_p, V, BETA: tl.constexpr, BLOCK: tl.constexpr):
    """See kl_rows."""
    row = tl.program_id(0)
    top_q, log_total_q, _q = row_sums(Q, stride_q, V, False, BLOCK)
    top_p, log_total_p, _p = row_sums(P, stride_p, V, False, BLOCK)
    divergence, s_sum = 0.0, 0.0
    for start in tl.range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        log_q = minus(Q, top_q, stride_q, column, V) - log_total_q
        log_p = minus(P, top_p, stride_p, column, V) - log_total_p
        parts, s = kl_terms_triton(log_q, log_p, BETA)
        divergence += tl.sum(parts, 0)
        s_sum += tl.sum(s, 0)
    tl.store(DIVERGENCE + row, divergence)
    if D is not None:
        for start in tl.range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            log_q = minus(Q, top_q, stride_q, column, V) - log_total_q
            log_p = minus(P, top_p, stride_p, column, V) - log_total_p
            s = kl_terms_triton(log_q, log_p, BETA)[1]
            d = tl.load(D + row) * (s - tl.exp(log_q) * s_sum)
            tl.store(at(Q, stride_q, column), d.to(Q.dtype.element_ty), mask=column < V)


@triton.jit
def kl_terms_triton(log_q, log_p, BETA: tl.constexpr):
    """kl_terms; log(m / max(p, q)) is what keeps its digits where p and q are far apart."""
    q, p, log_ratio = tl.exp(log_q), tl.exp(log_p), log_p - log_q
    if BETA == 0:
        parts, s = p * log_ratio, -p
    elif BETA == 1:
        parts, s = -q * log_ratio, -q * log_ratio
    else:
        p_over, p_under = tl.maximum(log_ratio, 0.0), tl.minimum(log_ratio, 0.0)
        log_m = tl.log((1 - BETA) * tl.exp(-p_over) + BETA * tl.exp(p_under))
        s = (1 - BETA) * q * (-p_over - log_m)
        parts = BETA * p * (p_under - log_m) + s
    return parts, s


# --------------------------------------------------------------------------------------------------
# Operators that torch.compile, FSDP and activation checkpointing see as one node each. Given
# d_results, the gradient of its results, an operator also returns those of hidden and weight, where
# needed: so it is its own backward pass.

@torch.library.custom_op("nanobeige::linear_logprobs", mutates_args=())
def logprobs_op(
        hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool,
        by_triton: bool, d_results: Tensor | None,
        needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Results (1, N): log-probabilities; (2, N) with_entropy: and entropies."""
    results = _results(hidden, 1 + with_entropy)

    def work(rows):
        logits = wide_logits_of(hidden[rows], weight, temperature)
        d = None
        if d_results is not None:
            d = (d_results[:, rows] / temperature).contiguous()
        results[:, rows] = logprobs_rows(
            logits, targets[rows].contiguous(), with_entropy, d, by_triton)
        return logits.to(hidden.dtype)

    return results, *over_chunks(work, hidden, weight, needed)


@logprobs_op.register_fake
def _(hidden, weight, targets, temperature, with_entropy, by_triton, d_results, needed):
    return _results(hidden, 1 + with_entropy), *_gradients(hidden, weight, needed)


@torch.library.custom_op("nanobeige::linear_logprobs_kl", mutates_args=())
def logprobs_kl_op(
        hidden: Tensor, weight: Tensor, targets: Tensor,
        teacher_hidden: Tensor, teacher_weight: Tensor,
        beta: float, temperature: float, by_triton: bool, d_results: Tensor | None,
        needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Results (2, N): log-probabilities, divergences."""
    results = _results(hidden, 2)

    def work(rows):
        logits = logits_of(hidden[rows], weight, 1.0)
        q = logits / temperature  # a copy also at 1: each of the two takes its gradient
        p = logits_of(teacher_hidden[rows], teacher_weight, temperature)
        d, d_divergence = None, None
        if d_results is not None:
            d = d_results[:1, rows].contiguous()
            d_divergence = (d_results[1, rows] / temperature).contiguous()
        results[:1, rows] = logprobs_rows(logits, targets[rows].contiguous(), False, d, by_triton)
        results[1, rows] = kl_rows(q, p, beta, d_divergence, by_triton)
        return logits.add_(q)

    return results, *over_chunks(work, hidden, weight, needed)


@logprobs_kl_op.register_fake
def _(hidden, weight, targets, teacher_hidden, teacher_weight, beta, temperature, by_triton,
      d_results, needed):
    return _results(hidden, 2), *_gradients(hidden, weight, needed)


@torch.library.custom_op("nanobeige::linear_topk_kl", mutates_args=())
def topk_kl_op(
        hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, d_results: Tensor | None,
        needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Results (1, N): divergences."""
    results = _results(hidden, 1)

    def work(rows):
        logits = logits_of(hidden[rows], weight, 1.0)
        d = None if d_results is None else d_results[0, rows]
        results[0, rows] = topk_kl_rows(logits, ids[rows], logprobs[rows], d)
        return logits

    return results, *over_chunks(work, hidden, weight, needed)


@topk_kl_op.register_fake
def _(hidden, weight, ids, logprobs, d_results, needed):
    return _results(hidden, 1), *_gradients(hidden, weight, needed)


def _save(ctx, inputs, output):
    *inputs, _, _ = inputs  # less d_results, needed
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.options = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.mark_non_differentiable(*output[1:])


def _backward(op, ctx, d_results, *_):
    """The results may be used non-linearly, in ratios or margins: only here are gradients known, so
    logits are made again."""
    needed = ctx.needs_input_grad[:2]
    _, *gradients = op(*ctx.saved_tensors, *ctx.options, d_results, needed)
    return _where_needed(ctx, gradients)


for op in (logprobs_op, logprobs_kl_op, topk_kl_op):
    op.register_autograd(partial(_backward, op), setup_context=_save)


@torch.library.custom_op("nanobeige::linear_cross_entropy", mutates_args=())
def cross_entropy_op(
        hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, by_triton: bool,
        needed: list[bool],
        token_weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradients of hidden and weight). They are known up to a factor, as the loss is a
    sum: so they are made here, while a chunk's logits are at hand, and no logits are made twice."""
    kept = targets != ignore_index
    index = targets.where(kept, 0)
    counts = kept if token_weights is None else kept * token_weights
    d_logprobs = -counts[None].to(wide_type(hidden)) if any(needed) else None
    logprobs, *gradients = logprobs_op(
        hidden, weight, index, 1.0, False, by_triton, d_logprobs, needed)
    return -(logprobs * counts).sum(), *gradients


@cross_entropy_op.register_fake
def _(hidden, weight, targets, ignore_index, by_triton, needed, token_weights=None):
    return _results(hidden, 1).sum(), *_gradients(hidden, weight, needed)


def _save_cross_entropy(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros as gradients of the gradients


def _backward_cross_entropy(ctx, d_loss, *_):
    gradients = []
    for d in ctx.saved_tensors:
        # Into out: a bf16 gradient times an fp32 factor, rounded once.
        gradients.append(torch.mul(d, d_loss[None], out=torch.empty_like(d)))
    return _where_needed(ctx, gradients)


cross_entropy_op.register_autograd(_backward_cross_entropy, setup_context=_save_cross_entropy)


def _results(hidden: Tensor, n: int) -> Tensor:
    return hidden.new_empty(n, len(hidden), dtype=wide_type(hidden))


def _gradients(hidden: Tensor, weight: Tensor, needed: list[bool]) -> list[Tensor]:
    return [torch.empty_like(x) if need else x.new_empty(0)
            for x, need in zip((hidden, weight), needed)]


def _where_needed(ctx, gradients) -> tuple[Tensor | None, ...]:
    """Those of hidden and weight, and None for the other arguments."""
    d_hidden, d_weight = (d if need else None for d, need in zip(gradients, ctx.needs_input_grad))
    return d_hidden, d_weight, *[None] * (len(ctx.needs_input_grad) - 2)
