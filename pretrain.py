"""Phase 1, pre-training with FG-WSD: Fine-Grained Warmup-Stable-Decay (arXiv 2512.06266, section 2).

The learning rate is an ordinary warmup-stable-decay. What is new is that the constant stage is cut into stages of ever
better data, so that a change of data never falls together with a change of rate; context grows only in the decay.

    python -m data.corpus configs/tiny.py            # once: tokenizer and shards
    python pretrain.py configs/tiny.py               # or: torchrun --nproc_per_node=8 pretrain.py configs/3b.py
    python pretrain.py configs/3b.py --plan          # what the stages would do, without training

A stopped run goes on from its newest whole checkpoint when the same command is given again.

Shapes: B rows of a micro-batch, T context, C width, V vocabulary.
"""
import dataclasses
import json
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
import report
from common import UserError
from data.corpus import CorpusConfig, data_folder, read_pool
from data.mixture import Mixture, PoolStream, StagePlan, branch, plan_stages
from data.tokenizer import Tokenizer, TokenizerConfig
from evaluate import EvaluateConfig, evaluate, table
from generate import sample
from kernels.cross_entropy import linear_cross_entropy
from model import NOT_OF_THE_WEIGHTS, ModelConfig, flops_per_token, init_weights, meta_model

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


@dataclass
class PretrainConfig:
    stages: list                 # the FG-WSD table: see Stage
    batch_tokens: int            # tokens of a global batch: an optimizer step
    lr: float = 3e-4             # peak learning rate
    total_tokens: int = 0        # scales all stages alike to this many tokens; 0: as the table says
    micro_tokens: int = 0        # tokens of one forward pass on one device; 0: a device's whole share of the batch
    beta1: float = 0.9           # AdamW
    beta2: float = 0.95          # AdamW
    weight_decay: float = 0.1    # AdamW, on matrices but not on embeddings and norms
    clip: float = 1.0            # largest global norm of the gradient
    dtype: str = "float32"       # of compute, "float32" or "bfloat16"; weights and optimizer are always fp32
    compile: bool = False        # torch.compile each block
    recompute: bool = False      # activation checkpointing: less memory, a third more time
    shard_size: int = 0          # ranks that share one copy of the weights (0: all); fewer is HSDP, for many nodes
    seed: int = 0                # of weights, data order and samples
    log_every: int = 20          # steps between lines on the screen (metrics.jsonl has every step)
    eval_every: int = 0          # steps between evaluations (0: at the end of each stage, where there is one anyway)
    eval_tokens: int = 100_000   # held-out tokens a pool for the validation loss
    held_out: list = field(default_factory=list)  # pools of which it is taken (default: all that the stages use)
    eval_problems: int = 0       # held-out problems a task at each evaluation (0: none); the last one has evaluate's
    save_every: int = 200        # steps between checkpoints; the end of each stage has one anyway
    keep: int = 2                # newest checkpoints kept, beside those of stage ends
    on_nonfinite: str = "skip"   # a loss or gradient that is no number: "skip" the step, or "stop"
    prompts: list = field(default_factory=list)  # texts that are continued at each evaluation
    branch_from: str = ""        # checkpoint of another run at which this one leaves for stage `branch_to`
    branch_to: str = "decay"     # where a branch goes on: a decay can be had from any stable checkpoint
    pool_tokens: dict = field(default_factory=dict)  # tokens a pool, for --plan where the corpus is not prepared


CURVES = {
    "linear": lambda x: x,
    "1-sqrt": math.sqrt,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
}


def learning_rate(cfg: PretrainConfig, stage: Stage, plan: StagePlan, step: int) -> float:
    """Rate of a step: from + (to - from) * f(x), with x = 1 / n_steps at the stage's first step and 1 at its last.

    f: linear; 1-sqrt (arXiv 2405.18392), which falls as 1 - sqrt(x); cosine. exponential: from * (to / from)^x.
    The report gives 4.5e-4 -> 1.5e-6 and is silent on the curve: our choice.
    """
    start, end = stage.lr
    x = (step + 1 - plan.first_step) / plan.n_steps
    if stage.curve == "exponential":
        return cfg.lr * start * (end / start) ** x
    return cfg.lr * (start + (end - start) * CURVES[stage.curve](x))


def check_settings(cfg: PretrainConfig, stages: list[Stage]) -> None:
    """What types cannot say: raises UserError."""
    for s in stages:
        if bool(s.epochs) == bool(s.tokens and s.mixture):
            raise UserError(f"stage {s.name!r} needs either epochs, or tokens and mixture")
        if len(s.lr) != 2:
            raise UserError(f"stage {s.name!r}: lr must be [start, end], not {s.lr}")
        if s.curve not in (*CURVES, "exponential") or (s.curve == "exponential" and min(s.lr) <= 0):
            raise UserError(f"stage {s.name!r}: curve {s.curve!r} with lr {s.lr}; known: {', '.join(CURVES)}, and "
                            "exponential between rates above 0")
    for key, allowed in (("dtype", ("float32", "bfloat16")), ("on_nonfinite", ("skip", "stop"))):
        if getattr(cfg, key) not in allowed:
            raise UserError(f"pretrain.{key} must be one of {', '.join(allowed)}, not {getattr(cfg, key)!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Plan and data

def make_plan(cfg, stages: list[Stage], pool_sizes: dict[str, int]) -> list[StagePlan]:
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


def resume(path: Path, checked: bool, model, optimizer, tokenizer, plans: list[StagePlan], cfg, d) -> dict:
    """Loads a checkpoint to go on from and returns its meta; UserError where it belongs to another run than this."""
    meta = common.read_meta(path)
    other = [f"model.{k}" for k, v in as_json(cfg.model).items()
             if k not in NOT_OF_THE_WEIGHTS and meta["model"][k] != v]
    if meta["tokenizer"] != tokenizer.hash:
        other.append("tokenizer")
    if meta["history"] != history(plans, meta["step"]):
        other.append("stages")
    if other:
        raise UserError(f"{path} was trained with other {', '.join(other)}; choose another --run, or delete it")
    common.load_checkpoint(d, path, model, optimizer, checked)
    changed = [k for k, v in as_json(cfg.pretrain).items() if k in meta["pretrain"] and meta["pretrain"][k] != v]
    if d.is_main:
        print(f"going on from {path} (step {meta['step']})"
              + (f"; settings that have changed since: {', '.join(changed)}" if changed else ""))
    return meta


def history(plans: list[StagePlan], step: int) -> list:
    """The plan's past at a step, as JSON: a checkpoint's must be the same for a run to go on from it."""
    return [[p.name, p.context, p.rows, p.first_step, min(p.end_step, step), p.start]
            for p in plans if p.first_step < step]


def as_json(settings) -> dict:
    """A dataclass as it looks after a trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def print_plan(cfg, stages: list[Stage], plans: list[StagePlan], pool_sizes: dict[str, int]) -> None:
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
    command = shlex.join(["python", "-m", "data.corpus", cfg.path, *settings])
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


def continuations(model, tokenizer, prompts: list[str], seed: int) -> list[str]:
    """What the model writes after each prompt: 60 tokens at temperature 0.6."""
    ids = [[tokenizer.bos, *tokenizer.encode(p)] for p in prompts]
    samples = sample(model, ids, max_new_tokens=60, temperature=0.6, top_p=0.95, stop=(tokenizer.eot,), seed=seed)
    return [p + tokenizer.decode([t for t in s[0].tokens if t != tokenizer.eot]) for p, s in zip(prompts, samples)]


def look(model, replica, tokenizer, held_out: dict[str, PoolStream], context: int, n_problems: int, cfg, d) -> dict:
    """Held-out loss, accuracy on n_problems a task, and samples: printed, and returned for the metrics."""
    losses = validation(model, tokenizer, held_out, context, cfg.pretrain, d)
    plain = common.unsharded(model, replica)
    plain.rope_theta = model.rope_theta
    scores = {}
    if n_problems and cfg.evaluate.tasks:
        scores = evaluate(plain, tokenizer, dataclasses.replace(cfg.evaluate, n_problems=n_problems), d)
    if not d.is_main:
        return {}
    for pool, r in losses.items():
        tqdm.write(f"  held-out {pool}: loss {r['loss']:.4f}, {r['bits_per_byte']:.4f} bits per byte")
    texts = continuations(plain, tokenizer, cfg.pretrain.prompts, cfg.pretrain.seed) if cfg.pretrain.prompts else []
    for text in texts:
        tqdm.write("  | " + text.replace("\n", "\n  | "))
    if scores:
        tqdm.write(table(scores))
    sys.stdout.flush()
    without_rows = {task: {k: v for k, v in score.items() if k != "rows"} for task, score in scores.items()}
    return {"validation": losses, "scores": without_rows, "samples": texts}


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
    per_pass = max(1, (cfg.micro_tokens or tokens.numel()) // tokens.shape[1])
    nats = torch.zeros((), device=d.device)
    for first in range(0, len(tokens), per_pass):
        rows = slice(first, first + per_pass)
        common.set_gradient_sync(model, last_micro_batch=first + per_pass >= len(tokens))
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
    stages = [common.build(Stage, s, f"pretrain.stages[{i}]") for i, s in enumerate(p.stages)]
    check_settings(p, stages)
    if cfg.corpus.path:  # one's own text: a single pool, in every stage
        stages = [dataclasses.replace(s, mixture={"text": 1.0}, epochs={}) if s.tokens else
                  dataclasses.replace(s, epochs={"text": max(s.epochs.values())}) for s in stages]
    folder = cfg.out / "pretrain"

    if cfg.plan and p.pool_tokens and not cfg.corpus.path:
        cfg.model.vocab_size = cfg.model.vocab_size or cfg.tokenizer.vocab_size
        plans = make_plan(cfg, stages, p.pool_tokens)
        print_plan(cfg, stages, plans, p.pool_tokens)
        return print("picture:", report.plot_plan(folder / "plan.png", cfg, stages, plans, learning_rate))

    tokenizer, pools, held_out = open_data(cfg, stages)
    set_vocab_size(cfg.model, tokenizer.n_vocab)
    pool_sizes = {name: sum(s.n_tokens for s in shards) for name, shards in pools.items()}
    plans = make_plan(cfg, stages, pool_sizes)
    if cfg.plan:
        print_plan(cfg, stages, plans, pool_sizes)
        return print("picture:", report.plot_plan(folder / "plan.png", cfg, stages, plans, learning_rate))

    d = common.init_distributed(p.dtype, p.shard_size)
    mixture = Mixture(pools, plans, p.seed)
    held_out = {name: PoolStream(name, shards, 0, max(s.context for s in stages)) for name, shards in held_out.items()}

    # model and optimizer
    model = meta_model(cfg.model)
    for block in model.layers:
        block.recompute = p.recompute
    common.shard_model(model, d, p.dtype, p.compile)
    optimizer = common.adamw(model, p.lr, (p.beta1, p.beta2), p.weight_decay)
    replica = None
    if d.mesh is not None:  # one plain copy on this device, for samples
        replica = meta_model(cfg.model).to(getattr(torch, p.dtype)).to_empty(device=d.device).requires_grad_(False)
    newest = common.find_checkpoint(d, folder)
    step, seconds = 0, 0.0
    if newest or p.branch_from:
        meta = resume(newest or Path(p.branch_from), newest is not None, model, optimizer, tokenizer, plans, cfg, d)
        step, seconds, model.rope_theta = meta["step"], meta["seconds"], meta["model"]["rope_theta"]
    elif cfg.init_from:
        hf.start_from(d, model, tokenizer, cfg.init_from, cfg.out)
    else:
        init_weights(model, p.seed, common.assign)

    metrics, commit = common.Metrics(d, folder, step), common.commit()
    stop_signal = common.StopSignal()
    n_steps, skipped, first_step, seconds_before = plans[-1].end_step, 0, step, seconds
    peak = common.peak_flops(d.device) if p.dtype == "bfloat16" else None
    flops_of_token = {plan.context: flops_per_token(cfg.model, plan.context) for plan in plans}
    if d.is_main:
        print_plan(cfg, stages, plans, pool_sizes)
        n_parameters = sum(x.numel() for x in model.parameters())
        print(f"{n_parameters:,} parameters, {d.world} process(es) on {d.device.type}, {p.dtype}")
        print(f"loader alone: {loader_speed(mixture, step, d):,.0f} tokens/s a process")
    if step >= n_steps and d.is_main:
        print("this run is complete; nothing to do")

    bar = tqdm(total=n_steps, initial=step, unit="step", disable=None if d.is_main else True, dynamic_ncols=True)
    loader = ThreadPoolExecutor(1)
    next_batch = loader.submit(mixture.batch, step, d.rank, d.world) if step < n_steps else None
    while step < n_steps:
        started = time.time()
        plan = mixture.stage(step)
        stage = next(s for s in stages if s.name == plan.name)
        model.rope_theta = stage.rope_theta or model.rope_theta
        batch = next_batch.result()
        if step + 1 < n_steps:
            next_batch = loader.submit(mixture.batch, step + 1, d.rank, d.world)
        lr = learning_rate(p, stage, plan, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss, n_tokens = train_step(model, batch, p, d)
        grad_norm = common.clip_grad_norm(model, p.clip)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        skipped = 0 if finite else skipped + 1
        if not finite:
            message = (f"step {step}: loss {loss}, gradient norm {grad_norm}; read from "
                       + ", ".join(mixture.sources(step)))
            if d.is_main:
                print(f"warning: {message}; the weights are as before", flush=True)
            if p.on_nonfinite == "stop" or skipped == 10:
                raise UserError(f"{message}; stopped with the weights of the last checkpoint")

        elapsed = time.time() - started
        seconds += elapsed
        flops = plan.rows * plan.context * flops_of_token[plan.context] / elapsed / d.world
        mfu = flops / peak if peak else None
        metrics.write(step=step, stage=plan.name, loss=loss, lr=lr, grad_norm=grad_norm, tokens=n_tokens,
                      tokens_per_s=n_tokens / elapsed, mfu=mfu, memory_gb=common.memory_gb(d.device), seconds=seconds,
                      finite=finite)
        bar.update()
        step += 1
        if d.is_main and (step % p.log_every == 0 or step == n_steps):
            left = (n_steps - step) * (seconds - seconds_before) / (step - first_step)
            speed = f"{n_tokens / elapsed:,.0f} tokens/s  MFU {f'{mfu:.1%}' if mfu else 'n/a'}"
            tqdm.write(f"step {step:>6}/{n_steps} {step / n_steps:4.0%}  {plan.name:10} loss {loss:.4f}  lr {lr:.2e}  "
                       f"|g| {grad_norm:.2f}  {speed}  {common.memory_gb(d.device):.1f} GB  {left / 60:.1f} min left")
            sys.stdout.flush()

        stopping = d.sum(float(stop_signal.number))[0] > 0  # all ranks leave together
        stage_ends = step == plan.end_step
        if (stage_ends or (p.eval_every and step % p.eval_every == 0)) and not stopping:
            if d.is_main:
                tqdm.write(f"--- step {step}, end of stage {plan.name}" if stage_ends else f"--- step {step}")
            n_problems = cfg.evaluate.n_problems if step == n_steps else p.eval_problems
            found = look(model, replica, tokenizer, held_out, plan.context, n_problems, cfg, d)
            metrics.write(step=step - 1, stage=plan.name, seconds=seconds, **found)
        if stage_ends or stopping or step % p.save_every == 0:
            meta = dict(phase="pretrain", stage=plan.name, keep=stage_ends, seconds=seconds, world=d.world,
                        pools=plan.positions(step), command=cfg.command,
                        commit=commit, machine=common.machine(d.device),
                        config=common.config_hash(cfg, "model", "corpus", "pretrain"),
                        model=dataclasses.asdict(cfg.model) | {"rope_theta": model.rope_theta},
                        tokenizer=tokenizer.hash, history=history(plans, step), pretrain=as_json(p))
            saved = common.save_checkpoint(d, folder, step, model, optimizer, meta, data_folder(cfg) / "tokenizer.json",
                                           p.keep)
            if saved is None and (stopping or step == n_steps):
                raise UserError(f"the last checkpoint could not be written to {folder}; make room and run the same "
                                "command again")
        if stopping:
            if d.is_main:
                print(f"stopped by signal at step {step}; the same command goes on from here", flush=True)
            sys.exit(128 + (stop_signal.number or 15))
    bar.close()
    if d.is_main:
        print("pictures:", report.plot_run(folder, cfg, stages, plans, learning_rate))


def set_vocab_size(model: ModelConfig, n_vocab: int) -> None:
    """Fills in vocab_size, or checks that the tokenizer's ids fill the embedding but for its padding."""
    if model.vocab_size is None:
        model.vocab_size = -(-n_vocab // 64) * 64
    if not n_vocab <= model.vocab_size < n_vocab + 128:
        raise UserError(f"the tokenizer has {n_vocab} ids but model.vocab_size is {model.vocab_size}; it must be the "
                        "same or up to 127 more (padding); leave it out to take the tokenizer's")


def loader_speed(mixture: Mixture, step: int, d) -> float:
    """Tokens a second that one process reads and packs with nothing else to do."""
    started, n, end = time.time(), 0, mixture.plans[-1].end_step
    for s in range(step, min(step + 8, end)):
        n += mixture.batch(s, d.rank, d.world).tokens.size
    return n / max(1e-9, time.time() - started)


if __name__ == "__main__":
    common.cli(main)
