"""How large is a model, and does its training fit? `python -m checks.sizes configs/3b.py`

Parameters of each part, training FLOPs per token, bytes of the KV cache, and GB per GPU in
training: by estimate, not measured.
"""
import common
from data.text.tokenizer import TokenizerConfig
from model import ModelConfig, count_parameters, flops_per_token, meta_model

GPU_SIZES = (24, 80, 141)  # GB of memory
USABLE = 0.92              # share of a GPU's memory that training may take: our choice
N_GPUS = (1, 8, 64)


def main():
    config = common.load_config(
        "Prints the sizes of a model: `python -m checks.sizes configs/3b.py`",
        model=ModelConfig, tokenizer=TokenizerConfig)
    cfg = config.model
    cfg.vocab_size = cfg.vocab_size or config.tokenizer.vocab_size
    print(f"{config.run}: {cfg.n_layers} layers, width {cfg.hidden_size}, ffn {cfg.ffn_size}, "
          f"{cfg.n_heads} query and {cfg.n_kv_heads} key/value heads of {cfg.head_dim}, "
          f"vocabulary {cfg.vocab_size}")
    print_parameters(cfg)
    print_flops(cfg)
    print_cache(cfg)
    print_memory(cfg, micro_tokens=8192, recompute=False)
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
        cfg: ModelConfig, gpus: int, micro_tokens: int, recompute: bool) -> dict[str, float]:
    """Estimated GB per GPU of pretrain.py, part by part.

    fp32 weights, gradients and AdamW's two states, sharded; bf16 copies, gathered; activations of
    one forward pass of micro_tokens tokens, whole, or at block borders only (recompute) with those
    inside one block; a chunk of logits.
    """
    C, V, L = cfg.hidden_size, cfg.vocab_size, cfg.n_layers
    counts = count_parameters(meta_model(cfg))
    root = counts["embedding"] + counts["lm_head"]
    block = (counts["total"] - root) / L

    # Bytes per token, in bf16.
    heads = cfg.n_heads + cfg.n_kv_heads
    inside_block = 2 * (8 * C + 3 * cfg.ffn_size) + 2 * 2 * heads * cfg.head_dim
    activations = 2 * C * L + inside_block if recompute else inside_block * L

    chunk = min(2**28, micro_tokens * V)  # logits at a time
    sharded = 16 * counts["total"] / gpus
    gathered = (2 * block + root) * (2 + 2)
    loss = 6 * chunk + 4 * V * C
    return {
        "weights, gradients, AdamW (16 bytes a parameter, sharded)": sharded / 1e9,
        "gathered: two blocks, embedding and lm_head, their gradients": gathered / 1e9,
        "activations": micro_tokens * activations / 1e9,
        "loss: a chunk of logits, lm_head's fp32 gradient": loss / 1e9,
    }


if __name__ == "__main__":
    common.cli(main)
