"""Replaces several files of a folder as one: all of them, or none, whenever it is killed.

What is new is written aside, in `.forget/`; what is to be moved where is written last, in `.forget/commit.json`. A kill before
that leaves the folder as it was. After it, the folder is closed to readers until `finish_replacing` has moved the rest.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.commit import HashedFile, committed, sync_directory

ASIDE = ".forget"
COMMIT = f"{ASIDE}/commit.json"


def is_interrupted(folder: Path) -> bool:
    """Whether a process was killed, or is at work, between old and new files."""
    return (folder / COMMIT).exists()


def check_whole(folder: Path) -> None:
    """Raises:
    ValueError: files of the folder are being replaced, or were when a process was killed.
    """
    if is_interrupted(folder):
        raise ValueError(
            f"{folder} is left by a `facescale shards forget` that was interrupted: the same command goes on"
        )


class Replacement:
    """What will replace files of a folder, and which are to go. Leaving it without `commit` changes nothing.

    Args:
        root: the folder; whatever an earlier one left aside there, uncommitted, is deleted.
        mode: of new files.
    """

    def __init__(self, root: Path, mode: int) -> None:
        self.root, self._mode = root, mode
        self._moved: list[str] = []
        self._deleted: list[str] = []

    def __enter__(self) -> "Replacement":
        shutil.rmtree(self.root / ASIDE, ignore_errors=True)
        (self.root / ASIDE).mkdir(mode=0o700)
        return self

    def __exit__(self, *_: object) -> None:
        if not (self.root / COMMIT).exists():
            shutil.rmtree(self.root / ASIDE, ignore_errors=True)

    def write(self, name: str, fill: Callable[[HashedFile], None]) -> str:
        """Writes a new file; returns its SHA-256."""
        path = self.root / ASIDE / name
        path.parent.mkdir(exist_ok=True)
        with committed(path, self._mode) as file:
            fill(file)
        self._moved.append(name)
        return file.sha256

    def put(self, name: str, data: bytes) -> str:
        """Writes a small one."""
        return self.write(name, lambda file: file.write(data))

    def delete(self, *names: str) -> None:
        """Takes note that files go."""
        self._deleted += names

    def commit(self, about: dict[str, Any]) -> None:
        """Moves everything; from here on the folder is the new one.

        Args:
            about: JSON-able; `finish_replacing` returns it where this is killed.
        """
        for folder in {(self.root / ASIDE / name).parent for name in self._moved}:
            sync_directory(folder)
        with committed(self.root / COMMIT) as file:
            file.write(json.dumps({"moved": self._moved, "deleted": self._deleted, "about": about}).encode())
        sync_directory(self.root / ASIDE)
        finish_replacing(self.root)


def finish_replacing(root: Path) -> dict[str, Any] | None:
    """Moves what a killed process has left; returns what that one gave to `commit`, or None where there was nothing."""
    if not (root / COMMIT).exists():
        return None
    record = json.loads((root / COMMIT).read_bytes())
    for name in record["moved"]:
        if (root / ASIDE / name).exists():
            os.replace(root / ASIDE / name, root / name)
    for name in record["deleted"]:
        (root / name).unlink(missing_ok=True)
    for folder in {(root / name).parent for name in (*record["moved"], *record["deleted"])}:
        if folder.is_dir():
            sync_directory(folder)
            if not any(folder.iterdir()):
                folder.rmdir()
    (root / COMMIT).unlink()
    shutil.rmtree(root / ASIDE)
    sync_directory(root)
    about: dict[str, Any] = record["about"]
    return about
