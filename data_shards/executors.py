"""Who does the tasks of a conversion: processes of this machine, or those of many."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.context import BaseContext

from data_shards.work import Done, Task, close_work, run_task

_PR_SET_PDEATHSIG = 1
_NOT_FORKED = ("torch", "nvidia.dali", "cv2", "pyarrow")
"""Libraries that start threads of their own."""


Engine = Callable[[Sequence[Task], int | None], Iterator[Done]]
"""Does tasks with so many workers, in any order; yields what each has got through."""


def engine(name: str) -> Engine:
    """The engine of this name: `processes` or `ray`.

    Raises:
        ValueError: Ray is not installed.
    """
    if name == "ray":
        from data_shards.executor_ray import run_tasks_ray

        return run_tasks_ray
    assert name == "processes", name
    return run_tasks


def run_tasks(tasks: Sequence[Task], workers: int | None) -> Iterator[Done]:
    """Does the tasks with so many processes (with this one where that is 1), in any order.

    Raises:
        OSError: a worker died, or the output cannot be written.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if workers <= 1 or tasks[0].location.startswith("memory:"):  # fsspec's memory:// belongs to one process
        try:
            yield from map(run_task, tasks)
        finally:
            close_work()
        return
    with ProcessPoolExecutor(workers, _context(), begin_worker, (os.getpid(),)) as pool:
        rest = iter(tasks)
        try:
            running: set[Future[Done]] = {pool.submit(run_task, task) for task in islice(rest, 2 * workers)}
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                running |= {pool.submit(run_task, task) for task in islice(rest, len(finished))}
            _end_idle(pool)
        except BrokenProcessPool:
            raise OSError("a conversion worker died, perhaps for lack of memory: try fewer `workers`") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_idle(pool: ProcessPoolExecutor) -> None:
    """Ends workers that have nothing left to do, before the pool asks them to leave.

    One that is killed while it waits for a task holds the queue's lock; the others would wait for that, and the pool for them.
    """
    for worker in list(pool._processes.values()):
        worker.terminate()


def _context() -> BaseContext:
    """Fork where that is safe, for it starts workers at once: no other thread runs, no library with threads is loaded."""
    safe = threading.active_count() == 1 and not any(name in sys.modules for name in _NOT_FORKED)
    return multiprocessing.get_context("fork" if safe else "spawn")


def begin_worker(parent: int) -> None:
    """Ctrl-C reaches the workers too: they leave quietly and the parent cleans up. They never outlive the parent."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we could ask to be told
        os._exit(1)
