"""Phase 4a, the pairwise reward model: says in one token, A or B, which of two responses is better.

    python reward.py configs/tiny.py                 # after distill.py; the last stage of rl.py uses it

The report (arXiv 2512.06266, RL) trains a dedicated model for this, and is silent on how: our choice is the next-token
loss on the verdict alone, on both orders of each pair, so that the place of a response cannot matter. pairwise.py has
the prompt, and what rl.py makes of the verdicts.

Shapes: N verdicts of a batch (two a pair), C width.
"""
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch.nn.functional as F

import common
import hf
import loop
from common import UserError
from data.text import sources
from data.chat.packing import pack
from data.chat.pairs import order
from data.tasks import taste
from data.text.tokenizer import Tokenizer
from kernels.cross_entropy import linear_cross_entropy, wide_type
from model import ModelConfig
from pairwise import KINDS, Judge, prompt_alone, prompt_of, verdicts

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(kw_only=True)
class RewardConfig(loop.TrainConfig):
    preferences: list            # sources: {"taste": pairs, "noise", "seed"}, or path and hf ones of data/text/sources.py
    held_out: list = field(default_factory=list)  # the same, for the table at the end
    kind: str = "pairwise"       # or "bradley_terry": a score of each response alone (see pairwise.BradleyTerry)
    context: int = 256           # tokens of a packed row; longer pairs are left out
    batch_pairs: int = 32        # pairs of a global batch, each in both orders
    epochs: float = 1.0          # over the pairs
    lr_end: float = 0.1          # the rate's end, as a share of lr
    curve: str = "cosine"        # how it goes there: linear, 1-sqrt, cosine


# ---------------------------------------------------------------------------------------------------------------------
# Preferences

def preference_of(record: dict) -> dict | None:
    """{"question", "better", "worse"} of a record; None for a tie, or equal texts. ValueError for an unknown form:

    {"question", "better", "worse"}; HelpSteer3 (context, response1, response2, overall_preference from -3 to 3);
    UltraFeedback binarized and the like (prompt, chosen, rejected: texts or messages; score_chosen, score_rejected).
    """
    text = lambda said: said if isinstance(said, str) else "\n".join(message["content"] for message in said)
    last = lambda said: said if isinstance(said, str) else said[-1]["content"]
    if {"question", "better", "worse"} <= record.keys():
        return record if record["better"] != record["worse"] else None
    if {"context", "response1", "response2", "overall_preference"} <= record.keys():
        responses, better = (record["response1"], record["response2"]), record["overall_preference"]
        if better == 0 or responses[0] == responses[1]:
            return None
        first, second = responses if better < 0 else responses[::-1]
        return {"question": text(record["context"]), "better": first, "worse": second, "gap": abs(better)}
    if {"prompt", "chosen", "rejected"} <= record.keys():
        gap = (record.get("score_chosen") or 0) - (record.get("score_rejected") or 0)
        if "score_chosen" in record and gap == 0 or last(record["chosen"]) == last(record["rejected"]):
            return None
        return {"question": text(record["prompt"]), "better": last(record["chosen"]), "worse": last(record["rejected"]),
                "gap": gap}
    raise ValueError(f"no preference: it has {', '.join(record)}; see reward.preference_of for what is known")


def preferences(given: list[dict], split: str) -> tuple[list[dict], Counter]:
    """All preferences of the sources, and what was left out."""
    found, left_out, place = [], Counter(), sources.ReadPosition()
    for source in given:
        if "taste" in source:
            found += taste.pairs(split, source["taste"], source.get("seed", 0), source.get("noise", 0.0))
            continue
        if fault := sources.invalid_reason(source):
            raise UserError(f"{fault}; or \"taste\"")
        found += islice(of_source(source, place, left_out), source.get("documents"))
    return found, left_out + Counter({"bad lines": place.bad})


def of_source(source: dict, place: sources.ReadPosition, left_out: Counter) -> Iterator[dict]:
    for where in sources.shards(source):
        for number, record in sources.read(source, where, bad_line=place.bad_line):
            try:
                preference = preference_of(record)
            except (ValueError, TypeError, KeyError, IndexError) as error:
                place.bad_line(f"{where}:{number}", str(error))
                continue
            if preference:
                yield preference
            else:
                left_out["ties"] += 1


def both_orders(preference: dict, tokenizer, kind: str = "pairwise") -> list[tuple[list[int], list[int]]]:
    """(prompt, verdict) with the better response first, then second: swapping the texts flips the verdict. With
    "bradley_terry" of the better response alone, then of the worse."""
    question, better, worse = (preference[key] for key in ("question", "better", "worse"))
    first, second = verdicts(tokenizer)
    if kind == "bradley_terry":
        return [(prompt_alone(question, better, tokenizer), [first]),
                (prompt_alone(question, worse, tokenizer), [second])]
    return [(prompt_of(question, better, worse, tokenizer), [first]),
            (prompt_of(question, worse, better, tokenizer), [second])]


# ---------------------------------------------------------------------------------------------------------------------
# One step, and what the model is worth

def train_step(model, sequences: list, p: RewardConfig, d) -> float:
    """Adds up the gradient of the mean over verdicts of -log p(verdict), or over pairs of -log P(better is better) by
    Bradley and Terry (arXiv 2203.02155, eq. 1); returns that loss, in nats. sequences: of both_orders, a pair's two
    side by side."""
    (n,) = d.sum(len(sequences))
    rows = loop.as_tensors(pack(sequences, p.context), d.device)
    common.set_gradient_sync(model, last_micro_batch=True)
    hidden, head = loop.hidden_of(model, rows), model.lm_head.weight
    if p.kind == "bradley_terry":
        first, second = rows["targets"][:2]  # A and B
        scores = (hidden @ (head[first] - head[second])).to(wide_type(hidden))
        loss = -F.logsigmoid(scores[::2] - scores[1::2]).sum() / (n / 2)
    else:
        loss = linear_cross_entropy(hidden, head, rows["targets"], kernels=model.cfg.kernels) / n
    (loss * d.world).backward()
    return d.sum(loss.item())[0]


def grade(judge: Judge, held_out: list[dict]) -> dict[str, float]:
    """Shares of held-out pairs: judged right in both orders ("accuracy"), each order alone, both orders agreeing, and
    accuracy where the better response is the longer one, the shorter one, and of matched length."""
    asked = [(p["question"], p["better"], p["worse"]) for p in held_out]
    forth, back = judge(asked), 1 - judge([(q, b, a) for q, a, b in asked])
    right, agree = (forth > 0.5) & (back > 0.5), (forth > 0.5) == (back > 0.5)
    longer = np.array([len(better) - len(worse) for _, better, worse in asked])
    matched = abs(longer) <= 0.1 * np.array([max(len(a), len(b)) for _, a, b in asked])
    found = {"accuracy": right, "first": forth > 0.5, "second": back > 0.5, "orders agree": agree}
    for name, which in (("better is longer", ~matched & (longer > 0)), ("better is shorter", ~matched & (longer < 0)),
                        ("matched length", matched)):
        found[name] = right[which]
    return {name: float(values.mean()) for name, values in found.items() if len(values)} | {"pairs": len(held_out)}


# ---------------------------------------------------------------------------------------------------------------------
# The run

def main():
    cfg = common.load_config(__doc__, model=ModelConfig, reward=RewardConfig)
    p = cfg.reward
    loop.check_settings("reward", p, [loop.OneStage(0, [1, p.lr_end], p.curve)])
    if p.kind not in KINDS:
        raise UserError(f"reward.kind must be one of {', '.join(KINDS)}, not {p.kind!r}")
    d = common.init_distributed(p.dtype, p.shard_size)
    if p.batch_pairs % d.world:
        raise UserError(f"reward.batch_pairs={p.batch_pairs} is no multiple of the {d.world} processes")
    source = hf.resolve_checkpoint(d, cfg.init_from or "distill", cfg.out)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    loop.set_vocab_size(cfg.model, tokenizer.n_vocab)
    found, left_out = preferences(p.preferences, "train")
    pairs = [pair for pair in (both_orders(preference, tokenizer, p.kind) for preference in found)
             if all(len(prompt) < p.context for prompt, _ in pair)]
    left_out[f"longer than {p.context} tokens"] = len(found) - len(pairs)
    if not pairs:
        raise UserError("reward.preferences has no pair to train on"
                        + "".join(f"; {n} {why}" for why, n in left_out.items()))
    stage = loop.OneStage(max(1, round(cfg.scale * p.epochs * len(pairs) / p.batch_pairs)), [1, p.lr_end], p.curve,
                          name="reward model")
    if d.is_main:
        print(f"{len(pairs):,} preferences" + "".join(f", {n} left out ({why})" for why, n in left_out.items() if n))

    run = loop.Run("reward", cfg, p, tokenizer, source / "tokenizer.json", d)
    past = [p.seed, common.hash_json(found), str(source), p.batch_pairs, p.context, p.kind]
    newest = common.find_checkpoint(d, run.folder)
    if newest:
        run.resume(newest, True, lambda step: past)
    else:
        run.model.rope_theta = hf.load_initial_weights(d, run.model, tokenizer, source)
    for step in run.steps(stage.n_steps):
        lr = loop.learning_rate(p, stage, stage, step)
        mine = order(len(pairs), step * p.batch_pairs, p.batch_pairs, p.seed)[d.rank::d.world]
        loss = train_step(run.model, [sequence for i in mine for sequence in pairs[i]], p, d)
        grad_norm = run.update(loss, lr, where=lambda: f"pairs {mine.tolist()}")
        run.done(stage.name, loss, lr, grad_norm, 2 * p.batch_pairs, (1, 2 * p.batch_pairs))
        run.save(stage, ("model", "reward"), past)
    if p.held_out:
        plain = run.plain()
        judge = KINDS[p.kind](plain, tokenizer, p.context)
        scores = grade(judge, preferences(p.held_out, "test")[0])
        if d.is_main:
            print("held-out preferences: " + ", ".join(f"{name} {value:.3f}" if name != "pairs" else f"{value} pairs"
                                                      for name, value in scores.items())
                  + f"; {judge.too_long} prompts were too long, so their pairs not judged right" * (judge.too_long > 0))
            common.write_atomic(run.folder / "held_out.json", json.dumps(scores))
    sys.stdout.flush()


if __name__ == "__main__":
    common.cli(main)
