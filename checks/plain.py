"""How plain is the code? Syntax nodes a code line, the longest function, wide lines; and what ruff
cannot say.

    python -m checks.plain              # a line for each root script
    python -m checks.plain data report  # and for what stands in these folders

A code line is one that holds code: no blank line, comment or docstring. nanoGPT has 6 to 8 nodes a
line, nanochat 6 to 9. test_plain.py holds the limits.
"""
import ast
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHASES = ("pretrain", "refine", "sft", "distill", "reward", "rl")
WIDTH = 100          # characters of a line
LONGEST = 50         # lines of a function …
LONGEST_MAIN = 70    # … and of main(), or of a Triton kernel, which cannot be cut
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Measure:
    """What is counted of one file."""
    code_lines: int
    nodes: int
    wide_lines: int
    longest: int       # lines of the longest function but main()
    longest_name: str
    main: int          # lines of main()

    @property
    def nodes_per_line(self) -> float:
        return self.nodes / max(1, self.code_lines)


def code_files(*patterns: str) -> list[Path]:
    """Our files that match one of the patterns, without tests and what they share."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in found if not path.name.startswith(("test_", "conftest")))


def docstrings(tree: ast.Module) -> list[ast.Expr]:
    """Texts that stand alone as a statement."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return [node for node in statements
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]


def measure(path: Path) -> Measure:
    """Counts one file. Docstrings, and whether a name is read or written, are no nodes."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    texts = docstrings(tree)
    prose = {n for node in texts for n in range(node.lineno, node.end_lineno + 1)}
    code = [line for n, line in enumerate(lines, 1)
            if n not in prose and line.strip() and not line.strip().startswith("#")]
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    main = lengths.pop("main", 0)
    longest_name = max(lengths, key=lengths.get, default="")
    nodes = sum(not isinstance(node, ast.expr_context) for node in ast.walk(tree))
    wide_lines = sum(len(line) > WIDTH for line in lines)
    return Measure(
        code_lines=len(code),
        nodes=nodes - 2 * len(texts),
        wide_lines=wide_lines,
        longest=lengths.get(longest_name, 0),
        longest_name=longest_name,
        main=main,
    )


def faults(path: Path) -> list[str]:
    """Where a file breaks a rule of ours that ruff does not know, as "file:line: what"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            is_kernel = "triton.jit" in map(ast.unparse, node.decorator_list)
            limit = LONGEST_MAIN if node.name == "main" or is_kernel else LONGEST
            length = node.end_lineno - node.lineno + 1
            if length > limit:
                found.append((node.lineno, f"{node.name} has {length} lines, more than {limit}"))
        if isinstance(node, COMPREHENSIONS) and any(
            isinstance(n, ast.NamedExpr) for n in ast.walk(node)
        ):
            found.append((node.lineno, "a walrus inside of a comprehension"))
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Mult)
            and _is_text_times_flag(node)
        ):
            found.append((node.lineno, "a text or list times a flag: write an if"))
        if isinstance(node, ast.stmt) and _own_comprehensions(node) > 1:
            found.append((node.lineno, "more than one comprehension in a statement"))
    name = path.relative_to(ROOT)
    return [f"{name}:{line}: {what}" for line, what in sorted(found)]


def _is_text_times_flag(node: ast.BinOp) -> bool:
    """Whether this is `"text" * flag` or `[x] * flag`: a flag is a comparison, a `not` or a
    bool()."""
    def is_text(side):
        return isinstance(side, (ast.JoinedStr, ast.List, ast.Tuple)) or (
            isinstance(side, ast.Constant) and isinstance(side.value, str))

    def is_flag(side):
        calls_bool = isinstance(side, ast.Call) and getattr(side.func, "id", "") == "bool"
        return calls_bool or isinstance(side, (ast.Compare, ast.BoolOp)) or (
            isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.Not))

    return (is_text(node.left) and is_flag(node.right)) or (
        is_flag(node.left) and is_text(node.right)
    )


def _own_comprehensions(statement: ast.stmt) -> int:
    """Comprehensions of a statement, without those of the statements inside of it."""
    count, todo = 0, [statement]
    while todo:
        for child in ast.iter_child_nodes(todo.pop()):
            if not isinstance(child, ast.stmt):
                count += isinstance(child, COMPREHENSIONS)
                todo.append(child)
    return count


def main():
    folders = [f"{folder}/**/*.py" for folder in sys.argv[1:]]
    print(
        f"{'file':34}{'code lines':>11}{'nodes a line':>14}{'over 100':>10}{'main':>6}  longest "
        f"function"
    )
    broken = []
    for path in code_files("*.py", *folders):
        m = measure(path)
        name = str(path.relative_to(ROOT))
        wide = m.wide_lines / max(1, m.code_lines)
        print(f"{name:34}{m.code_lines:11,}{m.nodes_per_line:14.1f}{wide:10.1%}{m.main:6}  "
              f"{m.longest_name} {m.longest}")
        broken += faults(path)
    print("\n".join(broken))


if __name__ == "__main__":
    main()
