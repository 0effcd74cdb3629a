"""Starts the ranks of a training run as Slurm does: a process each, told by environment variables, without a launcher above them.

The processes are forked from one that has imported everything, so that tests can afford to start and kill many.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trainer.train", "nvidia.dali.fn", "deepspeed", "tests.distributed.ranks"])


class Job:
    """The ranks of one run, started when it is made.

    Args:
        options: of `python -m trainer.train`.
        prepare: called in each rank before training, with its number; it may change things there.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int,
        *options: object,
        prepare: Callable[[int], None] | None = None,
        **environment: str,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.said_in = [folder / f"rank{number}.txt" for number in range(ranks)]
        self.processes = []
        for number in range(ranks):
            found = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            if ranks == 1:
                found = {}
            found |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
                "ACCELERATE_USE_CPU": "true",
            }
            argv = [str(option) for option in options]
            env = {name: str(value) for name, value in {**found, **environment}.items()}
            process = _context.Process(target=_rank, args=(argv, env, str(self.said_in[number]), prepare, number))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes in rank order, -9 where it was SIGKILL; kills what is left after the time, and fails."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [number for number, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not late, f"ranks {late} still ran after {timeout} s: {self.said()[-3000:]}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.join()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def said(self) -> str:
        """What all ranks have written to stderr."""
        return "\n".join(path.read_text(errors="replace") for path in self.said_in if path.is_file())

    def lines(self) -> list[str]:
        """Our own lines among it, without their start."""
        ours = [line for line in self.said().splitlines() if line.startswith("facescale: ")]
        return [line.removeprefix("facescale: ") for line in ours]

    def until(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Waits for something that the run does."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"it did not come to it: {self.said()[-3000:]}"
            assert any(process.is_alive() for process in self.processes), f"all have ended: {self.said()[-3000:]}"
            time.sleep(0.01)


def _rank(
    argv: list[str], environment: dict[str, str], said_in: str, prepare: Callable[[int], None] | None, number: int
) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ |= environment
    handle = os.open(said_in, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    os.dup2(handle, 1)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    from trainer.train import main

    if prepare is not None:
        prepare(number)
    code = main(argv)
    sys.stderr.flush()
    os._exit(code)


def steps_logged(run: Path) -> int:
    """The step of the newest line in the run's log; 0 where there is none."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    with contextlib.suppress(ValueError, IndexError):
        import json

        return int(json.loads(lines[-1])["step"])
    return 0
