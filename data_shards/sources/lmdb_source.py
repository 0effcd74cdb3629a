"""LMDB: pictures under keys like `identity/image.jpg`, or Caffe's Datum records."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.files import is_remote, local
from data_shards.sources.base import (
    MAX_IMAGE_BYTES,
    Found,
    Place,
    Reader,
    extension_of,
    flaw_of_member,
    identity_and_stem,
    sniff,
)

_DATA = "data.mdb"
_META_PREFIX = b"__"
_DATA_FIELD, _LABEL_FIELD, _ENCODED_FIELD = 4, 5, 7
_LAST_FIELD = 7


class _Datum(NamedTuple):
    data: bytes
    label: int | None
    encoded: bool


@dataclass(frozen=True)
class Lmdb:
    """A folder with data.mdb, or the file itself; of this machine, for LMDB maps it.

    Whose picture it is: the folder in the key, or the label of a Datum. Keys that begin with `__` are passed over, and nothing
    is ever unpickled.
    """

    location: str
    streams = False

    def describe(self) -> dict[str, str | int]:
        status = _data_file(self.location).stat()
        return {"kind": "lmdb", "location": self.location, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}

    def pictures(self) -> Iterator[Found]:
        import lmdb

        name = _data_file(self.location).name
        environment = _environment(self.location)
        identities = others = 0
        try:
            with environment.begin(buffers=True) as transaction:
                for key, value in transaction.cursor():
                    if bytes(key[:2]) == _META_PREFIX:
                        continue
                    found = _found(name, os.fsdecode(bytes(key)), value)
                    if found is None:
                        others += 1
                        continue
                    identities += not found.refused
                    yield found
        except lmdb.Error as error:
            raise ValueError(f"source {self.location} cannot be read: {error}") from None
        finally:
            environment.close()
        if others and not identities:
            allowed = "identity/image.jpg, or Caffe's Datum records with a label"
            raise ValueError(
                f"source {self.location} has {others:,} entries whose keys name no identity: allowed are {allowed}"
            )

    def open(self) -> Reader:
        return _LmdbReader(self.location)


class _LmdbReader:
    def __init__(self, location: str) -> None:
        self._environment = _environment(location)
        self._skip = len(_data_file(location).name) + 1

    def read(self, place: Place) -> bytes:
        with self._environment.begin() as transaction:
            value = transaction.get(os.fsencode(place.name[self._skip :]))
        if value is None:
            raise ValueError("is gone")
        if sniff(value[:12]):
            return bytes(value)
        return _datum(value).data

    def close(self) -> None:
        self._environment.close()


def _data_file(location: str) -> Path:
    if is_remote(location):
        raise ValueError(f"source {location} is a URL: LMDB must lie on this machine")
    path = local(location)
    return path / _DATA if path.is_dir() else path


def _environment(location: str) -> Any:
    """The environment, opened for reading only after its size was compared with what it says, for LMDB would crash later.

    Raises:
        ValueError: it is none, or cut short.
    """
    import lmdb

    file = _data_file(location)
    try:
        size = file.stat().st_size
        environment = lmdb.open(
            str(file), subdir=False, readonly=True, lock=False, readahead=False, max_spare_txns=1, create=False
        )
    except (lmdb.Error, OSError) as error:
        raise ValueError(f"source {location} is no LMDB that can be read: {error}") from None
    pages = environment.info()["last_pgno"] + 1
    needed = pages * environment.stat()["psize"]
    if size < needed:
        environment.close()
        raise ValueError(f"source {location} is cut short: it is {size:,} bytes and says {needed:,}")
    return environment


def _found(file: str, key: str, value: memoryview) -> Found | None:
    """What an entry is; None where it names no identity."""
    name = f"{file}/{key}"
    head = sniff(bytes(value[:12]))
    if head:
        if "/" not in key:
            return None
        try:
            identity, stem = identity_and_stem(key)
        except ValueError as error:
            return Found("", name, "", 0, "", refused=str(error))
        return Found(identity, name, stem, len(value), extension_of(key) or head, refused=flaw_of_member(key))
    try:
        datum = _datum(bytes(value))
    except ValueError:
        if extension_of(key) is None:
            return None
        return Found("", name, "", 0, "", refused="is no JPEG, PNG, PGM, BMP or WebP by its first bytes")
    if datum.label is None or datum.label < 0:
        return Found("", name, "", 0, "", refused="has no label in its Datum")
    extension = sniff(datum.data[:12])
    stem = key.rpartition("/")[2]
    stem = stem[: stem.rfind(".")] if "." in stem else stem
    reason = "" if extension else "is a Datum of raw pixels: allowed are encoded pictures"
    return Found(f"{datum.label:07d}", name, stem, len(datum.data), extension, refused=reason)


def _datum(record: bytes) -> _Datum:
    """The fields of a Datum that matter, from its protocol buffer (caffe.proto).

    Raises:
        ValueError: it is none.
    """
    data, label, encoded = b"", None, False
    at = 0
    while at < len(record):
        tag, at = _varint(record, at)
        field, kind = tag >> 3, tag & 7
        if not 1 <= field <= _LAST_FIELD:
            raise ValueError("is no Datum")
        if kind == 0:
            value, at = _varint(record, at)
            label = value if field == _LABEL_FIELD else label
            encoded = bool(value) if field == _ENCODED_FIELD else encoded
        elif kind == 2:
            length, at = _varint(record, at)
            if at + length > len(record) or length > MAX_IMAGE_BYTES:
                raise ValueError("is cut short")
            data = record[at : at + length] if field == _DATA_FIELD else data
            at += length
        elif kind == 5:
            at += 4
        else:
            raise ValueError("is no Datum")
    if not data or at != len(record):
        raise ValueError("is no Datum")
    return _Datum(data, label, encoded)


def _varint(record: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(record) or shift > 63:
            raise ValueError("is no Datum")
        value |= (record[at] & 0x7F) << shift
        shift += 7
        at += 1
        if record[at - 1] < 0x80:
            return value, at
