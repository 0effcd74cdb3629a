"""What every kind of source gives: the pictures that it holds, and their bytes."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".pgm": "pgm", ".bmp": "bmp", ".webp": "webp"}
"""File names that count as pictures, in any case, and the extension that they get in a shard."""
MAX_IMAGE_BYTES = 2**30
"""A larger file is no picture of a face, and a worker reads a picture as a whole."""


class Found(NamedTuple):
    """One picture that a source lists, not yet read."""

    identity: str
    """Whose it is: the name of the folder that holds it, or the label as text."""
    name: str
    """What it is called in the source, unique there: for messages, and for `Reader.read`."""
    stem: str
    """What its key is made from: the file's name without extension, or its number in the source."""
    size: int
    """Encoded bytes, as far as the source knows without reading it."""
    extension: str
    """One of `EXTENSIONS`' values, by name (by content where it has no name)."""
    part: int = 0
    """Which of the source's files holds it."""
    offset: int = 0
    """Where in that file, in the reader's own terms."""
    stamp: int = 0
    """Changes when the picture does: a modification time in ns, or 0 where the file's own is enough."""
    refused: str = ""
    """Why it is left out without being read (a link, an absolute path, …); empty where it is not."""


class Place(NamedTuple):
    """What a reader needs to find one picture."""

    name: str
    part: int
    offset: int
    size: int


class Reader(Protocol):
    """Reads pictures of a source; each worker process opens its own."""

    def read(self, place: Place) -> bytes:
        """The encoded picture.

        Raises:
            OSError: it cannot be read.
            ValueError: it can, but is damaged; the message is the reason and begins with a verb ("is cut short").
        """
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """A collection of pictures; small and picklable, for it is sent to the workers."""

    @property
    def streams(self) -> bool:
        """True where reading in the order of (part, offset) is much faster than at random (compressed archives)."""
        ...

    def describe(self) -> dict[str, str | int]:
        """Kind, location and, of single files, size and modification time: a changed source is told by it."""
        ...

    def pictures(self) -> Iterator[Found]:
        """Every picture, in an order that depends on the source alone.

        Raises:
            ValueError: the source is not usable; the message names the file and what is wrong, in one line.
        """
        ...

    def open(self) -> Reader: ...


def extension_of(name: str) -> str | None:
    """The extension that a file of this name gets in a shard; None where it does not count as a picture."""
    dot = name.rfind(".")
    return EXTENSIONS.get(name[dot:].lower()) if dot >= 0 else None


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


def identity_and_stem(member: str) -> tuple[str, str]:
    """Name of the folder that directly holds an archive's member, and the member's name without extension.

    Raises:
        ValueError: it lies in no folder; the message is the reason.
    """
    folder, _, base = member.rpartition("/")
    identity = folder.rpartition("/")[2]
    if identity in ("", "."):
        raise ValueError("lies in no identity's folder")
    return identity, base[: base.rfind(".")] if "." in base else base


def flaw_of_member(member: str) -> str:
    """Why the name of an archive's member is refused; empty where it is not."""
    if member.startswith(("/", "\\")) or (len(member) > 1 and member[1] == ":"):
        return "has an absolute path"
    if ".." in member.replace("\\", "/").split("/"):
        return "has '..' in its path"
    return ""
