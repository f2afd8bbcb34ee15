"""Samples: the same held-out problems, answered greedily by the checkpoint after each phase."""
import json
from pathlib import Path

import torch

import common
import hf
from common import UserError
from data.tasks import registry
from data.tasks.problem import GENERATED, Problem
from evaluate import EvaluateConfig, task_prompt
from generate import decode_answer, sample
from report.tables import MAX_CHARACTERS, PHASES, load_json, phase_title

MAX_BYTES_ON_CPU = 4e9   # of a checkpoint that is still asked for samples without a GPU
LEVEL = 2                # of the problems: of 1 to 3, where there is one


def find_checkpoints(out: Path) -> dict[str, Path]:
    """{as in read_scores(): the checkpoint at its end, or the newest of a running phase}."""
    checkpoints = {}
    for phase in PHASES:
        for path in reversed(common.list_checkpoints(out / phase)):
            try:
                meta = common.read_meta(path)
            except UserError:
                continue
            if phase != "rl" or meta["keep"]:
                checkpoints[phase_title(phase, meta["stage"])] = path
    return checkpoints


def collect_samples(out: Path, cfg: EvaluateConfig) -> list[dict]:
    """A held-out problem of each generated family, with the answers of all phases.

    Answers are kept in samples.json, by checkpoint; right or wrong is computed anew each time.
    """
    tasks = [task for task in cfg.tasks if task in GENERATED and rules_decide(task)]
    problems = [registry.family(task).problems(cfg.split, LEVEL, cfg.seed)[-1] for task in tasks]
    if not problems:
        return []
    answers = collect_answers(out, problems, cfg.max_new_tokens)
    if not answers:
        return []
    items = []
    for i, (task, problem) in enumerate(zip(tasks, problems)):
        phases = {}  # {answer: the phases that gave it}
        for phase, texts in answers.items():
            phases.setdefault(texts[i], []).append(phase)
        rewards = registry.rewards([problem] * len(phases), list(phases))
        replies = []
        for (text, names), reward in zip(phases.items(), rewards):
            shown = text.strip()[:MAX_CHARACTERS]
            replies.append((", ".join(names), describe_reward(reward), shown))
        items.append(dict(task=task, question=problem.question, answer=problem.answer,
                          replies=replies))
    return items


def rules_decide(task: str) -> bool:
    """Whether no answer to a task is left open to a verifier, whom a report does not ask."""
    return not hasattr(registry.family(task), "judge")


def describe_reward(reward: float | None) -> str:
    if reward is None:
        return "not scored"
    return {1: "right", 0: "wrong"}.get(reward, f"score {reward}")


def collect_answers(out: Path, problems: list[Problem], length: int) -> dict[str, list[str]]:
    """{phase: its answers}; checkpoints that have answered these problems before are not asked."""
    cache_file = out / "samples.json"
    cache = load_json(cache_file)
    asked = dict(questions=[problem.question for problem in problems], length=length)
    answers, used = {}, {}
    for phase, path in find_checkpoints(out).items():
        contents = common.hash_json([common.read_meta(path)["files"], asked])
        key = f"{path.relative_to(out)} {contents}"
        try:
            answers[phase] = cache.get(key) or answer_greedily(path, problems, length)
        except UserError as error:
            print(f"warning: no samples of {path}: {error}", flush=True)
            continue
        used[key] = answers[phase]
    if used:
        common.write_atomic(cache_file, json.dumps(used))
    return answers


def answer_greedily(path: Path, problems: list[Problem], length: int) -> list[str]:
    """A checkpoint's answer to each problem, asked in the format that it was trained on."""
    meta = common.read_meta(path)
    n_bytes = sum(size for size, _ in meta["files"].values())
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    elif n_bytes <= MAX_BYTES_ON_CPU:
        device, dtype = "cpu", torch.float32
    else:
        raise UserError("it is too large to be asked on a CPU")
    model, tokenizer = hf.load(path, device, dtype)
    stop = tokenizer.stop_ids
    prompt_format = "document" if meta["phase"] == "pretrain" else "chat"
    prompts = [task_prompt(problem, tokenizer, prompt_format) for problem in problems]
    groups = sample(model, prompts, max_new_tokens=length, temperature=0, stop=stop)
    return [decode_answer(group[0].tokens, tokenizer) for group in groups]
