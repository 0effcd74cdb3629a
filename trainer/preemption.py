"""Being asked to stop: Slurm's preemption or time limit, a spot machine's end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 75
"""Exit code of a run that has saved and wants to be started again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What Slurm sends before it ends a job: by itself, and with `--signal`."""


class Preempted(Exception):
    """A rank was asked to stop; all have saved this step."""

    def __init__(self, step: int) -> None:
        super().__init__(f"asked to stop: step {step} is saved, --run.resume goes on from it")


class Asked:
    """Whether this rank was asked to stop."""

    now = False


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """While inside, a signal to this process is noted instead of ending it: the next step tells all ranks."""
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        asked.now = True

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield asked
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
