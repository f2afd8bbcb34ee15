"""Are the kernels right? Each against PyTorch in float64, on a GPU or in Triton's interpreter.

    python -m kernels.tools.check                 # all of them
    python -m kernels.tools.check attention       # one family: attention, rms_norm or cross_entropy

The rule is FlashAttention's: an error against float64 of at most twice that of PyTorch's own result
in the same type, and one rounding of the largest value. It adapts to every shape and type, and
leaves no constant to be tuned until a test passes. In the interpreter every launch is also guarded
(guards.py): a load or store outside of the tensors shows.
"""
import argparse
import sys
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, attention, cross_entropy, rmsnorm, triton
from kernels.tiles import Tiles
from kernels.tools.guards import guards

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 0  # of all inputs; the tests try several
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# A GPU's exp2 is good to two units in the last place.
EPS = {BF16: 2**-8, FP16: 2**-11, FP32: 2**-23 if INTERPRETED else 2**-21}


def main() -> None:
    """Prints a line per case with the finding nearest its bound; exit code 1 if one is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help=", ".join(CHECKS))
    families = parser.parse_args().family or list(CHECKS)
    if not set(families) <= set(CHECKS):
        parser.error(f"families are {', '.join(CHECKS)}")

    device = "the CPU, in Triton's interpreter"
    if DEVICE == "cuda":
        device = torch.cuda.get_device_name()
    print(f"on {device}")
    worst = {}
    for family in families:
        worst |= worst_findings(family)
    for case, finding in worst.items():
        word = "ok   " if finding.ok else "WRONG"
        share = finding.error / finding.bound
        print(f"{word} {case:76} error at most {share:4.0%} of {finding.bound:.0e}")
    bad = sum(not finding.ok for finding in worst.values())
    print(f"{len(worst)} cases, " + (f"{bad} wrong" if bad else "all right"))
    sys.exit(bool(bad))


# --------------------------------------------------------------------------------------------------
# The rule

@dataclass
class Finding:
    """How far a result is from the truth, and how far it may be."""
    what: str
    error: float  # largest absolute error against float64; NaN is wrong
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def badness(self) -> tuple[bool, float]:
        return not self.ok, self.error / self.bound


def compare(what: str, ours: Callable, plain: Callable, inputs: list[torch.Tensor | None],
            d_outs: list[torch.Tensor | None]) -> Iterator[Finding]:
    """A Finding for each output and gradient of ours(*inputs).

    d_outs: given gradients of the outputs (None: not used). plain: the same function in PyTorch;
    run in the inputs' type it sets the bound, run in float64 it is the truth. Inputs that are not
    floating point, or None, have no gradient.
    """
    with guards():
        results = outputs_and_gradients(ours, inputs, d_outs)
    plain_results = outputs_and_gradients(plain, inputs, d_outs)
    exact_results = outputs_and_gradients(plain, inputs, d_outs, torch.float64)
    names = [f"out {i}" for i in range(len(d_outs))]
    names += [f"gradient {i}" for i in range(len(results) - len(d_outs))]
    for name, result, low, exact in zip(names, results, plain_results, exact_results):
        assert result.dtype == low.dtype, (what, name, result.dtype)
        assert result.shape == low.shape, (what, name, result.shape)
        if exact.numel():
            one_rounding = EPS[result.dtype] * exact.abs().max().item()
            bound = 2 * largest_error(low, exact) + one_rounding + 1e-7
            yield Finding(f"{what}: {name}", largest_error(result, exact), bound)


def largest_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return (x.double() - exact).abs().max().item()


def outputs_and_gradients(
        function: Callable, inputs: list, d_outs: list,
        dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The outputs of function(*inputs), then the gradients of the inputs that have one.

    dtype: what all is computed in; None: as it comes.
    """
    args = []
    for x in inputs:
        if x is not None and x.is_floating_point():
            x = x.detach().to(dtype or x.dtype).requires_grad_()
        args.append(x)
    outs = function(*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    variables = [x for x in args if x is not None and x.requires_grad]
    used = [(out, d.to(dtype or d.dtype)) for out, d in zip(outs, d_outs) if d is not None]
    if not used:
        return [*outs]
    used_outs, used_d = zip(*used)
    gradients = torch.autograd.grad(used_outs, variables, used_d, allow_unused=True)
    gradients = [torch.zeros_like(x) if d is None else d for x, d in zip(variables, gradients)]
    return [*outs, *gradients]


# --------------------------------------------------------------------------------------------------
# Inputs

def rand(*shape: int, dtype=FP32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * SEED + seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def documents(B: int, T: int, S: int, cuts: list[list[int]]) -> torch.Tensor:
    """doc_start (B, T) of rows with a document beginning at 0 and at each of the cuts."""
    assert len(cuts) == B
    rows = []
    for row in cuts:
        starts = [0, *row]
        rows.append([max(filter(lambda cut: cut <= t, starts)) for t in range(S - T, S)])
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LAYOUTS = {  # gradients come in every layout: views of something wider, transposed, expanded
    "contiguous": lambda x: x,
    "sliced": lambda x: F.pad(x, (3, 2))[..., 3:-2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "rows strided": lambda x: torch.stack([x, x + 1], 1)[:, 0],
    "expanded": lambda x: x.flatten()[:1].expand(x.shape),  # from one number
    "one row": lambda x: x[:1].expand(x.shape),
}


# --------------------------------------------------------------------------------------------------
# RMSNorm

class NormCase(NamedTuple):
    N: int
    C: int
    dtype: torch.dtype
    x_layout: str
    d_layout: str
    scale: float


NORM_CASES = [
    NormCase(5, 32, FP32, "contiguous", "contiguous", 1.0),
    NormCase(7, 100, FP32, "sliced", "transposed", 1.0),
    NormCase(3, 1, FP32, "contiguous", "expanded", 1.0),
    NormCase(1, 2560, FP32, "contiguous", "sliced", 1e4),
    NormCase(6, 130, BF16, "transposed", "sliced", 1.0),
    NormCase(4, 48, BF16, "rows strided", "one row", 1e-4),
    NormCase(9, 64, BF16, "one row", "rows strided", 1e3),
    NormCase(0, 16, BF16, "contiguous", "contiguous", 1.0),
]


def check_rms_norm(kernels) -> Iterator[Finding]:
    """kernels: kernels.rmsnorm, or a copy of it that something was done to."""
    def ours(x, residual, weight):
        if residual is None:
            return kernels.rms_norm(x, weight, 1e-5, "triton")
        return kernels.add_rms_norm(x, residual, weight, 1e-5, "triton")

    for seed, case in enumerate(NORM_CASES):
        shape, change = (case.N, case.C), LAYOUTS[case.d_layout]
        tensors = [rand(*shape, dtype=case.dtype, seed=seed + i, scale=case.scale) for i in (0, 1)]
        x, residual = (LAYOUTS[case.x_layout](t) for t in tensors)
        weight = rand(case.C, dtype=case.dtype, seed=seed + 2)
        d, d_total = (change(rand(*shape, dtype=case.dtype, seed=seed + i)) for i in (3, 4))
        name = (f"{case.N} x {case.C} {name_of(case.dtype)}, x {case.x_layout} * {case.scale:g}, "
                f"gradient {case.d_layout}")
        yield from compare(f"rms_norm {name}", ours, plain_norm, [x, None, weight], [d])
        used = [[d, d_total], [d, None], [None, d_total]]
        for d_outs in used[:3 if seed < 2 else 1]:
            yield from compare(
                f"add_rms_norm {name}", ours, plain_norm, [x, residual, weight], d_outs)

    zero = torch.zeros(2, 8, device=DEVICE)
    yield from compare("rms_norm of zeros", ours, plain_norm, [zero, None, rand(8)], [rand(2, 8)])
    yield from compare("rms_norm, bfloat16 with a weight of float32", ours, plain_norm,
                       [rand(3, 20, dtype=BF16), None, rand(20)], [rand(3, 20)])


def plain_norm(x, residual, weight):
    total = x if residual is None else x + residual
    wide = total if x.dtype == torch.float64 else total.float()
    y = F.rms_norm(wide, (x.shape[-1],), eps=1e-5).type_as(x) * weight
    return y if residual is None else (y, total)


# --------------------------------------------------------------------------------------------------
# Attention

class Shape(NamedTuple):
    B: int
    T: int
    S: int
    H: int
    K: int
    D: int
    cuts: list[list[int]] | None  # of each row: where documents begin; None: no documents

    def queries(self) -> tuple:
        return self.B, self.T, self.H, self.D

    def keys(self) -> tuple:
        return self.B, self.S, self.K, self.D

    def documents(self) -> torch.Tensor | None:
        return None if self.cuts is None else documents(self.B, self.T, self.S, self.cuts)

    def inputs(self, dtype=FP32) -> list[torch.Tensor]:
        return [rand(*shape, dtype=dtype) for shape in (self.queries(), self.keys(), self.keys())]


ATTENTION = {  # the first sees most mistakes, and is small
    "behind a cache, documents": Shape(1, 19, 60, 2, 1, 16, [[10, 50]]),
    "4 queries a key, documents": Shape(2, 36, 36, 4, 1, 16, [[7, 16, 33, 34], [25]]),
    "5 queries a key": Shape(1, 33, 33, 5, 1, 16, None),
    "no documents": Shape(2, 40, 40, 2, 2, 16, None),
    "one token": Shape(2, 1, 1, 2, 1, 16, None),
    "one-token documents": Shape(1, 37, 37, 2, 2, 16, [list(range(37))]),
    "a whole tile between two cut ones": Shape(1, 100, 100, 1, 1, 16, [[3, 90]]),
    "head width 24, padded": Shape(1, 17, 17, 2, 1, 24, [[5]]),
    "head width 64": Shape(1, 20, 20, 2, 1, 64, None),
    "head width 128, documents": Shape(1, 34, 34, 1, 1, 128, [[16]]),
    "behind a cache": Shape(1, 19, 60, 2, 1, 16, None),
    "no rows": Shape(0, 8, 8, 2, 1, 16, None),
}
ATTENTION_TYPES = {  # fp32 alone, but for these
    "head width 64": [BF16],
    "head width 128, documents": [BF16],
    "5 queries a key": [FP32, FP16],
    "4 queries a key, documents": [FP32, BF16],
    "no documents": [BF16],
    "one token": [FP32, BF16],
}
DECODING = {  # B, S, H, K, D, where each row's keys begin or None
    "decoding": (2, 37, 4, 2, 16, None),
    "decoding, unequal lengths, 5 queries a key": (4, 50, 5, 1, 16, [0, 13, 32, 49]),
    "decoding, several splits, head width 24": (2, 1100, 2, 2, 24, [0, 600]),
}


def check_attention(kernels) -> Iterator[Finding]:
    """kernels: kernels.attention, or a copy of it that something was done to."""
    for part in (masks, layouts, decoding, visits, specialized):
        yield from part(kernels)


def by_triton(kernels) -> Callable:
    def ours(*inputs):
        return kernels.attention(*inputs, kernels="triton")
    return ours


def masks(kernels) -> Iterator[Finding]:
    """At each of ATTENTION's shapes, forward and backward; and queries that see no key at all."""
    ours = by_triton(kernels)
    docs = torch.tensor([[0, 0, 4, 4, 4, 6]], dtype=torch.int32, device=DEVICE)
    blind = [2, 3, 5]  # queries that see nothing
    q, k, v = (rand(1, 6, 1, 16, seed=i).requires_grad_() for i in range(3))
    o = ours(q, k, v, docs)
    dq, _, dv = torch.autograd.grad(o.sum(), (q, k, v))
    nothing = torch.stack([x[0, blind] for x in (o, dq, dv)])
    yield Finding("queries that see nothing: zero, and zero gradients",
                  nothing.abs().max().item(), 1e-30)

    for i, (name, shape) in enumerate(ATTENTION.items()):
        shapes = [shape.queries(), shape.keys(), shape.keys(), shape.queries()]
        for dtype in ATTENTION_TYPES.get(name, [FP32]):
            q, k, v, d_out = (rand(*x, dtype=dtype, seed=i + n) for n, x in enumerate(shapes))
            yield from compare(f"{name}, {name_of(dtype)}", ours, kernels.plain_attention,
                               [q, k, v, shape.documents()], [d_out])


def layouts(kernels) -> Iterator[Finding]:
    """Strides of q, k, v and of the gradient; values that make the softmax a step, or flat."""
    ours, plain = by_triton(kernels), kernels.plain_attention
    B, T, H, K, D = 2, 20, 2, 2, 16
    docs = documents(B, T, T, [[4, 17], []])
    for layout, change in LAYOUTS.items():
        d_out = change(rand(B, T, H, D, seed=1))
        qkv = [rand(B, n, T, D, seed=2).transpose(1, 2) for n in (H, K, K)]
        yield from compare(
            f"gradient {layout}, heads first", ours, plain, [*qkv, docs], [d_out])
    qkv = rand(B, T, H + 2 * K, D, seed=3).split([H, K, K], 2)
    d_out = rand(B, T, H, D, seed=4)
    yield from compare("q, k, v side by side", ours, plain, [*qkv, docs], [d_out])
    for scale, dtype in ((300.0, FP32), (30.0, BF16), (1e-4, FP32)):
        qkv = [rand(B, T, n, D, dtype=dtype, scale=scale, seed=5) for n in (H, K, K)]
        d_out = rand(B, T, H, D, dtype=dtype, seed=6)
        yield from compare(
            f"values of {scale:g}, {name_of(dtype)}", ours, plain, [*qkv, docs], [d_out])


def decoding(kernels) -> Iterator[Finding]:
    """One query a row against a cache, without a gradient, at each of DECODING's shapes."""
    ours = torch.no_grad()(by_triton(kernels))
    for name, (B, S, H, K, D, begin) in DECODING.items():
        docs = None
        if begin is not None:
            docs = torch.tensor(begin, dtype=torch.int32, device=DEVICE)[:, None]
        for dtype in (FP32, BF16):
            qkv = Shape(B, 1, S, H, K, D, None).inputs(dtype)
            yield from compare(f"{name}, {name_of(dtype)}", ours, kernels.plain_attention,
                               [*qkv, docs], [None])
            if begin is not None:
                q, k, v = qkv
                inputs = [q, k.transpose(1, 2), v.transpose(1, 2), S - docs[:, 0]]
                yield from compare(
                    f"{name}, from the first key on, {name_of(dtype)}",
                    by_length(kernels, "triton"), by_length(kernels, "torch"), inputs, [None])


def by_length(kernels, kind: str) -> Callable:
    """decode_attention of one part; lengths (B,): keys of each row."""
    def attend(q, k, v, lengths):
        S = k.shape[2]
        beyond = torch.arange(S, device=DEVICE) >= lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=q.dtype, device=DEVICE)
        mask = mask.masked_fill(beyond, float("-inf"))[:, None, None]
        filled = kernels.Filled(lengths, [(slice(None), S, mask)])
        with torch.no_grad():
            return kernels.decode_attention(q, k, v, filled, kind)
    return attend


def specialized(kernels) -> Iterator[Finding]:
    """The warp-specialised forward, asked for by name: on a GPU tuning must choose it."""
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        return
    usual_tiles = kernels.tiles_for

    def specialized_tiles(kernel, *rest):
        if kernel != "attention_forward":
            return usual_tiles(kernel, *rest)
        return Tiles(16, 16, 1, 1, True) if INTERPRETED else Tiles(128, 128, 4, 2, True)

    names = ("no documents", "5 queries a key",
             "4 queries a key, documents", "behind a cache, documents")
    kernels.tiles_for = specialized_tiles
    try:
        for name in names:
            shape = ATTENTION[name]
            shape = shape._replace(  # TMA wants multiples of 16 bytes
                T=shape.T - shape.T % 4, S=shape.S - shape.S % 4, D=shape.D if INTERPRETED else 128)
            d_out = rand(*shape.queries(), dtype=BF16)
            yield from compare(
                f"specialized, {name}", by_triton(kernels), kernels.plain_attention,
                [*shape.inputs(BF16), shape.documents()], [d_out])
    finally:
        kernels.tiles_for = usual_tiles


def visits(kernels) -> Iterator[Finding]:
    """Products of tiles that the kernels make, against those in which some query sees some key."""
    if not INTERPRETED:
        return
    builder = triton.runtime.interpreter.InterpreterBuilder
    product = builder.create_dot
    n_products = 0

    def counted_product(*args):
        nonlocal n_products
        n_products += 1
        return product(*args)

    names = ("no documents", "4 queries a key, documents",
             "one-token documents", "behind a cache, documents")
    builder.create_dot = counted_product
    try:
        for name in names:
            shape = ATTENTION[name]
            docs = shape.documents()
            n_tiles, needed = count_tiles(shape, docs)
            what = f"visits, {name}: {needed} of {n_tiles} tiles"
            qkv = [x.requires_grad_() for x in shape.inputs()]
            n_products = 0
            o = kernels.attention(*qkv, docs, kernels="triton")
            yield Finding(f"{what} forward", abs(n_products - 2 * shape.H * needed), 0.5)
            n_products = 0
            o.sum().backward()  # 3 products a tile for dq, 4 for dk and dv
            yield Finding(f"{what} backward", abs(n_products - 7 * shape.H * needed), 0.5)
    finally:
        builder.create_dot = product


def count_tiles(shape: Shape, docs: torch.Tensor | None) -> tuple[int, int]:
    """Tiles of 16 x 16 scores in all rows, and those in which some query sees some key."""
    B, T, S = shape.B, shape.T, shape.S
    key, query = torch.arange(S), torch.arange(S - T, S)[:, None]
    first = 0 if docs is None else docs.cpu()[:, :, None]
    sees = (key <= query) & (key >= first)
    sees = F.pad(sees.expand(B, T, S), (0, -S % 16, 0, -T % 16))
    tiles = sees.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).any(4).any(2)
    return tiles.numel(), int(tiles.sum())


# --------------------------------------------------------------------------------------------------
# Losses

class LossCase(NamedTuple):
    N: int
    C: int
    V: int
    dtype: torch.dtype
    hidden_layout: str
    weight_layout: str
    d_layout: str
    scale: float
    temperature: float
    betas: tuple[float, ...]


def loss_cases(block: int) -> list[LossCase]:
    """block: logits of a row that a program holds at once."""
    several = 2 * block + 37
    usual = ["contiguous"] * 3
    four = (0, 0.5, 0.1, 1)
    return [
        LossCase(4, 16, several, FP32, *usual, 1.0, 1.0, four),
        LossCase(3, 8, several, FP32, "rows strided", "transposed", "expanded", 1e4, 0.6, four),
        LossCase(1, 16, 37, FP32, "contiguous", "contiguous", "rows strided", 1.0, 2.0, (0, 0.9)),
        LossCase(130, 8, 5, FP32, "sliced", "sliced", "rows strided", 1.0, 0.6, (1,)),
        LossCase(3, 24, several, BF16, "transposed", "sliced", "one row", 1.0, 0.6, four),
        LossCase(2, 32, block, BF16, "one row", "rows strided", "contiguous", 1.0, 1.0, (0, 0.5)),
        LossCase(2, 16, several, BF16, *usual, 1e4, 2.0, four),
        LossCase(2, 4, 1, FP32, *usual, 1.0, 1.0, (0, 0.5, 1)),
        LossCase(0, 16, 40, BF16, *usual, 1.0, 1.0, (0, 0.5)),
    ]


def check_cross_entropy(kernels) -> Iterator[Finding]:
    """kernels: kernels.cross_entropy, or a copy of it that something was done to."""
    usual_chunks = kernels.CHUNK, kernels.CHUNK_GPU
    kernels.CHUNK = kernels.CHUNK_GPU = 1  # as small as chunks get: 128 tokens
    try:
        for seed, case in enumerate(loss_cases(kernels.BLOCK)):
            yield from check_losses(kernels, case, seed)
    finally:
        kernels.CHUNK, kernels.CHUNK_GPU = usual_chunks


def check_losses(kernels, case: LossCase, seed: int) -> Iterator[Finding]:
    """Every loss at one case."""
    N, C, V, dtype, temperature = case.N, case.C, case.V, case.dtype, case.temperature
    hidden = LAYOUTS[case.hidden_layout](rand(N, C, dtype=dtype, seed=seed, scale=case.scale))
    weight = LAYOUTS[case.weight_layout](rand(V, C, dtype=dtype, seed=seed + 1))
    teacher = [rand(N, C + 3, dtype=dtype, seed=seed + 2, scale=case.scale),
               rand(V, C + 3, dtype=dtype, seed=seed + 3)]
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    d = [LAYOUTS[case.d_layout](rand(N, seed=seed + i)) for i in range(2)]
    name = (f"{N} x {C} x {V} {name_of(dtype)}, {case.hidden_layout} * {case.scale:g}, "
            f"weight {case.weight_layout}")

    def ours_cross_entropy(h, w, t):
        return kernels.linear_cross_entropy(h, w, t, kernels="triton")

    def ours_logprobs(h, w, t):
        return kernels.linear_logprobs(h, w, t, temperature, "triton")

    def plain_logprobs(h, w, t):
        return plain_logprobs_entropy(h, w, t, temperature)[0]

    def ours_entropy(h, w, t):
        return kernels.linear_logprobs_entropy(h, w, t, temperature, "triton")

    def plain_entropy(h, w, t):
        return plain_logprobs_entropy(h, w, t, temperature)

    # A power of two scales without rounding: plain PyTorch scales the logits' gradient, ours scales
    # the products with it, and the two orders round differently.
    d_sum = torch.tensor(-0.5, device=DEVICE)
    for n, ignored in (("none", targets < 0), ("some", targets % 3 == 1), ("all", targets >= 0)):
        kept = targets.masked_fill(ignored, -100)
        yield from compare(f"cross_entropy, {name}, {n} ignored", ours_cross_entropy,
                           plain_cross_entropy, [hidden, weight, kept], [d_sum])
    name += f", d {case.d_layout}, T {temperature}"
    yield from compare(f"logprobs, {name}", ours_logprobs, plain_logprobs,
                       [hidden, weight, targets], d[:1])
    used = [("both", d), ("logprobs", [d[0], None]), ("entropy", [None, d[1]])]
    for n, d_outs in used[:3 if seed < 2 else 1]:
        yield from compare(f"logprobs_entropy, {name}, d of {n}", ours_entropy, plain_entropy,
                           [hidden, weight, targets], d_outs)
    for beta in case.betas:
        def ours_kl(h, w, t, *teacher):
            return kernels.linear_logprobs_kl(h, w, t, *teacher, beta, temperature, "triton")

        def plain_kl(h, w, t, *teacher):
            return plain_logprobs_kl(h, w, t, *teacher, beta, temperature)

        yield from compare(f"logprobs_kl, {name}, beta {beta}", ours_kl, plain_kl,
                           [hidden, weight, targets, *teacher], [None, d[0]])


def scaled_logits(hidden, weight, temperature: float) -> torch.Tensor:
    """In one product, before its one rounding."""
    return torch.addmm(hidden.new_zeros(()), hidden, weight.T, beta=0, alpha=1 / temperature)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)


def plain_cross_entropy(hidden, weight, targets):
    log_p = log_softmax(scaled_logits(hidden, weight, 1.0))
    return F.nll_loss(log_p, targets, reduction="sum")


def plain_logprobs_entropy(hidden, weight, targets, temperature: float):
    log_p = log_softmax(scaled_logits(hidden, weight, temperature))
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def plain_logprobs_kl(hidden, weight, targets, teacher_hidden, teacher_weight, beta: float,
                      temperature: float):
    """The definition; the student's logits are rounded before the temperature divides them."""
    logits = scaled_logits(hidden, weight, 1.0)
    logprobs = log_softmax(logits).gather(1, targets[:, None])[:, 0]
    log_q = log_softmax(logits / temperature)
    log_p = log_softmax(scaled_logits(teacher_hidden, teacher_weight, temperature)).detach()
    return logprobs, divergence(log_q, log_p, beta)


def divergence(log_q: torch.Tensor, log_p: torch.Tensor, beta: float) -> torch.Tensor:
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_student, log_teacher = torch.tensor(1 - beta).log(), torch.tensor(beta).log()
    log_m = torch.stack([log_q + log_student, log_p + log_teacher]).logsumexp(0)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


# --------------------------------------------------------------------------------------------------

CHECKS = {  # the first argument of each is the module to check
    "attention": check_attention,
    "rms_norm": check_rms_norm,
    "cross_entropy": check_cross_entropy,
}
MODULES = {"attention": attention, "rms_norm": rmsnorm, "cross_entropy": cross_entropy}


def check_family(family: str) -> Iterator[Finding]:
    return CHECKS[family](MODULES[family])


def worst_findings(family: str) -> dict[str, Finding]:
    """{case: of its findings that nearest its bound}."""
    worst = {}
    for finding in check_family(family):
        case = finding.what.rpartition(": ")[0]
        worst[case] = max(worst.get(case, finding), finding, key=Finding.badness)
    return worst


if __name__ == "__main__":
    main()
