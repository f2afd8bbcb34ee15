"""Graded pages: what a labeller with the answer key says of pages with and without a fault."""
from collections.abc import Sequence

import numpy as np

from data.tasks.pages import CORRUPTIONS, corrupt, training_problem
from data.tasks.problem import Problem, between, pick, seeded_rng, to_document

FAMILIES = ("math", "code", "tools", "form")
DIMENSIONS = ("accuracy", "order", "completeness", "focus", "overall")


def labelled_pages(n: int, seed: int, families: Sequence[str] = FAMILIES
                   ) -> tuple[list[str], np.ndarray, list[str]]:
    """n pages of training problems, half of them clean: texts, grades, kinds of fault.

    grades: (n, 5), of DIMENSIONS; the kind of fault of a clean page is "".
    """
    rng = seeded_rng("labelled pages", seed)
    texts, grades, kinds = [], [], []
    for i in range(n):
        problem = training_problem(pick(rng, families), between(rng, 1, 3), rng)
        if i % 2:
            kind, page = "", to_document(problem)
        else:
            kind = pick(rng, CORRUPTIONS)
            page = corrupt(problem, kind, rng)
        texts.append(page)
        grades.append(grade(problem, page))
        kinds.append(kind)
    return texts, np.array(grades, float), kinds


def grade(problem: Problem, page: str) -> list[int]:
    """What a labeller who knows the answer says of a page: 0 to 9 on each of DIMENSIONS."""
    question, work, answer = split_page(page)
    shares = (grade_accuracy(problem, work, answer),
              grade_order(problem, question, work),
              grade_completeness(problem, question, work, answer),
              grade_focus(problem, work))
    grades = [round(9 * share) for share in shares]
    return [*grades, min(grades)]  # a chain is as good as its weakest link


def split_page(page: str) -> tuple[str, str, str]:
    """Question, work and answer of a page; "" for what is not there."""
    question, rest = "", page
    if page.startswith("Problem:"):
        question, _, rest = page.partition("\n")
    work, _, answer = rest.strip().removeprefix("Work:").rpartition("Answer:")
    return question, work, answer.strip()


def grade_accuracy(problem: Problem, work: str, answer: str) -> float:
    """The share of the steps that are there, with the answer as the last one."""
    n_right = sum(step in work for step in problem.steps) + (answer == problem.answer)
    return n_right / (len(problem.steps) + 1)


def grade_order(problem: Problem, question: str, work: str) -> float:
    """The share of the steps that are in order; without steps: whether the question is whole."""
    if not problem.steps:
        return float(question.removeprefix("Problem: ") == problem.question)
    places = [work.index(step) for step in problem.steps if step in work]
    n_in_order = sum(a < b for a, b in zip(places, places[1:]))
    if places:
        n_in_order += 1  # the first
    return n_in_order / len(problem.steps)


def grade_completeness(problem: Problem, question: str, work: str, answer: str) -> float:
    """The share of a page's parts that are there; the question counts twice where work is due."""
    if problem.steps:
        return (2 * bool(question) + bool(work.strip()) + bool(answer)) / 4
    return (bool(question) + bool(answer)) / 2


def grade_focus(problem: Problem, work: str) -> float:
    """The share of the words in the work that belong to the problem."""
    expected = " ".join([*problem.steps, problem.answer])
    known = set(problem.question.split())
    words = work.split()
    n_known = sum(word.strip(".,:") in expected or word in known for word in words)
    return n_known / max(1, len(words))
