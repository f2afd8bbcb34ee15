"""The filter on small pools: what it learns, its steps, resuming, and bad input."""
from settings import from_dict

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

from common import UserError
from data.engine import Engine
from data.filter import classifier, quality
from data.filter.quality import QualityConfig

GOOD = (
    "the proof follows from the lemma since every finite group of prime order is cyclic "
    "and so abelian"
).split()
BAD = (
    "click here buy now cheap offer subscribe free shipping best price deal today only limited win"
).split()


def page(rng: random.Random, good: bool, n: int = 60) -> str:
    """Words of one kind mostly, with some of the other."""
    kinds = (GOOD, BAD) if good else (BAD, GOOD)
    return " ".join(
        kinds[rng.random() < 0.2][int(rng.random() * len(GOOD)) % len(BAD)] for _ in range(n)
    )


def write(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labels(n: int = 120, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "text": page(rng, i % 2 == 0),
            "tags": {"accuracy": 8 - 6 * (i % 2) + i % 3 % 2, "overall": 8 - 6 * (i % 2)},
        }
        for i in range(n)
    ]


@pytest.fixture
def setup(tmp_path):
    """Two shards with good and bad pages, a duplicate, an empty record, a malformed line, and
    labels."""
    rng = random.Random(1)
    rows = [
        [{"text": page(rng, i % 2 == 0), "score": 4.0 - 3 * (i % 2)} for i in range(30)]
        for _ in range(2)
    ]
    rows[1][4] = dict(rows[0][3])
    rows[1][5] = {"text": "", "score": 5.0}
    for i in range(2):
        write(tmp_path / "raw" / f"{i}.jsonl", rows[i])
    with open(tmp_path / "raw" / "1.jsonl", "a") as f:
        f.write("{torn")
    held_out = write(tmp_path / "test.jsonl", [{"text": rows[0][6]["text"]}])
    cfg = dict(
        sources=[{"path": str(tmp_path / "raw")}],
        labels=write(tmp_path / "labels.jsonl", labels()),
        evaluation_sets=[{"path": held_out}],
        workers=1,
    )
    return SimpleNamespace(cfg=cfg, rows=rows, out=tmp_path / "out", tmp=tmp_path)


def run(setup, **settings):
    cfg = from_dict(QualityConfig, setup.cfg | settings, "quality")
    quality.run(cfg, setup.out, Engine(workers=cfg.workers))
    kinds = {
        kind: [
            r
            for path in sorted((setup.out / kind).glob("*.parquet"))
            for r in pyarrow.parquet.read_table(path).to_pylist()
        ]
        for kind in ("high", "medium", "classified")
    }
    return kinds


def test_all_steps_sort_the_pages(setup, capsys):
    kinds = run(setup)
    classified = kinds["classified"]
    assert len(classified) == 60 and {r["number"] for r in classified} == set(range(30))
    assert [r["reason"] for r in classified[30 + 4 : 30 + 6]] == ["exact duplicate", "empty"]
    assert classified[6]["reason"] == "contaminated"
    rest = [r for i, r in enumerate(classified) if i not in (6, 34, 35)]
    right = [(r["kind"] == "high") == (r["number"] % 2 == 0) for r in rest]
    assert np.mean(right) > 0.9
    assert {r["text"] for r in kinds["high"]} <= {
        row["text"] for shard in setup.rows for row in shard
    }
    assert set(kinds["high"][0]) == {"text", "score", "accuracy", "overall"}
    printed = capsys.readouterr().out
    assert (
        "1 exact duplicate" in printed
        and "1 malformed lines" in printed
        and "1 contaminated" in printed
    )


def test_two_processes_single_steps_and_resuming_give_the_same(setup, capsys):
    whole = run(setup)
    assert run(SimpleNamespace(cfg=setup.cfg, out=setup.tmp / "two"), workers=2) == whole
    other = SimpleNamespace(cfg=setup.cfg, out=setup.tmp / "other")
    run(other, step="fit")
    with pytest.raises(UserError, match="2 of 2 parts of the sources are not signed yet"):
        run(other, step="merge")
    run(other, step="sign")
    with pytest.raises(UserError, match="step=merge has not been done"):
        run(other, step="classify")
    run(other, step="merge")
    assert len(run(other, step="classify")["classified"]) == 60
    assert run(other) == whole
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in setup.out.rglob("*")}
    run(setup)
    assert "classify: 0 of 2" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in setup.out.rglob("*")}
    (setup.out / "classified" / "00001.json").unlink()  # killed before the mark
    (setup.out / "high" / "00001.tmp").write_text("torn")
    assert run(setup) == whole
    run(setup, high=9.5)  # other settings: classified again, not signed again
    assert "classify: 2 of 2" in capsys.readouterr().out
    (setup.tmp / "raw" / "1.jsonl").unlink()  # what came of a shard that is no more goes too
    assert (
        len(run(setup)["classified"]) == 30
        and "1 of 1 parts classified" in capsys.readouterr().out
    )


def test_a_column_that_is_not_there_is_named(setup):
    with pytest.raises(UserError, match="no column 'body'; it has text, score"):
        run(setup, sources=[setup.cfg["sources"][0] | {"column": ["text", "body"]}])


def test_a_users_embedding_makes_the_vectors(setup, monkeypatch):
    (setup.tmp / "embedders.py").write_text(
        "import numpy as np\ndef embed(texts):\n"
        "    return np.array([[t.count('the'), t.count('buy') + 1] for t in texts])\n"
    )
    monkeypatch.syspath_prepend(setup.tmp)
    import embedders

    texts, grades = (
        [r["text"] for r in labels()],
        np.array([[r["tags"]["overall"]] for r in labels()]),
    )
    made = classifier.fit(texts, grades, ["overall"], embed=embedders.embed)
    assert made.vectors.shape[1] == 2 and np.allclose(np.linalg.norm(made.vectors, axis=1), 1)
    assert len(run(setup, embed="embedders:embed")["classified"]) == 60
    with pytest.raises(
        UserError, match=r"quality.embed gave an array of shape \(3,\) for 120 texts"
    ):
        classifier.fit(texts, grades, ["overall"], embed=lambda texts: np.zeros(3))
    with pytest.raises(UserError, match="must name a function"):
        run(setup, embed="embedders:none")


def test_a_saved_filter_scores_alike(tmp_path):
    rows, rng = labels(), random.Random(5)
    made = classifier.fit(
        [r["text"] for r in rows],
        np.array([list(r["tags"].values()) for r in rows]),
        ["accuracy", "overall"],
    )
    made.save(tmp_path / "filter.npz")
    texts = [page(rng, i % 2 == 0) for i in range(20)]
    for one, other in zip(
        made.scores(texts), classifier.Filter.load(tmp_path / "filter.npz").scores(texts)
    ):
        assert np.array_equal(one, other)
    alone = np.concatenate([made.scores([t])[1] for t in texts])
    assert np.allclose(alone, made.scores(texts)[1], atol=1e-4)  # a document's score is its own


def test_bm25_is_the_formula():
    import scipy.sparse

    n, idf = np.array([[2.0, 0, 1], [1, 3, 0]]), np.array([0.5, 1.0, 2.0], np.float32)
    expected = idf * n * 2.2 / (n + 1.2 * (0.25 + 0.75 * n.sum(1, keepdims=True) / n.sum(1).mean()))
    assert np.allclose(classifier.bm25(scipy.sparse.csr_matrix(n), idf).toarray(), expected)


def test_tf_idf_is_scikit_learns():
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfTransformer

    n = scipy.sparse.csr_matrix(np.array([[2.0, 0, 1], [1, 3, 0], [0, 1, 1]]))
    oracle = TfidfTransformer(sublinear_tf=True).fit(n)
    assert np.allclose(
        classifier.tf_idf(n, oracle.idf_.astype(np.float32)).toarray(),
        oracle.transform(n).toarray(),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=""), "no labels: give quality.labels"),
        (dict(labels="none.jsonl"), "no labels at none.jsonl"),
        (dict(sources=[]), "quality.sources must be a list of at least 1"),
        (dict(sources=[{"path": "nothing/here"}]), "no .txt, .md, .jsonl, .parquet"),
        (dict(sources=[{"pat": "x"}]), "must have one of"),
        (dict(high=1.0), "quality.drop=3.0 is above quality.high=1.0"),
        (dict(sources=[{"path": "x", "megabytes": 100}]), "megabytes has no effect here"),
        (dict(labels="", evaluation_sets=[{"path": "nothing/there"}]), "nothing/there"),
        (dict(embed="nothing:here"), "embed='nothing:here' must name a function"),
    ],
)
def test_wrong_settings_are_one_line(setup, change, message):
    with pytest.raises(UserError, match=message):
        run(setup, **change)


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [dict(r, tags={"overall": 7}) for r in labels()],
            "all 120 labelled documents have the same overall grade, 7",
        ),
        (labels(10), "10 labelled documents are too few"),
        ([], "0 labelled documents are too few"),
        (labels()[:50] + [{"text": "x", "tags": {"overall": 3}}], "record 51 must be"),
        (
            labels()[:50] + [{"text": "x", "tags": {"accuracy": 3, "overall": 12}}],
            "record 51 must be",
        ),
        ([{"text": "x", "label": 3}], "record 1 must be .*it has text, label"),
        (
            [{"text": f"only{i}", "tags": {"overall": i % 10}} for i in range(40)],
            "no words in common",
        ),
    ],
)
def test_bad_labels_are_one_line(setup, rows, message):
    with pytest.raises(UserError, match=message):
        run(setup, labels=write(setup.tmp / "bad.jsonl", rows))


def test_a_broken_line_of_labels_is_named(setup):
    path = write(setup.tmp / "broken.jsonl", labels())
    Path(path).write_text("{bad\n" + Path(path).read_text())
    with pytest.raises(UserError, match="broken.jsonl:1: "):
        run(setup, labels=path)


def test_parts_of_unknown_size_are_work_for_many_processes():
    """A data set of the hub says no sizes: each part counts as much as a range of a large file."""
    work = [({}, SimpleNamespace(bytes=None)), ({}, SimpleNamespace(bytes=7))]
    assert quality._sizes(work) == [quality.LARGEST, 7]


def test_documents_of_one_character_and_of_many_megabytes(setup):
    long = page(random.Random(3), True, 40_000) + " "
    write(
        setup.tmp / "raw" / "2.jsonl",
        [{"text": "x"}, {"text": "\u0000"}, {"text": long * 20}, {"text": "…"}],
    )
    classified = run(setup, high=6.0)["classified"][60:]
    assert len(classified) == 4 and classified[2]["kind"] == "high"


class Labeller(BaseHTTPRequestHandler):
    """Grades by the share of good words, in prose and a fence; every fourth answer is no grade."""

    asked = 0

    def do_POST(self):
        Labeller.asked += 1
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0][
            "content"
        ]
        document = text.partition("<document>")[2].split()
        grade = round(9 * sum(w in GOOD for w in document) / max(1, len(document)))
        content = (
            "I would rather not."
            if Labeller.asked % 4 == 0
            else f'Sure:\n```json\n{{"overall": {grade}}}\n```'
        )
        body = json.dumps(
            {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_language_model_labels_the_seed_set(setup, monkeypatch, capsys):
    monkeypatch.setattr(quality, "DIMENSIONS", {"overall": "good"})
    server = HTTPServer(("127.0.0.1", 0), Labeller)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    llm = dict(url=f"http://127.0.0.1:{server.server_port}/v1", model="m", retries=0, concurrency=1)
    try:
        settings = dict(labels="", llm=llm, n_labels=50)
        kinds = run(setup, **settings)
        asked = Labeller.asked
        assert 30 <= len(labels_made := (setup.out / "labels.jsonl").read_text().splitlines()) < 50
        assert set(json.loads(labels_made[0])["tags"]) == {"overall"} and asked == 50
        assert f"{len(labels_made)} of 50 documents have a grade" in capsys.readouterr().out
        good = [
            r["kind"] == "high"
            for r in kinds["classified"]
            if not r["reason"] or r["reason"] == "low score"
        ]
        assert 0.2 < np.mean(good) < 0.8
        run(setup, **settings)
        assert Labeller.asked == asked  # nothing is paid for twice
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match="cannot connect"):
        setup.out = setup.tmp / "down"
        run(setup, labels="", llm=llm, n_labels=20)
