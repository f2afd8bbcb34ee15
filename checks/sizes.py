"""How large is a model, and does its training fit? `python -m checks.sizes configs/3b.py`

Parameters of each part, training FLOPs per token, bytes of the KV cache, and GB per GPU in
training: by a formula, at once. checks.memory runs the steps themselves, of all phases.
"""
from settings import load_config

import common
from data.text.tokenizer import TokenizerConfig
from model import ModelConfig, count_parameters, flops_per_token, meta_model

GPU_SIZES = (24, 80, 141)  # GB of memory
RUNTIME_GB = 2.0           # what a process holds in any case: our estimate
USABLE = 0.92              # share of a GPU's memory that training may take: our choice
N_GPUS = (1, 8, 64)


def main():
    config = load_config(__doc__, options=(), model=ModelConfig, tokenizer=TokenizerConfig)
    cfg = config.model
    cfg.vocab_size = cfg.vocab_size or config.tokenizer.vocab_size
    print(f"{config.run}: {cfg.n_layers} layers, width {cfg.hidden_size}, ffn {cfg.ffn_size}, "
          f"{cfg.n_heads} query and {cfg.n_kv_heads} key/value heads of {cfg.head_dim}, "
          f"vocabulary {cfg.vocab_size}")
    print_parameters(cfg)
    print_flops(cfg)
    print_cache(cfg)
    print_memory(cfg, micro_tokens=16384, recompute=False)
    print_memory(cfg, micro_tokens=8192, recompute=True)
    print_memory(cfg, micro_tokens=max(32768, cfg.max_context), recompute=True)


def print_parameters(cfg: ModelConfig) -> None:
    counts = count_parameters(meta_model(cfg))
    print("\nparameters")
    for part, n in counts.items():
        print(f"  {part:12}{n:>16,} {n / counts['total']:7.1%}")
    body = counts["total"] - counts["embedding"] - counts["lm_head"]
    print(f"  {'not embeddings':12}{body:>14,}")


def print_flops(cfg: ModelConfig) -> None:
    print("\ntraining FLOPs a token")
    for divisor in (256, 64, 16, 4, 1):
        context = cfg.max_context // divisor
        if context >= 64:
            gflops = flops_per_token(cfg, context) / 1e9
            print(f"  context {context:>7,}{gflops:>12.3f} GFLOP")


def print_cache(cfg: ModelConfig) -> None:
    width = 2 * cfg.n_kv_heads * cfg.head_dim  # keys and values
    bytes_per_token = 2 * cfg.n_layers * width  # in bf16
    gb = bytes_per_token * cfg.max_context / 1e9
    print(f"\nKV cache: {bytes_per_token:,} bytes a token in bf16; "
          f"{gb:.3f} GB at {cfg.max_context:,}")


def print_memory(cfg: ModelConfig, micro_tokens: int, recompute: bool) -> None:
    """A table of GB per GPU: a row for each part, a column for each number of GPUs."""
    kept = "with activation checkpointing" if recompute else "all activations kept"
    print(f"\nwill it fit? GB a GPU in training, by estimate: {micro_tokens:,} tokens "
          f"a forward pass, {kept}")
    columns = [training_memory_gb(cfg, gpus, micro_tokens, recompute) for gpus in N_GPUS]
    totals = [sum(column.values()) for column in columns]
    print_row("", ["1 GPU", "8 GPUs", "64 GPUs"])
    for part in columns[0]:
        print_row(part, [f"{column[part]:.1f}" for column in columns])
    print_row("total", [f"{total:.1f}" for total in totals])
    for size in GPU_SIZES:
        answers = ["fits" if total < USABLE * size else "no" for total in totals]
        print_row(f"a GPU of {size} GB", answers)


def print_row(name: str, cells: list[str]) -> None:
    print(f"  {name:64}" + "".join(f"{cell:>9}" for cell in cells))


def training_memory_gb(
        cfg: ModelConfig, gpus: int, micro_tokens: int, recompute: bool,
        n_passes: int = 2) -> dict[str, float]:
    """Estimated GB per GPU of pretrain.py, part by part; n_passes: forward passes of a step.

    In bytes of fp32 weights and AdamW's two states, sharded; of bf16 weights, gathered; of one
    pass's activations, of micro_tokens tokens, without torch.compile. checks.memory runs the step
    and agrees to 10 %.
    """
    C, V, L, F = cfg.hidden_size, cfg.vocab_size, cfg.n_layers, cfg.ffn_size
    counts = count_parameters(meta_model(cfg))
    root = counts["embedding"] + counts["lm_head"]
    block = (counts["total"] - root) / L

    # Bytes per token, in bf16: what a block keeps for its backward pass, and what that adds.
    heads = 2 * cfg.n_heads + 2 * cfg.n_kv_heads
    of_block = 2 * (4 * C + heads * cfg.head_dim + 4 * F)
    added = 2 * (C + 2 * F)
    kept = 2 * C * L if recompute else of_block * L
    in_backward = kept + added + (of_block if recompute else 0)

    chunk = min(2**28, micro_tokens * V)  # logits at a time
    while_loss = micro_tokens * kept + 2 * chunk + 6 * V * C
    while_backward = micro_tokens * in_backward + 2 * V * C
    return {
        "weights, AdamW: 12 bytes a parameter, sharded": 12 * counts["total"] / gpus / 1e9,
        "gathered: embedding, lm_head, two blocks": 2 * (root + 2 * block) / 1e9,
        "gradients not reduced yet: 4 bytes a parameter": (
            4 * counts["total"] / 1e9 if n_passes > 1 else 0.0),
        "activations, and the loss or a block's backward pass": (
            max(while_loss, while_backward) / 1e9),
        "the sampler's copy": 2 * counts["total"] / 1e9,
        "CUDA's context, NCCL's buffers": RUNTIME_GB,
    }


if __name__ == "__main__":
    common.cli(main)
