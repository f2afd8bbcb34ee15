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

from kernels import use_triton
from kernels.attention import Filled, attention, decode_attention
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
    """Keys and values of B rows of tokens, each of a length of its own.

    Of each layer one tensor (B, 2, K, S, D), with keys and values at 0 and 1: a row's tokens stand
    at 0, 1, … lengths[b] - 1. What is behind them is never read, but is finite. There is room for S
    tokens a row: S grows in blocks up to `size`, and ended rows' places are used again. All that
    moves moves a layer at a time, so there is never a second cache beside the first.
    """

    BLOCK = 4096  # tokens that S grows by: our choice
    PART = 16     # rows that are read together, to the length of their longest: our choice

    def __init__(self, cfg: ModelConfig, batch: int, size: int, device, dtype):
        self.size, self.lengths = size, [0] * batch
        self.n_moves = 0  # how often it moved to other memory
        shape = (batch, 2, cfg.n_kv_heads, 0, cfg.head_dim)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype)] * cfg.n_layers
        # A kernel stops at each row's own length; PyTorch needs a mask, and parts.
        self.by_kernel = use_triton(self.layers[0], cfg.kernels) and cfg.head_dim <= 128

    @staticmethod
    def bytes_per_token(cfg: ModelConfig, dtype: torch.dtype) -> int:
        """What a token of a row takes in all layers."""
        return 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * dtype.itemsize

    def reserve(self, batch: int, length: int) -> None:
        """Makes room for `batch` rows of `length` tokens."""
        B, _, _, S, _ = self.layers[0].shape
        if batch <= B and length <= S:
            return
        if length > S:
            S = min(-(-length // self.BLOCK) * self.BLOCK, max(self.size, length))
        self.n_moves += 1
        for layer, old in enumerate(self.layers):
            new = old.new_zeros(batch, *old.shape[1:3], S, old.shape[4])
            kept = min(batch, B)
            new[:kept, :, :, :old.shape[3]] = old[:kept]
            self.layers[layer] = new

    def fill(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores the first T tokens of each row: k, v (B, T, K, D)."""
        B, T, _, _ = k.shape
        tensor = self.layers[layer]
        tensor[:B, 0, :, :T] = k.transpose(1, 2)
        tensor[:B, 1, :, :T] = v.transpose(1, 2)

    def copy(self, source: "KVCache", places: list[tuple[int, int]]) -> None:
        """Copies rows of a cache, which may be this one: (row there, its new place here) each."""
        if not places:
            return
        n_tokens = max(source.lengths[row] for row, _ in places)
        rows, places = torch.tensor(places, device=self.layers[0].device).T
        for mine, theirs in zip(self.layers, source.layers):
            mine[places, :, :, :n_tokens] = theirs[rows, :, :, :n_tokens]

    def next_step(self) -> "DecodeStep":
        """Room for one more token of each row; to be called before each Transformer.decode."""
        B, longest = len(self.lengths), max(self.lengths) + 1
        self.reserve(B, longest)
        positions = torch.tensor(self.lengths).to(self.layers[0].device)
        parts = [(slice(0, B), longest, None)]
        if not self.by_kernel and min(self.lengths) + 1 < longest:
            parts = self._parts(positions)
        self.lengths = [length + 1 for length in self.lengths]
        return DecodeStep(self, positions, parts)

    def _parts(self, positions: torch.Tensor) -> list:
        """Filled.parts: rows that are read together, each part to the length of its longest."""
        columns = torch.arange(max(self.lengths) + 1, device=positions.device)
        beyond = columns > positions[:, None]
        mask = self.layers[0].new_zeros(beyond.shape).masked_fill_(beyond, float("-inf"))
        parts = []
        for first in range(0, len(positions), self.PART):
            rows = slice(first, first + self.PART)
            n_keys = max(self.lengths[rows]) + 1
            parts.append((rows, n_keys, mask[rows, None, None, :n_keys]))
        return parts


class DecodeStep(NamedTuple):
    """One more token of each row of a cache."""
    cache: KVCache
    positions: torch.Tensor  # (B,) int64: where each row's new token stands
    parts: list              # what attention reads, as kernels.attention.Filled has them


class Layout(NamedTuple):
    """Where the tokens stand: what attention needs beside them, the same in all layers."""
    cos: torch.Tensor               # (..., T, 1, D/2) fp32 as rotary() makes it; in the blocks
                                    # (..., T, 1, D), as rotate() wants it
    sin: torch.Tensor
    doc_start: torch.Tensor | None = None  # (B, T) int32: where each token's document begins
    shared: object | None = None    # a data.chat.packing.SharedPrefix: rows that begin alike
    cache: KVCache | None = None    # to be filled with these tokens, or with one more of each row …
    places: torch.Tensor | None = None     # … (2 B K,): where, among all places of a layer …
    filled: Filled | None = None           # … and what attention then reads


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
        cos, sin, shared = layout.cos, layout.sin, layout.shared
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim), cos, sin)  # (B, T, H, D)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim), cos, sin)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)                    # (B, T, K, D)
        if layout.filled is not None:
            tensor = layout.cache.layers[layer]
            tensor.view(-1, self.head_dim).index_copy_(
                0, layout.places, torch.cat((k, v), 1).view(-1, self.head_dim))
            k, v = tensor[:B].unbind(1)
            return self.o_proj(decode_attention(q, k, v, layout.filled, self.kernels).flatten(2))
        if layout.cache is not None:
            layout.cache.fill(layer, k, v)
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

        doc_start (B, T) int32: the position in the row where each token's document begins;
        attention stays inside the document and rotary positions restart there. None: one document a
        row. cache: an empty one, which is filled with the tokens' keys and values. With shared
        (data.chat.packing.SharedPrefix) tokens and result are (1, U), and doc_start describes the
        rows.
        """
        T = tokens.shape[1] if shared is None else shared.index.shape[1]
        positions = torch.arange(T, device=tokens.device)
        if doc_start is not None:
            positions = positions - doc_start
        cos, sin = self.rotary(positions if shared is None else shared.collect(positions))
        if cache is not None:
            cache.reserve(*tokens.shape)
            cache.lengths = [T] * len(tokens)
        return self._through_blocks(tokens, Layout(cos, sin, doc_start, shared, cache))

    def decode(self, tokens: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """Hidden states (B, 1, C) of tokens (B, 1) that come next in the rows of a cache.

        step: of cache.next_step(). Without a gradient.
        """
        positions = step.positions
        B, n_runs, S = len(positions), 2 * self.cfg.n_kv_heads, step.cache.layers[0].shape[3]
        # a layer (B, 2, K, S, D) as places of D numbers: a row has 2 K runs of S places each
        run_starts = torch.arange(B * n_runs, device=positions.device).view(B, n_runs) * S
        places = (run_starts + positions[:, None]).flatten()
        cos, sin = self.rotary(positions[:, None])
        filled = Filled((positions + 1).int(), step.parts)
        layout = Layout(cos, sin, cache=step.cache, places=places, filled=filled)
        return self._through_blocks(tokens, layout)

    def _through_blocks(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        cos = torch.cat((layout.cos, layout.cos), -1).type_as(x)  # as rotate() wants them
        sin = torch.cat((-layout.sin, layout.sin), -1).type_as(x)
        layout = layout._replace(cos=cos, sin=sin)
        for block in self.layers:
            x = block(x, layout)
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
