"""The kernels' benchmark, as far as it goes without a GPU: its clock, its counts, its tables, its
refusals."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from conftest import ROOT
from kernels import attention
from kernels.tiles import Tiles
from kernels.tools import bench, check

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
needs_none = pytest.mark.skipif(GPU, reason="has a GPU")


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kernels.tools.bench", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_none
def test_without_a_gpu_it_says_so_in_one_line():
    done = run("--quick")
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr.startswith("error: kernels.tools.bench measures a GPU")
        and done.stderr.count("\n") == 1
    )


@needs_gpu
def test_quick_run():
    done = run("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        all(f"## {family}" in done.stdout for family in bench.RACES)
        and "TFLOP/s (bf16" in done.stdout
    )


# ---- the timer


def test_seconds_counts_neither_warm_up_nor_clearing(monkeypatch):
    now, lengths = [0.0], iter([100.0, 50.0, 1.0, 7.0, 2.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    def passes(n):
        now[0] += n

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        bench, "larger_than_l2", lambda: SimpleNamespace(zero_=lambda: passes(1000.0))
    )
    monkeypatch.setattr(bench, "TURN", 0.0)  # the fewest calls
    assert bench.seconds(lambda: passes(next(lengths))) == pytest.approx(2.0)
    assert next(lengths, None) is None


def test_race_takes_turns_and_shows_errors():
    turns, speed = [], {"slow": itertools.count(10), "fast": itertools.count(1), "broken": None}

    def measure(name):
        turns.append(name)
        if name == "broken" and len(turns) > 3:
            raise RuntimeError("no kernel for this\nand a long story")
        return float(next(speed[name])) if speed[name] else 5.0

    found = bench.race({name: name for name in speed}, measure)
    assert found == {"slow": 12.0, "fast": 3.0, "broken": "RuntimeError: no kernel for this"}
    assert turns == ["slow", "fast", "broken"] * 2 + ["slow", "fast"] * 3
    with pytest.raises(RuntimeError):
        turns.clear()
        bench.race({name: name for name in speed}, measure, expected=torch.OutOfMemoryError)


def test_race_leaves_out_who_computes_something_else(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda run: 1.0)
    x, nan = (
        torch.randn(64, generator=torch.Generator().manual_seed(0)),
        torch.full((64,), torch.nan),
    )
    found = bench.race(
        {
            "ours": lambda: (x, x),
            "near": lambda: (1.01 * x, x),
            "far": lambda: (x, 1.1 * x),
            "nan": lambda: (x, nan),
            "other shape": lambda: (x, x[:5]),
        }
    )
    assert found == {
        "ours": 1.0,
        "near": 1.0,
        "other shape": 1.0,
        "far": "ValueError: differs by 10%",
        "nan": "ValueError: differs by nan%",
    }


def test_backward_is_the_difference(monkeypatch):
    monkeypatch.setattr(
        bench,
        "race",
        lambda runs: {
            name: "no" if name == "bad" else 1.0 if run.func is bench.one_pass else 3.5
            for name, run in runs.items()
        },
    )
    passes = dict(bench.race_passes({"good": (None, []), "bad": (None, [])}, ()))
    assert passes == {
        "forward": {"good": 1.0, "bad": "no"},
        "backward": {"good": 2.5, "bad": "no"},
        "forward + backward": {"good": 3.5, "bad": "no"},
    }


# ---- what is counted


def test_documents_and_visible_pairs():
    docs = bench.documents(3, 300, mean=20)
    assert docs.dtype == torch.int32 and not docs[:, 0].any() and (docs.diff() >= 0).all()
    assert (
        (docs.diff() == 0) | (docs[:, 1:] == torch.arange(1, 300))
    ).all() and 30 <= docs.diff().bool().sum() <= 60
    assert torch.equal(docs, bench.documents(3, 300, mean=20)) and (docs[0] != docs[1]).any()
    assert bench.visible_pairs(3, 300, docs) == sum(
        int(docs[b, t]) <= s <= t for b in range(3) for t in range(300) for s in range(300)
    )
    assert bench.visible_pairs(2, 10, None) == 100


@pytest.fixture
def work(monkeypatch):
    """{(case, pass): FLOPs or bytes} of a family, without running anything."""
    monkeypatch.setattr(bench, "race", lambda runs, measure=None: {name: 1.0 for name in runs})
    monkeypatch.setattr(bench, "both_passes", lambda f, inputs, d_outs=None: ())
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    return lambda family, *args: {found[:2]: found[3] for found in bench.RACES[family](*args)}


def test_flops_and_bytes_by_hand(work):
    found = work("attention", [(32, False), (64, True)], 64, (4, 2, 16))
    forward = 2 * 2 * (4 * 16) * (2 * 32 * 32 / 2)  # two products of 2 FLOPs, 2 rows
    assert found["2 x 32", "forward"] == forward and found["2 x 32", "backward"] == 2.5 * forward
    assert found["2 x 32", "forward + backward"] == 3.5 * forward
    assert found["1 x 64, documents", "forward"] < 4 * 64 * 64 * 64 / 2
    own = (
        3 * 64
        - torch.randint(32, (3, 1), generator=torch.Generator().manual_seed(bench.SEED)).sum()
    )
    assert work("decode", [(3, 64)], (4, 2, 16))["3 x 64", "forward"] == own * 2 * 16 * 2 * 2
    found, tensor = work("rms_norm", [(10, 32)]), 10 * 32 * 2
    assert [
        found[f"10 x 32{add}", step] / tensor
        for add in ("", ", add")
        for step in ("forward", "backward", "forward + backward")
    ] == [2, 3, 5, 4, 4, 8]
    assert (
        work("cross_entropy", [7], 16, 100)["7 tokens", "forward + backward"]
        == 3 * 2 * 7 * 16 * 100
    )


@needs_none
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_contestants_compute_the_same(monkeypatch):
    """On a CPU, with SDPA's own back end for those of a GPU. FlexAttention has no backward pass
    there."""

    class Backend:
        CUDNN_ATTENTION = EFFICIENT_ATTENTION = SDPBackend.MATH
        FLASH_ATTENTION = SDPBackend.FLASH_ATTENTION

    monkeypatch.setattr(bench, "SDPBackend", Backend)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "seconds", lambda run: 1.0)
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    for packed, peers in (
        (False, ["SDPA flash", "eager (k, v repeated)"]),
        (True, ["plain_attention"]),
    ):
        *_, (_, _, times, _) = bench.race_attention([(24, packed)], 24, (2, 1, 16))
        assert times.pop("FlexAttention").startswith("NotImplementedError")
        assert times == dict.fromkeys(
            ["ours", "SDPA cuDNN", "SDPA efficient (k, v repeated)", *peers], 1.0
        )
    ((_, _, times, _),) = bench.race_decode([(2, 40)], (2, 1, 16))
    assert times == dict.fromkeys(["ours", "plain_attention", "FlexAttention", "SDPA cuDNN"], 1.0)
    for _, step, times, _ in bench.race_rms_norm([(3, 32)]):
        assert set(times.values()) == {0.0 if step == "backward" else 1.0}


def test_table():
    def rows(case, times, memory={}):
        return bench.measurements("cross_entropy", 10.0, case, "forward", times, 4e9, memory)

    text = bench.table(
        rows("a", {"ours": 1e-3, "ours (torch)": 1e-4, "slow": 4e-3, "best": 2e-3}, {"ours": 1.5})
        + rows("b", {"ours": 1e-3, "best": "Error: a|b"})
        + rows("c", {"ours": "lost", "best": 1e-3})
    )
    head, _, a, b, c = text.splitlines()[2:]
    assert head.count("|") == a.count("|") == b.count("|") == c.count("|")
    assert a.startswith(
        "| a | forward | 1.000 (4) 1.50 GB | 0.100 (40) | 4.000 (1) | 2.000 (2) | 40% | 2.00 |"
    )
    assert b == "| b | forward | 1.000 (4) |  |  | Error: a/b | 40% |  |"
    assert c == "| c | forward | lost |  |  | 1.000 (4) |  |  |"


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main() as on a GPU, with checks and measurements made up; its exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "GPU")
    monkeypatch.setattr(bench, "INTERPRETED", False)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "ceilings", lambda: {"TFLOP/s": 1.0, "GB/s": 10.0})
    monkeypatch.setattr(
        bench,
        "RACES",
        {
            "decode": lambda cases: [("1 x 4", "forward", {"ours": 0.5}, 1e9)],
            "attention": lambda cases: [("2 x 4", "forward", {"ours": 1.0}, 1e12)],
        },
    )
    for name in ("attention", "rms_norm", "cross_entropy"):
        fine = lambda module: [check.Finding(module.__name__, 1.0, 2.0)]
        monkeypatch.setitem(check.CHECKS, name, fine)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["checks/bench.py", *options])
        with pytest.raises(SystemExit) as leave:
            bench.main()
        return leave.value.code

    return run


def test_a_full_run_is_written(main, tmp_path, capsys):
    assert not main("decode") and not main("--quick") and not list(tmp_path.iterdir())
    assert not main() and not main()  # lines are added, the tables are those of the last run
    lines = [json.loads(line) for line in (tmp_path / "kernels_gpu.jsonl").read_text().splitlines()]
    assert [(x["family"], x["seconds"], x["rate"], x["share"]) for x in lines] == [
        ("decode", 0.5, 2.0, 0.2),
        ("attention", 1.0, 1.0, 1.0),
    ] * 2
    assert lines[0].keys() >= {
        "commit",
        "command",
        "machine",
        "driver",
        "power_limit",
        "torch",
        "date",
    }
    assert (tmp_path / "kernels_gpu.md").read_text().count(
        "| 2 x 4 | forward | 1000.000 (1) | 100% |  |"
    ) == 1


def test_nothing_wrong_is_measured(main, monkeypatch, tmp_path):
    found = ("", "", {"ours": 1.0, "x": "differs by 9%"}, 1.0)
    monkeypatch.setattr(bench, "RACES", {"attention": lambda cases: [found]})
    assert main() == 1
    monkeypatch.setitem(check.CHECKS, "rms_norm", lambda _: [check.Finding("a case", 3.0, 2.0)])
    monkeypatch.setattr(bench, "ceilings", None)
    assert "WRONG a case" in main()


# ---- tuning


@needs_none
def test_a_choice_of_tiles_is_tried_first(monkeypatch):
    monkeypatch.setattr(attention, "tiles_for", attention.tiles_for)
    for kernel in ("attention_dq", "attention_decode"):
        assert bench.attempt(kernel, 16, Tiles(16, 32, 1, 1)), kernel
    usual, factor = attention.attention, {"torch": 1.0, "triton": 1.1}
    monkeypatch.setattr(
        attention, "attention", lambda *a, kernels: usual(*a, kernels=kernels) * factor[kernels]
    )
    assert not bench.attempt("attention_forward", 16, Tiles(16, 16, 1, 1))


def test_a_choice_that_hangs_or_fails_is_left_out(monkeypatch, capsys):
    def hangs(*args, timeout, **more):
        raise subprocess.TimeoutExpired("", timeout)

    for run, survives, said in [
        (hangs, False, "not done in 120 seconds"),
        (lambda *a, **k: SimpleNamespace(returncode=1, stderr="a\nwhy\n"), False, "why"),
        (lambda *a, **k: SimpleNamespace(returncode=0, stderr="a warning"), True, ""),
    ]:
        monkeypatch.setattr(subprocess, "run", run)
        assert bench.survives("attention_dq", 64, Tiles(16, 16, 4, 2)) == survives
        assert said in capsys.readouterr().out


def test_tuning_takes_the_best_over_all_shapes(monkeypatch, tmp_path):
    a, b, c, d = (Tiles(n, 16, 4, 2) for n in (16, 32, 64, 128))
    speed = {
        a: [1.0, 1.0, 1.0, 9.0],
        b: [0.1, 4.0, 4.0, 5.0],
        c: [0.1, 0.1, None, 0.1],
        d: [0.1] * 4,
    }
    tuned = tmp_path / "tuned.json"
    tuned.write_text(
        '{"GPU": {"attention_dq 64": [1, 2, 3, 4, false], "else": [1]}, "another": {}}'
    )
    monkeypatch.setattr(attention, "tiles_for", attention.tiles_for)
    monkeypatch.setattr(bench, "TUNED", tuned)
    monkeypatch.setattr(bench, "chip", lambda device: "chip")
    monkeypatch.setattr(bench, "CANDIDATES", {"chip": {"attention_dq": list(speed)}})
    monkeypatch.setattr(bench, "survives", lambda kernel, D, tiles: tiles != d)
    shapes = []
    monkeypatch.setattr(bench, "launch", lambda *shape: shapes.append(shape))
    now = lambda run: (
        speed[attention.tiles_for("attention_dq")][(len(shapes) - 1) % 4] * 1.0
    )  # None: an error
    monkeypatch.setattr(bench, "seconds", now)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    bench.tune()
    kept = {"else": [1]}
    assert json.loads(tuned.read_text()) == {
        "GPU": kept | {"attention_dq 64": list(b), "attention_dq 128": list(b)},
        "another": {},
    }
    assert len(shapes) == 8 and {shape[1] for shape in shapes} == {64, 128}
