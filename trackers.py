"""The lines of metrics.jsonl for the trackers that people use: `--track=tensorboard,wandb,trackio`.

Any of them. A run that is resumed goes on as the same run there. A tracker whose package is missing
or that fails costs the run nothing but a line that says so: metrics.jsonl has everything anyway.

TensorBoard finds its files beside the metrics (`tensorboard --logdir out`). wandb sends to its
server, or where it has no key keeps the run in out/<run>/<phase>/wandb for `wandb sync`. trackio
keeps its runs where its TRACKIO_DIR says. What else the three can do is set by their own
environment variables: WANDB_MODE, WANDB_ENTITY, TRACKIO_SPACE_ID, …
"""
import dataclasses
import importlib.util
import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

import common
import untrusted

PROJECT = "nanobeige"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another one


@dataclass
class Job:
    """What trackers are told of a phase's run."""
    run: str         # the name of the folder under out/ …
    phase: str       # … and of the folder in it
    folder: Path     # the phase's
    settings: dict   # all of them, and how the run was made; plain JSON
    first_step: int = 0  # 0: a new run. Else one that goes on
    prompts: list[str] = field(default_factory=list)  # that the samples of its lines answer

    @property
    def name(self) -> str:
        return f"{self.run}/{self.phase}"


def describe(config: SimpleNamespace, device: torch.device) -> dict:
    """All settings of a command, by section, and the code and machine that it runs on; no secret
    that an address in them holds."""
    sections = {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            sections[name] = dataclasses.asdict(value)
    made_by = dict(command=config.command, init_from=config.init_from, scale=config.scale,
                   commit=common.current_commit(), machine=common.describe_machine(device))
    values = json.loads(json.dumps(sections | made_by, default=str))
    return untrusted.mask_values(values)


class TensorBoard:
    """Scalars; config, samples and names of stages as texts."""

    def __init__(self, job: Job, run_id: str):
        from torch.utils.tensorboard import SummaryWriter

        # what a killed run had written of the steps that will be repeated is hidden
        self.writer = SummaryWriter(str(job.folder), purge_step=job.first_step)
        text = json.dumps(job.settings, indent=1)
        self.writer.add_text("config", as_code(text), job.first_step)
        self.stage = ""

    def log(self, step: int, values: dict) -> None:
        for name, value in values.items():
            if name != "stage":
                self.writer.add_scalar(name, value, step)
        if values.get("stage", self.stage) != self.stage:
            self.stage = values["stage"]
            self.writer.add_text("stage", self.stage, step)
        self.writer.flush()  # else a kill would lose two minutes, which no resumed run repeats

    def log_table(self, step: int, columns: list[str], rows: list[list]) -> None:
        text = ""
        for row in rows:
            for column, cell in zip(columns, row):
                text += f"**{column}**\n\n{as_code(str(cell))}\n\n"
        self.writer.add_text("samples", text, step)

    def close(self, code: int) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases: the x axis is our own step, as an evaluation has that of a step before."""

    def __init__(self, job: Job, run_id: str):
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if not mode and not wandb.login(prompt=False):  # asking for a key would hold the run up
            mode = "offline"
        self.table = wandb.Table
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=job.name, group=job.run,
            job_type=job.phase, dir=str(job.folder), id=run_id, mode=mode,
            resume=None if mode == "offline" else "allow",  # offline the id alone says it
            settings=wandb.Settings(console="off", init_timeout=60, finish_timeout=300))
        self.run.config.update(job.settings, allow_val_change=True)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict) -> None:
        self.run.log({"step": step} | values)

    def log_table(self, step: int, columns: list[str], rows: list[list]) -> None:
        self.run.log({"step": step, "samples": self.table(columns=columns, data=rows)})

    def close(self, code: int) -> None:
        if code > 128:  # a signal: the same command goes on
            self.run.mark_preempting()
        self.run.finish(exit_code=code)


class Trackio:
    """Runs go by their names there, so the name has our id in it."""

    def __init__(self, job: Job, run_id: str):
        import trackio

        self.table = trackio.Table
        self.run = trackio.init(
            os.environ.get("TRACKIO_PROJECT", PROJECT), name=f"{job.name} {run_id}",
            group=job.run, config=job.settings, resume="allow", embed=False)

    def log(self, step: int, values: dict) -> None:
        self.run.log(values, step=step)

    def log_table(self, step: int, columns: list[str], rows: list[list]) -> None:
        self.run.log({"samples": self.table(columns=columns, data=rows)}, step=step)

    def close(self, code: int) -> None:
        self.run.finish()


CLASSES = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Trackers:
    """Those that a run was told to use, each until it fails.

    tracked.json keeps beside the metrics what each calls this run, and how many lines it has for
    certain: those until it was last closed. Of what came after, a kill may have taken some along:
    they are sent again, and so is all that a tracker has missed, or never heard of.
    """

    def __init__(self, names: list[str], job: Job):
        self.job = job
        self.working = {}
        self.known = read_known(job)
        self.lines_before = common.read_metrics(job.folder) if job.first_step else []
        self.n_lines = len(self.lines_before)
        for name in names:
            if not is_missing(name):
                self._attempt(name, self._open, name)
        common.on_exit.append(self.close)

    def _open(self, name: str) -> None:
        known = self.known.setdefault(name, {"id": uuid.uuid4().hex[:8], "lines": 0})
        self.working[name] = CLASSES[name](self.job, known["id"])
        for line in self.lines_before[known["lines"]:]:
            self._write_to(name, line)
        write_known(self.job, self.known)

    def write(self, line: dict) -> None:
        """A line of metrics.jsonl, to all that work."""
        self.n_lines += 1
        for name in list(self.working):
            self._attempt(name, self._write_to, name, line)

    def _write_to(self, name: str, line: dict) -> None:
        values = flatten(line)
        step = values.pop("step")
        self.working[name].log(step, values)
        if line.get("samples"):
            rows = [[step, *row] for row in zip(self.job.prompts, line["samples"])]
            self.working[name].log_table(step, ["step", "prompt", "sample"], rows)

    def close(self, code: int = 0) -> None:
        """Ends them, with the process's exit code; a second call does nothing."""
        for name in list(self.working):
            self._attempt(name, self._close, name, code)
        self.working = {}

    def _close(self, name: str, code: int) -> None:
        self.working[name].close(code)
        self.known[name]["lines"] = self.n_lines
        write_known(self.job, self.known)

    def _attempt(self, name: str, do, *arguments) -> None:
        """Calls do(); whatever goes wrong in it ends this tracker alone."""
        try:
            do(*arguments)
        except Exception as error:
            self.working.pop(name, None)
            said = untrusted.mask_secrets(f"{type(error).__name__}: {error}")
            print(f"warning: {name} tracks this run no more: {untrusted.printable(said)}; nothing "
                  "else is lost", flush=True)


def is_missing(name: str) -> bool:
    return importlib.util.find_spec(name) is None  # the packages are called as the trackers are


def warn_of_missing(names: list[str]) -> None:
    """A line for each tracker whose package is not there: hours may pass before the first step."""
    for name in filter(is_missing, names):
        print(f"warning: --track={name}: its package is not there, so {name} will not track this "
              f"run; `pip install {name}` brings it", flush=True)


def read_known(job: Job) -> dict[str, dict]:
    """{tracker: {"id": …, "lines": …}} of those that know this run.

    A run that starts anew, or a folder that was copied, is another run.
    """
    if job.first_step == 0:
        return {}
    try:
        kept = json.loads((job.folder / "tracked.json").read_text())
        return kept["trackers"] if kept["name"] == job.name else {}
    except (OSError, ValueError, LookupError, TypeError):  # there is none, or it is damaged
        return {}


def write_known(job: Job, known: dict[str, dict]) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"name": job.name, "trackers": known})
    common.write_atomic(job.folder / "tracked.json", text)


def flatten(line: dict, prefix: str = "") -> dict[str, float | str]:
    """The numbers and texts of a line, as {"stage": …, "scores/math/avg": …}, and no lists."""
    values = {}
    for key, value in line.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            values |= flatten(value, name + "/")
        elif isinstance(value, bool):
            values[name] = int(value)
        elif isinstance(value, int | float | str):
            values[name] = value
    return values


def as_code(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "    " + text.replace("\n", "\n    ")
