"""Phase 4b, reinforcement learning in three stages: STEM, coding, human preference.

    python rl.py configs/tiny.py                     # after distill.py and reward.py

The report (arXiv 2512.06266, RL): on-policy GRPO, one stage after the other, truncated responses masked out of the
loss; before each stage the problems are filtered with the checkpoint of the stage before: 16 samples each, kept where
0.10 < mean reward < 0.90. Rewards are verified (data/verify/answers.py, tests in a sandbox), in the last stage a pairwise
reward model's (pairwise.py). Group size, clip, rate and lengths are not published: our choice is DAPO's loss
(arXiv 2503.14476: clip 0.2 / 0.28, mean over all tokens of the step), one update a batch, no KL term.

Shapes: G responses of a group, R rows (responses) of this rank, N response tokens.
"""
import dataclasses
import json
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

import common
import hf
import loop
import pairwise
from report import plots
from common import UserError
from data.verify import sandbox
from data.chat.template import after_thoughts
from data.tasks.problem import Problem
from data.tasks import registry
from data.chat.packing import pack, share_prefixes
from data.chat.pairs import order
from data.tasks import taste
from data.text.tokenizer import Tokenizer
from evaluate import EvaluateConfig, task_prompt
from generate import sample, stop_ids
from kernels.cross_entropy import linear_logprobs, linear_logprobs_entropy
from model import ModelConfig
from pairwise import Judge, group_rewards, win_rates
from progress import progress_bar

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Stage:
    name: str
    problems: dict               # {task of data/tasks: training problems of it, before the filter}
    steps: int
    reward: str = "verified"     # or "pairwise": responses to COMPARED tasks are compared, wrong ones earn nothing
    temperature: float | None = None                  # default: rl.temperature
    lr: list = field(default_factory=lambda: [1, 1])  # at the start and at the end, as shares of rl.lr
    curve: str = "linear"


@dataclass(kw_only=True)
class RlConfig(loop.TrainConfig):
    stages: list                 # STEM, coding, preference: see Stage
    judge: str = ""              # the pairwise reward model: a phase, a checkpoint or a folder
    group_size: int = 8          # responses to each problem
    batch_groups: int = 16       # problems of a step
    micro_rows: int = 0          # responses of one forward pass on one device; 0: all of the device's
    updates: int = 1             # optimizer steps a batch; beyond 1 the policy leaves the one that was sampled from
    loss: str = "dapo"           # or "grpo" (2402.03300), "dr_grpo" (2503.20783), "gspo" (2507.18071)
    clip_low: float = 0.2        # the ratio's clip below 1 …
    clip_high: float = 0.28      # … and above it (DAPO's clip-higher)
    divide_by_std: bool = True   # advantages by the group's standard deviation (never with "dr_grpo", "pairwise")
    kl: float = 0.0              # weight of the divergence from the start of the stage (k2: its gradient is the KL's)
    temperature: float = 1.0     # of the rollouts, and of the log-probabilities in the loss: top-p is off
    max_new_tokens: int = 96     # longer responses are cut off, and masked out of the loss
    max_rows: int = 256          # responses that are decoded together
    context: int = 256           # tokens of a packed row
    filter_samples: int = 16     # of each problem before a stage; 0: no filter
    keep_between: list = field(default_factory=lambda: [0.1, 0.9])  # mean rewards that are kept, strictly
    opponents: int = 3           # of each response in a pairwise group; 0: all


LOSSES = ("dapo", "grpo", "dr_grpo", "gspo")
COMPARED = {"taste", "helpsteer3", "ultrafeedback"}  # tasks of which no rule judges all of a reply


def check(p: RlConfig, stages: list[Stage], world: int) -> None:
    """What types cannot say: raises UserError."""
    if p.loss not in LOSSES:
        raise UserError(f"rl.loss must be one of {', '.join(LOSSES)}, not {p.loss!r}")
    for key, least in (("group_size", 2), ("batch_groups", 1), ("updates", 1), ("max_new_tokens", 1)):
        if getattr(p, key) < least:
            raise UserError(f"rl.{key} must be at least {least}, not {getattr(p, key)}")
    if (coldest := min([p.temperature, *(s.temperature for s in stages if s.temperature is not None)])) <= 0:
        raise UserError(f"rl.temperature must be above 0, not {coldest}: all responses would be the same")
    if len(p.keep_between) != 2:
        raise UserError(f"rl.keep_between must be [low, high], not {p.keep_between}")
    if not stages or len({stage.name for stage in stages}) < len(stages):
        raise UserError("rl.stages needs one stage at least, each with a name of its own")
    for stage in stages:
        if stage.reward not in ("verified", "pairwise"):
            raise UserError(f"stage {stage.name!r}: reward must be 'verified' or 'pairwise', not {stage.reward!r}")
        if stage.reward == "pairwise" and not p.judge:
            raise UserError(f"stage {stage.name!r} needs rl.judge, a checkpoint of reward.py")
        if stage.reward == "pairwise" and not {task.partition("=")[0] for task in stage.problems} & COMPARED:
            raise UserError(f"stage {stage.name!r}: replies to {', '.join(sorted(COMPARED))} can be compared, not to "
                            f"{', '.join(stage.problems)}")
    if p.batch_groups % world:
        raise UserError(f"rl.batch_groups={p.batch_groups} is no multiple of the {world} processes")


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts and rewards

@dataclass
class Rollout:
    """A response and what became of it. reward None: could not be scored; advantage and weight: see advantages()."""
    problem: Problem
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # of the sampler
    finish_reason: str
    text: str
    reward: float | None = None
    advantage: float = 0.0
    weight: float = 1.0    # in the loss: 0 where cut off, or not scored


def roll_out(model, tokenizer, problems: list[Problem], n: int, p: RlConfig, seed: int) -> list[list[Rollout]]:
    """n responses to each problem, by their own tokens: nothing is decoded and encoded again."""
    stop = stop_ids(tokenizer)
    prompts = [task_prompt(problem, tokenizer, "chat") for problem in problems]
    answers = sample(model, prompts, n, p.max_new_tokens, p.temperature, stop=stop, seed=seed, max_rows=p.max_rows)
    return [[Rollout(problem, prompt, a.tokens, a.logprobs, a.finish_reason,
                     tokenizer.decode([t for t in a.tokens if t not in stop])) for a in each]
            for problem, prompt, each in zip(problems, prompts, answers)]


def reply_of(text: str) -> str:
    """What the judge sees: thoughts are not compared."""
    return (after_thoughts(text) or "").strip()


def right(r: Rollout) -> bool:
    """Whether a response passes the rule behind the comparisons: it has a reply; in `taste`, with the right number."""
    return taste.is_correct(r.problem, r.text) if r.problem.family == "taste" else bool(reply_of(r.text))


def split_groups(groups: list[list[Rollout]], stage: Stage) -> tuple[list, list]:
    """The groups that a rule judges, and those whose responses are compared."""
    compared = lambda group: stage.reward == "pairwise" and group[0].problem.family in COMPARED
    return [group for group in groups if not compared(group)], [group for group in groups if compared(group)]


def score(groups: list[list[Rollout]], stage: Stage, judge: Judge | None, p: RlConfig, seed: int) -> list[float]:
    """Fills in the rewards; returns the judge's disagreement between orders in each group that it compared.

    Pairwise: a right response earns the share of comparisons that it wins, a wrong one nothing. A group that the judge
    cannot tell apart better than it agrees with itself gets one reward for all its right ones: no signal.
    """
    by_rule, by_judge = split_groups(groups, stage)
    flat = [r for group in by_rule for r in group]
    for r, reward in zip(flat, registry.rewards([r.problem for r in flat], [r.text for r in flat])):
        r.reward = reward
    asked = [(group[0].problem.question, [reply_of(r.text) for r in group]) for group in by_judge]
    verdicts = group_rewards(judge, asked, p.opponents, seed) if asked else []
    for group, found in zip(by_judge, verdicts):
        trusted = found.rewards.std() > found.disagreement
        for r, reward in zip(group, found.rewards if trusted else np.full(len(group), 0.5)):
            r.reward = float(reward) if right(r) else 0.0
    return [found.disagreement for found in verdicts]


def advantages(groups: list[list[Rollout]], divide_by_std: bool) -> int:
    """Fills in advantage = (reward - mean of the group) / standard deviation (population; our choice); returns how many
    groups have a signal: a response that is trained and was better or worse than the mean.

    What could not be scored is in no mean and not trained. What was cut off is in its group's mean, and not trained: it
    counts in neither numerator nor denominator of the loss.
    """
    n = 0
    for group in groups:
        scored = [r for r in group if r.reward is not None]
        rewards = np.array([r.reward for r in scored])
        spread = float(rewards.std()) if len(set(rewards)) > 1 else 0.0  # of equal ones rounding may leave some
        for r in group:
            r.weight = float(r.reward is not None and r.finish_reason == "stop")
            r.advantage = 0.0
            if r.reward is not None and spread > 0:
                r.advantage = float(r.reward - rewards.mean()) / (spread if divide_by_std else 1.0)
        n += any(r.weight and r.advantage for r in group)
    return n


# ---------------------------------------------------------------------------------------------------------------------
# The on-policy filter

def filtered(run: loop.Run, p: RlConfig, stage: Stage, judge: Judge | None,
             references: dict[str, str]) -> list[Problem]:
    """The stage's problems that the policy as it is now sometimes solves and sometimes does not, with a table.

    Pairwise: the mean is the win rate of its samples against one reference response, its own greedy one, which is put
    into references {question: reply}. The answer is kept on disk: a resumed run takes the same problems.
    """
    d = run.d
    given = [problem for task, n in stage.problems.items()
             for problem in registry.family(task).problems("train", max(1, round(run.cfg.scale * n)), p.seed)]
    problems = [problem for problem in given
                if len(task_prompt(problem, run.tokenizer, "chat")) + p.max_new_tokens <= p.context]
    key = common.hash_json([str(run.tokenizer_file), [problem.key for problem in problems], stage.reward,  # until the
                          p.filter_samples, p.temperature])  # stage's first checkpoint all of these may change
    path = run.folder / "filter" / f"{stage.name}-{key}.json".replace(" ", "_")
    if d.sum(float(path.is_file()))[0] < d.world:
        plain, mine, means = run.plain(), problems[d.rank::d.world], {}
        for first in progress_bar(range(0, len(mine), 64), desc=f"filter of {stage.name}", unit="chunk",
                          disable=not d.is_main):
            part = mine[first:first + 64]
            groups = roll_out(plain, run.tokenizer, part, p.filter_samples or 1, p, p.seed * 1_000_000 + first)
            compared = [group[0].problem for group in split_groups(groups, stage)[1]]
            greedy = roll_out(plain, run.tokenizer, compared, 1, dataclasses.replace(p, temperature=0.0), 0)
            references |= {group[0].problem.question: reply_of(group[0].text) for group in greedy}
            means |= filter_means(groups, stage, judge, references)
        means, known = d.gather(means), d.gather(dict(references))
        if d.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            common.write_atomic(path, json.dumps({"means": means, "references": known}))
        d.barrier()
    found = json.loads(path.read_text())
    references |= found["references"]
    low, high = p.keep_between
    keep = lambda problem: not p.filter_samples or (m := found["means"].get(problem.key)) is not None and low < m < high
    kept = [problem for problem in problems if keep(problem)]
    if d.is_main:
        values = np.array([m for m in found["means"].values() if m is not None])
        print(f"{stage.name}: {len(given)} problems, {len(given) - len(problems)} of them too long, mean reward "
              f"{values.mean() if len(values) else math.nan:.3f}; too hard (at most {low}) {(values <= low).sum()}, "
              f"too easy (at least {high}) {(values >= high).sum()}, kept {len(kept)}", flush=True)
    if not kept:
        raise UserError(f"stage {stage.name!r}: no problem is left by the filter; take others, or more of them")
    return kept


def filter_means(groups: list[list[Rollout]], stage: Stage, judge: Judge | None,
                 references: dict[str, str]) -> dict[str, float | None]:
    """{problem: the mean of its group}, of verified rewards or of wins against the reference; None: none was scored."""
    by_rule, by_judge = split_groups(groups, stage)
    flat = [r for group in by_rule for r in group]
    rewards = iter(registry.rewards([r.problem for r in flat], [r.text for r in flat]))
    each = [[x for x in (next(rewards) for _ in group) if x is not None] for group in by_rule]
    each += wins(by_judge, judge, references)
    return {group[0].problem.key: float(np.mean(x)) if len(x) else None for group, x in zip(by_rule + by_judge, each)}


def wins(groups: list[list[Rollout]], judge: Judge | None, references: dict[str, str]) -> list[np.ndarray]:
    """How surely each response beats its problem's reference; 0 for a wrong one."""
    if not groups:
        return []
    asked = [(r.problem.question, reply_of(r.text), references[r.problem.question]) for group in groups for r in group]
    rates = win_rates(judge, asked) * [right(r) for group in groups for r in group]
    return np.split(rates, np.cumsum([len(group) for group in groups])[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def surrogate(logprobs: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, p: RlConfig) -> tuple:
    """-min(ratio * A, clip(ratio) * A) with ratio = exp(log p - old log p) (PPO, arXiv 1707.06347, eq. 7), and whether
    the clip decides; of tokens (N,), or of whole sequences (R,) for GSPO."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - p.clip_low, 1 + p.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage), clipped * advantage < ratio * advantage


def policy_loss(logprobs: torch.Tensor, old: torch.Tensor, rows: dict, advantage: torch.Tensor, weight: torch.Tensor,
                reference: torch.Tensor | None, n_tokens: float, n_rows: float, p: RlConfig) -> tuple:
    """(loss, share of the tokens or, for GSPO, sequences that are clipped): this pass's part of the step's; scalars.

    logprobs, old, reference (N,) of the present, the sampling and the stage's first policy; advantage, weight (R,) of
    each response; n_tokens, n_rows: those with a weight, in the whole step on all ranks.
    dapo     sum over tokens / n_tokens                                 (arXiv 2503.14476, eq. 12)
    grpo     mean over responses of the mean over their tokens          (arXiv 2402.03300, eq. 3)
    dr_grpo  sum over tokens / (n_rows * max_new_tokens)                (arXiv 2503.20783)
    gspo     mean over responses; ratio = exp(mean of their log ratios) (arXiv 2507.18071, eq. 5)
    """
    n, sequence = len(advantage), rows["sequence"]
    lengths = loop.by_sequence(torch.ones_like(logprobs), rows, n)
    if p.loss == "gspo":
        mean = lambda x: loop.by_sequence(x, rows, n) / lengths
        losses, clipped = surrogate(mean(logprobs), mean(old), advantage, p)
        shares = weight / n_rows
    else:
        losses, clipped = surrogate(logprobs, old, advantage[sequence], p)
        shares = {"dapo": weight / n_tokens, "grpo": weight / (n_rows * lengths),
                  "dr_grpo": weight / (n_rows * p.max_new_tokens)}[p.loss][sequence]
    loss = (losses * shares).sum()
    if reference is not None:  # k2, (log p - log ref)^2 / 2: as a loss its gradient is the reverse KL's, k3's is not
        loss = loss + p.kl * ((logprobs - reference).square() / 2 * weight[sequence]).sum() / n_tokens
    return loss, (clipped * (shares > 0)).sum() / (n_rows if p.loss == "gspo" else n_tokens)


def passes(mine: list[Rollout], p: RlConfig, d):
    """(responses, packed rows, whether it is the last) of each forward pass: equally many passes on all ranks.

    Responses without an advantage have no gradient (but for a KL term): no pass is spent on them, or on as few as make
    the ranks' numbers equal. They count in the loss's denominators all the same.
    """
    has_gradient = lambda r: r.weight > 0 and (r.advantage != 0 or p.kl > 0)
    n = max(1, *d.gather({d.rank: sum(map(has_gradient, mine))}).values())
    first_those, size = sorted(mine, key=has_gradient, reverse=True)[:n], p.micro_rows or n
    for first in range(0, n, size):
        part = first_those[first:first + size]
        rows = share_prefixes(pack([(r.prompt, r.tokens) for r in part], p.context))
        yield part, loop.as_tensors(rows, d.device), first + size >= n


@torch.no_grad()
def logprobs_of(model, mine: list[Rollout], p: RlConfig, d) -> list[torch.Tensor]:
    """The log-probabilities of each pass's response tokens under a model."""
    return [linear_logprobs(loop.hidden_of(model, rows), model.lm_head.weight, rows["targets"], p.temperature,
                            model.cfg.kernels) for _, rows, _ in passes(mine, p, d)]


def train_step(model, mine: list[Rollout], old: list[torch.Tensor] | None, reference: list[torch.Tensor] | None,
               p: RlConfig, d) -> dict[str, float]:
    """Adds up the gradient of the step's loss; returns the loss and what the log shows of it.

    old: log-probabilities of the policy that sampled; None: this is it, and the ratio is 1.
    """
    n_tokens, n_rows = d.sum(sum(r.weight * len(r.tokens) for r in mine), sum(r.weight for r in mine))
    n_tokens, n_rows = max(n_tokens, 1.0), max(n_rows, 1.0)
    total, apart = torch.zeros(4, dtype=torch.float64, device=d.device), 0.0
    for i, (part, rows, last) in enumerate(passes(mine, p, d)):
        common.set_gradient_sync(model, last_micro_batch=last)
        logprobs, entropy = linear_logprobs_entropy(loop.hidden_of(model, rows), model.lm_head.weight, rows["targets"],
                                                    p.temperature, model.cfg.kernels)
        now = logprobs.detach()
        advantage, weight = (torch.tensor([getattr(r, key) for r in part]).to(now)
                             for key in ("advantage", "weight"))
        loss, clipped = policy_loss(logprobs, now if old is None else old[i], rows, advantage, weight,
                                    reference and reference[i], n_tokens, n_rows, p)
        (loss * d.world).backward()
        of_sampler = torch.tensor([x for r in part for x in r.logprobs]).to(now)
        apart = max(apart, (now - of_sampler).abs().max().item())
        weight = weight[rows["sequence"]]
        total += torch.stack([loss.detach(), clipped, (entropy.detach() * weight).sum(), weight.sum()]).double()
    loss, clipped, entropy, n = d.sum(*total.tolist())
    return {"loss": loss, "clipped": clipped, "entropy": entropy / max(n, 1.0),
            "sampler_off": max(d.gather({d.rank: apart}).values())}


# ---------------------------------------------------------------------------------------------------------------------
# The run

@dataclass
class Plan:
    name: str
    first_step: int
    n_steps: int

    @property
    def end_step(self) -> int:
        return self.first_step + self.n_steps


def summary(groups: list[list[Rollout]], d) -> dict[str, float]:
    """What a step's rollouts were like, over all ranks; the headline is `reward`, the loss says nothing (it is about 0
    on-policy)."""
    flat = [r for group in groups for r in group]
    scored = [r for r in flat if r.reward is not None]
    of_group = [[r.reward for r in group if r.reward is not None] for group in groups]
    return averages({
        "reward": [r.reward for r in scored],
        "all_right": [min(x, default=0) == 1 for x in of_group],
        "all_wrong": [max(x, default=1) == 0 for x in of_group],
        "length_right": [len(r.tokens) for r in scored if r.reward > 0.5],
        "length_wrong": [len(r.tokens) for r in scored if r.reward <= 0.5],
        "truncated": [r.finish_reason != "stop" for r in flat], "unscored": [r.reward is None for r in flat],
    }, d)


def averages(values: dict[str, list], d) -> dict[str, float]:
    """The mean of each list over all ranks; nan where it is empty on all of them."""
    sums = d.sum(*(float(np.sum(v)) for v in values.values()), *(float(len(v)) for v in values.values()))
    return {name: total / n if n else math.nan for name, total, n in zip(values, sums, sums[len(values):])}


def write_rollouts(run: loop.Run, groups: list[list[Rollout]]) -> None:
    """rollouts/<step>.jsonl with every rollout of this rank; now and then the best and the worst are printed."""
    folder = run.folder / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    flat = [r for group in groups for r in group]
    lines = [json.dumps({"task": r.problem.family, "question": r.problem.question, "response": r.text,
                         "reward": r.reward, "advantage": r.advantage, "finish_reason": r.finish_reason, "tokens": len(r.tokens)})
             for r in flat]
    suffix = f".{run.d.rank}" if run.d.world > 1 else ""
    common.write_atomic(folder / f"{run.step:06d}{suffix}.jsonl", "\n".join(lines) + "\n")
    if run.d.is_main and run.step % run.p.log_every == 0:
        ranked = sorted((r for r in flat if r.reward is not None), key=lambda r: r.reward)
        for name, r in (("best", ranked[-1]), ("worst", ranked[0])) if ranked else ():
            tqdm.write(f"  {name} ({r.reward:.2f}) > {r.problem.question}\n  | " + r.text.replace("\n", "\n  | "))


def alarm(lines: list[dict], stage: Stage) -> str:
    """What looks like reward hacking in a stage so far, or "": reward up and held-out score down, or length running."""
    steps = [line for line in lines if "reward" in line and line["stage"] == stage.name]
    scored = [line for line in lines if line.get("scores")]
    few = max(1, len(steps) // 4)
    mean = lambda key, part: float(np.nanmean([line[key] for line in part]))
    if len(steps) > 7 and mean("length", steps[-few:]) > 1.5 * mean("length", steps[:few]):
        return "responses have become half as long again"
    if len(steps) > 7 and mean("reward", steps[-few:]) > mean("reward", steps[:few]):
        for task in stage.problems:
            *past, new = [line["scores"][task] for line in scored if task in line["scores"]] or [None]
            best = max(past, key=lambda score: score["avg"], default=new)
            if past and new["avg"] < best["avg"] - 2 * math.hypot(best["stderr"], new["stderr"]):
                return f"reward rises while held-out {task} falls from {best['avg']:.3f} to {new['avg']:.3f}"
    return ""


def main():
    cfg = common.load_config(__doc__, flags=sandbox.FLAG, model=ModelConfig, rl=RlConfig, evaluate=EvaluateConfig)
    if cfg.unsafe_exec:
        sandbox.allow_unlocked()
    p = cfg.rl
    stages = [common.from_dict(Stage, s, f"rl.stages[{i}]") for i, s in enumerate(p.stages)]
    loop.check_settings("rl", p, stages)
    d = common.init_distributed(p.dtype, p.shard_size)
    check(p, stages, d.world)
    source = hf.resolve_checkpoint(d, cfg.init_from or "distill", cfg.out)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    loop.set_vocab_size(cfg.model, tokenizer.n_vocab)
    ends = np.cumsum([0, *(max(1, round(cfg.scale * stage.steps)) for stage in stages)]).tolist()
    plans = [Plan(stage.name, first, end - first) for stage, first, end in zip(stages, ends, ends[1:])]
    judge = None
    if any(stage.reward == "pairwise" for stage in stages):
        judge = pairwise.load(hf.resolve_checkpoint(d, p.judge, cfg.out), d.device, getattr(torch, p.dtype), p.context)

    run = loop.Run("rl", cfg, p, tokenizer, source / "tokenizer.json", d)
    past = lambda step: [p.seed, str(source), p.group_size, p.batch_groups, *(
        [s.name, s.problems, s.reward, plan.first_step] for s, plan in zip(stages, plans) if plan.first_step < step)]
    newest = common.find_checkpoint(d, run.folder)
    if newest:
        run.resume(newest, True, past)
    else:
        run.model.rope_theta = hf.load_initial_weights(d, run.model, tokenizer, source)
        if cfg.evaluate.tasks:
            loop.before(run, ("chat",))
    problems, references, first_policy, in_stage = [], {}, None, None

    for step in run.steps(ends[-1]):
        stage, plan = next((s, plan) for s, plan in zip(stages, plans) if step < plan.end_step)
        if stage is not in_stage:
            p = dataclasses.replace(run.p, temperature=stage.temperature or run.p.temperature)
            problems, in_stage = filtered(run, p, stage, judge, references), stage
            if step == plan.first_step:  # with the old moments mathematics was forgotten while code was trained
                run.optimizer.state.clear()
            start = run.folder / f"step_{plan.first_step:08d}" if plan.first_step else source  # not where it goes on
            first_policy = hf.load_frozen(d, start, p.dtype) if p.kl else None
        chosen = order(len(problems), (step - plan.first_step) * p.batch_groups, p.batch_groups, p.seed)
        clock = [time.time()]
        groups = roll_out(run.plain(), tokenizer, [problems[i] for i in chosen[d.rank::d.world]], p.group_size, p,
                          seed=(p.seed * 1000 + d.rank) * 1_000_000 + step)
        clock.append(time.time())
        if judge is not None:
            judge.known.clear()  # what is asked together is rounded together: a resumed run asks the same, to the bit
        disagreement = score(groups, stage, judge, p, p.seed + step)
        by_rule, by_judge = split_groups(groups, stage)
        divide = p.divide_by_std and p.loss != "dr_grpo"
        (signal,) = d.sum(advantages(by_rule, divide) + advantages(by_judge, False))
        write_rollouts(run, groups)
        seen = summary(groups, d)
        if stage.reward == "pairwise":
            seen |= averages({"win_rate": [x for each in wins(by_judge, judge, references) for x in each],
                              "rubric": [taste.reward(r.problem, r.text) for group in by_judge for r in group
                                         if r.problem.family == "taste"],
                              "disagreement": disagreement}, d)
        clock.append(time.time())

        mine, lr = [r for group in groups for r in group], loop.learning_rate(p, stage, plan, step)
        old = logprobs_of(run.model, mine, p, d) if p.updates > 1 else None
        reference = logprobs_of(first_policy, mine, p, d) if p.kl else None
        found, grad_norm, run.finite = {"loss": 0.0}, 0.0, True
        for _ in range(p.updates if signal else 0):  # a step without signal changes no weight
            now = train_step(run.model, mine, old, reference, p, d)
            found = now | {"sampler_off": found.get("sampler_off", now["sampler_off"])}  # of the first: it sampled
            grad_norm = run.update(now["loss"], lr, where=lambda: f"step {step} of stage {stage.name}")
        n_tokens = int(d.sum(sum(len(r.tokens) for r in mine))[0])
        loss = found.pop("loss")
        run.done(stage.name, loss, lr, grad_norm, n_tokens, (1, n_tokens), **seen, **found, groups_with_signal=signal,
                 length=n_tokens / (p.batch_groups * p.group_size), rollout_s=clock[1] - clock[0],
                 scoring_s=clock[2] - clock[1], update_s=time.time() - clock[2])
        if d.is_main and run.step % p.log_every == 0:
            tqdm.write(f"  reward {seen['reward']:.3f}  entropy {found.get('entropy', math.nan):.3f}  length "
                       f"{n_tokens / len(mine) / d.world:.1f}  groups with signal {signal:.0f}")

        n_problems = run.evaluate_now(plan)
        if n_problems is not None:
            run.metrics.write(step=step, stage=stage.name, seconds=run.seconds, **loop.look(run, n_problems))
            if d.is_main and (said := alarm(plots.evaluations(run.folder), stage)):
                print(f"warning: {said}; look at {run.folder / 'rollouts'}", flush=True)
        run.save(plan, ("model", "rl"), past(run.step))
    if d.is_main:
        print(plots.gain(run.folder))
        print("picture:", plots.plot_rl(run.folder))


if __name__ == "__main__":
    common.cli(main)
