"""What `python -m experiments.rl` trains: the tiny model from DPD or SFT on."""
from configs.tiny import evaluate, model, rl

evaluate = evaluate | dict(
    tasks=["math", "code", "tools", "form", "taste"], n_problems=1024, k=2, max_new_tokens=80,
)
