"""Launches in Triton's interpreter under guard: an access outside of every tensor shows.

While guards() holds, a launch works on copies of its tensors that lie in poisoned memory: what is
around and between their elements is NaN (2^30 for integers). A load or store outside of every
tensor is an AssertionError; a load between the rows of a tensor brings NaN into the results, a
store between them is seen after the launch.
"""
import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from kernels import INTERPRETED, triton

PAD = 4096  # elements of poison before and behind a tensor


@dataclass
class Poisoned:
    """A copy of a tensor, strides and all, in a buffer of poison."""
    original: torch.Tensor
    copy: torch.Tensor
    buffer: torch.Tensor
    outside: torch.Tensor  # (len(buffer),) bool: where the poison is

    @property
    def extent(self) -> tuple[int, int]:
        """Where the first element of the copy begins, and where the last one does."""
        first = self.copy.data_ptr()
        return first, first + (_span(self.copy) - 1) * self.copy.element_size()

    def copy_back(self) -> None:
        """Takes what the launch wrote to the original; AssertionError if it wrote elsewhere."""
        poison = self.buffer[self.outside]
        intact = poison.isnan() if self.copy.is_floating_point() else poison == 2**30
        assert intact.all(), "a store between rows"
        _without_repeats(self.original).copy_(_without_repeats(self.copy))


@contextlib.contextmanager
def guards():
    """Guards the launches in its block; without the interpreter it does nothing."""
    if not INTERPRETED:
        yield
        return
    executor = triton.runtime.interpreter.GridExecutor
    builder = triton.runtime.interpreter.InterpreterBuilder
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    extents = []  # of each tensor of this launch

    def assert_inside(pointers, mask) -> None:
        used = pointers.data[np.asarray(mask.data)]
        if used.size:
            low, high = used.min(), used.max()
            inside = [first <= low and high <= last for first, last in extents]
            assert any(inside), "an access outside of every tensor"

    def guarded_load(self, pointers, mask, *rest, **named):
        assert_inside(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def guarded_store(self, pointers, value, mask, *rest):
        assert_inside(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def guarded_launch(self, *args, **kwargs):
        poisoned, new_args = [], []
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.numel():
                poisoned.append(_poison(arg))
                arg = poisoned[-1].copy
            new_args.append(arg)
        extents[:] = [tensor.extent for tensor in poisoned]
        launch(self, *new_args, **kwargs)
        for tensor in poisoned:
            tensor.copy_back()

    executor.__call__ = guarded_launch
    builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
    try:
        yield
    finally:
        executor.__call__ = launch
        builder.create_masked_load, builder.create_masked_store = load, store


def _poison(x: torch.Tensor) -> Poisoned:
    poison = float("nan") if x.is_floating_point() else 2**30
    buffer = torch.full((_span(x) + 2 * PAD,), poison, dtype=x.dtype)
    outside = torch.ones(len(buffer), dtype=torch.bool)
    outside[PAD:].as_strided(x.shape, x.stride()).fill_(False)
    copy = buffer[PAD:].as_strided(x.shape, x.stride())
    _without_repeats(copy).copy_(_without_repeats(x))
    return Poisoned(x, copy, buffer, outside)


def _span(x: torch.Tensor) -> int:
    """Elements of memory from the first of x to the last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))


def _without_repeats(x: torch.Tensor) -> torch.Tensor:
    """x with every dimension of stride 0 cut to one element.

    PyTorch does not write to elements that share memory.
    """
    for dim in range(x.ndim):
        if x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    return x
