"""What is wrong is one line with the setting, its value and its bounds; --help and mistakes are
answered before torch is loaded, from the same settings that the classes have."""
import settings
from settings import (
    Any,
    Bounds,
    Count,
    Curve,
    PositiveFloat,
    PositiveInt,
    StartAndEnd,
    UserError,
    load_config,
)

import ast
import importlib
import math
import resource
import subprocess
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from checks import plain
from conftest import ROOT


@dataclass
class Stage:
    lr: StartAndEnd
    curve: Curve = "linear"


@dataclass
class Settings:
    lr: PositiveFloat = 1e-3  # learning rate
    steps: PositiveInt = 10   # how many,
                              # for all
    rows: Count = 1
    beta: Annotated[float, Bounds(least=0, below=1)] = 0.9
    name: str = "x"  # a text
    kind: Literal["", "one"] = ""
    compile: bool = False
    theta: float | None = None  # optional
    texts: list[str] = field(default_factory=list)
    weights: dict[str, PositiveFloat] = field(default_factory=lambda: {"a": 1})
    values: list[Any] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)  # a list


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("_helper = dict(a=1)\npretrain = dict(lr=1, steps=5e3)\n")
    return str(path)


def load(*argv):
    return load_config("doc", list(argv), flags={"plan": "a switch"}, pretrain=Settings)


def test_values_and_types(config):
    cfg = load(
        config,
        "--pretrain.theta=4e4",
        "--pretrain.values=[1, 2.5, None]",
        "--pretrain.stages=[{'lr': (0, 1)}]",
        "--pretrain.compile=TRUE",
        "--run=r",
        "--plan",
        "--scale=0.1",
        "--pretrain.name=12",
        "--model.n_layers=3",
    )
    p = cfg.pretrain
    assert (p.lr, p.steps, p.theta, p.values, p.name) == (1.0, 5000, 4e4, [1, 2.5, None], "12")
    assert isinstance(p.lr, float) and isinstance(p.steps, int) and p.compile is True
    assert p.stages == [Stage([0.0, 1.0])]
    assert cfg.plan and cfg.scale == 0.1 and str(cfg.out) == "out/r"
    assert load(config, "--pretrain.theta=None").pretrain.theta is None
    assert load(config, "--plan=false").plan is False


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--pretrain.lrr=1", "pretrain: unknown key 'lrr'; did you mean 'lr'?"),
        ("--pretrian.lr=1", "unknown section 'pretrian' in '--pretrian.lr=1'; "
                            "did you mean 'pretrain'?"),
        ("--lr=1", "unknown option '--lr=1'; did you mean --pretrain.lr?"),
        ("--rnu=x", "unknown option '--rnu=x'; did you mean 'run'?"),
        ("run=x", "argument 'run=x' is not understood; settings are written --section.key=value"),
        ("--run=../x", "--run must be the name of a folder under out/, not '../x'"),
        ("--scale=0", "--scale must be a number above 0, not 0"),
        ("--plan=maybe", "--plan must be true or false, not 'maybe'"),
        ("--pretrain.steps=1.5", "pretrain.steps must be a whole number of at least 1, not 1.5"),
        ("--pretrain.steps=1e30", "pretrain.steps must be a whole number of at least 1 (no number "
                                  "may be beyond 1e+15), not 1e+30"),
        ("--pretrain.steps=True", "pretrain.steps must be a whole number of at least 1, not True"),
        ("--pretrain.rows=0", "pretrain.rows must be a whole number from 1 to 1,000,000, not 0"),
        ("--pretrain.lr=fast", "pretrain.lr must be a number above 0, not 'fast'"),
        ("--pretrain.lr=nan", "pretrain.lr must be a number above 0, not 'nan'"),
        ("--pretrain.lr=", "pretrain.lr must be a number above 0, not ''"),
        ("--pretrain.lr=None", "pretrain.lr must be a number above 0, not None"),
        ("--pretrain.beta=1", "pretrain.beta must be a number of at least 0 and below 1, not 1"),
        ("--pretrain.theta=x", "pretrain.theta must be a number, or None, not 'x'"),
        ("--pretrain.kind=two", "pretrain.kind must be one of '', 'one', not 'two'"),
        ("--pretrain.compile=1", "pretrain.compile must be true or false, not 1"),
        ("--pretrain.texts=[1]", "pretrain.texts[0] must be a text, not 1"),
        ("--pretrain.texts=x", "pretrain.texts must be a list, each a text, not 'x'"),
        ("--pretrain.weights={'b': 0}", "pretrain.weights['b'] must be a number above 0, not 0"),
        ("--pretrain.stages=[{'lr': [1]}]",
         "pretrain.stages[0].lr must be a list of 2, each a number of at least 0, not [1]"),
        ("--pretrain.stages=[{}]",
         "pretrain.stages[0].lr is missing: it must be a list of 2, each a number of at least 0"),
    ],
)
def test_what_is_wrong_is_named(config, argument, message):
    with pytest.raises(UserError) as error:
        load(config, argument)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**16), 1e300])
@pytest.mark.parametrize("name", ["lr", "theta", "beta", "rows", "steps"])
def test_numbers_are_finite(value, name):
    with pytest.raises(UserError, match=f"^pretrain.{name} must be a (whole )?number"):
        settings.from_dict(Settings, {name: value}, "pretrain")


def test_config_file_errors(tmp_path):
    with pytest.raises(UserError, match="no config file"):
        load(str(tmp_path / "none.py"))
    for text, message in (
        ("pretain = dict()", "unknown section 'pretain'; did you mean 'pretrain'"),
        ("pretrain = 3", "section 'pretrain' must be a dict, not 3"),
        ("x = 1 +", "not a valid config: SyntaxError"),
    ):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / "bad.py"))


def test_help_lists_every_setting(config, capsys):
    with pytest.raises(SystemExit):
        load("--help")
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        "--pretrain.lr=0.001 learning rate [a number above 0]",
        "--pretrain.steps=10 how many, for all [a whole number of at least 1]",
        "--pretrain.weights={'a': 1} [a dict, each name with a number above 0]",
        "--pretrain.theta=None optional [a number, or None]",
        "lr: [a list of 2, each a number of at least 0]",
        "--plan a switch", "--run",
    ):
        assert expected in text


# --------------------------------------------------------------------------------------------------
# Before torch is loaded

SCRIPTS = [
    "pretrain", "refine", "sft", "distill", "reward", "rl", "evaluate", "data.text.corpus",
    "data.sets.synthesize", "data.verify.transcripts", "data.filter.quality", "report.__main__",
    "checks.sizes", "checks.verifier",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_source_says_what_the_classes_have(script):
    """Names, types, and which must be given; so --help and early errors are the real ones."""
    path = ROOT / (script.replace(".", "/") + ".py")
    arguments = settings.arguments_of_load_config(path)
    module = importlib.import_module(script)
    n_sections = 0
    for name, section in arguments.items():
        if not isinstance(section, settings.SourceClass):
            continue
        owner = importlib.import_module(
            str(section.path.relative_to(ROOT).with_suffix("")).replace("/", "."))
        cls = getattr(owner, section.node.name)
        found, hints = section.settings(), typing.get_type_hints(cls, include_extras=True)
        assert found.keys() == hints.keys()
        for key, hint in hints.items():
            assert settings.describe(found[key].hint) == settings.describe(hint), key
        n_sections += 1
    assert n_sections and arguments["doc"] == module.__doc__.strip()


def test_help_and_mistakes_need_no_torch():
    """A second of CPU at most: torch alone takes more."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for argument, code in (("--help", 0), ("--pretrain.lr=-1", 2)):
        command = [sys.executable, "-X", "importtime", ROOT / "pretrain.py",
                   ROOT / "configs/tiny.py", argument]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == code and "torch" not in result.stderr
    assert "pretrain.lr must be a number above 0, not -1" in result.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_every_command_reads_its_settings_first():
    """Whoever calls load_config() imports settings before anything else."""
    for script in SCRIPTS:
        path = ROOT / Path(script.replace(".", "/") + ".py")
        first = ast.parse(path.read_text()).body[1]
        assert isinstance(first, ast.ImportFrom) and first.module == "settings", path


@pytest.mark.parametrize("options, message", [
    (["x", "--top_p=0"], "argument --top_p: it must be a number above 0 and up to 1, not 0"),
    (["x", "--temperature=-1"], "--temperature: it must be a number of at least 0, not -1"),
    (["x", "--max_new_tokens=-5"], "it must be a whole number from 1 to 1,000,000, not -5"),
    ([], "the following arguments are required: checkpoint"),
])
def test_options_without_a_config(options, message, monkeypatch, capsys):
    """Of generate.py, by the function that is run before torch is loaded."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *options])
    with pytest.raises(SystemExit, match="2"):
        settings.run_read_options(ROOT / "generate.py")
    assert message in capsys.readouterr().err


def test_read_options_needs_nothing_of_its_script(monkeypatch, capsys):
    """It is run by itself; one that names what its script imports would end the command at once."""
    scripts = []
    for path in plain.code_files("*.py", "checks/*.py", "data/**/*.py", "experiments/*.py"):
        if "\ndef read_options()" in path.read_text():
            scripts.append(path)
    assert len(scripts) >= 3
    for path in scripts:
        monkeypatch.setattr(sys, "argv", [path.name, "--help"])
        with pytest.raises(SystemExit, match="0"):
            settings.run_read_options(path)
        assert capsys.readouterr().out.startswith("usage:"), path
