"""Small programs: a composition of one to three operations in words; the answer is a Python expression for it.

Key: the composition with its constants, so whole compositions are held out. There are too few single operations to hold
any out, and each must be learned: at level 1 the key has the example in it too. Level: the number of operations. The
steps are the program with a name for each result; the answer puts them into one another.

No model-written code is executed. A response is parsed and its tree is walked by `run`, which knows only what the
operations need and counts its work: anything else is worth nothing, and nothing can hang or fill the memory.
"""
import ast
import operator
import random
import warnings
from collections.abc import Sequence
from itertools import combinations

from data.tasks.problem import between, distinct, final_answer, pick, Problem

# phrase, code around the inner expression {x}, meaning, range of the constant {k}; list -> list, then list -> number
LIST_OPERATIONS = (
    ("sort the list", "sorted({x})", lambda x, k: sorted(x), (0, 0)),
    ("reverse the list", "{x}[::-1]", lambda x, k: list(reversed(x)), (0, 0)),
    ("keep the even numbers", "[v for v in {x} if v % 2 == 0]", lambda x, k: [v for v in x if not v & 1], (0, 0)),
    ("keep the odd numbers", "[v for v in {x} if v % 2 == 1]", lambda x, k: [v for v in x if v & 1], (0, 0)),
    ("keep numbers above {k}", "[v for v in {x} if v > {k}]", lambda x, k: [v for v in x if v >= k + 1], (2, 6)),
    ("keep numbers below {k}", "[v for v in {x} if v < {k}]", lambda x, k: [v for v in x if v <= k - 1], (4, 9)),
    ("remove the number {k}", "[v for v in {x} if v != {k}]", lambda x, k: [v for v in x if not v == k], (0, 9)),
    ("add {k} to each", "[v + {k} for v in {x}]", lambda x, k: [k + v for v in x], (2, 9)),
    ("take {k} from each", "[v - {k} for v in {x}]", lambda x, k: [-k + v for v in x], (2, 9)),
    ("multiply each by {k}", "[v * {k} for v in {x}]", lambda x, k: [k * v for v in x], (2, 9)),
    ("square each", "[v * v for v in {x}]", lambda x, k: [v ** 2 for v in x], (0, 0)),
    ("negate each", "[-v for v in {x}]", lambda x, k: [0 - v for v in x], (0, 0)),
    ("keep the first {k}", "{x}[:{k}]", lambda x, k: [v for i, v in enumerate(x) if i < k], (2, 4)),
    ("drop the first {k}", "{x}[{k}:]", lambda x, k: [v for i, v in enumerate(x) if i >= k], (1, 3)),
)
NUMBER_OPERATIONS = (
    ("give the sum", "sum({x})", lambda x, k: sum(x), (0, 0)),
    ("give the largest", "max({x})", lambda x, k: sorted(x)[-1], (0, 0)),
    ("give the smallest", "min({x})", lambda x, k: sorted(x)[0], (0, 0)),
    ("count them", "len({x})", lambda x, k: sum(1 for _ in x), (0, 0)),
    ("give the first", "{x}[0]", lambda x, k: list(reversed(x))[-1], (0, 0)),
    ("give the last", "{x}[-1]", lambda x, k: list(reversed(x))[0], (0, 0)),
)
TESTS = 5


def make(rng: random.Random, level: int) -> Problem:
    """Draws until every operation matters: without any of them, or all, a test changes, so no shorter one is right."""
    while True:
        last = LIST_OPERATIONS + NUMBER_OPERATIONS
        chosen = [pick(rng, LIST_OPERATIONS) for _ in range(level - 1)] + [pick(rng, last)]
        chosen = [(*operation[:3], between(rng, *operation[3])) for operation in chosen]
        lists = [[between(rng, 0, 9) for _ in range(4 if i == 0 else between(rng, 5, 7))] for i in range(TESTS + 1)]
        try:
            results = [_apply(chosen, x) for x in lists]
            shorter = [[_apply(some, x) for x in lists[1:]]
                       for size in range(level) for some in combinations(chosen, size)]
        except (IndexError, TypeError):         # the largest of no numbers; a list operation on a number
            continue
        small = all(abs(v) < 1000 for result in results for v in ([result] if type(result) is int else result))
        if small and results[0] != [] and results[1:] not in shorter:
            break
    wording = ", then ".join(phrase.format(k=k) for phrase, _, _, k in chosen)
    expression, steps = "x", []
    for given, name, (_, code, _, k) in zip("xab", "abc", chosen):
        expression = code.format(x=expression, k=k)
        steps.append(f"{name} = {code.format(x=given, k=k)}.")
    example = f"f({lists[0]}) = {results[0]}"
    key = f"code {wording} {example}" if level == 1 else f"code {wording}"
    return Problem("code", key, f"Write f(x): {wording}. Example: {example}.", tuple(steps), f"return {expression}",
                   level, {"tests": [list(test) for test in zip(lists[1:], results[1:])]})


def _apply(chosen: Sequence[tuple], x: list[int]) -> list[int] | int:
    for _, _, meaning, k in chosen:
        x = meaning(x, k)
    return x


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


def reward(problem: Problem, response: str) -> float:
    """1.0 if the answer, an expression in x with or without 'return', passes every hidden test."""
    answer = final_answer(response).removeprefix("return ").strip()
    try:
        if len(answer) > MOST_CHARACTERS:
            return 0.0
        with warnings.catch_warnings():         # the parser comments on odd literals
            warnings.simplefilter("ignore")
            tree = ast.parse(answer, mode="eval").body
        return float(all(_same(run(tree, x), result) for x, result in problem.extra["tests"]))
    except Exception:                           # whatever fails here, the response is its cause
        return 0.0


def _same(got: object, wanted: list[int] | int) -> bool:
    return type(got) is type(wanted) and got == wanted


# ---- the evaluator: values are whole numbers, flat lists of them, and (in conditions only) truth values

MOST_CHARACTERS, MOST_WORK, LARGEST = 200, 2000, 10 ** 6
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
              ast.Mod: operator.mod}
COMPARISONS = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
               ast.Gt: operator.gt, ast.GtE: operator.ge}
FUNCTIONS = {"sorted": sorted, "sum": sum, "max": max, "min": min, "len": len}


def run(tree: ast.expr, x: list[int]) -> list[int] | int:
    """The value of the expression for this x; raises for everything outside the small language above."""
    work = 0

    def number(node: ast.expr, names: dict) -> int:
        value = evaluate(node, names)
        if type(value) is not int or abs(value) > LARGEST:      # not isinstance: a truth value is no number
            raise ValueError("not a small number")
        return value

    def numbers(node: ast.expr, names: dict) -> list[int]:
        value = evaluate(node, names)
        if type(value) is not list:
            raise ValueError("not a list")
        return value

    def evaluate(node: ast.expr | None, names: dict):
        nonlocal work
        work += 1
        if work > MOST_WORK:
            raise ValueError("too much work")
        match node:
            case ast.Name(id=name):
                return names[name]
            case ast.Constant(value=value):
                return value                    # whoever uses it asks for a number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -number(operand, names)
            case ast.BinOp(left=left, op=op, right=right):
                return ARITHMETIC[type(op)](number(left, names), number(right, names))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return COMPARISONS[type(op)](number(left, names), number(right, names))
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
                return FUNCTIONS[name](numbers(argument, names))
            case ast.Subscript(value=value, slice=ast.Slice(lower=lower, upper=upper, step=step)):
                ends = [None if end is None else number(end, names) for end in (lower, upper, step)]
                return numbers(value, names)[slice(*ends)]
            case ast.Subscript(value=value, slice=index):
                return numbers(value, names)[number(index, names)]
            case ast.ListComp(elt=element, generators=[
                    ast.comprehension(target=ast.Name(id=name), iter=source, ifs=ifs, is_async=0)]):
                inner = [{**names, name: v} for v in numbers(source, names)]
                return [number(element, scope) for scope in inner if all(evaluate(test, scope) for test in ifs)]
        raise ValueError(f"{type(node).__name__} is not allowed")

    return evaluate(tree, {"x": list(x)})
