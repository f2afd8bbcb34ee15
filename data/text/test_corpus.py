"""Oracles: the tokenizer itself for what is in a shard, an unbroken run for a killed one, the texts
for their files."""

import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from common import UserError, cli
from data.filter import dedup
from data.text import corpus, shards
from data.text.corpus import documents, prepare, verify
from data.text.shards import HEADER, CorpusConfig, read_pool
from data.text.sources import ReadPosition
from data.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

TEXTS = [
    f"Document {i}: " + "naïve café 你好 🙂 <|endoftext|> 12 + 7 = 19\r\n" * (1 + i % 5)
    for i in range(300)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A small tokenizer; its file is tokenizer.name."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, TokenizerConfig(vocab_size=400)).save(path)
    return Tokenizer.load(path)


@pytest.fixture
def jsonl(tmp_path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))
    )
    return path


def make(folder: Path, tokenizer: Tokenizer, path: Path, **settings) -> dict:
    """Prepares the pool "text" of a file in small shards; returns its manifest."""
    cfg = CorpusConfig(
        **{"path": str(path), "shard_tokens": 1500, "val_fraction": 0.1, "workers": 1} | settings
    )
    return prepare(
        folder, TokenizerConfig(path=tokenizer.name), cfg, "python -m data.text.corpus CONFIG"
    )["text"]


def read(folder: Path, split: str, tokenizer: Tokenizer) -> list[list[int]]:
    """All documents of a split, as ids."""
    return [
        list(map(int, ids))
        for shard in read_pool(folder / "text", split, tokenizer.hash)
        for ids in np.split(shard.tokens, shard.ends[:-1].astype(int))
    ]


def split_texts(sources: list[dict], **settings) -> list[tuple[str, str]]:
    """All (split, text) of sources; a bad line is an error."""
    cfg = CorpusConfig(**settings)
    return [
        document
        for part in documents(sources, cfg, cfg.val_fraction, ReadPosition(stop=True))
        for document in part
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_shards_hold_the_documents(tmp_path, tokenizer, jsonl):
    manifest = make(tmp_path / "data", tokenizer, jsonl)
    got = {split: read(tmp_path / "data", split, tokenizer) for split in ("train", "val")}
    for split in got:
        texts = [
            text for s, text in split_texts([{"path": str(jsonl)}], val_fraction=0.1) if s == split
        ]
        assert got[split] == [
            [tokenizer.bos, *tokenizer.encode(text), tokenizer.eot] for text in texts
        ]
    assert len(got["train"]) + len(got["val"]) == 300 and 10 < len(got["val"]) < 60
    train = read_pool(tmp_path / "data" / "text", "train", tokenizer.hash)
    assert len(train) > 3 and all(1500 <= s.n_tokens < 1800 for s in train[:-1])
    assert all(
        s.ends[-1] == s.n_tokens == len(s.tokens) and s.tokens.dtype == np.uint16 for s in train
    )
    assert sum(e["text_bytes"] for e in manifest["shards"]) == sum(
        len(text.encode()) for text in TEXTS
    )
    assert verify(tmp_path / "data" / "text") == len(manifest["shards"])


def test_all_formats_give_the_same_documents(tmp_path, tokenizer, jsonl):
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "texts.parquet", row_group_size=70)
    for name in ("texts.jsonl", "texts.parquet"):
        (tmp_path / (name + ".gz")).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for i, text in enumerate(TEXTS):
        for folder, pack in (("txt", bytes), ("txt.gz", gzip.compress)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{i:03}.{folder}").write_bytes(pack(text.encode()))
    for name in (
        "texts.jsonl",
        "texts.jsonl.gz",
        "texts.parquet",
        "texts.parquet.gz",
        "txt",
        "txt.gz",
        "txt/*.txt",
    ):
        assert [
            text for _, text in split_texts([{"path": str(tmp_path / name)}], val_fraction=0.0)
        ] == TEXTS, name


def test_held_out_documents_are_in_no_training_shard(tmp_path, tokenizer):
    path = tmp_path / "twice.jsonl"  # each text twice: the copy must fall on the same side
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2))
    make(tmp_path / "data", tokenizer, path)
    train, val = (
        {tuple(ids) for ids in read(tmp_path / "data", split, tokenizer)}
        for split in ("train", "val")
    )
    assert val and not train & val and len(train | val) == len(TEXTS)


def test_a_text_file_is_held_out_by_its_end(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("0123456789" * 100)
    make(tmp_path / "data", tokenizer, tmp_path / "book.txt")
    (train,), (val,) = (read(tmp_path / "data", split, tokenizer) for split in ("train", "val"))
    assert (
        tokenizer.decode(train[1:-1]) == "0123456789" * 90
        and tokenizer.decode(val[1:-1]) == "0123456789" * 10
    )


def test_second_run_does_nothing_and_changes_are_seen(tmp_path, tokenizer, jsonl, capsys):
    folder = tmp_path / "data"
    make(folder, tokenizer, jsonl)
    before, times = contents(folder), {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    capsys.readouterr()
    make(folder, tokenizer, jsonl, workers=1)
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert contents(folder) == before and times == {
        p: p.stat().st_mtime_ns for p in folder.rglob("*")
    }

    make(folder, tokenizer, jsonl, shard_tokens=4000)
    assert "made again" in capsys.readouterr().out and len(contents(folder)) < len(before)
    with open(jsonl, "a") as f:
        f.write('{"text": "one more"}\n')
    make(folder, tokenizer, jsonl, shard_tokens=4000)
    assert "made again" in capsys.readouterr().out
    assert sum(len(read(folder, split, tokenizer)) for split in ("train", "val")) == 301


def test_what_is_ready_asks_no_hub_and_no_shard_goes_before_the_hub_answers(
    tmp_path, tokenizer, jsonl, monkeypatch
):
    folder = tmp_path / "data"
    make(folder, tokenizer, jsonl)
    before = contents(folder)

    def offline(*_):
        raise UserError("Offline?")

    monkeypatch.setattr(corpus, "_cut_into_pieces", offline)
    make(folder, tokenizer, jsonl)
    with pytest.raises(UserError, match="Offline"):
        make(folder, tokenizer, jsonl, shard_tokens=4000)
    assert contents(folder) == before


# Makes the pool in child processes that are killed at random moments soon after a shard, until one
# comes to its end.
KILLER = """
import json, os, random, signal, sys, time
import datasets
from pathlib import Path
from data.text import corpus
from data.text.test_corpus import Tokenizer, make
folder, name, sources = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
pause = float(sys.argv[4])
corpus.BATCH_DOCUMENTS = 25
draw, kills = random.Random(0), 0
tokenizer, manifest = Tokenizer.load(name), folder / "text" / "00000" / "manifest.json"
written = lambda: manifest.stat().st_mtime_ns if manifest.exists() else 0
while True:
    before, child = written(), os.fork()
    if not child:
        make(folder, tokenizer, "", pools={"text": sources}, shard_tokens=3000)
        os._exit(0)
    if kills < 5:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while written() == before and not os.waitid(os.P_PID, child, flags):
            time.sleep(0.001)
        time.sleep(draw.random() * pause)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    kills += 1
print("kills", kills)
"""


def of_every_kind(folder: Path) -> list[dict]:
    """Sources of all kinds, with bad, empty and left-out records, and limits; 1500 documents or
    so."""
    rows = [
        {"id": i, "text": f"{i} {text}" if i % 50 else "", "score": i % 6}
        for i, text in enumerate(TEXTS * 2)
    ]
    for k in range(3):
        (folder / "set").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows[k * 200 : k * 200 + 200]),
            folder / "set" / f"train-{k}.parquet",
            row_group_size=64,
        )
    (folder / "lines").mkdir()
    for k in range(2):
        lines = [json.dumps(row) for row in rows[k * 300 : k * 300 + 300]]
        (folder / "lines" / f"{k}.jsonl").write_text(
            "\n".join([*lines[:40], "{bad", "", *lines[40:]])
        )
    (folder / "book.txt").write_text("0123456789 " * 300)
    return [
        {"path": str(folder / "lines"), "keep": {"score": [1, None]}},
        {"path": str(folder / "book.txt")},
        {"hf": str(folder / "set"), "keep": {"score": [2, 4]}},
        {"hf": str(folder / "set"), "megabytes": 0.02},
        {"path": str(folder / "set"), "documents": 150},
        {"pages": 200, "families": {"math": 1}, "seed": 3},
        {"stdlib": 0.05},
    ]


def test_killed_runs_end_in_the_same_bytes(tmp_path, tokenizer):
    sources = of_every_kind(tmp_path)
    make(tmp_path / "warm", tokenizer, "", pools={"text": sources})
    started = time.time()
    manifest = make(
        tmp_path / "unbroken", tokenizer, "", pools={"text": sources}, shard_tokens=3000
    )
    pause = (time.time() - started) / 20
    command = [
        sys.executable,
        "-uc",
        KILLER,
        tmp_path / "killed",
        tokenizer.name,
        json.dumps(sources),
        str(pause),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split("kills")[1]) >= 3 and "goes on after" in result.stdout
    assert (
        manifest["lost"]["bad"] == 2
        and manifest["lost"]["empty"] > 5
        and manifest["lost"]["left_out"] > 200
    )
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


class Stop(Exception):
    pass


def test_a_resumed_run_reads_little_again(tmp_path, tokenizer, monkeypatch):
    """Stopped after each of its shards in turn: the same bytes, and no more than a batch is drawn
    again each time."""
    sources = of_every_kind(tmp_path)
    unbroken = make(tmp_path / "unbroken", tokenizer, "", pools={"text": sources})
    total = sum(entry["documents"] for entry in unbroken["shards"])
    monkeypatch.setattr(corpus, "BATCH_DOCUMENTS", 25)
    drawn, texts, write = [], corpus.texts, shards.write_whole

    def counted(*arguments):
        for document in texts(*arguments):
            drawn.append(document)
            yield document

    def stops(path: Path, *parts):
        write(path, *parts)
        if (
            path.name == "manifest.json"
            and path.parent.parent.name == "text"
            and not json.loads(parts[0])["complete"]
        ):
            raise Stop

    monkeypatch.setattr(corpus, "texts", counted)
    monkeypatch.setattr(shards, "write_whole", stops)
    for stopped in range(200):
        try:
            make(tmp_path / "stopped", tokenizer, "", pools={"text": sources})
            break
        except Stop:
            continue
    assert stopped > 20 and total <= len(drawn) <= total + 25 * (stopped + 1)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "unbroken")


def test_missing_and_truncated_shards_are_named_and_made_again(tmp_path, tokenizer, jsonl):
    folder = tmp_path / "data"
    make(folder, tokenizer, jsonl)
    whole, shard = contents(folder), folder / "text" / "00000" / "train_00001.bin"
    for damage, message in (
        (lambda: shard.unlink(), "train_00001.bin is missing"),
        (lambda: os.truncate(shard, 999), "train_00001.bin is truncated"),
    ):
        damage()
        with pytest.raises(UserError, match=message + ".*python -m data.text.corpus CONFIG"):
            read_pool(folder / "text", "train", tokenizer.hash)
        read_pool(folder / "text", "val", tokenizer.hash)
        make(folder, tokenizer, jsonl)
        assert contents(folder) == whole


def test_flipped_byte_foreign_tokenizer_and_unfinished_pools(tmp_path, tokenizer, jsonl):
    folder = tmp_path / "data" / "text"
    with pytest.raises(UserError, match="no data in .*text: .*corpus tiny.py"):
        read_pool(folder, "train", tokenizer.hash, "python -m data.text.corpus tiny.py")
    make(folder.parent, tokenizer, jsonl)
    with pytest.raises(UserError, match=f"made with tokenizer {tokenizer.hash}, not 0123"):
        read_pool(folder, "train", "0123456789abcdef")

    shard = folder / "00000" / "train_00001.bin"
    whole = bytearray(shard.read_bytes())
    for place in (9, HEADER.size + 3, len(whole) - 5):  # in the header, the ends, the tokens
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match="train_00001.bin differs from its checksum"):
            verify(folder)
    shard.write_bytes(b"x" + whole[1:])
    with pytest.raises(UserError, match="train_00001.bin has a header unlike"):
        read_pool(folder, "train", tokenizer.hash)

    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(UserError, match="not finished"):
        read_pool(folder, "train", tokenizer.hash)
    with pytest.raises(UserError, match="not finished"):
        verify(folder)


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer, jsonl):
    """65,536 ids still fit uint16; one more does not. The token that begins each document gets the
    last id."""
    spec = json.loads(tokenizer.json)
    piece = next(p for p, i in spec["model"]["vocab"].items() if i == tokenizer.encode(TEXTS[0])[0])
    for last, dtype in ((65535, np.uint16), (65536, np.uint32)):
        spec["model"]["vocab"][piece] = last
        (tmp_path / f"{last}.json").write_text(json.dumps(spec))
        large = Tokenizer.load(tmp_path / f"{last}.json")
        make(tmp_path / f"data{last}", large, jsonl)
        shard = read_pool(tmp_path / f"data{last}" / "text", "train", large.hash)[0]
        assert large.n_vocab == last + 1 and shard.tokens.dtype == dtype and shard.tokens[1] == last
        assert large.decode(shard.tokens[1 : int(shard.ends[0]) - 1]) in TEXTS


BAD = [
    b'{"text": "good"}',
    b'{"text": "cut',
    b"[1]",
    b'{"text": 5}',
    b'{"body": "x"}',
    b"",
    b'{"text": ""}',
    b'{"text": "\\ud800"}',
    b'{"text": "\xff"}',
    b'{"text": "fine"}',
]


def test_bad_lines_are_named(tmp_path, tokenizer, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(BAD))
    manifest = make(tmp_path / "data", tokenizer, path, val_fraction=0.0)
    assert manifest["lost"]["bad"] == 5 and manifest["lost"]["empty"] == 1
    texts = [tokenizer.decode(ids[1:-1]) for ids in read(tmp_path / "data", "train", tokenizer)]
    assert texts == ["good", "\ufffd", "fine"]
    shown = capsys.readouterr().err
    assert all(f"{path}:{line}: " in shown for line in (2, 3, 4)) and f"{path}:5" not in shown
    with pytest.raises(UserError, match="bad.jsonl:2: not JSON"):
        make(tmp_path / "data", tokenizer, path, on_bad_line="stop")

    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["good", None, "fine"]}), tmp_path / "bad.parquet"
    )
    with pytest.raises(UserError, match="bad.parquet:2: text is missing or not text"):
        make(tmp_path / "data", tokenizer, tmp_path / "bad.parquet", on_bad_line="stop")
    (tmp_path / "bad.txt").write_bytes(b"good\nbad \xff")
    with pytest.raises(UserError, match="bad.txt:2: not UTF-8"):
        make(tmp_path / "data", tokenizer, tmp_path / "bad.txt", on_bad_line="stop")
    make(tmp_path / "data", tokenizer, tmp_path / "bad.txt", val_fraction=0.0)
    assert (
        tokenizer.decode(read(tmp_path / "data", "train", tokenizer)[0][1:-1]) == "good\nbad \ufffd"
    )


def test_the_table_names_each_file(tmp_path, tokenizer, capsys):
    """Documents, tokens, what was left out and why, the first bad line; nothing is lost between."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.txt").write_text("one text\n", encoding="utf-16")
    (folder / "b.txt").write_bytes("tëxt ".encode("latin-1") * 50)
    (folder / "c.md").write_text("# More\n")
    (folder / "d.jsonl").write_text('{"text": "x y"}\nno\n{"text": ""}\n{"text": 3}\n')
    manifest = make(tmp_path / "data", tokenizer, folder, val_fraction=0.0)
    files = {Path(name).name: counts for name, counts in manifest["files"].items()}
    assert {name: counts["documents"] for name, counts in files.items()} == {
        "a.txt": 1, "b.txt": 0, "c.md": 1, "d.jsonl": 1}
    for name, text in (("a.txt", "one text\n"), ("c.md", "# More\n"), ("d.jsonl", "x y")):
        assert files[name]["tokens"] == len(tokenizer.encode(text)) + 2
    assert sum(counts["tokens"] for counts in files.values()) == manifest["shards"][0]["tokens"]
    capsys.readouterr()
    corpus.print_table({"text": manifest})
    said = capsys.readouterr().out
    for line in (r" 1 +\d+  \S+/a.txt\n", r" 0 +0  \S+/b.txt\n +left out: bad lines: 1, .*\n"
                 " +first bad line: 1: neither UTF-8 nor UTF-16",
                 r" 1 +\d+  \S+/d.jsonl\n +left out: bad lines: 2, empty documents: 1, .*\n"
                 " +first bad line: 2: not JSON"):
        assert re.search(line, said), said


def test_user_errors(tmp_path, tokenizer, jsonl):
    def error(message: str, **settings) -> None:
        with pytest.raises(UserError, match=message) as caught:
            make(tmp_path / "data", tokenizer, **({"path": jsonl} | settings))
        assert "\n" not in str(caught.value)

    for name, data in (
        ("empty.txt", b""),
        ("empty.jsonl", b"\n"),
        ("a.csv", b"x"),
        ("bad.parquet", b"PAR1"),
    ):
        (tmp_path / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "other.parquet")
    error("no documents to train on in .*empty.txt.*1 empty", path=tmp_path / "empty.txt")
    error("no documents to train on in .*empty.jsonl", path=tmp_path / "empty.jsonl")
    error("no .txt, .md, .jsonl, .parquet, .* file .* at .*a.csv", path=tmp_path / "a.csv")
    error("no .txt, .md, .jsonl, .parquet, .* file .* at .*none", path=tmp_path / "none")
    error("bad.parquet cannot be read", path=tmp_path / "bad.parquet")
    error("texts.jsonl:1: no column 'body'.*id, text", column="body")
    error("other.parquet:1: no column 'text'.*body", path=tmp_path / "other.parquet")
    error("corpus is empty", path="")
    for source in (
        {"file": "x"},
        {"path": "x", "stdlib": 1},
        {"path": "x", "seed": 1},
        {"pages": 9},
        {"pages": 9, "families": {"maths": 1}},
    ):
        error("pool 'a'", path="", pools={"a": [source]})


def test_no_space_left(tmp_path, tokenizer, jsonl):
    """On a full disk: one line, no torn file; with space again, the same bytes as ever."""
    jsonl.write_text(jsonl.read_text() * 4)
    make(tmp_path / "unbroken", tokenizer, jsonl)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        with pytest.raises(
            UserError, match="disk/data/.* cannot be written: No space left on device"
        ):
            make(disk / "data", tokenizer, jsonl)
        shards = list((disk / "data" / "text" / "00000").glob("*.bin"))
        assert shards and not list(disk.rglob("*.tmp"))
        assert all(
            p.read_bytes() == (tmp_path / "unbroken/text/00000" / p.name).read_bytes()
            for p in shards
        )
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        make(disk / "data", tokenizer, jsonl)
        assert contents(disk) == {
            f"data/{name}": data for name, data in contents(tmp_path / "unbroken").items()
        }
    finally:
        subprocess.run(["umount", disk], check=True)


def test_embedded_sources(tmp_path):
    """The running Python's own text, and pages with a share of faulty twins; the tokenizer is
    trained on all pools."""
    pages = {"pages": 200, "families": {"math": 1, "drills": 1}, "seed": 3}
    cfg = CorpusConfig(
        pools={"broad": [{"stdlib": 0.2}, pages | {"corrupt": 0.25}], "high": [pages]}, workers=1
    )
    texts = {
        name: [text for _, text in split_texts(sources)] for name, sources in cfg.pools.items()
    }
    stdlib, mixed = texts["broad"][:-200], texts["broad"][-200:]
    assert 100_000 < sum(len(text.encode()) for text in stdlib) <= 200_000 and len(set(stdlib)) > 10
    assert 40 <= sum(a != b for a, b in zip(mixed, texts["high"])) <= 50, (
        "a quarter is faulty, the rest the same page"
    )

    sample = list(corpus._sample(cfg.pools, cfg))
    held_out = {
        text
        for sources in cfg.pools.values()
        for split, text in split_texts(sources)
        if split == "val"
    }
    assert held_out and not held_out & set(sample), "the tokenizer sees no held-out document"
    manifests = prepare(tmp_path, TokenizerConfig(vocab_size=800, train_mb=0.2), cfg, "command")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.n_vocab == 800 and len(tokenizer.encode("Answer")) == 1, (
        "both pools are in the sample"
    )
    assert {m["tokenizer"] for m in manifests.values()} == {tokenizer.hash}
    prepare(tmp_path, TokenizerConfig(vocab_size=800, train_mb=0.2, kind="char"), cfg, "command")
    assert Tokenizer.load(tmp_path / "tokenizer.json").hash != tokenizer.hash
    with pytest.raises(UserError, match="made with tokenizer"):
        read_pool(tmp_path / "high", "train", tokenizer.hash)


def test_command_line(tmp_path, monkeypatch, capsys):
    """`python -m data.text.corpus CONFIG --corpus.path=FILE --tokenizer.kind=char`, then --verify,
    then a mistake."""
    (tmp_path / "config.py").write_text("tokenizer = dict(vocab_size=300)\n")
    (tmp_path / "my.txt").write_text("To be, or not to be. " * 50)
    own = ["config.py", "--corpus.path=my.txt", "--tokenizer.kind=char"]
    environment = os.environ | {"PYTHONPATH": str(Path(corpus.__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-m", "data.text.corpus", *own],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout.count("text ") == 2, result.stderr
    manifest = json.loads((tmp_path / "out/config/data/text/manifest.json").read_text())
    assert manifest["command"] == " ".join(["python -m data.text.corpus", *own])

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["corpus.py", *arguments])
        cli(corpus.main)
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    assert "2 shards equal their checksums" in run(*own, "--verify")
    with pytest.raises(SystemExit) as caught:
        run("config.py", "--corpus.path=none.txt")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: no .txt") and error.count("\n") == 1


def test_a_small_part_of_its_sources_holds_out_more():
    """2M tokens of 4 GB, which are about 1,000M."""
    cfg = CorpusConfig(val_fraction=1e-4, val_tokens=2_000_000, megabytes=2500)
    sources = [{"hf": "a"}, {"hf": "b", "megabytes": 1500}]
    assert corpus.held_out_share(sources, cfg) == pytest.approx(0.002)
    whole = CorpusConfig(val_fraction=1e-4, val_tokens=2_000_000)
    assert corpus.held_out_share(sources, whole) == 1e-4  # of a source taken whole nothing is known
    assert corpus.held_out_share([{"path": "x", "megabytes": 0.001}], whole) == 0.1
    assert corpus.held_out_share(sources, CorpusConfig(megabytes=1.0)) == 0.02


def test_of_duplicates_the_copy_in_the_first_pool_and_source_stays(tmp_path, tokenizer):
    rng = random.Random(4)
    a, b, c, d = (" ".join(f"w{rng.randrange(999)}" for _ in range(60)) for _ in range(4))
    files = {"x": [a, b], "y": [b.upper(), c], "z": [a + " with a tail", d, c]}
    for name, texts in files.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    x, y, z = ({"path": str(tmp_path / f"{name}.jsonl")} for name in files)
    expected = {("one", "two"): ([a, b, c], [d]), ("two", "one"): ([b], files["z"])}
    for order, kept in expected.items():
        cfg = CorpusConfig(pools={"one": [x, y], "two": [z]}, dedup=list(order), val_fraction=0.0)
        made = prepare(tmp_path / "data", TokenizerConfig(path=tokenizer.name), cfg, "command")
        for name, texts in zip(("one", "two"), kept):
            shards = read_pool(tmp_path / "data" / name, "train", tokenizer.hash)
            [ids] = [shard.tokens for shard in shards]
            found = [tokenizer.decode(part[1:]) for part in np.split(ids, shards[0].ends)[:-1]]
            assert [text.removesuffix("<|endoftext|>") for text in found] == texts
        assert sum(manifest["lost"]["duplicates"] for manifest in made.values()) == 3
    with pytest.raises(UserError, match="corpus.dedup names 'three'; the pools are one"):
        prepare(tmp_path / "data", TokenizerConfig(path=tokenizer.name),
                CorpusConfig(pools={"one": [x]}, dedup=["three"]), "command")


def test_signatures_of_another_scheme_are_not_mixed_in(tmp_path, tokenizer, monkeypatch):
    """What an older version signed and did not merge lies in a folder of another name."""
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "one two three"}) + "\n")
    cfg = CorpusConfig(pools={"one": [{"path": str(tmp_path / "x.jsonl")}]}, dedup=["one"])
    folders = set()
    for scheme in (dedup.SCHEME, "minima of 64 bits"):
        monkeypatch.setattr(dedup, "SCHEME", scheme)
        monkeypatch.setattr(dedup, "merge", lambda folder, n, engine: folders.add(folder.name))
        with pytest.raises(TypeError):  # nothing was merged
            prepare(tmp_path / "data", TokenizerConfig(path=tokenizer.name), cfg, "command")
    assert len(folders) == 2


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is there")
def test_without_ray_that_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="--engine=ray needs Ray: pip install ray"):
        prepare(tmp_path / "data", TokenizerConfig(), CorpusConfig(), "command", "ray")
    assert not list(tmp_path.iterdir())


def test_large_files_are_cut_into_ranges(tmp_path, tokenizer, monkeypatch):
    """Pieces of any size hold the same documents, in the same order."""
    sources = of_every_kind(tmp_path)[:2] + [{"path": str(tmp_path / "set")}]
    found = []
    for largest in (1e9, 7000):
        monkeypatch.setattr(corpus, "LEAST_BYTES", largest)
        monkeypatch.setattr(corpus, "BYTES_PER_TOKEN", 0)
        make(tmp_path / "data", tokenizer, "", pools={"text": sources}, val_fraction=0.0,
             shard_tokens=1500)
        found.append(read(tmp_path / "data", "train", tokenizer))
        shutil.rmtree(tmp_path / "data")
    book = tokenizer.encode("0123456789 " * 300)
    assert found[0] == found[1] and [tokenizer.bos, *book, tokenizer.eot] in found[0]
