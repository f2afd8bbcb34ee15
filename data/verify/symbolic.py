"""Are two expressions equal? math-verify 0.9.0, and its parser, in processes that may be killed.

It may take long, fill the memory or never return, so it works behind a pipe, with limits; and it
reads much that it misunderstands, so it only sees short expressions of a small alphabet
(data/verify/answers.py says why).
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
import time

MAX_QUESTION = 300      # characters of an expression
MEMORY = 1 << 30        # bytes of address space of a worker
START = 120.0           # seconds in which a worker must start: it imports sympy
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
    r"\{?[0-9]{2,}\}?[^()^]*\)\s*\^\s*\{?[0-9]{2})")
# Two numbers side by side, a mixed number or a product; and 3_8, of which it drops the base
_AMBIGUOUS = re.compile(r"[0-9] *(?: [0-9]|\\frac\{[0-9]+\}\{[0-9])|[0-9)}] *_")


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
        gold_left, gold_right = gold_sides
        answer_left, answer_right = answer_sides
        ratio = sympy.simplify((gold_left - gold_right) / (answer_left - answer_right))
        return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)
    [one], [other] = gold_sides, answer_sides
    if one.is_Symbol or other.is_Symbol:        # of which math-verify compares the letters
        return sympy.simplify(one - other) == 0
    # no time-out of its own, which is a signal
    return bool(verify(one, other, numeric_precision=50, timeout_seconds=None))


def _work(seconds: int) -> None:
    """The worker's life: answers each line of stdin, with so many seconds of CPU time for each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = sys.stdout
    sys.stdout = sys.stderr     # nothing that a library prints is taken for a verdict
    print(json.dumps(is_equal("x", "x")), file=replies, flush=True)     # imports are done: ready
    for line in sys.stdin:
        # The kernel kills it at the limit. Processor time, not the clock: a busy machine must
        # change no verdict.
        spent = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.RLIM_INFINITY))
        try:
            verdict = is_equal(*json.loads(line))
        except Exception:       # both were read, and sympy cannot compare them, or memory is full
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)


# ---- in front of the workers

class Failed(Exception):
    """The judge failed, not the answer: a worker cannot start, or gets no processor time."""


class Pool:
    """math-verify in so many processes, each started when it is first needed. Thread-safe.

    A question may take `seconds` of processor time, or ten times that by the clock; then its worker
    is killed, and another takes its place. Raises Failed; UserError where math-verify is not
    installed.
    """

    def __init__(self, workers: int = 1, seconds: int = 2):
        self.workers = workers
        self.seconds = seconds
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
        if not _is_readable(gold) or _HEAVY.search(gold):
            return None
        if len(answer) > MAX_QUESTION or _HEAVY.search(answer):
            return False
        if not _is_readable(answer):
            return None
        question = json.dumps([gold, answer]).encode() + b"\n"
        worker = self.idle.get()
        try:
            for _ in range(2):      # a worker may have died of something else
                worker = worker or self._start()
                reply = _exchange(worker, question, 10 * self.seconds)
                if reply:
                    return json.loads(reply)
                exit_status = _end(worker)
                worker = None
                if exit_status == -signal.SIGXCPU:
                    raise TimeoutError
            return False
        except BaseException:       # nobody will read its reply
            _end(worker)
            worker = None
            raise
        finally:
            self.idle.put(worker)

    def _start(self) -> subprocess.Popen:
        if not importlib.util.find_spec("math_verify"):
            # not at the top: a worker has no use for torch
            from common import UserError
            raise UserError("mathematics is judged with math-verify; "
                            "pip install math-verify==0.9.0")
        # A session of its own, so that Ctrl-C does not reach it; it ends when its input does.
        # -P: data/ is no place for sympy to import from.
        worker = subprocess.Popen(
            [sys.executable, "-P", __file__, str(self.seconds)], bufsize=0, start_new_session=True,
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
    _work(int(sys.argv[1]))
