"""The mixture: exact epochs, even interleaving, targets inside documents, the same global batches
at any world size."""

import json
import random
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from common import UserError
from data.text.corpus import prepare
from data.text.mixture import IGNORE, Mixture, PoolStream, branch, plan_stages, rows_before
from data.text.shards import CorpusConfig, read_pool
from data.text.tokenizer import TokenizerConfig, train_tokenizer


def stage(name="s", context=16, tokens=0, mixture={}, epochs={}):
    return SimpleNamespace(
        name=name, context=context, tokens=tokens, mixture=mixture, epochs=epochs, least_steps=0
    )


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Two pools of several shards; every document is made of one word of its own, so that it can be
    told in a batch."""
    folder = tmp_path_factory.mktemp("pools")
    tokenizer = train_tokenizer(["abc"], TokenizerConfig(kind="char"))
    tokenizer.save(folder / "abc.json")
    result = {}
    for name, n, seed in (("high", 60, 1), ("medium", 90, 2)):
        rng = random.Random(seed)
        texts = [chr(97 + i % 26) * rng.choice([1, 3, 10, 40, 90]) + str(i) for i in range(n)]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )
        pools = {name: [{"path": str(folder / f"{name}.jsonl")}]}
        cfg = CorpusConfig(pools=pools, val_fraction=0.0, shard_tokens=700)
        prepare(folder, TokenizerConfig(path=str(folder / "abc.json")), cfg, "make")
        result[name] = read_pool(folder / name, "train", tokenizer.hash)
        assert len(result[name]) > 2
    return result


def test_rows_before_is_the_sort_by_time():
    """Against sorting all rows by exact rational times."""
    for counts in ([3, 5], [1, 1, 1], [7, 0, 2], [4, 4, 13], [1, 100]):
        times = sorted(
            (Fraction(2 * k + 1, 2 * r), i) for i, r in enumerate(counts) for k in range(r)
        )
        for n in range(sum(counts) + 3):
            before = Counter(i for _, i in times[:n])
            assert rows_before(n, counts) == [before[i] for i in range(len(counts))], (n, counts)


def test_rows_before_at_the_size_of_the_report():
    counts = [3_200_000_000, 2_500_000_001]
    n = 2_345_678_901
    before = rows_before(n, counts)
    assert sum(before) == n and abs(before[0] - n * counts[0] / sum(counts)) < 2


def test_one_epoch_each_then_a_second_of_high(pools):
    """'One epoch high + one epoch medium, then high only': every training position exactly once,
    then high's once more."""
    sizes = {name: sum(s.n_tokens for s in shards) for name, shards in pools.items()}
    stages = [stage("diversity", epochs=dict(high=1, medium=1)), stage("high", epochs=dict(high=1))]
    plans = plan_stages(stages, sizes, batch_tokens=64)
    mixture = Mixture(pools, plans, seed=3)

    def pairs(name):  # every (token, next token in its document)
        counter = Counter()
        for shard in pools[name]:
            first = 0
            for end in shard.ends.astype(int):
                doc = shard.tokens[first:end].tolist()
                counter.update(zip(doc[:-1], doc[1:]))
                first = end
        return counter

    def trained(plan):
        counter = Counter()
        for step in range(plan.first_step, plan.end_step):
            b = mixture.batch(step)
            kept = b.targets != IGNORE
            counter.update(zip(b.tokens[kept].tolist(), b.targets[kept].tolist()))
        return counter

    assert trained(plans[0]) == pairs("high") + pairs("medium")
    assert trained(plans[1]) == pairs("high")


def test_epochs_are_shuffled_anew(pools):
    stream = PoolStream("high", pools["high"], seed=0, piece=64)
    first, second = (stream.read(epoch * stream.size, stream.size)[0] for epoch in (0, 1))
    assert sorted(first) == sorted(second) and not np.array_equal(first, second)
    other = PoolStream("high", pools["high"], seed=1, piece=64).read(0, stream.size)[0]
    assert sorted(first) == sorted(other) and not np.array_equal(first, other)


def test_targets_and_document_starts(pools):
    """Each target is the next token of the same document; a document starts with <s> unless its
    start is in an earlier row."""
    shards = pools["medium"]
    bos, eot = int(shards[0].tokens[0]), int(shards[0].tokens[int(shards[0].ends[0]) - 1])
    stream = PoolStream("medium", shards, seed=0, piece=1 << 20)
    tokens, targets, starts = stream.read(0, stream.size)
    position = np.arange(len(tokens))
    np.testing.assert_array_equal(tokens == bos, starts == position)
    np.testing.assert_array_equal(targets == IGNORE, tokens == eot)
    np.testing.assert_array_equal(targets[:-1][tokens[:-1] != eot], tokens[1:][tokens[:-1] != eot])
    np.testing.assert_array_equal(
        starts, np.maximum.accumulate(np.where(tokens == bos, position, 0))
    )


def test_pieces_of_long_documents(pools):
    """Cut into pieces, a document's tokens and targets stay the same; only the order and the starts
    change."""
    whole = PoolStream("high", pools["high"], seed=0, piece=1 << 20)
    cut = PoolStream("high", pools["high"], seed=0, piece=16)
    pairs = [
        Counter(zip(*(column.tolist() for column in s.read(0, s.size)[:2]))) for s in (whole, cut)
    ]
    assert pairs[0] == pairs[1]
    starts = cut.read(0, cut.size)[2]
    assert (np.arange(len(starts)) - starts).max() == 15


def test_any_world_size_sees_the_same_global_batch(pools):
    sizes = {name: sum(s.n_tokens for s in shards) for name, shards in pools.items()}
    plans = plan_stages(
        [stage(tokens=1000, mixture=dict(high=1, medium=2))], sizes, batch_tokens=80
    )
    mixture = Mixture(pools, plans, seed=5)
    for step in (0, 3, plans[-1].end_step - 1):
        alone = mixture.batch(step)
        for world in (2, 3, 7):
            parts = [mixture.batch(step, rank, world) for rank in range(world)]
            assert len({part.tokens.shape for part in parts}) == 1  # equally many rows, padded
            for column in ("tokens", "targets", "doc_start"):
                rows = [row.tobytes() for part in parts for row in getattr(part, column)]
                padding = Counter(rows) - Counter(row.tobytes() for row in getattr(alone, column))
                assert not Counter(row.tobytes() for row in getattr(alone, column)) - Counter(rows)
                assert sum(padding.values()) == world * parts[0].tokens.shape[0] - len(alone.tokens)
    again = Mixture(pools, plans, seed=5)  # no state: any order, any object
    np.testing.assert_array_equal(again.batch(3).tokens, mixture.batch(3).tokens)


def test_weights_count_tokens_and_contexts_change_without_loss(pools):
    sizes = {name: sum(s.n_tokens for s in shards) for name, shards in pools.items()}
    stages = [
        stage("a", tokens=999, mixture=dict(high=0.3, medium=0.7)),
        stage("b", 64, tokens=500, mixture=dict(high=1)),
    ]
    plans = plan_stages(stages, sizes, batch_tokens=64)
    assert plans[0].tokens == dict(high=300, medium=699)
    assert plans[1].start == dict(high=300)  # goes on at the very next token
    stream = PoolStream("high", pools["high"], seed=0, piece=64)
    expected = stream.read(300, 64)[0]
    np.testing.assert_array_equal(
        Mixture(pools, plans, seed=0).batch(plans[1].first_step).tokens[0], expected
    )
    assert sum(plan_stages(stages, sizes, 64, scale=0.5)[0].tokens.values()) == 500


def test_a_warm_up_keeps_its_steps_in_a_short_run():
    """Up to a fifth of the run, and up to what the table gives it; the run's length stays."""
    def tokens(scale, least_steps, warmup=1000):
        stages = [
            stage("warmup", tokens=warmup, mixture=dict(high=1)),
            stage("stable", tokens=80_000, mixture=dict(high=1)),
            stage("decay", tokens=19_000, mixture=dict(high=1)),
        ]
        stages[0].least_steps = least_steps
        plans = plan_stages(stages, dict(high=10**6), batch_tokens=64, scale=scale)
        return [plan.tokens["high"] for plan in plans]

    assert tokens(1.0, 10) == tokens(1.0, 0) == [1000, 80_000, 19_000]
    assert tokens(0.1, 0) == [100, 8000, 1900]
    assert tokens(0.1, 10) == [640, 7564, 1796] and sum(tokens(0.1, 10)) == 10_000
    assert tokens(0.1, 1000) == [1000, 7273, 1727]  # all that the table gives it
    assert tokens(0.01, 1000)[0] == 200             # a fifth
    assert tokens(2.0, 10) == [2000, 160_000, 38_000]


def test_branch_goes_on_where_the_pools_stood(pools):
    sizes = {name: sum(s.n_tokens for s in shards) for name, shards in pools.items()}
    stages = [
        stage("stable", tokens=1600, mixture=dict(high=1, medium=1)),
        stage("more", tokens=640, mixture=dict(high=1)),
        stage("decay", tokens=320, mixture=dict(high=1)),
    ]
    plans = plan_stages(stages, sizes, batch_tokens=64)
    branched = branch(plans, 10, "decay")
    assert [(p.name, p.first_step, p.end_step) for p in branched] == [
        ("stable", 0, 10),
        ("decay", 10, 15),
    ]
    assert branched[1].start["high"] == plans[0].positions(10)["high"] == 320
    a, b = Mixture(pools, plans, 0), Mixture(pools, branched, 0)
    for step in range(10):
        np.testing.assert_array_equal(a.batch(step).tokens, b.batch(step).tokens)
    taken = [sum(plan.taken().values()) for plan in branched]
    assert taken == [640, 320]  # of 1600 tokens of the first stage a branch at step 10 takes these
    assert [plan.taken() for plan in plans] == [plan.tokens for plan in plans]
    with pytest.raises(UserError, match="cannot branch"):
        branch(plans, 10, "nowhere")


def test_padding_sees_nothing_and_is_seen_by_nothing(pools):
    """Documents of one token, so that doc_start never falls along a row: kernels skip by it."""
    sizes = {name: sum(s.n_tokens for s in shards) for name, shards in pools.items()}
    plans = plan_stages([stage(tokens=70, mixture=dict(high=1))], sizes, batch_tokens=64)
    last = Mixture(pools, plans, seed=0).batch(plans[0].end_step - 1)
    padding = np.flatnonzero((last.targets == IGNORE).all(0))
    assert len(padding) > 1 and (np.diff(last.doc_start) >= 0).all()
    rows = last.doc_start[:, padding[-1]]
    np.testing.assert_array_equal(rows, padding[-1])


def test_sources_name_the_shards(pools):
    sizes = {name: sum(s.n_tokens for s in shards) for name, shards in pools.items()}
    mixture = Mixture(
        pools, plan_stages([stage(tokens=640, mixture=dict(high=1))], sizes, 64), seed=0
    )
    named = mixture.sources(2)
    assert named and set(named) <= {str(s.path) for s in pools["high"]}


def test_errors_are_named(pools):
    with pytest.raises(UserError, match="pool 'hihg'"):
        plan_stages([stage(tokens=10, mixture=dict(hihg=1))], dict(high=100), 64)
    with pytest.raises(UserError, match="multiple of its context"):
        plan_stages([stage(tokens=10, context=48, mixture=dict(high=1))], dict(high=100), 64)
