"""Shares of a writer who knows everything, of one who knows one role alone, and of one who says
nothing; and who gets which role."""
from settings import from_dict

from dataclasses import replace

import pytest

from common import UserError
from data.refine import practice, trial
from data.tasks.pages import FAMILIES
from refine import RefineConfig

PROBLEMS = [problem for family in practice.ITEMS
            for problem in FAMILIES[family].problems("train", 5, 3)]
PROMPTS = {
    "checklist": "CHECKLIST {instruction}",
    "evaluate": "JUDGE {instruction}\n{response}\n{items}",
    "revise": "REVISE {instruction}\n{response}\n{critique}",
    "failure": "{critique}",
    "complete": "COMPLETE {solution}",
}


def writer(*roles: str):
    """Knows PROBLEMS' answers, and gives them in these roles; in the others it says "no"."""

    def write(conversations):
        return [answer(messages[-1]["content"]) for messages in conversations]

    def answer(text: str) -> str:
        role = next((role for role in ("CHECKLIST", "JUDGE", "REVISE", "COMPLETE")
                     if text.startswith(role)), "DRAFT")
        if role not in roles:
            return "no"
        if role == "COMPLETE":
            problem = next(p for p in PROBLEMS if text.endswith(f"Answer: {p.answer}"))
            return practice.chain_record(problem, PROMPTS)["messages"][-1]["content"]
        problem = next(p for p in PROBLEMS if p.question in text)
        if role == "CHECKLIST":
            return practice.checklist_record(problem, PROMPTS)["messages"][-1]["content"]
        if role == "JUDGE":
            body = text.removeprefix(f"JUDGE {problem.question}\n")
            chain, _, _ = body.rpartition("\nAnswer:")
            critique = practice.compare_steps(problem, chain)
            return '[{"pass": true}]' if not critique else '[{"pass": false, "critique": "Wrong."}]'
        return practice.to_response(problem)

    return write


def test_shares():
    everything = ("DRAFT", "CHECKLIST", "JUDGE", "REVISE", "COMPLETE")
    models = {"all": writer(*everything), "none": writer()}
    models |= {role: writer(role) for role in everything}
    shares = trial.try_models(models, PROBLEMS, PROMPTS)
    assert list(shares) == ["draft", "checklist", "judge", "revise", "complete"]
    for role, by_model in shares.items():
        for name, share in by_model.items():
            knows = name == "all" or name.lower().startswith(role)
            assert share == (1.0 if knows else 0.0), (role, name)


def test_one_who_passes_everything_is_no_judge():
    shares = trial.try_models({"kind": lambda asked: ['[{"pass": true}]'] * len(asked)}, PROBLEMS,
                           PROMPTS)
    assert shares["judge"]["kind"] == 0.5


SHARES = {"draft": {"a": 0.2, "b": 0.7}, "checklist": {"a": 0.5, "b": 0.5},
          "judge": {"a": 0.8, "b": 0.9}, "revise": {"a": 0.9, "b": 0.3},
          "complete": {"a": 0.0, "b": 0.1}}
ROLES = RefineConfig(drafters=["c", "a", "b"], checklist="best", evaluators=["best", "a"],
                     revisers=["b", "best"], completer="best", models={}, instructions={"x": {}})


def test_one_may_be_named_beside_the_best():
    given = trial.assign(replace(ROLES, evaluators=["best", "b"]), SHARES)
    assert given.evaluators == ["b"]  # who is the best, and stands once


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(models=[]), "models"),
        (dict(problems={"recall": 3}), "no faults can be planted in 'recall'"),
        (dict(problems={"math": 0}), "problems"),
        (dict(number=3), "unknown key 'number'"),
    ],
)
def test_wrong_settings_of_the_trial(wrong, message):
    with pytest.raises(UserError, match=message):
        settings = dict(models=["a"], problems={"math": 3}) | wrong
        from_dict(trial.TrialConfig, settings, "refine.trial")


def test_each_role_goes_to_the_best():
    given = trial.assign(ROLES, SHARES)
    assert given.drafters == ["b", "a", "c"]  # the best first; last who was not tried
    assert (given.checklist, given.evaluators, given.revisers, given.completer) == (
        "a", ["b", "a"], ["b", "a"], "b")
    assert ROLES.checklist == "best"


def test_where_nobody_can_judge_nobody_does():
    shares = SHARES | {"judge": {"a": 0.74, "b": 0.5}}
    given = trial.assign(replace(ROLES, evaluators=["best"]), shares)
    assert (given.checklist, given.evaluators, given.revisers) == ("", [], ["b", "a"])
    named = trial.assign(replace(ROLES, evaluators=[], checklist="a"), shares)
    assert named.checklist == "a"  # its items may be programs, which nobody need judge
