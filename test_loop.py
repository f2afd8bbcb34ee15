"""MFU: of a step whose FLOPs are known, on a device whose peak is known, in all five phases."""
from settings import load_config

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
import distill
import loop
import pretrain
import reward
import rl
import sft
from checks import mini_phases
from checks.mini_rl import toy
from data.text.mixture import document_lengths
from model import ModelConfig, Transformer, training_flops

PEAK = 1e12


def test_flops_of_packed_sequences_are_those_of_each_alone():
    cfg = ModelConfig(3, 32, 48, 4, 2, 8, vocab_size=64)
    model = Transformer(cfg)
    lengths = np.array([3, 16, 5])
    ours = training_flops(cfg, lengths.sum(), (lengths**2).sum() / 2)
    counted = 0
    for length in lengths.tolist():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            logits = model(torch.zeros(1, length, dtype=torch.int64)) @ model.lm_head.weight.T
            logits.sum().backward()
        # six products of whole squares: the half above the diagonal is none of the model's
        squares = 6 * 2 * length**2 * cfg.n_layers * cfg.n_heads * cfg.head_dim
        counted += counter.get_total_flops() - squares // 2
    assert ours == counted


def test_lengths_of_documents():
    doc_start = np.array([[0, 0, 0, 3, 3, 5, 6, 7], [0, 0, 2, 2, 2, 2, 2, 2]])
    assert document_lengths(doc_start).tolist() == [3, 2, 2, 6]  # one token trains nothing
    assert document_lengths(np.zeros((2, 8), np.int32)).tolist() == [8, 8]


def spy_on_lengths(monkeypatch, module) -> list[int]:
    """Collects the lengths of what the step trains, from what goes into its rows."""
    seen = []
    if module in (pretrain, sft):
        train_step = module.train_step

        def watched(model, batch, settings, dist):
            for starts in batch.doc_start.tolist():
                lengths = [starts.count(start) for start in set(starts)]
                seen.extend(length for length in lengths if length > 1)
            return train_step(model, batch, settings, dist)

        monkeypatch.setattr(module, "train_step", watched)
        return seen
    pack = module.pack

    def watched_pack(sequences, context):
        if torch.is_grad_enabled():  # not what a reference scores
            seen.extend(len(prompt) + len(response) for prompt, response in sequences)
        return pack(sequences, context)

    monkeypatch.setattr(module, "pack", watched_pack)
    return seen


@pytest.mark.parametrize("module", [pretrain, sft, distill, reward, rl])
def test_mfu_of_each_phase(base, monkeypatch, module):
    """The first step of the real script, on a device with a known peak, told how long it took."""
    mini_phases.prepare(base)
    toy(monkeypatch.setattr)
    monkeypatch.setattr(common, "peak_flops", lambda device, dtype: PEAK)
    seen = spy_on_lengths(monkeypatch, module)
    write, lines = common.Metrics.write, []

    def stop_after_the_first(self, **line):
        lines.append(line)
        write(self, **line)
        raise SystemExit

    monkeypatch.setattr(common.Metrics, "write", stop_after_the_first)
    phase = module.__name__
    options = ["--evaluate.tasks=[]", f"--{phase}.prompts=[]"]
    base.call(module.main, *mini_phases.command(phase, "mfu"), *options)
    (line,) = lines
    cfg = load_config("", [str(base.folder / "phases.py")], model=ModelConfig).model
    weights = 2 * 32 * (2 * 32 + 2 * 16 + 3 * 64) + 32 * 448  # two layers; 400 ids, padded
    assert (cfg.n_layers, cfg.hidden_size, cfg.ffn_size, cfg.n_heads, cfg.head_dim) == (
        2, 32, 64, 2, 16)
    lengths = np.array(seen, np.float64)
    flops = 6 * (weights * lengths.sum() + 2 * 2 * 16 * (lengths**2).sum())
    seconds = line["tokens"] / line["tokens_per_s"]
    assert line["mfu"] == pytest.approx(flops / seconds / PEAK) and line["mfu"] > 0


def test_devices_are_known_by_their_whole_names(monkeypatch):
    peaks = {}
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA GB200", "NVIDIA B200",
                 "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H20"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        peaks[name.removeprefix("NVIDIA ")] = common.peak_flops(torch.device("cuda"), "bfloat16")
    assert peaks["H100 80GB HBM3"] == 989e12 != peaks["H100 NVL"]
    assert peaks["B200"] != peaks["GB200"] and peaks["GeForce RTX 4090"] == 165e12
    assert peaks["GeForce RTX 4090 Laptop GPU"] is None and peaks["H20"] is None
    assert common.peak_flops(torch.device("cuda"), "float32") is None


def test_a_stage_has_its_own_micro_batches_and_recomputation():
    section = loop.TrainConfig(recompute=True)
    section.micro_tokens = 64
    stages = [
        pretrain.StageConfig("a", [1, 1], 16, tokens=1, mixture={"p": 1}),
        pretrain.StageConfig("b", [1, 1], 16, recompute=False, micro_tokens=0, rope_theta=7.0),
    ]
    loop.fill_in_stages(stages, section)
    assert [(stage.recompute, stage.micro_tokens) for stage in stages] == [(True, 64), (False, 0)]
    model = Transformer(ModelConfig(2, 32, 48, 4, 2, 8, vocab_size=64))
    for stage, expected in zip(stages, ((True, 10_000.0), (False, 7.0))):
        loop.configure(model, stage)
        assert {block.recompute for block in model.layers} == {expected[0]}
        assert model.rope_theta == expected[1]


@pytest.mark.parametrize("device, capability, slow", [
    ("cpu", "AVX2", True), ("cpu", "AVX512", False), ("cuda", "AVX2", False)])
def test_bfloat16_is_slow_on_an_old_cpu(monkeypatch, device, capability, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert common.computes_bfloat16_slowly(torch.device(device)) is slow


def test_a_checkpoint_that_cannot_be_written_is_not_taken_for_the_newest(base, monkeypatch):
    """An evaluation follows the end of the first stage, which found no room on the disk."""
    mini_phases.prepare(base)
    save, steps = common.save_checkpoint, []

    def no_room_once(dist, folder, step, *rest):
        steps.append(step)
        return None if len(steps) == 1 else save(dist, folder, step, *rest)

    monkeypatch.setattr(common, "save_checkpoint", no_room_once)
    stage = dict(lr=[1, 1], context=256, epochs=dict(talks=1))
    stages = [dict(name="a", **stage), dict(name="b", **stage)]
    base.call(sft.main, *mini_phases.command("sft", "no-room"), f"--sft.stages={stages}",
              "--sft.eval_problems=2", "--evaluate.n_problems=2", "--evaluate.max_new_tokens=4",
              "--sft.prompts=[]", "--sft.compare=False")
    folder = base.folder / "out/no-room/sft"
    kept = [common.read_meta(path)["step"] for path in common.list_checkpoints(folder)]
    scored = [line["step"] + 1 for line in common.read_metrics(folder) if "scores" in line]
    assert kept == [steps[-1]] and scored == [steps[0], steps[-1]]


def test_only_what_was_given_is_said_to_have_no_effect(capsys):
    cfg = rl.RlConfig(stages=[], filter_samples=0)
    run = SimpleNamespace(phase="rl", cfg=cfg, eval_tasks=["math"],
                          dist=common.Dist(0, 1, torch.device("cpu"), None))
    loop.say_unused(run, {"keep_between": "filter_samples is 0"})
    assert capsys.readouterr().out == ""
    cfg.keep_between = [0.2, 0.9]
    loop.say_unused(run, {"keep_between": "filter_samples is 0"})
    assert capsys.readouterr().out == (
        "note: rl.keep_between has no effect: filter_samples is 0\n")


@pytest.mark.parametrize("form, expected", [("chat", "[7] 8 9"), ("document", "text8 9")])
def test_an_answer_has_the_thoughts_that_its_prompt_began(monkeypatch, form, expected):
    """As templates do whose prompt ends with <think>; a page is printed with its beginning."""
    monkeypatch.setattr(loop, "sample", lambda *_, **settings: [[SimpleNamespace(tokens="8 9")]])
    monkeypatch.setattr(loop.template, "render", lambda messages, *_, **settings: [7])
    monkeypatch.setattr(loop, "decode_answer",
                        lambda tokens, _, prompt="": f"{prompt} {tokens}" if prompt else tokens)
    run = SimpleNamespace(
        cfg=SimpleNamespace(prompts=["text"], seed=0),
        tokenizer=SimpleNamespace(stop_ids=(), encode_prompt=lambda text: [7]),
        config=SimpleNamespace(evaluate=SimpleNamespace(max_new_tokens=4)))
    assert loop.answer_prompts(run, None, form) == [expected]
