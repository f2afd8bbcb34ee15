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

import numpy as np
import torch
import torch.nn.functional as F

from kernels import INTERPRETED, triton
from kernels.tiles import Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 0  # of all inputs; the tests try several
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11,
       torch.float32: 2**-23 if INTERPRETED else 2**-21}  # a GPU's exp2 is good to two units in the last place


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
        grads = torch.autograd.grad([o for o, _ in used], wrt, [d for _, d in used], allow_unused=True) if used else ()
        return [*outs, *(torch.zeros_like(x) if g is None else g for x, g in zip(wrt, grads))]

    with guards():
        mine = run(ours, None)
    names = [f"out {i}" for i in range(len(d_outs))] + [f"gradient {i}" for i in range(len(mine) - len(d_outs))]
    for name, got, low, exact in zip(names, mine, run(plain, None), run(plain, torch.float64)):
        assert (got.dtype, got.shape) == (low.dtype, low.shape), (what, name, got.dtype, got.shape)
        if exact.numel():
            largest = lambda x: (x.double() - exact).abs().max().item()
            bound = 2 * largest(low) + EPS[got.dtype] * exact.abs().max().item() + 1e-7
            yield Finding(f"{what}: {name}", largest(got), bound)


@contextlib.contextmanager
def guards():
    """While it holds, launches in the interpreter work on copies of their tensors that lie in poisoned memory, and an
    access outside of every tensor is an AssertionError."""
    if not INTERPRETED:
        yield
        return
    executor, builder = triton.runtime.interpreter.GridExecutor, triton.runtime.interpreter.InterpreterBuilder
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    extents = []  # (first, last byte) of each tensor of this launch

    def inside(pointers, mask):
        used = pointers.data[np.asarray(mask.data)]
        if used.size:
            low, high = used.min(), used.max()
            assert any(first <= low and high <= last for first, last in extents), "an access outside of every tensor"

    def guarded_load(self, pointers, mask, *rest, **named):
        inside(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def guarded_store(self, pointers, value, mask, *rest):
        inside(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def guarded_launch(self, *args, **kwargs):
        copies = [_poisoned(a) if isinstance(a, torch.Tensor) and a.numel() else (a, None, None) for a in args]
        extents[:] = [(c.data_ptr(), c.data_ptr() + sum((n - 1) * step for n, step in zip(c.shape, c.stride()))
                       * c.element_size()) for c, around, _ in copies if around is not None]
        launch(self, *(copy for copy, _, _ in copies), **kwargs)
        for arg, (copy, around, before) in zip(args, copies):
            if around is not None:
                after = around[0][around[1]]
                assert torch.equal(after.isnan() if copy.is_floating_point() else after, before), "a store between rows"
                _without_repeats(arg).copy_(_without_repeats(copy))

    executor.__call__ = guarded_launch
    builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
    try:
        yield
    finally:
        executor.__call__, builder.create_masked_load, builder.create_masked_store = launch, load, store


def _poisoned(x: torch.Tensor, pad: int = 4096):
    """A copy of x, strides and all, in a buffer of NaN (or 2^30); where that poison is; and what it looks like."""
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
    generator = torch.Generator().manual_seed(1000 * SEED + seed + sum(shape))
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
        print(f"{'ok   ' if f.ok else 'WRONG'} {case:76} error at most {f.error / f.bound:4.0%} of {f.bound:.0e}")
    bad = sum(not f.ok for f in worst.values())
    print(f"{len(worst)} cases, " + (f"{bad} wrong" if bad else "all right"))
    sys.exit(bool(bad))


# ---------------------------------------------------------------------------------------------------------------------
# The cases of each family

def rms_norm(kernels) -> Iterator[Finding]:
    """kernels: the module to check: kernels.rmsnorm, or a copy of it that something was done to."""

    def plain(x, residual, weight):
        total = x if residual is None else x + residual
        wide = total if x.dtype == torch.float64 else total.float()
        y = F.rms_norm(wide, (x.shape[-1],), eps=1e-5).type_as(x) * weight
        return y if residual is None else (y, total)

    def ours(x, residual, weight):
        if residual is None:
            return kernels.rms_norm(x, weight, 1e-5, "triton")
        return kernels.add_rms_norm(x, residual, weight, 1e-5, "triton")

    for seed, (N, C, dtype, x_layout, d_layout, scale) in enumerate([
            (5, 32, torch.float32, "contiguous", "contiguous", 1.0),
            (7, 100, torch.float32, "sliced", "transposed", 1.0),
            (3, 1, torch.float32, "contiguous", "expanded", 1.0), (1, 2560, torch.float32, "contiguous", "sliced", 1e4),
            (6, 130, torch.bfloat16, "transposed", "sliced", 1.0),
            (4, 48, torch.bfloat16, "rows strided", "one row", 1e-4),
            (9, 64, torch.bfloat16, "one row", "rows strided", 1e3),
            (0, 16, torch.bfloat16, "contiguous", "contiguous", 1.0)]):
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
    yield from compare("rms_norm, bfloat16 with a weight of float32", ours, plain,
                       [rand(3, 20, dtype=torch.bfloat16), None, rand(20)], [rand(3, 20)])

def documents(B: int, T: int, S: int, cuts: list[list[int]]) -> torch.Tensor:
    """doc_start (B, T) of rows with a document beginning at 0 and at each of the cuts."""
    rows = [[max([0, *(c for c in row if c <= t)]) for t in range(S - T, S)] for row in cuts]
    assert len(rows) == B
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


ATTENTION = {  # B, T, S, H, K, D, cuts of each row or None; the first sees most mistakes, and is small
    "behind a cache, documents": (1, 19, 60, 2, 1, 16, [[10, 50]]),
    "4 queries a key, documents": (2, 36, 36, 4, 1, 16, [[7, 16, 33, 34], [25]]),
    "5 queries a key": (1, 33, 33, 5, 1, 16, None),
    "no documents": (2, 40, 40, 2, 2, 16, None),
    "one token": (2, 1, 1, 2, 1, 16, None),
    "one-token documents": (1, 37, 37, 2, 2, 16, [list(range(37))]),
    "a whole tile between two cut ones": (1, 100, 100, 1, 1, 16, [[3, 90]]),
    "head width 24, padded": (1, 17, 17, 2, 1, 24, [[5]]),
    "head width 64": (1, 20, 20, 2, 1, 64, None),
    "head width 128, documents": (1, 34, 34, 1, 1, 128, [[16]]),
    "behind a cache": (1, 19, 60, 2, 1, 16, None),
    "no rows": (0, 8, 8, 2, 1, 16, None),
}
ATTENTION_TYPES = {  # fp32 alone, but for these
    "head width 64": [torch.bfloat16], "head width 128, documents": [torch.bfloat16],
    "5 queries a key": [torch.float32, torch.float16], "4 queries a key, documents": [torch.float32, torch.bfloat16],
    "no documents": [torch.bfloat16], "one token": [torch.float32, torch.bfloat16]}
DECODING = {  # B, S, H, K, D, where each row's keys begin or None
    "decoding": (2, 37, 4, 2, 16, None),
    "decoding, unequal lengths, 5 queries a key": (4, 50, 5, 1, 16, [0, 13, 32, 49]),
    "decoding, several splits, head width 24": (2, 1100, 2, 2, 24, [0, 600]),
}


def attention(kernels) -> Iterator[Finding]:
    """kernels: kernels.attention, or a copy of it that something was done to."""
    for part in (masks, layouts, decoding, visits, specialized):
        yield from part(kernels)


def masks(kernels) -> Iterator[Finding]:
    """Attention at each of ATTENTION's shapes, forward and backward; and queries that see no key at all."""
    ours = lambda *qkv: kernels.attention(*qkv, kernels="triton")
    docs = torch.tensor([[0, 0, 4, 4, 4, 6]], dtype=torch.int32, device=DEVICE)  # 2, 3 and 5 see nothing
    q, k, v = (rand(1, 6, 1, 16, seed=i).requires_grad_() for i in range(3))
    o = ours(q, k, v, docs)
    dq, _, dv = torch.autograd.grad(o.sum(), (q, k, v))
    nothing = torch.stack([o[0, [2, 3, 5]], dq[0, [2, 3, 5]], dv[0, [2, 3, 5]]])
    yield Finding("queries that see nothing: zero, and zero gradients", nothing.abs().max().item(), 1e-30)
    for i, (name, (B, T, S, H, K, D, cuts)) in enumerate(ATTENTION.items()):
        docs = None if cuts is None else documents(B, T, S, cuts)
        for dtype in ATTENTION_TYPES.get(name, [torch.float32]):
            q, k, v, d_out = (rand(*shape, dtype=dtype, seed=i + n) for n, shape in
                              enumerate([(B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D)]))
            yield from compare(f"{name}, {str(dtype)[6:]}", ours, kernels.plain_attention, [q, k, v, docs], [d_out])


def layouts(kernels) -> Iterator[Finding]:
    """Strides of q, k, v and of the gradient; values that make the softmax a step, or flat."""
    ours = lambda *qkv: kernels.attention(*qkv, kernels="triton")
    B, T, H, K, D = 2, 20, 2, 2, 16
    docs = documents(B, T, T, [[4, 17], []])
    for layout, change in LAYOUTS.items():
        d_out = change(rand(B, T, H, D, seed=1))
        heads_first = [rand(B, n, T, D, seed=2).transpose(1, 2) for n in (H, K, K)]
        yield from compare(f"gradient {layout}, heads first", ours, kernels.plain_attention, [*heads_first, docs],
                           [d_out])
    q, k, v = rand(B, T, H + 2 * K, D, seed=3).split([H, K, K], 2)
    yield from compare("q, k, v side by side", ours, kernels.plain_attention, [q, k, v, docs],
                       [rand(B, T, H, D, seed=4)])
    for scale, dtype in ((300.0, torch.float32), (30.0, torch.bfloat16), (1e-4, torch.float32)):
        qkv = [rand(B, T, n, D, dtype=dtype, scale=scale, seed=5) for n in (H, K, K)]
        yield from compare(f"values of {scale:g}, {str(dtype)[6:]}", ours, kernels.plain_attention, [*qkv, docs],
                           [rand(B, T, H, D, dtype=dtype, seed=6)])


def decoding(kernels) -> Iterator[Finding]:
    """One query a row against a cache, without a gradient, at each of DECODING's shapes."""
    ours = torch.no_grad()(lambda *qkv: kernels.attention(*qkv, kernels="triton"))
    for name, (B, S, H, K, D, begin) in DECODING.items():
        docs = None if begin is None else torch.tensor(begin, dtype=torch.int32, device=DEVICE)[:, None]
        for dtype in (torch.float32, torch.bfloat16):
            qkv = [rand(*shape, dtype=dtype) for shape in ((B, 1, H, D), (B, S, K, D), (B, S, K, D))]
            yield from compare(f"{name}, {str(dtype)[6:]}", ours, kernels.plain_attention, [*qkv, docs], [None])


def specialized(kernels) -> Iterator[Finding]:
    """The warp-specialised forward: on a GPU tuning must choose it, so here it is asked for by name."""
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        return
    usual = kernels.tiles_for
    kernels.tiles_for = lambda kernel, *_: (Tiles(16, 16, 1, 1, True) if INTERPRETED else Tiles(128, 128, 4, 2, True)) \
        if kernel == "attention_forward" else usual(kernel, *_)
    try:
        for name in ("no documents", "5 queries a key", "4 queries a key, documents", "behind a cache, documents"):
            B, T, S, H, K, D, cuts = ATTENTION[name]
            T, S, D = T - T % 4, S - S % 4, D if INTERPRETED else 128  # TMA wants multiples of 16 bytes
            docs = None if cuts is None else documents(B, T, S, cuts)
            qkv = [rand(*shape, dtype=torch.bfloat16) for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, D))]
            yield from compare(f"specialized, {name}", lambda *a: kernels.attention(*a, kernels="triton"),
                               kernels.plain_attention, [*qkv, docs], [rand(B, T, H, D, dtype=torch.bfloat16)])
    finally:
        kernels.tiles_for = usual


def visits(kernels) -> Iterator[Finding]:
    """Products of tiles that the kernels make, against those of tiles in which some query sees some key."""
    if not INTERPRETED:
        return
    builder, made = triton.runtime.interpreter.InterpreterBuilder, []
    product = builder.create_dot
    builder.create_dot = lambda *args: made.append(1) or product(*args)
    try:
        for name in ("no documents", "4 queries a key, documents", "one-token documents", "behind a cache, documents"):
            B, T, S, H, K, D, cuts = ATTENTION[name]
            docs = None if cuts is None else documents(B, T, S, cuts)
            qkv = [rand(*shape).requires_grad_() for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, D))]
            key, query = torch.arange(S), torch.arange(S - T, S)[:, None]
            sees = (key <= query) & (key >= (0 if docs is None else docs.cpu()[:, :, None]))
            sees = F.pad(sees.expand(B, T, S), (0, -S % 16, 0, -T % 16)).unflatten(2, (-1, 16)).unflatten(1, (-1, 16))
            tiles, needed = sees.shape[1] * sees.shape[3] * B, int(sees.any(4).any(2).sum())
            o = kernels.attention(*qkv, docs, kernels="triton")
            yield Finding(f"visits, {name}: {needed} of {tiles} tiles forward", abs(len(made) - 2 * H * needed), 0.5)
            made.clear()
            o.sum().backward()  # 3 products a tile for dq, 4 for dk and dv
            yield Finding(f"visits, {name}: {needed} of {tiles} tiles backward", abs(len(made) - 7 * H * needed), 0.5)
            made.clear()
    finally:
        builder.create_dot = product


def cross_entropy(kernels) -> Iterator[Finding]:
    """kernels: the module to check: kernels.cross_entropy, or a copy of it that something was done to."""

    def log_softmax(hidden, weight, temperature):
        logits = torch.addmm(hidden.new_zeros(()), hidden, weight.T, beta=0, alpha=1 / temperature)
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

    def plain_cross_entropy(hidden, weight, targets):
        return F.nll_loss(log_softmax(hidden, weight, 1.0), targets, reduction="sum")

    def plain_logprobs(hidden, weight, targets, temperature):
        log_p = log_softmax(hidden, weight, temperature)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def plain_kl(hidden, weight, teacher_hidden, teacher_weight, beta, temperature):
        log_q = log_softmax(hidden, weight, temperature)
        log_p = log_softmax(teacher_hidden, teacher_weight, temperature).detach()
        kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
        if beta in (0, 1):
            return kl(log_q, log_p) if beta else kl(log_p, log_q)
        log_m = torch.stack([log_q + torch.tensor(1 - beta).log(), log_p + torch.tensor(beta).log()]).logsumexp(0)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

    several, fp32, bf16 = 2 * kernels.BLOCK + 37, torch.float32, torch.bfloat16
    sizes = kernels.CHUNK, kernels.CHUNK_GPU
    kernels.CHUNK = kernels.CHUNK_GPU = 1  # as small as chunks get: 128 tokens
    try:
        for seed, (N, C, V, dtype, h_layout, w_layout, d_layout, scale, temperature, betas) in enumerate([
                (4, 16, several, fp32, "contiguous", "contiguous", "contiguous", 1.0, 1.0, (0, 0.5, 0.1, 1)),
                (3, 8, several, fp32, "rows strided", "transposed", "expanded", 1e4, 0.6, (0, 0.5, 0.1, 1)),
                (1, 16, 37, fp32, "contiguous", "contiguous", "rows strided", 1.0, 2.0, (0, 0.9)),
                (130, 8, 5, fp32, "sliced", "sliced", "rows strided", 1.0, 0.6, (1,)),
                (3, 24, several, bf16, "transposed", "sliced", "one row", 1.0, 0.6, (0, 0.5, 0.1, 1)),
                (2, 32, kernels.BLOCK, bf16, "one row", "rows strided", "contiguous", 1.0, 1.0, (0, 0.5)),
                (2, 16, several, bf16, "contiguous", "contiguous", "contiguous", 1e4, 2.0, (0, 0.5, 0.1, 1)),
                (2, 4, 1, fp32, "contiguous", "contiguous", "contiguous", 1.0, 1.0, (0, 0.5, 1)),
                (0, 16, 40, bf16, "contiguous", "contiguous", "contiguous", 1.0, 1.0, (0, 0.5))]):
            hidden = LAYOUTS[h_layout](rand(N, C, dtype=dtype, seed=seed, scale=scale))
            weight = LAYOUTS[w_layout](rand(V, C, dtype=dtype, seed=seed + 1))
            teacher = [rand(N, C + 3, dtype=dtype, seed=seed + 2, scale=scale),
                       rand(V, C + 3, dtype=dtype, seed=seed + 3)]
            targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
            d = [LAYOUTS[d_layout](rand(N, seed=seed + i)) for i in range(2)]
            name = f"{N} x {C} x {V} {str(dtype)[6:]}, {h_layout} * {scale:g}, weight {w_layout}"
            for n, ignored in (("none", targets < 0), ("some", targets % 3 == 1), ("all", targets >= 0)):
                yield from compare(f"cross_entropy, {name}, {n} ignored",
                                   lambda h, w, t: kernels.linear_cross_entropy(h, w, t, kernels="triton"),
                                   plain_cross_entropy, [hidden, weight, targets.masked_fill(ignored, -100)],
                                   [rand(1)[0]])
            name += f", d {d_layout}, T {temperature}"
            yield from compare(f"logprobs, {name}",
                               lambda h, w, t: kernels.linear_logprobs(h, w, t, temperature, "triton"),
                               lambda h, w, t: plain_logprobs(h, w, t, temperature)[0],
                               [hidden, weight, targets], d[:1])
            for n, used in (("both", d), ("logprobs", [d[0], None]), ("entropy", [None, d[1]]))[:3 if seed < 2 else 1]:
                yield from compare(f"logprobs_entropy, {name}, d of {n}",
                                   lambda h, w, t: kernels.linear_logprobs_entropy(h, w, t, temperature, "triton"),
                                   lambda h, w, t: plain_logprobs(h, w, t, temperature),
                                   [hidden, weight, targets], used)
            for beta in betas:
                yield from compare(f"kl, {name}, beta {beta}",
                                   lambda h, w, th, tw: kernels.linear_kl(h, w, th, tw, beta, temperature, "triton"),
                                   lambda h, w, th, tw: plain_kl(h, w, th, tw, beta, temperature),
                                   [hidden, weight, *teacher], d[:1])
    finally:
        kernels.CHUNK, kernels.CHUNK_GPU = sizes
