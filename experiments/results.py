"""The lines of results/NAME.jsonl: what every experiment and check measured, with how it was made."""
import json
from pathlib import Path

from common import UserError


def append(name: str, *lines: dict) -> None:
    """Appends lines to results/<name>.jsonl."""
    Path("results").mkdir(exist_ok=True)
    with open(f"results/{name}.jsonl", "a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def record(name: str, meta: dict, **result) -> None:
    """Appends a result to results/<name>.jsonl, with what its checkpoint says of how it was made."""
    line = {key: meta[key] for key in ("commit", "command", "config", "machine", "seconds", "step")}
    line |= {"seed": meta[meta["phase"]]["seed"]} | result
    append(name, line)


def recorded(name: str) -> list[dict]:
    """The results that an experiment left; UserError where there are none, or a line is no result."""
    path = Path("results") / f"{name}.jsonl"
    try:
        results = [json.loads(line) for line in path.read_text().splitlines()]
        if not results or not all({"table", "arm", "seed", "correct"} <= set(result) for result in results):
            raise ValueError("a line is no result")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} has no results that can be read ({error}); `python -m experiments.{name}` makes them"
                        ) from None
    return results
