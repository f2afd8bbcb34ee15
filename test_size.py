"""Size is a feature: the code stays small enough to be read."""
from conftest import ROOT


def lines(pattern: str) -> dict[str, int]:
    files = [p for p in ROOT.glob(pattern) if not p.name.startswith(("test_", "conftest"))]
    return {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}


def test_no_file_is_long():
    everything = lines("*.py") | lines("data/**/*.py") | lines("kernels/*.py") | lines("checks/*.py") | lines("configs/*.py")
    assert len(everything) > 20 and not {name: n for name, n in everything.items() if n > 600}


def test_the_whole_is_small():
    assert sum(lines("*.py").values()) < 3500
    assert sum(lines("data/**/*.py").values()) < 2500


def test_no_line_is_wide():
    wide = [f"{p.relative_to(ROOT)}:{i}" for p in ROOT.glob("**/*.py") if ".venv" not in p.parts and "out" not in p.parts
            for i, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 120]
    assert not wide
