"""Bars in a log file: few lines, in order with what is written beside them."""
import sys

import pytest
from tqdm import tqdm

import common


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    clock = type("Clock", (), dict(now=100.0, monotonic=lambda self: self.now))()
    monkeypatch.setattr(common, "time", clock)
    return clock


def test_lines_now_and_then(clock, capsys):
    bar = common.progress_bar(total=1000, desc="pool math", unit="B")
    bar._time = lambda: clock.now
    bar.start_t = bar.last_print_t = clock.now
    for i in range(1000):
        clock.now += 0.1
        bar.update()
        if i % 100 == 50:
            tqdm.write(f"line {i}", file=sys.stderr)
    bar.close()
    output = capsys.readouterr().err
    lines = output.splitlines()
    assert "\r" not in output and output.endswith("\n") and "" not in lines
    states = [line for line in lines if line.startswith("pool math: ")]
    assert len(states) == 4 and "1000/1000" in states[-1] and lines[-1] == states[-1]
    assert [line for line in lines if line not in states] == [
        f"line {i}" for i in range(50, 1000, 100)
    ]
    assert lines.index(states[0]) == 3  # in order: after 30 seconds, and three lines written before


def test_short_work_is_one_line(capsys):
    assert list(common.progress_bar(range(5), desc="verify high")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.startswith("verify high: 100%|")
    assert list(common.progress_bar(range(5), delay=5)) == [0, 1, 2, 3, 4]
    assert list(common.progress_bar(range(5), disable=None)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_tqdm(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with common.progress_bar(total=3, leave=False) as bar:
        assert type(bar) is tqdm
