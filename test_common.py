"""Checkpoints that are whole or absent; signals and metrics."""

import json
import os
import signal

import pytest
import torch

import common
from common import UserError


def small(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        model(
            torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        ).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


D = common.Dist(0, 1, torch.device("cpu"), None)


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model, optimizer = small()
    for step in (1, 2, 3):
        train(model, optimizer, 1, step)
        common.save_checkpoint(
            D,
            tmp_path,
            step,
            model,
            optimizer,
            {"keep": step == 1},
            tmp_path / "tokenizer.json",
            keep=1,
        )
    return tmp_path, model, optimizer


def test_resume_equals_going_on(saved):
    folder, model, optimizer = saved
    other, other_optimizer = small(seed=9)
    assert (
        common.load_checkpoint(D, common.find_checkpoint(D, folder), other, other_optimizer)["step"]
        == 3
    )
    train(model, optimizer, 3)
    train(other, other_optimizer, 3)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_old_checkpoints_go_and_stage_ends_stay(saved):
    assert [p.name for p in common.list_checkpoints(saved[0])] == ["step_00000003", "step_00000001"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no meta", "torn meta"])
def test_damage_is_named_and_passed_over(saved, damage, capsys):
    folder = saved[0]
    newest = folder / "step_00000003"
    victim = next(newest.glob("__0_*"))
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-7])
    elif damage == "delete":
        victim.unlink()
    elif damage == "no meta":
        (newest / "meta.json").unlink()
    else:
        (newest / "meta.json").write_text('{"step": 3, "fi')
    assert common.find_checkpoint(D, folder).name == "step_00000001"
    assert "step_00000003" in capsys.readouterr().out
    with pytest.raises(UserError, match="step_00000003"):
        common.load_checkpoint(D, newest, *small())


def test_a_save_that_was_killed_is_no_checkpoint(saved):
    folder = saved[0]
    (folder / "step_00000003").rename(folder / ".step_00000004.tmp")
    assert common.find_checkpoint(D, folder).name == "step_00000001"


def test_a_checkpoint_that_is_written_again_is_never_absent(saved, monkeypatch):
    """Killed between the two renames, the old one is found; the next save clears up."""
    folder, model, optimizer = saved
    rename = os.rename
    save = lambda: common.save_checkpoint(
        D, folder, 3, model, optimizer, {"again": True}, folder / "tokenizer.json")

    def until_killed(source, target):
        if str(target).endswith("step_00000003"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(common.os, "rename", until_killed)
    with pytest.raises(KeyboardInterrupt):
        save()
    monkeypatch.undo()
    old = common.find_checkpoint(D, folder)
    assert old.name == "step_00000003.old" and "again" not in common.read_meta(old)
    assert common.load_checkpoint(D, old, *small(seed=9))["step"] == 3
    save(), save()
    assert [p.name for p in common.list_checkpoints(folder)] == ["step_00000003", "step_00000001"]
    assert common.read_meta(folder / "step_00000003")["again"]


def test_a_run_that_went_on_from_behind_a_damaged_checkpoint_keeps_what_it_writes(saved):
    """Step 3 is damaged, so the run goes on from 1: 2 is its newest, whatever the number says."""
    folder, model, optimizer = saved
    damaged = next((folder / "step_00000003").glob("*.distcp"))
    damaged.write_bytes(b"")
    assert common.find_checkpoint(D, folder).name == "step_00000001"
    save = lambda step: common.save_checkpoint(
        D, folder, step, model, optimizer, {}, folder / "tokenizer.json", keep=1)
    assert save(2) == folder / "step_00000002"
    assert common.find_checkpoint(D, folder).name == "step_00000002"
    (folder / "step_00000002" / "meta.json").write_text("{")  # torn: in the way of no later save
    save(4)
    assert [p.name for p in common.list_checkpoints(folder)] == ["step_00000004", "step_00000001"]


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common.current_commit() == ""


def test_a_checkpoint_before_the_first_step_has_no_optimizer_state(tmp_path):
    """torch would make one, by a step: with it the steps to come are others (pytorch #164929)."""
    (tmp_path / "tokenizer.json").write_text("{}")
    untouched, saved, resumed = small(), small(), small(seed=9)
    common.save_checkpoint(D, tmp_path, 0, *saved, {}, tmp_path / "tokenizer.json")
    common.load_checkpoint(D, tmp_path / "step_00000000", *resumed)
    assert not saved[1].state and not resumed[1].state
    for model, optimizer in (untouched, saved, resumed):
        train(model, optimizer, 3)
    for model, _ in (saved, resumed):
        assert torch.equal(model.weight, untouched[0].weight)


def test_a_save_that_fails_loses_nothing(saved, monkeypatch, capsys):
    folder, model, optimizer = saved
    monkeypatch.setattr(
        common.dcp,
        "save",
        lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    assert (
        common.save_checkpoint(D, folder, 9, model, optimizer, {}, folder / "tokenizer.json")
        is None
    )
    assert "No space left" in capsys.readouterr().out
    assert common.find_checkpoint(D, folder).name == "step_00000003" and not list(
        folder.glob(".step*")
    )


def test_kept_lines(tmp_path):
    """Of all ranks; a torn line is left out, and goes with the next that is added."""
    first, second = tmp_path / "kept/a [1].0.jsonl", tmp_path / "kept/a [1].1.jsonl"
    common.keep_lines(first, [{"n": 1}, {"n": 2}])
    common.keep_lines(second, [{"n": 3}])
    (tmp_path / "kept/b.0.jsonl").write_text('{"n": 9}\n')
    first.write_text(first.read_text()[:-4])
    kept = lambda: [row["n"] for row in common.read_kept_lines(tmp_path / "kept", "a [1]")]
    assert kept() == [1, 3]
    common.keep_lines(first, [{"n": 4}])
    assert kept() == [1, 4, 3]
    second.write_text('{"n": 3}\nmine\n{"n": 5}\n')
    with pytest.raises(UserError, match=r"a \[1\].1.jsonl is damaged, or no file of samples"):
        kept()
    assert [*common.read_kept_lines(tmp_path / "nowhere", "a")] == []


def test_work_is_handed_out_to_who_is_free(monkeypatch):
    """Each piece once, in any order of asking."""
    store = torch.distributed.HashStore()
    ranks = [common.Dist(rank, 3, torch.device("cpu"), None, store=store) for rank in range(3)]
    monkeypatch.setattr(common.Dist, "wait", lambda self: None)
    for _ in range(2):  # a second queue begins anew
        takers = [rank.hand_out("abcdefg", "letters") for rank in ranks]
        taken = [next(takers[i]) for i in (2, 0, 0, 1, 0)]
        assert taken == [*"abcde"] and [*takers[1]] == ["f", "g"]
        assert [*takers[0]] == [*takers[2]] == []
    assert [*D.hand_out("abc", "letters")] == [*"abc"]
    assert ranks[0].piece_size(100, 4, 64) == 15 and ranks[0].piece_size(20, 4, 64) == 7
    assert ranks[0].piece_size(5, 9, 4) == 1


def test_a_signal_ends_kept_work_at_once():
    """Elsewhere it is noted, and ends the next such work before it begins."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    dist, done = common.Dist(0, 1, torch.device("cpu"), None), []
    try:
        stop_signal = common.StopSignal(dist)
        with pytest.raises(common.Interrupted) as left:
            for piece in dist.hand_out(range(9), "pieces"):
                done.append(piece)
                if piece == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
        assert done == [0, 1] and left.value.code == 128 + signal.SIGTERM
        stop_signal = common.StopSignal(dist)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal.on_any_rank()
        with pytest.raises(common.Interrupted):
            done += dist.hand_out(range(9), "pieces")
        assert done == [0, 1]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_metrics_drop_what_will_be_repeated_and_a_torn_line(tmp_path):
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in range(6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    metrics = common.Metrics(D, tmp_path, first_step=4)
    metrics.write(step=4, loss=2.0)
    assert [(m["step"], m["loss"]) for m in common.read_metrics(tmp_path)] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 2),
    ]


def test_metrics_wait_in_memory_while_the_disk_is_full(tmp_path, monkeypatch):
    metrics = common.Metrics(D, tmp_path, first_step=0)
    metrics.write(step=0, loss=1.0)

    class Torn:
        """A file of which half a line reaches the disk."""

        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, text):
            self.file.write(text[:9])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "open", Torn, raising=False)
    metrics.write(step=1, loss=1.0)
    assert [m["step"] for m in common.read_metrics(tmp_path)] == [0]
    monkeypatch.undo()
    metrics.write(step=2, loss=1.0)
    assert [m["step"] for m in common.read_metrics(tmp_path)] == [0, 1, 2]


def test_adamw_groups_cover_every_parameter_once():
    from model import ModelConfig, Transformer

    model = Transformer(ModelConfig(2, 16, 24, 2, 1, 8, vocab_size=32))
    optimizer = common.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    decay, plain = (set(map(id, group["params"])) for group in optimizer.param_groups)
    assert len(decay) + len(plain) == len(list(model.parameters())) and not decay & plain
    assert (
        id(model.embed_tokens.weight) in plain
        and id(model.norm.weight) in plain
        and id(model.lm_head.weight) in decay
    )
