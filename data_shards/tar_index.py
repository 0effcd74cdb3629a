"""DALI's index of any WebDataset tar, ours or another tool's."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from data_shards.commit import committed
from data_shards.tar_members import BLOCK, Member, dali_index, split_name

_FILE_TYPES = (b"0", b"\0", b"7")
_LONG_NAME, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"x", b"g", b"S"
_ZERO = bytes(BLOCK)


def index_tar(path: Path | str) -> list[list[Member]]:
    """The members of each sample of a tar: ustar, GNU (also names over 100 characters) or PAX; uncompressed.

    Members belong to one sample where they follow each other and share the name up to the first dot behind the last slash.
    Folders, links and hidden files are passed over, as DALI's own tool does.

    Raises:
        ValueError: it is no tar, is cut short, damaged or sparse, or a name has blanks, which DALI's reader takes for the end.
        OSError: it cannot be read.
    """
    samples: list[list[Member]] = []
    last = None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise ValueError(f"{path} is empty: it is no tar")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            for name, offset, length in _files(path, tar, size):
                key, extension = split_name(name)
                if not key or key.endswith("/"):
                    continue
                if any(letter.isspace() for letter in name):
                    raise ValueError(f"{path} has a member {name!r}: DALI's reader takes no blanks in names")
                if key != last:
                    samples.append([])
                    last = key
                samples[-1].append(Member(extension, offset, length, name))
    return samples


def write_tar_index(path: Path | str) -> int:
    """Writes `path` with the ending .idx instead of .tar; returns the number of samples."""
    samples = index_tar(path)
    with committed(Path(path).with_suffix(".idx"), 0o644) as file:
        file.write(dali_index(samples))
    return len(samples)


def _files(path: Path | str, tar: mmap.mmap, size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, bytes) of every regular file."""
    at, name, length = 0, None, None
    while True:
        block = tar[at : at + BLOCK]
        if len(block) < BLOCK:
            raise ValueError(f"{path} is cut short: it has no end after {at:,} bytes")
        if block[0] == 0 and block == _ZERO:
            return
        kind, stored = block[156:157], _size(path, block, at)
        data = at + BLOCK
        length = stored if length is None else length
        at = data + length + -length % BLOCK
        if data + length > size:
            raise ValueError(f"{path} is cut short: a member of {length:,} bytes begins at {data:,} of {size:,}")
        if kind == _LONG_NAME:
            name = os.fsdecode(tar[data : data + length].rstrip(b"\0"))
        elif kind in (_PAX, _PAX_GLOBAL):
            values = _pax(path, tar[data : data + length], data)
            if kind == _PAX and any(key.startswith("GNU.sparse") for key in values):
                raise ValueError(f"{path} has a sparse member at byte {data:,}, which has no bytes of its own")
            if kind == _PAX:
                name = values.get("path", name)
                after = values.get("size")
                at = data + length + -length % BLOCK
                length = int(after) if after else None
                continue
        elif kind == _SPARSE:
            raise ValueError(f"{path} has a sparse member at byte {data:,}, which has no bytes of its own")
        else:
            if kind in _FILE_TYPES:
                yield name or _name(block), data, length
            name = None
        length = None


def _name(block: bytes) -> str:
    name = os.fsdecode(block[:100].split(b"\0", 1)[0])
    if block[257:263] == b"ustar\0" and block[345]:
        return f"{os.fsdecode(block[345:500].split(bytes(1), 1)[0])}/{name}"
    return name


def _size(path: Path | str, block: bytes, at: int) -> int:
    """The size field, after comparing the header's checksum."""
    try:
        if int(block[148:156].strip(b"\0 "), 8) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise ValueError
        if block[124] & 0x80:
            return int.from_bytes(block[124:136], "big") & (2**95 - 1)
        return int(block[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise ValueError(f"{path} is no tar or damaged: there is no header at byte {at:,}") from None


def _pax(path: Path | str, data: bytes, at: int) -> dict[str, str]:
    values = {}
    try:
        while data:
            length = int(data[: data.index(b" ")])
            key, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
            values[os.fsdecode(key)] = os.fsdecode(value)
            if length < 5:
                raise ValueError
            data = data[length:]
    except ValueError:
        raise ValueError(f"{path} is damaged: the extended header at byte {at:,} cannot be read") from None
    return values
