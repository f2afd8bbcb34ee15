"""Your own text, character by character: 0.85M parameters, 2000 steps of 12 x 64 characters, under
two CPU minutes.

    python -m data.text.corpus configs/char.py --corpus.path=FILE
    python pretrain.py configs/char.py --corpus.path=FILE

The sizes are those of nanoGPT's CPU example, whose README reports 1.88 nats a character on
tinyshakespeare.
"""
model = dict(
    n_layers=4, hidden_size=128, ffn_size=352, n_heads=4, n_kv_heads=4, head_dim=32, max_context=64,
    tie_embeddings=True, init_std=0.04,
)

tokenizer = dict(kind="char")

corpus = dict(path="input.txt", val_fraction=0.1)

pretrain = dict(
    lr=3e-3,
    batch_tokens=12 * 64,
    stages=[
        dict(name="warmup", tokens=76_800, lr=[0, 1], context=64, mixture=dict(text=1)),
        dict(name="stable", tokens=998_400, lr=[1, 1], context=64, mixture=dict(text=1)),
        dict(name="decay", tokens=460_800, lr=[1, 0.01], curve="1-sqrt", context=64,
             mixture=dict(text=1)),
    ],
    log_every=100, save_every=1000, prompts=["\n"],
)

evaluate = dict(tasks=[])
