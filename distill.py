"""Phase 3, Dual Preference Distillation: a student learns from a teacher's good answers and from
its own bad ones.

    python distill.py configs/tiny.py                # after sft.py and tiny_teacher.py
    torchrun --nproc_per_node=8 distill.py configs/3b.py
    python distill.py configs/tiny.py --prepare      # only samples and pairs: sample_pairs.py

The report (arXiv 2512.06266, DPD): positives y+ are the teacher's samples, negatives y- the
student's own, clearly worse. The loss has three parts: a preference of y+ over y-, the teacher's
distribution on y+, and the same on y-: on its own wrong path the student is told what to do
instead. Its equation, weights and the direction of the divergence are not published: our choice is

    L = dpo * mean over pairs of -log sigmoid(beta * (gain(y+) - gain(y-)))
      + kl_chosen   * mean over tokens of y+ of KL(teacher || pi)
      + kl_rejected * mean over tokens of y- of KL(teacher || pi)

    gain(y) = log pi(y) - log ref(y)

with ref the SFT checkpoint, frozen. Preference alone pushes both answers down, y+ too (likelihood
displacement).

Shapes: B rows of a micro-batch, T context, C width, P pairs of a micro-batch, N response tokens in
it.
"""
from settings import (
    Count,
    Curve,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    load_config,
)

import dataclasses
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

import common
import hf
import loop
import sample_pairs
from common import Dist, UserError
from data.chat.packing import pack
from data.chat.pairs import CHOSEN, REJECTED, SIDES, Pair, TopK, to_sequences
from data.text.tokenizer import TokenizerConfig
from data.verify import sandbox
from evaluate import EvaluateConfig
from kernels.cross_entropy import (
    linear_logprobs,
    linear_logprobs_kl,
    linear_topk_kl,
    teacher_topk,
)
from model import ModelConfig
from sample_pairs import Teacher
from sampler import Served, open_checkpoint
from schedule import Schedule, Stage, check_schedule, learning_rate, stage_at

REFERENCE, TEACHER = 0, 1  # in cached log-probabilities (pairs, 2, 2): whose they are

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass(kw_only=True)
class DistillConfig(sample_pairs.PairConfig):  # which has what is sampled and what makes a pair
    batch_pairs: Count = 32      # pairs of a global batch: an optimizer step
    micro_pairs: NonNegativeInt = 0  # pairs of one forward pass on one device; 0: all of the
                                     # device's
    epochs: PositiveFloat = 2.0  # over the pairs
    lr_end: NonNegativeFloat = 0.1  # the rate's end, as a share of lr
    curve: Curve = "cosine"      # how it goes there
    dpo: NonNegativeFloat = 1.0  # weight of the preference
    beta: PositiveFloat = 0.1    # its inverse temperature
    margin: Literal["", "sum", "token"] = ""  # log-probabilities of a response: their sum, or their
                                 # mean (the default for samples beyond 1,000 tokens, whose sums
                                 # saturate the sigmoid)
    kl_chosen: NonNegativeFloat = 1.0  # weight of the distillation on y+
    kl_rejected: NonNegativeFloat = 1.0  # … and on y-
    divergence: Fraction = 0.0   # 0: forward KL, 1: reverse KL, between: generalised Jensen-Shannon
                                 # (arXiv 2306.13649)
    kl_temperature: PositiveFloat = 1.0  # of both distributions in it
    top_k: NonNegativeInt = 0    # keep of the teacher only its k likeliest tokens, on disk, and
                                 # the rest as one
    nll: NonNegativeFloat = 0.0  # weight of the cross-entropy of y+ (with DPO: arXiv 2404.19733)
    compare: bool = True         # also evaluate teacher and start, on the same problems


def check_settings(cfg: DistillConfig, world: int) -> None:
    """Raises UserError for what bounds cannot say. world: processes."""
    check_schedule("DPD", rate_schedule(cfg))
    if cfg.batch_pairs % world:
        raise UserError(
            f"distill.batch_pairs={cfg.batch_pairs} is no multiple of the {world} processes")
    if bool(cfg.problems) == bool(cfg.pairs):
        raise UserError("distill needs either problems, {task: how many}, or pairs, a file")
    needs_teacher = cfg.problems or (uses_kl(cfg) and not cfg.top_k)
    if needs_teacher and not cfg.teacher:
        raise UserError(
            "distill.teacher must be named: it writes the positives, and is what kl_chosen and "
            "kl_rejected learn from (with distill.pairs, and top_k or both of these 0, there need "
            "be none)"
        )
    if cfg.top_k and (cfg.divergence or cfg.kl_temperature != 1 or cfg.refresh_every):
        raise UserError(
            "distill.top_k goes with divergence=0, kl_temperature=1 and refresh_every=0: forward "
            "KL, of what is on disk"
        )
    if not any((cfg.dpo, cfg.kl_chosen, cfg.kl_rejected, cfg.nll)):
        raise UserError(
            "distill needs a term: dpo, kl_chosen, kl_rejected or nll must be above 0")
    if cfg.refresh_every and not cfg.problems:
        raise UserError(
            "distill.refresh_every needs problems: new samples are scored as problems of a task")


def unused_settings(cfg: DistillConfig) -> dict[str, str]:
    """Settings that have no effect beside the others, each with the reason."""
    unused = sample_pairs.unused_settings(cfg)
    if not cfg.dpo:
        unused |= dict.fromkeys(("beta", "margin"), "dpo is 0")
    if not uses_kl(cfg):
        reason = "kl_chosen and kl_rejected are 0"
        unused |= dict.fromkeys(("divergence", "kl_temperature", "top_k"), reason)
    return unused


def rate_schedule(cfg: DistillConfig) -> Schedule:
    """The settings of the only stage."""
    return Schedule([1, cfg.lr_end], cfg.curve)


def uses_kl(cfg: DistillConfig) -> bool:
    """Whether the teacher's distribution is in the loss."""
    return cfg.kl_chosen + cfg.kl_rejected > 0


def margin_per_token(cfg: DistillConfig) -> bool:
    """Whether the margin is of mean log-probabilities: sums over long responses saturate the
    sigmoid."""
    return cfg.margin == "token" or (not cfg.margin and cfg.max_new_tokens > 1000)


# --------------------------------------------------------------------------------------------------
# The loss


def preference_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO (arXiv 2305.18290, eq. 7) of each pair: (P,), in nats; log 2 where the two agree.

    -log sigmoid(beta * ((pi+ - ref+) - (pi- - ref-))), with policy pi and reference ref (P, 2):
    log-probabilities of the chosen (+) and the rejected (-) response.
    """
    gain = policy - reference
    return -F.logsigmoid(beta * (gain[:, CHOSEN] - gain[:, REJECTED]))


def distillation_loss(
    divergence: torch.Tensor, is_side: torch.Tensor, n_tokens: float
) -> torch.Tensor:
    """One side's share of the mean divergence from the teacher per token; a scalar.

    GKD, arXiv 2306.13649, eq. 1. divergence (N,) of all response tokens; is_side (N,) bool: those
    of y+ (the teacher's good path), or of y- (the student's own bad one); n_tokens: that side's in
    the global batch.
    """
    return (divergence * is_side).sum() / n_tokens


def train_step(
    model, kl_teacher, pairs: list[Pair], rank_pairs: np.ndarray, cached_logprobs: np.ndarray,
    cfg: DistillConfig, dist: Dist,
) -> tuple[float, int, dict[str, float]]:
    """Adds up the gradient of the global batch's loss; returns that loss, the response tokens, and
    what the log shows of them.

    rank_pairs: this rank's pairs of the batch; kl_teacher: a model, TopK, or None (no
    distillation); cached_logprobs (pairs, 2, 2): summed log-probabilities of each pair's two
    responses under reference and teacher. All denominators are global, known before the first
    backward pass: pairs, tokens of y+, tokens of y-. FSDP averages gradients over ranks, so the
    loss is scaled by the world size.
    """
    n_rank_tokens = count_response_tokens(pairs, rank_pairs)
    n_pairs, n_chosen, n_rejected = dist.sum(len(rank_pairs), *n_rank_tokens.sum(0))
    pairs_per_pass = cfg.micro_pairs or len(rank_pairs)
    totals = 0
    for part in loop.micro_batches(model, len(rank_pairs), pairs_per_pass):
        indices = rank_pairs[part]
        rows = pack_pairs(pairs, indices, cfg.context, dist.device)
        logprobs, divergence = student_logprobs_and_kl(model, kl_teacher, rows, indices, cfg)
        policy = sum_per_response(logprobs, rows, len(indices))  # (P, 2), as the two cached ones
        cached = torch.from_numpy(cached_logprobs[indices]).to(policy)
        reference, teacher = cached.unbind(1)
        lengths = torch.ones_like(policy)  # what the margin's log-probabilities are divided by
        if margin_per_token(cfg):
            lengths = torch.from_numpy(n_rank_tokens[part]).to(policy)

        preference = preference_loss(policy / lengths, reference / lengths, cfg.beta)
        terms = {
            "dpo": preference.sum() / n_pairs,
            "nll": -policy[:, CHOSEN].sum() / n_chosen,
        }
        if kl_teacher is not None:
            side = rows["sequence"] % 2
            terms["kl_chosen"] = distillation_loss(divergence, side == CHOSEN, n_chosen)
            terms["kl_rejected"] = distillation_loss(divergence, side == REJECTED, n_rejected)
        loss = weighted_sum(terms, cfg)
        (loss * dist.world).backward()

        statistics = response_statistics(
            policy, reference, teacher, lengths, cfg.beta, n_pairs, (n_chosen, n_rejected))
        statistics |= {"loss": loss} | terms
        totals = totals + torch.stack([*statistics.values()]).detach().double()
    metrics = dict(zip(statistics, dist.sum(*totals.tolist())))
    metrics["chosen_tokens"] = n_chosen / n_pairs
    metrics["rejected_tokens"] = n_rejected / n_pairs
    return metrics.pop("loss"), int(n_chosen + n_rejected), metrics


def weighted_sum(terms: dict[str, torch.Tensor], cfg: DistillConfig) -> torch.Tensor:
    """The loss: each term with the weight that the config has under its name; 0 leaves it out."""
    loss = 0
    for name, term in terms.items():
        weight = getattr(cfg, name)
        if weight:
            loss = loss + weight * term
    return loss


def student_logprobs_and_kl(
    model, kl_teacher, rows: dict, indices: np.ndarray, cfg: DistillConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The student's log-probabilities of the response tokens (N,), and its divergence from the
    teacher there (N,), or None without one. indices: of the pairs in the rows."""
    hidden = loop.response_hidden_states(model, rows)  # (N, C)
    head = model.lm_head.weight
    kernels = model.cfg.kernels
    if isinstance(kl_teacher, torch.nn.Module):
        with torch.no_grad():
            teacher_hidden = loop.response_hidden_states(kl_teacher, rows.get("teacher", rows))
        return linear_logprobs_kl(
            hidden, head, rows["targets"], teacher_hidden, kl_teacher.lm_head.weight,
            cfg.divergence, cfg.kl_temperature, kernels,
        )
    logprobs = linear_logprobs(hidden, head, rows["targets"], kernels=kernels)
    if kl_teacher is None:
        return logprobs, None
    ids, teacher_logprobs = (
        torch.from_numpy(array).to(hidden.device) for array in kl_teacher.read(indices))
    return logprobs, linear_topk_kl(hidden, head, ids.long(), teacher_logprobs.to(logprobs))


@torch.no_grad()
def response_statistics(
    policy: torch.Tensor, reference: torch.Tensor, teacher: torch.Tensor, lengths: torch.Tensor,
    beta: float, n_pairs: float, n_tokens: tuple[float, float],
) -> dict[str, torch.Tensor]:
    """A micro-batch's share of what the log shows: scalars that add up to the global batch's.

    margin, accuracy: the mean margin of y+ over y-, and the share of pairs where it is above 0;
    {student, reference, teacher}_{chosen, rejected}: mean log-probability per token. n_tokens: of
    both sides of the global batch.
    """
    gain = beta * (policy - reference) / lengths
    margin = gain[:, CHOSEN] - gain[:, REJECTED]
    statistics = {
        "margin": margin.sum() / n_pairs,
        "accuracy": (margin > 0).sum() / n_pairs,
    }
    for who, logprobs in (("student", policy), ("reference", reference), ("teacher", teacher)):
        for i, side in enumerate(SIDES):
            statistics[f"{who}_{side}"] = logprobs[:, i].sum() / n_tokens[i]
    return statistics


def pack_pairs(pairs: list[Pair], indices: np.ndarray, context: int, device) -> dict:
    """Both responses of some pairs, each after its prompt, in rows of `context` tokens: the arrays
    of data.chat.packing.Rows as tensors.

    "teacher": the rows with the same responses, each after the prompt that the teacher is asked,
    where that is another one.
    """
    parts = [pairs[i] for i in indices]
    rows = pack(to_sequences(parts), context).to(device)
    if any(pair.teacher_prompt for pair in parts):
        rows["teacher"] = pack(to_sequences(parts, for_teacher=True), context).to(device)
    return rows


def count_response_tokens(pairs: list[Pair], indices: np.ndarray) -> np.ndarray:
    """(P, 2) float64: the lengths of the chosen and the rejected response of some pairs."""
    counts = [(len(pairs[i].chosen), len(pairs[i].rejected)) for i in indices]
    return np.array(counts, dtype=np.float64)


def sequence_lengths(pairs: list[Pair], indices: np.ndarray) -> list[int]:
    """Tokens of each prompt with a response, two for each of some pairs."""
    sequences = to_sequences([pairs[i] for i in indices])
    return [len(prompt) + len(response) for prompt, response in sequences]


def sum_per_response(values: torch.Tensor, rows: dict, n_pairs: int) -> torch.Tensor:
    """Sums (P, 2) over each response of the values (N,) of its tokens."""
    return loop.sum_per_sequence(values, rows, 2 * n_pairs).view(-1, 2)


# --------------------------------------------------------------------------------------------------
# Log-probabilities of the pairs under reference and teacher: computed once, and kept


@torch.no_grad()
def sequence_logprobs(
    model, pairs: list[Pair], batches: list[np.ndarray], cfg: DistillConfig, dist: Dist,
    top_k: TopK | None = None, is_teacher: bool = False,
) -> dict[int, list[float]]:
    """{pair: summed log-probabilities of its two responses} for all pairs of the batches.

    batches: this rank's pairs of each step. They go through as they do in training, so that the
    student's are the very numbers of its first steps. top_k: also takes the model's likeliest
    tokens.
    """
    sums = {}
    for rank_pairs in batches:
        pairs_per_pass = cfg.micro_pairs or len(rank_pairs)
        for part in loop.micro_batches(model, len(rank_pairs), pairs_per_pass):
            indices = rank_pairs[part]
            rows = pack_pairs(pairs, indices, cfg.context, dist.device)
            if is_teacher:
                rows = rows.get("teacher", rows)
            hidden = loop.response_hidden_states(model, rows)
            head = model.lm_head.weight
            logprobs = linear_logprobs(hidden, head, rows["targets"], kernels=model.cfg.kernels)
            part_sums = sum_per_response(logprobs, rows, len(indices)).tolist()
            for pair, values in zip(indices.tolist(), part_sums):
                sums.setdefault(pair, values)  # a pair may come twice: the first stays
            if top_k is not None:
                ids, top_logprobs = teacher_topk(hidden, head, top_k.k)
                top_k.write(indices, ids.cpu().numpy(), top_logprobs.cpu().numpy())
    return dist.gather(sums)


def cache_logprobs(run: loop.Run, teacher, pairs: list[Pair], n_steps: int) -> np.ndarray:
    """(pairs, 2, 2) float64: summed log-probabilities of both responses under reference and
    teacher, from disk or computed and kept there; TopK's files are written, too.

    nan for what no step takes, or without a teacher.
    """
    cfg, dist = run.cfg, run.dist
    n_batches = min(n_steps, -(-len(pairs) // cfg.batch_pairs))  # of the first epoch
    key = common.hash_json([run.resume_key(0), cfg.top_k, n_batches])
    path = run.folder / f"logprobs-{key}.npy"
    is_cached = path.is_file()
    if cfg.top_k and teacher is not None:
        is_cached = is_cached and (run.folder / f"top{cfg.top_k}_logprobs.npy").is_file()
    logprobs = dist.from_main(lambda: np.load(path) if is_cached else None)
    if logprobs is not None:
        return logprobs
    run.folder.mkdir(parents=True, exist_ok=True)
    batches = [loop.batch_of_step(step, len(pairs), cfg, dist) for step in range(n_batches)]
    reference = run.model
    if run.first_step > 0:  # then the model is no longer what training began with
        reference = hf.load_frozen(dist, run.source, cfg.dtype)
    logprobs = np.full((len(pairs), 2, 2), math.nan)
    sums = sequence_logprobs(reference, pairs, batches, cfg, dist)
    set_logprobs(logprobs, REFERENCE, sums)
    if teacher is not None:
        top_k = new_top_k(run, pairs) if cfg.top_k else None
        if isinstance(teacher, Served):
            sums = sample_pairs.served_logprobs(teacher, pairs, batches, cfg.max_rows, dist, top_k)
        else:
            sums = sequence_logprobs(teacher, pairs, batches, cfg, dist, top_k, is_teacher=True)
        set_logprobs(logprobs, TEACHER, sums)
    if dist.is_main:
        aside = path.with_suffix(".tmp.npy")
        np.save(aside, logprobs)
        aside.rename(path)
    return logprobs


def set_logprobs(logprobs: np.ndarray, who: int, sums: dict[int, list[float]]) -> None:
    """Puts in what sequence_logprobs() returned. who: REFERENCE or TEACHER."""
    for pair, values in sums.items():
        logprobs[pair, who] = values


def new_top_k(run: loop.Run, pairs: list[Pair]) -> TopK:
    """Empty files for the teacher's likeliest tokens, made by the first rank, opened by all."""
    if run.dist.is_main:
        TopK(run.folder, pairs, run.cfg.top_k, new=True)
    run.dist.wait()
    return TopK(run.folder, pairs, run.cfg.top_k)


# --------------------------------------------------------------------------------------------------
# The teacher


def check_teacher(run: loop.Run, teacher: Teacher | None) -> None:
    """Raises UserError where the teacher's distribution is in the loss but over other tokens than
    the student's."""
    cfg = run.cfg
    vocab_size = run.config.model.vocab_size
    if cfg.top_k > vocab_size:
        raise UserError(
            f"distill.top_k={cfg.top_k} is more than the vocabulary of {vocab_size}")
    if teacher is None or not uses_kl(cfg):
        return
    if not teacher.same_tokenizer:
        raise UserError(
            f"the teacher {teacher.source} has another tokenizer than {run.source}: its "
            "distribution is over other tokens. Set distill.kl_chosen=0 and distill.kl_rejected=0 "
            "(preference alone)"
        )
    teacher_vocab_size = hf.read_model_config(teacher.source).vocab_size
    if teacher_vocab_size != vocab_size:
        raise UserError(
            f"the teacher {teacher.source} has a vocabulary of {teacher_vocab_size}, the student "
            f"one of {vocab_size}: pad the smaller to the larger"
        )


def load_teacher(run: loop.Run, teacher: Teacher | None) -> torch.nn.Module | Served | None:
    """The teacher's model, where it can be asked about the student's tokens, or its servers."""
    if teacher is None or not teacher.same_tokenizer:
        return None
    cfg = run.cfg
    if cfg.teacher_servers and cfg.top_k:
        dtype = getattr(torch, cfg.dtype)
        return open_checkpoint(teacher.source, cfg.teacher_servers, run.dist, dtype)[0]
    return hf.load_frozen(run.dist, teacher.source, run.cfg.dtype)


def load_reference(run: loop.Run) -> torch.nn.Module | None:
    """What the student started from, where new negatives are to be scored under it."""
    if not run.cfg.refresh_every:
        return None
    return hf.load_frozen(run.dist, run.source, run.cfg.dtype)


def select_kl_teacher(run: loop.Run, teacher_model, pairs: list[Pair]):
    """Whose distribution is in the loss: the teacher's, its likeliest tokens on disk, or None."""
    if not uses_kl(run.cfg):
        return None
    if run.cfg.top_k:
        return TopK(run.folder, pairs, run.cfg.top_k)
    return teacher_model


# --------------------------------------------------------------------------------------------------
# The run


def print_plan(pairs: list[Pair], left_out: Counter, n_steps: int, cfg: DistillConfig) -> None:
    """How many pairs and steps there are; left_out: pairs that are not taken, by the reason."""
    reasons = [f", {n} left out ({reason})" for reason, n in left_out.items()]
    print(f"{len(pairs):,} pairs{''.join(reasons)}; {n_steps:,} steps of {cfg.batch_pairs}")


def resume_key(pairs: list[Pair], source: Path, cfg: DistillConfig) -> list:
    """What a checkpoint's past must have been, as JSON, for a run to go on from it."""
    pairs_hash = common.hash_json([dataclasses.astuple(pair) for pair in pairs])
    return [
        cfg.seed, pairs_hash, str(source), cfg.teacher, cfg.batch_pairs, cfg.context,
        cfg.refresh_every, cfg.negatives,
    ]


def refresh_if_due(
    run: loop.Run, step: int, plan: list[Stage], problems: list, pairs: list[Pair],
    cached_logprobs: np.ndarray, scorers: tuple,
) -> None:
    """Every refresh_every steps, new negatives from the present student: in `pairs`, and their
    log-probabilities under the scorers, reference and teacher, in `cached_logprobs`."""
    cfg, dist = run.cfg, run.dist
    if not cfg.refresh_every:
        return
    start = step - step % cfg.refresh_every
    if step == run.first_step:
        refreshes = range(0, start + 1, cfg.refresh_every)  # a resumed run repeats all of them
    elif step == start:
        refreshes = [start]
    else:
        return
    run.save_unless_saved(plan)  # sampling may take hours, and a signal ends it at once
    n_steps = plan[-1].end_step
    key = common.hash_json(run.resume_key(step))
    for refresh_step in refreshes:
        sample_pairs.refresh_negatives(run, problems, pairs, refresh_step, n_steps, key)
    end = min(start + cfg.refresh_every, n_steps)
    batches = [loop.batch_of_step(n, len(pairs), cfg, dist) for n in range(start, end)]
    for who, model in enumerate(scorers):
        if model is not None:
            sums = sequence_logprobs(
                model, pairs, batches, cfg, dist, is_teacher=who == TEACHER)
            set_logprobs(cached_logprobs, who, sums)


def main():
    config = load_config(
        __doc__,
        flags={"prepare": "sample, choose pairs, and stop"} | sandbox.FLAG,
        model=ModelConfig, tokenizer=TokenizerConfig, distill=DistillConfig,
        evaluate=EvaluateConfig)
    if config.weak_jail:
        sandbox.allow_weak_jail()
    cfg = config.distill
    dist = common.init_distributed(cfg.dtype, cfg.shard_size, cfg.timeout_minutes)
    check_settings(cfg, dist.world)
    run = loop.start("distill", config, dist, "sft", unused_settings(cfg))
    teacher = sample_pairs.find_teacher(run)
    check_teacher(run, teacher)
    problems = dist.from_main(lambda: sample_pairs.load_problems(cfg, config.scale))
    pairs, left_out = sample_pairs.load_pairs(run, problems, teacher)
    n_steps = max(1, round(cfg.epochs * len(pairs) / cfg.batch_pairs))
    plan = [Stage(name="DPD", first_step=0, n_steps=n_steps, settings=rate_schedule(cfg))]
    if dist.is_main:
        print_plan(pairs, left_out, n_steps, cfg)
    if config.prepare:
        return

    past = resume_key(pairs, run.source, cfg)  # of now: new negatives will change the pairs
    loop.load_or_resume(run, lambda step: past)
    model, optimizer = run.model, run.optimizer
    if cfg.compare and run.first_step == 0 and config.evaluate.tasks:
        loop.evaluate_starting_point(run, ("chat",))
        sample_pairs.evaluate_teacher(run, teacher)
    teacher_model = load_teacher(run, teacher)
    cached_logprobs = cache_logprobs(run, teacher_model, pairs, n_steps)
    kl_teacher = select_kl_teacher(run, teacher_model, pairs)
    scorers = (load_reference(run), teacher_model)

    log = loop.Log(run, n_steps)
    stop_signal = common.StopSignal(dist)
    for step in range(run.first_step, n_steps + 1):
        if log.owes_evaluation(plan):
            stage = stage_at(plan, step - 1)
            log.evaluation(stage, loop.evaluate_and_sample(run, stage, step == n_steps))
        if step == n_steps:
            break
        started = time.time()
        stage = stage_at(plan, step)
        lr = learning_rate(cfg.lr, stage, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        refresh_if_due(run, step, plan, problems, pairs, cached_logprobs, scorers)
        batch = loop.batch_of_step(step, len(pairs), cfg, dist)
        loss, n_tokens, metrics = train_step(
            model, kl_teacher, pairs, batch, cached_logprobs, cfg, dist)
        grad_norm = common.clip_grad_norm(model, cfg.grad_clip)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
        else:  # what is not finite never enters the weights; ten in a row are an error
            log.skip_step(step, loss, grad_norm, data=f"pairs {[pairs[i].number for i in batch]}")
        optimizer.zero_grad(set_to_none=True)
        seconds = time.time() - started
        lengths = sequence_lengths(pairs, batch)
        log.step(step, stage, loss, lr, grad_norm, n_tokens, lengths, seconds, **metrics)

        stop = stop_signal.on_any_rank()
        if run.save_is_due(step + 1, stage) or stop:
            run.save(step + 1, stage, must_succeed=stop or step + 1 == n_steps)
        if stop:
            stop_signal.leave(step + 1)
    log.close()
    loop.print_results(run)


if __name__ == "__main__":
    common.cli(main)
