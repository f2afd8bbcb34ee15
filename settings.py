"""The settings of a command: read, held against their bounds, and listed by --help.

A setting stands once, in the dataclass of its section: its name, its type with the bounds, its
default, and beside it what it means:

    lr: PositiveFloat = 3e-4     # peak learning rate

A command is `python SCRIPT.py CONFIG.py --section.key=value`. A config is plain Python with one
dict a section. What is wrong is a UserError: one line with the setting, its value and its bounds.

Scripts import this module first, because it answers --help and most mistakes within a second,
before torch is loaded: see answer_early().
"""
import argparse
import ast
import builtins
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import math
import os
import re
import shlex
import sys
import textwrap
import tokenize
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Annotated, Any, Literal

import untrusted

ROOT = Path(__file__).resolve().parent


class UserError(Exception):
    """An error that the user can mend: printed as one line, exit code 2."""


# --------------------------------------------------------------------------------------------------
# Types that say their bounds; beside them bool, str, list[…], dict[str, …], Literal[…], … | None

LARGEST = 10**15  # of any number, so that sums and products of settings stay within 64 bits


@dataclass(frozen=True)
class Bounds:
    """Of a number. All numbers are finite, and none is beyond ±LARGEST."""
    least: float = -LARGEST
    most: float = LARGEST
    above: float = -math.inf
    below: float = math.inf

    def allow(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        has_least, has_most = self.least > -LARGEST, self.most < LARGEST
        if has_least and has_most:
            return f"from {self.least:,} to {self.most:,}"
        words = []
        if has_least:
            words.append(f"of at least {self.least:,}")
        if self.above > -math.inf:
            words.append(f"above {self.above:,}")
        if self.below < math.inf:
            words.append(f"below {self.below:,}")
        if has_most:
            words.append(f"up to {self.most:,}")
        return " and ".join(words)


@dataclass(frozen=True)
class Length:
    """Of a list: how many it holds."""
    least: int
    most: int | None = None

    def allow(self, value: list) -> bool:
        return self.least <= len(value) <= (self.most or len(value))

    def __str__(self) -> str:
        return f"of {self.least}" if self.least == self.most else f"of at least {self.least}"


PositiveInt = Annotated[int, Bounds(least=1)]
NonNegativeInt = Annotated[int, Bounds(least=0)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NonNegativeFloat = Annotated[float, Bounds(least=0)]
Fraction = Annotated[float, Bounds(least=0, most=1)]
FractionBelow1 = Annotated[float, Bounds(least=0, below=1)]
Count = Annotated[int, Bounds(least=1, most=10**6)]  # what is held in memory or made one by one
CountOr0 = Annotated[int, Bounds(least=0, most=10**6)]
Minutes = Annotated[float, Bounds(above=0, most=1e6)]
Seed = Annotated[int, Bounds(least=0, most=2**32 - 1)]
TopP = Annotated[float, Bounds(above=0, most=1)]
StartAndEnd = Annotated[list[NonNegativeFloat], Length(2, 2)]  # shares of the peak rate
Curve = Literal["linear", "1-sqrt", "cosine", "exponential"]   # of the rate, from start to end
Sources = list[dict[str, Any]]                                 # see data/text/sources.py


def read_value(name: str, value, hint):
    """The value as its type wants it, 5 for 5.0 and back; else UserError with the bounds."""
    kind, limits = split_hint(hint)
    if NoneType in typing.get_args(kind):
        if value is None:
            return None
        kind, limits = split_hint(without_none(kind))
    inner, origin = typing.get_args(kind), typing.get_origin(kind) or kind
    if is_section(kind) and isinstance(value, dict):
        return from_dict(kind, value, name)
    read = as_number(value, origin) if origin in (int, float) else value
    if not allows(origin, inner, limits, read):
        note = ""
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            note = f" (no number may be beyond {LARGEST:.0e})"
        raise UserError(f"{name} must be {describe(hint)}{note}, not {shorten(value)}")
    if origin is list:
        return [read_value(f"{name}[{i}]", item, inner[0]) for i, item in enumerate(value)]
    if origin is dict:
        return {key: read_value(f"{name}[{key!r}]", item, inner[1]) for key, item in value.items()}
    return read


def allows(origin, inner: tuple, limits: Bounds | Length | None, value) -> bool:
    """Whether a value is of a type and within its limits; what a list or dict holds is not seen.

    origin, inner: list and (str,) of list[str].
    """
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (int, float):
        return value is not None and (limits or Bounds()).allow(value)
    if origin is list:
        return isinstance(value, (list, tuple)) and (limits is None or limits.allow(value))
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return origin is Any or type(value) is origin and "\0" not in str(value)


def split_hint(hint) -> tuple:
    """(type, Bounds or Length or None)."""
    kind, limits = hint, None
    if typing.get_origin(hint) is Annotated:
        kind, limits = typing.get_args(hint)[:2]
    return {list: list[Any], dict: dict[str, Any]}.get(kind, kind), limits


def without_none(kind):
    return next(each for each in typing.get_args(kind) if each is not NoneType)


def as_number(value, kind: type) -> float | None:
    """The int or float that a value stands for; None for none. 10e9 tokens is an int."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if kind is int:
        return int(value) if isinstance(value, int) or value.is_integer() else None
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 308 digits
        return None


def describe(hint) -> str:
    """What values a type allows, in words: "a number above 0"."""
    kind, limits = split_hint(hint)
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if NoneType in inner:
        return f"{describe(without_none(kind))}, or None"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner)) if len(inner) > 1 else repr(*inner)
    if is_section(kind):
        return f"a dict of {kind.__name__}'s settings"
    words = WORDS[origin]
    if limits is not None and str(limits):
        words += f" {limits}"
    if origin in (list, dict) and inner[-1] is not Any:
        words += f", each {'name with ' if origin is dict else ''}{describe(inner[-1])}"
    return words


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
         list: "a list", dict: "a dict", Any: "a value"}


def shorten(value) -> str:
    """A value as Python writes it, cut and printable."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = "a number with thousands of digits"
    return text if len(text) <= 80 else text[:77] + "…"


# --------------------------------------------------------------------------------------------------
# A section, from a dict

def is_section(kind) -> bool:
    return dataclasses.is_dataclass(kind) or isinstance(kind, SourceClass)


def from_dict(cls, values: dict, where: str):
    """The dataclass cls from a dict; UserError names the nearest key, or the setting's bounds.

    where: what a setting's name begins with in messages, "pretrain" or "pretrain.stages[2]".
    """
    if isinstance(cls, SourceClass):
        settings = cls.settings()
        hints = {name: setting.hint for name, setting in settings.items()}
        required = [name for name, setting in settings.items() if setting.default is None]
    else:
        hints = typing.get_type_hints(cls, include_extras=True)
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING
                    and f.default_factory is dataclasses.MISSING]
    read = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), hints)}")
        read[key] = read_value(f"{where}.{key}", value, hints[key])
    for name in required:
        if name not in read:
            raise UserError(f"{where}.{name} is missing: it must be {describe(hints[name])}")
    try:
        return cls(**read)
    except ValueError as error:  # what a dataclass's own __post_init__ refuses
        raise UserError(f"{where}: {error}") from error


def nearest(name: str, names) -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


# --------------------------------------------------------------------------------------------------
# The command: a config, and what stands behind it

SECTIONS = (
    "model", "tokenizer", "quality", "corpus", "synthesize", "transcripts", "pretrain", "refine",
    "sft", "distill", "reward", "rl", "evaluate",
)
OPTIONS = {
    "run": "name of the folder under out/ (default: the config's name); under torchrun: --name",
    "init_from": "checkpoint to start from: a phase of this run, or any checkpoint's folder",
    "scale": "shortens (or lengthens) every stage alike: --scale=0.1",
    "engine": "who works on data: processes of this machine, or ray (RAY_ADDRESS: its cluster)",
    "track": "who gets the metrics too, some of tensorboard, wandb, trackio: --track=wandb,trackio",
}
OPTION_TYPES = {"run": str, "init_from": str, "scale": PositiveFloat, "track": str,
                "engine": Literal["processes", "ray"]}
TRACKERS = ("tensorboard", "wandb", "trackio")


def load_config(
    doc: str, argv: list[str] | None = None, flags: dict[str, str] = {},
    options: tuple[str, ...] = ("run", "init_from", "scale", "track"), **sections
) -> SimpleNamespace:
    """Reads `CONFIG --section.key=value …` and returns a namespace with one dataclass a section.

    sections: name -> dataclass, the sections that this script uses. flags: name -> help of the
    script's own switches. options: those of OPTIONS that it takes. The result also holds path (of
    the config), run, out (Path), init_from, scale, command. Raises UserError for a missing file, an
    unknown section, key, option, or a value out of its bounds.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(format_help(doc, flags, options, sections))
        sys.exit(0 if argv else 2)
    path = Path(argv[0])
    if argv[0].startswith("-") or not path.is_file():
        raise UserError(
            f"no config file {path}; the first argument is a config, for example configs/tiny.py"
        )
    raw = read_config_file(path)
    given = {"run": path.stem, "init_from": "", "scale": 1.0, "track": [],
             "engine": "processes"}
    given |= dict.fromkeys(flags, False)
    for argument in argv[1:]:
        section, key, text = parse_argument(argument)
        if section:
            if section not in raw:
                suggestion = nearest(section, SECTIONS)
                raise UserError(f"unknown section {section!r} in {argument!r}{suggestion}")
            if section in sections:  # another script's setting may stand in the command
                raw[section][key] = parse_text(text, hint_of(sections[section], key))
        else:
            name, value = read_option(argument, key, text, flags, options, sections)
            given[name] = value
    cfg = SimpleNamespace(path=str(path), out=Path("out") / given["run"], **given)
    cfg.command = untrusted.mask_secrets(shlex.join([Path(sys.argv[0]).name, *argv]))
    for name, cls in sections.items():
        setattr(cfg, name, from_dict(cls, raw[name], name))
    return cfg


def read_option(argument: str, key: str, text: str, flags: dict, options: tuple, sections: dict):
    """(name, value) of --option=value, or of a switch: --switch, --switch=true, --switch=false."""
    name = "run" if key == "name" else key.replace("-", "_")  # torchrun has a --run of its own
    if name in flags:
        is_plain = argument == f"--{key}"
        return name, read_value(f"--{name}", True if is_plain else parse_text(text, bool), bool)
    if name not in options:
        if name in OPTIONS:
            raise UserError(f"{script_name()} takes no --{name}")
        owners = [section for section, cls in sections.items() if hint_of(cls, key)]
        suggestion = nearest(key, [*options, *flags, *sections])
        if owners:
            settings = " or ".join(f"--{owner}.{key}" for owner in owners)
            suggestion = f"; did you mean {settings}?"
        raise UserError(f"unknown option {argument!r}{suggestion}")
    value = read_value(f"--{name}", parse_text(text, OPTION_TYPES[name]), OPTION_TYPES[name])
    if name == "run" and (not value.strip("./") or value.startswith("/") or ".." in value):
        raise UserError(f"--run must be the name of a folder under out/, not {value!r}")
    return name, tracker_names(value) if name == "track" else value


def tracker_names(text: str) -> list[str]:
    """The trackers of --track=one,another."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track: unknown tracker {name!r}{nearest(name, TRACKERS)}")
    return list(dict.fromkeys(names))


def script_name() -> str:
    """The running command as it is typed: pretrain.py, or -m data.text.corpus."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"-m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


def sections_of(path: str) -> set[str]:
    """Names of the sections that a config file has."""
    return {name for name, values in read_config_file(Path(path)).items() if values}


def parse_argument(argument: str) -> tuple[str, str, str]:
    """(section, key, value's text) of --section.key=value; the section of --option=value is ""."""
    if not argument.startswith("--"):
        raise UserError(
            f"argument {argument!r} is not understood; settings are written --section.key=value"
        )
    name, _, text = argument.removeprefix("--").partition("=")
    section, dot, key = name.partition(".")
    return (section, key, text) if dot else ("", name, text)


def parse_text(text: str, hint) -> object:
    """The value of a command-line text: a Python literal, true or false, else the text itself."""
    kind, _ = split_hint(hint)
    if kind is str or typing.get_origin(kind) is Literal:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def hint_of(cls, key: str):
    """The type of a setting; None where there is no such setting."""
    if isinstance(cls, SourceClass):
        setting = cls.settings().get(key)
        return setting.hint if setting else None
    return typing.get_type_hints(cls, include_extras=True).get(key)


def read_config_file(path: Path) -> dict[str, dict]:
    """Imports a config file; each public dict in it must be a known section."""
    spec = importlib.util.spec_from_file_location("config_" + path.stem, path)
    if spec is None:
        raise UserError(f"{path} is no config: it must be a Python file, NAME.py")
    module = importlib.util.module_from_spec(spec)
    if str(Path.cwd()) not in sys.path:  # so that `from configs.tiny import *` works
        sys.path.insert(0, str(Path.cwd()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} is not a valid config: {type(error).__name__}: {error}") from error
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    for name, value in public.items():
        if isinstance(value, dict) and name not in SECTIONS:
            raise UserError(f"{path}: unknown section {name!r}{nearest(name, SECTIONS)}")
        if name in SECTIONS and not isinstance(value, dict):
            raise UserError(f"{path}: section {name!r} must be a dict, not {shorten(value)}")
    return {name: dict(public.get(name, {})) for name in SECTIONS}


# --------------------------------------------------------------------------------------------------
# Settings as they stand in the source: for --help, and for a look before anything is imported

@dataclass(frozen=True)
class Setting:
    hint: object
    default: str | None  # as it is written; None: the setting must be given
    meaning: str


@dataclass(frozen=True)
class SourceClass:
    """A dataclass of settings, read from its file and not imported."""
    path: Path
    node: ast.ClassDef = dataclasses.field(compare=False)

    def __call__(self, **values) -> dict:
        """In place of the instance that the real class would make."""
        return values

    @property
    def __name__(self) -> str:
        return self.node.name

    def settings(self) -> dict[str, Setting]:
        """By name, those of its bases first."""
        found = {}
        for base in self.node.bases:
            cls = find_class(self.path, base)
            found |= cls.settings() if cls else {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for node in self.node.body:
            if isinstance(node, ast.AnnAssign):
                hint = eval(ast.unparse(node.annotation), {}, _Names(self.path))
                default = written_default(node.value) if node.value else None
                found[node.target.id] = Setting(hint, default, meaning_at(lines, node))
        return found


class _Names(dict):
    """What the names in a piece of a file's code mean: types of this module, classes of ours, and
    modules of ours, of which only constants are read."""

    def __init__(self, path: Path):
        super().__init__(vars(builtins) | globals())
        self.path = path

    def __missing__(self, name: str):
        cls = find_class(self.path, ast.Name(name))
        file = file_of_import(parse_file(self.path), name)
        if cls or file:
            return cls or _Constants(file)
        raise KeyError(name)


class _Constants:
    """The constants of a file as attributes."""

    def __init__(self, path: Path):
        self.path = path

    def __getattr__(self, name: str):
        for statement in parse_file(self.path).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
                return ast.literal_eval(statement.value)
        raise AttributeError(name)


@functools.cache
def parse_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def find_class(path: Path, node: ast.expr) -> SourceClass | None:
    """The class that `Name` or `module.Name` in a file means, here or where it is imported from."""
    tree = parse_file(path)
    if isinstance(node, ast.Attribute):
        file = file_of_import(tree, node.value.id)
        return find_class(file, ast.Name(node.attr)) if file else None
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == node.id:
            return SourceClass(path, statement)
    file = file_of_import(tree, node.id)
    return find_class(file, node) if file else None


def file_of_import(tree: ast.Module, name: str) -> Path | None:
    """Our file that a name comes from, or is; None for others' modules."""
    for statement in ast.walk(tree):
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        if name in [alias.asname or alias.name for alias in statement.names]:
            module = statement.module if isinstance(statement, ast.ImportFrom) else name
            for dotted in (f"{module}.{name}", module):
                file = ROOT / (dotted.replace(".", "/") + ".py")
                if file.is_file():
                    return file
    return None


def written_default(node: ast.expr) -> str:
    """A default as the user would write it: [] for field(default_factory=list)."""
    if not isinstance(node, ast.Call):
        return ast.unparse(node)
    factory = next((word.value for word in node.keywords if word.arg == "default_factory"), None)
    if isinstance(factory, ast.Lambda):
        try:
            return repr(ast.literal_eval(factory.body))
        except ValueError:
            return "…"  # the meaning says it
    return {"dict": "{}", "list": "[]"}.get(ast.unparse(factory), "…")


def meaning_at(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment beside a setting, which may go on in the lines below; or that above it."""
    meaning = [comment_of(lines[node.end_lineno - 1])]
    for line in lines[node.end_lineno:]:
        if not re.match(r" {9,}# ", line):
            break
        meaning.append(comment_of(line))
    text = " ".join(meaning).strip()
    above = lines[node.lineno - 2].strip()
    return text or (above.removeprefix("# ") if above.startswith("# ") else "")


def comment_of(line: str) -> str:
    """The comment at a line's end, without its sign; "" for none."""
    try:
        for token in tokenize.generate_tokens(iter([line.strip() + "\n"]).__next__):
            if token.type == tokenize.COMMENT:
                return token.string.removeprefix("#").strip()
    except (tokenize.TokenError, IndentationError):  # the end of a statement of several lines
        pass
    return line.rpartition("# ")[2] if "# " in line else ""


def source_class(cls) -> SourceClass:
    """The source of a dataclass."""
    if isinstance(cls, SourceClass):
        return cls
    return find_class(Path(inspect.getfile(cls)), ast.Name(cls.__name__))


def format_help(doc: str, flags: dict, options: tuple, sections: dict) -> str:
    """What the command does, and each setting with default, meaning and bounds."""
    lines = [doc.strip(), "", f"Usage: python {script_name()} CONFIG [--section.key=value …]", ""]
    for name, text in [(name, OPTIONS[name]) for name in options] + [*flags.items()]:
        lines += setting_lines(f"--{name}", text)
    for section, cls in sections.items():
        lines += ["", f"{section}:"]
        for name, setting in source_class(cls).settings().items():
            head = f"--{section}.{name}"
            head += " (must be given)" if setting.default is None else f"={setting.default}"
            lines += setting_lines(head, f"{setting.meaning} [{describe(setting.hint)}]")
            lines += nested_lines(setting.hint)
    return "\n".join(lines)


def setting_lines(head: str, text: str) -> list[str]:
    """A setting and, below it, what it means."""
    return [f"  {head}", *textwrap.wrap(text.strip(), 92, initial_indent=" " * 8,
                                        subsequent_indent=" " * 8)]


def nested_lines(hint) -> list[str]:
    """The settings of each entry of a list[StageConfig]."""
    kind, _ = split_hint(hint)
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is not list or not inner or not is_section(inner[0]):
        return []
    lines = []
    for name, setting in source_class(inner[0]).settings().items():
        default = "" if setting.default is None else f"={setting.default}"
        meaning = f"{name}{default}: {setting.meaning} [{describe(setting.hint)}]"
        lines += textwrap.wrap(meaning, 92, initial_indent=" " * 8, subsequent_indent=" " * 12)
    return lines


def answer_early() -> None:
    """Answers --help and what is wrong in the command line of the script that is starting.

    torch takes seconds to load, and a reader of --help should not wait for it. So the call of
    load_config() in the script's main() is read as text, with the classes that it names; or the
    function read_options() of a script that has options and no config is run by itself.
    """
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "/")
    if ROOT not in path.resolve().parents or not path.is_file():  # or `python - < file`
        return
    if sys.argv[1:2] == ["--compare"]:  # python -m report: of runs, so without a config
        return
    arguments = arguments_of_load_config(path.resolve())
    try:
        if arguments is not None:
            load_config(**arguments)
            say_ignored(arguments)
        else:
            run_read_options(path.resolve())
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {untrusted.mask_secrets(str(error))}", file=sys.stderr)
        sys.exit(2)


def arguments_of_load_config(path: Path) -> dict | None:
    """What a script's main() calls load_config() with, each class as a SourceClass; None where it
    does not call it, or not with words that can be read."""
    tree = parse_file(path)
    main = next((node for node in tree.body
                 if isinstance(node, ast.FunctionDef) and node.name == "main"), None)
    call, local = None, {}  # and the names that main() gives values to
    for node in ast.walk(main) if main else ():
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_config":
            call = node
        elif isinstance(node, ast.Assign):
            local[ast.unparse(node.targets[0])] = node.value
    if call is None or not all(word.arg for word in call.keywords):
        return None
    arguments = {"doc": ast.get_docstring(tree)}
    for word in call.keywords:
        code = ast.unparse(local.get(ast.unparse(word.value), word.value))
        if word.arg in ("flags", "options"):
            try:
                arguments[word.arg] = eval(code, {}, _Names(path))
            except (NameError, AttributeError, ValueError):
                return None
        else:
            arguments[word.arg] = find_class(path, word.value)
    return arguments


def say_ignored(sections: dict) -> None:
    """Names the settings of the command that are another script's."""
    for argument in sys.argv[2:]:
        section, _, _ = parse_argument(argument)
        if section and section not in sections and os.environ.get("RANK", "0") == "0":
            print(f"note: {argument} has no effect in {script_name()}", file=sys.stderr)


def run_read_options(path: Path) -> None:
    """Runs the function read_options() of a script, if any: argparse answers what it has to."""
    tree = parse_file(path)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "read_options" and not node.args.args:
            names = globals() | {"argparse": argparse, "__doc__": ast.get_docstring(tree)}
            exec(ast.unparse(node), names)
            names["read_options"]()


def option(hint) -> Callable[[str], object]:
    """The `type` of an argparse option whose values this type allows."""
    def read(text: str):
        try:
            return read_value("it", parse_text(text, hint), hint)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


answer_early()
