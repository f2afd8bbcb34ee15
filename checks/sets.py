"""Public sets on their real files: do gold answers score 1, and empty answers and another problem's
answer 0?

    python -m checks.sets --gsm8k=FILE --math500=FILE --humaneval=FILE --bfcl=FILE,FILE … [--write]
    # half a minute

Any of data/sets/public.py whose problems have an answer. Gold answers are given in the form of a
chat reply; the other problem is the next one of another answer.
"""
import argparse
import time

import torch

import common
from data.sets import public
from data.tasks import registry
from data.tasks.problem import to_chat
from experiments import results


def reply_of_another(problems: list, replies: list[str], i: int) -> str:
    """The next reply after the i-th, round the list, that has another answer; "" where none has."""
    for j in [*range(i, len(problems)), *range(i)]:
        if problems[j].answer != problems[i].answer:
            return replies[j]
    return ""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in public.SETS:
        parser.add_argument(f"--{name}", metavar="FILES", help="one, or several with commas")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    given = [(name, getattr(args, name)) for name in public.SETS if getattr(args, name)]
    if not given:
        raise common.UserError("give sets and files, as --gsm8k=FILE")
    print(
        f"| {'set':40} | problems | gold | empty | another's | seconds |\n|---|---|---|---|---|---|"
    )
    for name, path in ((name, path) for name, paths in given for path in paths.split(",")):
        started = time.time()
        problems = registry.family(f"{name}={path}").problems("test", 10 ** 6, 0)
        if without := [problem.key for problem in problems if not problem.answer]:
            raise common.UserError(
                f"{len(without)} problems of {name} have no answer to try, as {without[0]}"
            )
        replies = [to_chat(problem)[-1]["content"] for problem in problems]
        others = [reply_of_another(problems, replies, i) for i in range(len(problems))]
        scores = {kind: registry.rewards(problems, answers) for kind, answers in
                  (("gold", replies), ("empty", [""] * len(problems)), ("another's", others))}
        share = {}
        for kind, rewards in scores.items():
            share[kind] = sum(reward == 1 for reward in rewards) / len(rewards)
        file, seconds = path.rpartition("/")[2], time.time() - started
        print(
            f"| {name + ': ' + file:40} | {len(problems)} | "
            + " | ".join(f"{s:.1%}" for s in share.values())
            + f" | {seconds:.0f} |",
            flush=True,
        )
        for kind, wanted in (("gold", 1.0), ("empty", 0.0), ("another's", 0.0)):
            for problem, score in zip(problems, scores[kind]):
                if score != wanted:
                    print(f"    {kind} scores {score}: {problem.key}, {problem.answer[:60]!r}")
        if args.write:
            results.append(
                "sets",
                dict(
                    set=name,
                    file=file,
                    problems=len(problems),
                    **share,
                    seconds=seconds,
                    seed=0,
                    commit=common.current_commit(),
                    machine=common.describe_machine(torch.device("cpu")),
                    command=f"python -m checks.sets --{name}=… --write",
                ),
            )


if __name__ == "__main__":
    common.cli(main)
