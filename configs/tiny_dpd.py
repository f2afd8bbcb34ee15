"""What `python -m experiments.dpd` trains: the tiny model from SFT on.

Each arm has other parts of the distillation's loss.
"""
from configs.tiny import distill, evaluate, model

evaluate = evaluate | dict(
    tasks=["math", "code", "tools", "form"], n_problems=128, k=4, max_new_tokens=72,
)
