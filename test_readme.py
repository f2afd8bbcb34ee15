"""README.md and docs/ agree with results/ and with the code.

The figures of tables. A table belongs to the results that the text before it names last: as
results/NAME.jsonl, by `experiments.NAME` or by `checks.NAME`; where its section names none before
it, to those that it names first after it; a row may name its own. So a new table is checked without
a change here. Its figures are numbers with a decimal point or a thousands comma, rounded as it
likes, without those that a letter follows (3.2M tokens). All figures of a row must be in one group
of what the results give: what an arm, a difference or a contestant got. It takes all lines of a
file together where nothing below groups them.

And whatever the pages name: links, scripts, modules, settings, results, experiments, and the code
that they quote.
"""
from settings import from_dict, read_config_file

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import pytest

import distill
import evaluate
import model
import pretrain
import refine
import reward
import rl
import sft
from conftest import ROOT
from data.filter import quality
from data.text import corpus, tokenizer
from experiments import hacking, results
from experiments.all import EXPERIMENTS

PAGES = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
for _path in sorted((ROOT / "docs").glob("*.md")):
    PAGES[f"docs/{_path.name}"] = _path.read_text(encoding="utf-8")
TEXT = "\n".join(PAGES.values())

RESULTS = {}
for _path in sorted((ROOT / "results").glob("*.jsonl")):
    RESULTS[_path.stem] = [json.loads(line) for line in _path.read_text().splitlines()]

NAMES = re.compile(r"results/(\w+)\.jsonl|experiments\.(\w+)|checks\.(\w+)")
FIGURE = re.compile(r"(?<![\w.,])[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+)(?![\w,]|\.\d)")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
QUOTE = re.compile(  # From [rl.py](../rl.py), `surrogate`: and a block of code
    r"[Ff]rom\s+\[[^\]]*\]\(([^)]+\.py)\),\s+`(\w+)`:\n\n```python\n(.*?)```", re.DOTALL)

NO_RESULTS = {  # how a table begins that is of no results -> what it is
    "| results | made by |": "the files of results/",
    "| stage | tokens | learning rate |": "the settings of configs/3b.py",
    "| | math | form | code | tools |": "what refine.py prints, in out/tiny/refine/report.json",
    "| role | what counts | base |": "the same",
    "| kernel | what limits it |": "arithmetic and goals; nothing is measured yet",
    "| config | parameters | 1 GPU |": "estimates of checks/sizes.py",
    "| setting | whose servers they are |": "a list of settings",
    "| phase of `configs/3b.py` | trained tokens |": "arithmetic, which the text above it gives",
}
# How a row begins -> why its figures are in no results, though others of its table are.
NOT_RECORDED = {
    "| warmup | 0.15M |": "python -m report --record keeps the last evaluation of a phase",
    "| diversity | 1.15M |": "the same",
    "| high quality | 2.3M |": "the same",
}
ORIGIN = {"commit", "command", "seed", "config", "machine", "seconds"}
NO_ORIGIN = {  # results -> what their lines lack, and why
    "bench": ({"config"}, "of checks/peers.py, whose constants the sizes are"),
    "constraints": ({"seconds"}, "it reads what evaluate.py has scored"),
    "dpd_speed": ({"seconds"}, "these are in tokens_per_s, one figure per turn"),
    "engine": ({"config"}, "no config: all is in the command"),
    "engine_speed": ({"config"}, "no config: all is in the command"),
    "evaluate": ({"config"}, "a checkpoint has its own, and the command names it"),
    "fuzz": ({"config"}, "no config: all is in the command"),
    "memory": ({"seed"}, "nothing is drawn"),
    "programs": ({"config"}, "no config: all is in the command"),
    "quality": ({"config"}, "no config: all are constants of checks/quality.py"),
    "sets": ({"config"}, "no config: all is in the command"),
    "sampler_speed": ({"seconds"}, "these are in tokens_per_s"),
    "sft_speed": ({"seconds"}, "these are in tokens_per_s, one figure per turn"),
    "verify": ({"config"}, "no config: all is in the command"),
}
SECTIONS = {  # of a config -> its settings
    "model": model.ModelConfig,
    "tokenizer": tokenizer.TokenizerConfig,
    "corpus": corpus.CorpusConfig,
    "quality": quality.QualityConfig,
    "pretrain": pretrain.PretrainConfig,
    "refine": refine.RefineConfig,
    "sft": sft.SftConfig,
    "distill": distill.DistillConfig,
    "reward": reward.RewardConfig,
    "rl": rl.RlConfig,
    "evaluate": evaluate.EvaluateConfig,
}


# -------------------------------------------------------------------------------------------------
# What results give: groups of values

def numbers(value: object) -> list[float]:
    """All numbers within a line of JSON."""
    if isinstance(value, dict):
        return numbers(list(value.values()))
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [value] if is_number else []


def experiment_groups(name: str) -> list[list[float]]:
    """The tables of an experiment: rows of one arm or difference together, and each column."""
    # "(a)", "(a) - (b)", or all of the first cell
    label = re.compile(r"\| ?(\(\S+\)(?: - \(\S+\))?|[^|]*)")
    text = EXPERIMENTS[name].tables(results.read(name))
    rows, columns = {}, []
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        cells_of_lines = []
        for line in table.splitlines():
            cells = [values(cell) for cell in line.split("|")[2:-1]]
            cells_of_lines.append(cells)
            rows.setdefault(label.match(line)[1], []).extend(sum(cells, []))
        columns += [sum(column, []) for column in zip(*cells_of_lines)]
    return [*rows.values(), *columns]


def phase_groups(*phases: str) -> list[list[float]]:
    """One group per line: accuracy of each task, and bits per byte."""
    groups = []
    for line in [line for phase in phases for line in RESULTS[phase]]:
        group = [pool["bits_per_byte"] for pool in line.get("validation", {}).values()]
        for kind in ("before", "scores", "teacher"):
            group += [score["avg"] for score in line.get(kind, {}).values() if "avg" in score]
        groups.append(group)
    return groups


def pretrain_groups() -> list[list[float]]:
    return phase_groups("pretrain")


def sft_groups() -> list[list[float]]:
    return phase_groups("sft")


def distill_groups() -> list[list[float]]:
    """Its tables begin with the phases before."""
    return phase_groups("pretrain", "sft", "distill")


def rl_run_groups() -> list[list[float]]:
    """Its tables begin with the phases before."""
    groups = distill_groups()
    for line in RESULTS["rl_run"]:
        for stage in line["stages"].values():
            groups.append([score["avg"] for score in stage.values()])
    return groups


def context_groups() -> list[list[float]]:
    groups = []
    for line in RESULTS["context"]:
        groups += [numbers(line["before"]), numbers(line["after"])]
    return groups


def quality_groups() -> list[list[float]]:
    """One group per way to score: the mean over seeds of each fault, each seed's of all faults, and
    the means of both parts of retrieval.
    """
    tables = [line["auc"] for line in RESULTS["quality"]]

    def means(way: str) -> list[float]:
        return [mean(table[way][fault] for table in tables) for fault in tables[0][way]]

    parts = means("lexical") + means("vector")
    groups = []
    for way in tables[0]:
        of_all_faults = [table[way]["all"] for table in tables]
        groups.append(means(way) + of_all_faults + parts)
    return groups


def verify_groups() -> list[list[float]]:
    """Trials and errors of right forms, then of wrong answers, in each set."""
    lines = [line for line in RESULTS["verify"] if "refused" in line]
    right = [[line["right"], line["refused"]] for line in lines]
    wrong = [[line["wrong"], line["accepted"]] for line in lines]
    return [sum(right, []), sum(wrong, [])]


def bench_groups() -> list[list[float]]:
    """One group per shape, eager or compiled: tokens per second of all, and ours by the best of the
    others.
    """
    speeds = {}
    for line in RESULTS["bench"]:
        by_dtype = speeds.setdefault((line["shape"], line["compile"]), {})
        by_dtype.setdefault(line["dtype"], {})[line["contestant"]] = line["tokens_per_s"]
    groups = []
    for by_dtype in speeds.values():
        group = []
        for contestants in by_dtype.values():
            others = [contestants[name] for name in contestants if name.startswith("transformers")]
            group += [*contestants.values(), contestants.get("ours", 0) / max(others)]
        groups.append(group)
    return groups


def hacking_groups() -> list[list[float]]:
    return [values(row) for row in hacking.make_table(RESULTS["hacking"]).splitlines()]


def sampler_speed_groups() -> list[list[float]]:
    """One group per case: each contestant's tokens per second, and ours by it."""
    groups = []
    for line in RESULTS["sampler_speed"]:
        speeds = line["tokens_per_s"]
        ours = next(speed for name, speed in speeds.items() if name.startswith("ours"))
        groups.append([*speeds.values(), *(ours / speed for speed in speeds.values())])
    return groups


def turn_groups(name: str) -> list[list[float]]:
    """One group per size of model: the median turn of each contestant, and the ratio."""
    groups = []
    for line in RESULTS[name]:
        groups.append([*map(median, line["tokens_per_s"].values()), line["ratio"]])
    return groups


GROUPS = {
    "pretrain": pretrain_groups,
    "sft": sft_groups,
    "distill": distill_groups,
    "rl_run": rl_run_groups,
    "context": context_groups,
    "quality": quality_groups,
    "verify": verify_groups,
    "bench": bench_groups,
    "hacking": hacking_groups,
    "sampler_speed": sampler_speed_groups,
}


def result_groups(name: str) -> list[list[float]]:
    """All groups of results/NAME.jsonl."""
    if name in EXPERIMENTS:
        return experiment_groups(name)
    if name in ("sft_speed", "dpd_speed"):
        return turn_groups(name)
    if name in GROUPS:
        return GROUPS[name]()
    return [numbers(RESULTS[name])]


# -------------------------------------------------------------------------------------------------
# What the pages say

def figures(text: str) -> list[tuple[float, float]]:
    """(value, half a unit of its last digit) of each figure."""
    pairs = []
    for figure in FIGURE.findall(text):
        n_decimals = len(figure.partition(".")[2])
        pairs.append((float(figure.replace(",", "")), 0.5 * 10.0 ** -n_decimals))
    return pairs


def values(text: str) -> list[float]:
    return [value for value, _ in figures(text)]


def missing_figures(row: str, group: list[float]) -> list[float]:
    """The figures of a row that round no value of the group."""
    missing = []
    for value, half_unit in figures(row):
        if not any(abs(value - other) <= half_unit + 1e-9 for other in group):
            missing.append(value)
    return missing


def named_results(text: str) -> list[str]:
    """The results that a text names, in order."""
    names = ["".join(groups) for groups in NAMES.findall(text)]
    return [name for name in names if name in RESULTS]


def sections(text: str) -> Iterator[list[str]]:
    """The lines of each section of a page: up to the next heading of the first or second level."""
    section, in_code = [], False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        if re.match("##? ", line) and not in_code:
            yield section
            section = []
        section.append(line)
    yield section


@dataclass
class Table:
    lines: list[str]
    before: list[str]  # the results that its section names before it …
    after: list[str]   # … and after it

    @property
    def title(self) -> str:
        return re.sub(r"\W+", "-", self.lines[0]).strip("-")


def tables_of_section(section: list[str]) -> list[Table]:
    blocks, in_code = [], False  # (first line, line after the last one)
    for i, line in enumerate(section):
        in_code ^= line.startswith("```")
        if in_code or not line.startswith("|"):
            continue
        if blocks and blocks[-1][1] == i:
            blocks[-1] = (blocks[-1][0], i + 1)
        else:
            blocks.append((i, i + 1))
    tables = []
    for first, end in blocks:
        before = named_results("\n".join(section[:first]))
        after = named_results("\n".join(section[end:]))
        tables.append(Table(section[first:end], before, after))
    return tables


TABLES = []
for _text in PAGES.values():
    for _section in sections(_text):
        TABLES += tables_of_section(_section)


def tree() -> dict[str, str]:
    """path -> comment of each entry of README's tree of files."""
    block = re.search(r"^## Files.*?```\n(.*?)```", PAGES["README.md"], re.DOTALL | re.MULTILINE)[1]
    entries, parent = {}, ""
    for line in block.splitlines():
        name, _, comment = line.strip().partition(" ")
        if line.startswith("  "):
            name = parent + name
        elif name.endswith("/"):
            parent = name
        entries[name] = comment.strip()
    return entries


def prose() -> str:
    """All pages, without README's tree of files: what that names is relative to its folders."""
    return re.sub(r"^(## Files.*?)```.*?```", r"\1", TEXT, count=1, flags=re.DOTALL | re.MULTILINE)


# -------------------------------------------------------------------------------------------------
# Figures

@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_figures_of_tables(table):
    if table.lines[0].startswith(tuple(NO_RESULTS)):
        return
    nearest = [*table.before[-1:], *table.after[:1], ""]
    name = nearest[0]
    for row in table.lines[2:]:
        of_row = named_results(row)
        name = of_row[0] if of_row else name
        assert name, f"no results are named in, before or after the table {table.lines[0]}"
        if row.startswith(tuple(NOT_RECORDED)):
            continue
        missing = [missing_figures(row, group) for group in result_groups(name)]
        fewest = min(missing, key=len)
        assert not fewest, f"results/{name}.jsonl does not give {fewest} in the row\n{row}"


def test_exceptions_are_in_use():
    rows = [line for table in TABLES for line in table.lines]
    for beginning in [*NO_RESULTS, *NOT_RECORDED]:
        assert any(row.startswith(beginning) for row in rows), beginning
    assert NO_ORIGIN.keys() <= RESULTS.keys()


@pytest.mark.parametrize("name", RESULTS)
def test_origin_of_results(name):
    """How each line was made is in it, or NO_ORIGIN says why not."""
    assert RESULTS[name]
    missing = set()
    for line in RESULTS[name]:
        missing |= {key for key in ORIGIN if line.get(key) in (None, "")}
    allowed, _ = NO_ORIGIN.get(name, (set(), ""))
    assert missing == allowed


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_named(name):
    assert re.search(rf"results/{name}\.jsonl|checks\.{name}\b", TEXT)


# -------------------------------------------------------------------------------------------------
# Names

@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    folder = (ROOT / page).parent
    broken = [link for link in LINK.findall(PAGES[page]) if not (folder / link).exists()]
    assert not broken


def test_every_chapter_is_linked_from_readme():
    chapters = set(PAGES) - {"README.md"}
    assert chapters
    assert chapters <= set(LINK.findall(PAGES["README.md"]))


WRITTEN_BY_READERS = ("data/tasks/count.py", "rl.imitation")  # in the exercises of docs/CHANGE.md


def test_scripts_and_configs_exist():
    scripts = set(re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.(?:py|sh))\b", prose()))
    assert len(scripts) > 20
    for script in sorted(scripts - {*WRITTEN_BY_READERS}):
        assert (ROOT / script).exists() or (ROOT / "configs" / script).exists(), script


def test_results_files_exist():
    names = set(re.findall(r"results/(\w+)\.jsonl", TEXT))
    assert names == RESULTS.keys()


def test_modules_exist():
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT))
    assert len(modules) > 10
    for module in sorted(modules):
        assert importlib.util.find_spec(module) is not None, module
    named = set(re.findall(r"python -m experiments\.(\w+)", TEXT))
    assert named == EXPERIMENTS.keys() | {"hacking"}


def test_tests_exist():
    selections = re.findall(r"bash test\.sh (\S+\.py) -k (\w+)", TEXT)
    assert selections
    for file, word in selections:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"def test_\w*{word}", source), f"{file} -k {word}"


def test_settings_exist():
    options = re.findall(r"--(\w+)\.(\w+)=", TEXT)
    alone = re.findall(rf"`({'|'.join(SECTIONS)})\.(?!py`|json`)(\w+)(?: = \S+)?`", TEXT)
    assert len(options) > 20
    assert len(alone) > 3
    for section, key in options + alone:
        if (section, key) == ("section", "key"):
            continue
        names = {field.name for field in dataclasses.fields(SECTIONS[section])}
        assert key in names or f"{section}.{key}" in WRITTEN_BY_READERS, f"{section}.{key}"


def test_steps_of_the_filter_exist():
    steps = re.findall(r"--quality\.step=(\w+)", TEXT)
    assert steps
    assert set(steps) <= set(quality.STEPS)


CONFIGS = re.findall(r"```python\n((?:from configs|\w+ = dict\().*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", CONFIGS)
def test_configs_can_be_read(code):
    """A part of a config that a page shows has sections with settings that exist."""
    namespace = {}
    exec(code, namespace)
    names = SECTIONS.keys() & namespace.keys()
    assert names
    for name in names:
        from_dict(SECTIONS[name], namespace[name], name)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_files_of_configs_can_be_read(path):
    for name, values in read_config_file(path).items():
        stages_come_with_the_arms = name == "pretrain" and values.get("stages") == []
        if values and name in SECTIONS and not stages_come_with_the_arms:
            from_dict(SECTIONS[name], values, name)


def test_files_of_the_tree_exist():
    for path, comment in tree().items():
        assert (ROOT / path).exists(), path
        folder = ROOT / path if path.endswith("/") else ROOT
        for name in re.findall(r"(?<![\w/.])\w+\.py\b", comment):
            assert (folder / name).exists(), f"{path}: {name}"


def test_tree_has_every_script_and_folder():
    entries = set(tree())
    for comment in tree().values():
        entries |= set(re.findall(r"\w+\.py\b", comment))
    scripts = [path.name for path in ROOT.glob("*.py")]
    scripts = [name for name in scripts if not name.startswith(("test_", "conftest"))]
    packages = [f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")]
    groups = [f"data/{path.parent.name}/" for path in ROOT.glob("data/*/__init__.py")]
    missing = set(scripts + packages + groups) - entries
    assert not missing


QUOTES = []
for _page, _text in PAGES.items():
    for _link, _function, _code in QUOTE.findall(_text):
        QUOTES.append((_page, Path(_page).parent / _link, _function, _code))


@pytest.mark.parametrize("page, path, function, code", QUOTES)
def test_quoted_code_is_the_code(page, path, function, code):
    """What a page quotes stands in the file, line by line, apart from indentation; "…" leaves some
    lines out.
    """
    source = (ROOT / path).resolve().read_text(encoding="utf-8")
    assert f"def {function}(" in source
    lines = "\n".join(line.strip() for line in source.splitlines())
    for part in code.split("…"):
        quoted = "\n".join(line.strip() for line in part.strip().splitlines())
        assert quoted
        assert quoted in lines, f"{page}: this is not in {path}:\n{quoted}"


def test_every_phase_is_quoted():
    quoted = {path.name for _, path, _, _ in QUOTES}
    assert quoted >= {"pretrain.py", "refine.py", "distill.py", "rl.py"}


# -------------------------------------------------------------------------------------------------
# Form

def test_readme_is_short():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 250
    assert len(text.encode("utf-8")) <= 16 * 1024


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_narrow(page):
    lines = [line for line in PAGES[page].splitlines() if not line.startswith("|")]
    assert max(len(line) for line in lines) <= 100


@pytest.mark.parametrize("page", PAGES)
def test_chapters_begin_with_what_the_reader_learns(page):
    if page == "README.md":
        return
    lines = PAGES[page].splitlines()
    assert lines[0].startswith("# ")
    assert lines[2].startswith("You will learn")
