r"""The teacher of the tiny distillation: the base model, trained for longer on worked problems.

    python sft.py configs/tiny_teacher.py --run=tiny/teacher --init_from=out/tiny/pretrain \
        --sft.data=out/tiny/practice/worked
"""
from configs.tiny import evaluate, model, sft

sft = sft | dict(
    lr=4e-3,
    stages=[dict(name="teacher", trained_tokens=700_000, lr=[1, 0.01], curve="1-sqrt", context=256,
                 mixture=dict(math=4, code=4, form=2, tools=2, programs=3))],
    prompts=[], compare=False)

evaluate = evaluate | dict(n_problems=256)
