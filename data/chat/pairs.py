"""Preference pairs: which samples make one, the file they stand in, a teacher on disk.

The report (arXiv 2512.06266, DPD): the positive is a teacher's sample, the best by scores and
rules; the negative is the student's own, and clearly worse. What "best" and "clearly worse" mean is
our choice: see choose_positive() and choose_negative().
"""
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import UserError
from data.chat import template
from data.chat.template import after_thoughts, split_thoughts

SIDES = ("chosen", "rejected")  # of a pair, in this order wherever both stand
CHOSEN, REJECTED = 0, 1


@dataclass
class Pair:
    """One prompt with a better and a worse response, as token ids; each has at least one."""
    number: int          # of its problem, or its line in a file
    task: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    teacher_prompt: list[int] | None = None  # where the teacher is asked with a system turn


def to_sequences(
    pairs: list[Pair], for_teacher: bool = False
) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of both sides of each pair, as data.chat.packing.pack takes them:
    sequence 2 * pair + side."""
    sequences = []
    for pair in pairs:
        prompt = pair.prompt
        if for_teacher and pair.teacher_prompt:
            prompt = pair.teacher_prompt
        sequences += [(prompt, pair.chosen), (prompt, pair.rejected)]
    return sequences


# --------------------------------------------------------------------------------------------------
# Which samples make a pair


def choose_positive(samples: list[dict], min_score: float) -> dict | None:
    """The best of a teacher's samples of one prompt, or None.

    It scores at least `min_score`, its thoughts are closed, and of these it is the one that the
    teacher finds most likely. A sample: {"text", "tokens", "finish_reason", "score" (None: could
    not be scored), "logprob" (mean of its tokens, when it was drawn)}. Those that were cut off, or
    are empty, are not looked at.
    """
    good = []
    for sample in usable_samples(samples):
        if sample["score"] >= min_score and after_thoughts(sample["text"]):
            good.append(sample)
    return most_likely(good)


def choose_negative(samples: list[dict], max_score: float) -> dict | None:
    """Of the student's samples that score at most `max_score`, the one that it finds most likely:
    there it is confidently wrong."""
    worse = [sample for sample in usable_samples(samples) if sample["score"] <= max_score]
    return most_likely(worse)


def usable_samples(samples: list[dict]) -> list[dict]:
    """Those that ended, are not empty, and could be scored."""
    usable = []
    for sample in samples:
        ended = sample["finish_reason"] == "stop"
        if ended and sample["text"].strip() and sample["score"] is not None:
            usable.append(sample)
    return usable


def most_likely(samples: list[dict]) -> dict | None:
    """The first of the samples with the highest log-probability; None of none."""
    return max(samples, key=lambda sample: sample["logprob"], default=None)


# --------------------------------------------------------------------------------------------------
# The file: a line per pair


def make_record(
    number: int, task: str, question: str, chosen: dict, rejected: dict, writers: tuple[str, str]
) -> dict:
    """A line of pairs.jsonl: texts to read, tokens to train on, scores, and who wrote them."""
    record = {"number": number, "task": task, "prompt": question}
    for side, sample, writer in zip(SIDES, (chosen, rejected), writers):
        kept = [key for key in ("text", "score", "logprob", "tokens") if key in sample]
        record[side] = {key: sample[key] for key in kept} | {"writer": writer}
    return record


def read_pairs(
    path: Path, tokenizer, context: int, on_bad_line: str = "skip", teacher_system: str = ""
) -> tuple[list[Pair], Counter]:
    """All pairs of a JSON Lines file, and how many were left out, by the reason.

    "prompt": a question, or messages; "chosen", "rejected": a text, messages that end with it, or
    {"text", "tokens"} (tokens as they were sampled: nothing is decoded and encoded again). Left
    out: what does not fit into a row of `context`, and with on_bad_line="skip" lines that are no
    pair, which are named; "stop" raises UserError for these. teacher_system: see template.render;
    the teacher scores the responses behind this system turn.
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
            pair = parse_pair(json.loads(line), number, tokenizer, teacher_system)
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            reason = describe_error(error)
            if on_bad_line == "stop":
                raise UserError(f"{path}:{number + 1}: {reason}") from None
            print(f"warning: {path}:{number + 1}: {reason}; left out", flush=True)
            left_out["no pair"] += 1
            continue
        longest = max(len(pair.chosen), len(pair.rejected))
        if len(pair.teacher_prompt or pair.prompt) + longest > context:
            left_out[f"longer than {context} tokens"] += 1
        else:
            pairs.append(pair)
    return pairs, left_out


def describe_error(error: Exception) -> str:
    """Why a line is no pair, in words."""
    if isinstance(error, json.JSONDecodeError):
        return "the line is cut or no JSON"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error)


def parse_pair(record: dict, number: int, tokenizer, teacher_system: str = "") -> Pair:
    """The pair of a line; ValueError, KeyError and the like where it is none."""
    if not isinstance(record, dict):
        raise ValueError("the line is no JSON object")
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = template.render(messages, tokenizer, add_generation_prompt=True)
    chosen, rejected = (
        parse_response(record[side], side, messages, ids, tokenizer) for side in SIDES)
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    pair = Pair(record.get("number", number), record.get("task", ""), ids, chosen, rejected)
    if teacher_system:
        pair.teacher_prompt = template.render(messages, tokenizer, True, system=teacher_system)
    return pair


def parse_response(
    response, side: str, messages: list[dict], prompt: list[int], tokenizer
) -> list[int]:
    """Token ids of one side of a line.

    response: as the line has it; messages: the prompt as messages; prompt: its token ids.
    """
    if isinstance(response, dict) and response.get("tokens"):
        tokens = response["tokens"]
        if not all(isinstance(token, int) and 0 <= token < tokenizer.n_vocab for token in tokens):
            raise ValueError(f"{side} has tokens that this tokenizer does not have")
        return tokens
    message = parse_message(response)
    if message.get("role", "assistant") != "assistant":
        raise ValueError(f"{side} must end with an assistant's message")
    text = message["content"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{side} is empty: it needs at least one token after the prompt")
    if after_thoughts(text) is None:
        raise ValueError(f"{side} never closes its <think>")
    thoughts, content = split_thoughts(text)
    reasoning = message.get("reasoning") or thoughts
    answer = message | {"role": "assistant", "content": content, "reasoning": reasoning}
    ids, weights = template.render_weighted([*messages, answer | {"weight": 1.0}], tokenizer)
    end = 1 + max(i for i, weight in enumerate(weights) if weight)  # no line break behind it
    if ids[:len(prompt)] != prompt:
        raise ValueError(f"{side} begins with blanks that are one token with the prompt's end")
    return ids[len(prompt):end]


def parse_message(response) -> dict:
    """The assistant's message: the last of messages, or made of a text or {"text"}."""
    if isinstance(response, list) and response:
        return response[-1]
    if isinstance(response, dict):
        return {"content": response["text"]}
    return {"content": response}


# --------------------------------------------------------------------------------------------------
# A teacher on disk


class TopK:
    """The teacher's k likeliest tokens at each response token of each pair, most likely first.

    Two files: k ids (int32) and k log-probabilities (float16), 6 bytes * k per token, the pairs'
    chosen and rejected response one after the other.
    """

    def __init__(self, folder: Path, pairs: list[Pair], k: int, new: bool = False):
        """Opens the files, or makes them where they are `new`; UserError where they do not fit."""
        self.k = k
        self.lengths = [len(pair.chosen) + len(pair.rejected) for pair in pairs]  # in tokens
        self.starts = np.cumsum([0, *self.lengths])
        shape = (int(self.starts[-1]), k)
        self.ids = open_array(folder / f"top{k}_ids.npy", np.int32, shape, new)
        self.logprobs = open_array(folder / f"top{k}_logprobs.npy", np.float16, shape, new)

    def write(self, indices: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Keeps ids and log-probabilities (N, k) of some pairs' tokens, in the order of pack()."""
        first = 0
        for i in indices:
            end = first + self.lengths[i]
            places = slice(self.starts[i], self.starts[i + 1])
            self.ids[places] = ids[first:end]
            self.logprobs[places] = logprobs[first:end]
            first = end

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids and log-probabilities of some pairs' tokens, (N, k) each, in the order of pack()."""
        ranges = [np.arange(self.starts[i], self.starts[i + 1]) for i in indices]
        places = np.concatenate(ranges)
        return self.ids[places], self.logprobs[places]


def open_array(path: Path, dtype, shape: tuple[int, int], new: bool) -> np.ndarray:
    """An array in a .npy file, mapped into memory."""
    if not new and not path.is_file():
        raise UserError(f"there is no {path}: name distill.teacher, or put the file there")
    array = np.lib.format.open_memmap(path, "w+" if new else "r+", dtype, shape)
    if array.shape != shape:
        raise UserError(
            f"{path} has the shape {array.shape}, these pairs and top_k need {shape}: delete it")
    return array
