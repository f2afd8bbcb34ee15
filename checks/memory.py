"""Does each phase fit? `python -m checks.memory configs/3b.py --gpus 8`: peak GB per GPU, by part.
`--gb` says how much a GPU has (an H200's 150.1), `--write` appends to results/memory.jsonl.

Training is not estimated but run, without a GPU and in seconds: the phases' own train_step, clip
and AdamW on tensors that have a shape and no data (FakeTensorMode), in a process group that only
says it has so many ranks, while torch's FSDPMemTracker adds up what is alive. Each sequence is as
long as the phase lets it be. torch.compile is left out: it keeps fewer activations, so the figures
are bounds. Sampling, judging and what a process holds in any case are arithmetic, which
test_memory.py holds to what is allocated.
"""
from settings import load_config, sections_of

import argparse
import contextlib
import dataclasses
import functools
import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import common
import distill
import loop
import pretrain
import reward
import rl
import sft
from checks.bench import random_batch
from checks.sizes import RUNTIME_GB
from data.chat import packing
from data.chat.pairs import Pair
from data.tasks.problem import Problem
from data.text.tokenizer import TokenizerConfig
from evaluate import EvaluateConfig
from experiments import results
from generate import FREE_SHARE, pass_bytes_per_token, row_bytes
from kernels import cross_entropy
from model import ModelConfig, count_parameters, meta_model
from reward import PASS_TOKENS
from rollouts import Rollout

GPU_GB = 150.1  # that an H200 gives to torch
SPARE = 0.1     # share of a GPU that must stay free for the pieces that its allocator leaves
PROMPT = 2048   # tokens of a prompt at most, where a phase does not say
SECTIONS = dict(
    model=ModelConfig, tokenizer=TokenizerConfig, pretrain=pretrain.PretrainConfig,
    sft=sft.SftConfig, distill=distill.DistillConfig, reward=reward.RewardConfig, rl=rl.RlConfig,
    evaluate=EvaluateConfig,
)


@dataclass
class Case:
    """A training step to be measured."""
    name: str
    cfg: loop.TrainConfig   # the phase's section, as it holds in the stage
    train_step: Callable    # of (model, frozen models, dist)
    n_frozen: int = 0       # models beside it: a teacher, a reference
    n_copies: int = 0       # whole copies in the type of compute: the sampler's, the judge's


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gb", type=float, default=GPU_GB)
    parser.add_argument("--write", action="store_true")
    options, argv = parser.parse_known_args()
    config = read_config(argv)
    started = time.time()
    with fake_group(options.gpus) as dist:
        lines = {case.name: measure(case, config.model, dist) for case in cases(config, dist.world)}
    lines |= sampling_lines(config, options.gpus, options.gb)
    print_table(lines, options.gpus, options.gb)
    if options.write:
        write_result(config, lines, options.gpus, time.time() - started)


def write_result(
    config: SimpleNamespace, lines: dict[str, dict[str, float]], gpus: int, seconds: float
) -> None:
    """Appends a line to results/memory.jsonl."""
    sections = [name for name in SECTIONS if hasattr(config, name)]
    totals = {name: round(sum(line.values()), 2) for name, line in lines.items()}
    results.append("memory", dict(
        commit=common.current_commit(), command=shlex.join(["python", "-m", "checks.memory",
        *sys.argv[1:]]), config=common.config_hash(config, *sections),
        machine=common.describe_machine(torch.device("cpu")), seconds=round(seconds),
        run=config.run, gpus=gpus, gb=totals))


def read_config(argv: list[str]) -> SimpleNamespace:
    """The config, with those of the phases that it has; the vocabulary's size filled in."""
    sections = SECTIONS
    if argv and not argv[0].startswith("-"):
        present = sections_of(argv[0])
        sections = {name: cls for name, cls in SECTIONS.items() if name in present}
    sections |= dict(model=ModelConfig, evaluate=EvaluateConfig)
    config = load_config(__doc__, argv, **sections)
    if config.model.vocab_size is None:
        loop.set_vocab_size(config.model, config.tokenizer.vocab_size)
    return config


def print_table(lines: dict[str, dict[str, float]], gpus: int, gb: float) -> None:
    """A row for each case, a column for each part, in GB; and whether it fits."""
    parts = list(dict.fromkeys(part for line in lines.values() for part in line))
    rows = [["GB per GPU", *parts, "total", "fits"]]
    for name, line in lines.items():
        total = sum(line.values())
        cells = [f"{line[part]:.1f}" if part in line else "" for part in parts]
        rows.append([name, *cells, f"{total:.1f}", "yes" if total < (1 - SPARE) * gb else "NO"])
    print(loop.align(rows))
    print(f"{gpus} GPUs of {gb:.1f} GB; fits: with {SPARE:.0%} to spare")


# --------------------------------------------------------------------------------------------------
# The phases' steps


def cases(config: SimpleNamespace, gpus: int) -> list[Case]:
    """The steps of all phases that a config has, one for each context."""
    found = []
    for phase in ("pretrain", "sft"):
        if hasattr(config, phase):
            found += packed_cases(config, phase, gpus)
    if hasattr(config, "distill"):
        found.append(distill_case(config, gpus))
    if hasattr(config, "reward"):
        found.append(reward_case(config, gpus))
    if hasattr(config, "rl"):
        found.append(rl_case(config, gpus))
    return found


def packed_cases(config: SimpleNamespace, phase: str, gpus: int) -> list[Case]:
    """Of pretrain.py and sft.py: packed rows of a stage's context."""
    cfg = getattr(config, phase)
    module = {"pretrain": pretrain, "sft": sft}[phase]
    loop.fill_in_stages(cfg.stages, cfg)
    found = {}
    for stage in cfg.stages:
        n_rows = -(-cfg.batch_tokens // stage.context // gpus)  # of a rank
        per_pass = max(1, (stage.micro_tokens or n_rows * stage.context) // stage.context)
        n_rows = min(n_rows, 2 * per_pass)  # more passes take no more memory than two
        batch = random_batch(n_rows, stage.context, config.model.vocab_size, seed=0)
        if phase == "sft":
            weights = np.ones(batch.tokens.shape, np.float32)
            batch = packing.Batch(batch.tokens, batch.targets, weights, batch.doc_start)

        def train_step(model, frozen, dist, module=module, batch=batch, stage=stage):
            module.train_step(model, batch, stage, dist)

        name = f"{phase}, {stage.context:,}"
        stage_cfg = dataclasses.replace(cfg, recompute=stage.recompute)
        found[name] = Case(name, stage_cfg, train_step, n_copies=1)
    return list(found.values())


def distill_case(config: SimpleNamespace, gpus: int) -> Case:
    """Pairs of two responses that are as long as samples can be."""
    cfg = config.distill
    prompt = min(PROMPT, cfg.context - cfg.max_new_tokens)
    n_pairs = first_passes(cfg.batch_pairs // gpus, cfg.micro_pairs)
    pairs = [Pair(i, "", [0] * prompt, *2 * [[0] * cfg.max_new_tokens]) for i in range(n_pairs)]
    cached = np.zeros((n_pairs, 2, 2))
    uses_teacher = bool(cfg.teacher) and distill.uses_kl(cfg) and not cfg.top_k

    def train_step(model, frozen, dist):
        teacher = frozen[0] if uses_teacher else None
        distill.train_step(model, teacher, pairs, np.arange(n_pairs), cached, cfg, dist)

    n_frozen = uses_teacher + bool(cfg.refresh_every)
    return Case(f"distill, {cfg.context:,}", cfg, train_step, n_frozen, n_copies=1)


def reward_case(config: SimpleNamespace, gpus: int) -> Case:
    """Comparisons that fill the context."""
    cfg = config.reward
    n_pairs = first_passes(cfg.batch_pairs // gpus, cfg.micro_pairs)
    sequences = [([0] * (cfg.context - 1), [0])] * (2 * n_pairs)

    def train_step(model, frozen, dist):
        reward.train_step(model, sequences, cfg, dist)

    return Case(f"reward, {cfg.context:,}", cfg, train_step)


def rl_case(config: SimpleNamespace, gpus: int) -> Case:
    """Responses that fill the context, all of them with an advantage."""
    cfg = config.rl
    kl = max(cfg.kl, *(stage.kl or 0.0 for stage in cfg.stages))
    cfg = dataclasses.replace(cfg, kl=kl)
    n = first_passes(cfg.batch_groups // gpus * cfg.group_size, cfg.micro_rows)
    prompt, response = [0] * (cfg.context - cfg.max_new_tokens), [0] * cfg.max_new_tokens
    problem = Problem("", "", "", (), "", 1)
    logprobs = [0.0] * cfg.max_new_tokens
    batch = rl.RolloutBatch([
        Rollout(problem, prompt, response, logprobs, "stop", "", 1.0, advantage=1.0)
        for _ in range(n)])

    def train_step(model, frozen, dist):
        for scored, by in (("old", model), ("reference", frozen and frozen[0])):
            if cfg.updates > 1 and scored == "old" or cfg.kl and scored == "reference":
                setattr(batch, scored, rl.score_rollouts(by, batch.rollouts, cfg, dist))
        rl.train_step(model, batch, cfg, dist)

    n_copies = 1 + any(stage.reward == "pairwise" for stage in cfg.stages)
    return Case(f"rl, {cfg.context:,}", cfg, train_step, bool(cfg.kl), n_copies)


def first_passes(n: int, per_pass: int) -> int:
    """Of n items those of two passes: more passes take no more memory."""
    return min(n, 2 * per_pass) if per_pass else n


# --------------------------------------------------------------------------------------------------
# A process that looks like one of many, and tensors that look like a GPU's


class FakeDist(common.Dist):
    """One of many ranks, whose others say nothing."""

    def sum(self, *values: float) -> list[float]:
        return [float(value) for value in values]

    def gather(self, mine: dict) -> dict:
        return mine


@contextlib.contextmanager
def fake_group(gpus: int) -> Iterator[FakeDist]:
    """Rank 0 of a process group whose collectives move nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        mesh = init_device_mesh("cpu", (gpus,), mesh_dim_names=("shard",))
        yield FakeDist(0, gpus, torch.device("cpu"), mesh)
    finally:
        torch.distributed.destroy_process_group()


class WithoutData(TorchDispatchMode):
    """Lets code run that reads numbers out of tensors, and shows the tracker the inside of our
    losses, which are one operator each."""

    def __init__(self):
        super().__init__()
        ops = (
            cross_entropy.logprobs_op, cross_entropy.logprobs_kl_op, cross_entropy.topk_kl_op,
            cross_entropy.cross_entropy_op,
        )
        self.bodies = {op._opoverload: op._init_fn for op in ops}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        return self.bodies.get(func, func)(*args, **(kwargs or {}))


class NoKernel:
    """Stands for a Triton kernel: it takes no memory."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@contextlib.contextmanager
def fake_tensors(like_gpu: bool) -> Iterator[None]:
    """Tensors without data; like_gpu: the kernels, chunks and products are those of a GPU."""
    with contextlib.ExitStack() as stack:
        # DTensor tries each operator out on whole, unsharded tensors: in a mode of its own, so that
        # they are not counted.
        sharding = "torch.distributed.tensor._sharding_prop.detect_fake_mode"
        stack.enter_context(mock.patch(sharding, lambda *args: None))
        if like_gpu:
            for name, value in (
                ("CHUNK", cross_entropy.CHUNK_GPU),
                ("add_product", lambda total, a, b: None),  # in place
                ("logprobs_kernel", NoKernel()),
                ("kl_kernel", NoKernel()),
            ):
                stack.enter_context(mock.patch.object(cross_entropy, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


PARTS = {  # of FSDPMemTracker's snapshot
    "weights": ("Sharded Param",),
    "gathered": ("Unsharded Param", "All Gather"),
    "gradients": ("Sharded Grad",),
    "not reduced": ("Unsharded Grad", "Reduce Scatter"),
    "AdamW": ("OptState",),
    "activations, loss": ("Activation", "Temp", "Inputs", "Buffer"),
}


def measure(
    case: Case, model_config: ModelConfig, dist: FakeDist, like_gpu: bool = True
) -> dict[str, float]:
    """GB of a GPU at the peak of a step, by part."""
    cfg = dataclasses.replace(case.cfg, compile=False)
    kernels = "triton" if like_gpu else "torch"
    model_config = dataclasses.replace(model_config, kernels=kernels)
    with fake_tensors(like_gpu):
        model, optimizer = loop.build_model(model_config, cfg, dist)
        frozen = [frozen_model(model_config, cfg, dist) for _ in range(case.n_frozen)]
        tracker = FSDPMemTracker(model, optimizer)
        with tracker, WithoutData():
            begin = functools.partial(begin_pass, tracker)
            model.register_forward_pre_hook(begin, prepend=True)
            train(case, model, frozen, optimizer, dist)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    parts = {}
    for part, kinds in PARTS.items():
        parts[part] = sum(snapshot[kind] for kind in kinds) / 1e9
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    width = getattr(torch, cfg.dtype).itemsize / 1e9
    if frozen:
        parts["frozen"] = len(frozen) * n_parameters * width / dist.world
    if case.n_copies:
        parts["copies"] = case.n_copies * n_parameters * width
    if like_gpu:
        parts["runtime"] = RUNTIME_GB
    return parts


def begin_pass(tracker: FSDPMemTracker, model, *_) -> None:
    """Tells the tracker that another forward pass begins, and what FSDP keeps of the last one: the
    gradients that it has not reduced yet."""
    gc.collect()  # what only hangs together in circles is not alive
    tracker.reset_mod_stats()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                gradient = parameter.unsharded_accumulated_grad
                if gradient is not None:
                    kind = _FSDPRefType.UNSHARDED_GRAD
                    tracker._update_and_maybe_create_winfos(gradient, kind)


def frozen_model(model_config: ModelConfig, cfg: loop.TrainConfig, dist: common.Dist):
    """As hf.load_frozen makes it, without weights."""
    torch.set_default_dtype(getattr(torch, cfg.dtype))
    try:
        model = meta_model(model_config).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    return common.shard_model(model, dist, cfg.dtype, compile=False)


def train(case: Case, model, frozen: list, optimizer, dist: common.Dist) -> None:
    """A step as the phases' loops make it, after a first one without a signal, which leaves AdamW's
    state behind."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for has_signal in (False, True):
        if has_signal:
            case.train_step(model, frozen, dist)
            common.clip_grad_norm(model, case.cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------
# By arithmetic


def sampling_lines(config: SimpleNamespace, gpus: int, gb: float) -> dict[str, dict[str, float]]:
    """What sampling and judging take: {case: GB of each part}. Rows are as many as fit, as in
    generate.sample."""
    n_parameters = count_parameters(meta_model(config.model))["total"]
    lines = {}

    def add(name: str, cfg, trained: bool, copies: int, prompt: int, new: int) -> dict:
        width = getattr(torch, cfg.dtype).itemsize if cfg is not config.evaluate else 2
        dtype = torch.bfloat16 if width == 2 else torch.float32
        line = {"copies": copies * width * n_parameters / 1e9, "runtime": RUNTIME_GB}
        if trained:
            line |= {"weights": 4 * n_parameters / gpus / 1e9}
            line |= {"AdamW": 8 * n_parameters / gpus / 1e9}
        row = row_bytes(config.model, dtype, prompt, new) / 1e9
        n_rows = min(cfg.max_rows, int(FREE_SHARE * (gb - sum(line.values())) / row))
        lines[f"{name}, {n_rows} rows of {prompt + new:,}"] = line | {"rows": n_rows * row}
        return line

    if hasattr(config, "distill"):
        cfg = config.distill
        prompt = min(PROMPT, cfg.context - cfg.max_new_tokens)
        add("distill's samples", cfg, False, 1, prompt, cfg.max_new_tokens)
    if hasattr(config, "rl"):
        cfg = config.rl
        prompt = cfg.context - cfg.max_new_tokens
        line = add("rl's rollouts, filter", cfg, True, 2, prompt, cfg.max_new_tokens)
        judge = PASS_TOKENS * pass_bytes_per_token(config.model, torch.bfloat16) / 1e9
        lines[f"rl's judge, {PASS_TOKENS:,} tokens"] = line | {"rows": judge}
    cfg = config.evaluate
    add("evaluate.py", cfg, False, 1, PROMPT, cfg.max_new_tokens)
    return lines


def allocated(work: Callable[[], object]) -> int:
    """Bytes that a call holds at its peak beyond those from before, as PyTorch's CPU allocator
    counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
    return int(np.cumsum([0, *sizes]).max())


if __name__ == "__main__":
    sys.exit(common.cli(main))
