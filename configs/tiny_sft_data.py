"""What `python -m experiments.sft_data` trains: the tiny model.

The experiment chooses the conversations.
"""
from configs.tiny import evaluate, model, sft

sft = sft | dict(prompts=[], keep=1)

evaluate = evaluate | dict(
    tasks=["math", "code", "tools", "form"], n_problems=128, k=4, max_new_tokens=72,
)
