"""Which tokens each batch holds: a pure function of (seed, step, rank, world size).

So a resumed run needs no saved iterator, any world size sees the same global batches, and a batch can be looked at
again after the fact. Three layers:
* PoolStream: a pool as an endless stream of tokens. Each epoch is a permutation of the pool's documents.
* MixtureStage: how many tokens a stage takes from each pool; its rows are interleaved evenly and exactly.
* Mixture: the batch of a step, packed rows with doc_start (attention stays inside a document).

FG-WSD (arXiv 2512.06266, section 2) is a list of stages; the report gives no data order inside a stage: our choice.
"""
import zlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np

from common import UserError
from data.text.corpus import Shard
from schedule import Stage, stage_at

IGNORE = -100  # target of a position that is not trained: the last token of a document, and padding
WINDOW = 16    # shards whose documents are shuffled together; bounds the memory of a shuffle


@dataclass
class Batch:
    """Rows of one rank: tokens (B, T) int64, targets (B, T) int64 (IGNORE: not trained), doc_start (B, T) int32."""
    tokens: np.ndarray
    targets: np.ndarray
    doc_start: np.ndarray


@dataclass
class _Window:
    """Pieces of documents in shuffled order."""
    shard: np.ndarray  # number of the shard
    first: np.ndarray  # first token in it
    last: np.ndarray   # one past the last
    final: np.ndarray  # whether the piece ends its document
    ends: np.ndarray   # running sum of the lengths


class PoolStream:
    """A pool's documents, reshuffled each epoch, as one endless stream of tokens.

    Shards are permuted, and documents are permuted within windows of WINDOW shards. A document longer than `piece`
    tokens is cut into pieces of that length, which are shuffled like documents: else a book would fill whole batches.
    """

    def __init__(self, name: str, shards: list[Shard], seed: int, piece: int):
        self.shards, self.piece = shards, piece
        self.seed = [seed, zlib.crc32(name.encode())]
        self.size = sum(shard.n_tokens for shard in shards)  # tokens in an epoch
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._orders: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}

    def read(self, position: int, n: int, touched: set | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets (int64) and document starts (int32, relative to `position`) of n stream positions.

        touched, if given, collects the paths of the shards that were read.
        """
        tokens = np.empty(n, np.int64)
        targets = np.empty(n, np.int64)
        starts = np.empty(n, np.int32)
        filled = 0
        while filled < n:
            window, offset = self._locate(position + filled)
            i = int(np.searchsorted(window.ends, offset, side="right"))
            offset -= int(window.ends[i - 1]) if i else 0  # inside piece i
            while filled < n and i < len(window.ends):
                shard = self.shards[window.shard[i]]
                first, last = int(window.first[i]) + offset, int(window.last[i])
                take = min(last - first, n - filled)
                tokens[filled:filled + take] = shard.tokens[first:first + take]
                targets[filled:filled + take - 1] = tokens[filled + 1:filled + take]
                ended = first + take == last and window.final[i]  # what follows is another document
                targets[filled + take - 1] = IGNORE if ended else shard.tokens[first + take]
                starts[filled:filled + take] = filled
                if touched is not None:
                    touched.add(str(shard.path))
                filled, offset, i = filled + take, 0, i + 1
        return tokens, targets, starts

    def _locate(self, position: int) -> tuple[_Window, int]:
        """The window that holds a stream position, and the offset of the position in it."""
        epoch, offset = divmod(position, self.size)
        if epoch not in self._orders:
            order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.shards))
            groups = [order[i:i + WINDOW] for i in range(0, len(order), WINDOW)]
            ends = np.cumsum([sum(self.shards[s].n_tokens for s in group) for group in groups])
            self._orders = {epoch: (groups, ends)}
        groups, ends = self._orders[epoch]
        number = bisect_right(ends, offset)
        offset -= int(ends[number - 1]) if number else 0
        if (epoch, number) not in self._windows:
            self._windows[epoch, number] = self._shuffle(epoch, number, groups[number])
            while len(self._windows) > 2:  # this one and the one that a batch may begin in
                self._windows.popitem(last=False)
        return self._windows[epoch, number], offset

    def _shuffle(self, epoch: int, number: int, group: np.ndarray) -> _Window:
        parts = []
        for s in group:
            last = self.shards[s].ends.astype(np.int64)
            first = np.concatenate([[0], last[:-1]])
            counts = -(-(last - first) // self.piece)  # pieces of each document
            first = np.repeat(first, counts)
            end = np.repeat(last, counts)
            place = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, … in its document
            first = first + place * self.piece
            last = np.minimum(first + self.piece, end)
            parts.append((np.full(len(first), s), first, last, last == end))
        shard, first, last, final = (np.concatenate(columns) for columns in zip(*parts))
        order = np.random.default_rng([*self.seed, epoch, 1 + number]).permutation(len(shard))
        return _Window(shard[order], first[order], last[order], final[order], np.cumsum((last - first)[order]))


@dataclass(kw_only=True)
class MixtureStage(Stage):
    """A stage in numbers. Its last row of a pool and its last batch may be part padding, so that a stage takes exactly
    its tokens and the next one goes on at the very next."""
    context: int              # T, tokens a row
    rows: int                 # rows of a global batch
    tokens: dict[str, int]    # pool -> tokens that the whole stage takes
    start: dict[str, int]     # pool -> position in the pool's stream where the stage begins

    def pool_rows(self) -> list[int]:
        return [-(-n // self.context) for n in self.tokens.values()]

    def positions(self, step: int) -> dict[str, int]:
        """Position of each pool's stream before `step` (first_step <= step <= end_step)."""
        before = rows_before((step - self.first_step) * self.rows, self.pool_rows())
        return {pool: self.start[pool] + min(n * self.context, self.tokens[pool])
                for pool, n in zip(self.tokens, before)}


def rows_before(n: int, pool_rows: list[int]) -> list[int]:
    """How many of a stage's first n rows come from each pool, when the pools are interleaved evenly.

    The k-th row of a pool with R rows has the time (k + 1/2) / R; rows go in order of time, ties in order of pools. So
    each count grows by whole rows, stays within about a row of its share, and is exact at the stage's end.
    """
    n = min(n, sum(pool_rows))
    rows = np.array(pool_rows, dtype=np.float64)
    def before(time: float) -> np.ndarray:
        return np.clip(np.ceil(time * rows - 0.5), 0, rows).astype(np.int64)
    low, high = 0.0, 2.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if before(middle).sum() <= n else (low, middle)
    counts, room = before(low), before(high) - before(low)
    for i in range(len(rows)):  # rows at the very same time
        more = min(int(room[i]), n - int(counts.sum()))
        counts[i] += more
    return counts.tolist()


def plan_stages(stages: list, pool_sizes: dict[str, int], batch_tokens: int, scale: float = 1.0) -> list[MixtureStage]:
    """Lays the stages out one after the other.

    stages: objects with name, context, and either tokens and mixture ({pool: weight}; weights count tokens and need not
    add up to 1) or epochs ({pool: epochs of the pool}). pool_sizes: tokens in an epoch of each pool. scale multiplies
    every stage's tokens. Raises UserError for an unknown pool, or a batch that no whole rows fill.
    """
    plans, step, position = [], 0, {}
    for stage in stages:
        shares = stage.epochs or stage.mixture
        for pool in shares:
            if pool not in pool_sizes:
                raise UserError(f"stage {stage.name!r} takes from pool {pool!r}; there are {', '.join(pool_sizes)}")
        if batch_tokens % stage.context:
            raise UserError(f"stage {stage.name!r}: batch_tokens={batch_tokens} is no multiple of its context "
                            f"{stage.context}")
        if stage.epochs:
            tokens = {pool: round(scale * n * pool_sizes[pool]) for pool, n in shares.items()}
        else:
            total, weight = round(scale * stage.tokens), sum(shares.values())
            edges = np.round(np.cumsum([0.0, *shares.values()]) / weight * total).astype(np.int64)
            tokens = {pool: int(n) for pool, n in zip(shares, np.diff(edges))}
        rows = batch_tokens // stage.context
        plan = MixtureStage(
            name=stage.name, first_step=step, n_steps=0, settings=stage, context=stage.context, rows=rows,
            tokens=tokens, start={pool: position.get(pool, 0) for pool in tokens})
        plan.n_steps = -(-sum(plan.pool_rows()) // rows)
        if plan.n_steps == 0:
            raise UserError(f"stage {stage.name!r} has no tokens")
        step += plan.n_steps
        position |= {pool: plan.start[pool] + n for pool, n in tokens.items()}
        plans.append(plan)
    return plans


def branch(plans: list[MixtureStage], step: int, to: str) -> list[MixtureStage]:
    """The plan of a run that leaves at `step` and goes straight to stage `to`: what WSD is for.

    The stage that holds `step` ends there, those between are left out, and the pools go on where they stood.
    """
    names = [p.name for p in plans]
    if to not in names or step > plans[names.index(to)].first_step:
        raise UserError(f"cannot branch from step {step} to stage {to!r}; the stages are "
                        + ", ".join(f"{p.name} (from step {p.first_step})" for p in plans))
    kept = [replace(p, n_steps=min(p.n_steps, step - p.first_step)) for p in plans if p.first_step < step]
    position = {pool: at for p in kept for pool, at in p.positions(p.end_step).items()}
    last = plans[names.index(to)]
    return kept + [replace(last, first_step=step, start={p: position.get(p, 0) for p in last.tokens})]


class Mixture:
    """The batches of a run."""

    def __init__(self, pools: dict[str, list[Shard]], plans: list[MixtureStage], seed: int):
        piece = max(plan.context for plan in plans)
        self.streams = {name: PoolStream(name, shards, seed, piece) for name, shards in pools.items()}
        self.plans = plans

    def stage(self, step: int) -> MixtureStage:
        return stage_at(self.plans, step)

    def batch(self, step: int, rank: int = 0, world: int = 1, touched: set | None = None) -> Batch:
        """The rows of this rank: every world-th row of the global batch; each rank gets equally many, padded."""
        plan = self.stage(step)
        n = (step - plan.first_step) * plan.rows
        before, after = rows_before(n, plan.pool_rows()), rows_before(n + plan.rows, plan.pool_rows())
        rows = [(pool, k) for pool, a, b in zip(plan.tokens, before, after) for k in range(a, b)][rank::world]
        shape = (-(-plan.rows // world), plan.context)
        batch = Batch(np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64), np.zeros(shape, np.int32))
        for i, (pool, k) in enumerate(rows):
            length = min(plan.context, plan.tokens[pool] - k * plan.context)  # the pool's last row may be short
            columns = self.streams[pool].read(plan.start[pool] + k * plan.context, length, touched)
            batch.tokens[i, :length], batch.targets[i, :length], batch.doc_start[i, :length] = columns
        return batch

    def sources(self, step: int) -> list[str]:
        """The shards that a step's global batch was read from: to be named when a loss is not finite."""
        touched = set()
        self.batch(step, touched=touched)
        return sorted(touched)
