"""The labeller with the answer key, and the table of AUCs."""

import numpy as np
import pytest

from checks.quality import aucs
from data.tasks import pages
from data.tasks.problem import seeded_rng, to_document
from experiments.labels import DIMENSIONS, FAMILIES, grade, labelled_pages


def test_clean_pages_have_the_best_grades_and_every_fault_costs():
    rng = seeded_rng("test", 0)
    for family in FAMILIES:
        for level in (1, 2, 3):
            for _ in range(20):
                problem = pages.training_problem(family, level, rng)
                assert grade(problem, to_document(problem)) == [9] * len(DIMENSIONS), to_document(
                    problem
                )
                for kind in pages.CORRUPTIONS:
                    page = pages.corrupt(problem, kind, rng)
                    assert page == to_document(problem) or min(grade(problem, page)) < 9, (
                        kind,
                        page,
                    )


def test_labelled_pages_are_half_clean_and_repeat_with_the_seed():
    texts, grades, kinds = labelled_pages(200, 3)
    assert (
        kinds.count("") == 100
        and set(kinds) == {"", *pages.CORRUPTIONS}
        and grades.shape == (200, len(DIMENSIONS))
    )
    assert labelled_pages(200, 3)[0] == texts != labelled_pages(200, 4)[0]


def test_auc_is_the_share_of_pairs_in_order():
    kinds = np.array(["", "", *pages.CORRUPTIONS])
    found = aucs(np.array([5.0, 3.0, 4.0, 1.0, 5.0, 9.0]), kinds)
    assert [found[kind] for kind in pages.CORRUPTIONS] == [0.5, 1.0, 0.25, 0.0]
    assert found["all"] == pytest.approx((0.5 + 1 + 0.25 + 0) / 4)
