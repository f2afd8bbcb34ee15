"""Phase 2a, makes the data of SFT: deliberative generation refinement and chain-of-thought reconstruction.

    python refine.py configs/tiny.py --practice      # what small writers are trained on, by sft.py: see speedrun.sh
    python refine.py configs/tiny.py                 # out/tiny/refine/NAME.jsonl for each set of instructions

For each instruction several writers draft, a checklist is written for it, evaluators and programs hold every draft
against it, and a reviser rewrites the best by their critique, until nothing is left to criticize or the score stops
rising. A chain completer then writes the chain of thought that leads to the solution (arXiv 2512.06266, SFT). The loop
and its prompts are in data/refine/refinement.py, what programs can check in data/refine/checklist.py.

Writers are checkpoints or OpenAI-compatible endpoints. Every answer is kept on disk as it comes: a killed run goes on
where it was and pays for nothing twice. No gold answer is looked at, but in the audit at the end, where the problems
are generated ones, and in --practice, which teaches small writers what a capable one can do anyway.
"""
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

import common
import hf
from common import UserError
from data.refine import checklist
from data.verify import sandbox
from data.text import sources
from data.tasks import pages, registry
from data.tasks.problem import Problem, between, seeded_rng, to_chat
from data.chat.conversations import normalize
from data.refine.refinement import counted, nth, reconstruct, refine, Refined, Settings, split
from data.refine import practice
from data.text.tokenizer import Tokenizer
from data.llm import cached, http_llm, LLM, LLMConfig
from generate import local_llm

PROBED = 200  # reconstructions of each set for which the audit asks again, without the answer and with a wrong one


@dataclass(kw_only=True)
class RefineConfig(Settings):
    writers: dict                # name -> {"checkpoint": phase of this run or path, …} or {"url": endpoint, …}
    instructions: dict           # name of a set -> a source of data/text/sources.py, or {"problems": n, "family", "seed"}
    completer: str = ""          # who reconstructs chains of thought; "": nobody, and there is no data with thoughts
    chains: int = 4              # reconstructions that are tried of each solution, until one may be kept
    least_score: float = 0.0     # solutions of a lower score are left out
    check_steps: bool = False    # chains with a false calculation are left out, too
    together: int = 1024         # instructions that are refined side by side
    folder: str = ""             # of what is made (default: out/<run>/refine)
    practice: dict = field(default_factory=dict)  # of --practice: {"problems", "worked": {family: n}, "writer", "seed"}


# ---------------------------------------------------------------------------------------------------------------------
# Writers and instructions

def writer_of(cfg, name: str) -> LLM:
    """A writer of the config, its answers kept under out/<run>/refine/cache."""
    spec = dict(cfg.refine.writers[name])
    if "checkpoint" in spec:
        path = hf.resolve_checkpoint(common.Dist(0, 1, torch.device("cpu"), None), spec.pop("checkpoint"), cfg.out)
        try:
            writer = local_llm(str(path), **spec)
        except TypeError as error:
            raise UserError(f"refine.writers[{name!r}]: {error}") from None
        spec["weights"] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.iterdir())]
    else:
        writer = http_llm(common.from_dict(LLMConfig, spec, f"refine.writers[{name!r}]"))
    folder = Path(cfg.refine.folder or cfg.out / "refine") / "cache"
    return cached(writer, folder / f"{name}-{common.hash_json(spec)}.jsonl", failures=True)


def instructions_of(source: dict, scale: float) -> list[list[dict]]:
    """Messages that end with the user's: the questions of generated training problems, or records of a source."""
    if "problems" in source:
        return [to_chat(problem)[:1] for problem in problems_of(source, scale)]
    found, place = [], sources.ReadPosition()
    for where in sources.shards(source):
        for number, record in sources.read(source, where, bad_line=place.bad_line):
            try:
                found.append(instruction_in(record, source))
            except ValueError as error:
                place.bad_line(f"{where}:{number}", str(error))
    return found[:round(scale * source.get("documents", len(found)))]


def instruction_in(record: dict, source: dict) -> list[dict]:
    """The user's part of a record: its messages up to the last user turn, or its prompt."""
    if isinstance(record.get(source.get("column", "prompt")), str):
        return [{"role": "user", "content": record[source.get("column", "prompt")]}]
    messages = normalize(record)["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[:last + 1]


def problems_of(source: dict, scale: float) -> list[Problem]:
    """Training problems of one family, no question twice."""
    rng, found, n = seeded_rng("refine", source["family"], source["seed"]), {}, round(scale * source["problems"])
    while len(found) < n:
        problem = pages.training_problem(source["family"], between(rng, 1, 3), rng)
        found.setdefault(problem.question, problem)
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Refinement and reconstruction

def make(instructions: list, team: dict, p: RefineConfig, usage: Counter,
         count) -> Iterator[tuple[Refined, dict | None]]:
    """(history, record for sft.py) of each instruction; None where no reconstruction could be kept."""
    for first in range(0, len(instructions), p.together):
        cases = refine(instructions[first:first + p.together], team, p, checklist.runnable, usage=usage, count=count)
        for case in cases:
            case.number += first
        solutions = [split(case.attempts[case.best]["response"])[1] for case in cases]
        chains = [None] * len(cases)
        for n in range(p.chains if p.completer else 0):
            missing = [i for i, chain in enumerate(chains) if chain is None]
            writer = counted(nth(team[p.completer], n), usage, p.completer, "complete", count=count)
            found = reconstruct([(cases[i].instruction, solutions[i]) for i in missing], writer, p.prompts)
            for i, chain in zip(missing, found):
                if chain and keeps(cases[i].instruction[-1]["content"], chain[1], solutions[i], p.check_steps):
                    chains[i] = chain
        for case, solution, chain in zip(cases, solutions, chains):
            yield case, record_of(case, solution, chain, p)


def record_of(case: Refined, solution: str, chain: tuple[str, str] | None, p: RefineConfig) -> dict | None:
    """What sft.py trains on, with where it comes from; None without a chain that leads to the solution."""
    best = case.attempts[case.best]
    if best["score"] < p.least_score or not solution or p.completer and not chain:
        return None
    reply = {"role": "assistant", "content": solution} | ({"reasoning": chain[1]} if chain else {})
    return {"messages": [*case.instruction, reply], "summary": chain[0] if chain else "", "score": best["score"],
            "rounds": best["round"], "writer": best["writer"], "number": case.number}


def keeps(question: str, chain: str, solution: str, check_steps: bool) -> bool:
    return bool(checklist.leads_to(question, chain, solution)) and not (
        check_steps and checklist.false_step(question, chain))


# ---------------------------------------------------------------------------------------------------------------------
# The audit: here, and only here, what was made is held against the answers of generated problems

def audit(histories: list[Refined], problems: list[Problem]) -> dict[str, float]:
    """Shares of right responses: of all drafts, of the best draft, in the end; and what revision did to them."""
    by_question = {problem.question: problem for problem in problems}
    right = []  # of each instruction: its drafts, its best draft, its end
    for case in histories:
        problem = by_question[case.instruction[-1]["content"]]
        rewards = [registry.reward(problem, attempt["response"]) for attempt in case.attempts]
        drafts = [i for i, attempt in enumerate(case.attempts) if attempt["round"] == 0]
        best = max(drafts, key=lambda i: case.attempts[i]["score"])
        right.append((np.mean([rewards[i] for i in drafts]), rewards[best], rewards[case.best]))
    drafts, best, end = np.array(right).T
    return {"drafts": drafts.mean(), "best draft": best.mean(), "refined": end.mean(),
            "mended": ((best == 0) & (end == 1)).sum() / max(1, (best == 0).sum()),
            "spoiled": ((best == 1) & (end == 0)).sum() / max(1, (best == 1).sum())}


def probe(histories: list[Refined], writer: LLM, p: RefineConfig) -> dict[str, float]:
    """Does the completer use the answer? How often its chain leads to the solution with it, without it, and with
    another one, and then to that; and how often a chain with the right end has a false step."""
    cases = histories[:PROBED]
    ours = [split(case.attempts[case.best]["response"])[1] for case in cases]
    wrong = [next((text for text in ours[i + 1:] + ours[:i] if text != ours[i]), "") for i in range(len(ours))]

    def share(given: list[str], wanted: list[str]) -> tuple[float, float]:
        chains = reconstruct([(case.instruction, text) for case, text in zip(cases, given)], writer, p.prompts)
        found = [(case.instruction[-1]["content"], chain[1]) for case, chain, text in zip(cases, chains, wanted)
                 if chain and checklist.leads_to(case.instruction[-1]["content"], chain[1], text)]
        return len(found) / len(cases), sum(bool(checklist.false_step(*pair)) for pair in found) / max(1, len(found))

    led, false = share(ours, ours)
    return {"led by its answer": led, "by none": share([""] * len(ours), ours)[0],
            "by a wrong one": share(wrong, ours)[0], "to the wrong one": share(wrong, wrong)[0],
            "false step though": false}


# ---------------------------------------------------------------------------------------------------------------------
# Practice: records on which small writers learn to draft, judge, revise and complete

def write_practice(cfg) -> None:
    """Writes out/<run>/practice/{draft,checklist,verdict,revision,chain}.jsonl from training problems: with planted
    faults, and with the errors that the config's practice.writer makes; and worked/<family>.jsonl for a teacher."""
    p, records = cfg.refine, {name: [] for name in ("draft", "checklist", "verdict", "revision", "chain")}
    for family, n in p.practice["problems"].items():
        problems = problems_of({"family": family, "problems": n, "seed": p.practice["seed"]}, cfg.scale)
        rng = seeded_rng("practice", family, p.practice["seed"])
        drafts = writer_of(cfg, p.practice["writer"])([to_chat(problem)[:1] for problem in problems])
        for i, problem in enumerate(problems):
            tried = [practice.plant(problem, rng)[0], *([drafts[i]] if drafts[i] else [])]
            wrong = [text for text in tried if registry.reward(problem, text) != 1]
            records["draft"].append(practice.draft_record(problem))
            records["checklist"].append(practice.checklist_record(problem, p.prompts))
            records["verdict"] += [practice.verdict_record(problem, text, p.prompts) for text in tried]
            records["revision"] += [practice.revision_record(problem, text, p.prompts) for text in wrong]
            records["chain"].append(practice.chain_record(problem, p.prompts))
        right = np.mean([bool(text) and registry.reward(problem, text) == 1 for problem, text in zip(problems, drafts)])
        print(f"{family:8}{len(problems):6} practice problems; {p.practice['writer']} is right in {right:.0%}")
    for family, n in p.practice.get("worked", {}).items():
        problems = problems_of({"family": family, "problems": n, "seed": p.practice["seed"] + 1}, cfg.scale)
        records[f"worked/{family}"] = [practice.draft_record(problem) for problem in problems]
    for name, lines in records.items():
        write_lines(cfg.out / "practice" / f"{name}.jsonl", lines)
        print(f"{name:14}{len(lines):6} records")


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------------------------------

def main():
    cfg = common.load_config(__doc__, flags={"practice": "write what small writers are trained on, and stop"}
                             | sandbox.FLAG, refine=RefineConfig)
    if cfg.unsafe_exec:
        sandbox.allow_unlocked()
    p, folder = cfg.refine, Path(cfg.refine.folder or cfg.out / "refine")
    if cfg.practice:
        return write_practice(cfg)
    if unknown := {*p.drafters, *p.evaluators, *p.revisers, p.checklist, p.completer} - {"", *p.writers}:
        raise UserError(f"refine: there is no writer {min(unknown)!r}; refine.writers has {', '.join(p.writers)}")
    team, usage, report = {name: writer_of(cfg, name) for name in p.writers}, Counter(), {}
    file = cfg.out / "data" / "tokenizer.json"
    count = Tokenizer.load(file).encode if file.is_file() else list  # tokens, or else characters
    for name, source in p.instructions.items():
        instructions = instructions_of(source, cfg.scale)
        made = list(make(instructions, team, p, usage, lambda text: len(count(text))))
        histories = [case for case, _ in made]
        kept = [record for _, record in made if record]
        write_lines(folder / "history" / f"{name}.jsonl", [asdict(case) for case in histories])
        write_lines(folder / f"{name}.jsonl", kept)
        rounds = np.mean([max(attempt["round"] for attempt in case.attempts) for case in histories])
        print(f"{name}: {len(instructions):,} instructions, {len(histories):,} with drafts, {rounds:.2f} rounds of "
              f"revision, {sum(case.unparsable for case in histories):,} answers in no usable form; "
              f"{len(kept):,} records in {folder / name}.jsonl", flush=True)
        report[name] = {"instructions": len(instructions), "kept": len(kept) / len(histories), "rounds": rounds}
        if "problems" in source:
            report[name] |= audit(histories, problems_of(source, cfg.scale))
        if p.completer:
            report[name] |= probe(histories, team[p.completer], p)
    print_report(report, usage)
    common.write_atomic(folder / "report.json", json.dumps(
        {"sets": report, "usage": {" ".join(key): n for key, n in usage.items()}, "commit": common.current_commit(),
         "command": cfg.command, "config": common.config_hash(cfg, "refine")}, indent=1, default=float))


def print_report(report: dict[str, dict], usage: Counter) -> None:
    """Shares a row, sets a column; then who wrote how much."""
    print(f"\n{'':20}" + "".join(f"{name:>12}" for name in report))
    for row in dict.fromkeys(key for column in report.values() for key in column):
        cells = (f"{column[row]:12.3f}" if row in column else " " * 12 for column in report.values())
        print(f"{row:20}" + "".join(cells))
    print(f"\n{'writer':12}{'role':12}{'requests':>10}{'tokens':>10}")
    for writer, role in dict.fromkeys(key[:2] for key in usage):
        print(f"{writer:12}{role:12}{usage[writer, role, 'requests']:10,}{usage[writer, role, 'written']:10,}")


if __name__ == "__main__":
    common.cli(main)
