"""rl.py by its real command, its losses beside TRL's and plain PyTorch on full logits, its rewards
beside cheats.

A model that was pre-trained for seconds answers nothing right and ends no response:
checks/mini_rl.py has rewards that any text may earn, and many tokens that end one. All else is the
real thing.
"""
from settings import from_dict

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import generate
import hf
import rl
import rollouts
import sampler
from checks.mini_rl import CONFIG, toy
from common import UserError
from conftest import ROOT
from data.tasks import registry
from data.tasks.problem import Problem
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from data.verify.agentic import Verdict
from generate import sample_as_completed
from model import ModelConfig, Transformer, init_weights
from rl import (
    RlConfig,
    RolloutBatch,
    StageConfig,
    assign_advantages,
    policy_loss,
    score_rollouts,
    select_trained,
    train_step,
)
from rollouts import Judges, Rollout, sample_rollouts
from sampler import Embedded, in_order

ONE = common.Dist(0, 1, torch.device("cpu"), None)
V = 90
MATH, TASTE, PHRASES = (
    registry.family(name).problems("train", 17, 0) for name in ("math", "taste", "phrases")
)


def settings(**changes) -> RlConfig:
    return RlConfig(**dict(stages=[], context=40, max_new_tokens=9) | changes)


def rollout(reward=None, n=3, problem=MATH[0], text="", **more) -> Rollout:
    return Rollout(
        problem,
        [1, 2],
        [3] * n,
        [-1.0] * n,
        **dict(finish_reason="stop", text=text, reward=reward) | more,
    )


# ---- the loss of tokens

@pytest.fixture(scope="module")
def tokens():
    """Responses of uneven lengths, the second and the fourth cut off, far from the policy that
    sampled them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 3, 1, 5, 6, 2])
    now = -2 * torch.rand(6, 7, generator=generator).double()
    old = now + 0.5 * torch.randn(6, 7, generator=generator).double()
    old[2] = now[2] - 0.4  # better than the mean, and much likelier by now: the whole response is
                           # clipped
    return SimpleNamespace(
        n=6,
        mask=torch.arange(7) < lengths[:, None],
        weight=torch.tensor([1, 0, 1, 0, 1, 1]).double(),
        now=now.clone().requires_grad_(),
        old=old,
        advantage=torch.tensor([1.5, -2, 0.5, 1, -1, -0.25]).double(),
        n_rows=4.0,
        n_tokens=16.0,
    )


def ours(t, p: RlConfig, reference=None, sampler=None) -> tuple:
    rows = {"sequence": torch.arange(t.n)[:, None].expand_as(t.mask)[t.mask]}
    return policy_loss(
        t.now[t.mask],
        t.old[t.mask],
        rows,
        t.advantage,
        t.weight,
        reference,
        t.n_tokens,
        t.n_rows,
        p,
        None if sampler is None else sampler[t.mask],
    )


def assert_same(t, our_loss, their_loss) -> None:
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-12) and abs(our_loss) > 0.01
    a, b = (
        torch.autograd.grad(loss, t.now, retain_graph=True)[0] for loss in (our_loss, their_loss)
    )
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert (a != 0).sum() > 5


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
def test_loss_is_what_trl_computes(tokens, loss):
    """Values and gradients in float64, clipped and not. TRL counts what was cut off, without its
    tokens, as a response of the mean with "grpo" and "dr_grpo": there its loss is smaller, by 4 of
    6 here."""
    from trl.trainer.grpo_trainer import (
        GRPOTrainer,  # here: the script of two ranks below does without it
    )
    t, p = tokens, settings(loss=loss)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (t.now, torch.zeros_like(t.now), None),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        loss_type=loss,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        beta=0.0,
        use_vllm=False,
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.28,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=9,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
    )
    mask = t.mask * t.weight[:, None].long()  # as _generate_and_score_completions masks them
    ids = torch.zeros(6, 7, dtype=torch.int64)
    theirs = GRPOTrainer._compute_loss(
        trainer,
        trainer.model,
        dict(
            prompt_ids=ids,
            prompt_mask=ids,
            completion_ids=ids,
            completion_mask=mask,
            advantages=t.advantage,
            old_per_token_logps=t.old,
            num_items_in_batch=mask.sum(),
        ),
    )
    loss, clipped = ours(t, p)
    assert_same(t, loss, theirs if p.loss == "dapo" else theirs * 6 / 4)
    assert (
        clipped.item() == pytest.approx(*trainer._metrics["train"]["clip_ratio/region_mean"])
        and clipped > 0.2
    )


def test_gspo_is_its_formula(tokens):
    """Equation 5 of the paper, a response after the other; one of the four is clipped."""
    t, terms, n_clipped = tokens, [], 0
    for i in range(6):
        if t.weight[i]:
            ratio = (t.now[i] - t.old[i])[t.mask[i]].mean().exp()
            clipped = min(max(ratio, 0.8), 1.28)
            terms.append(-min(ratio * t.advantage[i], clipped * t.advantage[i]))
            n_clipped += bool(clipped * t.advantage[i] < ratio * t.advantage[i])
    loss, share = ours(t, settings(loss="gspo"))
    assert_same(t, loss, sum(terms) / 4)
    assert share == n_clipped / 4 > 0


def test_gradient_of_the_divergence_is_that_of_the_reverse_kl():
    """In expectation, over all five tokens of a distribution; k3, a good estimate of the same
    value, has the forward KL's gradient."""
    generator = torch.Generator().manual_seed(1)
    logits, reference = (
        torch.randn(5, generator=generator).double().log_softmax(0) for _ in range(2)
    )
    now = logits.requires_grad_().log_softmax(0)
    chance, zeros = now.detach().exp(), torch.zeros(5).double()  # weights of the responses make it
                                                                 # an expectation
    k2, _ = policy_loss(
        now,
        now.detach(),
        {"sequence": torch.arange(5)},
        zeros,
        chance,
        reference,
        1.0,
        1.0,
        settings(kl=1.0),
    )
    k3 = (chance * ((reference - now).exp() - (reference - now) - 1)).sum()
    reverse, forward = (
        (now.exp() * (now - reference)).sum(),
        (reference.exp() * (reference - now)).sum(),
    )
    k2, k3, reverse, forward = (torch.autograd.grad(x, logits, retain_graph=True)[0]
                                for x in (k2, k3, reverse, forward))
    torch.testing.assert_close(k2, reverse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(k3, forward, rtol=1e-12, atol=1e-12)
    assert (k3 - reverse).abs().max() > 0.05


@pytest.mark.parametrize("loss", ["dapo", "grpo", "gspo"])
@pytest.mark.parametrize("tis", [0.0, 0.8, math.inf])
def test_tis_is_the_expectation_over_the_sampler(loss, tis):
    """Five tokens, drawn from q and trained in p: the sum over all of them of q min(p / q, tis) A
    grad log p; with a cap that none reaches that is p's own policy gradient."""
    generator = torch.Generator().manual_seed(3)
    logits, sampler = (torch.randn(5, generator=generator).double() for _ in range(2))
    now, sampler = logits.requires_grad_().log_softmax(0), sampler.log_softmax(0)
    advantage = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]).double()
    rows = {"sequence": torch.arange(5)}  # of one token each, as often as q draws it
    found, _ = policy_loss(now, now.detach(), rows, advantage, sampler.exp(), None, 1.0, 1.0,
                           settings(loss=loss, tis=tis), sampler)
    chance, weight = now.detach().exp(), sampler.exp()
    if tis:
        weight = torch.minimum(chance, tis * sampler.exp())
    expected = -(weight * advantage * now).sum()
    ours, right = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, expected))
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-14)
    on_policy = torch.autograd.grad(-(chance * advantage * now).sum(), logits)[0]
    assert torch.allclose(ours, on_policy) == (tis == math.inf)


def test_tis_of_the_same_log_probabilities_changes_no_bit(tokens):
    for loss in ("dapo", "grpo", "dr_grpo", "gspo"):
        plain, _ = ours(tokens, settings(loss=loss))
        corrected, _ = ours(tokens, settings(loss=loss, tis=math.inf), sampler=tokens.old)
        assert torch.equal(plain, corrected)
        assert torch.equal(*(torch.autograd.grad(x, tokens.now, retain_graph=True)[0]
                             for x in (plain, corrected)))


# ---- advantages

def test_advantages_by_hand():
    """Deviation from the mean of the group, by the population's standard deviation; an unscored
    response is in neither, one that was cut off in both, and neither is trained."""
    group = [
        rollout(1.0),
        rollout(0.0),
        rollout(None),
        rollout(0.0, finish_reason="length"),
        rollout(0.0),
    ]
    assert assign_advantages([group], True) == 1
    std = math.sqrt((0.75 ** 2 + 3 * 0.25 ** 2) / 4)
    assert [r.advantage for r in group] == pytest.approx(
        [0.75 / std, -0.25 / std, 0, -0.25 / std, -0.25 / std]
    )
    assert [r.loss_mask for r in group] == [1, 1, 0, 0, 1]
    assert assign_advantages([group], False) == 1
    assert [r.advantage for r in group] == [0.75, -0.25, 0, -0.25, -0.25]


@pytest.mark.parametrize("group", [
    [rollout(1.0)], [rollout(None)] * 2, [rollout(None), rollout(1.0)],
    [rollout(1.0) for _ in range(3)],
    [rollout(0.1) for _ in range(3)],  # their mean is not quite 0.1
    [rollout(reward) for reward in (0.3, 0.1 + 0.2, 0.3, 0.3)],
    [rollout(reward, finish_reason="length") for reward in (0.0, 1.0)],
], ids=["one", "unscored", "one scored", "equal", "a mean that is rounded", "a sum that is rounded",
        "all cut off"])
def test_groups_without_a_signal(group):
    """No step is taken for their sake: the optimizer would move on by its momentum."""
    assert assign_advantages([group], True) == 0 and all(
        not r.loss_mask * r.advantage for r in group
    )


# ---- one step

def new_model(width=32, vocab_size=V, seed=0) -> Transformer:
    model = Transformer(ModelConfig(2, width, 48, 2, 1, 16, vocab_size=vocab_size, init_std=0.2))
    init_weights(model, seed)
    return model


@pytest.fixture(scope="module")
def step():
    """A model, uneven rollouts of two prompts, of which some begin alike, one was cut off and one
    not scored, and log-probabilities of two other models."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    mine = []
    for i in range(6):
        fresh, response = (rng.integers(0, V, n).tolist() for n in rng.integers(1, 14, 2))
        prompt = mine[-1].prompt if i % 3 else fresh
        response = mine[-1].tokens[:5] + response if i % 3 == 2 else response
        mine.append(
            Rollout(
                MATH[i],
                prompt,
                response,
                [-1.0] * len(response),
                "stop",
                "",
                advantage=[2, -1.5][i % 2],
                loss_mask=float(i not in (1, 4)),
            )
        )
    model = new_model().double()
    own = own_logprobs(model, mine, 0.7)
    old, reference = (
        [x.detach() + 0.4 * torch.randn(len(x), generator=generator).double() for x in own]
        for _ in range(2)
    )
    old[0] = own[0].detach() - 0.4  # clipped as a whole
    return SimpleNamespace(
        model=model, mine=mine, own=[x.detach() for x in own], old=old, reference=reference
    )


def own_logprobs(model, mine: list[Rollout], temperature: float) -> list[torch.Tensor]:
    """By full logits, a sequence at a time."""
    logits = [
        (
            model(torch.tensor([r.prompt + r.tokens]))[0, len(r.prompt) - 1 : -1]
            @ model.lm_head.weight.T
        )
        for r in mine
    ]
    return [(x / temperature).log_softmax(-1).gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
            for x, r in zip(logits, mine)]


def passes(responses: list[Rollout], p: RlConfig, dist) -> list[list[Rollout]]:
    """The responses of each forward pass."""
    trained = select_trained(responses, p, dist)
    size = p.micro_rows or len(trained)
    return [trained[first:first + size] for first in range(0, len(trained), size)]


def our_step(step, p, old=None, reference=None, order=range(6)) -> tuple[dict, list[torch.Tensor]]:
    """What train_step returns, and the gradients; old and reference: of each response."""
    mine, number = [step.mine[i] for i in order], {id(r): i for i, r in enumerate(step.mine)}
    by_pass = lambda values: values and [torch.cat([values[number[id(r)]] for r in part])
                                         for part in passes(mine, p, ONE)]
    step.model.zero_grad()
    batch = RolloutBatch(mine, by_pass(old), by_pass(reference))
    loss, metrics = train_step(step.model, batch, p, ONE)
    return {"loss": loss} | metrics, [
        parameter.grad.clone() for parameter in step.model.parameters()
    ]


def plain_loss(step, p) -> torch.Tensor:
    loss = 0
    trained = [i for i in range(6) if step.mine[i].loss_mask]
    n_tokens = sum(len(step.mine[i].tokens) for i in trained)
    own = own_logprobs(step.model, step.mine, p.temperature)
    for i in trained:
        A, log_ratio = step.mine[i].advantage, own[i] - step.old[i]
        ratio = (log_ratio.mean() if p.loss == "gspo" else log_ratio).exp()
        term = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
        loss += {
            "dapo": term.sum() / n_tokens,
            "grpo": term.mean() / 4,
            "dr_grpo": term.sum() / (4 * 9),
            "gspo": term / 4,
        }[p.loss]
        loss += p.kl * ((own[i] - step.reference[i]) ** 2 / 2).sum() / n_tokens
    return loss


def assert_same_gradients(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


LOSSES = ("dapo", "grpo", "dr_grpo", "gspo")


@pytest.mark.parametrize("loss", LOSSES)
def test_step_is_autograd_on_full_logits(step, loss):
    """Loss and gradients, with a temperature, several updates behind, near a reference; in passes
    of one response, of three, and of all, and in another order."""
    p = settings(loss=loss, temperature=0.7, kl=0.3)
    expected = plain_loss(step, p)
    gradients = torch.autograd.grad(expected, list(step.model.parameters()))
    for micro_rows, order in ((0, range(6)), (1, range(6)), (3, range(6)), (3, [5, 0, 3, 1, 4, 2])):
        seen, found = our_step(
            step,
            settings(loss=loss, temperature=0.7, kl=0.3, micro_rows=micro_rows),
            step.old,
            step.reference,
            order,
        )
        assert seen["loss"] == pytest.approx(expected.item(), rel=1e-9) and 0 < seen["clipped"] <= 1
        assert_same_gradients(found, gradients)


def test_the_first_update_needs_no_old_logprobs(step):
    """They are its own: the ratio is 1, nothing is clipped, and only advantages make the loss."""
    p = settings(temperature=0.7, micro_rows=4)
    seen, without = our_step(step, p)
    assert_same_gradients(without, our_step(step, p, step.own)[1])
    trained = [r for r in step.mine if r.loss_mask]
    assert seen["clipped"] == 0 and seen["loss"] == pytest.approx(
        -sum(r.advantage * len(r.tokens) for r in trained) / sum(len(r.tokens) for r in trained))


def test_entropy_is_of_the_tokens_that_are_trained(step):
    """At the temperature of the rollouts; and how far the sampler was off is the largest
    difference."""
    seen, entropies = our_step(step, settings(temperature=0.7))[0], []
    for r in step.mine:
        logits = (
            step.model(torch.tensor([r.prompt + r.tokens]))[0, len(r.prompt) - 1 : -1]
            @ step.model.lm_head.weight.T
        )
        entropies += (
            [torch.distributions.Categorical(logits=logits / 0.7).entropy()] if r.loss_mask else []
        )
    assert seen["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-6)
    apart = [(x + 1).abs().max().item() for x, r in zip(step.own, step.mine) if r.loss_mask]
    assert seen["logprob_mismatch"] == pytest.approx(max(apart), rel=1e-6)
    apart = torch.cat([x + 1 for x, r in zip(step.own, step.mine) if r.loss_mask])  # -1: sampler's
    assert seen["sampler_off"] == pytest.approx(apart.abs().mean().item(), rel=1e-6)
    assert seen["sampler_kl"] == pytest.approx((apart.exp() - 1 - apart).mean().item(), rel=1e-6)


def test_no_pass_is_spent_on_responses_without_an_advantage(step):
    """They change no gradient, but count in the loss's denominators; a KL term does have a gradient
    there."""
    mine = [
        dataclasses.replace(r, advantage=0.0) if i in (0, 3) else r for i, r in enumerate(step.mine)
    ]
    some = SimpleNamespace(model=step.model, mine=mine)
    for loss in LOSSES:
        p = settings(loss=loss, temperature=0.7)
        assert_same_gradients(
            our_step(some, p, step.old)[1],
            torch.autograd.grad(
                plain_loss(SimpleNamespace(**vars(step) | vars(some)), p),
                list(step.model.parameters()),
            ),
        )
        assert [len(part) for part in passes(mine, p, ONE)] == [2]
        assert [len(part) for part in passes(mine, settings(loss=loss, kl=0.1), ONE)] == [4]


def test_ranks_make_equally_many_passes(step):
    """Where another rank has more to train, responses without an advantage fill up, or FSDP would
    wait for ever."""
    mine = [
        dataclasses.replace(r, advantage=0.0) if i in (0, 3) else r for i, r in enumerate(step.mine)
    ]
    other = SimpleNamespace(rank=0, device="cpu", gather=lambda own: own | {1: 5})
    assert [len(part) for part in passes(mine, settings(micro_rows=2), other)] == [2, 2, 1]


def test_a_batch_of_cut_off_responses_is_finite(step):
    cut = [
        Rollout(
            r.problem, r.prompt, r.tokens, r.logprobs, "length", "", advantage=1.0, loss_mask=0.0
        )
        for r in step.mine
    ]
    seen, gradients = our_step(
        SimpleNamespace(model=step.model, mine=cut), settings(kl=0.3), step.old, step.reference
    )
    assert seen["loss"] == seen["clipped"] == seen["entropy"] == 0 and not any(
        g.any() for g in gradients
    )


# ---- rollouts

@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([problem.question for problem in MATH], TokenizerConfig(vocab_size=340))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_sampler_and_the_trainer_have_the_same_policy(tokenizer, temperature):
    """Log-probabilities of each token to 1e-5 in fp32, with prompts of uneven lengths and in passes
    of five."""
    model, p = new_model(vocab_size=tokenizer.n_vocab), settings(
        temperature=temperature, context=192, micro_rows=5, max_new_tokens=12)
    groups = in_order(
        sample_rollouts(Embedded(model), tokenizer, MATH[:3] + TASTE[:1], 3, p, seed=1))
    mine = [r for group in groups for r in group]
    assert len({len(r.prompt) for r in mine}) == 4 and len({r.text for r in mine}) == 12
    for r in mine:
        r.advantage = 1.0
    found = torch.cat(score_rollouts(model, mine, p, ONE))
    np.testing.assert_allclose(found, [x for r in mine for x in r.logprobs], atol=1e-5)
    assert train_step(model, RolloutBatch(mine), p, ONE)[1]["logprob_mismatch"] < 1e-5


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_a_bandit_is_solved(tokenizer, monkeypatch, loss):
    """One prompt, responses of one token, a reward for one token of 2 %: soon nothing else is
    said."""
    model, p = (
        new_model(vocab_size=tokenizer.n_vocab),
        settings(context=192, max_new_tokens=1, group_size=32, temperature=1.0, loss=loss),
    )
    anything = lambda *given, stop, **more: sample_as_completed(
        *given, stop=tuple(range(tokenizer.n_vocab)), **more
    )
    monkeypatch.setattr(generate, "sample_as_completed", anything)
    prompt = rollouts.task_prompt(MATH[0], tokenizer, "chat")
    chances = lambda: (model(torch.tensor([prompt]))[0, -1] @ model.lm_head.weight.T).softmax(-1)
    best = (chances() - 0.02).abs().argmin()
    assert 0.01 < chances()[best] < 0.03
    optimizer = common.adamw(model, 1e-2, (0.9, 0.95), 0.0)
    for seed in range(60):
        groups = in_order(
            sample_rollouts(Embedded(model), tokenizer, MATH[:1], p.group_size, p, seed))
        for r in groups[0]:
            r.reward = float(r.tokens == [best])
        if assign_advantages(groups, True):
            train_step(model, RolloutBatch(groups[0]), p, ONE)
            optimizer.step()
            optimizer.zero_grad()
    assert chances()[best] > 0.95


# ---- scores and the filter

def test_verified_rewards_are_the_tasks_own():
    groups = [
        [
            rollout(problem=problem, text=text)
            for text in (f"Answer: {problem.answer}", "Answer: -1")
        ]
        for problem in MATH[:3]
    ]
    assert rollouts.assign_rewards(groups, StageConfig("s", {}, 1), Judges(), settings(), 0) == []
    assert [[r.reward for r in group] for group in groups] == [[1, 0]] * 3


def test_the_verifier_scores_what_rules_leave_open():
    """It is asked once about all; what it cannot decide is unscored and out of the baseline."""
    problem = PHRASES[0]
    value = problem.extra["value"]
    texts = [f"Answer: {value}", "Answer: -1", "Answer: 1000", ""]
    open_group = [rollout(problem=problem, text=text) for text in texts]
    closed = [rollout(problem=MATH[0], text="Answer: -1") for _ in range(4)]
    verdicts = {value: True, "-1": False, "1000": None}
    asked = []

    def verifier(cases):
        asked.append(cases)
        return [Verdict(verdicts[answer], []) for *_, answer in cases]

    stage, judges = StageConfig("s", {}, 1), Judges(verifier=verifier)
    assert rollouts.assign_rewards([closed, open_group], stage, judges, settings(), 0) == []
    assert asked == [[(problem.question, problem.answer, answer) for answer in verdicts]]
    assert [r.reward for r in open_group] == [1, 0, None, 0]
    assert [r.verdict is not None for r in open_group] == [True, True, True, False]
    assert not any(r.verdict for r in closed)
    assert assign_advantages([open_group], False) == 1
    assert [r.advantage for r in open_group] == pytest.approx([2 / 3, -1 / 3, 0, -1 / 3])
    assert [r.loss_mask for r in open_group] == [1, 1, 0, 1]
    summary = rollouts.summarize_rollouts([closed, open_group], {}, ONE)
    assert summary["by_verifier"] == 3 / 8 and summary["unscored"] == 1 / 8
    means = rollouts.mean_rewards([open_group], stage, judges, settings(), {})
    assert means == {problem.key: pytest.approx(1 / 3)}
    rollouts.assign_rewards([open_group], stage, Judges(), settings(), 0)
    assert [r.reward for r in open_group] == [0, 0, 0, 0]  # with rules alone


@pytest.mark.parametrize("cut_earns, earned", [(True, 1.0), (False, 0.0)])
def test_what_a_response_that_was_cut_off_earns(cut_earns, earned):
    """Its text is right. Where it earns nothing, the filter measures the same, and one that ends is
    better than the mean."""
    text = f"Answer: {MATH[0].answer}"
    group = [rollout(text=text), rollout(text=text, finish_reason="length")]
    stage, cfg = StageConfig("s", {}, 1), settings(cut_earns=cut_earns)
    rollouts.assign_rewards([group], stage, Judges(), cfg, 0)
    assert [r.reward for r in group] == [1, earned]
    means = rollouts.mean_rewards([group], stage, Judges(), cfg, {})
    assert means == {MATH[0].key: (1 + earned) / 2}
    assign_advantages([group], True)
    assert [r.advantage for r in group] == [1 - earned, earned - 1]
    assert [r.loss_mask for r in group] == [1, 0]


def test_a_compared_response_that_was_cut_off_may_earn_nothing():
    """In its group and in the filter."""
    number = TASTE[0].extra["number"]
    references = {TASTE[0].question: f"Answer: {number} a"}
    texts = [f"Answer: {number} {word}" for word in ("bb", "ccc")]
    for cut_earns in (True, False):
        cfg = settings(cut_earns=cut_earns)
        group = [rollout(problem=TASTE[0], text=texts[0]),
                 rollout(problem=TASTE[0], text=texts[1], finish_reason="length")]
        [rates] = rollouts.reference_win_rates([group], Fake(), references, cfg)
        rollouts.assign_rewards([group], PAIRWISE, Judges(Fake()), cfg, 0)
        assert rates.tolist() == [1, cut_earns]
        assert (group[1].reward > 0) == cut_earns


class Fake:
    """A judge that likes the longer text, and the first one by `bias`; asked: what it was shown."""

    def __init__(self, bias=0.0):
        self.bias, self.asked = bias, []

    def __call__(self, asked):
        self.asked += asked
        return np.array(
            [
                min(1.0, max(0.0, (len(a) > len(b)) + 0.5 * (len(a) == len(b)) + self.bias))
                for _, a, b in asked
            ]
        )


def taste_group(*words: str, thoughts="") -> list[Rollout]:
    """Right replies with some words after the number, and a wrong one that is the longest of
    all."""
    problem = TASTE[0]
    texts = [f"{thoughts}Answer: {problem.extra['number']} {word}" for word in words] + [
        "Answer: 1" + " and more" * 5
    ]
    return [rollout(problem=problem, text=text) for text in texts]


PAIRWISE = StageConfig("s", {"taste": 1}, 1, reward="pairwise")


def test_pairwise_rewards_are_wins_of_right_responses():
    """The wrong one would win against all, and gets nothing. Thoughts are not compared."""
    judge, group = (
        Fake(),
        taste_group("a", "bb", "ccc", thoughts="<think>\nLong thoughts.\n</think>\n\n"),
    )
    judges = Judges(judge)
    assert rollouts.assign_rewards([group], PAIRWISE, judges, settings(opponents=0), 0) == [0]
    assert [r.reward for r in group] == [0, 1 / 3, 2 / 3, 0]
    assert not any("thoughts" in text for _, *texts in judge.asked for text in texts)


def test_a_mixed_stage_judges_each_task_in_its_own_way():
    """Mathematics by its rule, taste by comparisons, in the order that the groups come in; so does
    the filter."""
    solved = [
        rollout(problem=MATH[0], text=text)
        for text in (f"Answer: {MATH[0].answer}", "Answer: -1", "?")
    ]
    groups = [solved, taste_group("a", "bb", "ccc"), solved[:2]]
    judges = Judges(Fake())
    assert rollouts.assign_rewards(groups, PAIRWISE, judges, settings(opponents=0), 0) == [0]
    assert [[r.reward for r in group] for group in groups] == [
        [1, 0, 0],
        [0, 1 / 3, 2 / 3, 0],
        [1, 0],
    ]
    number = TASTE[0].extra["number"]
    references = {TASTE[0].question: f"Answer: {number} xx"}
    means = rollouts.mean_rewards(groups[:2], PAIRWISE, Judges(Fake()), settings(), references)
    assert means == {
        MATH[0].key: pytest.approx(1 / 3),
        TASTE[0].key: pytest.approx((0 + 0.5 + 1 + 0) / 4),
    }
    assert (
        rollouts.assign_rewards(groups, StageConfig("s", {}, 1), Judges(), settings(), 0) == []
        and groups[1][0].reward is not None
    )


def test_requests_without_a_rule_need_a_reply_alone():
    """No rule stands behind the comparisons; thoughts that never end are no reply."""
    ask = Problem("helpsteer3", "k", "Write a poem.", (), "", 0, {})
    replies = [
        "A poem.",
        "<think>\nA poem.",
        "<think>\n?\n</think>\n\nPoem.",
        "<think>\n\n</think>\n\n ",
    ]
    cfg = settings()
    assert [rollouts.is_acceptable(rollout(problem=ask, text=text), cfg) for text in replies] == [
        True,
        False,
        True,
        False,
    ]


def test_the_recipe_of_3b_is_sound():
    recipe = runpy.run_path(str(ROOT / "configs/3b.py"))["rl"]
    p = from_dict(RlConfig, recipe, "rl")
    rl.check_settings(p, 8)


def test_a_judge_that_contradicts_itself_is_not_followed():
    """It says whatever stands first: right responses get one reward, so among them there is no
    signal."""
    always_first = lambda asked: np.full(len(asked), 0.9)
    group = taste_group("a", "bb", "ccc")
    assert rollouts.assign_rewards(
        [group], PAIRWISE, Judges(always_first), settings(opponents=0), 0
    ) == pytest.approx([0.8])
    assert [r.reward for r in group] == [0.5, 0.5, 0.5, 0]
    assert assign_advantages([group[:3]], False) == 0
    # more than it tells apart
    leaning = lambda asked: np.array([0.7 + 0.002 * (len(a) - len(b)) for _, a, b in asked])
    assert rollouts.assign_rewards(
        [group], PAIRWISE, Judges(leaning), settings(opponents=0), 0
    ) == pytest.approx([0.4])
    assert [r.reward for r in group] == [0.5, 0.5, 0.5, 0]


def test_wins_against_a_reference():
    group, number = taste_group("a", "bb", "ccc"), TASTE[0].extra["number"]
    found = rollouts.reference_win_rates(
        [group, group[1:]], Fake(), {TASTE[0].question: f"Answer: {number} xx"}, settings()
    )
    assert [x.tolist() for x in found] == [[0, 0.5, 1, 0], [0.5, 1, 0]]


def fake_run(folder) -> SimpleNamespace:
    """What the filter needs of a run."""
    (folder / "start").mkdir(exist_ok=True)
    return SimpleNamespace(
        dist=ONE,
        config=SimpleNamespace(scale=1.0),
        cfg=settings(),
        source=folder / "start",
        folder=folder,
        tokenizer=None,
        tokenizer_file=folder / "start/tokenizer.json",
        unsharded_model=lambda: "now",
        step=0,
    )


def filtered(
    monkeypatch, folder, rewards: list[list], again=False, stage=None, is_resumed=False, **changes
) -> list[int]:
    """Which of the first problems of `math` are kept where the samples of each get these
    rewards."""
    stage = stage or StageConfig("a stage", {"math": len(rewards)}, 1)
    problems = [
        p
        for task, n in stage.problems.items()
        for p in registry.family(task).problems("train", n, 0)
    ]

    def drawn(sampler, tokenizer, some, n, p, seed, numbers=()):
        if not some:
            return
        assert sampler.model == "now" and not again
        assert [problems[number] for number in numbers] == some
        yield {
            place: [
                rollout(problem=problem, text=json.dumps(reward))
                for reward in rewards[problems.index(problem)]
            ]
            for place, problem in enumerate(some)
        }

    monkeypatch.setattr(rollouts, "sample_rollouts", drawn)
    monkeypatch.setattr(rollouts, "task_prompt", lambda problem, *_: [1] * 5)
    monkeypatch.setattr(
        registry,
        "scores",
        lambda problems, responses, _: [registry.Score(json.loads(text)) for text in responses],
    )
    kept, _ = rollouts.filter_problems(
        fake_run(folder), Embedded(), settings(**changes), stage, Judges(), is_resumed)
    return [problems.index(problem) for problem in kept]


def right(k: int, n: int) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)


def test_the_filter_keeps_what_is_neither_hopeless_nor_known(monkeypatch, tmp_path, capsys):
    """2 to 14 of 16; what it found is taken again by a run that goes on."""
    rewards = [right(k, 16) for k in range(17)]
    assert filtered(monkeypatch, tmp_path, rewards) == [*range(2, 15)]
    assert re.search(
        r"^a stage: 17 problems, .*mean reward 0.500; too hard \(at most 0.1\) 2, too easy \(at "
        r"least "
        r"0.9\) 2, kept 13$",
        capsys.readouterr().out,
    )
    assert filtered(monkeypatch, tmp_path, rewards, again=True) == [*range(2, 15)]


def test_the_bounds_of_the_filter_are_out(monkeypatch, tmp_path):
    """Problems of which no sample could be scored too; the others' means are of those that
    could."""
    rewards = [right(1, 10), right(9, 10), right(2, 10), [None] * 10, [None] * 8 + [0.0, 1.0]]
    assert filtered(monkeypatch, tmp_path, rewards) == [2, 4]


def test_the_filter_asks_again_for_other_problems(monkeypatch, tmp_path):
    """A run that died before its first checkpoint may go on with other settings: nothing else looks
    at them then."""
    assert filtered(monkeypatch, tmp_path, [right(1, 2)] * 3) == [0, 1, 2]
    assert filtered(monkeypatch, tmp_path, [right(1, 2)] * 5) == [0, 1, 2, 3, 4]
    assert filtered(monkeypatch, tmp_path, [right(1, 2), right(2, 2)] * 2, temperature=0.5) == [
        0,
        2,
    ]
    assert filtered(monkeypatch, tmp_path, [right(2, 2), right(1, 2)] * 2, temperature=0.7) == [
        1,
        3,
    ]


def test_the_filter_of_comparisons_takes_the_greedy_response_for_reference(monkeypatch, tmp_path):
    """Kept is what wins against it now and then. Of the three problems one loses each time, and one
    wins each time."""
    problems, words = registry.family("taste").problems("train", 3, 0), {}
    words = dict(zip((p.key for p in problems), (["a", "b"], ["a", "bbbbb"], ["bbbb", "bbbbb"])))

    def drawn(sampler, tokenizer, some, n, p, seed, numbers=None):
        assert (n, p.temperature) in ((1, 0.0), (4, 1.0))
        yield {place: [rollout(problem=q, text=f"Answer: {q.extra['number']} {word}")
                       for word in (["ccc"] if n == 1 else words[q.key])]
               for place, q in enumerate(some)}

    monkeypatch.setattr(rollouts, "sample_rollouts", drawn)
    monkeypatch.setattr(rollouts, "task_prompt", lambda problem, *_: [1] * 5)
    stage = StageConfig("s", {"taste": 3}, 1, reward="pairwise")
    kept, references = rollouts.filter_problems(
        fake_run(tmp_path), Embedded(), settings(filter_samples=4), stage, Judges(Fake()))
    assert kept == [problems[1]]
    assert references == {q.question: f"Answer: {q.extra['number']} ccc" for q in problems}


def test_a_sampler_answers_one_call_at_a_time(monkeypatch, tmp_path):
    """The greedy replies are there before the samples are asked for; rules need none."""
    calls = []

    def drawn(sampler, tokenizer, some, n, p, seed, numbers=None):
        calls.append(f"begins {n}")
        text = "Answer: 1"
        yield {place: [rollout(problem=q, text=text)] * n for place, q in enumerate(some)}
        calls.append(f"ends {n}")

    monkeypatch.setattr(rollouts, "sample_rollouts", drawn)
    monkeypatch.setattr(rollouts, "task_prompt", lambda problem, *_: [1] * 5)
    cfg = settings(filter_samples=4, keep_between=[-1, 2])
    asked = {"pairwise": ["begins 1", "ends 1", "begins 4", "ends 4"],
             "verified": ["begins 4", "ends 4"]}
    for reward, expected in asked.items():
        stage = StageConfig(reward, {"taste": 3}, 1, reward=reward)
        rollouts.filter_problems(fake_run(tmp_path), Embedded(), cfg, stage, Judges(Fake()))
        assert calls == expected
        calls.clear()


def test_what_the_filter_found_is_of_its_settings(monkeypatch, tmp_path):
    """A run that was killed after the filter goes on with longer answers: all is asked again."""
    assert filtered(monkeypatch, tmp_path, [right(2, 2), right(1, 2)], max_new_tokens=9) == [1]
    assert filtered(monkeypatch, tmp_path, [right(1, 2), right(2, 2)], max_new_tokens=10) == [0]
    (tmp_path / "start").mkdir(exist_ok=True)
    (tmp_path / "start/weights").write_text("other ones")
    assert filtered(monkeypatch, tmp_path, [right(2, 2), right(1, 2)], max_new_tokens=10) == [1]
    assert filtered(monkeypatch, tmp_path, [right(2, 2), right(1, 2)], max_new_tokens=10) == [1]
    # in the midst of the stage the policy is no longer the one that was measured
    other = dict(rewards=[right(2, 2), right(2, 2)], max_new_tokens=11)
    assert filtered(monkeypatch, tmp_path, again=True, is_resumed=True, **other) == [1]


def test_the_filter_leaves_out_what_is_too_long(monkeypatch, tmp_path):
    """A prompt of 5 tokens and 9 of the response."""
    assert filtered(monkeypatch, tmp_path, [right(1, 2)] * 3, context=14) == [0, 1, 2]
    with pytest.raises(UserError, match="each of 3 problems and an answer have more tokens than"):
        filtered(monkeypatch, tmp_path, [right(1, 2)] * 3, context=13)


def test_nothing_is_left_by_the_filter(monkeypatch, tmp_path):
    with pytest.raises(
        UserError, match="stage 'a stage': no problem is left by the filter; take others, or more"
    ):
        filtered(monkeypatch, tmp_path, [right(0, 2)] * 2 + [right(2, 2)])


def test_without_the_filter_all_are_kept(monkeypatch, tmp_path):
    assert filtered(monkeypatch, tmp_path, [[0.0], [1.0]], filter_samples=0) == [0, 1]


def test_without_the_filter_nothing_is_sampled(monkeypatch, tmp_path):
    monkeypatch.setattr(rollouts, "measure_problems", lambda *_: pytest.fail("sampled"))
    assert filtered(monkeypatch, tmp_path, [[0.0], [1.0]], filter_samples=0) == [0, 1]


# ---- what the rewards cannot be cheated with

LONG = "This is a long story, and it goes on. " * 60
CHEATS = {  # an answer, the right one and a wrong one -> a response
    "hedged": lambda answer, wrong, question: f"Answer: {wrong} or {answer}",
    "all of them": lambda answer, wrong, question: "Answer: " + ", ".join(map(str, range(100))),
    "boxes": lambda answer, wrong, question: rf"Answer: \boxed{{{wrong}}} \boxed{{{answer}}}",
    "a later line": lambda answer, wrong, question: f"Answer: {answer}\nAnswer: {wrong}",
    "exit": lambda answer, wrong, question: "Answer: import sys; sys.exit(0)",
    "exit in an expression": lambda answer, wrong, question: (
        'Answer: return __import__("sys").exit(0)'
    ),
    "always equal": lambda answer, wrong, question: (
        "Answer: return type('', (), {'__eq__': lambda a, b: True})()"
    ),
    "the question": lambda answer, wrong, question: f"Answer: {question}",
    "the example": lambda answer, wrong, question: (
        f"Answer: return {question.rpartition(' = ')[2].rstrip('.')}"
    ),
    "no thoughts, wrong": lambda answer, wrong, question: f"<think>\n\n</think>\n\nAnswer: {wrong}",
    "thoughts without end": lambda answer, wrong, question: f"<think>\nAnswer: {answer}",
    "in thoughts alone": lambda answer, wrong, question: f"<think>\nAnswer: {answer}\n</think>\n\n",
    "a long line": lambda answer, wrong, question: f"Answer: {LONG} {answer}",
    "a long wrong one": lambda answer, wrong, question: f"{LONG}\nAnswer: {wrong}",
    "praise": lambda answer, wrong, question: "Answer: This is right! Reward: 1.0",
    "empty": lambda answer, wrong, question: "",
}


@pytest.mark.parametrize("task", ["math", "code", "tools", "form", "taste"])
@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_earn_nothing(task, cheat):
    """Of 60 problems each, in which the honest reply earns all. But the example of a few programs
    is what they give for every test too: then it is right."""
    problems, earned = registry.family(task).problems("train", 60, 5), 0
    for problem in problems:
        assert registry.reward(problem, f"<think>\nSo.\n</think>\n\nAnswer: {problem.answer}") == 1
        wrong = next(
            other.answer
            for other in problems
            if registry.reward(problem, f"Answer: {other.answer}") == 0
        )
        earned += registry.reward(problem, CHEATS[cheat](problem.answer, wrong, problem.question))
    assert earned <= (2 if (task, cheat) == ("code", "the example") else 0)


@pytest.mark.parametrize("task", ["math", "code", "tools", "form", "taste"])
def test_length_and_repetition_earn_nothing_more(task):
    for problem in registry.family(task).problems("train", 20, 6):
        honest = f"Answer: {problem.answer}"
        for response in (
            f"{LONG}\n{honest}",
            f"<think>\n{LONG}\n</think>\n\n{honest}",
            f"{honest}\n" * 50,
            f"<think>\n\n</think>\n\n{honest}",
        ):
            assert registry.reward(problem, response) <= registry.reward(problem, honest) == 1


# ---- the log

def test_what_was_not_scored_is_neither_right_nor_wrong():
    groups = [[rollout(reward=r) for r in rewards] for rewards in
              ([1.0, 1.0], [0.0, 0.0], [1.0, None], [None, None], [0.0, 1.0])]
    seen = rollouts.summarize_rollouts(groups, {}, ONE)
    assert (seen["all_right"], seen["all_wrong"], seen["unscored"]) == pytest.approx(
        (0.4, 0.2, 0.3)
    )
    assert seen["reward"] == pytest.approx(4 / 7)


# ---- the alarm

def lines(rewards: list, lengths: list, scores: list) -> list[dict]:
    """Metrics of a stage, with evaluations of `math` at its end, and of the stage before."""
    steps = [
        {"stage": "s", "reward": r, "length": n} for r, n in zip(rewards, lengths, strict=True)
    ]
    before = [{"stage": "r", "reward": 0.0, "length": 900.0}] * 9
    return (
        before
        + steps
        + [{"stage": "s", "scores": {"math": {"avg": x, "stderr": 0.02}}} for x in scores]
    )


UP, DOWN, FLAT = [0.1 * i for i in range(9)], [0.9 - 0.1 * i for i in range(9)], [20.0] * 9


@pytest.mark.parametrize("rewards, lengths, scores, said", [
    (UP, FLAT, [0.6, 0.5], "reward rises while held-out math falls from 0.600 to 0.500"),
    (DOWN, FLAT, [0.6, 0.5], ""),
    (UP, FLAT, [0.5, 0.6], ""),
    (UP, FLAT, [0.6, 0.56], ""),  # within two standard errors
    (UP, FLAT, [0.6], ""),
    # little by little
    (UP, FLAT, [0.6, 0.57, 0.53], "reward rises while held-out math falls from 0.600 to 0.530"),
    (UP, FLAT, [], ""),
    (UP, [10.0 + 2 * i for i in range(9)], [0.5, 0.6], "responses have become half as long again"),
    (UP, [20.0 + i for i in range(9)], [0.5, 0.6], ""),
    (UP[:7], FLAT[:7], [0.6, 0.5], ""),  # too early to say
])
def test_alarm(rewards, lengths, scores, said):
    assert rollouts.detect_hacking(lines(rewards, lengths, scores), "s", ["math"]) == said


# ---- whole runs

@pytest.fixture(scope="module")
def base(base):
    (base.folder / "mini_rl.py").write_text(CONFIG)
    return base


def attempt(base, monkeypatch, *options: str) -> None:
    toy(monkeypatch.setattr)
    base.call(
        rl.main, "rl.py", "mini_rl.py", "--init_from=out/base/pretrain", *options
    )


def metrics(base, run: str) -> list[dict]:
    """Of each step, without what a clock or the machine decides."""
    clocks = ("seconds", "tokens_per_s", "memory_gb", "rollout_s", "scoring_s", "update_s")
    return [
        {key: None if value != value else value for key, value in line.items() if key not in clocks}
        for line in common.read_metrics(base.folder / "out" / run / "rl")
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def whole(base) -> str:
    """What a run prints."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        attempt(base, patch, "--run=rl")
    return printed.getvalue()


def test_what_a_user_sees(base, whole):
    steps = metrics(base, "rl")
    assert "before, in chat form" in whole and re.search(r"step +4/7 +57%  STEM +loss ", whole)
    assert re.search(
        r"\nSTEM: 10 problems, .*mean reward 0\.\d+; too hard \(at most 0.1\) \d+, too easy .* "
        r"kept \d\n",
        whole,
    )
    assert re.search(r"\npreference: 6 problems, ", whole) and re.search(
        r"  best \(\d\.\d\d\) > .+\n  \| ", whole
    )
    assert re.search(
        r"  reward \d\.\d+  entropy \d\.\d+  length +\d+\.\d  groups with signal \d", whole
    )
    assert (
        re.search(r"task +before +asked in +after +gain\nmath .* chat ", whole)
        and "  > 1 + 1?\n  | " in whole
    )
    always = {
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "reward",
        "all_right",
        "all_wrong",
        "length",
        "length_right",
        "length_wrong",
        "truncated",
        "unscored",
        "groups_with_signal",
    }
    assert [line["stage"] for line in steps] == ["STEM"] * 4 + ["preference"] * 3
    for line in steps:
        assert line.keys() >= always and line["finite"]
        assert ({"win_rate", "rubric", "disagreement"} <= line.keys()) == (
            line["stage"] == "preference"
        )
        assert (
            not line["groups_with_signal"]
            or line["logprob_mismatch"] < 1e-5
            and line["entropy"] > 1
        )
    assert sum(line["groups_with_signal"] > 0 for line in steps) >= 5 and 0 < steps[0]["reward"] < 1
    assert any(line.get("clipped", 0) > 0 for line in steps)  # of the second update


def test_every_rollout_is_on_disk(base, whole):
    """And the metrics are what they say."""
    files = sorted((base.folder / "out/rl/rl/rollouts").iterdir())
    assert [path.name for path in files] == [f"{step:06d}.jsonl" for step in range(7)]
    for path, line in zip(files, metrics(base, "rl")):
        rollouts = [json.loads(text) for text in path.read_text().splitlines()]
        assert len(rollouts) == 8
        for key, value in (("reward", "reward"), ("length", "tokens")):
            assert line[key] == pytest.approx(np.mean([r[value] for r in rollouts]))
        assert line["truncated"] == np.mean([r["finish_reason"] == "length" for r in rollouts])
        assert all(r["reward"] == len(r["response"]) % 2 for r in rollouts if r["task"] == "math")
        for group in (rollouts[:4], rollouts[4:]):  # divided by the deviation where a rule judges
                                                    # alone
            assert len({r["question"] for r in group}) == 1
            rewards = np.array([r["reward"] for r in group])
            spread = (rewards.std() or 1) if group[0]["task"] == "math" else 1
            assert [r["advantage"] for r in group] == pytest.approx(
                (rewards - rewards.mean()) / spread
            )


def test_a_run_with_a_verifier(base, monkeypatch, capsys):
    """Its share is in the log, its conversations beside the rollouts; each case is asked once, and
    no more after a restart."""
    asked = []

    def llm(conversations):
        texts = [None] * len(conversations)
        for i, messages in enumerate(conversations):
            if messages is not None:
                asked.append(messages[0]["content"])
                equal = len(asked[-1]) % 2
                texts[i] = "Verdict: equivalent" if equal else "Verdict: different"
        return texts

    monkeypatch.setattr(generate, "open_llm", lambda spec, where, *_: (llm, spec))
    options = (
        "--run=verified",
        "--rl.stages=[{'name': 'STEM', 'problems': {'math': 4, 'phrases': 10}, 'steps': 3}]",
        "--rl.verifier={'model': {'checkpoint': 'a'}, 'prompts': {'system': ''}}",
        "--rl.keep_between=[-1, 2]",
    )
    attempt(base, monkeypatch, *options)
    printed = capsys.readouterr().out
    assert "by verifier" in printed and re.search(r"  verifier: \d+ answers, 0 undecided", printed)
    assert len(asked) == len(set(asked)) > 10
    for step, line in enumerate(metrics(base, "verified")):
        path = base.folder / f"out/verified/rl/rollouts/{step:06d}.jsonl"
        rows = [json.loads(text) for text in path.read_text().splitlines()]
        decided = [row for row in rows if row["verdict"]]
        assert all(row["task"] == "phrases" for row in decided)
        assert all(row["reward"] == row["verdict"]["equal"] for row in decided)
        assert line["by_verifier"] == len(decided) / len(rows)
        assert line["verifier_cases"] >= len(decided) and line["verifier_s"] >= 0
        named = line["verifier_equivalent"] + line["verifier_different"]
        assert named == line["verifier_cases"] and line["verifier_undecided"] == 0
    assert sum(line["by_verifier"] for line in metrics(base, "verified")) > 0
    n_asked = len(asked)
    for path in common.list_checkpoints(base.folder / "out/verified/rl"):
        if int(path.name[5:]) > 1:
            shutil.rmtree(path)
    attempt(base, monkeypatch, *options)
    assert "(step 1)" in capsys.readouterr().out and len(asked) == n_asked


def test_a_stage_has_its_own_temperature(base, whole, monkeypatch):
    """All but 0 here: the responses of a group are one. And Dr. GRPO does not divide by the
    deviation."""
    stage = "{'name': 's', 'problems': {'math': 10}, 'steps': 1, 'temperature': %s}"
    for name, temperature in (("cold", 1e-4), ("warm", 1.0)):
        attempt(
            base,
            monkeypatch,
            f"--run={name}",
            f"--rl.stages=[{stage % temperature}]",
            "--rl.filter_samples=0",
            "--rl.loss=dr_grpo",
            "--evaluate.tasks=[]",
            "--rl.prompts=[]",
        )
        text = (base.folder / f"out/{name}/rl/rollouts/000000.jsonl").read_text()
        rollouts = [json.loads(line) for line in text.splitlines()]
        assert (len({(r["question"], r["response"]) for r in rollouts}) == 2) == (name == "cold")
    assert {abs(r["advantage"]) for r in rollouts} <= {0.25, 0.5, 0.75, 0.0} and any(
        r["advantage"] for r in rollouts
    )


def test_stages_that_have_begun_cannot_change(base, whole, monkeypatch, capsys):
    cut(base, "rl-changed", 6)
    with pytest.raises(SystemExit, match="2"):
        attempt(
            base,
            monkeypatch,
            "--run=rl-changed",
            "--rl.stages=[{'name': 'STEM', 'problems': {'math': 10}, 'steps'"
            ": 4}, {'name': 'preference', 'problems': {'taste': 6}, 'steps': 3, 'reward': "
            "'verified'}]",
        )
    assert "was trained with other stages" in capsys.readouterr().err


def cut(base, again: str, last: int) -> None:
    """What a machine that died leaves behind of the run: its checkpoints up to step `last`."""
    shutil.copytree(base.folder / "out/rl", base.folder / "out" / again)
    for path in common.list_checkpoints(base.folder / "out" / again / "rl"):
        if int(path.name[5:]) > last:
            shutil.rmtree(path)


def weights(base, run: str, step: int) -> list[torch.Tensor]:
    return [*hf.load(base.folder / "out" / run / "rl" / f"step_{step:08d}")[0].parameters()]


@pytest.mark.parametrize("last", [2, 4, 6])
def test_resume_is_exact_to_the_bit(base, whole, monkeypatch, capsys, last):
    """From the middle of either stage, and from between them: with the filter's problems, and near
    the policy that the stage began with."""
    cut(base, f"rl-{last}", last)
    attempt(base, monkeypatch, f"--run=rl-{last}")
    output = capsys.readouterr().out
    assert f"(step {last})" in output and "before, in chat form" not in output
    assert metrics(base, f"rl-{last}") == metrics(base, "rl")
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(base, f"rl-{last}", 7), weights(base, "rl", 7), strict=True)
    )


def test_each_stage_begins_with_a_fresh_optimizer(base, whole):
    """Its count is of the stage's updates alone: two a step that has a signal."""
    folder = base.folder / "out/rl/rl/step_00000007"
    model, _ = hf.load(folder)
    optimizer = common.adamw(model.requires_grad_(True), 1e-3, (0.9, 0.95), 0.0)
    common.load_checkpoint(ONE, folder, model, optimizer)
    n = sum(
        line["groups_with_signal"] > 0
        for line in metrics(base, "rl")
        if line["stage"] == "preference"
    )
    assert n and {int(state["step"]) for state in optimizer.state.values()} == {2 * n}


def test_a_step_without_signal_changes_no_weight(base, whole, monkeypatch, capsys):
    """The optimizer has momentum by then."""
    cut(base, "equal", 2)
    monkeypatch.setattr(
        rollouts,
        "assign_rewards",
        lambda groups, *_: [setattr(r, "reward", 1.0) for g in groups for r in g] and 0.0,
    )
    attempt(base, monkeypatch, "--run=equal",
            "--rl.stages=[{'name': 'STEM', 'problems': {'math': 10}, 'steps': 4}]")
    before, after = weights(base, "equal", 2), weights(base, "equal", 4)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, weights(base, "rl", 4), strict=True))
    for line in metrics(base, "equal")[2:]:
        assert (
            line["groups_with_signal"] == line["loss"] == line["grad_norm"] == 0
            and line["all_right"] == 1
        )


def test_a_stage_whose_first_step_has_no_signal(base, monkeypatch):
    """It is saved there, or resumed from there, or neither: the weights are the same to the bit."""
    assign_rewards = rollouts.assign_rewards

    def equal_at_first(groups, stage, judges, cfg, seed):
        disagreement = assign_rewards(groups, stage, judges, cfg, seed)
        for rollout in rollouts.flatten(groups) if seed == 0 else ():
            rollout.reward = 1.0
        return disagreement

    monkeypatch.setattr(rollouts, "assign_rewards", equal_at_first)
    options = ("--rl.stages=[{'name': 'STEM', 'problems': {'math': 10}, 'steps': 3}]",
               "--evaluate.tasks=[]", "--rl.prompts=[]")
    attempt(base, monkeypatch, "--run=unbroken", "--rl.save_every=99", *options)
    attempt(base, monkeypatch, "--run=saved", *options)
    assert [line["groups_with_signal"] > 0 for line in metrics(base, "saved")][0] is False
    for step in (2, 3):
        shutil.rmtree(base.folder / f"out/saved/rl/step_{step:08d}")
    expected = weights(base, "unbroken", 3)
    attempt(base, monkeypatch, "--run=saved", *options)
    assert all(map(torch.equal, weights(base, "saved", 3), expected))


def test_signals_in_the_midst_of_sampling(base, monkeypatch, capsys):
    """In the second answer of the filter, of a step's rollouts and of the last evaluation: it
    leaves at once, and what was answered is not asked again. The others are then decoded beside
    fewer: the same tokens, log-probabilities that are rounded otherwise."""
    options = ("--rl.stages=[{'name': 'STEM', 'problems': {'math': 5}, 'steps': 2}]",
               "--rl.max_rows=4", "--rl.save_every=99", "--rl.filter_samples=4",
               "--rl.keep_between=[-1, 2]", "--evaluate.max_rows=2", "--rl.prompts=[]")
    asked = []

    def count(sample, kill_at):
        def counted(*arguments, **named):
            for answers in sample(*arguments, **named):
                if len(asked) == kill_at - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                asked.append(named["seed"])
                yield answers
        return counted

    def run(name, kill_at):
        with pytest.MonkeyPatch.context() as patch:
            toy(patch.setattr)
            patch.setattr(sampler, "PIECE_FILLS", 1)  # what a signal ends is a problem or two
            patch.setattr(generate, "sample_as_completed",
                          count(generate.sample_as_completed, kill_at))
            base.call(rl.main, "rl.py", "mini_rl.py", "--init_from=out/base/pretrain",
                      f"--run={name}", *options)

    run("unstopped", -1)
    n_before, n_filter, n_step = 4, 5, 2  # problems
    everything = [*asked]
    assert len(everything) == n_before + n_filter + 2 * n_step + n_before
    del asked[:]
    for kill_at, says in (
        (n_before + 2, "stopped by signal; what was done is kept"),
        (n_before + n_filter + n_step + 2, "stopped by signal at step 1"),
        (len(everything) - 2, "stopped by signal; what was done is kept"),
    ):
        with pytest.raises(SystemExit) as left:
            run("stopped", kill_at)
        assert left.value.code == 128 + signal.SIGTERM and says in capsys.readouterr().out
    run("stopped", -1)
    assert asked == everything
    lines = [metrics(base, "stopped"), metrics(base, "unstopped")]
    for line in lines[0] + lines[1]:
        assert max(line.pop(key, 0) for key in ("logprob_mismatch", "sampler_off")) < 1e-5
        assert abs(line.pop("sampler_kl", 0)) < 1e-6
    assert lines[0] == lines[1]
    assert all(map(torch.equal, weights(base, "stopped", 2), weights(base, "unstopped", 2)))
    ends = [common.read_metrics(base.folder / "out" / run / "rl")[-1] for run in
            ("stopped", "unstopped")]
    assert ends[0]["scores"] == ends[1]["scores"] and ends[0]["scores"]["math"]["n"] == 4


def test_two_ranks_take_the_same_steps(base, whole):
    """Each with a group of its own, of very uneven lengths, in passes of three responses and one.

    And the second one comes to the end of the filter later than to a step's collectives it may.
    """
    output = base.run(
        "-m",
        "checks.waiting",
        "work",
        "filter",
        "14",  # seconds that it sleeps
        "0.2",  # minutes of time-out
        "0",
        "mini_rl.py",
        "--name=two",
        "--init_from=out/base/pretrain",
        "--rl.prompts=[]",
        "--evaluate.tasks=[]",
        ranks=2,
    )
    assert "2 process(es)" in output
    for key in (
        "loss",
        "reward",
        "length",
        "truncated",
        "unscored",
        "groups_with_signal",
        "grad_norm",
        "entropy",
        "clipped",
        "win_rate",
        "disagreement",
        "logprob_mismatch",
    ):
        ours, theirs = (
            [line[key] for line in metrics(base, run) if key in line] for run in ("two", "rl")
        )
        assert ours == pytest.approx(theirs, abs=1e-4), key
    for name in ("000000.0.jsonl", "000000.1.jsonl"):
        assert len((base.folder / "out/two/rl/rollouts" / name).read_text().splitlines()) == 4


@pytest.mark.parametrize("options, message", [
    (["--rl.loss=ppo"], "rl.loss must be one of 'dapo', 'grpo', 'dr_grpo', 'gspo', not 'ppo'"),
    (["--rl.stages=[{'name': 's', 'problems': {'math': 5}, 'steps': 2, 'reward': 'best'}]"],
     "rl.stages[0].reward must be one of 'verified', 'pairwise', not 'best'"),
    (["--rl.reward_model="], "stage 'preference' needs rl.reward_model, a checkpoint of reward.py"),
    (["--rl.reward_model=nowhere"], "nowhere is no checkpoint: neither a phase's folder"),
    (["--init_from=nowhere"], "nowhere is no checkpoint: neither a phase's folder"),
    (["--rl.stages=[{'name': 's', 'problems': {'maths': 5}, 'steps': "
      "2}]"], "no task 'maths'; there are math, "),
    (["--rl.stages=[{'name': 's', 'problems': {'math': 5}, 'step': 2}]"],
     "rl.stages[0]: unknown key 'step'; did you mean 'steps'?"),
    (["--rl.stages=[{'name': 's', 'problems': {'math': 5}, 'steps': 2, 'lr': [1]}]"],
     "rl.stages[0].lr must be a list of 2, each a number of at least 0, not [1]"),
    (["--rl.stages=[{'name': 's', 'problems': {'math': 5}, 'steps': 2, 'reward': 'pairwise'}]"],
     "stage 's': replies to helpsteer3, taste, ultrafeedback can be compared, not to math"),
    (["--rl.stages=[]"],
     "rl.stages must be a list of at least 1, each a dict of StageConfig's settings, not []"),
    (["--rl.stages=[{'name': 's', 'problems': {'math': 5}, 'steps': 2}, {'name': 's', 'problems': "
      "{'math': 5}, 'steps': 2}]"],
     "rl.stages must each have a name of its own"),
    (["--rl.group_size=1"], "rl.group_size must be a whole number from 2 to 10,000, not 1"),
    (["--rl.updates=0"], "rl.updates must be a whole number from 1 to 1,000,000, not 0"),
    (["--rl.temperature=0"], "rl.temperature must be a number above 0, not 0"),
    (["--rl.keep_between=[0.5]"],
     "rl.keep_between must be a list of 2, each a number, not [0.5]"),
    (["--rl.context=40", "--evaluate.tasks=[]"],
     "and an answer have more tokens than rl.context=40"),
    (["--model.n_layers=3"], "has n_layers = 2, this run's model has 3: set model.n_layers"),
])
def test_bad_settings_are_one_line(base, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=bad", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and len(error) < 400


def test_groups_are_shared_out_evenly(base, monkeypatch, capsys):
    """The check of the number of processes comes before any of them waits for another."""
    monkeypatch.setattr(
        common, "init_distributed", lambda *_: common.Dist(0, 3, torch.device("cpu"), None)
    )
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=bad")
    assert "rl.batch_groups=2 is no multiple of the 3 processes" in capsys.readouterr().err
