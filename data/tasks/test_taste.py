"""The hidden rubric of `taste` by hand, and what its preferences give away of it, right and wrong.
"""

import re

import pytest

from data.tasks import registry, taste
from data.tasks.problem import Problem, as_reply, assign_split, seeded_rng, to_document

PROBLEM = Problem(
    "taste",
    "form 75 + 3 [('unit', 'miles')]",
    "Tom runs 75 miles. He runs 3 more. What is the total? Give the unit.",
    ("75 + 3 = 78.",),
    "Tom runs 78 miles!",
    1,
    {"number": 78, "name": "Tom", "unit": "miles", "verb": "runs"},
)
WORDING = {
    "Name the person.": "name",
    "Give the unit.": "unit",
    "End with an exclamation mark.": "mark",
}
N = 2000


def problem_of(question: str) -> Problem:
    """Read off the text alone."""
    name, a, unit, b, asked = re.fullmatch(
        r"(\w+) \w+ (\d+) (\w+)\. \w+ \w+ (\d+) more\. What is the total\?((?: [A-Z][a-z ]+\.)+)",
        question,
    ).groups()
    asked = [WORDING[text] for text in re.findall(r"[A-Z][a-z ]+\.", asked)]
    values = {"name": name, "unit": unit, "mark": "an exclamation mark"}
    return Problem(
        "taste",
        f"form {a} + {b} {sorted((kind, values[kind]) for kind in asked)}",
        question,
        (),
        "",
        len(asked),
        {"number": int(a) + int(b), "name": name, "unit": unit},
    )


@pytest.mark.parametrize(
    "reply, points",
    [
        ("Tom runs 78 miles!", 4),
        ("Tom runs 78 miles.", 3),
        ("Tom runs 78!", 3),
        ("The total is 78 miles!", 3),  # five words
        ("So the total is 78 miles!", 2),
        ("Then Tom runs 78 miles now!", 3),
        ("78", 1),
        ("Then the total is 78 now", 0),
        ("Tommy runs 78 smiles", 1),
    ],
)
def test_rubric_by_hand(reply, points):
    """Person, unit, exclamation mark, five words at most: a quarter each."""
    for response in (
        reply,
        f"Answer: {reply}",
        f"<think>\nTom, miles!\n</think>\n\nAnswer: {reply}",
    ):
        assert taste.rubric(PROBLEM, response) == taste.reward(PROBLEM, response) == points / 4
        assert taste.is_correct(PROBLEM, response)


@pytest.mark.parametrize(
    "reply",
    [
        "Tom runs 79 miles!",
        "Tom runs 75 miles, 78 miles!",
        "Tom runs miles!",
        "",
        "<think>\nAnswer: Tom runs 78 miles!",
        "Tom runs -78 miles!",
    ],
)
def test_a_wrong_number_earns_nothing(reply):
    """Whatever its form; and no number, or two."""
    assert not taste.is_correct(PROBLEM, reply) and taste.reward(PROBLEM, reply) == 0


def test_the_answer_earns_all():
    for problem in taste.problems("train", 100, 0):
        made = problem_of(problem.question)
        assert (made.key, made.level) == (
            problem.key,
            problem.level,
        ) and made.extra.items() <= problem.extra.items()
        assert registry.reward(problem, as_reply(to_document(problem).partition("Work:")[2])) == 1


def test_replies_are_right_and_of_all_forms():
    rng = seeded_rng("test")
    replies = [taste.reply(PROBLEM, rng) for _ in range(300)]
    assert all(taste.is_correct(PROBLEM, text) for text in replies)
    assert {taste.rubric(PROBLEM, text) for text in replies} == {0, 0.25, 0.5, 0.75, 1}


def differences(pairs: list[dict]) -> list[float]:
    """By how much the rubric likes the better one better."""
    return [
        taste.rubric(problem, pair["better"]) - taste.rubric(problem, pair["worse"])
        for pair in pairs
        for problem in [problem_of(pair["question"])]
    ]


def test_preferences_without_noise_follow_the_rubric():
    """No ties; the answers alone do not decide, as all are right."""
    pairs = taste.pairs("train", N, 0)
    assert len(pairs) == N and differences(pairs) == [pair["gap"] for pair in pairs]
    assert min(pair["gap"] for pair in pairs) == 0.25
    assert all(
        taste.is_correct(problem_of(pair["question"]), pair[side])
        for pair in pairs
        for side in ("better", "worse")
    )
    assert (
        0.3 < sum(len(pair["better"]) > len(pair["worse"]) for pair in pairs) / N < 0.5
    )  # being short is of it


@pytest.mark.parametrize("noise", [0.15, 0.3])
def test_noise_is_for_the_longer_reply_alone(noise):
    """About the given share of the pairs says the opposite of the rubric: where that likes the
    shorter one better.
    """
    pairs = taste.pairs("train", N, 0, noise)
    flipped = [pair for pair, gained in zip(pairs, differences(pairs)) if gained < 0]
    assert len(flipped) / N == pytest.approx(noise, abs=0.03)
    assert all(len(pair["better"]) > len(pair["worse"]) for pair in flipped)
    assert [pair["gap"] for pair in pairs] == [abs(gained) for gained in differences(pairs)]


def test_a_question_that_form_has_too_is_in_the_same_split():
    form = {
        problem.question: problem.key
        for problem in registry.family("form").problems("train", 5000, 0)
    }
    both = [problem for problem in taste.problems("train", 5000, 0) if problem.question in form]
    assert len(both) > 10 and all(form[problem.question] == problem.key for problem in both)


def test_splits_keep_apart():
    """Of problems and of preferences."""
    for split in ("train", "dev", "test"):
        assert {assign_split(problem.key) for problem in taste.problems(split, 50, 0)} == {split}
        assert {
            assign_split(problem_of(pair["question"]).key) for pair in taste.pairs(split, 50, 0)
        } == {split}


def test_the_same_seed_gives_the_same():
    assert (
        taste.pairs("train", 20, 3, 0.2)
        == taste.pairs("train", 30, 3, 0.2)[:20]
        != taste.pairs("train", 20, 4, 0.2)
    )
    assert (
        taste.problems("dev", 20, 3) == taste.problems("dev", 20, 3) != taste.problems("dev", 20, 4)
    )
    assert registry.family("taste") is taste
