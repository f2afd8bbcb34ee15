"""Do known solutions pass their tests in the sandbox, and do wrong variants fail? HumanEval and
sanitized MBPP.

    python -m checks.programs --humaneval=FILE --mbpp=FILE [--write]   # 2.5 minutes on 2 cores
"""
import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import common
from data.sets import public
from data.sets.programs import mutants, run_tests
from data.tasks.problem import seeded_rng
from data.verify import sandbox
from experiments import results

VARIANTS = 8    # of each solution


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--humaneval", metavar="FILE", required=True)
    parser.add_argument("--mbpp", metavar="FILE", required=True, help="the sanitized one")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for name, file in (("humaneval", args.humaneval), ("mbpp", args.mbpp)):
        problems, started = public.load(name, file, ""), time.time()
        wrong = [
            mutants(problem.answer, seeded_rng("variants", i), VARIANTS)
            for i, problem in enumerate(problems)
        ]
        with sandbox.Sandbox(workers=2) as box, ThreadPoolExecutor(os.cpu_count()) as pool:
            right = list(
                pool.map(lambda problem: run_tests(problem.answer, problem, box), problems)
            )
            flat = [(i, code) for i, codes in enumerate(wrong) for code in codes]
            scores = list(pool.map(lambda pair: run_tests(pair[1], problems[pair[0]], box), flat))
        seconds = time.time() - started
        failing = {i for (i, _), value in zip(flat, scores) if value == 0.0}
        line = dict(set=name, problems=len(problems), solutions_pass=right.count(1.0),
                    with_a_failing_variant=len(failing), variants=len(flat),
                    variants_fail=scores.count(0.0), broken=(right + scores).count(None),
                    per_second=(len(flat) + len(right)) / seconds)
        print(line)
        for i, problem in enumerate(problems):
            if right[i] != 1.0 or i not in failing:
                print(f"  {problem.key}: solution {right[i]}, {len(wrong[i])} variants")
        if args.write:
            results.append(
                "programs",
                dict(
                    commit=common.current_commit(),
                    command="python -m checks.programs --humaneval=… --mbpp=… --write",
                    seed=0,
                    machine=common.describe_machine(torch.device("cpu")),
                    seconds=seconds,
                )
                | line,
            )


if __name__ == "__main__":
    common.cli(main)
