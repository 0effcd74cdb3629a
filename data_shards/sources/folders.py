"""Pictures in folders, one for each identity: VGGFace2, LFW, CASIA-WebFace; here or at a URL."""

import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from data_shards.files import filesystem, is_remote, local
from data_shards.sources.base import EXTENSIONS, MAX_IMAGE_BYTES, Found, Place, Reader, extension_of

DEEPEST = 3
"""Levels of folders under the root that are looked at; pictures in the third are refused, not overlooked."""
LISTING_THREADS = 8
SAMPLE_FOLDERS = 8
SLOW_LISTING_S = 0.01
"""Seconds a folder's listing takes where threads pay."""
LAYOUTS = "SOURCE/identity/image.jpg or SOURCE/part/identity/image.jpg (parts such as train/ and test/)"


class _Entry(NamedTuple):
    name: str
    size: int
    stamp: int
    refused: str


@dataclass(frozen=True)
class Folders:
    """A folder of `identity/image.jpg` (LFW), or one level further down, `part/identity/image.jpg` (VGGFace2).

    The same name in two parts is one identity. Hidden files and folders and files of other kinds are passed over. Links
    are followed, except those to a folder that holds the link.
    """

    location: str
    streams = False

    def describe(self) -> dict[str, str | int]:
        return {"kind": "folders", "location": self.location}

    def pictures(self) -> Iterator[Found]:
        tree: _LocalTree | _RemoteTree = (
            _RemoteTree(self.location) if is_remote(self.location) else _LocalTree(self.location)
        )
        folders = _identity_folders(self.location, tree)
        ordinal = 0
        for folder, entries in zip(folders, _listings(tree.pictures, folders), strict=True):
            identity = folder.rpartition("/")[2]
            for name, size, stamp, refused in entries:
                stem = name[: name.rfind(".")]
                extension = EXTENSIONS[name[len(stem) :].lower()]
                yield Found(identity, f"{folder}/{name}", stem, size, extension, 0, ordinal, stamp, refused)
                ordinal += 1
        for loop in sorted(tree.loops):
            yield Found("", loop, "", 0, "", refused="is a link to a folder that holds it")

    def open(self) -> Reader:
        return _RemoteReader(self.location) if is_remote(self.location) else _LocalReader(self.location)


def _identity_folders(location: str, tree: "_LocalTree | _RemoteTree") -> list[str]:
    """Folders that directly hold pictures, relative, sorted by identity and then by path.

    Raises:
        ValueError: pictures lie in another layout.
    """
    with_pictures: set[str] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        depth = len(PurePosixPath(folder).parts)
        folders, picture = tree.look(folder, inside=depth < DEEPEST)
        pending += [f"{folder}/{name}" if folder else name for name in folders]
        if picture is not None:
            if depth not in (1, 2):
                raise ValueError(f"source {location}: {f'{folder}/{picture}'.lstrip('/')} does not lie as {LAYOUTS}")
            with_pictures.add(folder)
    for folder in sorted(with_pictures):
        if (parent := folder.rpartition("/")[0]) in with_pictures:
            raise ValueError(
                f"source {location}: {parent} holds pictures and so does {folder} in it; allowed is {LAYOUTS}"
            )
    return sorted(with_pictures, key=lambda folder: (os.fsencode(folder.rpartition("/")[2]), os.fsencode(folder)))


class _LocalTree:
    def __init__(self, location: str) -> None:
        self.root = str(local(location))
        self.loops: list[str] = []
        if not os.path.isdir(self.root):
            raise ValueError(f"source {location} is {'no folder' if os.path.exists(self.root) else 'not there'}")

    def look(self, folder: str, inside: bool) -> tuple[list[str], str | None]:
        """Names of the folders in a folder (none unless `inside`) and of one picture in it, if there is one."""
        folders, picture = [], None
        for entry in self._entries(folder):
            name = entry.name
            is_picture = extension_of(name) is not None
            if is_picture and picture is not None and not entry.is_symlink() and not entry.is_dir():
                continue
            if _is_folder(entry):
                if not inside:
                    continue
                if entry.is_symlink() and self._holds(entry.path):
                    self.loops.append(f"{folder}/{name}".lstrip("/"))
                else:
                    folders.append(name)
            elif is_picture:
                picture = name
        return sorted(folders, key=os.fsencode), picture

    def _holds(self, link: str) -> bool:
        target, place = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
        return place == target or place.startswith(target.rstrip("/") + "/")

    def _entries(self, folder: str) -> list["os.DirEntry[str]"]:
        path = os.path.join(self.root, folder)
        try:
            with os.scandir(path) as entries:
                return [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise ValueError(f"source folder {path} cannot be read: {error.strerror}") from None

    def pictures(self, folder: str) -> list[_Entry]:
        found = []
        for entry in self._entries(folder):
            if extension_of(entry.name) is None:
                continue
            try:
                status = entry.stat()
            except OSError as error:
                found.append(_Entry(entry.name, 0, 0, f"cannot be read: {error.strerror}"))
                continue
            if stat.S_ISREG(status.st_mode):
                found.append(_Entry(entry.name, status.st_size, status.st_mtime_ns, ""))
            elif not stat.S_ISDIR(status.st_mode):
                found.append(_Entry(entry.name, 0, 0, "is no regular file"))
        return sorted(found, key=lambda entry: os.fsencode(entry.name))


class _RemoteTree:
    """The whole listing of a URL, asked for once: object stores list all names below a prefix at once."""

    def __init__(self, location: str) -> None:
        system, root = filesystem(location)
        self.loops: list[str] = []
        self.folders: dict[str, set[str]] = {"": set()}
        self.files: dict[str, list[_Entry]] = {}
        try:
            listing: dict[str, dict[str, Any]] = system.find(root, detail=True)
        except OSError as error:
            raise ValueError(f"source {location} cannot be listed: {error}") from None
        if not listing:
            raise ValueError(f"source {location} is not there or empty")
        for path, info in listing.items():
            self._add(path[len(root) :].strip("/"), int(info.get("size") or 0))

    def _add(self, path: str, size: int) -> None:
        parts = path.split("/")
        if any(part.startswith(".") for part in parts):
            return
        for depth in range(len(parts) - 1):
            self.folders.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
        if extension_of(parts[-1]) is not None:
            self.files.setdefault("/".join(parts[:-1]), []).append(_Entry(parts[-1], size, 0, ""))

    def look(self, folder: str, inside: bool) -> tuple[list[str], str | None]:
        picture = self.files.get(folder)
        return sorted(self.folders.get(folder, ())) if inside else [], picture[0].name if picture else None

    def pictures(self, folder: str) -> list[_Entry]:
        return sorted(self.files[folder])


class _LocalReader:
    def __init__(self, location: str) -> None:
        self.root = str(local(location))

    def read(self, place: Place) -> bytes:
        handle = os.open(f"{self.root}/{place.name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = os.read(handle, place.size + 1)
            if len(data) == place.size:
                return data
            status = os.fstat(handle)  # it has grown or shrunk since it was listed, or came in pieces
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "no regular file")
            if status.st_size > MAX_IMAGE_BYTES:
                raise ValueError(f"is {status.st_size:,} bytes: allowed are {MAX_IMAGE_BYTES:,}")
            with os.fdopen(os.dup(handle), "rb") as rest:
                return data + rest.read()
        finally:
            os.close(handle)

    def close(self) -> None:
        pass


class _RemoteReader:
    def __init__(self, location: str) -> None:
        self.system, self.root = filesystem(location)

    def read(self, place: Place) -> bytes:
        return self.system.cat_file(f"{self.root.rstrip('/')}/{place.name}")

    def close(self) -> None:
        pass


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _listings(work: Callable[[str], list[_Entry]], folders: list[str]) -> Iterator[list[_Entry]]:
    """Each folder's listing in order: one after the other where that is fast, by threads where each has to be waited for.

    Threads only get in each other's way on a local disk (three times slower); on a network file system they hide the latency.
    """
    started = time.monotonic()
    for folder in folders[:SAMPLE_FOLDERS]:
        yield work(folder)
    if time.monotonic() - started < SAMPLE_FOLDERS * SLOW_LISTING_S:
        yield from map(work, folders[SAMPLE_FOLDERS:])
        return
    rest = iter(folders[SAMPLE_FOLDERS:])
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        waiting = deque(threads.submit(work, folder) for folder in islice(rest, 4 * LISTING_THREADS))
        while waiting:  # only so many under way that the threads are busy: memory stays flat
            yield waiting.popleft().result()
            waiting += [threads.submit(work, folder) for folder in islice(rest, 1)]
