"""BFCL, the Berkeley Function-Calling Leaderboard (Patil et al., ICML 2025): single-turn calls, compared with a gold.

Nothing is called: function, arguments and values are compared by the rules of the official checker of syntax trees
(bfcl_eval, ast_checker.py). A gold lists the values allowed for each argument; "" among them means that it may be left
out. Different from the official checker are
    parallel calls   matched so that as many as possible fit; officially each gold takes the first call that fits
    values           strings are compared without case and marks also deep inside of lists and dicts, where truth values
                     are no numbers; where a string stands for a variable it is a string like others
    irrelevance      a <tool_call> that cannot be read is a call, so that broken calls are not learned as a refusal
    thoughts         only the text after the last </think> is read
"""
import ast
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from common import UserError
from data.tasks.problem import Problem
from data.sets.ifeval import judged

LEVELS = {"simple": 1, "simple_python": 1, "multiple": 2, "parallel": 3, "parallel_multiple": 3, "irrelevance": 2}
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}    # of BFCL, in JSON schema
EMPTY = {"string": "", "any": "", "array": [], "tuple": []}
LONGEST = 20_000                        # characters of a reply with calls: the parsers below are not made for more


# ---- records

def read(record: dict, golds: list[dict]) -> Problem:
    """A question and its gold calls (none for irrelevance: no call is right); the answer is one way to write them."""
    category, functions = record["id"].rpartition("_")[0], record["function"]
    if category not in LEVELS:
        raise ValueError(f"category {category!r}; there are {', '.join(LEVELS)}")
    if unknown := {name for gold in golds for name in gold} - {function["name"] for function in functions}:
        raise ValueError(f"gold {', '.join(unknown)} is not among the functions")
    [[message]] = record["question"]    # one turn of one message
    extra = {"functions": functions, "ground_truth": golds,
             "tools": [{"type": "function", "function": schema(function)} for function in functions], "reply": "{}"}
    answer = "".join(f"<tool_call>{json.dumps({'name': name, 'arguments': example(arguments)})}</tool_call>"
                     for gold in golds for name, arguments in gold.items())
    return Problem("bfcl", f"bfcl {record['id']}", message["content"], (), answer, LEVELS[category], extra)


def example(gold: object) -> object:
    """The first of the allowed values wherever there are several; what has none but "" is left out."""
    if isinstance(gold, dict):
        chosen = {key: [value for value in allowed if value != ""] for key, allowed in gold.items()}
        return {key: example(allowed[0]) for key, allowed in chosen.items() if allowed}
    return list(map(example, gold)) if isinstance(gold, list) else gold


def schema(node):
    """A part of a function's description, with the names of types that JSON schema has."""
    if isinstance(node, list):
        return list(map(schema, node))
    if not isinstance(node, dict):
        return node
    return {key: TYPES.get(value, value) if key == "type" and isinstance(value, str) else schema(value)
            for key, value in node.items()}


def problems_of(records: Iterable[dict], answers: Iterable[dict]) -> list[Problem]:
    """All records, each with the answer of its id; UserError for one without, or one that cannot be read."""
    golds, found = {answer.get("id"): answer.get("ground_truth") for answer in answers}, []
    for record in records:
        name = str(record.get("id"))
        if name not in golds and not name.startswith("irrelevance"):
            raise UserError(f"BFCL: no answer to {name}")
        try:
            found.append(read(record, golds.get(name, [])))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"BFCL: {name} is malformed: {error!r}") from None
    return found


def load(path: str) -> list[Problem]:
    """The problems of a file of questions, whose answers are beside it: NAME_answer.jsonl, or possible_answer/NAME."""
    questions = Path(path).expanduser()
    places = [questions.with_name(f"{questions.stem}_answer{questions.suffix}"),
              questions.parent / "possible_answer" / questions.name]
    answers = next((place for place in places if place.is_file()), None)
    if not answers and "irrelevance" not in questions.name:
        raise UserError(f"no answers for {questions}: neither {places[0]} nor {places[1]}")
    return problems_of(rows(questions), rows(answers) if answers else [])


def rows(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, which the official ones are although they are called .json."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not all(isinstance(row, dict) for row in found):
        raise UserError(f"{path} does not hold a JSON object in each line")
    return found


# ---- the calls of a response

def calls(response: str) -> list[dict] | None:
    """The calls, each {"name", "arguments"}; None for a reply that is none, or has a malformed one.

    Three forms: <tool_call> blocks of JSON, text around them aside; one JSON call or a list; Python, [f(a=1), g.h()].
    """
    text = judged(response).strip().strip("`").strip()
    if len(text) > LONGEST:
        return None
    try:
        found = parse(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return found if all(map(is_call, found)) else None


def parse(text: str) -> list:
    if "<tool_call>" in text:
        blocks = [block.split("</tool_call>") for block in text.split("<tool_call>")[1:]]
        return [json.loads(body) for body, _ in blocks]     # ValueError for a block with no end, or two
    try:
        found = json.loads(text)
    except ValueError:
        return python_calls(text if text.startswith("[") else f"[{text}]")
    return found if isinstance(found, list) else [found]


def python_calls(text: str) -> list[dict]:
    """Calls with literal arguments, read and never evaluated; SyntaxError or ValueError for everything else."""
    with warnings.catch_warnings():     # the parser comments on odd literals
        warnings.simplefilter("ignore")
        tree = ast.parse(text, mode="eval").body
    found = []
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("no call with named arguments")
        arguments = {argument.arg: ast.literal_eval(argument.value) for argument in node.keywords}
        name = ast.unparse(node.func)
        if len(arguments) < len(node.keywords) or None in arguments or not re.fullmatch(r"[\w.]+", name):
            raise ValueError("an argument twice, or **, or a name that is none")
        found.append({"name": name, "arguments": arguments})
    return found


def is_call(call: object) -> bool:
    return (isinstance(call, dict) and call.keys() == {"name", "arguments"} and isinstance(call["name"], str)
            and isinstance(call["arguments"], dict))


# ---- rewards

def reward(problem: Problem, response: str) -> float:
    """1.0 if the calls are the gold ones, in any order; without gold: if there is text, and no call."""
    found, golds = calls(response), problem.extra["ground_truth"]
    if not golds:
        text = judged(response)
        return float(text.strip() != "" and "<tool_call>" not in text and not found)
    functions = {function["name"]: function for function in problem.extra["functions"]}
    if found is None or len(found) != len(golds):
        return 0.0
    return float(all_matched([[i for i, call in enumerate(found) if fits(call, gold, functions)] for gold in golds]))


def all_matched(choices: list[list[int]]) -> bool:
    """Whether each gold can have a call for itself, of those that fit it (bipartite matching, by augmenting paths)."""
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


def fits(call: dict, gold: dict, functions: dict[str, dict]) -> bool:
    [(name, allowed)], arguments = gold.items(), call["arguments"]
    parameters = functions[name]["parameters"]
    required, properties = set(parameters.get("required", ())), parameters["properties"]
    if call["name"] != name or not required <= arguments.keys() <= allowed.keys() & properties.keys():
        return False
    return all(one_of(arguments[key], values, properties[key]["type"]) if key in arguments else "" in values
               for key, values in allowed.items())


def one_of(value: object, allowed: list, kind: str) -> bool:
    """What may be left out may be empty, too, if it is a text or a list (as officially)."""
    golds = [EMPTY[kind] if gold == "" else gold for gold in allowed if gold != "" or kind in EMPTY]
    return any(same(coerced(value, kind), coerced(gold, kind)) for gold in golds)


def coerced(value: object, kind: str) -> object:
    """A whole number where a float belongs, and a tuple where one does; not inside of lists (as officially)."""
    if kind == "float" and type(value) is int:
        return float(value) if abs(value) < 2 ** 1000 else value
    return list(value) if kind == "tuple" and isinstance(value, tuple) else value


def same(value: object, gold: object) -> bool:
    if isinstance(gold, str):
        return isinstance(value, str) and plain(value) == plain(gold)
    if isinstance(gold, list):
        return isinstance(value, list) and len(value) == len(gold) and all(map(same, value, gold))
    if isinstance(gold, dict):
        return isinstance(value, dict) and value.keys() <= gold.keys() and all(
            any(same(value[key], allowed) or same_number(value[key], allowed) for allowed in values)
            if key in value else "" in values for key, values in gold.items())
    return type(value) is type(gold) and value == gold


def same_number(value: object, gold: object) -> bool:
    """In dicts 5 is 5.0 (as officially), which is never so for true and 1."""
    return {type(value), type(gold)} == {int, float} and value == gold


def plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
