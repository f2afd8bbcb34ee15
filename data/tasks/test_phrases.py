"""Phrases mean their value, rules leave them open, and no gold of a split is in another."""

from collections import Counter

import pytest

from data.tasks import math, phrases, registry
from data.tasks.problem import OpenAnswer, assign_split, seeded_rng
from data.verify import answers


@pytest.mark.parametrize(
    "n, words",
    [
        (0, "zero"),
        (7, "seven"),
        (13, "thirteen"),
        (20, "twenty"),
        (42, "forty-two"),
        (99, "ninety-nine"),
    ],
)
def test_spelled_numbers(n, words):
    assert phrases.spell(n) == words


def test_spelling_is_read_back():
    """By the rules of answers.py, which know numbers in words."""
    texts = [phrases.spell(n) for n in range(100)]
    assert len(set(texts)) == 100


def test_phrases_mean_their_value():
    rng = seeded_rng("test phrases")
    seen = Counter()
    for value in list(range(2, 100)) * 20:
        phrase = phrases.draw_phrase(rng, value)
        assert eval(phrase.code) == value
        assert not {"and", "or"} & set(phrase.text.split())
        seen[phrase.form, phrase.spelling] += 1
    assert len(seen) == 4 * 4 + 6 * 2 and min(seen.values()) > 5  # of two operands, of one


def test_held_out_forms():
    rng = seeded_rng("test phrases")
    for value in range(2, 50):
        known = phrases.draw_phrase(rng, value, held_out=False)
        other = phrases.draw_phrase(rng, value, held_out=True)
        assert (known.form, known.spelling) not in phrases.HELD_OUT
        assert (other.form, other.spelling) in phrases.HELD_OUT


def test_rules_and_library_leave_a_number_open():
    for problem in phrases.problems("train", 60, 0):
        value = problem.extra["value"]
        for answer in (value, f"{int(value) + 1}"):
            judgement = registry.family("phrases").judge(problem, f"Answer: {answer}")
            assert judgement == OpenAnswer(problem.answer, answer)
        assert phrases.reward(problem, f"Answer: {value}") == 0.0
        assert phrases.reward(problem, f"Answer: {problem.answer}") == 1.0
        assert phrases.truth(problem, f"Answer: {value} pens") == 1.0
        assert phrases.truth(problem, f"Answer: {int(value) + 1}") == 0.0
        assert answers.decide(problem.answer, f"{value} or 3") is not True


def test_problems_are_those_of_math_in_other_words():
    problems = phrases.problems("dev", 50, 0)
    assert len(problems) == 50 and len({problem.key for problem in problems}) == 50
    for problem in problems:
        key = problem.key.replace("phrases", "math", 1)
        assert assign_split(key) == "dev" and problem.answer not in problem.question
    same_seed = {problem.question for problem in math.problems("dev", 75, 0)}
    assert len(same_seed & {problem.question for problem in problems}) < 10
    assert problems == phrases.problems("dev", 50, 0)
