"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467), alone and with the residual add before it.

y = x / sqrt(mean(x^2) + eps) * w. The work is a handful of operations an element, so memory is the
limit: the kernels read each element once and write each result once. A program holds a whole row in
registers. The weight's gradient is a sum over all rows: each program adds up its own rows in fp32,
and one last sum in a fixed order joins the programs (no atomics: the same bits every time).

Shapes: N rows, C width, P programs. `python -m kernels.tools.check rms_norm` checks the kernels.
"""
import torch

from kernels import INTERPRETED, tl, triton, use_triton, with_last_dim_contiguous

MAX_WIDTH = 8192  # a row must fit a program's registers; wider ones are left to PyTorch


def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, eps: float, kernels: str = "auto") -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x (..., C) of any float type; weight (C,). Statistics in fp32 (float64 for float64 x), result in
    x's type.
    """
    if use_triton(x, kernels) and x.shape[-1] <= MAX_WIDTH:
        return forward_op(x, None, weight, eps)[0]
    return PlainRMSNorm.apply(x, None, weight, eps)


def add_rms_norm(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
        kernels: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual): the pair that a pre-norm block needs; all (...,
    C)."""
    if use_triton(x, kernels) and x.shape[-1] <= MAX_WIDTH:
        return forward_op(x, residual, weight, eps)[:2]
    return PlainRMSNorm.apply(x, residual, weight, eps)


class PlainRMSNorm(torch.autograd.Function):
    """The same by PyTorch. The backward pass is written out: autograd's would go through memory
    twice as often."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        total = x if residual is None else x + residual
        wide = total.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = (norm.square() / x.shape[-1] + eps).rsqrt()
        normed = (wide * rstd).type_as(x)
        ctx.save_for_backward(normed, rstd, weight)
        return normed * weight if residual is None else (normed * weight, total)

    @staticmethod
    def backward(ctx, dy, d_total=None):
        """dx = rstd * (g - n * mean(g * n)) with n = x * rstd and g = dy * w, and d_total on top of
        it."""
        normed, rstd, weight = ctx.saved_tensors
        product = dy * normed
        mean = (product @ weight.type_as(product))[..., None].type_as(normed) / normed.shape[-1]
        inner = torch.addcmul((dy * weight).type_as(normed), normed, mean, value=-1)
        rstd = rstd.type_as(normed)
        d_weight = product.flatten(0, -2).sum(0).type_as(weight)
        if d_total is None:
            return inner.mul_(rstd), None, d_weight, None
        dx = torch.addcmul(d_total, inner, rstd)
        return dx, dx, d_weight, None


# --------------------------------------------------------------------------------------------------
# Triton

@triton.jit
def rms_norm_forward(X, RESIDUAL, W, Y, TOTAL, RSTD, stride_x, stride_r, C, eps,
                     ADD: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program: Y and 1 / rms, and with ADD the sum that they are of. Y, TOTAL (N, C)
    contiguous; RSTD (N,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < C
    x = tl.load(X + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(RESIDUAL + row * stride_r + column, mask=inside, other=0.0).to(tl.float32)
        total = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + row * C + column, total, mask=inside)
        x = total.to(tl.float32)  # the norm is of what is stored
    rstd = tl.rsqrt(tl.sum(x * x, 0) / C + tl.cast(eps, tl.float32))
    w = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the weight, as Llama does.
    normed = (x * rstd).to(X.dtype.element_ty).to(tl.float32)
    tl.store(Y + row * C + column, (normed * w).to(Y.dtype.element_ty), mask=inside)
    tl.store(RSTD + row, rstd)


@triton.jit
def rms_norm_backward(DY, DTOTAL, X, W, RSTD, DX, DW, stride_dy, stride_dt, stride_x, N, C,
                      ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Rows p, p + P, p + 2P, ... of program p: DX (N, C), and its share of the weight's gradient in
    DW (P, C).

    With n = x * rstd and g = dy * w: dx = rstd * (g - n * mean(g * n)), and dw = sum over rows of
    dy * n. With ADD the gradient that reaches the sum by another way, DTOTAL, comes on top.
    """
    column = tl.arange(0, BLOCK)
    inside = column < C
    w = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        dy = tl.load(DY + row * stride_dy + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        n = x * tl.load(RSTD + row)
        g = dy * w
        dx = (g - n * (tl.sum(g * n, 0) / C)) * tl.load(RSTD + row)
        if ADD:
            dx += tl.load(DTOTAL + row * stride_dt + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * C + column, dx.to(DX.dtype.element_ty), mask=inside)
        dw += dy * n
    tl.store(DW + tl.program_id(0).to(tl.int64) * C + column, dw, mask=inside)


# --------------------------------------------------------------------------------------------------
# Launches, as operators that torch.compile, FSDP and activation checkpointing see as one node each

FORWARD, BACKWARD = 16, 8  # elements a thread: the backward pass keeps more of each in registers


def launch(C: int, elements: int) -> dict:
    """Block and warps for a width.

    A thread loads so many elements of each tensor, 8 of bf16 at once.
    """
    block = triton.next_power_of_2(C)
    return dict(BLOCK=block, num_warps=min(16, max(1, block // (32 * elements))))


def programs(N: int, device: torch.device) -> int:
    """P of the backward pass.

    Two per multiprocessor hide each other's latency and leave a short last sum.
    """
    if INTERPRETED:
        return min(N, 4)
    return min(N, 2 * torch.cuda.get_device_properties(device).multi_processor_count)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return with_last_dim_contiguous(x.reshape(-1, x.shape[-1]))


@torch.library.custom_op("nanobeige::rms_norm", mutates_args=())
def forward_op(
        x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor,
        eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, x + residual or an empty tensor, 1 / rms of each row in fp32)."""
    y, total, rstd = forward_fake(x, residual, weight, eps)
    rows, C = _rows(x), x.shape[-1]
    if len(rows):
        add = rows if residual is None else _rows(residual)
        rms_norm_forward[(len(rows),)](
            rows, add, weight.contiguous(), y, total, rstd, rows.stride(0), add.stride(0), C, eps,
            ADD=residual is not None, **launch(C, FORWARD))
    return y, total, rstd


@forward_op.register_fake
def forward_fake(x, residual, weight, eps):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    total = x.new_empty(0 if residual is None else x.shape)
    return y, total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("nanobeige::rms_norm_backward", mutates_args=())
def backward_op(
        dy: torch.Tensor, d_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor,
        rstd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of (x, weight), where x is what the norm was taken of."""
    dx, dw = backward_fake(dy, d_total, x, weight, rstd)
    rows, C = _rows(x), x.shape[-1]
    if not len(rows):
        return dx, dw.zero_()
    P = programs(len(rows), x.device)
    partial = torch.empty(P, C, device=x.device, dtype=torch.float32)
    dy = _rows(dy)
    add = dy if d_total is None else _rows(d_total)
    rms_norm_backward[(P,)](
        dy, add, rows, weight.contiguous(), rstd, dx, partial,
        dy.stride(0), add.stride(0), rows.stride(0), len(rows), C,
        ADD=d_total is not None, **launch(C, BACKWARD))
    return dx, partial.sum(0).to(weight.dtype)


@backward_op.register_fake
def backward_fake(dy, d_total, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, rstd)
    ctx.added = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, d_total, _):
    x, weight, rstd = ctx.saved_tensors
    if dy is None:  # only the sum was used
        return d_total, d_total, None, None
    dx, dw = backward_op(dy, d_total if ctx.added else None, x, weight, rstd)
    return dx, dx if ctx.added else None, dw, None


forward_op.register_autograd(_backward, setup_context=_save)
