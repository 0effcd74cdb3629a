"""Compares a shard set on disk with its manifest and index, sample by sample."""

import hashlib
import os
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.index import BLOCK, INDEX, SAMPLE, ShardSet, map_index, split_name
from data_shards.pictures import inspect_image, quiet_pillow
from data_shards.progress import progress

CHUNK = 2**20
NAMED = 100
"""Damaged samples of one shard that are named one by one."""


class _Shard(NamedTuple):
    """A shard as it should be."""

    path: Path
    entry: dict[str, Any]
    samples: NDArray[Any]
    """Its rows of the index, in the tar's order."""


def verify(directory: Path | str, decode: bool = False) -> list[str]:
    """Every way in which a shard set differs from what the conversion wrote, one line each; empty where it is whole.

    Reads every byte, in chunks. A shard whose SHA-256 differs is searched for the damaged samples by the CRC-32 that the
    index has of each picture; they are named by key.

    Args:
        directory: a finished output of the conversion.
        decode: also decode every picture.
    Raises:
        ValueError: no manifest that can be read (see `ShardSet.open`).
    """
    shard_set = ShardSet.open(directory)
    problems = list(_foreign_folders(shard_set))
    keys: list[NDArray[np.uint64]] = []
    places: list[tuple[Path, NDArray[np.uint64]]] = []
    total = sum(entry["samples"] for entry in shard_set.manifest["splits"].values())
    with progress("verify", total=total) as advance, quiet_pillow():
        for split in shard_set.splits:
            folder, entry = shard_set.path / split, shard_set.manifest["splits"][split]
            problems += _foreign_files(folder, entry)
            samples, flaws = _checked_index(folder, entry, len(shard_set.identity_names))
            problems += flaws
            for shard in _shards(folder, entry, samples):
                hashes = np.zeros(len(shard.samples), np.uint64)
                problems += _verify_shard(shard, decode, hashes)
                keys.append(hashes)
                places.append((shard.path, shard.samples["offset"]))
                advance(shard.entry["samples"])
    return problems + _duplicates(keys, places)


def _foreign_folders(shard_set: ShardSet) -> Iterator[str]:
    for entry in sorted(os.scandir(shard_set.path), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name not in shard_set.splits and any(Path(entry.path).glob("*.tar")):
            yield f"{entry.path}: holds tars, but the manifest knows no such split"


def _foreign_files(folder: Path, entry: dict[str, Any]) -> Iterator[str]:
    names = [shard["name"] for shard in entry["shards"]]
    ours = {INDEX, *names, *(Path(name).with_suffix(".idx").name for name in names)}
    if folder.is_dir():
        yield from (f"{folder / name}: not in the manifest" for name in sorted(set(os.listdir(folder)) - ours))


def _checked_index(folder: Path, entry: dict[str, Any], identities: int) -> tuple[NDArray[Any] | None, list[str]]:
    """The split's index if it can be used at all, and what is wrong with it."""
    path = folder / INDEX
    try:
        samples = map_index(path, entry["samples"])
    except ValueError as error:
        return None, [str(error)]
    problems = []
    if _sha256(path) != entry["index_sha256"]:
        problems.append(f"{path}: differs from what was written (SHA-256)")
    if (strays := int((samples["shard"] >= len(entry["shards"])).sum())) > 0:
        problems.append(f"{path}: {strays:,} rows point to no shard")
    if (strays := int((samples["identity"] >= identities).sum())) > 0:
        problems.append(f"{path}: {strays:,} rows have an identity that the manifest does not name")
    if (found := len(np.unique(samples["identity"]))) != entry["identities"]:
        problems.append(f"{path}: {found:,} identities, the manifest says {entry['identities']:,}")
    if (samples["identity"][1:] < samples["identity"][:-1]).any():
        problems.append(f"{path}: its rows are not sorted by identity")
    return samples, problems


def _shards(folder: Path, entry: dict[str, Any], samples: NDArray[Any] | None) -> Iterator[_Shard]:
    for number, shard in enumerate(entry["shards"]):
        rows = np.empty(0, SAMPLE) if samples is None else samples[samples["shard"] == number]
        yield _Shard(folder / shard["name"], shard, rows[np.argsort(rows["offset"])])


def _verify_shard(shard: _Shard, decode: bool, hashes: NDArray[np.uint64]) -> Iterator[str]:
    """Problems of one shard; fills in 64 bits of each sample's key."""
    path, entry = shard.path, shard.entry
    index = path.with_suffix(".idx")
    if not index.is_file():
        yield f"{index}: missing"
    elif _sha256(index) != entry["idx_sha256"]:
        yield f"{index}: differs from what was written (SHA-256)"
    if not path.is_file():
        yield f"{path}: missing"
        return
    size = path.stat().st_size
    if size != entry["bytes"]:
        yield f"{path}: {size:,} bytes, the manifest says {entry['bytes']:,}"
    if len(shard.samples) and len(shard.samples) != entry["samples"]:
        yield f"{path}: {len(shard.samples):,} samples in the index, the manifest says {entry['samples']:,}"
    damaged = size != entry["bytes"] or _sha256(path) != entry["sha256"]
    if damaged and size == entry["bytes"]:
        yield f"{path}: differs from what was written (SHA-256)"
    found = 0
    for flaw in _flaws(shard, damaged, decode, size, hashes):
        found += 1
        if found <= NAMED:
            yield f"{path}: {flaw}"
    if found > NAMED:
        yield f"{path}: and {found - NAMED:,} more damaged samples"
    if damaged and size == entry["bytes"] and len(shard.samples) and not found:
        yield f"{path}: no picture is damaged, but padding or end is"


def _flaws(shard: _Shard, damaged: bool, decode: bool, size: int, hashes: NDArray[np.uint64]) -> Iterator[str]:
    """What is wrong with each sample: its place, header, label and, where asked for, its bytes and picture."""
    expected = BLOCK
    with shard.path.open("rb") as tar:
        for number, sample in enumerate(shard.samples):
            offset, length = int(sample["offset"]), int(sample["size"])
            label_at = offset + length + -length % BLOCK
            inside = BLOCK <= offset <= size
            name = _member(_read(tar, offset - BLOCK, BLOCK), length) if inside else None
            key, extension = split_name(name) if name else (f"sample at byte {offset:,}", "")
            if label_at + 2 * BLOCK > size:
                yield f"{key}: it lies behind the end of the file"
                continue
            if name:
                hashes[number] = int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) or 1
            if not name or offset != expected:
                yield f"{key}: the index does not fit the tar, or the picture's header is damaged"
            elif damaged and _crc32(tar, offset, length) != sample["crc32"]:
                yield f"{key}: the picture's bytes differ (CRC-32)"
            elif decode and (flaw := _undecodable(_read(tar, offset, length), extension, sample)):
                yield f"{key}: {flaw}"
            if name and not _label_fits(_read(tar, label_at, 2 * BLOCK), key, int(sample["identity"])):
                yield f"{key}: its label or the label's header is damaged"
            expected = label_at + 3 * BLOCK
        if len(shard.samples) and not damaged and expected - BLOCK + 2 * BLOCK != size:
            yield "holds more than the index lists"


def _label_fits(blocks: bytes, key: str, identity: int) -> bool:
    text = b"%d" % identity
    return _member(blocks[:BLOCK], len(text)) == f"{key}.cls" and blocks[BLOCK:].rstrip(b"\0") == text


def _member(block: bytes, size: int) -> str | None:
    """Name in a USTAR header block if its checksum holds and it is that of a file of `size` bytes."""
    if len(block) != BLOCK or block[257:263] != b"ustar\0":
        return None
    try:
        checksum, found = int(block[148:156].strip(b"\0 "), 8), int(block[124:136].strip(b"\0 "), 8)
    except ValueError:
        return None
    whole = sum(block) - sum(block[148:156]) + 8 * ord(" ") == checksum
    return block[:100].rstrip(b"\0").decode("ascii", "replace") if whole and found == size else None


def _undecodable(data: bytes, extension: str, sample: Any) -> str | None:
    try:
        width, height = inspect_image(data, extension, max_pixels=int(sample["width"]) * int(sample["height"]))
    except ValueError as error:
        return str(error)
    if (width, height) != (sample["width"], sample["height"]):
        return f"is {width} x {height} pixels, the index says {sample['width']} x {sample['height']}"
    return None


def _duplicates(keys: list[NDArray[np.uint64]], places: list[tuple[Path, NDArray[np.uint64]]]) -> list[str]:
    """Names each key that a later sample has again; a hash of 0 is a key that could not be read."""
    if not keys:
        return []
    every = np.concatenate(keys)
    values, counts = np.unique(every[every > 0], return_counts=True)
    repeated = np.isin(every, values[counts > 1])
    starts = np.cumsum([0, *(len(hashes) for hashes in keys)])
    problems, seen = [], set()
    for position in np.flatnonzero(repeated):
        number = int(np.searchsorted(starts, position, side="right")) - 1
        path, offsets = places[number]
        with path.open("rb") as tar:
            block = _read(tar, int(offsets[position - starts[number]]) - BLOCK, BLOCK)
        key = split_name(block[:100].rstrip(b"\0").decode("ascii", "replace"))[0]
        if key in seen:
            problems.append(f"{path}: {key}: the key occurs before")
        seen.add(key)
    return problems


def _read(tar: IO[bytes], offset: int, length: int) -> bytes:
    tar.seek(offset)
    return tar.read(length)


def _crc32(tar: IO[bytes], offset: int, length: int) -> int:
    tar.seek(offset)
    crc = 0
    while length > 0 and (chunk := tar.read(min(CHUNK, length))):
        crc = zlib.crc32(chunk, crc)
        length -= len(chunk)
    return crc


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
