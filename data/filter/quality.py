"""The hybrid filter: which documents are of high or medium quality, or dropped.

As in the report (arXiv 2512.06266, section 2), two scores decide. *Tags*: a strong model grades a
seed set 0-9 on several dimensions, and a small model distilled from it grades everything.
*Retrieval*: lexical and vector similarity to curated documents. Before that go exact and near
duplicates, and what overlaps with evaluation sets (data/filter/dedup.py).

    python -m data.filter.quality configs/filter.py                 # all steps
    python -m data.filter.quality configs/filter.py --engine=ray    # on a cluster

The steps, each resumable: label (a language model grades the seed set, if a file does not), fit
(the small model), sign (signatures for duplicates), merge (the signatures of all), classify (writes
high/ and medium/, which are sources for data.text.corpus). Signing and classifying take a part of
the sources at a time, a file or a range of a large one, and whoever is free takes the next.

The report says neither which dimensions nor how the two scores meet: our choice
(data/filter/classifier.py).
"""
from settings import Bounds, Count, Length, Sources, from_dict, load_config

import functools
import hashlib
import importlib
import itertools
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow
import pyarrow.parquet

import common
from common import UserError
from data.engine import Engine
from data.filter import dedup
from data.filter.classifier import N_CURATED, Filter, excerpt, fit
from data.llm import LLM, LLMConfig, cached, first_json, http_llm
from data.text.sources import (
    Part,
    find_files,
    invalid_reason,
    kept,
    parts,
    read,
    text_columns,
)

# Content before form: labels about content predict usefulness better (report, section 2).
DIMENSIONS = {
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

STEPS = ("label", "fit", "sign", "merge", "classify")
CLASSES = ("high", "medium", "dropped")
REASONS = ("empty", "exact duplicate", "near duplicate", "contaminated", "low score")
EXCERPT = 8000  # characters by which a document is graded: from five places if it is longer


@dataclass
class QualityConfig:
    sources: Annotated[Sources, Length(1)]  # what is filtered, as in corpus.pools; of duplicates
                                 # the copy in the first source stays
    labels: str = ""             # .jsonl of {"text": …, "tags": {dimension: 0 … 9}}; made here if
                                 # there is an llm
    llm: dict = field(default_factory=dict)  # LLMConfig of the labeller: {"url": …, "model": …}
    n_labels: Count = 2000       # documents that it labels, spread over the parts
    curated: Sources = field(default_factory=list)  # good documents for retrieval; none: the best
                                 # labelled ones
    embed: str = ""              # "module:function" of texts -> (N, E) vectors; "": TF-IDF + SVD
                                 # of the labelled set
    high: float = 6.0            # score from which a document is of high quality
    drop: float = 3.0            # score below which it is dropped; between the two it is medium
    evaluation_sets: Sources = field(default_factory=list)  # whose texts no document may hold 13
                                 # words of
    step: Literal["label", "fit", "sign", "merge", "classify", "all"] = "all"  # all: in this order
    workers: Annotated[int, Bounds(0, 1000)] = 0  # processes (0: one a core, fewer for little text)


# --------------------------------------------------------------------------------------------------
# Labels

RUBRIC = """Grade the document below for the training of a language model.
Give a whole number from 0 (worst) to 9 (best) to each of:
{dimensions}
Answer with one JSON object and nothing else, like {example}

<document>
{text}
</document>"""


def label(cfg: QualityConfig, work: list, path: Path, llm: LLM) -> None:
    """Has the model grade documents of all parts alike; writes .jsonl of {"text", "tags"}."""
    per_part = -(-cfg.n_labels // len(work))
    texts = []
    for source, part in work:
        for text in itertools.islice(_documents(source, part), per_part):
            texts.append(excerpt(text, EXCERPT))
    texts = texts[:cfg.n_labels]
    dimensions = "\n".join(f"- {name}: {meaning}" for name, meaning in DIMENSIONS.items())
    example = json.dumps(dict.fromkeys(DIMENSIONS, 5))
    conversations = []
    for text in texts:
        prompt = RUBRIC.format(text=text, dimensions=dimensions, example=example)
        conversations.append([{"role": "user", "content": prompt}])
    answers = llm(conversations)
    lines = []
    for text, answer in zip(texts, answers):
        tags = read_grades(answer or "")
        if tags:
            lines.append(json.dumps({"text": text, "tags": tags}) + "\n")
    print(f"{len(lines)} of {len(texts)} documents have a grade from 0 to 9 in each of "
          f"{', '.join(DIMENSIONS)}")
    if 2 * len(lines) < len(texts):
        first = (answers[0] or "none")[:200]
        raise UserError(f"the model graded only {len(lines)} of {len(texts)} documents; its first "
                        f"answer was {first!r}; ask another model, or give quality.labels")
    common.write_atomic(path, "".join(lines))


def read_grades(answer: str) -> dict[str, int] | None:
    """{dimension: grade} in a model's answer; None where a grade is missing, or not 0 to 9."""
    tags = first_json(answer)
    if not isinstance(tags, dict):
        return None
    for name in DIMENSIONS:
        if type(tags.get(name)) is not int or not 0 <= tags[name] <= 9:
            return None
    return {name: tags[name] for name in DIMENSIONS}


def read_labels(path: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts, grades (N, G) and dimensions of a file of labels.

    UserError names the file and line of a fault.
    """
    def refuse(where: str, what: str) -> None:
        raise UserError(f"{where}: {what}")

    texts, grades = [], []
    dimensions = []
    source = {"path": str(path)}
    for part in parts(source):
        for number, record in read(source, part, bad_line=refuse):
            tags = record.get("tags")
            if not dimensions and isinstance(tags, dict):
                dimensions = list(tags)
            if not _is_label(record, dimensions):
                raise UserError(f"{path}: record {number} must be {{\"text\": …, \"tags\": "
                                "{dimension: 0 … 9}} with the dimensions of the first, "
                                f"{', '.join(dimensions) or 'of which there are none'}; "
                                f"it has {', '.join(record)}")
            texts.append(record["text"])
            grades.append([tags[name] for name in dimensions])
    return texts, np.array(grades), dimensions


def _is_label(record: dict, dimensions: list[str]) -> bool:
    """Whether a record has a text, and a grade from 0 to 9 in each of the dimensions."""
    text, tags = record.get("text"), record.get("tags")
    if not isinstance(text, str) or not isinstance(tags, dict):
        return False
    if sorted(tags) != sorted(dimensions):
        return False
    return all(isinstance(grade, (int, float)) and 0 <= grade <= 9 for grade in tags.values())


# --------------------------------------------------------------------------------------------------
# Documents of a part, and their signatures

def _documents(source: dict, part: Part, bad_lines: list[str] | None = None) -> Iterator[str]:
    """The text of each of a part's records, in their order; "" for one that holds none.

    bad_lines, if given, collects what was malformed. UserError for a column that is not there.
    """
    columns = text_columns(source)

    def bad_line(where: str, what: str) -> None:
        if bad_lines is not None:
            bad_lines.append(f"{where}: {what}")

    for _, record in read(source, part, bad_line=bad_line):
        if not kept(record, source):
            continue
        missing = [column for column in columns if column not in record]
        if missing:
            raise UserError(f"{part}: no column {missing[0]!r}; it has {', '.join(record)}")
        values = [record[column] for column in columns]
        is_text = all(isinstance(value, str) for value in values)
        yield "\n\n".join(values) if is_text else ""


def _all_documents(sources: list[dict]) -> Iterator[str]:
    """The documents of sources, part by part."""
    for source in sources:
        for part in parts(source):
            yield from _documents(source, part)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Documents to be scored together: few enough to fit in memory, however long they are."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == 64 or size > 4e6:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def sign_part(item: tuple, folder: Path) -> None:
    """Signs the documents of (number, (source, part))."""
    number, (source, part) = item
    dedup.sign(_documents(source, part), folder, number)


# --------------------------------------------------------------------------------------------------
# Classes

def classify(text: str, score: float, duplicate: int, contamination: dedup.Contamination,
             cfg: QualityConfig) -> tuple[str, str]:
    """(class, reason) of a document: one of CLASSES, and where it is dropped, one of REASONS.

    duplicate: as in dedup.duplicates.
    """
    if not text.strip():
        return "dropped", "empty"
    if duplicate == dedup.EXACT:
        return "dropped", "exact duplicate"
    if duplicate == dedup.NEAR:
        return "dropped", "near duplicate"
    if contamination(text):
        return "dropped", "contaminated"
    if score >= cfg.high:
        return "high", ""
    if score >= cfg.drop:
        return "medium", ""
    return "dropped", "low score"


def classify_part(item: tuple, cfg: QualityConfig, folder: Path, signatures: Path,
                  made_by: str) -> None:
    """Writes a part's documents to high/<number>.parquet and medium/… (text, score, tags).

    And what became of each document, with its score, to classified/<number>.parquet;
    classified/<number>.json, written last, marks it as done. item: (number, (source, part), number
    of its first document).
    """
    number, (source, part), first = item
    mark = folder / "classified" / f"{number:05d}.json"
    mark.unlink(missing_ok=True)
    duplicates = np.load(signatures / dedup.DUPLICATES, mmap_mode="r")[first:]
    filter = _load_filter(cfg, folder)
    contamination = _load_contamination(json.dumps(cfg.evaluation_sets))
    files = {name: _ParquetFile(folder / name / f"{number:05d}.parquet")
             for name in ("high", "medium", "classified")}
    table = {kind: {"documents": 0, "tokens": 0, "bytes": 0, "samples": []} for kind in CLASSES}
    reasons = dict.fromkeys(REASONS, 0)
    i = 0  # number of the document in its part
    bad_lines = []
    for batch in _batches(_documents(source, part, bad_lines)):
        for text, row in zip(batch, score_documents(batch, filter)):
            kind, reason = classify(text, row["score"], duplicates[i], contamination, cfg)
            if reason:
                reasons[reason] += 1
            else:
                files[kind].add({"text": text, **row})
            files["classified"].add({"number": i, "kind": kind, "reason": reason, **row})
            _count_document(table[kind], text, row["score"], reason)
            i += 1
    for file in files.values():
        file.close()
    common.write_atomic(mark, json.dumps({
        "made_by": made_by,
        "part": str(part),
        "table": table,
        "reasons": reasons,
        "bad_lines": len(bad_lines),
        "first_bad_lines": bad_lines[:3],
    }))


def _count_document(cell: dict, text: str, score: float, reason: str) -> None:
    """Adds a document to its class in a part's table; the first two are its samples."""
    cell["documents"] += 1
    cell["tokens"] += dedup.count(text)
    cell["bytes"] += len(text.encode("utf-8", "replace"))
    if len(cell["samples"]) < 2:
        beginning = " ".join(text[:300].split())[:160]
        cell["samples"].append(f"{score:.1f} {reason} {beginning}")


def score_documents(texts: list[str], filter: Filter) -> list[dict[str, float]]:
    """Score and tags of each document."""
    tags, scores, _ = filter.scores([excerpt(text, EXCERPT) for text in texts])
    rows = []
    for score, grades in zip(scores.tolist(), tags.tolist()):
        rows.append({"score": score, **dict(zip(filter.dimensions, grades))})
    return rows


class _ParquetFile:
    """A .parquet file that fills a group of rows at a time: whole or absent."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self.path = path
        self.aside = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.tmp")  # two may write it
        self.writer = None
        self.rows = []
        self.size = 0  # about the bytes of the rows that are held

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.size += len(row.get("text", "")) + 50
        if self.size > 16e6:
            self._flush()

    def _flush(self) -> None:
        if not self.rows:
            return
        table = pyarrow.Table.from_pylist(self.rows)
        if self.writer is None:
            self.writer = pyarrow.parquet.ParquetWriter(self.aside, table.schema,
                                                        compression="zstd")
        self.writer.write_table(table)
        self.rows = []
        self.size = 0

    def close(self) -> None:
        self._flush()
        if self.writer:
            self.writer.close()
            self.aside.replace(self.path)


def _load_filter(cfg: QualityConfig, folder: Path) -> Filter:
    """The fitted filter of a folder."""
    path = folder / "filter.npz"
    return _cached_filter(path, path.stat().st_mtime_ns, cfg.embed)


@functools.cache  # one a process; `changed` is when the file was written
def _cached_filter(path: Path, changed: int, embed: str) -> Filter:
    return Filter.load(path, _import_function(embed))


@functools.cache  # one a process
def _load_contamination(evaluation_sets: str) -> dedup.Contamination:
    """evaluation_sets: as JSON."""
    return dedup.Contamination(_all_documents(json.loads(evaluation_sets)))


def _import_function(name: str) -> Callable | None:
    """The function that "module:function" names, None for ""."""
    if not name:
        return None
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"quality.embed={name!r} must name a function, like embedders:embed "
                        f"({error})") from None


# --------------------------------------------------------------------------------------------------
# The steps

LARGEST = 128e6  # bytes of a file's range


def run(cfg: QualityConfig, folder: Path, engine: Engine = Engine()) -> None:
    """All steps that cfg.step asks for, each only as far as it is not done."""
    check_settings(cfg)
    work = [(source, part) for source in cfg.sources for part in parts(source, LARGEST)]
    if not work:
        raise UserError("quality.sources is empty: name what is to be filtered")
    folder.mkdir(parents=True, exist_ok=True)
    steps = STEPS if cfg.step == "all" else (cfg.step,)
    n_classified = len(list((folder / "classified").glob("*.json")))
    if "classify" in steps and n_classified < len(work):
        check_evaluation_sets(cfg.evaluation_sets)
    labels = Path(cfg.labels) if cfg.labels else folder / "labels.jsonl"
    if "label" in steps and not cfg.labels and not labels.is_file():
        label_step(cfg, work, folder, labels)
    if ("fit" in steps or "classify" in steps) and not labels.is_file():
        raise UserError(f"no labels at {labels}; make them with --quality.step=label")

    files = [find_files(source["path"]) for source in cfg.sources if "path" in source]
    names = [str(part) for _, part in work]
    signatures = folder / "signatures" / _hash(dedup.SCHEME, cfg.sources, names, files)
    label_text = labels.read_text() if labels.is_file() else ""
    fitted_by = _hash(label_text, cfg.curated, cfg.embed)
    if "fit" in steps and _made_by(folder / "fit.json") != fitted_by:
        fit_step(cfg, folder, labels, fitted_by)
    if "sign" in steps:
        sign_step(work, signatures, engine)
    if "merge" in steps:
        merge_step(work, signatures, engine)
    if "classify" in steps:
        classify_step(cfg, work, folder, signatures, fitted_by, engine)


def check_settings(cfg: QualityConfig) -> None:
    """Raises UserError for a wrong setting."""
    if cfg.drop > cfg.high:
        raise UserError(f"quality.drop={cfg.drop} is above quality.high={cfg.high}")
    for source in (*cfg.sources, *cfg.curated, *cfg.evaluation_sets):
        reason = invalid_reason(source)
        if reason:
            raise UserError(reason)
    for source in cfg.sources:
        for limit in ("documents", "megabytes"):
            if limit in source:
                raise UserError(f"{limit} has no effect here: the filter reads {source} whole")
    _import_function(cfg.embed)  # its error, too


def check_evaluation_sets(evaluation_sets: list[dict]) -> None:
    """Reads the sets that the last step looks for: their errors come before hours of work."""
    known = _load_contamination(json.dumps(evaluation_sets))
    if known.too_short:
        print(f"note: {known.too_short:,} of {known.n_items:,} evaluation items have fewer than "
              f"{dedup.SHORTEST} words and are not looked for")


def label_step(cfg: QualityConfig, work: list, folder: Path, labels: Path) -> None:
    """Makes the file of labels."""
    if not cfg.llm:
        raise UserError("no labels: give quality.labels (a file), or quality.llm (an endpoint "
                        "that grades documents)")
    llm = http_llm(from_dict(LLMConfig, cfg.llm, "quality.llm"))
    label(cfg, work, labels, cached(llm, folder / "answers.jsonl"))


def fit_step(cfg: QualityConfig, folder: Path, labels: Path, made_by: str) -> None:
    """Fits the small model to the labels: filter.npz."""
    texts, grades, dimensions = read_labels(labels)
    curated = list(itertools.islice(_all_documents(cfg.curated), N_CURATED))
    started = time.time()
    texts = [excerpt(text, EXCERPT) for text in texts]
    curated = [excerpt(text, EXCERPT) for text in curated]
    filter = fit(texts, grades, dimensions, curated, _import_function(cfg.embed))
    filter.save(folder / "filter.npz")
    common.write_atomic(folder / "fit.json", json.dumps({"made_by": made_by}))
    print(f"fit: {len(texts)} labelled documents, {len(filter.idf):,} grams, "
          f"{time.time() - started:.0f} s")


def sign_step(work: list, signatures: Path, engine: Engine) -> None:
    """Signs the documents of all parts that are not signed yet."""
    items = list(enumerate(work))
    sizes = _sizes(work)
    for _ in engine.map(sign_part, items, "sign", sizes, folder=signatures):
        pass


def _sizes(work: list) -> list[int]:
    """Bytes of each (source, part); where nobody knows, as many as a range of a large file has."""
    return [int(LARGEST) if part.bytes is None else part.bytes for _, part in work]


def merge_step(work: list, signatures: Path, engine: Engine) -> None:
    """Finds the duplicates among the documents of all parts."""
    missing = dedup.unsigned(signatures, len(work))
    if missing:
        raise UserError(f"{len(missing)} of {len(work)} parts of the sources are not signed yet: "
                        "run --quality.step=sign")
    dedup.merge(signatures, len(work), engine)
    kinds = np.load(signatures / dedup.DUPLICATES, mmap_mode="r")
    n_exact, n_near = (kinds == dedup.EXACT).sum(), (kinds == dedup.NEAR).sum()
    print(f"merge: {len(kinds):,} documents, {n_exact:,} exact and {n_near:,} near duplicates")


def classify_step(cfg: QualityConfig, work: list, folder: Path, signatures: Path, fitted_by: str,
                  engine: Engine) -> None:
    """Classifies the parts that are not classified yet, and prints the table of all."""
    if not (signatures / dedup.DUPLICATES).is_file():
        raise UserError("--quality.step=merge has not been done with these sources")
    if _made_by(folder / "fit.json") != fitted_by:
        raise UserError("--quality.step=fit has not been done with these settings")
    for name in ("high", "medium", "classified"):
        for path in (folder / name).glob("[0-9]*"):
            if path.suffix == ".tmp" or int(path.stem) >= len(work):  # there were more parts once
                path.unlink(missing_ok=True)
    made_by = _hash(signatures.name, fitted_by, cfg.high, cfg.drop, cfg.evaluation_sets)
    firsts = dedup.merge(signatures, len(work), engine)
    items = []
    for number, (source, part) in enumerate(work):
        if _made_by(folder / "classified" / f"{number:05d}.json") != made_by:
            items.append((number, (source, part), int(firsts[number])))
    print(f"classify: {len(items)} of {len(work)} parts to do")
    sizes = _sizes([each for _, each, _ in items])
    for _ in engine.map(classify_part, items, "classify", sizes, cfg=cfg, folder=folder,
                        signatures=signatures, made_by=made_by):
        pass
    print_table(folder, len(work), made_by)


def print_table(folder: Path, n_parts: int, made_by: str) -> None:
    """Prints documents, tokens and samples of each class, over the parts classified so far."""
    done = []  # with these settings
    for path in sorted((folder / "classified").glob("*.json")):
        part = json.loads(path.read_text())
        if part["made_by"] == made_by:
            done.append(part)
    print(f"\n{len(done)} of {n_parts} parts classified")
    print(f"{'':8}{'documents':>12}{'tokens*':>16}{'MB':>12}{'share':>8}")
    total = 0
    for part in done:
        total += sum(cell["bytes"] for cell in part["table"].values())
    for kind in CLASSES:
        cells = [part["table"][kind] for part in done]
        n_documents = sum(cell["documents"] for cell in cells)
        n_tokens = sum(cell["tokens"] for cell in cells)
        size = sum(cell["bytes"] for cell in cells)
        print(f"{kind:8}{n_documents:12,}{n_tokens:16,}{size / 1e6:12.2f}"
              f"{size / max(1, total):8.1%}")
        samples = itertools.chain.from_iterable(cell["samples"] for cell in cells)
        for sample in itertools.islice(samples, 3):
            print(f"    {sample}")
    dropped = []
    for reason in REASONS:
        n = sum(part["reasons"][reason] for part in done)
        dropped.append(f"{n:,} {reason}")
    n_bad_lines = sum(part["bad_lines"] for part in done)
    print(f"dropped: {', '.join(dropped)}; {n_bad_lines:,} malformed lines")
    print("* words and signs; a tokenizer's differ")


def _made_by(mark: Path) -> str:
    """The settings that a step, or its part, was done with; "" if it is not done.

    The mark, a .json file, is written last.
    """
    return json.loads(mark.read_text())["made_by"] if mark.is_file() else ""


def _hash(*values) -> str:
    """16 hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def main():
    config = load_config(__doc__, options=("run", "engine"), quality=QualityConfig)
    run(config.quality, config.out / "quality", Engine(config.engine, config.quality.workers))


if __name__ == "__main__":
    common.cli(main)
