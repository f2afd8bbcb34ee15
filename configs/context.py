"""Does the long-context stage work? The tiny model learns at 64 tokens; the decay has 256, by ABF
(arXiv 2309.16039).

Trained like any config; then `python -m checks.context` measures loss by position and passkeys by
distance, before and after the decay.
"""
from configs.tiny import model, tokenizer

model = model | dict(max_context=256)
tokenizer = tokenizer | dict(train_mb=2.0)

corpus = dict(
    pools=dict(
        short=[dict(pages=60_000, families={"recall:0-1": 2, "math": 1, "tools": 1, "form": 1},
                    seed=11)],
        long=[dict(pages=8_000, families={"recall:0-24": 3, "tools": 1}, seed=12)],
    ),
    val_fraction=0.05,
)

pretrain = dict(
    lr=4e-3,
    batch_tokens=4096,
    stages=[
        dict(name="warmup", tokens=150_000, lr=[0, 1], context=64, mixture=dict(short=1)),
        dict(name="stable", tokens=3_600_000, lr=[1, 1], context=64, mixture=dict(short=1)),
        dict(name="decay", tokens=800_000, lr=[1, 0.01], curve="1-sqrt", context=256,
             rope_theta=80_000.0,
             mixture=dict(long=1)),
    ],
    log_every=50, save_every=1000,
)

evaluate = dict(tasks=[])
