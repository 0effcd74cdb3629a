"""The sorted listing of a source on disk: every picture's place and key, memory-mapped by the plan and by all workers."""

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.sources.base import EXTENSIONS, Found, Place

MAX_NAME = 99
"""Longest member name in characters: more does not fit the USTAR header that every reader understands."""
MAX_KEY = MAX_NAME - len(".webp")
EXTENSION_CODES = tuple(sorted(set(EXTENSIONS.values())))
BATCH_ROWS = 8_192

ROW = np.dtype(
    [
        ("name_at", "<u8"),  # of the picture's name in names.bin; its key follows
        ("offset", "<u8"),  # in its part of the source
        ("stamp", "<i8"),
        ("draw", "<u8"),  # 64 bits that depend on the key alone: the shuffles are made from them
        ("size", "<u4"),  # encoded bytes
        ("identity", "<u4"),  # position in the listing's names
        ("part", "<u4"),
        ("name_size", "<u2"),
        ("key_size", "u1"),
        ("extension", "u1"),  # position in EXTENSION_CODES
    ]
)
_ROWS, _NAMES, _IDENTITIES = "rows.npy", "names.bin", "identities.json"
_FORBIDDEN = re.compile(r"[^A-Za-z0-9_-]")
_LONGEST_PREFIX = (MAX_KEY - 1) // 2
_SPOOL = np.dtype(
    [
        ("text_at", "<u8"),
        ("offset", "<u8"),
        ("stamp", "<i8"),
        ("size", "<u4"),
        ("identity", "<u4"),
        ("part", "<u4"),
        ("name_size", "<u2"),
        ("stem_size", "<u2"),
        ("extension", "u1"),
    ]
)
_MAX_SIZE = 2**32 - 1


class Refused(NamedTuple):
    """A picture that is left out without being read."""

    path: str
    reason: str


class Listing:
    """A source's pictures, sorted by identity (bytes of the name), then key.

    Attributes:
        rows: read-only memory map of `ROW`, shape (n,).
        identities: name of each identity; `rows["identity"]` points into it.
    """

    def __init__(self, folder: Path) -> None:
        self.rows: NDArray[Any] = _mapped(folder / _ROWS)
        self.identities: list[str] = json.loads((folder / _IDENTITIES).read_text())
        self._names = _mapped_text(folder / _NAMES)

    def __len__(self) -> int:
        return len(self.rows)

    def entries(self, rows: NDArray[Any]) -> Iterator[tuple[Place, str, str]]:
        """(place, key, extension) of these rows of `self.rows`."""
        fields = ("name_at", "name_size", "key_size", "part", "offset", "size", "extension")
        for start in range(0, len(rows), BATCH_ROWS):
            columns = [rows[name][start : start + BATCH_ROWS].tolist() for name in fields]
            for at, name_size, key_size, part, offset, size, extension in zip(*columns, strict=True):
                text = self._names[at : at + name_size + key_size]
                place = Place(os.fsdecode(text[:name_size]), part, offset, size)
                yield place, text[name_size:].decode("ascii"), EXTENSION_CODES[extension]

    def name(self, row: int) -> str:
        return next(self.entries(self.rows[row : row + 1]))[0].name

    def fingerprint(self) -> str:
        """SHA-256 over what identifies the pictures: names, keys, sizes and stamps."""
        digest = hashlib.sha256(b"\0".join(os.fsencode(name) for name in self.identities))
        for start in range(0, len(self.rows), BATCH_ROWS):
            chunk = self.rows[start : start + BATCH_ROWS]
            for field in ("identity", "size", "stamp", "extension", "part"):
                digest.update(chunk[field].tobytes())
        for start in range(0, len(self._names), 2**24):
            digest.update(self._names[start : start + 2**24])
        return digest.hexdigest()


def write_listing(folder: Path, pictures: Iterable[Found], pseudonyms: bool = False) -> list[Refused]:
    """Sorts what a source yields and writes it into `folder`; returns what is left out unread, sorted by name.

    Memory is some 16 bytes a picture while it sorts; the rest goes through files.

    Args:
        pseudonyms: the keys hold no names: pictures get numbers, and identities are ordered by a draw from
            their names and called `p0000000`, ….
    """
    spool = _Spool(folder)
    refused = []
    for found in pictures:
        if found.refused:
            refused.append(Refused(found.name, found.refused))
        else:
            spool.add(found)
    identities = spool.close()
    names = sorted(identities, key=os.fsencode)
    if pseudonyms:  # the order of the alphabet would tell something about the names
        names.sort(key=lambda name: name_draw(f"pseudonym {name}"))
    rank = np.empty(len(names), np.uint32)
    rank[[identities[name] for name in names]] = np.arange(len(names), dtype=np.uint32)
    prefixes = [pseudonym(row) for row in range(len(names))] if pseudonyms else unique_prefixes(names)
    _write_sorted(folder, spool, rank, prefixes, pseudonyms)
    (folder / _IDENTITIES).write_text(json.dumps(names))
    spool.remove()
    return sorted(refused, key=lambda picture: os.fsencode(picture.path))


def unique_prefixes(identities: Sequence[str]) -> list[str]:
    """First part of the key, `[A-Za-z0-9_-]`, for each identity name, all different; see `unique_stems`."""
    return _unique([_shortened(name, _LONGEST_PREFIX) for name in identities], _LONGEST_PREFIX)


def unique_stems(stems: Sequence[str], longest: int) -> list[str]:
    """Second part of the key, `[A-Za-z0-9_-]`, for each file stem of one identity, all different.

    Other characters become `_`; a name longer than `longest` ends in a hash of what was cut off. Of names that come out
    the same the first keeps it and the others get `_2`, `_3`, … whichever no other picture has.
    """
    return _unique([_shortened(stem, longest) for stem in stems], longest)


def _unique(wanted: list[str], longest: int) -> list[str]:
    taken = set(wanted)
    if len(taken) == len(wanted):
        return wanted
    seen: set[str] = set()
    numbers: dict[str, int] = {}
    for row, key in enumerate(wanted):
        if key in seen:
            number = numbers.get(key, 1) + 1
            while (candidate := f"{key[: longest - len(str(number)) - 1]}_{number}") in taken:
                number += 1
            numbers[key] = number
            taken.add(candidate)
            wanted[row] = candidate
        seen.add(key)
    return wanted


def _shortened(name: str, longest: int) -> str:
    clean = _FORBIDDEN.sub("_", name) or "_"
    if len(clean) <= longest:
        return clean
    digest = blake2b(os.fsencode(name), digest_size=5).hexdigest()
    return f"{clean[: longest - len(digest) - 1]}-{digest}"


def name_draw(name: str) -> int:
    """64 random bits that depend on these characters alone: the same on every machine, whatever else is listed."""
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest(), "little")


def pseudonym(row: int) -> str:
    """What identity `row` of a listing is called instead of its name."""
    return f"p{row:07d}"


class _Spool:
    """What a source yields, in its own order, in two files."""

    def __init__(self, folder: Path) -> None:
        self.paths = folder / "spool.rows", folder / "spool.text"
        self._files = self.paths[0].open("wb"), self.paths[1].open("wb")
        self._identities: dict[str, int] = {}
        self._rows: list[tuple[int, ...]] = []
        self._texts: list[bytes] = []
        self._written = 0

    def add(self, found: Found) -> None:
        number = self._identities.setdefault(found.identity, len(self._identities))
        code = EXTENSION_CODES.index(found.extension)
        name, stem = os.fsencode(found.name), os.fsencode(found.stem)
        size = found.size if found.size < _MAX_SIZE else _MAX_SIZE
        row = (self._written, found.offset, found.stamp, size, number, found.part, len(name), len(stem), code)
        self._rows.append(row)
        self._texts.append(name + stem)
        self._written += len(name) + len(stem)
        if len(self._rows) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._files[0].write(np.array(self._rows, _SPOOL).tobytes())
        self._files[1].write(b"".join(self._texts))
        self._rows, self._texts = [], []

    def close(self) -> dict[str, int]:
        self._flush()
        for file in self._files:
            file.close()
        return self._identities

    def remove(self) -> None:
        for path in self.paths:
            path.unlink()


def _write_sorted(folder: Path, spool: _Spool, rank: NDArray[np.uint32], prefixes: list[str], numbered: bool) -> None:
    """Sorts the spooled rows by (rank of the identity, key) and writes them with their keys."""
    rows = _mapped_or_empty(spool.paths[0], _SPOOL)
    text = _mapped_text(spool.paths[1])
    ranks = rank[rows["identity"]] if len(rows) else np.zeros(0, np.uint32)
    order = np.argsort(ranks, kind="stable")
    bounds = np.append(np.searchsorted(ranks[order], np.arange(len(rank))), len(rows))
    written = 0
    header = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": rows.shape}
    with (folder / _ROWS).open("wb") as out, (folder / _NAMES).open("wb") as names:
        np.lib.format.write_array_header_1_0(out, header)
        for first, last in _batches(bounds):
            picked, texts, sizes, draws = [], [], [], []
            for number in range(first, last):
                members = rows[order[bounds[number] : bounds[number + 1]]]
                for position, name, key in _keyed(members, text, prefixes[number], numbered):
                    picked.append(int(bounds[number]) + position)
                    texts.append(name + key)
                    sizes.append((len(name), len(key)))
                    draws.append(blake2b(key, digest_size=8).digest())
            chunk = np.empty(len(picked), ROW)
            old = rows[order[picked]]
            for field in ("offset", "stamp", "size", "part", "extension"):
                chunk[field] = old[field]
            chunk["identity"] = ranks[order[picked]]
            chunk["draw"] = np.frombuffer(b"".join(draws), "<u8")
            lengths = np.array(sizes, np.uint64).reshape(-1, 2)
            chunk["name_size"], chunk["key_size"] = lengths.T
            ends = written + np.cumsum(lengths.sum(axis=1))
            chunk["name_at"] = ends - lengths.sum(axis=1)
            written = int(ends[-1]) if len(ends) else written
            out.write(chunk.tobytes())
            names.write(b"".join(texts))


def _keyed(
    members: NDArray[Any], text: bytes | mmap.mmap, prefix: str, numbered: bool
) -> list[tuple[int, bytes, bytes]]:
    """(position, name, key) of one identity's pictures, sorted by key."""
    found = []
    columns = [members[field].tolist() for field in ("text_at", "name_size", "stem_size")]
    for position, (at, name_size, stem_size) in enumerate(zip(*columns, strict=True)):
        both = text[at : at + name_size + stem_size]
        found.append((both[:name_size], both[name_size:], position))
    found.sort()
    if numbered:
        stems = [f"{number:07d}" for number in range(len(found))]
    else:
        stems = unique_stems([os.fsdecode(stem) for _, stem, _ in found], MAX_KEY - 1 - len(prefix))
    start = prefix + "/"
    keyed = [(position, name, (start + stem).encode()) for (name, _, position), stem in zip(found, stems, strict=True)]
    return sorted(keyed, key=lambda picture: picture[2])


def _batches(bounds: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of identities that hold some `BATCH_ROWS` pictures together."""
    first, count = 0, len(bounds) - 1
    while first < count:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + BATCH_ROWS, side="right")) - 1)
        yield first, min(last, count)
        first = min(last, count)


def _mapped(path: Path) -> NDArray[Any]:
    rows: NDArray[Any] = np.load(
        path, mmap_mode="r" if path.stat().st_size > mmap.PAGESIZE else None, allow_pickle=False
    )
    assert rows.dtype == ROW, rows.dtype
    return rows.view(np.ndarray)


def _mapped_text(path: Path) -> bytes | mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _mapped_or_empty(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)


def difference(old: Listing, new: Listing) -> str:
    """The first picture in which two listings differ, in words; empty where there is none."""
    for (before, _, _), (after, _, _) in zip(old.entries(old.rows), new.entries(new.rows), strict=False):
        if before.name != after.name:
            gone = os.fsencode(before.name) < os.fsencode(after.name)
            return f"{before.name} is gone" if gone else f"{after.name} is new"
        if before.size != after.size:
            return f"{after.name} has {after.size:,} bytes, before {before.size:,}"
    if len(old) != len(new):
        longer, shorter = (old, new) if len(old) > len(new) else (new, old)
        return f"{longer.name(len(shorter))} is {'gone' if longer is old else 'new'}"
    stamps = np.flatnonzero(old.rows["stamp"] != new.rows["stamp"])
    return f"{new.name(int(stamps[0]))} was modified" if len(stamps) else ""
