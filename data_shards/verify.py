"""Compares a shard set on disk with its manifest and index, sample by sample."""

import hashlib
import multiprocessing
import os
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.index import INDEX, MANIFEST, SAMPLE, WIDS, ShardSet, map_table
from data_shards.progress import progress
from data_shards.tar_members import BLOCK, split_name

CHUNK = 2**20
WORTH_WORKERS = 2**26
"""Bytes of a set from which on starting processes pays."""
NAMED = 100
"""Damaged samples of one shard that are named one by one."""


class _Shard(NamedTuple):
    """A shard as it should be."""

    path: Path
    entry: dict[str, Any]
    samples: NDArray[Any] | None
    """Its rows of the index, in the tar's order; None where the index cannot be used."""
    decode: bool


class _Checked(NamedTuple):
    """What has been found out about a shard."""

    path: Path
    problems: list[str]
    samples: int
    keys: NDArray[np.uint64]
    """64 bits of each sample's key, 0 where it cannot be read."""
    offsets: NDArray[np.uint64]


def verify(directory: Path | str, decode: bool = False, workers: int | None = None) -> list[str]:
    """Every way in which a shard set differs from what the conversion wrote, one line each; empty where it is whole.

    Reads every byte, in chunks. A shard whose SHA-256 differs is searched for the damaged samples by the CRC-32 that the
    index has of each picture; they are named by key. Memory: 16 bytes a sample for the search for duplicate keys.

    Args:
        directory: a finished output of the conversion.
        decode: also decode every picture with DALI.
        workers: processes; None: as many as this process may use cores, one for a small set.
    Raises:
        ValueError: no manifest that can be read (see `ShardSet.open`).
    """
    if Path(directory, ".work").is_dir() and not Path(directory, MANIFEST).exists():
        raise ValueError(f"{directory} is an unfinished conversion: the same `facescale shard` command goes on with it")
    shard_set = ShardSet.open(directory)
    problems = list(_foreign_folders(shard_set)) + list(_other_files(shard_set))
    index, flaws = _checked_index(shard_set)
    problems += flaws
    shards: list[_Shard] = []
    for split, entry in shard_set.manifest["splits"].items():
        problems += _foreign_files(shard_set.path / split, entry)
        shards += _shards(shard_set.path / split, entry, index, decode)
    checked = []
    total = sum(shard.entry["samples"] for shard in shards)
    with progress("verify", total=total) as advance:
        large = sum(shard.entry["bytes"] for shard in shards) >= WORTH_WORKERS
        for found in _run(shards, workers or (len(os.sched_getaffinity(0)) if large else 1)):
            problems += found.problems
            checked.append(found)
            advance(found.samples)
    return problems + _duplicates(checked)


def _run(shards: list[_Shard], workers: int) -> Iterator[_Checked]:
    """Checks the shards, in their order, by so many processes (by this one where that is 1)."""
    if min(workers, len(shards)) <= 1:
        yield from map(_verify_shard, shards)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's and DALI's threads
    with context.Pool(min(workers, len(shards))) as pool:
        yield from pool.imap(_verify_shard, shards)


def _foreign_folders(shard_set: ShardSet) -> Iterator[str]:
    for entry in sorted(os.scandir(shard_set.path), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name not in shard_set.splits and any(Path(entry.path).glob("*.tar")):
            yield f"{entry.path}: holds tars, but the manifest knows no such split"


def _other_files(shard_set: ShardSet) -> Iterator[str]:
    """Files beside the shards that are missing or changed."""
    for name, sha256 in shard_set.manifest["files"].items():
        path = shard_set.path / name
        if not path.is_file():
            yield f"{path}: missing"
        elif _sha256(path) != sha256:
            yield f"{path}: differs from what was written (SHA-256)"


def _foreign_files(folder: Path, entry: dict[str, Any]) -> Iterator[str]:
    names = [shard["name"] for shard in entry["shards"]]
    ours = {WIDS, *names, *(Path(name).with_suffix(".idx").name for name in names)}
    if folder.is_dir():
        yield from (f"{folder / name}: not in the manifest" for name in sorted(set(os.listdir(folder)) - ours))


def _checked_index(shard_set: ShardSet) -> tuple[NDArray[Any] | None, list[str]]:
    """The index if it can be used at all, and where it does not fit the manifest."""
    path, manifest = shard_set.path / INDEX, shard_set.manifest
    try:
        index = map_table(path, SAMPLE, sum(entry["samples"] for entry in manifest["splits"].values()))
    except ValueError as error:
        return None, [str(error)]
    problems = []
    names = len(shard_set.identity_names)
    for split, entry in manifest["splits"].items():
        samples = index[entry["start"] : entry["start"] + entry["samples"]]
        where = f"{path}, {split}"
        if hashlib.sha256(samples.tobytes()).hexdigest() != entry["index_sha256"]:
            problems.append(f"{where}: differs from what was written (SHA-256)")
        if (strays := int((samples["shard"] >= len(entry["shards"])).sum())) > 0:
            problems.append(f"{where}: {strays:,} rows point to no shard")
        if (strays := int((samples["identity"] >= names).sum())) > 0:
            problems.append(f"{where}: {strays:,} rows have an identity that the manifest does not name")
        if (found := len(np.unique(samples["identity"]))) != entry["identities"]:
            problems.append(f"{where}: {found:,} identities, the manifest says {entry['identities']:,}")
        if (samples["identity"][1:] < samples["identity"][:-1]).any():
            problems.append(f"{where}: its rows are not sorted by identity")
        try:
            shard_set.check_identities(split, samples)
        except ValueError as error:
            problems += [str(error)] * (str(error) not in problems)
    counts = np.bincount(np.minimum(index["identity"], names), minlength=names)[:names]
    for name, found, listed in zip_longest(shard_set.identity_names, counts.tolist(), manifest["images"]):
        if found != listed:
            problems.append(f"{path}: {found} images of {name!r}, the manifest says {listed}")
            break
    return index, problems


def _shards(folder: Path, entry: dict[str, Any], index: NDArray[Any] | None, decode: bool) -> Iterator[_Shard]:
    if index is None:
        yield from (_Shard(folder / shard["name"], shard, None, decode) for shard in entry["shards"])
        return
    samples = index[entry["start"] : entry["start"] + entry["samples"]]
    order = np.argsort(samples["shard"], kind="stable")
    bounds = np.searchsorted(samples["shard"][order], np.arange(len(entry["shards"]) + 1))
    for number, shard in enumerate(entry["shards"]):
        rows = samples[order[bounds[number] : bounds[number + 1]]]
        yield _Shard(folder / shard["name"], shard, rows[np.argsort(rows["offset"], kind="stable")], decode)


def _verify_shard(shard: _Shard) -> _Checked:
    samples = np.empty(0, SAMPLE) if shard.samples is None else shard.samples
    keys = np.zeros(len(samples), np.uint64)
    problems = list(_problems(shard._replace(samples=samples), shard.samples is not None, keys))
    return _Checked(shard.path, problems, shard.entry["samples"], keys, samples["offset"])


def _problems(shard: _Shard, indexed: bool, keys: NDArray[np.uint64]) -> Iterator[str]:
    """Problems of one shard; fills in 64 bits of each sample's key."""
    path, entry, samples = shard.path, shard.entry, shard.samples
    assert samples is not None
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
    if indexed and len(samples) != entry["samples"]:
        yield f"{path}: {len(samples):,} samples in the index, the manifest says {entry['samples']:,}"
    damaged = size != entry["bytes"] or _sha256(path) != entry["sha256"]
    if damaged and size == entry["bytes"]:
        yield f"{path}: differs from what was written (SHA-256)"
    found = 0
    flaws = chain(_flaws(shard, damaged, size, keys), _decoding_flaws(shard, size) if shard.decode else ())
    for flaw in flaws:
        found += 1
        if found <= NAMED:
            yield f"{path}: {flaw}"
    if found > NAMED:
        yield f"{path}: and {found - NAMED:,} more damaged samples"
    if damaged and size == entry["bytes"] and len(samples) and not found:
        yield f"{path}: no picture is damaged, but padding or end is"


def _flaws(shard: _Shard, damaged: bool, size: int, keys: NDArray[np.uint64]) -> Iterator[str]:
    """What is wrong with each sample: its place, header, label and, where asked for, its bytes."""
    samples = shard.samples
    assert samples is not None
    expected = BLOCK
    with shard.path.open("rb") as tar:
        for number, sample in enumerate(samples):
            offset, length = int(sample["offset"]), int(sample["size"])
            label_at = offset + length + -length % BLOCK
            inside = BLOCK <= offset <= size
            name = _member(_read(tar, offset - BLOCK, BLOCK), length) if inside else None
            key = split_name(name)[0] if name else f"sample at byte {offset:,}"
            if label_at + 2 * BLOCK > size:
                yield f"{key}: it lies behind the end of the file"
                continue
            if name:
                keys[number] = int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) or 1
            if not name or offset != expected:
                yield f"{key}: the index does not fit the tar, or the picture's header is damaged"
            elif damaged and _crc32(tar, offset, length) != sample["crc32"]:
                yield f"{key}: the picture's bytes differ (CRC-32)"
            if name and not _label_fits(_read(tar, label_at, 2 * BLOCK), key, int(sample["identity"])):
                yield f"{key}: its label or the label's header is damaged"
            expected = label_at + 3 * BLOCK
        if len(samples) and not damaged and expected - BLOCK + 2 * BLOCK != size:
            yield "holds more than the index lists"


def _decoding_flaws(shard: _Shard, size: int) -> Iterator[str]:
    """Which pictures DALI does not decode, or not to the size that the index has, among those that lie in the file."""
    from data_shards.decode import SizeProbe

    assert shard.samples is not None
    probe = SizeProbe()
    ends = shard.samples["offset"] + shard.samples["size"]
    samples = shard.samples[(shard.samples["offset"] >= BLOCK) & (ends <= size) & (shard.samples["size"] <= size)]
    with shard.path.open("rb") as tar:
        for start in range(0, len(samples), probe.batch_size):
            batch = samples[start : start + probe.batch_size]
            encoded = [np.frombuffer(_read(tar, int(s["offset"]), int(s["size"])), np.uint8) for s in batch]
            for sample, data, found in zip(batch, encoded, probe.sizes(encoded), strict=True):
                listed = (int(sample["width"]), int(sample["height"]))
                if found == listed:
                    continue
                name = _member(_read(tar, int(sample["offset"]) - BLOCK, BLOCK), len(data))
                key = split_name(name)[0] if name else f"sample at byte {sample['offset']:,}"
                if found is None:
                    yield f"{key}: does not decode with DALI"
                else:
                    yield f"{key}: is {found[0]} x {found[1]} pixels, the index says {listed[0]} x {listed[1]}"


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


def _duplicates(checked: list[_Checked]) -> list[str]:
    """Names each key that a later sample has again."""
    if not checked:
        return []
    every = np.concatenate([shard.keys for shard in checked])
    values, counts = np.unique(every[every > 0], return_counts=True)
    repeated = np.flatnonzero(np.isin(every, values[counts > 1]))
    starts = np.cumsum([0, *(len(shard.keys) for shard in checked)])
    problems, seen = [], set()
    for position in repeated:
        number = int(np.searchsorted(starts, position, side="right")) - 1
        shard = checked[number]
        with shard.path.open("rb") as tar:
            block = _read(tar, int(shard.offsets[position - starts[number]]) - BLOCK, BLOCK)
        key = split_name(block[:100].rstrip(b"\0").decode("ascii", "replace"))[0]
        if key in seen:
            problems.append(f"{shard.path}: {key}: the key occurs before")
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
