"""Is a corpus the same from one process, from several, from Ray on several nodes, and after kills?

    python -m checks.engine                   # the bytes: processes, kills, sources that fail
    python -m checks.engine --ray             # and Ray, with one node and two, one of them killed
    python -m checks.engine --stores          # and the same files by HTTP and from an S3 server

The sources are this Python's text and generated pages, --megabytes of them (24), as .jsonl,
.jsonl.gz, .parquet and .txt, with planted duplicates across four sources and three pools. --write
adds a line to results/engine.jsonl. Ray and the stores are packages that are not required: pip
install ray s3fs moto[server] aiohttp. Speeds: checks/engine_speed.py.
"""
from settings import ROOT

import argparse
import contextlib
import functools
import gzip
import hashlib
import http.server
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

import common
from checks import bench
from data.engine import ONE_THREAD
from data.tasks import pages
from data.text.sources import ReadPosition, texts
from data.text.tokenizer import Tokenizer
from experiments import results

STORED = ("lines.jsonl", "packed.jsonl.gz", "table.parquet")
N_PLANTED = 120  # documents of which each of the four sources of three pools holds a copy
SETTINGS = ["--corpus.shard_tokens=1_000_000", "--tokenizer.vocab_size=1024",
            "--tokenizer.train_mb=1"]

CONFIG = """
corpus = dict(
    pools=dict(
        first=[dict(path="{folder}/lines.jsonl"), dict(path="{folder}/packed.jsonl.gz")],
        second=[dict(path="{folder}/table.parquet")],
        third=[dict(path="{folder}/books"), dict(pages=2000, families=dict(math=1), seed=9)],
    ),
    dedup=["second", "first", "third"], val_fraction=0.02)
"""


# --------------------------------------------------------------------------------------------------
# Sources

DOCUMENT = 3000  # characters of one, about, as on the web


def planted() -> list[str]:
    """Documents that are found in every source."""
    rng = random.Random(5)
    words = [f"word{i}" for i in range(5000)]
    return [" ".join(rng.choices(words, k=200)) for _ in range(N_PLANTED)]


def all_documents() -> Iterator[str]:
    """This Python's text and generated pages; in the second round the same passages are joined in
    another order, and so on for ever."""
    passages = [text for text, _ in texts([{"stdlib": 16}], ReadPosition(), "text")]
    passages += itertools.islice(pages.documents(dict(math=1, drills=1, code=1), 10**9, 3,
                                                 corrupt=False), 10_000)
    rng = random.Random(3)
    while True:
        rng.shuffle(passages)
        document = ""
        for passage in passages:
            document += passage + "\n\n"
            if len(document) > DOCUMENT:
                yield document
                document = ""


def write_lines(path: Path, opened: Callable, documents: Iterable[str]) -> None:
    with opened(path, "wt", encoding="utf-8") as f:
        for text in documents:
            f.write(json.dumps({"text": text}) + "\n")


def until(megabytes: float, documents: Iterator[str]) -> Iterator[str]:
    """The first documents, of about so many MB."""
    size = 0
    while size < 1e6 * megabytes:
        text = next(documents)
        size += len(text.encode())
        yield text


def write_sources(folder: Path, megabytes: float) -> None:
    """Four files or folders of different text, about megabytes in all, with the planted texts."""
    documents = all_documents()
    copies = planted()
    rows = {name: list(copies) for name in ("lines", "packed", "table", "books")}
    for texts_of_source in rows.values():
        texts_of_source += until(megabytes / 4, documents)
        random.Random(1).shuffle(texts_of_source)
    folder.mkdir()
    write_lines(folder / "lines.jsonl", open, rows["lines"])
    write_lines(folder / "packed.jsonl.gz", gzip.open, rows["packed"])
    table = pyarrow.table({"text": rows["table"]})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=500)
    (folder / "books").mkdir()
    for i, text in enumerate(rows["books"]):
        (folder / "books" / f"{i:06}.txt").write_text(text, encoding="utf-8")
    (folder / "config.py").write_text(CONFIG.format(folder=folder))


# --------------------------------------------------------------------------------------------------
# Runs

def command(folder: Path, out: str, *options: str, config: str = "config.py") -> list[str]:
    return [sys.executable, "-m", "data.text.corpus", str(folder / config),
            f"--corpus.folder={folder / out}", *SETTINGS, *options]


def run(folder: Path, out: str, *options: str, code: int = 0, **settings) -> str:
    """What a run prints; asserts its exit code."""
    done = subprocess.run(command(folder, out, *options, **settings), cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def digest(folder: Path) -> str:
    """Over the names and bytes of all shards."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.bin")):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def run_killed(folder: Path, out: str, seconds: float, kills: int, *options: str) -> None:
    """Starts a run again and again; it is killed `kills` times at random moments of so many
    seconds."""
    rng = random.Random(out)
    for _ in range(kills):
        process = subprocess.Popen(command(folder, out, *options), cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()  # SIGKILL: its workers notice by themselves
            process.wait()
    run(folder, out, *options)


def check_duplicates(folder: Path) -> None:
    """Of each planted document the copy of the first pool of corpus.dedup stays, and no other."""
    manifests = {name: json.loads((folder / name / "manifest.json").read_text())
                 for name in ("second", "first", "third")}
    lost = {name: manifest["lost"]["duplicates"] for name, manifest in manifests.items()}
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    found = {}
    for name, manifest in manifests.items():
        kept = b""
        for entry in manifest["shards"]:
            data = (folder / name / entry["file"]).read_bytes()
            ids = np.frombuffer(data, "<u2", entry["tokens"], 64 + 8 * entry["documents"])
            kept += tokenizer.decode_bytes(ids.tolist())
        found[name] = sum(text.encode() in kept for text in planted())
    print(f"planted in four sources of three pools: {N_PLANTED}; found in {found}; left out {lost}")
    assert found == {"second": N_PLANTED, "first": 0, "third": 0}


def check_processes(folder: Path, kills: int) -> str:
    """One process, two, and killed ones: the same shards. Returns their digest."""
    started = time.time()
    run(folder, "one", "--corpus.workers=1")
    seconds = time.time() - started
    expected = digest(folder / "one")
    report("1 process", expected, expected)
    run(folder, "two", "--corpus.workers=2")
    report("2 processes", digest(folder / "two"), expected)
    run_killed(folder, "killed", seconds, kills, "--corpus.workers=2")
    report(f"2 processes, killed {kills} times", digest(folder / "killed"), expected)
    check_duplicates(folder / "one")
    return expected


def report(what: str, found: str, expected: str) -> None:
    print(f"{what:40} {found} {'the same' if found == expected else 'DIFFERENT'}", flush=True)
    assert found == expected


def check_faults(folder: Path) -> None:
    """A source that is cut is one bad line; with on_bad_line=stop, or where it is missing, an error
    ends all in a line, and what was written before is whole."""
    packed = folder / "packed.jsonl.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:len(whole) // 2])
    output = run(folder, "cut", "--corpus.workers=1")
    [bad_line] = [line for line in output.splitlines() if line.startswith("bad line ")]
    print(f"a source that is cut: {bad_line}")
    expect_error(folder, "a source that is cut, to be stopped at", "--corpus.on_bad_line=stop")
    packed.unlink()
    expect_error(folder, "a source that is missing")
    packed.write_bytes(whole)


def expect_error(folder: Path, what: str, *options: str) -> None:
    output = run(folder, "faulty", "--corpus.workers=1", *options, code=2)
    [error] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert not list((folder / "faulty").rglob("*.tmp")), output
    print(f"{what}: {error}")


# --------------------------------------------------------------------------------------------------
# Ray

def check_ray(folder: Path, expected: str, kills: int) -> None:
    """One node, two nodes, one of two killed, and the command itself killed: the same shards."""
    from ray.cluster_utils import Cluster

    for n_nodes in (1, 2):
        with ray_cluster(Cluster, n_nodes):
            run(folder, f"ray{n_nodes}", "--engine=ray")
        report(f"Ray, {n_nodes} nodes", digest(folder / f"ray{n_nodes}"), expected)
    with ray_cluster(Cluster, 2) as cluster:
        process = subprocess.Popen(command(folder, "lost", "--engine=ray"), cwd=ROOT)
        while len(list((folder / "lost").rglob("*.bin"))) < 3:
            assert process.poll() is None
            time.sleep(0.1)
        cluster.remove_node(list(cluster.worker_nodes)[-1], allow_graceful=False)
        assert process.wait(600) == 0
        report("Ray, a node of 2 killed", digest(folder / "lost"), expected)
        run_killed(folder, "rayskilled", 30, kills, "--engine=ray")
        report(f"Ray, the command killed {kills} times", digest(folder / "rayskilled"), expected)


@contextlib.contextmanager
def ray_cluster(make, n_nodes: int):
    """A cluster of nodes of one core on this machine, which RAY_ADDRESS names meanwhile."""
    cluster = make(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(n_nodes - 1):
        cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        del os.environ["RAY_ADDRESS"]
        cluster.shutdown()


# --------------------------------------------------------------------------------------------------
# Other stores

class Unreliable(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files; of five answers one is refused, and one cut in its middle."""
    n_asked = 0

    def do_GET(self):
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = data[first:last + 1]
        Unreliable.n_asked += 1
        if Unreliable.n_asked % 5 == 1:
            self.send_error(503)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if Unreliable.n_asked % 5 == 3 else data)

    def log_message(self, *args):
        pass


def check_stores(folder: Path) -> None:
    """The same shards from files here, over a bad HTTP connection, and from a server of S3's
    form."""
    import boto3
    from moto.server import ThreadedMotoServer

    handler = functools.partial(Unreliable, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    moto = ThreadedMotoServer(port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key",
                   "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    bucket = boto3.resource("s3").create_bucket(Bucket="sources")
    for name in STORED:
        bucket.upload_file(str(folder / name), name)
    stores = {"files here": folder, "HTTP, cut and refused": "http://127.0.0.1:"
              f"{server.server_port}", "a server of S3's form": "s3://sources"}
    expected = ""
    for what, base in stores.items():
        out = what.split()[0]
        sources = [dict(path=f"{base}/{name}") for name in STORED]
        (folder / "stored.py").write_text(f"corpus = dict(pools=dict(text={sources!r}))\n")
        output = run(folder, out, config="stored.py")
        expected = expected or digest(folder / out)
        report(what, digest(folder / out), expected)
        assert not any("secret" in path.read_text() for path in (folder / out).rglob("*.json"))
        print(f"    taken up again {output.count('trying again')} times")
    server.shutdown()
    moto.stop()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--stores", action="store_true")
    parser.add_argument("--write", action="store_true", help="append to results/engine.jsonl")
    args = parser.parse_args()
    os.environ |= ONE_THREAD
    started = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sources"
        write_sources(folder, args.megabytes)
        expected = check_processes(folder, args.kills)
        if args.ray:
            check_ray(folder, expected, args.kills)
        if args.stores:
            check_stores(folder)
        check_faults(folder)
    if args.write:
        origin = bench.describe_origin("checks.engine", 0, torch.device("cpu"))
        results.append("engine", origin | dict(
            seconds=time.time() - started, digest=expected, **vars(args)))


if __name__ == "__main__":
    common.cli(main)
