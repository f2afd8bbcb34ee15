"""Preference pairs: which samples make one, the file they stand in, and the rows of a step.

The report (arXiv 2512.06266, DPD): the positive is a teacher's sample, the best by scores and rules; the negative is
the student's own, and clearly worse. What "best" and "clearly worse" mean is our choice: see positive() and negative().
"""
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import UserError
from data.chat import template
from data.refine.refinement import split_thoughts
from data.chat.template import after_thoughts

SIDES = ("chosen", "rejected")  # of a pair, in this order wherever both stand
CHOSEN, REJECTED = 0, 1


@dataclass
class Pair:
    """One prompt with a better and a worse response, as token ids; each response has at least one."""
    number: int          # of its problem, or its line in a file
    task: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def positive(samples: list[dict], right: float) -> dict | None:
    """The best of a teacher's samples of one prompt: it scores at least `right`, its thoughts are closed, and of these
    it is the one that the teacher finds most likely; None where there is none.

    A sample: {"text", "tokens", "finish_reason", "score" (None: could not be scored), "logprob" (mean of its tokens, when it
    was drawn)}. Those that were cut off, or are empty, are not looked at.
    """
    good = [s for s in _whole(samples) if s["score"] >= right and after_thoughts(s["text"])]
    return max(good, key=lambda s: s["logprob"], default=None)


def negative(samples: list[dict], most: float) -> dict | None:
    """Of the student's samples that score at most `most`, the one that it finds most likely: there it is confidently
    wrong."""
    worse = [s for s in _whole(samples) if s["score"] <= most]
    return max(worse, key=lambda s: s["logprob"], default=None)


def _whole(samples: list[dict]) -> list[dict]:
    return [s for s in samples if s["finish_reason"] == "stop" and s["text"].strip() and s["score"] is not None]


# ---------------------------------------------------------------------------------------------------------------------
# The file: a line a pair

def record_of(number: int, task: str, question: str, chosen: dict, rejected: dict, writers: tuple[str, str]) -> dict:
    """A line of pairs.jsonl: texts to read, tokens to train on, scores, and who wrote them."""
    side = lambda sample, writer: {key: sample[key] for key in ("text", "score", "logprob", "tokens")
                                   if key in sample} | {"writer": writer}
    return {"number": number, "task": task, "prompt": question, "chosen": side(chosen, writers[CHOSEN]),
            "rejected": side(rejected, writers[REJECTED])}


def read_pairs(path: Path, tokenizer, context: int, on_bad_line: str = "skip") -> tuple[list[Pair], Counter]:
    """All pairs of a JSON Lines file, and how many were left out, by the reason.

    "prompt": a question, or messages; "chosen", "rejected": a text, messages that end with it, or {"text", "tokens"}
    (tokens as they were sampled: nothing is decoded and encoded again). Left out: what does not fit into a row of
    `context`, and with on_bad_line="skip" lines that are no pair, which are named; "stop" raises UserError for these.
    """
    pairs, left_out = [], Counter()
    try:
        lines = path.read_text().split("\n")  # not splitlines(): JSON may hold U+2028 and the like
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the pairs in {path}: {error}") from None
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            pair = _pair(json.loads(line), number, tokenizer)
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            reason = "the line is cut or no JSON" if isinstance(error, json.JSONDecodeError) else (
                f"{error} is missing" if isinstance(error, KeyError) else str(error))
            if on_bad_line == "stop":
                raise UserError(f"{path}:{number + 1}: {reason}") from None
            print(f"warning: {path}:{number + 1}: {reason}; left out", flush=True)
            left_out["no pair"] += 1
            continue
        if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) > context:
            left_out[f"longer than {context} tokens"] += 1
        else:
            pairs.append(pair)
    return pairs, left_out


def _pair(record: dict, number: int, tokenizer) -> Pair:
    if not isinstance(record, dict):
        raise ValueError("the line is no JSON object")
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = template.render(messages, tokenizer, add_generation_prompt=True)
    sides = [_response(record[side], side, messages, ids, tokenizer) for side in SIDES]
    if sides[CHOSEN] == sides[REJECTED]:
        raise ValueError("chosen and rejected are the same")
    return Pair(record.get("number", number), record.get("task", ""), ids, *sides)


def _response(given, side: str, messages: list[dict], prompt: list[int], tokenizer) -> list[int]:
    if isinstance(given, dict) and given.get("tokens"):
        if not all(isinstance(t, int) and 0 <= t < tokenizer.n_vocab for t in given["tokens"]):
            raise ValueError(f"{side} has tokens that this tokenizer does not have")
        return given["tokens"]
    said = given[-1] if isinstance(given, list) and given else {
        "content": given["text"] if isinstance(given, dict) else given}
    if said.get("role", "assistant") != "assistant":
        raise ValueError(f"{side} must end with an assistant's message")
    text = said["content"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{side} is empty: it needs at least one token after the prompt")
    if after_thoughts(text) is None:
        raise ValueError(f"{side} never closes its <think>")
    thoughts, content = split_thoughts(text)
    answer = said | {"role": "assistant", "content": content, "reasoning": said.get("reasoning") or thoughts}
    whole = template.render([*messages, answer], tokenizer)
    end = len(whole) - whole[::-1].index(tokenizer.special["<|im_end|>"])  # no line break behind it
    if whole[:len(prompt)] != prompt:
        raise ValueError(f"{side} begins with blanks that are one token with the prompt's end")
    return whole[len(prompt):end]


# ---------------------------------------------------------------------------------------------------------------------
# Which pairs a step takes

def order(n: int, first: int, count: int, seed: int) -> np.ndarray:
    """Pairs first … first + count - 1 of an endless stream of n, each epoch another permutation: (count,) int64."""
    epochs = range(first // n, -(-(first + count) // n))
    stream = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    return stream[first - first // n * n:][:count]


def sequences_of(pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of both sides of each pair, as data.chat.packing.pack takes them: sequence 2 * pair + side."""
    return [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]


# ---------------------------------------------------------------------------------------------------------------------
# A teacher on disk

class TopK:
    """The teacher's k likeliest tokens at each response token of each pair, most likely first: files of k ids (int32)
    and k log-probabilities (float16), 6 bytes * k a token, the pairs' chosen and rejected one after the other."""

    def __init__(self, folder: Path, pairs: list[Pair], k: int, new: bool = False):
        self.k, self.length = k, [len(pair.chosen) + len(pair.rejected) for pair in pairs]
        self.first, self.files = np.cumsum([0, *self.length]), {}
        for name, dtype in (("ids", np.int32), ("logprobs", np.float16)):
            path, shape = folder / f"top{k}_{name}.npy", (int(self.first[-1]), k)
            if not new and not path.is_file():
                raise UserError(f"there is no {path}: name distill.teacher, or put the file there")
            file = self.files[name] = np.lib.format.open_memmap(path, "w+" if new else "r+", dtype, shape)
            if file.shape != shape:
                raise UserError(f"{path} has the shape {file.shape}, these pairs and top_k need {shape}: delete it")

    def of(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and log-probabilities, (N, k) each, in the order of pack()."""
        at = np.concatenate([self.first[i] + np.arange(self.length[i]) for i in pairs])
        return self.files["ids"][at], self.files["logprobs"][at]
