"""The stages of a run in steps, and the learning rate of a step."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

from common import UserError


@dataclass(kw_only=True)
class Stage:
    """A stage of a run: its steps, first_step <= step < end_step, and what the config says of it.

    settings has at least lr, [start, end] as shares of the peak rate, and curve, how it gets from
    one to the other.
    """
    name: str
    first_step: int
    n_steps: int
    settings: object = None

    @property
    def end_step(self) -> int:
        return self.first_step + self.n_steps


@dataclass
class Schedule:
    """The settings of a stage of which the config says nothing else."""
    lr: Sequence[float]  # learning rate at the start and at the end, as shares of the peak
    curve: str           # linear, 1-sqrt, cosine or exponential


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that a step belongs to."""
    return next(stage for stage in stages if step < stage.end_step)


def is_due(every: int, n_steps: int) -> bool:
    """Whether what happens every so many steps happens after n_steps of them; 0: never."""
    return every > 0 and n_steps % every == 0


def _cosine(x: float) -> float:
    return (1 - math.cos(math.pi * x)) / 2


CURVES = {
    "linear": float,
    "1-sqrt": math.sqrt,
    "cosine": _cosine,
}  # each from 0 at x = 0 to 1 at x = 1


def learning_rate(peak: float, stage: Stage, step: int) -> float:
    """Rate of a step: from + (to - from) * f(x), x from 1 / n_steps to 1 over a stage's steps.

    f: linear; 1-sqrt (arXiv 2405.18392), which falls as 1 - sqrt(x); cosine. exponential: from *
    (to / from)^x. The report gives 4.5e-4 -> 1.5e-6 for pre-training and is silent on the curve:
    our choice.
    """
    start, end = stage.settings.lr
    curve = stage.settings.curve
    x = (step + 1 - stage.first_step) / stage.n_steps
    if curve == "exponential":
        return peak * start * (end / start) ** x
    return peak * (start + (end - start) * CURVES[curve](x))


def check_schedule(name: str, settings) -> None:
    """Raises UserError for an exponential curve from or to 0; the rest is checked by its types."""
    if settings.curve == "exponential" and min(settings.lr) == 0:
        raise UserError(
            f"stage {name!r}: curve 'exponential' needs rates above 0, not {settings.lr}")
