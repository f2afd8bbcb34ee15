"""How fast are the kernels? On the GPU at hand, beside PyTorch's own ways to compute the same.

    python -m kernels.tools.bench                     # about ten minutes
    python -m kernels.tools.bench attention decode    # some of the families: printed, not written
    python -m kernels.tools.bench --quick             # 4K tokens a row alone: printed, not written
    python -m kernels.tools.bench --tune

The first writes results/kernels_gpu.md and .jsonl; --tune times every choice of tiles.CANDIDATES
and writes kernels/tuned.json.

The kernels are checked first; wrong ones are not timed. Contestants take turns, so that a GPU that
grows hot and slow does so for all, and must agree with ours. Inputs are random: products of zeros
draw less power, and so run faster.

Shapes: B batch, T query positions, S key positions, H query heads, K key/value heads, D head width,
N rows or tokens, C width, V vocabulary.
"""
import argparse
import datetime
import functools
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import common
from kernels import INTERPRETED, attention, cross_entropy, rmsnorm, triton
from kernels.tiles import CANDIDATES, TUNED, Tiles, chip, tiles_for
from kernels.tools import check
from kernels.tools.check import DEVICE, rand

SEED = 0
ROUNDS = 5            # turns of a contestant; the median of the turns' medians counts
TURN = 0.3            # seconds of a turn
HEADS = (20, 4, 128)  # H, K, D of the 3B model
WIDTH, VOCABULARY = 2560, 166_144
TOKENS = 16_384       # B * T in attention, where T is not longer
BF16 = torch.bfloat16
CASES = {
    "attention": [  # T, packed documents
        (2048, False), (4096, False), (8192, False), (32768, False), (65536, False),
        (4096, True), (32768, True)],
    "decode": [(1, 4096), (64, 4096), (1, 32768), (64, 32768)],  # B, S
    "rms_norm": [(16384, 1024), (16384, 2560), (16384, 8192)],   # N, C
    "cross_entropy": [4096, 16384],                              # N
}
QUICK = {
    "attention": [(4096, False), (4096, True)],
    "decode": [(64, 4096)],
    "rms_norm": [(4096, 2560)],
    "cross_entropy": [4096],
}
UNITS = {
    "attention": "TFLOP/s",
    "decode": "GB/s",
    "rms_norm": "GB/s",
    "cross_entropy": "TFLOP/s",
}
TUNED_AT = (4096, 32768)  # T of the shapes at which tiles are timed
SIDE_BY_SIDE = min(16, os.cpu_count())  # processes that try tiles
RESULTS = Path(__file__).parents[2] / "results"


# --------------------------------------------------------------------------------------------------
# The timer

@functools.cache
def larger_than_l2() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device=DEVICE)


def seconds(run: Callable) -> float:
    """Median time of a GPU call, after two that do not count, over as many as make a turn."""
    time_calls(run, 1)  # compiles, asks for memory
    started = time.perf_counter()
    time_calls(run, 1)
    n = TURN / (time.perf_counter() - started)
    return statistics.median(time_calls(run, int(min(max(n, 3), 1000))))


def time_calls(run: Callable, n: int) -> list[float]:
    """Seconds on the GPU of each of n calls. What Python needs to launch a kernel is not timed."""
    events = []
    for _ in range(n):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # Leaves no input in L2, and lasts long enough for the host to get ahead of the GPU.
        for _ in range(8):
            larger_than_l2().zero_()
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def race(contestants: dict, measure: Callable | None = None,
         expected: type = Exception) -> dict[object, float | str]:
    """{name: median over the rounds of measure(contestant), or what went wrong}.

    Each contestant has a turn per round. measure: seconds() of a function, unless another is given;
    then its results must also be near the first one's.
    """
    times = {name: [] for name in contestants}
    errors, first = {}, None
    for round in range(ROUNDS):
        for name, run in contestants.items():
            if name in errors:
                continue
            try:
                if measure is None and round == 0:
                    first = check_results(run, first)
                times[name].append((measure or seconds)(run))
            except expected as error:
                first_line = str(error).strip().partition("\n")[0]
                errors[name] = f"{type(error).__name__}: {first_line:.60}"
            if name in errors:  # here, where nothing holds on to the failed call's tensors
                torch.cuda.empty_cache()
    return {name: errors.get(name) or statistics.median(times[name]) for name in contestants}


def check_results(run: Callable, first: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """The first contestant's results; ValueError where those of run are not near them."""
    results = [x.detach() for x in run()]
    first = first or results
    error = difference(results, first)
    if not error < 0.03:
        raise ValueError(f"differs by {error:.0%}")
    return first


def difference(results: list[torch.Tensor], of: list[torch.Tensor]) -> float:
    """The largest error of a tensor relative to its norm; NaN is the largest.

    Gradients of repeated keys have another shape: left out.
    """
    errors = []
    for x, y in zip(results, of):
        if x.shape == y.shape:
            x, y = x.float(), y.float()
            errors.append(((x - y).norm() / y.norm()).item())
    return max(errors, key=lambda error: (math.isnan(error), error))


def one_pass(f: Callable, inputs: list[torch.Tensor]) -> tuple:
    outs = f(*inputs)
    return outs if isinstance(outs, tuple) else (outs,)


def both_passes(f: Callable, inputs: list[torch.Tensor], d_outs: tuple | None = None) -> tuple:
    outs = one_pass(f, inputs)
    return *outs, *torch.autograd.grad(outs, inputs, d_outs)


def race_passes(contestants: dict[str, tuple[Callable, list]],
                d_outs: tuple) -> Iterator[tuple[str, dict]]:
    """(pass, {name: time}) of contestants {name: (function, inputs)}.

    The backward pass is the difference of the other two.
    """
    forward = race({name: partial(one_pass, *what) for name, what in contestants.items()})
    both = race({name: partial(both_passes, *what, d_outs) for name, what in contestants.items()})
    backward = {}
    for name in contestants:
        errors = [t for t in (forward[name], both[name]) if isinstance(t, str)]
        backward[name] = errors[0] if errors else both[name] - forward[name]
    yield "forward", forward
    yield "backward", backward
    yield "forward + backward", both


def ceilings(n: int = 8192, floats: int = 2**28) -> dict[str, float]:
    """TFLOP/s of a large bf16 product, and GB/s, read and written, of a large copy.

    Both by PyTorch.
    """
    a, b = (rand(n, n, dtype=BF16, seed=i) for i in range(2))
    x = torch.randn(floats, device=DEVICE)
    runs = {"product": lambda: a @ b, "copy": partial(torch.empty_like(x).copy_, x)}
    times = race(runs, seconds)
    return {"TFLOP/s": 2 * n**3 / times["product"] / 1e12,
            "GB/s": 2 * x.nbytes / times["copy"] / 1e9}


# --------------------------------------------------------------------------------------------------
# The families: each yields (case, pass, {name: time}, FLOPs or bytes that must move)

def documents(B: int, T: int, mean: int = 512, seed: int = SEED) -> torch.Tensor:
    """doc_start (B, T) int32 of packed rows; each token begins a document with chance 1 / mean."""
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / mean
    return torch.where(begins, torch.arange(T), 0).cummax(1).values.int()


def visible_pairs(B: int, T: int, docs: torch.Tensor | None) -> float:
    """Pairs of a query and a key that it sees: T^2 / 2 per row by convention.

    Exact with documents.
    """
    if docs is None:
        return B * T * T / 2
    return float((torch.arange(T, device=docs.device) - docs + 1).sum())


def attention_inputs(B: int, T: int, heads: tuple, packed: bool) -> list:
    """q, k, v, doc_start and the output's gradient."""
    H, K, D = heads
    q, k, v, d_out = (rand(B, T, n, D, dtype=BF16, seed=i) for i, n in enumerate((H, K, K, H)))
    docs = documents(B, T, min(512, T // 3)).to(DEVICE) if packed else None
    return [q, k, v, docs, d_out]


def attention_peers(q, k, v, docs) -> dict[str, tuple[Callable, list]]:
    """{name: (function, inputs)}, in the model's layout.

    For documents SDPA needs a mask, which is made once, by a call that is not timed; only
    plain_attention, which is what a model without Triton runs, makes its own each time.
    """
    T, H = q.shape[1:3]
    S, K = k.shape[1:3]
    mask = None
    if docs is not None:
        mask = functools.cache(partial(attention.additive_mask, q, T, S, docs))
    is_grouped = K != H
    qkv = [q, k, v]
    peers = {"FlexAttention": (flex(q, k, docs), qkv),
             "SDPA cuDNN": (sdpa(SDPBackend.CUDNN_ATTENTION, mask, is_grouped), qkv)}
    if docs is None:
        peers["SDPA flash"] = sdpa(SDPBackend.FLASH_ATTENTION, mask, is_grouped), qkv
    else:
        peers["plain_attention"] = partial(attention.plain_attention, doc_start=docs), qkv
    if T > 1:  # these know no grouped queries: they get a key head for each query head, made here
        k, v = (x.detach().repeat_interleave(H // K, 2).requires_grad_() for x in (k, v))
        efficient = sdpa(SDPBackend.EFFICIENT_ATTENTION, mask, is_grouped=False)
        peers["SDPA efficient (k, v repeated)"] = efficient, [q, k, v]
        if docs is None and T <= 8192:
            peers["eager (k, v repeated)"] = eager(q, k), [q, k, v]
    return peers


def heads_first(attend: Callable) -> Callable:
    """attend() of tensors (B, heads, T, D), as a function of ours, (B, T, heads, D)."""
    def function(*qkv):
        return attend(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    return function


def flex(q, k, docs) -> Callable:
    """FlexAttention, compiled; its mask of blocks is made by the first call."""
    (B, T), S = q.shape[:2], k.shape[1]
    compiled = torch.compile(flex_attention, dynamic=False)

    def sees(b, h, query, key):
        causal = key <= query + (S - T)
        return causal if docs is None else causal & (key >= docs[b, query])

    @functools.cache
    def blocks():
        return create_block_mask(
            sees, None if docs is None else B, None, T, S, device=DEVICE)

    return heads_first(lambda q, k, v: compiled(q, k, v, block_mask=blocks(), enable_gqa=True))


def sdpa(backend, mask: Callable | None, is_grouped: bool) -> Callable:
    """PyTorch's scaled_dot_product_attention by one of its back ends; mask None: causal."""
    def attend(q, k, v):
        attn_mask = None if mask is None else mask()
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, is_causal=mask is None, enable_gqa=is_grouped)

    return heads_first(attend)


def eager(q, k) -> Callable:
    """The definition, with all scores in memory."""
    T, S, D = q.shape[1], k.shape[1], q.shape[3]
    query = torch.arange(S - T, S, device=DEVICE)[:, None]
    is_hidden = torch.arange(S, device=DEVICE) > query

    def attend(q, k, v):
        scores = (q @ k.mT * D**-0.5).masked_fill(is_hidden, float("-inf"))
        return scores.softmax(-1) @ v

    return heads_first(attend)


def race_attention(cases: list, tokens: int = TOKENS, heads: tuple = HEADS) -> Iterator[tuple]:
    for T, packed in cases:
        B = max(1, tokens // T)
        *qkv, docs, d_out = attention_inputs(B, T, heads, packed)
        for x in qkv:
            x.requires_grad_()
        ours = partial(attention.attention, doc_start=docs, kernels="triton")
        contestants = {"ours": (ours, qkv)} | attention_peers(*qkv, docs)
        # Two products forward, five backward.
        flops = 4 * heads[0] * heads[2] * visible_pairs(B, T, docs)
        case = f"{B} x {T}, documents" if packed else f"{B} x {T}"
        for step, times in race_passes(contestants, (d_out,)):
            factor = {"forward": 1, "backward": 2.5, "forward + backward": 3.5}[step]
            yield case, step, times, factor * flops


def race_decode(cases: list, heads: tuple = HEADS) -> Iterator[tuple]:
    """One query a row against a cache of S positions; the last half or more are the row's own."""
    H, K, D = heads
    for B, S in cases:
        shapes = [(B, 1, H, D), (B, S, K, D), (B, S, K, D)]
        qkv = [rand(*shape, dtype=BF16, seed=i) for i, shape in enumerate(shapes)]
        generator = torch.Generator().manual_seed(SEED)
        start = torch.randint(S // 2, (B, 1), generator=generator).int().to(DEVICE)
        ours = partial(attention.attention, doc_start=start, kernels="triton")
        contestants = {"ours": (ours, qkv)} | attention_peers(*qkv, start)
        with torch.no_grad():
            times = race({name: partial(one_pass, *what) for name, what in contestants.items()})
        n_bytes = int((S - start).sum()) * K * D * 2 * 2  # k and v in bf16
        yield f"{B} x {S}", "forward", times, n_bytes


def race_rms_norm(cases: list) -> Iterator[tuple]:
    for (N, C), add in itertools.product(cases, (False, True)):
        shapes = [(N, C)] * 4 + [(C,)]
        d, d_total, x, residual, weight = (
            rand(*shape, dtype=BF16, seed=i) for i, shape in enumerate(shapes))
        d_outs = (d, d_total) if add else (d,)
        inputs = [x, residual, weight] if add else [x, weight]
        for tensor in inputs:
            tensor.requires_grad_()
        ours = rmsnorm.add_rms_norm if add else rmsnorm.rms_norm
        peer = partial(plain_norm, C, add)
        contestants = {
            "ours": (partial(ours, eps=1e-5, kernels="triton"), inputs),
            "torch": (peer, inputs),
            "torch compiled": (torch.compile(peer, dynamic=False), inputs)}
        # Tensors (N, C) that must be read or written.
        forward, backward = (4, 4) if add else (2, 3)
        moved = {"forward": forward, "backward": backward,
                 "forward + backward": forward + backward}
        case = f"{N} x {C}, add" if add else f"{N} x {C}"
        for step, times in race_passes(contestants, d_outs):
            yield case, step, times, moved[step] * N * C * 2


def plain_norm(C: int, add: bool, x, *rest):
    """By PyTorch; rest: the weight, or with add the residual and the weight."""
    total = x + rest[0] if add else x
    y = F.rms_norm(total, (C,), rest[-1], 1e-5)
    return (y, total) if add else y


def race_cross_entropy(cases: list, C: int = WIDTH, V: int = VOCABULARY) -> Iterator[tuple]:
    """And the peak memory of loss and gradients, in GB above the inputs."""
    for N in cases:
        hidden = rand(N, C, dtype=BF16).requires_grad_()
        weight = rand(V, C, dtype=BF16, scale=0.02).requires_grad_()
        generator = torch.Generator().manual_seed(SEED)
        targets = torch.randint(V, (N,), generator=generator).to(DEVICE)
        ours = partial(cross_entropy.linear_cross_entropy, targets=targets)
        plain = partial(plain_cross_entropy, targets=targets)
        contestants = {
            "ours": partial(ours, kernels="triton"),
            "ours (torch)": partial(ours, kernels="torch"),
            "plain": plain,
            "plain compiled": torch.compile(plain, dynamic=False)}
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
            contestants["F.linear_cross_entropy"] = partial(
                F.linear_cross_entropy, target=targets, reduction="sum",
                options=torch.nn.LinearCrossEntropyOptions())
        runs = {name: partial(both_passes, f, [hidden, weight]) for name, f in contestants.items()}
        times = race(runs)
        memory = {name: peak_memory_gb(run) for name, run in runs.items()
                  if not isinstance(times[name], str)}
        yield f"{N} tokens", "forward + backward", times, 6 * N * C * V, memory


def plain_cross_entropy(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def peak_memory_gb(run: Callable) -> float:
    """Of a call, above what is in memory before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


RACES = {
    "attention": race_attention,
    "decode": race_decode,
    "rms_norm": race_rms_norm,
    "cross_entropy": race_cross_entropy,
}


# --------------------------------------------------------------------------------------------------
# Tuning

def use(kernel: str, tiles: Tiles) -> None:
    """From now on this kernel has these tiles, the others their own."""
    def new_tiles_for(name, *rest):
        return tiles if name == kernel else tiles_for(name, *rest)

    attention.tiles_for = new_tiles_for


def attempt(kernel: str, D: int, tiles: Tiles) -> bool:
    """Whether a kernel is right with these tiles, at a small shape."""
    use(kernel, tiles)
    ours = partial(attention.attention, kernels="triton")
    plain = partial(attention.attention, kernels="torch")
    findings = []
    for packed in (False, True):
        # No multiple of a tile; of 16, as the shapes that are timed, so that Triton, which compiles
        # for such lengths apart, has it compiled by then.
        T = 20 if INTERPRETED else 304
        q, k, v, docs, d_out = attention_inputs(2, T, (4, 2, D), packed)
        if kernel == "attention_decode":
            q, d_out, ours = q[:, -1:], None, torch.no_grad()(ours)
            docs = None if docs is None else docs[:, -1:]
        findings += check.compare(kernel, ours, plain, [q, k, v, docs], [d_out])
    return all(finding.ok for finding in findings)


def survives(kernel: str, D: int, tiles: Tiles) -> bool:
    """attempt() in a process of its own: a kernel that waits for ever, or a fault, ends with it."""
    numbers = [str(int(x)) for x in (D, *tiles)]
    command = [sys.executable, "-m", "kernels.tools.bench", "--try", kernel, *numbers]
    reason = ""
    try:
        done = subprocess.run(
            command, cwd=RESULTS.parent, timeout=120, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2] or "wrong"
    except subprocess.TimeoutExpired:
        reason = "not done in 120 seconds"
    if reason:
        print(f"{kernel} {D}: {tuple(tiles)} is left out: {reason}", flush=True)
    return not reason


def launch(kernel: str, D: int, T: int, packed: bool) -> Callable:
    """What is timed: the pass that the kernel is, or is a part of."""
    heads = (*HEADS[:2], D)
    q, k, v, docs, d_out = attention_inputs(max(1, TOKENS // T), T, heads, packed)
    scale = D**-0.5
    if kernel == "attention_decode":
        start = None if docs is None else docs[:, T // 2, None]
        return partial(attention.decode_op, q[:, -1:], k, v, start, scale)
    if kernel == "attention_forward":
        return partial(attention.forward_op, q, k, v, docs, scale)
    o, lse = attention.forward_op(q, k, v, docs, scale)
    return partial(attention.backward_op, d_out, q, k, v, docs, o, lse, scale)


def tune() -> None:
    """Writes the fastest tiles of each kernel and head width to kernels/tuned.json."""
    for (kernel, D), candidates in right_tiles((64, 128)).items():
        times = time_tiles(kernel, D, candidates)
        if times:
            write_tiles(kernel, D, fastest(times))


def right_tiles(widths: tuple[int, ...]) -> dict[tuple[str, int], list[Tiles]]:
    """{(kernel, head width): its candidates that are right}.

    Each is tried in a process of its own, several side by side: these mostly start and compile.
    """
    choices = CANDIDATES[chip(torch.device("cuda"))]
    forms = []
    for kernel, D in itertools.product(choices, widths):
        forms += [(kernel, D, tiles) for tiles in choices[kernel]]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        are_right = list(pool.map(survives, *zip(*forms)))
    right = {}
    for (kernel, D, tiles), is_right in zip(forms, are_right):
        if is_right:
            right.setdefault((kernel, D), []).append(tiles)
    return right


def fastest(times: dict[Tiles, list[float]]) -> Tiles:
    """Over all shapes alike."""
    return min(times, key=lambda tiles: statistics.geometric_mean(times[tiles]))


def write_tiles(kernel: str, D: int, tiles: Tiles) -> None:
    """Takes them from now on, on GPUs of this name."""
    tuned = json.loads(TUNED.read_text()) if TUNED.is_file() else {}
    tuned.setdefault(torch.cuda.get_device_name(), {})[f"{kernel} {D}"] = tiles
    TUNED.write_text(json.dumps(tuned, indent=1) + "\n")


def time_tiles(kernel: str, D: int, candidates: list[Tiles]) -> dict[Tiles, list[float]]:
    """{tiles: seconds at each shape} of those that run at every shape."""
    def timed(tiles: Tiles) -> float:
        use(kernel, tiles)
        return seconds(run)

    times = {tiles: [] for tiles in candidates}
    for T, packed in itertools.product(TUNED_AT, (False, True)):
        run = launch(kernel, D, T, packed)
        case = f"{kernel} {D}, {T}, documents" if packed else f"{kernel} {D}, {T}"
        for tiles, t in race({tiles: tiles for tiles in times}, timed).items():
            if isinstance(t, str):
                del times[tiles]
                print(f"{case}: {tuple(tiles)} {t}", flush=True)
            else:
                times[tiles].append(t)
                print(f"{case}: {tuple(tiles)} {1e3 * t:.3f} ms", flush=True)
    return times


# --------------------------------------------------------------------------------------------------
# The report

def measurements(family: str, ceiling: float, case: str, step: str, times: dict, work: float,
                 memory={}) -> list[dict]:
    """A line per contestant: its time, its rate in UNITS[family], and its share of the ceiling."""
    unit = UNITS[family]
    scale = {"TFLOP/s": 1e12, "GB/s": 1e9}[unit]
    lines = []
    for name, t in times.items():
        line = dict(family=family, case=case, step=step, contestant=name, unit=unit,
                    memory_gb=memory.get(name))
        if isinstance(t, str):
            line["error"] = t
        else:
            rate = work / t / scale
            line |= dict(seconds=t, rate=rate, share=rate / ceiling)
        lines.append(line)
    return lines


def table(lines: list[dict]) -> str:
    """A family's measurements as markdown: a row per case and pass, a column per contestant.

    Ours is the first.
    """
    names = list(dict.fromkeys(line["contestant"] for line in lines))
    head = ["case", "pass", *names, "ours, of the ceiling", "speed of ours / of the best peer"]
    rows = [f"Milliseconds ({lines[0]['unit']})", "", markdown_row(head), "|---" * len(head) + "|"]
    for key, group in itertools.groupby(lines, lambda line: (line["case"], line["step"])):
        by_name = {line["contestant"]: line for line in group}
        ours = by_name[names[0]]
        peer_rates = [line["rate"] for name, line in by_name.items()
                      if "rate" in line and not name.startswith("ours")]
        share = ratio = ""
        if "rate" in ours:
            share = f"{ours['share']:.0%}"
            if peer_rates:
                ratio = f"{ours['rate'] / max(peer_rates):.2f}"
        cells = [table_cell(by_name.get(name)) for name in names]
        rows.append(markdown_row([*key, *cells, share, ratio]))
    return "\n".join(rows) + "\n"


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table_cell(line: dict | None) -> str:
    if line is None:
        return ""
    if "error" in line:
        return line["error"].replace("|", "/")
    text = f"{1e3 * line['seconds']:.3f} ({line['rate']:,.0f})"
    if line["memory_gb"]:
        text += f" {line['memory_gb']:.2f} GB"
    return text


def describe_run() -> dict:
    """What every line of results/kernels_gpu.jsonl says of its origin."""
    smi = "nvidia-smi --query-gpu=driver_version,power.limit --format=csv,noheader"
    done = subprocess.run(smi, shell=True, capture_output=True, text=True)
    driver, _, power_limit = done.stdout.partition("\n")[0].partition(", ")
    return dict(
        commit=common.current_commit(),
        command=shlex.join(["python", "-m", "kernels.tools.bench", *sys.argv[1:]]),
        seed=SEED,
        machine=common.describe_machine(torch.device("cuda")),
        driver=driver,
        power_limit=power_limit,
        torch=torch.__version__,
        triton=triton.__version__,
        date=datetime.date.today().isoformat())


def check_kernels() -> None:
    """Ends the process with what is wrong, if anything is."""
    print("checking the kernels", file=sys.stderr)
    for family in check.CHECKS:
        wrong = [f"WRONG {finding.what}: error {finding.error:.1e}, bound {finding.bound:.1e}"
                 for finding in check.check_family(family) if not finding.ok]
        if wrong:
            sys.exit("\n".join(wrong))


def race_family(family: str, quick: bool, ceiling: float) -> list[dict]:
    """The measurements of a family, as far as its shapes fit this GPU."""
    cases = (QUICK if quick else CASES)[family]
    lines = []
    try:
        for case, step, *numbers in RACES[family](cases):
            torch.compiler.reset()  # the next shape is compiled for itself
            print(f"{family} {case}, {step}", file=sys.stderr, flush=True)
            lines += measurements(family, ceiling, case, step, *numbers)
    except torch.OutOfMemoryError:  # of the inputs alone
        print(f"{family}: larger shapes do not fit this GPU")
    return lines


def report(families: list[str], quick: bool, is_whole: bool) -> list[dict]:
    """Races the families, prints the tables, and writes them if the run is a whole one."""
    run, top = describe_run(), ceilings()
    text = ", ".join(f"{key} {value}" for key, value in run.items())
    text += (f"\n\nCeilings, measured in the same run: {top['TFLOP/s']:,.0f} TFLOP/s "
             f"(bf16 product of 8192^3) and {top['GB/s']:,.0f} GB/s (copy of 1 GB).\n")
    print(text)
    all_lines = []
    for family in families:
        lines = race_family(family, quick, top[UNITS[family]])
        if not lines:
            continue
        all_lines += lines
        text += f"\n## {family}\n\n{table(lines)}"
        print(f"\n## {family}\n\n{table(lines)}", flush=True)
        if is_whole:
            (RESULTS / "kernels_gpu.md").write_text(text)
            with open(RESULTS / "kernels_gpu.jsonl", "a") as f:
                f.writelines(json.dumps(run | line) + "\n" for line in lines)
    return all_lines


def is_failure(line: dict) -> bool:
    """Whether ours failed, or two computed something else; peers may refuse a shape."""
    if "error" not in line:
        return False
    return "differs" in line["error"] or line["contestant"] == "ours"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(RACES)}; none: all")
    parser.add_argument("--quick", action="store_true", help="4K tokens a row alone")
    parser.add_argument("--tune", action="store_true", help="choose the tiles for this GPU")
    # --try KERNEL D TILES: attempt(), for survives()
    parser.add_argument("--try", dest="attempt", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.family) - set(RACES)
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; known: {', '.join(RACES)}")
    if args.attempt:
        kernel, *numbers = args.attempt
        D, *tiles, specialized = map(int, numbers)
        sys.exit(not attempt(kernel, D, Tiles(*tiles, bool(specialized))))
    if not torch.cuda.is_available():
        print("error: kernels.tools.bench measures a GPU, and there is none here; "
              "`python -m kernels.tools.check` checks the kernels without one", file=sys.stderr)
        sys.exit(2)
    if INTERPRETED:  # it is not what is to be measured
        os.execve(sys.executable, [sys.executable, "-m", "kernels.tools.bench", *sys.argv[1:]],
                  os.environ | {"TRITON_INTERPRET": "0"})
    if args.tune:
        return tune()
    check_kernels()
    is_whole = not args.quick and not args.family
    lines = report(args.family or list(RACES), args.quick, is_whole)
    sys.exit(any(is_failure(line) for line in lines))


if __name__ == "__main__":
    main()
