"""Raw web text to pools of high and medium quality: `python -m data.filter.quality
configs/filter.py` (see docs/DATA.md).

A strong model behind an OpenAI-compatible endpoint (vLLM, SGLang, transformers serve, llama.cpp)
grades 2,000 documents; a small one learns from it and grades the rest. The cuts are our choice:
look at the table, then move them.
"""
quality = dict(
    sources=[dict(hf="HuggingFaceFW/fineweb", config="sample-10BT")],
    # ODC-BY; or dict(path="folder/of/jsonl")
    llm=dict(url="http://localhost:8000/v1", temperature=0.0, max_tokens=200),
    # or labels="labels.jsonl"
    n_labels=2000,
    evaluation_sets=[
        dict(hf="openai/gsm8k", config="main", split="test", column=["question", "answer"]),  # MIT
        dict(hf="HuggingFaceH4/MATH-500", split="test", column=["problem", "solution"]),  # MIT
    ],
    high=6.0, drop=3.0,  # of the score, 0-9
)

corpus = dict(pools=dict(
    high=[dict(path="out/filter/quality/high")],
    medium=[dict(path="out/filter/quality/medium")],
))
