"""Ends a job that hangs, and says which rank was to blame and what it was doing.

A thread of each rank posts a heartbeat every second, whatever the rank's main thread is waiting for. A rank that has been at one
thing for too long, or that finds another rank's process gone, reads all heartbeats, names the ranks that are silent or that
hold up the others, kills those of them that run on its own machine, and ends. Rank 0, which may keep the heartbeats, goes last.
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
from dataclasses import asdict, replace

from trainer.collectives import Board, rank, world_size
from trainer.heartbeats import BEAT_S, EXIT_STALLED, NO_BOARD, SILENT_S, Beat, Verdict, is_gone, slowest, told

_LEFT = "left"
_ENDS = "ends: "
_LINGER_S = 8.0
"""Seconds that rank 0 waits for the other ranks to go, at most: they have to see that it failed, and wait `SILENT_S`."""


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
        self._beats: dict[int, Beat] = {}
        """Those that were read last, and below the silent ones among them."""
        self._silent_ones: dict[int, Beat] = {}
        self._mute: list[int] = []
        """Ranks that have never posted."""
        self._asked = 0.0
        """When the thread asked the board for something that it waits for; 0: it does not wait."""
        self._ended = threading.Event()
        self._talk, self._go = threading.Lock(), threading.Lock()
        self._said_last = False
        self._threads: list[threading.Thread] = []
        self._board = Board() if Board.reachable() else None
        if self._board is not None:
            self._threads = [
                threading.Thread(target=watch, name="watchdog", daemon=True)
                for watch in (self._watch, self._watch_board)
            ]
            for thread in self._threads:
                thread.start()

    @contextmanager
    def at(self, doing: str, alone: bool = False) -> Iterator[None]:
        """Says what the main thread is at, and whether it does that alone, without waiting for other ranks."""
        before = self._doing, self._alone
        self._begin(doing, alone)
        yield
        self._begin(*before)  # not after an exception: `explain` tells what failed

    def end(self) -> None:
        """The job is over: the ranks may go in any order, rank 0 last."""
        self._ended.set()
        for thread in self._threads:
            thread.join(SILENT_S)  # rank 0 may be gone once this rank has said that it leaves
        self._say(_LEFT, last=True)
        self._let_others_go()

    def fail(self, reason: str, code: int) -> None:
        """This rank ends for a reason of its own. Others that come to the same end have some seconds to say so themselves; those
        that wait for this one are told."""
        self._say(json.dumps(asdict(replace(self._beat(), failed=reason, code=code))), last=True)
        self._ended.set()
        self._let_others_go()

    def explain(self) -> Verdict | None:
        """Why a collective failed: which ranks are gone, silent or have failed; None where none is."""
        if self._board is None or self._ended.is_set():
            return None
        patience = time.monotonic() + SILENT_S + 2 * BEAT_S
        while time.monotonic() < patience:
            try:
                beats, silent, verdict = self._look()
            except RuntimeError:
                return self._without_board()
            failed = {number: beat for number, beat in beats.items() if beat.failed}
            if not verdict and (silent or failed):
                verdict = self._judge(beats, failed or silent)
            if verdict:
                return verdict
            time.sleep(BEAT_S / 4)
        return None

    def give_up(self, verdict: Verdict, detail: str = "") -> None:
        """Ends this process at once: its main thread may never return. Silent ranks of this machine are killed, for they would
        not hear the launcher either."""
        with self._go:  # of two threads that know why, one speaks
            if self._ended.is_set() and threading.current_thread() is not threading.main_thread():
                return
            if rank() == verdict.speaker:
                reason = f"was at {self._doing}; {verdict.reason}{f' ({detail})' if detail else ''}"
                print(f"facescale: rank {rank()} of {world_size()} {reason}", file=sys.stderr, flush=True)
            for beat in self._silent_ones.values():
                if beat.is_here and not beat.failed:
                    with contextlib.suppress(OSError):
                        os.kill(beat.pid, signal.SIGKILL)
            if not self._board_hangs():
                self._say(_ENDS + json.dumps(asdict(verdict)), last=True)
                self._let_others_go()
            os._exit(verdict.code)

    def _begin(self, doing: str, alone: bool) -> None:
        self._doing, self._alone, self._since = doing, alone, time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._say(json.dumps(asdict(self._beat())))
                beats, silent, verdict = self._look()
            except RuntimeError:
                if not self._said_last:
                    self.give_up(self._without_board())
                return
            ended = {number: beat for number, beat in silent.items() if beat.failed or is_gone(beat)}
            if not verdict and (ended or self._too_long()):
                verdict = self._judge(beats, ended or silent or slowest(beats))
            if verdict:
                self.give_up(verdict)
                return

    def _watch_board(self) -> None:
        """Where rank 0 is stopped and keeps the heartbeats, asking for them never returns."""
        while not self._ended.wait(BEAT_S):
            if self._board_hangs() and self._too_long():
                blamed = {number: beat for number, beat in self._beats.items() if number == 0}
                verdict = replace(self._without_board(), reason=told(blamed, self._seen) or NO_BOARD)
                self._silent_ones = (
                    blamed if rank() == verdict.speaker else {}
                )  # it is not to be found dead before that is said
                self.give_up(verdict)

    def _board_hangs(self) -> bool:
        asked = self._asked
        return asked > 0 and time.monotonic() - asked > SILENT_S

    def _too_long(self) -> bool:
        return time.monotonic() - self._since > self._limit_s

    def _beat(self) -> Beat:
        self._number += 1
        seconds = round(time.monotonic() - self._since, 1)
        return Beat(self._number, socket.gethostname(), os.getpid(), self._doing, seconds, self._alone)

    def _judge(self, beats: dict[int, Beat], blamed: dict[int, Beat]) -> Verdict:
        """Names those to blame, and posts it: the other ranks are to end for the same reason, not because this rank is gone."""
        able = [number for number in beats if number == rank() or not (beats[number].failed or number in blamed)]
        codes = {beat.code for beat in blamed.values() if beat.failed}
        begun = "".join(f"rank {number} has not begun; " for number in self._mute)
        reason = begun + told(blamed, self._seen)
        verdict = Verdict(reason, speaker=min(able, default=rank()), code=min(codes, default=EXIT_STALLED))
        self._say(_ENDS + json.dumps(asdict(verdict)), last=True)
        return verdict

    def _without_board(self) -> Verdict:
        """One rank of each machine says it: which others still can is not known."""
        return Verdict(NO_BOARD, speaker=rank() if rank() == 1 or os.environ.get("LOCAL_RANK") == "0" else -1)

    def _say(self, text: str, last: bool = False) -> None:
        """Posts, unless this rank has had its last word.

        Raises:
            RuntimeError: the board is gone, and this is not the last word.
        """
        if self._board is None:
            return
        with self._talk, contextlib.suppress(*([RuntimeError] if last else [])):
            if not self._said_last:
                self._said_last = last
                self._board.post(text)

    def _let_others_go(self) -> None:
        """Rank 0 waits until no other rank asks for heartbeats any more; one that has not begun yet will."""
        until = time.monotonic() + _LINGER_S
        while self._board is not None and rank() == 0 and time.monotonic() < until:
            try:
                posted = self._board.read()
            except RuntimeError:
                return
            beats = [_beat_of(text) for text in posted[1:] if text]
            if all(posted[1:]) and not any(beat and not beat.failed and not is_gone(beat) for beat in beats):
                return
            time.sleep(BEAT_S / 20)

    def _look(self) -> tuple[dict[int, Beat], dict[int, Beat], Verdict | None]:
        """Beats of all ranks, those of silent ones, and why the job ends if a rank has said so.

        A rank that ends the job posts its reason and is gone at once: who is found gone is asked for a reason once more.
        """
        beats, verdict = self._read()
        silent = self._silent(beats)
        if silent and not verdict:
            beats, verdict = self._read()
            silent = self._silent(beats)
        self._silent_ones = silent
        return beats, silent, verdict

    def _read(self) -> tuple[dict[int, Beat], Verdict | None]:
        """The newest beat of each rank, and why the job ends if a rank has said so."""
        assert self._board is not None
        self._asked = time.monotonic()
        posted = self._board.read()
        self._asked = 0.0
        self._mute = [number for number, text in enumerate(posted) if not text]
        beats = {number: beat for number, text in enumerate(posted) if (beat := _beat_of(text))}
        now = time.monotonic()
        for number, beat in beats.items():
            if self._seen.get(number, (-1, 0.0))[0] != beat.number:
                self._seen[number] = beat.number, now
        self._beats = beats
        ends = [text.removeprefix(_ENDS) for text in posted if text.startswith(_ENDS)]
        return beats, Verdict(**json.loads(ends[0])) if ends else None

    def _silent(self, beats: dict[int, Beat]) -> dict[int, Beat]:
        """Ranks that post no more. One that gave a reason and went is left some time: this rank may be about to find the same."""
        return {
            number: beat
            for number, beat in beats.items()
            if number != rank() and (self._quiet(number) > SILENT_S or (is_gone(beat) and not beat.failed))
        }

    def _quiet(self, number: int) -> float:
        """Seconds since a rank's newest beat was seen."""
        return time.monotonic() - self._seen[number][1]


def _beat_of(text: str) -> Beat | None:
    return Beat(**json.loads(text)) if text and text != _LEFT and not text.startswith(_ENDS) else None
