"""Does FG-WSD help? The model, data and rates of `python -m experiments.fg_wsd`.

The experiment sets the stages of each arm. Half the pages are clean, half are corrupted twins of
such pages, so that quality and subject are not confused: the report's high and medium pool in
small. The filtered pools hold the same pages, told apart by data/filter/quality.py. One task
family, short programs, since only that is learned in 1.2M tokens. Sizes are our choice: what five
seeds of five arms twice can afford in 45 minutes on 2 cores.
"""
_clean = dict(pages=4200, families=dict(code=1), seed=1)
_corrupted = dict(pages=4750, families=dict(code=1), seed=2, corrupt=1.0)

model = dict(
    n_layers=4, hidden_size=96, ffn_size=264, n_heads=3, n_kv_heads=1, head_dim=32,
    rope_theta=10_000.0, max_context=256, tie_embeddings=True, init_std=0.04,
)

tokenizer = dict(kind="bpe", vocab_size=512, train_mb=1.0)

quality = dict(sources=[_clean, _corrupted], labels="out/fg_wsd/labels.jsonl", high=6.0, drop=0.0)

corpus = {
    "pools": {
        "high": [_clean],
        "medium": [_corrupted],
        "filtered high": [dict(path="out/fg_wsd/quality/high")],
        "filtered medium": [dict(path="out/fg_wsd/quality/medium")],
    },
    "val_fraction": 0.03,
}

pretrain = dict(
    lr=4e-3,        # the sweep of experiments/fg_wsd.py chooses
    batch_tokens=2048,
    stages=[],      # the arms of experiments/fg_wsd.py
    held_out=["high"],
    log_every=100, save_every=200, keep=1,
)

evaluate = dict(tasks=["code"], n_problems=512, k=4, max_new_tokens=64)
