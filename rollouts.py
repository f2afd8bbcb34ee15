"""Rollouts of rl.py: responses are sampled, rewarded and written down; problems filtered.

The functions take rl.py's settings: `cfg` is its RlConfig, `stage` a StageConfig of its table.

Shapes: G responses of a group, one group per problem.
"""
import dataclasses
import functools
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
import loop
from common import Dist, UserError
from data.chat.template import after_thoughts
from data.tasks import registry, taste
from data.tasks.problem import Problem
from evaluate import task_prompt
from generate import Sample, decode_answer
from reward import RewardModel, group_rewards, win_rates
from sampler import in_order

COMPARED = {"taste", "helpsteer3", "ultrafeedback"}  # no rule judges all of a reply to these


def unused_settings(cfg) -> dict[str, str]:
    """Settings that have no effect beside the others, each with the reason."""
    unused = {}
    if cfg.updates == 1:
        reason = "with one update a batch no ratio is clipped"
        unused |= dict.fromkeys(("clip_low", "clip_high"), reason)
    if cfg.loss == "dr_grpo":
        unused["divide_by_std"] = "dr_grpo never divides"
    if not cfg.filter_samples:
        unused["keep_between"] = "filter_samples is 0"
    if not any(stage.reward == "pairwise" for stage in cfg.stages):
        unused |= dict.fromkeys(("opponents", "reward_model"), "no stage is pairwise")
    return unused


@dataclass
class Rollout:
    """A response and what became of it."""
    problem: Problem
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]        # of the sampler
    finish_reason: str
    text: str
    reward: float | None = None  # None: could not be scored
    verdict: object = None       # of the verifier, where rules left the answer open
    advantage: float = 0.0
    loss_mask: float = 1.0       # 0 where the response is not trained: cut off, or not scored


@dataclass
class Judges:
    """Who scores what rules cannot."""
    reward_model: RewardModel | None = None  # compares responses; loaded in stages that ask it …
    reward_folder: Path | None = None        # … from here
    verifier: object = None      # data.verify.agentic.Verifier: decides on answers in other forms


def sample_rollouts(
    sampler, tokenizer, problems: list[Problem], n: int, cfg, seed: int,
    numbers: list[int] | None = None,
) -> Iterator[dict[int, list[Rollout]]]:
    """An iterator of {place of a problem: n responses to it}, as they come.

    By their own tokens: nothing is decoded and encoded again. cfg: an RlConfig, of which
    max_new_tokens, temperature and max_rows hold. numbers: of the problems among all (default:
    their places here); with the seed they decide all draws.
    """
    prompts = [task_prompt(problem, tokenizer, "chat") for problem in problems]
    batches = sampler.sample(  # servers are asked at once
        prompts,
        n,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        stop=tokenizer.stop_ids,
        seed=seed,
        max_rows=cfg.max_rows,
        numbers=numbers,
    )
    return make_groups(batches, problems, prompts, tokenizer)


def make_groups(
    batches: Iterator[dict[int, list[Sample]]], problems: list[Problem], prompts: list[list[int]],
    tokenizer,
) -> Iterator[dict[int, list[Rollout]]]:
    """What sample_rollouts yields, from what the sampler yields."""
    for batch in batches:
        groups = {}
        for place, samples in batch.items():
            groups[place] = make_group(problems[place], prompts[place], samples, tokenizer)
        yield groups


def make_group(
    problem: Problem, prompt: list[int], samples: list[Sample], tokenizer
) -> list[Rollout]:
    group = []
    for answer in samples:
        text = decode_answer(answer.tokens, tokenizer, prompt)
        group.append(
            Rollout(problem, prompt, answer.tokens, answer.logprobs, answer.finish_reason, text))
    return group


KEPT = "sampled"  # folder of the phase: the samples of the step that is being done
FILTER = "filter"  # another one: what the filter of each stage measured


@dataclass
class Asked:
    """A rank's samples of a step that were asked for."""
    problems: dict[int, Problem]      # by their number in the step
    groups: dict[int, list[Rollout]]  # that were kept before a restart in the midst of the step
    missing: list[int]                # the numbers of the others …
    batches: Iterator[dict]           # … and their groups, by place in `missing`, as they come
    path: Path                        # where these are kept


def ask_rollouts(sampler, run: loop.Run, state, step: int) -> Asked:
    """Asks the policy as it is now for this rank's groups of a step, but for those that were kept.

    state: rl.py's StageState. All ranks call it.
    """
    cfg, dist = state.cfg, run.dist
    sampler.update(run.unsharded_model(), run.step)
    first = (step - state.stage.first_step) * cfg.batch_groups
    batch = loop.shuffled_indices(len(state.problems), first, cfg.batch_groups, cfg.seed)
    problems = {}
    for number in range(dist.rank, cfg.batch_groups, dist.world):
        problems[number] = state.problems[batch[number]]
    name = common.hash_json([step, run.resume_key(step), loop.as_json(run.cfg)])
    groups = {}
    for row in common.read_kept_lines(run.folder / KEPT, name):
        number = row["number"]
        if number in problems:
            samples = [Sample(*values) for values in row["samples"]]
            prompt = task_prompt(problems[number], run.tokenizer, "chat")
            groups[number] = make_group(problems[number], prompt, samples, run.tokenizer)
    missing = [number for number in problems if number not in groups]
    seed = cfg.seed * 1_000_000_000 + step  # with a problem's number in the step: all its draws
    batches = sample_rollouts(
        sampler, run.tokenizer, [problems[number] for number in missing], cfg.group_size, cfg,
        seed, missing)
    path = run.folder / KEPT / f"{name}.{dist.rank}.jsonl"
    return Asked(problems, groups, missing, batches, path)


def receive_rollouts(asked: Asked) -> list[list[Rollout]]:
    """This rank's groups of a step, kept on disk as they come, for a restart in the midst of it."""
    for batch in asked.batches:
        rows = []
        for place, group in batch.items():
            number = asked.missing[place]
            asked.groups[number] = group
            samples = [(r.tokens, r.logprobs, r.finish_reason) for r in group]
            rows.append({"number": number, "samples": samples})
        common.keep_lines(asked.path, rows)
    return [asked.groups[number] for number in asked.problems]


def discard_kept(run: loop.Run) -> None:
    """Deletes the samples of a step that is done."""
    if run.dist.is_main:
        shutil.rmtree(run.folder / KEPT, ignore_errors=True)


def flatten(groups: list) -> list:
    """What the groups hold, one after the other."""
    return list(itertools.chain.from_iterable(groups))


# --------------------------------------------------------------------------------------------------
# Rewards


def reply_text(text: str) -> str:
    """What the reward model sees: thoughts are not compared."""
    return (after_thoughts(text) or "").strip()


def is_acceptable(rollout: Rollout, cfg) -> bool:
    """Whether a compared response may earn: it has a reply, in `taste` with the right number; one
    that was cut off may where cfg.cut_earns."""
    if rollout.finish_reason != "stop" and not cfg.cut_earns:
        return False
    if rollout.problem.family == "taste":
        return taste.is_correct(rollout.problem, rollout.text)
    return bool(reply_text(rollout.text))


def is_compared(problem: Problem, stage) -> bool:
    """Whether the reward model compares the responses to a problem; else a rule judges each."""
    return stage.reward == "pairwise" and problem.family in COMPARED


def split_groups(groups: list[list[Rollout]], stage) -> tuple[list, list]:
    """The groups that a rule judges, and those whose responses are compared."""
    by_rule, compared = [], []
    for group in groups:
        (compared if is_compared(group[0].problem, stage) else by_rule).append(group)
    return by_rule, compared


def verified_scores(rollouts: list[Rollout], judges: Judges, cfg) -> list[registry.Score]:
    """What rules and verifier say of each response; one that was cut off may earn nothing."""
    problems = [rollout.problem for rollout in rollouts]
    scores = registry.scores(problems, [rollout.text for rollout in rollouts], judges.verifier)
    if not cfg.cut_earns:
        for rollout, score in zip(rollouts, scores):
            if rollout.finish_reason != "stop":
                score.reward = 0.0
    return scores


def assign_rewards(
    groups: list[list[Rollout]], stage, judges: Judges, cfg, seed: int
) -> list[float]:
    """Fills in the rewards; returns each compared group's disagreement between the two orders.

    Pairwise: an acceptable response earns the share of comparisons that it wins, another one
    nothing. A group that the reward model cannot tell apart better than it agrees with itself gets
    one reward for all: no signal.
    """
    by_rule, compared = split_groups(groups, stage)
    rollouts = flatten(by_rule)
    for rollout, score in zip(rollouts, verified_scores(rollouts, judges, cfg)):
        rollout.reward, rollout.verdict = score.reward, score.verdict
    if not compared:
        return []
    replies = []
    for group in compared:
        texts = [reply_text(rollout.text) for rollout in group]
        replies.append((group[0].problem.question, texts))
    verdicts = group_rewards(judges.reward_model, replies, cfg.opponents, seed)
    for group, verdict in zip(compared, verdicts):
        can_tell = verdict.rewards.std() > verdict.disagreement
        rewards = verdict.rewards if can_tell else np.full(len(group), 0.5)
        for rollout, reward in zip(group, rewards):
            rollout.reward = float(reward) if is_acceptable(rollout, cfg) else 0.0
    return [verdict.disagreement for verdict in verdicts]


def reward_rollouts(
    state, step: int, groups: list[list[Rollout]]
) -> dict[str, list[float]]:
    """Fills in the rewards; returns what else the reward model says of compared responses.

    state: rl.py's StageState.
    """
    cfg, stage = state.cfg, state.stage.settings
    reward_model = state.judges.reward_model
    if reward_model is not None:  # what is asked together is rounded together:
        reward_model.known.clear()  # so a resumed run asks the same, to the bit
    disagreement = assign_rewards(groups, stage, state.judges, cfg, cfg.seed + step)
    if stage.reward != "pairwise":
        return {}
    _, compared = split_groups(groups, stage)
    rates = reference_win_rates(compared, reward_model, state.references, cfg)
    rubric = []
    for rollout in flatten(compared):
        if rollout.problem.family == "taste":
            rubric.append(taste.reward(rollout.problem, rollout.text))
    return {"win_rate": flatten(rates), "rubric": rubric, "disagreement": disagreement}


def reference_win_rates(groups: list[list[Rollout]], reward_model: RewardModel | None,
                        references: dict[str, str], cfg) -> list[np.ndarray]:
    """How surely each response beats its problem's reference; 0 for one that is not acceptable."""
    if not groups:
        return []
    rollouts = flatten(groups)
    comparisons = []
    for rollout in rollouts:
        question = rollout.problem.question
        comparisons.append((question, reply_text(rollout.text), references[question]))
    may_earn = [is_acceptable(rollout, cfg) for rollout in rollouts]
    rates = win_rates(reward_model, comparisons) * may_earn
    ends = np.cumsum([len(group) for group in groups])
    return np.split(rates, ends[:-1])


# --------------------------------------------------------------------------------------------------
# The on-policy filter


def filter_problems(
    run: loop.Run, sampler, cfg, stage, judges: Judges, is_resumed: bool = False
) -> tuple[list[Problem], dict[str, str]]:
    """The stage's problems that the policy sometimes solves and sometimes does not, with a table.

    And {question: the policy's greedy reply} of compared problems, which their samples are measured
    against. is_resumed: the stage goes on in its midst, with the filter that it began with.
    """
    candidates = run.dist.from_main(lambda: load_problems(stage, run.config.scale, cfg.seed))
    problems = []
    for problem in candidates:
        n_tokens = len(task_prompt(problem, run.tokenizer, "chat")) + cfg.max_new_tokens
        if n_tokens <= cfg.context:
            problems.append(problem)
    if not problems:
        raise UserError(
            f"stage {stage.name!r}: each of {len(candidates)} problems and an answer have more "
            f"tokens than rl.context={cfg.context}"
        )
    counts = f"{stage.name}: {len(candidates)} problems, {len(candidates) - len(problems)} too long"
    if not cfg.filter_samples and stage.reward == "verified":  # nobody needs an answer to them
        if run.dist.is_main:
            print(f"{counts}, no filter", flush=True)
        return problems, {}
    means, references = measure_problems(
        run, sampler, cfg, stage, problems, judges, is_resumed)
    low, high = cfg.keep_between
    kept = []
    for problem, mean in zip(problems, means):
        if not cfg.filter_samples or (mean is not None and low < mean < high):
            kept.append(problem)
    if run.dist.is_main:
        values = np.array([mean for mean in means if mean is not None])
        mean = values.mean() if len(values) else math.nan
        print(
            f"{counts}, mean reward {mean:.3f}; too hard (at most {low}) {(values <= low).sum()}, "
            f"too easy (at least {high}) {(values >= high).sum()}, kept {len(kept)}",
            flush=True,
        )
    if not kept:
        raise UserError(
            f"stage {stage.name!r}: no problem is left by the filter; take others, or more of them"
        )
    return kept, references


def load_problems(stage, scale: float, seed: int) -> list[Problem]:
    """The training problems of all tasks of a stage."""
    problems = []
    for task, n in stage.problems.items():
        problems += registry.family(task).problems("train", max(1, round(scale * n)), seed)
    return problems


def measure_problems(
    run: loop.Run, sampler, cfg, stage, problems: list[Problem], judges: Judges, is_resumed: bool
) -> tuple[list[float | None], dict[str, str]]:
    """The mean reward of each problem's samples, and {question: greedy reply} of compared problems.

    Compared problems: the mean win rate against the greedy reply. The ranks share the work; what
    they find is kept on disk as it comes, and a resumed run has the same.
    """
    dist, folder = run.dist, run.folder / FILTER
    name = dist.from_main(lambda: name_filter(run, cfg, stage, problems, judges, is_resumed))
    rows = dist.from_main(
        lambda: {row["number"]: row for row in common.read_kept_lines(folder, name)})
    numbers = list(range(len(problems)))
    pieces = sampler.pieces(numbers, rows, cfg.filter_samples or 1, cfg.max_rows, dist)
    if pieces:
        sampler.update(run.unsharded_model(), run.step)
    measured = {}
    for piece in dist.hand_out(pieces, f"filter of {stage.name}"):
        piece_problems = [problems[number] for number in piece]
        batches = sample_and_measure(
            sampler, run.tokenizer, cfg, stage, piece_problems, piece, judges)
        for batch in batches:
            common.keep_lines(folder / f"{name}.{dist.rank}.jsonl", batch)
            measured |= {row["number"]: row for row in batch}
    rows |= dist.gather(measured)
    means, references = [], {}
    for number, problem in enumerate(problems):
        means.append(rows[number]["mean"])
        if rows[number]["reference"] is not None:
            references[problem.question] = rows[number]["reference"]
    return means, references


def name_filter(
    run: loop.Run, cfg, stage, problems: list[Problem], judges: Judges, is_resumed: bool
) -> str:
    """The beginning of the names of the files that keep what a filter measures.

    Until the stage's first checkpoint problems, settings and weights may change: they have another
    name then. After it the policy is no longer the one that was measured: the name stays.
    """
    keys = common.hash_json([problem.key for problem in problems])
    chosen = run.folder / FILTER / f"{stage.name}.json".replace(" ", "_")
    if is_resumed and chosen.is_file():
        before = json.loads(chosen.read_text())
        if before["problems"] == keys:
            return before["name"]
    key = [loop.key_of_run(run), str(run.tokenizer_file), keys, stage.reward, cfg.filter_samples,
           cfg.temperature, cfg.max_new_tokens, cfg.cut_earns]
    if judges.verifier:
        key.append(judges.verifier.key)
    if stage.reward == "pairwise" and judges.reward_folder:
        key.append(loop.weights_key(judges.reward_folder, cfg.dtype))
    name = f"{stage.name}-{common.hash_json(key)}".replace(" ", "_")
    chosen.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomic(chosen, json.dumps({"name": name, "problems": keys}))
    return name


def sample_and_measure(
    sampler, tokenizer, cfg, stage, problems: list[Problem], numbers: list[int], judges: Judges
) -> Iterator[list[dict]]:
    """Yields what is kept of problems: number, mean reward, the greedy reply as reference.

    numbers: of the problems in the stage; they alone decide the draws, whoever samples what.
    """
    n_samples, seed = cfg.filter_samples or 1, cfg.seed * 1_000_000
    # before the samples, for a sampler answers one call at a time
    references = greedy_replies(sampler, tokenizer, problems, cfg, stage)
    for batch in sample_rollouts(sampler, tokenizer, problems, n_samples, cfg, seed, numbers):
        means = mean_rewards(list(batch.values()), stage, judges, cfg, references)
        rows = []
        for place in batch:
            problem = problems[place]
            reference = references.get(problem.question)
            mean = means[problem.key]
            rows.append({"number": numbers[place], "mean": mean, "reference": reference})
        yield rows


def greedy_replies(sampler, tokenizer, problems: list[Problem], cfg, stage) -> dict[str, str]:
    """{question: the policy's greedy reply} of the compared problems."""
    compared = [problem for problem in problems if is_compared(problem, stage)]
    if not compared:
        return {}
    greedy_cfg = dataclasses.replace(cfg, temperature=0.0)
    replies = {}
    for (greedy,) in in_order(sample_rollouts(sampler, tokenizer, compared, 1, greedy_cfg, 0)):
        replies[greedy.problem.question] = reply_text(greedy.text)
    return replies


def mean_rewards(
    groups: list[list[Rollout]], stage, judges: Judges, cfg, references: dict[str, str]
) -> dict[str, float | None]:
    """{problem's key: mean of its group}, of verified rewards or of wins; None: none was scored."""
    by_rule, compared = split_groups(groups, stage)
    rewards = iter(score.reward for score in verified_scores(flatten(by_rule), judges, cfg))
    values = []
    for group in by_rule:
        of_group = [next(rewards) for _ in group]
        values.append([reward for reward in of_group if reward is not None])
    values += reference_win_rates(compared, judges.reward_model, references, cfg)
    means = {}
    for group, numbers in zip(by_rule + compared, values):
        means[group[0].problem.key] = float(np.mean(numbers)) if len(numbers) else None
    return means


# --------------------------------------------------------------------------------------------------
# Which of them are trained


def select_trained(rollouts: list[Rollout], cfg, dist: Dist) -> list[Rollout]:
    """The responses that a rank's forward passes take: equally many on all ranks.

    Responses without an advantage have no gradient (but for a KL term): no pass is spent on them,
    or on as few as make the ranks' numbers equal. They count in the loss's denominators all the
    same.
    """
    is_trained = functools.partial(has_gradient, cfg=cfg)
    counts = dist.gather({dist.rank: sum(map(is_trained, rollouts))})
    n = max(1, *counts.values())
    return sorted(rollouts, key=is_trained, reverse=True)[:n]


def has_gradient(rollout: Rollout, cfg) -> bool:
    return rollout.loss_mask > 0 and (rollout.advantage != 0 or cfg.kl > 0)


def trained_lengths(rollouts: list[Rollout], cfg) -> list[int]:
    """Tokens of each prompt with a response that has a gradient."""
    return [len(r.prompt) + len(r.tokens) for r in rollouts if has_gradient(r, cfg)]


# --------------------------------------------------------------------------------------------------
# What rollouts were like


def summarize_rollouts(
    groups: list[list[Rollout]], verdicts: dict[str, list[float]], dist: Dist
) -> dict[str, float]:
    """What a step's rollouts were like, over all ranks; verdicts: on them, by name.

    Watch `reward`: on-policy the loss is about 0. A reward above 0.5 counts as right.
    """
    rollouts = flatten(groups)
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    all_right, all_wrong = [], []
    for group in groups:
        rewards = [rollout.reward for rollout in group if rollout.reward is not None]
        all_right.append(min(rewards, default=0) == 1)
        all_wrong.append(max(rewards, default=1) == 0)
    values = {
        "reward": [rollout.reward for rollout in scored],
        "all_right": all_right,
        "all_wrong": all_wrong,
    }
    values["length_right"] = [len(rollout.tokens) for rollout in scored if rollout.reward > 0.5]
    values["length_wrong"] = [len(rollout.tokens) for rollout in scored if rollout.reward <= 0.5]
    values["truncated"] = [rollout.finish_reason != "stop" for rollout in rollouts]
    values["unscored"] = [rollout.reward is None for rollout in rollouts]
    values["by_verifier"] = [rollout.verdict is not None for rollout in rollouts]
    return average_over_ranks(values | verdicts, dist)


def average_over_ranks(values: dict[str, list], dist: Dist) -> dict[str, float]:
    """The mean of each list over all ranks; nan where it is empty on all of them."""
    sums = [float(np.sum(numbers)) for numbers in values.values()]
    counts = [float(len(numbers)) for numbers in values.values()]
    totals = dist.sum(*sums, *counts)
    means = {}
    for name, total, count in zip(values, totals, totals[len(values):]):
        means[name] = total / count if count else math.nan
    return means


def verifier_metrics(judges: Judges, dist: Dist) -> dict[str, float]:
    """What the verifier was asked in a step and said, of all ranks; seconds are the slowest's."""
    if judges.verifier is None:
        return {}
    counts = judges.verifier.take_counts()
    seconds = dist.gather({dist.rank: counts.pop("seconds")})
    sums = dict(zip(counts, dist.sum(*counts.values())))
    metrics = {f"verifier_{name}": total for name, total in sums.items()}
    return metrics | {"verifier_s": max(seconds.values())}


def write_rollouts(run: loop.Run, step: int, groups: list[list[Rollout]]) -> None:
    """Writes rollouts/<step>.jsonl; now and then prints the best and the worst of this rank."""
    folder = run.folder / "rollouts"
    folder.mkdir(parents=True, exist_ok=True)
    rollouts = flatten(groups)
    lines = [
        json.dumps(
            {
                "task": r.problem.family,
                "question": r.problem.question,
                "response": r.text,
                "reward": r.reward,
                "verdict": r.verdict and dataclasses.asdict(r.verdict),
                "advantage": r.advantage,
                "finish_reason": r.finish_reason,
                "tokens": len(r.tokens),
            }
        )
        for r in rollouts
    ]
    suffix = f".{run.dist.rank}" if run.dist.world > 1 else ""
    common.write_atomic(folder / f"{step:06d}{suffix}.jsonl", "\n".join(lines) + "\n")
    scored = sorted((r for r in rollouts if r.reward is not None), key=lambda r: r.reward)
    if run.dist.is_main and step % run.cfg.log_every == 0 and scored:
        print_rollout("best", scored[-1])
        print_rollout("worst", scored[0])


def print_rollout(name: str, rollout: Rollout) -> None:
    text = rollout.text.replace("\n", "\n  | ")
    tqdm.write(f"  {name} ({rollout.reward:.2f}) > {rollout.problem.question}\n  | {text}")


def detect_hacking(lines: list[dict], name: str, tasks: list[str]) -> str:
    """A sign of reward hacking in a stage, or "": reward up, held-out score down; or length.

    lines: of loop.read_evaluations; name: of the stage; tasks: of its problems. The first and the
    last quarter of its steps are compared, from the eighth step on.
    """
    steps = [line for line in lines if "reward" in line and line["stage"] == name]
    if len(steps) <= 7:
        return ""
    quarter = len(steps) // 4
    first, last = steps[:quarter], steps[-quarter:]
    if mean_of("length", last) > 1.5 * mean_of("length", first):
        return "responses have become half as long again"
    if mean_of("reward", last) <= mean_of("reward", first):
        return ""
    for task in tasks:
        scores = [line["scores"][task] for line in lines if task in (line.get("scores") or {})]
        if len(scores) < 2:
            continue
        *past, new = scores
        best = max(past, key=lambda score: score["avg"])
        if new["avg"] < best["avg"] - 2 * math.hypot(best["stderr"], new["stderr"]):
            fall = f"{best['avg']:.3f} to {new['avg']:.3f}"
            return f"reward rises while held-out {task} falls from {fall}"
    return ""


def mean_of(key: str, lines: list[dict]) -> float:
    return float(np.nanmean([line[key] for line in lines]))
