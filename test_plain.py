"""The code is plain and its arrows point down: ruff, checks/plain.py's limits, the imports."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checks import plain
from conftest import ROOT

FOLDERS = ("data", "kernels", "experiments", "report", "checks")
NODES_PER_LINE = 8.5
LONGEST_SCRIPT = 600
LOADED_BY_PRETRAIN = 22  # modules of ours that `import pretrain` loads
LAYERS = (  # a module imports from its own layer or from those before it
    ("settings", "untrusted", "dcp_files"),
    ("common",),
    ("schedule", "kernels", "trackers"),
    ("model", "data"),
    ("hf",),
    ("generate",),
    ("sampler",),
    ("evaluate",),
    ("loop",),
    ("sample_pairs", "rollouts", *plain.PHASES),
    ("experiments", "report", "checks"),
)


def modules() -> dict[str, Path]:
    """Our modules by name, without tests."""
    files = plain.code_files("*.py", *(f"{folder}/**/*.py" for folder in FOLDERS))
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        names[".".join(parts)] = path
    return names


MODULES = modules()


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, inside of functions as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else node.module)
    return names & MODULES.keys()


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def layer(name: str) -> int:
    top = name.partition(".")[0]
    return next(i for i, names in enumerate(LAYERS) if top in names)


def test_ruff():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", MODULES)
def test_rules_that_ruff_does_not_know(name):
    assert not plain.faults(MODULES[name])


@pytest.mark.parametrize("name", plain.PHASES)
def test_a_phase_is_plain(name):
    """Few syntax nodes a line, no wide line, and short enough to be read in one go."""
    measure = plain.measure(MODULES[name])
    assert measure.nodes_per_line <= NODES_PER_LINE
    assert measure.wide_lines == 0
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) < LONGEST_SCRIPT


def test_no_circle():
    """Depth first: a module that is met again on the way down imports itself in the end."""
    done = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in GRAPH[name]:
                visit(other, (*way, name))
            done.add(name)

    assert len(GRAPH) > 50
    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("name", GRAPH)
def test_arrows_point_down(name):
    assert not [other for other in GRAPH[name] if layer(other) > layer(name)]


def test_import_pretrain_loads_little():
    """No sandbox, no client of servers, no plots until they are needed. Empty files are none."""
    code = ("import sys, pretrain\n"
            "for module in list(sys.modules.values()): print(getattr(module, '__file__', ''))")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-"], input=code, cwd=ROOT, capture_output=True,
                            text=True, check=True, env=environment).stdout
    files = set(output.split()) & {str(path) for path in MODULES.values()}
    loaded = [name for name in files if Path(name).read_text(encoding="utf-8").strip()]
    assert 15 < len(loaded) <= LOADED_BY_PRETRAIN, sorted(loaded)
