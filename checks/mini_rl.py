"""RL of the miniature model: `python -m checks.mini_rl mini_rl.py` is rl.py with toy rewards.

A model that was pre-trained for seconds answers nothing right and ends no response. Here any text
may earn a reward, and many tokens end a response. All else is the real thing. test_rl.py and
checks.kill run it in a folder of checks.mini.
"""
import common
import generate
import rl
from data.tasks import registry, taste
from data.tasks.problem import OpenAnswer
from generate import sample_as_completed

CONFIG = """
from mini import *
rl = dict(
    stages=[
        dict(name="STEM", problems=dict(math=10), steps=4),
        dict(name="preference", problems=dict(taste=6), steps=3, reward="pairwise", temperature=0.8,
             lr=[1, 0.1]),
    ],
    reward_model="out/base/pretrain", group_size=4, batch_groups=2, micro_rows=3, updates=2, kl=0.1,
    max_new_tokens=12, context=192, filter_samples=4, opponents=0, save_every=1, keep=99,
    log_every=2, lr=2e-3, prompts=["1 + 1?"])
"""
END_TOKENS = tuple(range(0, 400, 5))  # every fifth token ends a response


def toy(change) -> None:
    """Puts toy functions in the place of rl's own.

    change: as setattr, or a test's monkeypatch.setattr
    """
    change(generate, "sample_as_completed", sample_with_many_ends)
    change(registry, "judge", judge_by_length)
    change(taste, "is_correct", is_correct_by_length)


def sample_with_many_ends(*arguments, stop, **options):
    return sample_as_completed(*arguments, stop=(*stop, *END_TOKENS), **options)


def judge_by_length(problem, response) -> float | OpenAnswer:
    """A number for all tasks but phrases, which are open."""
    if problem.family == "phrases":
        return OpenAnswer(problem.answer, response)
    return float(len(response) % 2)


def is_correct_by_length(problem, response) -> bool:
    return len(response) % 3 > 0


if __name__ == "__main__":
    toy(setattr)
    common.cli(rl.main)
