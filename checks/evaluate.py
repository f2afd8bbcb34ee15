"""Is the greedy score of a checkpoint the same by evaluate.py, transformers, `transformers serve`
and lm-eval?

    python -m checks.evaluate out/tiny/pretrain [--task=math] [--n=64] [--lm_eval=lm/bin/lm_eval]
    [--write]  # a minute

The checkpoint is exported to a temporary folder in fp32 (as by hf.py), which the other three read.
The lm-evaluation-harness gets documents as JSON lines and a task of its own format, with a regular
expression and exact match for our scorer: only where answers are numbers. It brings a package of
the name `evaluate`, so it wants an environment of its own: python -m venv lm && lm/bin/pip install
lm-eval transformers torch.
"""
import argparse
import json
import os
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import common
import evaluate
import hf
import sampler
from data.tasks import registry
from data.tasks.problem import document_prompt
from experiments import results

TASK = """
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\nProblem:"], max_gen_toks: {most}, do_sample: false}}
filter_list:
  - name: answer
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "Answer:[A-Za-z, ]*(-?[0-9]+)[A-Za-z, ]*[.!]?"
      - function: take_first
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def by_transformers(
    folder: Path, problems: list, cfg: evaluate.EvaluateConfig
) -> list[float | None]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    responses = []
    for asked in (evaluate.task_prompt(problem, None, cfg.prompt_format) for problem in problems):
        tokens = (
            tokenizer(asked, return_tensors="pt")
            if isinstance(asked, str)
            else tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        )
        answer = model.generate(**tokens, do_sample=False, max_new_tokens=cfg.max_new_tokens)
        responses.append(
            tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return registry.rewards(problems, responses)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """`transformers serve` on an exported checkpoint, and its url."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    process = subprocess.Popen(
        ["transformers", "serve", str(folder), "--host", "localhost", "--port", address[10:]],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.5)
        yield process, f"http://{address}/v1"
    finally:
        process.kill()
        process.wait()


def by_harness(
    command: str, folder: Path, problems: list, cfg: evaluate.EvaluateConfig
) -> list[float]:
    chat = cfg.prompt_format == "chat"
    documents = [
        dict(prompt=p.question if chat else document_prompt(p), answer=p.answer) for p in problems
    ]
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in documents)
    )
    (folder / "ours.yaml").write_text(TASK.format(folder=folder, most=cfg.max_new_tokens))
    call = [
        os.path.abspath(command),
        "--model=hf",
        "--tasks=ours",
        f"--include_path={folder}",
        "--log_samples",
        f"--model_args=pretrained={folder},dtype=float32,add_bos_token={not chat}",
        f"--output_path={folder / 'lm_eval'}",
        *["--apply_chat_template"] * chat,
    ]
    print(shlex.join(call))
    # elsewhere, `evaluate` would be ours
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise common.UserError(f"{command} failed: {done.stderr.strip()[-500:]}")
    samples = next((folder / "lm_eval").rglob("samples_ours_*.jsonl")).read_text().splitlines()
    return [
        row["exact_match"]
        for row in sorted(map(json.loads, samples), key=lambda row: row["doc_id"])
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--task", default="math")
    parser.add_argument("--n", type=int, default=64, help="problems (default 64)")
    parser.add_argument("--lm_eval", help="the harness's command")
    parser.add_argument(
        "--write", action="store_true", help="append the result to results/evaluate.jsonl"
    )
    args, started = parser.parse_args(), time.time()
    source = hf.resolve_checkpoint(common.Dist(0, 1, torch.device("cpu"), None), args.checkpoint)
    model, tokenizer = hf.load(source)
    cfg = evaluate.EvaluateConfig(
        [args.task],
        prompt_format=evaluate.default_prompt_format(source, tokenizer),
        n_problems=args.n,
        k=1,
        temperature=0.0,
        top_p=1.0,
        max_rows=16,
    )
    problems = registry.family(args.task).problems(cfg.split, cfg.n_problems, cfg.seed)
    rows = evaluate.evaluate(sampler.Embedded(model), tokenizer, cfg)[args.task]["rows"]
    rewards = {"ours": [row["reward"] for row in rows]}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "export"
        hf.export(model, tokenizer, folder, torch.float32)
        rewards["transformers"] = by_transformers(folder, problems, cfg)
        with serving(folder) as (_, cfg.endpoint):
            cfg.model = str(folder)
            score = evaluate.evaluate(evaluate.server_llm(cfg), None, cfg)[args.task]
            rewards["transformers serve"] = [row["reward"] for row in score["rows"]]
        if args.lm_eval:
            rewards["lm-eval"] = by_harness(args.lm_eval, folder, problems, cfg)
    line = dict(task=args.task, form=cfg.prompt_format, problems=len(problems))
    line["scores"] = {way: sum(found) / len(found) for way, found in rewards.items()}
    harness = " --lm_eval=…" if args.lm_eval else ""
    line["other verdicts"] = {}
    for way, verdicts in rewards.items():
        line["other verdicts"][way] = sum(a != b for a, b in zip(verdicts, rewards["ours"]))
    print(line)
    if args.write:
        results.append(
            "evaluate",
            line
            | dict(
                command=f"python -m checks.evaluate {args.checkpoint} --task={args.task} "
                        f"--n={args.n}{harness} --write",
                seed=0,
                commit=common.current_commit(),
                machine=common.describe_machine(torch.device("cpu")),
                seconds=time.time() - started,
            ),
        )


if __name__ == "__main__":
    common.cli(main)
