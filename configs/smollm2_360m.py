"""SmolLM2-360M-Instruct on one GPU: SFT, distillation from SmolLM2-1.7B-Instruct (DPD), then RL.

UNTESTED: nobody has run this. Sizes of the model are those that its authors publish; rates, steps
and batches are guesses from configs/smollm2.py and configs/3b.py, for a GPU of 80 GB.

    python sft.py configs/smollm2_360m.py --init_from=SmolLM2-360M-Instruct
    python distill.py configs/smollm2_360m.py
    python rl.py configs/smollm2_360m.py

The teacher, beside this folder, has the same tokenizer, as distillation asks: all SmolLM2 have it.
"""
from configs import smollm2

model = dict(
    n_layers=32, hidden_size=960, ffn_size=2560, n_heads=15, n_kv_heads=5, head_dim=64,
    vocab_size=49_152, tie_embeddings=True, rope_theta=100_000.0, max_context=8192,
)

sft = smollm2.sft | dict(
    lr=1e-4, batch_tokens=2**16, micro_tokens=2**15, dtype="bfloat16", compile=True,
)

_gsm8k = "gsm8k=corpora/gsm8k/train.jsonl"
distill = dict(
    teacher="SmolLM2-1.7B-Instruct", problems={_gsm8k: 7000},
    n_samples=4, temperature=0.8, max_new_tokens=512, max_rows=256, context=1024, batch_pairs=64,
    micro_pairs=8, epochs=1, lr=2e-6, margin="token", beta=2.0,
    dtype="bfloat16", compile=True, log_every=5, save_every=50, prompts=smollm2.sft["prompts"],
)

_prompts = "corpora/prompts.jsonl"
rl = smollm2.rl | dict(
    stages=[dict(name="constraints", problems={f"constraints={_prompts}": 5000}, steps=300,
                 lr=[1, 0.1])],
    lr=2e-6, group_size=16, batch_groups=32, filter_samples=8, max_new_tokens=768, context=1536,
    micro_rows=32, max_rows=512, dtype="bfloat16", compile=True,
)

evaluate = smollm2.evaluate | dict(n_problems=256, max_new_tokens=768)
