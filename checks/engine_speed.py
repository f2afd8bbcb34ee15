"""How fast a corpus is prepared, beside datatrove and `tokenizers`, and in how much memory.

    python -m checks.engine_speed cores                   # MB/s of one process and of two
    python -m checks.engine_speed memory                  # the peak at 100 MB of input and at 1 GB
    python -m checks.engine_speed datatrove --python=ENVIRONMENT/bin/python
    python -m checks.engine_speed tokenizer --tokenizer=FILE    # ids by words beside the whole way

The text is this Python's own and generated pages (checks/engine.py), --megabytes of it. datatrove
needs an environment of its own: pip install datatrove[processing] spacy tokenizers. --write adds a
line to results/engine_speed.jsonl.
"""
from settings import ROOT

import argparse
import collections
import functools
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import common
from checks import bench
from checks.engine import all_documents, command, digest, report, run, until, write_lines
from data.engine import ONE_THREAD, Engine
from data.filter import dedup
from data.text import corpus
from data.text.shards import CorpusConfig
from data.text.sources import ReadPosition, texts
from data.text.tokenizer import Tokenizer, TokenizerConfig, _without_control_tokens
from experiments import results


def measured(folder: Path, out: str, *options: str) -> tuple[float, float, float]:
    """(seconds, CPU-seconds, peak GB) of a run; with several processes, the peak of the first."""
    shutil.rmtree(folder / out, ignore_errors=True)
    tokenizer = folder / "sample" / "tokenizer.json"
    started = time.time()
    with open(folder / f"{out}.log", "w") as log:
        process = subprocess.Popen(
            command(folder, out, f"--tokenizer.path={tokenizer}", *options), cwd=ROOT, stdout=log,
            stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (folder / f"{out}.log").read_text()
    seconds = time.time() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def train_tokenizer(folder: Path) -> Path:
    """The tokenizer.json of a short run, in the folder."""
    write_lines(folder / "sample.jsonl", open, until(1, all_documents()))
    write_plain_config(folder, "sample.jsonl")
    run(folder, "sample")
    return folder / "sample" / "tokenizer.json"


def measure_cores(folder: Path, megabytes: float, turns: int) -> dict:
    """MB/s of one process and of two, which take turns; the same bytes."""
    train_tokenizer(folder)
    write_lines(folder / "text.jsonl", open, until(megabytes, all_documents()))
    write_plain_config(folder, "text.jsonl")
    seconds = {1: [], 2: []}
    for _ in range(turns):
        for workers in seconds:
            taken, _, _ = measured(folder, f"by{workers}", f"--corpus.workers={workers}")
            seconds[workers].append(taken)
    report("2 processes", digest(folder / "by2"), digest(folder / "by1"))
    best = {workers: megabytes / min(taken) for workers, taken in seconds.items()}
    print(f"1 process {best[1]:.2f} MB/s, 2 processes {best[2]:.2f} MB/s, "
          f"{best[2] / best[1]:.2f} x, of {megabytes:g} MB, start and end included")
    return {"mb_per_s": best, "seconds_each": seconds}


def write_plain_config(folder: Path, name: str, dedup: bool = False) -> None:
    """A config of one pool, "text", of one file."""
    sources = [dict(path=str(folder / name))]
    marked = ["text"] if dedup else []
    (folder / "config.py").write_text(f"corpus = dict(pools=dict(text={sources!r}), "
                                      f"dedup={marked!r})\n")


def measure_memory(folder: Path) -> dict:
    """The peak memory of one process that signs, marks and writes 100 MB and 1 GB, of a file that
    is cut into ranges and of one that is read from its beginning to its end."""
    train_tokenizer(folder)
    peaks = {}
    quick_gzip = functools.partial(gzip.open, compresslevel=1)
    for name, opened in (("text.jsonl", open), ("text.jsonl.gz", quick_gzip)):
        for megabytes in (100, 1000):
            write_lines(folder / name, opened, until(megabytes, all_documents()))
            write_plain_config(folder, name, dedup=True)
            _, seconds, peak = measured(folder, "memory", "--corpus.workers=1")
            peaks[f"{name}, {megabytes} MB"] = peak
            print(f"{name:14} of {megabytes:5} MB: {seconds:5.0f} CPU-seconds, "
                  f"peak {peak:.2f} GB", flush=True)
            shutil.rmtree(folder / "memory")
            (folder / name).unlink()
    return {"peak_gb": peaks}


# --------------------------------------------------------------------------------------------------
# Beside datatrove

N_COPIED = 500  # documents of which an exact and a near copy are planted


def with_copies(documents: list[str]) -> tuple[Sequence[str], Sequence[int]]:
    """The documents with two copies of N_COPIED of them, in another order; the number of the
    document of each, -1 for one that has no copies."""
    rng = random.Random(7)
    rows = [(text, -1) for text in documents]
    for i in range(N_COPIED):
        words = documents[i].split(" ")
        words[len(words) // 2] = "changed"
        rows[i] = (documents[i], i)
        rows += [(documents[i].upper(), i), (" ".join(words), i)]
    rng.shuffle(rows)
    texts_of_rows, groups = zip(*rows)
    return texts_of_rows, groups


def measure_datatrove(folder: Path, megabytes: float, turns: int, python: Path) -> dict:
    """CPU-seconds of one core beside datatrove's, which take turns: tokens, and duplicates."""
    tokenizer = train_tokenizer(folder)
    control = "|".join(map(re.escape, Tokenizer.load(tokenizer).special))
    documents = (text for text in all_documents()  # where it is text we take it as that
                 if not re.search(control, text))
    texts_of_file, groups = with_copies(list(until(megabytes, documents)))
    path = folder / "text.jsonl"
    write_lines(path, open, texts_of_file)
    seconds = {name: [] for name in ("tokens", "their tokens", "duplicates", "their duplicates")}
    for turn in range(turns):
        started = time.process_time()
        n_tokens = make_tokens(path, tokenizer, folder / f"ours{turn}")
        seconds["tokens"].append(time.process_time() - started)
        theirs = ask_peer(python, folder, "tokens", path, tokenizer, f"theirs{turn}")
        seconds["their tokens"].append(theirs["seconds"])
        assert n_tokens == theirs["tokens"]
        started = time.process_time()
        left_out = find_duplicates(path, folder / f"signed{turn}")
        seconds["duplicates"].append(time.process_time() - started)
        theirs = ask_peer(python, folder, "duplicates", path, f"peer{turn}")
        seconds["their duplicates"].append(theirs["seconds"])
    size = sum(len(text.encode()) for text in texts_of_file) / 1e6
    best = {name: size / min(taken) for name, taken in seconds.items()}
    found = {}
    for name, numbers in (("ours", left_out), ("theirs", theirs["left_out"])):
        kept = collections.Counter(groups)
        kept.subtract(groups[number] for number in numbers)
        # a document that is near another one may have no copy left
        assert max(kept[i] for i in range(N_COPIED)) == 1, f"{name}: two copies of one stay"
        found[name] = len(numbers) - 2 * N_COPIED
    print(", ".join(f"{name} {speed:.2f} MB/s" for name, speed in best.items()))
    for name in ("tokens", "duplicates"):
        print(f"{name}: {best[name] / best[f'their {name}']:.2f} x datatrove's, a core")
    print(f"of {N_COPIED} documents with two copies no two stay, with both; left out beside these "
          f"copies: {found}")
    return {"mb": size, "mb_per_s": best, "seconds_each": seconds, "left_out_beside": found}


def make_tokens(path: Path, tokenizer: Path, folder: Path) -> int:
    """Makes shards of a .jsonl; the number of tokens, without the two that begin and end each
    document."""
    cfg = CorpusConfig(path=str(path), shard_tokens=1_000_000, workers=1)
    manifests = corpus.prepare(folder, TokenizerConfig(path=str(tokenizer)), cfg, "")
    return sum(entry["tokens"] - 2 * entry["documents"] for entry in manifests["text"]["shards"])


def find_duplicates(path: Path, folder: Path) -> list[int]:
    """Numbers of the documents of a .jsonl that are left out as duplicates."""
    documents = texts([dict(path=str(path))], ReadPosition(), "text")
    dedup.sign((text for text, _ in documents), folder, 0)
    dedup.merge(folder, 1, Engine(workers=1))
    return np.flatnonzero(np.load(folder / dedup.DUPLICATES)).tolist()


def ask_peer(python: Path, folder: Path, *arguments: object) -> dict:
    """What checks/engine_peer.py answers, run in the folder."""
    peer = Path(__file__).with_name("engine_peer.py")
    done = subprocess.run([python.absolute(), "-P", peer, *arguments], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --------------------------------------------------------------------------------------------------
# The released tokenizer

STRANGE = [
    "", " ", "\n", "\t", "  a  b ", "a\u2581b", "\u2581\u2581 x", "\r\n\r\n", "\u00a0a\u3000b",
    "\x00\x1f\x7f", "<|im_start|>user<|im_end|>", "<think>\n</think><tool_call>", "<s></s>",
    "e\u0301a\u0308.", "2\u00b2 \u2460\u3002\u2461", "\U0001f642\U0001f469\u200d\U0001f467",
    "don't WE'LL", "def f(x):\n\treturn x[0]**2\n",
]


def check_tokenizer(path: str, megabytes: float) -> dict:
    """Ids of words against those of the whole text; speeds of both in CPU-seconds."""
    tokenizer = Tokenizer.load(path)
    assert tokenizer._words, "this tokenizer takes the whole way"
    whole = _without_control_tokens(json.loads(tokenizer.json), tokenizer.special)
    english = [text for text, _ in texts([{"stdlib": min(16, megabytes)}], ReadPosition(), "text")]
    rng = random.Random(0)
    pieces = [piece.decode("utf-8", "ignore") for piece in tokenizer.pieces]
    chinese = [piece for piece in pieces if re.search("[\u4e00-\u9fff]", piece)]
    found = {}
    for name, words in (("any pieces", pieces), ("Chinese pieces", chinese), ("strange", STRANGE)):
        n = {"strange": 40}.get(name, 400)
        found[name] = ["".join(rng.choices(words, k=n)) for _ in range(int(megabytes * 250))]
    found["English and code"] = english
    speeds = {}
    for name, documents in found.items():
        size = sum(len(text.encode()) for text in documents) / 1e6
        seconds = []
        ids = []
        for encode in (whole.encode_batch_fast, tokenizer.encode_batch):
            started = time.process_time()
            if encode == tokenizer.encode_batch:
                ids.append(encode(documents))
            else:
                encodings = encode(documents, add_special_tokens=False)
                ids.append([encoding.ids for encoding in encodings])
            seconds.append(time.process_time() - started)
        equal = sum(list(ours) == theirs for theirs, ours in zip(*ids))
        speeds[name] = [size / seconds[0], size / seconds[1]]
        print(f"{name:18} {size:6.1f} MB: {equal} of {len(documents)} documents have equal ids; "
              f"whole {speeds[name][0]:.2f} MB/s, by words {speeds[name][1]:.2f} MB/s")
        assert equal == len(documents)
    return {"tokenizer_mb_per_s": speeds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cores", "memory", "datatrove", "tokenizer"))
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--python", type=Path, default=sys.executable,
                        help="one that has datatrove")
    parser.add_argument("--tokenizer", default="", help="a tokenizer.json")
    parser.add_argument("--write", action="store_true", help="append to the results")
    args = parser.parse_args()
    os.environ |= ONE_THREAD
    started = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sources"
        folder.mkdir()
        if args.what == "cores":
            found = measure_cores(folder, args.megabytes, args.turns)
        elif args.what == "memory":
            found = measure_memory(folder)
        elif args.what == "datatrove":
            found = measure_datatrove(folder, args.megabytes, args.turns, args.python)
        else:
            found = check_tokenizer(args.tokenizer, args.megabytes)
    if args.write:
        origin = bench.describe_origin("checks.engine_speed", 0, torch.device("cpu"))
        results.append("engine_speed", origin | dict(
            seconds=time.time() - started, what=args.what, megabytes=args.megabytes) | found)


if __name__ == "__main__":
    common.cli(main)
