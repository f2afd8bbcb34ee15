"""Phase 2a, makes the data of SFT: deliberative refinement, and chains of thought reconstructed.

    python refine.py configs/tiny.py --practice  # what small models learn from: see speedrun.sh
    python refine.py configs/tiny.py             # out/tiny/refine/NAME.jsonl for each set

For each instruction several models draft, a checklist is written for it, evaluators and programs
hold every draft against it, and a reviser rewrites the best by their critique, until nothing is
left to criticize or the score stops rising. A chain completer then writes the chain of thought that
leads to the solution (arXiv 2512.06266, SFT). The loop and its prompts are in
data/refine/refinement.py, what programs can check in data/refine/checklist.py.

Models are checkpoints or OpenAI-compatible endpoints. Every answer is kept on disk as it comes: a
killed run goes on where it was and pays for nothing twice. Refinement sees no gold answer. Such are
looked at, of generated problems, by the audit at the end; by the trial (data/refine/trial.py) that
says who does what; by --practice, which teaches small models what a capable one can do anyway; and
where a set of instructions has own_answers, which are not refined at all.
"""
from settings import Count, Fraction, Length, from_dict, load_config

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np

import common
from common import UserError
from data.chat.conversations import normalize
from data.chat.template import split_thoughts
from data.llm import LLM, cached
from data.refine import checklist, practice, trial
from data.refine.refinement import Case, Settings, nth_draw, reconstruct, refine, with_usage
from data.tasks import pages, registry
from data.tasks.problem import Problem, between, seeded_rng
from data.text import sources
from data.text.tokenizer import Tokenizer
from data.verify import sandbox
from generate import open_llm

N_PROBED = 100  # reconstructions of each set that the audit repeats without and with a wrong answer


@dataclass(kw_only=True)
class RefineConfig(Settings):
    models: dict[str, dict]  # name -> {"checkpoint": phase or path, …} or {"url": endpoint, …}
    instructions: Annotated[dict[str, dict], Length(1)]  # name of a set -> where from: see
                                                         # load_instructions()
    completer: str = ""        # who writes chains of thought; "": nobody, data have no thoughts
    chain_attempts: Count = 4  # to reconstruct each solution's chain, until one may be kept
    min_score: Fraction = 0.0  # solutions of a lower score are left out
    check_steps: bool = False  # chains with a false calculation are left out, too
    own_chains: bool = False   # where no reconstruction may be kept, the response's own chain
                               # is, if it leads to the solution
    batch_size: Count = 1024   # instructions that are refined side by side
    folder: str = ""           # of the output (default: out/<run>/refine)
    practice: dict = field(default_factory=dict)  # of --practice: see write_practice()
    trial: dict = field(default_factory=dict)  # of roles that go to "best": see TrialConfig in
                                               # data/refine/trial.py; {}: there is none


# --------------------------------------------------------------------------------------------------
# Models and instructions

def output_folder(config: SimpleNamespace) -> Path:
    return Path(config.refine.folder or config.out / "refine")


def load_llm(config: SimpleNamespace, name: str) -> LLM:
    """A model of the config, its answers kept under out/<run>/refine/cache."""
    llm, identity = open_llm(
        config.refine.models[name], f"refine.models[{name!r}]", config.out)
    cache = output_folder(config) / "cache" / f"{name}-{common.hash_json(identity)}.jsonl"
    return cached(llm, cache, failures=True)


def load_instructions(source: dict, scale: float) -> list[list[dict]]:
    """Messages that end with the user's: from generated problems, or from records of a source.

    source: {"problems": n, "family", "seed"} (and "own_answers": true, if these become the data as
    they are), or as in data/text/sources.py.
    """
    if "problems" in source:
        problems = generate_problems(source, scale)
        return [practice.question_messages(problem) for problem in problems]
    instructions = []
    position = sources.ReadPosition()
    for part in sources.parts(source):
        for number, record in sources.read(source, part, bad_line=position.bad_line):
            try:
                instructions.append(user_part(record, source))
            except ValueError as error:
                position.bad_line(f"{part}:{number}", str(error))
    n = max(1, round(scale * source.get("documents", len(instructions))))
    return instructions[:n]


def user_part(record: dict, source: dict) -> list[dict]:
    """A record's messages up to the last user turn, or its prompt. ValueError: it has neither."""
    prompt = record.get(source.get("column", "prompt"))
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = normalize(record)["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[:last + 1]


def generate_problems(source: dict, scale: float) -> list[Problem]:
    """Training problems of one family, no question twice."""
    family, seed = source["family"], source["seed"]
    rng = seeded_rng("refine", family, seed)
    n = max(1, round(scale * source["problems"]))
    problems = {}
    while len(problems) < n:
        problem = pages.training_problem(family, between(rng, 1, 3), rng)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


# --------------------------------------------------------------------------------------------------
# Refinement and reconstruction

def refine_and_reconstruct(
        instructions: list, models: dict[str, LLM], cfg: RefineConfig, usage: Counter,
        count: Callable[[str], int]) -> Iterator[tuple[Case, dict | None]]:
    """(history, record for sft.py) of each instruction; None where none may be kept.

    usage and count: as in refine().
    """
    for first in range(0, len(instructions), cfg.batch_size):
        batch = instructions[first:first + cfg.batch_size]
        cases = refine(batch, models, cfg, checklist.runnable_items, usage=usage, count=count)
        for case in cases:
            case.number += first
        chains = reconstruct_with_retries(cases, models, cfg, usage, count)
        for case, chain in zip(cases, chains):
            yield case, make_record(case, chain, cfg)


def reconstruct_with_retries(
        cases: list[Case], models: dict[str, LLM], cfg: RefineConfig, usage: Counter,
        count: Callable[[str], int]) -> list[tuple[str, str] | None]:
    """(summary, chain of thought) for each case's solution; None where no attempt may be kept. The
    summary is "" where the chain is the response's own.
    """
    chains = [None] * len(cases)
    attempts = cfg.chain_attempts if cfg.completer else 0
    for attempt in range(attempts):
        missing = [i for i, chain in enumerate(chains) if chain is None]
        pairs = [(cases[i].instruction, cases[i].solution) for i in missing]
        llm = nth_draw(models[cfg.completer], attempt)
        llm = with_usage(llm, usage, cfg.completer, "complete", count=count)
        for i, summary_and_chain in zip(missing, reconstruct(pairs, llm, cfg.prompts)):
            if summary_and_chain is None:
                continue
            _, chain = summary_and_chain
            if chain_may_be_kept(cases[i].question, chain, cases[i].solution, cfg.check_steps):
                chains[i] = summary_and_chain
    for i, case in enumerate(cases):
        if chains[i] is None and cfg.completer and cfg.own_chains:
            chain, _ = split_thoughts(case.best_attempt["response"])
            if chain_may_be_kept(case.question, chain, case.solution, cfg.check_steps):
                chains[i] = "", chain
    return chains


def chain_may_be_kept(question: str, chain: str, solution: str, check_steps: bool) -> bool:
    """Whether a chain leads to the solution, and, with check_steps, by no false step."""
    if not checklist.leads_to(question, chain, solution):
        return False
    return not (check_steps and checklist.find_false_step(question, chain))


def make_record(case: Case, chain: tuple[str, str] | None, cfg: RefineConfig) -> dict | None:
    """What sft.py trains on, with where it comes from; None without a chain to the solution."""
    best = case.best_attempt
    lacks_chain = bool(cfg.completer) and chain is None
    if best["score"] < cfg.min_score or not case.solution or lacks_chain:
        return None
    reply = {"role": "assistant", "content": case.solution}
    summary = ""
    if chain is not None:
        summary, reply["reasoning"] = chain
    return {"messages": [*case.instruction, reply], "summary": summary, "score": best["score"],
            "rounds": best["round"], "writer": best["writer"], "number": case.number}


# --------------------------------------------------------------------------------------------------
# The audit: what was made is held against the answers of generated problems

def audit(cases: list[Case], problems: list[Problem]) -> dict[str, float]:
    """Shares of right responses: of all drafts, of the best draft, in the end; and what revision
    did to them: the share of wrong best drafts that it mended, and of right ones that it spoiled.
    """
    by_question = {problem.question: problem for problem in problems}
    rows = []
    for case in cases:
        problem = by_question[case.question]
        rewards = [registry.reward(problem, attempt["response"]) for attempt in case.attempts]
        drafts = [i for i, attempt in enumerate(case.attempts) if attempt["round"] == 0]
        best_draft = max(drafts, key=lambda i: case.attempts[i]["score"])
        mean_of_drafts = np.mean([rewards[i] for i in drafts])
        rows.append((mean_of_drafts, rewards[best_draft], rewards[case.best]))
    all_drafts, best_draft, refined = np.array(rows).T
    mended = (best_draft == 0) & (refined == 1)
    spoiled = (best_draft == 1) & (refined == 0)
    return {
        "drafts": all_drafts.mean(),
        "best draft": best_draft.mean(),
        "refined": refined.mean(),
        "mended": mended.sum() / max(1, (best_draft == 0).sum()),
        "spoiled": spoiled.sum() / max(1, (best_draft == 1).sum()),
    }


def probe_completer(cases: list[Case], llm: LLM, cfg: RefineConfig) -> dict[str, float]:
    """Does the completer use the answer? How often its chain leads to the solution with it, without
    it, and with another one, and then to that; how often one with the right end has a false step.
    """
    cases = cases[:N_PROBED]
    solutions = [case.solution for case in cases]
    wrong = [other_solution(solutions, i) for i in range(len(cases))]

    def reconstruct_from(given: list[str]) -> list[tuple[str, str] | None]:
        pairs = [(case.instruction, solution) for case, solution in zip(cases, given)]
        return reconstruct(pairs, llm, cfg.prompts)

    informed = reconstruct_from(solutions)
    uninformed = reconstruct_from([""] * len(cases))
    misinformed = reconstruct_from(wrong)
    return {
        "led by its answer": share_leading_to(solutions, cases, informed),
        "by none": share_leading_to(solutions, cases, uninformed),
        "by a wrong one": share_leading_to(solutions, cases, misinformed),
        "to the wrong one": share_leading_to(wrong, cases, misinformed),
        "false step though": share_with_false_step(solutions, cases, informed),
    }


def probe_hidden(problems: list[Problem], llm: LLM, cfg: RefineConfig) -> dict[str, float]:
    """The same where the question hides what the chain takes, so that it cannot be solved anew:
    how often the chain leads to the gold answer with that, and without; {}: nothing can be hidden.
    """
    rng = seeded_rng("hidden")
    cases, asked = [], []
    for problem in problems[:N_PROBED]:
        hiding = practice.hide_from_question(problem, rng)
        if hiding is None:
            return {}
        cases.append(Case(0, practice.question_messages(problem)))
        asked.append(practice.question_messages(hiding))
    gold = [f"Answer: {problem.answer}" for problem in problems[:N_PROBED]]
    informed = reconstruct(list(zip(asked, gold)), llm, cfg.prompts)
    uninformed = reconstruct([(question, "") for question in asked], llm, cfg.prompts)
    return {
        "hidden: by its answer": share_leading_to(gold, cases, informed),
        "hidden: by none": share_leading_to(gold, cases, uninformed),
    }


def other_solution(solutions: list[str], i: int) -> str:
    """The next solution that differs from the i-th; "" if all are equal."""
    for solution in solutions[i + 1:] + solutions[:i]:
        if solution != solutions[i]:
            return solution
    return ""


def chains_leading_to(solutions: list[str], cases: list[Case], chains: list) -> list[tuple]:
    """(question, chain of thought) where there is a chain and it leads to the solution."""
    leading = []
    for solution, case, summary_and_chain in zip(solutions, cases, chains):
        if summary_and_chain is None:
            continue
        _, chain = summary_and_chain
        if checklist.leads_to(case.question, chain, solution):
            leading.append((case.question, chain))
    return leading


def share_leading_to(solutions: list[str], cases: list[Case], chains: list) -> float:
    return len(chains_leading_to(solutions, cases, chains)) / len(cases)


def share_with_false_step(solutions: list[str], cases: list[Case], chains: list) -> float:
    """Of the chains that lead to the solution."""
    leading = chains_leading_to(solutions, cases, chains)
    n_false = sum(bool(checklist.find_false_step(question, chain)) for question, chain in leading)
    return n_false / max(1, len(leading))


# --------------------------------------------------------------------------------------------------
# Practice: records on which small models learn to draft, judge, revise and complete

def write_practice(config: SimpleNamespace) -> None:
    """Writes out/<run>/practice/{draft,checklist,verdict,revision,chain}.jsonl from training
    problems, with planted faults and with the errors that a model makes; and <family>.jsonl, worked
    problems for a teacher.

    refine.practice is {"problems": {family: n}, "chains": {family: n}, "worked": {family: n},
    "model": name, "seed"}.
    """
    settings = config.refine.practice
    records = {name: [] for name in ("draft", "checklist", "verdict", "revision", "chain")}
    for family, n in settings["problems"].items():
        source = {"family": family, "problems": n, "seed": settings["seed"]}
        add_practice(records, source, config)
    for family, n in settings.get("worked", {}).items():
        source = {"family": family, "problems": n, "seed": settings["seed"] + 1}
        problems = generate_problems(source, config.scale)
        records[family] = [practice.draft_record(problem) for problem in problems]
    for family, n in settings.get("chains", {}).items():
        source = {"family": family, "problems": n, "seed": settings["seed"] + 2}
        records["chain"] += chain_records(source, config)
    for name, lines in records.items():
        write_lines(config.out / "practice" / f"{name}.jsonl", lines)
        print(f"{name:14}{len(lines):6} records")


def add_practice(records: dict[str, list], source: dict, config: SimpleNamespace) -> None:
    """Adds the records of one family's problems."""
    prompts, model = config.refine.prompts, config.refine.practice["model"]
    problems = generate_problems(source, config.scale)
    rng = seeded_rng("practice", source["family"], source["seed"])
    drafts = load_llm(config, model)([practice.question_messages(problem) for problem in problems])
    n_right = 0
    for problem, draft in zip(problems, drafts):
        faulty, _ = practice.plant_fault(problem, rng)
        responses = [faulty]
        if draft:
            responses.append(draft)
            n_right += registry.reward(problem, draft) == 1
        records["draft"].append(practice.draft_record(problem))
        records["checklist"].append(practice.checklist_record(problem, prompts))
        for response in responses:
            records["verdict"].append(practice.verdict_record(problem, response, prompts))
            if registry.reward(problem, response) != 1:
                records["revision"].append(practice.revision_record(problem, response, prompts))
    share = n_right / max(1, len(problems))
    print(f"{source['family']:8}{len(problems):6} practice problems; "
          f"{model} is right in {share:.0%}")


def chain_records(source: dict, config: SimpleNamespace) -> list[dict]:
    """For the completer; from every other question something is hidden that the solution tells."""
    prompts = config.refine.prompts
    rng = seeded_rng("chains", source["family"], source["seed"])
    records = []
    for i, problem in enumerate(generate_problems(source, config.scale)):
        asked = practice.hide_from_question(problem, rng) if i % 2 else None
        records.append(practice.chain_record(problem, prompts, asked))
    return records


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    common.write_atomic(path, text)


# --------------------------------------------------------------------------------------------------

def main():
    flags = {"practice": "write what small models are trained on, and stop"} | sandbox.FLAG
    config = load_config(__doc__, flags=flags, options=("run", "scale"), refine=RefineConfig)
    if config.weak_jail:
        sandbox.allow_weak_jail()
    cfg, folder = config.refine, output_folder(config)
    check_names(cfg)
    common.lock_folder(folder)  # whose cache keeps what the models say
    if config.practice:
        return write_practice(config)
    models = {name: load_llm(config, name) for name in cfg.models}
    cfg, shares = hold_trial(models, config)
    count = token_counter(config.out / "data" / "tokenizer.json")
    usage, report = Counter(), {}
    for name, source in cfg.instructions.items():
        if source.get("own_answers"):
            problems = generate_problems(source, config.scale)
            records = [practice.draft_record(problem) for problem in problems]
            write_lines(folder / f"{name}.jsonl", records)
            print(f"{name}: {len(records):,} records with their own answers")
            continue
        instructions = load_instructions(source, config.scale)
        cases, records = [], []
        for case, record in refine_and_reconstruct(instructions, models, cfg, usage, count):
            cases.append(case)
            if record:
                records.append(record)
        if not cases:
            raise UserError(f"refine.instructions[{name!r}]: no instruction got a draft")
        write_lines(folder / "history" / f"{name}.jsonl", [asdict(case) for case in cases])
        write_lines(folder / f"{name}.jsonl", records)

        rounds = np.mean([case.attempts[-1]["round"] for case in cases])
        unparsable = sum(case.unparsable for case in cases)
        print(f"{name}: {len(instructions):,} instructions, {len(cases):,} with drafts, "
              f"{rounds:.2f} rounds of revision, {unparsable:,} answers in no usable form; "
              f"{len(records):,} records in {folder / name}.jsonl", flush=True)
        report[name] = {"instructions": len(instructions), "kept": len(records) / len(cases),
                        "rounds": rounds}
        if cfg.completer:
            report[name] |= probe_completer(cases, models[cfg.completer], cfg)
        if "problems" in source:
            problems = generate_problems(source, config.scale)
            report[name] |= audit(cases, problems)
        if "problems" in source and cfg.completer:
            report[name] |= probe_hidden(problems, models[cfg.completer], cfg)
    print_report(report, usage)
    write_report(folder / "report.json", report, usage, shares, config)


def hold_trial(models: dict[str, LLM],
               config: SimpleNamespace) -> tuple[RefineConfig, dict[str, dict]]:
    """The settings with a model in place of each "best", and how good each was at each role."""
    cfg = config.refine
    if not cfg.trial:
        return cfg, {}
    plan = from_dict(trial.TrialConfig, cfg.trial, "refine.trial")
    problems = []
    for family, n in plan.problems.items():
        problems += generate_problems({"family": family, "problems": n, "seed": plan.seed}, 1.0)
    tried = {name: models[name] for name in plan.models}
    shares = trial.try_models(tried, problems, cfg.prompts)
    cfg = trial.assign(cfg, shares)
    print(f"trial, {len(problems)} problems:")
    for role, by_model in shares.items():
        cells = "".join(f"{name:>10} {share:.3f}" for name, share in by_model.items())
        print(f"{role:12}{cells}")
    print(f"so drafts: {', '.join(cfg.drafters)}; checklists: {cfg.checklist or 'nobody'}; "
          f"judges: {', '.join(cfg.evaluators) or 'nobody'}; revises: {', '.join(cfg.revisers)}; "
          f"completes: {cfg.completer or 'nobody'}", flush=True)
    return cfg, shares


def check_names(cfg: RefineConfig) -> None:
    """UserError for a role that no model of the config has, and for settings that do not fit."""
    roles = {*cfg.evaluators, *cfg.revisers, cfg.checklist, cfg.completer}
    if trial.BEST in roles and not cfg.trial:
        raise UserError('refine: a role goes to "best", but there is no refine.trial, which finds '
                        "out who that is")
    names = {*cfg.drafters, *roles - {trial.BEST}}
    if cfg.trial:
        names |= set(from_dict(trial.TrialConfig, cfg.trial, "refine.trial").models)
    for name, source in cfg.instructions.items():
        if source.get("own_answers") and "problems" not in source:
            raise UserError(f"refine.instructions[{name!r}] has own_answers, which only generated "
                            'problems have: {"problems": n, "family": …, "own_answers": true}')
    unknown = names - {"", *cfg.models}
    if unknown:
        known = ", ".join(cfg.models)
        raise UserError(f"refine: there is no model {min(unknown)!r}; refine.models has {known}")


def token_counter(tokenizer_file: Path) -> Callable[[str], int]:
    """Counts a text's tokens by the run's tokenizer, or else its characters."""
    if not tokenizer_file.is_file():
        return len
    tokenizer = Tokenizer.load(tokenizer_file)
    return lambda text: len(tokenizer.encode(text))


def print_report(report: dict[str, dict], usage: Counter) -> None:
    """Shares a row, sets a column; then who wrote how much."""
    print("\n" + " " * 20 + "".join(f"{name:>12}" for name in report))
    rows = {}  # an ordered set: a set of instructions may lack some
    for column in report.values():
        rows |= dict.fromkeys(column)
    for row in rows:
        cells = [f"{column[row]:12.3f}" if row in column else " " * 12
                 for column in report.values()]
        print(f"{row:20}" + "".join(cells))
    print(f"\n{'model':12}{'role':12}{'requests':>10}{'tokens':>10}")
    for model, role in dict.fromkeys(key[:2] for key in usage):
        requests, tokens = usage[model, role, "requests"], usage[model, role, "written"]
        print(f"{model:12}{role:12}{requests:10,}{tokens:10,}")


def write_report(path: Path, report: dict, usage: Counter, shares: dict,
                 config: SimpleNamespace) -> None:
    values = {
        "sets": report,
        "trial": shares,
        "usage": {" ".join(key): n for key, n in usage.items()},
        "commit": common.current_commit(),
        "command": config.command,
        "config": common.config_hash(config, "refine"),
    }
    common.write_atomic(path, json.dumps(values, indent=1, default=float))


if __name__ == "__main__":
    common.cli(main)
