"""Is it fast? Our training beside a transformers Llama, our sampling beside its generate().

    OMP_NUM_THREADS=1 python -m checks.peers --write
    OMP_NUM_THREADS=1 python -m checks.peers --profile

The first takes six minutes on a CPU and adds lines to results/bench.jsonl; the second says only
where the time of our own steps and samples goes.

Same sizes, same tokens, same threads; all contestants live in one process and take turns, and the
median of the rounds counts. transformers has SDPA and AdamW's fused form, and once AdamW as it is
by default; bfloat16 as autocast and as bfloat16 weights. A step is forward, loss, backward,
clipping and AdamW; rows are one document each. "products" are the step's matrix products alone,
without anything between them: nobody can be faster than one's share of that.

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
from checks.bench import build, describe_origin, step, timed
from common import UserError
from data.text.mixture import Batch
from experiments import results
from generate import sample
from kernels.tools.bench import TURN, race
from model import ModelConfig, Transformer, init_weights
from pretrain import PretrainConfig

SEED = 0
SHAPES = {  # model, B, T
    "char": (ModelConfig(4, 128, 352, 4, 4, 32, vocab_size=65), 12, 64),
    "small": (ModelConfig(6, 256, 704, 4, 2, 64, vocab_size=4096), 8, 256)}
ROWS, PROMPT, NEW = 64, 32, 128  # of generation
CPU = torch.device("cpu")


def random_tokens(cfg: ModelConfig, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, cfg.vocab_size, (rows, length))


def llama(cfg: ModelConfig, dtype: torch.dtype = torch.float32):
    """transformers' Llama of these sizes.

    It has no special tokens: no text ends before it is long enough.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError("the peer is missing: pip install -r requirements-dev.txt") from error
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.ffn_size,
        num_hidden_layers=cfg.n_layers,
        head_dim=cfg.head_dim,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        vocab_size=cfg.vocab_size,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None)).to(dtype)


# --------------------------------------------------------------------------------------------------
# Contestants: functions that make one step, or one batch of samples

def our_step(model_cfg: ModelConfig, B: int, T: int, dtype: str, compile: bool) -> Callable:
    cfg = PretrainConfig(stages=[], batch_tokens=B * T, dtype=dtype, compile=compile)
    dist = common.init_distributed(dtype)
    tokens = random_tokens(model_cfg, B, T + 1)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), np.zeros((B, T), np.int32))
    model, optimizer = build(SimpleNamespace(model=model_cfg, pretrain=cfg), dist)
    return partial(step, model, optimizer, batch, cfg, dist)


def their_step(cfg: ModelConfig, B: int, T: int, dtype: torch.dtype, compile: bool,
               autocast: bool = False, **adamw) -> Callable:
    model = llama(cfg, dtype)
    forward = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, **adamw)
    tokens = torch.from_numpy(random_tokens(cfg, B, T))

    def one_step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one_step


def products(cfg: ModelConfig, B: int, T: int, dtype: torch.dtype) -> Callable:
    """The matrix products of a step: three of each weight and of lm_head, six of attention."""
    random = partial(torch.randn, dtype=dtype)
    C, F, D = cfg.hidden_size, cfg.ffn_size, cfg.head_dim
    width, kv_width = cfg.n_heads * D, cfg.n_kv_heads * D
    attention = [(C, width), (C, kv_width), (C, kv_width), (width, C)]
    mlp = [(C, F), (C, F), (F, C)]
    factors = []
    for n_in, n_out in (attention + mlp) * cfg.n_layers + [(C, cfg.vocab_size)]:
        x, weight, d_out = random(B * T, n_in), random(n_out, n_in), random(B * T, n_out)
        factors += [(x, weight.T), (d_out, weight), (d_out.T, x)]

    q, k, v, d_out = (random(B * cfg.n_heads, T, D) for _ in range(4))
    p = random(B * cfg.n_heads, T, T)
    scores = [(q, k.mT), (d_out, v.mT), (p.mT, q), (p, k)]
    values = [(p, v), (p.mT, d_out)]
    factors += (scores + values) * cfg.n_layers

    def run():
        for a, b in factors:
            a @ b

    return run


def our_samples(cfg: ModelConfig, dtype: torch.dtype) -> Callable:
    model = Transformer(cfg)
    init_weights(model, SEED)
    prompts = random_tokens(cfg, ROWS, PROMPT).tolist()

    def run():
        samples = sample(model, prompts, max_new_tokens=NEW, seed=SEED)
        assert all(len(s.tokens) == NEW for (s,) in samples)

    model.to(dtype)
    return run


def their_samples(cfg: ModelConfig, dtype: torch.dtype, compile: bool) -> Callable:
    """compile: a cache of fixed size, and forward() compiled."""
    model = llama(cfg, dtype).eval()
    prompts = torch.from_numpy(random_tokens(cfg, ROWS, PROMPT))
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW,
                   attention_mask=torch.ones_like(prompts))
    if compile:
        model.forward = torch.compile(model.forward)
        options["cache_implementation"] = "static"

    def run():
        assert model.generate(prompts, **options).shape == (ROWS, PROMPT + NEW)

    return run


FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"float32": FP32, "bfloat16": BF16}


def training_contestants(shape: str) -> dict[tuple[str, str, bool], Callable]:
    """{(who, dtype, compiled): function that makes one step}."""
    cfg, B, T = SHAPES[shape]
    runs = {}
    for name, dtype in DTYPES.items():
        runs["products", name, False] = products(cfg, B, T, dtype)
    for compile in (False, True):
        for name in DTYPES:
            runs["ours", name, compile] = our_step(cfg, B, T, name, compile)
        theirs = partial(their_step, cfg, B, T, compile=compile, fused=True)
        runs["transformers", "float32", compile] = theirs(dtype=FP32)
        runs["transformers", "bfloat16", compile] = theirs(dtype=FP32, autocast=True)
        runs["transformers, all bf16", "bfloat16", compile] = theirs(dtype=BF16)
    runs["transformers, AdamW's default", "float32", False] = their_step(cfg, B, T, FP32, False)
    return runs


def generation_contestants() -> dict[tuple[str, str, bool], Callable]:
    """{(who, dtype, compiled): function that makes one batch of samples}."""
    cfg, _, _ = SHAPES["small"]
    runs = {}
    for name, dtype in DTYPES.items():
        runs["ours", name, False] = our_samples(cfg, dtype)
        for compile in (False, True):
            runs["transformers", name, compile] = their_samples(cfg, dtype, compile)
    return runs


# --------------------------------------------------------------------------------------------------
# The race, and what it says

def turn(run: Callable) -> float:
    """The median time of a call, over as many as make a turn."""
    times = []
    while sum(times) < TURN:
        times.append(timed(run, CPU))
    return statistics.median(times)


def compare(shape: str) -> list[dict]:
    """A line per contestant: seconds, tokens/s, and in training also share_of_products.

    share_of_products: the share of its time that the products alone take.
    """
    if shape == "generation":
        runs, n_tokens = generation_contestants(), ROWS * NEW
    else:
        _, B, T = SHAPES[shape]
        runs, n_tokens = training_contestants(shape), B * T
    for run in runs.values():  # compiles, and asks for memory
        run()
        run()
    times = race(runs, turn, ())
    lines = []
    for (who, dtype, compiled), seconds in times.items():
        floor = times.get(("products", dtype, False))
        lines.append(dict(
            shape=shape, contestant=who, dtype=dtype, compile=compiled, tokens=n_tokens,
            seconds=seconds, tokens_per_s=n_tokens / seconds,
            share_of_products=floor and floor / seconds))
    return lines


def ratios(lines: list[dict]) -> dict[str, float]:
    """Our tokens/s over theirs, {what: ratio}.

    Theirs at its best in each precision and over both; ours at its best over theirs by default.
    """
    def best(who: str, **same) -> float:
        speeds = [0.0]
        for line in lines:
            is_same = all(line[key] == value for key, value in same.items())
            if line["contestant"].startswith(who) and is_same:
                speeds.append(line["tokens_per_s"])
        return max(speeds)

    is_training = lines[0]["shape"] != "generation"
    found = {}
    for compiled, name in (False, "eager"), (True, "compiled"):
        for dtype in (*DTYPES, None):
            same = dict(compile=compiled)
            ours = same if is_training else dict(compile=False)  # our decoding has no compiled form
            only = dict(dtype=dtype) if dtype else {}
            ratio = best("ours", **ours, **only) / best("transformers", **same, **only)
            found[f"{name}, {dtype or 'the best of each'}"] = ratio
    if is_training:
        by_default = best("transformers, AdamW's default")
        found["our best, over transformers as it comes"] = best("ours") / by_default
    return found


def table(lines: list[dict]) -> str:
    rows = [f"{'':32}{'dtype':10}{'':10}{'ms':>10}{'tokens/s':>11}{'products':>10}"]
    for line in sorted(lines, key=lambda line: (line["dtype"] == "bfloat16", line["compile"])):
        mode = "compiled" if line["compile"] else "eager"
        ms = 1e3 * line["seconds"]
        share = f"{line['share_of_products']:.0%}" if line["share_of_products"] else ""
        rows.append(f"{line['contestant']:32}{line['dtype']:10}{mode:10}"
                    f"{ms:>10,.1f}{line['tokens_per_s']:>11,.0f}{share:>10}")
    for what, ratio in ratios(lines).items():
        rows.append(f"  {what}: {ratio:.2f} x transformers")
    return "\n".join(rows)


GROUPS = {  # of operators, by the name that a profile has for each; the first that fits counts
    "matrix products": r"aten::(add|b|badd)?mm_?$",
    "attention": "scaled_dot_product|softmax",
    "AdamW": "adamw|AdamW",
    "copies": r"aten::(copy_|cat|fill_|zero_|roll|index.*|embedding.*|gather)$",
    "between the products":
        r"aten::(mul|add|sub|div|silu|pow|sum|cumsum|exp|rsqrt|linalg_vector|addcmul|addmv)",
    "Python, autograd, views": ""}


def profile(run: Callable) -> dict[str, float]:
    """Share of the time of a call that each group of operators takes itself."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    times = collections.Counter()
    for event in profiler.key_averages():
        group = next(group for group, names in GROUPS.items() if re.search(names, event.key))
        times[group] += event.self_cpu_time_total
    return {group: times[group] / times.total() for group in GROUPS}


def print_profile(shape: str) -> None:
    """Where the time of our own steps, or samples, goes."""
    for name, dtype in DTYPES.items():
        if shape == "generation":
            run = our_samples(SHAPES["small"][0], dtype)
        else:
            run = our_step(*SHAPES[shape], name, False)
        shares = [f"{group} {share:.0%}" for group, share in profile(run).items()]
        print(f"{shape}, {name}: " + ", ".join(shares))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true",
                        help="append the results to results/bench.jsonl")
    parser.add_argument("--profile", action="store_true",
                        help="only our own time, by groups of operators")
    args = parser.parse_args()
    print(f"{common.describe_machine(CPU)}, torch {torch.__version__}")
    for shape in (*SHAPES, "generation"):
        if args.profile:
            print_profile(shape)
            continue
        torch.compiler.reset()
        lines = compare(shape)
        print(f"\n{shape}\n{table(lines)}", flush=True)
        if args.write:
            origin = describe_origin("checks.peers", SEED, CPU)
            results.append("bench", *(origin | line for line in lines))


if __name__ == "__main__":
    common.cli(main)
