"""Random programs into the sandbox, random answers into the verifier, damaged inputs into all that
reads them: nothing crashes, hangs or earns a reward.

    python -m checks.fuzz [--n=10000] [--write]     # nine minutes on 2 cores, and four for inputs
    python -m checks.fuzz --only=inputs             # checks/fuzz_inputs.py alone

Programs are statements drawn from lists of what attackers use, nested and joined at random, some
with random characters; they are judged by tests that expect a secret. Answers are pieces of LaTeX,
numbers, brackets and any Unicode. Then the speed of both on plain work: programs and answers a
second.
"""
import argparse
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import common
from checks import fuzz_inputs
from data.verify import answers
from data.verify.sandbox import Limits, Sandbox
from experiments import results

LIMITS = Limits(seconds=0.3, wall=2.0)
SECRET = "SECRET-" + os.urandom(8).hex()
TESTS = f"assert f('x') == '{SECRET}'\nassert {{f('y'): 1}} == {{'{SECRET}': 1}}"
GOLDS = [
    "7919",
    r"\frac{355}{113}",
    "0.4375",
    r"(3,\frac{\pi}{2})",
    "east",
    r"\{1,2,86\}",
    "x^2+97",
    r"37\%",
    r"[2,\infty)",
]

NAMES = st.sampled_from(
    "os sys json gc ctypes signal builtins socket threading fcntl resource mmap atexit".split()
)
VALUES = st.sampled_from(
    "1 '' b'x' None [] {} () x f E() 10**9 -1 'passed' 0 parent open print range(10**6) "
    "float('nan')".split()
)
CALLS = st.sampled_from(
    "os._exit sys.exit os.fork os.kill os.write os.read os.close os.dup2 os.open os.listdir "
    "os.unlink os.rename "
    "os.dup os.chmod os.execv os.system os.pipe os.abort os.getppid sys.setrecursionlimit "
    "sys.settrace sys._getframe "
    "eval exec gc.get_objects compile __import__ setattr getattr vars globals locals open input "
    "print repr hash "
    "iter next len bytes bytearray memoryview signal.signal signal.alarm "
    "socket.socketpair threading.Thread ctypes.string_at "
    "ctypes.memset ctypes.CDLL mmap.mmap resource.setrlimit fcntl.fcntl atexit.register "
    "json.dumps".split()
)
EXPRESSIONS = st.recursive(
    VALUES,
    lambda inner: (
        st.builds("{}({})".format, CALLS, st.lists(inner, max_size=3).map(", ".join))
        | st.builds(
            "({} {} {})".format,
            inner,
            st.sampled_from(["+", "*", "==", "and", "**", "%", "@", "in"]),
            inner,
        )
        | st.builds("[{} for x in {}]".format, inner, inner)
        | st.builds("(lambda x: {})".format, inner)
    ),
    max_leaves=6,
)
LINES = (
    st.builds("x = {}".format, EXPRESSIONS)
    | st.builds("return {}".format, EXPRESSIONS)
    | EXPRESSIONS
    | st.builds("import {}".format, NAMES)
    | st.builds("raise SystemExit({})".format, VALUES)
    | st.builds("del {}".format, st.sampled_from(["x", "f", "len"]))
    | st.just("while True: pass")
    | st.builds(
        "{}.{} = {}".format,
        NAMES,
        st.sampled_from(["write", "dumps", "exit", "len", "x"]),
        EXPRESSIONS,
    )
    | st.just("class E(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__")
    | st.text(max_size=20)
)


def program_of(before: list[str], body: list[str], after: list[str]) -> str:
    def indented(line: str) -> str:
        return line.replace("\n", "\n    ")

    lines = [
        "import os, sys, json, gc, ctypes, signal, builtins, socket, threading, fcntl, "
        "resource, mmap, atexit",
        "parent, x = os.getppid(), 1",
    ]
    lines += [f"try:\n    {indented(line)}\nexcept BaseException: pass" for line in before]
    lines.append("def f(x):")
    lines += [f"    {indented(line)}" for line in body]
    return "\n".join(lines + after)


PROGRAMS = st.builds(
    program_of,
    st.lists(LINES, max_size=3),
    st.lists(LINES, min_size=1, max_size=3),
    st.lists(LINES, max_size=1),
)
PIECES = st.sampled_from(
    [
        "\\boxed{",
        "}",
        "{",
        "\\frac",
        "\\sqrt",
        "^",
        "_",
        "\\left(",
        "\\right]",
        "(",
        ")",
        "[",
        "]",
        ",",
        ";",
        "9",
        "7",
        "0.5",
        "1e9",
        "**",
        "!",
        "%",
        "\\%",
        "$",
        "$$",
        "\\text{",
        "\\pi",
        "x",
        "=",
        "or",
        " and ",
        "\\infty",
        "\n",
        "####",
        "The answer is ",
        "</think>",
        "<think>",
        "95**95**95",
        "9^{9^{9^9}}",
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "&",
        "\\\\",
        "\0",
        "٣",
        "−",
        "-",
        "+",
        "1,000",
        "cm",
        "B",
        "__import__('os')",
        "\\input{/etc/passwd}",
        "\\int_0^1",
        "\\sum",
        "\\lim",
        "½",
        "\u202e",
        "²",
    ]
)
ANSWERS = st.lists(
    PIECES | st.text(max_size=8) | st.integers().map(str) | st.floats().map(str), max_size=25
).map("".join)


def run(n: int, strategy, body) -> tuple[Counter, float]:
    """What became of n examples, and the longest time that one took, in seconds."""
    ends, longest = Counter(), 0.0

    @seed(0)
    @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def each(example):
        nonlocal longest
        started = time.time()
        ends[body(example)] += 1
        longest = max(longest, time.time() - started)
    each()
    return ends, longest


def per_second(work, n: int = 1000, threads: int = 2) -> float:
    with ThreadPoolExecutor(threads) as pool:
        started = time.time()
        list(pool.map(work, range(n)))
    return n / (time.time() - started)


def fuzz_readers(n: int, write: bool) -> None:
    """Damaged folders, tokenizers, data files and answers; UserError where there was a fault."""
    started = time.time()
    ends = fuzz_inputs.run_all(n)
    for kind, counts in ends.items():
        print(f"{counts.total()} {kind}: {dict(counts.most_common())}")
    n_faults = sum(count for counts in ends.values() for end, count in counts.items() if ":" in end)
    if write:
        record(f"--only=inputs --n={n}", started, inputs=ends)
    if n_faults:
        raise common.UserError(f"{n_faults} faults, see above")


def speeds(box: Sandbox) -> dict[str, float]:
    """Plain work a second."""
    right = "def f(x):\n    return sorted(x)"
    speed = {
        "scripts": per_second(lambda i: box.run(f"print({i})")),
        "functions": per_second(lambda i: box.call(right, "f", [[[3, 1, 2]]] * 5)),
        "tests": per_second(lambda i: box.test(right, "assert f([2, 1]) == [1, 2]", ["f"])),
    }
    plain = [(str(i), f"<think>hm</think> So it is \\boxed{{{i + i % 2}}}.") for i in range(20_000)]
    speed["plain answers"] = per_second(lambda i: answers.reward(*plain[i]), len(plain), threads=1)
    return speed


def fuzz_verifiers(n: int, write: bool) -> None:
    """Programs and answers; an AssertionError where one passed or broke something."""
    started = time.time()
    with Sandbox(workers=2, limits=LIMITS) as box:
        def program(source: str) -> str:
            status = box.test(source, TESTS, ["f"]).status
            assert status not in ("passed", "broken"), (status, source)
            return status

        def answer(text: str) -> float | None:
            response, gold = f"so it is \\boxed{{{text}}}", GOLDS[len(text) % len(GOLDS)]
            rewards = [answers.reward(gold, response), answers.reward(gold, text)]
            assert rewards == [0.0, 0.0] or gold in text, (gold, text, rewards)
            return max(rewards)

        programs, longest_program = run(n, PROGRAMS, program)
        print(
            f"{programs.total()} programs: {dict(programs)}; none passed, the longest took "
            f"{longest_program:.1f} s"
        )
        ends, longest_answer = run(n, ANSWERS, answer)
        print(
            f"{ends.total()} answers: {dict(ends)}; none was right, the longest took "
            f"{longest_answer:.1f} s"
        )
        box.limits = Limits()
        speed = speeds(box)
    print(
        "a second, on 2 cores: " + ", ".join(f"{name} {value:.0f}" for name, value in speed.items())
    )
    if write:
        record(f"--n={n}", started, programs=programs,
               answers={str(end): count for end, count in ends.items()},
               longest=[longest_program, longest_answer], per_second=speed)


def record(options: str, started: float, **figures) -> None:
    """Appends a line to results/fuzz.jsonl."""
    results.append(
        "fuzz",
        dict(
            commit=common.current_commit(),
            command=f"python -m checks.fuzz {options} --write",
            seed=0,
            **figures,
            machine=common.describe_machine(torch.device("cpu")),
            seconds=time.time() - started,
        ),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="tries of each kind")
    parser.add_argument("--only", choices=["inputs", "verifiers"])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.only != "verifiers":
        fuzz_readers(args.n, args.write)  # first: it forks, and threads come later
    if args.only != "inputs":
        fuzz_verifiers(args.n, args.write)


if __name__ == "__main__":
    common.cli(main)
