"""Which tokens each batch holds: a pure function of (seed, step, rank, world size).

So a resumed run needs no saved iterator, any world size sees the same global batches, and a batch
can be looked at again after the fact. Three layers:
* PoolStream: a pool as an endless stream of tokens. Each epoch is a permutation of the pool's
  documents.
* MixtureStage: how many tokens a stage takes from each pool; its rows are interleaved evenly and
  exactly.
* Mixture: the batch of a step, packed rows with doc_start (attention stays inside a document).

FG-WSD (arXiv 2512.06266, section 2) is a list of stages; the report gives no data order inside a
stage: our choice.
"""
import zlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np

from common import UserError
from data.text.shards import Shard
from schedule import Stage, stage_at

IGNORE = -100  # target of a position that is not trained: the last token of a document, and padding
WINDOW = 16    # shards whose documents are shuffled together; bounds the memory of a shuffle


@dataclass
class Batch:
    """Rows of one rank: B rows of T tokens."""
    tokens: np.ndarray     # (B, T) int64
    targets: np.ndarray    # (B, T) int64; IGNORE: not trained
    doc_start: np.ndarray  # (B, T) int32: where in the row the document of each position begins


def document_lengths(doc_start: np.ndarray) -> np.ndarray:
    """Lengths (documents,) of what is in packed rows, doc_start (B, T).

    Without documents of one token, which train nothing: padding is made of such.
    """
    is_start = doc_start == np.arange(doc_start.shape[1])
    lengths = np.diff(np.flatnonzero(is_start), append=doc_start.size)
    return lengths[lengths > 1]


# --------------------------------------------------------------------------------------------------
# A pool as a stream of tokens

@dataclass
class _Window:
    """Pieces of documents in shuffled order, an array entry for each."""
    shard: np.ndarray  # number of the shard
    first: np.ndarray  # first token in it
    last: np.ndarray   # one past the last
    final: np.ndarray  # whether the piece ends its document
    ends: np.ndarray   # running sum of the lengths


class PoolStream:
    """A pool's documents, reshuffled each epoch, as one endless stream of tokens.

    Shards are permuted, and documents are permuted within windows of WINDOW shards. A document
    longer than `piece` tokens is cut into pieces of that length, which are shuffled like documents:
    else a book would fill whole batches.
    """

    def __init__(self, name: str, shards: list[Shard], seed: int, piece: int):
        self.shards, self.piece = shards, piece
        self.seed = [seed, zlib.crc32(name.encode())]
        self.size = sum(shard.n_tokens for shard in shards)  # tokens in an epoch
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._epochs: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}  # the one read last

    def read(self, position: int, n: int,
             paths: set[str] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets (n,) int64 and document starts (n,) int32 of n stream positions.

        Document starts count from `position`. paths, if given, collects the shards that were read.
        """
        tokens = np.empty(n, np.int64)
        targets = np.empty(n, np.int64)
        starts = np.empty(n, np.int32)
        filled = 0
        while filled < n:
            window, offset = self._locate(position + filled)
            i = int(np.searchsorted(window.ends, offset, side="right"))  # piece that holds it
            if i > 0:
                offset -= int(window.ends[i - 1])
            while filled < n and i < len(window.ends):
                shard = self.shards[window.shard[i]]
                first = int(window.first[i]) + offset
                last = int(window.last[i])
                take = min(last - first, n - filled)
                end = filled + take
                tokens[filled:end] = shard.tokens[first:first + take]
                targets[filled:end - 1] = tokens[filled + 1:end]
                ends_document = first + take == last and window.final[i]
                targets[end - 1] = IGNORE if ends_document else shard.tokens[first + take]
                starts[filled:end] = filled
                if paths is not None:
                    paths.add(str(shard.path))
                filled = end
                offset = 0
                i += 1
        return tokens, targets, starts

    def _locate(self, position: int) -> tuple[_Window, int]:
        """The window that holds a stream position, and the offset of the position in it."""
        epoch, offset = divmod(position, self.size)
        permuted = self._epochs.get(epoch)
        if permuted is None:
            permuted = self._permute_shards(epoch)
            self._epochs = {epoch: permuted}
        groups, ends = permuted
        number = bisect_right(ends, offset)
        if number > 0:
            offset -= int(ends[number - 1])
        window = self._windows.get((epoch, number))
        if window is None:  # names of their own, since Mixture.sources may read in another thread
            window = self._shuffle(epoch, number, groups[number])
            self._windows[epoch, number] = window
            while len(self._windows) > 2:  # this one and the one that a batch may begin in
                self._windows.popitem(last=False)
        return window, offset

    def _permute_shards(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Shard numbers of each window of an epoch, and one past the last token of each window."""
        order = np.random.default_rng([*self.seed, epoch]).permutation(len(self.shards))
        groups = [order[i:i + WINDOW] for i in range(0, len(order), WINDOW)]
        sizes = []
        for group in groups:
            sizes.append(sum(self.shards[number].n_tokens for number in group))
        return groups, np.cumsum(sizes)

    def _shuffle(self, epoch: int, window: int, group: np.ndarray) -> _Window:
        """Cuts the documents of a window's shards into pieces and puts these into random order."""
        parts = []
        for number in group:
            last = self.shards[number].ends.astype(np.int64)
            first = np.concatenate([[0], last[:-1]])
            n_pieces = -(-(last - first) // self.piece)  # of each document
            n_before = np.cumsum(n_pieces) - n_pieces
            first = np.repeat(first, n_pieces)
            end = np.repeat(last, n_pieces)
            piece = np.arange(len(first)) - np.repeat(n_before, n_pieces)  # 0, 1, … in its document
            first = first + piece * self.piece
            last = np.minimum(first + self.piece, end)
            parts.append((np.full(len(first), number), first, last, last == end))
        shard, first, last, final = (np.concatenate(columns) for columns in zip(*parts))
        order = np.random.default_rng([*self.seed, epoch, 1 + window]).permutation(len(shard))
        ends = np.cumsum((last - first)[order])
        return _Window(shard[order], first[order], last[order], final[order], ends)


# --------------------------------------------------------------------------------------------------
# Stages: how many rows of each pool, and which are next

@dataclass(kw_only=True)
class MixtureStage(Stage):
    """A stage in numbers.

    Its last row of a pool and its last batch may be part padding, so that a stage takes exactly its
    tokens and the next one goes on at the very next.
    """
    context: int              # T, tokens per row
    rows: int                 # rows of a global batch
    tokens: dict[str, int]    # pool -> tokens that the whole stage takes
    start: dict[str, int]     # pool -> position in the pool's stream where the stage begins

    def pool_rows(self) -> list[int]:
        """Rows that the whole stage takes from each pool."""
        return [-(-n // self.context) for n in self.tokens.values()]

    def positions(self, step: int) -> dict[str, int]:
        """Position of each pool's stream before `step` (first_step <= step <= end_step)."""
        before = rows_before((step - self.first_step) * self.rows, self.pool_rows())
        positions = {}
        for pool, n in zip(self.tokens, before):
            taken = min(n * self.context, self.tokens[pool])
            positions[pool] = self.start[pool] + taken
        return positions

    def taken(self) -> dict[str, int]:
        """Tokens that it takes of each pool: fewer than `tokens` where a branch leaves it early."""
        ends = self.positions(self.end_step)
        return {pool: end - self.start[pool] for pool, end in ends.items()}


def rows_before(n: int, pool_rows: list[int]) -> list[int]:
    """How many of a stage's first n rows come from each pool, when pools are interleaved evenly.

    The k-th row of a pool with R rows has the time (k + 1/2) / R; rows go in order of time, ties in
    order of pools. So each count grows by whole rows, stays within about a row of its share, and is
    exact at the stage's end.
    """
    n = min(n, sum(pool_rows))
    rows = np.array(pool_rows, dtype=np.float64)

    def count_until(time: float) -> np.ndarray:
        return np.clip(np.ceil(time * rows - 0.5), 0, rows).astype(np.int64)

    low, high = 0.0, 2.0
    middle = 1.0
    while middle not in (low, high):  # bisection, until no number lies between low and high
        if count_until(middle).sum() <= n:
            low = middle
        else:
            high = middle
        middle = (low + high) / 2
    counts = count_until(low)
    ties = count_until(high) - counts  # rows of each pool at the very next time
    for pool in range(len(rows)):
        counts[pool] += min(int(ties[pool]), n - int(counts.sum()))
    return counts.tolist()


def plan_stages(stages: list, pool_sizes: dict[str, int], batch_tokens: int,
                scale: float = 1.0) -> list[MixtureStage]:
    """The stages in steps and tokens, one after the other.

    stages: objects with name, context, least_steps, and either tokens and mixture ({pool: weight};
    weights count tokens and need not add up to 1) or epochs ({pool: epochs of the pool}).
    pool_sizes: tokens in an epoch of each pool. scale multiplies the tokens of the run
    (stage_scales). Raises UserError for an unknown pool, or a batch that no whole rows fill.
    """
    plans = []
    step = 0
    position = dict.fromkeys(pool_sizes, 0)  # of each pool's stream
    for stage in stages:
        for pool in stage.epochs or stage.mixture:
            if pool not in pool_sizes:
                raise UserError(f"stage {stage.name!r} takes from pool {pool!r}; "
                                f"there are {', '.join(pool_sizes)}")
    scales = stage_scales(stages, pool_sizes, batch_tokens, scale)
    for stage, stage_scale in zip(stages, scales):
        if batch_tokens % stage.context:
            raise UserError(f"stage {stage.name!r}: batch_tokens={batch_tokens} is no multiple of "
                            f"its context {stage.context}")
        tokens = tokens_per_pool(stage, pool_sizes, stage_scale)
        plan = MixtureStage(
            name=stage.name,
            first_step=step,
            n_steps=0,
            settings=stage,
            context=stage.context,
            rows=batch_tokens // stage.context,
            tokens=tokens,
            start={pool: position[pool] for pool in tokens})
        plan.n_steps = -(-sum(plan.pool_rows()) // plan.rows)
        if plan.n_steps == 0:
            raise UserError(f"stage {stage.name!r} has no tokens")
        step = plan.end_step
        for pool, n in tokens.items():
            position[pool] += n
        plans.append(plan)
    return plans


LARGEST_SHARE = 0.2  # of a run that its stages with least_steps may take for them: our choice


def stage_scales(stages: list, pool_sizes: dict[str, int], batch_tokens: int,
                 scale: float) -> list[float]:
    """What each stage's tokens are multiplied by, so that the run's are by `scale`.

    A warm-up of 0.4 % of a long run would be ten steps of a short one. So a stage keeps its
    least_steps, or what it has of them in the table, and the others give the tokens for it.
    """
    sizes = [sum(tokens_per_pool(stage, pool_sizes, 1.0).values()) for stage in stages]
    total = scale * sum(sizes)
    scales = []
    for stage, size in zip(stages, sizes):
        least = min(stage.least_steps * batch_tokens, size, LARGEST_SHARE * total)
        scales.append(max(scale, least / size if least else 0.0))
    kept = [(own, size) for own, size in zip(scales, sizes) if own > scale]
    if len(kept) in (0, len(scales)):
        return scales
    others = sum(sizes) - sum(size for _, size in kept)
    rest = (total - sum(own * size for own, size in kept)) / others
    return [own if own > scale else rest for own in scales]


def tokens_per_pool(stage, pool_sizes: dict[str, int], scale: float) -> dict[str, int]:
    """{pool: tokens that a stage takes of it}: of its epochs, or its tokens shared by weight."""
    if stage.epochs:
        return {pool: round(scale * epochs * pool_sizes[pool])
                for pool, epochs in stage.epochs.items()}
    total = round(scale * stage.tokens)
    weights = list(stage.mixture.values())
    edges = np.cumsum([0.0, *weights]) / sum(weights) * total
    edges = np.round(edges).astype(np.int64)
    return dict(zip(stage.mixture, np.diff(edges).tolist()))


def branch(plans: list[MixtureStage], step: int, to: str) -> list[MixtureStage]:
    """The plan of a run that leaves at `step` and goes straight to stage `to`: what WSD is for.

    The stage that holds `step` ends there, those between are left out, and the pools go on where
    they stood.
    """
    last = next((plan for plan in plans if plan.name == to), None)
    if last is None or step > last.first_step:
        known = ", ".join(f"{plan.name} (from step {plan.first_step})" for plan in plans)
        raise UserError(f"cannot branch from step {step} to stage {to!r}; the stages are {known}")
    branched = []
    position = {}  # of each pool's stream
    for plan in plans:
        if plan.first_step < step:
            plan = replace(plan, n_steps=min(plan.n_steps, step - plan.first_step))
            position |= plan.positions(plan.end_step)
            branched.append(plan)
    start = {pool: position.get(pool, 0) for pool in last.tokens}
    branched.append(replace(last, first_step=step, start=start))
    return branched


# --------------------------------------------------------------------------------------------------
# Batches

class Mixture:
    """The batches of a run."""

    def __init__(self, pools: dict[str, list[Shard]], plans: list[MixtureStage], seed: int):
        piece = max(plan.context for plan in plans)
        self.streams = {name: PoolStream(name, shards, seed, piece)
                        for name, shards in pools.items()}
        self.plans = plans

    def stage(self, step: int) -> MixtureStage:
        """The stage that a step belongs to."""
        return stage_at(self.plans, step)

    def batch(self, step: int, rank: int = 0, world: int = 1,
              paths: set[str] | None = None) -> Batch:
        """The rows of this rank: every world-th row of the global batch.

        Each rank gets equally many rows, the last one padded. paths, if given, collects the shards
        that were read.
        """
        stage = self.stage(step)
        shape = (-(-stage.rows // world), stage.context)
        tokens = np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        # Padding is documents of one token, since doc_start may never fall along a row
        # (kernels/attention.py).
        doc_start = np.tile(np.arange(stage.context, dtype=np.int32), (shape[0], 1))
        rank_rows = _rows_of_step(stage, step)[rank::world]
        for i, (pool, k) in enumerate(rank_rows):
            first = k * stage.context
            length = min(stage.context, stage.tokens[pool] - first)  # the last row may be short
            row = self.streams[pool].read(stage.start[pool] + first, length, paths)
            tokens[i, :length], targets[i, :length], doc_start[i, :length] = row
        return Batch(tokens, targets, doc_start)

    def sources(self, step: int) -> list[str]:
        """The shards of a step's global batch: to be named when a loss is not finite."""
        paths = set()
        self.batch(step, paths=paths)
        return sorted(paths)


def _rows_of_step(stage: MixtureStage, step: int) -> list[tuple[str, int]]:
    """(pool, k) of each row of a global batch: the k-th row that the stage takes from the pool."""
    n = (step - stage.first_step) * stage.rows
    before = rows_before(n, stage.pool_rows())
    after = rows_before(n + stage.rows, stage.pool_rows())
    rows = []
    for pool, first, end in zip(stage.tokens, before, after):
        rows += [(pool, k) for k in range(first, end)]
    return rows
