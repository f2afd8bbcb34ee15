"""The scale of the report's FG-WSD ablation: about 1B parameters on 1T tokens (arXiv 2512.06266,
section 2).

The report gives no shape for this model; here it is the 3B's with fewer and narrower layers and a
smaller vocabulary.
"""
from configs.small import corpus, evaluate  # the same folders; only held-out share and size differ

model = dict(
    n_layers=24, hidden_size=1792, ffn_size=7168, n_heads=14, n_kv_heads=2, head_dim=128,
    rope_theta=100_000.0, max_context=32_768,
)

tokenizer = dict(kind="bpe", vocab_size=65_536, train_mb=2000.0)

corpus = corpus | dict(val_fraction=0.0001)

pretrain = dict(
    lr=4.5e-4,
    batch_tokens=2**21,
    micro_tokens=2**13,
    stages=[  # the 3B's shares of 1T tokens
        dict(name="warmup", tokens=4e9, lr=[0, 1], context=4096,
             mixture=dict(high=6.5, medium=6.0)),
        dict(name="diversity", tokens=539e9, lr=[1, 1], context=4096,
             mixture=dict(high=6.5, medium=6.0)),
        dict(name="high quality", tokens=283e9, lr=[1, 1], context=4096, mixture=dict(high=1)),
        dict(name="decay", tokens=174e9, lr=[1, 1 / 300], curve="1-sqrt", context=32_768,
             rope_theta=5e6,
             mixture=dict(high=1, reasoning=1)),
    ],
    pool_tokens=dict(high=283e9, medium=261e9, reasoning=87e9),
    dtype="bfloat16", compile=True, recompute=True,
    log_every=10, eval_every=2000, eval_tokens=10_000_000, save_every=1000,
    prompts=["The meaning of life is", "def fibonacci(n):", "The capital of Norway is"],
)
