"""A list of (path, identity): CSV, TSV or Parquet."""

import csv
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from data_shards.files import filesystem, is_remote, local, name_of, open_file
from data_shards.sources.archives import describe_files
from data_shards.sources.base import Found, Place, Reader, extension_of

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
IDENTITY_COLUMNS = ("identity", "label", "person", "id", "class")


@dataclass(frozen=True)
class PictureList:
    """Paths are relative to `root`, by default the list's folder; absolute ones and URLs are taken as they are."""

    location: str
    root: str = ""
    streams = False

    def describe(self) -> dict[str, str | int]:
        return {"kind": "list", **describe_files((self.location,)), "root": self._root}

    @property
    def _root(self) -> str:
        return self.root or self.location.rstrip("/").rpartition("/")[0] or "."

    def pictures(self) -> Iterator[Found]:
        seen: dict[bytes, int] = {}
        rows = _parquet_rows(self.location) if self.location.lower().endswith(".parquet") else _csv_rows(self.location)
        for line, path, identity in rows:
            key = blake2b(os.fsencode(path), digest_size=8).digest()
            first = seen.setdefault(key, line)
            repeated = f"is listed twice (lines {first:,} and {line:,})" if first != line else ""
            name = path if not repeated else f"{path} (line {line:,})"
            yield self._found(name, path, identity, line, repeated)

    def open(self) -> Reader:
        return _ListReader(self._root)

    def _found(self, name: str, path: str, identity: str, line: int, refused: str) -> Found:
        base = name_of(path)
        extension = extension_of(base)
        size = stamp = 0
        if not refused and extension is None:
            refused = "is no picture by its name"
        if not refused and not identity:
            refused = f"has no identity (line {line:,})"
        if not refused:
            size, stamp, refused = _look(self._root, path)
        stem = base[: base.rfind(".")] if "." in base else base
        return Found(identity, name, stem, size, extension or "", 0, line, stamp, refused)


def _look(root: str, path: str) -> tuple[int, int, str]:
    """Size and modification time of a listed file, or why it is refused."""
    try:
        if is_remote(place := _place(root, path)):
            system, inside = filesystem(place)
            return int(system.size(inside) or 0), 0, ""
        status = os.stat(local(place))
    except ValueError as error:
        return 0, 0, str(error)
    except OSError as error:
        return 0, 0, f"cannot be read: {error.strerror or 'No such file or directory'}"
    if not stat.S_ISREG(status.st_mode):
        return 0, 0, "is no regular file"
    return status.st_size, status.st_mtime_ns, ""


def _place(root: str, path: str) -> str:
    """Where a listed picture lies.

    Raises:
        ValueError: '..' in its path, or a URL that we do not read.
    """
    if ".." in path.replace("\\", "/").split("/"):
        raise ValueError("has '..' in its path")
    if "\0" in path:
        raise ValueError("has a NUL in its path")
    if is_remote(path) or path.startswith("/"):
        return path
    return f"{root.rstrip('/') or '/'}/{path}"


class _ListReader:
    def __init__(self, root: str) -> None:
        self._root = root

    def read(self, place: Place) -> bytes:
        where = _place(self._root, place.name)
        if is_remote(where):
            with open_file(where) as file:
                return file.read()
        handle = os.open(local(where), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "no regular file")
            return file.read()

    def close(self) -> None:
        pass


def _columns(location: str, header: list[str]) -> tuple[int, int]:
    """Positions of path and identity.

    Raises:
        ValueError: there are no such columns.
    """
    plain = [title.strip().lower() for title in header]
    found = [
        next((plain.index(title) for title in titles if title in plain), -1)
        for titles in (PATH_COLUMNS, IDENTITY_COLUMNS)
    ]
    if -1 in found:
        allowed = f"{'|'.join(PATH_COLUMNS)} and {'|'.join(IDENTITY_COLUMNS)}"
        raise ValueError(f"source {location} has the columns {', '.join(header) or 'none'}: needed are {allowed}")
    return found[0], found[1]


def _csv_rows(location: str) -> Iterator[tuple[int, str, str]]:
    """(line, path, identity). A file whose first line names no columns is one of two columns without names."""
    import io

    tabs = location.lower().endswith(".tsv")
    try:
        raw = open_file(location)
    except OSError as error:
        raise ValueError(f"source {location} cannot be read: {error.strerror or error}") from None
    with io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if tabs else ",", skipinitialspace=True, strict=True)
        path = identity = -1
        try:
            for row in rows:
                if not row:
                    continue
                if path < 0:
                    path, identity, named = _first_row(location, row)
                    if named:
                        continue
                if len(row) <= max(path, identity):
                    raise ValueError(f"source {location}, line {rows.line_num:,}: {len(row)} columns, needed are 2")
                yield rows.line_num, row[path], row[identity].strip()
        except csv.Error as error:
            raise ValueError(f"source {location}, line {rows.line_num:,}: {error}") from None


def _first_row(location: str, row: list[str]) -> tuple[int, int, bool]:
    """Positions of path and identity, and whether this row names them."""
    if len(row) == 2 and extension_of(row[0]) is not None:
        return 0, 1, False
    return *_columns(location, row), True


def _parquet_rows(location: str) -> Iterator[tuple[int, str, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with open_file(location) as file, parquet.ParquetFile(file) as table:
            header = list(table.schema_arrow.names)
            columns = [header[at] for at in _columns(location, header)]
            line = 0
            for batch in table.iter_batches(10_000, columns=columns):
                paths, identities = (batch.column(name).to_pylist() for name in columns)
                for path, identity in zip(paths, identities, strict=True):
                    line += 1
                    yield line, _text(path), _text(identity).strip()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source {location} is no Parquet file that can be read: {_line(error)}") from None


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:07d}"
    return value if isinstance(value, str) else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
