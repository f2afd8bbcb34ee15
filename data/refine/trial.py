"""Who is good at what: each model tries every role of the refinement on problems whose answers are
known, and each role goes to the best, if that is good enough.

The problems are training problems, but none of those that are refined. The report has several
teachers and does not say who does what: our choice.
"""
from dataclasses import replace
from statistics import fmean

from data.llm import LLM
from data.refine import checklist, practice, refinement
from data.tasks import registry
from data.tasks.problem import Problem, seeded_rng

BEST = "best"  # in place of a model's name: the one that was best at this role
LEAST = dict(judge=0.75)  # who is worse gets no role: to judge by chance alone is 0.5. Our choice


def try_out(models: dict[str, LLM], problems: list[Problem], prompts: dict) -> dict[str, dict]:
    """{role: {model: share of what came out right}}.

    draft: answers. checklist: those with the family's item. judge: verdicts, the mean of the share
    on sound chains and that on faulty ones. revise: faulty responses that were made right.
    complete: chains that lead to the solution, while their question hides what they take.
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


def best_model(role: str, shares: dict[str, float]) -> str:
    """Who is best at a role, of equals the first; "": nobody is good enough."""
    name = max(shares, key=shares.get)
    return name if shares[name] >= LEAST.get(role, 0.0) else ""


def assign(cfg: refinement.Settings, shares: dict[str, dict]) -> refinement.Settings:
    """The settings with models in place of each "best", by what try_out() returned.

    The better a model drafts, the earlier it stands: of equal drafts the first is kept. Where
    nobody can judge, nobody writes checklists either: what programs check is what counts.
    """
    def named(role: str, name: str) -> str:
        return best_model(role, shares[role]) if name == BEST else name

    judges = [named("judge", name) for name in cfg.evaluators]
    evaluators = list(filter(None, judges))
    return replace(
        cfg,
        drafters=sorted(cfg.drafters, key=lambda name: -shares["draft"].get(name, 0.0)),
        checklist=named("checklist", cfg.checklist) if evaluators else "",
        evaluators=evaluators,
        revisers=[named("revise", name) for name in cfg.revisers],
        completer=named("complete", cfg.completer))


# --------------------------------------------------------------------------------------------------
# The roles. faulty: a wrong response to each problem.

def try_drafting(llm: LLM, problems: list[Problem]) -> float:
    texts = llm([practice.question_messages(problem) for problem in problems])
    return fmean(map(is_right, problems, texts))


def try_checklists(llm: LLM, problems: list[Problem], prompts: dict) -> float:
    records = [practice.checklist_record(problem, prompts) for problem in problems]
    replies = [record["messages"][-1]["content"] for record in records]
    return fmean(map(str.__eq__, replies, map(str, ask(llm, records))))


def try_judging(llm: LLM, problems: list[Problem], faulty: list[str], prompts: dict) -> float:
    records = []
    for problem, wrong in zip(problems, faulty):
        for response in (wrong, practice.to_response(problem)):
            records.append(practice.verdict_record(problem, response, prompts))
    agreed = {True: [], False: []}  # of sound chains, of faulty ones
    for record, text in zip(records, ask(llm, records)):
        is_sound = passes(record["messages"][-1]["content"])
        agreed[is_sound].append(passes(text or "") == is_sound)
    return fmean(map(fmean, filter(None, agreed.values())))


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
    n_led = 0
    for problem, (_, solution), made in zip(
            problems, pairs, refinement.reconstruct(pairs, llm, prompts)):
        if made is not None:
            _, chain = made
            n_led += bool(checklist.leads_to(problem.question, chain, solution))
    return n_led / len(problems)


def ask(llm: LLM, records: list[dict]) -> list[str | None]:
    """The model's own replies to what practice records ask."""
    return llm([record["messages"][:-1] for record in records])


def is_right(problem: Problem, text: str | None) -> bool:
    return text is not None and registry.reward(problem, text) == 1.0
