"""Phase 4a, the reward model: says in one token, A or B, which of two responses is better.

    python reward.py configs/tiny.py                 # after distill.py; rl.py's last stage asks it

The report (arXiv 2512.06266, RL) has a dedicated model that answers in a few tokens, for speed and
because it is harder to hack; how it is trained and how its verdicts become rewards is not
published. Our choice is the next-token loss on the verdict alone, on both orders of each pair, so
that the place of a response cannot matter; and as a reward the share of comparisons won.

Shapes: N verdicts of a batch (two per pair), G responses of a group, C width.
"""
from settings import (
    Count,
    Curve,
    Length,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Sources,
    load_config,
)

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

import common
import hf
import loop
from common import Dist, UserError
from data.chat import template
from data.chat.packing import pack, row_size
from data.tasks import taste
from data.text import sources
from data.text.tokenizer import TokenizerConfig
from kernels.cross_entropy import linear_cross_entropy, wide_type
from model import ModelConfig
from schedule import Schedule, Stage, check_schedule, learning_rate, stage_at

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass(kw_only=True)
class RewardConfig(loop.TrainConfig):
    preferences: Annotated[Sources, Length(1)]  # {"taste": pairs, "noise", "seed"}, or path and hf
                                 # sources of data/text/sources.py
    held_out: Sources = field(default_factory=list)  # the same, for the table at the end
    kind: Literal["pairwise", "bradley_terry"] = "pairwise"  # bradley_terry: a score of each
                                                             # response alone
    context: Count = 256         # tokens of a packed row; longer pairs are left out
    batch_pairs: Count = 32      # pairs of a global batch, each in both orders
    micro_pairs: NonNegativeInt = 0  # pairs of one forward pass on one device; 0: all of the
                                     # device's
    epochs: PositiveFloat = 1.0  # over the pairs
    lr_end: NonNegativeFloat = 0.1  # the rate's end, as a share of lr
    curve: Curve = "cosine"      # how it goes there


# of loop.TrainConfig, with the reason
UNUSED = dict.fromkeys(("eval_every", "eval_problems", "eval_tasks", "prompts"),
                       "a reward model is graded at the end, on reward.held_out")


def check_settings(cfg: RewardConfig, world: int) -> None:
    """Raises UserError for what bounds cannot say."""
    check_schedule("reward", Schedule([1, cfg.lr_end], cfg.curve))
    if cfg.batch_pairs % world:
        raise UserError(
            f"reward.batch_pairs={cfg.batch_pairs} is no multiple of the {world} processes")


# --------------------------------------------------------------------------------------------------
# Preferences


def parse_preference(record: dict) -> dict | None:
    """{"question", "better", "worse"} of a record; None for a tie, or equal texts.

    Known forms: {"question", "better", "worse"}; HelpSteer3 (context, response1, response2,
    overall_preference from -3 to 3); UltraFeedback binarized and the like (prompt, chosen,
    rejected: texts or messages; score_chosen, score_rejected). ValueError for any other.
    """
    if {"question", "better", "worse"} <= record.keys():
        return record if record["better"] != record["worse"] else None
    if {"context", "response1", "response2", "overall_preference"} <= record.keys():
        return _parse_helpsteer(record)
    if {"prompt", "chosen", "rejected"} <= record.keys():
        return _parse_ultrafeedback(record)
    raise ValueError(
        f"no preference: it has {', '.join(record)}; see reward.parse_preference for what is known")


def _parse_helpsteer(record: dict) -> dict | None:
    first, second = record["response1"], record["response2"]
    preference = record["overall_preference"]  # below 0: the first is better
    if preference == 0 or first == second:
        return None
    better, worse = (first, second) if preference < 0 else (second, first)
    question = _all_text(record["context"])
    return {"question": question, "better": better, "worse": worse, "gap": abs(preference)}


def _parse_ultrafeedback(record: dict) -> dict | None:
    gap = (record.get("score_chosen") or 0) - (record.get("score_rejected") or 0)
    better, worse = _last_text(record["chosen"]), _last_text(record["rejected"])
    is_tie = "score_chosen" in record and gap == 0
    if is_tie or better == worse:
        return None
    return {"question": _all_text(record["prompt"]), "better": better, "worse": worse, "gap": gap}


def _all_text(text_or_messages: str | list[dict]) -> str:
    if isinstance(text_or_messages, str):
        return text_or_messages
    return "\n".join(message["content"] for message in text_or_messages)


def _last_text(text_or_messages: str | list[dict]) -> str:
    if isinstance(text_or_messages, str):
        return text_or_messages
    return text_or_messages[-1]["content"]


def read_preferences(source_list: list[dict], split: str) -> tuple[list[dict], Counter]:
    """All preferences of the sources, and {reason: how many records were left out}."""
    preferences, left_out, position = [], Counter(), sources.ReadPosition()
    for source in source_list:
        if "taste" in source:
            n, seed, noise = source["taste"], source.get("seed", 0), source.get("noise", 0.0)
            preferences += taste.pairs(split, n, seed, noise)
            continue
        reason = sources.invalid_reason(source)
        if reason:
            raise UserError(f'{reason}; or "taste"')
        preferences += islice(read_source(source, position, left_out), source.get("documents"))
    return preferences, left_out + Counter({"bad lines": position.bad})


def read_source(source: dict, position: sources.ReadPosition, left_out: Counter) -> Iterator[dict]:
    """The preferences of one source; position and left_out count what is none."""
    for part in sources.parts(source):
        for number, record in sources.read(source, part, bad_line=position.bad_line):
            try:
                preference = parse_preference(record)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                position.bad_line(f"{part}:{number}", str(error))
                continue
            if preference:
                yield preference
            else:
                left_out["ties"] += 1


# --------------------------------------------------------------------------------------------------
# The prompt, and the verdict

PAIRWISE_PROMPT = "{question}\nA: {a}\nB: {b}\nBetter:"
ALONE_PROMPT = "{question}\nReply: {reply}\nGood:"  # of a Bradley-Terry model
LETTERS = ("A", "B")


def verdict_tokens(tokenizer) -> tuple[int, int]:
    """The token of each verdict, A and B.

    It follows the opened turn of the assistant as a token of its own, so it cannot merge with what
    is before it.
    """
    ids = [tokenizer.encode(letter) for letter in LETTERS]
    if any(len(each) != 1 for each in ids):
        raise UserError(
            f"{tokenizer.name} has no single token for each of {' and '.join(LETTERS)}: A and B "
            "must each be one token"
        )
    return ids[0][0], ids[1][0]


def user_prompt(content: str, tokenizer) -> list[int]:
    """Token ids of a conversation in which the user says this, up to the assistant's answer."""
    messages = [{"role": "user", "content": content}]
    return template.render(messages, tokenizer, add_generation_prompt=True)


def comparison_prompt(question: str, a: str, b: str, tokenizer) -> list[int]:
    """Asks which of two responses is better."""
    return user_prompt(PAIRWISE_PROMPT.format(question=question, a=a, b=b), tokenizer)


def single_prompt(question: str, reply: str, tokenizer) -> list[int]:
    """Asks whether one response is good."""
    return user_prompt(ALONE_PROMPT.format(question=question, reply=reply), tokenizer)


def both_orders(
    preference: dict, tokenizer, kind: str = "pairwise"
) -> list[tuple[list[int], list[int]]]:
    """(prompt, verdict) with the better response first, then second: swapping flips the verdict.

    With "bradley_terry" (prompt, verdict) of the better response alone, then of the worse.
    """
    question, better, worse = (preference[key] for key in ("question", "better", "worse"))
    first, second = verdict_tokens(tokenizer)
    if kind == "bradley_terry":
        prompts = (
            single_prompt(question, better, tokenizer),
            single_prompt(question, worse, tokenizer),
        )
    else:
        prompts = (comparison_prompt(question, better, worse, tokenizer),
                   comparison_prompt(question, worse, better, tokenizer))
    return [(prompts[0], [first]), (prompts[1], [second])]


# --------------------------------------------------------------------------------------------------
# The reward model in use: rl.py asks it


PASS_TOKENS = 65_536  # of one forward pass of the judge at most: memory


class RewardModel:
    """Probabilities that the first of two responses is the better one, in the order given.

    Each comparison is made once. Equal texts are a tie, 0.5, whatever the model would say of its
    first and second place. model: a plain module on this rank. context: tokens of a packed row;
    where a prompt is longer the answer is 0.5 too, and it is counted in too_long.
    """

    def __init__(self, model, tokenizer, context: int, max_rows: int = 32):
        self.model, self.tokenizer = model, tokenizer
        self.context, self.max_rows = context, max_rows
        self.letters = verdict_tokens(tokenizer)
        self.known, self.too_long = {}, 0

    def __call__(self, comparisons: list[tuple[str, str, str]]) -> np.ndarray:
        """(question, one, other) of each -> P(one is better): (n,) float64."""
        for comparison in comparisons:
            if comparison[1] == comparison[2]:
                self.known[comparison] = 0.0
        return sigmoid(self.margins(comparisons, comparison_prompt))

    @torch.inference_mode()
    def margins(self, keys: list[tuple[str, ...]], render: Callable) -> np.ndarray:
        """The logit of A less that of B after the prompt of each key: (n,) float64; nan: too long.

        render: makes token ids of a key and the tokenizer, comparison_prompt or single_prompt.
        """
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        prompts = {key: render(*key, self.tokenizer) for key in new}
        short = [key for key in new if len(prompts[key]) < self.context]
        self.too_long += len(new) - len(short)
        self.known |= dict.fromkeys(new, math.nan)
        weight = self.model.lm_head.weight[list(self.letters)]  # (2, C): no other logits are needed
        longest = max((len(prompts[key]) for key in short), default=1)
        size = row_size(longest + 1, self.context)  # with the verdict; a row for each at most
        per_pass = max(1, min(self.max_rows * self.context // longest, PASS_TOKENS // size))
        for first in range(0, len(short), per_pass):
            part = short[first:first + per_pass]
            rows = pack([(prompts[key], [self.letters[0]]) for key in part], size)
            rows = rows.to(weight.device)
            logits = (loop.response_hidden_states(self.model, rows) @ weight.T).double()
            self.known |= zip(part, (logits[:, 0] - logits[:, 1]).tolist())
        return np.array([self.known[key] for key in keys])


class BradleyTerry(RewardModel):
    """The rival: a score r of each response alone, P(one is better) = sigmoid(r(one) - r(other)).

    arXiv 2203.02155, eq. 1. Its orders cannot disagree. r is the margin of A over B: no head of its
    own is needed.
    """

    def __call__(self, comparisons: list[tuple[str, str, str]]) -> np.ndarray:
        ones = self.margins([(question, one) for question, one, _ in comparisons], single_prompt)
        others = self.margins(
            [(question, other) for question, _, other in comparisons], single_prompt
        )
        return sigmoid(ones - others)


KINDS = {"pairwise": RewardModel, "bradley_terry": BradleyTerry}


def sigmoid(margins: np.ndarray) -> np.ndarray:
    """(n,) float64; 0.5 for nan."""
    return 1 / (1 + np.exp(-np.nan_to_num(margins)))


def load_reward_model(folder: Path, device, dtype: torch.dtype, context: int) -> RewardModel:
    """The model of a checkpoint of this phase, or of an exported one: then it is pairwise."""
    meta = common.read_meta(folder) if (folder / "meta.json").is_file() else {}
    kind = KINDS.get(meta.get("reward", {}).get("kind", "pairwise"))
    if kind is None:
        raise UserError(f"{folder} is no reward model: its kind is none of {', '.join(KINDS)}")
    model, tokenizer = hf.load(folder, device, dtype, checked=True)
    return kind(model, tokenizer, context)


def swapped(comparisons: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(question, other, one) for question, one, other in comparisons]


@dataclass
class GroupVerdict:
    """Of one group of responses."""
    rewards: np.ndarray  # (G,): the share of comparisons won, each order half; mean about 0.5
    disagreement: float  # mean difference of the two orders: how far the model may be trusted


def group_rewards(
    reward_model: Callable, groups: list[tuple[str, list[str]]], n_opponents: int, seed: int
) -> list[GroupVerdict]:
    """Each response against others of its group.

    reward of i = mean over its opponents j of (P(i beats j) + P(j does not beat i)) / 2. groups:
    (question, responses). n_opponents: of each, drawn without replacement; 0: all of the group.
    """
    rng = np.random.default_rng(seed)
    comparisons, ends = [], [0]  # of all responses, one after the other
    for question, responses in groups:
        for i, response in enumerate(responses):
            opponents = [j for j in range(len(responses)) if j != i]
            if n_opponents:
                opponents = rng.permutation(opponents)[:n_opponents].tolist()
            comparisons += [(question, response, responses[j]) for j in opponents]
            ends.append(len(comparisons))
    first_wins = reward_model(comparisons)
    second_loses = 1 - reward_model(swapped(comparisons))
    wins = mean_per_slice((first_wins + second_loses) / 2, ends)
    differences = mean_per_slice(abs(first_wins - second_loses), ends)
    verdicts, begin = [], 0
    for _, responses in groups:
        group = slice(begin, begin + len(responses))
        verdicts.append(GroupVerdict(np.array(wins[group]), float(np.mean(differences[group]))))
        begin = group.stop
    return verdicts


def mean_per_slice(values: np.ndarray, ends: list[int]) -> list[float]:
    """The mean of the values between two ends each; 0.5 where there are none."""
    means = []
    for begin, end in zip(ends, ends[1:]):
        means.append(float(values[begin:end].mean()) if begin < end else 0.5)
    return means


def win_rates(reward_model: Callable, comparisons: list[tuple[str, str, str]]) -> np.ndarray:
    """How surely the response wins in each (question, response, reference), both orders: (n,)."""
    return (reward_model(comparisons) + 1 - reward_model(swapped(comparisons))) / 2


# --------------------------------------------------------------------------------------------------
# One step, and what the model is worth


def train_step(model, sequences: list, cfg: RewardConfig, dist: Dist) -> float:
    """Adds up the gradient of the global batch's mean loss; returns that loss, in nats.

    pairwise: mean over verdicts of -log p(verdict). bradley_terry: mean over pairs of -log P(better
    is better) (arXiv 2203.02155, eq. 1). sequences: of both_orders, a pair's two side by side.
    """
    (n_verdicts,) = dist.sum(len(sequences))
    total = 0.0
    per_pass = 2 * cfg.micro_pairs or len(sequences)
    for part in loop.micro_batches(model, len(sequences), per_pass):
        rows = pack(sequences[part], cfg.context).to(dist.device)
        hidden = loop.response_hidden_states(model, rows)  # (N, C)
        head = model.lm_head.weight
        if cfg.kind == "bradley_terry":
            first, second = rows["targets"][:2]  # A and B
            scores = (hidden @ (head[first] - head[second])).to(wide_type(hidden))
            loss = -F.logsigmoid(scores[::2] - scores[1::2]).sum() / (n_verdicts / 2)
        else:
            nats = linear_cross_entropy(hidden, head, rows["targets"], kernels=model.cfg.kernels)
            loss = nats / n_verdicts
        (loss * dist.world).backward()
        total = total + loss.detach()
    return dist.sum(float(total))[0]


def grade(reward_model: Callable, held_out: list[dict]) -> dict[str, float]:
    """Shares of held-out pairs that are judged right, by name, and how many pairs there are.

    "accuracy": in both orders; "first", "second": in each order alone; "orders agree"; and accuracy
    where the better response is the longer one, the shorter one, and of matched length.
    """
    comparisons = [(pair["question"], pair["better"], pair["worse"]) for pair in held_out]
    first = reward_model(comparisons)
    second = 1 - reward_model(swapped(comparisons))
    first_right, second_right = first > 0.5, second > 0.5
    is_right = first_right & second_right
    better_length = np.array([len(better) for _, better, _ in comparisons])
    worse_length = np.array([len(worse) for _, _, worse in comparisons])
    matched = abs(better_length - worse_length) <= 0.1 * np.maximum(better_length, worse_length)
    shares = {
        "accuracy": is_right,
        "first": first_right,
        "second": second_right,
        "orders agree": (first - 0.5) * (second - 0.5) > 0,  # what is undecided does not agree
        "better is longer": is_right[~matched & (better_length > worse_length)],
        "better is shorter": is_right[~matched & (better_length < worse_length)],
        "matched length": is_right[matched],
    }
    scores = {name: float(values.mean()) for name, values in shares.items() if len(values)}
    return scores | {"pairs": len(held_out)}


def evaluate_held_out(run: loop.Run, log: loop.Log) -> None:
    """Grades the model on the held-out preferences: printed, and written to held_out.json."""
    cfg = run.cfg
    reward_model = KINDS[cfg.kind](run.unsharded_model(), run.tokenizer, cfg.context)
    held_out, _ = run.dist.from_main(lambda: read_preferences(cfg.held_out, "test"))
    scores = grade(reward_model, held_out)
    if not run.dist.is_main:
        return
    n_pairs = scores["pairs"]
    cells = [f"{name} {value:.3f}" for name, value in scores.items() if name != "pairs"]
    note = ""
    if reward_model.too_long:
        note = f"; {reward_model.too_long} prompts were too long, so their pairs not judged right"
    print(f"held-out preferences: {', '.join(cells)}, {n_pairs} pairs{note}")
    common.write_atomic(run.folder / "held_out.json", json.dumps(scores))
    log.track({"step": run.step - 1, "held_out": scores})


# --------------------------------------------------------------------------------------------------
# The run


def prepare_pairs(run: loop.Run, preferences: list[dict], left_out: Counter) -> list:
    """Each preference as two sequences, those longer than a row left out; prints how many."""
    cfg = run.cfg
    pairs = []
    for preference in preferences:
        sequences = both_orders(preference, run.tokenizer, cfg.kind)
        if all(len(prompt) < cfg.context for prompt, _ in sequences):
            pairs.append(sequences)
    left_out[f"longer than {cfg.context} tokens"] = len(preferences) - len(pairs)
    if not pairs:
        reasons = "".join(f"; {n} {reason}" for reason, n in left_out.items())
        raise UserError(f"reward.preferences has no pair to train on{reasons}")
    if run.dist.is_main:
        reasons = "".join(f", {n} left out ({reason})" for reason, n in left_out.items() if n)
        print(f"{len(pairs):,} preferences{reasons}")
    return pairs


def main():
    config = load_config(
        __doc__, model=ModelConfig, tokenizer=TokenizerConfig, reward=RewardConfig)
    cfg = config.reward
    dist = common.init_distributed(cfg.dtype, cfg.shard_size, cfg.timeout_minutes)
    check_settings(cfg, dist.world)
    run = loop.start("reward", config, dist, "distill", UNUSED)
    preferences, left_out = dist.from_main(lambda: read_preferences(cfg.preferences, "train"))
    pairs = prepare_pairs(run, preferences, left_out)
    n_steps = max(1, round(config.scale * cfg.epochs * len(pairs) / cfg.batch_pairs))
    plan = [Stage(name="reward model", first_step=0, n_steps=n_steps,
                  settings=Schedule([1, cfg.lr_end], cfg.curve))]

    key = [cfg.seed, common.hash_json(preferences), str(run.source), cfg.batch_pairs, cfg.context]
    loop.load_or_resume(run, lambda step: [*key, cfg.kind])
    model, optimizer = run.model, run.optimizer

    log = loop.Log(run, n_steps)
    stop_signal = common.StopSignal(dist)
    for step in range(run.first_step, n_steps):
        started = time.time()
        stage = stage_at(plan, step)
        lr = learning_rate(cfg.lr, stage, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        batch = loop.batch_of_step(step, len(pairs), cfg, dist)
        sequences = [sequence for i in batch for sequence in pairs[i]]
        loss = train_step(model, sequences, cfg, dist)
        grad_norm = common.clip_grad_norm(model, cfg.grad_clip)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
        else:  # what is not finite never enters the weights; ten in a row are an error
            log.skip_step(step, loss, grad_norm, data=f"pairs {batch.tolist()}")
        optimizer.zero_grad(set_to_none=True)
        seconds = time.time() - started
        n_verdicts = 2 * cfg.batch_pairs
        lengths = [len(prompt) + len(verdict) for prompt, verdict in sequences]
        log.step(step, stage, loss, lr, grad_norm, n_verdicts, lengths, seconds)

        stop = stop_signal.on_any_rank()
        if run.save_is_due(step + 1, stage) or stop:
            run.save(step + 1, stage, must_succeed=stop or step + 1 == n_steps)
        if stop:
            stop_signal.leave(step + 1)
    log.close()
    if cfg.held_out:
        evaluate_held_out(run, log)
    sys.stdout.flush()


if __name__ == "__main__":
    common.cli(main)
