"""Pictures in archives (zip, tar, tar.gz), read where they lie: nothing is ever extracted."""

import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from data_shards.files import is_remote, local, name_of, open_file, size_of
from data_shards.sources.base import (
    MAX_IMAGE_BYTES,
    Found,
    Place,
    Reader,
    extension_of,
    flaw_of_member,
    identity_and_stem,
)

GZIP_SPACING = 2**22
"""Uncompressed bytes between the points from which a tar.gz can be read on."""
_ZIP_LOCAL = b"PK\x03\x04"
_ZIP_LOCAL_SIZE = 30
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1


def archive_kind(location: str) -> str | None:
    """zip, tar or tar.gz by the first bytes; None where they are of none of these.

    Raises:
        ValueError: it cannot be read, or is compressed in another way.
    """
    try:
        with open_file(location) as file:
            head = file.read(512)
    except OSError as error:
        raise ValueError(f"source {location} cannot be read: {error.strerror or error}") from None
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if head[257:262] == b"ustar" or (len(head) == 512 and _is_old_tar(head)):
        return "tar"
    if head.startswith((b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise ValueError(
            f"source {location} is compressed in a way that we do not read: allowed are tar, tar.gz and zip"
        )
    return None


@dataclass(frozen=True)
class ZipArchive:
    """Zip archives, stored or deflated. Listing one takes memory for its central directory, some 600 bytes a member."""

    locations: tuple[str, ...]
    streams = False

    def describe(self) -> dict[str, str | int]:
        return {"kind": "zip", **describe_files(self.locations)}

    def pictures(self) -> Iterator[Found]:
        for part, location in enumerate(self.locations):
            with _opened(location) as file:
                try:
                    members = zipfile.ZipFile(file).infolist()
                except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                    raise ValueError(f"source {location} is no whole zip archive: {error}") from None
            members.sort(key=lambda member: member.header_offset)
            names = _Names(location)
            for member in members:
                if is_picture(member.filename):
                    flaw = _zip_flaw(member)
                    yield names.found(member.filename, member.file_size, part, member.header_offset, flaw)

    def open(self) -> Reader:
        return _ZipReader(self.locations)


@dataclass(frozen=True)
class TarArchive:
    """Uncompressed tar archives in any of tar's formats."""

    locations: tuple[str, ...]
    streams = False

    def describe(self) -> dict[str, str | int]:
        return {"kind": "tar", **describe_files(self.locations)}

    def pictures(self) -> Iterator[Found]:
        for part, location in enumerate(self.locations):
            with _opened(location) as file:
                yield from _tar_pictures(location, part, file)

    def open(self) -> Reader:
        return RangeReader(self.locations)


@dataclass(frozen=True)
class GzipTarArchive:
    """Gzip-compressed tar archives: read on from points some megabytes apart, which each process finds for itself.

    Converting a large one in another order than `source` decompresses it many times: gunzip it first.
    """

    locations: tuple[str, ...]
    streams = True

    def describe(self) -> dict[str, str | int]:
        return {"kind": "tar.gz", **describe_files(self.locations)}

    def pictures(self) -> Iterator[Found]:
        for part, location in enumerate(self.locations):
            with _opened(location) as file, _gunzipped(file) as stream:
                yield from _tar_pictures(location, part, stream)

    def open(self) -> Reader:
        return _GzipReader(self.locations)


def is_picture(member: str) -> bool:
    """Whether an archive's member counts as a picture by its name; hidden files do not."""
    parts = member.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts) or "__MACOSX" in parts
    return extension_of(member) is not None and not hidden


def describe_files(locations: tuple[str, ...]) -> dict[str, str | int]:
    """Location, bytes and modification time of the files that make up a source; of several, the sum and the newest."""
    sizes = sum(size_of(location) for location in locations)
    here = [local(location) for location in locations if not is_remote(location)]
    stamps = [path.stat().st_mtime_ns for path in here]
    where = locations[0] if len(locations) == 1 else f"{len(locations)} files, {locations[0]} first"
    return {"location": where, "bytes": sizes, "modified_ns": max(stamps, default=0)}


class _Names:
    """Makes what is found in one archive into `Found`, under names that are unique."""

    def __init__(self, location: str) -> None:
        self.archive = name_of(location)
        self._seen: dict[int, int] = {}

    def found(self, member: str, size: int, part: int, offset: int, flaw: str) -> Found:
        number = self._seen[hash(member)] = self._seen.get(hash(member), 0) + 1
        name = f"{self.archive}/{member}" if number == 1 else f"{self.archive}/{member} ({number})"
        extension = extension_of(member) or ""
        flaw = flaw or flaw_of_member(member)
        try:
            identity, stem = identity_and_stem(member)
        except ValueError as error:
            identity, stem, flaw = "", "", flaw or str(error)
        return Found(identity, name, stem, size, extension, part, offset, 0, flaw)


def _tar_pictures(location: str, part: int, file: IO[bytes]) -> Iterator[Found]:
    names = _Names(location)
    last = "its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=0, encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep every member
                last = member.name
                if is_picture(member.name):
                    yield names.found(member.name, member.size, part, member.offset_data, tar_flaw(member))
            require_end(tar, file)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        if last == "its beginning":
            raise ValueError(f"source {location} is no whole tar archive: {error}") from None
        reason = f"is cut short or damaged behind {last}: {error or 'unexpected end'}"
        yield Found("", names.archive, "", 0, "", part, refused=" ".join(reason.split()))


def require_end(tar: tarfile.TarFile, file: IO[bytes]) -> None:
    """tarfile takes any end for the end; raises where there are no zero blocks."""
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE).count(0) != tarfile.BLOCKSIZE:
        raise ValueError("it has no end")


def tar_flaw(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"is a {'symbolic' if member.issym() else 'hard'} link in the archive"
    if member.issparse():
        return "is a sparse file in the archive"
    return "" if member.isreg() else "is no regular file in the archive"


def _zip_flaw(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if member.compress_type not in (_STORED, _DEFLATED):
        return f"is compressed by method {member.compress_type}: allowed are stored and deflated"
    if (member.external_attr >> 16) & 0o170000 not in (0, 0o100000):
        return "is no regular file in the archive"
    return ""


class RangeReader:
    """Reads byte ranges out of files that stay open."""

    def __init__(self, locations: tuple[str, ...]) -> None:
        self._locations = locations
        self._files: dict[int, IO[bytes]] = {}
        self._lock = threading.Lock()

    def read(self, place: Place) -> bytes:
        data = self.range(place.part, place.offset, place.size)
        if len(data) != place.size:
            raise ValueError(f"is cut short: {len(data):,} of {place.size:,} bytes are left")
        return data

    def range(self, part: int, offset: int, size: int) -> bytes:
        if part not in self._files:
            self._files[part] = open_file(self._locations[part])
        file = self._files[part]
        if not is_remote(self._locations[part]):
            return os.pread(file.fileno(), size, offset)
        with self._lock:
            file.seek(offset)
            return file.read(size)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class _ZipReader(RangeReader):
    def read(self, place: Place) -> bytes:
        header = self.range(place.part, place.offset, _ZIP_LOCAL_SIZE)
        if len(header) < _ZIP_LOCAL_SIZE or not header.startswith(_ZIP_LOCAL):
            raise ValueError("is damaged: it has no header in the archive")
        method, crc = int.from_bytes(header[8:10], "little"), int.from_bytes(header[14:18], "little")
        stored = int.from_bytes(header[18:22], "little")
        skip = _ZIP_LOCAL_SIZE + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        follows = bool(header[6] & 0x08)  # sizes and checksum come after the data
        limit = place.size + place.size // 100 + 64  # what deflate may add
        length = limit if follows or stored == 0xFFFFFFFF else min(stored, limit)
        if method == _STORED:
            data = self.range(place.part, place.offset + skip, place.size)
        else:
            data = _inflated(self.range(place.part, place.offset + skip, length), place.size)
        if len(data) != place.size:
            raise ValueError(f"is cut short: {len(data):,} of {place.size:,} bytes are left")
        if not follows and zlib.crc32(data) != crc:
            raise ValueError("is damaged: its checksum in the archive differs (CRC-32)")
        return data


def _inflated(data: bytes, size: int) -> bytes:
    """Never more than a byte over what was listed, whatever the data would grow to."""
    try:
        inflated = zlib.decompressobj(-15).decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"is damaged: {error}") from None
    if len(inflated) > size:
        raise ValueError(f"is damaged: it is larger than the {size:,} bytes that the archive lists")
    return inflated


class _GzipReader(RangeReader):
    def __init__(self, locations: tuple[str, ...]) -> None:
        super().__init__(locations)
        self._raw: list[IO[bytes]] = []

    def close(self) -> None:
        super().close()
        for file in self._raw:
            file.close()

    def range(self, part: int, offset: int, size: int) -> bytes:
        if part not in self._files:
            self._raw.append(open_file(self._locations[part]))
            self._files[part] = _gunzipped(self._raw[-1])
        try:
            self._files[part].seek(offset)
            return self._files[part].read(min(size, MAX_IMAGE_BYTES))
        except Exception as error:  # indexed_gzip has errors of its own
            raise ValueError(f"is damaged: {' '.join(str(error).split()) or type(error).__name__}") from None


def _gunzipped(file: IO[bytes]) -> Any:
    import indexed_gzip

    return indexed_gzip.IndexedGzipFile(fileobj=file, spacing=GZIP_SPACING, auto_build=True)


def _opened(location: str) -> IO[bytes]:
    try:
        return open_file(location)
    except OSError as error:
        raise ValueError(f"source {location} cannot be read: {error.strerror or error}") from None


def _is_old_tar(head: bytes) -> bool:
    try:
        return int(head[148:156].strip(b"\0 "), 8) == sum(head) - sum(head[148:156]) + 8 * ord(" ")
    except ValueError:
        return False
