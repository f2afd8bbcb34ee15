r"""The agentic verifier of the tiny RL: a program that compares, its output, the verdict.

    python sft.py configs/tiny_verifier.py --run=tiny/verifier --init_from=out/tiny/pretrain \
        --sft.data=out/tiny/verifier_data
"""
from configs.tiny import evaluate, model, sft

sft = sft | dict(
    lr=2e-3, batch_tokens=2048,
    stages=[dict(name="transcripts", epochs=dict(transcripts=1), lr=[1, 0.01], curve="1-sqrt",
                 context=256)],
    prompts=[], compare=False)

evaluate = evaluate | dict(tasks=[])
