"""Tool use: choose one of the offered signatures and fill its arguments from the request.

The answer is one JSON call. Key: the call. Level 1: two tools offered, two arguments; level 2:
three arguments; level 3: three tools offered, three arguments, and in the request a number that is
no argument.
"""
import json
import random

from data.tasks.problem import Problem, answer_line, between, distinct, pick, shuffled

DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
CITIES = ("Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi")
ROOMS = ("kitchen", "garden", "hall", "office", "cellar", "attic")
COLORS = ("red", "green", "blue", "white")
GOODS = ("apples", "books", "pens", "lamps", "cups", "chairs")
TONES = ("bell", "drum", "horn", "harp")
# name: ((argument, its values; None = a number) x 3, the request with two, what the third adds)
TOOLS = {
    "weather": (
        (("days", None), ("city", CITIES), ("time", DAYS)),
        "show the weather of {0} days in {1}", "from {2}"),
    "taxi": (
        (("people", None), ("city", CITIES), ("day", DAYS)),
        "call a taxi for {0} people to {1}", "on {2}"),
    "light": (
        (("level", None), ("room", ROOMS), ("color", COLORS)),
        "set the light to {0} in the {1}", "in {2}"),
    "timer": (
        (("minutes", None), ("room", ROOMS), ("tone", TONES)),
        "time {0} minutes in the {1}", "with a {2}"),
    "order": (
        (("count", None), ("item", GOODS), ("color", COLORS)),
        "order {0} {1}", "in {2}"),
    "move": (
        (("count", None), ("item", GOODS), ("room", ROOMS)),
        "move {0} {1}", "to the {2}"),
}
MANNERS = ("Please {}.", "Can you {}?", "I want you to {}.")
DISTRACTORS = ("I am {} years old.", "I live in house {}.", "I waited {} hours.")
LARGEST = 99


def make(rng: random.Random, level: int) -> Problem:
    n_tools = 3 if level == 3 else 2
    n_arguments = 2 if level == 1 else 3
    names = shuffled(rng, list(TOOLS))[:n_tools]
    name = pick(rng, names)
    arguments, request, addition = TOOLS[name]
    values = {}
    for argument, choices in arguments[:n_arguments]:
        values[argument] = between(rng, 2, LARGEST) if choices is None else pick(rng, choices)

    if n_arguments == 3:
        request = f"{request} {addition}"
    manner = pick(rng, MANNERS)
    text = manner.format(request.format(*values.values()))
    if level == 3:
        distractor = pick(rng, DISTRACTORS)
        text = f"{distractor.format(between(rng, 2, LARGEST))} {text}"

    offered = ", ".join(_write_signature(name, n_arguments) for name in names)
    steps = [f"The tool is {name}."]
    steps += [f"{argument} = {value}." for argument, value in values.items()]
    call = json.dumps({"name": name, "arguments": values})
    question = f"Tools: {offered}. {text}"
    return Problem("tools", f"tools {call}", question, tuple(steps), call, level)


def _write_signature(name: str, n_arguments: int) -> str:
    arguments = [argument for argument, _ in TOOLS[name][0][:n_arguments]]
    return f"{name}({', '.join(arguments)})"


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


def reward(problem: Problem, response: str) -> float:
    """1.0 if the answer is JSON of the same call: key order and spaces do not matter, types do."""
    try:
        return float(_canonical(answer_line(response)) == _canonical(problem.answer))
    except (ValueError, RecursionError):        # no JSON, or nested too deeply to be a call
        return 0.0


def _canonical(text: str) -> str:
    """The same text for the same call; compared as text, since 1 == 1.0 == True in Python."""
    return json.dumps(json.loads(text), sort_keys=True)
