"""What each rank says, in RUN/logs/rank-N.log, with the time. Rank 0 says it on the console as well; of the others, only our own
lines come through: what libraries say once a rank is for the file."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from trainer.collectives import rank

LOGS = "logs"
"""Name of the folder in a run's."""
_OURS = "facescale: "


@contextmanager
def logged(run: Path) -> Iterator[None]:
    """Appends to this rank's file what it says inside, and the traceback with which it leaves, if it does.

    Args:
        run: the run folder; it exists.
    """
    (run / LOGS).mkdir(exist_ok=True)
    with (run / LOGS / f"rank-{rank()}.log").open("a", buffering=1, encoding="utf-8") as file:
        log, before = _Log(file), sys.stderr
        with _elsewhere(file) if rank() else _unchanged(before) as console:
            sys.stderr = _Both(console, log, all_of_it=not rank())
            try:
                yield
            except BaseException:
                log.write(traceback.format_exc())
                raise
            finally:
                sys.stderr.flush()
                sys.stderr = before


@contextmanager
def _unchanged(console: TextIO) -> Iterator[TextIO]:
    yield console


@contextmanager
def _elsewhere(file: TextIO) -> Iterator[TextIO]:
    """Sends descriptors 1 and 2, which libraries of C++ write to, into the file; yields the console that they were."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    with os.fdopen(kept[1], "w", buffering=1, closefd=False) as console:
        try:
            yield console
        finally:
            sys.stdout.flush()
            for was, descriptor in zip(kept, (1, 2), strict=True):
                os.dup2(was, descriptor)
                os.close(was)


class _Log:
    """Whole lines, each with its time; progress bars, which move the cursor, are left out."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._line = file, ""

    def write(self, text: str) -> list[str]:
        """Returns the lines that this has completed."""
        if "\r" in text or "\x1b" in text:
            return []
        *lines, self._line = (self._line + text).split("\n")
        for line in filter(str.strip, lines):
            self._file.write(f"{datetime.now().astimezone().isoformat(' ', 'seconds')} {line}\n")
        return lines


class _Both:
    """Standard error for console and log."""

    def __init__(self, console: TextIO, log: _Log, all_of_it: bool) -> None:
        self._console, self._log, self._all = console, log, all_of_it

    def write(self, text: str) -> int:
        lines = self._log.write(text)
        if self._all:
            self._console.write(text)
        else:
            self._console.writelines(f"{line}\n" for line in lines if line.startswith(_OURS))
        return len(text)

    def flush(self) -> None:
        self._console.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)
