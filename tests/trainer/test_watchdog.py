"""What a rank makes of the others' heartbeats; real ranks that die and stall are in tests/distributed/test_faults.py."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from trainer import watchdog as watchdog_module
from trainer.heartbeats import SILENT_S, Beat, Verdict, slowest
from trainer.watchdog import Watchdog


class _Board:
    """Reads as what was posted between two reads, the last for ever."""

    def __init__(self, *reads: list[str]) -> None:
        self.reads, self.posted = list(reads), []

    def read(self) -> list[str]:
        return self.reads.pop(0) if len(self.reads) > 1 else self.reads[0]

    def post(self, text: str) -> None:
        self.posted.append(text)


def _beat(pid: int, number: int = 1, **more) -> str:
    return json.dumps(asdict(Beat(number, socket.gethostname(), pid, "the data of step 4", 5.0, True, **more)))


def _ends(verdict: Verdict) -> str:
    return "ends: " + json.dumps(asdict(verdict))


def _gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _watchdog(*reads: list[str]) -> Watchdog:
    made = Watchdog(600)
    made._board = _Board(*reads)
    return made


HERE = _beat(os.getpid())


def test_a_rank_that_gave_its_reason_and_went_is_not_called_dead():
    """It posts and exits between this rank's look at the board and its look at the process."""
    verdict = Verdict("rank 1 has been at the data of step 4 for 5 s", speaker=0)
    watchdog = _watchdog([HERE, _beat(_gone())], [HERE, _ends(verdict)])
    assert watchdog._look() == ({0: Beat(**json.loads(HERE))}, {}, verdict)


def test_a_rank_that_went_without_a_word_is_silent():
    _, silent, verdict = _watchdog([HERE, _beat(_gone())])._look()
    assert list(silent) == [1]
    assert verdict is None


def test_a_rank_that_left_is_not_silent():
    assert _watchdog([HERE, _beat(_gone())], [HERE, "left"])._look()[1:] == ({}, None)


def test_a_rank_that_failed_is_left_time_for_this_one_to_find_the_same(monkeypatch):
    watchdog = _watchdog([HERE, _beat(_gone())], [HERE, _beat(_gone(), number=2, failed="no space left", code=1)])
    assert watchdog._look()[1:] == ({}, None)
    now = time.monotonic()
    monkeypatch.setattr(watchdog_module.time, "monotonic", lambda: now + SILENT_S + 1)
    beats, silent, _ = watchdog._look()
    assert list(silent) == [1]
    verdict = watchdog._judge(beats, silent)
    assert verdict.reason.endswith(" failed at the data of step 4: no space left")
    assert (verdict.speaker, verdict.code) == (0, 1), "the failed rank's own code, on all ranks"


def test_a_collective_that_fails_is_explained_by_a_rank_that_failed_at_once():
    verdict = _watchdog([HERE, _beat(_gone(), failed="no space left", code=1)]).explain()
    assert verdict.reason.endswith(" failed at the data of step 4: no space left")


def test_after_the_last_word_nothing_is_posted():
    """The thread may be about to post that all is well."""
    watchdog = _watchdog([HERE, "left"])
    watchdog._say("a beat")
    watchdog.end()
    watchdog._say("a beat")
    assert watchdog._board.posted == ["a beat", "left"]


def test_rank_0_goes_when_no_other_asks_any_more():
    alive, gone = _beat(os.getpid(), number=3), _beat(_gone())
    watchdog = _watchdog([HERE, alive, alive, "left"], [HERE, alive, gone, "left"], [HERE, "left", gone, "left"])
    watchdog.end()
    assert len(watchdog._board.reads) == 1, "it asked until rank 1 had left, too"


def test_rank_0_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(watchdog_module, "_LINGER_S", 0.2)
    begun = time.monotonic()
    _watchdog([HERE, HERE]).end()
    assert 0.2 <= time.monotonic() - begun < 5


def test_a_rank_that_never_began_is_named():
    watchdog = _watchdog([HERE, ""])
    beats, _, _ = watchdog._look()
    assert watchdog._judge(beats, slowest(beats)).reason.startswith("rank 1 has not begun; rank 0 (process ")


@pytest.mark.parametrize(("doing", "blamed"), [("a a b", [2]), ("a a a", [0, 1, 2])])
def test_who_is_at_something_else_than_most_holds_up_the_others(doing, blamed):
    beats = {number: Beat(1, "host", 1, what, 5.0, False) for number, what in enumerate(doing.split())}
    assert list(slowest(beats)) == blamed
