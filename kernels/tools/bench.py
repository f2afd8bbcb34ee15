"""How fast are the kernels? On the GPU at hand, beside PyTorch's own ways to compute the same, each called by name.

    python -m kernels.tools.bench                     # writes results/kernels_gpu.md and .jsonl; about ten minutes
    python -m kernels.tools.bench attention decode    # some of the families: printed, not written
    python -m kernels.tools.bench --quick             # 4K tokens a row alone: printed, not written
    python -m kernels.tools.bench --tune              # times every choice of tiles.CANDIDATES, writes kernels/tuned.json

The kernels are checked first; wrong ones are not timed. Contestants take turns, so that a GPU that grows hot and slow
does so for all, and must agree with ours. Inputs are random: products of zeros draw less power, and so run faster.

Shapes: B batch, T query positions, S key positions, H query heads, K key/value heads, D head width, N rows or tokens,
C width, V vocabulary.
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
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import attention, cross_entropy, INTERPRETED, rmsnorm, triton
from kernels.tools import check
from kernels.tools.check import DEVICE, rand
from kernels.tiles import CANDIDATES, TUNED, Tiles, chip, tiles_for

SEED = 0
ROUNDS, TURN = 5, 0.3    # turns of a contestant, seconds of a turn; the median of the turns' medians counts
HEADS = (20, 4, 128)     # H, K, D of the 3B model
WIDTH, VOCABULARY = 2560, 166_144
TOKENS = 16_384          # B * T in attention, where T is not longer
CASES = {
    "attention": [(2048, False), (4096, False), (8192, False), (32768, False), (65536, False),  # T, packed documents
                  (4096, True), (32768, True)],
    "decode": [(1, 4096), (64, 4096), (1, 32768), (64, 32768)],                                 # B, S
    "rms_norm": [(16384, 1024), (16384, 2560), (16384, 8192)],                                  # N, C
    "cross_entropy": [4096, 16384]}                                                             # N
QUICK = {"attention": [(4096, False), (4096, True)], "decode": [(64, 4096)], "rms_norm": [(4096, 2560)],
         "cross_entropy": [4096]}
UNITS = {"attention": "TFLOP/s", "decode": "GB/s", "rms_norm": "GB/s", "cross_entropy": "TFLOP/s"}
RESULTS = Path(__file__).parent.parent / "results"


# ---------------------------------------------------------------------------------------------------------------------
# The timer

@functools.cache
def larger_than_l2() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device=DEVICE)


def seconds(run: Callable) -> float:
    """Median time on the GPU of a call, after two that do not count, over as many as make a turn."""
    def spans(n: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in events:
            for _ in range(8):  # leaves no input in L2, and lasts long enough for the host to get ahead of the GPU:
                larger_than_l2().zero_()  # what Python needs to launch a kernel is not timed
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    spans(1)  # compiles, asks for memory
    started = time.perf_counter()
    spans(1)
    return statistics.median(spans(int(min(max(TURN / (time.perf_counter() - started), 3), 1000))))


def race(contestants: dict, measure: Callable | None = None, expected: type = Exception) -> dict[object, float | str]:
    """Each contestant has a turn a round: {name: median over the rounds of measure(contestant), or what went wrong}.

    measure: seconds() of a function, unless another is given; then its results must also be near the first one's."""
    found, first = {name: [] for name in contestants}, None
    for round in range(ROUNDS):
        for name, run in contestants.items():
            if isinstance(found[name], str):
                continue
            try:
                if measure is None and round == 0:
                    results = [x.detach() for x in run()]
                    first = first or results
                    if not (off := difference(results, first)) < 0.03:
                        raise ValueError(f"differs by {off:.0%}")
                    results = None  # makes room for what is timed
                found[name].append((measure or seconds)(run))
            except expected as error:
                found[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.60}"
            if isinstance(found[name], str):  # here, where nothing holds on to the failed call's tensors
                torch.cuda.empty_cache()
    return {name: x if isinstance(x, str) else statistics.median(x) for name, x in found.items()}


def difference(results: list[torch.Tensor], of: list[torch.Tensor]) -> float:
    """The largest error of a tensor relative to its norm; gradients of repeated keys have another shape: left out."""
    pairs = [(x.float(), y.float()) for x, y in zip(results, of) if x.shape == y.shape]
    return max((((x - y).norm() / y.norm()).item() for x, y in pairs), key=lambda error: (math.isnan(error), error))


def one_pass(f: Callable, inputs: list[torch.Tensor]) -> tuple:
    outs = f(*inputs)
    return outs if isinstance(outs, tuple) else (outs,)


def both_passes(f: Callable, inputs: list[torch.Tensor], d_outs: tuple | None = None) -> tuple:
    outs = one_pass(f, inputs)
    return *outs, *torch.autograd.grad(outs, inputs, d_outs)


def race_passes(contestants: dict[str, tuple[Callable, list]], d_outs: tuple) -> Iterator[tuple[str, dict]]:
    """(pass, {name: time}) of contestants {name: (function, inputs)}; backward is the difference of the other two."""
    forward = race({name: partial(one_pass, *what) for name, what in contestants.items()})
    both = race({name: partial(both_passes, *what, d_outs) for name, what in contestants.items()})
    errors = {name: t for name, t in (both | forward).items() if isinstance(t, str)}
    yield "forward", forward
    yield "backward", {name: errors.get(name) or both[name] - forward[name] for name in contestants}
    yield "forward + backward", both


def ceilings(n: int = 8192, floats: int = 2**28) -> dict[str, float]:
    """TFLOP/s of a large bf16 product, and GB/s, read and written, of a large copy: both by PyTorch."""
    a, b = (rand(n, n, dtype=torch.bfloat16, seed=i) for i in range(2))
    x = torch.randn(floats, device=DEVICE)
    times = race({"product": lambda: a @ b, "copy": partial(torch.empty_like(x).copy_, x)}, seconds)
    return {"TFLOP/s": 2 * n**3 / times["product"] / 1e12, "GB/s": 2 * x.nbytes / times["copy"] / 1e9}


# ---------------------------------------------------------------------------------------------------------------------
# The families: each yields (case, pass, {name: time}, FLOPs or bytes that must move)

def documents(B: int, T: int, mean: int = 512, seed: int = SEED) -> torch.Tensor:
    """doc_start (B, T) int32 of packed rows: a document begins at each token with chance 1 / mean."""
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 1 / mean
    return torch.where(begins, torch.arange(T), 0).cummax(1).values.int()


def visible_pairs(B: int, T: int, docs: torch.Tensor | None) -> float:
    """Pairs of a query and a key that it sees: T^2 / 2 a row by convention, exact with documents."""
    return B * T * T / 2 if docs is None else float((torch.arange(T, device=docs.device) - docs + 1).sum())


def attention_inputs(B: int, T: int, heads: tuple, packed: bool) -> list:
    """q, k, v, doc_start and the output's gradient."""
    H, K, D = heads
    q, k, v, d_out = (rand(B, T, n, D, dtype=torch.bfloat16, seed=i) for i, n in enumerate((H, K, K, H)))
    return [q, k, v, documents(B, T, min(512, T // 3)).to(DEVICE) if packed else None, d_out]


def attention_peers(q, k, v, docs) -> dict[str, tuple[Callable, list]]:
    """{name: (function, inputs)}, in the model's layout. For documents SDPA needs a mask, which is made once, by a call
    that is not timed; only plain_attention, which is what a model without Triton runs, makes its own each time."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    key, query = torch.arange(S, device=DEVICE), torch.arange(S - T, S, device=DEVICE)[:, None]

    @functools.cache
    def mask():
        sees = (key <= query) & (key >= docs[:, :, None])
        return torch.zeros(sees.shape, device=DEVICE, dtype=q.dtype).masked_fill_(~sees, float("-inf"))[:, None]

    def sees(b, h, query, key):
        causal = key <= query + (S - T)
        return causal if docs is None else causal & (key >= docs[b, query])

    blocks = functools.cache(lambda: create_block_mask(sees, None if docs is None else B, None, T, S, device=DEVICE))
    compiled = torch.compile(flex_attention, dynamic=False)

    def heads_first(attend):
        return lambda *qkv: attend(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    def sdpa(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, None if docs is None else mask(), is_causal=docs is None,
                                                      enable_gqa=k.shape[1] != H)
        return heads_first(attend)

    flex = heads_first(lambda q, k, v: compiled(q, k, v, block_mask=blocks(), enable_gqa=True))
    eager = heads_first(lambda q, k, v: (q @ k.mT * D**-0.5).masked_fill(key > query, float("-inf")).softmax(-1) @ v)
    qkv = [q, k, v]
    peers = {"FlexAttention": (flex, qkv), "SDPA cuDNN": (sdpa(SDPBackend.CUDNN_ATTENTION), qkv)}
    if docs is None:
        peers["SDPA flash"] = sdpa(SDPBackend.FLASH_ATTENTION), qkv
    else:
        peers["plain_attention"] = lambda *qkv: attention.plain_attention(*qkv, docs), qkv
    if T > 1:  # these know no grouped queries: they get a key head for each query head, made here
        repeated = [q, *(x.detach().repeat_interleave(H // K, 2).requires_grad_() for x in (k, v))]
        peers["SDPA efficient (k, v repeated)"] = sdpa(SDPBackend.EFFICIENT_ATTENTION), repeated
        if docs is None and T <= 8192:
            peers["eager (k, v repeated)"] = eager, repeated
    return peers


def race_attention(cases: list, tokens: int = TOKENS, heads: tuple = HEADS) -> Iterator[tuple]:
    for T, packed in cases:
        B = max(1, tokens // T)
        *qkv, docs, d_out = attention_inputs(B, T, heads, packed)
        for x in qkv:
            x.requires_grad_()
        ours = {"ours": (partial(attention.attention, doc_start=docs, kernels="triton"), qkv)}
        flops = 4 * heads[0] * heads[2] * visible_pairs(B, T, docs)  # two products forward, five backward
        for step, times in race_passes(ours | attention_peers(*qkv, docs), (d_out,)):
            factor = {"forward": 1, "backward": 2.5, "forward + backward": 3.5}[step]
            yield f"{B} x {T}{', documents' * packed}", step, times, factor * flops


def race_decode(cases: list, heads: tuple = HEADS) -> Iterator[tuple]:
    """One query a row against a cache of S positions, of which the last half or more are the row's own."""
    H, K, D = heads
    for B, S in cases:
        qkv = [rand(B, *n, D, dtype=torch.bfloat16, seed=i) for i, n in enumerate([(1, H), (S, K), (S, K)])]
        start = torch.randint(S // 2, (B, 1), generator=torch.Generator().manual_seed(SEED)).int().to(DEVICE)
        contestants = {"ours": (partial(attention.attention, doc_start=start, kernels="triton"), qkv)}
        contestants |= attention_peers(*qkv, start)
        with torch.no_grad():
            times = race({name: partial(one_pass, *what) for name, what in contestants.items()})
        yield f"{B} x {S}", "forward", times, int((S - start).sum()) * K * D * 2 * 2  # k and v in bf16


def race_rms_norm(cases: list) -> Iterator[tuple]:
    for (N, C), add in itertools.product(cases, (False, True)):
        *xs, weight = (rand(*n, dtype=torch.bfloat16, seed=i) for i, n in enumerate([(N, C)] * 4 + [(C,)]))
        d_outs, inputs = tuple(xs[:1 + add]), [x.requires_grad_() for x in [*xs[2:3 + add], weight]]

        def peer(x, *rest):
            total = x + rest[0] if add else x
            y = F.rms_norm(total, (C,), rest[-1], 1e-5)
            return (y, total) if add else y

        ours = partial(rmsnorm.add_rms_norm if add else rmsnorm.rms_norm, eps=1e-5, kernels="triton")
        contestants = {"ours": ours, "torch": peer, "torch compiled": torch.compile(peer, dynamic=False)}
        for step, times in race_passes({name: (f, inputs) for name, f in contestants.items()}, d_outs):
            forward, backward = (4, 4) if add else (2, 3)  # tensors (N, C) that must be read or written
            moved = {"forward": forward, "backward": backward, "forward + backward": forward + backward}[step]
            yield f"{N} x {C}{', add' * add}", step, times, moved * N * C * 2


def race_cross_entropy(cases: list, C: int = WIDTH, V: int = VOCABULARY) -> Iterator[tuple]:
    """And the peak memory of loss and gradients, in GB above the inputs."""
    def peak(run: Callable) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    for N in cases:
        inputs = [rand(N, C, dtype=torch.bfloat16).requires_grad_(),
                  rand(V, C, dtype=torch.bfloat16, scale=0.02).requires_grad_()]
        targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
        ours = partial(cross_entropy.linear_cross_entropy, targets=targets)
        plain = lambda hidden, weight: F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        contestants = {"ours": partial(ours, kernels="triton"), "ours (torch)": partial(ours, kernels="torch"),
                       "plain": plain, "plain compiled": torch.compile(plain, dynamic=False)}
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
            contestants["F.linear_cross_entropy"] = partial(F.linear_cross_entropy, target=targets, reduction="sum",
                                                            options=torch.nn.LinearCrossEntropyOptions())
        runs = {name: partial(both_passes, f, inputs) for name, f in contestants.items()}
        times = race(runs)
        memory = {name: peak(run) for name, run in runs.items() if not isinstance(times[name], str)}
        yield f"{N} tokens", "forward + backward", times, 6 * N * C * V, memory


RACES = {"attention": race_attention, "decode": race_decode, "rms_norm": race_rms_norm,
         "cross_entropy": race_cross_entropy}


# ---------------------------------------------------------------------------------------------------------------------
# Tuning

def use(kernel: str, tiles: Tiles) -> None:
    """From now on this kernel has these tiles, the others their own."""
    attention.tiles_for = lambda name, *about: tiles if name == kernel else tiles_for(name, *about)


def attempt(kernel: str, D: int, tiles: Tiles) -> bool:
    """Whether a kernel is right with these tiles, at a small shape."""
    use(kernel, tiles)
    found, (ours, plain) = [], (partial(attention.attention, kernels=way) for way in ("triton", "torch"))
    for packed in (False, True):
        q, k, v, docs, d_out = attention_inputs(2, 20 if INTERPRETED else 300, (4, 2, D), packed)
        if kernel == "attention_decode":
            q, docs, d_out, ours = q[:, -1:], docs if docs is None else docs[:, -1:], None, torch.no_grad()(ours)
        found += check.compare(kernel, ours, plain, [q, k, v, docs], [d_out])
    return all(f.ok for f in found)


def survives(kernel: str, D: int, tiles: Tiles) -> bool:
    """attempt() in a process of its own: a kernel that waits for ever, or a fault, ends with it."""
    command = [sys.executable, "-m", "kernels.tools.bench", "--try", kernel, *(str(int(x)) for x in (D, *tiles))]
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, timeout=120, capture_output=True, text=True)
        why = done.returncode and (done.stderr.strip().rpartition("\n")[2] or "wrong")
    except subprocess.TimeoutExpired:
        why = "not done in 120 seconds"
    if why:
        print(f"{kernel} {D}: {tuple(tiles)} is left out: {why}", flush=True)
    return not why


def launch(kernel: str, D: int, T: int, packed: bool) -> Callable:
    """What is timed: the pass that the kernel is, or is a part of."""
    q, k, v, docs, d_out = attention_inputs(max(1, TOKENS // T), T, (*HEADS[:2], D), packed)
    if kernel == "attention_decode":
        return partial(attention.decode_op, q[:, -1:], k, v, docs if docs is None else docs[:, T // 2, None], D**-0.5)
    if kernel == "attention_forward":
        return partial(attention.forward_op, q, k, v, docs, D**-0.5)
    return partial(attention.backward_op, d_out, q, k, v, docs, *attention.forward_op(q, k, v, docs, D**-0.5), D**-0.5)


def tune() -> None:
    """Writes the fastest tiles, by the geometric mean over the shapes, to kernels/tuned.json, kernel by kernel."""
    def timed(tiles: Tiles) -> float:
        use(kernel, tiles)
        return seconds(run)

    for (kernel, choices), D in itertools.product(CANDIDATES[chip(torch.device("cuda"))].items(), (64, 128)):
        times = {tiles: [] for tiles in choices if survives(kernel, D, tiles)}
        for T, packed in itertools.product((4096, 32768), (False, True)):
            run = launch(kernel, D, T, packed)
            found = race({tiles: tiles for tiles in times}, timed)
            for tiles, t in found.items():
                shown = t if isinstance(t, str) else f"{1e3 * t:.3f} ms"
                print(f"{kernel} {D}, {T}{', documents' * packed}: {tuple(tiles)} {shown}", flush=True)
            times = {tiles: [*times[tiles], t] for tiles, t in found.items() if not isinstance(t, str)}
        if times:
            tuned = json.loads(TUNED.read_text()) if TUNED.is_file() else {}
            tuned.setdefault(torch.cuda.get_device_name(), {})[f"{kernel} {D}"] = min(
                times, key=lambda tiles: statistics.geometric_mean(times[tiles]))
            TUNED.write_text(json.dumps(tuned, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The report

def measurements(family: str, ceiling: float, case: str, step: str, times: dict, work: float, memory={}) -> list[dict]:
    """One a contestant: its time, its rate in UNITS[family], and what share of the ceiling that is."""
    scale = {"TFLOP/s": 1e12, "GB/s": 1e9}[UNITS[family]]
    ran = lambda t: dict(seconds=t, rate=work / t / scale, share=work / t / scale / ceiling)
    return [dict(family=family, case=case, step=step, contestant=name, unit=UNITS[family], memory_gb=memory.get(name))
            | (dict(error=t) if isinstance(t, str) else ran(t)) for name, t in times.items()]


def table(rows: list[dict]) -> str:
    """A family's measurements as markdown: a line a case and pass, a column a contestant, ours first."""
    def cell(r: dict | None) -> str:
        if r is None or "error" in r:
            return r["error"].replace("|", "/") if r else ""
        return f"{1e3 * r['seconds']:.3f} ({r['rate']:,.0f})" + (f" {r['memory_gb']:.2f} GB" if r["memory_gb"] else "")

    names = list(dict.fromkeys(r["contestant"] for r in rows))
    head = ["case", "pass", *names, "ours, of the ceiling", "speed of ours / of the best peer"]
    lines = [f"Milliseconds ({rows[0]['unit']})", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key, group in itertools.groupby(rows, lambda r: (r["case"], r["step"])):
        found = {r["contestant"]: r for r in group}
        peers = [r["rate"] for name, r in found.items() if "rate" in r and not name.startswith("ours")]
        ours, last = found[names[0]], ["", ""]
        if "rate" in ours:
            last = [f"{ours['share']:.0%}", f"{ours['rate'] / max(peers):.2f}" if peers else ""]
        lines.append("| " + " | ".join([*key, *(cell(found.get(name)) for name in names), *last]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(RACES)}; none: all")
    parser.add_argument("--quick", action="store_true", help="4K tokens a row alone")
    parser.add_argument("--tune", action="store_true", help="choose the tiles for this GPU")
    parser.add_argument("--try", dest="attempt", nargs=7, help=argparse.SUPPRESS)  # kernel, D, tiles
    args = parser.parse_args()
    if unknown := set(args.family) - set(RACES):
        parser.error(f"no family {', '.join(unknown)}; known: {', '.join(RACES)}")
    if args.attempt:
        D, *tiles, specialized = map(int, args.attempt[1:])
        sys.exit(not attempt(args.attempt[0], D, Tiles(*tiles, bool(specialized))))
    if not torch.cuda.is_available():
        print("error: kernels.tools.bench measures a GPU, and there is none here; `python -m kernels.attention` checks the "
              "kernels without one", file=sys.stderr)
        sys.exit(2)
    if INTERPRETED:  # it is not what is to be measured
        os.execve(sys.executable, [sys.executable, "-m", "kernels.tools.bench", *sys.argv[1:]],
                  os.environ | {"TRITON_INTERPRET": "0"})
    if args.tune:
        return tune()
    import common  # here: nothing else of kernels/ reaches up
    print("checking the kernels", file=sys.stderr)
    for find, module in (check.attention, attention), (check.rms_norm, rmsnorm), (check.cross_entropy, cross_entropy):
        if wrong := [f for f in find(module) if not f.ok]:
            sys.exit("\n".join(f"WRONG {f.what}: error {f.error:.1e}, bound {f.bound:.1e}" for f in wrong))

    smi = "nvidia-smi --query-gpu=driver_version,power.limit --format=csv,noheader"
    smi = subprocess.run(smi, shell=True, capture_output=True, text=True).stdout.partition("\n")[0]
    run = dict(commit=common.current_commit(), command=shlex.join(["python", "-m", "kernels.tools.bench", *sys.argv[1:]]), seed=SEED,
               machine=common.describe_machine(torch.device("cuda")), driver=smi.partition(", ")[0],
               power_limit=smi.partition(", ")[2], torch=torch.__version__, triton=triton.__version__,
               date=datetime.date.today().isoformat())
    top = ceilings()
    text = ", ".join(f"{key} {value}" for key, value in run.items()) + "\n\nCeilings, measured in the same run: " + \
        f"{top['TFLOP/s']:,.0f} TFLOP/s (bf16 product of 8192^3) and {top['GB/s']:,.0f} GB/s (copy of 1 GB).\n"
    print(text)
    rows = []
    for family in args.family or RACES:
        of_family = []
        try:
            for found in RACES[family]((QUICK if args.quick else CASES)[family]):
                torch.compiler.reset()  # the next shape is compiled for itself
                print(f"{family} {found[0]}, {found[1]}", file=sys.stderr, flush=True)
                of_family += measurements(family, top[UNITS[family]], *found)
        except torch.OutOfMemoryError:  # of the inputs alone
            print(f"{family}: larger shapes do not fit this GPU")
        if not of_family:
            continue
        rows += of_family
        text += f"\n## {family}\n\n{table(of_family)}"
        print(f"\n## {family}\n\n{table(of_family)}", flush=True)
        if not args.quick and not args.family:
            (RESULTS / "kernels_gpu.md").write_text(text)
            with open(RESULTS / "kernels_gpu.jsonl", "a") as f:
                f.writelines(json.dumps(run | row) + "\n" for row in of_family)
    sys.exit(any("error" in r and ("differs" in r["error"] or r["contestant"] == "ours") for r in rows))


if __name__ == "__main__":
    main()
