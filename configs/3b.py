"""Nanbeige4-3B: 3,933,637,120 parameters, 23T tokens (arXiv 2512.06266, sections 1 and 2, and the
released config).

The report gives the stages, their tokens, rates and data, and 64K context by ABF in the decay. It
is silent on batch, stable context, decay curve, the rotary base before the raise, AdamW's settings
and the decay's shares: our choice. Nobody has 23T tokens: `--pretrain.total_tokens=10e9` shortens
all stages alike, and for it

    python -m data.text.corpus configs/3b.py --corpus.megabytes=2500

takes only the first 2.5 GB of text from each source; `megabytes` at a source does it one by one.

The report's data is not public. These data sets are, and those of pre-training without a gate and
for commercial use; beside each its licence as we know it (`data.text.corpus` prints what the card
says). The web sets overlap, each is deduplicated only within itself: see `dedup`.

tokenizer: that of the chat models, for Base's has no chat tokens. It fits Base's weights, too:

    hf download Nanbeige/Nanbeige4.1-3B tokenizer.json --local-dir corpora
"""
model = dict(
    n_layers=32, hidden_size=2560, ffn_size=10_496, n_heads=20, n_kv_heads=4, head_dim=128,
    vocab_size=166_144,
    rope_theta=100_000.0, max_context=65_536, norm_eps=1e-5, init_std=0.02,
)

tokenizer = dict(path="corpora/tokenizer.json")

_dclm = "mlfoundations/dclm-baseline-1.0-parquet"
# DCLM's score, of which the set has nothing below 0.018; the cut at 0.1 is our choice
_prob = "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob"

corpus = dict(
    pools=dict(
        high=[
            # ODC-BY, 1.3T tokens
            dict(hf="HuggingFaceFW/fineweb-edu", keep={"int_score": [3, None]}),
            # CC-BY-4.0, of 4T
            dict(hf=_dclm, keep={_prob: [0.1, None]}),
            # ODC-BY; the second is Chinese
            dict(hf="epfml/FineWeb-HQ"),
            dict(hf="epfml/FineWeb2-HQ", config="cmn_Hani"),
            # ODC-BY, books and papers
            dict(hf="HuggingFaceFW/finepdfs-edu", config="eng_Latn"),
            # ODC-BY, synthetic, 28B
            dict(hf="HuggingFaceTB/smollm-corpus", config="cosmopedia-v2"),
            # code; open, by file
            dict(hf="common-pile/stackv2_edu_filtered"),
        ],
        medium=[
            # ODC-BY, 4.1T
            dict(hf="HuggingFaceFW/fineweb-edu-score-2", keep={"int_score": [2, 2]}),
            # CC-BY-4.0
            dict(hf=_dclm, keep={_prob: [None, 0.0999999]}),
            # ODC-BY, Chinese
            dict(hf="HuggingFaceFW/fineweb-2", config="cmn_Hani"),
        ],
        math=[
            # ODC-BY, 34B
            dict(hf="HuggingFaceTB/finemath", config="finemath-3plus"),
            dict(hf="HuggingFaceTB/finemath", config="infiwebmath-3plus"),
            # ODC-BY, 371B in all
            dict(hf="LLM360/MegaMath", data_dir="megamath-web-pro"),
            dict(hf="LLM360/MegaMath", data_dir="megamath-web"),
        ],
        # beside that in high; stack-edu and megamath-code say where text is, not the text; The
        # Stack is gated
        code=[
            # MIT, web pages with code, 55B
            dict(hf="OpenCoder-LLM/opc-fineweb-code-corpus"),
            # ODC-BY, synthetic
            dict(hf="LLM360/MegaMath", data_dir="megamath-text-code-block"),
            dict(hf="LLM360/MegaMath", data_dir="megamath-translated-code"),
        ],
        qa=[
            # ODC-BY; the first is synthetic
            dict(hf="LLM360/MegaMath", data_dir="megamath-qa"),
            dict(hf="allenai/dolmino-mix-1124", config="flan"),
            dict(hf="allenai/dolmino-mix-1124", config="stackexchange"),
        ],
        # long chains of thought, after their problems; CC-BY-4.0
        thoughts=[
            dict(hf="nvidia/OpenMathReasoning", split="cot",
                 column=["problem", "generated_solution"]),
            dict(hf="nvidia/OpenCodeReasoning", config="split_0", split="split_0",
                 column=["input", "output"]),
        ],
        # ODC-BY, long documents
        long=[dict(hf="HuggingFaceFW/finepdfs", config="eng_Latn")],
    ),
    # of a page that several pools hold, the smaller pool keeps it
    dedup=["thoughts", "qa", "code", "math", "high", "long", "medium"],
    val_fraction=0.0001, val_tokens=2_000_000, shard_tokens=200_000_000,
)

pretrain = dict(
    lr=4.5e-4,
    batch_tokens=2**22,
    micro_tokens=2**14,  # of an H200, as python -m checks.memory configs/3b.py has it
    stages=[
        # the report's sizes of high and medium: with them, one epoch of each, then high's second
        dict(name="warmup", tokens=0.1e12, lr=[0, 1], context=4096, least_steps=500,
             mixture=dict(high=6.5, medium=6.0)),
        dict(name="diversity", tokens=12.4e12, lr=[1, 1], context=4096,
             mixture=dict(high=6.5, medium=6.0)),
        dict(name="high quality", tokens=6.5e12, lr=[1, 1], context=4096, mixture=dict(high=1)),
        dict(name="decay", tokens=4e12, lr=[1, 1.5e-6 / 4.5e-4], curve="1-sqrt", context=65_536,
             rope_theta=5e6, recompute=True, micro_tokens=2**16,
             # 64K needs a base of 2.9e6 (arXiv 2405.14591); 5e6 as released. Shares: near SmolLM3's
             # decay (0.62 web, 0.14 math and thoughts, 0.23 code), with less code, for less is to
             # be had, and `long` for the 64K
             mixture=dict(high=0.58, long=0.15, math=0.13, code=0.10, qa=0.02, thoughts=0.02)),
    ],
    pool_tokens=dict(
        # estimates, for --plan alone: published where they are, else guessed from rows and bytes
        high=5.4e12, medium=6.5e12, math=0.33e12, code=0.11e12, qa=0.026e12, thoughts=0.025e12,
        long=1.1e12),
    dtype="bfloat16", compile=True,
    log_every=10, eval_every=5000, eval_tokens=20_000_000, save_every=1000,
    prompts=["The meaning of life is", "def fibonacci(n):", "The capital of Norway is"],
)

# Data for SFT by the report's two mechanisms: your instructions (.jsonl with "prompt" or
# "messages"), answered by two OpenAI-compatible servers. 32K tokens at 10 a second are an hour; a
# server is at its best with hundreds of requests at once.
_long = dict(max_tokens=32_768, timeout=7200.0, concurrency=256)

refine = dict(
    models=dict(
        teacher=dict(url="http://localhost:8000/v1", **_long),
        second=dict(url="http://localhost:8001/v1", **_long),
    ),
    drafters=["teacher", "second"], n_drafts=2, checklist="teacher",
    evaluators=["teacher", "second"],
    revisers=["teacher"], completer="second", thoughts=False,
    instructions=dict(prompts=dict(path="corpora/instructions")),
)

# Apache-2.0; 850k math, 250k code, 100k science
_thoughts3 = dict(hf="open-thoughts/OpenThoughts3-1.2M")

sft = dict(
    lr=4e-5, batch_tokens=2**21, micro_tokens=2**16,
    pools=dict(
        math=[
            _thoughts3 | dict(keep={"domain": ["math", "math"]}),
            # CC-BY-4.0, 3.2M
            dict(hf="nvidia/OpenMathReasoning", split="cot",
                 column=["problem", "generated_solution"]),
        ],
        science=[_thoughts3 | dict(keep={"domain": ["science", "science"]})],
        code=[
            _thoughts3 | dict(keep={"domain": ["code", "code"]}),
            # CC-BY-4.0, 570k
            dict(hf="nvidia/OpenCodeReasoning", config="split_0", split="split_0",
                 column=["input", "output"]),
        ],
        # Apache-2.0, 220k
        reasoning=[dict(hf="open-r1/OpenR1-Math-220k")],
        # ODC-BY, parts of it NC, 940k
        general=[dict(hf="allenai/tulu-3-sft-mixture")],
        # yours: "messages" with tool calls and "tools", as OpenAI has them
        tools=[dict(path="corpora/tools")],
    ),
    stages=[
        # The report: 30M conversations at first, 50 % math, 30 % science, 20 % code. So much is not
        # public, and science would come back 90 times: epochs of what there is, 6M in all
        dict(name="cold start", epochs=dict(math=1, science=3, code=2), lr=[1, 1], context=32_768),
        # the report's shares; as many conversations as are three epochs of `reasoning`
        dict(name="overall", conversations=1_650_000, lr=[1, 0.1], curve="cosine", context=65_536,
             mixture=dict(reasoning=4, general=3, tools=2, code=1)),
    ],
    dtype="bfloat16", compile=True, recompute=True, log_every=10, save_every=500,
    prompts=["How many prime numbers are there below 50?"],
)

# The teacher: any Llama-architecture folder with the same tokenizer, here the same group's later
# model. DAPO-Math-17k: Apache-2.0, 17k problems in 1.79M rows. Big-Math: Apache-2.0, the hub may
# ask for your name. KodCode: CC-BY-NC-4.0, not for commercial use
distill = dict(
    teacher="Nanbeige4.1-3B", teacher_system="released",
    problems=dict(dapo=12_000, bigmath=12_000, kodcode=12_000),
    n_samples=8, max_new_tokens=16_384, max_rows=48, context=32_768, batch_pairs=64, micro_pairs=1,
    epochs=1, lr=1e-6,
    # of mean log-probabilities per token, which are small: the range of SimPO (arXiv 2405.14734)
    beta=2.0,
    dtype="bfloat16", compile=True, recompute=True, log_every=5, save_every=100,
    prompts=["How many prime numbers are there below 50?"],
)

# Labels of people and of a strong model: HelpSteer3, CC-BY-4.0; UltraFeedback, MIT
reward = dict(
    preferences=[dict(hf="nvidia/HelpSteer3", config="preference"),
                 dict(hf="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs")],
    held_out=[dict(hf="nvidia/HelpSteer3", config="preference", split="validation")],
    context=8192, batch_pairs=64, micro_pairs=2, epochs=1, lr=5e-6,
    dtype="bfloat16", compile=True, recompute=True, log_every=10, save_every=100,
)

# Code problems made both ways by a server's model, which must be given: topics and functions of
# Python files in, problems that the sandbox agrees with out. Before rl.py:
#     python -m data.sets.synthesize configs/3b.py
# functions: yours, or any source of data/text/sources.py
synthesize = dict(
    n=20_000, variants=4, folder="corpora/synthetic",
    writer=dict(url="http://localhost:8000/v1", max_tokens=16_384, timeout=3600.0, concurrency=256),
    functions=[dict(path="corpora/python")],
)
_programs = [f"synthetic={synthesize['folder']}/{way}.jsonl" for way in ("forward", "backward")]

# The report's stages and filter; steps, group, rate and lengths are ours
rl = dict(
    stages=[
        dict(name="STEM", problems=dict(dapo=17_000, bigmath=17_000), steps=400),
        dict(name="coding", problems=dict(kodcode=9_000) | dict.fromkeys(_programs, 4_000),
             steps=400),
        dict(name="preference", problems=dict(helpsteer3=8_000, ultrafeedback=8_000), steps=200,
             reward="pairwise"),
    ],
    # what rules and math-verify leave open, in STEM: any OpenAI-compatible server
    verifier=dict(seconds=1800.0, model=dict(
        url="http://localhost:8002/v1", max_tokens=8192, timeout=1800.0, concurrency=256)),
    reward_model="reward", group_size=16, batch_groups=64, micro_rows=1, max_rows=32,
    max_new_tokens=32_000, context=34_816, filter_samples=16, keep_between=[0.1, 0.9],
    lr=1e-6, weight_decay=0.0,
    dtype="bfloat16", compile=True, recompute=True, log_every=1, eval_every=50, save_every=25,
    prompts=["How many prime numbers are there below 50?"],
)

# system: for the released checkpoints; those of this run are asked without
evaluate = dict(tasks=[], system="released")
