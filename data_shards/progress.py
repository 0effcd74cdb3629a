"""Progress bars on standard error: one line with rate and remaining time, nothing at all where that is not a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_running: ContextVar[Progress | None] = ContextVar("running", default=None)


class Advance(Protocol):
    def __call__(self, done: int = 1, /) -> None: ...


class _Rate(TextColumn):
    """Items per second of a task, in the task's unit."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} {task.fields['unit']}/s")


@contextmanager
def progress(description: str, total: int, unit: str = "images", enabled: bool = True) -> Iterator[Advance]:
    """Shows how far a loop is; yields the function to call with the number of items just done.

    Args:
        description: what is being done, in a word or two.
        total: number of items in all.
        unit: what an item is, in the plural.
        enabled: False keeps it quiet (ranks other than 0).
    """
    if (running := _running.get()) is not None:  # a terminal has one live display: a bar inside another joins it
        task = running.add_task(description, total=total, unit=unit, visible=enabled)
        yield lambda done=1: running.advance(task, done)
        running.remove_task(task)
        return
    quiet = not (enabled and sys.stderr.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(""), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=quiet) as bar:
        task = bar.add_task(description, total=total, unit=unit)
        token = _running.set(bar)
        try:
            yield lambda done=1: bar.advance(task, done)
        finally:
            _running.reset(token)
