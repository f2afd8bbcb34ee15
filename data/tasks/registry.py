"""What judges responses to a task, found by its name: a generated family, or a public set."""
import importlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from data.tasks.problem import FAMILIES, Problem


def family(spec: str):
    """What has `problems(split, n, seed)` and `reward(problem, response)`, loaded when asked for.

    spec: one of FAMILIES, "taste", or a public set (data/sets/public.py): "gsm8k" from the hub, or
    "gsm8k=FILE". Where its answers can be compared, as for a vote, it has `same` as well.
    """
    if spec in FAMILIES or spec == "taste":
        return importlib.import_module(f"data.tasks.{spec}")
    from data.sets import public  # verifier and sandbox, which generated problems do without

    return public.family(spec)


def reward(problem: Problem, response: str) -> float | None:
    """1.0 for a right response, else 0.0; None: could not be scored.

    response: the text after the prompt, or a chat reply.
    """
    return family(problem.family).reward(problem, response)


def rewards(problems: Sequence[Problem], responses: Sequence[str]) -> list[float | None]:
    """The reward of each response, several at a time: programs wait for the sandbox."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(reward, problems, responses))
