"""How fast does a config train on this device? Whole optimizer steps, with and without the kernels.

    python -m checks.bench configs/3b.py      # one GPU: kernels on and off, at the stages' contexts
    python -m checks.bench configs/tiny.py    # a CPU: PyTorch alone
    python -m checks.bench configs/small.py --compile --micro_batches=4 --write

--write adds lines to results/bench.jsonl. On a CPU, Triton's interpreter is no contestant. A
context that does not fit the GPU gets a line that says so. Model, FSDP, AdamW, clipping and loss
are pretrain.py's, with the config's dtype, compile, recompute and micro_tokens; only weights and
tokens are random, packed with documents of 512 on the mean. A step is --micro_batches=1 of them.
The contestants share one model and take turns, so that a device that grows hot and slow does so for
both. checks.peers compares with transformers.

MFU is by model.flops_per_token: as if each row were one document, unlike in training.
"""
from settings import load_config

import dataclasses
import gc
import shlex
import statistics
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Callable

import torch
from torch.distributed.tensor import DTensor

import common
import loop
from common import Dist, UserError
from data.text.mixture import Batch
from data.text.tokenizer import TokenizerConfig
from experiments import results
from kernels.tools.bench import TURN, documents, race
from model import ModelConfig, flops_per_token, meta_model
from pretrain import PretrainConfig, check_stages, train_step


def main():
    config, n_micro = load_bench_config()
    cfg = config.pretrain
    check_stages(cfg.stages)
    dist = common.init_distributed(cfg.dtype)
    if dist.world > 1:
        raise UserError("checks.bench measures one device; start it without torchrun")
    contestants = ["triton", "torch"]
    if config.model.kernels != "auto":
        contestants = [config.model.kernels]
    if dist.device.type == "cpu":
        contestants = ["torch"]
        print("no GPU: Triton would run in its interpreter, which is for checking, "
              "so PyTorch is alone")

    print_head(config, dist)
    origin = describe_origin("checks.bench", cfg.seed, dist.device) | dict(
        config=common.config_hash(config, "model", "pretrain"),
        dtype=cfg.dtype, compile=cfg.compile)
    trainer = Trainer(config, dist)
    for context in sorted({stage.context for stage in cfg.stages}):
        for line in race_kernels(trainer, context, n_micro, contestants):
            print_line(line)
            if config.write:
                results.append("bench", origin | line)


def load_bench_config() -> tuple[SimpleNamespace, int]:
    """The config, with the vocabulary's size and the option --compile, and --micro_batches."""
    name = "--micro_batches="
    own_options = [option for option in sys.argv[1:] if option.startswith(name)]
    flags = {"compile": "torch.compile each block, whatever the config says",
             "write": "append the results to results/bench.jsonl"}
    config = load_config(
        __doc__, [option for option in sys.argv[1:] if option not in own_options], flags,
        model=ModelConfig, tokenizer=TokenizerConfig, pretrain=PretrainConfig)
    config.pretrain.compile |= config.compile
    config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size

    value = own_options[-1].removeprefix(name) if own_options else "1"
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--micro_batches must be a number above 0, not {value!r}")
    return config, int(value)


def describe_origin(module: str, seed: int, device: torch.device) -> dict:
    """What every line of results/bench.jsonl says of its origin; module: the command's."""
    return dict(
        commit=common.current_commit(),
        command=shlex.join(["python", "-m", module, *sys.argv[1:]]),
        seed=seed,
        machine=common.describe_machine(device),
        torch=torch.__version__)


def print_head(config: SimpleNamespace, dist: Dist) -> None:
    cfg = config.pretrain
    n_parameters = sum(p.numel() for p in meta_model(config.model).parameters())
    words = [f"{config.run}: {n_parameters:,} parameters", cfg.dtype]
    if cfg.compile:
        words.append("compiled")
    if cfg.recompute:
        words.append("recompute")
    words += [common.describe_machine(dist.device), f"torch {torch.__version__}"]
    print(", ".join(words) + "\n")
    print(f"{'context':>8} {'kernels':8}{'tokens':>8}{'ms/step':>10}{'tokens/s':>11}"
          f"{'MFU':>7}{'peak GB':>9}")


def print_line(line: dict) -> None:
    text = f"{line['context']:>8,} {line['kernels']:8}{line['tokens']:>8,}"
    if "error" in line:
        text += f"  {line['error']}"
    else:
        ms = 1e3 * line["seconds"]
        mfu = f"{line['mfu']:.1%}" if line["mfu"] else "n/a"
        text += f"{ms:>10,.1f}{line['tokens_per_s']:>11,.0f}{mfu:>7}{line['memory_gb']:>9.2f}"
    print(text, flush=True)


# --------------------------------------------------------------------------------------------------
# A step, and its time

def build(config: SimpleNamespace, dist: Dist):
    """(model, optimizer) as pretrain.py makes them, with random weights."""
    model, optimizer = loop.build_model(config.model, config.pretrain, dist)
    draw_weights(model, config.pretrain.seed)
    return model, optimizer


@torch.no_grad()
def draw_weights(model, seed: int) -> None:
    """As init_weights draws them, but on the device: of billions a CPU would draw for a minute."""
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.ndim == 1:
            local.fill_(1.0)
        else:
            local.normal_(0.0, model.cfg.init_std, generator=generator)


def settings_at(cfg: PretrainConfig, context: int) -> PretrainConfig:
    """The section with what a stage of this context has of its own: micro_tokens, recompute."""
    loop.fill_in_stages(cfg.stages, cfg)
    for stage in cfg.stages:
        if stage.context == context:
            cfg = dataclasses.replace(
                cfg, micro_tokens=stage.micro_tokens, recompute=stage.recompute)
    return cfg


def use_kernels(model, kernels: str) -> None:
    """Switches a model: "triton" or "torch" in every module that asks, and in the loss."""
    model.cfg.kernels = kernels
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels


def random_batch(rows: int, context: int, vocab_size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, context), generator=generator)
    targets = torch.randint(vocab_size, (rows, context), generator=generator)
    doc_start = documents(rows, context, seed=seed)
    return Batch(tokens.numpy(), targets.numpy(), doc_start.numpy())


def step(model, optimizer, batch: Batch, cfg: PretrainConfig, dist: Dist) -> None:
    """One step of pretrain.py's loop."""
    train_step(model, batch, cfg, dist)
    common.clip_grad_norm(model, cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(run: Callable, device: torch.device) -> float:
    """Seconds of a call until the device has done it."""
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Trainer:
    """The model and the optimizer that all contestants share.

    They are built when a step first needs them, and anew after a lack of memory: FSDP cannot go on
    from within a step.
    """

    def __init__(self, config: SimpleNamespace, dist: Dist):
        self.config = config
        self.dist = dist
        self.model = None
        self.optimizer = None

    def time_steps(self, kernels: str, batch: Batch, cfg: PretrainConfig) -> tuple[float, float]:
        """The median seconds of the steps of a turn, and the peak memory in GB.

        A first step does not count: after it, what a change of kernels brings with it is over.
        """
        if self.model is None:
            gc.collect()
            torch.cuda.empty_cache()
            self.model, self.optimizer = build(self.config, self.dist)
        device, times = self.dist.device, []
        try:
            use_kernels(self.model, kernels)
            loop.set_recompute(self.model, cfg.recompute)
            run = partial(step, self.model, self.optimizer, batch, cfg, self.dist)
            run()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            while sum(times) < TURN:
                times.append(timed(run, device))
        except torch.OutOfMemoryError:
            self.model = self.optimizer = None
            raise
        return statistics.median(times), common.memory_gb(device)


def race_kernels(
        trainer: Trainer, context: int, n_micro: int, contestants: list[str]) -> list[dict]:
    """A line per contestant: seconds of a step, tokens/s, MFU, peak memory; or the error."""
    cfg, model_cfg = settings_at(trainer.config.pretrain, context), trainer.config.model
    rows = max(1, (cfg.micro_tokens or cfg.batch_tokens) // context)  # of a micro-batch
    batch = random_batch(rows * n_micro, context, model_cfg.vocab_size, cfg.seed)
    cfg = dataclasses.replace(cfg, micro_tokens=rows * context)
    torch.compiler.reset()  # each context is compiled for itself
    memory_gb = dict.fromkeys(contestants, 0.0)

    def turn(kernels: str) -> float:
        seconds, gb = trainer.time_steps(kernels, batch, cfg)
        memory_gb[kernels] = max(memory_gb[kernels], gb)
        return seconds

    peak = common.peak_flops(trainer.dist.device, cfg.dtype)
    flops = flops_per_token(model_cfg, context)
    lines = []
    times = race({kernels: kernels for kernels in contestants}, turn, torch.OutOfMemoryError)
    for kernels, seconds in times.items():
        line = dict(context=context, kernels=kernels, tokens=batch.tokens.size)
        line["recompute"] = cfg.recompute
        if isinstance(seconds, str):
            line["error"] = seconds
        else:
            tokens_per_s = batch.tokens.size / seconds
            line |= dict(
                seconds=seconds,
                tokens_per_s=tokens_per_s,
                mfu=tokens_per_s * flops / peak if peak else None,
                memory_gb=memory_gb[kernels])
        lines.append(line)
    return lines


if __name__ == "__main__":
    common.cli(main)
