"""Who is good at what: each model tries every role of the refinement on problems whose answers are
known, and each role goes to the best. A judge must be good enough, too: there may be none.

The problems are training problems, drawn with a seed of their own. The report has several teachers
and does not say who does what: our choice.
"""
from settings import Count, Length, Seed

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated

from data.llm import LLM
from data.refine import checklist, practice, refinement
from data.tasks import registry
from data.tasks.problem import Problem, seeded_rng

BEST = "best"  # in place of a model's name: the one that was best at this role
LEAST_JUDGE = 0.75  # share of right verdicts below which nobody judges; by chance it is 0.5


@dataclass(kw_only=True)
class TrialConfig:
    models: Annotated[list[str], Length(1)]  # who is tried
    problems: Annotated[dict[str, Count], Length(1)]  # of each family, whatever --scale says
    seed: Seed = 0

    def __post_init__(self):
        unknown = set(self.problems) - set(practice.ITEMS)
        if unknown:
            known = ", ".join(practice.ITEMS)
            raise ValueError(f"no faults can be planted in {min(unknown)!r}, but in {known}")


def try_models(models: dict[str, LLM], problems: list[Problem], prompts: dict) -> dict[str, dict]:
    """{role: {model: share of what came out right}}.

    draft: answers. checklist: those that have the family's item. judge: verdicts, the mean of the
    share on sound chains and that on faulty ones. revise: faulty responses that were made right.
    complete: chains that lead to the solution by no false step, though their question hides what
    they take (where a family has that).
    """
    rng = seeded_rng("trial")
    faulty = [practice.plant_fault(problem, rng)[0] for problem in problems]
    shares = {role: {} for role in ("draft", "checklist", "judge", "revise", "complete")}
    for name, llm in models.items():
        shares["draft"][name] = try_drafting(llm, problems)
        shares["checklist"][name] = try_checklists(llm, problems, prompts)
        shares["judge"][name] = try_judging(llm, problems, faulty, prompts)
        shares["revise"][name] = try_revising(llm, problems, faulty, prompts)
        shares["complete"][name] = try_completing(llm, problems, prompts)
    return shares


def best_model(shares: dict[str, float]) -> str:
    """Of equals the first."""
    return max(shares, key=shares.get)


def assign(cfg: refinement.Settings, shares: dict[str, dict]) -> refinement.Settings:
    """The settings with models in place of each "best", by what try_models() returned.

    The better a model drafts, the earlier it stands: of equal drafts the first is kept. Where the
    best judge is not good enough nobody judges, nor writes checklists for judges: what programs
    check is what counts.
    """
    def named(role: str, name: str) -> str:
        return best_model(shares[role]) if name == BEST else name

    evaluators = dict.fromkeys(named("judge", name) for name in cfg.evaluators)
    if BEST in cfg.evaluators and max(shares["judge"].values()) < LEAST_JUDGE:
        evaluators = [name for name in cfg.evaluators if name != BEST]
    writes_checklists = cfg.checklist != BEST or evaluators
    return replace(
        cfg,
        drafters=sorted(cfg.drafters, key=lambda name: -shares["draft"].get(name, 0.0)),
        checklist=named("checklist", cfg.checklist) if writes_checklists else "",
        evaluators=list(evaluators),
        revisers=[named("revise", name) for name in cfg.revisers],
        completer=named("complete", cfg.completer))


# --------------------------------------------------------------------------------------------------
# The roles. faulty: a wrong response to each problem.

def try_drafting(llm: LLM, problems: list[Problem]) -> float:
    texts = llm([practice.question_messages(problem) for problem in problems])
    return fmean(map(is_right, problems, texts))


def try_checklists(llm: LLM, problems: list[Problem], prompts: dict) -> float:
    records = [practice.checklist_record(problem, prompts) for problem in problems]
    has_item = []
    for problem, text in zip(problems, ask(llm, records)):
        items = refinement.parse_checklist(text or "") or []
        has_item.append(practice.ITEMS[problem.family][0] in [item.text for item in items])
    return fmean(has_item)


def try_judging(llm: LLM, problems: list[Problem], faulty: list[str], prompts: dict) -> float:
    records = []
    for problem, wrong in zip(problems, faulty):
        for response in (wrong, practice.to_response(problem)):
            records.append(practice.verdict_record(problem, response, prompts))
    agreed = {True: [], False: []}  # of sound chains, of faulty ones
    for record, text in zip(records, ask(llm, records)):
        is_sound = passes(record["messages"][-1]["content"])
        agreed[is_sound].append(passes(text or "") == is_sound)
    on_sound, on_faulty = (fmean(same) if same else 0.0 for same in agreed.values())
    return (on_sound + on_faulty) / 2


def passes(text: str) -> bool | None:
    """Whether a verdict on one item passes it; None: no verdict."""
    critiques = refinement.parse_verdicts(text, 1)
    return None if critiques is None else critiques == [""]


def try_revising(llm: LLM, problems: list[Problem], faulty: list[str], prompts: dict) -> float:
    records = []
    for problem, response in zip(problems, faulty):
        records.append(practice.revision_record(problem, response, prompts))
    return fmean(map(is_right, problems, ask(llm, records)))


def try_completing(llm: LLM, problems: list[Problem], prompts: dict) -> float:
    rng = seeded_rng("hidden")
    pairs = []
    for problem in problems:
        hiding = practice.hide_from_question(problem, rng) or problem
        pairs.append((practice.question_messages(hiding), f"Answer: {problem.answer}"))
    led = []
    chains = refinement.reconstruct(pairs, llm, prompts)
    for problem, (_, solution), summary_and_chain in zip(problems, pairs, chains):
        _, chain = summary_and_chain or ("", "")
        leads_there = bool(checklist.leads_to(problem.question, chain, solution))
        led.append(leads_there and not checklist.find_false_step(problem.question, chain))
    return fmean(led)


def ask(llm: LLM, records: list[dict]) -> list[str | None]:
    """The model's own replies to what practice records ask."""
    return llm([record["messages"][:-1] for record in records])


def is_right(problem: Problem, text: str | None) -> bool:
    return text is not None and registry.reward(problem, text) == 1.0
