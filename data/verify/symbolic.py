"""Are two expressions equal? math-verify 0.9.0, and its parser, in processes that may be killed.

It may take long, fill the memory or never return, so it works behind a pipe, with limits; and it
reads much that it misunderstands, so it only sees short expressions of a small alphabet
(data/verify/answers.py says why). Cheap tests come first: expressions that differ in numbers, at a
few points, are not equal. Only what agrees there is compared symbolically.
"""
import functools
import importlib.util
import json
import math
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

MAX_QUESTION = 300      # characters of an expression
MAX_BRACKETS = 12       # inside of each other
MEMORY = 1 << 30        # bytes of address space of a worker
STUCK = 60.0            # seconds by the clock after which a worker gets no processor time
START = 120.0           # seconds in which a worker must start: it imports sympy
QUICK = 0.15            # seconds of processor time that a question may always take …
BUDGET = 10.0           # … and those beyond it that all questions of a pool may take together, …
REFILL = 0.1            # … of which so many come back with each second of the clock
MAX_REMEMBERED = 10_000     # verdicts
FUNCTIONS = ("arcsin", "arccos", "arctan", "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh",
             "tanh", "ln", "log", "exp", "sqrt", "pi")


# ---- the worker: a process that reads questions and writes verdicts, a line of JSON each

_COMMANDS = ("frac", r"sqrt(?:\[[2-9]\])?", "cdot", "binom", "infty", "alpha", "beta", "theta",
             "lambda", "mu", "phi", "omega", "sigma", "delta", *FUNCTIONS)
_MATHEMATICS = re.compile(
    rf"(?:\\(?:{'|'.join(_COMMANDS)})(?![A-Za-z])|"
    r"(?<![A-Za-z\\])[A-Za-z]{1,2}(?![A-Za-z])|"
    r"[0-9]|\.[0-9]|[-+/^_(){}|= ])++")
# Towers, which never end: 9^{9^9}, 9^9^9, (9^{99})^{99}
_HEAVY = re.compile(
    r"!|\^\s*(?:\{[^{}]*\}?\s*\^|\{?-?[0-9]{5}|[0-9A-Za-z]+\s*\^|"
    r"\{?[0-9]{2,}\}?[^()^]*\)\s*\^\s*\{?[0-9]{2})|"
    r"\\binom\s*\{[^{}]*[0-9]{5}")
# Two numbers side by side, a mixed number or a product; and 3_8, of which it drops the base
_AMBIGUOUS = re.compile(r"[0-9] *(?: [0-9]|\\frac\{[0-9]+\}\{[0-9])|[0-9)}] *_")


def _is_heavy(text: str) -> bool:
    """Whether it may never end: towers of powers, many brackets inside of each other."""
    depth = deepest = 0
    for bracket in re.findall(r"[({)}]", text):
        depth += 1 if bracket in "({" else -1
        deepest = max(deepest, depth)
    return deepest > MAX_BRACKETS or bool(_HEAVY.search(text))


def _is_readable(text: str) -> bool:
    """Whether math-verify may see it: short, its alphabet, no words, nothing ambiguous."""
    if len(text) > MAX_QUESTION:
        return False
    return bool(_MATHEMATICS.fullmatch(text)) and not _AMBIGUOUS.search(text)


# sympy and what rests on it take seconds to load, and only a worker needs them, so they are
# imported inside of the functions.

@functools.cache
def _load_parser() -> type:
    """The parser of math-verify, with one repair."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    class Parser(_Latex2Sympy):
        def convert_postfix_list(self, factors: list, i: int = 0) -> sympy.Expr:
            """Factors side by side; to the library 5(6) is 5 + 6, a mixed number."""
            factor = self.convert_postfix(factors[i])
            if not isinstance(factor, sympy.Expr):
                raise ValueError("a set, or a derivative")
            if i == len(factors) - 1:
                return factor
            return self.mul_flat(factor, self.convert_postfix_list(factors, i + 1))

    return Parser


def _exact(decimal: re.Match) -> str:
    """A decimal number as a fraction, so that nothing is rounded."""
    numerator = int(decimal[1] + decimal[2])
    denominator = 10 ** len(decimal[2])
    return f"{{\\frac{{{numerator}}}{{{denominator}}}}}"


@functools.lru_cache(1000)      # a gold is read once for all of its answers
def _parse(text: str):
    """The sympy expression that a text is; None where it is none."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    exact = re.sub(r"([0-9]*)\.([0-9]+)", _exact, text)
    config = ConversionConfig(lowercase_symbols=False)      # R is not r
    Parser = _load_parser()
    try:
        value = Parser(is_real=True, config=config).parse(exact)
    except Exception:       # the parser raises just that
        return None
    if not isinstance(value, sympy.Expr):
        return None
    return value.subs(sympy.Symbol("i", real=True), sympy.I).doit()


# Where expressions are compared in numbers. Positive, so that no two forms of one expression differ
# in the branch of a root or a logarithm.
_POINTS = ((0.7390851, 1.1447298), (1.3247179, 0.4142135), (2.2360679, 0.8660254))
_DIGITS = 20            # to which an expression is evaluated
_TOLERANCE = 1e-9       # of a relative difference; the rest is left to sympy


def _values(expression, points: tuple) -> list:
    """The expression's values at some points, complex numbers or None where it has none."""
    names = sorted(expression.free_symbols, key=str)
    values = []
    for first, step in points:
        # by the letter, not by its place among those that the expression happens to have
        at = {name: first + step * sum(map(ord, str(name))) / 97 for name in names}
        value = expression.evalf(_DIGITS, subs=at)
        values.append(value if value.is_number and value.is_finite else None)
    return values


def _differ(one, other, at_least: int) -> bool:
    """Whether two numbers differ for sure; not where one of them is missing.

    Relative to the larger one, or to `at_least`: what is zero may be evaluated as 1e-125.
    """
    if one is None or other is None:
        return False
    largest = max(abs(one), abs(other), at_least)
    return bool(abs(one - other) > _TOLERANCE * largest)


def _differ_in_numbers(one, other) -> bool:
    pairs = zip(_values(one, _POINTS), _values(other, _POINTS))
    return any(_differ(left, right, at_least=1) for left, right in pairs)


def _same_equation(gold_sides: list, answer_sides: list) -> bool:
    """Whether two equations are the same up to a factor that is a number."""
    import sympy

    gold_left, gold_right = gold_sides
    answer_left, answer_right = answer_sides
    ratio = (gold_left - gold_right) / (answer_left - answer_right)
    first, *others = _values(ratio, _POINTS)
    if any(_differ(first, other, at_least=0) for other in others):
        return False
    ratio = sympy.simplify(ratio)
    return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)


def is_equal(gold: str, answer: str) -> bool | None:
    """Whether two expressions, or two equations up to a factor, are equal.

    None where one of them is neither.
    """
    import sympy
    from math_verify import verify

    gold_sides = [_parse(side) for side in gold.split("=")]
    answer_sides = [_parse(side) for side in answer.split("=")]
    if len(gold_sides) != len(answer_sides) or len(gold_sides) > 2:
        return None
    if None in gold_sides + answer_sides:
        return None
    if len(gold_sides) == 2:
        return _same_equation(gold_sides, answer_sides)
    [one], [other] = gold_sides, answer_sides
    if _differ_in_numbers(one, other):
        return False
    if one.is_Symbol or other.is_Symbol:        # of which math-verify compares the letters
        return sympy.simplify(one - other) == 0
    # no time-out of its own, which is a signal
    return bool(verify(one, other, numeric_precision=50, timeout_seconds=None))


class _TooLong(BaseException):
    """No Exception, which sympy would catch."""


def _raise_too_long(*_) -> None:
    raise _TooLong


def _answer(gold: str, answer: str, seconds: float) -> bool | None | str:
    """The verdict; 'slow' if there is none after so many seconds of processor time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return is_equal(gold, answer)
    except _TooLong:
        return "slow"
    except Exception:       # both were read, and sympy cannot compare them, or memory is full
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _work() -> None:
    """The worker's life: answers each line of stdin with a verdict and the seconds it took."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, _raise_too_long)
    replies = sys.stdout
    sys.stdout = sys.stderr     # nothing that a library prints is taken for a verdict
    print(json.dumps([is_equal("x", "x"), 0]), file=replies, flush=True)    # imports are done
    for line in sys.stdin:
        # Python sees the signal between two of its steps. One that never ends, of C, is ended with
        # the process: the kernel kills it at the limit. Processor time, not the clock: a busy
        # machine must change no verdict.
        began = time.process_time()
        gold, answer, seconds = json.loads(line)
        at_most = math.ceil(began + seconds + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (at_most, resource.RLIM_INFINITY))
        try:
            verdict = _answer(gold, answer, seconds)
        except _TooLong:        # it came in the last moment, when the timer was being stopped
            verdict = "slow"
        print(json.dumps([verdict, time.process_time() - began]), file=replies, flush=True)


# ---- in front of the workers

class Failed(Exception):
    """The judge failed, not the answer: a worker cannot start, or gets no processor time."""


@dataclass
class Cost:
    """What a pool's questions have cost so far."""
    questions: int = 0      # that workers were asked
    slow: int = 0           # of them, those that were cut off without a verdict
    seconds: float = 0.0    # of the workers' processor time


class Pool:
    """math-verify in so many processes, each started when it is first needed. Thread-safe.

    A question may take `seconds` of processor time, or QUICK once the pool's budget for slow ones
    is spent; then it is cut off, and its answer is wrong. A worker that cannot be stopped is
    killed, and another takes its place. `cost` counts. Raises Failed, also for a worker that does
    not answer in STUCK seconds by the clock; UserError where math-verify is not installed.
    """

    def __init__(self, workers: int = 1, seconds: float = 1.0):
        self.workers = workers
        self.seconds = seconds
        self.cost = Cost()
        self.budget = BUDGET
        self.counted_at = time.monotonic()
        self.counting = threading.Lock()
        self.remembered: dict[bytes, bool | None | str] = {}
        # the last used is asked first; None: to be started
        self.idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(workers):
            self.idle.put(None)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for worker in [self.idle.get() for _ in range(self.workers)]:
            _end(worker)
            self.idle.put(None)

    def ask(self, gold: str, answer: str) -> bool | None:
        """Whether two tidy expressions are equal, None where one cannot be read.

        TimeoutError for an endless one.
        """
        if not _is_readable(gold) or _is_heavy(gold):
            return None
        if len(answer) > MAX_QUESTION or _is_heavy(answer):
            return False
        if not _is_readable(answer):
            return None
        question = json.dumps([gold, answer]).encode()
        if question not in self.remembered:
            if len(self.remembered) >= MAX_REMEMBERED:
                self.remembered.clear()
            self.remembered[question] = self._ask_worker(gold, answer)
        verdict = self.remembered[question]
        if verdict == "slow":
            raise TimeoutError
        return verdict

    def _ask_worker(self, gold: str, answer: str) -> bool | None | str:
        """The verdict, or 'slow'."""
        seconds = self.seconds if self.budget > 0 else min(QUICK, self.seconds)
        question = json.dumps([gold, answer, seconds]).encode() + b"\n"
        worker = self.idle.get()
        try:
            for _ in range(2):      # a worker may have died of something else
                worker = worker or self._start()
                reply = _exchange(worker, question, STUCK)
                if reply:
                    verdict, took = json.loads(reply)
                    self._count(took, verdict == "slow")
                    return verdict
                exit_status = _end(worker)
                worker = None
                if exit_status == -signal.SIGXCPU:
                    self._count(seconds + 1, True)
                    return "slow"
            return False
        except BaseException:       # nobody will read its reply
            _end(worker)
            worker = None
            raise
        finally:
            self.idle.put(worker)

    def _count(self, took: float, is_slow: bool) -> None:
        """A question's cost; what was beyond QUICK is taken from the budget."""
        with self.counting:
            now = time.monotonic()
            refilled = self.budget + REFILL * (now - self.counted_at)
            self.counted_at = now
            self.budget = min(BUDGET, refilled) - max(0.0, took - QUICK)
            self.cost.questions += 1
            self.cost.slow += is_slow
            self.cost.seconds += took

    def _start(self) -> subprocess.Popen:
        if not importlib.util.find_spec("math_verify"):
            # not at the top: a worker has no use for torch
            from common import UserError
            raise UserError("mathematics is judged with math-verify; "
                            "pip install math-verify==0.9.0")
        # A session of its own, so that Ctrl-C does not reach it; it ends when its input does.
        # -P: data/ is no place for sympy to import from.
        worker = subprocess.Popen(
            [sys.executable, "-P", __file__], bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            if not _exchange(worker, b"", START):
                raise Failed("a worker of the verifier does not start")
        except BaseException:
            _end(worker)
            raise
        return worker


def _exchange(worker: subprocess.Popen, question: bytes, seconds: float) -> bytes | None:
    """The reply, a line; None if the worker is dead; Failed after so many seconds."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    reply = b""
    try:
        worker.stdin.write(question)        # it fits into the pipe
        while not reply.endswith(b"\n"):
            milliseconds_left = 1000 * max(0, deadline - time.monotonic())
            if not poll.poll(milliseconds_left):
                raise Failed("a worker of the verifier does not answer")
            piece = os.read(worker.stdout.fileno(), 4096)
            if not piece:
                return None
            reply += piece
    except (BrokenPipeError, ConnectionResetError):
        return None
    return reply


def _end(worker: subprocess.Popen | None) -> int | None:
    """Kills it; its exit status, that of its own end if it was dead."""
    if worker is None:
        return None
    worker.kill()
    worker.stdin.close()
    worker.stdout.close()
    return worker.wait()


if __name__ == "__main__":
    _work()
