"""One shard: its pictures are read, checked, perhaps transformed, and written. Runs in the conversion's worker processes."""

import tarfile
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.commit import HashedFile
from data_shards.convert_config import ConvertConfig
from data_shards.face_regions import Regions
from data_shards.index import SAMPLE
from data_shards.listing import EXTENSION_CODES, Listing
from data_shards.pictures import inspect_image, probe_image, quiet_pillow
from data_shards.shard_plan import END, Job
from data_shards.sources.base import MAX_IMAGE_BYTES, Place, Reader, identity_and_stem, sniff
from data_shards.store import Store
from data_shards.tar_members import BLOCK, Member, dali_index
from data_shards.transform import transform

CHUNK = 2**20
"""Bytes that are collected before they are hashed and written."""
TOO_SMALL = "smaller than min_size"


class Failure(NamedTuple):
    """A picture left out of the shards."""

    path: str
    """What it is called in the source; its key where pseudonyms are asked for."""
    reason: str


class Shard(NamedTuple):
    """One written shard. Its samples' `shard` is 0 until all are written, for an empty one takes no number."""

    split: str
    name: str
    extension: str
    """Of all its pictures."""
    bytes: int
    sha256: str
    idx_sha256: str
    rows: NDArray[np.int64]
    """Of the listing, in the tar's order."""
    samples: NDArray[Any]
    failures: list[Failure]
    filtered: dict[str, int]


class Tools(NamedTuple):
    """What a worker needs beside the job."""

    listing: Listing
    labels: NDArray[np.uint32]
    reader: Reader
    streams: bool
    regions: Regions | None
    config: ConvertConfig


class _Contents:
    """What has been put into a tar so far."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.samples: list[tuple[int, ...]] = []
        self.entries: list[tuple[Member, Member]] = []
        self.failures: list[Failure] = []
        self.too_small = 0


def write_shard(store: Store, job: Job, tools: Tools) -> Shard:
    """Writes one tar and its DALI index into the store; neither where no picture survives."""
    contents = _Contents()
    length, sha256, idx_sha256 = 0, "", ""
    extension = tools.config.transform.extension(EXTENSION_CODES[job.extension])
    try:
        with quiet_pillow(), store.writing(f"{job.split}/{job.name}") as tar:
            _fill(tar, contents, extension, job, tools)
            if not contents.rows:
                raise _NothingLeft
        length, sha256 = tar.length, tar.sha256
        idx_sha256 = store.write(f"{job.split}/{job.name[:-4]}.idx", dali_index(contents.entries))
    except _NothingLeft:
        pass
    return Shard(
        split=job.split,
        name=job.name,
        extension=extension,
        bytes=length,
        sha256=sha256,
        idx_sha256=idx_sha256,
        rows=np.array(contents.rows, np.int64),
        samples=np.array(contents.samples, SAMPLE),
        failures=contents.failures,
        filtered={TOO_SMALL: contents.too_small} if contents.too_small else {},
    )


class _NothingLeft(Exception):
    """No picture of a shard survived: what was begun is taken back."""


def _fill(tar: HashedFile, contents: _Contents, extension: str, job: Job, tools: Tools) -> None:
    rows = tools.listing.rows[job.rows]
    labels = tools.labels[rows["identity"]].tolist()
    writer, min_size, named = _TarWriter(tar), tools.config.min_size, EXTENSION_CODES[job.extension]
    for (place, key, data), label, row in zip(_read(tools, rows), labels, job.rows.tolist(), strict=True):
        try:
            if isinstance(data, Exception):
                raise data
            data, width, height = _checked(data, named, place, tools)
        except (ValueError, OSError) as error:
            name = key if tools.config.pseudonyms else place.name
            contents.failures.append(Failure(name, reason_of(error)))
            continue
        if width < min_size or height < min_size:
            contents.too_small += 1
            continue
        image, text = writer.add(key, extension, data, b"%d" % label)
        contents.entries.append((image, text))
        contents.samples.append((image.offset, image.size, 0, label, zlib.crc32(data), width, height))
        contents.rows.append(row)
    writer.finish()


def _read(tools: Tools, rows: NDArray[Any]) -> Iterator[tuple[Place, str, bytes | Exception]]:
    """(place, key, encoded picture or what went wrong) in the order of the rows.

    Of a source that only streams well, the pictures are read in its own order and kept until their turn comes.
    """
    early: dict[Place, bytes | Exception] = {}
    if tools.streams:
        order = np.lexsort((rows["offset"], rows["part"]))
        early = {place: _try(tools.reader, place) for place, _, _ in tools.listing.entries(rows[order])}
    for place, key, _ in tools.listing.entries(rows):
        yield place, key, early.pop(place) if tools.streams else _try(tools.reader, place)


def _try(reader: Reader, place: Place) -> bytes | Exception:
    if place.size > MAX_IMAGE_BYTES:
        return ValueError(f"is {place.size:,} bytes: allowed are {MAX_IMAGE_BYTES:,}")
    try:
        return reader.read(place)
    except (ValueError, OSError) as error:
        return error


def _checked(data: bytes, named: str, place: Place, tools: Tools) -> tuple[bytes, int, int]:
    """A picture as it goes into the shard, its width and height.

    Args:
        named: the extension that the source gives it; what it is, its bytes say.

    Raises:
        ValueError: it does not decode or is refused.
    """
    extension = sniff(data[:12])
    if not extension:
        raise ValueError("is no JPEG, PNG, PGM, BMP or WebP by its first bytes" if data else "is empty")
    config = tools.config
    if not config.transform.changes_bytes:
        inspect = inspect_image if config.check == "decode" else probe_image
        return data, *inspect(data, extension, config.max_pixels)
    probe_image(data, extension, config.max_pixels)
    region = None
    if tools.regions is not None:
        region = tools.regions.find(*identity_and_stem(place.name))
    data, _, width, height = transform(data, named, config.transform, region)
    return data, width, height


class _TarWriter:
    """Appends members to a USTAR archive: mode 0644, no owner, time 0, so that equal pictures give equal bytes."""

    def __init__(self, tar: HashedFile) -> None:
        self._tar = tar
        self._parts: list[bytes] = []
        self._pending = 0

    def add(self, key: str, extension: str, data: bytes, label: bytes) -> tuple[Member, Member]:
        """Appends a picture and its label."""
        name, size = key.encode("ascii"), len(data)
        offset = self._tar.length + self._pending + BLOCK
        image = b"%b.%b" % (name, extension.encode("ascii"))
        padding = _ZEROS[: -size % BLOCK]
        self._parts += (
            _header(image, size),
            data,
            padding,
            _header(name + b".cls", len(label)),
            label.ljust(BLOCK, b"\0"),
        )
        self._pending += 3 * BLOCK + size + len(padding)
        if self._pending >= CHUNK:
            self._flush()
        label_at = offset + size + len(padding) + BLOCK
        return Member(extension, offset, size, f"{key}.{extension}"), Member("cls", label_at, len(label), f"{key}.cls")

    def finish(self) -> None:
        self._parts.append(END)
        self._flush()

    def _flush(self) -> None:
        self._tar.write(b"".join(self._parts))
        self._parts.clear()
        self._pending = 0


_ZEROS = bytes(BLOCK)


def _header(name: bytes, size: int) -> bytes:
    """A member's USTAR header block, as `tarfile` writes it, in a tenth of the time."""
    front, middle, tail, base = _template()
    digits = b"%011o" % size
    checksum = base + sum(name) + sum(digits)
    return b"".join((name.ljust(100, b"\0"), front, digits, middle, b"%06o" % checksum, tail))


@cache
def _template() -> tuple[bytes, bytes, bytes, int]:
    """The parts of a header that no member changes, and the sum of their bytes with the checksum's field as blanks."""
    block = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    fixed = block[:124] + block[135:148] + b" " * 8 + block[156:]
    return block[100:124], block[135:148], block[154:], sum(fixed)


def reason_of(error: ValueError | OSError) -> str:
    """Why a picture is left out, in words that do not depend on the machine."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or type(error).__name__}"
    return " ".join(str(error).split())
