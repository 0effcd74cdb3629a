"""The bars that `progress` draws on a terminal. Apart, for rich takes longer to import than a small conversion's plan to make."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_shards.progress import Advance

_running: ContextVar[Progress | None] = ContextVar("running", default=None)


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
def bar(description: str, total: int | None, unit: str, file: TextIO) -> Iterator[Advance]:
    """A bar with rate and remaining time; a terminal has one live display, so a bar inside another joins it."""
    if (running := _running.get()) is not None:
        task = running.add_task(description, total=total, unit=unit, bytes=0)
        yield _advance(running, task)
        running.remove_task(task)
        return
    with Progress(*COLUMNS, console=Console(file=file)) as display:
        task = display.add_task(description, total=total, unit=unit, bytes=0)
        token = _running.set(display)
        try:
            yield _advance(display, task)
        finally:
            _running.reset(token)


def _advance(display: Progress, task: TaskID) -> Advance:
    def advance(done: int = 1, size: int = 0, /) -> None:
        shown = display.tasks[display.task_ids.index(task)]
        display.update(task, advance=done, bytes=shown.fields["bytes"] + size)

    return advance
