"""Oracles: a loop over all rows for first fit, TRL's packing, single conversations for loss and
gradient of rows.
"""

import time
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import pack_dataset

from common import UserError
from data.chat.conversations import Pool
from data.chat.packing import (
    Stream,
    _interleave,
    _read_stream,
    build_batch,
    first_fit_decreasing,
    plan_stages,
)
from data.text.mixture import IGNORE
from model import ModelConfig, init_weights, meta_model


def stage(name="s", context=64, mixture={}, conversations=0, trained_tokens=0, epochs={}):
    return SimpleNamespace(
        name=name,
        context=context,
        mixture=mixture,
        conversations=conversations,
        trained_tokens=trained_tokens,
        epochs=epochs,
    )


def make_pool(lengths, seed: int, vocab: int = 1000) -> Pool:
    """Random tokens, none of them 0; the first third of a conversation has weight 0, the rest 0,
    0.5 or 1.
    """
    rng = np.random.default_rng(seed)
    weights = [
        np.where(np.arange(n) < -(-n // 3), 0, rng.choice([0, 0.5, 1], n, p=[0.1, 0.2, 0.7]))
        for n in lengths
    ]
    return Pool(
        rng.integers(1, vocab, sum(lengths)).astype(np.uint32),
        np.concatenate(weights).astype(np.float16),
        np.cumsum(lengths),
    )


def realistic(n: int, context: int, seed: int = 0) -> np.ndarray:
    """Lengths of conversations: lognormal around an eighth of the context, a few at its end."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(context / 8), 1.0, n))
    return np.clip(lengths, 8, context).astype(np.int64)


@pytest.fixture(scope="module")
def pools() -> dict[str, Pool]:
    return {
        "math": make_pool(np.random.default_rng(1).integers(6, 64, 150), 1),
        "code": make_pool(np.random.default_rng(2).integers(6, 64, 70), 2),
    }


def found(plan, pools, rank: int = 0, world: int = 1) -> list[tuple]:
    """(tokens, targets, weights) of each conversation in the batches of a plan, told by doc_start
    alone.
    """
    conversations = []
    for step in range(plan.first_step, plan.end_step):
        b = build_batch(plan, pools, step, rank, world)
        assert b.tokens.shape == (-(-plan.rows // world), plan.context)
        for columns in zip(b.tokens, b.targets, b.weights, b.doc_start):
            borders = np.flatnonzero(columns[3] == np.arange(plan.context))
            pieces = zip(*(np.split(column, borders[1:]) for column in columns[:3]))
            conversations += [
                tuple(tuple(c.tolist()) for c in piece) for piece in pieces if piece[0][0] != 0
            ]
    return conversations


def wanted(pool: Pool, numbers=None) -> Counter:
    """The same of a pool's conversations, by a loop."""
    counter = Counter()
    for i in range(len(pool.ends)) if numbers is None else numbers:
        tokens, weights = (column.tolist() for column in pool.conversation(i))
        following = [(t, w) if w else (IGNORE, 0) for t, w in zip(tokens[1:], weights[1:])] + [
            (IGNORE, 0)
        ]
        counter[tuple(tokens), *zip(*following)] += 1
    return counter


def test_first_fit_is_the_loop_over_all_rows():
    rng = np.random.default_rng(0)
    for n, size in [(0, 10), (1, 10), (2, 1), (60, 10), (200, 50), (200, 1000)]:
        lengths = rng.integers(1, size + 1, n)
        rows, room = [], []
        for i in sorted(range(n), key=lambda i: (-lengths[i], i)):
            row = next((r for r in range(len(rows)) if room[r] >= lengths[i]), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(size)
            rows[row].append(i)
            room[row] -= lengths[i]
        assert first_fit_decreasing(lengths, size) == rows


def test_packing_is_fast():
    begin = time.process_time()
    first_fit_decreasing(realistic(100_000, 32768), 32768)
    assert time.process_time() - begin < 5  # takes half a second; the loop would take minutes


def test_fill_is_that_of_trl():
    context = 512
    lengths = realistic(5000, context)
    theirs = pack_dataset(
        Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), context, "bfd"
    )
    theirs = lengths.sum() / (len(theirs) * context)
    ours = lengths.sum() / (len(first_fit_decreasing(lengths, context)) * context)
    (plan,) = plan_stages(
        [stage(context=context, epochs=dict(a=1))], {"a": make_pool(lengths, 0)}, 8 * context, 0
    )
    assert plan.tokens == lengths.sum() and plan.fill == plan.tokens / (len(plan.ends) * context)
    assert ours > theirs - 0.005 and plan.fill > theirs - 0.005 and plan.fill > 0.97


def test_an_epoch_holds_each_conversation_once_and_whole(pools):
    stages = [
        stage("both", epochs=dict(math=1, code=2)),
        stage("more", context=128, epochs=dict(math=0.5)),
        stage("rest", epochs=dict(math=0.5)),
    ]
    first, more, rest = plan_stages(stages, pools, batch_tokens=256, seed=3)
    assert Counter(found(first, pools)) == wanted(pools["math"]) + wanted(pools["code"]) + wanted(
        pools["code"]
    )
    assert Counter(found(more, pools) + found(rest, pools)) == wanted(
        pools["math"]
    )  # goes on where it left off
    assert (
        first.epochs == dict(math=1, code=2)
        and more.epochs == dict(math=0.5)
        and more.first_step == first.end_step
    )
    assert (first.rows, more.rows, first.dropped, first.cut) == (4, 2, 0, 0)
    assert first.trained == sum(
        sum(w > 0 for w in weights) for _, _, weights in found(first, pools)
    )


def test_loss_and_gradient_are_those_of_single_conversations(pools):
    """The real model in float64: packed, and each conversation alone without a doc_start."""
    (plan,) = plan_stages(
        [stage(mixture=dict(math=1, code=1), conversations=12)], pools, batch_tokens=1024, seed=0
    )
    model = (
        meta_model(
            ModelConfig(
                n_layers=2,
                hidden_size=32,
                ffn_size=64,
                n_heads=2,
                n_kv_heads=1,
                head_dim=16,
                vocab_size=1000,
            )
        )
        .double()
        .to_empty(device="cpu")
    )
    init_weights(model, 0)

    def loss_and_gradient(rows):
        loss = 0
        for tokens, targets, weights, doc_start in rows:
            losses = torch.nn.functional.cross_entropy(
                (model(tokens, doc_start) @ model.lm_head.weight.T).flatten(0, 1),
                targets.flatten(),
                reduction="none",
            )
            loss = loss + (losses * weights.flatten()).sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    b = build_batch(plan, pools, 0)
    assert plan.n_steps == 1 and (b.tokens == 0).any()
    packed = loss_and_gradient(
        [tuple(map(torch.from_numpy, (b.tokens, b.targets, b.weights, b.doc_start)))]
    )
    single = []
    for k, i in zip(plan.pool, plan.conversation):
        tokens, weights = (
            torch.from_numpy(c.astype(float)) for c in pools[["math", "code"][k]].conversation(i)
        )
        single.append((tokens[None, :-1].long(), tokens[None, 1:].long(), weights[None, 1:], None))
    for ours, theirs in zip(packed, loss_and_gradient(single), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_ranks_share_the_global_batch(pools):
    (plan,) = plan_stages([stage(epochs=dict(math=1, code=1))], pools, batch_tokens=5 * 64, seed=0)
    assert len(plan.ends) % 5  # the last step has padding rows
    for world in (2, 3, 7):
        parts = [found(plan, pools, rank, world) for rank in range(world)]
        assert Counter(sum(parts, [])) == Counter(found(plan, pools))
    empty = build_batch(plan, pools, 0, rank=6, world=7)
    assert not empty.tokens.any() and (empty.targets == IGNORE).all() and not empty.weights.any()
    assert (empty.doc_start == np.arange(64)).all()


def test_a_batch_is_a_pure_function(pools):
    stages = [
        stage("a", mixture=dict(math=2, code=1), conversations=100),
        stage("b", epochs=dict(code=1)),
    ]
    plans, again, other = (
        plan_stages(stages, pools, batch_tokens=256, seed=seed) for seed in (0, 0, 1)
    )
    last = plans[1].end_step - 1
    for column in ("tokens", "targets", "weights", "doc_start"):  # resumed, at the last step first
        np.testing.assert_array_equal(
            getattr(build_batch(again[1], pools, last), column),
            getattr(build_batch(plans[1], pools, last), column),
        )
    assert found(plans[0], pools) == found(again[0], pools) != found(other[0], pools)
    assert Counter(found(plans[0], pools)) != Counter(
        found(other[0], pools)
    )  # another seed takes others


def test_each_epoch_has_an_order_of_its_own():
    first, second = np.split(_read_stream(Stream("a", 50, 0), 100, seed=0), 2)
    for other in (
        second,
        _read_stream(Stream("a", 50, 0), 50, seed=1),
        _read_stream(Stream("b", 50, 0), 50, seed=0),
    ):
        assert sorted(first) == sorted(other) == list(range(50)) and (first != other).any()
    np.testing.assert_array_equal(
        _read_stream(Stream("a", 50, 30), 40, seed=0), [*first[30:], *second[:20]]
    )


def test_interleaving_is_the_sort_by_time():
    """Against sorting by exact rational times; numbers are their own pool's stream, whatever lies
    between.
    """
    for shares in ([3, 5], [1, 1, 1], [1, 0, 40], [0.25, 0.5]):
        streams = [Stream(f"pool {i}", 7 + i, 5 * i) for i in range(len(shares))]
        for n in (0, 1, 2, 9, 50):
            pool, conversation = _interleave(streams, shares, n, seed=0)
            times = sorted(
                (Fraction(2 * k + 1, 2) / Fraction(s), i)
                for i, s in enumerate(shares)
                if s
                for k in range(60)
            )
            assert pool.tolist() == [i for _, i in times[:n]]
            for i in range(len(shares)):
                alone = _interleave(streams[i : i + 1], [1], int((pool == i).sum()), seed=0)[1]
                np.testing.assert_array_equal(conversation[pool == i], alone)


def test_a_stage_is_as_long_as_it_says(pools):
    (by_count,) = plan_stages(
        [stage(mixture=dict(math=0.3, code=0.1), conversations=200)], pools, 256, seed=0, scale=0.6
    )
    assert np.bincount(by_count.pool).tolist() == [90, 30] and by_count.epochs == dict(
        math=90 / 150, code=30 / 70
    )
    for n in (1, 500, 100_000):
        (plan,) = plan_stages(
            [stage(mixture=dict(math=1, code=1), trained_tokens=2 * n)],
            pools,
            256,
            seed=0,
            scale=0.5,
        )
        count = len(plan.pool)
        fewer = [
            plan_stages([stage(mixture=dict(math=1, code=1), conversations=c)], pools, 256, seed=0)[
                0
            ].trained
            for c in (count, count - 1)
            if c
        ]
        assert plan.trained == fewer[0] >= n and (count == 1 or fewer[1] < n)


def test_long_conversations_are_dropped_or_cut():
    pool = make_pool(
        [30, 40, 100, 50, 200, 33, 95], 0
    )  # the long ones' weights begin at 34, 67 and 32
    plans = {
        how: plan_stages(
            [stage(context=50, epochs=dict(a=1))], {"a": pool}, 100, seed=0, over_long=how
        )[0]
        for how in ("drop", "cut")
    }
    dropped, cut = plans["drop"], plans["cut"]
    assert (dropped.dropped, dropped.cut, cut.dropped, cut.cut) == (3, 0, 1, 2)
    assert Counter(found(dropped, {"a": pool})) == wanted(pool, [0, 1, 3, 5])
    begun = [tuple(column[:50] for column in pool.conversation(i)) for i in (0, 1, 2, 3, 5, 6)]
    shortened = Pool(
        *map(np.concatenate, zip(*begun)), np.cumsum([len(tokens) for tokens, _ in begun])
    )
    assert (
        Counter(found(cut, {"a": pool})) == wanted(shortened)
        and cut.trained == shortened.trained.sum()
    )


@pytest.mark.parametrize(
    "wrong, why",
    [
        (dict(mixture=dict(maht=1), conversations=9), "pool 'maht'; there are math, code"),
        (dict(mixture=dict(math=1), conversations=9, context=48), "no multiple of its context 48"),
        (dict(mixture=dict(math=1)), "either a mixture and one of"),
        (
            dict(mixture=dict(math=1), conversations=9, trained_tokens=9),
            "either a mixture and one of",
        ),
        (dict(mixture=dict(math=1), epochs=dict(math=1)), "or epochs alone"),
        (dict(conversations=9), "either a mixture and one of"),
        (dict(mixture=dict(math=-1), conversations=9), "must be at least 0"),
        (dict(mixture=dict(math=0), conversations=9), "and one above"),
        (dict(epochs=dict(math=0.001)), "has nothing in it: of its 0 conversations"),
        (
            dict(mixture=dict(math=1), trained_tokens=9, context=4),
            "every conversation of math is longer than its c.* 4",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_laid_out_is_named(pools, wrong, why):
    with pytest.raises(UserError, match=why):
        plan_stages([stage(**wrong)], pools, batch_tokens=64, seed=0)


def test_over_long_is_one_of_two(pools):
    with pytest.raises(UserError, match="over_long is 'split'; it must be 'drop' or 'cut'"):
        plan_stages([], pools, 64, 0, over_long="split")
