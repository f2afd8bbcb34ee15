"""Small programs: one to three operations in words; the answer is a Python expression for them.

Key: the composition with its constants, so whole compositions are held out. There are too few
single operations to hold any out, and each must be learned: at level 1 the key has the example in
it too. Level: the number of operations. The steps are the program with a name for each result; the
answer puts them into one another.

No model-written code is executed. A response is parsed and its tree is walked by `run`, which knows
only what the operations need and counts its work: anything else is worth nothing, and nothing can
hang or fill the memory.
"""
import ast
import operator
import random
import warnings
from collections.abc import Sequence
from itertools import combinations

from data.tasks.problem import Problem, answer_line, between, distinct, pick

# An operation: its phrase, code around the inner expression {x}, meaning, and the range of its
# constant {k}. The meaning is written another way than the code, so that each checks the other.

# ---- from a list to a list
SORT = ("sort the list", "sorted({x})", lambda x, k: sorted(x), (0, 0))
REVERSE = ("reverse the list", "{x}[::-1]", lambda x, k: list(reversed(x)), (0, 0))
KEEP_EVEN = ("keep the even numbers", "[v for v in {x} if v % 2 == 0]",
             lambda x, k: [v for v in x if not v & 1], (0, 0))
KEEP_ODD = ("keep the odd numbers", "[v for v in {x} if v % 2 == 1]",
            lambda x, k: [v for v in x if v & 1], (0, 0))
KEEP_ABOVE = ("keep numbers above {k}", "[v for v in {x} if v > {k}]",
              lambda x, k: [v for v in x if v >= k + 1], (2, 6))
KEEP_BELOW = ("keep numbers below {k}", "[v for v in {x} if v < {k}]",
              lambda x, k: [v for v in x if v <= k - 1], (4, 9))
REMOVE = ("remove the number {k}", "[v for v in {x} if v != {k}]",
          lambda x, k: [v for v in x if not v == k], (0, 9))
ADD = ("add {k} to each", "[v + {k} for v in {x}]", lambda x, k: [k + v for v in x], (2, 9))
TAKE = ("take {k} from each", "[v - {k} for v in {x}]", lambda x, k: [-k + v for v in x], (2, 9))
MULTIPLY = ("multiply each by {k}", "[v * {k} for v in {x}]",
            lambda x, k: [k * v for v in x], (2, 9))
SQUARE = ("square each", "[v * v for v in {x}]", lambda x, k: [v ** 2 for v in x], (0, 0))
NEGATE = ("negate each", "[-v for v in {x}]", lambda x, k: [0 - v for v in x], (0, 0))
KEEP_FIRST = ("keep the first {k}", "{x}[:{k}]",
              lambda x, k: [v for i, v in enumerate(x) if i < k], (2, 4))
DROP_FIRST = ("drop the first {k}", "{x}[{k}:]",
              lambda x, k: [v for i, v in enumerate(x) if i >= k], (1, 3))
# ---- from a list to a number
SUM = ("give the sum", "sum({x})", lambda x, k: sum(x), (0, 0))
LARGEST_ONE = ("give the largest", "max({x})", lambda x, k: sorted(x)[-1], (0, 0))
SMALLEST_ONE = ("give the smallest", "min({x})", lambda x, k: sorted(x)[0], (0, 0))
COUNT = ("count them", "len({x})", lambda x, k: sum(1 for _ in x), (0, 0))
FIRST = ("give the first", "{x}[0]", lambda x, k: list(reversed(x))[-1], (0, 0))
LAST = ("give the last", "{x}[-1]", lambda x, k: list(reversed(x))[0], (0, 0))

# problems are drawn by place in these two: their order is part of every held-out set
LIST_OPERATIONS = (SORT, REVERSE, KEEP_EVEN, KEEP_ODD, KEEP_ABOVE, KEEP_BELOW, REMOVE, ADD, TAKE,
                   MULTIPLY, SQUARE, NEGATE, KEEP_FIRST, DROP_FIRST)
NUMBER_OPERATIONS = (SUM, LARGEST_ONE, SMALLEST_ONE, COUNT, FIRST, LAST)
TESTS = 5       # hidden ones of each problem


def make(rng: random.Random, level: int) -> Problem:
    """Draws until every operation matters.

    Without any of them, or all, a test changes, so no shorter program is right.
    """
    while True:
        operations = _draw_operations(rng, level)
        lists = _draw_lists(rng)
        try:
            results = [_apply(operations, x) for x in lists]
            every_one_matters = results[1:] not in _results_of_shorter(operations, lists[1:])
        except (IndexError, TypeError):     # the largest of none; a list operation on a number
            continue
        if all(map(_is_small, results)) and results[0] != [] and every_one_matters:
            break

    wording = ", then ".join(phrase.format(k=k) for phrase, _, _, k in operations)
    expression = "x"
    steps = []
    for argument, name, (_, code, _, k) in zip("xab", "abc", operations):
        expression = code.format(x=expression, k=k)
        steps.append(f"{name} = {code.format(x=argument, k=k)}.")
    example = f"f({lists[0]}) = {results[0]}"
    return Problem(
        family="code",
        key=f"code {wording} {example}" if level == 1 else f"code {wording}",
        question=f"Write f(x): {wording}. Example: {example}.",
        steps=tuple(steps),
        answer=f"return {expression}",
        level=level,
        extra={"tests": [list(test) for test in zip(lists[1:], results[1:])]})


def _draw_operations(rng: random.Random, level: int) -> list[tuple]:
    """(phrase, code, meaning, constant) of each; only the last may give a number."""
    chosen = [pick(rng, LIST_OPERATIONS) for _ in range(level - 1)]
    chosen.append(pick(rng, LIST_OPERATIONS + NUMBER_OPERATIONS))
    return [(*operation[:3], between(rng, *operation[3])) for operation in chosen]


def _draw_lists(rng: random.Random) -> list[list[int]]:
    """A short list for the example, and one for each test."""
    lists = []
    for i in range(TESTS + 1):
        length = 4 if i == 0 else between(rng, 5, 7)
        lists.append([between(rng, 0, 9) for _ in range(length)])
    return lists


def _apply(operations: Sequence[tuple], x: list[int]) -> list[int] | int:
    for _, _, meaning, k in operations:
        x = meaning(x, k)
    return x


def _results_of_shorter(operations: list[tuple], lists: list[list[int]]) -> list[list]:
    """The results on the lists of each program that leaves out some of the operations, or all."""
    results = []
    for size in range(len(operations)):
        for some in combinations(operations, size):
            results.append([_apply(some, x) for x in lists])
    return results


def _is_small(result: list[int] | int) -> bool:
    numbers = [result] if type(result) is int else result
    return all(abs(number) < 1000 for number in numbers)


def problems(split: str, n: int, seed: int) -> list[Problem]:
    return distinct(make, split, n, seed)


def reward(problem: Problem, response: str) -> float:
    """1.0 if the answer, an expression in x with or without 'return', passes every hidden test."""
    answer = answer_line(response).removeprefix("return ").strip()
    try:
        if len(answer) > MOST_CHARACTERS:
            return 0.0
        with warnings.catch_warnings():         # the parser comments on odd literals
            warnings.simplefilter("ignore")
            tree = ast.parse(answer, mode="eval").body
        return float(all(_same(run(tree, x), result) for x, result in problem.extra["tests"]))
    except Exception:                           # whatever fails here, the response is its cause
        return 0.0


def _same(result: object, expected: list[int] | int) -> bool:
    return type(result) is type(expected) and result == expected


# ---- the evaluator: values are whole numbers, flat lists of them, and (in conditions) truth values

MOST_CHARACTERS, MOST_WORK, LARGEST = 200, 2000, 10 ** 6
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
FUNCTIONS = {"sorted": sorted, "sum": sum, "max": max, "min": min, "len": len}


def run(tree: ast.expr, x: list[int]) -> list[int] | int:
    """The value of the expression for this x; raises for all outside of the small language."""
    return _Evaluator().evaluate(tree, {"x": list(x)})


class _Evaluator:
    """Walks one tree; `names` are the values of the names in scope."""

    def __init__(self):
        self.work = 0       # nodes evaluated so far

    def number(self, node: ast.expr, names: dict) -> int:
        value = self.evaluate(node, names)
        if type(value) is not int or abs(value) > LARGEST:      # no isinstance: True is no number
            raise ValueError("not a small number")
        return value

    def numbers(self, node: ast.expr, names: dict) -> list[int]:
        value = self.evaluate(node, names)
        if type(value) is not list:
            raise ValueError("not a list")
        return value

    def evaluate(self, node: ast.expr | None, names: dict):
        self.work += 1
        if self.work > MOST_WORK:
            raise ValueError("too much work")
        match node:
            case ast.Name(id=name):
                return names[name]
            case ast.Constant(value=value):
                return value                    # whoever uses it asks for a number
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.number(operand, names)
            case ast.BinOp(left=left, op=op, right=right):
                calculate = ARITHMETIC[type(op)]
                return calculate(self.number(left, names), self.number(right, names))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                compare = COMPARISONS[type(op)]
                return compare(self.number(left, names), self.number(right, names))
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
                function = FUNCTIONS[name]
                return function(self.numbers(argument, names))
            case ast.Subscript(value=value, slice=ast.Slice() as part):
                return self.numbers(value, names)[self.read_slice(part, names)]
            case ast.Subscript(value=value, slice=index):
                return self.numbers(value, names)[self.number(index, names)]
            case ast.ListComp(elt=element, generators=[
                    ast.comprehension(target=ast.Name(id=name), is_async=0) as loop]):
                return self.comprehension(element, name, loop, names)
        raise ValueError(f"{type(node).__name__} is not allowed")

    def read_slice(self, part: ast.Slice, names: dict) -> slice:
        ends = []
        for end in (part.lower, part.upper, part.step):
            ends.append(None if end is None else self.number(end, names))
        return slice(*ends)

    def comprehension(self, element: ast.expr, name: str, loop: ast.comprehension,
                      names: dict) -> list[int]:
        """[element for name in … if …]"""
        result = []
        for value in self.numbers(loop.iter, names):
            scope = {**names, name: value}
            if all(self.evaluate(condition, scope) for condition in loop.ifs):
                result.append(self.number(element, scope))
        return result
