"""Files that appear under their names only when they are whole and on the disk."""

import ctypes
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"
WRITEBACK = 2**23
"""Bytes of a file that are written before the disk is asked to begin with them."""

_SYNC_FILE_RANGE_WRITE = 2


class HashedFile:
    """A file being written, with its length and SHA-256 so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._started = 0
        self.length = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.length += len(data)
        if self.length - self._started >= WRITEBACK:
            self._file.flush()
            start_writeback(self._file.fileno(), self._started, self.length - self._started)
            self._started = self.length

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def committed(path: Path, mode: int = 0o600) -> Iterator[HashedFile]:
    """A file that gets its name only when it is whole and on the disk; an exception leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, mode)) as file:
            yield HashedFile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def start_writeback(handle: int, offset: int, length: int) -> None:
    """Asks Linux to begin writing these bytes to the disk, so that the fsync at the end has little left to wait for."""
    with suppress(AttributeError):  # other systems have no such call
        _libc().sync_file_range(handle, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
