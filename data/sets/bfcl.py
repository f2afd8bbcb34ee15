"""BFCL, the Berkeley Function-Calling Leaderboard (Patil et al., ICML 2025): single-turn calls.

Nothing is called: function, arguments and values are compared with a gold by the rules of the
official checker of syntax trees (bfcl_eval, ast_checker.py). A gold lists the values allowed for
each argument; "" among them means that it may be left out. Different from the official checker are
    parallel calls   matched so that as many as possible fit; officially each gold takes the first
                     call that fits
    values           strings are compared without case and marks also deep inside of lists and
                     dicts, where truth values are no numbers; where a string stands for a variable
                     it is a string like others
    irrelevance      a <tool_call> that cannot be read is a call, so that broken calls are not
                     learned as a refusal
    thoughts         only the text after the last </think> is read
"""
import ast
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from common import UserError
from data.sets.ifeval import reply_text
from data.tasks.problem import Problem

LEVELS = {
    "simple": 1,
    "simple_python": 1,
    "multiple": 2,
    "parallel": 3,
    "parallel_multiple": 3,
    "irrelevance": 2,
}
# of BFCL, in JSON schema
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
EMPTY = {"string": "", "any": "", "array": [], "tuple": []}
LONGEST = 20_000    # characters of a reply with calls: the parsers below are not made for more


# ---- records

def read(record: dict, golds: list[dict]) -> Problem:
    """A question and its gold calls; the answer is one way to write them.

    golds: none for irrelevance, where no call is right.
    """
    category = record["id"].rpartition("_")[0]
    if category not in LEVELS:
        raise ValueError(f"category {category!r}; there are {', '.join(LEVELS)}")
    functions = record["function"]
    names = {function["name"] for function in functions}
    unknown = set().union(*golds) - names
    if unknown:
        raise ValueError(f"gold {', '.join(unknown)} is not among the functions")
    [[message]] = record["question"]    # one turn of one message
    tools = [{"type": "function", "function": to_schema(function)} for function in functions]
    extra = {"functions": functions, "ground_truth": golds, "tools": tools, "reply": "{}"}
    return Problem(
        family="bfcl",
        key=f"bfcl {record['id']}",
        question=message["content"],
        steps=(),
        answer=write_calls(golds),
        level=LEVELS[category],
        extra=extra)


def write_calls(golds: list[dict]) -> str:
    blocks = []
    for gold in golds:
        for name, arguments in gold.items():
            call = json.dumps({"name": name, "arguments": example(arguments)})
            blocks.append(f"<tool_call>{call}</tool_call>")
    return "".join(blocks)


def example(gold: object) -> object:
    """The first of the allowed values wherever there are several.

    What has none but "" is left out.
    """
    if isinstance(gold, list):
        return list(map(example, gold))
    if not isinstance(gold, dict):
        return gold
    chosen = {}
    for key, allowed in gold.items():
        values = [value for value in allowed if value != ""]
        if values:
            chosen[key] = example(values[0])
    return chosen


def to_schema(node):
    """A part of a function's description, with the names of types that JSON schema has."""
    if isinstance(node, list):
        return list(map(to_schema, node))
    if not isinstance(node, dict):
        return node
    part = {}
    for key, value in node.items():
        if key == "type" and isinstance(value, str):
            part[key] = TYPES.get(value, value)
        else:
            part[key] = to_schema(value)
    return part


def read_problems(records: Iterable[dict], answers: Iterable[dict]) -> list[Problem]:
    """All records, each with the answer of its id.

    UserError for one without, or one that cannot be read.
    """
    golds = {answer.get("id"): answer.get("ground_truth") for answer in answers}
    problems = []
    for record in records:
        name = str(record.get("id"))
        if name not in golds and not name.startswith("irrelevance"):
            raise UserError(f"BFCL: no answer to {name}")
        try:
            problems.append(read(record, golds.get(name, [])))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"BFCL: {name} is malformed: {error!r}") from None
    return problems


def load(path: str) -> list[Problem]:
    """The problems of a file of questions.

    Its answers are beside it: NAME_answer.jsonl, or possible_answer/NAME.
    """
    questions = Path(path).expanduser()
    beside = questions.with_name(f"{questions.stem}_answer{questions.suffix}")
    below = questions.parent / "possible_answer" / questions.name
    if beside.is_file():
        answers = read_lines(beside)
    elif below.is_file():
        answers = read_lines(below)
    elif "irrelevance" in questions.name:
        answers = []
    else:
        raise UserError(f"no answers for {questions}: neither {beside} nor {below}")
    return read_problems(read_lines(questions), answers)


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, which the official ones are although called .json."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} does not hold a JSON object in each line")
    return rows


# ---- the calls of a response

def calls(response: str) -> list[dict] | None:
    """The calls, each {"name", "arguments"}; None for a reply that is none, or has a malformed one.

    Three forms: <tool_call> blocks of JSON, text around them aside; one JSON call or a list;
    Python, [f(a=1), g.h()].
    """
    text = reply_text(response).strip().strip("`").strip()
    if len(text) > LONGEST:
        return None
    try:
        parsed = parse(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return parsed if all(map(is_call, parsed)) else None


def parse(text: str) -> list:
    if "<tool_call>" in text:
        blocks = [block.split("</tool_call>") for block in text.split("<tool_call>")[1:]]
        return [json.loads(body) for body, _ in blocks]     # ValueError for no end, or two
    try:
        parsed = json.loads(text)
    except ValueError:
        return python_calls(text if text.startswith("[") else f"[{text}]")
    return parsed if isinstance(parsed, list) else [parsed]


def python_calls(text: str) -> list[dict]:
    """Calls with literal arguments, read and never evaluated.

    SyntaxError or ValueError for everything else.
    """
    with warnings.catch_warnings():     # the parser comments on odd literals
        warnings.simplefilter("ignore")
        tree = ast.parse(text, mode="eval").body
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    return list(map(python_call, nodes))


def python_call(node: ast.expr) -> dict:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with named arguments")
    arguments = {}
    for argument in node.keywords:
        if argument.arg is None or argument.arg in arguments:
            raise ValueError("an argument twice, or **")
        arguments[argument.arg] = ast.literal_eval(argument.value)
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError("a name that is none")
    return {"name": name, "arguments": arguments}


def is_call(call: object) -> bool:
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        return False
    return isinstance(call["name"], str) and isinstance(call["arguments"], dict)


# ---- rewards

def reward(problem: Problem, response: str) -> float:
    """1.0 if the calls are the gold ones, in any order; without gold: if there is text, no call."""
    predicted = calls(response)
    golds = problem.extra["ground_truth"]
    if not golds:
        text = reply_text(response)
        return float(text.strip() != "" and "<tool_call>" not in text and not predicted)
    if predicted is None or len(predicted) != len(golds):
        return 0.0
    functions = {function["name"]: function for function in problem.extra["functions"]}
    choices = []        # for each gold the numbers of the calls that fit it
    for gold in golds:
        choices.append([i for i, call in enumerate(predicted) if fits(call, gold, functions)])
    return float(all_matched(choices))


def all_matched(choices: list[list[int]]) -> bool:
    """Whether each gold can have a call for itself, of those that fit it.

    Bipartite matching, by augmenting paths.
    """
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
    [(name, allowed)] = gold.items()
    arguments = call["arguments"]
    parameters = functions[name]["parameters"]
    required = set(parameters.get("required", ()))
    properties = parameters["properties"]
    if call["name"] != name:
        return False
    if not required <= arguments.keys() <= allowed.keys() & properties.keys():
        return False
    for key, values in allowed.items():
        if key not in arguments:
            if "" not in values:
                return False
        elif not one_of(arguments[key], values, properties[key]["type"]):
            return False
    return True


def one_of(value: object, allowed: list, kind: str) -> bool:
    """What may be left out may be empty, too, if it is a text or a list (as officially)."""
    for gold in allowed:
        if gold == "":
            if kind not in EMPTY:
                continue
            gold = EMPTY[kind]
        if same(coerced(value, kind), coerced(gold, kind)):
            return True
    return False


def coerced(value: object, kind: str) -> object:
    """A whole number where a float belongs, and a tuple where one does.

    Not inside of lists (as officially).
    """
    if kind == "float" and type(value) is int:
        return float(value) if abs(value) < 2 ** 1000 else value
    return list(value) if kind == "tuple" and isinstance(value, tuple) else value


def same(value: object, gold: object) -> bool:
    if isinstance(gold, str):
        return isinstance(value, str) and plain(value) == plain(gold)
    if isinstance(gold, list):
        if not isinstance(value, list) or len(value) != len(gold):
            return False
        return all(map(same, value, gold))
    if isinstance(gold, dict):
        return isinstance(value, dict) and same_dict(value, gold)
    return type(value) is type(gold) and value == gold


def same_dict(value: dict, gold: dict) -> bool:
    """gold: {key: the allowed values}."""
    if not value.keys() <= gold.keys():
        return False
    for key, allowed in gold.items():
        if key not in value:
            if "" not in allowed:
                return False
        elif not any(same(value[key], one) or same_number(value[key], one) for one in allowed):
            return False
    return True


def same_number(value: object, gold: object) -> bool:
    """In dicts 5 is 5.0 (as officially), which is never so for true and 1."""
    return {type(value), type(gold)} == {int, float} and value == gold


def plain(text: str) -> str:
    """Without case and marks."""
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
