"""Nanbeige4-3B: 3,933,637,120 parameters, 23T tokens (arXiv 2512.06266, sections 1 and 2, and the released config).

The report gives the stages, their tokens, rates and data, and 64K context by ABF in the decay. It is silent on batch,
stable context, decay curve, the rotary base before the raise, AdamW's settings and the decay's shares: our choice.
Nobody has 23T tokens: `--pretrain.total_tokens=10e9` shortens all stages alike.

tokenizer: the tokenizer.json of Nanbeige4-3B-Base on Hugging Face; corpora/: folders of .parquet, .jsonl or .txt.
"""
model = dict(
    n_layers=32, hidden_size=2560, ffn_size=10_496, n_heads=20, n_kv_heads=4, head_dim=128, vocab_size=166_144,
    rope_theta=100_000.0, max_context=65_536, norm_eps=1e-5, init_std=0.02,
)

tokenizer = dict(path="corpora/tokenizer.json")

corpus = dict(
    pools=dict(
        high=[dict(path="corpora/high")],            # 6.5T tokens: web, books, papers of high score, 15 % synthetic
        medium=[dict(path="corpora/medium")],        # 6.0T tokens: the rest that passed the filter
        reasoning=[dict(path="corpora/reasoning")],  # math, code, synthetic QA, long chains of thought
    ),
    val_fraction=0.00001,
)

pretrain = dict(
    lr=4.5e-4,
    batch_tokens=2**22,
    micro_tokens=2**13,
    stages=[  # warmup and diversity together are one epoch of high and one of medium; then high's second epoch
        dict(name="warmup", tokens=0.1e12, lr=[0, 1], context=4096, mixture=dict(high=6.5, medium=6.0)),
        dict(name="diversity", tokens=12.4e12, lr=[1, 1], context=4096, mixture=dict(high=6.5, medium=6.0)),
        dict(name="high quality", tokens=6.5e12, lr=[1, 1], context=4096, mixture=dict(high=1)),
        dict(name="decay", tokens=4e12, lr=[1, 1.5e-6 / 4.5e-4], curve="1-sqrt", context=65_536, rope_theta=5e6,
             mixture=dict(high=1, reasoning=1)),  # 64K needs a base of 2.9e6 (arXiv 2405.14591); 5e6 as released
    ],
    pool_tokens=dict(high=6.5e12, medium=6.0e12, reasoning=1e12),
    dtype="bfloat16", compile=True, recompute=True,
    log_every=10, eval_every=5000, eval_tokens=20_000_000, save_every=1000,
    prompts=["The meaning of life is", "def fibonacci(n):", "The capital of Norway is"],
)

evaluate = dict(tasks=[])
