"""distill.py by its real command, and its loss beside TRL's and beside plain PyTorch on full logits."""
import dataclasses
import json
import math
import re
import shutil
import signal
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from trl import DPOTrainer
from trl.experimental.gkd import GKDTrainer

import common
import distill
import hf
from common import UserError
from conftest import ROOT
from data import tasks
from data.pairs import CHOSEN, REJECTED, Pair
from data.tokenizer import TokenizerConfig, train_tokenizer
from distill import DistillConfig, TopK, distillation_loss, preference_loss, score, train_step
from kernels.cross_entropy import linear_kl, linear_logprobs
from model import ModelConfig, Transformer, init_weights

ONE = common.Dist(0, 1, torch.device("cpu"), None)
V = 90
ALL = np.arange(5)


# ---- the loss

def test_preference_is_what_trl_computes():
    """Values and gradients of the logits, in float64, of three pairs with responses of uneven lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (6, 9), generator=generator)  # as TRL has them: chosen of all pairs, then rejected
    mask = torch.tensor([[0] * 3 + [1] * n + [0] * (6 - n) for n in (6, 2, 3, 4, 1, 5)])
    logits = torch.randn(6, 8, V, generator=generator).double().requires_grad_()  # at each place, of the next token
    reference = -30 * torch.rand(3, 2, generator=generator).double()

    class Model:
        training = True

        def __call__(self, labels, **_):
            return SimpleNamespace(log_probs=-F.cross_entropy(logits.mT, labels[:, 1:], reduction="none"),
                                   **dict.fromkeys(("entropy", "mean_logits", "is_top1"), labels[:, 1:] > 0))

    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=Model(), accelerator=alone, beta=0.3, loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None,
        f_divergence_type="reverse_kl", precompute_ref_logps=True, aux_loss_enabled=False, use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1)
    theirs = DPOTrainer._compute_loss(trainer, trainer.model, dict(
        input_ids=tokens, completion_mask=mask, attention_mask=torch.ones_like(mask),
        ref_chosen_logps=reference[:, CHOSEN], ref_rejected_logps=reference[:, REJECTED]), False)

    logprobs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    policy = (logprobs * mask[:, 1:]).sum(1).view(2, 3).T
    ours = preference_loss(policy, reference, 0.3).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10) and ours > 0.1
    for a, b in zip(*(torch.autograd.grad(loss, logits, retain_graph=True) for loss in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def new_model(width: int, seed: int) -> Transformer:
    model = Transformer(ModelConfig(2, width, 48, 2, 1, 16, vocab_size=V, init_std=0.2))
    init_weights(model, seed)
    return model.double()


@pytest.fixture(scope="module")
def step():
    """Student, a teacher of another width, five uneven pairs, and their scores under another student and the teacher."""
    rng = np.random.default_rng(0)
    pairs = [Pair(i, "", *(rng.integers(0, V, n).tolist() for n in rng.integers(1, 14, 3))) for i in range(5)]
    student, teacher = new_model(32, 0), new_model(48, 1)
    scores = [score(model, pairs, [ALL], settings(), ONE) for model in (new_model(32, 2), teacher)]
    frozen = np.array([[scores[who][i] for who in (0, 1)] for i in range(5)])
    return SimpleNamespace(student=student, teacher=teacher, pairs=pairs, frozen=frozen)


def settings(**changes) -> DistillConfig:
    """All terms at once."""
    return DistillConfig(**dict(context=40, dpo=0.7, beta=0.4, kl_chosen=0.6, kl_rejected=0.9, nll=0.3) | changes)


def our_step(step, p, teacher=None, mine=ALL) -> tuple[dict, list[torch.Tensor]]:
    """What train_step returns, and the gradients."""
    step.student.zero_grad()
    seen = train_step(step.student, teacher or step.teacher, step.pairs, mine, step.frozen, p, ONE)
    return seen, [parameter.grad.clone() for parameter in step.student.parameters()]


def divergence_of_trl(logits, theirs, p):
    return GKDTrainer.generalized_jsd_loss(logits[None], theirs[None], beta=p.divergence, temperature=p.kl_temperature,
                                           reduction="none")[0].sum(-1)


def buckets_of(k: int):
    """Forward KL over the teacher's k likeliest tokens and all others as one."""
    def divergence(logits, theirs, p):
        ids = theirs.topk(k).indices
        several = [x.log_softmax(-1).gather(1, ids) for x in (logits, theirs)]
        log_q, log_p = (torch.cat((x, (1 - x.exp().sum(-1, keepdim=True)).log()), 1) for x in several)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return divergence


def plain_step(step, p, divergence=divergence_of_trl, mine=ALL) -> tuple[dict, list[torch.Tensor]]:
    """The same by autograd on full logits, a sequence at a time."""
    n, dpo, nll, kl, accuracy = [0, 0], 0, 0, [0, 0], 0
    for i in mine:
        pair, gained = step.pairs[i], []
        for side, response in enumerate((pair.chosen, pair.rejected)):
            tokens, at = torch.tensor([pair.prompt + response]), slice(len(pair.prompt) - 1, -1)
            logits, theirs = (model(tokens)[0, at] @ model.lm_head.weight.T for model in (step.student, step.teacher))
            logprob = -F.cross_entropy(logits, torch.tensor(response), reduction="sum")
            kl[side] += divergence(logits, theirs.detach(), p).sum()
            n[side] += len(response)
            nll -= logprob if side == CHOSEN else 0
            gained.append((logprob - step.frozen[i, 0, side]) / (len(response) if p.margin == "token" else 1))
        dpo -= F.logsigmoid(p.beta * (gained[CHOSEN] - gained[REJECTED]))
        accuracy += (gained[CHOSEN] > gained[REJECTED]).item() / len(mine)
    terms = dict(dpo=dpo / len(mine), kl_chosen=kl[0] / n[0], kl_rejected=kl[1] / n[1], nll=nll / n[0])
    terms["loss"] = sum(getattr(p, name) * term for name, term in terms.items())
    gradients = torch.autograd.grad(terms["loss"], list(step.student.parameters()))
    return {name: term.item() for name, term in terms.items()} | {"accuracy": accuracy}, gradients


def assert_same_step(ours, theirs, rtol=1e-9, atol=1e-12):
    for name, value in theirs[0].items():
        assert ours[0][name] == pytest.approx(value, rel=rtol, abs=atol), name
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("changes", [
    {}, dict(divergence=1.0), dict(divergence=0.3, kl_temperature=2.0), dict(margin="token"), dict(dpo=0.0),
    dict(kl_chosen=0.0)], ids=str)
def test_step_is_autograd_on_full_logits(step, changes):
    """Loss, each term and all gradients to 1e-9, with TRL's divergence; the teacher gets no gradient."""
    p = settings(**changes)
    ours = our_step(step, p)
    assert_same_step(ours, plain_step(step, p))
    assert min(ours[0][name] for name in ("dpo", "kl_chosen", "kl_rejected", "nll")) > 0.01
    assert all(parameter.grad is None for parameter in step.teacher.parameters())


def test_what_the_log_shows_of_a_step(step):
    """Log-probabilities a token of both sides under the three models; teacher and reference are those of `frozen`."""
    seen, _ = our_step(step, settings())
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in step.pairs])
    own = score(step.student, step.pairs, [ALL], settings(), ONE)
    sums = [("student", np.array([own[i] for i in ALL])), ("reference", step.frozen[:, 0]),
            ("teacher", step.frozen[:, 1])]
    for who, values in sums:
        for side, name in enumerate(("chosen", "rejected")):
            assert seen[f"{who}_{name}"] == pytest.approx(values[:, side].sum() / lengths[:, side].sum(), rel=1e-12)
    margins = 0.4 * np.diff((sums[0][1] - sums[1][1])[:, ::-1])
    assert seen["margin"] == pytest.approx(margins.mean(), rel=1e-9)
    assert [seen["chosen_tokens"], seen["rejected_tokens"]] == (lengths.sum(0) / 5).tolist()


def test_without_a_teacher_only_the_other_terms_are_left(step):
    p = settings(kl_chosen=0.0, kl_rejected=0.0)
    seen = train_step(step.student, None, step.pairs, ALL, step.frozen, p, ONE)
    assert seen["loss"] == pytest.approx(plain_step(step, p)[0]["loss"], rel=1e-9)
    assert seen["kl_chosen"] == seen["kl_rejected"] == 0


@pytest.mark.parametrize("k", [3, V])
def test_top_k_is_the_divergence_over_buckets(step, tmp_path, k):
    """What score() wrote to disk, read back in another order of pairs; with k = V it is the full divergence."""
    p, mine = settings(top_k=k), np.array([3, 0, 4, 1])
    score(step.teacher, step.pairs, [ALL[:2], ALL[2:]], p, ONE, TopK(tmp_path, step.pairs, k, "w+"))
    top = TopK(tmp_path, step.pairs, k, "r+")
    assert {name: (file.shape, file.dtype) for name, file in top.files.items()} == {
        name: ((sum(top.length), k), dtype) for name, dtype in (("ids", np.int32), ("logprobs", np.float16))}
    expected = plain_step(step, p, divergence_of_trl if k == V else buckets_of(k), mine)
    assert_same_step(our_step(step, p, top, mine), expected, rtol=2e-3, atol=2e-3)  # half precision on disk


@pytest.mark.parametrize("micro_pairs", [1, 2, 5])
def test_micro_batches_do_not_change_the_step(step, micro_pairs):
    """Denominators are the whole batch's, so passes of uneven lengths add up to it."""
    assert_same_step(our_step(step, settings(micro_pairs=micro_pairs)), our_step(step, settings()))


@pytest.mark.parametrize("micro_pairs", [0, 1])
def test_the_first_step_begins_at_log_2(step, micro_pairs):
    """In fp32 to the last bit: the reference's scores are the very numbers that the student then has."""
    model, p, mine = new_model(32, 0).float(), settings(micro_pairs=micro_pairs), ALL[:4]
    scores = score(model, step.pairs, [mine], p, ONE)
    frozen = np.array([[scores[i]] * 2 for i in mine])
    seen = train_step(model, step.teacher.float(), step.pairs, mine, frozen, p, ONE)
    step.teacher.double()
    assert seen["dpo"] == np.float32(math.log(2)) and seen["margin"] == 0 and seen["accuracy"] == 0


def test_displacement_and_its_cure():
    """Two answers that differ in one token, whose output vectors look alike: preference alone widens the margin by
    pushing both down, y+ too; with the teacher's distribution on both, y+ becomes what it is for the teacher."""
    U = 2 * torch.eye(20)
    U[5] += 1.5 * U[4]  # y- ends with token 5 where y+ ends with 4
    before, targets = torch.tensor([0, 1, 2, 3] * 2), torch.tensor([1, 2, 3, 4, 1, 2, 3, 5])
    side = torch.arange(8) // 4
    start, teacher = U[1:5].clone(), U[1:5].clone()  # hidden states after tokens 0 … 3, of which the last makes it
    start[3], teacher[3] = 0.75 * U[4] - 0.375 * (U[5] - 1.5 * U[4]), 1.25 * U[4] - 2 * (U[5] - 1.5 * U[4])

    def sums(states):
        return linear_logprobs(states[before], U, targets).view(1, 2, 4).sum(-1)

    def train(weight_of_kl: float):
        states = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([states], lr=0.05)
        for _ in range(300):
            divergence = linear_kl(states[before], U, teacher[before], U)
            kl = sum(distillation_loss(divergence, side == which, 4) for which in (CHOSEN, REJECTED))
            (preference_loss(sums(states), reference, 0.5).mean() + weight_of_kl * kl).backward()
            optimizer.step()
            optimizer.zero_grad()
        return sums(states.detach())[0]

    reference = sums(start)
    goal, first = sums(teacher)[0], reference[0]
    alone, dual = train(0.0), train(10.0)
    print(first, goal, alone, dual)
    assert alone[CHOSEN] - alone[REJECTED] > first[CHOSEN] - first[REJECTED] + 2
    assert alone[CHOSEN] < first[CHOSEN] - 1
    assert dual[CHOSEN] - dual[REJECTED] > first[CHOSEN] - first[REJECTED] + 2
    assert abs(dual[CHOSEN] - goal[CHOSEN]) < 0.2 < abs(first[CHOSEN] - goal[CHOSEN])
