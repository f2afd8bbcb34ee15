r"""The chain completer of the tiny refinement: question and answer to summary and chain of thought.

It begins as one of the other models of the refinement, which can solve problems already.

    python sft.py configs/tiny_completer.py --run=tiny/completer --init_from=out/tiny/ann/sft \
        --sft.data=out/tiny/practice
"""
from configs.tiny import evaluate, model, sft

sft = sft | dict(
    lr=2e-3,
    stages=[dict(name="practice", epochs=dict(chain=2), lr=[1, 0.01], curve="1-sqrt", context=256)],
    prompts=[], compare=False)

evaluate = evaluate | dict(tasks=[])
