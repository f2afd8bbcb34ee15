"""Graded pages: what a labeller with the answer key says of pages with and without a planted fault."""
import numpy as np

from data.tasks.pages import CORRUPTIONS, corrupt, training_problem
from data.tasks.problem import Problem, between, pick, seeded_rng, to_document

FAMILIES = ("math", "code", "tools", "form")
DIMENSIONS = ("accuracy", "order", "completeness", "focus", "overall")


def grade(problem: Problem, page: str) -> list[int]:
    """What a labeller who knows the answer says of a page, 0-9 on each of DIMENSIONS: shares of what is there."""
    question, _, rest = page.partition("\n") if page.startswith("Problem:") else ("", "", page)
    work, _, answer = rest.strip().removeprefix("Work:").rpartition("Answer:")
    steps = [s for s in problem.steps if s in work]
    expected = [*problem.steps, problem.answer]
    right = sum(s in work for s in problem.steps) + (answer.strip() == problem.answer)
    places = [work.index(s) for s in steps]
    in_order = sum(a < b for a, b in zip(places, places[1:])) + bool(places)
    asked = question.removeprefix("Problem: ") == problem.question
    known, used = set(problem.question.split()), work.split()
    shares = (right / len(expected),
              in_order / max(1, len(problem.steps)) if problem.steps else float(asked),
              (2 * bool(question) + bool(work.strip()) + bool(answer.strip())) / 4 if problem.steps else
              (bool(question) + bool(answer.strip())) / 2,
              sum(w.strip(".,:") in " ".join(expected) or w in known for w in used) / max(1, len(used)))
    grades = [round(9 * share) for share in shares]
    return [*grades, min(grades)]  # a chain is as good as its weakest link


def labelled_pages(n: int, seed: int, families=FAMILIES) -> tuple[list[str], np.ndarray, list[str]]:
    """n pages of training problems, half of them clean: texts, grades (n, 5) and kinds of fault ("" for none)."""
    rng = seeded_rng("labelled pages", seed)
    texts, grades, kinds = [], [], []
    for i in range(n):
        problem = training_problem(pick(rng, families), between(rng, 1, 3), rng)
        kind = "" if i % 2 else pick(rng, CORRUPTIONS)
        page = corrupt(problem, kind, rng) if kind else to_document(problem)
        texts.append(page)
        grades.append(grade(problem, page))
        kinds.append(kind)
    return texts, np.array(grades, float), kinds
