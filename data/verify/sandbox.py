"""The sandbox: the only place where code that a model wrote is run. How it is locked in stands in data/verify/jail.py.

    with Sandbox(workers=2) as box:
        box.run("print(input())", stdin="hello")                        # a script
        box.call("def f(x): return x + 1", "f", [[1], [2]]).values      # [2, 3], to be compared out here
        box.test("def f(x): return x + 1", "assert f(1) == 2", ["f"])   # tests, in a process of their own

Expected values never enter the process that runs the program. A verdict is never taken from it either: only values,
rebuilt here (or in the process of the tests) from plain builtin types.

Each worker is a warm interpreter that forks a child for every program, in a few milliseconds; nothing but data survives
a program, and its folder is emptied. Threads may share a Sandbox, each takes a free worker. Linux on x86_64 or aarch64.
"""
import atexit
import functools
import json
import math
import os
import platform
import queue
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError
from data.verify import jail

JAIL = Path(jail.__file__).read_bytes()  # given to the interpreter by a pipe, which may be unable to read our folder


@dataclass(frozen=True)
class Limits:
    """Of one program. What goes beyond is killed."""
    seconds: float = 4.0         # of CPU time, over all its threads: a busy machine changes no verdict
    wall: float = 30.0           # from start to end; a program that only sleeps uses no CPU time
    memory: int = 512 << 20      # bytes of address space
    output: int = 1 << 20        # bytes of each: standard output, standard error, returned values
    file_size: int = 8 << 20     # bytes of a file, and 8 times as many of all
    files: int = 100             # in its folder
    threads: int = 100


@dataclass
class Result:
    """How a program ended.

    status: "ok", or for tests "passed"; "error": an exception, another exit code than 0, a failed test; "time",
    "output", "files", "threads": the limit that it broke; "killed": by a signal, as when memory runs out in C;
    "broken": the sandbox itself failed, which says nothing about the program (its reward is None).
    """
    status: str
    stdout: str = ""
    stderr: str = ""
    values: list = field(default_factory=list)  # that the calls returned; a jail.Raised for each that raised
    seconds: float = 0.0                        # of CPU time


class Unavailable(UserError):
    """The machine lacks what the sandbox needs."""


class Broken(Exception):
    """A worker does not do what it is told."""


class Sandbox:
    """A pool of workers. Raises Unavailable where the kernel lacks a layer, unless unsafe.

    python: the interpreter that runs the programs (default: this one's, without its virtual environment).
    paths: folders of packages that programs may import. unsafe: runs model-written code without the layers that are
    missing, so with your own rights to read, write and send. Only for machines that hold nothing.
    """

    def __init__(self, workers: int = 2, limits: Limits = Limits(), python: str = "", paths: Sequence[str] = (),
                 unsafe: bool = False):
        self.limits = limits
        self._start = functools.partial(_Worker, python or os.path.realpath(sys._base_executable), paths, unsafe)
        self._free = queue.LifoQueue()  # the warmest first
        for _ in range(workers - 1):
            self._free.put(None)  # started when it is first needed, and again after one broke
        self._free.put(self._start())
        try:
            result = self.run("import colorsys\nprint(colorsys.rgb_to_hsv(0, 0, 1)[2])")    # a module not yet imported
            if result.stdout != "1\n":  # a jail that runs nothing passes every test of its walls
                raise Unavailable(f"the sandbox does not run an honest program: {result.status}, {result.stderr!r}")
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        for worker in self.workers():
            worker.close()

    def workers(self) -> list:
        return [worker for worker in self._free.queue if worker]

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Result:
        """Runs a script; its result is what it printed."""
        def job(job):
            child = job.launch("run", {0: stdin, 3: program}, outputs=(1, 2))
            return job.finish(child, "ok")
        return self._job(job, limits)

    def call(self, program: str, function: str, arguments: list[list], limits: Limits | None = None) -> Result:
        """The values that a function of the program returns for each list of arguments (plain data, see jail.encode).

        values is whole only if status is "ok". One call sees what earlier ones did to the program's variables.
        """
        calls = [["get", 0, function], *(["call", 1, jail.encode(a), jail.encode({})] for a in arguments)]
        requests = b"".join(map(jail.frame, calls))

        def job(job):
            child = job.launch("serve", {0: "", 3: program, 5: requests}, outputs=(1, 2, 4))
            result = job.finish(child, "ok")
            with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
                answers = _frames(child.outputs[4], len(calls))
                if len(answers) == len(calls) and answers[0] == {"object": 1}:
                    result.values = [_value(answer) for answer in answers[1:]]
            if result.status == "ok" and len(result.values) != len(arguments):
                result.status = "error"
            return result
        return self._job(job, limits)

    def test(self, program: str, tests: str, names: Sequence[str], limits: Limits | None = None) -> Result:
        """Whether the tests, trusted code with assertions, run to their end: status "passed".

        names: what the tests use of the program, as globals or by `from solution import …`. Each becomes a jail.Proxy:
        no other name of the program reaches the tests, so none can take the place of `len` or `sorted` there.
        """
        def job(job):
            calls, answers = job.pipe(), job.pipe()
            program_child = job.launch("serve", {0: "", 3: program}, (1, 2), {4: answers[1], 5: calls[0]})
            child = job.launch("test", {0: "", 3: tests}, (1, 2, 4), {5: answers[0], 6: calls[1]}, names=list(names))
            job.close(*calls, *answers)
            result = job.finish(child, "passed")
            if result.status == "passed" and child.outputs[4] != b"passed":
                result.status = "error"
            result.stderr += program_child.text(2)
            return result
        return self._job(job, limits)

    def _job(self, body, limits: Limits | None) -> Result:
        for _ in range(2):  # once more with another worker if one broke
            worker = self._free.get()
            try:
                worker = worker or self._start()
                with _Job(worker, limits or self.limits) as job:
                    return body(job)
            except BaseException as error:
                if worker:  # what it says next may be the answer to this job
                    worker.close()
                    worker = None
                if not isinstance(error, (Broken, OSError, Unavailable)):
                    raise
            finally:
                self._free.put(worker)
        return Result("broken")


@functools.cache
def _shared(pid: int, unsafe: bool) -> Sandbox:
    box = Sandbox(workers=min(8, os.cpu_count() or 1), unsafe=unsafe)
    atexit.register(box.close)
    return box


FLAG = {"unsafe_exec": "run model-written code even without the sandbox's layers: with all your rights"}
_unlocked = False
_lock = threading.Lock()


def allow_unlocked():
    """From now on `shared` works where the kernel lacks a layer, too. A script calls it for --unsafe-exec."""
    global _unlocked
    _unlocked = True


def shared() -> Sandbox:
    """The sandbox of this process, made when it is first needed."""
    with _lock:
        return _shared(os.getpid(), _unlocked)


def same(got: object, wanted: object) -> bool:
    """Whether two plain values are equal in type and value: True is not 1, and 1.0 is not 1."""
    if type(got) is not type(wanted):
        return False
    if isinstance(wanted, (list, tuple)):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    if isinstance(wanted, dict):
        return same(list(got.items()), list(wanted.items())) if got.keys() == wanted.keys() else False
    return got == wanted or got != got and wanted != wanted


# ---------------------------------------------------------------------------------------------------------------------
# A worker: the locked-in interpreter and its folder

class _Worker:
    def __init__(self, python: str, paths: Sequence[str], unsafe: bool):
        if sys.platform != "linux" or platform.machine() not in jail.ARCHITECTURES:
            raise Unavailable(f"the sandbox needs Linux on {' or '.join(jail.ARCHITECTURES)}")
        self.folder = tempfile.mkdtemp(prefix="sandbox-")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(60)
        command = [python, "-S", "-s", "-P", "-B", "-X", "utf8", "-", str(theirs.fileno()), self.folder,
                   "unsafe" if unsafe else "safe", *paths]
        environment = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1", "TZ": "UTC", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, env=environment, cwd="/", start_new_session=True,
                                        pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            self.process.stdin.write(JAIL)
            self.process.stdin.close()
            answer = json.loads(self.control.recv(65536) or b"{}")
        except (OSError, ValueError):
            answer = {}
        if "missing" not in answer:
            said = answer.get("refused") or self.process.stderr.read1().decode("utf-8", "replace").strip()[-500:]
            self.close()
            raise Unavailable(f"no safe place for model-written code here: {said or 'the worker ended'}. --unsafe-exec "
                              "runs it without: with all your rights, on all your files")
        if answer["missing"]:
            print(f"warning: model-written code runs WITHOUT {'; '.join(answer['missing'])}", file=sys.stderr)

    def ask(self, request: dict, fds: Sequence[int] = ()) -> tuple[dict, list[int]]:
        socket.send_fds(self.control, [json.dumps(request).encode()], fds)
        data, received, _, _ = socket.recv_fds(self.control, 4096, 1)
        try:
            answer = json.loads(data)
        except ValueError:
            raise Broken("no answer") from None
        if "failed" in answer:
            raise Broken(answer["failed"])
        return answer, received

    def empty_folder(self):
        for entry in os.scandir(os.fsencode(self.folder)):
            os.unlink(entry.path)   # there can be no folders in it

    def close(self):
        self.control.close()        # at which the server ends, and its children with it
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# A job: one or two children, what goes in and comes out of them, and its limits

class _Child:
    def __init__(self, pid: int, pidfd: int):
        self.pid, self.pidfd, self.outputs = pid, pidfd, {}
        self.clock = ~pid << 3 | 2          # its CPU clock, as clock_getcpuclockid(3) makes it

    def text(self, number: int) -> str:
        return self.outputs[number].decode("utf-8", "replace")


class _Job:
    """Its children run while `finish` moves bytes and watches; leaving the block kills and reaps what is left."""

    def __init__(self, worker: _Worker, limits: Limits):
        self.worker, self.limits, self.children, self.fds = worker, limits, [], set()
        self.selector = selectors.DefaultSelector()
        self.seconds = 0.0
        self.deadline = time.monotonic() + limits.wall

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            for child in list(self.children):
                self.reap(child)
            self.worker.empty_folder()
        finally:
            self.selector.close()
            self.close(*self.fds)

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self.fds.update(ends)
        return ends

    def close(self, *fds: int):
        for fd in self.fds.intersection(fds):
            self.fds.remove(fd)
            os.close(fd)

    def launch(self, kind: str, inputs: dict[int, str | bytes], outputs: Sequence[int], given: dict[int, int] = {},
               **more) -> _Child:
        """Starts a child whose fds are: inputs, texts to be written; outputs, read to the end; given, ours."""
        theirs, ours = dict(given), {}
        for number in inputs:
            theirs[number], ours[number] = self.pipe()
        for number in outputs:
            ours[number], theirs[number] = self.pipe()
        limits = self.limits
        request = dict(kind=kind, numbers=list(theirs), memory=limits.memory, cpu=math.ceil(limits.seconds) + 1,
                       file_size=limits.file_size, output=limits.output, **more)
        answer, (pidfd,) = self.worker.ask(request, list(theirs.values()))
        self.close(*(fd for number, fd in theirs.items() if number not in given))
        child = _Child(answer["pid"], pidfd)
        self.fds.add(pidfd)
        self.children.append(child)
        for number, fd in ours.items():
            os.set_blocking(fd, False)
            if number in inputs:
                text = inputs[number]
                data = text.encode("utf-8", "replace") if isinstance(text, str) else text
                self.selector.register(fd, selectors.EVENT_WRITE, memoryview(data))
                self.write(fd)              # mostly it fits
            else:
                child.outputs[number] = bytearray()
                self.selector.register(fd, selectors.EVENT_READ, child.outputs[number])
        return child

    def write(self, fd: int):
        key = self.selector.get_key(fd)
        try:
            rest = key.data[os.write(fd, key.data):]
        except BlockingIOError:
            return
        except BrokenPipeError:             # it reads no more
            rest = b""
        if rest:
            self.selector.modify(fd, selectors.EVENT_WRITE, rest)
        else:
            self.selector.unregister(fd)
            self.close(fd)

    def read(self, fd: int, into: bytearray) -> bool:
        """Moves what is there; False if it is too much."""
        data = os.read(fd, 1 << 16)
        into += data
        if not data:
            self.selector.unregister(fd)
            self.close(fd)
        return len(into) <= self.limits.output

    def finish(self, child: _Child, good: str) -> Result:
        """Waits for the end of this child, then kills the others. good: the status for exit code 0."""
        self.selector.register(child.pidfd, selectors.EVENT_READ)
        broken = ""
        while not broken:
            events = self.selector.select(0.02)
            for key, _ in events:
                if isinstance(key.data, memoryview):
                    self.write(key.fd)
                elif key.data is not None and not self.read(key.fd, key.data):
                    broken = "output"
            if any(key.fd == child.pidfd for key, _ in events):
                break
            broken = broken or self.broken_limit()
        codes = {c: self.reap(c) for c in list(self.children)}
        while not broken and (left := [k for k, _ in self.selector.select(0) if isinstance(k.data, bytearray)]):
            if not all([self.read(key.fd, key.data) for key in left]):  # what was still in the pipes
                broken = "output"
        code = codes[child]
        status = broken or (good if code == 0 else "error" if code > 0 else "killed")
        if code == -signal.SIGXCPU or self.seconds > self.limits.seconds and not broken:
            status = "time"
        return Result(status, child.text(1), child.text(2), seconds=self.seconds)

    def broken_limit(self) -> str:
        limits = self.limits
        if time.monotonic() > self.deadline:
            return "time"
        for child in self.children:
            with suppress(OSError):         # it has ended
                if time.clock_gettime(child.clock) > limits.seconds:
                    return "time"
                if os.stat(f"/proc/{child.pid}/task").st_nlink - 2 > limits.threads:
                    return "threads"
        sizes = []
        for entry in os.scandir(os.fsencode(self.worker.folder)):
            with suppress(OSError):
                sizes.append(entry.stat(follow_symlinks=False).st_size)
        return "files" if len(sizes) > limits.files or sum(sizes) > 8 * limits.file_size else ""

    def reap(self, child: _Child) -> int:
        """Kills a child if it still runs; its exit code, negative for a signal."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        answer, _ = self.worker.ask({"reap": child.pid})
        self.children.remove(child)
        self.seconds = max(self.seconds, answer["seconds"])
        return answer["code"]


def _frames(data: bytes, most: int) -> list:
    """The messages, one more than `most` at most: a program may send any number."""
    messages, at = [], 0
    while at < len(data) and len(messages) <= most:
        size = int.from_bytes(data[at:at + 4], "big")
        messages.append(json.loads(bytes(data[at + 4:at + 4 + size])))
        at += 4 + size
    return messages


def _value(answer: object) -> object:
    try:
        return jail.decode(answer)
    except jail.Raised as raised:
        return raised
