"""Phase 4b, reinforcement learning in three stages: STEM, coding, human preference.

    python rl.py configs/tiny.py                     # after distill.py and reward.py

The report (arXiv 2512.06266, RL): on-policy GRPO, one stage after the other, truncated responses
masked out of the loss; before each stage the problems are filtered with the checkpoint of the stage
before: 16 samples each, kept where 0.10 < mean reward < 0.90. Rewards are verified
(data/verify/answers.py, tests in a sandbox), in the last stage a pairwise reward model's
(reward.py). Group size, clip, rate and lengths are not published: our choice is DAPO's loss (arXiv
2503.14476: clip 0.2 / 0.28, mean over all tokens of the step), one update a batch, no KL term.

Shapes: G responses of a group, R responses of one forward pass, N response tokens in it.
"""
from settings import (
    Bounds,
    Count,
    CountOr0,
    Curve,
    Fraction,
    Length,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StartAndEnd,
    load_config,
)

import dataclasses
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tqdm import tqdm

import common
import hf
import loop
from common import Dist, UserError
from data.chat.packing import pack, share_prefixes
from data.tasks.problem import Problem
from data.text.tokenizer import TokenizerConfig
from data.verify import sandbox
from evaluate import EvaluateConfig
from kernels.cross_entropy import linear_logprobs, linear_logprobs_entropy
from model import ModelConfig
from reward import load_reward_model
from rollouts import (
    COMPARED,
    Asked,
    Judges,
    Rollout,
    ask_rollouts,
    detect_hacking,
    discard_kept,
    filter_problems,
    flatten,
    receive_rollouts,
    reward_rollouts,
    select_trained,
    split_groups,
    summarize_rollouts,
    trained_lengths,
    unused_settings,
    verifier_metrics,
    write_rollouts,
)
from sampler import open_sampler
from schedule import Stage, check_schedule, learning_rate, stage_at

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass
class StageConfig:
    name: str
    problems: Annotated[dict[str, Count], Length(1)]  # {task of data/tasks: training problems of
                                                      # it, before the filter}
    steps: PositiveInt
    reward: Literal["verified", "pairwise"] = "verified"  # pairwise: responses to COMPARED tasks
                                                          # are compared, wrong ones earn nothing
    temperature: PositiveFloat | None = None  # default: rl.temperature
    kl: NonNegativeFloat | None = None  # default: rl.kl
    lr: StartAndEnd = field(default_factory=lambda: [1, 1])  # at the start and at the end, as
                                                             # shares of rl.lr
    curve: Curve = "linear"


@dataclass(kw_only=True)
class RlConfig(loop.TrainConfig):
    stages: Annotated[list[StageConfig], Length(1)]  # STEM, coding, preference
    reward_model: str = ""       # of pairwise stages: a phase, a checkpoint or a folder
    verifier: dict = field(default_factory=dict)  # who decides on answers that rules leave open,
                                 # VerifierConfig of data/verify/agentic.py ({}: they are wrong)
    group_size: Annotated[int, Bounds(2, 10_000)] = 8  # responses to each problem
    batch_groups: Count = 16     # problems of a step
    micro_rows: NonNegativeInt = 0  # responses of one forward pass on one device; 0: all of the
                                    # device's
    updates: Count = 1           # optimizer steps a batch; beyond 1 the policy leaves the one that
                                 # was sampled from
    loss: Literal["dapo", "grpo", "dr_grpo", "gspo"] = "dapo"  # arXiv 2503.14476, 2402.03300,
                                                               # 2503.20783, 2507.18071
    clip_low: Fraction = 0.2     # the ratio's clip below 1 …
    clip_high: NonNegativeFloat = 0.28  # … and above it (DAPO's clip-higher)
    tis: NonNegativeFloat = 0.0  # most that a token of another policy than the trainer's counts
                                 # (sampling_weights; others take 2); 0: all count 1
    divide_by_std: bool = True   # advantages by the group's standard deviation (never with
                                 # "dr_grpo", "pairwise")
    kl: NonNegativeFloat = 0.0   # weight of the divergence from the start of the stage (k2: its
                                 # gradient is the KL's)
    temperature: PositiveFloat = 1.0  # of the rollouts, and of the log-probabilities in the loss:
                                      # top-p is off
    max_new_tokens: Count = 96   # longer responses are cut off, and masked out of the loss
    cut_earns: bool = True       # such a response's reward counts in its group's mean; False: as 0
    max_rows: Count = 256        # responses that are decoded together
    context: Count = 256         # tokens of a packed row
    filter_samples: CountOr0 = 16  # of each problem before a stage; 0: no filter
    keep_between: Annotated[list[float], Length(2, 2)] = field(
        default_factory=lambda: [0.1, 0.9])  # mean rewards that the filter keeps, strictly: [-1, 2]
                                             # keeps all
    opponents: NonNegativeInt = 3  # of each response in a pairwise group; 0: all
    servers: list[str] = field(default_factory=list)  # URLs of vLLM servers that sample in place of
                                                      # this process (docs/SCALING.md)
    served_weights: str = ""     # folder of each step's weights, which they read (default: in
                                 # out/<run>/rl)
    ahead: Annotated[int, Bounds(0, 1)] = 0  # 1: servers sample the next step while this one
                                             # trains, by weights one update older; needs tis


def check_settings(cfg: RlConfig, world: int) -> None:
    """Raises UserError for what bounds cannot say."""
    if cfg.ahead and not (cfg.servers and cfg.tis):
        raise UserError(
            "rl.ahead=1 needs rl.servers, which sample while this process trains, and rl.tis, "
            "since their weights are one update older"
        )
    low, high = cfg.keep_between
    if low >= high:
        raise UserError(f"rl.keep_between must be [low, high], not {cfg.keep_between}")
    if len({stage.name for stage in cfg.stages}) < len(cfg.stages):
        raise UserError("rl.stages must each have a name of its own")
    for stage in cfg.stages:
        check_schedule(stage.name, stage)
        check_reward(cfg, stage)
    if cfg.batch_groups % world:
        raise UserError(
            f"rl.batch_groups={cfg.batch_groups} is no multiple of the {world} processes"
        )


def check_reward(cfg: RlConfig, stage: StageConfig) -> None:
    """Raises UserError where a stage's problems cannot be rewarded as it says."""
    if stage.reward == "verified":
        return
    if not cfg.reward_model:
        raise UserError(f"stage {stage.name!r} needs rl.reward_model, a checkpoint of reward.py")
    if not any(task.partition("=")[0] in COMPARED for task in stage.problems):
        raise UserError(
            f"stage {stage.name!r}: replies to {', '.join(sorted(COMPARED))} can be compared, not "
            f"to {', '.join(stage.problems)}"
        )


# --------------------------------------------------------------------------------------------------
# Advantages


LEAST_SPREAD = 1e-6  # of a group's rewards; what is below is rounding, as 0.3 and 0.1 + 0.2


def assign_advantages(groups: list[list[Rollout]], divide_by_std: bool) -> int:
    """Fills in advantage = (reward - group mean) / standard deviation (population; our choice).

    Returns how many groups have a signal: a response that is trained and was better or worse than
    the mean. Unscored responses are left out; truncated ones count in the mean but are masked, in
    the loss's numerator and denominator.
    """
    n_with_signal = 0
    for group in groups:
        rewards = np.array([rollout.reward for rollout in group if rollout.reward is not None])
        spread = float(rewards.std()) if len(rewards) else 0.0
        has_signal = spread > LEAST_SPREAD
        for rollout in group:
            is_scored = rollout.reward is not None
            rollout.loss_mask = float(is_scored and rollout.finish_reason == "stop")
            rollout.advantage = 0.0
            if is_scored and has_signal:
                difference = float(rollout.reward - rewards.mean())
                rollout.advantage = difference / (spread if divide_by_std else 1.0)
        n_with_signal += any(rollout.loss_mask and rollout.advantage for rollout in group)
    return n_with_signal


# --------------------------------------------------------------------------------------------------
# The loss


def surrogate(
    logprobs: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, cfg: RlConfig
) -> tuple:
    """PPO's clipped loss (arXiv 1707.06347, eq. 7), and whether the clip decides.

    -min(ratio * A, clip(ratio) * A) with ratio = exp(log p - old log p); of tokens (N,), or of
    whole sequences (R,) for GSPO.
    """
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    gain, clipped_gain = ratio * advantage, clipped * advantage
    return -torch.minimum(gain, clipped_gain), clipped_gain < gain


def sampling_weights(old: torch.Tensor, sampled: torch.Tensor, most: float) -> torch.Tensor:
    """min(exp(old - sampled), most): what a token counts that the sampler drew, without a gradient.

    Truncated importance sampling (Ionides, J. Comput. Graph. Stat. 17, 2008), for the difference
    between what samples and what trains (Yao et al., "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training", 2025; they cut at 2, as TRL and verl do): other kernels, other
    rounding, or weights one step old. old, sampled: log-probabilities of tokens or, as GSPO's
    ratio, means of a sequence.
    """
    return (old - sampled).exp().clamp(max=most).detach()


def sampler_distances(
    old: torch.Tensor, sampled: torch.Tensor, token_mask: torch.Tensor
) -> list[torch.Tensor]:
    """Sums over tokens: of |old - sampled|, and of what k3 (Schulman, "Approximating KL
    divergence", 2020) says of KL(sampler || old); all (N,)."""
    apart = old - sampled
    return [(apart.abs() * token_mask).sum(), ((apart.expm1() - apart) * token_mask).sum()]


def policy_loss(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    rows: dict,
    advantage: torch.Tensor,
    loss_mask: torch.Tensor,
    reference: torch.Tensor | None,
    n_tokens: float,
    n_rows: float,
    cfg: RlConfig,
    sampled: torch.Tensor | None = None,
) -> tuple:
    """(loss, share of tokens or, for GSPO, sequences that are clipped): this pass's part; scalars.

    logprobs, old, reference (N,): of the present, the sampling and the stage's first policy.
    sampled (N,): as the sampler computed old; needed for cfg.tis alone.
    advantage, loss_mask (R,): of each response.
    n_tokens, n_rows: those in the loss, in the whole step on all ranks.

    dapo     sum over tokens / n_tokens                                 (arXiv 2503.14476, eq. 12)
    grpo     mean over responses of the mean over their tokens          (arXiv 2402.03300, eq. 3)
    dr_grpo  sum over tokens / (n_rows * max_new_tokens)                (arXiv 2503.20783)
    gspo     mean over responses; ratio = exp(mean of their log ratios) (arXiv 2507.18071, eq. 5)
    """
    n, sequence = len(advantage), rows["sequence"]
    lengths = loop.sum_per_sequence(torch.ones_like(logprobs), rows, n)  # (R,)
    if cfg.loss == "gspo":
        new_mean = loop.sum_per_sequence(logprobs, rows, n) / lengths
        old_mean = loop.sum_per_sequence(old, rows, n) / lengths
        losses, clipped = surrogate(new_mean, old_mean, advantage, cfg)  # (R,)
        shares = loss_mask / n_rows
        if cfg.tis:
            sampled_mean = loop.sum_per_sequence(sampled, rows, n) / lengths
            losses = losses * sampling_weights(old_mean, sampled_mean, cfg.tis)
    else:
        losses, clipped = surrogate(logprobs, old, advantage[sequence], cfg)  # (N,)
        if cfg.tis:
            losses = losses * sampling_weights(old, sampled, cfg.tis)
        shares = {
            "dapo": loss_mask / n_tokens,
            "grpo": loss_mask / (n_rows * lengths),
            "dr_grpo": loss_mask / (n_rows * cfg.max_new_tokens),
        }[cfg.loss][sequence]
    loss = (losses * shares).sum()
    if reference is not None:  # k2, (log p - log ref)^2 / 2: as a loss its gradient is the reverse
                               # KL's, k3's is not
        k2 = (logprobs - reference).square() / 2
        loss = loss + cfg.kl * (k2 * loss_mask[sequence]).sum() / n_tokens
    return loss, (clipped * (shares > 0)).sum() / (n_rows if cfg.loss == "gspo" else n_tokens)


def pack_rollouts(rollouts: list[Rollout], cfg: RlConfig, dist: Dist) -> dict:
    """Packed rows on the device; equal beginnings of responses run through the model once."""
    sequences = [(rollout.prompt, rollout.tokens) for rollout in rollouts]
    return share_prefixes(pack(sequences, cfg.context)).to(dist.device)


@dataclass
class RolloutBatch:
    """What an update is made of, on this rank."""
    rollouts: list[Rollout]
    old: list[torch.Tensor] | None = None        # log-probabilities (N,) of each forward pass, of
                                                 # the policy that sampled; None: it is the present
                                                 # one, and the ratio is 1
    reference: list[torch.Tensor] | None = None  # of the stage's first policy; None: no KL term

    @property
    def n_tokens(self) -> int:
        return sum(len(rollout.tokens) for rollout in self.rollouts)


def make_batch(model, state: "StageState", groups: list[list[Rollout]], dist: Dist) -> RolloutBatch:
    """The groups, with the log-probabilities of the two older policies that the loss asks for."""
    cfg = state.cfg
    batch = RolloutBatch(flatten(groups))
    if cfg.updates > 1:
        batch.old = score_rollouts(model, batch.rollouts, cfg, dist)
    if cfg.kl:
        batch.reference = score_rollouts(state.first_policy, batch.rollouts, cfg, dist)
    return batch


@torch.no_grad()
def score_rollouts(model, rollouts: list[Rollout], cfg: RlConfig, dist: Dist) -> list[torch.Tensor]:
    """The log-probabilities (N,) of each forward pass's response tokens under a model."""
    trained = select_trained(rollouts, cfg, dist)
    logprobs = []
    for part in loop.micro_batches(model, len(trained), cfg.micro_rows or len(trained)):
        rows = pack_rollouts(trained[part], cfg, dist)
        hidden = loop.response_hidden_states(model, rows)
        head, targets = model.lm_head.weight, rows["targets"]
        logprobs.append(
            linear_logprobs(hidden, head, targets, cfg.temperature, model.cfg.kernels))
    return logprobs


def train_step(
    model, batch: RolloutBatch, cfg: RlConfig, dist: Dist
) -> tuple[float, dict[str, float]]:
    """Adds up the gradient of the step's loss; returns the loss and what the log shows of it.

    logprob_mismatch: the largest difference between the sampler's log-probabilities and these;
    sampler_off and sampler_kl: of the sampling policy's, the mean absolute difference and the k3
    estimate of KL(sampler || policy), over the tokens that are trained.
    """
    n_tokens = sum(rollout.loss_mask * len(rollout.tokens) for rollout in batch.rollouts)
    n_rows = sum(rollout.loss_mask for rollout in batch.rollouts)
    n_tokens, n_rows = dist.sum(n_tokens, n_rows)
    n_tokens, n_rows = max(n_tokens, 1.0), max(n_rows, 1.0)
    totals = torch.zeros(6, dtype=torch.float64, device=dist.device)
    mismatch = 0.0
    trained = select_trained(batch.rollouts, cfg, dist)
    passes = loop.micro_batches(model, len(trained), cfg.micro_rows or len(trained))
    for i, part in enumerate(passes):
        rollouts = trained[part]
        rows = pack_rollouts(rollouts, cfg, dist)
        hidden = loop.response_hidden_states(model, rows)  # (N, C)
        head, targets = model.lm_head.weight, rows["targets"]
        logprobs, entropy = linear_logprobs_entropy(
            hidden, head, targets, cfg.temperature, model.cfg.kernels)  # (N,) each
        current = logprobs.detach()
        advantage = torch.tensor([rollout.advantage for rollout in rollouts]).to(current)  # (R,)
        loss_mask = torch.tensor([rollout.loss_mask for rollout in rollouts]).to(current)  # (R,)
        old = current if batch.old is None else batch.old[i]
        reference = None if batch.reference is None else batch.reference[i]
        sampled = torch.tensor(flatten(rollout.logprobs for rollout in rollouts)).to(current)
        loss, clipped = policy_loss(
            logprobs, old, rows, advantage, loss_mask, reference, n_tokens, n_rows, cfg, sampled)
        (loss * dist.world).backward()
        mismatch = max(mismatch, (current - sampled).abs().max().item())
        token_mask = loss_mask[rows["sequence"]]
        masked_entropy = (entropy.detach() * token_mask).sum()
        sums = [loss.detach(), clipped, masked_entropy, token_mask.sum()]
        totals += torch.stack(sums + sampler_distances(old, sampled, token_mask)).double()
    loss, clipped, entropy, n, apart, k3 = dist.sum(*totals.tolist())
    mismatches = dist.gather({dist.rank: mismatch})
    metrics = {
        "clipped": clipped,
        "entropy": entropy / max(n, 1.0),
        "logprob_mismatch": max(mismatches.values()),
        "sampler_off": apart / max(n, 1.0),
        "sampler_kl": k3 / max(n, 1.0),
    }
    return loss, metrics


# --------------------------------------------------------------------------------------------------
# The run


@dataclass
class StageState:
    """What a stage has of its own while it runs."""
    stage: Stage
    cfg: RlConfig             # with the stage's temperature and kl
    problems: list[Problem]   # after the filter
    first_policy: torch.nn.Module | None  # that the stage began with, for the KL term
    judges: Judges
    references: dict[str, str]  # question -> the policy's greedy reply, of compared problems
    asked_ahead: Asked | None = None  # samples of the next step


def begin_stage(
    run: loop.Run, sampler, stage: Stage, step: int, judges: Judges
) -> StageState:
    """Loads the reward model where the stage asks it, filters the stage's problems with the present
    policy, and gives it a fresh optimizer."""
    cfg = run.cfg
    for name in ("temperature", "kl"):      # a stage's own, where it has one
        value = getattr(stage.settings, name)
        if value is not None:
            cfg = dataclasses.replace(cfg, **{name: value})
    judges.reward_model = None  # it takes memory only where it is asked
    if stage.settings.reward == "pairwise":
        dtype = getattr(torch, cfg.dtype)
        judges.reward_model = load_reward_model(
            judges.reward_folder, run.dist.device, dtype, cfg.context)
    problems, references = filter_problems(
        run, sampler, cfg, stage.settings, judges, is_resumed=step > stage.first_step)
    asked = verifier_metrics(judges, run.dist)  # so that the first step's counts are its own
    if asked and run.dist.is_main:
        print(f"  verifier: {asked['verifier_cases']:.0f} answers, "
              f"{asked['verifier_undecided']:.0f} undecided, {asked['verifier_s']:.0f} s")
    if step == stage.first_step:  # with the old moments mathematics was forgotten while code was
                                  # trained
        run.optimizer.state.clear()
    first_policy = None
    if cfg.kl:  # where the stage began, not where a resumed run goes on
        folder = loop.checkpoint_of_step(run, stage.first_step)
        first_policy = hf.load_frozen(run.dist, folder, cfg.dtype)
    return StageState(stage, cfg, problems, first_policy, judges, references)


def collect_rollouts(
    run: loop.Run, sampler, state: StageState, step: int, clock: loop.Clock
) -> tuple[list[list[Rollout]], dict[str, list[float]]]:
    """This rank's groups of a step, by the policy as it is now, with rewards and more verdicts.

    With cfg.ahead they are by the policy before the last update, but for a stage's first, and those
    of the next step are asked for. A signal ends it at once: what was sampled by then is kept.
    """
    dist, groups, verdicts = run.dist, [], {}
    clock.start_lap()
    asked = state.asked_ahead or ask_rollouts(sampler, run, state, step)
    state.asked_ahead = None
    with suppress(common.Interrupted), dist.leaving_at_once():
        groups = receive_rollouts(asked)
    dist.wait()
    goes_on = step + 1 < state.stage.end_step and not dist.stop_signal.on_any_rank()
    if state.cfg.ahead and goes_on:
        state.asked_ahead = ask_rollouts(sampler, run, state, step + 1)
    clock.lap("rollout_s")
    with suppress(common.Interrupted), dist.leaving_at_once():
        verdicts = reward_rollouts(state, step, groups)
        clock.lap("scoring_s")
    dist.wait()
    return groups, verdicts


def record_rollouts(
    run: loop.Run, state: StageState, step: int, groups: list[list[Rollout]],
    verdicts: dict[str, list[float]],
) -> dict[str, float]:
    """Fills in the advantages, writes the rollouts, and returns metrics of them."""
    cfg, dist = state.cfg, run.dist
    by_rule, compared = split_groups(groups, state.stage.settings)
    divide_by_std = cfg.divide_by_std and cfg.loss != "dr_grpo"
    n_with_signal = assign_advantages(by_rule, divide_by_std) + assign_advantages(compared, False)
    (n_with_signal,) = dist.sum(n_with_signal)
    write_rollouts(run, step, groups)
    metrics = summarize_rollouts(groups, verdicts, dist) | verifier_metrics(state.judges, dist)
    return metrics | {"groups_with_signal": n_with_signal}


def make_plan(stages: list[StageConfig], scale: float) -> list[Stage]:
    """The stages in steps, after --scale."""
    plan, first_step = [], 0
    for settings in stages:
        n_steps = max(1, round(scale * settings.steps))
        plan.append(
            Stage(name=settings.name, first_step=first_step, n_steps=n_steps, settings=settings)
        )
        first_step += n_steps
    return plan


def resume_key(plan: list[Stage], cfg: RlConfig, source: Path, step: int) -> list:
    """The run's past at a step, as JSON: a run goes on from checkpoints of the same past."""
    past = []
    for stage in plan:
        if stage.first_step < step:
            past.append(
                [stage.name, stage.settings.problems, stage.settings.reward, stage.first_step]
            )
    return [cfg.seed, str(source), cfg.group_size, cfg.batch_groups, *past]


def open_judges(run: loop.Run) -> Judges:
    """The verifier and the reward model's folder, where a stage needs them."""
    cfg = run.cfg
    judges = Judges()
    if any(stage.reward == "pairwise" for stage in cfg.stages):
        judges.reward_folder = run.find_checkpoint(cfg.reward_model)
    tasks = [task for stage in cfg.stages for task in stage.problems]
    loop.check_tasks(run, *tasks)
    judges.verifier = run.open_verifier(cfg.verifier, tasks)
    return judges


def report_step(run: loop.Run, step: int, metrics: dict) -> None:
    """Prints the line below the log's own one."""
    if run.dist.is_main and step % run.cfg.log_every == 0:
        decided = f"  by verifier {metrics['by_verifier']:.0%}" if metrics["by_verifier"] else ""
        tqdm.write(
            f"  reward {metrics['reward']:.3f}  entropy {metrics.get('entropy', math.nan):.3f}  "
            f"length {metrics['length']:.1f}  "
            f"groups with signal {metrics['groups_with_signal']:.0f}{decided}"
        )


def warn_of_hacking(run: loop.Run, stage: Stage) -> None:
    """Prints a warning where the evaluations so far look like reward hacking."""
    if not run.dist.is_main:
        return
    evaluations = loop.read_evaluations(run.folder)
    warning = detect_hacking(evaluations, stage.name, list(stage.settings.problems))
    if warning:
        print(f"warning: {warning}; look at {run.folder / 'rollouts'}", flush=True)


def main():
    config = load_config(
        __doc__, flags=sandbox.FLAG, model=ModelConfig, tokenizer=TokenizerConfig, rl=RlConfig,
        evaluate=EvaluateConfig)
    if config.weak_jail:
        sandbox.allow_weak_jail()
    cfg = config.rl
    dist = common.init_distributed(cfg.dtype, cfg.shard_size, cfg.timeout_minutes)
    check_settings(cfg, dist.world)
    run = loop.start("rl", config, dist, "distill", unused_settings(cfg))
    plan = make_plan(cfg.stages, config.scale)
    n_steps = plan[-1].end_step
    judges = open_judges(run)
    loop.load_or_resume(run, lambda step: resume_key(plan, cfg, run.source, step))
    model, optimizer = run.model, run.optimizer
    sampler = open_sampler(cfg.servers, run, cfg.served_weights)
    if run.first_step == 0 and config.evaluate.tasks:
        loop.evaluate_starting_point(run, ("chat",))

    log = loop.Log(run, n_steps)
    stop_signal = common.StopSignal(dist)
    state = None
    for step in range(run.first_step, n_steps + 1):
        if log.owes_evaluation(plan):
            stage = stage_at(plan, step - 1)
            log.evaluation(stage, loop.evaluate_and_sample(run, stage, step == n_steps))
            warn_of_hacking(run, stage)
        if step == n_steps:
            break
        clock = loop.Clock()
        stage = stage_at(plan, step)
        if state is None or stage is not state.stage:
            state = begin_stage(run, sampler, stage, step, judges)
        lr = learning_rate(cfg.lr, stage, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        groups, verdicts = collect_rollouts(run, sampler, state, step, clock)
        if stop_signal.on_any_rank():
            run.save_unless_saved(plan)
            stop_signal.leave(step)
        metrics = record_rollouts(run, state, step, groups, verdicts)
        batch = make_batch(model, state, groups, dist)
        loss = grad_norm = 0.0
        n_updates = cfg.updates if metrics["groups_with_signal"] else 0  # no signal, no update
        for _ in range(n_updates):
            loss, update_metrics = train_step(model, batch, state.cfg, dist)
            grad_norm = common.clip_grad_norm(model, cfg.grad_clip)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                optimizer.step()
            else:  # what is not finite never enters the weights; ten in a row are an error
                log.skip_step(step, loss, grad_norm, data=f"step {step} of stage {stage.name}")
            optimizer.zero_grad(set_to_none=True)
            first_mismatch = metrics.get("logprob_mismatch", update_metrics["logprob_mismatch"])
            metrics |= update_metrics | {"logprob_mismatch": first_mismatch}  # of what sampled
        clock.lap("update_s")
        discard_kept(run)
        n_tokens = int(dist.sum(batch.n_tokens)[0])
        metrics["length"] = n_tokens / (cfg.batch_groups * cfg.group_size)
        lengths = n_updates * trained_lengths(batch.rollouts, state.cfg)
        metrics |= clock.laps
        log.step(step, stage, loss, lr, grad_norm, n_tokens, lengths, clock.total(), **metrics)
        report_step(run, step + 1, metrics)

        if run.save_is_due(step + 1, stage):
            run.save(step + 1, stage, must_succeed=step + 1 == n_steps)
    log.close()
    loop.print_results(run)


if __name__ == "__main__":
    common.cli(main)
