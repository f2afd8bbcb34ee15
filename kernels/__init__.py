"""Hand-written Triton kernels, each beside the plain PyTorch that says what it computes.

`kernels="auto"`, an argument of every function here and a key of the model's config, takes Triton
on a GPU and PyTorch elsewhere; "triton" or "torch" takes one of them anywhere. Without a GPU,
Triton runs in its interpreter: right, and very slow. Each file is one family;
`python -m kernels.tools.check` checks them all.
"""
import os
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it while it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import triton
    import triton.language as tl
except ImportError:
    # A platform without Triton: kernels stay what they are, functions that nobody calls.
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=None)

KINDS = ("auto", "triton", "torch")


def use_triton(x: torch.Tensor, kernels: str) -> bool:
    """Whether a call on x goes to Triton; kernels: one of KINDS. float64 is always left to
    PyTorch."""
    assert kernels in KINDS, kernels
    by_triton = x.dtype != torch.float64 and (
        kernels == "triton" or kernels == "auto" and x.is_cuda)
    if by_triton and INTERPRETED:
        from kernels import interpreter  # noqa: F401  (makes its bfloat16 that of a GPU)
    return by_triton


def with_last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but in the last dimension; only there a copy is made (a stride
    of 0, say)."""
    return x if x.stride(-1) == 1 else x.contiguous()
