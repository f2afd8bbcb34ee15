"""The parts of checks/gpu.sh at a tiny shape on the CPU; what they say where there is no GPU."""
import json
import os
import subprocess
import sys

import pytest
import torch

from checks import gpu
from conftest import ROOT
from kernels.tools import check

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A part as the command runs it, with --small; its file."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu.SMALL, "folder", tmp_path)
    monkeypatch.setattr(gpu, "TURN", 0.0)
    monkeypatch.setattr(check, "NORM_CASES", check.NORM_CASES[:1])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def run(part):
        monkeypatch.setattr(sys, "argv", ["gpu.py", part, "--small"])
        assert gpu.main() == 0
        return json.loads((tmp_path / f"{part}.json").read_text())

    return run


def is_whole(line):
    """Every case has figures, and nothing is missing of how they were made."""
    origin = {"commit", "command", "seed", "config", "machine", "torch", "seconds"}
    return (
        all(line[key] not in (None, "") for key in origin)
        and line["error"] is None
        and line["errors"] == {}
        and all(line["figures"].values())
    )


def test_kernels_peers_tiles(run):
    (family,) = run("kernels")["figures"].values()
    assert family["wrong"] == 0 < family["cases"]
    peers = run("peers")
    assert is_whole(peers)
    forward = peers["figures"]["rms_norm"]["2 x 32, forward"]
    assert forward["seconds"].keys() == {"ours", "torch", "torch compiled"}
    assert forward["times_best"] == pytest.approx(
        forward["seconds"][forward["best_peer"]] / forward["seconds"]["ours"]
    )
    tiles = run("tiles")
    assert is_whole(tiles)
    decode = tiles["figures"]["attention_decode"]
    assert decode["best"] in decode["seconds"] and decode["gain"] > 0


def test_steps(run):
    for part, n_cases in (("training", 3), ("updates", 2)):
        line = run(part)
        assert is_whole(line) and len(line["figures"]) == n_cases
        for figures in line["figures"].values():
            assert figures["tokens_per_s"] == pytest.approx(figures["tokens"] / figures["seconds"])
            assert figures["mfu"] is None or torch.cuda.is_available()


def test_samples_and_a_step_of_rl(run, capsys):
    samples = run("sampler")
    assert is_whole(samples)
    (figures,) = samples["figures"].values()
    assert figures["tokens_per_s"] == pytest.approx(16 * 4 / figures["seconds"])
    step = run("rl_step")
    assert is_whole(step)
    figures = step["figures"]["one step"]
    parts = [figures[part] for part in ("rollout_s", "scoring_s", "update_s")]
    assert figures["seconds"] == pytest.approx(sum(parts)) and min(parts) > 0
    assert figures["responses"] == 16 and figures["tokens"] <= 16 * 8
    gpu.print_table(gpu.SMALL.folder)
    table = capsys.readouterr().out
    assert "\nsampler: " in table and "\ntraining: not run" in table
    assert f"16 rows behind 4 tokens {'':24} seconds" in table


def test_what_fails_is_null_and_the_others_go_on(run, monkeypatch, tmp_path, capsys):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\na lot")

    seen = []

    def look():
        seen.append(json.loads((tmp_path / "kernels.json").read_text()))
        return dict(cases=1, wrong=1, error="wrong: a case")

    monkeypatch.setitem(gpu.PARTS, "kernels", lambda scale: dict(a=fail, b=look, c=dict))
    with pytest.raises(AssertionError):
        run("kernels")
    line = json.loads((tmp_path / "kernels.json").read_text())
    why = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert line["error"] == why and line["errors"] == dict(a=why, b="wrong: a case")
    assert line["figures"] == dict(a=None, b=dict(cases=1, wrong=1), c={})
    (before,) = seen  # what a part leaves that is stopped at its limit
    assert before["error"] == "it was stopped before its end"
    assert before["figures"] == dict(a=None, b=None, c=None)
    gpu.print_table(tmp_path)
    assert f"  a: {why}\n" in capsys.readouterr().out


@needs_none
def test_without_a_gpu_each_part_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    done = subprocess.run(
        ["bash", "checks/gpu.sh"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    lines = [f"{part}: skipped, there is no GPU here\n" for part in gpu.PARTS]
    assert done.stdout == "".join(lines)

    monkeypatch.setattr(gpu.FULL, "folder", tmp_path)
    for part in gpu.PARTS:
        monkeypatch.setattr(sys, "argv", ["gpu.py", part])
        assert gpu.main() == 0
    assert capsys.readouterr().out == "".join(lines) and not list(tmp_path.iterdir())
