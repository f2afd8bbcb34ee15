"""README.md and results/ agree: the figures of its tables, the origin of every result, and whatever it names.

A table belongs to the results that the text before it names last: as results/NAME.jsonl, by `experiments.NAME` or by
`checks.NAME`; where its section names none before it, to those that it names first after it. So a new table is checked
without a change here. Its figures are numbers with a decimal point or a thousands comma, rounded as it likes, without
those that a letter follows (3.2M tokens). All figures of a row must be found in one group of what the results give:
what an arm, a difference or a contestant got. It takes all lines of a file together where nothing below groups them.
"""
import importlib.util
import json
import re
from statistics import mean, median

import pytest

from experiments import hacking, results
from experiments.all import EXPERIMENTS
from checks import verify
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
           for path in sorted((ROOT / "results").glob("*.jsonl"))}
NAMES = re.compile(r"results/(\w+)\.jsonl|experiments\.(\w+)|checks\.(\w+)")
FIGURE = re.compile(r"(?<![\w.,])[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+)(?![\w,]|\.\d)")

NO_RESULTS = {  # how a table begins that is of no results -> what it is
    "| file | what it is |": "the files",
    "| stage | tokens | learning rate |": "the settings of configs/3b.py",
    "| | math | form | code | tools |": "what speedrun.sh prints of refine.py, in out/tiny/refine/report.json alone",
    "| kernel | what limits it |": "arithmetic and goals; nothing is measured yet",
    "| config | parameters | 1 GPU |": "estimates of model.py",
}
NOT_RECORDED = {  # how a row begins -> why its figures are in no results, though others of its table are
    "| warmup | 0.15M |": "report.py --record keeps the last evaluation of a phase",
    "| diversity | 1.15M |": "the same",
    "| high quality | 2.3M |": "the same",
}
ORIGIN = {"commit", "command", "seed", "config", "machine", "seconds"}
NO_ORIGIN = {  # results -> what their lines lack, and why
    "bench": ({"config"}, "with --peers; the sizes are constants of checks/peers.py"),
    "dpd_speed": ({"seconds"}, "these are in tokens_per_s, a figure a turn"),
    "evaluate": ({"config"}, "a checkpoint has its own, and the command names it"),
    "fuzz": ({"config"}, "no config: all is in the command"),
    "programs": ({"config"}, "no config: all is in the command"),
    "quality": ({"config"}, "no config: all are constants of checks/quality.py"),
    "sets": ({"config"}, "no config: all is in the command"),
    "sft_speed": ({"seconds"}, "these are in tokens_per_s, a figure a turn"),
    "verify": ({"config"}, "no config: all is in the command"),
}


# ---------------------------------------------------------------------------------------------------------------------
# What results give: groups of values

def numbers(value: object) -> list[float]:
    """All numbers within a line of JSON."""
    if isinstance(value, (dict, list)):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def of_experiment(name: str) -> list[list[float]]:
    """The tables of an experiment: rows of one arm or difference together, and each column of a table."""
    rows, columns, label = {}, [], re.compile(r"\| ?(\(\S+\)(?: - \(\S+\))?|[^|]*)")  # "(a)", "(a) - (b)" or all
    for table in re.findall(r"(?:^\|.*\n?)+", EXPERIMENTS[name].tables(results.read(name)), re.MULTILINE):
        cells = [[figures(cell) for cell in line.split("|")[2:-1]] for line in table.splitlines()]
        for line, row in zip(table.splitlines(), cells):
            rows.setdefault(label.match(line)[1], []).extend(sum(row, []))
        columns += [sum(column, []) for column in zip(*cells)]
    return [[value for value, _ in group] for group in [*rows.values(), *columns]]


def of_phases(*names: str) -> list[list[float]]:
    """Accuracy of each task and bits a byte, a group a line."""
    return [[score["avg"] for kind in ("before", "scores", "teacher") for score in line.get(kind, {}).values()
             if "avg" in score] + [pool["bits_per_byte"] for pool in line.get("validation", {}).values()]
            for name in names for line in RESULTS[name]]


def of_quality() -> list[list[float]]:
    """A group a way to score: the mean over seeds of each fault, and each seed's of all. Retrieval's has its parts."""
    tables = [line["auc"] for line in RESULTS["quality"]]
    means = {way: [mean(t[way][fault] for t in tables) for fault in tables[0][way]] for way in tables[0]}
    return [[*means[way], *(t[way]["all"] for t in tables), *means["lexical"], *means["vector"]] for way in means]


def of_verify() -> list[list[float]]:
    """Trials of right rewritings, then of wrong answers, in each set."""
    return [[sum(n for kind, n in line["trials"].items() if kind in kinds) for line in RESULTS["verify"]]
            for kinds in (verify.RIGHT, verify.WRONG)]


def of_bench() -> list[list[float]]:
    """A group a shape, eager or compiled: tokens a second of each contestant, and ours by the best of the others."""
    groups = {}
    for line in RESULTS["bench"]:
        key = line["shape"], line["compile"]
        groups.setdefault(key, {}).setdefault(line["dtype"], {})[line["contestant"]] = line["tokens_per_s"]
    return [[value for speeds in group.values() for value in
             [*speeds.values(), speeds.get("ours", 0) / max(speed for who, speed in speeds.items()
                                                            if who.startswith("transformers"))]]
            for group in groups.values()]


def of_turns(name: str) -> list[list[float]]:
    """A group a size of model: the median turn of each contestant, and the ratio."""
    return [[*map(median, line["tokens_per_s"].values()), line["ratio"]] for line in RESULTS[name]]


GROUPS = {
    "pretrain": lambda: of_phases("pretrain"), "sft": lambda: of_phases("sft"),
    "distill": lambda: of_phases("pretrain", "sft", "distill"),  # its table begins with the phases before
    "rl_run": lambda: of_phases("pretrain", "sft", "distill") + [
        [score["avg"] for score in stage.values()] for line in RESULTS["rl_run"] for stage in line["stages"].values()],
    "context": lambda: [numbers(line[when]) for line in RESULTS["context"] for when in ("before", "after")],
    "quality": of_quality, "verify": of_verify, "bench": of_bench,
    "hacking": lambda: [[value for value, _ in figures(row)]
                        for row in hacking.make_table(RESULTS["hacking"]).splitlines()],
    "sft_speed": lambda: of_turns("sft_speed"), "dpd_speed": lambda: of_turns("dpd_speed"),
    **{name: lambda name=name: of_experiment(name) for name in EXPERIMENTS},
}


# ---------------------------------------------------------------------------------------------------------------------
# What README.md says

def figures(text: str) -> list[tuple[float, float]]:
    """(value, half a unit of its last digit) of each figure."""
    return [(float(figure.replace(",", "")), 0.5 * 10.0 ** -len(figure.partition(".")[2]))
            for figure in FIGURE.findall(text)]


def tables() -> list[tuple[list[str], list[str], list[str]]]:
    """(lines, results named before, results named after) of each table, both within its section, in order."""
    found, section, within, code = [], [], [], False
    for line in [*README.splitlines(), "## end"]:
        code ^= line.startswith("```")
        if line.startswith("|") and not code:
            if not within or within[-1][-1] != len(section) - 1:
                within.append([])
            within[-1].append(len(section))
        if re.match("##? ", line) and not code:
            for places in within:
                named = [["".join(groups) for groups in NAMES.findall("\n".join(part))]
                         for part in (section[:places[0]], section[places[-1] + 1:])]
                found.append(([section[i] for i in places], *([n for n in part if n in RESULTS] for part in named)))
            section, within = [], []
            continue
        section.append(line)
    return found


def title(table: tuple) -> str:
    return re.sub(r"\W+", "-", table[0][0]).strip("-")


@pytest.mark.parametrize("table", tables(), ids=title)
def test_figures_of_tables(table):
    lines, before, after = table
    if any(lines[0].startswith(beginning) for beginning in NO_RESULTS):
        return
    assert before or after, f"no results are named before or after the table {lines[0]}"
    name = before[-1] if before else after[0]
    for line in lines[2:]:
        name = next((n for n in map("".join, NAMES.findall(line)) if n in RESULTS), name)  # a row may name its own
        groups = GROUPS[name]() if name in GROUPS else [numbers(RESULTS[name])]
        if any(line.startswith(beginning) for beginning in NOT_RECORDED):
            continue
        missing = [[value for value, half in figures(line) if not any(abs(value - v) <= half + 1e-9 for v in group)]
                   for group in groups]
        assert not (best := min(missing, key=len)), f"results/{name}.jsonl does not give {best} in the row\n{line}"


def test_exceptions_are_in_use():
    rows = [line for lines, _, _ in tables() for line in lines]
    assert not [beginning for beginning in [*NO_RESULTS, *NOT_RECORDED]
                if not any(row.startswith(beginning) for row in rows)]
    assert NO_ORIGIN.keys() <= RESULTS.keys()


@pytest.mark.parametrize("name", RESULTS)
def test_origin_of_results(name):
    """How each line was made is in it, or NO_ORIGIN says why not."""
    assert RESULTS[name]
    missing = {key for line in RESULTS[name] for key in ORIGIN if line.get(key) in (None, "")}
    assert missing == NO_ORIGIN.get(name, (set(), ""))[0]


def test_results_are_named():
    assert not [name for name in RESULTS if not re.search(rf"results/{name}\.jsonl|checks\.{name}\b", README)]


def test_what_is_named_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    scripts = re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.(?:py|sh))\b", README)
    results = re.findall(r"results/\w+\.jsonl", README)
    assert links and scripts and results
    assert not sorted({path for path in links + scripts + results
                       if not (ROOT / path).exists() and not (ROOT / "configs" / path).exists()})
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert modules and not sorted({module for module in modules if importlib.util.find_spec(module) is None})
    assert set(re.findall(r"python -m experiments\.(\w+)", README)) <= EXPERIMENTS.keys() | {"hacking"}
