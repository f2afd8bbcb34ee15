"""Damaged and hostile inputs: checkpoint folders, tokenizers, data files, a server's answers.

Each try changes something that works, at random and repeatably (by its number), and hands it to the
code that reads it. That must end in a result or in one line of ours (UserError): a traceback, the
death of the process, more than SECONDS or MEMORY is a fault. checks.fuzz runs it.
"""
import dataclasses
import gzip
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

import common
import hf
from common import UserError
from data import llm
from data.text import sources
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from model import ModelConfig, Transformer

SECONDS = 10         # of CPU time that a try may take, its children apart
WALL = 120           # and of time in all, on a busy machine
MEMORY = 4 << 30     # bytes of address space beside what the process has before
LONGEST_LINE = 2000  # characters of what a UserError says

HOSTILE = [
    None, True, False, 0, 1, -1, 3, 255, 1 << 31, 1 << 62, 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "../x", "/etc/passwd", "\0", "\x1b[2J", "false", "1e5", "\ud800",
    "x" * 100_000, [], [1], [[]], {}, {"a": {}}, [None] * 1000,
]
TEXTS = ["A plain text of a few words.", "naïve 你好 🙂\nwith lines\n\n", "x = 1\n" * 50]


# --------------------------------------------------------------------------------------------------
# Changes

def damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut out, doubled, moved in, or all behind a place gone."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        size = rng.choice((1, 1, 2, 8, 100))
        kind = rng.randrange(6)
        if kind == 0:
            del data[at:at + size]
        elif kind == 1:
            data[at:at] = rng.randbytes(size)
        elif kind == 2:
            data[at:at] = data[at:at + size]
        elif kind == 3:
            data[at:at + size] = rng.choice((b"\0", b"\xff", b"\n", b"{", b"9")) * size
        elif kind == 4 and rng.random() < 0.3:
            del data[at:]
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def changed(value: object, rng: random.Random) -> object:
    """A JSON value in which one value, somewhere, has become a hostile one, or is gone."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = dict(value)
        if rng.random() < 0.1:
            del rest[key]
        else:
            rest[key] = changed(value[key], rng)
        return rest
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], changed(value[at], rng), *value[at + 1:]]
    return rng.choice(HOSTILE)


def changed_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with a hostile value, or damaged, or nested without end."""
    kind = rng.random()
    if kind < 0.2:
        return damaged(data, rng)
    if kind < 0.22:
        return rng.choice((b"[", b'{"a":')) * 100_000
    return json.dumps(changed(json.loads(data), rng)).encode()


def changed_weights(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or damaged."""
    if rng.random() < 0.4:
        return damaged(data, rng)
    size = struct.unpack("<Q", data[:8])[0]
    header = changed_json(data[8:8 + size], rng)
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 1 << 31, 1 << 63))
    return struct.pack("<Q", size) + header + data[8 + len(header):]


def change_file(path: Path, rng: random.Random) -> None:
    """Changes a file by its kind, or puts something else in its place."""
    kind = rng.random()
    if kind < 0.04:
        path.unlink()
        if kind < 0.01:
            os.mkfifo(path)
        elif kind < 0.02:
            path.mkdir()
        elif kind < 0.03:
            path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", path.name, "..")))
        return
    change = {".json": changed_json, ".safetensors": changed_weights}.get(path.suffix, damaged)
    path.write_bytes(change(path.read_bytes(), rng))


# --------------------------------------------------------------------------------------------------
# What is tried: each makes its input anew in an empty folder, and reads it

def small_tokenizer() -> Tokenizer:
    return train_tokenizer(["a small text to learn from. " * 20], TokenizerConfig(vocab_size=320))


class Folders:
    """hf.load of folders like Hugging Face's and of our own, with checksums that are right."""

    def __init__(self, where: Path):
        self.where = where
        tokenizer = small_tokenizer()
        cfg = ModelConfig(2, 16, 24, 2, 1, 8, vocab_size=320, max_context=64)
        model = Transformer(cfg)
        hf.export(model, tokenizer, where / "theirs", torch.float32)
        tokenizer.save(where / "tokenizer.json")
        alone = common.Dist(0, 1, torch.device("cpu"), None)
        optimizer = common.adamw(model, 1e-3, (0.9, 0.95), 0.1)
        meta = {"model": dataclasses.asdict(cfg), "tokenizer_ids": tokenizer.ids}
        common.save_checkpoint(alone, where, 7, model, optimizer, meta, where / "tokenizer.json")

    def __call__(self, folder: Path, rng: random.Random) -> str:
        source = self.where / rng.choice(("theirs", "step_00000007"))
        shutil.copytree(source, folder, dirs_exist_ok=True)
        files = [path for path in folder.iterdir() if path.name != "tokenizer.json"]
        for path in rng.sample(files, rng.choice((1, 1, 2))):
            change_file(path, rng)
        meta = folder / "meta.json"
        if source.name.startswith("step_") and rng.random() < 0.9 and meta.is_file():
            self.seal(folder)
        hf.load(folder)
        return "loaded"

    def seal(self, folder: Path) -> None:
        """Has meta.json say the checksums of the files as they are, where it still can."""
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            for name in meta["files"]:
                data = (folder / name).read_bytes() if (folder / name).is_file() else b""
                meta["files"][name] = [len(data), zlib.crc32(data)]
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
            return
        (folder / "meta.json").write_text(json.dumps(meta))


class Tokenizers:
    """Tokenizer.load, and the encoding of a few texts, of files with hostile values."""

    def __init__(self, where: Path):
        self.whole = small_tokenizer().json.encode()

    def __call__(self, folder: Path, rng: random.Random) -> str:
        (folder / "tokenizer.json").write_bytes(changed_json(self.whole, rng))
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        for text in TEXTS:
            tokenizer.decode(tokenizer.encode(text))
        return "loaded"


class DataFiles:
    """The documents of text files, JSON lines and Parquet, packed or not, in several encodings."""

    def __init__(self, where: Path):
        lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS * 9)
        texts = "\n".join(TEXTS).encode()
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS * 9}), where / "a.parquet")
        parquet = (where / "a.parquet").read_bytes()
        self.files = {
            "a.txt": texts, "a.md": texts, "b.txt": texts.decode().encode("utf-16"),
            "a.jsonl": lines.encode(), "b.jsonl": lines.encode("utf-16"), "a.parquet": parquet,
            "c.txt.gz": gzip.compress(texts), "c.jsonl.gz": gzip.compress(lines.encode()),
            "c.parquet.gz": gzip.compress(parquet),
            "d.jsonl.zst": pyarrow.compress(lines.encode(), "zstd", asbytes=True),
        }

    def __call__(self, folder: Path, rng: random.Random) -> str:
        name = rng.choice(list(self.files))
        (folder / name).write_bytes(damaged(self.files[name], rng))
        position = sources.ReadPosition(quiet=True)
        n = sum(1 for _ in sources.texts([{"path": str(folder)}], position, "text"))
        return "read" if n else "nothing in it"


class Answers:
    """http_llm, of a server that answers with damaged JSON, statuses and headers."""

    def __init__(self, where: Path):
        llm.BACKOFF = 0.001
        self.server = None

    def __call__(self, folder: Path, rng: random.Random) -> str:
        if self.server is None:  # in the process that asks
            self.server = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=self.serve, daemon=True).start()
        message = {"role": "assistant", "content": "An answer.", "reasoning_content": "So it is."}
        answer = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"total": 3}}
        body = json.dumps(answer).encode()
        if rng.random() < 0.8:
            body = changed_json(body, rng)
        status = rng.choice((200, 200, 200, 200, 204, 301, 400, 401, 429, 500, 999))
        head = f"HTTP/1.1 {status} OK\r\nContent-Length: {len(body)}\r\nRetry-After: 9999\r\n\r\n"
        self.answer = head.encode() + body
        if rng.random() < 0.3:
            self.answer = damaged(self.answer, rng)
        cfg = llm.LLMConfig(url=f"http://127.0.0.1:{self.server.getsockname()[1]}/v1", model="m",
                            timeout=5, retries=0)
        text = llm.http_llm(cfg)([[{"role": "user", "content": "?"}]])[0]
        return "none" if text is None else "a text"

    def serve(self) -> None:
        while True:
            connection, _ = self.server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(self.answer)


KINDS = {"folders": Folders, "tokenizers": Tokenizers, "data files": DataFiles, "answers": Answers}


# --------------------------------------------------------------------------------------------------
# Many tries, in processes that may die

def outcome(work: Callable, number: int, seed: str) -> str:
    """How a try ended, in a word; "traceback …" and "a line …" for faults."""
    rng = random.Random(f"{seed} {number}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return work(Path(folder), rng)
        except UserError as error:
            said = str(error)
            is_good = said.isprintable() and len(said) < LONGEST_LINE
            return "refused" if is_good else f"a line that is none: {said[:200]!r}"
        except BaseException as error:
            return f"traceback: {type(error).__name__}: {str(error)[:200]!r}"


def child(work: Callable, numbers: range, seed: str, pipe: int) -> None:
    """Tries what is numbered so, and says of each when it begins and how it ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(WALL)
        os.write(pipe, f"{json.dumps([number, outcome(work, number, seed)])}\n".encode())


def run(kind: str, n: int) -> Counter:
    """{how it ended: how often} of n tries. A process that dies is a fault, and followed by
    another."""
    with tempfile.TemporaryDirectory() as where:
        return _run(kind, KINDS[kind](Path(where)), n)


def _run(kind: str, work: Callable, n: int) -> Counter:
    ends, first = Counter(), 0
    while first < n:
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                child(work, range(first, n), kind, write)
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as results:
            for line in results:
                number, end = json.loads(line)
                ends[end] += 1
                first = number + 1
                if ":" in end:
                    print(f"FAULT in {kind}, try {number}: {end}", flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if first < n:
            ends[f"death: exit code {status}"] += 1
            print(f"FAULT in {kind}, try {first}: the process ended with code {status}", flush=True)
            first += 1
    return ends


def run_all(n: int) -> dict[str, Counter]:
    """The ends of n tries, shared out among the kinds; of tokenizers, which take a process each,
    fewer."""
    shares = {"folders": 0.35, "tokenizers": 0.1, "data files": 0.3, "answers": 0.25}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with ProcessPoolExecutor(len(shares), get_context("fork")) as pool:
        ends = {kind: pool.submit(run, kind, round(n * share)) for kind, share in shares.items()}
        return {kind: end.result() for kind, end in ends.items()}
