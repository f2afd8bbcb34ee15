"""Phase 3, Dual Preference Distillation: a student learns from a teacher's good answers and from its own bad ones.

    python distill.py configs/tiny.py                # after sft.py and tiny_teacher.py
    torchrun --nproc_per_node=8 distill.py configs/3b.py
    python distill.py configs/tiny.py --prepare      # only samples and pairs: out/tiny/distill/pairs.jsonl

The report (arXiv 2512.06266, DPD): positives y+ are the teacher's samples, negatives y- the student's own, clearly
worse. The loss has three parts: a preference of y+ over y-, the teacher's distribution on y+, and the same on y-: on
its own wrong path the student is told what to do instead. Its equation, weights and the direction of the divergence are
not published: our choice is

    L = dpo * mean over pairs of -log sigmoid(beta * ((log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-))))
      + kl_chosen   * mean over tokens of y+ of KL(teacher || pi)
      + kl_rejected * mean over tokens of y- of KL(teacher || pi)

with ref the SFT checkpoint, frozen. Preference alone pushes both answers down, y+ too (likelihood displacement).

Shapes: B rows of a micro-batch, T context, C width, P pairs of a micro-batch, N response tokens in it.
"""
import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import common
import hf
import loop
from report import plots
from common import UserError
from data.verify import sandbox
from data.tasks.problem import Problem
from data.tasks import registry
from data.chat.packing import pack
from data.chat.pairs import (
    CHOSEN,
    negative,
    order,
    Pair,
    positive,
    read_pairs,
    record_of,
    REJECTED,
    sequences_of,
    SIDES,
    TopK,
)
from data.text.tokenizer import Tokenizer
from evaluate import EvaluateConfig, evaluate, task_prompt, format_table, without_rows
from generate import sample, stop_ids
from kernels.cross_entropy import linear_logprobs, linear_logprobs_kl, linear_topk_kl, teacher_topk
from model import ModelConfig
from progress import progress_bar

# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(kw_only=True)
class DistillConfig(loop.TrainConfig):
    teacher: str = ""            # whose samples and distribution: a phase, a checkpoint, or a Hugging Face folder
    problems: dict = field(default_factory=dict)  # {task of data/tasks: training problems of it that are sampled}
    pairs: str = ""              # in place of problems: a file of pairs (see data/chat/pairs.py)
    on_bad_line: str = "skip"    # lines of it that are no pair: "skip", or "stop"
    n_samples: int = 4           # of each problem, by teacher and student each
    samples: str = ""            # folder of them (default: out/<run>/distill/samples); runs may share one
    temperature: float = 1.0     # of the samples
    max_new_tokens: int = 96     # longer samples are cut off, and not used
    max_rows: int = 256          # samples that are decoded together: their cache must fit
    right: float = 1.0           # least score of a positive
    gap: float = 0.5             # how much less a negative must score
    context: int = 256           # tokens of a packed row; longer pairs are left out
    batch_pairs: int = 32        # pairs of a global batch: an optimizer step
    micro_pairs: int = 0         # pairs of one forward pass on one device; 0: all of the device's
    epochs: float = 2.0          # over the pairs
    lr_end: float = 0.1          # the rate's end, as a share of lr
    curve: str = "cosine"        # how it goes there: linear, 1-sqrt, cosine
    dpo: float = 1.0             # weight of the preference
    beta: float = 0.1            # its inverse temperature
    margin: str = ""             # log-probabilities of a response: their "sum", or "token" (their mean; this is the
                                 # default for samples beyond 1,000 tokens, whose sums saturate the sigmoid)
    kl_chosen: float = 1.0       # weight of the distillation on y+
    kl_rejected: float = 1.0     # … and on y-
    divergence: float = 0.0      # 0: forward KL, 1: reverse KL, between: generalised Jensen-Shannon (arXiv 2306.13649)
    kl_temperature: float = 1.0  # of both distributions in it
    top_k: int = 0               # keep of the teacher only its k likeliest tokens, on disk, and the rest as one
    nll: float = 0.0             # weight of the plain cross-entropy of y+ (SFT; with DPO: arXiv 2404.19733)
    refresh_every: int = 0       # steps between new negatives from the present student (0: never)
    negatives: str = "worse"     # what these must be: "worse", or "any": with kl_rejected alone GKD (arXiv 2306.13649)
    compare: bool = True         # also evaluate teacher and start, on the same problems


def check(p: DistillConfig) -> None:
    """What types cannot say: raises UserError."""
    for key, allowed in (("margin", ("", "sum", "token")), ("negatives", ("worse", "any")),
                         ("on_bad_line", ("skip", "stop"))):
        if getattr(p, key) not in allowed:
            raise UserError(f"distill.{key} must be one of {', '.join(map(repr, allowed))}, not {getattr(p, key)!r}")
    if bool(p.problems) == bool(p.pairs):
        raise UserError("distill needs either problems, {task: how many}, or pairs, a file")
    if not p.teacher and (p.problems or not p.top_k and p.kl_chosen + p.kl_rejected > 0):
        raise UserError("distill.teacher must be named: it writes the positives, and is what kl_chosen and kl_rejected "
                        "learn from (with distill.pairs, and top_k or both of these 0, there need be none)")
    if p.top_k and (p.divergence or p.kl_temperature != 1 or p.refresh_every):
        raise UserError("distill.top_k goes with divergence=0, kl_temperature=1 and refresh_every=0: forward KL, of "
                        "what is on disk")
    if not 0 <= p.divergence <= 1:
        raise UserError(f"distill.divergence must be between 0 and 1, not {p.divergence}")
    if not any((p.dpo, p.kl_chosen, p.kl_rejected, p.nll)):
        raise UserError("distill needs a term: dpo, kl_chosen, kl_rejected or nll must be above 0")
    if p.refresh_every and not p.problems:
        raise UserError("distill.refresh_every needs problems: new samples are scored as problems of a task")


# ---------------------------------------------------------------------------------------------------------------------
# Pairs: sample, score, choose

def problems_of(p: DistillConfig, scale: float) -> list[tuple[str, Problem]]:
    """(task, problem) of all prompts: training problems, never held-out ones."""
    return [(task, problem) for task, n in p.problems.items()
            for problem in registry.family(task).problems("train", max(1, round(scale * n)), p.seed)]


def draw(model, tokenizer, problems: list, p: DistillConfig, seed: int) -> list[list[dict]]:
    """n_samples scored samples of each problem (data/chat/pairs.py has their form)."""
    stop = stop_ids(tokenizer)
    prompts = [task_prompt(problem, tokenizer, "chat") for _, problem in problems]
    answers = sample(model, prompts, p.n_samples, p.max_new_tokens, p.temperature, stop=stop, seed=seed,
                     max_rows=p.max_rows)
    texts = [tokenizer.decode([t for t in a.tokens if t not in stop]) for each in answers for a in each]
    scores = iter(registry.rewards([problem for _, problem in problems for _ in range(p.n_samples)], texts))
    texts = iter(texts)
    return [[{"text": next(texts), "score": next(scores), "finish_reason": a.finish_reason, "tokens": a.tokens,
              "logprob": float(np.mean(a.logprobs))} for a in each] for each in answers]


def sampled(who: str, source: Path, problems: list, p: DistillConfig, out: Path, d) -> list[list[dict]]:
    """The samples of a checkpoint, from disk as far as they are there: a killed run goes on. Ranks share the work."""
    made_by = [str(source), *sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.iterdir()),
               [(task, problem.key) for task, problem in problems],
               p.n_samples, p.temperature, p.max_new_tokens, p.seed]
    folder, size = Path(p.samples or out / "samples") / f"{who}-{common.hash_json(made_by)}", 64
    chunks = [(folder / f"{n:05d}.json", n) for n in range(-(-len(problems) // size))]
    mine = [(path, n) for path, n in chunks[d.rank::d.world] if not path.is_file()]
    if mine:
        model, tokenizer = hf.load(source, d.device, getattr(torch, p.dtype))
        folder.mkdir(parents=True, exist_ok=True)
        for path, n in progress_bar(mine, desc=f"samples of the {who}", unit="chunk", disable=not d.is_main):
            drawn = draw(model, tokenizer, problems[n * size:(n + 1) * size], p, seed=p.seed * 1_000_000 + n)
            common.write_atomic(path, json.dumps(drawn))
    d.barrier()
    return [samples for path, _ in chunks for samples in json.loads(path.read_text())]


def make_pairs(problems: list, student: Path, teacher: Path, share_tokens: bool, p: DistillConfig, folder: Path,
               d) -> Path:
    """Writes pairs.jsonl and says how many prompts gave a pair, and why the others did not."""
    writers = (str(teacher), str(student))
    by_teacher, by_student = (sampled(who, source, problems, p, folder, d)
                              for who, source in (("teacher", teacher), ("student", student)))
    if d.is_main:
        records, counts = [], {}
        for number, (task, problem) in enumerate(problems):
            chosen, rejected = positive(by_teacher[number], p.right), negative(by_student[number], p.right - p.gap)
            counts.setdefault(task, Counter())["teacher never right" if chosen is None else
                                               "student never clearly worse" if rejected is None else "pairs"] += 1
            if chosen and rejected:
                if not share_tokens:  # then its ids mean nothing to the student
                    chosen = {key: value for key, value in chosen.items() if key != "tokens"}
                records.append(record_of(number, task, problem.question, chosen, rejected, writers))
        right = lambda samples, task: np.mean([bool(s["score"]) for (name, _), each in zip(problems, samples)
                                               if name == task for s in each])
        print(f"{'task':10}{'prompts':>8}{'pairs':>7}{'teacher':>9}{'student':>9}   (share of right ones); no pair:")
        for task, found in counts.items():
            rest = ", ".join(f"{reason} {n}" for reason, n in found.items() if reason != "pairs")
            print(f"{task:10}{found.total():8}{found['pairs']:7}{right(by_teacher, task):9.2f}"
                  f"{right(by_student, task):9.2f}   {rest}")
        wrote = lambda samples: sum(len(s["tokens"]) for each in samples for s in each)
        print(f"the teacher wrote {wrote(by_teacher):,} tokens, the student {wrote(by_student):,}")
        if not records:
            raise UserError("no prompt gave a pair: the teacher must be right where the student is wrong. Take more "
                            "prompts or samples, harder problems, or a better teacher")
        folder.mkdir(parents=True, exist_ok=True)
        common.write_atomic(folder / "pairs.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    d.barrier()
    return folder / "pairs.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def preference_loss(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO (arXiv 2305.18290, eq. 7) of each pair: -log sigmoid(beta * ((pi+ - ref+) - (pi- - ref-))): (P,), in nats.

    policy, reference (P, 2): log-probabilities of the chosen and the rejected response; log 2 where the two agree.
    """
    gained = policy - reference
    return -F.logsigmoid(beta * (gained[:, CHOSEN] - gained[:, REJECTED]))


def distillation_loss(divergence: torch.Tensor, of_side: torch.Tensor, n_tokens: float) -> torch.Tensor:
    """One side's share of the mean divergence from the teacher a token (GKD, arXiv 2306.13649, eq. 1); a scalar.

    divergence (N,) of all response tokens; of_side (N,) bool: those of y+ (the teacher's good path), or of y- (the
    student's own bad one); n_tokens: that side's in the global batch.
    """
    return (divergence * of_side).sum() / n_tokens


def passes(pairs: list[Pair], mine: np.ndarray, p: DistillConfig, device):
    """(places in `mine`, rows as tensors) of each forward pass: equally many on all ranks."""
    size = p.micro_pairs or len(mine)
    for first in range(0, len(mine), size):
        part = slice(first, first + size)
        yield part, loop.as_tensors(pack(sequences_of([pairs[i] for i in mine[part]]), p.context), device)


def of_responses(values: torch.Tensor, rows: dict) -> torch.Tensor:
    """Sums (P, 2) over each response of values (N,) of its tokens."""
    return loop.by_sequence(values, rows, int(rows["sequence"][-1]) + 1).view(-1, 2)


def train_step(model, teacher, pairs: list[Pair], mine: np.ndarray, frozen: np.ndarray, p: DistillConfig,
               d) -> dict[str, float]:
    """Adds up the gradient of the global batch's loss; returns the loss and what the log shows of it.

    mine: this rank's pairs of the batch; frozen (pairs, 2, 2): summed log-probabilities of each pair's two responses
    under reference and teacher; teacher: a model, TopK, or None (no distillation). All denominators are global, known
    before the first backward pass: pairs, tokens of y+, tokens of y-. FSDP averages over ranks: hence d.world.
    """
    lengths = np.array([[len(pairs[i].chosen), len(pairs[i].rejected)] for i in mine], dtype=np.float64)
    n_pairs, *n_tokens = d.sum(len(mine), *lengths.sum(0))
    total = 0
    for part, rows in passes(pairs, mine, p, d.device):
        common.set_gradient_sync(model, last_micro_batch=part.stop >= len(mine))
        logprobs, divergence = compare(model, teacher, rows, mine[part], p)
        policy, side = of_responses(logprobs, rows), rows["sequence"] % 2
        reference, by_teacher = torch.from_numpy(frozen[mine[part]]).to(policy).unbind(1)  # (P, 2 sides) each
        per = torch.from_numpy(lengths[part]).to(policy) if per_token(p) else torch.ones_like(policy)
        terms = {"dpo": preference_loss(policy / per, reference / per, p.beta).sum() / n_pairs,
                 "nll": -policy[:, CHOSEN].sum() / n_tokens[CHOSEN]}
        if teacher is not None:
            terms |= {f"kl_{of}": distillation_loss(divergence, side == i, n_tokens[i]) for i, of in enumerate(SIDES)}
        loss = sum(getattr(p, name) * term for name, term in terms.items() if getattr(p, name))
        (loss * d.world).backward()
        with torch.no_grad():
            gained = p.beta * (policy - reference) / per
            margin = gained[:, CHOSEN] - gained[:, REJECTED]
            seen = {"loss": loss, "margin": margin.sum() / n_pairs, "accuracy": (margin > 0).sum() / n_pairs} | terms
            for name, values in (("student", policy), ("reference", reference), ("teacher", by_teacher)):
                seen |= {f"{name}_{of}": values[:, i].sum() / n_tokens[i] for i, of in enumerate(SIDES)}
            total = total + torch.stack([*seen.values()]).double()
    return dict(zip(seen, d.sum(*total.tolist()))) | {
        f"{of}_tokens": n_tokens[i] / n_pairs for i, of in enumerate(SIDES)}


def compare(model, teacher, rows: dict, which: np.ndarray, p: DistillConfig) -> tuple:
    """The student's log-probabilities of the response tokens (N,), and its divergence from the teacher there (N,), or
    None without one."""
    hidden, head, kernels = loop.hidden_of(model, rows), model.lm_head.weight, model.cfg.kernels
    if isinstance(teacher, torch.nn.Module):
        with torch.no_grad():
            target = loop.hidden_of(teacher, rows)
        return linear_logprobs_kl(hidden, head, rows["targets"], target, teacher.lm_head.weight, p.divergence,
                                  p.kl_temperature, kernels)
    logprobs = linear_logprobs(hidden, head, rows["targets"], kernels=kernels)
    if teacher is None:
        return logprobs, None
    ids, of_teacher = (torch.from_numpy(a).to(hidden.device) for a in teacher.of(which))
    return logprobs, linear_topk_kl(hidden, head, ids.long(), of_teacher.to(logprobs))


def per_token(p: DistillConfig) -> bool:
    """Whether the margin is of mean log-probabilities: sums over long responses saturate the sigmoid."""
    return p.margin == "token" or not p.margin and p.max_new_tokens > 1000


@torch.no_grad()
def score(model, pairs: list[Pair], batches: list[np.ndarray], p: DistillConfig, d, keep: TopK | None = None) -> dict:
    """{pair: summed log-probabilities of its two responses} under a model, for all pairs of the batches.

    batches: this rank's pairs of each step. They go through as they do in training, so that the student's are the very
    numbers of its first steps. keep: also takes the model's likeliest tokens.
    """
    found = {}
    for mine in batches:
        for part, rows in passes(pairs, mine, p, d.device):
            hidden, head = loop.hidden_of(model, rows), model.lm_head.weight
            logprobs = linear_logprobs(hidden, head, rows["targets"], kernels=model.cfg.kernels)
            found = dict(zip(mine[part].tolist(), of_responses(logprobs, rows).tolist())) | found  # the first stays
            if keep:
                ids, logprobs = teacher_topk(hidden, head, keep.k)
                ends = np.cumsum([keep.length[i] for i in mine[part]])[:-1]
                for name, values in (("ids", ids), ("logprobs", logprobs)):
                    for i, each in zip(mine[part], np.split(values.cpu().numpy(), ends)):
                        keep.files[name][keep.first[i]:keep.first[i + 1]] = each
    return d.gather(found)


def keep_scores(run: loop.Run, source: Path, teacher, pairs: list[Pair], batches: list[np.ndarray]) -> np.ndarray:
    """(pairs, 2, 2) float64: log-probabilities of chosen and rejected under reference and teacher, computed once and
    kept; nan for what is in no batch, or without a teacher. source: the reference's checkpoint. Writes TopK, too."""
    d, p = run.d, run.p
    path = run.folder / f"frozen-{common.hash_json([history(pairs, source, p), p.top_k, len(batches)])}.npy"
    kept = path.is_file() and (teacher is None or not p.top_k or (run.folder / f"top{p.top_k}_logprobs.npy").is_file())
    if d.sum(float(kept))[0] < d.world:
        reference, top = run.model if run.step == 0 else hf.load_frozen(d, source, p.dtype), None
        if p.top_k and teacher is not None:
            if d.is_main:
                TopK(run.folder, pairs, p.top_k, new=True)
            d.barrier()
            top = TopK(run.folder, pairs, p.top_k)
        found = np.full((len(pairs), 2, 2), math.nan)
        for i, (model, keep) in enumerate(((reference, None), (teacher, top))):
            if model is not None:
                for pair, values in score(model, pairs, batches, p, d, keep).items():
                    found[pair, i] = values
        if d.is_main:
            np.save(aside := path.with_suffix(".tmp.npy"), found)
            aside.rename(path)
        d.barrier()
    return np.load(path)


def history(pairs: list[Pair], source: Path, p: DistillConfig) -> list:
    """What a checkpoint's past must have been, as JSON, for a run to go on from it."""
    return [p.seed, common.hash_json([dataclasses.astuple(pair) for pair in pairs]), str(source), p.teacher,
            p.batch_pairs, p.context, p.refresh_every, p.negatives]


# ---------------------------------------------------------------------------------------------------------------------
# New negatives from the present student

def refresh(run: loop.Run, problems: list, pairs: list[Pair], step: int, n_steps: int, key: str) -> None:
    """Puts the present student's samples in place of the rejected responses of the pairs of the next refresh_every
    steps, where they are worse, or whatever they are (negatives="any"). They are kept on disk: a resumed run takes the
    same."""
    p, d = run.p, run.d
    upcoming = order(len(pairs), step * p.batch_pairs, min(p.refresh_every, n_steps - step) * p.batch_pairs, p.seed)
    path = run.folder / f"refresh-{key}" / f"{step:08d}.json"
    if d.sum(float(path.is_file()))[0] < d.world:
        mine = np.unique(upcoming)[d.rank::d.world].tolist()
        settings = dataclasses.replace(p, n_samples=1) if p.negatives == "any" else p
        drawn = draw(run.plain(), run.tokenizer, [problems[pairs[i].number] for i in mine], settings,
                     seed=(p.seed * 1000 + d.rank) * 1_000_000 + step)
        new = {}
        for i, samples in zip(mine, drawn):
            found = samples[0] if p.negatives == "any" else negative(samples, p.right - p.gap)
            if found and len(pairs[i].prompt) + len(found["tokens"]) <= p.context:
                new[i] = found["tokens"]
        new = d.gather(new)
        if d.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            common.write_atomic(path, json.dumps(new))
        d.barrier()
    for i, tokens in json.loads(path.read_text()).items():
        pairs[int(i)] = dataclasses.replace(pairs[int(i)], rejected=tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The run

def main():
    cfg = common.load_config(__doc__, flags={"prepare": "sample, choose pairs, and stop"} | sandbox.FLAG,
                             model=ModelConfig, distill=DistillConfig, evaluate=EvaluateConfig)
    if cfg.unsafe_exec:
        sandbox.allow_unlocked()
    p, folder = cfg.distill, cfg.out / "distill"
    check(p)
    loop.check_settings("distill", p, [loop.OneStage(0, [1, p.lr_end], p.curve)])
    d = common.init_distributed(p.dtype, p.shard_size)
    if p.batch_pairs % d.world:
        raise UserError(f"distill.batch_pairs={p.batch_pairs} is no multiple of the {d.world} processes")
    source = hf.resolve_checkpoint(d, cfg.init_from or "sft", cfg.out)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    loop.set_vocab_size(cfg.model, tokenizer.n_vocab)
    if p.top_k > cfg.model.vocab_size:
        raise UserError(f"distill.top_k={p.top_k} is more than the vocabulary of {cfg.model.vocab_size}")
    distills = p.kl_chosen + p.kl_rejected > 0
    teacher_source = hf.resolve_checkpoint(d, p.teacher, cfg.out) if p.teacher else None
    share_tokens = bool(teacher_source) and Tokenizer.load(teacher_source / "tokenizer.json").hash == tokenizer.hash
    if teacher_source and distills and not share_tokens:
        raise UserError(f"the teacher {teacher_source} has another tokenizer than {source}: its distribution is over "
                        "other tokens. Set distill.kl_chosen=0 and distill.kl_rejected=0 (preference alone)")
    if share_tokens and distills and (theirs := hf.read_model_config(teacher_source).vocab_size) != cfg.model.vocab_size:
        raise UserError(f"the teacher {teacher_source} has a vocabulary of {theirs}, the student one of "
                        f"{cfg.model.vocab_size}: pad the smaller to the larger")

    problems = problems_of(p, cfg.scale)
    path = Path(p.pairs) if p.pairs else make_pairs(problems, source, teacher_source, share_tokens, p, folder, d)
    pairs, left_out = read_pairs(path, tokenizer, p.context, p.on_bad_line)
    if not pairs:
        raise UserError(f"no pair in {path} can be used" + "".join(f"; {n} {why}" for why, n in left_out.items()))
    n_steps = max(1, round(p.epochs * len(pairs) / p.batch_pairs))
    if d.is_main:
        print(f"{len(pairs):,} pairs" + "".join(f", {n} left out ({why})" for why, n in left_out.items())
              + f"; {n_steps:,} steps of {p.batch_pairs}")
    if cfg.prepare:
        return

    run = loop.Run("distill", cfg, p, tokenizer, source / "tokenizer.json", d)
    past, stage = history(pairs, source, p), loop.OneStage(n_steps, [1, p.lr_end], p.curve, "DPD")
    newest = common.find_checkpoint(d, run.folder)
    if newest:
        run.resume(newest, True, lambda step: past)
    else:
        run.model.rope_theta = hf.load_initial_weights(d, run.model, tokenizer, source)
    if p.compare and run.step == 0 and cfg.evaluate.tasks:
        loop.before(run, ("chat",))
        if teacher_source:
            grade_teacher(run, teacher_source)

    mine_of = lambda step: order(len(pairs), step * p.batch_pairs, p.batch_pairs, p.seed)[d.rank::d.world]
    teacher = hf.load_frozen(d, teacher_source, p.dtype) if share_tokens else None
    first_epoch = [mine_of(step) for step in range(min(n_steps, -(-len(pairs) // p.batch_pairs)))]
    run.folder.mkdir(parents=True, exist_ok=True)
    frozen = keep_scores(run, source, teacher, pairs, first_epoch)
    guide = (TopK(run.folder, pairs, p.top_k) if p.top_k else teacher) if distills else None
    reference = hf.load_frozen(d, source, p.dtype) if p.refresh_every else None

    for step in run.steps(n_steps):
        base = step - step % p.refresh_every if p.refresh_every else -1
        if p.refresh_every and step in (base, run.first_step):
            for start in range(0 if step == run.first_step else base, base + 1, p.refresh_every):  # a resumed run: all
                refresh(run, problems, pairs, start, n_steps, common.hash_json(past))
            batches = [mine_of(s) for s in range(base, min(base + p.refresh_every, n_steps))]
            for i, model in enumerate((reference, teacher)):
                for pair, values in (score(model, pairs, batches, p, d) if model else {}).items():
                    frozen[pair, i] = values
        lr = loop.learning_rate(p, stage, stage, step)
        mine = mine_of(step)
        seen = train_step(run.model, guide, pairs, mine, frozen, p, d)
        loss = seen.pop("loss")
        grad_norm = run.update(loss, lr, where=lambda: f"pairs {', '.join(str(pairs[i].number) for i in mine)}")
        n_tokens = round((seen["chosen_tokens"] + seen["rejected_tokens"]) * p.batch_pairs)
        run.done(stage.name, loss, lr, grad_norm, n_tokens, (1, n_tokens), **seen)

        n_problems = run.evaluate_now(stage)
        if n_problems is not None:
            found = loop.look(run, n_problems)
            run.metrics.write(step=step, stage=stage.name, seconds=run.seconds, **found)
        run.save(stage, ("model", "distill"), past)
    if d.is_main:
        print(plots.gain(run.folder), end="\n" if p.compare else "")
        print("picture:", plots.plot_distill(run.folder))


def grade_teacher(run: loop.Run, source: Path) -> None:
    """Prints what the teacher can do on the student's problems, and keeps it in teacher.json with its cost."""
    model, tokenizer = hf.load(source, run.d.device, getattr(torch, run.p.dtype))
    scores = evaluate(model, tokenizer, dataclasses.replace(run.cfg.evaluate, prompt_format="chat"), run.d)
    if run.d.is_main:
        print(f"the teacher, {sum(x.numel() for x in model.parameters()):,} parameters\n{format_table(scores)}", flush=True)
        cost = {}
        if (source / "meta.json").is_file():
            meta, steps = common.read_meta(source), common.read_metrics(source.parent)
            cost = {key: meta[key] for key in ("step", "seconds", "command")} | {
                "trained_tokens": sum(line.get("tokens", 0) for line in steps)}
        common.write_atomic(run.folder / "teacher.json", json.dumps(without_rows(scores) | {"cost": cost}))


if __name__ == "__main__":
    common.cli(main)
