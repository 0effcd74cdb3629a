"""A shard set that lies elsewhere: its small files fetched once for each machine, its tars left where they are."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from weakref import finalize

from data_shards.commit import TEMPORARY, committed
from data_shards.files import is_remote
from data_shards.remote_cache import TarCache
from data_shards.remote_fetch import Fetcher
from data_shards.stream_config import StreamConfig

CHUNK = 2**23
"""Most bytes that are fetched at once."""


class DaemonPool:
    """Threads that do one job after another, and that never keep a process from ending.

    Those of concurrent.futures are waited for at the end of the process, through every pause and attempt that is left.

    Args:
        threads: how many at most; they are started as jobs come.
    """

    def __init__(self, threads: int) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._left = threads
        finalize(self, _dismiss, self._jobs, threads)

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        if self._left:
            self._left -= 1
            Thread(target=_work, args=(self._jobs,), name="facescale-fetch", daemon=True).start()
        self._jobs.put(lambda: _settle(done, work, args))
        return done


def _work(jobs: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it may hold the last reference to what dismisses this thread


def _settle(done: Future[Any], work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        done.set_result(work(*args))
    except BaseException as error:
        done.set_exception(error)


def _dismiss(jobs: "SimpleQueue[Callable[[], None] | None]", threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)


@dataclass
class RemoteTars:
    """Where the tars of a set are, and what stands between them and a reader.

    Attributes:
        name: of the set in the cache.
    """

    fetcher: Fetcher
    cache: TarCache
    name: str
    config: StreamConfig
    pool: DaemonPool = field(init=False)

    def __post_init__(self) -> None:
        self.pool = DaemonPool(self.config.connections)


def is_streamed(location: str | os.PathLike[str], config: StreamConfig) -> bool:
    """Whether a set is read through the cache: a URL, or any place where `data.stream.cache_local` says so."""
    return config.cache_local or is_remote(location)


def fetch_manifest(location: str | os.PathLike[str], config: StreamConfig, name: str) -> tuple[RemoteTars, Path]:
    """Fetches a set's manifest into the cache, in a folder that is named for its content; a changed set gets another.

    Raises:
        ValueError: it cannot be read; or the cache's folder cannot be written to.
    """
    fetcher = Fetcher(location, config)
    data = fetcher.read(name, check=_json_flaw)
    digest = hashlib.sha256(data).hexdigest()[:16]
    try:
        cache = TarCache(config.folder, config.cache_bytes)
        folder = config.folder / digest
        with cache.fetching(f"{digest}/index"):
            if not (folder / name).is_file():
                with committed(folder / name) as file:
                    file.write(data)
    except OSError as error:
        raise ValueError(f"data.stream.cache_dir {config.folder} cannot be written to: {error}") from None
    return RemoteTars(fetcher, cache, digest, config), folder


def _json_flaw(data: bytes) -> str | None:
    try:
        json.loads(data)
    except ValueError as error:
        return f"it is not JSON ({error})"
    return None


def fetch_tables(tars: RemoteTars, folder: Path, tables: Mapping[str, int], hashes: Mapping[str, str]) -> None:
    """Fetches a set's byte index into its folder, unless it is there already.

    Args:
        tables: length of each file by its name.
        hashes: SHA-256 of each, as the manifest has it.
    Raises:
        ValueError: a file cannot be read, is not what the manifest says, or does not fit on the disk.
    """
    with tars.cache.fetching(f"{tars.name}/index"):
        for name, size in tables.items():
            path = folder / name
            if path.is_file() and path.stat().st_size == size:
                continue
            for left in folder.glob(f"{name}.*{TEMPORARY}"):
                left.unlink()  # of a process that was killed: nobody else is here
            if shutil.disk_usage(folder).free < size:
                raise ValueError(f"data.stream.cache_dir {folder.parent} has no room for {name}, {size:,} bytes")
            attempts = 1 + tars.config.retries
            for _ in range(attempts):
                if _fetch_table(tars.fetcher, path, size) == hashes.get(name):
                    break
                path.unlink()
            else:
                where = f"{tars.fetcher.location}/{name}"
                raise ValueError(
                    f"{where} is not the file that its manifest names (SHA-256), {attempts} times in a row "
                    f"(data.stream.retries is {tars.config.retries})"
                )
    tars.cache.measure()


def _fetch_table(fetcher: Fetcher, path: Path, size: int) -> str:
    """Returns the SHA-256 of what came."""
    with committed(path) as file:
        for start in range(0, size, CHUNK):
            file.write(fetcher.read(path.name, start, min(size, start + CHUNK)))
    return file.sha256
