"""SmolLM2-135M-Instruct through SFT and RL on public data: a CPU of two cores and 24 GB, or a GPU.

The checkpoint is a Hugging Face folder, given as --init_from (docs/REAL.md has every command):

    python sft.py configs/smollm2.py --init_from=SmolLM2-135M-Instruct   # on GSM8K
    python rl.py configs/smollm2.py --init_from=SmolLM2-135M-Instruct    # on constraints

Each phase starts from the folder: the two say different things. Models of this size were tuned at
rates up to 1e-3 by their authors; the rates, sizes and steps here are our choice, for four hours of
SFT and an hour and a half of RL on two cores. On a GPU take bfloat16, and larger batches, which
cost nothing there: micro_tokens, micro_rows and max_rows may grow with its memory.
"""
model = dict(
    n_layers=30, hidden_size=576, ffn_size=1536, n_heads=9, n_kv_heads=3, head_dim=64,
    vocab_size=49_152, tie_embeddings=True, rope_theta=100_000.0, max_context=8192,
)

# 7,473 problems and their work, in its own words: python -m data.sets.solutions makes the file
sft = dict(
    pools=dict(gsm8k=[dict(path="corpora/gsm8k/solutions.jsonl")]),
    lr=2e-4, batch_tokens=2**14, micro_tokens=2**11, weight_decay=0.0,
    stages=[
        dict(name="warmup", epochs=dict(gsm8k=0.05), lr=[0, 1], context=1024),
        dict(name="solutions", epochs=dict(gsm8k=0.95), lr=[1, 0.1], curve="cosine", context=1024),
    ],
    dtype="float32", log_every=1, save_every=25,
    prompts=["Tom has 3 bags of 12 apples. He eats 4. How many apples are left?"],
)

# Prompts of your own, each with one to three of IFEval's constraints (data/sets/constraints.py).
# The reward is the share that is met, so groups differ even where all are seldom met: no filter.
# No KL term either: so few steps do not lead far from answers of the prompt, of which no rule sees
# anything; a longer run should have one, as Tülu 3 has. At temperature 1 half of what so small a
# model says is not language. A response that never ends earns nothing: half of a text keeps many a
# constraint, and where that counts, those that end are worse than the mean, and ever fewer do.
_prompts = "corpora/prompts.jsonl"
rl = dict(
    stages=[dict(name="constraints", problems={f"constraints_share={_prompts}": 160}, steps=40,
                 lr=[1, 0.1])],
    lr=3e-5, weight_decay=0.0, group_size=8, batch_groups=4, filter_samples=0, temperature=0.7,
    max_new_tokens=256, cut_earns=False, context=768, micro_rows=8, max_rows=64,
    dtype="float32", log_every=1, save_every=12,
    prompts=["What is a comet? Answer in exactly two bullet points, such as: * This is a point."],
)

# Greedy, an answer each. Nothing is evaluated in a phase: evaluate.py scores before and after
evaluate = dict(tasks=[], n_problems=64, k=1, temperature=0.0, max_new_tokens=320, max_rows=64)
