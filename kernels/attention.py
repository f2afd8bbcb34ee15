"""Causal grouped-query attention inside documents: the one form that every phase uses.

FlashAttention (Dao, arXiv 2205.14135 and 2307.08691): a program holds a tile of queries, walks over
the tiles of keys that it may see, and keeps for each query the largest score so far m, the sum l of
exp(score - m), and the output so far, rescaled whenever m grows. So no T x T matrix is ever in
memory. For the backward pass only lse = m + log l is kept: p = exp(score - lse) is made again, tile
by tile. With o the output, do its gradient and delta = sum(o * do):

    ds = p * (do v^T - delta)      dq = scale * ds k      dk = scale * ds^T q      dv = p^T do

One kernel holds queries and adds up dq, the other holds keys and adds up dk and dv over all query
heads that read them: seven products where five would do, but no atomics, so the same bits every
time. Tiles that the causal or the document mask rules out are not visited, tiles that it leaves
whole are not masked. Scores are in units of log 2, since exp2 is what the hardware has.

Shapes: B batch, T query positions, S key positions (S >= T), H query heads, K key/value heads,
G = H / K, D head width; BM and BN rows of a tile of queries and of keys.
`python -m kernels.tools.check attention` checks the kernels.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, tl, triton, use_triton, with_last_dim_contiguous
from kernels.tiles import CANDIDATES, Tiles, tiles_for


def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_start: torch.Tensor | None = None,
        kernels: str = "auto") -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, (B, T, H, D), of any float type.

    q (B, T, H, D); k, v (B, S, K, D) with H a multiple of K, grouped queries (Ainslie et al., arXiv
    2305.13245): head h reads key head h // (H / K). The queries are the last T of the S positions
    (T = S in training, T = 1 while decoding against a cache). doc_start (B, T) int32: where in
    0..S-1 each query's document begins, never falling along a row; a query sees the keys from there
    to itself. None: one document per row. The kernels take heads up to 128 wide; wider ones go to
    PyTorch.
    """
    D = q.shape[-1]
    if not use_triton(q, kernels) or D > 128:
        attend = plain_attention
        if q.dtype == torch.bfloat16 and q.requires_grad and not q.is_cuda:
            attend = spelled_out_attention
        if doc_start is None or q.is_cuda or torch.compiler.is_compiling():
            return attend(q, k, v, doc_start)
        return attend_in_blocks(attend, q, k, v, doc_start)
    padding = max(16, triton.next_power_of_2(D)) - D  # zeros add nothing to the scores
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        o = decode_op(q, k, v, doc_start, D**-0.5)
    else:
        o, _ = forward_op(q, k, v, doc_start, D**-0.5)
    return o[..., :D]


def plain_attention(q, k, v, doc_start=None):
    """The same by PyTorch: what the kernels are held to, and what runs without a GPU.

    With documents it makes a T x S mask.
    """
    T, S, K = q.shape[1], *k.shape[1:3]
    mask = None
    if doc_start is not None or 1 < T < S:
        mask = additive_mask(q, T, S, doc_start)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if T == 1:
        # The heads of a group as more queries of one: (B, K, G, D), and no copies of k and v.
        q = q.unflatten(1, (K, -1)).flatten(2, 3)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=q.shape[1] != K)
    if T == 1:
        o = o.unflatten(2, (-1, T)).flatten(1, 2)
    return o.transpose(1, 2)


def spelled_out_attention(q, k, v, doc_start=None):
    """The same in single products.

    In bfloat16 a CPU's SDPA takes several times as long for its backward pass.
    """
    T, S, K = q.shape[1], *k.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q = q.unflatten(1, (K, -1)).flatten(2, 3)  # (B, K, G T, D)
    mask = additive_mask(q, T, S, doc_start)[:, None]
    scores = (q * q.shape[-1]**-0.5 @ k.mT).unflatten(2, (-1, T)) + mask  # (B, K, G, T, S)
    o = (scores.softmax(-1).flatten(2, 3) @ v).unflatten(2, (-1, T)).flatten(1, 2)
    return o.transpose(1, 2)


LEAST_BLOCK, MOST_BLOCKS = 32, 16  # queries of a block and blocks of a row on a CPU; our choice


def attend_in_blocks(attend, q, k, v, doc_start):
    """attend(q, k, v, doc_start), a block of queries at a time, each with the keys that it may see.

    A CPU's SDPA computes with hidden keys as with others. Where in a row the keys of a block begin
    must be known in Python, so this is for tensors in a CPU's memory.
    """
    T, S = q.shape[1], k.shape[1]
    size = max(LEAST_BLOCK, -(-T // MOST_BLOCKS))
    first_keys = doc_start[:, ::size].amin(0).tolist()  # starts never fall along a row
    blocks = zip(q.split(size, 1), doc_start.split(size, 1), first_keys)
    outputs = []
    end = S - T
    for queries, starts, first in blocks:
        end += queries.shape[1]
        outputs.append(attend(queries, k[:, first:end], v[:, first:end], starts - first))
    return torch.cat(outputs, 1)


class Filled(NamedTuple):
    """How far the rows of a cache are filled: the same in all layers, so it is made once a step."""
    lengths: torch.Tensor  # (B,) int32
    parts: list[tuple[slice, int, torch.Tensor | None]]  # rows, keys of their longest, and the mask
                           # (rows, 1, 1, keys) of what is filled, None where all is


def decode_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, filled: Filled,
        kernels: str = "auto") -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of one query a row against a cache, (B, 1, H, D).

    q (B, 1, H, D); k, v (B, K, S, D), of which row b's first filled.lengths[b] keys count. Without
    a gradient. A kernel stops at each row's own length; PyTorch reads a part of the rows at once,
    as far as its longest.
    """
    K, D = k.shape[1], k.shape[3]
    if use_triton(q, kernels) and D <= 128:
        n_keys = max(n for _, n, _ in filled.parts)
        k, v = k[:, :, :n_keys].transpose(1, 2), v[:, :, :n_keys].transpose(1, 2)
        padding = max(16, triton.next_power_of_2(D)) - D
        if padding:
            q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
        return decode_op(q, k, v, None, D**-0.5, filled.lengths)[..., :D]
    q = q.squeeze(1).unflatten(1, (K, -1))  # (B, K, G, D): the heads of a group as queries of one
    outputs = []
    for rows, n_keys, mask in filled.parts:
        keys, values = k[rows, :, :n_keys], v[rows, :, :n_keys]
        outputs.append(F.scaled_dot_product_attention(q[rows], keys, values, attn_mask=mask))
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return o.flatten(1, 2).unsqueeze(1)


def additive_mask(
        like: torch.Tensor, T: int, S: int, doc_start: torch.Tensor | None) -> torch.Tensor:
    """(1 or B, 1, T, S): 0 where a query sees a key, else -inf; of the type and device of `like`.

    SDPA would make one of a boolean mask anyway, at every layer and in the backward pass again.
    """
    key = torch.arange(S, device=like.device)
    query = torch.arange(S - T, S, device=like.device)
    sees = (key <= query[:, None])[None, None]
    if doc_start is not None:
        sees = sees & (key >= doc_start[:, None, :, None])
    mask = torch.zeros(sees.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~sees, float("-inf"))


# --------------------------------------------------------------------------------------------------
# Triton: what the kernels share

@triton.jit
def head_of(X, b, h, stride_b, stride_h):
    """Where head h of row b begins; 64 bits, since a long batch has more than 2^31 elements."""
    return X + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h


@triton.jit
def tile_of(X, row, stride_t, D: tl.constexpr):
    """Pointers to rows `row` of a head: (rows, D)."""
    return X + row.to(tl.int64)[:, None] * stride_t + tl.arange(0, D)[None, :]


@triton.jit
def load_tile(X, row, stride_t, n, D: tl.constexpr, MASK: tl.constexpr):
    """Rows `row` of a head, (rows, D); with MASK those from n on are zeros."""
    if MASK:
        x = tl.load(tile_of(X, row, stride_t, D), mask=(row < n)[:, None], other=0.0)
    else:
        x = tl.load(tile_of(X, row, stride_t, D))
    return x


@triton.jit
def in_log2(scale):
    """The factor that takes a product of q and k to a score in units of log 2: scale * log2(e)."""
    return tl.cast(scale, tl.float32) * 1.4426950408889634  # Inductor would pass a float as fp64


@triton.jit
def query_tile(H, T, BM: tl.constexpr):
    """(row of the batch, head, first query) of a program that holds a tile of queries.

    A head's tiles with the most keys come first, so that the last programs to run are short ones.
    """
    tiles = tl.cdiv(T, BM)
    bh = tl.program_id(0) // tiles
    return bh // H, bh % H, (tiles - 1 - tl.program_id(0) % tiles) * BM


@triton.jit
def seen_keys(START, b, row0, T, S, BM: tl.constexpr, BN: tl.constexpr, DOC: tl.constexpr):
    """Which keys the queries row0 ... row0 + BM - 1 see, as multiples of BN.

    From `first`, with the document mask, to `whole`; from there with no mask to `diagonal`; from
    there with the causal (and document) mask to `last`.
    """
    position = row0 + S - T
    last = tl.minimum(position + BM, S)
    first = 0
    whole = 0
    if DOC:  # starts never fall: the first row sees furthest back, the last row least far
        first = tl.load(START + tl.cast(b, tl.int64) * T + row0) // BN * BN
        whole = tl.cdiv(
            tl.load(START + tl.cast(b, tl.int64) * T + tl.minimum(row0 + BM, T) - 1), BN) * BN
    diagonal = tl.maximum((position + 1) // BN * BN, first)
    return first, tl.minimum(tl.maximum(whole, first), diagonal), diagonal, last


# --------------------------------------------------------------------------------------------------
# Triton: forward

@triton.jit
def online_softmax(acc, m, l, s, v, scale, PRECISION: tl.constexpr):
    """One more tile of keys: products s (BM, BN), -inf where masked, and v (BN, D).

    acc (BM, D), m and l (BM,) fp32.
    """
    # m begins finite: a row that sees nothing here has p = 0, not NaN.
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_new, l


@triton.jit
def walk_keys(
        acc, m, l, q, K, V, first, last, position, start, stride_kt, stride_vt, S, scale,
        D: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, DOC: tl.constexpr,
        PRECISION: tl.constexpr):
    """The online softmax over keys first ... last - 1, for queries q (BM, D)."""
    for n in tl.range(first, last, BN):
        key = n + tl.arange(0, BN)
        k = load_tile(K, key, stride_kt, S, D, MASK)
        v = load_tile(V, key, stride_vt, S, D, MASK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
        if MASK:
            sees = key[None, :] <= position[:, None]
            if DOC:
                sees &= key[None, :] >= start[:, None]
            s = tl.where(sees, s, float("-inf"))
        acc, m, l = online_softmax(acc, m, l, s, v, scale, PRECISION)
    return acc, m, l


@triton.jit
def attention_forward(
        Q, K, V, O, LSE, START,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
        stride_vb, stride_vt, stride_vh, H, G, T, S, scale,
        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOC: tl.constexpr,
        PRECISION: tl.constexpr):
    """A tile of queries of one head per program.

    O (B, T, H, D) contiguous, LSE (B, H, T) in units of log 2.
    """
    b, h, row0 = query_tile(H, T, BM)
    row = row0 + tl.arange(0, BM)
    inside = row < T
    scale = in_log2(scale)
    q = load_tile(head_of(Q, b, h, stride_qb, stride_qh), row, stride_qt, T, D, True)
    K = head_of(K, b, h // G, stride_kb, stride_kh)
    V = head_of(V, b, h // G, stride_vb, stride_vh)
    start = row
    if DOC:
        start = tl.load(START + tl.cast(b, tl.int64) * T + row, mask=inside, other=0)
    first, whole, diagonal, last = seen_keys(START, b, row0, T, S, BM, BN, DOC)
    acc = tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], -1.0e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    if DOC:
        acc, m, l = walk_keys(
            acc, m, l, q, K, V, first, whole, row + S - T, start, stride_kt, stride_vt, S, scale,
            D, BN, True, DOC, PRECISION)
    acc, m, l = walk_keys(
        acc, m, l, q, K, V, whole, diagonal, row + S - T, start, stride_kt, stride_vt, S, scale,
        D, BN, False, DOC, PRECISION)
    acc, m, l = walk_keys(
        acc, m, l, q, K, V, diagonal, last, row + S - T, start, stride_kt, stride_vt, S, scale,
        D, BN, True, DOC, PRECISION)
    l = tl.where(l == 0.0, 1.0, l)  # a query that sees no key at all: output 0
    out = tile_of(head_of(O, b * T, h, H * D, D), row, H * D, D)
    tl.store(out, (acc / l[:, None]).to(O.dtype.element_ty), mask=inside[:, None])
    tl.store(LSE + tl.cast(b * H + h, tl.int64) * T + row, m + tl.log2(l), mask=inside)


@triton.jit
def attention_forward_specialized(
        Q, K, V, O, LSE, START,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
        stride_vb, stride_vt, stride_vh, H, G, T, S, scale,
        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOC: tl.constexpr,
        PRECISION: tl.constexpr):
    """attention_forward for Hopper: one group of warps only loads (TMA), two only compute.

    It is FlashAttention-3's form (arXiv 2407.08608). Triton's compiler splits a loop in that way if
    it is the only one, so every tile is masked here, and if all that it reads comes through
    descriptors of one or two dimensions: even the documents' starts.
    """
    b, h, row0 = query_tile(H, T, BM)
    row = row0 + tl.arange(0, BM)
    scale = in_log2(scale)
    q_rows = tl.make_tensor_descriptor(
        head_of(Q, b, h, stride_qb, stride_qh), [T, D], [stride_qt, 1], [BM, D])
    k_rows = tl.make_tensor_descriptor(
        head_of(K, b, h // G, stride_kb, stride_kh), [S, D], [stride_kt, 1], [BN, D])
    v_rows = tl.make_tensor_descriptor(
        head_of(V, b, h // G, stride_vb, stride_vh), [S, D], [stride_vt, 1], [BN, D])
    start = row
    if DOC:
        start = tl.make_tensor_descriptor(
            START + tl.cast(b, tl.int64) * T, [T], [1], [BM]).load([row0])
    first, _, _, last = seen_keys(START, b, row0, T, S, BM, BN, DOC)
    q = q_rows.load([row0, 0])
    acc = tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], -1.0e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    for n in tl.range(first, last, BN, warp_specialize=True):
        key = n + tl.arange(0, BN)
        s = tl.dot(q, tl.trans(k_rows.load([n, 0])), input_precision=PRECISION)
        sees = key[None, :] <= (row + S - T)[:, None]
        if DOC:
            sees &= key[None, :] >= start[:, None]
        s = tl.where(sees, s, float("-inf"))
        acc, m, l = online_softmax(acc, m, l, s, v_rows.load([n, 0]), scale, PRECISION)
    l = tl.where(l == 0.0, 1.0, l)
    out = tile_of(head_of(O, b * T, h, H * D, D), row, H * D, D)
    tl.store(out, (acc / l[:, None]).to(O.dtype.element_ty), mask=(row < T)[:, None])
    tl.store(LSE + tl.cast(b * H + h, tl.int64) * T + row, m + tl.log2(l), mask=row < T)


# --------------------------------------------------------------------------------------------------
# Triton: backward

@triton.jit
def walk_keys_back(
        dq, q, do, lse, delta, K, V, first, last, position, start, stride_kt, stride_vt, S, scale,
        D: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, DOC: tl.constexpr,
        PRECISION: tl.constexpr):
    """Adds to dq what keys first ... last - 1 give.

    q, do (BM, D); dq (BM, D), lse and delta (BM,) in fp32.
    """
    for n in tl.range(first, last, BN):
        key = n + tl.arange(0, BN)
        k = load_tile(K, key, stride_kt, S, D, MASK)
        v = load_tile(V, key, stride_vt, S, D, MASK)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        if MASK:
            sees = key[None, :] <= position[:, None]
            if DOC:
                sees &= key[None, :] >= start[:, None]
            p = tl.where(sees, p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_dq(
        Q, K, V, O, DO, LSE, DELTA, DQ, START,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
        stride_vb, stride_vt, stride_vh, stride_dob, stride_dot, stride_doh, H, G, T, S, scale,
        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOC: tl.constexpr,
        PRECISION: tl.constexpr):
    """A tile of queries of one head per program.

    DQ (B, T, H, D) contiguous, and DELTA (B, H, T) for attention_dkdv.
    """
    b, h, row0 = query_tile(H, T, BM)
    row = row0 + tl.arange(0, BM)
    inside = row < T
    log2_scale = in_log2(scale)
    q = load_tile(head_of(Q, b, h, stride_qb, stride_qh), row, stride_qt, T, D, True)
    do = load_tile(head_of(DO, b, h, stride_dob, stride_doh), row, stride_dot, T, D, True)
    o = load_tile(head_of(O, b * T, h, H * D, D), row, H * D, T, D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + tl.cast(b * H + h, tl.int64) * T + row, delta, mask=inside)
    lse = tl.load(LSE + tl.cast(b * H + h, tl.int64) * T + row, mask=inside, other=0.0)
    K = head_of(K, b, h // G, stride_kb, stride_kh)
    V = head_of(V, b, h // G, stride_vb, stride_vh)
    start = row
    if DOC:
        start = tl.load(START + tl.cast(b, tl.int64) * T + row, mask=inside, other=0)
    first, whole, diagonal, last = seen_keys(START, b, row0, T, S, BM, BN, DOC)
    dq = tl.zeros([BM, D], tl.float32)
    if DOC:
        dq = walk_keys_back(
            dq, q, do, lse, delta, K, V, first, whole, row + S - T, start, stride_kt, stride_vt,
            S, log2_scale, D, BN, True, DOC, PRECISION)
    dq = walk_keys_back(
        dq, q, do, lse, delta, K, V, whole, diagonal, row + S - T, start, stride_kt, stride_vt,
        S, log2_scale, D, BN, False, DOC, PRECISION)
    dq = walk_keys_back(
        dq, q, do, lse, delta, K, V, diagonal, last, row + S - T, start, stride_kt, stride_vt,
        S, log2_scale, D, BN, True, DOC, PRECISION)
    out = tile_of(head_of(DQ, b * T, h, H * D, D), row, H * D, D)
    tl.store(out, (dq * tl.cast(scale, tl.float32)).to(DQ.dtype.element_ty), mask=inside[:, None])


@triton.jit
def attention_dkdv(
        Q, K, V, DO, LSE, DELTA, DK, DV, START, ENDS,
        stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
        stride_vb, stride_vt, stride_vh, stride_dob, stride_dot, stride_doh, H, G, T, S, scale,
        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOC: tl.constexpr,
        PRECISION: tl.constexpr):
    """A tile of keys of one key head per program.

    DK, DV (B, S, K, D) contiguous, summed over the head's G query heads. ENDS (B, tiles, 2): how
    many queries begin their document at or before the tile's first key, and its last one. Scores
    are made transposed, (BN, BM), so that p and ds are at once the left side of their products. One
    loop over heads and queries, and one loop body for whole tiles and cut ones, keep it within the
    registers.
    """
    tiles = tl.cdiv(S, BN)
    tile = tl.program_id(0) % tiles  # the first keys are seen by the most queries: they come first
    bk = tl.program_id(0) // tiles
    b, hk = bk // (H // G), bk % (H // G)
    key = tile * BN + tl.arange(0, BN)
    inside = key < S
    past = S - T
    log2_scale = in_log2(scale)
    k = load_tile(head_of(K, b, hk, stride_kb, stride_kh), key, stride_kt, S, D, True)
    v = load_tile(head_of(V, b, hk, stride_vb, stride_vh), key, stride_vt, S, D, True)
    # The queries that see any of these keys are first ... last - 1; whole ... tail - 1 of them see
    # them all.
    first = tl.maximum(tile * BN - past, 0) // BM * BM
    whole = tl.maximum(tile * BN + BN - 1 - past, 0)
    tail = T // BM * BM
    last = T
    if DOC:
        START += tl.cast(b, tl.int64) * T
        ENDS += (tl.cast(b, tl.int64) * tiles + tile) * 2
        tail = tl.load(ENDS) // BM * BM
        last = tl.load(ENDS + 1)
    steps = tl.cdiv(tl.maximum(last - first, 0), BM)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for step in tl.range(0, steps * G):
        g = step // steps
        h = hk * G + g
        row0 = first + (step - g * steps) * BM
        row = row0 + tl.arange(0, BM)
        at = tl.cast(b * H + h, tl.int64) * T
        q = load_tile(head_of(Q, b, h, stride_qb, stride_qh), row, stride_qt, T, D, True)
        do = load_tile(head_of(DO, b, h, stride_dob, stride_doh), row, stride_dot, T, D, True)
        lse = tl.load(LSE + at + row, mask=row < T, other=0.0)  # beyond T all is 0 but p
        delta = tl.load(DELTA + at + row, mask=row < T, other=0.0)
        start = row
        if DOC:
            start = tl.load(START + row, mask=row < T, other=0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale - lse[None, :])
        if (row0 < whole) | (row0 >= tail):
            sees = key[:, None] <= (row + past)[None, :]
            if DOC:
                sees &= key[:, None] >= start[None, :]
            p = tl.where(sees, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    KD = H // G * D
    dk_out = tile_of(head_of(DK, b * S, hk, KD, D), key, KD, D)
    tl.store(
        dk_out, (dk * tl.cast(scale, tl.float32)).to(DK.dtype.element_ty), mask=inside[:, None])
    dv_out = tile_of(head_of(DV, b * S, hk, KD, D), key, KD, D)
    tl.store(dv_out, dv.to(DV.dtype.element_ty), mask=inside[:, None])


# --------------------------------------------------------------------------------------------------
# Triton: decoding, one query a row against a cache

@triton.jit
def attention_decode(
        Q, K, V, O, LSE, START, LENGTHS,
        stride_qb, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        H, G, S, splits, scale,
        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        SPLIT: tl.constexpr, DOC: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr):
    """SPLIT keys of one key head per program, for its G query heads at once.

    So one read of the cache serves them all. O (B, H, splits, D) fp32 and LSE (B, H, splits) are of
    these keys alone, to be joined by attention_join (flash-decoding). A row's keys begin at START
    (B,) and end at LENGTHS (B,): where the rows' lengths differ, short ones end early.
    """
    split = tl.program_id(0) % splits
    bk = tl.program_id(0) // splits
    b, hk = bk // (H // G), bk % (H // G)
    g = tl.arange(0, BM)
    scale = in_log2(scale)
    q = load_tile(head_of(Q, b, hk * G, stride_qb, stride_qh), g, stride_qh, G, D, True)
    K = head_of(K, b, hk, stride_kb, stride_kh)
    V = head_of(V, b, hk, stride_vb, stride_vh)
    first = split * SPLIT
    start = g * 0
    if DOC:
        start += tl.load(START + b)
        first = tl.maximum(first, tl.load(START + b) // BN * BN)
    if RAGGED:
        S = tl.load(LENGTHS + b)
    acc = tl.zeros([BM, D], tl.float32)
    m = tl.full([BM], -1.0e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    last = tl.minimum(split * SPLIT + SPLIT, S)
    acc, m, l = walk_keys(
        acc, m, l, q, K, V, first, last, start * 0 + S - 1, start, stride_kt, stride_vt, S, scale,
        D, BN, True, DOC, PRECISION)
    l = tl.where(l == 0.0, 1.0, l)
    out = (tl.cast(b, tl.int64) * H + hk * G + g) * splits + split
    out_tile = O + out[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_tile, acc / l[:, None], mask=(g < G)[:, None])
    tl.store(LSE + out, m + tl.log2(l), mask=g < G)


@triton.jit
def attention_join(O, LSE, OUT, splits, D: tl.constexpr, BLOCK: tl.constexpr):
    """One head of one row per program: OUT (B * H, D).

    The splits' outputs, weighted by their shares of the softmax.
    """
    bh = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK)
    lse = tl.load(LSE + bh * splits + split, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    o = load_tile(O + bh * splits * D, split, D, splits, D, True)
    out = tl.sum(o * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(OUT + bh * D + tl.arange(0, D), out.to(OUT.dtype.element_ty))


# --------------------------------------------------------------------------------------------------
# Launches, as operators that torch.compile, FSDP and activation checkpointing see as one node each

def precision(x: torch.Tensor) -> str:
    """Of products: fp32 means fp32; other types do not ask."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@torch.library.custom_op("nanobeige::attention", mutates_args=())
def forward_op(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_start: torch.Tensor | None,
        scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(o (B, T, H, D), lse (B, H, T) fp32 in units of log 2)."""
    o, lse = forward_fake(q, k, v, doc_start, scale)
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    q, k, v = map(with_last_dim_contiguous, (q, k, v))
    tiles, start = tiles_for("attention_forward", D, q.dtype, q.device), starts(doc_start)
    kernel = attention_forward
    if tiles.specialized:
        kernel, tiles = specialized(tiles, q, k, v, start)
    if q.numel():
        kernel[(triton.cdiv(T, tiles.BM) * B * H,)](
            q, k, v, o, lse, start, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            H, H // K, T, S, scale,
            D=D, DOC=start is not None, PRECISION=precision(q), **tiles.options())
    return o, lse


def specialized(tiles: Tiles, q, k, v, start):
    """The specialised kernel and its tiles, or the other kernel and its own.

    The other one where an address is no multiple of TMA's 16 bytes.
    """
    addresses = []
    for x in (q, k, v, start):
        if x is not None:
            addresses += [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    if any(address % 16 for address in addresses):
        return attention_forward, CANDIDATES["sm_90"]["attention_forward"][0]

    def allocate(size, alignment, stream):
        return torch.empty(size, device=q.device, dtype=torch.int8)

    if not INTERPRETED:  # the descriptors are made by the kernel, in memory that it asks for
        triton.set_allocator(allocate)
    return attention_forward_specialized, tiles


@forward_op.register_fake
def forward_fake(q, k, v, doc_start, scale):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


def starts(doc_start: torch.Tensor | None) -> torch.Tensor | None:
    return None if doc_start is None else doc_start.to(torch.int32).contiguous()


@torch.library.custom_op("nanobeige::attention_backward", mutates_args=())
def backward_op(
        do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        doc_start: torch.Tensor | None, o: torch.Tensor, lse: torch.Tensor,
        scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv = backward_fake(do, q, k, v, doc_start, o, lse, scale)
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    q, k, v, do = map(with_last_dim_contiguous, (q, k, v, do))
    delta, start = torch.empty_like(lse), starts(doc_start)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    common = dict(D=D, DOC=start is not None, PRECISION=precision(q))
    tiles = tiles_for("attention_dq", D, q.dtype, q.device)
    attention_dq[(triton.cdiv(T, tiles.BM) * B * H,)](
        q, k, v, o, do, lse, delta, dq, start, *strides, H, H // K, T, S, scale,
        **common, **tiles.options())
    tiles = tiles_for("attention_dkdv", D, q.dtype, q.device)
    n_tiles, ends = triton.cdiv(S, tiles.BN), None
    if start is not None:
        # How many queries begin their document at or before each tile's first and last key.
        first = torch.arange(0, n_tiles * tiles.BN, tiles.BN, device=q.device, dtype=torch.int32)
        edges = torch.stack((first, first + tiles.BN - 1), 1).flatten()
        ends = torch.searchsorted(start, edges.repeat(B, 1), right=True, out_int32=True)
    attention_dkdv[(n_tiles * B * K,)](
        q, k, v, do, lse, delta, dk, dv, start, ends, *strides, H, H // K, T, S, scale,
        **common, **tiles.options())
    return dq, dk, dv


@backward_op.register_fake
def backward_fake(do, q, k, v, doc_start, o, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, doc_start, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, doc_start, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _):
    q, k, v, doc_start, o, lse = ctx.saved_tensors
    return *backward_op(do, q, k, v, doc_start, o, lse, ctx.scale), None, None


forward_op.register_autograd(_backward, setup_context=_save)


SPLIT = 512  # keys that one program of attention_decode reads


@torch.library.custom_op("nanobeige::attention_decode", mutates_args=())
def decode_op(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_start: torch.Tensor | None,
        scale: float, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """o (B, 1, H, D) of one query a row, without a gradient; lengths (B,) int32: of its keys."""
    out = decode_fake(q, k, v, doc_start, scale)
    (B, _, H, D), (S, K) = q.shape, k.shape[1:3]
    q, k, v = map(with_last_dim_contiguous, (q, k, v))
    tiles = tiles_for("attention_decode", D, q.dtype, q.device)
    # G query heads at once; tl.dot wants 16 rows.
    tiles = tiles._replace(BM=max(16, triton.next_power_of_2(H // K)))
    splits = triton.cdiv(S, SPLIT)
    o = torch.empty(B, H, splits, D, device=q.device, dtype=torch.float32)
    lse = torch.empty(B, H, splits, device=q.device, dtype=torch.float32)
    if B:
        attention_decode[(splits * B * K,)](
            q, k, v, o, lse, starts(doc_start), lengths,
            q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3], H, H // K, S, splits, scale,
            D=D, SPLIT=SPLIT, DOC=doc_start is not None, RAGGED=lengths is not None,
            PRECISION=precision(q), **tiles.options())
        attention_join[(B * H,)](o, lse, out, splits, D=D, BLOCK=triton.next_power_of_2(splits))
    return out


@decode_op.register_fake
def decode_fake(q, k, v, doc_start, scale, lengths=None):
    return q.new_empty(q.shape)
