"""Byte ranges out of a store, with a limit on the time of each attempt and further attempts after a growing pause."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from data_shards.files import file_system
from data_shards.stream_config import StreamConfig

MAX_PAUSE_S = 30.0
_PERMANENT = range(400, 500)
_PASSING = (408, 425, 429)
"""HTTP states of 400 to 499 that another attempt may not meet."""

Check = Callable[[bytes], str | None]
"""Says what is wrong with what came, or None."""


class Fetcher:
    """Reads files below one URL or folder.

    Packages below may try again by themselves within an attempt and its time: s3fs and gcsfs after errors, aiohttp once where a
    connection ends without any answer.

    Args:
        location: URL or folder.
        config: attempts, pauses, time limit.
    Raises:
        ValueError: the scheme is not admitted, or its package is not installed.
    """

    def __init__(self, location: str | os.PathLike[str], config: StreamConfig) -> None:
        self.location = os.fspath(location).rstrip("/")
        self._config = config
        self._system, self._root = file_system(self.location)

    def read(self, name: str, start: int | None = None, stop: int | None = None, check: Check | None = None) -> bytes:
        """Bytes `start` to `stop` of a file, or all of it; `check` has found nothing wrong with them.

        Raises:
            ValueError: every attempt failed, or the file is not there or not to be had; in one line.
        """
        begun = time.monotonic()
        attempts = 1 + self._config.retries
        for attempt in range(attempts):
            if attempt:
                time.sleep(self._pause(attempt))
            try:
                data = self._attempt(f"{self._root.rstrip('/')}/{name}", start, stop)
            except Exception as error:
                wrong = self._said(error)
                if _permanent(error):
                    raise ValueError(f"{self.location}/{name}{_range(start, stop)}: {wrong}") from None
            else:
                flaw = _length_flaw(data, start, stop) or (check(data) if check else None)
                if flaw is None:
                    return data
                wrong = flaw
        raise ValueError(
            f"{self.location}/{name}{_range(start, stop)}: {wrong}; that was the last of {attempts} attempts in "
            f"{time.monotonic() - begun:.1f} s (data.stream.retries is {self._config.retries})"
        )

    def _attempt(self, path: str, start: int | None, stop: int | None) -> bytes:
        limit = self._config.timeout_s
        if getattr(self._system, "async_impl", False):
            reading = asyncio.wait_for(self._system._cat_file(path, start=start, end=stop), limit)
            return asyncio.run_coroutine_threadsafe(reading, self._system.loop).result()
        # a read that hangs cannot be ended, only left behind
        done: Future[bytes] = Future()
        threading.Thread(
            target=_settle, args=(done, lambda: self._system.cat_file(path, start=start, end=stop)), daemon=True
        ).start()
        return done.result(limit)

    def _pause(self, attempt: int) -> float:
        longest = min(MAX_PAUSE_S, self._config.backoff_s * 2 ** min(attempt - 1, 30))
        return longest * random.uniform(0.5, 1)

    def _said(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"nothing whole came within {self._config.timeout_s:g} s (data.stream.timeout_s)"
        if isinstance(error, FileNotFoundError):
            return "there is no such file"
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return f"the server answered {status} {getattr(error, 'message', '')}".rstrip()
        return " ".join(f"{type(error).__name__} {error}".split())


def _settle(done: Future[Any], work: Callable[[], Any]) -> None:
    try:
        done.set_result(work())
    except Exception as error:
        done.set_exception(error)


def _permanent(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in _PERMANENT and status not in _PASSING
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)


def _range(start: int | None, stop: int | None) -> str:
    return "" if start is None or stop is None else f", bytes {start:,} to {stop:,}"


def _length_flaw(data: bytes, start: int | None, stop: int | None) -> str | None:
    if start is None or stop is None or len(data) == stop - start:
        return None
    more = ": does the server answer Range requests?" if len(data) > stop - start else ""
    return f"{len(data):,} bytes came instead of {stop - start:,}{more}"
