"""Phase 1, pre-training with FG-WSD: Fine-Grained Warmup-Stable-Decay.

From arXiv 2512.06266, section 2. The learning rate is an ordinary warmup-stable-decay. What is new
is that the constant stage is cut into stages of ever better data, so that a change of data never
falls together with a change of rate; context grows only in the decay.

    python -m data.text.corpus configs/tiny.py   # once: tokenizer and shards
    python pretrain.py configs/tiny.py
    torchrun --nproc_per_node=8 pretrain.py configs/3b.py
    python pretrain.py configs/3b.py --plan      # what the stages would do, without training

A stopped run goes on from its newest whole checkpoint when the same command is given again.

Shapes: B rows of a micro-batch, T context, C width, V vocabulary.
"""
from settings import (
    Count,
    Curve,
    Length,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StartAndEnd,
    load_config,
)

import dataclasses
import math
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm

import common
import hf
import loop
from common import Dist, UserError
from data.text.mixture import (
    IGNORE,
    Batch,
    Mixture,
    MixtureStage,
    PoolStream,
    branch,
    document_lengths,
    plan_stages,
)
from data.text.shards import CorpusConfig, data_folder, read_pool
from data.text.tokenizer import Tokenizer, TokenizerConfig
from evaluate import EvaluateConfig
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig, flops_per_token, init_weights
from schedule import check_schedule, learning_rate, stage_at

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass
class StageConfig:
    name: str
    lr: StartAndEnd              # learning rate at the start and at the end, as shares of
                                 # pretrain.lr
    context: Count               # tokens a row
    tokens: NonNegativeInt = 0   # tokens of the stage …
    mixture: dict[str, PositiveFloat] = field(default_factory=dict)  # … and each pool's share of
                                                                     # them: {pool: weight}
    epochs: dict[str, PositiveFloat] = field(default_factory=dict)  # or, in place of both: {pool:
                                                                    # epochs of the whole pool}
    curve: Curve = "linear"      # how the rate goes from start to end
    rope_theta: PositiveFloat | None = None  # rotary base from here on (ABF, arXiv 2309.16039);
                                             # None: as before
    least_steps: NonNegativeInt = 0  # which a run that is scaled down keeps of the stage, up to a
                                     # fifth of its steps: a warm-up's
    recompute: bool | None = None    # activation checkpointing; None: as in the section
    micro_tokens: NonNegativeInt | None = None  # tokens of one forward pass; None: as in the
                                                # section


@dataclass(kw_only=True)
class PretrainConfig(loop.TrainConfig):
    batch_tokens: PositiveInt    # tokens of a global batch: an optimizer step
    micro_tokens: NonNegativeInt = 0  # tokens of one forward pass on one device; 0: a device's
                                      # whole share of the batch
    stages: Annotated[list[StageConfig], Length(1)]  # the FG-WSD table
    total_tokens: NonNegativeInt = 0  # scales the stages to so many tokens in all; 0: as the table
                                      # says
    eval_tokens: PositiveInt = 100_000  # held-out tokens a pool for the validation loss
    held_out: list[str] = field(default_factory=list)  # pools of which it is taken (default: all
                                                       # that the stages use)
    branch_from: str = ""        # checkpoint of another run at which this one leaves for stage
                                 # `branch_to`
    branch_to: str = "decay"     # where a branch goes on: a decay can be had from any stable
                                 # checkpoint
    pool_tokens: dict[str, PositiveInt] = field(default_factory=dict)  # tokens a pool, for --plan
                                                                       # where the corpus is not
                                                                       # prepared


def check_stages(stages: list[StageConfig]) -> None:
    """Raises UserError for what types cannot say."""
    for stage in stages:
        if bool(stage.epochs) == bool(stage.tokens and stage.mixture):
            raise UserError(f"stage {stage.name!r} needs either epochs, or tokens and mixture")
        check_schedule(stage.name, stage)


def unused_settings(cfg: PretrainConfig) -> dict[str, str]:
    """Settings that have no effect beside the others, each with the reason."""
    return {} if cfg.branch_from else {"branch_to": "branch_from is not given"}


# --------------------------------------------------------------------------------------------------
# Plan and data


def read_stages(config: SimpleNamespace) -> list[StageConfig]:
    """The FG-WSD table, checked. One's own text (corpus.path) is a single pool, in every stage."""
    cfg, stages = config.pretrain, config.pretrain.stages
    check_stages(stages)
    loop.fill_in_stages(stages, cfg)
    if not config.corpus.path:
        return stages
    own_text = []
    for stage in stages:
        if stage.tokens:
            own_text.append(dataclasses.replace(stage, mixture={"text": 1.0}, epochs={}))
        else:
            own_text.append(dataclasses.replace(stage, epochs={"text": max(stage.epochs.values())}))
    return own_text


def make_plan(
    config: SimpleNamespace, stages: list[StageConfig], pool_sizes: dict[str, int]
) -> list[MixtureStage]:
    """The stages in steps, after --scale, total_tokens and a branch."""
    cfg, scale = config.pretrain, config.scale
    plan = plan_stages(stages, pool_sizes, cfg.batch_tokens, scale)
    if cfg.total_tokens:
        scale *= cfg.total_tokens / sum(sum(stage.tokens.values()) for stage in plan)
        plan = plan_stages(stages, pool_sizes, cfg.batch_tokens, scale)
    if cfg.branch_from:
        step = Path(cfg.branch_from).name.removeprefix("step_")
        if not step.isdecimal():
            raise UserError(
                f"pretrain.branch_from must be one checkpoint (…/step_<n>), not {cfg.branch_from}"
            )
        plan = branch(plan, int(step), cfg.branch_to)
    return plan


def resume_key(
    plan: list[MixtureStage], pool_sizes: dict[str, int], seed: int, step: int
) -> list:
    """The run's past at a step, as JSON: a run goes on from checkpoints of the same past.

    Positions say how much of each pool was read; in which order, its size and the seed.
    """
    past = []
    for stage in plan:
        if stage.first_step < step:
            end = min(stage.end_step, step)
            sizes = {pool: pool_sizes[pool] for pool in stage.tokens}
            past.append([stage.name, stage.context, stage.rows, stage.first_step, end, sizes,
                         stage.positions(end), stage.start])
    return [seed, *past]


def print_plan(
    config: SimpleNamespace, plan: list[MixtureStage], pool_sizes: dict[str, int]
) -> None:
    """The table of stages: rate, data, context and cost."""
    peak = config.pretrain.lr
    print(
        f"{'stage':14}{'steps':>10}{'tokens':>9}  {'learning rate':22}{'context':>8}"
        f"{'rope base':>11}{'FLOPs':>10}  mixture, epochs of each pool so far"
    )
    position, theta = {}, config.model.rope_theta
    total_tokens, total_flops = 0, 0.0
    for stage in plan:
        theta = stage.settings.rope_theta or theta
        start, end = stage.settings.lr
        taken = stage.taken()
        tokens = sum(taken.values())
        total_tokens += tokens
        flops = tokens * flops_per_token(config.model, stage.context)
        total_flops += flops
        position |= stage.positions(stage.end_step)
        shares = []
        for pool, n in taken.items():
            shares.append(f"{pool} {n / tokens:.0%} (to {position[pool] / pool_sizes[pool]:.2f})")
        rate = f"{peak * start:.2e} -> {peak * end:.2e}"
        print(
            f"{stage.name:14}{stage.n_steps:>10,}{tokens:>9.3g}  {rate:22}{stage.context:>8,}"
            f"{theta:>11.4g}{flops:>10.2e}  {', '.join(shares)}"
        )
    for pool, tokens in position.items():
        epochs = tokens / pool_sizes[pool]
        if epochs > 4:
            print(
                f"note: pool {pool!r} is repeated {epochs:.1f} times; past 4 epochs repeated "
                "tokens are worth little (arXiv 2305.16264)"
            )
    h100_hours = total_flops / (0.4 * 989e12) / 3600
    print(f"{plan[-1].end_step:,} steps, {total_tokens:.4g} tokens, {total_flops:.3g} FLOPs"
          f" = {h100_hours:,.3g} hours of one H100 at 40 % of its bf16 peak")


def open_data(config: SimpleNamespace, stages: list[StageConfig]) -> tuple[Tokenizer, dict, dict]:
    """Tokenizer, and {pool: shards} of what the stages train on and of what is held out.

    Raises UserError, with the command that prepares the data, where something is missing or
    damaged.
    """
    shared = ("--run=", "--name=", "--corpus.", "--tokenizer.")
    settings = [
        argument for argument in shlex.split(config.command)[1:] if argument.startswith(shared)
    ]
    command = shlex.join(["python", "-m", "data.text.corpus", config.path, *settings])
    folder = data_folder(config)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"no data in {folder}: prepare it with `{command}`")
    tokenizer = Tokenizer.load(folder / "tokenizer.json", config.tokenizer.eot)
    names = {}  # in the order of the stages, each once
    for stage in stages:
        names |= dict.fromkeys(stage.epochs or stage.mixture)
    train = {name: read_pool(folder / name, "train", tokenizer.hash, command) for name in names}
    held_out = {}
    for name in config.pretrain.held_out or names:
        shards = read_pool(folder / name, "val", tokenizer.hash, command)
        if shards:
            held_out[name] = shards
    return tokenizer, train, held_out


# --------------------------------------------------------------------------------------------------
# Evaluation as training goes


@torch.no_grad()
def validate(
    run: loop.Run, held_out: dict[str, PoolStream], context: int
) -> dict[str, dict[str, float]]:
    """Loss (nats per token) and bits per byte of each held-out pool, on the same tokens."""
    cfg, dist = run.cfg, run.dist
    rows_per_pass = max(1, (cfg.micro_tokens or cfg.batch_tokens // dist.world) // context)
    results = {}
    for pool, stream in held_out.items():
        n_rows = max(1, min(cfg.eval_tokens, stream.size) // context)
        nats = n_tokens = n_bytes = 0
        # FSDP: as many forward passes on every rank
        for first in range(0, n_rows, rows_per_pass * dist.world):
            last = min(first + rows_per_pass * dist.world, n_rows)
            rows = list(range(first, last))[dist.rank::dist.world]
            if rows:
                batch = read_rows(stream, rows, context)
            else:  # a rank without a row left runs a dummy row, which counts for nothing
                batch = read_rows(stream, [0], context)
                batch.targets.fill(IGNORE)
            nats += batch_loss(run.model, batch, dist).item()
            trained = batch.targets[batch.targets != IGNORE]
            n_tokens += len(trained)
            n_bytes += int(run.tokenizer.byte_lengths[trained].sum())
        nats, n_tokens, n_bytes = dist.sum(nats, n_tokens, n_bytes)
        results[pool] = {
            "loss": nats / max(1, n_tokens),
            "bits_per_byte": nats / math.log(2) / max(1, n_bytes),
        }
    if dist.mesh is not None:
        run.model.reshard()
    return results


def read_rows(stream: PoolStream, rows: list[int], context: int) -> Batch:
    """Rows of a pool's stream, by their numbers."""
    columns = [stream.read(row * context, min(context, stream.size)) for row in rows]
    tokens, targets, doc_start = zip(*columns)
    return Batch(np.stack(tokens), np.stack(targets), np.stack(doc_start))


def batch_loss(model, batch: Batch, dist: Dist) -> torch.Tensor:
    """Summed loss (nats) of all rows in one pass."""
    tokens, targets, doc_start = to_device(batch, dist)
    hidden = model(tokens, doc_start)
    return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten(),
                                kernels=model.cfg.kernels)


def evaluate_and_sample(
    run: loop.Run, held_out: dict[str, PoolStream], stage: MixtureStage, is_last: bool
) -> dict:
    """Held-out loss, accuracy on problems, and samples: printed, and returned for the metrics."""
    losses = validate(run, held_out, stage.context)
    metrics = loop.evaluate_and_sample(
        run, stage, is_last, run.config.evaluate.prompt_format or "document"
    )
    if not run.dist.is_main:
        return {}
    for pool, result in losses.items():
        tqdm.write(
            f"  held-out {pool}: loss {result['loss']:.4f}, "
            f"{result['bits_per_byte']:.4f} bits per byte"
        )
    sys.stdout.flush()
    return {"validation": losses} | metrics


# --------------------------------------------------------------------------------------------------
# One step


def to_device(batch: Batch, dist: Dist) -> list[torch.Tensor]:
    """tokens, targets and doc_start, (B, T) each."""
    arrays = (batch.tokens, batch.targets, batch.doc_start)
    return [torch.from_numpy(array).to(dist.device, non_blocking=True) for array in arrays]


def train_step(model, batch: Batch, settings: StageConfig, dist: Dist) -> tuple[float, int]:
    """Adds up the gradient of the global batch's loss; returns it (nats per token) and its tokens.

    settings: of the stage, of which micro_tokens holds. One denominator, known before the first
    backward pass: trained tokens over all ranks and micro-batches. FSDP averages gradients over
    ranks, so each rank's part is scaled by the world size.
    """
    tokens, targets, doc_start = to_device(batch, dist)
    if not batch.doc_start.any():  # one document a row: the causal mask alone
        doc_start = None
    (n_tokens,) = dist.sum(float((batch.targets >= 0).sum()))
    denominator = max(1.0, n_tokens)  # a stage's last batch may be a document's last token alone
    nats = torch.zeros((), device=dist.device)
    n_rows, context = tokens.shape
    rows_per_pass = max(1, (settings.micro_tokens or n_rows * context) // context)
    for rows in loop.micro_batches(model, n_rows, rows_per_pass):
        # (B, T, C)
        hidden = model(tokens[rows], doc_start if doc_start is None else doc_start[rows])
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            model.lm_head.weight,
            targets[rows].flatten(),
            kernels=model.cfg.kernels,
        )
        (loss * (dist.world / denominator)).backward()
        nats += loss.detach()
    (total,) = dist.sum(nats.item())
    return total / denominator, int(n_tokens)


# --------------------------------------------------------------------------------------------------
# The run


def plan_only(config: SimpleNamespace, stages: list[StageConfig]) -> None:
    """--plan: prints the table of stages."""
    pool_sizes, missing = known_pool_sizes(config, stages)
    if missing:
        print(f"note: pretrain.pool_tokens stands in for the corpus: {missing}")
    print_plan(config, make_plan(config, stages, pool_sizes), pool_sizes)


def known_pool_sizes(
    config: SimpleNamespace, stages: list[StageConfig]
) -> tuple[dict[str, int], str]:
    """Tokens of each pool as it is prepared, and ""; before that, those that pool_tokens estimates,
    and what is missing."""
    try:
        tokenizer, train, _ = open_data(config, stages)
    except UserError as error:
        if config.corpus.path or not config.pretrain.pool_tokens:
            raise
        config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
        return config.pretrain.pool_tokens, str(error)
    loop.set_vocab_size(config.model, tokenizer.n_vocab)
    return sizes_of_pools(train), ""


def sizes_of_pools(pools: dict[str, list]) -> dict[str, int]:
    """Tokens of each pool."""
    sizes = {}
    for name, shards in pools.items():
        sizes[name] = sum(shard.n_tokens for shard in shards)
    return sizes


def load_weights(run: loop.Run, plan: list[MixtureStage], pool_sizes: dict[str, int]) -> None:
    """Weights of the newest checkpoint, of the branch's start, of --init_from, or random ones."""
    config, cfg = run.config, run.cfg
    run.resume_key = lambda step: resume_key(plan, pool_sizes, cfg.seed, step)
    loop.make_model(run)
    newest = common.find_checkpoint(run.dist, run.folder)
    if newest:
        run.resume(newest, checked=True)
    elif cfg.branch_from:
        run.resume(Path(cfg.branch_from), checked=False)
    elif config.init_from:
        source = hf.resolve_checkpoint(run.dist, config.init_from, config.out)
        hf.load_initial_weights(run.dist, run.model, run.tokenizer, source)
    else:
        init_weights(run.model, cfg.seed, common.assign)


def measure_loader(mixture: Mixture, step: int, dist: Dist) -> float:
    """Tokens per second that one process reads and packs with nothing else to do."""
    started, n_tokens = time.time(), 0
    for each in range(step, min(step + 8, mixture.plans[-1].end_step)):
        n_tokens += mixture.batch(each, dist.rank, dist.world).tokens.size
    return n_tokens / max(1e-9, time.time() - started)


def main():
    config = load_config(
        __doc__,
        flags={"plan": "print the stages, and stop"},
        model=ModelConfig,
        tokenizer=TokenizerConfig,
        corpus=CorpusConfig,
        pretrain=PretrainConfig,
        evaluate=EvaluateConfig,
    )
    cfg = config.pretrain
    stages = read_stages(config)
    if config.plan:
        return plan_only(config, stages)

    tokenizer, train, held_out = open_data(config, stages)
    loop.set_vocab_size(config.model, tokenizer.n_vocab)
    pool_sizes = sizes_of_pools(train)
    plan = make_plan(config, stages, pool_sizes)
    n_steps = plan[-1].end_step
    longest = max(stage.context for stage in stages)
    held_out = {name: PoolStream(name, shards, 0, longest) for name, shards in held_out.items()}
    mixture = Mixture(train, plan, cfg.seed)

    dist = common.init_distributed(cfg.dtype, cfg.shard_size, cfg.timeout_minutes)
    tokenizer_file = data_folder(config) / "tokenizer.json"
    run = loop.open_run(
        "pretrain", config, dist, tokenizer, tokenizer_file, None, unused_settings(cfg))
    load_weights(run, plan, pool_sizes)
    model, optimizer = run.model, run.optimizer
    if dist.is_main:
        print_plan(config, plan, pool_sizes)
        speed = measure_loader(mixture, run.first_step, dist)
        print(f"loader alone: {speed:,.0f} tokens/s per process")

    log = loop.Log(run, n_steps)
    batches = loop.Prefetch(mixture.batch, run.first_step, n_steps, dist)
    stop_signal = common.StopSignal(dist)
    for step in range(run.first_step, n_steps + 1):
        if log.owes_evaluation(plan):
            stage = stage_at(plan, step - 1)
            log.evaluation(stage, evaluate_and_sample(run, held_out, stage, step == n_steps))
        if step == n_steps:
            break
        started = time.time()
        stage = stage_at(plan, step)  # FG-WSD: a stage says data, rate, context and RoPE base
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
            log.skip_step(step, loss, grad_norm, data=", ".join(mixture.sources(step)))
        optimizer.zero_grad(set_to_none=True)
        seconds = time.time() - started
        lengths = document_lengths(batch.doc_start)
        log.step(step, stage, loss, lr, grad_norm, n_tokens, lengths, seconds)

        stop = stop_signal.on_any_rank()
        if run.save_is_due(step + 1, stage) or stop:
            run.save(step + 1, stage, stop or step + 1 == n_steps, pools=stage.positions(step + 1))
        if stop:
            stop_signal.leave(step + 1)
    log.close()
    loop.print_results(run)


if __name__ == "__main__":
    common.cli(main)
