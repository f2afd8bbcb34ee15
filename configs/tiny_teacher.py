r"""The teacher of the tiny pipeline: it drafts, revises and completes the data of SFT (and would
judge, if the trial found it good enough), and its distribution is what DPD distils.

The base model, trained for longer than the student, on worked problems and on practice.

    python sft.py configs/tiny_teacher.py --run=tiny/teacher --init_from=out/tiny/pretrain \
        --sft.data=out/tiny/practice
"""
from configs.tiny import evaluate, model, sft

_worked = dict(math=4.5, code=5, form=3, tools=2, recall=0.5)
_practice = dict(checklist=0.3, verdict=0.7, revision=4, chain=3)

sft = sft | dict(
    lr=4e-3,
    stages=[dict(name="teacher", trained_tokens=800_000, lr=[1, 0.01], curve="1-sqrt", context=256,
                 mixture=_worked | _practice | dict(programs=2))],
    prompts=[], compare=False)

evaluate = evaluate | dict(n_problems=256)
