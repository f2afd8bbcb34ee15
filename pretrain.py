"""Phase 1, pre-training with FG-WSD: Fine-Grained Warmup-Stable-Decay (arXiv 2512.06266, section 2).

The learning rate is an ordinary warmup-stable-decay. What is new is that the constant stage is cut into stages of ever
better data, so that a change of data never falls together with a change of rate; context grows only in the decay.

    python -m data.text.corpus configs/tiny.py            # once: tokenizer and shards
    python pretrain.py configs/tiny.py               # or: torchrun --nproc_per_node=8 pretrain.py configs/3b.py
    python pretrain.py configs/3b.py --plan          # what the stages would do, without training

A stopped run goes on from its newest whole checkpoint when the same command is given again.

Shapes: B rows of a micro-batch, T context, C width, V vocabulary.
"""
import dataclasses
import math
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import hf
import loop
from report import plots
from common import UserError
from data.text.corpus import CorpusConfig, data_folder, read_pool
from data.text.mixture import branch, Mixture, plan_stages, PoolStream, MixtureStage
from data.text.tokenizer import Tokenizer, TokenizerConfig
from evaluate import EvaluateConfig, evaluate, format_table, without_rows
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig, flops_per_token, init_weights

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Stage:
    name: str
    lr: list                     # learning rate at the start and at the end, as shares of pretrain.lr
    context: int                 # tokens a row
    tokens: int = 0              # tokens of the stage …
    mixture: dict = field(default_factory=dict)  # … and each pool's share of them: {pool: weight}
    epochs: dict = field(default_factory=dict)  # or, in place of both: {pool: epochs of the whole pool}
    curve: str = "linear"        # how the rate goes from start to end: linear, 1-sqrt, cosine, exponential
    rope_theta: float | None = None  # rotary base from here on (ABF, arXiv 2309.16039); None: as before


@dataclass(kw_only=True)
class PretrainConfig(loop.TrainConfig):
    batch_tokens: int            # tokens of a global batch: an optimizer step
    micro_tokens: int = 0        # tokens of one forward pass on one device; 0: a device's whole share of the batch
    stages: list                 # the FG-WSD table: see Stage
    total_tokens: int = 0        # scales all stages alike to this many tokens; 0: as the table says
    eval_tokens: int = 100_000   # held-out tokens a pool for the validation loss
    held_out: list = field(default_factory=list)  # pools of which it is taken (default: all that the stages use)
    branch_from: str = ""        # checkpoint of another run at which this one leaves for stage `branch_to`
    branch_to: str = "decay"     # where a branch goes on: a decay can be had from any stable checkpoint
    pool_tokens: dict = field(default_factory=dict)  # tokens a pool, for --plan where the corpus is not prepared


def check_settings(p: PretrainConfig, stages: list[Stage]) -> None:
    """What types cannot say: raises UserError."""
    for s in stages:
        if bool(s.epochs) == bool(s.tokens and s.mixture):
            raise UserError(f"stage {s.name!r} needs either epochs, or tokens and mixture")
    loop.check_settings("pretrain", p, stages)


# ---------------------------------------------------------------------------------------------------------------------
# Plan and data

def make_plan(cfg, stages: list[Stage], pool_sizes: dict[str, int]) -> list[MixtureStage]:
    """The stages in steps, after --scale, total_tokens and a branch."""
    p, scale = cfg.pretrain, cfg.scale
    plans = plan_stages(stages, pool_sizes, p.batch_tokens, scale)
    if p.total_tokens:
        scale *= p.total_tokens / sum(sum(plan.tokens.values()) for plan in plans)
        plans = plan_stages(stages, pool_sizes, p.batch_tokens, scale)
    if p.branch_from:
        name = Path(p.branch_from).name
        if not name.removeprefix("step_").isdecimal():
            raise UserError(f"pretrain.branch_from must be one checkpoint (…/step_<n>), not {p.branch_from}")
        plans = branch(plans, int(name.removeprefix("step_")), p.branch_to)
    return plans


def history(plans: list[MixtureStage], step: int) -> list:
    """The plan's past at a step, as JSON: a checkpoint's must be the same for a run to go on from it."""
    return [[p.name, p.context, p.rows, p.first_step, min(p.end_step, step), p.start]
            for p in plans if p.first_step < step]


def print_plan(cfg, stages: list[Stage], plans: list[MixtureStage], pool_sizes: dict[str, int]) -> None:
    """The table of stages: rate, data, context and cost; and a picture of it."""
    by_name = {s.name: s for s in stages}
    head = f"{'stage':14}{'steps':>10}{'tokens':>9}  {'learning rate':22}{'context':>8}{'rope base':>11}{'FLOPs':>10}  "
    print(head + "mixture, epochs of each pool so far")
    position, theta, total = {}, cfg.model.rope_theta, 0.0
    for plan in plans:
        stage = by_name[plan.name]
        theta = stage.rope_theta or theta
        tokens = sum(plan.tokens.values())
        flops = tokens * flops_per_token(cfg.model, plan.context)
        position |= plan.positions(plan.end_step)
        total += flops
        shares = ", ".join(f"{pool} {n / tokens:.0%} (to {position[pool] / pool_sizes[pool]:.2f})"
                           for pool, n in plan.tokens.items())
        rate = f"{cfg.pretrain.lr * stage.lr[0]:.2e} -> {cfg.pretrain.lr * stage.lr[1]:.2e}"
        print(f"{plan.name:14}{plan.n_steps:>10,}{tokens:>9.3g}  {rate:22}{plan.context:>8,}{theta:>11.4g}"
              f"{flops:>10.2e}  {shares}")
    for pool, at in position.items():
        if at > 4 * pool_sizes[pool]:
            print(f"note: pool {pool!r} is repeated {at / pool_sizes[pool]:.1f} times; past 4 epochs repeated tokens "
                  "are worth little (arXiv 2305.16264)")
    print(f"{plans[-1].end_step:,} steps, {sum(sum(p.tokens.values()) for p in plans):.4g} tokens, {total:.3g} FLOPs"
          f" = {total / (0.4 * 989e12) / 3600:,.3g} hours of one H100 at 40 % of its bf16 peak")


def open_data(cfg, stages: list[Stage]) -> tuple[Tokenizer, dict[str, list], dict[str, list]]:
    """Tokenizer, and the training and held-out shards of every pool that the stages use.

    Raises UserError, with the command that prepares the data, where something is missing or damaged.
    """
    shared = ("--run=", "--name=", "--corpus.", "--tokenizer.")
    settings = [argument for argument in shlex.split(cfg.command)[1:] if argument.startswith(shared)]
    command = shlex.join(["python", "-m", "data.text.corpus", cfg.path, *settings])
    folder = data_folder(cfg)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"no data in {folder}: prepare it with `{command}`")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    names = list(dict.fromkeys(pool for s in stages for pool in (s.epochs or s.mixture)))
    train, held_out = ({name: read_pool(folder / name, split, tokenizer.hash, command) for name in chosen}
                       for split, chosen in (("train", names), ("val", cfg.pretrain.held_out or names)))
    return tokenizer, train, {name: shards for name, shards in held_out.items() if shards}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation as training goes

@torch.no_grad()
def validation(model, tokenizer, streams: dict[str, PoolStream], context: int, cfg: PretrainConfig, d) -> dict:
    """Held-out loss (nats a token) and bits per byte of each pool, over the same tokens every time."""
    results = {}
    for pool, stream in streams.items():
        n_rows = max(1, min(cfg.eval_tokens, stream.size) // context)
        per_pass = max(1, (cfg.micro_tokens or cfg.batch_tokens // d.world) // context)
        nats = n_tokens = n_bytes = 0
        for first in range(0, n_rows, per_pass * d.world):  # every rank makes the same number of forward passes
            rows = range(first, min(first + per_pass * d.world, n_rows))[d.rank::d.world] or [0]
            tokens, targets, doc_start = (torch.from_numpy(np.stack(c)).to(d.device) for c in zip(
                *(stream.read(row * context, min(context, stream.size)) for row in rows)))
            if first + d.rank >= n_rows:  # this rank has no row left: it only keeps the others company
                targets.fill_(-100)
            hidden = model(tokens, doc_start)
            nats += linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten(),
                                         kernels=model.cfg.kernels).item()
            kept = targets[targets >= 0].cpu().numpy()
            n_tokens, n_bytes = n_tokens + len(kept), n_bytes + int(tokenizer.byte_lengths[kept].sum())
        nats, n_tokens, n_bytes = d.sum(nats, n_tokens, n_bytes)
        results[pool] = {"loss": nats / max(1, n_tokens), "bits_per_byte": nats / math.log(2) / max(1, n_bytes)}
    if d.mesh is not None:
        model.reshard()
    return results


def look(run: loop.Run, held_out: dict[str, PoolStream], context: int, n_problems: int) -> dict:
    """Held-out loss, accuracy on n_problems a task, and samples: printed, and returned for the metrics."""
    cfg, p, d, tokenizer = run.cfg, run.p, run.d, run.tokenizer
    losses = validation(run.model, tokenizer, held_out, context, p, d)
    plain, scores = run.plain(), {}
    if n_problems and cfg.evaluate.tasks:
        scores = evaluate(plain, tokenizer, dataclasses.replace(cfg.evaluate, n_problems=n_problems), d)
    if not d.is_main:
        return {}
    for pool, r in losses.items():
        tqdm.write(f"  held-out {pool}: loss {r['loss']:.4f}, {r['bits_per_byte']:.4f} bits per byte")
    texts = []
    if p.prompts:
        ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in p.prompts]
        texts = [a + b for a, b in zip(p.prompts, loop.continuations(plain, tokenizer, ids, p.seed))]
    for text in texts:
        tqdm.write("  | " + text.replace("\n", "\n  | "))
    if scores:
        tqdm.write(format_table(scores))
    sys.stdout.flush()
    return {"validation": losses, "scores": without_rows(scores), "samples": texts}


# ---------------------------------------------------------------------------------------------------------------------
# One step

def train_step(model, batch, cfg: PretrainConfig, d) -> tuple[float, int]:
    """Adds up the gradient of the global batch's mean loss; returns that loss (nats a token) and the trained tokens.

    One denominator, known before the first backward pass: trained tokens over all ranks and micro-batches. FSDP
    averages gradients over ranks, so each rank's part is scaled by the world size.
    """
    tokens, targets, doc_start = (torch.from_numpy(a).to(d.device, non_blocking=True)
                                  for a in (batch.tokens, batch.targets, batch.doc_start))
    packed = bool(batch.doc_start.any())  # else one document a row: the causal mask alone
    (n_tokens,) = d.sum(float((targets >= 0).sum()))
    nats = torch.zeros((), device=d.device)
    for rows in loop.micro_batches(model, tokens.shape, cfg):
        hidden = model(tokens[rows], doc_start[rows] if packed else None)  # (B, T, C)
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets[rows].flatten(),
                                    kernels=model.cfg.kernels)
        (loss * (d.world / n_tokens)).backward()
        nats += loss.detach()
    (total,) = d.sum(nats.item())
    return total / n_tokens, int(n_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The run

def main():
    cfg = common.load_config(__doc__, flags={"plan": "print and plot the stages, and stop"}, model=ModelConfig,
                             tokenizer=TokenizerConfig, corpus=CorpusConfig, pretrain=PretrainConfig,
                             evaluate=EvaluateConfig)
    p = cfg.pretrain
    stages = [common.from_dict(Stage, s, f"pretrain.stages[{i}]") for i, s in enumerate(p.stages)]
    check_settings(p, stages)
    if cfg.corpus.path:  # one's own text: a single pool, in every stage
        stages = [dataclasses.replace(s, mixture={"text": 1.0}, epochs={}) if s.tokens else
                  dataclasses.replace(s, epochs={"text": max(s.epochs.values())}) for s in stages]
    folder = cfg.out / "pretrain"

    if cfg.plan and p.pool_tokens and not cfg.corpus.path:
        cfg.model.vocab_size = cfg.model.vocab_size or cfg.tokenizer.vocab_size
        plans = make_plan(cfg, stages, p.pool_tokens)
        print_plan(cfg, stages, plans, p.pool_tokens)
        return print("picture:", plots.plot_plan(folder / "plan.png", cfg, stages, plans, loop.learning_rate))

    tokenizer, pools, held_out = open_data(cfg, stages)
    loop.set_vocab_size(cfg.model, tokenizer.n_vocab)
    pool_sizes = {name: sum(s.n_tokens for s in shards) for name, shards in pools.items()}
    plans = make_plan(cfg, stages, pool_sizes)
    if cfg.plan:
        print_plan(cfg, stages, plans, pool_sizes)
        return print("picture:", plots.plot_plan(folder / "plan.png", cfg, stages, plans, loop.learning_rate))

    d = common.init_distributed(p.dtype, p.shard_size)
    mixture = Mixture(pools, plans, p.seed)
    held_out = {name: PoolStream(name, shards, 0, max(s.context for s in stages)) for name, shards in held_out.items()}

    run = loop.Run("pretrain", cfg, p, tokenizer, data_folder(cfg) / "tokenizer.json", d)
    newest = common.find_checkpoint(d, run.folder)
    if newest or p.branch_from:
        run.resume(newest or Path(p.branch_from), newest is not None, lambda step: history(plans, step))
    elif cfg.init_from:
        hf.load_initial_weights(d, run.model, tokenizer, hf.resolve_checkpoint(d, cfg.init_from, cfg.out))
    else:
        init_weights(run.model, p.seed, common.assign)
    if d.is_main:
        print_plan(cfg, stages, plans, pool_sizes)
        print(f"loader alone: {loader_speed(mixture, run.step, d):,.0f} tokens/s a process")

    n_steps, loader = plans[-1].end_step, ThreadPoolExecutor(1)
    next_batch = loader.submit(mixture.batch, run.step, d.rank, d.world) if run.step < n_steps else None
    for step in run.steps(n_steps):
        plan = mixture.stage(step)
        stage = next(s for s in stages if s.name == plan.name)
        run.model.rope_theta = stage.rope_theta or run.model.rope_theta
        batch = next_batch.result()
        if step + 1 < n_steps:
            next_batch = loader.submit(mixture.batch, step + 1, d.rank, d.world)
        lr = loop.learning_rate(p, stage, plan, step)

        loss, n_tokens = train_step(run.model, batch, p, d)
        grad_norm = run.update(loss, lr, where=lambda: ", ".join(mixture.sources(step)))
        run.done(plan.name, loss, lr, grad_norm, n_tokens, (plan.rows, plan.context))

        n_problems = run.evaluate_now(plan)
        if n_problems is not None:
            found = look(run, held_out, plan.context, n_problems)
            run.metrics.write(step=step, stage=plan.name, seconds=run.seconds, **found)
        run.save(plan, ("model", "corpus", "pretrain"), history(plans, run.step), pools=plan.positions(run.step))
    if d.is_main:
        print("pictures:", plots.plot_run(run.folder),
              plots.plot_plan(run.folder / "plan.png", cfg, stages, plans, loop.learning_rate))


def loader_speed(mixture: Mixture, step: int, d) -> float:
    """Tokens a second that one process reads and packs with nothing else to do."""
    started, n, end = time.time(), 0, mixture.plans[-1].end_step
    for s in range(step, min(step + 8, end)):
        n += mixture.batch(s, d.rank, d.world).tokens.size
    return n / max(1e-9, time.time() - started)


if __name__ == "__main__":
    common.cli(main)
