"""Code problems that `python -m data.sets.synthesize` made: write a function that passes hidden tests.

The report's second RL stage learns from such (arXiv 2512.06266, section 6): reward 1 if all tests pass, else 0. The
program runs in the sandbox and the values that it returns are compared out here, type and value, so an answer can
neither see what is expected nor claim to be right.
"""
from data.verify import jail, sandbox
from data.tasks.problem import Problem
from data.sets.programs import extract_program


def read(record: dict) -> Problem:
    """A line of data/sets/synthesize.py's file; its tests stay as they travel (jail.encode), which is fit for JSON."""
    return Problem("synthetic", record["question"], record["question"], (), record["solution"], record["level"],
                   {"names": [record["name"]], "tests": record["tests"], "reply": "```python\n{}\n```"})


def passes_tests(box: sandbox.Sandbox, program: str, name: str, tests: list) -> bool | None:
    """Whether the function gives the wanted value for the arguments of every test; None if that cannot be said."""
    arguments, wanted = zip(*((jail.decode(a), jail.decode(value)) for a, value in tests))
    result = box.call(program, name, list(arguments))
    if result.status == "broken":
        return None
    return len(result.values) == len(wanted) and all(map(sandbox.same, result.values, wanted))


def reward(problem: Problem, response: str) -> float | None:
    """1.0 if the program of the response passes all tests, else 0.0; None: could not be scored."""
    program = extract_program(response, problem)
    if program is None:
        return 0.0
    passed = passes_tests(sandbox.shared(), program, problem.extra["names"][0], problem.extra["tests"])
    return None if passed is None else float(passed)
