"""The sandbox: the only place where code that a model wrote is run.

    with Sandbox(workers=2) as box:
        # a script
        box.run("print(input())", stdin="hello")
        # values, to be compared out here: [2, 3]
        box.call("def f(x): return x + 1", "f", [[1], [2]]).values
        # tests, in a process of their own
        box.test("def f(x): return x + 1", "assert f(1) == 2", ["f"])

How it is locked in stands in data/verify/jail.py. Expected values never enter the process that runs
the program. A verdict is never taken from it either: only values, rebuilt here (or in the process
of the tests) from plain builtin types.

Each worker has a warm interpreter, a server, that forks a child for every program, in a few
milliseconds; nothing but data survives a program, and its folder is emptied. Tests are forked from
a second server, which never runs a program: the two share two pipes, and no folder, file or
Landlock domain. Threads may share a Sandbox, each takes a free worker. Linux on x86_64 or aarch64.
"""
import atexit
import fcntl
import functools
import json
import math
import os
import platform
import queue
import secrets
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

import common
from common import UserError
from data.verify import jail

# given to the interpreter by a pipe, which may be unable to read our folder
JAIL = Path(jail.__file__).read_bytes()


@dataclass(frozen=True)
class Limits:
    """Of one program. What goes beyond is killed."""
    seconds: float = 4.0        # of CPU time, of all its threads: a busy machine changes no verdict
    wall: float = 30.0          # from start to end; a program that only sleeps uses no CPU time
    memory: int = 512 << 20     # bytes of address space
    output: int = 1 << 20       # bytes of each: standard output, standard error, returned values
    file_size: int = 8 << 20    # bytes of a file, and 8 times as many of all
    files: int = 100            # in its folder
    threads: int = 100


@dataclass
class Result:
    """How a program ended.

    status: one of
        "ok", or for tests "passed"
        "error"     an exception, another exit code than 0, a failed test
        "time", "output", "files", "threads"    the limit that it broke
        "killed"    by a signal, as when memory runs out in C
        "broken"    the sandbox itself failed, which says nothing about the program (its reward is
                    None)
    """
    status: str
    stdout: str = ""
    stderr: str = ""
    # that the calls returned; a jail.Raised for each that raised
    values: list = field(default_factory=list)
    seconds: float = 0.0    # of CPU time


# what reading a message raises that a program may have forged
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError)


class Unavailable(UserError):
    """The machine lacks what the sandbox needs."""


class Broken(Exception):
    """A worker does not do what it is told."""


class Sandbox:
    """A pool of workers. Raises Unavailable where the kernel lacks a layer.

    python: the interpreter that runs the programs (default: this one's, without its virtual
        environment)
    paths: folders of packages that programs may import
    weak: where the kernel has no Landlock, and only there, goes on in the weaker jail of
        jail._hide_files. That is said at the start, and by common.describe_machine in every result.
    """

    def __init__(self, workers: int = 2, limits: Limits = Limits(), python: str = "",
                 paths: Sequence[str] = (), weak: bool = False):
        self.limits = limits
        python = python or os.path.realpath(sys._base_executable)
        self._start = functools.partial(_Worker, python, paths, weak)
        _sweep()
        self._free = queue.LifoQueue()  # the warmest first
        for _ in range(workers - 1):
            self._free.put(None)  # started when it is first needed, and again after one broke
        first = self._start()
        self._free.put(first)
        self.weakness = first.servers["programs"].weakness
        if self.weakness:
            print(f"warning: model-written code runs in a WEAKER jail: {self.weakness}",
                  file=sys.stderr)
            common.add_caveat("WEAKER jail for model-written code")
        try:
            # an honest program, with a module that is not yet imported
            result = self.run("import colorsys\nprint(colorsys.rgb_to_hsv(0, 0, 1)[2])")
            if result.stdout != "1\n":  # a jail that runs nothing passes every test of its walls
                raise Unavailable("the sandbox does not run an honest program: "
                                  f"{result.status}, {result.stderr!r}")
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

    def call(self, program: str, function: str, arguments: list[list],
             limits: Limits | None = None) -> Result:
        """The values that a function of the program returns for each list of arguments.

        Arguments and values are plain data (see jail.encode); values is whole only if status is
        "ok". One call sees what earlier ones did to the program's variables.
        """
        calls = [["get", 0, function]]
        calls += [["call", 1, jail.encode(args), jail.encode({})] for args in arguments]
        requests = b"".join(map(jail.frame, calls))

        def job(job):
            child = job.launch("serve", {0: "", 3: program, 5: requests}, outputs=(1, 2, 4))
            result = job.finish(child, "ok")
            with suppress(*MALFORMED):
                answers = _frames(child.outputs[4], len(calls))
                if len(answers) == len(calls) and answers[0] == {"object": 1}:
                    result.values = [_value(answer) for answer in answers[1:]]
            if result.status == "ok" and len(result.values) != len(arguments):
                result.status = "error"
            return result
        return self._job(job, limits)

    def test(self, program: str, tests: str, names: Sequence[str],
             limits: Limits | None = None) -> Result:
        """Whether the tests, trusted code with assertions, run to their end: status "passed".

        names: what the tests use of the program, as globals or by `from solution import …`. Each
        becomes a jail.Function, or, where one of them begins with a capital as classes do, a
        jail.Proxy: no other name of the program reaches the tests, so none can take the place of
        `len` or `sorted` there.
        """
        source = json.dumps([list(names), tests], ensure_ascii=False)
        token = secrets.token_hex(16)   # the tests' process shows it when all is done

        def job(job):
            calls_out, calls_in = job.pipe()
            answers_out, answers_in = job.pipe()
            child = job.launch("test", {0: "", 3: source, 7: token}, outputs=(1, 2, 4),
                               ours={5: answers_out, 6: calls_in})
            program_child = job.launch("serve", {0: "", 3: program}, outputs=(1, 2),
                                       ours={4: answers_in, 5: calls_out})
            job.close(calls_out, calls_in, answers_out, answers_in)
            result = job.finish(child, "passed")
            if result.status == "passed" and child.outputs[4] != token.encode():
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
def _shared(pid: int, weak: bool) -> Sandbox:
    box = Sandbox(workers=min(8, os.cpu_count() or 1), weak=weak)
    atexit.register(box.close)
    return box


FLAG = {"weak_jail": "where the kernel has no Landlock, run model-written code in a weaker jail: "
                     "docs/SECURITY.md says what that leaves open"}
_weak = False
_lock = threading.Lock()


def allow_weak_jail():
    """From now on `shared` works where the kernel has no Landlock, too: for --weak_jail."""
    global _weak
    _weak = True


def shared() -> Sandbox:
    """The sandbox of this process, made when it is first needed."""
    with _lock:
        return _shared(os.getpid(), _weak)


def same(value: object, expected: object) -> bool:
    """Whether two plain values are equal in type and value: True is not 1, and 1.0 is not 1."""
    if type(value) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(expected, dict):
        if value.keys() != expected.keys():
            return False
        return same(list(value.items()), list(expected.items()))
    both_are_nan = value != value and expected != expected
    return value == expected or both_are_nan


# --------------------------------------------------------------------------------------------------
# A worker: two locked-in interpreters, each with its folder

FOLDERS = "nanobeige-sandbox-"      # how the names of the folders begin


def _make_folder() -> tuple[str, int]:
    """A work folder, and an open file that holds its lock for as long as this process lives."""
    for _ in range(5):
        folder = tempfile.mkdtemp(prefix=FOLDERS)
        lock = _lock_folder(folder)
        if lock is not None and os.path.exists(folder):     # _sweep of another may have been faster
            return folder, lock
    raise Unavailable(f"no folder in {tempfile.gettempdir()} can be locked with flock")


def _lock_folder(folder: str) -> int | None:
    """An open file with the folder's lock; None if it is another user's, or in use."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    if os.fstat(lock).st_uid == os.geteuid():
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
    os.close(lock)
    return None


def _sweep():
    """Removes the folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(FOLDERS + "*"):
        lock = _lock_folder(str(folder))
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


class _Worker:
    """A server for programs, and one for tests, started when it is first needed."""

    def __init__(self, python: str, paths: Sequence[str], weak: bool):
        self._start = functools.partial(_Server, python, paths, weak)
        self.servers = {"programs": self._start()}

    def server(self, kind: str) -> "_Server":
        name = "tests" if kind == "test" else "programs"
        if name not in self.servers:
            self.servers[name] = self._start()
        return self.servers[name]

    def close(self):
        for server in self.servers.values():
            server.close()


class _Server:
    def __init__(self, python: str, paths: Sequence[str], weak: bool):
        if sys.platform != "linux" or platform.machine() not in jail.ARCHITECTURES:
            machines = " or ".join(jail.ARCHITECTURES)
            raise Unavailable(f"the sandbox needs Linux on {machines}")
        self.folder, self.lock = _make_folder()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(60)
        self.process = subprocess.Popen(
            [python, "-S", "-s", "-P", "-B", "-X", "utf8", "-",
             str(theirs.fileno()), self.folder, "weak" if weak else "whole", *paths],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1", "TZ": "UTC", "LANG": "C.UTF-8"},
            cwd="/", start_new_session=True, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            self.process.stdin.write(JAIL)
            self.process.stdin.close()
            answer = json.loads(self.control.recv(65536) or b"{}")
        except (OSError, ValueError):
            answer = {}
        if "instead" not in answer:
            reason = answer.get("refused")
            if not reason:
                errors = self.process.stderr.read1().decode("utf-8", "replace")
                reason = errors.strip()[-500:] or "the worker ended"
            self.close()
            hint = "" if weak else (
                ". --weak_jail runs it in a weaker jail, if one can be had (docs/SECURITY.md)")
            raise Unavailable(f"no safe place for model-written code here: {reason}{hint}")
        self.weakness = answer["instead"]

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

    def holds_more(self, files: int, size: int) -> bool:
        """Whether its folder has more files, or more bytes in all; nothing there can be removed."""
        with os.scandir(os.fsencode(self.folder)) as entries:
            for entry in entries:
                files -= 1
                size -= entry.stat(follow_symlinks=False).st_size
                if files < 0 or size < 0:
                    return True
        return False

    def empty_folder(self):
        for entry in os.scandir(os.fsencode(self.folder)):
            os.unlink(entry.path)   # there can be no folders in it

    def close(self):
        self.control.close()        # at which the server ends, and its children with it
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None         # closed more than once, it would be another's


# --------------------------------------------------------------------------------------------------
# A job: one or two children, what goes in and comes out of them, and its limits

# after so many rounds we take what is there every 2 ms: a program that writes byte by byte would
# wake us for each
BUSY_ROUNDS = 50


class _Child:
    def __init__(self, server: _Server, pid: int, pidfd: int):
        self.server, self.pid, self.pidfd, self.outputs = server, pid, pidfd, {}
        self.clock = ~pid << 3 | 2          # its CPU clock, as clock_getcpuclockid(3) makes it

    def text(self, number: int) -> str:
        return self.outputs[number].decode("utf-8", "replace")


class _Job:
    """Its children run while `finish` moves bytes and watches.

    Leaving the block kills and reaps what is left.
    """

    def __init__(self, worker: _Worker, limits: Limits):
        self.worker, self.limits = worker, limits
        self.children, self.fds = [], set()
        self.selector = selectors.DefaultSelector()
        self.seconds = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            for child in list(self.children):
                self.reap(child)
            for server in self.worker.servers.values():
                server.empty_folder()
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

    def launch(self, kind: str, inputs: dict[int, str | bytes], outputs: Sequence[int],
               ours: dict[int, int] = {}) -> _Child:
        """Starts a child with the fds `inputs`, texts to be written, and `outputs`, read whole.

        ours: {fd of the child: an fd of ours that it gets}; the caller closes these.
        """
        child_ends, our_ends = dict(ours), {}
        for number in inputs:
            child_ends[number], our_ends[number] = self.pipe()
        for number in outputs:
            our_ends[number], child_ends[number] = self.pipe()
        limits = self.limits
        request = dict(
            kind=kind, numbers=list(child_ends), memory=limits.memory,
            cpu=math.ceil(limits.seconds) + 1, file_size=limits.file_size, output=limits.output)
        server = self.worker.server(kind)
        answer, (pidfd,) = server.ask(request, list(child_ends.values()))
        self.close(*(fd for number, fd in child_ends.items() if number not in ours))
        child = _Child(server, answer["pid"], pidfd)
        self.fds.add(pidfd)
        self.children.append(child)
        for number, fd in our_ends.items():
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
        """Waits for the end of this child, then kills the others.

        good: the status for exit code 0.
        """
        self.selector.register(child.pidfd, selectors.EVENT_READ)
        self.deadline = time.monotonic() + self.limits.wall
        broken, rounds = "", 0
        while not broken:
            rounds += 1
            if rounds > BUSY_ROUNDS:
                time.sleep(0.002)
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
        if not broken and not self.read_rest():
            broken = "output"
        code = codes[child]
        if broken:
            status = broken
        elif code == 0:
            status = good
        else:
            status = "error" if code > 0 else "killed"
        if code == -signal.SIGXCPU or (self.seconds > self.limits.seconds and not broken):
            status = "time"
        return Result(status, child.text(1), child.text(2), seconds=self.seconds)

    def read_rest(self) -> bool:
        """Moves what is still in the pipes; False if it is too much."""
        while True:
            events = self.selector.select(0)
            waiting = [key for key, _ in events if isinstance(key.data, bytearray)]
            if not waiting:
                return True
            if not all([self.read(key.fd, key.data) for key in waiting]):
                return False

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
            if child.server.holds_more(limits.files, 8 * limits.file_size):
                return "files"
        return ""

    def reap(self, child: _Child) -> int:
        """Kills a child if it still runs; its exit code, negative for a signal."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        answer, _ = child.server.ask({"reap": child.pid})
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
