"""Are the kernels right? Each against PyTorch in float64, on a GPU or in Triton's interpreter.

The rule is FlashAttention's: an error against float64 of at most twice that of PyTorch's own result in the same type,
and one rounding of the largest value. It adapts to every shape and type, and leaves no constant to be tuned until a
test passes. In the interpreter every launch is also guarded: what lies around and between the tensors' elements is
NaN, so a load or store outside of them shows.
"""
import contextlib
import sys
from dataclasses import dataclass
from typing import Callable, Iterator

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 16 * 2**-24}


@dataclass
class Finding:
    what: str
    error: float  # largest absolute error against float64; NaN is wrong
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def compare(what: str, ours: Callable, plain: Callable, inputs: list[torch.Tensor],
            d_outs: list[torch.Tensor | None]) -> Iterator[Finding]:
    """A Finding for each output and gradient of ours(*inputs), for given gradients of the outputs (None: not used).

    plain: the same function in PyTorch; run in the inputs' type it sets the bound, run in float64 it is the truth.
    Inputs that are not floating point, or None, have no gradient.
    """
    def run(function, dtype):
        args = [x if x is None or not x.is_floating_point() else
                x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        outs = function(*args)
        outs = outs if isinstance(outs, tuple) else (outs,)
        wrt = [x for x in args if x is not None and x.requires_grad]
        used = [(out, d.to(dtype or d.dtype)) for out, d in zip(outs, d_outs) if d is not None]
        grads = torch.autograd.grad([o for o, _ in used], wrt, [d for _, d in used], allow_unused=True)
        return [*outs, *(torch.zeros_like(x) if g is None else g for x, g in zip(wrt, grads))]

    with guards():
        mine = run(ours, None)
    names = [f"out {i}" for i in range(len(d_outs))] + [f"gradient {i}" for i in range(len(mine) - len(d_outs))]
    for name, got, low, exact in zip(names, mine, run(plain, None), run(plain, torch.float64)):
        assert got.dtype == low.dtype and got.shape == low.shape, (what, name, got.dtype, got.shape, low.dtype, low.shape)
        if exact.numel():
            largest = lambda x: (x.double() - exact).abs().max().item()
            bound = 2 * largest(low) + EPS[got.dtype] * exact.abs().max().item() + 1e-6
            yield Finding(f"{what}: {name}", largest(got), bound)


@contextlib.contextmanager
def guards():
    """While it holds, every launch in the interpreter works on copies of its tensors that lie in poisoned memory."""
    if not INTERPRETED:
        yield
        return
    executor = triton.runtime.interpreter.GridExecutor
    launch = executor.__call__

    def guarded(self, *args, **kwargs):
        copies = [_poisoned(a) if isinstance(a, torch.Tensor) and a.numel() else (a, None, None) for a in args]
        launch(self, *(copy for copy, _, _ in copies), **kwargs)
        for arg, (copy, around, before) in zip(args, copies):
            if around is not None:
                assert torch.equal(around[0][around[1]].isnan() if copy.is_floating_point() else
                                   around[0][around[1]], before), "a store outside of its tensor"
                _without_repeats(arg).copy_(_without_repeats(copy))

    executor.__call__ = guarded
    try:
        yield
    finally:
        executor.__call__ = launch


def _poisoned(x: torch.Tensor, pad: int = 4096):
    """A copy of x, strides and all, in a buffer of NaN (or 2^30): the copy, where the poison is, and what it looks like."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    buffer = torch.full((span + 2 * pad,), float("nan") if x.is_floating_point() else 2**30, dtype=x.dtype)
    outside = torch.ones(len(buffer), dtype=torch.bool)
    outside[pad:].as_strided(x.shape, x.stride()).fill_(False)
    copy = buffer[pad:].as_strided(x.shape, x.stride())
    _without_repeats(copy).copy_(_without_repeats(x))
    poison = buffer[outside]
    return copy, (buffer, outside), poison.isnan() if x.is_floating_point() else poison


def _without_repeats(x: torch.Tensor) -> torch.Tensor:
    """x with every dimension of stride 0 cut to one element: PyTorch does not write to elements that share memory."""
    for d in range(x.ndim):
        x = x.narrow(d, 0, 1) if x.stride(d) == 0 else x
    return x


def rand(*shape: int, dtype=torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


LAYOUTS = {  # gradients come in every layout: views of something wider, transposed, expanded from one number
    "contiguous": lambda x: x,
    "sliced": lambda x: F.pad(x, (3, 2))[..., 3:-2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "rows strided": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "expanded": lambda x: x.flatten()[:1].expand(x.shape),
    "one row": lambda x: x[:1].expand(x.shape),
}


def main(check: Callable[[object], Iterator[Finding]], module: str) -> None:
    """Prints what a check of a module finds, a line a case with the finding nearest its bound; exit code 1 if wrong."""
    print("on " + (torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU, in Triton's interpreter"))
    worst = {}
    for finding in check(sys.modules[module]):
        case = finding.what.rpartition(": ")[0]
        worst[case] = max(worst.get(case, finding), finding, key=lambda f: (not f.ok, f.error / f.bound))
    for case, f in worst.items():
        print(f"{'ok   ' if f.ok else 'WRONG'} {case:76} error at most {f.error / f.bound:4.0%} of the bound {f.bound:.0e}")
    bad = sum(not f.ok for f in worst.values())
    print(f"{len(worst)} cases, " + (f"{bad} wrong" if bad else "all right"))
    sys.exit(bool(bad))


# ---------------------------------------------------------------------------------------------------------------------
# The cases of each family

def rms_norm(kernels) -> Iterator[Finding]:
    """kernels: the module to check: kernels.rmsnorm, or a copy of it that something was done to."""

    def plain(x, residual, weight):
        total = x if residual is None else x + residual
        y = F.rms_norm(total.float() if x.dtype != torch.float64 else total, (x.shape[-1],), eps=1e-5).type_as(x) * weight
        return y if residual is None else (y, total)

    def ours(x, residual, weight):
        if residual is None:
            return kernels.rms_norm(x, weight, 1e-5, "triton")
        return kernels.add_rms_norm(x, residual, weight, 1e-5, "triton")

    for seed, (N, C, dtype, x_layout, d_layout, scale) in enumerate([
            (5, 32, torch.float32, "contiguous", "contiguous", 1.0), (7, 100, torch.float32, "sliced", "transposed", 1.0),
            (3, 1, torch.float32, "contiguous", "expanded", 1.0), (1, 2560, torch.float32, "contiguous", "sliced", 1e4),
            (6, 130, torch.bfloat16, "transposed", "sliced", 1.0), (4, 48, torch.bfloat16, "rows strided", "one row", 1e-4),
            (9, 64, torch.bfloat16, "one row", "rows strided", 1e3), (0, 16, torch.bfloat16, "contiguous", "contiguous", 1.0)]):
        tensors = [rand(N, C, dtype=dtype, seed=seed + i, scale=scale) for i in range(2)]
        x, residual = (LAYOUTS[x_layout](t) for t in tensors)
        weight = rand(C, dtype=dtype, seed=seed + 2)
        d = [LAYOUTS[d_layout](rand(N, C, dtype=dtype, seed=seed + 3 + i)) for i in range(2)]
        name = f"{N} x {C} {str(dtype)[6:]}, x {x_layout} * {scale:g}, gradient {d_layout}"
        yield from compare(f"rms_norm {name}", ours, plain, [x, None, weight], d[:1])
        for used in ([d[0], d[1]], [d[0], None], [None, d[1]])[:3 if seed < 2 else 1]:
            yield from compare(f"add_rms_norm {name}", ours, plain, [x, residual, weight], used)
    zero = torch.zeros(2, 8, device=DEVICE)
    yield from compare("rms_norm of zeros", ours, plain, [zero, None, rand(8)], [rand(2, 8)])
