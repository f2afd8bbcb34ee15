"""The control of configs/context.py: the same decay at 256 tokens with RoPE's base left as it
was."""
from configs.context import corpus, evaluate, model, pretrain, tokenizer

*_stable, _decay = pretrain["stages"]
pretrain = pretrain | dict(stages=[*_stable, _decay | dict(rope_theta=None)])
