"""Work in pieces, on every core of this machine or on a Ray cluster: nobody else knows on which.

    for item, result in Engine("ray").map(function, items, "corpus", sizes): …

A function is one of a module; items and results are small: what is large goes to files, whole or
absent. An item may be done twice, by two machines at once where one is thought dead: both must come
to the same files. On a cluster the checkout and all folders lie where every machine has them.
"""
from settings import UserError

import importlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from threadpoolctl import threadpool_limits

from common import progress_bar

WORTH = 32e6   # bytes of input that are worth the start of a process, about two seconds
RETRIES = 10   # of an item whose worker or machine died
WINDOW = 4096  # items that Ray knows of at a time
SECONDS_TO_CONNECT = 10.0  # to a Ray cluster
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Engine:
    name: str = "processes"  # or "ray"
    workers: int = 0  # processes; 0: one a core, fewer for little work. Ray counts its own

    def map(self, function: Callable, items: Sequence, desc: str, sizes: Sequence[int],
            **same) -> Iterator[tuple]:
        """Yields (item, function(item, **same)) of each item as they are done, under a bar.

        sizes: bytes of each item, for the bar's speed and the time that is left; the largest go
        first, so that nobody waits for one that began last. What the function raises ends all.
        """
        order = sorted(range(len(items)), key=lambda i: -sizes[i])
        ordered = [items[i] for i in order]
        work = partial(_importable(function), **same)
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        n_workers = self.workers or min(cores, math.ceil(sum(sizes) / WORTH))
        if self.name == "ray":
            done = _on_ray(work, ordered)
        elif min(n_workers, len(items)) > 1:
            done = _in_processes(work, ordered, n_workers)
        else:
            done = ((i, work(item)) for i, item in enumerate(ordered))
        with progress_bar(desc=desc, total=sum(sizes), unit="B", unit_scale=True) as bar:
            for i, result in done:
                bar.update(sizes[order[i]])
                yield ordered[i], result


def _importable(function: Callable) -> Callable:
    """The same function by its module's own name, where workers find it, not as one of __main__."""
    if function.__module__ != "__main__":
        return function
    main = sys.modules["__main__"]
    if main.__spec__:  # python -m data.text.corpus
        name = main.__spec__.name
    else:              # python script.py
        name = Path(main.__file__).stem
    return getattr(importlib.import_module(name), function.__qualname__)


def _in_processes(work: Callable, items: list, n_workers: int) -> Iterator[tuple[int, object]]:
    """(number, result) of each item, by processes that end with this one."""
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that used threads can hang
    with ProcessPoolExecutor(min(n_workers, len(items)), spawn, _start_worker) as pool:
        numbers = {pool.submit(work, item): i for i, item in enumerate(items)}
        try:
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BaseException as error:  # nobody waits for items that are under way
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenExecutor):
                raise UserError("a worker was killed (too little memory?): run again with fewer "
                                "workers; what is whole is kept") from None
            raise


def _start_worker() -> None:
    """One thread; deaf to Ctrl-C, which the first process hears; gone when that is gone."""
    os.environ.update(ONE_THREAD)
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _on_ray(work: Callable, items: list) -> Iterator[tuple[int, object]]:
    """(number, result) of each item, by tasks that are done again where a machine dies."""
    ray = connect()
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_work_in)
    numbered = enumerate(items)
    waiting = {}  # a task's reference -> number of its item
    try:
        while True:
            for i, item in islice(numbered, WINDOW - len(waiting)):
                waiting[task.remote(os.getcwd(), work, item)] = i
            if not waiting:
                return
            [done], _ = ray.wait(list(waiting))
            yield waiting[done], ray.get(done)
            del waiting[done]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray gave up: {error!r:.200}; run again, and it goes on") from None
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def connect():
    """The module ray, with RAY_ADDRESS's cluster, or one that it starts on this machine."""
    try:
        import ray
    except ImportError:
        raise UserError("--engine=ray needs Ray: pip install ray") from None
    if not ray.is_initialized():
        check_address(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(log_to_driver=False, logging_level=40)  # workers import from where we are
        except Exception as error:  # what can go wrong has no common base
            raise UserError(f"no Ray cluster at RAY_ADDRESS: {error!r:.200}") from None
    return ray


def check_address(address: str) -> None:
    """UserError where nobody answers at HOST:PORT: Ray itself would try for ten minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto", "local", or none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from None


def _work_in(folder: str, work: Callable, item: object) -> object:
    """work(item) in the folder that the command runs in."""
    os.environ.update(ONE_THREAD)
    os.chdir(folder)
    return work(item)
