"""What the training loops of all phases do alike: settings, rates, model and optimizer, the step's end, checkpoints.

A phase's own script has what teaches: its stages, data, loss and loop. Here is the rest, once.
"""
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import UserError
from data.chat import template
from data.chat.packing import SharedPrefix
from evaluate import evaluate, format_table, without_rows
from generate import sample, stop_ids
from model import NOT_OF_THE_WEIGHTS, ModelConfig, flops_per_token, meta_model

# ---------------------------------------------------------------------------------------------------------------------
# Settings and rates


@dataclass(kw_only=True)
class TrainConfig:
    lr: float = 3e-4             # peak learning rate
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
    eval_problems: int = 0       # held-out problems a task at each evaluation (0: none); the last one has evaluate's
    save_every: int = 200        # steps between checkpoints; the end of each stage has one anyway
    keep: int = 2                # newest checkpoints kept, beside those of stage ends
    on_nonfinite: str = "skip"   # a loss or gradient that is no number: "skip" the step, or "stop"
    prompts: list = field(default_factory=list)  # texts that are answered at each evaluation


@dataclass
class OneStage:
    """The stage of a phase that has but one, and its plan: what learning_rate and Run ask for."""
    n_steps: int
    lr: list
    curve: str
    name: str = ""
    first_step: int = 0

    @property
    def end_step(self) -> int:
        return self.first_step + self.n_steps


CURVES = {
    "linear": lambda x: x,
    "1-sqrt": math.sqrt,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
}


def learning_rate(p: TrainConfig, stage, plan, step: int) -> float:
    """Rate of a step: from + (to - from) * f(x), with x = 1 / n_steps at the stage's first step and 1 at its last.

    f: linear; 1-sqrt (arXiv 2405.18392), which falls as 1 - sqrt(x); cosine. exponential: from * (to / from)^x.
    The report gives 4.5e-4 -> 1.5e-6 for pre-training and is silent on the curve: our choice.
    """
    start, end = stage.lr
    x = (step + 1 - plan.first_step) / plan.n_steps
    if stage.curve == "exponential":
        return p.lr * start * (end / start) ** x
    return p.lr * (start + (end - start) * CURVES[stage.curve](x))


def check_settings(phase: str, p: TrainConfig, stages: list) -> None:
    """What types cannot say: raises UserError."""
    for s in stages:
        if len(s.lr) != 2:
            raise UserError(f"stage {s.name!r}: lr must be [start, end], not {s.lr}")
        if s.curve not in (*CURVES, "exponential") or (s.curve == "exponential" and min(s.lr) <= 0):
            raise UserError(f"stage {s.name!r}: curve {s.curve!r} with lr {s.lr}; known: {', '.join(CURVES)}, and "
                            "exponential between rates above 0")
    for key, allowed in (("dtype", ("float32", "bfloat16")), ("on_nonfinite", ("skip", "stop"))):
        if getattr(p, key) not in allowed:
            raise UserError(f"{phase}.{key} must be one of {', '.join(allowed)}, not {getattr(p, key)!r}")


def set_vocab_size(model: ModelConfig, n_vocab: int) -> None:
    """Fills in vocab_size, or checks that the tokenizer's ids fill the embedding but for its padding."""
    if model.vocab_size is None:
        model.vocab_size = -(-n_vocab // 64) * 64
    if not n_vocab <= model.vocab_size < n_vocab + 128:
        raise UserError(f"the tokenizer has {n_vocab} ids but model.vocab_size is {model.vocab_size}; it must be the "
                        "same or up to 127 more (padding); leave it out to take the tokenizer's")


def as_json(settings) -> dict:
    """A dataclass as it looks after a trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


# ---------------------------------------------------------------------------------------------------------------------
# Model and optimizer

def build(model_cfg: ModelConfig, p: TrainConfig, d):
    """(model, optimizer), sharded, without weights yet."""
    model = meta_model(model_cfg)
    for block in model.layers:
        block.recompute = p.recompute
    common.shard_model(model, d, p.dtype, p.compile)
    return model, common.adamw(model, p.lr, (p.beta1, p.beta2), p.weight_decay)


def micro_batches(model, shape: tuple[int, int], p: TrainConfig) -> Iterator[slice]:
    """Slices of a rank's rows (B, T), of at most p.micro_tokens each; gradients are reduced after the last alone."""
    n_rows, context = shape
    per_pass = max(1, (p.micro_tokens or n_rows * context) // context)
    for first in range(0, n_rows, per_pass):
        common.set_gradient_sync(model, last_micro_batch=first + per_pass >= n_rows)
        yield slice(first, first + per_pass)


def as_tensors(rows, device) -> dict[str, torch.Tensor]:
    """The arrays of data.chat.packing.Rows on a device."""
    return {key: torch.from_numpy(value).to(device, non_blocking=True)
            for key, value in dataclasses.asdict(rows).items() if value is not None}


def hidden_of(model, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states (N, C) that predict the response tokens of packed rows (data.chat.packing.pack, or share_prefixes of them)."""
    shared = SharedPrefix(rows["index"], rows["unique"]) if "index" in rows else None
    return model(rows["tokens"], rows["doc_start"], shared=shared).flatten(0, 1)[rows["positions"]]


def by_sequence(values: torch.Tensor, rows: dict[str, torch.Tensor], n: int) -> torch.Tensor:
    """Sums (n,) over each sequence of values (N,) of its response tokens."""
    return values.new_zeros(n).index_add(0, rows["sequence"], values)


def continuations(model, tokenizer, prompts: list[list[int]], seed: int, length: int = 60) -> list[str]:
    """What the model writes after each prompt: `length` tokens at temperature 0.6."""
    stop = stop_ids(tokenizer)
    samples = sample(model, prompts, max_new_tokens=length, temperature=0.6, top_p=0.95, stop=stop, seed=seed)
    return [tokenizer.decode([t for t in s[0].tokens if t not in stop]) for s in samples]


class Run:
    """A phase's model and optimizer, how far it has come, and what is alike around each loop's own step.

    cfg: the script's config; p: the phase's section of it; tokenizer_file: is copied into each checkpoint. model has
    no weights yet: resume() and others give it some. replica: a plain copy for samples where the model is sharded.
    """

    def __init__(self, phase: str, cfg, p: TrainConfig, tokenizer, tokenizer_file: Path, d):
        self.phase, self.cfg, self.p, self.d = phase, cfg, p, d
        self.tokenizer, self.tokenizer_file, self.folder = tokenizer, tokenizer_file, cfg.out / phase
        self.model, self.optimizer = build(cfg.model, p, d)
        self.replica = None
        if d.mesh is not None:
            self.replica = meta_model(cfg.model).to(getattr(torch, p.dtype)).to_empty(device=d.device)
            self.replica.requires_grad_(False)
        self.step, self.seconds, self.skipped = 0, 0.0, 0

    def resume(self, path: Path, checked: bool, history: Callable[[int], list]) -> None:
        """Goes on from a checkpoint; UserError where it belongs to another run than this.

        history: what a step's past must have been, as JSON; it is saved with each checkpoint. checked: its files have
        just been read against their checksums.
        """
        meta = common.read_meta(path)
        other = [f"model.{k}" for k, v in as_json(self.cfg.model).items()
                 if k not in NOT_OF_THE_WEIGHTS and meta["model"][k] != v]
        if meta["tokenizer"] != self.tokenizer.hash:
            other.append("tokenizer")
        if meta["history"] != history(meta["step"]):
            other.append("stages")
        if other:
            raise UserError(f"{path} was trained with other {', '.join(other)}; choose another --run, or delete it")
        common.load_checkpoint(self.d, path, self.model, self.optimizer, checked)
        self.step, self.seconds = meta["step"], meta["seconds"]
        self.model.rope_theta = meta["model"]["rope_theta"]
        before = meta.get(self.phase, {})
        changed = [k for k, v in as_json(self.p).items() if k in before and before[k] != v]
        if self.d.is_main:
            print(f"going on from {path} (step {self.step})"
                  + (f"; settings that have changed since: {', '.join(changed)}" if changed else ""))

    def plain(self):
        """A plain module with the present weights, for sampling (common.unsharded_copy)."""
        plain = common.unsharded_copy(self.model, self.replica)
        plain.rope_theta = self.model.rope_theta
        return plain

    def steps(self, n_steps: int) -> Iterator[int]:
        """The steps that are left, each to be ended by done(); with a bar."""
        d = self.d
        self.n_steps, self.first_step, self.seconds_before = n_steps, self.step, self.seconds
        self.metrics, self.commit = common.Metrics(d, self.folder, self.step), common.current_commit()
        self.signal = common.StopSignal()
        if d.is_main:
            n_parameters = sum(x.numel() for x in self.model.parameters())
            print(f"{n_parameters:,} parameters, {d.world} process(es) on {d.device.type}, {self.p.dtype}")
            if self.step >= n_steps:
                print("this run is complete; nothing to do")
        with tqdm(total=n_steps, initial=self.step, unit="step", disable=None if d.is_main else True,
                  dynamic_ncols=True) as bar:
            while self.step < n_steps:
                self.started = time.time()
                yield self.step
                bar.update()

    def update(self, loss: float, lr: float, where: Callable[[], str]) -> float:
        """Clips the gradients and takes the optimizer's step; returns their norm.

        What is not finite never enters the weights: the step is skipped, and its data named (where()); UserError after
        ten in a row, or at once with on_nonfinite="stop".
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = common.clip_grad_norm(self.model, self.p.clip)
        self.finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self.finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped = 0 if self.finite else self.skipped + 1
        if not self.finite:
            message = f"step {self.step}: loss {loss}, gradient norm {grad_norm}; read from {where()}"
            if self.d.is_main:
                print(f"warning: {message}; the weights are as before", flush=True)
            if self.p.on_nonfinite == "stop" or self.skipped == 10:
                raise UserError(f"{message}; stopped with the weights of the last checkpoint")
        return grad_norm

    def done(self, stage: str, loss: float, lr: float, grad_norm: float, tokens: int, shape: tuple[int, int],
             **more) -> None:
        """Ends a step: its metrics, now and then a line. tokens: that were trained, of rows x context in `shape`."""
        elapsed = time.time() - self.started
        self.seconds += elapsed
        peak = common.peak_flops(self.d.device) if self.p.dtype == "bfloat16" else None
        flops = math.prod(shape) * flops_per_token(self.cfg.model, shape[1]) / elapsed / self.d.world if peak else 0
        mfu, memory = flops / peak if peak else None, common.memory_gb(self.d.device)
        self.metrics.write(step=self.step, stage=stage, loss=loss, lr=lr, grad_norm=grad_norm, tokens=tokens,
                           tokens_per_s=tokens / elapsed, mfu=mfu, memory_gb=memory, seconds=self.seconds,
                           finite=self.finite, **more)
        self.step += 1
        if self.d.is_main and (self.step % self.p.log_every == 0 or self.step == self.n_steps):
            left = (self.n_steps - self.step) * (self.seconds - self.seconds_before) / (self.step - self.first_step)
            speed = f"{tokens / elapsed:,.0f} tokens/s  MFU {f'{mfu:.1%}' if mfu else 'n/a'}"
            tqdm.write(f"step {self.step:>6}/{self.n_steps} {self.step / self.n_steps:4.0%}  {stage:10} loss {loss:.4f}"
                       f"  lr {lr:.2e}  |g| {grad_norm:.2f}  {speed}  {memory:.1f} GB  {left / 60:.1f} min left")
            sys.stdout.flush()

    def evaluate_now(self, plan) -> int | None:
        """Problems a task for an evaluation that is due after this step; None: none is due."""
        ends, p = self.step == plan.end_step, self.p
        if not ends and not (p.eval_every and self.step % p.eval_every == 0) or self.stopping():
            return None
        if self.d.is_main:
            tqdm.write(f"--- step {self.step}" + f", end of stage {plan.name}" * ends)
        return self.cfg.evaluate.n_problems if self.step == self.n_steps else p.eval_problems

    def stopping(self) -> bool:
        """Whether a signal wants this run to end; all ranks agree."""
        return self.d.sum(float(self.signal.number))[0] > 0

    def save(self, plan, sections: tuple[str, ...], history: list, **more) -> None:
        """A checkpoint, where one is due after this step; leaves the process where a signal asked for it.

        sections: of the config, what a result depends on; history: see resume(); more: further fields of its meta.
        """
        stopping, ends, d = self.stopping(), self.step == plan.end_step, self.d
        if ends or stopping or self.step % self.p.save_every == 0:
            meta = dict(phase=self.phase, stage=plan.name, keep=ends, seconds=self.seconds, world=d.world,
                        command=self.cfg.command, commit=self.commit, machine=common.describe_machine(d.device),
                        config=common.config_hash(self.cfg, *sections),
                        model=dataclasses.asdict(self.cfg.model) | {"rope_theta": self.model.rope_theta},
                        tokenizer=self.tokenizer.hash, history=history, **{self.phase: as_json(self.p)}, **more)
            saved = common.save_checkpoint(d, self.folder, self.step, self.model, self.optimizer, meta,
                                           self.tokenizer_file, self.p.keep)
            if saved is None and (stopping or self.step == self.n_steps):
                raise UserError(f"the last checkpoint could not be written to {self.folder}; make room and run the "
                                "same command again")
        if stopping:
            if d.is_main:
                print(f"stopped by signal at step {self.step}; the same command goes on from here", flush=True)
            sys.exit(128 + (self.signal.number or 15))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation of the phases after pre-training

def look(run: Run, n_problems: int) -> dict:
    """Accuracy in chat form on n_problems a task, and answers to the prompts: printed, and returned for the metrics."""
    cfg, p, d, plain, scores = run.cfg, run.p, run.d, run.plain(), {}
    if n_problems and cfg.evaluate.tasks:
        settings = dataclasses.replace(cfg.evaluate, n_problems=n_problems, prompt_format="chat")
        scores = evaluate(plain, run.tokenizer, settings, d)
    if not d.is_main:
        return {}
    texts = []
    if p.prompts:
        asked = [template.render([{"role": "user", "content": text}], run.tokenizer, True) for text in p.prompts]
        texts = continuations(plain, run.tokenizer, asked, p.seed, cfg.evaluate.max_new_tokens)
    for prompt, text in zip(p.prompts, texts):
        tqdm.write(f"  > {prompt}\n  | " + text.replace("\n", "\n  | "))
    if scores:
        tqdm.write(format_table(scores))
    sys.stdout.flush()
    return {"scores": without_rows(scores), "samples": texts}


def before(run: Run, forms: tuple[str, ...]) -> None:
    """Writes before.json: what the start can do, {task: score with "prompt_format"}, by its better form.

    forms: "document", as in phase 1, where the extractor is lenient; "chat". Else the gain may only be the form.
    """
    scores = {form: evaluate(run.plain(), run.tokenizer, dataclasses.replace(run.cfg.evaluate, prompt_format=form), run.d)
              for form in forms}
    if run.d.is_main:
        for form, by_task in scores.items():
            print(f"before, in {form} form\n{format_table(by_task)}", flush=True)
        best = {task: max(scores, key=lambda form: scores[form][task]["avg"]) for task in run.cfg.evaluate.tasks}
        run.folder.mkdir(parents=True, exist_ok=True)
        common.write_atomic(run.folder / "before.json", json.dumps(without_rows(
            {task: scores[form][task] | {"prompt_format": form} for task, form in best.items()})))
