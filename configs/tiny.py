"""About 1M parameters, 2 CPU cores, 45 minutes: the whole method small enough to watch.

The high pool is verified textbook pages; the medium pool is text of this Python installation, with
corrupted copies of such pages in it. Sizes, rates and shares are our choice.
"""
_pages = dict(math=4, drills=1, code=2, tools=0.8, form=1.5, recall=0.7)

model = dict(
    n_layers=4, hidden_size=128, ffn_size=352, n_heads=4, n_kv_heads=2, head_dim=32,
    rope_theta=10_000.0, max_context=256, tie_embeddings=True, init_std=0.04,
)

tokenizer = dict(kind="bpe", vocab_size=1024, train_mb=4.0)

corpus = dict(
    pools=dict(
        high=[dict(pages=16_000, families=_pages, seed=1)],
        medium=[dict(pages=5_000, families=_pages, seed=2, corrupt=1.0), dict(stdlib=1.5)],
        reasoning=[dict(pages=8_000, families=dict(math=3, code=3, recall=2), seed=3)],
    ),
    val_fraction=0.03,
)

pretrain = dict(
    lr=4e-3,
    batch_tokens=4096,
    stages=[
        dict(name="warmup", tokens=150_000, lr=[0, 1], context=128, mixture=dict(high=1, medium=1)),
        dict(name="diversity", tokens=1_000_000, lr=[1, 1], context=128,
             mixture=dict(high=1, medium=1)),
        dict(name="high quality", tokens=1_150_000, lr=[1, 1], context=128, mixture=dict(high=1)),
        dict(name="decay", tokens=900_000, lr=[1, 1 / 300], curve="1-sqrt", context=256,
             rope_theta=40_000.0,
             mixture=dict(high=1, reasoning=1)),
    ],
    log_every=20, save_every=200, eval_problems=64,
    prompts=["Problem: Mia has 12 apples.", "def ", "The"],
)

# A small model refines: the prompts have few tokens, for one that learned them by practice
# (tiny_teacher.py). Who does what is decided by a trial.
refine = dict(
    models=dict(
        base=dict(checkpoint="pretrain", prompt_format="document", max_new_tokens=64),
        teacher=dict(checkpoint="teacher/sft", max_new_tokens=96),
    ),
    drafters=["base", "teacher"],
    checklist="best", evaluators=["best"], revisers=["best"], completer="best", check_steps=True,
    chain_attempts=3, own_chains=True,
    trial=dict(models=["base", "teacher"], seed=9,
               problems=dict(math=30, form=20, code=30, tools=20)),
    instructions=dict(
        math=dict(problems=1600, family="math", seed=4),
        form=dict(problems=800, family="form", seed=4),
        code=dict(problems=1600, family="code", seed=4),
        tools=dict(problems=500, family="tools", seed=4),
        general=dict(problems=800, family="recall", seed=4, own_answers=True),
    ),
    practice=dict(model="base", seed=5, problems=dict(math=1200, form=800, code=700, tools=500),
                  chains=dict(math=3000, form=1000, code=3000, tools=1000),
                  worked=dict(math=6000, code=6000, form=3000, tools=2000, recall=3000)),
    prompts=dict(
        checklist="Checklist: {instruction}",
        evaluate="{instruction}\n{response}\nCheck: {items}",
        revise="{instruction}\n{response}\n{critique}\nRevise.",
        failure="{critique}",
        complete="{instruction}\n{solution}\nExplain.",
    ),
)

# Code problems made by machine, statement first and solution first: for SFT, for the distillation
# and, above all, for RL's coding stage; the same for every run
synthesize = dict(n=600, variants=3, conversations=500, folder="out/synthetic")
_programs = [f"synthetic={synthesize['folder']}/{way}.jsonl" for way in ("forward", "backward")]

sft = dict(
    lr=2e-3, batch_tokens=4096,
    pools=dict(programs=[dict(path=f"{synthesize['folder']}/programs.jsonl")]),
    stages=[
        # the report: 50 % math, 30 % science, 20 % code; then 40 % harder reasoning, 30 % general,
        # 20 % tools, 10 % code: of so little, code is forgotten at this size. General is passkeys:
        # without any, SFT forgets them
        dict(name="cold start", trained_tokens=90_000, lr=[1, 1], context=256,
             mixture=dict(math=5, form=3, code=2, general=1)),
        dict(name="overall", trained_tokens=280_000, lr=[1, 0.01], curve="1-sqrt", context=256,
             mixture=dict(math=3, code=4, form=3, tools=2, programs=2, general=1)),
    ],
    log_every=20, save_every=200, eval_tasks=_programs,
    prompts=["Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"],
)

# The teacher: tiny_teacher.py
distill = dict(
    teacher="teacher/sft",
    problems=dict(math=1000, code=800, form=500, tools=400) | dict.fromkeys(_programs, 200),
    n_samples=2, temperature=1.0, max_new_tokens=80, context=256,
    batch_pairs=32, epochs=2, lr=2.5e-4, dpo=0.1,
    # of a sum over some 40 tokens, beside two means over tokens: with 1 it alone decides, and harms
    log_every=10, prompts=sft["prompts"], eval_tasks=_programs,
)

# With noise=0.15 labels favour the longer reply, as people's do: what that leads to is in
# experiments/hacking.py
reward = dict(
    preferences=[dict(taste=3000, seed=6)], held_out=[dict(taste=500, seed=7)],
    context=256, batch_pairs=32, epochs=1, lr=1e-3, log_every=20,
)

# Decides what rules leave open, the phrases: a small model that learned the protocol by heart from
# transcripts (tiny_verifier.py), in few words.
_protocol = dict(system="", case="Gold: {gold}\nGiven: {answer}", ran="{stdout}", silent="Nothing.",
                 neither="Verdict?", last="")
transcripts = dict(n=12_000, seed=8, prompts=_protocol)
_verifier = dict(model=dict(checkpoint="verifier/sft", max_new_tokens=40, temperature=0),
                 prompts=_protocol, must_compute=True)

# Rollouts at the temperature at which answers are asked for: at 1, half the gain is lost. Many
# problems with 4 samples of each in the filter, in place of the report's 16: a problem that comes
# back five times is learned by heart. Rates fall, for the noise of the last steps costs the other
# tasks; the later stages have half of STEM's: tried with all of it, each cost mathematics 0.02 to
# 0.03.
rl = dict(
    stages=[
        dict(name="STEM", problems=dict(math=1000, phrases=600), steps=80, lr=[1, 0.1]),
        dict(name="coding", problems=dict(code=800) | dict.fromkeys(_programs, 400), steps=60,
             lr=[0.5, 0.05]),
        # without kl one of two runs ended in "88 miles miles miles miles!"
        dict(name="preference", problems=dict(taste=600), steps=60, reward="pairwise",
             temperature=0.9, lr=[0.5, 0.125], kl=0.05),
    ],
    reward_model="reward", verifier=_verifier, group_size=8, batch_groups=32, temperature=0.6,
    max_new_tokens=80, context=256, lr=2e-4,
    weight_decay=0.0, filter_samples=4, log_every=10, eval_problems=256,
    eval_tasks=["phrases", *_programs],
)

evaluate = dict(tasks=["math", "code", "tools", "form", "recall", "taste"],
                n_problems=256, k=4, max_new_tokens=80, verifier=_verifier)
