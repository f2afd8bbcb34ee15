"""Trackers get what metrics.jsonl gets, go on as the same run, and never stop a run."""
import settings

import importlib.util
import json
import os
import signal

import pytest

import common
import pretrain
import trackers
from checks.trackers import compare, differences, expected, read_tensorboard

OPTIONS = ("--scale=0.25", "--pretrain.save_every=3", "--pretrain.eval_problems=0",
           "--evaluate.tasks=[]")


def stop_after(monkeypatch, n_steps: int) -> None:
    """A signal in the step of this number, as the shell or a scheduler sends it."""
    train_step, done = pretrain.train_step, []

    def counted(*arguments):
        done.append(1)
        if len(done) == n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(pretrain, "train_step", counted)


def test_a_resumed_run_in_all_three(mini, tmp_path, monkeypatch):
    """Read back from what the real packages stored: the numbers, the samples, the config."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when trackio is imported
    monkeypatch.setenv("TRACKIO_SQLITE_SYNCHRONOUS", "OFF")  # a slow disk is none of its matters
    for package in trackers.CLASSES:
        pytest.importorskip(package)
    options = ("--run=tracked", "--track=tensorboard,wandb,trackio", *OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        mini.pretrain(*options, code=128 + signal.SIGTERM)
    mini.pretrain(*options)
    folder = mini.folder / "out/tracked/pretrain"
    wanted, samples = expected(folder)
    assert len(wanted) > 6 and samples and any("validation/high/loss" in v for v in wanted.values())
    assert compare("tracked/pretrain", folder, wanted, samples) == []
    wanted[5]["loss"] += 1e-6
    assert len(compare("tracked/pretrain", folder, wanted, samples)) == 3


def job(folder, first_step: int) -> trackers.Job:
    return trackers.Job("a", "sft", folder, {"commit": "c0ffee"}, first_step, ["1 + 1?"])


def test_what_a_killed_run_repeats_counts_once(tmp_path):
    pytest.importorskip("tensorboard")
    lines = [dict(step=step, stage="s", loss=float(step), finite=True) for step in range(9)]
    lines += [dict(step=8, stage="s", scores={"math": {"avg": 0.5, "maj": None}}, samples=["2"])]
    killed = trackers.Trackers(["tensorboard"], job(tmp_path, 0))
    for line in lines[:7]:
        killed.write(line | {"loss": -1.0 if line["step"] > 4 else line["loss"]})
    resumed = trackers.Trackers(["tensorboard"], job(tmp_path, 5))
    for line in lines[5:]:
        resumed.write(line)
    resumed.close()
    found, samples, config = read_tensorboard(tmp_path)
    wanted = {step: {"loss": float(step), "finite": 1} for step in range(9)}
    wanted[8]["scores/math/avg"] = 0.5
    assert differences(found, wanted) == [] and differences(wanted, found) == []
    assert samples == {8: ["    2"]} and config == {"commit": "c0ffee"}
    killed.close()


def test_what_a_tracker_may_have_missed_is_sent_again(tmp_path, monkeypatch):
    """All to who joins later, the lines since it was last closed to one that a kill cut off. A run
    that starts anew is another one, and so is a copy of its folder."""
    class Listener:
        heard = []

        def __init__(self, job, run_id):
            self.id = run_id

        def log(self, step, values):
            self.heard.append((self.id, step))

        def close(self, code):
            """Nothing to end."""

    monkeypatch.setattr(trackers, "CLASSES", {"tensorboard": Listener, "wandb": Listener})
    monkeypatch.setattr(trackers, "is_missing", lambda name: False)
    lines = [dict(step=step, loss=0.0) for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))

    def hear(names, a_job, close=True) -> list:
        """What is heard of the lines before and of step 3."""
        Listener.heard = []
        found = trackers.Trackers(names, a_job)
        found.write(lines[3])
        if close:
            found.close()
        return Listener.heard

    [(first, step)] = hear(["wandb"], job(tmp_path, 0))
    assert step == 3  # one line, and closed after it
    assert hear(["wandb"], job(tmp_path, 3), close=False) == [(first, 1), (first, 2), (first, 3)]
    assert hear(["wandb"], job(tmp_path, 3)) == [(first, 1), (first, 2), (first, 3)]
    heard = hear(["wandb", "tensorboard"], job(tmp_path, 3))
    assert [step for _, step in heard] == [0, 1, 2, 3, 3] and (first, 3) in heard
    copy = job(tmp_path, 3)
    copy.run = "b"
    assert {run for run, _ in hear(["wandb"], copy)}.isdisjoint({first})
    (tmp_path / "tracked.json").write_text("{")
    assert len(hear(["wandb"], job(tmp_path, 3))) == 4


def test_a_missing_or_broken_tracker_costs_a_line(mini, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: find_spec(name) if name == "tqdm" else None)
    plain = mini.pretrain("--run=plain", *OPTIONS)
    printed = mini.pretrain("--run=missing", "--track=wandb,trackio", *OPTIONS)
    for name in ("wandb", "trackio"):
        assert f"warning: --track={name}: its package is not there" in printed
        assert printed.count(f"`pip install {name}` brings it") == 1
    assert "warning" not in plain

    class Broken:
        def __init__(self, job, run_id):
            """It starts."""

        def log(self, step, values):
            if step == 2:
                raise ConnectionError("no route\nto http://me:secret@host")

        def log_table(self, step, columns, rows):
            """It takes them."""

        def close(self, code):
            raise AssertionError("what failed is asked no more")

    monkeypatch.setattr(trackers, "CLASSES", {"tensorboard": Broken})
    monkeypatch.setattr(trackers, "is_missing", lambda name: False)
    printed = mini.pretrain("--run=broken", "--track=tensorboard", *OPTIONS)
    assert printed.count("tensorboard tracks this run no more: ConnectionError: no route to "
                         "http://***@host; nothing else is lost") == 1
    losses = []
    for run in ("plain", "missing", "broken"):
        lines = common.read_metrics(mini.folder / "out" / run / "pretrain")
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) > 6


def test_an_unknown_tracker_is_named():
    assert settings.tracker_names("wandb, trackio,wandb") == ["wandb", "trackio"]
    with pytest.raises(common.UserError, match="unknown tracker 'wand'; did you mean 'wandb'"):
        settings.tracker_names("tensorboard,wand")
