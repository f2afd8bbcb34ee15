"""Supervised fine-tuning: its loss against transformers and TRL, one denominator, and the script by its real commands."""
import json
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl

import common
import hf
import sft
from conftest import ROOT
from data.mixture import IGNORE
from data.packing import Batch
from data.tokenizer import TokenizerConfig, train_tokenizer
from kernels.cross_entropy import linear_cross_entropy
from model import ModelConfig, Transformer, init_weights

ONE = common.Dist(0, 1, torch.device("cpu"), None)


def settings(**more) -> sft.SftConfig:
    return sft.SftConfig(stages=[], batch_tokens=256, **more)


def small_model(seed=0) -> Transformer:
    model = Transformer(ModelConfig(2, 32, 48, 2, 1, 16, vocab_size=320, init_std=0.1))
    init_weights(model, seed)
    return model


def packed(seed: int, rows: int = 8, context: int = 32, weights=(0.0, 1.0)) -> tuple[Batch, list]:
    """Random conversations of uneven lengths in rows, with padding; and each alone: (tokens, weights)."""
    rng = np.random.default_rng(seed)
    made = Batch(np.zeros((rows, context), np.int64), np.full((rows, context), IGNORE, np.int64),
                 np.zeros((rows, context), np.float32), np.tile(np.arange(context, dtype=np.int32), (rows, 1)))
    alone = []
    for row in range(rows):
        begin = 0
        while (length := int(rng.integers(2, 14))) <= context - begin:
            tokens = rng.integers(0, 256, length)  # transformers gives its pad token no gradient
            weight = rng.choice(weights, length).astype(np.float32)
            weight[0] = 0
            place = slice(begin, begin + length - 1)
            made.tokens[row, begin:begin + length], made.doc_start[row, begin:begin + length] = tokens, begin
            made.weights[row, place] = weight[1:]
            made.targets[row, place] = np.where(weight[1:] > 0, tokens[1:], IGNORE)
            alone.append((torch.tensor(tokens), torch.tensor(weight)))
            begin += length
    return made, alone


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


# ---- the loss

@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Our small model as transformers reads it."""
    tokenizer = train_tokenizer(["so it is " * 50], TokenizerConfig(vocab_size=270))
    folder = tmp_path_factory.mktemp("sft") / "export"
    hf.export(small_model(), tokenizer, folder, torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_transformers_one_by_one(theirs, seed):
    """Packed rows against each conversation alone: the sum of its cross-entropy over the count of trained tokens."""
    rows, alone = packed(seed)
    model = small_model()
    loss, n = sft.train_step(model, rows, settings(micro_tokens=64), ONE)
    total = sum(int((weight > 0).sum()) for _, weight in alone)
    theirs.zero_grad()
    expected = sum(torch.nn.functional.cross_entropy(
        theirs(tokens[None]).logits[0, :-1], tokens[1:].where(weight[1:] > 0, IGNORE), reduction="sum", ignore_index=IGNORE)
        for tokens, weight in alone if weight.any()) / total
    expected.backward()
    assert n == total and loss == pytest.approx(expected.item(), abs=1e-5)
    named = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        other = named[name if name.startswith("lm_head") else f"model.{name}"]
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_loss_is_trls(theirs, tmp_path):
    """SFTTrainer.compute_loss on the padded conversations, normalized by the global number of trained tokens."""
    rows, alone = packed(7)
    width = max(len(tokens) for tokens, _ in alone)
    pad = lambda x, value: torch.nn.functional.pad(x, (0, width - len(x)), value=value)
    labels = torch.stack([pad(tokens.where(weight > 0, IGNORE), IGNORE) for tokens, weight in alone])
    inputs = {"input_ids": torch.stack([pad(tokens, 0) for tokens, _ in alone]), "labels": labels,
              "attention_mask": torch.stack([pad(torch.ones_like(tokens), 0) for tokens, _ in alone])}
    n = int((labels[:, 1:] != IGNORE).sum())

    args = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, dataset_kwargs={
        "skip_prepare_dataset": True}, packing=False, disable_tqdm=True)
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(theirs.name_or_path)
    trainer = trl.SFTTrainer(theirs, args, train_dataset=data, processing_class=tokenizer)
    loss = trainer.compute_loss(theirs, inputs, num_items_in_batch=torch.tensor(n))
    ours, _ = sft.train_step(small_model(), rows, settings(), ONE)
    assert ours == pytest.approx(loss.item(), abs=1e-5)


def test_one_denominator():
    """1 x 8 rows = 8 x 1 accumulated, with weights of 0, 1/2 and 1, rows of which nothing is trained among them."""
    rows, _ = packed(3, weights=(0.0, 0.5, 1.0))
    rows.weights[2:4], rows.targets[2:4] = 0, IGNORE
    model, found = small_model().double(), []
    for micro in (0, 32):
        loss, n = sft.train_step(model, rows, settings(micro_tokens=micro), ONE)
        found.append((loss, n, gradients(model)))
    (loss, n, one), (again, m, eight) = found
    assert loss == pytest.approx(again, rel=1e-12) and n == m == (rows.weights > 0).sum()
    for a, b in zip(one, eight):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_token_weights_against_plain_pytorch():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (40, 30))
    targets = torch.randint(30, (40,), generator=generator)
    targets[::7] = IGNORE
    weights = torch.rand(40, generator=generator)
    loss = linear_cross_entropy(hidden, weight, targets, token_weights=weights)
    ours = torch.autograd.grad(loss, (hidden, weight))
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none", ignore_index=IGNORE) @ weights.double()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(ours, torch.autograd.grad(plain, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# ---- the script

CONFIG = """
from mini import *
_stage = dict(context=64, lr=[1, 0.1])
sft = dict(lr=5e-3, batch_tokens=512, save_every=3, prompts=["Mia has 3 pens."], pools=dict(
    math=[dict(path="math.jsonl")], other=[dict(path="other.jsonl")]), stages=[
    _stage | dict(name="cold start", conversations=60, mixture=dict(math=1)),
    _stage | dict(name="overall", epochs=dict(other=1))])
"""
GOOD = [{"messages": [{"role": "user", "content": f"Mia has {n} pens. She buys 2 more. How many?"},
                      {"role": "assistant", "content": f"<think>\n{n} + 2 = {n + 2}.\n</think>\n\nAnswer: {n + 2}"}]}
        for n in range(3, 63)]
BAD = ['{"messages": [', '{"messages": [{"role": "tutor", "content": "hi"}]}',
       json.dumps({"messages": GOOD[0]["messages"][:1]}),
       json.dumps({"messages": [GOOD[0]["messages"][0], {"role": "assistant", "content": ""}]}),
       json.dumps({"messages": [GOOD[0]["messages"][0], {"role": "assistant", "content": None, "tool_calls": [
           {"function": {"name": "f", "arguments": "{x"}}]}]}),
       json.dumps({"messages": [{"role": "user", "content": "a" * 1_000_001}, GOOD[0]["messages"][1]]})]


@pytest.fixture(scope="module")
def start(base):
    """A config and two pools; the run that others are compared with."""
    mini = base
    (mini.folder / "mini_sft.py").write_text(CONFIG)
    (mini.folder / "math.jsonl").write_text("".join(json.dumps(record) + "\n" for record in GOOD))
    (mini.folder / "other.jsonl").write_text("".join(json.dumps(record) + "\n" for record in GOOD[::2]))
    return tune(mini, "--run=whole")


def tune(mini, *options, ranks=0, code=0) -> str:
    options = [option.replace("--run=", "--name=") for option in options]
    return mini.run(str(ROOT / "sft.py"), "mini_sft.py", "--init_from=out/base/pretrain", *options, ranks=ranks, code=code)


def losses(mini, run) -> list[float]:
    return [line["loss"] for line in common.read_metrics(mini.folder / "out" / run / "sft") if "loss" in line]


def test_output_and_files(mini, start):
    for expected in ("cold start", "filled", "before, in document form", "before, in chat form", "asked in", "gain",
                     "end of stage overall", "> Mia has 3 pens.", "pool math: 60 rows of 60 conversations"):
        assert expected in start
    folder = mini.folder / "out/whole/sft"
    assert json.loads((folder / "before.json").read_text())["math"]["form"] in ("document", "chat")
    assert (folder / "loss.png").stat().st_size > 5000 and losses(mini, "whole")[-1] < losses(mini, "whole")[0] - 0.5
    meta = common.read_meta(common.checkpoints(folder)[0])
    assert meta["phase"] == "sft" and meta["model"]["rope_theta"] == 100.0  # the start's, which a stage had raised
    assert "complete; nothing to do" in tune(mini, "--run=whole")


def test_resume_repeats_the_unbroken_run_and_two_ranks_one(mini, start):
    tune(mini, "--run=early", "--sft.keep=99", "--sft.compare=false", "--evaluate.tasks=[]")
    for path in common.checkpoints(mini.folder / "out/early/sft"):
        if int(path.name[5:]) > 3:
            shutil.rmtree(path)
    assert "going on from" in tune(mini, "--run=early", "--sft.compare=false", "--evaluate.tasks=[]")
    assert losses(mini, "early") == losses(mini, "whole")
    tune(mini, "--run=ranks", "--sft.compare=false", "--evaluate.tasks=[]", ranks=2)
    assert losses(mini, "ranks") == pytest.approx(losses(mini, "whole"), abs=1e-4)
    assert "other stages" in tune(mini, "--run=early", "--sft.seed=5", "--scale=0.5", code=2)


def test_bad_records_are_named_and_the_rest_goes_on(mini, start):
    (mini.folder / "bad.jsonl").write_text("\n".join([json.dumps(GOOD[0]), *BAD, json.dumps(GOOD[1])]))
    pools = "--sft.pools={'math': [{'path': 'bad.jsonl'}], 'other': [{'path': 'other.jsonl'}]}"
    output = tune(mini, "--run=bad", pools, "--prepare")
    assert "pool math: 2 rows of 2 conversations" in output and "bad lines: 6 (the first: bad.jsonl:2:" in output
    assert not (mini.folder / "out/bad/sft/metrics.jsonl").exists()
    stopped = tune(mini, "--run=stop", pools, "--sft.on_bad_line=stop", code=2)
    assert "error: pool 'math': bad.jsonl:2: not JSON" in stopped


@pytest.mark.parametrize("option, said", [
    ("--sft.stages=[{'name':'a','lr':[1,1],'context':64,'epochs':{'maths':1}}]", "pool 'maths'"),
    ("--sft.stages=[{'name':'a','lr':[1,1],'context':64}]", "stage 'a'"),
    ("--sft.over_long=split", "over_long"), ("--sft.lrr=1", "did you mean 'lr'"), ("--init_from=nowhere", "nowhere")])
def test_wrong_settings(mini, start, option, said, monkeypatch):
    monkeypatch.chdir(mini.folder)
    monkeypatch.syspath_prepend(str(mini.folder))
    monkeypatch.setattr(sys, "argv", ["sft.py", "mini_sft.py", "--run=wrong", "--init_from=out/base/pretrain", option])
    with pytest.raises(common.UserError, match=said):
        sft.main()
