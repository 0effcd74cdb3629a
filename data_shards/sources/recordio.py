"""MXNet RecordIO as InsightFace packs face collections: train.rec, train.idx, property. Read without mxnet."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.files import is_remote, local, name_of, open_file, size_of
from data_shards.sources.archives import describe_files
from data_shards.sources.base import MAX_IMAGE_BYTES, Found, Place, Reader, sniff

MAGIC = 0xCED7230A
_RECORD = struct.Struct("<II")
"""Magic; three bits that say which part of a record this is, 29 bits of its length."""
_HEADER = struct.Struct("<IfQQ")
"""flag: number of labels behind the header, 0 for one in it; label; id; id2."""
_LENGTH_MASK = 2**29 - 1
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_MAX_LABELS = 4096
_HEAD = 12
"""Bytes of a picture that tell its kind."""


class _Record(NamedTuple):
    labels: tuple[float, ...]
    size: int
    head: bytes
    """First bytes of the picture."""


@dataclass(frozen=True)
class RecordIO:
    """A .rec file with its .idx beside it, or the folder that holds them.

    Record 0 and those of the identities, which InsightFace writes and which hold ranges and no picture, are passed over; of
    several labels the first is the identity.
    """

    location: str
    streams = False

    def describe(self) -> dict[str, str | int]:
        return {"kind": "recordio", **describe_files((self.record_file,)), "location": self.location}

    @property
    def record_file(self) -> str:
        """The .rec file.

        Raises:
            ValueError: there is none, or more than one.
        """
        if self.location.endswith(".rec"):
            return self.location
        if is_remote(self.location):
            return f"{self.location.rstrip('/')}/train.rec"
        found = sorted(name for name in os.listdir(local(self.location)) if name.endswith(".rec"))
        if "train.rec" in found:
            found = ["train.rec"]
        if len(found) != 1:
            raise ValueError(f"source {self.location} holds {len(found)} .rec files: give one of them")
        return f"{self.location.rstrip('/')}/{found[0]}"

    def pictures(self) -> Iterator[Found]:
        path = self.record_file
        try:
            size = size_of(path)
            keys, offsets = self._index(path)
            classes = self._classes(path)
            with open_file(path) as file:
                yield from _listed(path, file, size, keys, offsets, classes)
        except OSError as error:
            raise ValueError(f"source {path} cannot be read: {error.strerror or error}") from None

    def open(self) -> Reader:
        return _RecordReader(self.record_file)

    def _index(self, path: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Key and offset of each record, in the order of the offsets."""
        index = path.removesuffix(".rec") + ".idx"
        try:
            with open_file(index) as file:
                text = file.read()
        except FileNotFoundError:
            return _walked(path)
        try:
            numbers = np.array(text.split(), np.int64).reshape(-1, 2)
        except (ValueError, OverflowError):
            raise ValueError(
                f"source {index} is no index of records: each line must be a number and an offset"
            ) from None
        order = np.argsort(numbers[:, 1], kind="stable")
        return numbers[order, 0], numbers[order, 1]

    def _classes(self, path: str) -> int | None:
        """Number of identities that `property` states; None where there is no such file."""
        folder = path.rpartition("/")[0]
        try:
            with open_file(f"{folder}/property" if folder else "property") as file:
                return int(file.read(100).split(b",")[0])
        except (OSError, ValueError):
            return None


def _listed(
    path: str, file: IO[bytes], size: int, keys: NDArray[np.int64], offsets: NDArray[np.int64], classes: int | None
) -> Iterator[Found]:
    name = name_of(path)
    for key, offset in zip(keys.tolist(), offsets.tolist(), strict=True):
        called = f"{name} record {key}"
        try:
            record = _peek(file, offset, size)
            if key == 0 and len(record.labels) > 1 and not record.size:
                continue  # InsightFace's first record: the range of the identities' records
            if not record.size and len(record.labels) > 1:
                continue  # an identity's record: the range of its pictures
            identity = _identity(record.labels, classes)
            if not (extension := sniff(record.head)):
                raise ValueError("is no JPEG, PNG, PGM, BMP or WebP by its first bytes" if record.size else "is empty")
        except ValueError as error:
            yield Found("", called, "", 0, "", refused=str(error))
            continue
        yield Found(identity, called, f"{key:08d}", record.size, extension, 0, offset)


def _identity(labels: tuple[float, ...], classes: int | None) -> str:
    label = labels[0] if labels else float("nan")
    if not label.is_integer() or label < 0 or (classes is not None and label >= classes):
        allowed = "0 and up" if classes is None else f"0 to {classes - 1:,} by `property`"
        raise ValueError(f"has the label {label:g}: allowed are whole numbers, {allowed}")
    return f"{int(label):07d}"


def _peek(file: IO[bytes], offset: int, size: int) -> _Record:
    """Labels, size and first bytes of a record's picture.

    Raises:
        ValueError: there is no whole record; the message is the reason.
    """
    part, length = _part(file, offset, size)
    if part == _FIRST:
        return _split(_joined(file, offset, size))
    head = file.read(min(length, _HEADER.size))
    count = _labels(head, length)
    labels = file.read(4 * count)
    left = length - _HEADER.size - 4 * count
    return _Record(_values(head, labels), left, file.read(min(left, _HEAD)))


def _part(file: IO[bytes], offset: int, size: int) -> tuple[int, int]:
    """Which part of a record begins at `offset`, and its bytes; leaves the file behind its eight bytes."""
    if offset < 0 or offset + _RECORD.size > size:
        raise ValueError(f"is cut short: it begins at byte {offset:,} of {size:,}")
    file.seek(offset)
    magic, word = _RECORD.unpack(file.read(_RECORD.size))
    if magic != MAGIC:
        raise ValueError(f"is damaged: no record begins at byte {offset:,}")
    length = word & _LENGTH_MASK
    if offset + _RECORD.size + length > size:
        raise ValueError(f"is cut short: {length:,} bytes begin at byte {offset + _RECORD.size:,} of {size:,}")
    return word >> 29, length


def _joined(file: IO[bytes], offset: int, size: int) -> bytes:
    """A whole record. Where its bytes hold the magic number the writer has cut it there and left the number out."""
    parts: list[bytes] = []
    total = 0
    while True:
        part, length = _part(file, offset, size)
        if part not in ((_WHOLE, _FIRST) if not parts else (_MIDDLE, _LAST)):
            raise ValueError(f"is damaged: part {part} of a record at byte {offset:,} is out of turn")
        total += length
        if total > MAX_IMAGE_BYTES:
            raise ValueError(f"is more than {MAX_IMAGE_BYTES:,} bytes, which are allowed")
        parts.append(file.read(length))
        if part in (_WHOLE, _LAST):
            return _RECORD.pack(MAGIC, 0)[:4].join(parts)
        offset += _RECORD.size + length + -length % 4


def _split(record: bytes) -> _Record:
    count = _labels(record[: _HEADER.size], len(record))
    start = _HEADER.size + 4 * count
    return _Record(_values(record, record[_HEADER.size : start]), len(record) - start, record[start : start + _HEAD])


def _labels(header: bytes, length: int) -> int:
    """How many labels follow the header."""
    if len(header) < _HEADER.size:
        raise ValueError(f"is damaged: {length:,} bytes hold no header")
    count = int(_HEADER.unpack(header[: _HEADER.size])[0])
    if count > _MAX_LABELS or _HEADER.size + 4 * count > length:
        raise ValueError(f"is damaged: {count:,} labels in {length:,} bytes")
    return count


def _values(header: bytes, labels: bytes) -> tuple[float, ...]:
    if labels:
        return tuple(float(value) for value in np.frombuffer(labels, "<f4"))
    return (float(_HEADER.unpack(header[: _HEADER.size])[1]),)


def _walked(path: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers and offsets of the records of a file without .idx, one behind the other."""
    offsets, at = [], 0
    size = size_of(path)
    with open_file(path) as file:
        while at < size:
            try:
                part, length = _part(file, at, size)
            except ValueError:
                offsets.append(at)  # listing it will say why; nothing can be found behind it
                break
            if part in (_WHOLE, _FIRST):
                offsets.append(at)
            at += _RECORD.size + length + -length % 4
    return np.arange(len(offsets)), np.array(offsets, np.int64)


class _RecordReader:
    def __init__(self, path: str) -> None:
        self._file = open_file(path)
        self._size = size_of(path)

    def read(self, place: Place) -> bytes:
        record = _joined(self._file, place.offset, self._size)
        return record[len(record) - _split(record).size :]

    def close(self) -> None:
        self._file.close()
