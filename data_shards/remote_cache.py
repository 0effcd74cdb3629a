"""A cache on a local disk for parts of shards: sparse copies of the tars, shared by processes, kept below a size.

A copy has a range of its tar in the same place or a hole there. Nothing records which: whoever reads a picture compares its
checksum with the index, so that a hole, a write that was cut off by a kill or a power cut, and a damaged disk are the same: not
there. Two processes that write the same range write the same bytes.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".part"
"""Of a tar's copy."""
_PAGE = 4096
_ROOM = 0.05
"""Share of the limit that is made free when the cache is full, so that not every write looks at every file."""
_TOUCH_S = 1.0


class TarCache:
    """Ranges of files by name and offset.

    Args:
        folder: of the cache; several sets share it, and the limit.
        limit: bytes that the folder may take on the disk.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._touched: dict[str, float] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.measure()

    def measure(self) -> int:
        """Looks at every file; returns the bytes that the folder takes on the disk."""
        with self._locked() as ledger:
            used = self._scan()[0]
            _set_used(ledger, used)
        return used

    def read(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """What lies from each first byte to the one behind the last: the bytes, or zeros, or fewer; the caller checks."""
        try:
            handle = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return [b""] * len(spans)
        try:
            return [os.pread(handle, stop - start, start) for start, stop in spans]
        finally:
            os.close(handle)

    def write(self, name: str, offset: int, data: bytes) -> bool:
        """Keeps a range; returns whether there was room for it.

        Raises:
            OSError: the disk cannot be written to.
        """
        need = (len(data) // _PAGE + 2) * _PAGE
        with self._locked() as ledger:
            used = int.from_bytes(os.pread(ledger, 8, 0), "little")
            if used + need > self.limit:
                used = self._make_room(need, name)
                if used + need > self.limit:
                    _set_used(ledger, used)
                    return False
            _set_used(
                ledger, used + need
            )  # first: killed in between, it says too much, which the next full cache mends
            self._put(self._path(name), offset, data)
        return True

    def touch(self, name: str) -> None:
        """Says that a copy is in use."""
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_S) >= _TOUCH_S:
            self._touched[name] = now
            with suppress(FileNotFoundError):
                os.utime(self._path(name))

    @contextmanager
    def fetching(self, name: str) -> Iterator[None]:
        """One process of the machine at a time, so that a whole tar is fetched once."""
        path = self._path(name).with_suffix(".lock")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _held(path):
            yield

    def _path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    def _put(self, path: Path, offset: int, data: bytes) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(handle, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(handle)

    def _scan(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """Bytes that the folder takes on the disk; and (time of the last use, bytes, path) of each copy."""
        total, copies = 0, []
        for root, _, names in os.walk(self.folder):
            for name in names:
                path = Path(root, name)
                with suppress(FileNotFoundError):
                    found = path.stat()
                    total += found.st_blocks * 512
                    if name.endswith(SUFFIX):
                        copies.append((found.st_mtime_ns, found.st_blocks * 512, path))
        return total, sorted(copies)

    def _make_room(self, need: int, name: str) -> int:
        """Removes what was used longest ago, the tar that is being written last of all; returns the bytes then taken."""
        used, copies = self._scan()
        own = self._path(name)
        for _, size, path in sorted(copies, key=lambda copy: copy[2] == own):
            if used + need <= self.limit * (1 - _ROOM):
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    @contextmanager
    def _locked(self) -> Iterator[int]:
        with _held(self.folder / "used") as handle:
            yield handle


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """An open file that no other process or thread holds; the operating system lets go of it when the process ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _set_used(ledger: int, used: int) -> None:
    os.pwrite(ledger, used.to_bytes(8, "little"), 0)
