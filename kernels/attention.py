"""Causal grouped-query attention inside documents: the one form that every phase uses.

Shapes: B batch, T query positions, S key positions (S >= T), H query heads, K key/value heads, D head width.
"""
import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc_start: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, grouped queries (Ainslie et al., arXiv 2305.13245), any float type.

    q (B, T, H, D); k, v (B, S, K, D) with H a multiple of K: head h reads key head h // (H / K). The queries are the
    last T of the S positions (T = S in training, T = 1 while decoding against a cache). doc_start (B, T) int32: where
    in 0..S-1 each query's document begins; a query sees the keys from there to itself. None: one document a row.
    Returns (B, T, H, D).
    """
    T, S = q.shape[1], k.shape[1]
    mask = None
    if doc_start is not None:
        key, query = torch.arange(S, device=q.device), torch.arange(S - T, S, device=q.device)
        mask = (key <= query[:, None]) & (key >= doc_start[:, :, None])  # (B, T, S)
        # an additive mask: SDPA would make one of a boolean mask anyway, at every layer and in the backward pass again
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))[:, None]
    elif 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       is_causal=mask is None and T > 1, enable_gqa=q.shape[2] != k.shape[2])
    return o.transpose(1, 2)
