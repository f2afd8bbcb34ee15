"""Phase 3's data: samples of a teacher and of the student, and the preference pairs that are chosen
among them.

    python distill.py configs/tiny.py --prepare    # only this: out/tiny/distill/pairs.jsonl

distill.py calls load_pairs() before it trains, and refresh_negatives() while it trains. Which
samples make a pair, and what a line of the file holds, is in data/chat/pairs.py.
"""
from settings import Count, NonNegativeFloat, NonNegativeInt, PositiveFloat

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import common
import hf
import loop
from common import Dist, UserError
from data.chat.pairs import (
    CHOSEN,
    REJECTED,
    SIDES,
    Pair,
    TopK,
    choose_negative,
    choose_positive,
    make_record,
    read_pairs,
    to_sequences,
)
from data.tasks import registry
from data.tasks.problem import Problem
from data.text.tokenizer import Tokenizer
from evaluate import evaluate, format_table, task_prompt, without_rows
from generate import Sample, decode_answer
from model import meta_model
from sampler import Served, open_checkpoint, open_sampler, share_missing

CHUNK = 64  # problems that share a seed where no server answers

# --------------------------------------------------------------------------------------------------
# Settings


@dataclass(kw_only=True)
class PairConfig(loop.TrainConfig):
    teacher: str = ""            # a phase, a checkpoint, or a Hugging Face folder
    teacher_system: str = ""     # system turn that it is asked with, and only it: a text, or
                                 # "released", Nanbeige4's own
    problems: dict[str, Count] = field(default_factory=dict)  # {task of data/tasks: training
                                                              # problems sampled}
    pairs: str = ""              # in place of problems: a file of pairs (see data/chat/pairs.py)
    on_bad_line: Literal["skip", "stop"] = "skip"  # at lines of it that are no pair
    n_samples: Count = 4         # of each problem, by teacher and student each
    samples: str = ""            # their folder (default: out/<run>/distill/samples); may be shared
    temperature: PositiveFloat = 1.0  # of the samples
    max_new_tokens: Count = 96   # longer samples are cut off, and not used
    max_rows: Count = 256        # samples that are decoded together: their cache must fit
    min_positive_score: float = 1.0  # least score of a positive
    gap: NonNegativeFloat = 0.5  # how much less a negative must score
    context: Count = 256         # tokens of a packed row; longer pairs are left out
    teacher_servers: list[str] = field(default_factory=list)  # URLs of vLLM servers that have the
                                 # teacher, and sample in place of this process; with top_k they
                                 # also say its likeliest tokens (docs/SCALING.md)
    student_servers: list[str] = field(default_factory=list)  # … of others, which get the student
    served_weights: str = ""     # folder of its weights, which they read (default: in
                                 # out/<run>/distill)
    refresh_every: NonNegativeInt = 0  # steps between new negatives from the present student (0:
                                       # never)
    negatives: Literal["worse", "any"] = "worse"  # what these must be; any: GKD, arXiv 2306.13649


def unused_settings(cfg: PairConfig) -> dict[str, str]:
    """Settings that have no effect beside the others, each with the reason."""
    unused = {}
    if not cfg.refresh_every:
        unused["negatives"] = "refresh_every is 0"
    if not cfg.teacher:
        unused["teacher_system"] = "there is no teacher"
    if cfg.pairs:
        of_samples = ("n_samples", "samples", "temperature", "max_rows", "gap")
        unused |= dict.fromkeys((*of_samples, "min_positive_score"), "pairs are given")
    else:
        unused["on_bad_line"] = "no file of pairs is given"
    return unused


# --------------------------------------------------------------------------------------------------
# Samples


@dataclass
class Teacher:
    source: Path          # its checkpoint
    same_tokenizer: bool  # as the student's: only then do its tokens mean anything to the student


def find_teacher(run: loop.Run) -> Teacher | None:
    """The teacher that the config names, if any."""
    if not run.cfg.teacher:
        return None
    source = run.find_checkpoint(run.cfg.teacher)
    tokenizer = Tokenizer.load(source / "tokenizer.json")
    return Teacher(source, not run.tokenizer.disagreement(tokenizer))


def load_problems(cfg: PairConfig, scale: float) -> list[tuple[str, Problem]]:
    """(task, problem) of all prompts: training problems, never held-out ones."""
    problems = []
    for task, n in cfg.problems.items():
        n = max(1, round(scale * n))
        for problem in registry.family(task).problems("train", n, cfg.seed):
            problems.append((task, problem))
    return problems


def sample_and_score(
    sampler, tokenizer, problems: list[tuple[str, Problem]], cfg: PairConfig, seed: int,
    numbers: list[int], system: str = "",
) -> Iterator[dict[int, list[dict]]]:
    """Yields {place of a problem: n_samples scored samples}, as they come, in the form of
    data/chat/pairs.py.

    numbers: of the problems among those of this seed; both decide the draws.
    """
    prompts = [task_prompt(problem, tokenizer, "chat", system) for _, problem in problems]
    batches = sampler.sample(
        prompts, cfg.n_samples, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
        stop=tokenizer.stop_ids, seed=seed, max_rows=cfg.max_rows, numbers=numbers,
    )
    for batch in batches:
        samples = {}
        for place, answers in batch.items():
            samples[place] = describe_samples(answers, tokenizer, prompts[place])
        score_samples([problems[place] for place in batch], list(samples.values()))
        yield samples


def describe_samples(answers: list[Sample], tokenizer, prompt: list[int]) -> list[dict]:
    """Samples of a prompt as data/chat/pairs.py has them, without their scores."""
    return [
        {
            "text": decode_answer(answer.tokens, tokenizer, prompt),
            "score": None,
            "finish_reason": answer.finish_reason,
            "tokens": answer.tokens,
            "logprob": float(np.mean(answer.logprobs)),
        }
        for answer in answers
    ]


def score_samples(problems: list[tuple[str, Problem]], samples: list[list[dict]]) -> None:
    """Fills in the "score" of each sample: its task's own reward, all of them in one call."""
    flat_problems = []
    flat_samples = []
    for (_, problem), problem_samples in zip(problems, samples):
        for entry in problem_samples:
            flat_problems.append(problem)
            flat_samples.append(entry)
    scores = registry.rewards(flat_problems, [entry["text"] for entry in flat_samples])
    for entry, score in zip(flat_samples, scores):
        entry["score"] = score


def sample_checkpoint(
    who: str, source: Path, problems: list[tuple[str, Problem]], cfg: PairConfig, out: Path,
    dist: Dist,
) -> tuple[Path, str]:
    """Samples a checkpoint, and returns where the samples are, for `read_choices`.

    who: "teacher" or "student". The ranks share the work. The samples are kept as they come, in
    FOLDER/NAME.<rank>.jsonl, a line for each problem: a killed run goes on.
    """
    system = cfg.teacher_system if who == "teacher" else ""
    folder = Path(cfg.samples or out / "samples")
    name = f"{who}-{common.hash_json(sampling_key(source, problems, cfg, system))}"
    kept = dist.from_main(
        lambda: {row["number"] for row in common.read_kept_lines(folder, name)})
    servers = cfg.teacher_servers if who == "teacher" else cfg.student_servers
    numbers = range(len(problems))
    if servers:
        pieces = share_missing(numbers, kept, dist)
    else:
        size = dist.piece_size(min(CHUNK, len(problems)), cfg.n_samples, cfg.max_rows)
        pieces = []
        for chunk in common.cut(numbers, CHUNK):
            pieces += [piece for piece in common.cut(chunk, size) if not kept.issuperset(piece)]
    if pieces:  # else the checkpoint need not be loaded
        weights = Path(cfg.served_weights or out / "served") if who == "student" else None
        sampler, tokenizer = open_checkpoint(
            source, servers, dist, getattr(torch, cfg.dtype), weights)
    for piece in dist.hand_out(pieces, f"samples of the {who}"):
        seed, places = cfg.seed * 1_000_000, piece
        if not servers:
            seed, places = seed + piece[0] // CHUNK, [number % CHUNK for number in piece]
        piece_problems = [problems[number] for number in piece]
        batches = sample_and_score(
            sampler, tokenizer, piece_problems, cfg, seed, places, system)
        for batch in batches:
            rows = []
            for place, samples in batch.items():
                rows.append({"number": piece[place], "samples": samples})
            common.keep_lines(folder / f"{name}.{dist.rank}.jsonl", rows)
    return folder, name


def sampling_key(
    source: Path, problems: list[tuple[str, Problem]], cfg: PairConfig, system: str
) -> list:
    """What decides the samples of a checkpoint, as JSON: its files, the problems, the settings."""
    problem_keys = [(task, problem.key) for task, problem in problems]
    settings = [cfg.n_samples, cfg.temperature, cfg.max_new_tokens, cfg.seed]
    if system:
        settings.append(system)
    return [str(source), *common.list_files(source), problem_keys, *settings]


def evaluate_teacher(run: loop.Run, teacher: Teacher | None) -> None:
    """Prints what the teacher, if any, can do on the student's problems, and keeps it in
    teacher.json with its cost."""
    if teacher is None:
        return
    source = teacher.source
    sampler, tokenizer = open_checkpoint(
        source, run.cfg.teacher_servers, run.dist, getattr(torch, run.cfg.dtype))
    settings = dataclasses.replace(
        run.config.evaluate, tasks=run.eval_tasks, prompt_format="chat",
        system=run.cfg.teacher_system)
    made_by = run.dist.from_main(lambda: loop.weights_key(source, run.cfg.dtype))
    folder = run.folder / loop.KEPT_SAMPLES
    known = {} if run.cfg.teacher_servers else loop.read_known_scores(source, run.dist)
    scores = evaluate(
        sampler, tokenizer, settings, run.dist, folder, made_by, run.verifier, known=known)
    if not run.dist.is_main:
        return
    model = meta_model(hf.read_model_config(source))
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"the teacher, {n_parameters:,} parameters\n{format_table(scores)}", flush=True)
    cost = {}
    if (source / "meta.json").is_file():
        meta = common.read_meta(source)
        cost = {"step": meta["step"], "seconds": meta["seconds"],
                "command": "python " + meta["command"]}
        steps = common.read_metrics(source.parent)
        cost["trained_tokens"] = sum(line.get("tokens", 0) for line in steps)
    record = without_rows(scores) | {"cost": cost}
    common.write_atomic(run.folder / "teacher.json", json.dumps(record))


# --------------------------------------------------------------------------------------------------
# Pairs


def load_pairs(
    run: loop.Run, problems: list[tuple[str, Problem]], teacher: Teacher | None
) -> tuple[list[Pair], Counter]:
    """The pairs of the config's file, or of samples of teacher and student; and how many were left
    out, by the reason. UserError where no pair can be used."""
    cfg = run.cfg
    if cfg.pairs:
        path = Path(cfg.pairs)
    else:
        path = make_pairs(problems, run.source, teacher, cfg, run.folder, run.dist)
    pairs, left_out = read_pairs(
        path, run.tokenizer, cfg.context, cfg.on_bad_line, cfg.teacher_system)
    if not pairs:
        reasons = [f"; {n} {reason}" for reason, n in left_out.items()]
        raise UserError(f"no pair in {path} can be used{''.join(reasons)}")
    return pairs, left_out


def make_pairs(
    problems: list[tuple[str, Problem]], student: Path, teacher: Teacher, cfg: PairConfig,
    folder: Path, dist: Dist,
) -> Path:
    """Writes folder/pairs.jsonl; prints how many prompts gave a pair, and why the others did not.

    UserError where none did.
    """
    by_teacher = sample_checkpoint("teacher", teacher.source, problems, cfg, folder, dist)
    by_student = sample_checkpoint("student", student, problems, cfg, folder, dist)
    path = folder / "pairs.jsonl"

    def write_pairs() -> None:  # by one process: the samples of all are many
        best = partial(choose_positive, min_score=cfg.min_positive_score)
        worst = partial(choose_negative, max_score=cfg.min_positive_score - cfg.gap)
        positives = read_choices(by_teacher, problems, best)
        negatives = read_choices(by_student, problems, worst)
        records, outcomes = choose_pairs(problems, positives, negatives, teacher, student)
        print_outcomes(positives, negatives, outcomes)
        if not records:
            raise UserError(
                "no prompt gave a pair: the teacher must be right where the student is wrong. Take "
                "more prompts or samples, harder problems, or a better teacher"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record) + "\n" for record in records]
        common.write_atomic(path, "".join(lines))

    dist.from_main(write_pairs)
    return path


@dataclass
class Choices:
    """What was chosen among the samples of one checkpoint, and what they were like."""
    chosen: dict[int, dict | None]  # problem's number -> the sample, or None for none
    n_samples: Counter              # by task
    n_right: Counter                # those that score above 0
    n_tokens: int


def read_choices(
    kept: tuple[Path, str], problems: list[tuple[str, Problem]], choose: Callable
) -> Choices:
    """Reads what sample_checkpoint has kept, one problem after the other.

    choose: of a problem's samples the one that is taken, or None.
    """
    choices = Choices({}, Counter(), Counter(), 0)
    for row in common.read_kept_lines(*kept):
        number, samples = row["number"], row["samples"]
        if number in choices.chosen:  # sampled twice, when a run that was killed went on
            continue
        choices.chosen[number] = choose(samples)
        task, _ = problems[number]
        choices.n_samples[task] += len(samples)
        choices.n_right[task] += sum(bool(entry["score"]) for entry in samples)
        choices.n_tokens += sum(len(entry["tokens"]) for entry in samples)
    return choices


def choose_pairs(
    problems: list[tuple[str, Problem]], positives: Choices, negatives: Choices,
    teacher: Teacher, student: Path,
) -> tuple[list[dict], dict[str, Counter]]:
    """The lines of pairs.jsonl, and for each task how many of its prompts ended how."""
    writers = (str(teacher.source), str(student))
    records, outcomes = [], {}
    for number, (task, problem) in enumerate(problems):
        chosen, rejected = positives.chosen[number], negatives.chosen[number]
        if chosen is None:
            outcome = "teacher never right"
        elif rejected is None:
            outcome = "student never clearly worse"
        else:
            outcome = "pairs"
            if not teacher.same_tokenizer:
                chosen = {key: value for key, value in chosen.items() if key != "tokens"}
            records.append(make_record(number, task, problem.question, chosen, rejected, writers))
        outcomes.setdefault(task, Counter())[outcome] += 1
    return records, outcomes


def print_outcomes(
    positives: Choices, negatives: Choices, outcomes: dict[str, Counter]
) -> None:
    """A line per task: its pairs, who was how often right, and why prompts gave no pair."""
    print(f"{'task':10}{'prompts':>8}{'pairs':>7}{'teacher':>9}{'student':>9}"
          "   (share of right ones); no pair:")
    for task, counts in outcomes.items():
        teacher_right = positives.n_right[task] / positives.n_samples[task]
        student_right = negatives.n_right[task] / negatives.n_samples[task]
        reasons = [f"{reason} {n}" for reason, n in counts.items() if reason != "pairs"]
        print(f"{task:10}{counts.total():8}{counts['pairs']:7}{teacher_right:9.2f}"
              f"{student_right:9.2f}   {', '.join(reasons)}")
    print(f"the teacher wrote {positives.n_tokens:,} tokens, "
          f"the student {negatives.n_tokens:,}")


def served_logprobs(
    teacher: Served, pairs: list[Pair], batches: list[np.ndarray], max_rows: int, dist: Dist,
    top_k: TopK,
) -> dict[int, list[float]]:
    """{pair: summed log-probabilities of its two responses} by servers that have the teacher, whose
    likeliest tokens go to top_k; as distill.sequence_logprobs does it with a model.

    batches: this rank's pairs of each step.
    """
    numbers = np.unique(np.concatenate(batches)).tolist()
    sequences = to_sequences([pairs[i] for i in numbers], for_teacher=True)
    sums, halves = {}, {}
    for batch in teacher.score(sequences, top_k.k, max_rows):
        for place, (scores,) in batch.items():
            sides = halves.setdefault(place // 2, {})
            sides[place % 2] = scores
            if len(sides) == len(SIDES):
                both = [sides[CHOSEN], sides[REJECTED]]
                pair = numbers[place // 2]
                sums[pair] = [scores.total for scores in both]
                ids = np.concatenate([scores.ids for scores in both])
                logprobs = np.concatenate([scores.logprobs for scores in both])
                top_k.write(np.array([pair]), ids, logprobs)
                del halves[place // 2]
    return dist.gather(sums)


# --------------------------------------------------------------------------------------------------
# New negatives from the present student


def refresh_negatives(
    run: loop.Run, problems: list[tuple[str, Problem]], pairs: list[Pair], step: int, n_steps: int,
    key: str,
) -> None:
    """Puts new samples of the student in place of rejected responses, changing `pairs`.

    Of the pairs of the next refresh_every steps, where the sample is worse, or whatever it is
    (negatives="any"). The samples are kept on disk, in a folder of the run's `key`: a resumed run
    takes the same.
    """
    cfg, dist = run.cfg, run.dist
    folder, name = run.folder / f"refresh-{key}", f"{step:08d}"
    n_pairs = min(cfg.refresh_every, n_steps - step) * cfg.batch_pairs
    upcoming = loop.shuffled_indices(len(pairs), step * cfg.batch_pairs, n_pairs, cfg.seed)
    due = np.unique(upcoming).tolist()
    negatives = dist.from_main(
        lambda: {row["pair"]: row["tokens"] for row in common.read_kept_lines(folder, name)})
    done = {place for place, pair in enumerate(due) if pair in negatives}
    sampler = open_sampler(cfg.student_servers, run, cfg.served_weights)
    missing = sampler.pieces(range(len(due)), done, cfg.n_samples, cfg.max_rows, dist)
    if missing:
        sampler.update(run.unsharded_model(), step)
    sampled = {}
    for places in dist.hand_out(missing, "new negatives"):
        piece_pairs = {place: due[place] for place in places}
        for batch in sample_negatives(sampler, run, problems, pairs, piece_pairs, step):
            rows = [{"pair": i, "tokens": tokens} for i, tokens in batch.items()]
            common.keep_lines(folder / f"{name}.{dist.rank}.jsonl", rows)
            sampled |= batch
    negatives |= dist.gather(sampled)
    for i, tokens in negatives.items():
        if tokens is not None:
            pairs[i] = dataclasses.replace(pairs[i], rejected=tokens)


def sample_negatives(
    sampler, run: loop.Run, problems: list[tuple[str, Problem]], pairs: list[Pair],
    piece_pairs: dict[int, int], step: int,
) -> Iterator[dict[int, list[int] | None]]:
    """Yields {pair: tokens of its new rejected response, or None where it gets none}.

    piece_pairs: place among all that are due, which decides the draws -> pair.
    """
    cfg = run.cfg
    settings = dataclasses.replace(cfg, n_samples=1) if cfg.negatives == "any" else cfg
    numbers = list(piece_pairs.values())  # of the pairs
    pair_problems = [problems[pairs[i].number] for i in numbers]
    seed = cfg.seed * 1_000_000_000 + step
    batches = sample_and_score(
        sampler, run.tokenizer, pair_problems, settings, seed, list(piece_pairs))
    for batch in batches:
        negatives = {}
        for place, samples in batch.items():
            pair = pairs[numbers[place]]
            if cfg.negatives == "any":
                negative = samples[0]
            else:
                negative = choose_negative(samples, cfg.min_positive_score - cfg.gap)
            prompt = pair.teacher_prompt or pair.prompt
            fits = negative and len(prompt) + len(negative["tokens"]) <= cfg.context
            negatives[numbers[place]] = negative["tokens"] if fits else None
        yield negatives
