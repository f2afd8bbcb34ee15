"""distill.py by its real command, and its loss beside TRL's and beside plain PyTorch on full
logits."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
from collections import defaultdict
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
import loop
import sample_pairs
from common import UserError
from conftest import ROOT
from data.chat.pairs import CHOSEN, REJECTED, Pair, TopK
from data.tasks import pages, registry
from data.tasks.problem import as_reply, seeded_rng, to_document
from data.text.tokenizer import TokenizerConfig, train_tokenizer
from distill import (
    DistillConfig,
    distillation_loss,
    preference_loss,
    sequence_logprobs,
    train_step,
)
from kernels.cross_entropy import linear_logprobs, linear_logprobs_kl
from model import ModelConfig, Transformer, init_weights

ONE = common.Dist(0, 1, torch.device("cpu"), None)
V = 90
ALL = np.arange(5)


# ---- the loss


def test_preference_is_what_trl_computes():
    """Values and gradients of the logits, in float64, of three pairs with responses of uneven
    lengths."""
    generator = torch.Generator().manual_seed(0)
    # As TRL has them: chosen of all pairs, then rejected.
    tokens = torch.randint(V, (6, 9), generator=generator)
    mask = torch.tensor([[0] * 3 + [1] * n + [0] * (6 - n) for n in (6, 2, 3, 4, 1, 5)])
    # At each place, of the next token.
    logits = torch.randn(6, 8, V, generator=generator).double().requires_grad_()
    reference = -30 * torch.rand(3, 2, generator=generator).double()

    class Model:
        training = True

        def __call__(self, labels, **_):
            return SimpleNamespace(
                log_probs=-F.cross_entropy(logits.mT, labels[:, 1:], reduction="none"),
                **dict.fromkeys(("entropy", "mean_logits", "is_top1"), labels[:, 1:] > 0),
            )

    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=Model(),
        accelerator=alone,
        beta=0.3,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    theirs = DPOTrainer._compute_loss(
        trainer,
        trainer.model,
        dict(
            input_ids=tokens,
            completion_mask=mask,
            attention_mask=torch.ones_like(mask),
            ref_chosen_logps=reference[:, CHOSEN],
            ref_rejected_logps=reference[:, REJECTED],
        ),
        False,
    )

    logprobs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    policy = (logprobs * mask[:, 1:]).sum(1).view(2, 3).T
    ours = preference_loss(policy, reference, 0.3).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10) and ours > 0.1
    for a, b in zip(
        *(torch.autograd.grad(loss, logits, retain_graph=True) for loss in (ours, theirs))
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def new_model(width: int, seed: int) -> Transformer:
    model = Transformer(ModelConfig(2, width, 48, 2, 1, 16, vocab_size=V, init_std=0.2))
    init_weights(model, seed)
    return model.double()


@pytest.fixture(scope="module")
def step():
    """Student, a teacher of another width, uneven pairs, and their scores under another student and
    the teacher."""
    rng = np.random.default_rng(0)
    pairs = [
        Pair(i, "", *(rng.integers(0, V, n).tolist() for n in rng.integers(1, 14, 3)))
        for i in range(5)
    ]
    student, teacher = new_model(32, 0), new_model(48, 1)
    scores = [
        sequence_logprobs(model, pairs, [ALL], settings(), ONE)
        for model in (new_model(32, 2), teacher)
    ]
    cached_logprobs = np.array([[scores[who][i] for who in (0, 1)] for i in range(5)])
    return SimpleNamespace(
        student=student, teacher=teacher, pairs=pairs, cached_logprobs=cached_logprobs
    )


def settings(**changes) -> DistillConfig:
    """All terms at once."""
    return DistillConfig(
        **dict(context=40, dpo=0.7, beta=0.4, kl_chosen=0.6, kl_rejected=0.9, nll=0.3) | changes
    )


def metrics_of_step(model, kl_teacher, pairs, batch, cached_logprobs, cfg) -> dict:
    """What train_step returns, in one dict."""
    loss, n_tokens, metrics = train_step(model, kl_teacher, pairs, batch, cached_logprobs, cfg, ONE)
    assert n_tokens == sum(len(pairs[i].chosen) + len(pairs[i].rejected) for i in batch)
    return metrics | {"loss": loss}


def our_step(step, cfg, teacher=None, batch=ALL) -> tuple[dict, list[torch.Tensor]]:
    """What train_step returns, and the gradients."""
    step.student.zero_grad()
    metrics = metrics_of_step(
        step.student, teacher or step.teacher, step.pairs, batch, step.cached_logprobs, cfg
    )
    return metrics, [parameter.grad.clone() for parameter in step.student.parameters()]


def divergence_of_trl(logits, theirs, cfg):
    return GKDTrainer.generalized_jsd_loss(
        logits[None],
        theirs[None],
        beta=cfg.divergence,
        temperature=cfg.kl_temperature,
        reduction="none",
    )[0].sum(-1)


def buckets_of(k: int):
    """Forward KL over the teacher's k likeliest tokens and all others as one."""

    def divergence(logits, theirs, cfg):
        ids = theirs.topk(k).indices
        several = [x.log_softmax(-1).gather(1, ids) for x in (logits, theirs)]
        log_q, log_p = (
            torch.cat((x, (1 - x.exp().sum(-1, keepdim=True)).log()), 1) for x in several
        )
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    return divergence


def plain_step(
    step, cfg, divergence=divergence_of_trl, batch=ALL
) -> tuple[dict, list[torch.Tensor]]:
    """The same by autograd on full logits, a sequence at a time."""
    n, dpo, nll, kl = [0, 0], 0, 0, [0, 0]
    for i in batch:
        pair, gained = step.pairs[i], []
        for side, response in enumerate((pair.chosen, pair.rejected)):
            logits, theirs = (
                model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
                @ model.lm_head.weight.T
                for model, prompt in (
                    (step.student, pair.prompt),
                    (step.teacher, pair.teacher_prompt or pair.prompt),
                )
            )
            logprob = -F.cross_entropy(logits, torch.tensor(response), reduction="sum")
            kl[side] += divergence(logits, theirs.detach(), cfg).sum()
            n[side] += len(response)
            nll -= logprob if side == CHOSEN else 0
            gained.append(
                (logprob - step.cached_logprobs[i, 0, side])
                / (len(response) if cfg.margin == "token" else 1)
            )
        dpo -= F.logsigmoid(cfg.beta * (gained[CHOSEN] - gained[REJECTED]))
    terms = dict(
        dpo=dpo / len(batch), kl_chosen=kl[0] / n[0], kl_rejected=kl[1] / n[1], nll=nll / n[0]
    )
    terms["loss"] = sum(getattr(cfg, name) * term for name, term in terms.items())
    gradients = torch.autograd.grad(terms["loss"], list(step.student.parameters()))
    return {name: term.item() for name, term in terms.items()}, gradients


def assert_same_step(ours, theirs, rtol=1e-9, atol=1e-12):
    for name, value in theirs[0].items():
        assert ours[0][name] == pytest.approx(value, rel=rtol, abs=atol), name
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(divergence=1.0),
        dict(divergence=0.3, kl_temperature=2.0),
        dict(margin="token"),
        dict(dpo=0.0),
        dict(kl_chosen=0.0),
    ],
    ids=str,
)
def test_step_is_autograd_on_full_logits(step, changes):
    """Loss, each term and all gradients to 1e-9, with TRL's divergence; the teacher gets no
    gradient."""
    cfg = settings(**changes)
    ours = our_step(step, cfg)
    assert_same_step(ours, plain_step(step, cfg))
    assert min(ours[0][name] for name in ("dpo", "kl_chosen", "kl_rejected", "nll")) > 0.01
    assert all(parameter.grad is None for parameter in step.teacher.parameters())


def test_the_teacher_is_asked_behind_its_own_system_turn(step):
    """The student behind its prompt alone; also where the two are packed into other rows."""
    turns = [[5, 7, 9], [5, 7, 9], [], [5, 7, 9], [5] * 11]
    pairs = [
        dataclasses.replace(pair, teacher_prompt=turn + pair.prompt)
        for pair, turn in zip(step.pairs, turns)
    ]
    asked = SimpleNamespace(**vars(step) | {"pairs": pairs})
    ours, before = our_step(asked, settings()), our_step(step, settings())
    assert_same_step(ours, plain_step(asked, settings()))
    assert ours[0]["kl_chosen"] != pytest.approx(before[0]["kl_chosen"], rel=1e-3)
    whole = [dataclasses.replace(pair, prompt=pair.teacher_prompt) for pair in pairs]
    for is_teacher, alike in ((False, step.pairs), (True, whole)):
        sums = sequence_logprobs(
            step.teacher, pairs, [ALL], settings(), ONE, is_teacher=is_teacher
        )
        wanted = sequence_logprobs(step.teacher, alike, [ALL], settings(), ONE)
        for i in ALL:
            assert sums[i] == pytest.approx(wanted[i], rel=1e-12)


def test_what_the_log_shows_of_a_step(step):
    """Log-probabilities a token of both sides under the three models; teacher and reference are the
    cached ones."""
    metrics, _ = our_step(step, settings())
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in step.pairs])
    own = sequence_logprobs(step.student, step.pairs, [ALL], settings(), ONE)
    sums = [
        ("student", np.array([own[i] for i in ALL])),
        ("reference", step.cached_logprobs[:, 0]),
        ("teacher", step.cached_logprobs[:, 1]),
    ]
    for who, values in sums:
        for side, name in enumerate(("chosen", "rejected")):
            assert metrics[f"{who}_{name}"] == pytest.approx(
                values[:, side].sum() / lengths[:, side].sum(), rel=1e-12
            )
    margins = 0.4 * np.diff((sums[0][1] - sums[1][1])[:, ::-1])
    assert metrics["margin"] == pytest.approx(margins.mean(), rel=1e-9)
    assert (
        metrics["accuracy"] == pytest.approx((margins > 0).mean(), abs=1e-6)
        and 0 < metrics["accuracy"] < 1
    )
    assert [metrics["chosen_tokens"], metrics["rejected_tokens"]] == (lengths.sum(0) / 5).tolist()


def test_without_a_teacher_only_the_other_terms_are_left(step):
    cfg = settings(kl_chosen=0.0, kl_rejected=0.0)
    metrics = metrics_of_step(step.student, None, step.pairs, ALL, step.cached_logprobs, cfg)
    assert metrics["loss"] == pytest.approx(plain_step(step, cfg)[0]["loss"], rel=1e-9)
    assert not {"kl_chosen", "kl_rejected"} & metrics.keys()


@pytest.mark.parametrize("k", [3, V])
def test_top_k_is_the_divergence_over_buckets(step, tmp_path, k):
    """What sequence_logprobs() wrote to disk, read back in another order of pairs; with k = V it is
    the full divergence."""
    cfg, batch = settings(top_k=k), np.array([3, 0, 4, 1])
    new = TopK(tmp_path, step.pairs, k, new=True)
    sequence_logprobs(step.teacher, step.pairs, [ALL[:2], ALL[2:]], cfg, ONE, new)
    top_k = TopK(tmp_path, step.pairs, k)
    for array, dtype in ((top_k.ids, np.int32), (top_k.logprobs, np.float16)):
        assert array.shape == (sum(top_k.lengths), k) and array.dtype == dtype
    expected = plain_step(step, cfg, divergence_of_trl if k == V else buckets_of(k), batch)
    ours = our_step(step, cfg, top_k, batch)
    assert_same_step(ours, expected, rtol=2e-3, atol=2e-3)  # half precision on disk


@pytest.mark.parametrize("micro_pairs", [1, 2, 5])
def test_micro_batches_do_not_change_the_step(step, micro_pairs):
    """Denominators are the whole batch's, so passes of uneven lengths add up to it."""
    assert_same_step(our_step(step, settings(micro_pairs=micro_pairs)), our_step(step, settings()))


@pytest.mark.parametrize("micro_pairs", [0, 1])
def test_the_first_step_begins_at_log_2(step, micro_pairs):
    """In fp32 to the last bit: the reference's scores are the very numbers that the student then
    has, for its rows are packed as the student's (on some devices the rest of a row decides how a
    sum is rounded)."""
    model, cfg, batch, rows = (
        new_model(32, 0).float(),
        settings(micro_pairs=micro_pairs),
        ALL[:4],
        [],
    )
    model.register_forward_pre_hook(lambda model, arguments: rows.append(arguments[0].tolist()))
    sums = sequence_logprobs(model, step.pairs, [batch], cfg, ONE)
    cached_logprobs = np.array([[sums[i]] * 2 for i in batch])
    metrics = metrics_of_step(model, step.teacher.float(), step.pairs, batch, cached_logprobs, cfg)
    step.teacher.double()
    assert (
        metrics["dpo"] == np.float32(math.log(2))
        and metrics["margin"] == 0
        and metrics["accuracy"] == 0
    )
    assert (
        len(rows) == 2 * (4 if micro_pairs else 1)
        and rows[: len(rows) // 2] == rows[len(rows) // 2 :]
    )


def test_displacement_and_its_cure():
    """Two answers that differ in one token, whose output vectors look alike: preference alone
    widens the margin by pushing both down, y+ too; with the teacher's distribution on both, y+
    becomes what it is for the teacher."""
    U = 2 * torch.eye(20)  # output matrix: the tokens have nothing in common …
    own, U[5] = U[5].clone(), U[5] + 1.5 * U[4]  # … but 4 and 5, the ends of y+ and y-
    before, targets = torch.tensor([0, 1, 2, 3] * 2), torch.tensor([1, 2, 3, 4, 1, 2, 3, 5])
    # Hidden states after tokens 0 … 3: all that is trained.
    start, teacher = U[1:5].clone(), U[1:5].clone()
    start[3], teacher[3] = 0.75 * U[4] - 0.375 * own, 1.25 * U[4] - 2 * own

    def sums(states):
        return linear_logprobs(states[before], U, targets).view(1, 2, 4).sum(-1)

    def train(weight_of_kl: float):
        """log p of y+ and y- after training."""
        states = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([states], lr=0.05)
        for _ in range(300):
            divergence = linear_logprobs_kl(states[before], U, targets, teacher[before], U)[1]
            side = torch.arange(8) // 4
            kl = sum(distillation_loss(divergence, side == i, 4) for i in (CHOSEN, REJECTED))
            (preference_loss(sums(states), sums(start), 0.5).mean() + weight_of_kl * kl).backward()
            optimizer.step()
            optimizer.zero_grad()
        return sums(states.detach())[0]

    first, goal = sums(start)[0], sums(teacher)[0]
    alone, dual = train(0.0), train(10.0)
    margin = lambda logprobs: logprobs[CHOSEN] - logprobs[REJECTED]
    assert margin(alone) > margin(first) + 2 and alone[CHOSEN] < first[CHOSEN] - 1
    assert margin(dual) > margin(first) + 2
    assert abs(dual[CHOSEN] - goal[CHOSEN]) < 0.2 < abs(first[CHOSEN] - goal[CHOSEN])


# ---- samples and pairs


def answer(text: str, score: float | None, logprob=-1.0, finish="stop") -> dict:
    return {
        "text": text,
        "score": score,
        "finish_reason": finish,
        "tokens": [*text.encode()],
        "logprob": logprob,
    }


PROBLEMS = [
    (task, problem)
    for task in ("math", "form")
    for problem in registry.family(task).problems("train", 2, 1)
]


def test_a_killed_sampling_goes_on(monkeypatch, tmp_path):
    """Only what is missing is drawn again, and is as it was, in pieces of any size."""
    problems = [("math", problem) for problem in registry.family("math").problems("train", 130, 1)]
    drawn, loaded = [], []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    monkeypatch.setattr(
        hf, "load", lambda *arguments, checked: loaded.append(arguments) or (None, None))
    most = [99]

    def draw(sampler, tokenizer, some, cfg, seed, numbers, system):
        if len(drawn) == most[0]:
            raise KeyboardInterrupt
        drawn.append((seed, *numbers))
        samples = [
            [answer(f"{problem.key} {seed} {number}", 1.0)]
            for (_, problem), number in zip(some, numbers)
        ]
        yield dict(enumerate(samples))

    monkeypatch.setattr(sample_pairs, "sample_and_score", draw)

    def samples(dist=ONE, **changes):
        drawn.clear(), loaded.clear()
        cfg = DistillConfig(seed=2, **changes)
        kept = sample_pairs.sample_checkpoint(
            "student", tmp_path / "model", problems, cfg, tmp_path, dist
        )
        rows = {row["number"]: row["samples"] for row in common.read_kept_lines(*kept)}
        return [rows[number] for number in sorted(rows)]

    chunks = [(2_000_000, *range(64)), (2_000_001, *range(64)), (2_000_002, 0, 1)]
    whole = samples()
    assert [each[0]["text"].split(" 2000")[0] for each in whole] == [
        problem.key for _, problem in problems
    ]
    assert drawn == chunks and len(loaded) == 1
    (path,) = (tmp_path / "samples").iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:100]) + lines[100][:30])  # killed while it was written
    assert samples() == whole and drawn == chunks[1:]
    assert samples() == whole and not drawn and not loaded
    path.unlink()
    most[0] = 1
    with pytest.raises(KeyboardInterrupt):  # in the second piece
        samples()
    most[0] = 99
    assert samples() == whole and drawn == chunks[1:]
    assert len(path.read_text().splitlines()) == 130  # no problem twice
    samples(temperature=0.5), samples(samples=str(tmp_path / "shared"))
    assert (
        len(drawn) == 3
        and len([*(tmp_path / "samples").iterdir()]) == 2
        and (tmp_path / "shared").is_dir()
    )
    path.unlink()
    assert samples(max_rows=80) == whole  # smaller pieces, the same draws
    assert [piece[1:] for piece in drawn[:4]] == [
        tuple(range(16)), tuple(range(16, 32)), tuple(range(32, 48)), tuple(range(48, 64))]


def make_pairs(
    monkeypatch, folder, by_teacher: list, by_student: list, same_tokenizer=True, gap=0.5
) -> list[dict]:
    """What pairs.jsonl then says."""
    for who, samples in (("teacher", by_teacher), ("student", by_student)):
        rows = [{"number": number, "samples": each} for number, each in enumerate(samples)]
        common.keep_lines(folder / f"{who}.0.jsonl", rows[:1])
        common.keep_lines(folder / f"{who}.1.jsonl", rows[1:])
    monkeypatch.setattr(sample_pairs, "sample_checkpoint", lambda who, *_: (folder, who))
    teacher = sample_pairs.Teacher(folder / "big", same_tokenizer)
    path = sample_pairs.make_pairs(
        PROBLEMS, folder / "sft", teacher, DistillConfig(gap=gap), folder / "run", ONE
    )
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_make_pairs(monkeypatch, tmp_path, capsys):
    """Of four prompts the first and the last give a pair; the others are counted, by task and
    reason."""
    by_teacher = [
        [answer("no", 0.0), answer("yes", 1.0, -2.0), answer("likelier yes", 1.0)],
        [answer("no", 0.0)],
        [answer("yes", 1.0)] * 2,
        [answer("yes", 1.0)],
    ]
    by_student = [
        [answer("wrong", 0.0), answer("right", 1.0, -0.1)],
        [answer("wrong", 0.0)] * 2,
        [answer("right", 1.0), answer("endless", 0.0, finish="length")],
        [answer("half", 0.5), answer("unscored", None, -0.1)],
    ]
    first, last = make_pairs(monkeypatch, tmp_path, by_teacher, by_student)
    question = PROBLEMS[0][1].question
    assert first == {
        "number": 0,
        "task": "math",
        "prompt": question,
        "chosen": {
            "text": "likelier yes",
            "score": 1.0,
            "logprob": -1.0,
            "tokens": [*b"likelier yes"],
            "writer": str(tmp_path / "big"),
        },
        "rejected": {
            "text": "wrong",
            "score": 0.0,
            "logprob": -1.0,
            "tokens": [*b"wrong"],
            "writer": str(tmp_path / "sft"),
        },
    }
    assert (last["number"], last["task"], last["rejected"]["text"]) == (3, "form", "half")
    header, *lines, wrote = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["task", "prompts", "pairs", "teacher", "student"]
    assert [line.split() for line in lines] == [
        "math 2 1 0.50 0.25 teacher never right 1".split(),
        "form 2 1 1.00 0.50 student never clearly worse 1".split(),
    ]
    assert wrote.startswith("the teacher wrote 28 tokens, the student ")


def test_tokens_of_another_tokenizer_are_not_kept(monkeypatch, tmp_path):
    """The student's own always are."""
    (record,) = make_pairs(
        monkeypatch,
        tmp_path,
        [[answer("yes", 1.0)]] * 4,
        [[answer("no", 0.0)]] + [[answer("yes", 1.0)]] * 3,
        same_tokenizer=False,
    )
    assert (
        "tokens" not in record["chosen"]
        and record["chosen"]["text"] == "yes"
        and record["rejected"]["tokens"]
    )


def test_no_pair_at_all(monkeypatch, tmp_path):
    with pytest.raises(
        UserError,
        match="no prompt gave a pair: the teacher must be right where the student is wrong",
    ):
        make_pairs(monkeypatch, tmp_path, [[answer("yes", 1.0)]] * 4, [[answer("yes", 1.0)]] * 4)


def refreshed(monkeypatch, folder, drawn: dict | None, step=0, **changes) -> list[list[int]]:
    """The rejected responses of two pairs after a refresh, when the student answers as in `drawn`,
    {problem's number: samples}; None: must not be asked."""

    def draw(sampler, tokenizer, problems, cfg, seed, numbers):
        assert sampler.model == "now"
        assert cfg.n_samples == (1 if cfg.negatives == "any" else 4)
        yield {place: drawn[PROBLEMS.index(each)] for place, each in enumerate(problems)}

    monkeypatch.setattr(sample_pairs, "sample_and_score", draw)
    cfg = DistillConfig(**dict(context=20, batch_pairs=2, refresh_every=2) | changes)
    run = SimpleNamespace(
        cfg=cfg, dist=ONE, folder=folder, tokenizer=None, unsharded_model=lambda: "now"
    )
    pairs = [Pair(number, "", [1, 2], [3], [4]) for number in (0, 3)]
    sample_pairs.refresh_negatives(run, PROBLEMS, pairs, step, 5, "key")
    assert [(pair.number, pair.prompt, pair.chosen) for pair in pairs] == [
        (0, [1, 2], [3]),
        (3, [1, 2], [3]),
    ]
    return [pair.rejected for pair in pairs]


def test_refresh_takes_what_is_clearly_worse(monkeypatch, tmp_path):
    """Where nothing is, the old one stays. A second call takes the same from disk: the student is
    not asked."""
    drawn = {0: [answer("right", 1.0), answer("bad", 0.0)], 3: [answer("right", 1.0)]}
    assert refreshed(monkeypatch, tmp_path, drawn) == [[*b"bad"], [4]]
    assert refreshed(monkeypatch, tmp_path, None) == [[*b"bad"], [4]]
    assert refreshed(monkeypatch, tmp_path, {0: [], 3: [answer("poor", 0.0)]}, step=2) == [
        [4],
        [*b"poor"],
    ]


def test_refresh_asks_only_for_pairs_that_are_due(monkeypatch, tmp_path):
    """One of two here; the last refresh looks no further than the last step."""
    for step, due in enumerate(loop.shuffled_indices(2, 0, 5, 0)):
        drawn = {(0, 3)[due]: [answer("bad", 0.0)]}
        new = refreshed(
            monkeypatch, tmp_path, drawn, step, batch_pairs=1, refresh_every=1 if step < 4 else 9
        )
        assert new[due] == [*b"bad"] and new[1 - due] == [4]


def test_refresh_takes_anything_that_fits(monkeypatch, tmp_path):
    """negatives="any": one sample, whatever it scores or how it ends; over-long ones are not
    taken."""
    drawn = {0: [answer("right", 1.0, finish="length")], 3: [answer("r" * 19, 1.0)]}
    assert refreshed(monkeypatch, tmp_path, drawn, negatives="any") == [[*b"right"], [4]]


# ---- whole runs

CONFIG = """
from mini import *
distill = dict(
    teacher="out/base/pretrain", pairs="pairs.jsonl", context=192, batch_pairs=8, epochs=2,
    lr=1e-3, max_new_tokens=8, save_every=2, keep=99, log_every=2, prompts=["1 + 1?"])
"""
N = 20  # pairs


def worked_pairs() -> list[dict]:
    """Right replies over corrupted ones; a model that was pre-trained for seconds samples no such
    pair."""
    rng, records = seeded_rng("pairs"), []
    for problem in registry.family("math").problems("train", N, 1):
        chosen, rejected = (
            as_reply(page.partition("Work:")[2])
            for page in (to_document(problem), pages.corrupt(problem, "wrong result", rng))
        )
        records.append(
            {"prompt": problem.question, "chosen": chosen, "rejected": rejected, "task": "math"}
        )
    return records


@pytest.fixture(scope="module")
def base(base):
    """With pairs, a config, and the end of an earlier stage of pre-training for the student to
    start from."""
    (base.folder / "mini_distill.py").write_text(CONFIG)
    (base.folder / "pairs.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in worked_pairs())
    )
    shutil.copytree(
        common.list_checkpoints(base.folder / "out/base/pretrain")[-2], base.folder / "start"
    )
    return base


def attempt(base, monkeypatch, *options: str) -> None:
    base.call(
        distill.main, "distill.py", "mini_distill.py", "--init_from=start", *options
    )


def train(base, run: str, *options: str, ranks: int = 0, config="mini_distill.py") -> str:
    return base.run(
        str(ROOT / "distill.py"),
        config,
        f"--name={run}",
        "--init_from=start",
        *options,
        ranks=ranks,
    )


def metrics(base, run: str) -> list[dict]:
    """Of each step, without what a clock or the machine decides."""
    return [
        {
            key: value
            for key, value in line.items()
            if key not in ("seconds", "tokens_per_s", "memory_gb")
        }
        for line in common.read_metrics(base.folder / "out" / run / "distill")
        if "loss" in line
    ]


QUICK = ["--distill.compare=false", "--distill.prompts=[]", "--evaluate.tasks=[]"]


@pytest.fixture(scope="module")
def whole(base) -> str:
    """What a run prints."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        attempt(base, patch, "--run=dpd")
    return printed.getvalue()


def test_what_a_user_sees(base, whole):
    folder, steps = base.folder / "out/dpd/distill", metrics(base, "dpd")
    assert f"\n{N} pairs; 5 steps of 8\n" in "\n" + whole and "before, in chat form" in whole
    assert (
        re.search(r"the teacher, [\d,]+ parameters\ntask ", whole) and "  > 1 + 1?\n  | " in whole
    )
    assert re.search(r"step +4/5 +80%  DPD +loss \d", whole)
    assert re.search(r"task +before +asked in +after +gain\nmath .* chat ", whole)
    assert (
        "python -m report mini_distill.py --run=dpd" in whole and not (folder / "loss.png").exists()
    )
    teacher = json.loads((folder / "teacher.json").read_text())
    assert teacher["math"]["n"] == 4 and teacher["cost"].keys() == {
        "step",
        "seconds",
        "command",
        "trained_tokens",
    }
    assert teacher["cost"]["trained_tokens"] > 10_000
    assert len(steps) == 5 and all(line.keys() == steps[0].keys() for line in steps)
    assert steps[0].keys() >= {
        "loss",
        "dpo",
        "kl_chosen",
        "kl_rejected",
        "nll",
        "margin",
        "accuracy",
        "chosen_tokens",
        "rejected_tokens",
        "tokens",
        "lr",
        "grad_norm",
        *(
            f"{who}_{side}"
            for who in ("student", "reference", "teacher")
            for side in ("chosen", "rejected")
        ),
    }
    assert all(
        np.isfinite([value for value in line.values() if isinstance(value, float)]).all()
        for line in steps
    )


def test_a_run_begins_at_log_2_and_learns(base, whole):
    first, *_, last = metrics(base, "dpd")
    assert first["dpo"] == np.float32(math.log(2)) and first["margin"] == 0
    assert first["student_chosen"] == first["reference_chosen"] != first["teacher_chosen"]
    assert last["margin"] > 0 and last["accuracy"] > 0.5
    assert all(last[f"kl_{side}"] < first[f"kl_{side}"] - 0.01 for side in ("chosen", "rejected"))


def cut(base, run: str, again: str, last: int) -> None:
    """What a machine that died leaves behind of a run: its checkpoints up to step `last`."""
    shutil.copytree(base.folder / "out" / run, base.folder / "out" / again)
    for path in common.list_checkpoints(base.folder / "out" / again / "distill"):
        if int(path.name[5:]) > last:
            shutil.rmtree(path)


def assert_same_end(base, run: str, again: str) -> None:
    assert metrics(base, again) == metrics(base, run)
    ends = [
        hf.load(base.folder / "out" / name / "distill")[0].parameters() for name in (again, run)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_resume_is_exact_to_the_bit(base, whole, monkeypatch, capsys):
    """From a step in the middle of an epoch; the reference is the start, not what the checkpoint
    holds, though its scores are lost."""
    cut(base, "dpd", "dpd-again", 2)
    next((base.folder / "out/dpd-again/distill").glob("logprobs-*.npy")).unlink()
    attempt(base, monkeypatch, "--run=dpd-again")
    output = capsys.readouterr().out
    assert "(step 2)" in output and "before, in chat form" not in output
    assert_same_end(base, "dpd", "dpd-again")


def test_a_run_may_be_made_longer(base, monkeypatch):
    """Two steps see 16 of the 20 pairs; when it goes on for five, the others get their scores too,
    and tokens."""
    options = ["--run=longer", "--distill.top_k=5", *QUICK]
    attempt(base, monkeypatch, "--distill.epochs=0.8", *options)
    assert len(metrics(base, "longer")) == 2
    attempt(base, monkeypatch, *options)
    steps = metrics(base, "longer")
    assert len(steps) == 5 and all(line["finite"] for line in steps)
    assert all(line["kl_chosen"] < 2 * steps[0]["kl_chosen"] for line in steps)


def test_two_ranks_take_the_same_steps(base, whole):
    """In passes of three pairs and one."""
    output = train(base, "dpd-ranks", "--distill.micro_pairs=3", *QUICK, ranks=2)
    assert "2 process(es)" in output
    ours, theirs = metrics(base, "dpd-ranks"), metrics(base, "dpd")
    for key in (
        "loss",
        "dpo",
        "kl_chosen",
        "kl_rejected",
        "margin",
        "grad_norm",
        "student_rejected",
        "chosen_tokens",
    ):
        assert [line[key] for line in ours] == pytest.approx(
            [line[key] for line in theirs], abs=1e-4
        ), key
    assert ours[0]["dpo"] == pytest.approx(math.log(2), abs=1e-6) and ours[0]["margin"] == 0


def test_top_k_from_disk(base, whole, monkeypatch):
    """With all of the vocabulary the steps are the same, to the precision of its files; also where
    a run goes on, and where the teacher's model is no longer there."""
    everything = f"--distill.top_k={hf.load(base.folder / 'start')[0].cfg.vocab_size}"
    attempt(base, monkeypatch, "--run=dpd-top", everything, *QUICK)
    for key in ("loss", "kl_chosen", "kl_rejected"):
        pairs_of = [[line[key] for line in metrics(base, run)] for run in ("dpd-top", "dpd")]
        assert pairs_of[0] == pytest.approx(pairs_of[1], abs=2e-3), key
    cut(base, "dpd-top", "dpd-top-again", 2)
    attempt(base, monkeypatch, "--run=dpd-top-again", everything, *QUICK)
    assert_same_end(base, "dpd-top", "dpd-top-again")


def test_new_negatives_in_a_run(base, monkeypatch):
    """Some are replaced at one refresh and not at the next: a run that died between two goes on
    with all of them."""
    problems, draw = (
        [("math", problem) for problem in registry.family("math").problems("train", N, 1)],
        sample_pairs.sample_and_score,
    )

    def scored(sampler, tokenizer, some, cfg, seed, numbers):
        """What the student really says, but a third of it is called right, another third each
        time."""
        for batch in draw(sampler, tokenizer, some, cfg, seed, numbers):
            yield {
                i: [
                    answer | {"score": float((i + seed) % 3 == 0), "finish_reason": "stop"}
                    for answer in answers
                ]
                for i, answers in batch.items()
            }

    monkeypatch.setattr(sample_pairs, "make_pairs", lambda *_: base.folder / "pairs.jsonl")
    monkeypatch.setattr(sample_pairs, "load_problems", lambda *_: problems)
    monkeypatch.setattr(sample_pairs, "sample_and_score", scored)
    options = [
        "--distill.pairs=",
        "--distill.problems={'math': 20}",
        "--distill.refresh_every=3",
        *QUICK,
    ]
    attempt(base, monkeypatch, "--run=fresh", *options)
    first, second = (
        {
            row["pair"]
            for row in map(json.loads, path.read_text().splitlines())
            if row["tokens"] is not None
        }
        for path in sorted((base.folder / "out/fresh/distill").glob("refresh-*/*"))
    )
    assert first - second and second - first
    steps = metrics(base, "fresh")
    # Samples have 8 tokens at most.
    assert all(line["rejected_tokens"] < line["chosen_tokens"] - 8 for line in steps)
    assert all(np.isfinite(line["reference_rejected"] + line["teacher_rejected"]) for line in steps)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-5) and steps[1]["margin"] != 0
    cut(base, "fresh", "fresh-again", 4)
    attempt(base, monkeypatch, "--run=fresh-again", *options)
    assert_same_end(base, "fresh", "fresh-again")


# ---- bad input


@pytest.fixture(scope="module")
def folders(base):
    """Teachers that do not fit: of another tokenizer, and with more rows in the embedding."""
    model, tokenizer = hf.load(base.folder / "out/base/pretrain")
    other = train_tokenizer(
        [record["chosen"] for record in worked_pairs()], TokenizerConfig(vocab_size=350)
    )
    for name, its, n in (("other", other, 384), ("wider", tokenizer, model.cfg.vocab_size + 64)):
        teacher = Transformer(dataclasses.replace(model.cfg, vocab_size=n))
        init_weights(teacher, 0)
        hf.export(teacher, its, base.folder / name)


PREFERENCE = ["--distill.kl_chosen=0", "--distill.kl_rejected=0"]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--distill.teacher=other"],
            "the teacher other has another tokenizer than start: its distribution is over other "
            "tokens. Set distill.kl_chosen=0 and distill.kl_rejected=0 (preference alone)",
        ),
        (["--distill.teacher=wider", *QUICK], "the teacher wider has a vocabulary of"),
        (["--distill.teacher=nowhere"], "nowhere is no checkpoint: neither a phase's folder"),
        (["--distill.teacher="], "distill.teacher must be named"),
        (
            [
                "--distill.teacher=",
                "--distill.problems={'math': 5}",
                "--distill.pairs=",
                *PREFERENCE,
            ],
            "distill.teacher must be named",
        ),
        (["--distill.pairs="], "distill needs either problems, {task: how many}, or pairs, a file"),
        (
            ["--distill.problems={'math': 5}"],
            "distill needs either problems, {task: how many}, or pairs, a file",
        ),
        (["--distill.pairs=none.jsonl"], "cannot read the pairs in none.jsonl"),
        (["--distill.margin=mean"], "distill.margin must be one of '', 'sum', 'token', not 'mean'"),
        (
            ["--distill.negatives=worst"],
            "distill.negatives must be one of 'worse', 'any', not 'worst'",
        ),
        (
            ["--distill.on_bad_line=ignore"],
            "distill.on_bad_line must be one of 'skip', 'stop', not 'ignore'",
        ),
        (["--distill.curve=square"], "distill.curve must be one of 'linear', "),
        (["--distill.top_k=5", "--distill.divergence=0.5"], "distill.top_k goes with divergence=0"),
        (["--distill.divergence=2"], "distill.divergence"),
        (["--distill.top_k=1000", *QUICK], "distill.top_k"),
        (
            ["--distill.top_k=5", "--distill.teacher=", *QUICK],
            "there is no out/bad/distill/top5_ids.npy: name distill.teacher, or put the file there",
        ),
        (["--distill.dpo=0", *PREFERENCE, *QUICK], "distill"),
        (["--distill.refresh_every=5"], "distill.refresh_every needs problems"),
        (["--distill.context=16"], "no pair in pairs.jsonl can be used; 20 longer than 16 tokens"),
        (
            ["--model.n_layers=3", *QUICK],
            "has n_layers = 2, this run's model has 3: set model.n_layers",
        ),
    ],
)
def test_bad_settings_are_one_line(base, folders, monkeypatch, capsys, options, message):
    shutil.rmtree(base.folder / "out/bad", ignore_errors=True)
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=bad", *options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and len(error) < 300


def test_another_tokenizer_will_do_for_preference_alone(base, folders, monkeypatch, capsys):
    """Up to --prepare, which stops before the training."""
    attempt(base, monkeypatch, "--run=other", "--distill.teacher=other", "--prepare", *PREFERENCE)
    assert capsys.readouterr().out == f"{N} pairs; 5 steps of 8\n"
    assert not common.list_checkpoints(base.folder / "out/other/distill")


def test_preference_alone_needs_no_teacher(base, monkeypatch, capsys):
    attempt(
        base,
        monkeypatch,
        "--run=dpo",
        "--distill.teacher=",
        "--distill.epochs=0.4",
        *PREFERENCE,
        *QUICK,
    )
    assert "pictures and tables: " in capsys.readouterr().out
    (line,) = metrics(base, "dpo")
    assert line["loss"] == line["dpo"] and "kl_chosen" not in line


def test_pairs_are_shared_out_evenly(base, monkeypatch, capsys):
    """The check of the number of processes comes before any of them waits for another."""
    monkeypatch.setattr(
        common, "init_distributed", lambda *_: common.Dist(0, 3, torch.device("cpu"), None)
    )
    with pytest.raises(SystemExit, match="2"):
        attempt(base, monkeypatch, "--run=bad")
    assert "distill.batch_pairs=8 is no multiple of the 3 processes" in capsys.readouterr().err
