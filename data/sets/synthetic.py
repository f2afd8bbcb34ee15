"""Code problems that `python -m data.sets.synthesize` made: write a function that passes its tests.

The report's second RL stage learns from such (arXiv 2512.06266, section 6): reward 1 if all tests
pass, else 0. The program runs in the sandbox and the values that it returns are compared out here,
type and value, so an answer can neither see what is expected nor claim to be right.
"""
from data.sets.programs import extract_program
from data.tasks.problem import Problem
from data.verify import jail, sandbox


def read(record: dict) -> Problem:
    """A line of data/sets/synthesize.py's file.

    Its tests stay as they travel (jail.encode), which is fit for JSON.
    """
    question = record["question"]
    extra = {"names": [record["name"]], "tests": record["tests"], "split": record["split"],
             "reply": "```python\n{}\n```"}
    return Problem(
        "synthetic", question, question, (), record["solution"].strip(), record["level"], extra)


def passes_tests(box: sandbox.Sandbox, program: str, name: str, tests: list) -> bool | None:
    """Whether the function gives the wanted value for the arguments of every test.

    None if that cannot be said.
    """
    arguments = [jail.decode(encoded) for encoded, _ in tests]
    expected = [jail.decode(encoded) for _, encoded in tests]
    result = box.call(program, name, arguments)
    if result.status == "broken":
        return None
    if len(result.values) != len(expected):
        return False
    return all(map(sandbox.same, result.values, expected))


def reward(problem: Problem, response: str) -> float | None:
    """1.0 if the program of the response passes all tests, else 0.0; None: could not be scored."""
    program = extract_program(response, problem)
    if program is None:
        return 0.0
    [name] = problem.extra["names"]
    passed = passes_tests(sandbox.shared(), program, name, problem.extra["tests"])
    return None if passed is None else float(passed)
