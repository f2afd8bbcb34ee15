"""BFCL, single-turn (Berkeley Function-Calling Leaderboard): are the calls the right ones, by their syntax tree?

simple, multiple, parallel: the function's name, and for each argument one of the values that the gold allows, by the
rules of the official checker; parallel calls are matched so that as many as possible fit, officially each gold takes
the first. irrelevance: no function fits, so no call is right. Nothing is ever called.
"""
import ast
import json
import re
import warnings
from pathlib import Path

from common import UserError
from data.tasks import Problem

TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}    # to those of JSON Schema
LEVELS = {"simple": 1, "multiple": 2, "irrelevance": 2, "parallel": 3}
LONGEST = 20_000    # characters of a reply with calls: the parsers are not made for more


# ---- records

def load(path: str) -> list[Problem]:
    """Problems of a question file, with the answers beside it: <stem>_answer.jsonl, or possible_answer/<name> as in the
    official folder. UserError: no such file, a record that is malformed or without its answer."""
    file = Path(path)
    places = [file.with_name(f"{file.stem}_answer{file.suffix}"), file.parent / "possible_answer" / file.name]
    found = next((place for place in places if place.is_file()), None)
    if not found and "irrelevance" not in file.stem:
        raise UserError(f"no answers to {path}; looked at {' and '.join(map(str, places))}")
    answers = {record["id"]: record["ground_truth"] for record in _lines(found)} if found else {}
    problems = []
    for record in _lines(file):
        if found and record.get("id") not in answers:
            raise UserError(f"{found}: no answer to {record.get('id')}")
        try:
            problems.append(read(record, answers.get(record["id"], [])))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{path}: record {record.get('id')} is malformed: {error!r}") from None
    return problems


def _lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read(record: dict, ground_truth: list) -> Problem:
    """ground_truth: [{name: {argument: [allowed values; "" if it may be left out]}}]; [] for irrelevance."""
    question = "\n".join(message["content"] for message in record["question"][0] if message["role"] == "user")
    tools = [{"type": "function", "function": function | {"parameters": _schema(function["parameters"])}}
             for function in record["function"]]
    required = {function["name"]: function["parameters"].get("required", []) for function in record["function"]}
    level = next((level for kind, level in LEVELS.items() if kind in record["id"]), 1)
    answer = json.dumps([{"name": name, "arguments": _first(arguments)}
                         for call in ground_truth for name, arguments in call.items()])
    return Problem("bfcl", f"bfcl {record['id']}", question, (), answer, level,
                   {"tools": tools, "ground_truth": ground_truth, "required": required, "reply": "{}"})


def _first(value):
    """The first allowed value of each argument, also inside of dictionaries; those that have only "" are left out."""
    if isinstance(value, dict):
        chosen = {key: [v for v in allowed if v != ""] for key, allowed in value.items()}
        return {key: _first(allowed[0]) for key, allowed in chosen.items() if allowed}
    return list(map(_first, value)) if isinstance(value, list) else value


def _schema(value):
    if isinstance(value, dict):
        return {key: TYPES.get(inner, inner) if key == "type" and isinstance(inner, str) else _schema(inner)
                for key, inner in value.items()}
    return list(map(_schema, value)) if isinstance(value, list) else value


# ---- the calls of a response

def calls(response: str) -> list[tuple[str, dict]] | None:
    """(name, arguments) of each call, [] for none; None for what looks like calls and is malformed.

    Forms: <tool_call>{"name": …, "arguments": {…}}</tool_call>, a JSON list of such objects, [f(a=1), g.h(b="x")].
    """
    text = response.rpartition("</think>")[2].strip()
    if "<think>" in text or len(text) > LONGEST:
        return None
    try:
        if "<tool_call>" in text:
            bodies = [block.split("</tool_call>") for block in text.split("<tool_call>")[1:]]
            return [_json_call(json.loads(body)) for body, _ in bodies]     # ValueError for one with no end, or two
        text = re.sub(r"^```\w*\s|\s?```$", "", text).strip()
        if text[:1] == "{" or re.match(r"\[\s*[{\]]", text):
            found = json.loads(text)
            return [_json_call(call) for call in (found if isinstance(found, list) else [found])]
        if re.match(r"\[?\s*[A-Za-z_][\w.]*\(", text) and text[-1] in ")]":
            with warnings.catch_warnings():     # the parser comments on odd literals
                warnings.simplefilter("ignore")
                tree = ast.parse(text, mode="eval").body
            return [_python_call(node) for node in (tree.elts if isinstance(tree, ast.List) else [tree])]
        return []
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError, MemoryError):
        return None


def _json_call(call: dict) -> tuple[str, dict]:
    name, arguments = call["name"], call.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("no call")
    return name, arguments


def _python_call(node: ast.expr) -> tuple[str, dict]:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("no call with named arguments")
    return ast.unparse(node.func), {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}


# ---- are they right?

def _text(value: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')


def _equal(got: object, allowed: object) -> bool:
    """Strings without case, spaces and some punctuation; an int may stand for a float, not a truth value for an int.
    A dictionary, as everywhere in the gold, has a list of allowed values for each key."""
    if isinstance(allowed, str):
        return isinstance(got, str) and _text(got) == _text(allowed)
    if isinstance(allowed, bool) or isinstance(got, bool) or allowed is None:
        return got is allowed
    if isinstance(allowed, (int, float)):
        return isinstance(got, (int, float) if isinstance(allowed, float) else int) and got == allowed
    if isinstance(allowed, (list, tuple)):
        return isinstance(got, (list, tuple)) and len(got) == len(allowed) and all(map(_equal, got, allowed))
    return isinstance(got, dict) and isinstance(allowed, dict) and _fit(got, allowed)


def _fit(got: dict, wanted: dict, required: list = []) -> bool:
    """wanted: {argument: [allowed values]}; "" among them: it may be left out, unless it is required."""
    return got.keys() <= wanted.keys() and all(
        any(_equal(got[name], value) for value in allowed) if name in got else "" in allowed and name not in required
        for name, allowed in wanted.items())


def reward(problem: Problem, response: str) -> float:
    """1.0 if the response makes just the gold calls, in any order, or for irrelevance says something and calls none."""
    made, golds, required = calls(response), problem.extra["ground_truth"], problem.extra["required"]
    if not golds:
        return float(made == [] and bool(response.rpartition("</think>")[2].strip()))
    if made is None or len(made) != len(golds):
        return 0.0
    return float(_all_matched([[i for i, (called, given) in enumerate(made) if called == name and _fit(
        given, wanted, required.get(name, []))] for gold in golds for name, wanted in gold.items()]))


def _all_matched(choices: list[list[int]]) -> bool:
    """Whether each gold can have a call for itself, of those that fit it (bipartite matching by augmenting paths)."""
    owner = {}

    def place(gold: int, tried: set[int]) -> bool:
        for call in choices[gold]:
            if call not in tried:
                tried.add(call)
                if call not in owner or place(owner[call], tried):
                    owner[call] = gold
                    return True
        return False

    return all(place(gold, set()) for gold in range(len(choices)))
