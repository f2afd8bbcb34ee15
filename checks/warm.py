"""Commands that start at once: forked from a process that has loaded what the phases import.

Loading takes a process some four seconds, and tests start a hundred. `start` is subprocess.Popen
for them; real starts, by Python and torchrun, are what speedrun.sh and the other checks do.
"""
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

PRELOADED = ["pretrain", "sft", "distill", "reward", "rl", "evaluate", "refine", "generate",
             "data.llm", "data.text.corpus", "data.sets.synthesize"]


class Command:
    """What the tests use of a subprocess.Popen."""

    def __init__(self, process: multiprocessing.Process, output: Connection):
        self.process, self.pid = process, process.pid
        self.stdout = os.fdopen(os.dup(output.fileno()), "r")

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """The rest of the output, stdout and stderr; the process has then ended."""
        alarm = signal.signal(signal.SIGALRM, self._time_is_up)
        signal.alarm(int(timeout))
        try:
            with self.stdout:
                output = self.stdout.read()
            self.process.join()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, alarm)
        return output, None

    def _time_is_up(self, number, frame):
        self.process.kill()
        raise TimeoutError(f"process {self.pid} did not end in time")


def start(command: list[str], cwd: Path, ranks: int = 0) -> Command:
    """Starts a script with its arguments, or "-m", a module and its arguments.

    ranks: processes, with the variables that torchrun gives them (0: one, without).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    output, write_end = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(command, cwd, ranks, write_end))
    process.start()
    write_end.close()
    return Command(process, output)


def _run(command: list[str], cwd: Path, ranks: int, output: Connection) -> None:
    """In the new process: the command, as Python would run it."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    if ranks and _fork_ranks(ranks):
        return
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, str(cwd))
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(cwd, command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def _fork_ranks(n: int) -> bool:
    """False in each of n new processes; True in this one, once all have ended.

    As torchrun: a rank that fails ends the others, and then the exit code is 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = set()
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            return False
        running.add(pid)

    def tell(number: int) -> None:
        for pid in running:
            os.kill(pid, number)

    signal.signal(signal.SIGTERM, lambda number, frame: tell(number))
    failed = False
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not failed:
            failed = True
            tell(signal.SIGTERM)
    if failed:
        sys.exit(1)
    return True
