r"""A small model of the tiny refinement: it drafts, writes checklists, judges and revises.

    python sft.py configs/tiny_writer.py --run=tiny/ann --init_from=out/tiny/pretrain \
        --sft.data=out/tiny/practice
"""
from configs.tiny import evaluate, model, sft

sft = sft | dict(
    lr=2e-3,
    stages=[dict(name="practice", conversations=6000, lr=[1, 0.01], curve="1-sqrt", context=256,
                 mixture=dict(draft=5, checklist=1, verdict=4, revision=6))],
    prompts=[], compare=False)

evaluate = evaluate | dict(tasks=[])
