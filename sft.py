"""Phase 2b, supervised fine-tuning: a cold start on long chains of thought, then all kinds of work.

    python sft.py configs/tiny.py                    # after pretrain.py and refine.py
    torchrun --nproc_per_node=8 sft.py configs/3b.py --init_from=Nanbeige4-3B-Base
    python sft.py configs/3b.py --prepare            # only tokenizes the pools, which may take long

The report (arXiv 2512.06266, SFT): cold start with 32K of context on 50 % mathematics, 30 %
science, 20 % code; then 64K, 40 % harder reasoning, 30 % general, 20 % agents and tools, 10 % code.
It is silent on rates, batch, epochs, packing and loss: our choice is that only the assistant's own
tokens are trained, that whole conversations are packed into rows (attention stays inside each), and
that the loss is a sum over trained tokens by their global count.

Shapes: B rows of a micro-batch, T context, C width, N trained tokens.
"""
from settings import (
    Count,
    Curve,
    Length,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Sources,
    StartAndEnd,
    load_config,
)

import functools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import common
import loop
from common import Dist
from data.chat import packing
from data.chat.conversations import Pool, prepare, read_pool
from data.chat.packing import Batch, PackedStage, plan_stages
from data.text.mixture import document_lengths
from data.text.tokenizer import Tokenizer, TokenizerConfig
from data.verify import sandbox
from evaluate import EvaluateConfig
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig
from schedule import check_schedule, learning_rate, stage_at

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass
class StageConfig:
    name: str
    lr: StartAndEnd              # learning rate at the start and at the end, as shares of sft.lr
    context: Count               # tokens a row
    conversations: NonNegativeInt = 0  # conversations of the stage; or
    trained_tokens: NonNegativeInt = 0  # its tokens in the loss; one of the two, with a mixture
    mixture: dict[str, PositiveFloat] = field(default_factory=dict)  # {pool: its share of the
                                                                     # stage's conversations}
    epochs: dict[str, PositiveFloat] = field(default_factory=dict)  # in place of these three:
                                                                    # {pool: epochs of it}
    curve: Curve = "linear"      # how the rate goes from start to end
    rope_theta: PositiveFloat | None = None  # rotary base from here on (ABF, arXiv 2309.16039);
                                             # None: as before
    recompute: bool | None = None    # activation checkpointing; None: as in the section
    micro_tokens: NonNegativeInt | None = None  # tokens of one forward pass; None: as in the
                                                # section


@dataclass(kw_only=True)
class SftConfig(loop.TrainConfig):
    batch_tokens: PositiveInt    # tokens of a global batch: an optimizer step
    micro_tokens: NonNegativeInt = 0  # tokens of one forward pass on one device; 0: a device's
                                      # whole share of the batch
    stages: Annotated[list[StageConfig], Length(1)]  # cold start, overall
    pools: dict[str, Sources] = field(default_factory=dict)  # pool -> sources of conversations: see
                                                             # data/chat/conversations.py
    data: str = ""               # the other pools: NAME.jsonl in this folder (default:
                                 # out/<run>/refine)
    folder: str = ""             # of the tokenized pools (default: out/<run>/sft/data)
    over_long: Literal["drop", "cut"] = "drop"  # conversations longer than a row; "cut" teaches
                                                # never to end
    on_bad_line: Literal["skip", "stop"] = "skip"  # at records that are no conversation
    compare: bool = True         # also evaluate what training starts from, on the same problems


def read_stages(cfg: SftConfig) -> list[StageConfig]:
    """The table of stages, checked."""
    for stage in cfg.stages:
        check_schedule(stage.name, stage)
    loop.fill_in_stages(cfg.stages, cfg)
    return cfg.stages


# --------------------------------------------------------------------------------------------------
# Data


def open_pools(
    config, stages: list[StageConfig], tokenizer: Tokenizer, dist: Dist
) -> dict[str, Pool]:
    """The pools that the stages use, tokenized by the first rank where they are not yet."""
    cfg = config.sft
    names = {}  # in the order of the stages, each once
    for stage in stages:
        names |= dict.fromkeys(stage.epochs or stage.mixture)
    made = Path(cfg.data or config.out / "refine")
    sources = dict(cfg.pools)
    for name in names.keys() - sources.keys():
        path = made / f"{name}.jsonl"
        if not cfg.pools or path.is_file():
            sources[name] = [{"path": str(path)}]
    missing = names.keys() - sources.keys()
    if missing:
        raise common.UserError(
            f"the stages take from pool {min(missing)!r}; sft.pools has {', '.join(sources)}"
        )
    folder = Path(cfg.folder or config.out / "sft" / "data")

    def prepare_all() -> None:
        for name in names:
            prepare(folder, name, sources[name], tokenizer, on_bad_line=cfg.on_bad_line)

    dist.from_main(prepare_all)  # for hours maybe: the others wait
    return {name: read_pool(folder / name, tokenizer.hash) for name in names}


def resume_key(plan: list[PackedStage], pools: dict[str, Pool], seed: int, step: int) -> list:
    """The plan's past at a step, as JSON: a run goes on from checkpoints of the same past."""
    data = [[name, len(pool.ends), int(pool.ends[-1])] for name, pool in pools.items()]
    past = []
    for stage in plan:
        if stage.first_step < step:
            end = min(stage.end_step, step)
            past.append(
                [stage.name, stage.context, stage.rows, stage.first_step, end, stage.tokens]
            )
    return [seed, data, *past]


def print_plan(peak: float, plan: list[PackedStage]) -> None:
    """The table of stages: rate, data, and what packing makes of it. peak: learning rate."""
    print(
        f"{'stage':14}{'steps':>7}{'tokens':>9}{'trained':>9}{'filled':>8}{'too long':>9}"
        f"  {'learning rate':22}{'context':>8}  epochs of each pool"
    )
    for stage in plan:
        start, end = stage.settings.lr
        rate = f"{peak * start:.2e} -> {peak * end:.2e}"
        epochs = ", ".join(f"{pool} {n:.2f}" for pool, n in stage.epochs.items())
        too_long = stage.dropped + stage.cut
        print(
            f"{stage.name:14}{stage.n_steps:>7,}{stage.tokens:>9.3g}{stage.trained:>9.3g}"
            f"{stage.fill:>8.1%}{too_long:>9,}  {rate:22}{stage.context:>8,}  {epochs}"
        )


# --------------------------------------------------------------------------------------------------
# One step


def train_step(model, batch: Batch, settings: StageConfig, dist: Dist) -> tuple[float, int]:
    """Adds up the gradient of the global batch's loss; returns it (nats per token) and its tokens.

    settings: of the stage, of which micro_tokens holds.

    loss = sum of weight * -log p(token) / sum of weights, both over all ranks and micro-batches:
    one denominator, known before the first backward pass. A token's weight is its turn's (0 for all
    that the assistant did not write). Only trained positions meet lm_head. FSDP averages gradients
    over ranks, so each part is scaled by the world size.
    """
    arrays = (batch.tokens, batch.targets, batch.weights, batch.doc_start)
    tokens, targets, weights, doc_start = (
        torch.from_numpy(array).to(dist.device, non_blocking=True) for array in arrays)
    total_weight, n_tokens = dist.sum(
        float(batch.weights.sum(dtype=np.float64)), float((batch.weights > 0).sum()))
    nats = torch.zeros((), device=dist.device)
    n_rows, context = tokens.shape
    rows_per_pass = max(1, (settings.micro_tokens or n_rows * context) // context)
    for rows in loop.micro_batches(model, n_rows, rows_per_pass):
        trained = torch.from_numpy(np.flatnonzero(batch.weights[rows]))  # (N,) places in these rows
        trained = trained.to(dist.device, non_blocking=True)
        hidden = model(tokens[rows], doc_start[rows]).flatten(0, 1)[trained]  # (N, C)
        loss = linear_cross_entropy(
            hidden,
            model.lm_head.weight,
            targets[rows].flatten()[trained],
            kernels=model.cfg.kernels,
            token_weights=weights[rows].flatten()[trained],
        )
        (loss * (dist.world / total_weight)).backward()
        nats += loss.detach()
    (total,) = dist.sum(nats.item())
    return total / total_weight, int(n_tokens)


# --------------------------------------------------------------------------------------------------
# The run


def read_batch(
    plan: list[PackedStage], pools: dict[str, Pool], step: int, rank: int, world: int
) -> Batch:
    """A rank's rows of a step's global batch."""
    return packing.build_batch(stage_at(plan, step), pools, step, rank, world)


def main():
    config = load_config(
        __doc__,
        flags={"prepare": "tokenize the pools, and stop"} | sandbox.FLAG,
        model=ModelConfig,
        tokenizer=TokenizerConfig,
        sft=SftConfig,
        evaluate=EvaluateConfig,
    )
    if config.weak_jail:
        sandbox.allow_weak_jail()
    cfg = config.sft
    stages = read_stages(cfg)
    dist = common.init_distributed(cfg.dtype, cfg.shard_size, cfg.timeout_minutes)
    run = loop.start("sft", config, dist, default_source="pretrain")
    pools = open_pools(config, stages, run.tokenizer, dist)
    plan = plan_stages(stages, pools, cfg.batch_tokens, cfg.seed, config.scale, cfg.over_long)
    n_steps = plan[-1].end_step
    if dist.is_main:
        print_plan(cfg.lr, plan)
    if config.prepare:
        return

    loop.load_or_resume(run, functools.partial(resume_key, plan, pools, cfg.seed))
    model, optimizer = run.model, run.optimizer
    if cfg.compare and run.first_step == 0 and config.evaluate.tasks:
        loop.evaluate_starting_point(run, ("document", "chat"))

    log = loop.Log(run, n_steps)
    batches = loop.Prefetch(
        functools.partial(read_batch, plan, pools), run.first_step, n_steps, dist
    )
    stop_signal = common.StopSignal(dist)
    for step in range(run.first_step, n_steps + 1):
        if log.owes_evaluation(plan):
            stage = stage_at(plan, step - 1)
            log.evaluation(stage, loop.evaluate_and_sample(run, stage, step == n_steps))
        if step == n_steps:
            break
        started = time.time()
        stage = stage_at(plan, step)
        loop.configure(model, stage.settings)
        lr = learning_rate(cfg.lr, stage, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        batch = batches.next()
        loss, n_tokens = train_step(model, batch, stage.settings, dist)
        grad_norm = common.clip_grad_norm(model, cfg.grad_clip)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
        else:  # what is not finite never enters the weights; ten in a row are an error
            log.skip_step(step, loss, grad_norm, data=f"step {step} of stage {stage.name}")
        optimizer.zero_grad(set_to_none=True)
        seconds = time.time() - started
        lengths = document_lengths(batch.doc_start)
        log.step(step, stage, loss, lr, grad_norm, n_tokens, lengths, seconds)

        stop = stop_signal.on_any_rank()
        if run.save_is_due(step + 1, stage) or stop:
            run.save(step + 1, stage, must_succeed=stop or step + 1 == n_steps)
        if stop:
            stop_signal.leave(step + 1)
    log.close()
    loop.print_results(run)


if __name__ == "__main__":
    common.cli(main)
