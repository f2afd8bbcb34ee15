"""A public set's own solutions as conversations: data for SFT.

    python -m data.sets.solutions gsm8k=train.jsonl corpora/gsm8k/train.jsonl
    python -m data.sets.solutions gsm8k corpora/gsm8k/train.jsonl --split=train    # from the hub

A line is {"messages": […]}: the problem as evaluate.py asks it, the set's own work as thoughts in
think tags, and the answer in the form that is asked for. Any set of data/sets/public.py whose
problems come with an answer; those without any are left out. From the hub the split "train" leaves
a tenth for "dev"; a file gives all its rows for any split.
"""
import argparse
import json
import sys
from pathlib import Path

import common
from common import UserError
from data.tasks import registry
from data.tasks.problem import Problem, to_chat


def to_conversation(problem: Problem) -> dict:
    """The problem and its solution; thoughts stand in the content, where every reader finds them.

    Without work there are no think tags.
    """
    question, reply = to_chat(problem)
    content = reply["content"]
    if problem.steps:
        content = "<think>\n" + "\n".join(problem.steps) + f"\n</think>\n\n{content}"
    return {"messages": [question, {"role": "assistant", "content": content}]}


def write(task: str, split: str, path: Path) -> int:
    """Writes a split's conversations, in the shuffled order of seed 0, and returns how many."""
    problems = registry.family(task).problems(split, 10**9, 0)
    lines = [json.dumps(to_conversation(problem)) + "\n" for problem in problems if problem.answer]
    if not lines:
        raise UserError(f"{task}: none of {len(problems)} problems has an answer to learn from")
    path.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomic(path, "".join(lines))
    return len(lines)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="of data/sets/public.py: NAME or NAME=PATH")
    parser.add_argument("path", type=Path, help="of the .jsonl file to write")
    parser.add_argument("--split", default="train", choices=("train", "dev", "test"))
    return parser.parse_args()


def main():
    args = read_options()
    n = write(args.task, args.split, args.path)
    print(f"{n:,} conversations in {args.path}", file=sys.stderr)


if __name__ == "__main__":
    common.cli(main)
