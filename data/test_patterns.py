"""No text makes a pattern slow: every regular expression in our process, on hostile strings.

A pattern's own strings are made from its parts: a shortest match of what stands before a repeat,
very much of what is repeated, and an end that fits nothing. Beside them, every pattern meets long
runs of what fences, tags, numbers, brackets and LaTeX are made of. Text of ten times the length may
take about ten times as long; a pattern that backtracks over a repeat takes a hundred times.
"""
import ast
import importlib
import re
import re._constants as sre
import re._parser as parser
import time
from pathlib import Path

import pytest

from conftest import ROOT

FOLDERS = ("verify", "sets", "tasks", "refine", "chat")
METHODS = ("search", "match", "fullmatch", "findall", "finditer", "sub", "split")
SHORT, LONG = 1_000, 10_000     # characters
MOST, LITTLE = 0.05, 0.01       # seconds for a long text: too many; not worth a look
RATIO = 40                      # of a long text's time to a short one's: 10 where it is linear
# characters, MAX_ANSWER: longer ones are none
BOUNDED = {"answers": 1_000, "symbolic": 1_000, "spelling": 1_000, "units": 1_000}
# patterns of what is no model's text, or of what cannot make them slow
EXCEPTIONS = {
    r"(.*)\bword\b": "pages of ours",
    r"f\(x\): (.*)\. Example": "problems of ours",
    r"Example: (\w+\(.*\)) = (.*?)\.?$": "instructions",
    r"\[.*?\]": "lines that end with ]",
    "<<.+>>": "lines that end with >>",
}
RUNS = (
    "`", "~", "```\n", "```python\n", "*", "a", "A ", " ", "\t", "\n", "9", "9,", "1.", "1 ", "-",
    "(", ")", "[", "]", "{", "}", "<", "<think>", "</think>", "[PYTHON]", "\\", "\\frac", "{1}",
    "\\boxed{", "\\text{", "$", "#", "####", "_", "^", '"', "'", "%", "=", "=1", "x=", "answer is ",
    "Answer: ", "f(1) = ", "a = 1. ", "•", "é", "\x00",
)


# ---- the patterns: calls of `re` and of compiled patterns, found in the source

def find_patterns() -> list:
    """A pytest.param of test_time_grows_with_length for each call whose pattern can be told."""
    found = {}      # in the order of the modules
    files = [ROOT / "data" / "llm.py"]
    for folder in FOLDERS:
        files += sorted((ROOT / "data" / folder).glob("*.py"))
    for path in files:
        if not path.name.startswith("test_"):
            for pattern, flags, method in patterns_of(path):
                if pattern not in EXCEPTIONS:
                    longest = BOUNDED.get(path.stem, LONG)
                    key = (pattern, flags, method, longest)
                    found[key] = f"{path.stem}-{method}-{pattern[:30]!a}"
    return [pytest.param(*key, id=name) for key, name in found.items()]


def patterns_of(path: Path) -> list[tuple[str, int, str]]:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    patterns = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="re"), attr=method)) if (
                    method in METHODS):
                pattern = known_value(node.args[0], module)
                if isinstance(pattern, str):
                    pattern = re.compile(pattern, flags_of(node, module))
            case ast.Attribute(value=value, attr=method) if method in METHODS:
                pattern = known_value(value, module)
            case _:
                continue
        if isinstance(pattern, re.Pattern):
            patterns.append((pattern.pattern, pattern.flags, method))
    tables = [value for value in vars(module).values() if isinstance(value, (list, tuple))]
    for pattern in in_tables(tables):
        patterns.append((pattern.pattern, pattern.flags, "sub"))
    return patterns


def in_tables(values) -> list[re.Pattern]:
    """The patterns in lists and tuples, of any depth."""
    found = []
    for value in values:
        if isinstance(value, re.Pattern):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += in_tables(value)
    return found


def known_value(node: ast.expr, module) -> object:
    """What an expression is at import; a local name stands for a word. None: it is none."""
    names = {name.id: "word" for name in ast.walk(node) if isinstance(name, ast.Name)}
    try:
        return eval(ast.unparse(node), vars(module) | {
            name: word for name, word in names.items()
            if name not in vars(module) and name not in dir(__builtins__)})
    except Exception:
        return None


def flags_of(node: ast.Call, module) -> int:
    flags = [keyword.value for keyword in node.keywords if keyword.arg == "flags"]
    place = {"sub": 4, "split": 3}.get(node.func.attr, 2)
    flags += node.args[place:place + 1]
    return known_value(flags[0], module) if flags else 0


# ---- the strings

def shortest(parts) -> str:
    """A short text that the parts of a parsed pattern match, roughly."""
    return "".join(map(shortest_of_part, parts))


def shortest_of_part(part) -> str:
    kind, value = part
    if kind is sre.LITERAL:
        return chr(value)
    if kind is sre.NOT_LITERAL:
        return "b" if value == ord("a") else "a"
    if kind is sre.ANY:
        return "a"
    if kind is sre.IN:
        return character_of(value)
    if kind is sre.BRANCH:
        return shortest(value[1][0])
    if kind is sre.SUBPATTERN:
        return shortest(value[-1])
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
        return shortest(value[2]) * max(value[0], 1)
    if kind is sre.ATOMIC_GROUP:
        return shortest(value)
    return ""


def character_of(choices) -> str:
    candidates = "a1 \n.(*`-=,[{<\\\t\"'~_^%$é"
    pattern = parser.SubPattern(parser.State(), [(sre.IN, choices)])
    for character in candidates:
        if re._compiler.compile(pattern).fullmatch(character):
            return character
    for kind, value in choices:
        if kind is sre.LITERAL:
            return chr(value)
        if kind is sre.RANGE:
            return chr(value[0])
    return "a"


def pumped(parts, before: str = "") -> list[tuple[str, str]]:
    """(what stands before, what is repeated) of every repeat in a parsed pattern."""
    found = []
    for part in parts:
        kind, value = part
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            if value[1] > 9:
                found.append((before, shortest(value[2])))
            found += pumped(value[2], before)
        elif kind is sre.BRANCH:
            for branch in value[1]:
                found += pumped(branch, before)
        elif kind is sre.SUBPATTERN:
            found += pumped(value[-1], before)
        elif kind is sre.ATOMIC_GROUP:
            found += pumped(value, before)
        elif kind in (sre.ASSERT, sre.ASSERT_NOT):
            found += pumped(value[1], before)
        before += shortest_of_part(part)
    return found


def hostile(pattern: str, flags: int) -> dict[tuple[str, str, str], None]:
    """(beginning, what is repeated, end), each once."""
    texts = {}
    whole = parser.parse(pattern, flags)
    for before, repeated in [*pumped(whole), *[("", run) for run in RUNS]]:
        for run in (repeated, before + repeated, repeated + "\n"):
            for end in ("", "\x00", "`\n\x00"):
                if run:
                    texts[before, run, end] = None
    return texts


def seconds(compiled: re.Pattern, method: str, text: str, tries: int = 1) -> float:
    """What the method takes, of this thread alone; the least of the tries."""
    least = float("inf")
    for _ in range(tries):
        start = time.thread_time()
        if method == "sub":
            compiled.sub("", text)
        elif method == "finditer":
            list(compiled.finditer(text))
        else:
            getattr(compiled, method)(text)
        least = min(least, time.thread_time() - start)
    return least


@pytest.mark.parametrize("pattern, flags, method, longest", find_patterns())
def test_time_grows_with_length(pattern, flags, method, longest):
    compiled = re.compile(pattern, flags)
    for before, run, end in hostile(pattern, flags):
        text = before + run * (longest // len(run)) + end
        if seconds(compiled, method, text) < LITTLE:
            continue
        long_time = seconds(compiled, method, text, 2)
        assert long_time < MOST, (before, run, end)
        short_text = before + run * (SHORT // len(run)) + end
        if longest == LONG:
            short_time = seconds(compiled, method, short_text, 5)
            assert long_time < RATIO * short_time, (before, run, end)


SLOW = (  # one of them was here, and took 8 seconds for 32,000 characters
    (r"^(`{3,})[ \t]*(\w*)[^\n`]*\n", "search"),
    (r"a*\.?a*", "fullmatch"),
    (r"(?:[a-z],?)*b*;", "match"),
    (r"[0-9]*\.[0-9]+", "search"),
)


@pytest.mark.parametrize("pattern, method", SLOW)
def test_what_is_quadratic_is_found(pattern, method):
    with pytest.raises(AssertionError):
        test_time_grows_with_length(pattern, 0, method, LONG)


def test_the_patterns_are_found():
    ids = [param.id for param in find_patterns()]
    for name in ("answers", "agentic", "programs", "refinement", "checklist", "ifeval", "llm"):
        assert any(one.startswith(name) for one in ids), name
