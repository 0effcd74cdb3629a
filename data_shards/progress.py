"""Progress bars on standard error: one line with rate and remaining time, nothing at all where that is not a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

_running: ContextVar[Progress | None] = ContextVar("running", default=None)


class Advance(Protocol):
    def __call__(self, done: int = 1, size: int = 0, /) -> None: ...


class _Rate(TextColumn):
    """Items per second of a task, in the task's unit."""

    def render(self, task: Task) -> Text:
        speed = task.speed or 0
        text = f"{speed:,.0f} {task.fields['unit']}/s"
        if task.fields["bytes"] and task.completed:
            text += f", {speed * task.fields['bytes'] / task.completed / 1e6:,.0f} MB/s"
        return Text(text)


COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(""), TimeRemainingColumn())


@contextmanager
def progress(description: str, total: int | None, unit: str = "images", enabled: bool = True) -> Iterator[Advance]:
    """Shows how far a loop is; yields the function to call with the number of items just done, and perhaps their bytes.

    Args:
        description: what is being done, in a word or two.
        total: number of items in all; None where that is not known.
        unit: what an item is, in the plural.
        enabled: False keeps it quiet (ranks other than 0).
    """
    if (running := _running.get()) is not None:  # a terminal has one live display: a bar inside another joins it
        task = running.add_task(description, total=total, unit=unit, bytes=0, visible=enabled)
        yield _advance(running, task)
        running.remove_task(task)
        return
    quiet = not (enabled and sys.stderr.isatty())
    with Progress(*COLUMNS, console=Console(file=sys.stderr), disable=quiet) as bar:
        task = bar.add_task(description, total=total, unit=unit, bytes=0)
        token = _running.set(bar)
        try:
            yield _advance(bar, task)
        finally:
            _running.reset(token)


def _advance(bar: Progress, task: TaskID) -> Advance:
    def advance(done: int = 1, size: int = 0, /) -> None:
        bar.update(task, advance=done, bytes=bar.tasks[bar.task_ids.index(task)].fields["bytes"] + size)

    return advance
