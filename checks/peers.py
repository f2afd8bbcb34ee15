"""Is it fast? `python -m checks.peers`: our training beside a transformers Llama, our sampling beside its generate().

    OMP_NUM_THREADS=1 python -m checks.peers --write     # a CPU, six minutes; adds lines to results/bench.jsonl
    OMP_NUM_THREADS=1 python -m checks.peers --profile   # only where the time of our own steps and samples goes

Same sizes, same tokens, same threads; all contestants live in one process and take turns, and the median of the rounds
counts. transformers has SDPA and AdamW's fused form, and once AdamW as it is by default; bfloat16 as autocast and as
bfloat16 weights. A step is forward, loss, backward, clipping and AdamW; rows are one document each. "products" are the
step's matrix products alone, without anything between them: nobody can be faster than one's share of that.

Shapes: B rows, T context, C width, V vocabulary.
"""
import argparse
import collections
import re
import statistics
from functools import partial
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch

import common
from experiments import results
from checks.bench import build, made_by, step, timed
from common import UserError
from data.text.mixture import Batch
from generate import sample
from kernels.tools.bench import race, TURN
from model import ModelConfig, Transformer, init_weights
from pretrain import PretrainConfig

SEED = 0
SHAPES = {  # model, B, T
    "char": (ModelConfig(4, 128, 352, 4, 4, 32, vocab_size=65), 12, 64),
    "small": (ModelConfig(6, 256, 704, 4, 2, 64, vocab_size=4096), 8, 256)}
ROWS, PROMPT, NEW = 64, 32, 128  # of generation
CPU = torch.device("cpu")


def random_tokens(m: ModelConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, m.vocab_size, (rows, length))


def llama(m: ModelConfig, dtype: torch.dtype = torch.float32):
    """transformers' Llama of these sizes. Without special tokens: no text ends before it is long enough."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("the peer is missing: pip install -r requirements-dev.txt") from error
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=m.hidden_size, intermediate_size=m.ffn_size, num_hidden_layers=m.n_layers, head_dim=m.head_dim,
        num_attention_heads=m.n_heads, num_key_value_heads=m.n_kv_heads, vocab_size=m.vocab_size,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, pad_token_id=None)).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Contestants: functions that make one step, or one batch of samples

def our_step(m: ModelConfig, B: int, T: int, dtype: str, compile: bool) -> Callable:
    p = PretrainConfig(stages=[], batch_tokens=B * T, dtype=dtype, compile=compile)
    d = common.init_distributed(dtype)
    tokens = random_tokens(m, B, T + 1)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), np.zeros((B, T), np.int32))
    return partial(step, *build(SimpleNamespace(model=m, pretrain=p), d), batch, p, d)


def their_step(m: ModelConfig, B: int, T: int, dtype: torch.dtype, compile: bool, autocast: bool = False,
               **adamw) -> Callable:
    model = llama(m, dtype)
    forward = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, **adamw)
    tokens = torch.from_numpy(random_tokens(m, B, T))

    def one_step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one_step


def products(m: ModelConfig, B: int, T: int, dtype: torch.dtype) -> Callable:
    """The matrix products of a step: of each layer's weights and of lm_head three, of attention's squares six."""
    random = partial(torch.randn, dtype=dtype)
    C, width, kv_width = m.hidden_size, m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    layer = [(C, width), (C, kv_width), (C, kv_width), (width, C), (C, m.ffn_size), (C, m.ffn_size), (m.ffn_size, C)]
    factors = []
    for n_in, n_out in layer * m.n_layers + [(C, m.vocab_size)]:
        x, weight, d_out = random(B * T, n_in), random(n_out, n_in), random(B * T, n_out)
        factors += [(x, weight.T), (d_out, weight), (d_out.T, x)]
    q, k, v, d_out, p = (random(B * m.n_heads, T, n) for n in [m.head_dim] * 4 + [T])
    factors += [(q, k.mT), (p, v), (p.mT, d_out), (d_out, v.mT), (p, k), (p.mT, q)] * m.n_layers

    def run():
        for a, b in factors:
            a @ b

    return run


def our_samples(m: ModelConfig, dtype: torch.dtype) -> Callable:
    model = Transformer(m)
    init_weights(model, SEED)
    prompts = random_tokens(m, ROWS, PROMPT).tolist()

    def run():
        samples = sample(model, prompts, max_new_tokens=NEW, seed=SEED)
        assert all(len(s.tokens) == NEW for (s,) in samples)

    model.to(dtype)
    return run


def their_samples(m: ModelConfig, dtype: torch.dtype, compile: bool) -> Callable:
    """compile: a cache of fixed size, and forward() compiled."""
    model, prompts = llama(m, dtype).eval(), torch.from_numpy(random_tokens(m, ROWS, PROMPT))
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW,
                   attention_mask=torch.ones_like(prompts))
    if compile:
        model.forward, options["cache_implementation"] = torch.compile(model.forward), "static"

    def run():
        assert model.generate(prompts, **options).shape == (ROWS, PROMPT + NEW)

    return run


FP32, BF16 = torch.float32, torch.bfloat16


def contestants(shape: str) -> dict[tuple[str, str, bool], Callable]:
    """{(who, dtype, compiled): function} of training at a shape, or of "generation"."""
    m, B, T = SHAPES.get(shape, SHAPES["small"])
    found = {}
    if shape == "generation":
        for name, dtype in ("float32", FP32), ("bfloat16", BF16):
            found["ours", name, False] = our_samples(m, dtype)
            for compile in (False, True):
                found["transformers", name, compile] = their_samples(m, dtype, compile)
        return found
    for name, dtype in ("float32", FP32), ("bfloat16", BF16):
        found["products", name, False] = products(m, B, T, dtype)
    for compile in (False, True):
        for name in ("float32", "bfloat16"):
            found["ours", name, compile] = our_step(m, B, T, name, compile)
        found["transformers", "float32", compile] = their_step(m, B, T, FP32, compile, fused=True)
        found["transformers", "bfloat16", compile] = their_step(m, B, T, FP32, compile, autocast=True, fused=True)
        found["transformers, all bf16", "bfloat16", compile] = their_step(m, B, T, BF16, compile, fused=True)
    found["transformers, AdamW's default", "float32", False] = their_step(m, B, T, FP32, False)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The race, and what it says

def turn(run: Callable) -> float:
    """The median time of a call, over as many as make a turn."""
    times = []
    while sum(times) < TURN:
        times.append(timed(run, CPU))
    return statistics.median(times)


def compare(shape: str) -> list[dict]:
    """A line a contestant: seconds, tokens/s, and in training the share of its time that the products alone take."""
    runs = contestants(shape)
    _, B, T = SHAPES.get(shape, (None, ROWS, NEW))
    for run in runs.values():  # compiles, and asks for memory
        run()
        run()
    times = race(runs, turn, ())
    lines = []
    for (who, dtype, compiled), seconds in times.items():
        floor = times.get(("products", dtype, False))
        lines.append(dict(shape=shape, contestant=who, dtype=dtype, compile=compiled, tokens=B * T, seconds=seconds,
                          tokens_per_s=B * T / seconds, share_of_products=floor and floor / seconds))
    return lines


def ratios(lines: list[dict]) -> dict[str, float]:
    """Our tokens/s over theirs: theirs at its best in each precision and over both; ours at its best over default."""
    def best(who: str, **same) -> float:
        return max((line["tokens_per_s"] for line in lines if line["contestant"].startswith(who)
                    and all(line[key] == value for key, value in same.items())), default=0.0)

    found, training = {}, lines[0]["shape"] != "generation"
    for compiled in (False, True):
        for dtype in ("float32", "bfloat16", None):
            same = dict(compile=compiled) | (dict(dtype=dtype) if dtype else {})
            ours = same if training else same | dict(compile=False)  # our decoding has no compiled form
            found[f"{'compiled' if compiled else 'eager'}, {dtype or 'the best of each'}"] = (
                best("ours", **ours) / best("transformers", **same))
    if training:
        found["our best, over transformers as it comes"] = best("ours") / best("transformers, AdamW's default")
    return found


def table(lines: list[dict]) -> str:
    rows = [f"{'':32}{'dtype':10}{'':10}{'ms':>10}{'tokens/s':>11}{'products':>10}"]
    for line in sorted(lines, key=lambda line: (line["dtype"] == "bfloat16", line["compile"])):
        share = f"{line['share_of_products']:.0%}" if line["share_of_products"] else ""
        rows.append(f"{line['contestant']:32}{line['dtype']:10}{'compiled' if line['compile'] else 'eager':10}"
                    f"{1e3 * line['seconds']:>10,.1f}{line['tokens_per_s']:>11,.0f}{share:>10}")
    return "\n".join(rows + [f"  {what}: {ratio:.2f} x transformers" for what, ratio in ratios(lines).items()])


GROUPS = {"matrix products": r"aten::(add|b|badd)?mm_?$", "attention": "scaled_dot_product|softmax",
          "AdamW": "adamw|AdamW", "copies": r"aten::(copy_|cat|fill_|zero_|roll|index.*|embedding.*|gather)$",
          "between the products": r"aten::(mul|add|sub|div|silu|pow|sum|cumsum|exp|rsqrt|linalg_vector|addcmul|addmv)",
          "Python, autograd, views": ""}


def profile(run: Callable) -> dict[str, float]:
    """Share of the time of a call that each group of operators takes itself."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        run()
    times = collections.Counter()
    for event in found.key_averages():
        times[next(group for group, names in GROUPS.items() if re.search(names, event.key))] += (
            event.self_cpu_time_total)
    return {group: times[group] / times.total() for group in GROUPS}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="checks/bench.py --peers", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="append the results to results/bench.jsonl")
    parser.add_argument("--profile", action="store_true", help="only our own time, by groups of operators")
    args = parser.parse_args(argv)
    print(f"{common.describe_machine(CPU)}, torch {torch.__version__}")
    for shape in (*SHAPES, "generation"):
        if args.profile:
            for dtype in ("float32", "bfloat16"):
                run = (our_samples(SHAPES["small"][0], getattr(torch, dtype)) if shape == "generation" else
                       our_step(*SHAPES[shape], dtype, False))
                print(f"{shape}, {dtype}: " + ", ".join(f"{group} {x:.0%}" for group, x in profile(run).items()))
            continue
        torch.compiler.reset()
        lines = compare(shape)
        print(f"\n{shape}\n{table(lines)}", flush=True)
        if args.write:
            results.append("bench", *(made_by(SEED, CPU) | line for line in lines))
