"""What ranks tell each other while they work, and how a rank's silence is put into words."""

import contextlib
import os
import socket
import time
from dataclasses import dataclass

EXIT_STALLED = 70
"""Exit code of a rank that ends a job because it hangs (EX_SOFTWARE of sysexits.h)."""
BEAT_S = 1.0
SILENT_S = 4.0
"""Seconds without a heartbeat after which a rank counts as silent."""
NO_BOARD = "rank 0, which keeps the heartbeats, does not answer any more"


@dataclass(frozen=True)
class Beat:
    """What a rank posts."""

    number: int
    host: str
    pid: int
    doing: str
    """What its main thread is at."""
    seconds: float
    """For how long."""
    alone: bool
    """Whether it does that without waiting for other ranks."""
    failed: str = ""
    """Why its main thread has ended; empty while it works."""
    code: int = 0
    """The exit code that goes with it."""

    @property
    def is_here(self) -> bool:
        """Whether its process is one of this machine's."""
        return self.host == socket.gethostname()


@dataclass(frozen=True)
class Verdict:
    """Why the job ends; the first rank to know posts it for all."""

    reason: str
    speaker: int
    """The rank that prints it."""
    code: int = EXIT_STALLED
    """The exit code of all ranks."""


def is_gone(beat: Beat) -> bool:
    """Whether a rank's process has ended, as far as this machine can know."""
    if not beat.is_here:
        return False
    try:
        os.kill(beat.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    with contextlib.suppress(OSError), open(f"/proc/{beat.pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"
    return False


def slowest(beats: dict[int, Beat]) -> dict[int, Beat]:
    """Ranks at something of their own, which the others wait for; else those at another thing than most; else all."""
    alone = {number: beat for number, beat in beats.items() if beat.alone}
    if alone:
        return alone
    doings = [beat.doing for beat in beats.values()]
    usual = max(doings, key=doings.count)
    others = {number: beat for number, beat in beats.items() if beat.doing != usual}
    return others or beats


def told(blamed: dict[int, Beat], seen: dict[int, tuple[int, float]]) -> str:
    """The ranks that are to blame, each with its process, its machine and what it was at.

    Args:
        seen: number of each rank's newest beat, and when it was first seen (`time.monotonic`).
    """
    now = time.monotonic()
    parts = []
    for number, beat in sorted(blamed.items()):
        quiet = now - seen[number][1]
        if beat.failed:
            state = f"failed at {beat.doing}: {beat.failed}"
        elif is_gone(beat):
            state = f"is dead; it was at {beat.doing}"
        elif quiet > SILENT_S:
            state = f"has been silent for {quiet:.0f} s, stopped or cut off; it was at {beat.doing}"
        else:
            state = f"has been at {beat.doing} for {beat.seconds:.0f} s"
        parts.append(f"rank {number} (process {beat.pid} on {beat.host}) {state}")
    return "; ".join(parts)
