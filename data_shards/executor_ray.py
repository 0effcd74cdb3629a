"""The tasks of a conversion done by a Ray cluster: core tasks, nothing else of Ray. The only import of ray."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from data_shards.work import Done, Task, run_task

LEAST_VERSION = (2, 52)
"""The first with authentication by token, which we leave as it is set up."""
MAX_RETRIES = 5
"""Of a task whose worker or machine dies; it writes the same bytes again."""
_WAITING = 2
"""Tasks given out for each processor of the cluster."""


def run_tasks_ray(tasks: Sequence[Task], workers: int | None) -> Iterator[Done]:
    """Does the tasks with the cluster that RAY_ADDRESS names or that runs here, or with one of so many workers started for it.

    All machines must see source and output under the same path or URL, and have facescale installed.

    Raises:
        ValueError: Ray is not installed or too old, or the output belongs to one process.
        OSError: a task failed, or its worker died again and again.
    """
    ray = _imported()
    if tasks[0].location.startswith("memory:"):
        raise ValueError(
            f"output {tasks[0].location} belongs to one process: the executor ray needs one that machines share"
        )
    started = not ray.is_initialized()
    if started:
        _connect(ray, workers)
    try:
        yield from _run(ray, tasks)
    finally:
        if started:
            ray.shutdown()


def _run(ray: Any, tasks: Sequence[Task]) -> Iterator[Done]:
    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_task_in_folder)
    folder, rest = os.getcwd(), iter(tasks)
    window = max(2, _WAITING * int(ray.cluster_resources().get("CPU", 1)))
    running = [remote.remote(folder, task) for task in islice(rest, window)]
    while running:
        finished, running = ray.wait(running)
        for reference in finished:
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, OSError | ValueError) else OSError(_line(error)) from None
            except ray.exceptions.RayError as error:
                raise OSError(f"a Ray task was lost {MAX_RETRIES + 1} times: {_line(error)}") from None
        running += [remote.remote(folder, task) for task in islice(rest, len(finished))]


def _task_in_folder(folder: str, task: Task) -> Done:
    if os.path.isdir(folder):
        os.chdir(folder)  # paths may be relative to where the conversion was started
    return run_task(task)


def _connect(ray: Any, workers: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(num_cpus=workers or len(os.sched_getaffinity(0)), include_dashboard=False, **quiet)


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("executor ray: Ray is not installed: pip install 'facescale[ray]'") from None
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ValueError(f"executor ray: Ray {ray.__version__} is installed, needed is {least} or newer")
    return ray


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[-300:]
