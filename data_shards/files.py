"""Files by path or URL: which schemes are admitted, and how to open what they name. The only import of fsspec."""

import os
import re
from pathlib import Path
from typing import IO, Any

SCHEMES = ("abfs", "az", "file", "gcs", "gs", "hf", "http", "https", "memory", "s3")
"""URL schemes that are admitted; `pipe:` and whatever else runs a program never are."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether this is a URL and no path of this machine; `file://` is one.

    Raises:
        ValueError: a scheme that is not among `SCHEMES`, or a chain of them.
    """
    text = os.fspath(location)
    match = _URL.match(text)
    if not match or os.path.exists(text):
        return False
    scheme = match[1].lower()
    if scheme not in SCHEMES or not text[match.end() :].startswith("//") or "::" in text:
        raise ValueError(
            f"{text} is not a URL that we read or write: allowed are {', '.join(f'{s}://' for s in SCHEMES)}"
        )
    return scheme != "file"


def local(location: str | os.PathLike[str]) -> Path:
    """The path of a location on this machine."""
    assert not is_remote(location), location
    text = os.fspath(location)
    return Path(text.removeprefix("file://"))


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of an admitted URL, and the path in it.

    Raises:
        ValueError: the scheme's package is not installed, or it cannot be reached.
    """
    import fsspec

    assert is_remote(url), url
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from None


def file_system(location: str | os.PathLike[str]) -> tuple[Any, str]:
    """fsspec's file system of an admitted URL or of this machine, and the path in it.

    Raises:
        ValueError: see `is_remote` and `filesystem`.
    """
    if is_remote(location):
        return filesystem(os.fspath(location))
    import fsspec

    return fsspec.filesystem("file"), os.path.abspath(local(location))


def open_file(location: str | os.PathLike[str]) -> IO[bytes]:
    """A seekable file to read, here or at a URL.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if not is_remote(location):
        return local(location).open("rb")
    system, path = filesystem(os.fspath(location))
    return system.open(path, "rb")


def size_of(location: str | os.PathLike[str]) -> int:
    """Bytes of a file, here or at a URL."""
    if not is_remote(location):
        return local(location).stat().st_size
    system, path = filesystem(os.fspath(location))
    return int(system.size(path))


def name_of(location: str | os.PathLike[str]) -> str:
    """Last part of a path or URL."""
    return os.fspath(location).rstrip("/").rpartition("/")[2]
