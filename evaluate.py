"""Scores of a checkpoint or a server on tasks: avg@k, pass@k, maj@k, and the standard error over problems.

    python evaluate.py configs/tiny.py --evaluate.checkpoint=out/tiny/pretrain
    torchrun --nproc_per_node=8 evaluate.py configs/3b.py --evaluate.checkpoint=Nanbeige4-3B --evaluate.split=test \\
        --evaluate.tasks='["math500", "gsm8k=test.jsonl"]' --evaluate.k=8 --evaluate.max_new_tokens=32768
    python evaluate.py configs/tiny.py --evaluate.endpoint=http://localhost:8000/v1 --evaluate.tasks='["humaneval"]'

Every sample, a JSON line with prompt, response and reward, is in out/<run>/evaluate.jsonl in the end, and until then in
out/<run>/evaluate/<task>-<hash>.<rank>.jsonl, to which each batch is added once it is scored. The same command goes on
there: killed at any time it ends with the same files. The hash is over all that decides an answer (checkpoint or
server, settings, problems), so other settings never mix. Batches and random numbers are the same for any number of
processes, as long as there is a whole batch for each; then, on a CPU in fp32, so is the file, and else to rounding.
"""
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import generate
import hf
from data.chat import template
from data.verify import sandbox
from data.tasks import pages, registry
from data.tasks.problem import Problem, document_prompt, final_answer, to_chat
from data import llm


@dataclass
class EvaluateConfig:
    tasks: list = field(default_factory=lambda: list(pages.FAMILIES))  # task families, or sets: "gsm8k", "gsm8k=FILE"
    checkpoint: str = ""         # what to evaluate: a phase's folder, a checkpoint, or a Hugging Face folder
    endpoint: str = ""           # or an OpenAI-compatible server, http://localhost:8000/v1; key: OPENAI_API_KEY
    model: str = ""              # name on that server (default: the first that it has)
    prompt_format: str = ""      # how it is asked: "document" or "chat" (default: what the checkpoint was trained on)
    split: str = "dev"           # "dev" while settings are being chosen, "test" once they are frozen
    n_problems: int = 512        # held-out problems of each task, or all of a set that has fewer
    k: int = 4                   # samples of each problem
    temperature: float = 0.6     # the report's (section 5); 0 is greedy
    top_p: float = 0.95          # the report's
    max_new_tokens: int = 96     # longer answers count as truncated, and are scored as they are
    max_rows: int = 256          # samples that are decoded together; of a server: requests in flight
    seed: int = 0                # of problems and samples

    def __post_init__(self):
        if self.prompt_format not in ("", "document", "chat") or self.split not in ("train", "dev", "test"):
            raise ValueError(f"prompt_format {self.prompt_format!r} must be document or chat, split {self.split!r} train, dev or test")
        if min(self.n_problems, self.k, self.max_new_tokens, self.max_rows) < 1 or self.temperature < 0:
            raise ValueError("n_problems, k, max_new_tokens and max_rows must be at least 1, temperature at least 0")


# ---------------------------------------------------------------------------------------------------------------------
# Samples

def evaluate(model, tokenizer, cfg: EvaluateConfig, d: common.Dist | None = None, folder: Path | None = None,
             made_by: str = "") -> dict[str, dict]:
    """Scores of each task, as `summarize` makes them.

    model: a plain module on this rank (common.unsharded_copy), or without a tokenizer a writer of `server`; the ranks of d
    share the problems and all get the result. cfg.prompt_format "chat": the question in chat form; else the document up to where
    the model must go on. folder: where samples are kept; made_by: what the model is, for the names of the files there.
    """
    d = d or common.Dist(0, 1, torch.device("cpu"), None)
    scores = {}
    for spec in cfg.tasks:
        family = registry.family(spec)
        problems = family.problems(cfg.split, cfg.n_problems, cfg.seed)
        prompts = [task_prompt(problem, tokenizer, cfg.prompt_format) for problem in problems]
        key = [made_by, cfg.k, cfg.temperature, cfg.top_p, cfg.max_new_tokens, cfg.seed,
               [(problem.key, problem.answer, prompt) for problem, prompt in zip(problems, prompts)]]
        name = f"{spec.partition('=')[0]}-{common.hash_json(key)}"
        rows = kept(folder, name) if folder else {}
        d.barrier()                             # all have read before one of them writes
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # as generate.sample does
        size = max(1, min(cfg.max_rows // cfg.k, -(-len(prompts) // d.world)))
        batches = [order[i:i + size] for i in range(0, len(order), size)]
        todo = [batch for batch in batches if any((i, j) not in rows for i in batch for j in range(cfg.k))]
        new, bar = {}, tqdm(todo[d.rank::d.world], spec, delay=10, disable=None if d.is_main else True)
        for batch in bar:
            drawn = sample_batch(model, tokenizer, prompts, batch, cfg)
            rewards = registry.rewards([problems[i] for i, _ in drawn], [text or "" for text, *_ in drawn.values()])
            for ((i, j), (text, finish, tokens)), reward in zip(drawn.items(), rewards):
                prompt = tokenizer.decode(prompts[i]) if tokenizer else prompts[i]
                offered = getattr(family, "offered", final_answer)(text or "") or None
                new[i, j] = dict(task=spec, problem=i, sample=j, level=problems[i].level, answer=problems[i].answer,
                                 prompt=prompt, response=text, offered=offered, finish_reason=finish, tokens=tokens,
                                 reward=None if text is None else reward)
            if folder:
                with open(folder / f"{name}.{d.rank}.jsonl", "a") as file:
                    file.writelines(json.dumps(new[pair]) + "\n" for pair in drawn if new[pair]["response"] is not None)
        rows |= d.gather(new)
        scores[spec] = summarize([rows[pair] for pair in sorted(rows)], cfg.k, getattr(family, "same", None))
    return scores


def sample_batch(model, tokenizer, prompts: list, batch: list[int], cfg: EvaluateConfig) -> dict:
    """{(problem, sample): (text, finish, tokens)} of a batch of problems. finish: "stop", "length", or "failed" (with
    None for a text) where a server gave no answer."""
    pairs = [(i, j) for i in batch for j in range(cfg.k)]
    if tokenizer is None:
        asked = [None] * (cfg.k * len(prompts))     # numbers are places: the seeds depend on them
        for i, j in pairs:
            asked[i * cfg.k + j] = prompts[i]
        answers = model(asked)
        return {(i, j): answers[i * cfg.k + j] or (None, "failed", 0) for i, j in pairs}
    stop = generate.stop_ids(tokenizer)
    samples = generate.sample(model, [prompts[i] for i in batch], cfg.k, cfg.max_new_tokens, cfg.temperature, cfg.top_p,
                              stop=stop, seed=cfg.seed, max_rows=cfg.max_rows, numbers=batch)
    return {pair: (tokenizer.decode([t for t in one.tokens if t not in stop]), one.finish_reason, len(one.tokens))
            for pair, one in zip(pairs, (one for group in samples for one in group))}


def task_prompt(problem: Problem, tokenizer, prompt_format: str) -> list[int] | list[dict] | str:
    """What the model is given: the question in chat form, with its tools, or the beginning of a page. Token ids; or,
    without a tokenizer, what a server is sent: messages or a text."""
    if prompt_format != "chat":
        text = document_prompt(problem)
        return [tokenizer.bos, *tokenizer.encode(text)] if tokenizer else text
    messages, tools = to_chat(problem)[:1], problem.extra.get("tools", ())
    if tokenizer:
        return template.render(messages, tokenizer, add_generation_prompt=True, tools=tools)
    signatures = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    system = {"role": "system", "content": template.TOOLS_BEFORE + signatures + template.TOOLS_AFTER}
    return [system] * bool(tools) + messages


def server_llm(cfg: EvaluateConfig) -> llm.LLM:
    """A writer that gives (text, finish, tokens) for each of what `prompt_of` makes, None for what got no answer."""
    def read(answer: dict) -> tuple[str, str, int]:
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else llm.chat_form(choice["message"])
        return text, "length" if choice["finish_reason"] == "length" else "stop", answer["usage"]["completion_tokens"]

    return llm.http_llm(common.from_dict(llm.LLMConfig, dict(
        url=cfg.endpoint, model=cfg.model, temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_new_tokens,
        timeout=3600.0, concurrency=cfg.max_rows, seed=cfg.seed), "evaluate.endpoint"), read)


def kept(folder: Path, name: str) -> dict[tuple[int, int], dict]:
    """The samples that earlier processes kept, by problem and sample. A last line that a kill tore is cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for path in sorted(folder.glob(f"{name}.*.jsonl")):
        data = path.read_bytes()
        *lines, torn = data.split(b"\n")
        try:
            rows |= {(row["problem"], row["sample"]): row for row in map(json.loads, lines)}
        except (ValueError, KeyError, TypeError):
            raise common.UserError(f"{path} is damaged, or no file of samples: move it away") from None
        if torn:
            os.truncate(path, len(data) - len(torn))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k of the n samples is right: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def majority(votes: Sequence[tuple[str | None, float]], same: Callable[[str, str], bool]) -> float:
    """Reward of the answer that most samples offer, of (answer, reward) each; 0 where none offers any (None).

    Of several that are equally frequent one is drawn: its expected reward. Which answers are the same is for
    `same(answer, other)`; the first sample's reward holds for all of them.
    """
    found = []                                  # [answer, reward, how often]
    for answer, reward in votes:
        if answer is not None:
            vote = next((vote for vote in found if same(vote[0], answer)), None)
            if vote is None:
                found.append(vote := [answer, reward, 0])
            vote[2] += 1
    most = max((count for *_, count in found), default=0)
    return float(np.mean([reward for _, reward, count in found if count == most])) if found else 0.0


def summarize(rows: list[dict], k: int, same: Callable[[str, str], bool] | None = None) -> dict:
    """The scores of a task, from one record a sample.

    avg: mean reward of the samples, by problem, then over problems; stderr: of it, over problems; pass: pass@k;
    pass_at: of 1, 2, 4, … and k; maj: maj@k where answers can be compared (same), else None; levels: mean reward by
    level; truncated, no_answer: shares of the samples; tokens: mean of a sample, tokens_used: of all; n: problems. A
    reward of None (could not be scored) is left out of the means and counted in `unscored`.
    """
    problems = {}
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    graded = {p: [r for r in group if r["reward"] is not None] for p, group in problems.items()}
    rewards = {p: [r["reward"] for r in group] for p, group in graded.items()}
    means = np.array([np.mean(r) for r in rewards.values() if r])
    by_level = {}
    for p, of_problem in rewards.items():
        by_level.setdefault(problems[p][0]["level"], []).extend(of_problem)
    sizes = sorted({2 ** i for i in range(k.bit_length())} | {k})
    pass_at = {size: mean([pass_at_k(len(r), sum(x == 1 for x in r), size) for r in rewards.values() if len(r) >= size])
               for size in sizes}
    return {
        "avg": mean(means), "stderr": float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else float("nan"),
        "pass": pass_at[k], "pass_at": pass_at,
        "maj": mean([majority([(r["offered"], r["reward"]) for r in group], same)
                     for group in graded.values() if group]) if same else None,
        "levels": {level: mean(of_level) for level, of_level in sorted(by_level.items())},
        "truncated": mean([r["finish_reason"] == "length" for r in rows]),
        "no_answer": mean([r["offered"] is None for r in rows]),
        "tokens": mean([r["tokens"] for r in rows]), "tokens_used": sum(r["tokens"] for r in rows),
        "unscored": sum(r["reward"] is None for r in rows), "n": len(means), "k": k, "rows": rows,
    }


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def without_rows(scores: dict[str, dict]) -> dict[str, dict]:
    """The scores, fit for a line of metrics."""
    return {task: {k: v for k, v in score.items() if k != "rows"} for task, score in scores.items()}


def format_table(scores: dict[str, dict]) -> str:
    """The scores as a text table."""
    first = next(iter(scores.values()))
    tried = "pass@" + "/".join(map(str, first["pass_at"]))
    width, wide = max(10, *(len(name) + 1 for name in scores)), max(18, 5 * len(first["pass_at"]) + 2, len(tried) + 2)
    lines = [f"{'task':{width}}{'avg@k':>8}{'stderr':>8}  {tried:{wide}}{'maj@k':>7}   {'by level':22}"
             "  tokens  truncated  no answer  problems"]
    for name, s in scores.items():
        levels = "  ".join(f"{level}: {share:.2f}" for level, share in s["levels"].items())
        passes = " ".join(f"{share:.2f}" for share in s["pass_at"].values())
        voted = "" if s["maj"] is None else f"{s['maj']:.3f}"
        lines.append(f"{name:{width}}{s['avg']:8.3f}{s['stderr']:8.3f}  {passes:{wide}}{voted:>7}   {levels:22}"
                     f"{s['tokens']:8.1f}{s['truncated']:11.1%}{s['no_answer']:11.1%}{s['n']:10}"
                     + f"  ({s['unscored']} answers could not be scored)" * (s["unscored"] > 0))
    return "\n".join(lines) + f"\nk = {first['k']}, {sum(s['tokens_used'] for s in scores.values()):,} tokens drawn"


# ---------------------------------------------------------------------------------------------------------------------
# The command

def default_prompt_format(folder: Path) -> str:
    """The form that a checkpoint was trained on: documents in phase 1, conversations after it."""
    ours = (folder / "meta.json").is_file()
    return "document" if ours and common.read_meta(folder)["phase"] == "pretrain" else "chat"


def digest(folder: Path) -> str:
    """Of a checkpoint's weights, config and tokenizer (meta.json of ours holds the checksums of its weights)."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if re.search(r"^(?:config|meta|tokenizer)\.json$|\.safetensors$", file.name):
            with open(file, "rb") as f:
                total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def main():
    run = common.load_config(__doc__, flags=sandbox.FLAG, evaluate=EvaluateConfig)
    cfg = run.evaluate
    if run.unsafe_exec:
        sandbox.allow_unlocked()
    for spec in cfg.tasks:                      # what is wrong with one is said before the long work
        registry.family(spec).problems(cfg.split, cfg.n_problems, cfg.seed)
    if not cfg.tasks:
        raise common.UserError(f"no tasks: set evaluate.tasks to some of {', '.join(pages.FAMILIES)}, or to data sets")
    if cfg.endpoint and cfg.checkpoint:
        raise common.UserError("evaluate.endpoint and evaluate.checkpoint are both set: which of the two is meant?")
    d = common.init_distributed("float32")
    if cfg.endpoint:
        source, cfg.prompt_format = f"{cfg.endpoint} {cfg.model}".strip(), cfg.prompt_format or "chat"
        model, tokenizer, made_by = server_llm(cfg), None, source
    else:
        source = hf.resolve_checkpoint(d, cfg.checkpoint or run.out / "pretrain")
        cfg.prompt_format = cfg.prompt_format or default_prompt_format(source)
        dtype = torch.bfloat16 if d.device.type == "cuda" else torch.float32
        model, tokenizer = hf.load(source, d.device, dtype)
        made_by = f"{digest(source)} {dtype}"
    if d.is_main:
        print(f"{source}, split {cfg.split}, {cfg.prompt_format} form", flush=True)
    scores = evaluate(model, tokenizer, cfg, d, run.out / "evaluate", made_by)
    if d.is_main:
        print(format_table(scores))
        common.write_atomic(run.out / "evaluate.json", json.dumps(dict(
            made_by=str(source), settings=dataclasses.asdict(cfg), scores=without_rows(scores)), indent=1) + "\n")
        common.write_atomic(run.out / "evaluate.jsonl", "".join(
            json.dumps(row) + "\n" for score in scores.values() for row in score["rows"]))
        print(f"every sample is in {run.out / 'evaluate.jsonl'}")


if __name__ == "__main__":
    common.cli(main)
