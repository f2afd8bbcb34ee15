"""Programs judged by their tests: HumanEval, MBPP and KodCode. None runs in this process.

A problem's extra holds `tests`, trusted code, and `names`, what the tests use of the program;
data/verify/sandbox.py runs the two in different processes. So a program's changes to its own
arguments stay unseen: tests that ask for them fail.

HumanEval (arXiv 2107.03374): `prompt`, what a base model continues, and `helpers`, what stands
before the function. MBPP (arXiv 2108.07732): the question shows the first assertion alone, as
EvalPlus does (the paper shows all), for with all of them in view a table of their values would
pass.
"""
import ast
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial

from data.chat.template import after_thoughts
from data.sets.fences import PYTHON, fenced_blocks
from data.tasks.problem import Problem, shuffled
from data.verify import sandbox

# what ends a function's body: those of the Codex paper, and assert
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert")
TAGGED = re.compile(r"\[PYTHON\](.*?)(?:\[/PYTHON\]|\Z)", re.DOTALL)


def parse(code: str) -> ast.Module:
    """The tree of trusted code; SyntaxError, also for what only a compiler finds."""
    with warnings.catch_warnings():             # odd escapes in the sets' strings
        warnings.simplefilter("ignore")
        compile(code, "program", "exec", dont_inherit=True)
        return ast.parse(code)


def defined(tree: ast.Module) -> set[str]:
    """The names of a module's functions and classes."""
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


# ---- the sets: a record to a problem. KeyError for a missing column, ValueError for what else
# makes it unusable

def _problem(question: str, code: str, tests: str, names: set[str], level: int = 0,
             **extra: str) -> Problem:
    parse(tests)
    if not names or names - defined(parse(code)):
        raise ValueError("the solution does not define what the tests use")
    extra = {"tests": tests, "names": sorted(names), "reply": "```python\n{}\n```", **extra}
    return Problem("", question, question, (), code.strip(), level, extra)


def humaneval(record: dict) -> Problem:
    """The helper functions of some prompts (32, 38, 50) stand in the tests too.

    Those must not ask the program's.
    """
    prompt, name = record["prompt"], record["entry_point"]
    code = prompt + record["canonical_solution"]
    others = [node for node in parse(code).body if getattr(node, "name", "") != name]
    helpers = "\n".join(map(ast.unparse, others))
    question = f"Complete this Python function:\n\n```python\n{prompt.strip()}\n```"
    tests = f"{helpers}\n{record['test']}\ncheck({name})"
    return _problem(question, code, tests, {name}, prompt=prompt, helpers=helpers)


def mbpp(record: dict) -> Problem:
    """Of the full set (text, test_setup_code) or of the sanitized one (prompt, test_imports)."""
    if "text" in record:
        text, setup = record["text"], record["test_setup_code"]
    else:
        text, setup = record["prompt"], "\n".join(record["test_imports"])
    code = record["code"].replace("\r\n", "\n")
    asserts = record["test_list"]
    if not asserts:
        raise ValueError("no tests")            # which every program would pass
    imports = []                                # the tests of 302 use an import of the solution
    for node in parse(code).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
    tests = "\n".join([*imports, setup, *asserts])
    used = {node.id for node in ast.walk(parse(tests)) if isinstance(node, ast.Name)}
    question = f"{text.strip()}\nYour code should pass this test:\n{asserts[0]}"
    return _problem(question, code, tests, used & defined(parse(code)))


def kodcode(record: dict) -> Problem:
    """KodCode-V1 (arXiv 2503.02951). Its pytest functions are called one after the other.

    Those with parameters, which need fixtures or pytest.mark, and methods of classes are not
    supported: ValueError.
    """
    tree = parse(record["test"])
    tree.body = [node for node in tree.body if not _is_main_guard(node)]
    solution_names, pytest_names = _imported(tree)
    unsupported = pytest_names - {"approx", "raises", "fail"}
    cases = _test_functions(tree)
    if unsupported:
        raise ValueError(f"tests with pytest.{min(unsupported)}")
    if not cases or set(cases) - defined(tree):
        raise ValueError("tests that are no functions")

    infos = record.get("test_info") or ()
    declarations = "\n".join(info["function_declaration"] for info in infos)
    declarations = declarations or ", ".join(sorted(solution_names))
    question = f"{record['question'].strip()}\n\nDefine:\n{declarations}"
    calls = [f"{case}()" for case in dict.fromkeys(cases)]
    tests = "\n".join([PYTEST, ast.unparse(tree), *calls])
    level = {"easy": 1, "medium": 2, "hard": 3}.get(record.get("gpt_difficulty"), 0)
    return _problem(question, record["solution"], tests, solution_names, level)


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _imported(tree: ast.Module) -> tuple[set[str], set[str]]:
    """What a module uses of `solution`, and of `pytest`."""
    used = {"solution": set(), "pytest": set()}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="solution" | "pytest" as module, names=names):
                used[module].update(alias.name for alias in names)
            case ast.Attribute(value=ast.Name(id="solution" | "pytest" as module), attr=name):
                used[module].add(name)
    return used["solution"], used["pytest"]


def _test_functions(tree: ast.Module) -> list[str]:
    """The names of all functions, of any depth, that pytest would call."""
    cases = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            cases.append(node.name)
            if ast.unparse(node.args):
                raise ValueError("tests with parameters")
    return cases


# what stands in for pytest beside the tests, in the sandbox
PYTEST = """
import cmath, re, sys, types

class raises:
    def __init__(self, expected, match=''):
        self.expected, self.pattern = expected, match

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind, 'nothing was raised'
        self.type, self.value = kind, error
        return issubclass(kind, self.expected) and self.match(self.pattern)

    def match(self, pattern):
        return re.search(pattern or '', str(self.value)) is not None

class approx:
    def __init__(self, wanted, rel=1e-6, abs=1e-12):
        self.wanted, self.rel, self.abs = wanted, rel or 0, abs or 0

    def inner(self, value):
        return approx(value, self.rel, self.abs)

    def __eq__(self, got):
        wanted = self.wanted
        if isinstance(wanted, dict):
            return got == {key: self.inner(value) for key, value in wanted.items()}
        if isinstance(wanted, (list, tuple)):
            return list(got) == list(map(self.inner, wanted))
        return got == wanted or cmath.isclose(got, wanted, rel_tol=self.rel, abs_tol=self.abs)

def fail(reason=''):
    raise AssertionError(reason)

sys.modules['pytest'] = pytest = types.ModuleType('pytest')
pytest.raises, pytest.approx, pytest.fail = raises, approx, fail
"""


# ---- the reward

def extract_program(response: str, problem: Problem) -> str | None:
    """The program that a response offers; None: none, as its thoughts never end.

    Of the blocks (`offered_programs`) the last one that defines what the tests use counts, else the
    last one: nothing is put together from several. What begins with an indented line, or lacks
    HumanEval's function, continues the prompt.
    """
    text = after_thoughts(response)
    if text is None:
        return None
    prompt = problem.extra.get("prompt")
    names = problem.extra.get("names", ())
    offered = offered_programs(text)
    defining = [code for code in offered if _defines(code, names)]
    code = (defining or offered)[-1]
    if prompt and (_begins_indented(code) or not _defines(code, names)):
        return prompt + _cut_after_body(code)
    future = r"^from __future__ .*\n"           # must stay in front
    futures = "".join(re.findall(future, code, re.M))
    code = re.sub(future, "", code, flags=re.M)
    return f"{futures}{problem.extra.get('helpers', '')}\n{code.strip()}\n"


def offered_programs(text: str) -> list[str]:
    """What may be the program of a text, the likeliest at the end.

    The text before the first fence (all of it without one), as a base model writes it, and as it is
    left by a closing fence whose opening one the prompt had; blocks of no language; [PYTHON] …
    [/PYTHON], which Code Llama's prompts ask for; and Python blocks. Other languages never count.
    """
    blocks = list(fenced_blocks(text))
    before = text[:blocks[0].start] if blocks else text
    page = before.split("[/PYTHON]")[0].split("\nProblem:")[0]
    offered = [re.split(r"^Answer: ?", page, flags=re.M)[-1]]
    offered += [block.code for block in blocks if not block.language]
    offered += TAGGED.findall(text)
    offered += [block.code for block in blocks if block.language in PYTHON]
    return [code for code in offered if code.strip()] or [""]


def _defines(code: str, names: list[str]) -> bool:
    for name in names:
        if not re.search(rf"^(?:(?:async +)?def|class) +{name}\b|^{name} *[:=]", code, re.M):
            return False
    return True


def _begins_indented(code: str) -> bool:
    first = next((line for line in code.splitlines() if line.strip()), "")
    return first[:1].isspace()


def _cut_after_body(code: str) -> str:
    """Up to the first of STOPS."""
    end = len(code)
    for stop in STOPS:
        place = code.find(stop)
        if place >= 0:
            end = min(end, place)
    return code[:end]


def run_tests(program: str, problem: Problem, box: sandbox.Sandbox) -> float | None:
    """1.0 for a program that passes the problem's tests, else 0.0; None: the sandbox failed."""
    result = box.test(program, problem.extra["tests"], problem.extra["names"])
    return {"passed": 1.0, "broken": None}.get(result.status, 0.0)


def reward(problem: Problem, response: str) -> float | None:
    """1.0 if the response's program passes all tests, else 0.0; None: could not be scored."""
    program = extract_program(response, problem)
    return 0.0 if program is None else run_tests(program, problem, sandbox.shared())


# ---- wrong programs

OTHERS = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
    ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}


def mutants(code: str, rng: random.Random, n: int) -> list[str]:
    """Up to n different programs, each the given one with a small fault, in random order.

    Some may still be right.
    """
    original = ast.unparse(parse(code))
    count = len(list(_faults(parse(code))))
    programs = {}       # without values: in the order of their making
    for which in shuffled(rng, range(count)):
        tree = parse(code)
        plant = list(_faults(tree))[which]
        plant()
        mutant = ast.unparse(ast.fix_missing_locations(tree))
        try:
            parse(mutant)
        except SyntaxError:                     # as `nonlocal` without what it names
            continue
        if mutant != original:
            programs[mutant] = None
        if len(programs) >= n:
            break
    return list(programs)


def _faults(tree: ast.Module) -> Iterator[Callable[[], None]]:
    """Every change that makes a mutant, to be called to make it in place."""
    for node in ast.walk(tree):
        yield from _faults_of_expression(node)
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(body, list):
                yield from _left_out_statements(body)


def _faults_of_expression(node: ast.AST) -> Iterator[Callable[[], None]]:
    match node:
        case ast.Compare(ops=[op, *rest]):
            yield partial(setattr, node, "ops", [OTHERS[type(op)](), *rest])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in OTHERS:
            yield partial(setattr, node, "op", OTHERS[type(op)]())
        case ast.Constant(value=bool(value)):
            yield partial(setattr, node, "value", not value)
        case ast.Constant(value=int(value) | float(value)):
            yield partial(setattr, node, "value", value + 1)
        case ast.Return(value=ast.expr() as value):
            yield partial(setattr, node, "value", None)
            yield partial(setattr, node, "value", ast.List([value], ast.Load()))
        case ast.Call(func=ast.Name(id="range"), args=[_, *_] as ends):
            stop = min(1, len(ends) - 1)
            one_less = ast.BinOp(ends[stop], ast.Sub(), ast.Constant(1))
            yield partial(ends.__setitem__, stop, one_less)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield partial(setattr, node, "test", ast.UnaryOp(ast.Not(), test))


def _left_out_statements(body: list[ast.stmt]) -> Iterator[Callable[[], None]]:
    for i, statement in enumerate(body):
        match statement:
            case ast.Expr(value=ast.Constant()):
                pass                            # a docstring
            case ast.Assign() | ast.AugAssign() | ast.Expr() | ast.Break():
                yield partial(body.__setitem__, i, ast.Pass())
