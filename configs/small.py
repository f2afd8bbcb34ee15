"""About 126M parameters, one GPU: GPT-2's size, for ideas that the tiny model is too small for.

Put text with a `text` column (or plain .txt) into the folders below: FineWeb-Edu's documents of
score 3 and above make a good high pool, those below it a medium one; FineMath-4+ with code makes a
reasoning pool. Sizes, rates: our choice.
"""
model = dict(
    n_layers=12, hidden_size=768, ffn_size=2048, n_heads=12, n_kv_heads=4, head_dim=64,
    rope_theta=10_000.0, max_context=4096,
)

tokenizer = dict(kind="bpe", vocab_size=32_768, train_mb=500.0)

corpus = dict(
    pools=dict(
        high=[dict(path="corpora/high")],
        medium=[dict(path="corpora/medium")],
        reasoning=[dict(path="corpora/reasoning")],
    ),
    val_fraction=0.002,
)

pretrain = dict(
    lr=1.5e-3,
    batch_tokens=2**19,
    micro_tokens=2**13,
    stages=[
        dict(name="warmup", tokens=100e6, lr=[0, 1], context=1024, mixture=dict(high=1, medium=1)),
        dict(name="diversity", tokens=1.9e9, lr=[1, 1], context=1024,
             mixture=dict(high=1, medium=1)),
        dict(name="high quality", tokens=1e9, lr=[1, 1], context=1024, mixture=dict(high=1)),
        dict(name="decay", tokens=0.6e9, lr=[1, 1 / 300], curve="1-sqrt", context=4096,
             rope_theta=40_000.0,
             mixture=dict(high=1, reasoning=1)),
    ],
    pool_tokens=dict(high=2e9, medium=1e9, reasoning=0.5e9),
    dtype="bfloat16", compile=True,
    log_every=10, eval_every=500, eval_tokens=2_000_000, save_every=500,
    prompts=["The meaning of life is", "def fibonacci(n):", "The capital of Norway is"],
)

evaluate = dict(tasks=[])  # the generated families are made for the tiny model's corpus
