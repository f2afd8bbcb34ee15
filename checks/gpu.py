"""What does one GPU make of all this? The parts of `bash checks/gpu.sh`, which runs them all.

    python -m checks.gpu training            # on a GPU: writes results/gpu/training.json
    python -m checks.gpu training --small    # the same code at a tiny shape, on a CPU as well
    python -m checks.gpu table               # what all parts found

A part has a few cases. Where one fails, its figures are null, with the first line of its error, and
the next one goes on. The file is written anew after each case: a part that is stopped leaves what
it had. Steps are those of the phases' loops at the sizes of configs/3b.py, with random weights and
tokens; --small writes to out/gpu.
"""
from settings import load_config

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import common
import loop
import pretrain
import rl
import rollouts
import sft
from checks import bench
from checks import memory as checks_memory
from common import Dist
from data.chat.conversations import Pool
from data.chat.packing import build_batch, plan_stages
from data.tasks import math
from data.text.mixture import document_lengths
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from generate import sample
from kernels.tiles import Tiles
from kernels.tools import bench as kernel_bench
from kernels.tools import check as kernel_check
from model import ModelConfig, meta_model, training_flops
from rollouts import Rollout
from sampler import Embedded, in_order

SEED = 0
TURN = 3.0    # seconds that steps are timed for; at least one
GROUP = 8     # responses to a prompt
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Scale:
    """How large everything is."""
    config: list[str]      # arguments of read_config, of the parts at 3B …
    rl_config: list[str]   # … and of the RL step
    folder: Path           # of the results
    checked: list[str]     # families of kernels that are checked …
    raced: list[str]       # … and that are raced
    head_dim: int          # for which tiles are tuned
    kernel_bench: dict     # what kernels.tools.bench has here in place of its own
    pass_tokens: int       # of a forward pass of a training step at most: one GPU holds all of the
                           # optimizer
    passes: int            # of a training step at the shortest context
    sampled: list          # (rows, tokens of a prompt) of the sampler's cases …
    new: int               # … and the tokens that each row draws
    rl: dict               # settings of the RL step


FULL = Scale(
    config=["configs/3b.py"],
    rl_config=["configs/small.py"],
    folder=Path("results/gpu"),
    checked=list(kernel_check.CHECKS),
    raced=list(kernel_bench.RACES),
    head_dim=128,
    kernel_bench=dict(ROUNDS=2, TURN=0.1),
    pass_tokens=8192,
    passes=4,
    sampled=[(32, 512), (128, 512), (32, 8192)],
    new=256,
    rl=dict(dtype="bfloat16", batch_groups=16, max_new_tokens=512, context=1024),
)


def time_calls(run: Callable, n: int) -> list[float]:
    """As kernels.tools.bench's, on any device."""
    return [bench.timed(run, DEVICE) for _ in range(n)]


_stages = [dict(name=str(context), tokens=64, lr=[1, 1], context=context) for context in (8, 16)]
_model = ["--model.n_layers=1", "--model.hidden_size=32", "--model.ffn_size=48",
          "--model.n_heads=2", "--model.n_kv_heads=1", "--model.head_dim=16"]
SMALL = Scale(
    config=[
        "configs/tiny.py", *_model, "--model.vocab_size=64",
        f"--pretrain.stages={_stages}", "--pretrain.micro_tokens=8",
        f"--sft.stages={[dict(name='64', lr=[1, 1], context=64)]}", "--sft.micro_tokens=64",
        "--rl.context=64", "--rl.max_new_tokens=48",
    ],
    rl_config=["configs/tiny.py", *_model],
    folder=Path("out/gpu"),
    checked=["rms_norm"],
    raced=["rms_norm"],
    head_dim=16,
    kernel_bench=dict(
        ROUNDS=1, TURN=0.0, TOKENS=32, HEADS=(2, 1, 16), TUNED_AT=(32,),
        QUICK={"rms_norm": [(2, 32)]},
        CANDIDATES={"small": {"attention_decode": [Tiles(16, 16, 1, 1), Tiles(16, 32, 1, 1)]}},
        chip=lambda device: "small",
        survives=kernel_bench.attempt,
        SIDE_BY_SIDE=1,  # in this process, whose interpreter is one
        write_tiles=lambda *choice: None,
        ceilings=partial(kernel_bench.ceilings, 32, 2**10),
        time_calls=time_calls,
    ),
    pass_tokens=8,
    passes=2,
    sampled=[(16, 4)],
    new=4,
    rl=dict(batch_groups=2, max_new_tokens=8),
)


# --------------------------------------------------------------------------------------------------
# Kernels

def check_kernels(scale: Scale) -> dict[str, Callable]:
    """Are they right? The families side by side: nearly all of the time is Triton's compiler's."""
    if scale is SMALL:
        return {family: partial(check_family, family) for family in scale.checked}
    pool = ProcessPoolExecutor(len(scale.checked), get_context("spawn"))
    return {family: pool.submit(check_family, family).result for family in scale.checked}


def check_family(family: str) -> dict:
    worst = kernel_check.worst_findings(family)
    wrong = [case for case, finding in worst.items() if not finding.ok]
    nearest = max(worst.values(), key=kernel_check.Finding.badness)
    line = dict(cases=len(worst), wrong=len(wrong), worst=nearest.error / nearest.bound)
    if wrong:
        line["error"] = f"wrong: {'; '.join(wrong)}"
    return line


def race_kernels(scale: Scale) -> dict[str, Callable]:
    """How fast, beside what PyTorch has, at 4K tokens a row?"""
    top = functools.cache(kernel_bench.ceilings)
    return {"ceilings": top} | {
        family: partial(race_family, family, top) for family in scale.raced}


def race_family(family: str, ceilings: Callable) -> dict:
    """{case and pass: ours, the best of the others, and all of them}."""
    ceiling = ceilings()[kernel_bench.UNITS[family]]
    lines = kernel_bench.race_family(family, True, ceiling)
    figures = {}
    for (case, step), group in itertools.groupby(lines, lambda x: (x["case"], x["step"])):
        figures[f"{case}, {step}"] = compare_contestants(list(group))
    failures = [f"{x['contestant']}: {x['error']}" for x in lines if kernel_bench.is_failure(x)]
    return figures | ({"error": "; ".join(failures)} if failures else {})


def compare_contestants(lines: list[dict]) -> dict:
    """Ours and the best of the others in one case; null where there is none."""
    seconds = {line["contestant"]: line.get("seconds") for line in lines}
    errors = {line["contestant"]: line["error"] for line in lines if "error" in line}
    ran = {name: s for name, s in seconds.items() if s and not name.startswith("ours")}
    best = min(ran, key=ran.get, default=None)
    ours = next(line for line in lines if line["contestant"] == "ours")
    is_race = best is not None and seconds["ours"]
    return dict(
        rate=ours.get("rate"),
        unit=ours["unit"],
        of_ceiling=ours.get("share"),
        best_peer=best,
        times_best=ran[best] / seconds["ours"] if is_race else None,
        peak_gb=ours["memory_gb"],
        seconds=seconds,
        errors=errors)


def tune_tiles(scale: Scale) -> dict[str, Callable]:
    """The fastest tiles of each of attention's kernels: kernels/tuned.json, which runs then use."""
    right = functools.cache(partial(kernel_bench.right_tiles, (scale.head_dim,)))
    names = kernel_bench.CANDIDATES[kernel_bench.chip(DEVICE)]
    return {name: partial(tune, name, scale.head_dim, right) for name in names}


def tune(kernel: str, D: int, right: Callable) -> dict:
    times = kernel_bench.time_tiles(kernel, D, right()[kernel, D])
    best = kernel_bench.fastest(times)
    kernel_bench.write_tiles(kernel, D, best)
    first = next(iter(times))  # what is taken without tuning, unless it is wrong
    gain = statistics.geometric_mean(times[first]) / statistics.geometric_mean(times[best])
    return dict(
        best=str(tuple(best)),
        gain=gain,
        seconds={str(tuple(choice)): of_shapes for choice, of_shapes in times.items()})


# --------------------------------------------------------------------------------------------------
# Optimizer steps

@dataclass
class Step:
    """An optimizer step: what is timed, and what checks.memory computes."""
    model: ModelConfig
    train_step: Callable   # of a phase: (model, batch, cfg, dist) adds up the gradient
    cfg: loop.TrainConfig  # the phase's section of the config
    batch: object
    lengths: np.ndarray    # of the sequences in it, in tokens


def training(scale: Scale) -> dict[str, Callable]:
    """Steps of pretrain.py at its shortest and its longest context."""
    return {name: partial(time_step, step) for name, step in training_steps(scale).items()}


def updates(scale: Scale) -> dict[str, Callable]:
    """Steps of sft.py and rl.py."""
    return {name: partial(time_step, step) for name, step in update_steps(scale).items()}


def training_steps(scale: Scale) -> dict[str, Step]:
    """At the shortest context with the kernels and without, at the longest with them."""
    config = read_config(scale.config)
    contexts = [stage.context for stage in config.pretrain.stages]
    short, long, compile = min(contexts), max(contexts), config.pretrain.compile
    choices = [(short, "triton", False), (short, "torch", False), (short, "triton", compile),
               (long, "triton", compile), (short, "torch", compile)]
    steps = {}
    for context, kernels, compiled in choices:
        cfg = bench.settings_at(config.pretrain, context)
        rows = max(1, min(cfg.micro_tokens, scale.pass_tokens) // context)  # of a pass
        cfg = dataclasses.replace(cfg, compile=compiled, micro_tokens=rows * context)
        n_passes = scale.passes if context == short else 1
        model = dataclasses.replace(config.model, kernels=kernels)
        name = f"{context:,} tokens a row, {kernels}, {mode(compiled)}"
        steps[name] = pretraining_step(model, cfg, rows * n_passes, context)
    return steps


def mode(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def pretraining_step(
        model: ModelConfig, cfg: pretrain.PretrainConfig, rows: int, context: int) -> Step:
    """Rows of documents of 512 tokens on the mean; a row alone is one document."""
    batch = bench.random_batch(rows, context, model.vocab_size, SEED)
    if rows == 1:
        batch.doc_start[:] = 0
    return Step(model, pretrain.train_step, cfg, batch, document_lengths(batch.doc_start))


def update_steps(scale: Scale) -> dict[str, Step]:
    """SFT at its first stage's context, RL with a group in each row; eager, then as configured."""
    config = read_config(scale.config)
    stage = sft.read_stages(config.sft)[0]
    steps = {}
    for compiled in dict.fromkeys([False, config.sft.compile]):
        name = f"SFT, rows of {stage.context:,}, {mode(compiled)}"
        steps[name] = sft_step(config, stage, compiled)
        steps[f"RL, rows of {config.rl.context:,}, {mode(compiled)}"] = rl_update(config, compiled)
    return steps


def sft_step(config: SimpleNamespace, stage: sft.StageConfig, compiled: bool) -> Step:
    """One pass of conversations, the last three quarters of which are trained."""
    context = stage.context
    cfg = dataclasses.replace(
        config.sft, compile=compiled, recompute=stage.recompute, micro_tokens=stage.micro_tokens)
    rng = np.random.default_rng(SEED)
    lengths = np.clip(rng.lognormal(np.log(context / 4), 0.6, 64), 8, context).astype(int)
    tokens = rng.integers(config.model.vocab_size, size=lengths.sum()).astype(np.uint32)
    masks = [np.arange(n) >= n // 4 for n in lengths]
    pools = {"all": Pool(tokens, np.concatenate(masks).astype(np.float16), np.cumsum(lengths))}
    all_once = sft.StageConfig("all", [1, 1], context, epochs={"all": 1})
    (plan,) = plan_stages([all_once], pools, max(context, cfg.micro_tokens), SEED)
    batch = build_batch(plan, pools, plan.first_step)
    return Step(config.model, sft.train_step, cfg, batch, document_lengths(batch.doc_start))


def rl_update(config: SimpleNamespace, compiled: bool) -> Step:
    """Two groups, each of which fills a row, and so a pass."""
    cfg = dataclasses.replace(config.rl, compile=compiled, group_size=GROUP, micro_rows=GROUP)
    rng = np.random.default_rng(SEED)
    n_prompt = cfg.context // 64
    room = min(cfg.max_new_tokens, cfg.context - GROUP * n_prompt)
    groups = []
    for _ in range(2):
        prompt = rng.integers(config.model.vocab_size, size=n_prompt).tolist()
        groups.append([])
        for i, share in enumerate(rng.dirichlet([3.0] * GROUP)):
            response = rng.integers(config.model.vocab_size, size=1 + int(share * (room - GROUP)))
            logprobs = [0.0] * len(response)
            rollout = Rollout(None, prompt, response.tolist(), logprobs, "stop", "", float(i % 2))
            groups[-1].append(rollout)
    rl.assign_advantages(groups, cfg.divide_by_std)
    batch = rl.RolloutBatch(rollouts.flatten(groups))
    lengths = rollouts.trained_lengths(batch.rollouts, cfg)
    return Step(config.model, rl.train_step, cfg, batch, np.array(lengths))


def time_step(step: Step) -> dict:
    """The median seconds of an optimizer step, after one that compiles and makes AdamW's state."""
    cfg = step.cfg
    dist = common.init_distributed(cfg.dtype)
    model, optimizer = bench.build(SimpleNamespace(model=step.model, pretrain=cfg), dist)
    take = partial(take_step, step, model, optimizer, dist)
    first_s = bench.timed(take, DEVICE)
    reset_peak()
    times = []
    while not times or sum(times) < TURN:
        times.append(bench.timed(take, DEVICE))
    seconds, n_tokens = statistics.median(times), int(step.lengths.sum())
    flops = training_flops(step.model, n_tokens, (step.lengths**2).sum() / 2)
    peak = common.peak_flops(DEVICE, cfg.dtype)
    return dict(
        seconds=seconds,
        tokens=n_tokens,
        tokens_per_s=n_tokens / seconds,
        mfu=flops / seconds / peak if peak else None,
        peak_gb=common.memory_gb(DEVICE),
        first_s=first_s)


def take_step(step: Step, model, optimizer, dist: Dist) -> None:
    step.train_step(model, step.batch, step.cfg, dist)
    common.clip_grad_norm(model, step.cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def compare_peaks(scale: Scale) -> dict[str, Callable]:
    """The peaks of the parts before, beside what is computed for the same steps. Needs no GPU."""
    fewer = dataclasses.replace(scale, passes=2)  # more take no more memory
    pairs = {}
    for part, steps in (("training", training_steps(fewer)), ("updates", update_steps(fewer))):
        path = scale.folder / f"{part}.json"
        figures = json.loads(path.read_text())["figures"] if path.is_file() else {}
        for name, step in steps.items():
            if step.model.kernels != "torch":
                what, _, how = name.rpartition(", ")
                measured = (figures.get(name) or {}).get("peak_gb")
                pairs.setdefault(what, (step, {}))[1][how] = measured
    return {what: partial(compare_peak, *pair) for what, pair in pairs.items()}


def compare_peak(step: Step, measured: dict[str, float | None]) -> dict:
    """measured: GB, {"eager" or "compiled": of the step}; checks.memory knows the eager one."""
    def train_step(model, frozen, dist):
        step.train_step(model, step.batch, step.cfg, dist)

    case = checks_memory.Case("", step.cfg, train_step)
    with checks_memory.fake_group(1) as dist:
        parts = checks_memory.measure(case, step.model, dist)
    del parts["runtime"]  # is no tensor's
    computed = sum(parts.values())
    figures = {"computed_gb": computed}
    for how, gb in measured.items():
        figures |= {f"{how}_gb": gb, f"{how}_ratio": gb and gb / computed}
    return figures


# --------------------------------------------------------------------------------------------------
# Samples, and a step of RL

def sampler(scale: Scale) -> dict[str, Callable]:
    """Tokens per second of generate.sample, for groups of responses to one prompt."""
    model = functools.cache(partial(plain_model, scale))
    cases = {}
    for rows, n_prompt in scale.sampled:
        name = f"{rows} rows behind {n_prompt:,} tokens"
        cases[name] = partial(time_samples, model, rows, n_prompt, scale.new)
    return cases


def plain_model(scale: Scale):
    """As the phases' replicas: unsharded, in the type of compute."""
    config = read_config(scale.config)
    model = meta_model(config.model).to(getattr(torch, config.rl.dtype)).to_empty(device=DEVICE)
    bench.draw_weights(model, SEED)
    return model.requires_grad_(False)


def time_samples(model: Callable, rows: int, n_prompt: int, new: int) -> dict:
    """No token ends a response, so that all rows stay to the end. model(): the model."""
    vocab_size = model().cfg.vocab_size
    prompts = np.random.default_rng(SEED).integers(vocab_size, size=(rows // GROUP, n_prompt))
    draw = partial(sample, model(), prompts.tolist(), GROUP, seed=SEED, max_rows=rows)
    draw(max_new_tokens=min(new, 17))  # compiles
    prefill_s = bench.timed(partial(draw, max_new_tokens=1), DEVICE)
    reset_peak()
    seconds = bench.timed(partial(draw, max_new_tokens=new), DEVICE)
    return dict(
        seconds=seconds,
        tokens_per_s=rows * new / seconds,
        prefill_s=prefill_s,
        token_ms=1e3 * (seconds - prefill_s) / (new - 1),
        peak_gb=common.memory_gb(DEVICE))


def rl_step(scale: Scale) -> dict[str, Callable]:
    """A step of rl.py: rollouts, rewards by the rules, one update."""
    return {"one step": partial(time_rl_step, scale)}


def time_rl_step(scale: Scale) -> dict:
    config = read_config(scale.rl_config)
    cfg = rl.RlConfig(stages=[], group_size=GROUP, **scale.rl)
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path().glob("*.py"))]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=512))
    dist = common.init_distributed(cfg.dtype)
    run = loop.Run("rl", config, cfg, dist, tokenizer, tokenizer_file=Path())
    loop.make_model(run)
    bench.draw_weights(run.model, SEED)
    problems = math.problems("train", cfg.batch_groups, SEED)
    take_rl_step(run, problems)  # compiles
    reset_peak()
    figures = take_rl_step(run, problems)
    n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return figures | dict(peak_gb=common.memory_gb(DEVICE), parameters=n_parameters)


def take_rl_step(run: loop.Run, problems: list) -> dict:
    """Seconds of its parts. A random model answers nothing right and ends nothing: so that there is
    an update, every second response then counts as right, and all as ended."""
    cfg, clock = run.cfg, loop.Clock()
    groups = in_order(rollouts.sample_rollouts(
        Embedded(run.unsharded_model()), run.tokenizer, problems, cfg.group_size, cfg, SEED))
    clock.lap("rollout_s")
    stage = SimpleNamespace(reward="verified")
    rollouts.assign_rewards(groups, stage, rollouts.Judges(), cfg, SEED)
    clock.lap("scoring_s")
    responses = rollouts.flatten(groups)
    for i, rollout in enumerate(responses):
        rollout.reward, rollout.finish_reason = float(i % 2), "stop"
    rl.assign_advantages(groups, cfg.divide_by_std)
    batch = rl.RolloutBatch(responses)
    lengths = np.array(rollouts.trained_lengths(responses, cfg))
    step = Step(run.config.model, rl.train_step, cfg, batch, lengths)
    clock.start_lap()
    bench.timed(partial(take_step, step, run.model, run.optimizer, run.dist), DEVICE)
    clock.lap("update_s")
    return clock.laps | dict(
        seconds=sum(clock.laps.values()), responses=len(responses), tokens=batch.n_tokens)


# --------------------------------------------------------------------------------------------------
# Running a part, and what all of them found

PARTS = {
    "kernels": check_kernels,
    "peers": race_kernels,
    "tiles": tune_tiles,
    "training": training,
    "updates": updates,
    "sampler": sampler,
    "rl_step": rl_step,
    "memory": compare_peaks,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("--small", action="store_true", help="a tiny shape, on any device")
    args = parser.parse_args()
    scale = SMALL if args.small else FULL
    if args.part == "table":
        print_table(scale.folder)
        return 0
    measured = args.part == "memory" and (scale.folder / "training.json").is_file()
    if DEVICE.type == "cpu" and not args.small and not measured:
        print(f"{args.part}: skipped, there is no GPU here")
        return 0
    with mock.patch.multiple(kernel_bench, **scale.kernel_bench):
        return run_part(args.part, scale)


def run_part(part: str, scale: Scale) -> int:
    """Runs the cases, writes their figures, and prints them; 1 where something went wrong."""
    started = time.perf_counter()
    cases = PARTS[part](scale)
    line = describe(part, scale) | dict(
        seconds=0.0,
        error="it was stopped before its end",
        errors={},
        figures=dict.fromkeys(cases))
    write(line, scale.folder)
    for name, case in cases.items():
        try:
            figures = case()
            if "error" in figures:
                line["errors"][name] = figures.pop("error")
            line["figures"][name] = figures
        except Exception as error:
            line["errors"][name] = first_line(error)
        free_memory()
        line["seconds"] = time.perf_counter() - started
        write(line, scale.folder)
        print_case(name, line)
    line["error"] = next(iter(line["errors"].values()), None)
    write(line, scale.folder)
    return int(line["error"] is not None)


def describe(part: str, scale: Scale) -> dict:
    """How the figures of a part are made."""
    settings = dataclasses.asdict(dataclasses.replace(scale, kernel_bench={}))
    configs = [vars(read_config(argv)) for argv in (scale.config, scale.rl_config)]
    origin = bench.describe_origin("checks.gpu", SEED, DEVICE)
    return dict(part=part) | origin | dict(config=common.hash_json([settings, configs]))


def read_config(argv: list[str]) -> SimpleNamespace:
    """The sections that the parts need, as far as a config has them."""
    sections = dict(
        model=ModelConfig, tokenizer=TokenizerConfig, pretrain=pretrain.PretrainConfig)
    if argv == FULL.config or argv == SMALL.config:
        sections |= dict(sft=sft.SftConfig, rl=rl.RlConfig)
    config = load_config(__doc__, argv, **sections)
    config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    return config


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def free_memory() -> None:
    """Of a case that is over; what is compiled would hold on to its model."""
    torch.compiler.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text:.200}"


def write(line: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{line['part']}.json"
    common.write_atomic(path, json.dumps(line, indent=1) + "\n")


def print_table(folder: Path) -> None:
    """The figures of each part, in the order in which they are made."""
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.is_file():
            print(f"\n{part}: not run")
            continue
        line = json.loads(path.read_text())
        note = f"; {line['error']}" if line["error"] else ""
        print(f"\n{part}: {line['seconds']:.0f} s, {line['machine']}, {line['commit']}{note}")
        for name in line["figures"]:
            print_case(name, line)


def print_case(name: str, line: dict) -> None:
    """A row of numbers for a case; a row for each where its figures are several such."""
    figures, error = line["figures"][name], line["errors"].get(name)
    if error:
        print(f"  {name}: {error}", flush=True)
    if figures is None:
        return
    rows = {name: figures}
    if figures and all(isinstance(value, dict) for value in figures.values()):
        rows = {f"{name}, {key}": row for key, row in figures.items()}
    for title, row in rows.items():
        cells = []
        for key, value in row.items():
            if isinstance(value, float):
                value = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            if isinstance(value, (str, int)):
                cells.append(f"{key} {value}")
        print(f"  {title:48} {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
