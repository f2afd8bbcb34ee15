"""The decoder that every phase shares: a plain Llama, as in Nanbeige4-3B.

arXiv 2512.06266 and its released config: pre-norm, SwiGLU, grouped queries, rotary positions, no
biases. Parameters are named as in Hugging Face's Llama, so hf.py has nothing to rename. `python -m
checks.sizes CONFIG` prints the size of each part and what memory training needs.

Shapes: B batch, T time, C width, H heads, K key/value heads, D head width, V vocabulary, L layers,
S cache length.
"""
from settings import Bounds, Count, PositiveFloat, PositiveInt

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.rmsnorm import add_rms_norm, rms_norm


@dataclass
class ModelConfig:
    n_layers: Annotated[int, Bounds(1, 1000)]  # L, number of blocks
    hidden_size: Annotated[int, Bounds(1, 2**16)]  # C, width of the residual stream
    ffn_size: Count              # width of the SwiGLU layer
    n_heads: Count               # H, query heads
    n_kv_heads: Count            # K, key/value heads; H must be a multiple
    head_dim: Count              # D, width of a head: even, for rotary positions turn pairs
    vocab_size: PositiveInt | None = None  # V, rows of the embedding; None: the tokenizer's,
                                           # rounded up to a multiple of 64
    tie_embeddings: bool = False  # whether lm_head is the embedding
    rope_theta: PositiveFloat = 10000.0  # base of the rotary frequencies; a stage of pre-training
                                         # may raise it (ABF)
    max_context: PositiveInt = 4096  # max_position_embeddings that exports say
    norm_eps: Annotated[float, Bounds(above=0, below=1)] = 1e-5  # RMSNorm epsilon
    init_std: PositiveFloat = 0.02  # standard deviation of the initial weights
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: Triton on a GPU, PyTorch elsewhere

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, not {self.n_heads} of "
                             f"{self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}")


# What may differ between a checkpoint and a run.
NOT_OF_THE_WEIGHTS = ("rope_theta", "max_context", "init_std", "kernels")


class KVCache:
    """Keys and values of the tokens so far, and how many these are.

    Of each layer (B, S, K, D), with room for S >= length tokens: S grows in blocks up to `size`.
    All that moves moves a layer at a time, so there is never a second cache beside the first.
    """

    BLOCK = 4096  # tokens that S grows by: our choice

    def __init__(self, cfg: ModelConfig, batch: int, size: int, device, dtype):
        self.size, self.length = size, 0
        shape = (batch, 0, cfg.n_kv_heads, cfg.head_dim)
        self.k = [torch.empty(shape, device=device, dtype=dtype)] * cfg.n_layers
        self.v = list(self.k)

    @staticmethod
    def bytes_per_token(cfg: ModelConfig, dtype: torch.dtype) -> int:
        """What a token of a row takes in all layers."""
        return 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * dtype.itemsize

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (B, T, K, D) behind what is filled; returns all keys and values up to there."""
        end = self.length + k.shape[1]
        for tensors, new in ((self.k, k), (self.v, v)):
            if end > tensors[layer].shape[1]:
                tensors[layer] = self._grow(tensors[layer], end)
            tensors[layer][:, self.length:end] = new
        return self.k[layer][:, :end], self.v[layer][:, :end]

    def _grow(self, old: torch.Tensor, end: int) -> torch.Tensor:
        blocks = -(-end // self.BLOCK)
        room = min(blocks * self.BLOCK, self.size)
        new = old.new_empty(old.shape[0], room, *old.shape[2:])
        new[:, :self.length] = old[:, :self.length]
        return new

    def keep(self, rows: torch.Tensor) -> None:
        """Makes these rows the batch: finished ones leave, in place; repeated ones are copied.

        What rows leave behind is given back where S grows next.
        """
        n = len(rows)
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                if n > len(old):
                    tensors[layer] = old[rows]
                    continue
                old[:n, :self.length] = old[rows, :self.length]
                tensors[layer] = old[:n]


class Layout(NamedTuple):
    """Where the tokens stand: what attention needs beside them, the same in all layers."""
    cos: torch.Tensor               # (..., T, 1, D): rotary positions, as rotate() wants them
    sin: torch.Tensor
    doc_start: torch.Tensor | None  # (B, T) int32: where each token's document begins
    cache: KVCache | None
    shared: object | None           # a data.chat.packing.SharedPrefix: rows that begin alike


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864), half-split: x (B, T, heads, D); cos, sin (…, T, 1, D).

    (a cos - b sin, b cos + a sin) of x = (a, b), as x cos + (b, a) (-sin, sin): sin comes with the
    signs in it."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim, self.kernels = cfg.head_dim, cfg.kernels
        self.q_proj = nn.Linear(cfg.hidden_size, cfg.n_heads * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.hidden_size, bias=False)

    def forward(self, x, layout: Layout, layer: int):
        B, T, _ = x.shape
        cos, sin, cache, shared = layout.cos, layout.sin, layout.cache, layout.shared
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim), cos, sin)  # (B, T, H, D)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim), cos, sin)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)                    # (B, T, K, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if shared is not None:
            q, k, v = shared.spread(q), shared.spread(k), shared.spread(v)
        o = attention(q, k, v, layout.doc_start, self.kernels)
        if shared is not None:
            o = shared.collect(o)
        return self.o_proj(o.reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.ffn_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.ffn_size, bias=False)
        self.down_proj = nn.Linear(cfg.ffn_size, cfg.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.eps, self.kernels = cfg.norm_eps, cfg.kernels
        self.weight = nn.Parameter(torch.empty(cfg.hidden_size))

    def forward(self, x, residual=None):
        """Without a residual: norm(x). With one: (norm(x + residual), x + residual)."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, self.kernels)
        return add_rms_norm(x, residual, self.weight, self.eps, self.kernels)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.recompute = False  # activation checkpointing: keep only the block's input for the
                                # backward pass
        self.input_layernorm = RMSNorm(cfg)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x, layout: Layout):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, layout, use_reentrant=False)
        return self._forward(x, layout)

    def _forward(self, x, layout: Layout):
        attended = self.self_attn(self.input_layernorm(x), layout, self.layer)
        normed, x = self.post_attention_layernorm(attended, residual=x)
        return x + self.mlp(normed)


class Transformer(nn.Module):
    """Tokens to hidden states; kernels/cross_entropy.py makes losses of them, in chunks."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.rope_theta = cfg.rope_theta  # a plain number that a training stage may raise
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = RMSNorm(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def to_empty(self, *, device, recurse: bool = True):
        super().to_empty(device=device, recurse=recurse)
        if self.cfg.tie_embeddings and self.lm_head.weight is not self.embed_tokens.weight:
            self.lm_head.weight = self.embed_tokens.weight  # a plain module's to_empty() makes two
                                                            # of the tied one
        return self

    def forward(
        self,
        tokens: torch.Tensor,
        doc_start: torch.Tensor | None = None,
        cache: KVCache | None = None,
        shared=None,
    ):
        """tokens (B, T) int64 -> hidden states (B, T, C) after the last norm.

        doc_start (B, T) int32: the position in the row (0..T-1; with a cache 0..S-1) where each
        token's document begins; attention stays inside the document and rotary positions restart
        there. None: one document a row. With a cache the tokens continue what it holds, and are
        added to it. With shared (data.chat.packing.SharedPrefix) tokens and result are (1, U), and
        doc_start describes the rows.
        """
        past = cache.length if cache is not None else 0
        T = tokens.shape[1] if shared is None else shared.index.shape[1]
        positions = torch.arange(past, past + T, device=tokens.device)
        if doc_start is not None:
            positions = positions - doc_start
        cos, sin = self.rotary(positions if shared is None else shared.collect(positions))
        x = self.embed_tokens(tokens)
        cos = torch.cat((cos, cos), -1).type_as(x)  # as rotate() wants them
        sin = torch.cat((-sin, sin), -1).type_as(x)
        layout = Layout(cos, sin, doc_start, cache, shared)
        for block in self.layers:
            x = block(x, layout)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (..., T, 1, D/2), fp32, of positions (..., T): frequencies
        rope_theta^(-2i/D)."""
        exponent = torch.arange(
            0, self.cfg.head_dim, 2, device=positions.device, dtype=torch.float32
        )
        inv_freq = 1.0 / self.rope_theta ** (exponent / self.cfg.head_dim)
        angles = (positions[..., None].float() * inv_freq)[..., None, :]
        return angles.cos(), angles.sin()


@torch.no_grad()
def init_weights(
    model: Transformer, seed: int, assign=lambda parameter, full: parameter.copy_(full)
) -> None:
    """Normal(0, init_std) matrices (report, released config) and norms of 1.

    Each parameter has a generator of its own, seeded by (seed, its place), so that the weights do
    not depend on how many processes share them; `assign(parameter, full_tensor)` puts them into
    place (common.assign: sharded ones).
    """
    for place, parameter in enumerate(model.parameters()):
        if parameter.ndim == 1:
            full = torch.ones(parameter.shape)
        else:
            generator = torch.Generator().manual_seed((seed << 20) + place)
            full = torch.empty(parameter.shape).normal_(
                0.0, model.cfg.init_std, generator=generator
            )
        assign(parameter, full)


def meta_model(cfg: ModelConfig) -> Transformer:
    """The model without memory: for counting, and to be sharded before it gets any."""
    with torch.device("meta"):
        return Transformer(cfg)


# --------------------------------------------------------------------------------------------------
# Sizes

def count_parameters(model: Transformer) -> dict[str, int]:
    """Parameters of each part; a tied embedding counts once."""
    layer = model.layers[0]
    counts = {
        "embedding": _count(model.embed_tokens),
        "attention": _count(layer.self_attn) * len(model.layers),
        "mlp": _count(layer.mlp) * len(model.layers),
        "lm_head": 0 if model.cfg.tie_embeddings else _count(model.lm_head),
    }
    counts["norms"] = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    counts["total"] = _count(model)
    return counts


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def training_flops(cfg: ModelConfig, tokens: float, pairs: float) -> float:
    """FLOPs of training on sequences: 6 per weight of a product, and causal attention's products.

    tokens: of all sequences; pairs of a query and a key that it sees: the sum of length^2 / 2.
    6 (N tokens + 2 L H D pairs), where N leaves out the embedding's look-up but counts lm_head (as
    PaLM, arXiv 2204.02311, appendix B; theirs does not halve the attention).
    """
    counts = count_parameters(meta_model(cfg))
    matrices = counts["attention"] + counts["mlp"] + cfg.vocab_size * cfg.hidden_size
    return 6.0 * (matrices * tokens + 2 * cfg.n_layers * cfg.n_heads * cfg.head_dim * pairs)


def flops_per_token(cfg: ModelConfig, context: int) -> float:
    """training_flops per token of a sequence that fills the context."""
    return training_flops(cfg, 1, context / 2)
