"""The pairwise reward model in use: asks a checkpoint which of two responses is better, and makes rewards of that.

The report (arXiv 2512.06266, RL) has a dedicated model that answers in a few tokens, for speed and because it is harder
to hack; how it is trained and how its verdicts become rewards is not published: our choice. reward.py trains it.
"""
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import common
import hf
import loop
from common import UserError
from data.chat import template
from data.chat.packing import pack

PROMPT = "{question}\nA: {a}\nB: {b}\nBetter:"
ALONE = "{question}\nReply: {reply}\nGood:"  # of a Bradley-Terry model
LETTERS = ("A", "B")


def verdicts(tokenizer) -> tuple[int, int]:
    """The token of each verdict. It follows the opened turn of the assistant as a token of its own, so it cannot merge
    with what is before it."""
    ids = [tokenizer.encode(letter) for letter in LETTERS]
    if any(len(each) != 1 for each in ids):
        raise UserError(f"{tokenizer.name} has no single token for each of {' and '.join(LETTERS)}: no verdict of one "
                        "token can be had of it")
    return tuple(each[0] for each in ids)


def as_prompt(content: str, tokenizer) -> list[int]:
    """Token ids of a conversation in which the user says this, up to where the assistant answers."""
    return template.render([{"role": "user", "content": content}], tokenizer, add_generation_prompt=True)


def prompt_of(question: str, a: str, b: str, tokenizer) -> list[int]:
    return as_prompt(PROMPT.format(question=question, a=a, b=b), tokenizer)


def prompt_alone(question: str, reply: str, tokenizer) -> list[int]:
    return as_prompt(ALONE.format(question=question, reply=reply), tokenizer)


class Judge:
    """Probabilities that the first of two responses is the better one, in the order given; each is asked for once.

    Equal texts are a tie, 0.5, whatever the model would say of its first and second place. model: a plain module on
    this rank. context: tokens of a packed row; where a prompt is longer the answer is 0.5 too, and it is counted.
    """

    def __init__(self, model, tokenizer, context: int, max_rows: int = 32):
        self.model, self.tokenizer, self.context, self.max_rows = model, tokenizer, context, max_rows
        self.letters, self.known, self.too_long = verdicts(tokenizer), {}, 0

    def __call__(self, asked: list[tuple[str, str, str]]) -> np.ndarray:
        """(question, one, other) of each -> P(one is better): (n,) float64."""
        self.known |= {key: 0.0 for key in asked if key[1] == key[2]}
        return chances(self.margins(asked, prompt_of))

    @torch.inference_mode()
    def margins(self, keys: list[tuple[str, ...]], render: Callable) -> np.ndarray:
        """The logit of A less that of B after the prompt of each key: (n,) float64; nan where it is too long.

        render: makes token ids of a key and the tokenizer, prompt_of or prompt_alone."""
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        prompts = {key: render(*key, self.tokenizer) for key in new}
        short = [key for key in new if len(prompts[key]) < self.context]
        self.too_long += len(new) - len(short)
        self.known |= dict.fromkeys(new, math.nan)
        weight = self.model.lm_head.weight[list(self.letters)]  # (2, C): no other logits are needed
        per_pass = max(1, self.max_rows * self.context // max((len(prompts[key]) for key in short), default=1))
        for first in range(0, len(short), per_pass):
            part = short[first:first + per_pass]
            rows = pack([(prompts[key], [self.letters[0]]) for key in part], self.context)
            logits = (loop.hidden_of(self.model, loop.as_tensors(rows, weight.device)) @ weight.T).double()
            self.known |= dict(zip(part, (logits[:, 0] - logits[:, 1]).tolist()))
        return np.array([self.known[key] for key in keys])


class BradleyTerry(Judge):
    """The rival: a score r of each response alone, and P(one is better) = sigmoid(r(one) - r(other)) (arXiv 2203.02155,
    eq. 1). Its orders cannot disagree. r is the margin of A over B: no head of its own is needed."""

    def __call__(self, asked: list[tuple[str, str, str]]) -> np.ndarray:
        one, other = (self.margins([(key[0], key[place]) for key in asked], prompt_alone) for place in (1, 2))
        return chances(one - other)


def chances(margins: np.ndarray) -> np.ndarray:
    """Their sigmoid, (n,) float64; 0.5 for nan."""
    return 1 / (1 + np.exp(-np.nan_to_num(margins)))


KINDS = {"pairwise": Judge, "bradley_terry": BradleyTerry}


def load(folder: Path, device, dtype: torch.dtype, context: int) -> Judge:
    """The judge of a checkpoint of reward.py, or of an exported one, which is taken to be pairwise."""
    meta = common.read_meta(folder) if (folder / "meta.json").is_file() else {}
    kind = KINDS[meta.get("reward", {}).get("kind", "pairwise")]
    return kind(*hf.load(folder, device, dtype), context)


@dataclass
class Verdicts:
    """Of one group of responses."""
    rewards: np.ndarray  # (G,): the share of comparisons won, both orders counted half; their mean is about 0.5
    disagreement: float  # mean difference of the two orders' verdicts: how far the judge may be trusted


def group_rewards(judge: Judge, groups: list[tuple[str, list[str]]], opponents: int, seed: int) -> list[Verdicts]:
    """Each response against others of its group: reward = mean over these of (P(i beats j) + P(j does not beat i)) / 2.

    groups: (question, responses). opponents: of each, drawn without replacement; 0: all of the group.
    """
    rng, matches = np.random.default_rng(seed), []
    for question, responses in groups:
        for i in range(len(responses)):
            others = [j for j in range(len(responses)) if j != i]
            drawn = others if not opponents else rng.permutation(others)[:opponents].tolist()
            matches.append([(responses[i], responses[j]) for j in drawn])
    questions = [question for question, responses in groups for _ in responses]
    asked = [(question, *pair) for question, pairs in zip(questions, matches) for pair in pairs]
    forth = judge(asked)
    back = 1 - judge([(question, b, a) for question, a, b in asked])
    ends = np.cumsum([0, *map(len, matches)])
    mean = lambda values, i: float(values[ends[i]:ends[i + 1]].mean()) if ends[i] < ends[i + 1] else 0.5
    found, numbers = [], itertools.count()
    for _, responses in groups:
        mine = list(itertools.islice(numbers, len(responses)))
        found.append(Verdicts(np.array([mean((forth + back) / 2, i) for i in mine]),
                              float(np.mean([mean(abs(forth - back), i) for i in mine]))))
    return found


def win_rates(judge: Judge, asked: list[tuple[str, str, str]]) -> np.ndarray:
    """(question, response, reference) of each -> how surely the response wins, both orders: (n,)."""
    return (judge(asked) + 1 - judge([(question, b, a) for question, a, b in asked])) / 2
