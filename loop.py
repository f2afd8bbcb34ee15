"""Shared parts of the training loops: starting, resuming, saving, the log, evaluation.

The losses and the loops themselves stand in the scripts: pretrain.py, sft.py, distill.py,
reward.py, rl.py.
"""
from settings import (
    CountOr0,
    FractionBelow1,
    Minutes,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)

import dataclasses
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import common
import hf
from common import Dist, UserError, progress_bar
from data.chat import template
from data.tasks import registry
from data.text.tokenizer import Tokenizer
from evaluate import evaluate, format_table, open_verifier, rewards_by_problem, without_rows
from generate import decode_answer, sample
from model import NOT_OF_THE_WEIGHTS, ModelConfig, meta_model, training_flops
from sampler import Embedded
from schedule import Stage, is_due, stage_at

# Files in the folder of a phase
PLAN = "plan.json"         # how many steps it will have
KEPT_SAMPLES = "evaluate"  # a folder: samples of the evaluation that is being done
PAIRED_REWARDS = "problems.jsonl"  # each problem's reward at each evaluation, for --compare
SCORES = "scores.json"     # of its last evaluation, for the phases that start from there

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass(kw_only=True)
class TrainConfig:
    lr: PositiveFloat = 3e-4     # peak learning rate
    beta1: FractionBelow1 = 0.9  # AdamW
    beta2: FractionBelow1 = 0.95  # AdamW
    weight_decay: NonNegativeFloat = 0.1  # AdamW, on matrices but not on embeddings and norms
    grad_clip: PositiveFloat = 1.0  # largest global norm of the gradient
    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; weights and optimizer are
                                                       # always fp32
    compile: bool = False        # torch.compile each block
    recompute: bool = False      # activation checkpointing: less memory, a third more time
    shard_size: NonNegativeInt = 0  # ranks that share one copy of the weights (0: all); fewer is
                                    # HSDP, for many nodes
    seed: Seed = 0               # of weights, data order and samples
    log_every: PositiveInt = 20  # steps between lines on the screen (metrics.jsonl has every step)
    eval_every: NonNegativeInt = 0  # steps between evaluations (0: only at the end of each stage)
    eval_problems: CountOr0 = 0  # held-out problems per task at each evaluation (0: none); the last
                                 # takes evaluate's
    eval_tasks: list[str] = field(default_factory=list)  # evaluated in this phase beside
                                                         # evaluate.tasks
    save_every: NonNegativeInt = 200  # steps between checkpoints (0: any number); the end of each
                                      # stage has one anyway
    save_minutes: NonNegativeFloat = 20.0  # … and at most so many minutes between two (0: any
                                           # number)
    timeout_minutes: Minutes = 10.0  # a rank that comes so late to a step's collectives has failed
    keep: NonNegativeInt = 2     # checkpoints kept, beside those of stage ends; the newest always
    on_nonfinite: Literal["skip", "stop"] = "skip"  # a step whose loss or gradient is no number
    prompts: list[str] = field(default_factory=list)  # texts that are answered at each evaluation


def fill_in_stages(stages: list, cfg: TrainConfig) -> None:
    """Gives stages what they leave open: recompute and micro_tokens, as in the phase's section."""
    for stage in stages:
        if stage.recompute is None:
            stage.recompute = cfg.recompute
        if stage.micro_tokens is None:
            stage.micro_tokens = cfg.micro_tokens


def configure(model, stage) -> None:
    """Sets what a stage's settings say of the model: rotary base, activation checkpointing."""
    model.rope_theta = stage.rope_theta or model.rope_theta
    set_recompute(model, stage.recompute)


def set_recompute(model, recompute: bool) -> None:
    for block in model.layers:
        block.recompute = recompute


def set_vocab_size(model: ModelConfig, n_vocab: int) -> None:
    """Fills in vocab_size, or checks that the tokenizer's ids fill it but for padding."""
    if model.vocab_size is None:
        model.vocab_size = -(-n_vocab // 64) * 64
    if not n_vocab <= model.vocab_size < n_vocab + 128:
        raise UserError(
            f"the tokenizer has {n_vocab} ids but model.vocab_size is {model.vocab_size}; it must "
            "be the same or up to 127 more (padding); leave it out to take the tokenizer's"
        )


def as_json(settings) -> dict:
    """A dataclass as it looks after a trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


# --------------------------------------------------------------------------------------------------
# A run: start, resume, save


@dataclass
class Run:
    """A phase's run: where it stands, what it trains, and how far it had come when it started."""
    phase: str                # "pretrain", "sft", …
    config: SimpleNamespace   # the script's whole config …
    cfg: TrainConfig          # … and the phase's section of it
    dist: Dist
    tokenizer: Tokenizer
    tokenizer_file: Path      # is copied into each checkpoint
    source: Path | None = None  # checkpoint that the first weights come from
    model: torch.nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    replica: torch.nn.Module | None = None  # a plain copy for samples, where the model is sharded:
                                            # made when it is first asked for
    resume_key: Callable[[int], list] | None = None  # a step's past, which a checkpoint must share
    first_step: int = 0       # steps that were done before
    step: int = 0             # … and that are done by now
    seconds: float = 0.0      # of training, the steps before included
    saved_step: int = 0       # of its newest checkpoint
    saved_at: float = field(default_factory=time.monotonic)  # when it last wrote one, or tried to

    def __post_init__(self):
        if self.dist.is_main and self.config.track:
            import trackers  # only where --track asks for them

            trackers.warn_of_missing(self.config.track)

    @property
    def folder(self) -> Path:
        return self.config.out / self.phase

    @property
    def eval_tasks(self) -> list[str]:
        """What an evaluation of this phase asks; none where evaluate.tasks has none, or where the
        phase is not evaluated on tasks."""
        tasks = self.config.evaluate.tasks if hasattr(self.config, "evaluate") else []
        return list(dict.fromkeys(tasks + self.cfg.eval_tasks)) if tasks else []

    @functools.cached_property
    def verifier(self):
        """Who decides in evaluations on answers that rules leave open; None for nobody."""
        return self.open_verifier(self.config.evaluate.verifier, self.eval_tasks)

    def open_verifier(self, spec: dict, tasks: list[str]):
        """evaluate.open_verifier, its model sought where find_checkpoint seeks."""
        return open_verifier(spec, tasks, self.config.out, self.dist, self.config.init_from)

    def find_checkpoint(self, name: str) -> Path:
        """A checkpoint that the config names: a phase of this run, any, or of the run that
        --init_from is of."""
        return hf.resolve_checkpoint(self.dist, name, self.config.out, self.config.init_from)

    def unsharded_model(self):
        """A plain module with the present weights, for sampling (common.unsharded_copy)."""
        if self.dist.mesh is not None and self.replica is None:
            dtype = getattr(torch, self.cfg.dtype)
            replica = meta_model(self.config.model).to(dtype).to_empty(device=self.dist.device)
            self.replica = replica.requires_grad_(False)
        model = common.unsharded_copy(self.model, self.replica)
        model.rope_theta = self.model.rope_theta
        return model

    def resume(self, path: Path, checked: bool) -> None:
        """Takes weights, optimizer and step from a checkpoint; UserError if it is another run's.

        checked: its files have just been read against their checksums.
        """
        meta = common.read_meta(path)
        differences = [f"model.{key}" for key, value in as_json(self.config.model).items()
                       if key not in NOT_OF_THE_WEIGHTS and meta.get("model", {}).get(key) != value]
        if meta.get("tokenizer") != self.tokenizer.hash:
            differences.append("tokenizer")
        if meta.get("resume_key") != self.resume_key(meta["step"]):
            differences.append("stages, data, batch size or seed (or by an earlier version)")
        if differences:
            raise UserError(
                f"{path} was trained with other {', '.join(differences)}; choose another --run, or "
                "delete it"
            )
        common.load_checkpoint(self.dist, path, self.model, self.optimizer, checked)
        self.first_step = self.step = self.saved_step = meta["step"]
        self.seconds = meta["seconds"]
        self.model.rope_theta = meta["model"]["rope_theta"]
        if self.dist.is_main:
            before = meta.get(self.phase, {})
            changed = [
                key
                for key, value in as_json(self.cfg).items()
                if key in before and before[key] != value
            ]
            note = f"; settings that have changed since: {', '.join(changed)}" if changed else ""
            print(f"going on from {path} (step {self.first_step}){note}")

    def save_is_due(self, step: int, stage: Stage) -> bool:
        """Whether a checkpoint is due after `step` steps: by their number, by the first rank's
        clock, or because an evaluation comes next, which may take hours and be killed."""
        cfg = self.cfg
        minutes = (time.monotonic() - self.saved_at) / 60
        is_late = self.dist.is_main and 0 < cfg.save_minutes <= minutes
        by_clock = self.dist.sum(float(is_late))[0] > 0
        by_steps = evaluation_is_due(cfg, stage, step) or is_due(cfg.save_every, step)
        return by_clock or by_steps

    def save(self, step: int, stage: Stage, must_succeed: bool, **more) -> None:
        """Writes the checkpoint after `step` steps; the end of a stage is kept for good.

        more: further fields of its meta.json. A full disk loses only this checkpoint, unless it
        must succeed: then UserError.
        """
        config, dist = self.config, self.dist
        sections = [name for name in ("model", "corpus", self.phase) if hasattr(config, name)]
        meta = dict(
            phase=self.phase,
            stage=stage.name,
            keep=step == stage.end_step,
            seconds=self.seconds,
            world=dist.world,
            command=config.command,
            commit=common.current_commit(),
            machine=common.describe_machine(dist.device),
            config=common.config_hash(config, *sections),
            model=dataclasses.asdict(config.model) | {"rope_theta": self.model.rope_theta},
            tokenizer=self.tokenizer.hash,
            tokenizer_ids=self.tokenizer.ids,
            chat_template=self.tokenizer.chat_template and as_json(self.tokenizer.chat_template),
            resume_key=self.resume_key(step),
        )
        meta |= {self.phase: as_json(self.cfg)} | more
        saved = common.save_checkpoint(dist, self.folder, step, self.model, self.optimizer, meta,
                                       self.tokenizer_file, self.cfg.keep)
        self.saved_at = time.monotonic()  # of a try that failed, too: the next is as far away
        if saved is not None:
            self.saved_step = step
        elif must_succeed:
            raise UserError(
                f"the last checkpoint could not be written to {self.folder}; make room and run the "
                "same command again"
            )

    def save_unless_saved(self, plan: list[Stage]) -> None:
        """Writes the checkpoint of the steps that are done, before a signal is obeyed."""
        if self.step > self.saved_step:
            self.save(self.step, stage_at(plan, self.step - 1), must_succeed=True)


def evaluation_is_due(cfg: TrainConfig, stage: Stage, step: int) -> bool:
    """Whether a run is evaluated after `step` steps, the last one of which was of this stage."""
    return step == stage.end_step or is_due(cfg.eval_every, step)


def start(phase: str, config: SimpleNamespace, dist: Dist, default_source: str,
          unused: dict[str, str] = {}) -> Run:
    """A phase's run: its folder locked, its source found, no model yet (load_or_resume makes it).

    The tokenizer is the source's, or the config's. unused: settings that have no effect beside the
    others, each with the reason.
    """
    source = hf.resolve_checkpoint(dist, config.init_from or default_source, config.out)
    tokenizer_file = Path(config.tokenizer.path or source / "tokenizer.json")
    tokenizer = hf.load_tokenizer(source, config.tokenizer)
    if dist.is_main:
        for line in hf.notes_on(source, tokenizer):
            print(f"note: {line}")
    set_vocab_size(config.model, tokenizer.n_vocab)
    return open_run(phase, config, dist, tokenizer, tokenizer_file, source, unused)


def open_run(phase: str, config: SimpleNamespace, dist: Dist, tokenizer: Tokenizer,
             tokenizer_file: Path, source: Path | None, unused: dict[str, str]) -> Run:
    """A run whose folder is locked and whose tasks are known."""
    dist.from_main(lambda: common.lock_folder(config.out / phase))
    run = Run(phase, config, getattr(config, phase), dist, tokenizer, tokenizer_file, source)
    check_tasks(run)
    say_unused(run, unused)
    return run


def say_unused(run: Run, unused: dict[str, str]) -> None:
    """Prints which settings were given and have no effect, and why."""
    if not run.eval_tasks:
        of_tasks = ("eval_problems", "eval_tasks")
        unused = dict.fromkeys(of_tasks, "there are no evaluate.tasks") | unused
    if run.dist.world == 1:
        unused = {"shard_size": "there is one process"} | unused
    for setting in dataclasses.fields(run.cfg):
        default = setting.default
        if setting.default_factory is not dataclasses.MISSING:
            default = setting.default_factory()
        given = getattr(run.cfg, setting.name) != default
        if given and setting.name in unused and run.dist.is_main:
            print(f"note: {run.phase}.{setting.name} has no effect: {unused[setting.name]}")


def check_tasks(run: Run, *more: str) -> None:
    """Raises UserError, before hours of work, for tasks that there are not, or whose verifier
    cannot be opened. more: tasks that the phase takes beside those of its evaluation."""
    for task in (*run.eval_tasks, *more):
        registry.family(task)
    if run.eval_tasks:
        run.verifier  # it is opened where a task needs one


def load_or_resume(run: Run, resume_key: Callable[[int], list]) -> None:
    """Makes model and optimizer, with the weights of the newest checkpoint or of the source.

    resume_key: of a step, as JSON, what its past must have been for a run to go on from a
    checkpoint.
    """
    run.resume_key = resume_key
    make_model(run)
    newest = common.find_checkpoint(run.dist, run.folder)
    if newest:
        run.resume(newest, checked=True)
    else:
        run.model.rope_theta = hf.load_initial_weights(
            run.dist, run.model, run.tokenizer, run.source
        )


def checkpoint_of_step(run: Run, step: int) -> Path:
    """The run's checkpoint after `step` steps, or for 0 the one that it started from.

    UserError where there is none.
    """
    if step == 0:
        return run.source
    folder = run.folder / f"step_{step:08d}"
    if not (folder / "meta.json").is_file():
        raise UserError(f"the checkpoint {folder} is needed, but it could not be written or is "
                        "gone: make room and run the same command again")
    return folder


def make_model(run: Run) -> None:
    """Gives a run its model and optimizer, sharded, without weights yet."""
    run.model, run.optimizer = build_model(run.config.model, run.cfg, run.dist)


def build_model(model_config: ModelConfig, cfg: TrainConfig, dist: Dist):
    """(model, optimizer), sharded, without weights yet."""
    model = meta_model(model_config)
    check_memory(model, dist)
    set_recompute(model, cfg.recompute)
    common.shard_model(model, dist, cfg.dtype, cfg.compile)
    return model, common.adamw(model, cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)


def check_memory(model, dist: Dist) -> None:
    """Raises UserError where weights, gradients and AdamW's moments alone, 16 bytes a parameter,
    are more than all memory of the machine's GPU, or of the machine."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_shards = dist.mesh.shape[-1] if dist.mesh is not None else 1
    needed, there = 16 * n_parameters / n_shards, common.total_memory(dist.device)
    if needed > there:
        raise UserError(
            f"a model of {n_parameters:,} parameters needs {needed / 1e9:,.1f} GB in each process "
            f"for weights, gradients and AdamW; there are {there / 1e9:,.1f} GB: make it smaller, "
            "or spread it over more processes")


# --------------------------------------------------------------------------------------------------
# Batches


class Prefetch:
    """The batches of the steps to come: a thread reads the next one while the model trains."""

    def __init__(self, read: Callable, first_step: int, n_steps: int, dist: Dist):
        """read(step, rank, world) makes a rank's rows of a step's batch."""
        self.read, self.dist = read, dist
        self.step, self.n_steps = first_step, n_steps
        self.thread = ThreadPoolExecutor(1)
        self.pending = self._submit()

    def next(self):
        """The batch of the next step."""
        batch = self.pending.result()
        self.step += 1
        self.pending = self._submit()
        return batch

    def _submit(self):
        if self.step == self.n_steps:
            return None
        return self.thread.submit(self.read, self.step, self.dist.rank, self.dist.world)


def shuffled_indices(n: int, first: int, count: int, seed: int) -> np.ndarray:
    """`count` items from `first` on of an endless stream over n; each epoch is a permutation."""
    epochs = range(first // n, (first + count - 1) // n + 1)
    stream = np.concatenate(
        [np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs]
    )
    return stream[first % n:][:count]


def batch_of_step(step: int, n_pairs: int, cfg, dist: Dist) -> np.ndarray:
    """This rank's pairs of a step's global batch. cfg: of DPD or of the reward model."""
    batch = shuffled_indices(n_pairs, step * cfg.batch_pairs, cfg.batch_pairs, cfg.seed)
    return batch[dist.rank::dist.world]


def micro_batches(model, n_rows: int, rows_per_pass: int) -> Iterator[slice]:
    """Slices of a rank's rows, one per forward pass; gradients are reduced after the last alone."""
    for first in range(0, n_rows, rows_per_pass):
        common.set_gradient_sync(model, last_micro_batch=first + rows_per_pass >= n_rows)
        yield slice(first, first + rows_per_pass)


def response_hidden_states(model, rows: dict) -> torch.Tensor:
    """Hidden states (N, C) that predict the response tokens of packed rows.

    rows: data.chat.packing.Rows on the device; with "shared", what sequences have in common at
    their beginning runs through the model once.
    """
    hidden = model(rows["tokens"], rows["doc_start"], shared=rows.get("shared"))
    return hidden.flatten(0, 1)[rows["positions"]]


def sum_per_sequence(values: torch.Tensor, rows: dict[str, torch.Tensor], n: int) -> torch.Tensor:
    """Sums (n,) over each sequence of the values (N,) of its response tokens."""
    return values.new_zeros(n).index_add(0, rows["sequence"], values)


# --------------------------------------------------------------------------------------------------
# The log


class Clock:
    """Seconds of a step's parts."""

    def __init__(self):
        self.started = time.time()
        self.laps = {}
        self.start_lap()

    def start_lap(self) -> None:
        self.lap_started = time.time()

    def lap(self, name: str) -> None:
        """Ends a part of the step, and begins the next one."""
        self.laps[name] = time.time() - self.lap_started
        self.start_lap()

    def total(self) -> float:
        return time.time() - self.started


class Log:
    """The progress of a run: a bar, a line now and then, and metrics.jsonl with a line per step."""

    def __init__(self, run: Run, n_steps: int):
        self.run, self.n_steps = run, n_steps
        self.seconds_before = run.seconds
        self.skipped = 0  # steps in a row
        self.metrics = common.Metrics(run.dist, run.folder, run.first_step)
        if run.dist.is_main:  # how far an unfinished run is, is for `python -m report` to say
            common.write_atomic(run.folder / PLAN, json.dumps({"steps": n_steps}))
        self.owes_first = run.dist.from_main(self._first_evaluation_is_missing)
        self.trackers = self._open_trackers()
        if run.dist.is_main:
            n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
            print(
                f"{n_parameters:,} parameters, {run.dist.world} process(es) on "
                f"{run.dist.device.type}, "
                f"{run.cfg.dtype}"
            )
            if run.cfg.dtype == "bfloat16" and common.computes_bfloat16_slowly(run.dist.device):
                print(f"note: this CPU has no instructions for bfloat16: --{run.phase}.dtype="
                      "float32 is several times as fast")
            if run.first_step >= n_steps and not self.owes_first:
                print("this run is complete; nothing to do")
        self.bar = progress_bar(
            total=n_steps,
            initial=run.first_step,
            unit="step",
            dynamic_ncols=True,
            disable=None if run.dist.is_main else True,
        )

    def _open_trackers(self):
        """The trackers.Trackers of the command, on the first rank; None where it names none, or no
        step is left to be done."""
        run = self.run
        is_complete = run.first_step >= self.n_steps and not self.owes_first
        if not run.config.track or not run.dist.is_main or is_complete:
            return None
        import trackers

        settings = trackers.describe(run.config, run.dist.device)
        return trackers.Trackers(run.config.track, trackers.Job(
            run.config.run, run.phase, run.folder, settings, run.first_step, run.cfg.prompts))

    def _write(self, **line) -> None:
        self.metrics.write(**line)
        self.track(line)

    def track(self, line: dict) -> None:
        """A line for the trackers alone."""
        if self.trackers:
            self.trackers.write(line)

    def _first_evaluation_is_missing(self) -> bool:
        """Whether this run did its last step before, but not what may have been due after it."""
        last = [line for line in common.read_metrics(self.run.folder)
                if line["step"] == self.run.first_step - 1]
        return len(last) == 1 and "loss" in last[0]

    def owes_evaluation(self, plan: list[Stage]) -> bool:
        """Whether an evaluation is due after the steps that are done; at the start of a resumed
        run one that a signal had ended."""
        run = self.run
        if run.step == 0 or (run.step == run.first_step and not self.owes_first):
            return False
        return evaluation_is_due(run.cfg, stage_at(plan, run.step - 1), run.step)

    def step(self, step: int, stage: Stage, loss: float, lr: float, grad_norm: float, n_tokens: int,
             lengths: Sequence[int], seconds: float, **more) -> None:
        """Writes the step's metrics; prints every `log_every` steps.

        n_tokens: of the step, on all ranks: those in the loss; in rl.py all that were sampled.
        lengths: in tokens, of the sequences that went through the model on this rank, for the MFU.
        more: further metrics.
        """
        run, dist = self.run, self.run.dist
        run.step = step + 1
        run.seconds += seconds
        mfu = self._mfu(np.array(lengths, np.float64), seconds)
        memory = common.memory_gb(dist.device)
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if is_finite:
            self.skipped = 0
        self._write(
            step=step, stage=stage.name, loss=loss, lr=lr, grad_norm=grad_norm, tokens=n_tokens,
            tokens_per_s=n_tokens / seconds, mfu=mfu, memory_gb=memory, seconds=run.seconds,
            finite=is_finite, **more)
        done = step + 1
        if dist.is_main and (done % run.cfg.log_every == 0 or done == self.n_steps):
            seconds_per_step = (run.seconds - self.seconds_before) / (done - run.first_step)
            minutes_left = (self.n_steps - done) * seconds_per_step / 60
            mfu_text = f"{mfu:.1%}" if mfu else "n/a"
            speed = f"{n_tokens / seconds:,.0f} tokens/s  MFU {mfu_text}"
            tqdm.write(
                f"step {done:>6}/{self.n_steps} {done / self.n_steps:4.0%}  {stage.name:10} "
                f"loss {loss:.4f}  lr {lr:.2e}  |g| {grad_norm:.2f}  {speed}  {memory:.1f} GB  "
                f"{minutes_left:.1f} min left"
            )
            sys.stdout.flush()
        self.bar.update()

    def _mfu(self, lengths: np.ndarray, seconds: float) -> float | None:
        """Model FLOPs utilization: share of the devices' bf16 peak; None where that is unknown.

        Of the trained model alone, forward and backward: not of teachers, judges and samplers.
        """
        run = self.run
        tokens, pairs = run.dist.sum(lengths.sum(), (lengths**2).sum() / 2)
        peak = common.peak_flops(run.dist.device, run.cfg.dtype)
        if peak is None:
            return None
        flops = training_flops(run.config.model, tokens, pairs)
        return flops / seconds / run.dist.world / peak

    def skip_step(self, step: int, loss: float, grad_norm: float, data: str) -> None:
        """Says that a step was skipped because something was not finite, and which data it read.

        UserError after ten in a row, or at once with on_nonfinite="stop".
        """
        self.skipped += 1
        message = f"step {step}: loss {loss}, gradient norm {grad_norm}; read from {data}"
        if self.run.dist.is_main:
            print(f"warning: {message}; the weights are as before", flush=True)
        if self.run.cfg.on_nonfinite == "stop" or self.skipped == 10:
            raise UserError(f"{message}; stopped with the weights of the last checkpoint")

    def evaluation(self, stage: Stage, metrics: dict) -> None:
        """Writes what an evaluation found after the last step; its samples are needed no more."""
        run = self.run
        self._write(step=run.step - 1, stage=stage.name, seconds=run.seconds, **metrics)
        if run.dist.is_main:
            shutil.rmtree(run.folder / KEPT_SAMPLES, ignore_errors=True)

    def close(self) -> None:
        self.bar.close()


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate_and_sample(
    run: Run, stage: Stage, is_last: bool, prompt_format: str = "chat"
) -> dict:
    """Accuracy on held-out problems, and answers to prompts: printed, and returned.

    stage: of the last step. is_last: the last evaluation of a run takes all of evaluate.n_problems,
    those before it eval_problems. {} on other ranks than the first. Scored samples are kept as they
    come, until it is done.
    """
    if run.dist.is_main:
        note = f", end of stage {stage.name}" if run.step == stage.end_step else ""
        tqdm.write(f"--- step {run.step}{note}")
    n_problems = run.config.evaluate.n_problems if is_last else run.cfg.eval_problems
    model = run.unsharded_model()
    scores, found = {}, {}  # by task; the same by sample_file_name(), for the phases after this one
    if n_problems and run.eval_tasks:
        scores = evaluate_tasks(run, model, n_problems, prompt_format, found)
    texts = []
    if run.dist.is_main:
        with run.dist.leaving_at_once():
            texts = answer_prompts(run, model, prompt_format)
    run.dist.wait()
    if not run.dist.is_main:
        return {}
    if scores:
        tqdm.write(format_table(scores))
        line = dict(step=run.step - 1, rewards=rewards_by_problem(scores))
        common.keep_lines(run.folder / PAIRED_REWARDS, [line])
    if scores and is_last:
        common.write_atomic(run.folder / SCORES, json.dumps(without_rows(found)))
    sys.stdout.flush()
    return {"scores": without_rows(scores), "samples": texts}


def evaluate_tasks(run: Run, model, n_problems: int, prompt_format: str,
                   known: dict[str, dict]) -> dict[str, dict]:
    """The scores of the phase's tasks. known: as in evaluate()."""
    settings = dataclasses.replace(run.config.evaluate, tasks=run.eval_tasks,
                                   n_problems=n_problems, prompt_format=prompt_format, system="")
    made_by = run.dist.from_main(lambda: key_of_run(run))  # on all ranks the same
    return evaluate(Embedded(model), run.tokenizer, settings, run.dist, run.folder / KEPT_SAMPLES,
                    made_by, run.verifier, known)


def key_of_run(run: Run) -> str:
    """What tells the present weights from all others."""
    if run.step == 0:
        return weights_key(run.source, run.cfg.dtype)
    if run.step == run.saved_step:
        return weights_key(run.folder / f"step_{run.step:08d}", run.cfg.dtype)
    source = [str(run.source), run.source and common.list_files(run.source)]
    return common.hash_json([source, run.step, run.resume_key(run.step), as_json(run.cfg)])


def weights_key(checkpoint: Path, dtype: str) -> str:
    """The same for the same weights, in whatever phase they answer; dtype: in which they do."""
    return common.hash_json([checkpoint.name, common.list_files(checkpoint), dtype])


def read_known_scores(checkpoint: Path, dist: Dist) -> dict[str, dict]:
    """What the phase that made a checkpoint found in its last evaluation, for evaluate()."""
    def read() -> dict[str, dict]:
        try:
            return json.loads((checkpoint.parent / SCORES).read_text())
        except (OSError, ValueError):  # it was not evaluated, or not by us
            return {}

    return dist.from_main(read)


def answer_prompts(run: Run, model, prompt_format: str) -> list[str]:
    """Prints what the model makes of each of the config's prompts, and returns it."""
    cfg, tokenizer = run.cfg, run.tokenizer
    if not cfg.prompts:
        return []
    if prompt_format == "document":
        prompts = [tokenizer.encode_prompt(text) for text in cfg.prompts]
        answers = continue_prompts(model, tokenizer, prompts, cfg.seed)
        texts = []
        for prompt, tokens in zip(cfg.prompts, answers):
            texts.append(prompt + decode_answer(tokens, tokenizer))
        for text in texts:
            tqdm.write("  | " + text.replace("\n", "\n  | "))
        return texts
    conversations = [[{"role": "user", "content": text}] for text in cfg.prompts]
    prompts = [
        template.render(messages, tokenizer, add_generation_prompt=True)
        for messages in conversations
    ]
    answers = continue_prompts(
        model, tokenizer, prompts, cfg.seed, run.config.evaluate.max_new_tokens
    )
    texts = []
    for prompt, tokens in zip(prompts, answers):  # a prompt may have begun the thoughts
        texts.append(decode_answer(tokens, tokenizer, prompt))
    for prompt, text in zip(cfg.prompts, texts):
        tqdm.write(f"  > {prompt}\n  | " + text.replace("\n", "\n  | "))
    return texts


def continue_prompts(
    model, tokenizer, prompts: list[list[int]], seed: int, length: int = 60
) -> list[list[int]]:
    """The tokens that the model writes after each prompt: at most `length`, temperature 0.6."""
    stop = tokenizer.stop_ids
    samples = sample(
        model, prompts, max_new_tokens=length, temperature=0.6, top_p=0.95, stop=stop, seed=seed
    )
    return [answer.tokens for (answer,) in samples]


def evaluate_starting_point(run: Run, prompt_formats: tuple[str, ...]) -> None:
    """Writes before.json, what the start can do: {task: its score in the better prompt format}.

    prompt_formats: "document", as in phase 1, where the extractor is lenient; "chat". With one
    alone the gain of a phase may only be the format. What the phase before found is not asked
    again.
    """
    scores, known = {}, read_known_scores(run.source, run.dist)
    for prompt_format in prompt_formats:
        n_problems = run.config.evaluate.n_problems
        scores[prompt_format] = evaluate_tasks(
            run, run.unsharded_model(), n_problems, prompt_format, known)
    if not run.dist.is_main:
        return
    for prompt_format, by_task in scores.items():
        print(f"before, in {prompt_format} form\n{format_table(by_task)}", flush=True)
    best = {}
    for task in run.eval_tasks:
        better = max(scores, key=lambda prompt_format: scores[prompt_format][task]["avg"])
        best[task] = scores[better][task] | {"prompt_format": better}
    run.folder.mkdir(parents=True, exist_ok=True)
    common.write_atomic(run.folder / "before.json", json.dumps(without_rows(best)))


def read_evaluations(folder: Path) -> list[dict]:
    """The lines of a phase's metrics, after the scores that it began with."""
    before = folder / "before.json"
    start = [{"stage": "", "scores": json.loads(before.read_text())}] if before.is_file() else []
    return start + common.read_metrics(folder)


def gain_rows(folder: Path) -> list[list[str]]:
    """Each task's accuracy before a phase and after it; [] where it was not evaluated before."""
    scores = [line["scores"] for line in read_evaluations(folder) if line.get("scores")]
    if len(scores) < 2 or not (folder / "before.json").is_file():
        return []
    first, last = scores[0], scores[-1]
    rows = [["task", "before", "asked in", "after", "gain"]]
    for task, before in first.items():
        if task in last:
            gain = last[task]["avg"] - before["avg"]
            scores_of_task = [with_error(before), before["prompt_format"], with_error(last[task])]
            rows.append([task_title(task), *scores_of_task, f"{gain:+.3f}"])
    return rows


def gain_table(folder: Path) -> str:
    """gain_rows as text; "" for none."""
    rows = gain_rows(folder)
    if not rows:
        return ""
    first = next(iter(read_evaluations(folder)[0]["scores"].values()))
    note = f"accuracy (avg@{first['k']} ± s.e.) on the same {first['n']} held-out problems per task"
    return f"{align(rows)}\n{note}"


def print_results(run: Run) -> None:
    """What a phase prints at its end: its gain as a table, and how to draw its pictures."""
    if not run.dist.is_main:
        return
    table = gain_table(run.folder)
    if table:
        print(table)
    print(f"pictures and tables: python -m report {run.config.path} --run={run.config.run}")


def task_title(task: str) -> str:
    """What tables call a task: a set in a file ("gsm8k=data/gsm8k.jsonl") by its name and file."""
    name, _, path = task.partition("=")
    return f"{name}: {Path(path).stem}" if path else name


def with_error(score: dict) -> str:
    return f"{score['avg']:.3f} ±{score['stderr']:.3f}"


def align(rows: list[list[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join(lines)
