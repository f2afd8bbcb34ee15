"""Accuracy on held-out problems of the task families: avg@k and pass@k, with the standard error over problems.

    python evaluate.py configs/tiny.py --evaluate.checkpoint=out/tiny/pretrain
"""
import json
from dataclasses import dataclass, field

import numpy as np
import torch

import common
import generate
import hf
from data import chat, sandbox, tasks


@dataclass
class EvaluateConfig:
    tasks: list = field(default_factory=lambda: list(tasks.FAMILIES))  # task families, or sets: "gsm8k", "gsm8k=FILE"
    checkpoint: str = ""         # what to evaluate: a phase's folder, a checkpoint, or a Hugging Face folder
    form: str = ""               # how it is asked: "document" or "chat" (default: what the checkpoint was trained on)
    split: str = "dev"           # "dev" while settings are being chosen, "test" once they are frozen
    n_problems: int = 512        # held-out problems of each family
    k: int = 4                   # samples of each problem
    temperature: float = 0.6     # the report's (section 5); 0 is greedy
    top_p: float = 0.95          # the report's
    max_new_tokens: int = 96     # longer answers count as truncated, and are scored as they are
    max_rows: int = 256          # samples that are decoded together
    seed: int = 0                # of problems and samples


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k of the n samples is right: 1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1)."""
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def evaluate(model, tokenizer, cfg: EvaluateConfig, d: common.Dist | None = None) -> dict[str, dict]:
    """Scores of each task family: avg (mean reward of the k samples), stderr (over problems), pass, by level, and rows.

    model: a plain module on this rank (common.unsharded); the ranks of d share the problems and all get the result.
    cfg.form "chat": the question in chat form; else the document up to where the model must go on.
    rows: one record a sample, with prompt, response and reward. A reward of None (could not be scored) is left out of
    the mean and counted in `unscored`.
    """
    d = d or common.Dist(0, 1, torch.device("cpu"), None)
    stop = generate.stop_ids(tokenizer)
    scores = {}
    for name in cfg.tasks:
        problems = tasks.family(name).problems(cfg.split, cfg.n_problems, cfg.seed)
        mine = list(enumerate(problems))[d.rank::d.world]
        prompts = [prompt_of(problem, tokenizer, cfg.form) for _, problem in mine]
        samples = generate.sample(model, prompts, cfg.k, cfg.max_new_tokens, cfg.temperature, cfg.top_p, stop=stop,
                                  seed=cfg.seed, max_rows=cfg.max_rows)
        drawn = [(number, problem, j, answer) for (number, problem), answers in zip(mine, samples)
                 for j, answer in enumerate(answers)]
        responses = [tokenizer.decode([t for t in answer.tokens if t not in stop]) for *_, answer in drawn]
        rewards = tasks.rewards([problem for _, problem, _, _ in drawn], responses)
        rows = {f"{number}.{j}": dict(task=name, problem=number, level=problem.level, answer=problem.answer,
                                      prompt=tokenizer.decode(prompt_of(problem, tokenizer, cfg.form)),
                                      response=response, finish=answer.finish, reward=reward, tokens=len(answer.tokens))
                for (number, problem, j, answer), response, reward in zip(drawn, responses, rewards)}
        scores[name] = summarize(list(d.gather(rows).values()), cfg.k)
    return scores


def prompt_of(problem: tasks.Problem, tokenizer, form: str) -> list[int]:
    """What the model is given: the question in chat form, or the beginning of a page."""
    if form == "chat":
        return chat.render(tasks.chat(problem)[:1], tokenizer, add_generation_prompt=True)
    return [tokenizer.bos, *tokenizer.encode(tasks.prompt(problem))]


def summarize(rows: list[dict], k: int) -> dict:
    """avg@k, its standard error over problems, pass@k and accuracy by level, from one record a sample."""
    problems = {}
    for row in rows:
        problems.setdefault(row["problem"], []).append(row)
    graded = {p: [r["reward"] for r in group if r["reward"] is not None] for p, group in problems.items()}
    means = np.array([np.mean(rewards) for rewards in graded.values() if rewards])
    by_level = {}
    for p, rewards in graded.items():
        by_level.setdefault(problems[p][0]["level"], []).extend(rewards)
    return {
        "avg": float(means.mean()),
        "stderr": float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else float("nan"),
        "pass": float(np.mean([pass_at_k(len(r), sum(x == 1 for x in r), k) for r in graded.values() if len(r) >= k])),
        "levels": {level: float(np.mean(rewards)) for level, rewards in sorted(by_level.items())},
        "truncated": float(np.mean([r["finish"] == "length" for r in rows])),
        "tokens": float(np.mean([r["tokens"] for r in rows])),
        "unscored": sum(r["reward"] is None for r in rows),
        "n": len(means), "k": k, "rows": rows,
    }


def without_rows(scores: dict[str, dict]) -> dict[str, dict]:
    """The scores, fit for a line of metrics."""
    return {task: {k: v for k, v in score.items() if k != "rows"} for task, score in scores.items()}


def table(scores: dict[str, dict]) -> str:
    """The scores as a text table."""
    lines = [f"{'task':10}{'avg@k':>8}{'stderr':>8}{'pass@k':>8}   by level" + " " * 15 + "tokens  truncated"]
    for name, s in scores.items():
        levels = "  ".join(f"{level}: {mean:.2f}" for level, mean in s["levels"].items())
        lines.append(f"{name:10}{s['avg']:8.3f}{s['stderr']:8.3f}{s['pass']:8.3f}   {levels:22}{s['tokens']:8.1f}"
                     f"{s['truncated']:11.1%}")
    first = next(iter(scores.values()))
    return "\n".join(lines) + f"\n{first['n']} problems a task, k = {first['k']}"


def form_of(path: str) -> str:
    """The form that a checkpoint was trained on: documents in phase 1, conversations after it."""
    folder = hf.find(common.Dist(0, 1, torch.device("cpu"), None), path)
    ours = (folder / "meta.json").is_file()
    return "document" if ours and common.read_meta(folder)["phase"] == "pretrain" else "chat"


def main():
    cfg = common.load_config(__doc__, flags=sandbox.FLAG, evaluate=EvaluateConfig)
    sandbox.UNSAFE = cfg.unsafe_exec
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = cfg.evaluate.checkpoint or str(cfg.out / "pretrain")
    cfg.evaluate.form = cfg.evaluate.form or form_of(path)
    model, tokenizer = hf.load(path, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(f"{path}, split {cfg.evaluate.split}, {cfg.evaluate.form} form")
    scores = evaluate(model, tokenizer, cfg.evaluate)
    print(table(scores))
    cfg.out.mkdir(parents=True, exist_ok=True)
    with open(cfg.out / "evaluate.jsonl", "w") as f:
        for score in scores.values():
            f.writelines(json.dumps(row) + "\n" for row in score["rows"])
    print(f"every sample is in {cfg.out / 'evaluate.jsonl'}")


if __name__ == "__main__":
    common.cli(main)
