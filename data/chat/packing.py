"""Whole conversations packed into rows, and which rows each step takes: what data/text/mixture.py is for plain text.

No conversation is split, none sees another (doc_start), and a batch is a pure function of (plan, step, rank, world
size), so that a resumed run needs no saved iterator and any world size sees the same global batches.

The report trains its stages at 32K and 64K of context (arXiv 2512.06266, SFT) and is silent on packing, epochs and
order: our choice. B rows of a batch, T tokens a row.
"""
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError
from data.chat.conversations import Pool
from data.text.mixture import IGNORE
from schedule import Stage

WINDOW_ROWS = 256  # rows that are packed together at least: conversations are moved no further than that


@dataclass
class Batch:
    """Rows of one rank. Padding has token 0 and no target, and each of its positions is a document of its own."""
    tokens: np.ndarray     # (B, T) int64
    targets: np.ndarray    # (B, T) int64, IGNORE where not trained: the last token of a conversation, weight 0, padding
    weights: np.ndarray    # (B, T) float32: of the target in the loss; 0 where not trained
    doc_start: np.ndarray  # (B, T) int32: where in the row each position's conversation begins


@dataclass(kw_only=True)
class PackedStage(Stage):
    """A stage in numbers, and the conversations of its rows, one row after the other."""
    context: int              # T, tokens a row
    rows: int                 # rows of a global batch; the stage's last batch may be part padding
    pool: np.ndarray          # (conversations,) int64: their pools, as places in `epochs`
    conversation: np.ndarray  # (conversations,) int64: their numbers in the pools
    ends: np.ndarray          # (packed rows,) int64: one past the last conversation of each row
    tokens: int               # in all rows, without padding
    trained: int              # of them those with a weight
    dropped: int              # conversations left out: longer than the context, or cut before their trained tokens
    cut: int                  # conversations of which only the first T tokens are taken
    epochs: dict[str, float]  # pool -> epochs of it that the stage takes, dropped ones included

    @property
    def fill(self) -> float:
        """Share of the packed rows' positions that hold tokens."""
        return self.tokens / (len(self.ends) * self.context)


def first_fit_decreasing(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Indices of what goes into each row: longest first (ties: lower index first), each into the first row with room.

    Every length must be at most size. O(n log n): a tree over the rows knows the most room in each of its branches.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room, rows = [size] * (2 * leaves), []  # room[k]: the most below node k, whose children are 2k and 2k + 1
    for i in np.argsort(-lengths, kind="stable").tolist():
        length, node = int(lengths[i]), 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < length)
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(i)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def plan_stages(stages: list, pools: dict[str, Pool], batch_tokens: int, seed: int, scale: float = 1.0,
                over_long: str = "drop") -> list[PackedStage]:
    """Lays the stages out one after the other; each pool goes on where the last stage left it.

    stages: objects with name, context, and either mixture ({pool: share of the conversations}; shares need not add up
    to 1) with conversations (how many in all, those dropped included) or trained_tokens (as few conversations as reach
    it), or epochs ({pool: epochs of it}). scale multiplies every stage's size. over_long: what becomes of conversations
    longer than the context, "drop" (an answer without its end teaches never to stop) or "cut". UserError for what
    cannot be laid out.
    """
    if over_long not in ("drop", "cut"):
        raise UserError(f"over_long is {over_long!r}; it must be 'drop' or 'cut'")
    plans, step, position = [], 0, dict.fromkeys(pools, 0)
    for stage in stages:
        _check(stage, pools, batch_tokens)
        plan = _plan(stage, pools, position, batch_tokens // stage.context, step, seed, scale, over_long == "cut")
        step = plan.end_step
        position = {name: at + round(plan.epochs.get(name, 0) * len(pools[name].ends)) for name, at in position.items()}
        plans.append(plan)
    return plans


def _check(stage, pools: dict[str, Pool], batch_tokens: int) -> None:
    shares = stage.epochs or stage.mixture
    if [bool(stage.mixture), bool(stage.conversations) + bool(stage.trained_tokens), bool(stage.epochs)] not in (
            [True, 1, False], [False, 0, True]):
        raise UserError(f"stage {stage.name!r} must have either a mixture and one of conversations and trained_tokens, "
                        f"or epochs alone")
    for pool in shares:
        if pool not in pools:
            raise UserError(f"stage {stage.name!r} takes from pool {pool!r}; there are {', '.join(pools)}")
    if min(shares.values()) < 0 or max(shares.values()) == 0:
        raise UserError(f"stage {stage.name!r}: the numbers in {shares} must be at least 0, and one above")
    if batch_tokens % stage.context:
        raise UserError(f"stage {stage.name!r}: batch_tokens={batch_tokens} is no multiple of its context "
                        f"{stage.context}")


def _plan(stage, pools: dict[str, Pool], position: dict[str, int], rows: int, first_step: int, seed: int, scale: float,
          cut: bool) -> PackedStage:
    names = [name for name, share in (stage.epochs or stage.mixture).items() if share]
    lengths, trained = zip(*(_fitted(pools[name], stage.context, cut) for name in names))
    if not any(column.any() for column in lengths):
        raise UserError(f"stage {stage.name!r}: every conversation of {', '.join(names)} is longer than its context "
                        f"{stage.context}")
    streams = [(name, len(pools[name].ends), position[name]) for name in names]
    pool, conversation = _draw(stage, streams, trained, seed, scale)
    length = _of(lengths, pool, conversation)
    kept = length > 0
    if not kept.any():
        raise UserError(f"stage {stage.name!r} has nothing in it: of its {len(pool)} conversations (at "
                        f"scale={scale:g}) none is left that fits into its context {stage.context}")
    is_cut = _of([pools[name].lengths for name in names], pool, conversation)[kept] > stage.context
    epochs = {name: n / size for n, (name, size, _) in zip(np.bincount(pool, minlength=len(names)).tolist(), streams)}
    pool, conversation, length = pool[kept], conversation[kept], length[kept]
    order, ends = _pack(length, stage.context, rows, [seed, zlib.crc32(stage.name.encode())])
    return PackedStage(
        name=stage.name, first_step=first_step, n_steps=-(-len(ends) // rows), settings=stage, context=stage.context,
        rows=rows, pool=pool[order], conversation=conversation[order], ends=ends, tokens=int(length.sum()),
        trained=int(_of(trained, pool, conversation).sum()), dropped=int((~kept).sum()), cut=int(is_cut.sum()),
        epochs=epochs)


def _fitted(pool: Pool, context: int, cut: bool) -> tuple[np.ndarray, np.ndarray]:
    """(conversations,) int64 each: tokens and trained tokens that a stage takes of each conversation; 0: dropped."""
    lengths, trained = np.minimum(pool.lengths, context), pool.trained.copy()
    for i in np.flatnonzero(pool.lengths > context):
        trained[i] = np.count_nonzero(pool.conversation(i)[1][:context]) if cut else 0
    return np.where(trained > 0, lengths, 0), trained


def _draw(stage, streams: list[tuple[str, int, int]], trained: list[np.ndarray], seed: int,
          scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(pool, conversation) of all that a stage takes, as (conversations,) int64 each."""
    if stage.epochs:
        counts = [round(scale * stage.epochs[name] * size) for name, size, _ in streams]
        return _interleaved(streams, counts, sum(counts), seed)
    shares = [stage.mixture[name] for name, _, _ in streams]
    if stage.conversations:
        return _interleaved(streams, shares, round(scale * stage.conversations), seed)
    n, enough = 1024, 0
    while not enough:
        n *= 2
        pool, conversation = _interleaved(streams, shares, n, seed)
        reached = np.cumsum(_of(trained, pool, conversation)) >= scale * stage.trained_tokens
        enough = reached.any() and 1 + int(reached.argmax())
    return pool[:enough], conversation[:enough]


def _interleaved(streams: list[tuple[str, int, int]], shares: list[float], n: int,
                 seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pool, conversation), (n,) int64 each, of the first n draws from streams (name, size, position), evenly mixed.

    The k-th draw of a stream with share s has the time (k + 1/2) / s; draws go in order of time, as rows do in
    data/text/mixture.py, so that each stream stays within about one of its share.
    """
    share = np.array(shares) / (sum(shares) or 1)
    counts = np.where(share > 0, np.ceil(share * (n + len(share))) + 1, 0).astype(np.int64)  # at least what is needed
    times = np.concatenate([(np.arange(count) + 0.5) / s for count, s in zip(counts, share)])
    pool = np.repeat(np.arange(len(share)), counts)[np.argsort(times, kind="stable")[:n]]
    conversation = np.empty(len(pool), np.int64)
    for i, (name, size, position) in enumerate(streams):
        conversation[pool == i] = _stream(name, size, position, int((pool == i).sum()), seed)
    return pool, conversation


def _stream(name: str, size: int, position: int, n: int, seed: int) -> np.ndarray:
    """n conversation numbers of a pool's endless stream from a position on: each epoch is another permutation."""
    epochs = range(position // size, -(-(position + n) // size))
    orders = [np.random.default_rng([seed, zlib.crc32(name.encode()), epoch]).permutation(size) for epoch in epochs]
    return np.concatenate([np.empty(0, np.int64), *orders])[position % size:][:n]


def _of(columns: list[np.ndarray], pool: np.ndarray, conversation: np.ndarray) -> np.ndarray:
    """columns[pool][conversation] of each."""
    first = np.cumsum([0, *map(len, columns)])
    return np.concatenate(columns)[first[pool] + conversation]


def _pack(lengths: np.ndarray, context: int, rows: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Packs windows of conversations, shuffles each window's rows: (order of all, one past the last of each row)."""
    total, window = int(lengths.sum()), max(WINDOW_ROWS, rows) * context
    n = max(1, total // window)
    borders = np.searchsorted(np.cumsum(lengths), total * np.arange(1, n) / n)
    order, sizes = [], []
    for number, indices in enumerate(np.split(np.arange(len(lengths)), borders)):
        packed = first_fit_decreasing(lengths[indices], context)
        for row in np.random.default_rng([*seed, number]).permutation(len(packed)):
            order.append(indices[packed[row]])
            sizes.append(len(packed[row]))
    return np.concatenate(order), np.cumsum(sizes)


def batch(plan: PackedStage, pools: dict[str, Pool], step: int, rank: int = 0, world: int = 1) -> Batch:
    """The rows of this rank: every world-th row of the global batch; each rank gets equally many, padded."""
    shape = (-(-plan.rows // world), plan.context)
    made = Batch(np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64), np.zeros(shape, np.float32),
                 np.tile(np.arange(plan.context, dtype=np.int32), (shape[0], 1)))
    first, names = (step - plan.first_step) * plan.rows, list(plan.epochs)
    for i, row in enumerate(range(first, min(first + plan.rows, len(plan.ends)))[rank::world]):
        begin = 0
        for k in range(plan.ends[row - 1] if row else 0, plan.ends[row]):
            tokens, weights = pools[names[plan.pool[k]]].conversation(plan.conversation[k])
            tokens, weights = tokens[:plan.context].astype(np.int64), weights[1:plan.context]
            place, predicting = slice(begin, begin + len(tokens)), slice(begin, begin + len(weights))
            made.tokens[i, place], made.doc_start[i, place] = tokens, begin
            made.weights[i, predicting] = weights
            made.targets[i, predicting] = np.where(weights > 0, tokens[1:], IGNORE)
            begin = place.stop
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Prompts with responses that are scored or trained: distill.py, reward.py, rl.py

@dataclass
class Rows:
    """Sequences in packed rows; attention stays inside of each. N response tokens in all, in the sequences' order."""
    tokens: np.ndarray     # (B, T) int64
    doc_start: np.ndarray  # (B, T) int32: where in the row each position's sequence begins; padding: itself
    positions: np.ndarray  # (N,) int64: places in the flattened rows that predict the response tokens
    targets: np.ndarray    # (N,) int64: these tokens
    sequence: np.ndarray   # (N,) int64: which sequence each is of
    # After share_prefixes tokens are (1, U), and these two are the fields of a SharedPrefix.
    index: np.ndarray | None = None   # (B, T) int64
    unique: np.ndarray | None = None  # (U,) int64


class SharedPrefix(NamedTuple):
    """How rows (B, T) of sequences that begin alike, as responses to one prompt do, run through the model only once.

    The U positions that differ in what stands there or before are computed once; attention alone sees all rows (Prefix
    Grouper, arXiv 2506.05433). Exact: what a position becomes depends on it and those before it alone. This is what
    model.Transformer takes as `shared`.
    """
    index: torch.Tensor   # (B, T) int64: which of the U stands there
    unique: torch.Tensor  # (U,) int64: a position in the flattened rows where each of them stands

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(1, U, H, D) -> (B, T, H, D). The gradients of copies are added in a fixed order; index_select's are not."""
        n_heads, head_dim = x.shape[2:]
        return F.embedding(self.index, x[0].flatten(1)).unflatten(-1, (n_heads, head_dim))

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (1, U, ...)"""
        return x.flatten(0, 1).index_select(0, self.unique)[None]


def pack(sequences: list[tuple[list[int], list[int]]], context: int) -> Rows:
    """(prompt, response) token ids, each response of one token at least, in rows of `context` tokens."""
    lengths = np.array([len(prompt) + len(response) for prompt, response in sequences])
    filled = first_fit_decreasing(lengths, context)
    tokens = np.zeros((len(filled), context), np.int64)
    doc_start = np.tile(np.arange(context, dtype=np.int32), (len(filled), 1))
    positions = [None] * len(sequences)
    for row, members in enumerate(filled):
        begin = 0
        for i in members:
            (prompt, response), end = sequences[i], begin + lengths[i]
            tokens[row, begin:end], doc_start[row, begin:end] = prompt + response, begin
            positions[i] = row * context + np.arange(begin + len(prompt), end) - 1
            begin = end
    return Rows(tokens, doc_start, np.concatenate(positions),
                np.concatenate([np.array(response) for _, response in sequences]),
                np.repeat(np.arange(len(sequences)), [len(response) for _, response in sequences]))


def share_prefixes(rows: Rows) -> Rows:
    """The rows with equal beginnings of sequences taken once: their `index` and `unique` make a SharedPrefix.

    What predicts no response (last tokens, padding) is left out. positions are then among the U positions that are left.
    """
    context = rows.tokens.shape[1]
    row_starts = np.arange(len(rows.tokens))[:, None] * context
    begins = (row_starts + rows.doc_start).flatten().tolist()
    tokens = rows.tokens.flatten().tolist()
    is_last = np.diff(rows.sequence, append=-1)     # not 0 at the last response token of each sequence
    last_positions = rows.positions[np.flatnonzero(is_last)].tolist()

    index = np.zeros(len(tokens), np.int64)         # 0 too where it is left out: nothing reads it
    unique = []
    numbers = {}                                    # a trie: (number of the position before, token) -> number
    for last in last_positions:
        number = None
        for position in range(begins[last], last + 1):
            number = numbers.setdefault((number, tokens[position]), len(unique))
            if number == len(unique):
                unique.append(position)
            index[position] = number
    return Rows(
        tokens=rows.tokens.reshape(1, -1)[:, unique],
        doc_start=rows.doc_start,
        positions=index[rows.positions],
        targets=rows.targets,
        sequence=rows.sequence,
        index=index.reshape(rows.tokens.shape),
        unique=np.array(unique))
