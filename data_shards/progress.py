"""Progress bars on standard error: one line with rate and remaining time, nothing at all where that is not a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    def __call__(self, done: int = 1, size: int = 0, /) -> None: ...


@contextmanager
def progress(description: str, total: int | None, unit: str = "images", enabled: bool = True) -> Iterator[Advance]:
    """Shows how far a loop is; yields the function to call with the number of items just done, and perhaps their bytes.

    Args:
        description: what is being done, in a word or two.
        total: number of items in all; None where that is not known.
        unit: what an item is, in the plural.
        enabled: False keeps it quiet (ranks other than 0).
    """
    if not (enabled and sys.stderr.isatty()):
        yield _nothing
        return
    from data_shards.progress_bar import bar

    with bar(description, total, unit, sys.stderr) as advance:
        yield advance


def _nothing(done: int = 1, size: int = 0, /) -> None:
    pass
