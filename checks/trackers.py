"""Do trackers hold what metrics.jsonl holds? `python -m checks.trackers` in a new folder.

    pip install tensorboard wandb trackio
    python -m checks.trackers

Each of the five phases of a miniature run is trained for some 20 steps with all three trackers,
killed on the way (SIGKILL, then SIGTERM) and resumed each time; then evaluate.py is asked. What the
trackers' own files say is read back and compared with metrics.jsonl, number by number.
"""
import json
import os
import signal
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import common
import trackers
from checks import mini_phases
from checks.mini import Mini

SCALES = {"pretrain": 0.5, "sft": 8, "distill": 1, "reward": 1.7, "rl": 3}  # 18 to 24 steps each
OPTIONS = {
    "pretrain": ["--pretrain.eval_problems=2"],
    "sft": ["--sft.eval_problems=2", "--sft.prompts=['Hello', 'You']"],
    "distill": ["--distill.epochs=7", "--distill.eval_problems=2"],
    "reward": ["--reward.held_out=[{'taste': 24, 'seed': 1}]"],
    "rl": ["--rl.eval_problems=2"],
}
BLOCK = 1 << 15  # bytes of wandb's file, which is a LevelDB log after a head of 7 bytes


# --------------------------------------------------------------------------------------------------
# What a tracker has stored: {step: {name: value}}, {step: samples}, and the config

def read_tensorboard(folder: Path) -> tuple[dict, dict, dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    lines = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            lines.setdefault(event.step, {})[name] = event.value
    texts = {}
    for name in events.Tags()["tensors"]:
        for event in events.Tensors(name):
            texts[name, event.step] = event.tensor_proto.string_val[0].decode()
    samples, configs = {}, {}
    for (name, step), text in texts.items():
        if name.startswith("samples"):
            parts = (text + "**step**").split("**sample**\n\n")[1:]
            samples[step] = [part.partition("\n\n**step**")[0] for part in parts]
        elif name.startswith("config"):
            configs[step] = json.loads(text)  # Markdown's indentation is none of JSON
    return lines, samples, configs[max(configs)]


def wandb_records(path: Path) -> Iterator:
    """The records of a .wandb file; one torn by a kill ends them."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if not 1 <= kind <= 4 or at + 7 + length > len(data):
            return
        parts += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_wandb(folder: Path) -> tuple[dict, dict, dict]:
    lines, samples, config, ids = {}, {}, {}, set()
    paths = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    for path in paths:  # a resumed run goes on in another file, under the same id
        for record in wandb_records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            for update in (*record.run.config.update, *record.config.update):
                config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                      for item in record.history.item}
            if "samples/path" in values:
                table = path.parent / "files" / values["samples/path"]
                rows = json.loads(table.read_text())["data"]
                samples[values["step"]] = [sample for _, _, sample in rows]
            elif values:
                lines.setdefault(values["step"], {}).update(values)
    if len(ids) != 1:
        raise common.UserError(f"{folder}: {len(ids)} runs of wandb, not one")
    return lines, samples, config


def read_trackio(name: str) -> tuple[dict, dict, dict]:
    from trackio.sqlite_storage import SQLiteStorage

    records = SQLiteStorage.get_run_records(trackers.PROJECT)
    names = [run["name"] for run in records if run["name"].startswith(name + " ")]
    if len(names) != 1:
        raise common.UserError(f"{name}: {len(names)} runs of trackio, not one")
    [name] = names
    lines, samples = {}, {}
    for line in SQLiteStorage.get_logs(trackers.PROJECT, name):
        if "samples" in line:
            samples[line["step"]] = [row["sample"] for row in line["samples"]["_value"]]
        else:
            lines.setdefault(line["step"], {}).update(line)
    return lines, samples, SQLiteStorage.get_run_config(trackers.PROJECT, name)


# --------------------------------------------------------------------------------------------------
# Against metrics.jsonl

def expected(folder: Path) -> tuple[dict, dict]:
    """({step: {name: value}}, {step: samples}) of metrics.jsonl; evaluations are of a step, too."""
    lines, samples = {}, {}
    for line in common.read_metrics(folder):
        if line.get("samples"):
            samples[line["step"]] = line["samples"]
        values = trackers.flatten(line)
        lines.setdefault(values.pop("step"), {}).update(values)
    if (folder / "held_out.json").is_file():
        scores = json.loads((folder / "held_out.json").read_text())
        lines[max(lines)] |= trackers.flatten({"held_out": scores})
    return lines, samples


def differences(found: dict, wanted: dict, kind=float) -> list[str]:
    """Where a tracker's lines are other ones; kind: of the numbers that it stores."""
    wrong = []
    for step in sorted(found.keys() | wanted.keys()):
        has, should = found.get(step, {}), wanted.get(step, {})
        for name, value in should.items():
            stored = has.get(name)
            if isinstance(value, str):
                is_same = stored == value
            else:
                is_same = stored is not None and np.array_equal(kind(stored), kind(value), True)
            if not is_same:
                wrong.append(f"step {step}: {name} is {stored}, not {value}")
    return wrong + [f"step {step} is there" for step in found.keys() - wanted.keys()]


def compare(name: str, folder: Path, wanted: dict, samples: dict) -> list[str]:
    """What differs in any of the three trackers."""
    wrong = []
    no_texts = {}  # TensorBoard has the stage's name where it changes
    for step, values in wanted.items():
        no_texts[step] = {key: value for key, value in values.items() if key != "stage"}
    for tracker, (lines, tables, config), lines_wanted, kind, as_stored in (
        ("tensorboard", read_tensorboard(folder), no_texts, np.float32, trackers.as_code),
        ("wandb", read_wandb(folder), wanted, float, str),
        ("trackio", read_trackio(name), wanted, float, str),
    ):
        problems = differences(lines, lines_wanted, kind)
        for step, texts in samples.items():
            if tables.get(step) != [as_stored(text) for text in texts]:
                problems.append(f"step {step}: samples are {tables.get(step)}, not {texts}")
        missing = {"commit", "command", "machine"} - config.keys()
        problems += [f"the config lacks the {key}" for key in missing]
        wrong += [f"{name}: {tracker}: {problem}" for problem in problems]
    return wrong


# --------------------------------------------------------------------------------------------------
# The runs

def train_with_kills(mini: Mini, phase: str) -> None:
    """Trains a phase as run "tracked", killed after its 8th step and stopped after its 13th."""
    command = ["-m", "checks.mini_phases", *mini_phases.command(phase, "tracked"),
               "--track=tensorboard,wandb,trackio", f"--scale={SCALES[phase]}",
               f"--{phase}.save_every=3", f"--{phase}.log_every=1", *OPTIONS[phase]]
    for at, number in ((8, signal.SIGKILL), (13, signal.SIGTERM), (None, 0)):
        process = mini.popen(*command)
        for line in process.stdout:
            if at and line.startswith(f"step {at:>6}/"):
                process.send_signal(number)
            if "warning" in line:
                print(line, end="")
        code = process.wait()
        if code != {signal.SIGKILL: -9, signal.SIGTERM: 143}.get(number, 0):
            raise common.UserError(f"{phase} ended with the code {code}")


def check_evaluation(mini: Mini) -> list[str]:
    """Trackers of evaluate.py against evaluate.json."""
    mini.run("-m", "checks.mini_phases", "evaluate.py", "phases.py", "--run=tracked",
             "--evaluate.checkpoint=out/tracked/sft", "--track=tensorboard,wandb,trackio")
    out = mini.folder / "out/tracked"
    scores = json.loads((out / "evaluate.json").read_text())["scores"]
    return compare("tracked/evaluate", out / "evaluate",
                   {0: trackers.flatten({"scores": scores})}, {})


def main():
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"WANDB_MODE": "offline", "TRACKIO_DIR": f"{folder}/trackio"}
        mini = Mini(Path(folder))
        mini.prepare("--corpus.folder=data")
        mini.pretrain("--run=base", "--pretrain.eval_problems=0", "--evaluate.tasks=[]")
        mini_phases.prepare(mini)
        for phase in mini_phases.PHASES:
            train_with_kills(mini, phase)
            path = mini.folder / "out/tracked" / phase
            wanted, samples = expected(path)
            found = compare(f"tracked/{phase}", path, wanted, samples)
            n_numbers = sum(map(len, wanted.values()))
            print(f"{phase}: {len(wanted)} steps, {n_numbers} values, {len(samples)} tables of "
                  f"samples in each of three trackers; {len(found)} differ", *found[:5], sep="\n",
                  flush=True)
            wrong += found
        found = check_evaluation(mini)
        print(f"evaluate: {len(found)} differ", *found[:5], sep="\n")
        wrong += found
    if wrong:
        raise common.UserError(f"{len(wrong)} differ")


if __name__ == "__main__":
    common.cli(main)
