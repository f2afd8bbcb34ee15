"""The hybrid filter: which documents are of high or medium quality, or dropped (arXiv 2512.06266, section 2).

Two scores decide. *Tags*: a strong model grades a seed set 0-9 on several dimensions, and a small model distilled from
it grades everything. *Retrieval*: lexical and vector similarity to curated documents. Before that go exact and near
duplicates, and what overlaps with evaluation sets (data/filter/dedup.py).

    python -m data.filter.quality configs/filter.py                                           # all steps, all shards
    python -m data.filter.quality configs/filter.py --quality.step=judge --quality.shards=0:8   # one machine's share of a step

The steps, each resumable: label (a writer grades the seed set, if a file does not), fit (the small model), sign (a
shard at a time: signatures for duplicates), merge (once), judge (a shard at a time: writes high/ and medium/, which are
sources for data.text.corpus). Scores that a data set brings with it can serve in place of label and fit: score_column.

The report says neither which dimensions nor how the two meet: our choice (data/filter/classifier.py).
"""
import functools
import hashlib
import importlib
import itertools
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from threadpoolctl import threadpool_limits

import common
from common import UserError
from data.filter import dedup
from data.filter.classifier import excerpt, Filter, fit
from data.text.sources import invalid_reason, kept, read, records, shards, text_columns
from data.llm import cached, first_json, http_llm, LLMConfig
from progress import progress_bar

DIMENSIONS = {  # content before form: labels about content predict usefulness better (report, section 2)
    "accuracy": "statements, results and code are right",
    "reasoning": "conclusions follow from what is said, step by step and in order",
    "completeness": "nothing that a reader needs is missing: question, context, answer",
    "focus": "it stays with its subject; no part belongs to something else",
    "depth": "it explains how and why, not only what",
    "usefulness": "somebody who studies the subject learns from it",
    "clarity": "it is well organised, and written in whole sentences",
    "cleanliness": "no advertising, navigation, boilerplate or broken encoding",
    "overall": "how much a language model would gain from learning it",
}


@dataclass
class QualityConfig:
    sources: list                # what is filtered, as in corpus.pools; a shard is a file of theirs
    labels: str = ""             # .jsonl of {"text": …, "tags": {dimension: 0 … 9}}; made here if there is a writer
    writer: dict = field(default_factory=dict)  # LLMConfig of the labeller: {"url": …, "model": …}
    n_labels: int = 2000         # documents that the writer labels, spread over the shards
    dimensions: dict = field(default_factory=dict)  # {name: what the writer grades}; {}: DIMENSIONS above
    curated: list = field(default_factory=list)  # sources of good documents for retrieval; none: the best labelled ones
    n_curated: int = 200         # documents taken of them
    embed: str = ""              # "module:function" of texts -> (N, E) vectors; "": TF-IDF + SVD of the labelled set
    score_column: str = ""       # a score that the records bring ("score", "int_score"), in place of labels and fit
    high: float = 6.0            # score from which a document is of high quality
    drop: float = 3.0            # score below which it is dropped; between the two it is medium
    evaluation_sets: list = field(default_factory=list)  # sources whose texts no document may hold 13 words of
    step: str = "all"            # "label", "fit", "sign", "merge", "judge", or "all" in this order
    shards: str = ""             # range of shards for sign and judge, "first:end"; "": all
    workers: int = 2             # processes, a shard each
    excerpt: int = 8000          # characters by which a document is judged: from five places if it is longer


STEPS = ("label", "fit", "sign", "merge", "judge")
CLASSES = ("high", "medium", "dropped")

# ---------------------------------------------------------------------------------------------------------------------
# Labels

RUBRIC = """Grade the document below for the training of a language model.
Give a whole number from 0 (worst) to 9 (best) to each of:
{dimensions}
Answer with one JSON object and nothing else, like {example}

<document>
{text}
</document>"""


def label(cfg: QualityConfig, parts: list, path: Path, writer: Callable) -> None:
    """Has the writer grade documents of all shards alike, and writes .jsonl of {"text", "tags"} to path."""
    dimensions, each = cfg.dimensions or DIMENSIONS, -(-cfg.n_labels // len(parts))
    texts = [excerpt(text, cfg.excerpt) for part in parts
             for text, _ in itertools.islice(_documents(*part), each)][:cfg.n_labels]
    rubric = dict(dimensions="\n".join(f"- {name}: {what}" for name, what in dimensions.items()),
                  example=json.dumps(dict.fromkeys(dimensions, 5)))
    answers = writer([[{"role": "user", "content": RUBRIC.format(text=text, **rubric)}] for text in texts])
    lines = []
    for text, answer in zip(texts, answers):
        tags = first_json(answer or "")
        if isinstance(tags, dict) and all(type(tags.get(d)) is int and 0 <= tags[d] <= 9 for d in dimensions):
            lines.append(json.dumps({"text": text, "tags": {d: tags[d] for d in dimensions}}) + "\n")
    print(f"{len(lines)} of {len(texts)} documents have a grade from 0 to 9 in each of {', '.join(dimensions)}")
    if 2 * len(lines) < len(texts):
        raise UserError(f"the writer graded only {len(lines)} of {len(texts)} documents; its first answer was "
                        f"{(answers[0] or 'none')[:200]!r}; ask another model, or give quality.labels")
    common.write_atomic(path, "".join(lines))


def read_labels(path: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts, grades (N, G) and dimensions of a file of labels; UserError names the file and line of a fault."""
    texts, grades, dimensions = [], [], None
    for number, record in enumerate(records({"path": str(path)}), 1):
        text, tags = record.get("text"), record.get("tags")
        dimensions = dimensions or list(tags or ())
        if not isinstance(text, str) or not isinstance(tags, dict) or sorted(tags) != sorted(dimensions) or not all(
                isinstance(grade, (int, float)) and 0 <= grade <= 9 for grade in tags.values()):
            raise UserError(f"{path}: record {number} must be {{\"text\": …, \"tags\": {{dimension: 0 … 9}}}} with the "
                            f"dimensions of the first, {', '.join(dimensions) or 'of which there are none'}; it has "
                            f"{', '.join(record)}")
        texts.append(text)
        grades.append([tags[d] for d in dimensions])
    return texts, np.array(grades), dimensions


# ---------------------------------------------------------------------------------------------------------------------
# Shards

def _documents(source: dict, shard: object, score_column: str = "", bad_lines: list | None = None) -> Iterator:
    """(text, record) of a shard's records, in their order; an empty text for one that holds none.

    bad_lines, if given, collects what was malformed. UserError for a column that is not there, score_column too.
    """
    columns, bad_lines = text_columns(source), [] if bad_lines is None else bad_lines
    for _, record in read(source, shard, bad_line=lambda where, what: bad_lines.append(f"{where}: {what}")):
        if kept(record, source):
            if missing := [c for c in (*columns, score_column) if c and c not in record]:
                raise UserError(f"{shard}: no column {missing[0]!r}; it has {', '.join(record)}")
            found = [record[c] for c in columns]
            yield "\n\n".join(found) if all(isinstance(t, str) for t in found) else "", record


def _batches(documents: Iterator) -> Iterator[list]:
    """Documents to be scored together: few enough to fit in memory, however long they are."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if len(batch) == 64 or size > 4e6:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def sign(number: int, part: tuple, cfg: QualityConfig, folder: Path, made_by: str) -> None:
    """Signatures of a shard's documents, (documents, COLUMNS) uint64 in <folder>/<number>.npy."""
    signatures, mark = [], folder / f"{number:05d}.json"
    mark.unlink(missing_ok=True)  # from here on the shard is not done with any settings
    for text, _ in _documents(*part):
        signatures.append(dedup.signature(text))
        _advance(len(text))
    _save(folder / f"{number:05d}.npy", np.array(signatures, np.uint64).reshape(-1, dedup.COLUMNS))
    common.write_atomic(mark, json.dumps({"made_by": made_by, "documents": len(signatures)}))


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".tmp.npy"), array)
    path.with_suffix(".tmp.npy").replace(path)


def judge(number: int, part: tuple, cfg: QualityConfig, folder: Path, made_by: str) -> None:
    """Writes a shard's documents to <folder>/high/<number>.parquet, medium/… (text, score, tags), and what became of
    each document, with its score, to judged/<number>.parquet; judged/<number>.json, written last, marks it as done."""
    mark = folder / "judged" / f"{number:05d}.json"
    mark.unlink(missing_ok=True)
    first, found = _first_document(folder, number), np.load(folder / "duplicates.npy", mmap_mode="r")
    out = {kind: _Rows(folder / kind / f"{number:05d}.parquet") for kind in ("high", "medium", "judged")}
    table = {kind: dict(documents=0, tokens=0, bytes=0, samples=[]) for kind in CLASSES}
    reasons = dict.fromkeys(("empty", "exact duplicate", "near duplicate", "contaminated", "low score"), 0)
    at, bad_lines, evaluation_sets = 0, [], json.dumps(cfg.evaluation_sets)
    for batch in _batches(_documents(*part, cfg.score_column, bad_lines)):
        duplicate = found[first + at:first + at + len(batch)]
        for (text, _), repeated, row in zip(batch, duplicate, _scores(batch, cfg, folder)):
            reason = ("empty" if not text.strip() else "exact duplicate" if repeated == 2 else
                      "near duplicate" if repeated else "contaminated" if _contamination(evaluation_sets)(text) else
                      "" if row["score"] >= cfg.drop else "low score")
            kind = "dropped" if reason else "high" if row["score"] >= cfg.high else "medium"
            if reason:
                reasons[reason] += 1
            else:
                out[kind].add({"text": text, **row})
            out["judged"].add({"number": at, "kind": kind, "reason": reason, **row})
            cell = table[kind]
            cell["documents"] += 1
            cell["tokens"] += dedup.count(text)
            cell["bytes"] += len(text.encode("utf-8", "replace"))
            if len(cell["samples"]) < 2:
                cell["samples"].append(f"{row['score']:.1f} {reason} {' '.join(text[:300].split())[:160]}")
            at += 1
            _advance(len(text))
    for rows in out.values():
        rows.close()
    common.write_atomic(mark, json.dumps({"made_by": made_by, "shard": str(part[1]), "table": table, "reasons": reasons,
                                          "bad_lines": len(bad_lines), "first_bad_lines": bad_lines[:3]}))


def _scores(batch: list[tuple[str, dict]], cfg: QualityConfig, folder: Path) -> list[dict[str, float]]:
    """Of each document its score, and its tags where the filter made it."""
    if cfg.score_column:
        scores = [record[cfg.score_column] for _, record in batch]
        if wrong := [score for score in scores if not isinstance(score, int | float | None)]:
            raise UserError(f"quality.score_column={cfg.score_column!r} must hold numbers, not {wrong[0]!r}")
        return [{"score": float("nan" if score is None else score)} for score in scores]
    filter = _filter(cfg, folder)
    tags, scores, _ = filter.scores([excerpt(text, cfg.excerpt) for text, _ in batch])
    return [{"score": score, **dict(zip(filter.dimensions, grades))} for score, grades in zip(scores.tolist(),
                                                                                              tags.tolist())]


class _Rows:
    """A .parquet file that fills a group of rows at a time: whole or absent."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.path, self.rows, self.size, self.writer = path, [], 0, None

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.size += len(row.get("text", "")) + 50
        if self.size > 16e6:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            table = pyarrow.Table.from_pylist(self.rows)
            self.writer = self.writer or pyarrow.parquet.ParquetWriter(self.path.with_suffix(".tmp"), table.schema,
                                                                       compression="zstd")
            self.writer.write_table(table)
            self.rows, self.size = [], 0

    def close(self) -> None:
        self._flush()
        if self.writer:
            self.writer.close()
            self.path.with_suffix(".tmp").replace(self.path)


def _first_document(folder: Path, number: int) -> int:
    """How many documents all shards before this one hold."""
    return sum(json.loads((folder / "signatures" / f"{i:05d}.json").read_text())["documents"] for i in range(number))


@functools.cache  # one a process
def _load_filter(path: Path, changed: int, embed: str) -> Filter:
    return Filter.load(path, _function(embed))


def _filter(cfg: QualityConfig, folder: Path) -> Filter:
    path = folder / "filter.npz"
    return _load_filter(path, path.stat().st_mtime_ns, cfg.embed)


def _function(name: str) -> Callable | None:
    """The function that "module:function" names, None for ""."""
    if not name:
        return None
    module, _, function = name.partition(":")
    sys.path[:0] = [] if "" in sys.path else [""]
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"quality.embed={name!r} must name a function, like embedders:embed ({error})") from None


@functools.cache
def _contamination(evaluation_sets: str) -> dedup.Contamination:
    """evaluation_sets: as JSON."""
    return dedup.Contamination(text for source in json.loads(evaluation_sets) for shard in shards(source)
                               for text, _ in _documents(source, shard))


# ---------------------------------------------------------------------------------------------------------------------
# The steps

_spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used threads (OpenMP, torch) can hang
_read = _spawn.Value("q", 0)  # characters, by all workers


def _advance(n: int) -> None:
    with _read.get_lock():
        _read.value += n


def _start_worker(counter) -> None:
    global _read
    _read = counter
    threadpool_limits(1)


def run_shards(work: Callable, cfg: QualityConfig, parts: list, folder: Path, made_by: str, marks: Path) -> None:
    """Does a step's work on the chosen shards that it is not done on yet, several at a time, a process each."""
    first, _, end = cfg.shards.partition(":")
    if cfg.shards and not (first.isdecimal() and end.isdecimal()):
        raise UserError(f"quality.shards must be like 0:8, not {cfg.shards!r}")
    chosen = range(len(parts))[slice(int(first), int(end))] if cfg.shards else range(len(parts))
    todo = [i for i in chosen if _made_by(marks / f"{i:05d}.json") != made_by]
    sizes = [shard.stat().st_size if isinstance(shard, Path) else 0 for _, shard in parts]
    todo.sort(key=lambda i: -sizes[i])  # large files first: no worker waits for the last one long
    print(f"{work.__name__}: {len(todo)} of {len(chosen)} shards to do")
    workers, before, started = min(cfg.workers, len(todo)), _read.value, time.time()
    jobs = [(i, parts[i], cfg, folder, made_by) for i in todo]
    with progress_bar(desc=work.__name__, unit=" characters", unit_scale=True) as bar:
        for _ in (work(*job) for job in jobs) if workers <= 1 else _in_processes(work, jobs, workers):
            bar.update(_read.value - before - bar.n)
    if todo:
        seconds, n = time.time() - started, (_read.value - before) / 1e6
        whose = resource.RUSAGE_SELF if workers == 1 else resource.RUSAGE_CHILDREN
        print(f"{work.__name__}: {n:.1f} million characters in {seconds:.0f} s, {60 * n / seconds:.0f} a minute; "
              f"at most {resource.getrusage(whose).ru_maxrss / 1e6:.2f} GB of memory a process")


def _in_processes(work: Callable, jobs: list[tuple], workers: int) -> Iterator[None]:
    """Does work(*job) for each job, and yields twice a second."""
    with ProcessPoolExecutor(workers, _spawn, _start_worker, (_read,)) as pool:
        waiting = {pool.submit(work, *job) for job in jobs}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                yield
        except BaseException as error:  # nobody waits for shards that are under way
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError("a worker was killed (too little memory?): run again with fewer --quality.workers; "
                                "whole shards are kept") from None
            raise


def _made_by(mark: Path) -> str:
    """The settings that a step, or its shard, was done with: its .json file is written last. "" if it is not done."""
    return json.loads(mark.read_text())["made_by"] if mark.is_file() else ""


def merge(n: int, made_by: str, folder: Path) -> None:
    """Finds the duplicates among all n shards' signatures: duplicates.npy."""
    marks = folder / "signatures"
    if missing := [i for i in range(n) if _made_by(marks / f"{i:05d}.json") != made_by]:
        raise UserError(f"{len(missing)} of {n} shards are not signed yet, the first is {missing[0]}: run "
                        f"--quality.step=sign --quality.shards={missing[0]}:{missing[-1] + 1}")
    if _made_by(folder / "merge.json") != made_by:
        (folder / "merge.json").unlink(missing_ok=True)
        found = dedup.duplicates([marks / f"{i:05d}.npy" for i in range(n)], folder / "duplicates.tmp.npy")
        (folder / "duplicates.tmp.npy").replace(folder / "duplicates.npy")
        common.write_atomic(folder / "merge.json", json.dumps({"made_by": made_by}))
        print(f"merge: {len(found):,} documents, {(found == 2).sum():,} exact and {(found == 1).sum():,} near "
              "duplicates")


def print_table(folder: Path, n: int, made_by: str) -> None:
    """Documents, tokens and samples of each class, over the shards judged so far with these settings."""
    done = [json.loads(path.read_text()) for path in sorted((folder / "judged").glob("*.json"))]
    done = [line for line in done if line["made_by"] == made_by]
    print(f"\n{len(done)} of {n} shards judged\n{'':8}{'documents':>12}{'tokens*':>16}{'MB':>12}{'share':>8}")
    total = sum(cell["bytes"] for line in done for cell in line["table"].values())
    for kind in CLASSES:
        cells = [line["table"][kind] for line in done]
        documents, tokens, size = (sum(cell[key] for cell in cells) for key in ("documents", "tokens", "bytes"))
        print(f"{kind:8}{documents:12,}{tokens:16,}{size / 1e6:12.2f}{size / max(1, total):8.1%}")
        for sample in [sample for cell in cells for sample in cell["samples"]][:3]:
            print(f"    {sample}")
    reasons = {key: sum(line["reasons"][key] for line in done) for key in (done[0]["reasons"] if done else ())}
    print("dropped: " + ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
          + f"; {sum(line['bad_lines'] for line in done):,} malformed lines\n* words and signs; a tokenizer's differ")


def run(cfg: QualityConfig, folder: Path) -> None:
    """All steps that cfg.step asks for, each only as far as it is not done."""
    if cfg.step not in (*STEPS, "all"):
        raise UserError(f"quality.step must be one of {', '.join(STEPS)}, all; not {cfg.step!r}")
    if cfg.drop > cfg.high:
        raise UserError(f"quality.drop={cfg.drop} is above quality.high={cfg.high}")
    for source in (*cfg.sources, *cfg.curated, *cfg.evaluation_sets):
        if wrong := invalid_reason(source):
            raise UserError(wrong)
    parts = [(source, shard) for source in cfg.sources for shard in shards(source)]
    if not parts:
        raise UserError("quality.sources is empty: name what is to be filtered")
    folder.mkdir(parents=True, exist_ok=True)
    steps = STEPS if cfg.step == "all" else (cfg.step,)
    content = [[source, str(shard), shard.stat().st_size if isinstance(shard, Path) else 0] for source, shard in parts]
    signed_by = _hash("sign", content)
    labels = Path(cfg.labels) if cfg.labels else folder / "labels.jsonl"
    if not cfg.score_column:
        if "label" in steps and not cfg.labels and not labels.is_file():
            if not cfg.writer:
                raise UserError("no labels: give quality.labels (a file), quality.writer (an endpoint that grades "
                                "documents), or quality.score_column (a score in the data)")
            writer = http_llm(common.from_dict(LLMConfig, cfg.writer, "quality.writer"))
            label(cfg, parts, labels, cached(writer, folder / "answers.jsonl"))
        if {"fit", "judge"} & set(steps) and not labels.is_file():
            raise UserError(f"no labels at {labels}; make them with --quality.step=label")
    fitted_by = _hash(cfg.score_column) if cfg.score_column else _hash(
        labels.read_text() if labels.is_file() else "", cfg.curated, cfg.n_curated, cfg.excerpt, cfg.embed)
    if "fit" in steps and not cfg.score_column and _made_by(folder / "fit.json") != fitted_by:
        texts, grades, dimensions = read_labels(labels)
        curated = [t for source in cfg.curated for shard in shards(source) for t, _ in _documents(source, shard)]
        started = time.time()
        made = fit([excerpt(t, cfg.excerpt) for t in texts], grades, dimensions,
                   [excerpt(t, cfg.excerpt) for t in curated[:cfg.n_curated]], _function(cfg.embed), cfg.n_curated)
        made.save(folder / "filter.npz")
        common.write_atomic(folder / "fit.json", json.dumps({"made_by": fitted_by}))
        print(f"fit: {len(texts)} labelled documents, {len(made.idf):,} grams, {time.time() - started:.0f} s")
    if "sign" in steps:
        run_shards(sign, cfg, parts, folder / "signatures", signed_by, folder / "signatures")
    if "merge" in steps:
        merge(len(parts), signed_by, folder)
    if "judge" in steps:
        for step, made_by in [("merge", signed_by), *([] if cfg.score_column else [("fit", fitted_by)])]:
            if _made_by(folder / f"{step}.json") != made_by:
                raise UserError(f"--quality.step={step} has not been done with these settings and sources")
        judged_by = _hash(signed_by, fitted_by, cfg.high, cfg.drop, cfg.evaluation_sets)
        for path in (path for kind in ("high", "medium", "judged") for path in (folder / kind).glob("[0-9]*")):
            if int(path.stem) >= len(parts):  # there were more shards once
                path.unlink(missing_ok=True)
        run_shards(judge, cfg, parts, folder, judged_by, folder / "judged")
        print_table(folder, len(parts), judged_by)


def _hash(*values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def main():
    cfg = common.load_config(__doc__, quality=QualityConfig)
    run(cfg.quality, cfg.out / "quality")


if __name__ == "__main__":
    common.cli(main)
