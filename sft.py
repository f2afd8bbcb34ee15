"""Phase 2b, supervised fine-tuning: a cold start on long chains of thought, then all kinds of work.

    python sft.py configs/tiny.py                    # after pretrain.py and refine.py
    torchrun --nproc_per_node=8 sft.py configs/3b.py --init_from=Nanbeige4-3B-Base
    python sft.py configs/3b.py --prepare            # only tokenizes the pools, which may take long

The report (arXiv 2512.06266, SFT): cold start with 32K of context on 50 % mathematics, 30 % science, 20 % code; then
64K, 40 % harder reasoning, 30 % general, 20 % agents and tools, 10 % code. It is silent on rates, batch, epochs,
packing and loss: our choice is that only the assistant's own tokens are trained, that whole conversations are packed
into rows (attention stays inside each), and that the loss is a sum over trained tokens by their global count.

Shapes: B rows of a micro-batch, T context, C width, N trained tokens.
"""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import common
import hf
import loop
from report import plots
from data.verify import sandbox
from data.chat.conversations import Pool, prepare, read_pool
from data.chat.packing import Batch, batch, plan_stages, PackedStage
from data.text.tokenizer import Tokenizer
from evaluate import EvaluateConfig
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Stage:
    name: str
    lr: list                     # learning rate at the start and at the end, as shares of sft.lr
    context: int                 # tokens a row
    conversations: int = 0       # of the stage, …
    trained_tokens: int = 0      # … or, in their place, tokens in the loss, …
    mixture: dict = field(default_factory=dict)  # … and each pool's share of the conversations: {pool: weight}
    epochs: dict = field(default_factory=dict)  # or, in place of these: {pool: epochs of the whole pool}
    curve: str = "linear"        # how the rate goes from start to end: linear, 1-sqrt, cosine, exponential
    rope_theta: float | None = None  # rotary base from here on (ABF, arXiv 2309.16039); None: as before


@dataclass(kw_only=True)
class SftConfig(loop.TrainConfig):
    batch_tokens: int            # tokens of a global batch: an optimizer step
    micro_tokens: int = 0        # tokens of one forward pass on one device; 0: a device's whole share of the batch
    stages: list                 # cold start, overall: see Stage
    pools: dict = field(default_factory=dict)  # pool -> sources of conversations: see data/chat/conversations.py
    data: str = ""               # without pools: a folder whose NAME.jsonl are the pools (default: out/<run>/refine)
    folder: str = ""             # of the tokenized pools (default: out/<run>/sft/data)
    over_long: str = "drop"      # conversations longer than a row: "drop", or "cut" (which teaches never to end)
    on_bad_line: str = "skip"    # records that are no conversation: "skip", or "stop"
    compare: bool = True         # also evaluate what training starts from, on the same problems


# ---------------------------------------------------------------------------------------------------------------------
# Data

def open_pools(cfg, stages: list[Stage], tokenizer: Tokenizer, d) -> dict[str, Pool]:
    """The pools that the stages use, tokenized by the first rank where they are not yet."""
    names = dict.fromkeys(pool for s in stages for pool in (s.epochs or s.mixture))
    made = Path(cfg.sft.data or cfg.out / "refine")
    sources = cfg.sft.pools or {name: [dict(path=str(made / f"{name}.jsonl"))] for name in names}
    if missing := names.keys() - sources.keys():
        raise common.UserError(f"the stages take from pool {min(missing)!r}; sft.pools has {', '.join(sources)}")
    folder = Path(cfg.sft.folder or cfg.out / "sft" / "data")
    if d.is_main:
        for name in names:
            prepare(folder, name, sources[name], tokenizer, on_bad_line=cfg.sft.on_bad_line)
    d.barrier()
    return {name: read_pool(folder / name, tokenizer.hash) for name in names}


def history(plans: list[PackedStage], pools: dict[str, Pool], p: SftConfig, step: int) -> list:
    """The plan's past at a step, as JSON: a checkpoint's must be the same for a run to go on from it."""
    data = [[name, len(pool.ends), int(pool.ends[-1])] for name, pool in pools.items()]
    return [p.seed, data, *([s.name, s.context, s.rows, s.first_step, min(s.end_step, step), s.tokens]
                            for s in plans if s.first_step < step)]


def print_plan(cfg, stages: list[Stage], plans: list[PackedStage]) -> None:
    """The table of stages: rate, data, and what packing makes of it."""
    print(f"{'stage':14}{'steps':>7}{'tokens':>9}{'trained':>9}{'filled':>8}{'too long':>9}  {'learning rate':22}"
          f"{'context':>8}  epochs of each pool")
    for stage, plan in zip(stages, plans):
        rate = f"{cfg.sft.lr * stage.lr[0]:.2e} -> {cfg.sft.lr * stage.lr[1]:.2e}"
        epochs = ", ".join(f"{pool} {n:.2f}" for pool, n in plan.epochs.items())
        print(f"{plan.name:14}{plan.n_steps:>7,}{plan.tokens:>9.3g}{plan.trained:>9.3g}{plan.fill:>8.1%}"
              f"{plan.dropped + plan.cut:>9,}  {rate:22}{plan.context:>8,}  {epochs}")


# ---------------------------------------------------------------------------------------------------------------------
# One step

def train_step(model, rows: Batch, p: SftConfig, d) -> tuple[float, int]:
    """Adds up the gradient of the global batch's loss; returns that loss (nats a token) and the trained tokens.

    loss = sum of weight * -log p(token) / sum of weights, both over all ranks and micro-batches: one denominator, known
    before the first backward pass. A token's weight is its turn's (0 for all that the assistant did not write). Only
    trained positions meet lm_head. FSDP averages gradients over ranks, so each part is scaled by the world size.
    """
    tokens, targets, weights, doc_start = (torch.from_numpy(a).to(d.device, non_blocking=True) for a in (
        rows.tokens, rows.targets, rows.weights, rows.doc_start))
    total, n_tokens = d.sum(float(rows.weights.sum(dtype=np.float64)), float((rows.weights > 0).sum()))
    nats = torch.zeros((), device=d.device)
    for part in loop.micro_batches(model, tokens.shape, p):
        trained = torch.from_numpy(np.flatnonzero(rows.weights[part])).to(d.device, non_blocking=True)  # (N,)
        hidden = model(tokens[part], doc_start[part]).flatten(0, 1)[trained]  # (N, C)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, targets[part].flatten()[trained],
                                    kernels=model.cfg.kernels, token_weights=weights[part].flatten()[trained])
        (loss * (d.world / total)).backward()
        nats += loss.detach()
    (nats,) = d.sum(nats.item())
    return nats / total, int(n_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The run

def main():
    cfg = common.load_config(__doc__, flags={"prepare": "tokenize the pools, and stop"} | sandbox.FLAG,
                             model=ModelConfig, sft=SftConfig, evaluate=EvaluateConfig)
    if cfg.unsafe_exec:
        sandbox.allow_unlocked()
    p = cfg.sft
    stages = [common.from_dict(Stage, s, f"sft.stages[{i}]") for i, s in enumerate(p.stages)]
    loop.check_settings("sft", p, stages)
    d = common.init_distributed(p.dtype, p.shard_size)
    source = hf.resolve_checkpoint(d, cfg.init_from or "pretrain", cfg.out)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    loop.set_vocab_size(cfg.model, tokenizer.n_vocab)
    pools = open_pools(cfg, stages, tokenizer, d)
    plans = plan_stages(stages, pools, p.batch_tokens, p.seed, cfg.scale, p.over_long)
    if d.is_main:
        print_plan(cfg, stages, plans)
    if cfg.prepare:
        return

    run = loop.Run("sft", cfg, p, tokenizer, source / "tokenizer.json", d)
    newest = common.find_checkpoint(d, run.folder)
    if newest:
        run.resume(newest, True, lambda step: history(plans, pools, p, step))
    else:
        run.model.rope_theta = hf.load_initial_weights(d, run.model, tokenizer, source)
    if p.compare and run.step == 0 and cfg.evaluate.tasks:
        loop.before(run, ("document", "chat"))

    n_steps, loader = plans[-1].end_step, ThreadPoolExecutor(1)
    rows_of = lambda step: batch(plan_of(plans, step), pools, step, d.rank, d.world)
    next_rows = loader.submit(rows_of, run.step) if run.step < n_steps else None
    for step in run.steps(n_steps):
        plan = plan_of(plans, step)
        stage = stages[plans.index(plan)]
        run.model.rope_theta = stage.rope_theta or run.model.rope_theta
        rows = next_rows.result()
        if step + 1 < n_steps:
            next_rows = loader.submit(rows_of, step + 1)
        lr = loop.learning_rate(p, stage, plan, step)

        loss, n_tokens = train_step(run.model, rows, p, d)
        grad_norm = run.update(loss, lr, where=lambda: f"step {step} of stage {plan.name}")
        run.done(plan.name, loss, lr, grad_norm, n_tokens, (plan.rows, plan.context))

        n_problems = run.evaluate_now(plan)
        if n_problems is not None:
            found = loop.look(run, n_problems)
            run.metrics.write(step=step, stage=plan.name, seconds=run.seconds, **found)
        run.save(plan, ("model", "sft"), history(plans, pools, p, run.step))
    if d.is_main:
        print(plots.gain(run.folder), end="\n" if p.compare else "")
        print("picture:", plots.plot_run(run.folder))


def plan_of(plans: list[PackedStage], step: int) -> PackedStage:
    return next(plan for plan in plans if step < plan.end_step)


if __name__ == "__main__":
    common.cli(main)
