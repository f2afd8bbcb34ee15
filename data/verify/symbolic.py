"""Are two expressions equal? math-verify 0.9.0, and the parser that it rests on, in processes that may be killed.

It may take long, fill the memory or never return, so it works behind a pipe, with limits; and it reads much that it
misunderstands, so it only sees short expressions of a small alphabet (data/verify/answers.py says why).
"""
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
START = 120.0           # seconds in which a worker must have started: it imports sympy, perhaps on a busy machine
FUNCTIONS = ("arcsin", "arccos", "arctan", "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln",
             "log", "exp", "sqrt", "pi")


# ---- the worker: a process that reads questions and writes verdicts, a line of JSON each

_COMMANDS = ("frac", r"sqrt(?:\[[2-9]\])?", "cdot", "binom", "infty", "alpha", "beta", "theta", "lambda", "mu", "phi",
             "omega", "sigma", "delta", *FUNCTIONS)
_MATHEMATICS = re.compile(rf"(?:\\(?:{'|'.join(_COMMANDS)})(?![A-Za-z])|(?<![A-Za-z\\])[A-Za-z]{{1,2}}(?![A-Za-z])|"
                          r"[0-9]|\.[0-9]|[-+/^_(){}|= ])++")
# Towers, which never end: 9^{9^9}, 9^9^9, (9^{99})^{99}
_HEAVY = re.compile(r"!|\^\s*(?:\{[^{}]*\}?\s*\^|\{?-?[0-9]{5}|[0-9A-Za-z]+\s*\^|"
                    r"\{?[0-9]{2,}\}?[^()^]*\)\s*\^\s*\{?[0-9]{2})")


# Two numbers side by side, a mixed number or a product; and 3_8, of which it drops the base
_AMBIGUOUS = re.compile(r"[0-9] *(?: [0-9]|\\frac\{[0-9]+\}\{[0-9])|[0-9)}] *_")


def _readable(text: str) -> bool:
    """Whether math-verify may see it: short, its alphabet, no words, nothing ambiguous."""
    return len(text) <= MAX_QUESTION and bool(_MATHEMATICS.fullmatch(text)) and not _AMBIGUOUS.search(text)


def _judge(gold: str, answer: str) -> bool | None:
    """Whether two expressions, or two equations up to a factor, are equal; None where one of them is neither."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
    from math_verify import verify

    class Parser(_Latex2Sympy):
        def convert_postfix_list(self, factors: list, i: int = 0) -> sympy.Expr:
            """Factors side by side; to the library 5(6) is 5 + 6, a mixed number."""
            factor = self.convert_postfix(factors[i])
            if not isinstance(factor, sympy.Expr):
                raise ValueError("a set, or a derivative")
            return factor if i == len(factors) - 1 else self.mul_flat(factor, self.convert_postfix_list(factors, i + 1))

    def parse(text: str) -> sympy.Expr | None:
        exact = re.sub(r"([0-9]*)\.([0-9]+)", lambda m: f"{{\\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}}}", text)
        try:
            # lowercase_symbols=False: R is not r
            value = Parser(is_real=True, config=ConversionConfig(lowercase_symbols=False)).parse(exact)
        except Exception:       # the parser raises just that
            return None
        return value.subs(sympy.Symbol("i", real=True), sympy.I).doit() if isinstance(value, sympy.Expr) else None

    sides = [[parse(side) for side in text.split("=")] for text in (gold, answer)]
    if len(sides[0]) != len(sides[1]) or len(sides[0]) > 2 or None in sides[0] + sides[1]:
        return None
    if len(sides[0]) == 2:
        ratio = sympy.simplify((sides[0][0] - sides[0][1]) / (sides[1][0] - sides[1][1]))
        return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero)
    one, other = sides[0][0], sides[1][0]
    if one.is_Symbol or other.is_Symbol:        # of which math-verify compares the letters
        return sympy.simplify(one - other) == 0
    return bool(verify(one, other, numeric_precision=50, timeout_seconds=None))     # its time-outs are signals


def _work(seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies, sys.stdout = sys.stdout, sys.stderr        # nothing that a library prints is taken for a verdict
    print(json.dumps(_judge("x", "x")), file=replies, flush=True)   # imports are done: ready
    for line in sys.stdin:
        # The kernel kills it at the limit. Processor time, not the clock: a busy machine must change no verdict.
        spent = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, resource.RLIM_INFINITY))
        try:
            verdict = _judge(*json.loads(line))
        except Exception:       # both were read, and sympy cannot compare them, or its memory is full
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)


# ---- in front of the workers

class Failed(Exception):
    """The judge failed, not the answer: a worker cannot start, or gets no processor time."""


class Pool:
    """math-verify in so many processes, each started when it is first needed. Thread-safe.

    A question may take `seconds` of processor time, or ten times that by the clock; then its worker is killed, and
    another takes its place. Raises Failed; UserError where math-verify is not installed.
    """

    def __init__(self, workers: int = 1, seconds: int = 2):
        self.workers, self.seconds = workers, seconds
        self.idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()     # the last used is asked first
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
        """Whether two tidy expressions are equal, None where one cannot be read. TimeoutError for an endless one."""
        if not _readable(gold) or _HEAVY.search(gold):
            return None
        if len(answer) > MAX_QUESTION or _HEAVY.search(answer):
            return False
        if not _readable(answer):
            return None
        worker, question = self.idle.get(), json.dumps([gold, answer]).encode() + b"\n"
        try:
            for _ in range(2):      # a worker may have died of something else
                worker = worker or self._start()
                reply = _exchange(worker, question, 10 * self.seconds)
                if reply:
                    return json.loads(reply)
                code, worker = _end(worker), None
                if code == -signal.SIGXCPU:
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
            from common import UserError        # not at the top: a worker has no use for torch
            raise UserError("mathematics is judged with math-verify; pip install math-verify==0.9.0")
        # A session of its own, so that Ctrl-C does not reach it; it ends when its input does. -P: data/ is no place
        # for sympy to import from.
        worker = subprocess.Popen([sys.executable, "-P", __file__, str(self.seconds)], bufsize=0,
                                  start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL)
        try:
            if not _exchange(worker, b"", START):
                raise Failed("a worker of the verifier does not start")
        except BaseException:
            _end(worker)
            raise
        return worker


def _exchange(worker: subprocess.Popen, question: bytes, seconds: float) -> bytes | None:
    """The reply, a line; None if the worker is dead; Failed after so many seconds."""
    deadline, reply, waiting = time.monotonic() + seconds, b"", select.poll()
    waiting.register(worker.stdout, select.POLLIN)
    try:
        worker.stdin.write(question)        # it fits into the pipe
        while not reply.endswith(b"\n"):
            if not waiting.poll(1000 * max(0, deadline - time.monotonic())):
                raise Failed("a worker of the verifier does not answer")
            if not (piece := os.read(worker.stdout.fileno(), 4096)):
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
