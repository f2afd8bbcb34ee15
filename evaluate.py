"""Scores of a checkpoint or a server on tasks: avg@k, pass@k, maj@k, and their standard error.

    python evaluate.py configs/tiny.py --evaluate.checkpoint=out/tiny/pretrain
    torchrun --nproc_per_node=8 evaluate.py configs/3b.py --evaluate.split=test \\
        --evaluate.checkpoint=Nanbeige4-3B-Thinking-2511 --evaluate.k=8 \\
        --evaluate.tasks='["math500", "gsm8k=test.jsonl"]' --evaluate.max_new_tokens=32768
    python evaluate.py configs/tiny.py --evaluate.endpoint=http://localhost:8000/v1 \\
        --evaluate.tasks='["humaneval"]'
    python evaluate.py configs/3b.py --evaluate.checkpoint=Nanbeige4-3B-Thinking-2511 \\
        --evaluate.servers='["http://localhost:8000"]'    # vLLM servers that have it

Every sample, a JSON line with prompt, response and reward, is in out/<run>/evaluate.jsonl in the
end, and until then in out/<run>/evaluate/<task>-<hash>.<rank>.jsonl, to which each batch is added
once it is scored. The same command goes on there: killed at any time it ends with the same files.
The hash is over all that decides an answer (checkpoint or server, settings, problems), so other
settings never mix. Batches and random numbers are the same for any number of processes, as long as
there is a whole batch for each; then, on a CPU in fp32, so is the file, and else to rounding.
"""
from settings import Count, NonNegativeFloat, Seed, TopP, from_dict, load_config

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

import common
import generate
import hf
from data.chat import template
from data.tasks import registry
from data.tasks.problem import FAMILIES, GENERATED, Problem, answer_line, document_prompt, to_chat
from sampler import fixed_pieces, open_checkpoint


def all_families() -> list[str]:
    return list(FAMILIES)


@dataclass
class EvaluateConfig:
    tasks: list[str] = field(default_factory=all_families)  # task families (default: all
                                 # generated ones), or sets: "gsm8k=FILE"
    checkpoint: str = ""         # a phase's folder, a checkpoint in it, or a Hugging Face folder
    endpoint: str = ""           # or an OpenAI-compatible server's URL; its key: OPENAI_API_KEY
    servers: list[str] = field(default_factory=list)  # or vLLM servers' URLs that have the
                                 # checkpoint, and are sent token ids; not for a phase's own scores
    model: str = ""              # name on that server (default: the first that it has)
    prompt_format: Literal["", "document", "chat"] = ""  # of questions (default: as in training)
    system: str = ""             # system turn before them in chat form, for checkpoints that were
                                 # trained with one: a text, or "released", Nanbeige4's own; ours
                                 # were not, and get none
    split: Literal["train", "dev", "test"] = "dev"  # dev while settings are chosen, test once they
                                                    # are frozen
    n_problems: Count = 512      # held-out problems of each task, or all of a set that has fewer
    k: Count = 4                 # samples of each problem
    temperature: NonNegativeFloat = 0.6  # the report's (section 5); 0 is greedy
    top_p: TopP = 0.95           # the report's
    max_new_tokens: Count = 96   # longer answers count as truncated, and are scored as they are
    max_rows: Count = 256        # samples decoded together; of a server: requests in flight
    seed: Seed = 0               # of problems and samples
    verifier: dict = field(default_factory=dict)  # who decides on answers that rules leave open,
                                 # VerifierConfig of data/verify/agentic.py ({}: they are wrong)


# --------------------------------------------------------------------------------------------------
# Samples. Each is known by (problem, sample): the problem's number in its task, and 0 to k - 1.

def evaluate(sampler, tokenizer, cfg: EvaluateConfig, dist: common.Dist | None = None,
             folder: Path | None = None, made_by: str = "", verifier=None,
             known: dict[str, dict] | None = None) -> dict[str, dict]:
    """The scores of each task, as `summarize` makes them; the same on all ranks.

    sampler: as sampler.py has them, or without a tokenizer the LLM of `server_llm`; the ranks
    share the problems. cfg.prompt_format "chat": the question in chat form;
    else the document up to where the model must go on. folder: where samples are kept; made_by:
    what answers, for the names of the files there. verifier: of open_verifier. known: scores by
    those names, of before: what is there is not sampled again, and what is found is added.
    """
    dist = dist or common.Dist(0, 1, torch.device("cpu"), None)
    known = {} if known is None else known
    scores = {}
    for task in cfg.tasks:
        family = registry.family(task)
        problems = dist.from_main(
            lambda: family.problems(cfg.split, cfg.n_problems, cfg.seed))
        prompts = [task_prompt(problem, tokenizer, cfg.prompt_format, cfg.system)
                   for problem in problems]
        name = sample_file_name(task, problems, prompts, cfg, made_by, verifier)
        if name in known:
            scores[task] = known[name]
            continue
        rows = dist.from_main(lambda: read_kept_samples(folder, name))

        batches = task_batches(sampler, prompts, rows, cfg, dist)
        new_rows = {}
        for batch in dist.hand_out(batches, task):
            for answers in sample_batch(sampler, tokenizer, prompts, batch, cfg):
                scored = score_batch(task, problems, prompts, answers, tokenizer, verifier)
                new_rows |= scored
                if folder:
                    keep_samples(folder / f"{name}.{dist.rank}.jsonl", scored)

        rows |= dist.gather(new_rows)
        if tokenizer is None:
            discard_open_thoughts(rows)
        ordered = [rows[pair] for pair in sorted(rows)]
        scores[task] = summarize(ordered, cfg.k, getattr(family, "same", None))
        known[name] = scores[task]
    return scores


def task_prompt(problem: Problem, tokenizer, prompt_format: str,
                system: str = "") -> list[int] | list[dict] | str:
    """The prompt of a problem: the question in chat form with its tools, or a page's beginning.

    Token ids; or, without a tokenizer, what a server is sent: messages or a text. system: of the
    chat form, as template.render takes it; a server's own template puts in its own.
    """
    if prompt_format != "chat":
        text = document_prompt(problem)
        return tokenizer.encode_prompt(text) if tokenizer else text
    question = to_chat(problem)[:1]
    tools = problem.extra.get("tools", ())
    if tokenizer:
        return template.render(question, tokenizer, add_generation_prompt=True, tools=tools,
                               system=system)
    if not tools:
        return question
    signatures = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    content = template.TOOLS_BEFORE + signatures + template.TOOLS_AFTER
    return [{"role": "system", "content": content}, *question]


def sample_file_name(task: str, problems: list[Problem], prompts: list, cfg: EvaluateConfig,
                     made_by: str, verifier=None) -> str:
    """The beginning of the names of a task's sample files: other settings have another one."""
    questions = [(problem.key, problem.answer, prompt)
                 for problem, prompt in zip(problems, prompts)]
    key = [made_by, cfg.k, cfg.temperature, cfg.top_p, cfg.max_new_tokens, cfg.seed, questions]
    if verifier and getattr(registry.family(task), "judge", None):
        key.append(verifier.key)
    set_name = task.partition("=")[0]
    return f"{set_name}-{common.hash_json(key)}"


def task_batches(
    sampler, prompts: list, rows: dict, cfg: EvaluateConfig, dist: common.Dist
) -> list[list[int]]:
    """Batches of problem numbers of which a sample is missing, for all ranks.

    A batch holds prompts of like lengths, the shortest first: less padding.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done = {i for i in order if rows.keys() >= set(sample_keys([i], cfg.k))}
    pieces = getattr(sampler, "pieces", fixed_pieces)  # an LLM has none
    return pieces(order, done, cfg.k, cfg.max_rows, dist)


def sample_keys(batch: list[int], k: int) -> list[tuple[int, int]]:
    """(problem, sample) of each of the k samples of the batch's problems."""
    return [(i, j) for i in batch for j in range(k)]


def sample_batch(sampler, tokenizer, prompts: list, batch: list[int],
                 cfg: EvaluateConfig) -> Iterator[dict]:
    """Yields {(problem, sample): (text, finish_reason, tokens)} of a batch of problems.

    tokens: how many. finish_reason: "stop", "length", or "failed" (with None for a text) where a
    server gave no answer.
    """
    if tokenizer is None:
        yield ask_server(sampler, prompts, sample_keys(batch, cfg.k), cfg.k)
        return
    parts = sampler.sample(
        [prompts[i] for i in batch], cfg.k, max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature, top_p=cfg.top_p, stop=tokenizer.stop_ids,
        seed=cfg.seed, max_rows=cfg.max_rows, numbers=batch)
    for part in parts:
        answers = {}
        for place, samples in part.items():
            problem = batch[place]
            for j, sample in enumerate(samples):
                text = generate.decode_answer(sample.tokens, tokenizer, prompts[problem])
                answers[problem, j] = (text, sample.finish_reason, len(sample.tokens))
        yield answers


def ask_server(server: Callable, prompts: list, pairs: list[tuple[int, int]], k: int) -> dict:
    """What `sample_batch` returns, from a server."""
    conversations = [None] * (k * len(prompts))  # a sample's place here decides its seed
    for i, j in pairs:
        conversations[i * k + j] = prompts[i]
    answers = server(conversations)
    failed = (None, "failed", 0)
    return {(i, j): answers[i * k + j] or failed for i, j in pairs}


def score_batch(task: str, problems: list[Problem], prompts: list, answers: dict, tokenizer,
                verifier=None) -> dict[tuple[int, int], dict]:
    """The rows of a batch: of each sample all that is kept, its reward included."""
    offered_answer = getattr(registry.family(task), "offered", answer_line)
    responses = [text or "" for text, _, _ in answers.values()]
    scores = registry.scores([problems[i] for i, _ in answers], responses, verifier)
    rows = {}
    for ((i, j), (text, finish_reason, n_tokens)), score in zip(answers.items(), scores):
        rows[i, j] = {
            "task": task,
            "problem": i,
            "sample": j,
            "key": common.hash_json([problems[i].family, problems[i].key]),
            "level": problems[i].level,
            "answer": problems[i].answer,
            "prompt": tokenizer.decode(prompts[i]) if tokenizer else prompts[i],
            "response": text,
            "offered": offered_answer(text or "") or None,
            "finish_reason": finish_reason,
            "tokens": n_tokens,
            "reward": None if text is None else score.reward,
            "by_verifier": score.verdict is not None,
        }
    return rows


def discard_open_thoughts(rows: dict[tuple[int, int], dict]) -> None:
    """No reward for a server's thoughts that never end, where its chat template opens them.

    That shows in answers that have </think> without <think>; then those without either are all
    thoughts. Where every answer of a task was cut off it cannot be seen.
    """
    answered = [row for row in rows.values() if row["response"] is not None]
    thoughts = [row["response"].partition("</think>") for row in answered]
    if not any(end and "<think>" not in before for before, end, _ in thoughts):
        return
    for row, (_, end, _) in zip(answered, thoughts):
        if not end:
            row.update(reward=0.0, offered=None)


def keep_samples(path: Path, rows: dict[tuple[int, int], dict]) -> None:
    """Adds rows to a file of samples; not those that got no answer: they are asked for again."""
    common.keep_lines(path, [row for row in rows.values() if row["response"] is not None])


def read_kept_samples(folder: Path | None, name: str) -> dict[tuple[int, int], dict]:
    """The rows that earlier processes kept, by (problem, sample); without a folder none are."""
    if folder is None:
        return {}
    kept = common.read_kept_lines(folder, name)
    return {(row["problem"], row["sample"]): row for row in kept}


def server_llm(cfg: EvaluateConfig) -> Callable:
    """An LLM that gives (text, finish_reason, tokens) for each of what `task_prompt` makes.

    None where the server gave no answer. Its key is in the environment variable OPENAI_API_KEY.
    """
    from data import llm  # only who asks a server waits for its client

    def read(answer: dict) -> tuple[str, str, int]:
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else llm.chat_form(choice["message"])
        finish_reason = "length" if choice["finish_reason"] == "length" else "stop"
        return text, finish_reason, answer["usage"]["completion_tokens"]

    settings = {
        "url": cfg.endpoint,
        "model": cfg.model,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "max_tokens": cfg.max_new_tokens,
        "timeout": 3600.0,
        "concurrency": cfg.max_rows,
        "seed": cfg.seed,
    }
    return llm.http_llm(from_dict(llm.LLMConfig, settings, "evaluate.endpoint"), read)


def open_verifier(
        spec: dict, tasks: Sequence[str], out: Path, dist: common.Dist, init_from: str = ""):
    """The data.verify.agentic.Verifier of a config; None where no task leaves an answer open.

    spec: VerifierConfig; its model is sought in out, and in the run that init_from is of. Its
    verdicts are kept in out/<run>/verdicts, by its model and words.
    """
    if not spec or not any(getattr(registry.family(task), "judge", None) for task in tasks):
        return None
    from data.verify import agentic, sandbox  # only who has a verifier waits for them

    cfg = from_dict(agentic.VerifierConfig, spec, "verifier")
    llm, identity = generate.open_llm(cfg.model, "verifier.model", out, init_from)
    name = common.hash_json([identity, cfg.turns, cfg.must_compute, cfg.prompts])
    path = out / "verdicts" / f"{name}.{dist.rank}.jsonl"
    return agentic.Verifier(llm, sandbox.shared(), cfg, path)


# --------------------------------------------------------------------------------------------------
# Scores

def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k of the n samples is right.

    1 - C(n-c, k) / C(n, k) (arXiv 2107.03374, eq. 1).
    """
    if n - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def majority(votes: Sequence[tuple[str | None, float]], same: Callable[[str, str], bool]) -> float:
    """Reward of the answer that most of the (answer, reward) votes are for; 0 without a vote.

    An answer of None is no vote. Of several answers that are equally frequent one is drawn: its
    expected reward. Which answers are the same is for `same(answer, other)`; the first sample's
    reward holds for all of them.
    """
    groups = []                                 # of equal answers: [answer, reward, how many]
    for answer, reward in votes:
        if answer is None:
            continue
        group = next((group for group in groups if same(group[0], answer)), None)
        if group is None:
            groups.append([answer, reward, 1])
        else:
            group[2] += 1
    if not groups:
        return 0.0
    most = max(count for _, _, count in groups)
    return float(np.mean([reward for _, reward, count in groups if count == most]))


def summarize(rows: list[dict], k: int, same: Callable[[str, str], bool] | None = None) -> dict:
    """The scores of a task, from one row per sample.

    avg: mean reward of the samples, by problem, then over problems; stderr: of it, over problems;
    pass: pass@k; pass_at: of 1, 2, 4, … and k; maj: maj@k where answers can be compared (same),
    else None; levels: mean reward by level; truncated, no_answer: shares of the samples; tokens:
    mean of a sample, tokens_used: of all; n: problems. A reward of None (could not be scored) is
    left out of the means and counted in `unscored`.
    """
    by_problem = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row)
    votes, rewards, by_level = [], [], {}       # a list per problem; and rewards by level
    for group in by_problem.values():
        graded = [row for row in group if row["reward"] is not None]
        votes.append([(row["offered"], row["reward"]) for row in graded])
        rewards.append([row["reward"] for row in graded])
        by_level.setdefault(group[0]["level"], []).extend(rewards[-1])
    means = np.array([np.mean(r) for r in rewards if r])
    pass_at = {size: mean_pass_at(rewards, size) for size in pass_sizes(k)}
    levels = {level: mean(by_level[level]) for level in sorted(by_level)}
    is_truncated = [row["finish_reason"] == "length" for row in rows]
    has_no_answer = [row["offered"] is None for row in rows]
    is_unscored = [row["reward"] is None for row in rows]
    tokens = [row["tokens"] for row in rows]
    return {
        "avg": mean(means),
        "stderr": standard_error(means),
        "pass": pass_at[k],
        "pass_at": pass_at,
        "maj": mean([majority(v, same) for v in votes if v]) if same else None,
        "levels": levels,
        "truncated": mean(is_truncated),
        "no_answer": mean(has_no_answer),
        "tokens": mean(tokens),
        "tokens_used": sum(tokens),
        "unscored": sum(is_unscored),
        "n": len(means),
        "k": k,
        "rows": rows,
    }


def pass_sizes(k: int) -> list[int]:
    """1, 2, 4, … and k."""
    powers = [2 ** i for i in range(k.bit_length())]
    return sorted({*powers, k})


def mean_pass_at(rewards: list[list[float]], size: int) -> float:
    """pass@size, the mean over the problems that have as many samples; rewards: of each problem."""
    return mean([pass_at_k(len(r), r.count(1), size) for r in rewards if len(r) >= size])


def mean(values: Sequence[float]) -> float:
    """nan of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def standard_error(values: np.ndarray) -> float:
    """Of the mean of the values; nan of fewer than two."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def without_rows(scores: dict[str, dict]) -> dict[str, dict]:
    """The scores, fit for a line of metrics."""
    short = {}
    for task, score in scores.items():
        short[task] = {key: value for key, value in score.items() if key != "rows"}
    return short


def rewards_by_problem(scores: dict[str, dict]) -> dict[str, dict[str, float]]:
    """{task: {key of a problem: mean reward of its samples}}: what another run is paired with."""
    means = {}
    for task, score in scores.items():
        rewards = {}
        for row in score["rows"]:
            if row["reward"] is not None and "key" in row:  # rows of before had none
                rewards.setdefault(row["key"], []).append(row["reward"])
        means[task] = {key: mean(values) for key, values in rewards.items()}
    return means


def format_table(scores: dict[str, dict]) -> str:
    """The scores as a text table."""
    first = next(iter(scores.values()))
    pass_title = "pass@" + "/".join(map(str, first["pass_at"]))
    task_width = max(10, 1 + max(len(task) for task in scores))
    pass_width = max(18, 5 * len(first["pass_at"]) + 2, len(pass_title) + 2)
    layout = (f"{{:{task_width}}}{{:>8}}{{:>8}}  {{:{pass_width}}}{{:>7}}   {{:22}}"
              "{:>8}{:>11}{:>11}{:>10}")
    lines = [layout.format("task", "avg@k", "stderr", pass_title, "maj@k", "by level",
                           "tokens", "truncated", "no answer", "problems")]
    for task, score in scores.items():
        pass_at = [f"{share:.2f}" for share in score["pass_at"].values()]
        levels = [f"{level}: {reward:.2f}" for level, reward in score["levels"].items()]
        line = layout.format(
            task,
            f"{score['avg']:.3f}",
            f"{score['stderr']:.3f}",
            " ".join(pass_at),
            "" if score["maj"] is None else f"{score['maj']:.3f}",
            "  ".join(levels),
            f"{score['tokens']:.1f}",
            f"{score['truncated']:.1%}",
            f"{score['no_answer']:.1%}",
            score["n"])
        if score["unscored"]:
            line += f"  ({score['unscored']} answers could not be scored)"
        lines.append(line)
    tokens_used = sum(score["tokens_used"] for score in scores.values())
    lines.append(f"k = {first['k']}, {tokens_used:,} tokens drawn")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The command

def default_prompt_format(folder: Path, tokenizer) -> str:
    """The format that a checkpoint was trained on: "document" in phase 1, "chat" after it.

    A Hugging Face folder's is "chat" where it has a chat template or its tokenizer is made for
    chats.
    """
    if (folder / "meta.json").is_file():
        return "document" if common.read_meta(folder).get("phase") == "pretrain" else "chat"
    is_for_chats = tokenizer.chat_template or "<|im_start|>" in tokenizer.special
    return "chat" if is_for_chats else "document"


def find_checkpoint(dist: common.Dist, name: str, out: Path) -> Path:
    """The checkpoint to evaluate; without a name that of pre-training."""
    try:
        return hf.resolve_checkpoint(dist, name or out / "pretrain")
    except common.UserError as error:
        raise common.UserError(f"evaluate.checkpoint={name}: {error}") from None


def checkpoint_digest(folder: Path) -> str:
    """A hash of a checkpoint's weights, config and tokenizer.

    Of ours meta.json holds the checksums of the weights.
    """
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if re.search(r"^(?:config|meta|tokenizer)\.json$|\.safetensors$", path.name):
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def check_tasks(cfg: EvaluateConfig) -> None:
    """Raises UserError for what is wrong with the tasks: before the long work."""
    for task in cfg.tasks:
        registry.family(task).problems(cfg.split, cfg.n_problems, cfg.seed)
    if not cfg.tasks:
        raise common.UserError(f"no tasks: set evaluate.tasks to some of "
                               f"{', '.join(GENERATED)}, or to data sets")
    if cfg.endpoint and (cfg.checkpoint or cfg.servers):
        raise common.UserError("evaluate.endpoint and evaluate.checkpoint (or servers) are both "
                               "set: which of the two is meant?")


SHOWN = 8  # answers of each task that trackers get


def track(config: SimpleNamespace, dist: common.Dist, source: str, scores: dict) -> None:
    """Gives the scores, and some answers, to the trackers of --track."""
    import trackers  # only where --track asks for them

    shown = []
    for score in scores.values():
        shown += [row for row in score["rows"] if row["sample"] == 0][:SHOWN]
    settings = trackers.describe(config, dist.device) | {"source": source}
    job = trackers.Job(config.run, "evaluate", config.out / "evaluate", settings,
                       prompts=[str(row["prompt"]) for row in shown])
    samples = [row["response"] for row in shown]
    line = {"step": 0, "scores": without_rows(scores), "samples": samples}
    trackers.Trackers(config.track, job).write(line)


def main():
    from data.verify import sandbox  # the phases evaluate without this command's switch

    config = load_config(
        __doc__, flags=sandbox.FLAG, options=("run", "track"), evaluate=EvaluateConfig)
    if config.weak_jail:
        sandbox.allow_weak_jail()
    cfg = config.evaluate
    dist = common.init_distributed("float32")
    dist.from_main(lambda: check_tasks(cfg))
    dist.from_main(lambda: common.lock_folder(config.out / "evaluate"))
    if dist.is_main and config.track:
        import trackers

        trackers.warn_of_missing(config.track)
    if cfg.endpoint:
        source = made_by = f"{cfg.endpoint} {cfg.model}".strip()
        cfg.prompt_format = cfg.prompt_format or "chat"
        sampler, tokenizer = server_llm(cfg), None
    else:
        source = find_checkpoint(dist, cfg.checkpoint, config.out)
        in_bf16 = dist.device.type == "cuda" or cfg.servers
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        sampler, tokenizer = open_checkpoint(source, cfg.servers, dist, dtype)
        cfg.prompt_format = cfg.prompt_format or default_prompt_format(source, tokenizer)
        if hf.is_ours(source):
            cfg.system = ""  # as it was trained
        made_by = dist.from_main(lambda: f"{checkpoint_digest(source)} {dtype}")
        if cfg.servers:
            made_by += " served"
    if dist.is_main:
        print(f"{source}, split {cfg.split}, {cfg.prompt_format} form", flush=True)

    verifier = open_verifier(cfg.verifier, cfg.tasks, config.out, dist, cfg.checkpoint)
    scores = evaluate(sampler, tokenizer, cfg, dist, config.out / "evaluate", made_by, verifier)

    if dist.is_main:
        print(format_table(scores))
        result = dict(made_by=str(source), settings=dataclasses.asdict(cfg),
                      machine=common.describe_machine(dist.device), scores=without_rows(scores))
        common.write_atomic(config.out / "evaluate.json", json.dumps(result, indent=1) + "\n")
        rows = [row for score in scores.values() for row in score["rows"]]
        lines = [json.dumps(row) + "\n" for row in rows]
        common.write_atomic(config.out / "evaluate.jsonl", "".join(lines))
        if config.track:
            track(config, dist, str(source), scores)
        print(f"every sample is in {config.out / 'evaluate.jsonl'}")


if __name__ == "__main__":
    common.cli(main)
