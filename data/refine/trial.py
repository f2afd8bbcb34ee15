"""Who is good at what: every model tries every role of the refinement on problems whose answers are
known, and each role goes to the best, if that is good enough.

The problems are of training, and others than those that are refined. The report has several teachers
and does not say how it chose who does what: our choice.
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
    """{role: {model: share}} of what came out right.

    draft: answers. checklist: those with the family's item. judge: verdicts, the mean of that on
    sound chains and that on faulty ones. revise: faulty responses that were made right. complete:
    chains that lead to the solution, though their question hides what it takes.
    """
    rng = seeded_rng("trial")
    faulty = [practice.plant_fault(problem, rng)[0] for problem in problems]
    trials = {"draft": _draft, "checklist": _checklist, "judge": _judge, "revise": _revise,
              "complete": _complete}
    return {role: {name: run(llm, problems, faulty, prompts) for name, llm in models.items()}
            for role, run in trials.items()}


def best_model(role: str, shares: dict[str, float]) -> str:
    """Who is best at a role, of equals the first; "": nobody is good enough."""
    name = max(shares, key=shares.get)
    return name if shares[name] >= LEAST.get(role, 0.0) else ""


def assign(cfg: refinement.Settings, shares: dict[str, dict]) -> refinement.Settings:
    """The settings with models in place of each "best", by what try_out() returned.

    The better a model drafts, the earlier it stands: of equal drafts the first is kept. Where nobody
    can judge, nobody writes checklists either: what programs check is what counts.
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

def _draft(llm: LLM, problems: list, faulty: list, prompts: dict) -> float:
    texts = llm([practice.question_messages(problem) for problem in problems])
    return fmean(map(_is_right, problems, texts))


def _checklist(llm: LLM, problems: list, faulty: list, prompts: dict) -> float:
    records = [practice.checklist_record(problem, prompts) for problem in problems]
    return fmean(text == record["messages"][-1]["content"]
                 for text, record in zip(_ask(llm, records), records))


def _judge(llm: LLM, problems: list, faulty: list, prompts: dict) -> float:
    responses = faulty + [practice.to_response(problem) for problem in problems]
    records = [practice.verdict_record(problem, response, prompts)
               for problem, response in zip(problems * 2, responses)]
    agrees = {True: [], False: []}  # by whether the chain is sound
    for text, record in zip(_ask(llm, records), records):
        sound = _passes(record["messages"][-1]["content"])
        agrees[sound].append(_passes(text or "") == sound)
    return fmean(fmean(same) for same in agrees.values() if same)


def _passes(text: str) -> bool | None:
    """Whether a verdict on one item passes it; None: no verdict."""
    critiques = refinement.parse_verdicts(text, 1)
    return None if critiques is None else critiques == [""]


def _revise(llm: LLM, problems: list, faulty: list, prompts: dict) -> float:
    records = [practice.revision_record(problem, response, prompts)
               for problem, response in zip(problems, faulty)]
    return fmean(map(_is_right, problems, _ask(llm, records)))


def _complete(llm: LLM, problems: list, faulty: list, prompts: dict) -> float:
    rng = seeded_rng("hidden")
    asked = [practice.hide_from_question(problem, rng) or problem for problem in problems]
    pairs = [(practice.question_messages(hiding), f"Answer: {problem.answer}")
             for hiding, problem in zip(asked, problems)]
    chains = refinement.reconstruct(pairs, llm, prompts)
    led = [chain is not None and bool(checklist.leads_to(problem.question, chain[1], solution))
           for problem, chain, (_, solution) in zip(problems, chains, pairs)]
    return fmean(led)


def _ask(llm: LLM, records: list[dict]) -> list[str | None]:
    """The model's own replies to what practice records ask."""
    return llm([record["messages"][:-1] for record in records])


def _is_right(problem: Problem, text: str | None) -> bool:
    return text is not None and registry.reward(problem, text) == 1.0
