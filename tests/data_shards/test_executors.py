"""Processes that do the tasks of a conversion."""

import os
import signal
from concurrent.futures.process import _ExecutorManagerThread
from contextlib import suppress
from pathlib import Path

import pytest
from collections_on_disk import draw_collection

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet


@pytest.mark.timeout(60)
def test_a_worker_killed_while_the_pool_ends_does_not_keep_it_from_ending(tmp_path, monkeypatch):
    """The one that waits for a task holds the queue's lock, and killed it keeps it: the other could never leave."""
    draw_collection(tmp_path / "in", {"ann": 4, "bob": 4})
    leave, ended = _ExecutorManagerThread.shutdown_workers, []

    def after_a_kill(self):
        ended.append(len(self.processes))
        for worker in list(self.processes):
            with suppress(OSError):
                if "pipe" in Path(f"/proc/{worker}/wchan").read_text():
                    os.kill(worker, signal.SIGKILL)
        leave(self)

    monkeypatch.setattr(_ExecutorManagerThread, "shutdown_workers", after_a_kill)
    convert(tmp_path / "in", tmp_path / "out", ConvertConfig(shard_samples=2, workers=2))
    assert ended == [2]
    assert len(ShardSet.open(tmp_path / "out").split("train")) == 8
