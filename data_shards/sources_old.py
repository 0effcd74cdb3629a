"""Collections of pictures: which there are, whose they are, and the key that each one gets."""

import errno
import os
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from data_shards.progress import progress

FILE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".pgm", ".bmp", ".webp")
"""File names that count as pictures, in any case; what a file *is* its first bytes say."""
MAX_NAME = 99
"""Longest member name in characters: more does not fit the USTAR header that every reader understands."""
MAX_KEY = MAX_NAME - len(".webp")
DEEPEST = 3
"""Levels of folders under the root that are looked at; pictures in the third are refused, not overlooked."""
LISTING_THREADS = 8
LAYOUTS = "SOURCE/identity/image.jpg or SOURCE/part/identity/image.jpg (parts such as train/ and test/)"

_FORBIDDEN = re.compile(r"[^A-Za-z0-9_-]")


class SourceImage(NamedTuple):
    """One picture of a collection, not yet read."""

    identity: str
    """Name of the folder that holds it."""
    key: str
    """Its unique WebDataset key."""
    path: str
    """Where it lies, relative to the root."""
    size: int
    """In bytes."""
    extension: str
    """jpg, png, pgm, bmp or webp by its first bytes; empty where they are of none of these or cannot be read."""


def scan(root: Path | str) -> list[SourceImage]:
    """Lists the pictures under `root`, sorted by identity (bytes of the name), then key.

    An identity is a folder that directly holds pictures: `root/identity/image.jpg` (LFW), or one level further down,
    `root/part/identity/image.jpg` (VGGFace2); the same name in two parts is one identity. Hidden files and folders and
    files of other kinds are passed over.

    Raises:
        ValueError: `root` is no folder, cannot be read, holds no pictures, or holds them in another layout.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"source {root} is {'no folder' if root.exists() else 'not there'}")
    folders = list(_identity_folders(root))
    with ThreadPoolExecutor(LISTING_THREADS) as threads:
        listings = threads.map(lambda folder: _pictures(root, folder), folders)
        found: list[SourceImage] = []
        with progress("list", len(folders), "identities") as advance:
            for listing in listings:
                found += listing
                advance(1)
    if not found:
        raise ValueError(f"source {root} holds no pictures ({' '.join(FILE_EXTENSIONS)}) as {LAYOUTS}")
    found.sort(key=lambda picture: (os.fsencode(picture.identity), os.fsencode(picture.path)))
    keys = unique_keys((picture.identity, Path(picture.path).stem) for picture in found)
    keyed = [picture._replace(key=key) for picture, key in zip(found, keys, strict=True)]
    return sorted(keyed, key=lambda picture: (os.fsencode(picture.identity), picture.key))


def unique_keys(names: Iterable[tuple[str, str]]) -> list[str]:
    """A key of `[A-Za-z0-9_/-]`, `MAX_KEY` characters at most, for each (identity, file stem), all different.

    Other characters become `_`; a long name ends in a hash of what was cut off. Of names that come out the same the
    first keeps the key and the others get `_2`, `_3`, … whichever no other picture has.
    """
    wanted = [_key(identity, stem) for identity, stem in names]
    taken = set(wanted)
    seen: set[str] = set()
    numbers: dict[str, int] = {}
    for row, key in enumerate(wanted):
        if key in seen:
            number = numbers.get(key, 1) + 1
            while (candidate := f"{key[: MAX_KEY - len(str(number)) - 1]}_{number}") in taken:
                number += 1
            numbers[key] = number
            taken.add(candidate)
            wanted[row] = candidate
        seen.add(key)
    return wanted


def sniff(head: bytes) -> str:
    """Extension of a picture by its first 12 bytes, or an empty string."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head[:2] in (b"P5", b"P2") and head[2:3].isspace():
        return "pgm"
    if head.startswith(b"BM"):
        return "bmp"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    return ""


def read_head(path: Path | str) -> tuple[int, bytes]:
    """Size of a regular file and its first 12 bytes.

    Raises:
        OSError: it cannot be read or is none.
    """
    with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        return status.st_size, file.read(12)


def _key(identity: str, stem: str) -> str:
    longest = (MAX_KEY - 1) // 2
    key = f"{_FORBIDDEN.sub('_', identity)}/{_FORBIDDEN.sub('_', stem)}"
    if len(key) <= MAX_KEY:
        return key
    return f"{_shortened(identity, longest)}/{_shortened(stem, longest)}"


def _shortened(name: str, longest: int) -> str:
    digest = blake2b(os.fsencode(name), digest_size=5).hexdigest()
    clean = _FORBIDDEN.sub("_", name)
    return clean if len(clean) <= longest else f"{clean[: longest - len(digest) - 1]}-{digest}"


def _identity_folders(root: Path) -> Iterable[str]:
    """Folders, relative to `root`, that directly hold pictures."""
    pending = [""]
    with_pictures: set[str] = set()
    while pending:
        folder = pending.pop()
        depth = len(Path(folder).parts)
        for entry in _entries(root, folder):
            inside = os.path.join(folder, entry.name)
            if entry.is_dir():
                if depth < DEEPEST:
                    pending.append(inside)
            elif entry.name.lower().endswith(FILE_EXTENSIONS):
                if depth not in (1, 2):
                    raise ValueError(f"source {root}: {inside} does not lie as {LAYOUTS}")
                with_pictures.add(folder)
    for folder in sorted(with_pictures):
        if (parent := os.path.dirname(folder)) in with_pictures:
            raise ValueError(f"source {root}: {parent} holds pictures and so does {folder} in it; allowed is {LAYOUTS}")
    return sorted(with_pictures)


def _entries(root: Path, folder: str) -> list[os.DirEntry[str]]:
    path = os.path.join(root, folder)
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"source folder {path} cannot be read: {error.strerror}") from None


def _pictures(root: Path, folder: str) -> list[SourceImage]:
    identity = os.path.basename(folder)
    pictures = []
    for entry in _entries(root, folder):
        if entry.name.lower().endswith(FILE_EXTENSIONS) and not entry.is_dir():
            size, extension = _look(entry.path)
            pictures.append(SourceImage(identity, "", os.path.join(folder, entry.name), size, extension))
    return pictures


def _look(path: str) -> tuple[int, str]:
    """Size and kind of a file; what cannot be read is listed as of no kind, for the conversion to report by name."""
    try:
        size, head = read_head(path)
    except OSError:
        return 0, ""
    return size, sniff(head)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe must not stop the listing
