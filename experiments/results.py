"""The lines of results/NAME.jsonl: what experiments and checks measured, and how it was made."""
import json
from pathlib import Path

import common
from common import UserError


def results_path(name: str) -> Path:
    return Path("results") / f"{name}.jsonl"


def append(name: str, *lines: dict) -> None:
    """Appends lines to results/<name>.jsonl."""
    path = results_path(name)
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def replace(name: str, lines: list[dict]) -> None:
    """Writes results/<name>.jsonl anew."""
    path = results_path(name)
    path.parent.mkdir(exist_ok=True)
    common.write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


def describe_run(meta: dict) -> dict:
    """Commit, command, config, machine, seconds, step and seed of a run, by its checkpoint."""
    made = {key: meta[key] for key in ("commit", "config", "machine", "seconds", "step")}
    return made | {"command": "python " + meta["command"], "seed": meta[meta["phase"]]["seed"]}


def record(name: str, meta: dict, **result) -> None:
    """Appends a result to results/<name>.jsonl, with how its checkpoint says it was made."""
    append(name, describe_run(meta) | result)


def read(name: str) -> list[dict]:
    """The results that an experiment left; UserError where none can be read."""
    path = results_path(name)
    required = {"table", "arm", "seed", "correct"}
    try:
        results = [json.loads(line) for line in path.read_text().splitlines()]
        if not results or not all(required <= set(result) for result in results):
            raise ValueError("a line is no result")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} has no results that can be read ({error}); "
                        f"`python -m experiments.{name}` makes them") from None
    return results
