"""Size is a feature: the code stays small enough to be read."""
from conftest import ROOT


def code(*patterns: str) -> dict[str, list[str]]:
    files = [p for pattern in patterns for p in ROOT.glob(pattern) if not p.name.startswith(("test_", "conftest"))]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8").splitlines() for p in files}


def test_no_file_is_long_and_no_line_wide():
    everything = code("*.py", "data/**/*.py", "kernels/*.py", "checks/*.py", "configs/*.py")
    assert len(everything) > 20 and not {name: len(lines) for name, lines in everything.items() if len(lines) > 600}
    assert not [f"{name}:{i}" for name, lines in everything.items() for i, l in enumerate(lines, 1) if len(l) > 120]


def test_the_whole_is_small():
    around = code("ablate.py", "bench.py", "evaluate.py", "plots.py", "report.py", "stats.py")
    phases = {name: lines for name, lines in code("*.py").items() if name not in around}
    assert sum(map(len, phases.values())) < 3850 and sum(map(len, around.values())) < 1850
    assert sum(map(len, code("data/*.py").values())) < 6250
    assert sum(map(len, code("data/tasks/*.py").values())) < 2150
