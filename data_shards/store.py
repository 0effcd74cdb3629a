"""Where a conversion writes: a folder of this machine or a URL, with the same few operations for both."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from data_shards.commit import TEMPORARY, HashedFile, committed, sync_directory
from data_shards.files import filesystem, is_remote, local

LOCK_PATIENCE_S = 2.0
"""Workers of a killed conversion hold its lock for a moment longer."""


class Store:
    """Files below one place; each appears under its name only when it is whole.

    Object stores show a file when its upload is complete; a folder's file is written aside, synced and renamed.
    """

    def __init__(self, location: str, file_mode: int = 0o600) -> None:
        self.location = location
        self.remote = is_remote(location)
        self.file_mode = file_mode
        if self.remote:
            self._system, self._root = filesystem(location)
        else:
            self._root = os.path.realpath(local(location))

    def path(self, name: str) -> Path:
        """Of a file in a folder of this machine."""
        assert not self.remote
        return Path(self._root, name)

    @contextmanager
    def writing(self, name: str) -> Iterator[HashedFile]:
        if not self.remote:
            with committed(self.path(name), self.file_mode) as file:
                yield file
            return
        with tempfile.TemporaryDirectory(prefix="facescale-") as folder:
            temporary = Path(folder, "file")
            with committed(temporary) as file:
                yield file
            self._system.put_file(str(temporary), self._at(name))

    def write(self, name: str, data: bytes) -> str:
        """Writes a small file; returns its SHA-256."""
        with self.writing(name) as file:
            file.write(data)
        return file.sha256

    def read(self, name: str) -> bytes:
        return self._system.cat_file(self._at(name)) if self.remote else self.path(name).read_bytes()

    def reading(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file to read from."""
        file: IO[bytes] = self._system.open(self._at(name), "rb") if self.remote else self.path(name).open("rb")
        return file

    def exists(self, name: str) -> bool:
        return self._system.exists(self._at(name)) if self.remote else self.path(name).exists()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        if not self.remote:
            return self.path(name).stat().st_size if self.path(name).is_file() else None
        return int(self._system.size(self._at(name))) if self._system.exists(self._at(name)) else None

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders in a folder; none where it does not exist."""
        if self.remote:
            self._system.invalidate_cache()
            with suppress(FileNotFoundError):
                return sorted(
                    path.rstrip("/").rpartition("/")[2] for path in self._system.ls(self._at(folder), detail=False)
                )
            return []
        with suppress(FileNotFoundError):
            return sorted(os.listdir(self.path(folder)))
        return []

    def make_folder(self, name: str) -> None:
        if not self.remote:
            self.path(name).mkdir(mode=self._folder_mode, parents=True, exist_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file or a folder with everything in it; nothing where it does not exist."""
        if self.remote:
            with suppress(FileNotFoundError):
                self._system.rm(self._at(name), recursive=True)
        elif self.path(name).is_dir():
            shutil.rmtree(self.path(name))
        else:
            self.path(name).unlink(missing_ok=True)

    def remove_temporary(self, folder: str) -> None:
        """Removes what interrupted writers have left in a folder."""
        for name in self.names(folder):
            if name.endswith(TEMPORARY):
                self.remove(f"{folder}/{name}".lstrip("/"))

    def sync(self, folder: str = "") -> None:
        """Makes the names in a folder survive a power cut."""
        if not self.remote:
            sync_directory(self.path(folder))

    def local_folder(self, name: str) -> Path:
        """A folder of this store on this machine: itself, or an empty one to copy into, which the caller removes."""
        return Path(tempfile.mkdtemp(prefix="facescale-")) if self.remote else self.path(name)

    def upload(self, folder: Path, name: str) -> None:
        """Copies a local folder's files to `name`, where they are not there anyway."""
        if self.remote:
            for file in sorted(folder.iterdir()):
                self._system.put_file(str(file), self._at(f"{name}/{file.name}"))

    def download(self, name: str, folder: Path) -> None:
        if self.remote:
            for file in self.names(name):
                if self._system.isfile(self._at(f"{name}/{file}")):
                    self._system.get_file(self._at(f"{name}/{file}"), str(folder / file))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the place for this process alone; the operating system lets go of it when the process ends, however it does.

        A URL is locked for this machine only.

        Raises:
            ValueError: another process holds it, or it cannot be written to.
        """
        handle = self._lock_handle()
        try:
            patience = time.monotonic() + LOCK_PATIENCE_S
            while not _try_lock(handle):
                if time.monotonic() > patience:
                    raise ValueError(
                        f"output {self.location} is being written by another conversion: nothing was touched"
                    )
                time.sleep(0.05)
            yield
        finally:
            os.close(handle)

    def _lock_handle(self) -> int:
        if self.remote:
            name = f"facescale-{os.getuid()}-{blake2b(self.location.encode(), digest_size=8).hexdigest()}.lock"
            return os.open(
                Path(tempfile.gettempdir(), name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        return os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def _folder_mode(self) -> int:
        return self.file_mode | (self.file_mode & 0o444) >> 2

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "mode": self.file_mode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["location"], state["mode"])  # type: ignore[misc]


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
