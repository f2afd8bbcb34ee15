"""Sampling: equal to one pass without a cache, to transformers' top-k and top-p, and to the
trainer's log-probabilities.
"""

import argparse
import json
import re

import numpy as np
import pytest
import torch

import common
import generate
from generate import sample, sample_tokens
from kernels.cross_entropy import linear_logprobs
from model import KVCache, ModelConfig, Transformer, init_weights

V = 50


@pytest.fixture(scope="module")
def model():
    m = Transformer(
        ModelConfig(2, 32, 48, 4, 2, 8, vocab_size=V, init_std=0.2)
    )  # larger ones magnify fp32's rounding
    init_weights(m, 0)
    return m


def prompts(n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(V, (int(torch.randint(1, 20, (1,), generator=g)),), generator=g).tolist()
        for _ in range(n)
    ]


def logits_of(model, tokens):
    """(T, V) of one sequence, in one pass, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0] @ model.lm_head.weight.T


def test_greedy_equals_argmax_without_cache(model):
    for prompt, (answer,) in zip(
        prompts(), sample(model, prompts(), max_new_tokens=12, temperature=0)
    ):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(logits_of(model, tokens)[-1].argmax()))
        assert answer.tokens == tokens[len(prompt) :] and answer.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_trainer(model, temperature):
    """Sampler (padding, cache, rows that leave) and trainer (packed row, chunked loss) agree
    to 1e-5 in fp32.
    """
    answers = sample(
        model, prompts(), n=3, max_new_tokens=16, temperature=temperature, stop=(1, 2, 3), seed=5
    )
    row, starts, spans = [], [], []
    for prompt, group in zip(prompts(), answers):
        for answer in group:
            spans.append((len(row) + len(prompt) - 1, answer))
            starts += [len(row)] * (len(prompt) + len(answer.tokens))
            row += prompt + answer.tokens
    tokens, doc_start = torch.tensor([row]), torch.tensor([starts], dtype=torch.int32)
    with torch.no_grad():
        hidden = model(tokens, doc_start)[0]
    logprobs = linear_logprobs(hidden[:-1], model.lm_head.weight, tokens[0, 1:], temperature)
    for first, answer in spans:
        expected = logprobs[first : first + len(answer.tokens)]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-5, rtol=0)
    assert len({answer.finish_reason for _, answer in spans}) == 2


def test_stop_ends_a_row_and_is_kept(model):
    for group in sample(model, prompts(), n=4, max_new_tokens=30, stop=(7, 8), seed=1):
        for answer in group:
            assert not {7, 8} & set(answer.tokens[:-1]) and len(answer.tokens) == len(
                answer.logprobs
            )
            assert (answer.tokens[-1] in (7, 8)) == (answer.finish_reason == "stop")
            assert answer.finish_reason == "stop" or len(answer.tokens) == 30


def test_a_row_depends_on_its_seed_alone(model):
    """Not on how many rows are decoded together, nor on the other prompts' stops."""
    alike = lambda **k: [
        [a.tokens for a in group]
        for group in sample(model, prompts(), n=3, max_new_tokens=20, stop=(4,), **k)
    ]
    assert alike(seed=2) == alike(seed=2, max_rows=3) == alike(seed=2, max_rows=7)
    assert alike(seed=2) != alike(seed=3)
    flat = [tokens for group in alike(seed=2) for tokens in group]
    assert len({tuple(t) for t in flat}) > len(flat) // 2


def test_rows_alone_and_among_others(model, monkeypatch):
    """Each of 12 prompts alone; and all in a batch whose rows leave, move and are replaced, in
    parts of 4 rows, in passes of one prompt or more, in a cache that grows."""
    many = prompts(12, seed=1)
    options = dict(n=3, max_new_tokens=24, stop=(1, 2, 3), seed=5)
    alone = []
    for number, prompt in enumerate(many):
        alone += sample(model, [prompt], numbers=[number], **options)
    monkeypatch.setattr(KVCache, "PART", 4)
    monkeypatch.setattr(KVCache, "BLOCK", 8)
    for max_rows, pass_tokens in ((64, 1), (20, 30), (5, 2048)):
        monkeypatch.setattr(generate, "PASS_TOKENS", pass_tokens)
        together = sample(model, many, max_rows=max_rows, **options)
        for one, other in zip(sum(alone, []), sum(together, [])):
            assert one.tokens == other.tokens
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_answers_come_as_they_end(model):
    """A short one before the long ones that began with it; each once."""
    came = list(generate.sample_as_completed(
        model, enumerate(prompts(12)), 2, 40, stop=(1, 2, 3), seed=5, max_rows=8))
    assert sorted(number for number, _ in came) == list(range(12))
    order = [number for number, _ in came]
    by_length = sorted(range(12), key=lambda i: -len(prompts(12)[i]))
    assert order != by_length and {order[0], order[-1]} != {by_length[0], by_length[-1]}
    assert dict(came)[3] == sample(model, prompts(12), 2, 40, stop=(1, 2, 3), seed=5)[3]


@pytest.mark.parametrize("settings, message", [
    ({"temperature": -1}, "temperature must be at least 0, not -1"),
    ({"top_p": 0}, "top_p must be above 0 and at most 1 (off), not 0"),
    ({"top_k": -1}, "top_k must be at least 0 (off), not -1"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
], ids=str)
def test_what_cannot_be_sampled_is_one_line(model, settings, message):
    with pytest.raises(common.UserError, match=re.escape(message)):
        sample(model, [[1]], **settings)


def test_an_empty_prompt_and_a_long_one(model):
    with pytest.raises(common.UserError, match="an empty prompt cannot be continued"):
        sample(model, [[1], []])
    with pytest.warns(UserWarning, match="longer than the model's context, max_context = 4096"):
        sample(model, [[1] * 4096], max_new_tokens=2)
    assert sample(model, []) == []


def test_a_part_of_the_prompts_keeps_its_numbers(model):
    whole = sample(model, prompts(), 2, max_new_tokens=8, seed=3)
    part = sample(
        model, [prompts()[i] for i in (4, 1)], 2, max_new_tokens=8, seed=3, numbers=[4, 1]
    )
    assert [[a.tokens for a in answers] for answers in part] == [
        [a.tokens for a in whole[i]] for i in (4, 1)
    ]


@pytest.mark.parametrize(
    "top_k, top_p", [(0, 0.8), (0, 0.3), (5, 1.0), (8, 0.7), (1, 1.0), (0, 1e-6)]
)
def test_top_k_and_top_p_are_those_of_transformers(top_k, top_p):
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = (TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected).log_softmax(-1)
    seen = torch.zeros(6, V, dtype=torch.bool)
    for draw in torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64):
        token, logprob = sample_tokens(logits, 0.7, top_p, top_k, draw.expand(6))
        torch.testing.assert_close(
            logprob, expected.gather(1, token[:, None])[:, 0], atol=1e-5, rtol=0
        )
        seen[torch.arange(6), token] = True
    likely = expected.exp() > 1e-3
    assert (seen & ~expected.isfinite()).sum() == 0 and (likely & ~seen).sum() == 0


def test_frequencies_follow_the_distribution():
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(1)).expand(20_000, 8)
    draws = torch.from_numpy(np.stack([generate.uniforms(0, i, 0, 1) for i in range(20_000)]))[:, 0]
    token, _ = sample_tokens(logits, 1.0, 1.0, 0, draws)
    probs = logits[0].softmax(-1)
    counts = torch.bincount(token, minlength=8)
    chi2 = ((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum()
    assert chi2 < 24.3  # 0.1 % point of 7 degrees of freedom


SHARDED = """
import torch, common, generate
from pathlib import Path
from model import ModelConfig, Transformer, init_weights, meta_model
cfg = ModelConfig(2, 32, 48, 4, 2, 8, vocab_size=50, init_std=0.3)
d = common.init_distributed("float32")
model = common.shard_model(meta_model(cfg), d, "float32", False)
init_weights(model, 0, common.assign)
plain = Transformer(cfg)
init_weights(plain, 0)
replica = common.unsharded_copy(model, Transformer(cfg))
length = 3 if d.rank == 0 else 40  # a collective inside decoding would hang here
ours = generate.sample(replica, [[1, 2, 3]], n=2, max_new_tokens=length, seed=d.rank)
theirs = generate.sample(plain, [[1, 2, 3]], n=2, max_new_tokens=length, seed=d.rank)
assert ours == theirs and len(ours[0][0].tokens) == length
optimizer = common.adamw(model, 1e-3, (0.9, 0.95), 0.1)
folder, tokenizer = Path("alone"), Path("data/tokenizer.json")
checkpoint = common.save_checkpoint(d, folder, 1, model, optimizer, {}, tokenizer)
if d.rank == 1:  # a collective would wait for the other one
    alone = Transformer(cfg)
    common.load_checkpoint(common.Dist(0, 1, d.device, None), checkpoint, alone)
    assert all(map(torch.equal, alone.parameters(), plain.parameters()))
d.wait()
print(f"rank {d.rank} done\\n", end="")  # one write: the ranks share a pipe
common.cli(lambda: None)  # out as every script goes: gloo's threads may abort Python's own way
"""


def test_sharded_weights_and_rows_of_very_different_lengths(mini):
    (mini.folder / "sharded.py").write_text(SHARDED)
    output = mini.run("sharded.py", ranks=2)
    assert "rank 0 done" in output and "rank 1 done" in output


def test_a_folders_sampling_is_shown_and_used(tmp_path, capsys):
    """What no option says; what is not done is named."""
    config = {"temperature": 0.3, "top_k": 7, "do_sample": True, "repetition_penalty": 1.2}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    args = argparse.Namespace(temperature=None, top_p=None, top_k=5)
    generate.fill_in_sampling(args, tmp_path)
    assert vars(args) == {"temperature": 0.3, "top_p": 0.95, "top_k": 5}
    shown = capsys.readouterr().err
    assert "temperature 0.3, top_p 0.95, top_k 5" in shown and str(tmp_path) in shown
    assert "not done, though the same file says it: repetition_penalty = 1.2" in shown
    (tmp_path / "generation_config.json").unlink()
    args = argparse.Namespace(temperature=None, top_p=None, top_k=None)
    generate.fill_in_sampling(args, tmp_path)
    assert vars(args) == generate.DEFAULTS and not capsys.readouterr().err


def test_command_line(mini):
    mini.pretrain("--run=gen")
    command = [generate.__file__, "out/gen/pretrain", "--max_new_tokens=20", "Problem: Mia"]
    output = mini.run(*command)
    assert "20 tokens" in output or "tokens/s" in output
    assert mini.run(*command).splitlines()[0] == output.splitlines()[0]
    assert "error: " in mini.run(generate.__file__, "nowhere", "x", code=2)
