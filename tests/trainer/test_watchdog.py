"""What a rank makes of the others' heartbeats; real ranks that die and stall are in tests/distributed/test_faults.py."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict

from trainer.watchdog import Beat, Verdict, Watchdog


class _Board:
    """Reads as what was posted between two reads."""

    def __init__(self, *reads: list[str]) -> None:
        self._reads = list(reads)

    def read(self) -> list[str]:
        return self._reads.pop(0)


def _beat(pid: int) -> str:
    return json.dumps(asdict(Beat(1, socket.gethostname(), pid, "the data of step 4", 5.0, True)))


def _gone() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_rank_that_gave_its_reason_and_went_is_not_called_dead():
    """It posts and exits between this rank's look at the board and its look at the process."""
    verdict = Verdict("rank 1 has been at the data of step 4 for 5 s", speaker=0)
    ends = "ends: " + json.dumps(asdict(verdict))
    watchdog = Watchdog(600)
    watchdog._board = _Board([_beat(os.getpid()), _beat(_gone())], [_beat(os.getpid()), ends])
    assert watchdog._look()[2] == verdict


def test_a_rank_that_went_without_a_word_is_silent():
    watchdog = Watchdog(600)
    beats = [_beat(os.getpid()), _beat(_gone())]
    watchdog._board = _Board(beats, beats)
    _, silent, verdict = watchdog._look()
    assert list(silent) == [1]
    assert verdict is None
