"""Ends a job that hangs, and says which rank was to blame and what it was doing.

A thread of each rank posts a heartbeat every second, whatever the rank's main thread is waiting for. A rank that has been at one
thing for too long, or that finds another rank's process gone, reads all heartbeats, names the ranks that are silent or that
hold up the others, kills those of them that run on its own machine, and ends.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from trainer.collectives import Board, rank, world_size

EXIT_STALLED = 70
"""Exit code of a rank that ends a job because it hangs (EX_SOFTWARE of sysexits.h)."""
BEAT_S = 1.0
SILENT_S = 4.0
"""Seconds without a heartbeat after which a rank counts as silent."""


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


@dataclass(frozen=True)
class Verdict:
    """Why the job ends; the first rank to know posts it for all."""

    reason: str
    speaker: int
    """The rank that prints it."""


class Watchdog:
    """Watches over the ranks from a thread; does nothing where there is one rank.

    Args:
        limit_s: seconds that the main thread may be at one thing.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._doing, self._alone, self._since = "its start", False, time.monotonic()
        self._number = 0
        self._seen: dict[int, tuple[int, float]] = {}
        """Number of each rank's newest beat, and when this rank first saw it."""
        self._ended = threading.Event()
        self._board = Board() if Board.reachable() else None
        if self._board is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def at(self, doing: str, alone: bool = False) -> Iterator[None]:
        """Says what the main thread is at, and whether it does that alone, without waiting for other ranks."""
        before = self._doing, self._alone
        self._begin(doing, alone)
        yield
        self._begin(*before)  # not after an exception: `explain` tells what failed

    def end(self) -> None:
        """The job is over: the ranks may go in any order."""
        self._ended.set()
        if self._board is not None:
            with contextlib.suppress(RuntimeError):
                self._board.post(_LEFT)

    def explain(self) -> str:
        """Which ranks are silent, for the message of a collective that failed; empty where none is."""
        if self._board is None or self._ended.is_set():
            return ""
        patience = time.monotonic() + SILENT_S + 2 * BEAT_S
        while time.monotonic() < patience:
            try:
                _, silent, verdict = self._look()
            except RuntimeError:
                return f"was at {self._doing}; {_NO_BOARD}"
            if verdict:
                return f"was at {self._doing}; {verdict.reason}"
            if silent:
                return f"was at {self._doing}; {_told(silent, self._seen)}"
            time.sleep(BEAT_S / 4)
        return ""

    def _begin(self, doing: str, alone: bool) -> None:
        self._doing, self._alone, self._since = doing, alone, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._post()
                beats, silent, verdict = self._look()
            except RuntimeError:
                self._give_up(Verdict(_NO_BOARD, speaker=1))
                return
            if verdict:
                self._give_up(verdict)
                return
            dead = {number: beat for number, beat in silent.items() if _is_gone(beat)}
            if dead or time.monotonic() - self._since > self._limit_s:
                blamed = dead or silent or _slowest(beats)
                verdict = Verdict(_told(blamed, self._seen), speaker=min(beats.keys() - silent.keys()))
                self._leave_to_others(verdict)
                self._give_up(verdict, kill=silent)

    def _post(self) -> None:
        assert self._board is not None
        self._number += 1
        seconds = round(time.monotonic() - self._since, 1)
        beat = Beat(self._number, socket.gethostname(), os.getpid(), self._doing, seconds, self._alone)
        self._board.post(json.dumps(asdict(beat)))

    def _leave_to_others(self, verdict: Verdict) -> None:
        """Lets the other ranks end for the same reason, not because this rank is gone. Rank 0 may keep the board: it waits."""
        assert self._board is not None
        with contextlib.suppress(RuntimeError):
            self._board.post(_ENDS + json.dumps(asdict(verdict)))
        if rank() == 0:
            time.sleep(2 * BEAT_S)

    def _look(self) -> tuple[dict[int, Beat], dict[int, Beat], Verdict | None]:
        """Beats of all ranks, those of silent ones, and why the job ends if a rank has said so.

        A rank that ends the job posts its reason and is gone at once: who is found gone is asked for a reason once more.
        """
        beats, verdict = self._read()
        silent = self._silent(beats)
        if silent and not verdict:
            _, verdict = self._read()
        return beats, silent, verdict

    def _read(self) -> tuple[dict[int, Beat], Verdict | None]:
        """The newest beat of each rank, and why the job ends if a rank has said so."""
        assert self._board is not None
        posted = {number: text for number, text in enumerate(self._board.read()) if text and text != _LEFT}
        ends = [text.removeprefix(_ENDS) for text in posted.values() if text.startswith(_ENDS)]
        if ends:
            return {}, Verdict(**json.loads(ends[0]))
        beats = {number: Beat(**json.loads(text)) for number, text in posted.items()}
        now = time.monotonic()
        for number, beat in beats.items():
            if self._seen.get(number, (-1, 0.0))[0] != beat.number:
                self._seen[number] = beat.number, now
        return beats, None

    def _silent(self, beats: dict[int, Beat]) -> dict[int, Beat]:
        now = time.monotonic()
        return {
            number: beat
            for number, beat in beats.items()
            if number != rank() and (now - self._seen[number][1] > SILENT_S or _is_gone(beat))
        }

    def _give_up(self, verdict: Verdict, kill: dict[int, Beat] | None = None) -> None:
        """Ends this process at once: its main thread may never return. Silent ranks of this machine are killed, for they would
        not hear the launcher either."""
        if self._ended.is_set():
            return
        if rank() == verdict.speaker:
            line = f"facescale: rank {rank()} of {world_size()} was at {self._doing}; {verdict.reason}"
            print(line, file=sys.stderr, flush=True)
        for beat in (kill or {}).values():
            if beat.host == socket.gethostname():
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        os._exit(EXIT_STALLED)


_LEFT = "left"
_ENDS = "ends: "
_NO_BOARD = "rank 0, which keeps the heartbeats, does not answer any more"


def _is_gone(beat: Beat) -> bool:
    if beat.host != socket.gethostname():
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


def _slowest(beats: dict[int, Beat]) -> dict[int, Beat]:
    """Ranks at something of their own, which the others wait for; else those at another thing than most; else all."""
    alone = {number: beat for number, beat in beats.items() if beat.alone}
    if alone:
        return alone
    doings = [beat.doing for beat in beats.values()]
    usual = max(doings, key=doings.count)
    others = {number: beat for number, beat in beats.items() if beat.doing != usual}
    return others or beats


def _told(blamed: dict[int, Beat], seen: dict[int, tuple[int, float]]) -> str:
    now = time.monotonic()
    parts = []
    for number, beat in sorted(blamed.items()):
        quiet = now - seen[number][1]
        if _is_gone(beat):
            state = f"is dead; it was at {beat.doing}"
        elif quiet > SILENT_S:
            state = f"has been silent for {quiet:.0f} s, stopped or cut off; it was at {beat.doing}"
        else:
            state = f"has been at {beat.doing} for {beat.seconds:.0f} s"
        parts.append(f"rank {number} (process {beat.pid} on {beat.host}) {state}")
    return "; ".join(parts)
