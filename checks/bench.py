"""How fast does a config train on this device? Whole optimizer steps, with the Triton kernels and without.

    python -m checks.bench configs/3b.py                 # one GPU: kernels on and off, at the stages' contexts, at most 32K
    python -m checks.bench configs/tiny.py               # a CPU: PyTorch alone, since Triton's interpreter is no contestant
    python -m checks.bench configs/small.py --compile --micro_batches=4 --write       # adds lines to results/bench.jsonl
    python -m checks.peers                       # a CPU: training and sampling beside transformers (checks/peers.py)

Model, FSDP, AdamW, clipping and loss are pretrain.py's, with the config's dtype, compile, recompute and micro_tokens;
only the tokens are random, packed with documents of 512 on the mean. A step is --micro_batches=1 of them. The
contestants share one model and take turns, so that a device that grows hot and slow does so for both.

MFU is by model.flops_per_token, as in training: as if each row were one document.
"""
import dataclasses
import gc
import shlex
import statistics
import sys
import time
from functools import partial

import torch

import common
import loop
from common import UserError
from data.text.mixture import Batch
from data.text.tokenizer import TokenizerConfig
from experiments import results
from kernels.tools.bench import TURN, documents, race
from model import ModelConfig, flops_per_token, init_weights, meta_model
from pretrain import PretrainConfig, StageConfig, check_settings, train_step

LONGEST = 32_768  # the 3B model's 64K rows do not fit one GPU of 80 GB


def build(cfg, d):
    """(model, optimizer) as pretrain.py makes them."""
    p = cfg.pretrain
    model, optimizer = loop.build_model(cfg.model, p, d)
    init_weights(model, p.seed, common.assign)
    return model, optimizer


def use_kernels(model, kernels: str) -> None:
    """Switches a model: "triton" or "torch" in every module that asks, and in the loss."""
    model.cfg.kernels = kernels
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels


def random_batch(rows: int, context: int, vocab_size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(vocab_size, (rows, context), generator=generator).numpy() for _ in range(2))
    return Batch(tokens, targets, documents(rows, context, seed=seed).numpy())


def step(model, optimizer, batch: Batch, p: PretrainConfig, d) -> None:
    """One step of pretrain.py's loop."""
    train_step(model, batch, p, d)
    common.clip_grad_norm(model, p.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(run, device) -> float:
    """Seconds of a call until the device has done it."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def race_kernels(cfg, trainer: list, context: int, n_micro: int, contestants: list[str], d) -> list[dict]:
    """A line a contestant: seconds of a step, tokens/s, MFU, peak memory; or the error.

    trainer: model and optimizer, built here where it is empty."""
    p = cfg.pretrain
    rows = max(1, (p.micro_tokens or p.batch_tokens) // context)  # of a micro-batch
    batch = random_batch(rows * n_micro, context, cfg.model.vocab_size, p.seed)
    p = dataclasses.replace(p, micro_tokens=rows * context)
    torch.compiler.reset()  # each context is compiled for itself
    memory = {}

    def turn(kernels: str) -> float:
        """The median step of a turn, after one that does not count: what a change of kernels brings with it is over."""
        if not trainer:
            gc.collect()
            torch.cuda.empty_cache()
            trainer.extend(build(cfg, d))
        try:
            use_kernels(trainer[0], kernels)
            run, times = partial(step, *trainer, batch, p, d), []
            run()
            if d.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            while sum(times) < TURN:
                times.append(timed(run, d.device))
        except torch.OutOfMemoryError:  # FSDP cannot go on from within a step: the next turn builds anew
            trainer.clear()
            raise
        memory[kernels] = max(memory.get(kernels, 0.0), common.memory_gb(d.device))
        return statistics.median(times)

    peak = common.peak_flops(d.device) if p.dtype == "bfloat16" else None
    lines = []
    for kernels, t in race({kind: kind for kind in contestants}, turn, torch.OutOfMemoryError).items():
        line = dict(context=context, kernels=kernels, tokens=batch.tokens.size)
        if isinstance(t, str):
            lines.append(line | dict(error=t))
        else:
            speed = batch.tokens.size / t
            mfu = speed * flops_per_token(cfg.model, context) / peak if peak else None
            lines.append(line | dict(seconds=t, tokens_per_s=speed, mfu=mfu, memory_gb=memory[kernels]))
    return lines


def made_by(seed: int, device) -> dict:
    """What every line of results/bench.jsonl says of its origin."""
    return dict(commit=common.current_commit(), command=shlex.join(["python", "checks/bench.py", *sys.argv[1:]]), seed=seed,
                machine=common.describe_machine(device), torch=torch.__version__)


def main():
    if "--peers" in sys.argv:
        from checks import peers  # here: it takes its steps from this file
        return peers.main([argument for argument in sys.argv[1:] if argument != "--peers"])
    ours = [argument for argument in sys.argv[1:] if argument.startswith("--micro_batches=")]
    cfg = common.load_config(__doc__, [argument for argument in sys.argv[1:] if argument not in ours],
                             flags={"compile": "torch.compile each block, whatever the config says",
                                    "write": "append the results to results/bench.jsonl"},
                             model=ModelConfig, tokenizer=TokenizerConfig, pretrain=PretrainConfig)
    p, n_micro = cfg.pretrain, ours[-1].partition("=")[2] if ours else "1"
    if not n_micro.isdecimal() or int(n_micro) < 1:
        raise UserError(f"--micro_batches must be a number above 0, not {n_micro!r}")
    stages = [common.from_dict(StageConfig, s, f"pretrain.stages[{i}]") for i, s in enumerate(p.stages)]
    check_settings(p, stages)
    p.compile |= cfg.compile
    cfg.model.vocab_size = cfg.model.vocab_size or cfg.tokenizer.vocab_size
    d = common.init_distributed(p.dtype)
    if d.world > 1:
        raise UserError("checks/bench.py measures one device; start it without torchrun")
    contestants = ["triton", "torch"] if cfg.model.kernels == "auto" else [cfg.model.kernels]
    if d.device.type == "cpu":
        contestants = ["torch"]
        print("no GPU: Triton would run in its interpreter, which is for checking, so PyTorch is alone")

    n_parameters = sum(x.numel() for x in meta_model(cfg.model).parameters())
    print(f"{cfg.run}: {n_parameters:,} parameters, {p.dtype}{', compiled' * p.compile}{', recompute' * p.recompute}, "
          f"{common.describe_machine(d.device)}, torch {torch.__version__}\n\n"
          f"{'context':>8} {'kernels':8}{'tokens':>8}{'ms/step':>10}{'tokens/s':>11}{'MFU':>7}{'peak GB':>9}")
    origin = made_by(p.seed, d.device) | dict(config=common.config_hash(cfg, "model", "pretrain"), dtype=p.dtype,
                                              compile=p.compile, recompute=p.recompute)
    trainer = []
    for context in sorted({min(s.context, LONGEST) for s in stages}):
        for line in race_kernels(cfg, trainer, context, int(n_micro), contestants, d):
            head = f"{line['context']:>8,} {line['kernels']:8}{line['tokens']:>8,}"
            mfu = f"{line['mfu']:.1%}" if line.get("mfu") else "n/a"
            print(head + (f"  {line['error']}" if "error" in line else f"{1e3 * line['seconds']:>10,.1f}"
                          f"{line['tokens_per_s']:>11,.0f}{mfu:>7}{line['memory_gb']:>9.2f}"), flush=True)
            if cfg.write:
                results.append("bench", origin | line)


if __name__ == "__main__":
    common.cli(main)
