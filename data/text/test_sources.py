"""Oracles: the rows that the files were made of; reading from the beginning for reading from any
place."""

import gzip
import json
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from common import UserError
from data.text import decoding, sources
from data.text.sources import (
    RETRIES,
    ReadPosition,
    invalid_reason,
    licence,
    parts,
    read,
    records,
    texts,
)
from data.text.test_corpus import of_every_kind

ROWS = [
    {
        "id": i,
        "text": f"text {i} naïve 你好 " * (1 + i % 4),
        "answer": f"answer {i}",
        "int_score": i % 6,
        "language": "en" if i % 3 else "fr",
        "embeddings": [0.5] * 8,
    }
    for i in range(90)
]


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """ROWS in three files, as Parquet and as JSON lines."""
    found = {"parquet": tmp_path / "parquet", "jsonl": tmp_path / "jsonl"}
    for folder in found.values():
        folder.mkdir()
    for k in range(3):
        rows = ROWS[30 * k : 30 * k + 30]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows),
            found["parquet"] / f"train-{k}.parquet",
            row_group_size=7,
        )
        (found["jsonl"] / f"train-{k}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return found


def every_way(folders: dict[str, Path], **settings) -> list[dict]:
    """The same source read as files and as a data set, from both formats."""
    return [
        {kind: str(folder)} | settings for folder in folders.values() for kind in ("path", "hf")
    ]


def read_all(source: dict, place: ReadPosition | None = None, **settings) -> list[str]:
    return [
        text for text, _ in texts([source], place or ReadPosition(stop=True), "text", **settings)
    ]


def test_data_sets_and_files_give_the_same_documents(folders):
    for source in every_way(folders):
        assert read_all(source) == [row["text"] for row in ROWS], source
    for source in every_way(folders, column=["text", "answer"]):
        assert read_all(source) == [f"{row['text']}\n\n{row['answer']}" for row in ROWS], source
    picked = {
        "hf": str(folders["jsonl"].parent),
        "data_dir": "jsonl",
        "data_files": ["train-2.jsonl", "train-0.jsonl"],
    }
    assert read_all(picked) == [row["text"] for row in ROWS[60:] + ROWS[:30]]


def test_keep_cuts_by_score(folders):
    bounds = {"int_score": [4, 5]}, {"int_score": [None, 3]}
    for source in every_way(folders):
        got = []
        for keep in bounds:
            place = ReadPosition()
            got.append(read_all(source | {"keep": keep}, place))
            assert place.left_out == len(ROWS) - len(got[-1])
        assert (
            got[0] == [row["text"] for row in ROWS if row["int_score"] >= 4] and len(got[0]) == 30
        )
        assert got[1] == [row["text"] for row in ROWS if row["int_score"] < 4]
        both = {"int_score": [1, None], "language": ["fr", "fr"]}
        assert read_all(source | {"keep": both}) == [
            r["text"] for r in ROWS if r["int_score"] and r["id"] % 3 == 0
        ]
        with pytest.raises(
            UserError, match="keep of .* is of another type than its column: .*'str'"
        ):
            read_all(source | {"keep": {"language": [1, 2]}})


def test_a_record_without_a_score_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": 1.0}\n{"text": "b", "score": null}\n')
    place = ReadPosition()
    assert read_all(
        {"path": str(tmp_path / "a.jsonl"), "keep": {"score": [None, None]}}, place
    ) == ["a"]
    assert place.left_out == 1


def test_limits_take_the_beginning(folders):
    whole = [row["text"] for row in ROWS if row["int_score"]]
    for source in [*every_way(folders), {"pages": 90, "families": {"math": 1}}, {"stdlib": 1}]:
        keep = {"keep": {"int_score": [1, 5]}} if {"path", "hf"} & set(source) else {}
        everything = read_all(source | keep)
        assert everything == whole or not keep
        assert read_all(source | keep | {"documents": 41}) == everything[:41]
        assert read_all(source | keep | {"documents": 0}) == []
        limit = sum(len(text.encode()) for text in everything[:7]) / 1e6
        assert read_all(source | keep | {"megabytes": limit}) == everything[:7]
        assert read_all(source | keep, megabytes=limit) == everything[:7]


def test_missing_columns_are_named(folders):
    for source in every_way(folders):
        for wrong in ({"column": "body"}, {"keep": {"body": [0, 1]}}, {"column": ["text", "body"]}):
            with pytest.raises(
                UserError, match="no column 'body'.*one of id, text, answer, int_score"
            ) as caught:
                read_all(source | wrong)
            assert "\n" not in str(caught.value) and ("shard 0:1" in str(caught.value)) == (
                "hf" in source
            )


def test_reading_goes_on_from_every_place(tmp_path):
    """At each document, the asdict() of the place opens the rest; of sources of every kind, with
    limits."""
    pool = of_every_kind(tmp_path)
    place, whole, places = ReadPosition(), [], []
    for text, _ in texts(pool, place, "text"):
        whole.append(text)
        places.append(json.loads(json.dumps(asdict(place))))
    assert len(whole) > 1000 and {p["source"] for p in places} == set(range(len(pool)))
    for n in range(0, len(whole), 41):
        again = ReadPosition(**places[n])
        assert [text for text, _ in texts(pool, again, "text")] == whole[n + 1 :]
        assert again == place, "counts of what was left out too"


def test_a_record_without_the_column_is_a_bad_line_where_one_goes_on(tmp_path):
    """Only as the first of its file it would be a wrong setting."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"id": 1}\n{"text": "b"}\n')
    place = ReadPosition(record=1)
    assert read_all({"path": str(tmp_path / "a.jsonl")}, place) == ["b"] and place.bad == 1


def test_only_what_is_needed_is_read(folders):
    """Of a Parquet file the needed columns, of a file gone through before no line again as a
    record."""
    source = {"hf": str(folders["parquet"]), "keep": {"int_score": [0, 5]}}
    first = parts(source, columns=["text", "int_score"])[0]
    assert set(next(read(source, first))[1]) == {"text", "int_score"}
    for source in every_way(folders):
        whole = list(read(source, parts(source)[1]))
        assert [number for number, _ in whole] == list(range(1, 31))
        for skip in (1, 7, 29, 30):
            assert list(read(source, parts(source)[1], skip)) == whole[skip:]


def test_records_are_whole_and_by_shard(folders):
    for source in every_way(folders, keep={"int_score": [2, None]}):
        expected = [row for row in ROWS if row["int_score"] >= 2]
        assert len(parts(source)) == 3 and list(records(source)) == expected
        assert [row for part in parts(source) for row in records(source, part)] == expected
    assert next(records({"pages": 3, "families": {"math": 1}})).keys() == {"text"}


class Torn:
    """A stream of 30 rows, 4 at a time, that breaks before each of `breaks`, a list of row
    numbers."""

    num_shards = 1

    def __init__(self, breaks: list[int]):
        self.breaks, self.start = breaks, 0

    def shard(self, num_shards, index):
        return self

    def skip(self, n):
        self.start = n
        return self

    def iter(self, batch_size):
        for i in range(self.start, 30, 4):
            if self.breaks and self.breaks[0] < i + 4:
                self.breaks.pop(0)
                raise ConnectionError("Server Disconnected")
            yield pyarrow.Table.from_pylist(ROWS[i : min(i + 4, 30)])


def test_torn_streams_are_taken_up_again(monkeypatch):
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    monkeypatch.setattr(sources, "_open", lambda *arguments: stream)
    stream = Torn([5, 9, 9, 9, 27])
    assert read_all({"hf": "a/b"}) == [row["text"] for row in ROWS[:30]] and waits == [
        2,
        2,
        4,
        8,
        2,
    ]
    stream, place, waits[:] = Torn([9] * (RETRIES + 1)), ReadPosition(), []
    with pytest.raises(
        UserError,
        match=r"data set a/b, shard 0 broke off after record 8 \(ConnectionError\); run ag",
    ):
        read_all({"hf": "a/b"}, place)
    assert waits == [2, 4, 8, 16, 32] and place.record == 8
    assert read_all({"hf": "a/b"}, place) == [row["text"] for row in ROWS[8:30]], "it does go on"


def test_errors_of_data_sets(folders, tmp_path, monkeypatch):
    def error(message: str, **source) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_all(source)
        assert "\n" not in str(caught.value)

    parquet = str(folders["parquet"])
    error("data set .*parquet: .*Available.*default", hf=parquet, config="sample-10BT")
    error(
        "data set .*parquet: Bad split: test. Available splits: .'train'.", hf=parquet, split="test"
    )
    error("data set .*parquet: .*doesn't contain any data files", hf=parquet, data_dir="none")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    error(
        'scripts are no longer supported.*convert it.*give ."path": folder.',
        hf=str(tmp_path / "script"),
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad\n')
    error("data set .*bad, shard 0 cannot be read: .*JSON", hf=str(tmp_path / "bad"))

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    error(
        "Couldn't reach 'a/b' on the Hub .*hf download --repo-type=dataset a/b .*"
        '."path": FOLDER.$',
        hf="a/b",
    )
    for kind, message, expected in (
        (
            datasets.exceptions.DatasetNotFoundError,
            "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.",
            "data set a/b: Dataset 'a/b' doesn't exist on the Hub or cannot be accessed$",
        ),
        (
            datasets.exceptions.DatasetNotFoundError,
            "Dataset 'a/b' is a gated dataset on the Hub. You must\nbe",
            "gated.*Accept its terms at https://huggingface.co/datasets/a/b, then `hf auth login`$",
        ),
    ):

        def refuse(*arguments, **options):
            raise kind(message)

        monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
        error(expected, hf="a/b")


def test_the_licence_of_the_card(folders):
    source = {"hf": str(folders["parquet"])}
    assert licence(source) == ""
    (folders["parquet"] / "README.md").write_text("---\nlicense: odc-by\n---\n# Text\n")
    assert licence(source) == "odc-by"
    (folders["parquet"] / "README.md").write_text(
        "---\nlicense: other\nlicense_name: our own\n---\n# Text\n"
    )
    assert licence(source) == "our own"


def test_faults_of_sources():
    for good in (
        {"path": "x", "keep": {"a": [1, None]}, "documents": 3},
        {"stdlib": 1, "megabytes": 1},
        {"hf": "a/b", "config": "c", "column": ["q", "a"]},
        {"pages": 9, "families": {"math": 1}},
    ):
        assert not invalid_reason(good)
    for bad, message in (
        ({"hf": "a/b", "trust_remote_code": True}, "one of"),
        ({"path": "x", "config": "c"}, "one of"),
        ({"path": "x", "hf": "a/b"}, "one of"),
        ({}, "one of"),
        ({"stdlib": 1, "keep": {}}, "one of"),
        ({"path": "x", "keep": {"a": 3}}, "lowest, highest"),
        ({"pages": 1}, "families"),
    ):
        assert message in invalid_reason(bad)


# --------------------------------------------------------------------------------------------------
# Own text: encodings, packed files, bad lines


TEXT = "naïve, café, 你好 and plain text\nof two lines\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le",
                                      "utf-16-be"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_encodings_are_detected(tmp_path, encoding, packing):
    pack = {"": bytes, ".gz": gzip.compress,
            ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}[packing]
    lines = "".join(json.dumps({"text": TEXT, "id": i}, ensure_ascii=False) + "\n"
                    for i in range(3))
    (tmp_path / f"a.txt{packing}").write_bytes(pack(TEXT.encode(encoding)))
    (tmp_path / f"b.jsonl{packing}").write_bytes(pack(lines.encode(encoding)))
    place = ReadPosition(stop=True)
    assert read_all({"path": str(tmp_path)}, place) == [TEXT] * 4


def test_another_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes((TEXT * 9).encode("latin-1", "replace"))
    (tmp_path / "b.txt").write_bytes(TEXT.encode() * 99 + b"one \xff here\n")
    place = ReadPosition()
    b = (TEXT * 99) + "one \ufffd here\n"
    assert read_all({"path": str(tmp_path)}, place) == [b] and place.bad == 2
    assert place.files == {
        str(tmp_path / "a.txt"): {"bad": 1, "first": "1: neither UTF-8 nor UTF-16; convert the "
                                  "file, for example by `iconv -f LATIN1 -t UTF-8`"},
        str(tmp_path / "b.txt"): {"bad": 1, "documents": 1, "first": "199: not UTF-8; 1 such bytes "
                                  "become U+FFFD"},
    }
    with pytest.raises(UserError, match=r"a.txt:1: neither UTF-8 nor"):
        read_all({"path": str(tmp_path)})


def test_markdown_is_text_but_a_data_sets_card_is_not(tmp_path):
    (tmp_path / "README.md").write_text("# A book\n")
    (tmp_path / "b.md").write_text("# More\n")
    assert read_all({"path": str(tmp_path)}) == ["# A book\n", "# More\n"]
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    assert read_all({"path": str(tmp_path)}) == ["# More\n", "c"]


def test_the_first_bad_line_of_each_file(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n' + "no\n" * 5)
    place = ReadPosition()
    assert read_all({"path": str(tmp_path)}, place) == ["x", "x"] and place.bad == 10
    assert [counts["bad"] for counts in place.files.values()] == [5, 5]
    said = capsys.readouterr().err
    assert said.count("bad line") == 4 and "a.jsonl:2: not JSON" in said and "b.jsonl:2" in said
    assert ReadPosition(**json.loads(json.dumps(asdict(place)))) == place


RECORDS = [{"text": f"line {i} " + "x" * 50, "n": i} for i in range(3000)]


@pytest.mark.parametrize("name", ["a.json", "lines.json", "a.jsonl.zst", "a.arrow", "f.arrow",
                                  "a.json.gz"])
def test_forms_of_files(tmp_path, name):
    """Whole, from every place, and cut off: what comes before is read, then it is one bad line."""
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    table, path = pyarrow.Table.from_pylist(RECORDS), tmp_path / name
    if name.endswith(".arrow"):
        new = pyarrow.ipc.new_file if name == "f.arrow" else pyarrow.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    elif name == "a.jsonl.zst":
        path.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    elif name == "lines.json":
        path.write_bytes(lines)
    else:
        text = json.dumps(RECORDS, indent=1).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    source, bad = {"path": str(path)}, []

    def rows(skip=0):
        (part,) = sources.parts(source, largest=1000)
        return list(sources.read(source, part, skip, bad_line=lambda *line: bad.append(line)))

    whole = list(enumerate(RECORDS, 1))
    assert rows() == whole and rows(2999) == whole[2999:] and not bad
    if name in ("f.arrow", "a.json.gz"):
        return
    path.write_bytes(path.read_bytes()[:-200])
    left = rows()
    assert left == whole[:len(left)] and len(left) < 3000
    ((where, _),) = bad
    assert where == f"{path}:{len(left) + 1}"


def test_a_gz_that_is_cut_off(tmp_path):
    """One bad line, by the reader and by a corpus that goes on with the next file."""
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-3000])
    (tmp_path / "b.jsonl").write_bytes(lines)
    place = ReadPosition()
    found = list(sources.texts([{"path": str(tmp_path)}], place, "text"))
    assert 3000 < len(found) < 6000 and place.bad == 1
    assert "a.jsonl.gz" in place.first and "cut off or torn here" in place.first
    with pytest.raises(UserError, match="a.jsonl.gz.*cut off"):
        list(sources.texts([{"path": str(tmp_path)}], ReadPosition(stop=True), "text"))


def test_a_json_beside_other_files_is_no_data(tmp_path):
    """It describes them, as in what `datasets` saves."""
    (tmp_path / "state.json").write_text("{}")
    names = lambda: [Path(file.address).name for file in sources.find_files(str(tmp_path))]  # noqa
    assert names() == ["state.json"]
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    assert names() == ["a.jsonl"]
    assert sources.find_files(str(tmp_path / "*.json"))[0].address.endswith("state.json")


def test_no_line_fills_the_memory(tmp_path, monkeypatch):
    """A long one is a bad line, one without end and a bomb are a UserError; in bounded memory."""
    monkeypatch.setattr(decoding, "MOST_LINE", 1 << 16)
    monkeypatch.setattr(sources, "MOST_SMALL", 1 << 20)
    good = b'{"text": "good"}\n'
    long = b'{"text": "' + b"x" * (1 << 17) + b'"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(good + long + good))
    table = pyarrow.table({"text": ["good", "x" * (1 << 17), "good"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    place = ReadPosition()
    assert read_all({"path": str(tmp_path)}, place) == ["good"] * 4
    assert [c["first"] for c in place.files.values()] == ["2: longer than 0 MB"] * 2
    endless = gzip.compress(b"\0" * (20 << 20))
    for name in ("c.jsonl.gz", "d.txt.gz", "e.parquet.gz"):
        (tmp_path / name).write_bytes(endless)
        tracemalloc.start()
        with pytest.raises(UserError, match=f"{name} (cannot be read: it has a|unpacks to)"):
            read_all({"path": str(tmp_path / name)})
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
        tracemalloc.stop()


class Unreliable(MemoryFileSystem):
    """A store of which two answers of three are an error, or cut in their middle."""

    protocol = "unreliable"
    n_asked = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("unreliable://"))

    def cat_file(self, path, start=None, end=None, **options):
        Unreliable.n_asked += 1
        data = super().cat_file(path, start=start, end=end, **options)
        if Unreliable.n_asked % 3 == 1:
            raise ConnectionError("Server Disconnected")
        return data[: len(data) // 2] if Unreliable.n_asked % 3 == 2 else data


def test_other_stores_give_the_same_documents(folders, monkeypatch, capsys):
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    monkeypatch.setattr(sources, "FETCHED_BYTES", 1500)
    waits = []
    monkeypatch.setattr(sources.time, "sleep", waits.append)
    store = Unreliable()
    for kind, folder in folders.items():
        for file in folder.iterdir():
            store.pipe_file(f"/sets/{kind}/{file.name}", file.read_bytes())
        if kind == "jsonl":
            packed = gzip.compress((folder / "train-0.jsonl").read_bytes())
            store.pipe_file("/sets/packed/train-0.jsonl.gz", packed)
    for where, n in (("parquet", 90), ("jsonl/*-[02].jsonl", 60), ("packed/train-0.jsonl.gz", 30)):
        source = {"path": f"unreliable://sets/{where}"}
        expected = [row["text"] for row in (ROWS if n == 90 else ROWS[:30] + ROWS[60:])][:n]
        assert read_all(source) == expected
        assert [part.bytes > 0 for part in parts(source)] == [True] * (n // 30)
    assert len(waits) > 20 and set(waits) == {2, 4}
    assert "trying again in 2 s" in capsys.readouterr().err
    pieces = parts({"path": "unreliable://sets/jsonl/train-1.jsonl"}, largest=1000)
    found = [record for part in pieces for _, record in read({"path": "x"}, part)]
    assert len(pieces) > 5 and found == ROWS[30:60]
    monkeypatch.setattr(Unreliable, "n_asked", 0)
    monkeypatch.setattr(store, "cat_file", lambda *_, **__: b"")
    with pytest.raises(UserError, match=r"train-1.jsonl broke off \(OSError: 0 bytes in place of"):
        read_all({"path": "unreliable://sets/jsonl/train-1.jsonl"})
    for where, message in (
        ("unreliable://sets/none.jsonl", "none.jsonl is not there"),
        ("s3x://sets/a.jsonl", "cannot be read: Protocol not known: s3x"),
    ):
        with pytest.raises(UserError, match=message):
            read_all({"path": where})
    assert "password" in invalid_reason({"path": "https://me:secret@host/a.jsonl"})
