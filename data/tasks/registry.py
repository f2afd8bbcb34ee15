"""What judges responses to a task, found by its name: a generated family, or a public set."""
import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data.tasks.problem import GENERATED, OpenAnswer, Problem


@dataclass
class Score:
    """The reward of a response, and what the verifier said of it."""
    reward: float | None        # 1.0 right, 0.0 wrong, None: could not be scored
    verdict: object = None      # data.verify.agentic.Verdict; None where rules decided


def family(spec: str):
    """What has `problems(split, n, seed)` and `reward(problem, response)`, loaded when asked for.

    spec: one of GENERATED, or a public set (data/sets/public.py): "gsm8k" from
    the hub, or "gsm8k=FILE". Where its answers can be compared, as for a vote, it has `same` as
    well; where rules leave some answers open `judge`, which returns these as OpenAnswer.
    """
    if spec in GENERATED:
        return importlib.import_module(f"data.tasks.{spec}")
    from data.sets import public  # verifier and sandbox, which generated problems do without

    return public.family(spec)


def reward(problem: Problem, response: str) -> float | None:
    """1.0 for a right response, else 0.0; None: could not be scored.

    response: the text after the prompt, or a chat reply.
    """
    return family(problem.family).reward(problem, response)


def judge(problem: Problem, response: str) -> float | None | OpenAnswer:
    """As `reward`, or the answer that rules leave open to a verifier."""
    of_family = family(problem.family)
    judge_response = getattr(of_family, "judge", None) or of_family.reward
    return judge_response(problem, response)


def rewards(problems: Sequence[Problem], responses: Sequence[str]) -> list[float | None]:
    """The reward of each response by rules alone."""
    return [score.reward for score in scores(problems, responses)]


def scores(
    problems: Sequence[Problem], responses: Sequence[str], verifier: Callable | None = None
) -> list[Score]:
    """The score of each response, several at a time: programs wait for the sandbox.

    verifier: a data.verify.agentic.Verifier, which is asked about all answers that rules leave open
    together. Without one they are wrong.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        judgements = list(pool.map(judge, problems, responses))
    cases = {}
    for i, judgement in enumerate(judgements):
        if isinstance(judgement, OpenAnswer):
            cases[i] = (problems[i].question, judgement.gold, judgement.answer)
    if verifier is None:
        return [Score(0.0 if i in cases else reward) for i, reward in enumerate(judgements)]
    scored = [Score(reward) for reward in judgements]
    for i, verdict in zip(cases, verifier(list(cases.values()))):
        scored[i] = Score(None if verdict.equal is None else float(verdict.equal), verdict)
    return scored
