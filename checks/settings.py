"""Puts wrong and extreme values into every setting: each runs, or is refused in one line.

    python -m checks.settings                    # all sections and options: an hour on one core
    python -m checks.settings --only=pretrain    # those of one command

Every value of VALUES goes into every setting of every section of every command, into every setting
of the stages, and into every option. What settings.py refuses must name the setting and its bounds.
All else is tried: the command on the miniature of checks.mini_phases, until it has done three steps
or has ended, with no traceback and in minutes. A weight, a rate or a fraction (a setting that is
no whole number) that changes nothing in these steps must be in NOT_IN_STEPS, or the command must
say that it has no effect.
"""
from settings import (
    LARGEST,
    SourceClass,
    UserError,
    arguments_of_load_config,
    describe,
    load_config,
    parse_text,
    read_config_file,
    split_hint,
    without_none,
)

import argparse
import importlib
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

import common
from checks import mini_phases, mini_rl
from checks.mini import ROOT, Mini
from data.tasks import registry
from data.tasks.problem import to_document

VALUES = ("0", "-1", "1", "nan", "inf", "", "abc", "1e30", str(LARGEST), "[]", "[1]", "{}",
          "None", "true")
TEXTS = ("", "abc", "0")  # of settings that are texts: any is one
SECONDS = 600.0  # that a try may take: compiling takes minutes where a machine is busy
STEPS = 3
COMMANDS = {  # whose sections are tried by it
    "pretrain": ("model", "pretrain"),
    "sft": ("sft",),
    "distill": ("distill",),
    "reward": ("reward",),
    "rl": ("rl",),
    "evaluate": ("evaluate",),
    "data.text.corpus": ("tokenizer", "corpus"),
    "refine": ("refine",),
    "data.sets.synthesize": ("synthesize",),
    "data.verify.transcripts": ("transcripts",),
    "data.filter.quality": ("quality",),
}
CONFIGS = {  # the file of each; the others' is phases.py, of checks.mini_phases
    "data.text.corpus": "mini.py",
    "refine": "others.py",
    "data.sets.synthesize": "others.py",
    "data.verify.transcripts": "others.py",
    "data.filter.quality": "others.py",
}
OTHERS = """
from mini import *
refine = dict(
    models=dict(base=dict(checkpoint="out/base/pretrain", prompt_format="document",
                          max_new_tokens=4, temperature=1.0, max_rows=16)),
    drafters=["base"], n_drafts=1, checklist="base", evaluators=["base"], revisers=["base"],
    rounds=1, retries=0, completer="base", chain_attempts=1, batch_size=8,
    instructions=dict(math=dict(problems=2, family="math", seed=1)))
synthesize = dict(n=8, functions=[dict(stdlib=1)])
transcripts = dict(n=8)
quality = dict(sources=[dict(pages=40, families=dict(math=1), seed=1)], labels="labels.jsonl",
               workers=1)
"""
NOT_IN_STEPS = {  # what they decide is not what three steps compute
    "save_minutes", "timeout_minutes", "min_positive_score", "gap", "temperature", "top_p",
    "val_fraction", "megabytes", "train_mb", "norm_eps", "keep_between",
}


def settings_of(script: str) -> Iterator[tuple[str, object]]:
    """(name as it is written behind --, type) of what is tried with a script."""
    arguments = arguments_of_load_config(ROOT / (script.replace(".", "/") + ".py"))
    for section in COMMANDS[script]:
        settings = arguments[section].settings()
        for name, setting in settings.items():
            yield f"{section}.{name}", setting.hint
        if "stages" in settings:
            (stage,) = typing.get_args(split_hint(settings["stages"].hint)[0])
            for name, setting in stage.settings().items():
                yield f"{section}.stages[0].{name}", setting.hint
    options = arguments.get("options", ("run", "init_from", "scale", "track"))
    for name in (*options, *arguments.get("flags", {})):
        yield name, str


def read(folder: Path, script: str, *options: str):
    """The config that a script would read; UserError where it refuses an option."""
    arguments = arguments_of_load_config(ROOT / (script.replace(".", "/") + ".py"))
    config = CONFIGS.get(script, "phases.py")
    for name, section in arguments.items():
        if isinstance(section, SourceClass):
            arguments[name] = real_class(section)
    return load_config(argv=[str(folder / config), *options], **arguments)


def real_class(section: SourceClass) -> type:
    """The class itself, which knows its defaults."""
    module = str(section.path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    return getattr(importlib.import_module(module), section.node.name)


def value_of(config, name: str):
    """A setting's value in a config."""
    *owners, key = name.replace("[0]", ".0").split(".")
    for owner in owners:
        config = config[0] if owner == "0" else getattr(config, owner)
    return getattr(config, key)


def option_for(folder: Path, name: str, hint, value: str) -> str:
    """The option that gives a setting a value; one of the first stage comes with all stages."""
    section, is_of_stage, key = name.partition(".stages[0].")
    if not is_of_stage:
        return f"--{name}={value}"
    first, *others = read_config_file(folder / "phases.py")[section]["stages"]
    stages = [first | {key: parse_text(value, hint)}, *others]
    return f"--{section}.stages={stages!r}"


class Tries:
    """The folder of a miniature run, and commands tried in it."""

    def __init__(self, folder: Path):
        self.mini, self.n = Mini(folder), 0
        mini_phases.prepare(self.mini)
        (folder / "others.py").write_text(OTHERS)
        labels = ""
        for i, problem in enumerate(registry.family("math").problems("train", 80, 2)):
            label = {"text": to_document(problem), "tags": {"overall": i % 10}}
            labels += json.dumps(label) + "\n"
        (folder / "labels.jsonl").write_text(labels)
        if (folder / "out/base").exists():
            return
        self.mini.prepare("--corpus.folder=data")
        self.mini.run(str(ROOT / "pretrain.py"), "mini.py", "--run=base", "--corpus.folder=data",
                      "--evaluate.tasks=[]")

    def command(self, script: str, run: str) -> list[str]:
        if script in mini_phases.PHASES:
            return [*mini_phases.command(script, run), f"--{script}.log_every=1",
                    f"--{script}.grad_clip=0.1", f"--{script}.prompts=[]", "--evaluate.tasks=[]"]
        if script == "evaluate":
            return ["evaluate.py", "phases.py", f"--run={run}",
                    "--evaluate.checkpoint=out/base/pretrain"]
        return [script, CONFIGS[script], f"--run={run}"]

    def run(self, script: str, *options: str) -> tuple[str, list[dict]]:
        """(what it printed, its first steps); the output begins with FAULT where there is one."""
        self.n += 1
        run = f"try{self.n}"
        printed = self.mini.folder / f"{run}.log"
        process = multiprocessing.Process(
            target=self.call, args=(script, printed, [*self.command(script, run), *options]))
        process.start()
        folder = self.mini.folder / "out" / run / script
        started, is_told = time.time(), False
        while process.is_alive():
            if not is_told and len(common.read_metrics(folder)) >= STEPS:
                process.terminate()
                is_told = True
            if time.time() - started > SECONDS:
                process.kill()
                return f"FAULT: nothing for {SECONDS:.0f} s", []
            process.join(0.02)
        output = printed.read_text(errors="replace")
        lines = common.read_metrics(folder)[:STEPS]
        shutil.rmtree(folder.parent, ignore_errors=True)
        if "Traceback" in output or process.exitcode not in (0, 2, 128 + signal.SIGTERM):
            return f"FAULT: exit code {process.exitcode}\n{output[-2000:]}", lines
        return output, lines

    def call(self, script: str, printed: Path, command: list[str]) -> None:
        """In a process forked from this one, which has loaded all modules: the command."""
        sys.stdout = sys.stderr = open(printed, "w", buffering=1)
        mini_rl.toy(setattr)
        self.mini.call(importlib.import_module(script).main, *command)


def outcome(lines: list[dict]) -> list:
    """What the steps computed."""
    timed = ("seconds", "tokens_per_s", "memory_gb", "rollout_s", "scoring_s", "update_s")
    return [(key, value) for line in lines for key, value in line.items() if key not in timed]


def is_real(hint) -> bool:
    """Whether a setting is a number that need not be whole: a weight, a rate, a fraction."""
    kind, _ = split_hint(hint)
    if NoneType in typing.get_args(kind):
        kind, _ = split_hint(without_none(kind))
    return kind is float


def judge(tries: Tries, script: str, name: str, hint, value: str, usual: list) -> tuple[str, str]:
    """(verdict, why): "refused", "runs", "says" (it ended with a line), or a fault."""
    folder, short = tries.mini.folder, name.rpartition(".")[2]
    try:
        config = read(folder, script, option_for(folder, name, hint, value))
    except UserError as error:
        return "refused" if short in str(error) else "UNNAMED", str(error)
    is_usual = value_of(config, name) == value_of(read(folder, script), name)
    output, lines = tries.run(script, option_for(folder, name, hint, value))
    if output.startswith("FAULT"):
        return "FAULT", output
    last = output.strip().rpartition("\n")[2]
    if last.startswith("error: "):
        return "says", last
    is_seen = script in mini_phases.PHASES and short not in NOT_IN_STEPS and not is_usual
    if is_seen and is_real(hint) and outcome(lines) == usual:
        if f"{short} has no effect" not in output:
            return "SILENT", f"changes nothing in {STEPS} steps"
    return "runs", ""


def try_all(tries: Tries, script: str, counts: Counter) -> None:
    """All values in all settings of a script; prints what was not plainly refused and did not run.
    """
    _, lines = tries.run(script)
    usual = outcome(lines)
    for name, hint in settings_of(script):
        for value in TEXTS if hint is str else VALUES:
            verdict, why = judge(tries, script, name, hint, value, usual)
            counts[verdict] += 1
            if verdict.isupper() or verdict == "says":
                print(f"{verdict} {script} --{name}={value} [{describe(hint)}]: {why}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=COMMANDS, help="one command's settings")
    parser.add_argument("--folder", help="of the miniature run (default: one that is removed)")
    args = parser.parse_args()
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(args.folder or folder)
        sys.path.append(str(folder))  # phases.py takes sections of mini.py
        tries = Tries(folder)
        for script in COMMANDS:
            importlib.import_module(script)
        for script in [args.only] if args.only else COMMANDS:
            try_all(tries, script, counts)
    faults = [verdict for verdict in counts if verdict.isupper()]
    print(json.dumps(counts))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
