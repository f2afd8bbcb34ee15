"""Whole conversations packed into rows, and which rows each step takes: for SFT what
data/text/mixture.py is for pre-training.

No conversation is split, none sees another (doc_start), and a batch is a pure function of (stage,
step, rank, world size), so that a resumed run needs no saved iterator and any world size sees the
same global batches.

The report trains its stages at 32K and 64K of context (arXiv 2512.06266, SFT) and is silent on
packing, epochs and order: our choice. B rows of a batch, T tokens of a row.
"""
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError
from data.chat.conversations import Pool
from data.text.mixture import IGNORE
from schedule import Stage

WINDOW_ROWS = 256  # rows that are packed together at least: conversations are moved no further


@dataclass
class Batch:
    """Rows of one rank.

    Padding has token 0 and no target, and each of its positions is a document of its own. Not
    trained are the last token of a conversation, what has weight 0, and padding.
    """
    tokens: np.ndarray     # (B, T) int64
    targets: np.ndarray    # (B, T) int64: the next token; IGNORE where not trained
    weights: np.ndarray    # (B, T) float32: of the target in the loss; 0 where not trained
    doc_start: np.ndarray  # (B, T) int32: where in the row each position's conversation begins


@dataclass(kw_only=True)
class PackedStage(Stage):
    """A stage in numbers, and the conversations of its rows, one row after the other."""
    context: int              # T, tokens of a row
    rows: int                 # of a global batch; the stage's last batch may be part padding
    pool: np.ndarray          # (conversations,) int64: their pools, as places in `epochs`
    conversation: np.ndarray  # (conversations,) int64: their numbers in the pools
    ends: np.ndarray          # (packed rows,) int64: one past the last conversation of each row
    tokens: int               # in all rows, without padding
    trained: int              # of them those with a weight
    dropped: int              # conversations left out: too long, or cut before their trained tokens
    cut: int                  # conversations of which only the first T tokens are taken
    epochs: dict[str, float]  # pool -> epochs of it that the stage takes, dropped ones included

    @property
    def fill(self) -> float:
        """Share of the packed rows' positions that hold tokens."""
        return self.tokens / (len(self.ends) * self.context)


# --------------------------------------------------------------------------------------------------
# Packing

def first_fit_decreasing(lengths: np.ndarray, size: int) -> list[list[int]]:
    """The indices that go into each row of `size` tokens.

    Longest first (ties: lower index first), each into the first row with room. Every length must be
    at most size. O(n log n): a tree over the rows knows the most room in each of its branches.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [size] * (2 * leaves)  # room[k]: the most below node k, whose children are 2k and 2k + 1
    rows = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        node = 1
        while node < leaves:      # down to the first row with room: left where it fits there
            node = 2 * node
            if room[node] < length:
                node += 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[node] -= length
        while node > 1:           # and up again
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def pack_windows(lengths: np.ndarray, context: int, rows: int,
                 seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(order of all conversations, one past the last of each row).

    Windows of conversations are packed one by one, and each window's rows shuffled. rows: of a
    global batch.
    """
    total = int(lengths.sum())
    window_tokens = max(WINDOW_ROWS, rows) * context
    n_windows = max(1, total // window_tokens)
    targets = total * np.arange(1, n_windows) / n_windows
    borders = np.searchsorted(np.cumsum(lengths), targets)
    windows = np.split(np.arange(len(lengths)), borders)
    order, sizes = [], []
    for number, indices in enumerate(windows):
        packed = first_fit_decreasing(lengths[indices], context)
        rng = np.random.default_rng([*seed, number])
        for row in rng.permutation(len(packed)):
            order.append(indices[packed[row]])
            sizes.append(len(packed[row]))
    return np.concatenate(order), np.cumsum(sizes)


# --------------------------------------------------------------------------------------------------
# Stages

class Stream(NamedTuple):
    """A pool as an endless stream: each epoch is another permutation of its conversations."""
    name: str      # of the pool
    size: int      # its conversations
    position: int  # how many the stages before have taken


def plan_stages(stages: list, pools: dict[str, Pool], batch_tokens: int, seed: int,
                scale: float = 1.0, over_long: str = "drop") -> list[PackedStage]:
    """Lays the stages out one after the other; each pool goes on where the last stage left it.

    stages: objects with name, context, and either mixture ({pool: share of the conversations};
    shares need not add up to 1) with conversations (how many in all, those dropped included) or
    trained_tokens (as few conversations as reach it), or epochs ({pool: epochs of it}). scale
    multiplies every stage's size. over_long: what becomes of conversations longer than the context,
    "drop" (an answer without its end teaches never to stop) or "cut". UserError for what cannot be
    laid out.
    """
    if over_long not in ("drop", "cut"):
        raise UserError(f"over_long is {over_long!r}; it must be 'drop' or 'cut'")
    plan = []
    first_step = 0
    positions = dict.fromkeys(pools, 0)
    for stage in stages:
        _check(stage, pools, batch_tokens)
        names = [name for name, share in (stage.epochs or stage.mixture).items() if share]
        streams = [Stream(name, len(pools[name].ends), positions[name]) for name in names]
        rows = batch_tokens // stage.context
        packed = _plan_stage(
            stage, streams, pools, rows, first_step, seed, scale, over_long == "cut")
        plan.append(packed)
        first_step = packed.end_step
        for stream in streams:
            positions[stream.name] += round(packed.epochs[stream.name] * stream.size)
    return plan


def _check(stage, pools: dict[str, Pool], batch_tokens: int) -> None:
    """Raises UserError for a stage that cannot be laid out."""
    where = f"stage {stage.name!r}"
    n_sizes = bool(stage.conversations) + bool(stage.trained_tokens)
    is_mixture = bool(stage.mixture) and n_sizes == 1 and not stage.epochs
    is_epochs = bool(stage.epochs) and n_sizes == 0 and not stage.mixture
    if not is_mixture and not is_epochs:
        raise UserError(f"{where} must have either a mixture and one of conversations and "
                        "trained_tokens, or epochs alone")
    shares = stage.epochs or stage.mixture
    for pool in shares:
        if pool not in pools:
            raise UserError(f"{where} takes from pool {pool!r}; there are {', '.join(pools)}")
    if min(shares.values()) < 0 or max(shares.values()) == 0:
        raise UserError(f"{where}: the numbers in {shares} must be at least 0, and one above")
    if batch_tokens % stage.context:
        raise UserError(f"{where}: batch_tokens={batch_tokens} is no multiple of its context "
                        f"{stage.context}")


def _plan_stage(stage, streams: list[Stream], pools: dict[str, Pool], rows: int, first_step: int,
                seed: int, scale: float, cut: bool) -> PackedStage:
    names = [stream.name for stream in streams]
    lengths, trained = [], []  # of each pool: tokens and trained tokens of its conversations
    for name in names:
        pool_lengths, pool_trained = _fit(pools[name], stage.context, cut)
        lengths.append(pool_lengths)
        trained.append(pool_trained)
    if not any(pool_lengths.any() for pool_lengths in lengths):
        raise UserError(f"stage {stage.name!r}: every conversation of {', '.join(names)} is longer "
                        f"than its context {stage.context}")

    pool, conversation = _choose_conversations(stage, streams, trained, seed, scale)
    counts = np.bincount(pool, minlength=len(streams)).tolist()
    length = _look_up(lengths, pool, conversation)
    fits = length > 0
    if not fits.any():
        raise UserError(f"stage {stage.name!r} has nothing in it: of its {len(pool)} conversations "
                        f"(at scale={scale:g}) none is left that fits into its context "
                        f"{stage.context}")
    pool, conversation, length = pool[fits], conversation[fits], length[fits]
    whole_length = _look_up([pools[name].lengths for name in names], pool, conversation)

    seeds = [seed, zlib.crc32(stage.name.encode())]
    order, ends = pack_windows(length, stage.context, rows, seeds)
    return PackedStage(
        name=stage.name,
        first_step=first_step,
        n_steps=-(-len(ends) // rows),
        settings=stage,
        context=stage.context,
        rows=rows,
        pool=pool[order],
        conversation=conversation[order],
        ends=ends,
        tokens=int(length.sum()),
        trained=int(_look_up(trained, pool, conversation).sum()),
        dropped=int((~fits).sum()),
        cut=int((whole_length > stage.context).sum()),
        epochs={stream.name: n / stream.size for stream, n in zip(streams, counts)})


def _fit(pool: Pool, context: int, cut: bool) -> tuple[np.ndarray, np.ndarray]:
    """(conversations,) int64 each: tokens and trained tokens that a stage takes of each.

    0 tokens: it is dropped.
    """
    lengths = np.minimum(pool.lengths, context)
    trained = pool.trained.copy()
    for i in np.flatnonzero(pool.lengths > context):
        _, weights = pool.conversation(i)
        trained[i] = np.count_nonzero(weights[:context]) if cut else 0
    return np.where(trained > 0, lengths, 0), trained


def _choose_conversations(stage, streams: list[Stream], trained: list[np.ndarray], seed: int,
                          scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(pool, conversation) of all that a stage takes, as (conversations,) int64 each.

    trained: of each stream, the trained tokens of each conversation.
    """
    if stage.epochs:
        counts = [round(scale * stage.epochs[stream.name] * stream.size) for stream in streams]
        return _interleave(streams, counts, sum(counts), seed)
    shares = [stage.mixture[stream.name] for stream in streams]
    if stage.conversations:
        return _interleave(streams, shares, round(scale * stage.conversations), seed)
    n = 1024
    while True:
        n *= 2
        pool, conversation = _interleave(streams, shares, n, seed)
        sums = np.cumsum(_look_up(trained, pool, conversation))
        is_enough = sums >= scale * stage.trained_tokens
        if is_enough.any():
            n_conversations = 1 + int(is_enough.argmax())
            return pool[:n_conversations], conversation[:n_conversations]


def _interleave(streams: list[Stream], shares: list[float], n: int,
                seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pool, conversation), (n,) int64 each, of the first n draws from the streams, evenly mixed.

    The k-th draw of a stream with share s has the time (k + 1/2) / s; draws go in order of time, as
    rows do in data/text/mixture.py, so that each stream stays within about one of its share.
    """
    share = np.array(shares) / (sum(shares) or 1)
    needed = np.ceil(share * (n + len(share))) + 1  # draws of each stream: at least what is needed
    counts = np.where(share > 0, needed, 0).astype(np.int64)
    times = np.concatenate([(np.arange(count) + 0.5) / s for count, s in zip(counts, share)])
    order = np.argsort(times, kind="stable")
    pool = np.repeat(np.arange(len(share)), counts)[order[:n]]
    conversation = np.empty(len(pool), np.int64)
    for i, stream in enumerate(streams):
        is_own = pool == i
        conversation[is_own] = _read_stream(stream, int(is_own.sum()), seed)
    return pool, conversation


def _read_stream(stream: Stream, n: int, seed: int) -> np.ndarray:
    """The next n conversation numbers of a stream, (n,) int64."""
    first_epoch = stream.position // stream.size
    end_epoch = -(-(stream.position + n) // stream.size)
    orders = [np.empty(0, np.int64)]
    for epoch in range(first_epoch, end_epoch):
        rng = np.random.default_rng([seed, zlib.crc32(stream.name.encode()), epoch])
        orders.append(rng.permutation(stream.size))
    begin = stream.position % stream.size
    return np.concatenate(orders)[begin:begin + n]


def _look_up(columns: list[np.ndarray], pool: np.ndarray, conversation: np.ndarray) -> np.ndarray:
    """columns[pool][conversation] of each."""
    firsts = np.cumsum([0, *map(len, columns)])
    return np.concatenate(columns)[firsts[pool] + conversation]


# --------------------------------------------------------------------------------------------------
# Batches

def build_batch(stage: PackedStage, pools: dict[str, Pool], step: int, rank: int = 0,
                world: int = 1) -> Batch:
    """The rows of this rank: every world-th row of the global batch; all ranks get equally many."""
    names = list(stage.epochs)
    first = (step - stage.first_step) * stage.rows
    last = min(first + stage.rows, len(stage.ends))
    batch = _padding(-(-stage.rows // world), stage.context)
    for i, row in enumerate(range(first + rank, last, world)):
        begin = stage.ends[row - 1] if row else 0
        conversations = []
        for k in range(begin, stage.ends[row]):
            pool = pools[names[stage.pool[k]]]
            conversations.append(pool.conversation(stage.conversation[k]))
        _fill_row(batch, i, conversations)
    return batch


def _padding(n_rows: int, context: int) -> Batch:
    """Rows without a conversation."""
    shape = (n_rows, context)
    return Batch(
        tokens=np.zeros(shape, np.int64),
        targets=np.full(shape, IGNORE, np.int64),
        weights=np.zeros(shape, np.float32),
        doc_start=np.tile(np.arange(context, dtype=np.int32), (n_rows, 1)))


def _fill_row(batch: Batch, i: int, conversations: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes conversations, (tokens, weights) each, into row i; one longer than the row is cut."""
    context = batch.tokens.shape[1]
    begin = 0
    for tokens, weights in conversations:
        tokens = tokens[:context].astype(np.int64)
        end = begin + len(tokens)
        batch.tokens[i, begin:end] = tokens
        batch.doc_start[i, begin:end] = begin

        predicting = slice(begin, end - 1)  # each predicts the next token, with that one's weight
        next_tokens, next_weights = tokens[1:], weights[1:context]
        batch.weights[i, predicting] = next_weights
        batch.targets[i, predicting] = np.where(next_weights > 0, next_tokens, IGNORE)
        begin = end


# --------------------------------------------------------------------------------------------------
# Prompts with responses that are scored or trained: distill.py, reward.py, rl.py

@dataclass
class Rows:
    """Sequences in packed rows; attention stays inside of each.

    N response tokens in all, in the sequences' order. After share_prefixes tokens are (1, U), and
    index and unique are the fields of a SharedPrefix.
    """
    tokens: np.ndarray     # (B, T) int64
    doc_start: np.ndarray  # (B, T) int32: where in the row each sequence begins; padding: itself
    positions: np.ndarray  # (N,) int64: where in the flattened rows the response is predicted
    targets: np.ndarray    # (N,) int64: the response's tokens
    sequence: np.ndarray   # (N,) int64: which sequence each is of
    index: np.ndarray | None = None   # (B, T) int64
    unique: np.ndarray | None = None  # (U,) int64

    def to(self, device) -> dict:
        """The arrays as tensors, by name; index and unique become "shared", a SharedPrefix."""
        tensors = {}
        for name, array in vars(self).items():
            if array is not None:
                tensors[name] = torch.from_numpy(array).to(device, non_blocking=True)
        if "index" in tensors:
            tensors["shared"] = SharedPrefix(tensors.pop("index"), tensors.pop("unique"))
        return tensors


class SharedPrefix(NamedTuple):
    """How rows (B, T) of sequences that begin alike run through the model only once.

    Responses to one prompt do. The U positions that differ in what stands there or before are
    computed once; attention alone sees all rows (Prefix Grouper, arXiv 2506.05433). Exact: what a
    position becomes depends on it and those before it alone. This is what model.Transformer takes
    as `shared`.
    """
    index: torch.Tensor   # (B, T) int64: which of the U stands there
    unique: torch.Tensor  # (U,) int64: a position in the flattened rows where each of them stands

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(1, U, H, D) -> (B, T, H, D).

        The gradients of copies are added in a fixed order; index_select's are not.
        """
        n_heads, head_dim = x.shape[2:]
        return F.embedding(self.index, x[0].flatten(1)).unflatten(-1, (n_heads, head_dim))

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (1, U, ...)"""
        return x.flatten(0, 1).index_select(0, self.unique)[None]


ROW_STEP = 256  # rows are cut to multiples of it: few shapes, and tiles of attention that are full


def row_size(filled: int, context: int) -> int:
    """T of rows of which the fullest has so many tokens."""
    return min(context, -(-filled // ROW_STEP) * ROW_STEP)


def pack(sequences: list[tuple[list[int], list[int]]], context: int) -> Rows:
    """(prompt, response) token ids in rows of at most `context` tokens, cut where the fullest ends
    (row_size); no response may be empty."""
    lengths = np.array([len(prompt) + len(response) for prompt, response in sequences])
    packed = first_fit_decreasing(lengths, context)
    T = row_size(max(int(lengths[members].sum()) for members in packed), context)
    tokens = np.zeros((len(packed), T), np.int64)
    doc_start = np.tile(np.arange(T, dtype=np.int32), (len(packed), 1))
    positions = [None] * len(sequences)
    for row, members in enumerate(packed):
        begin = 0
        for i in members:
            prompt, response = sequences[i]
            end = begin + lengths[i]
            tokens[row, begin:end] = prompt + response
            doc_start[row, begin:end] = begin
            positions[i] = row * T + np.arange(begin + len(prompt), end) - 1
            begin = end
    responses = [np.array(response) for _, response in sequences]
    response_lengths = [len(response) for response in responses]
    return Rows(
        tokens=tokens,
        doc_start=doc_start,
        positions=np.concatenate(positions),
        targets=np.concatenate(responses),
        sequence=np.repeat(np.arange(len(sequences)), response_lengths))


def share_prefixes(rows: Rows) -> Rows:
    """The rows with equal beginnings of sequences taken once.

    Their `index` and `unique` make a SharedPrefix. What predicts no response (last tokens, padding)
    is left out; `positions` are then among the U positions that are left.
    """
    context = rows.tokens.shape[1]
    row_starts = np.arange(len(rows.tokens))[:, None] * context
    begins = (row_starts + rows.doc_start).flatten().tolist()
    tokens = rows.tokens.flatten().tolist()
    is_last = np.diff(rows.sequence, append=-1)  # not 0 at each sequence's last response token
    last_positions = rows.positions[np.flatnonzero(is_last)].tolist()

    index = np.zeros(len(tokens), np.int64)  # 0 too where it is left out: nothing reads it
    unique = []
    numbers = {}  # a trie: (number of the position before, token) -> number, its place in unique
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
