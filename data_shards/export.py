"""The pictures of a shard set as folders again, byte by byte."""

import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_shards.index import ShardSet, Split
from data_shards.progress import progress
from data_shards.tar_members import BLOCK, header_name, split_name


def export(directory: Path | str, out: Path | str, splits: Sequence[str] | None = None) -> int:
    """Writes OUT/split/identity/image.jpg for every sample and returns how many.

    The identity's folder is called as in the manifest, or like the first part of the key where that name cannot be a folder's.
    Each picture is compared with the index's CRC-32. Works aside and renames at the end.

    Raises:
        ValueError: OUT exists and is not empty, there is no such split, or a picture differs from what was written.
        OSError: the disk is full or fails.
    """
    shard_set, out = ShardSet.open(directory), Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"output {out} exists and is not empty: nothing was touched, give a new folder")
    chosen = [shard_set.split(name) for name in splits or shard_set.splits]
    partial = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.mkdir(mode=0o700, parents=True)
        with progress("export", total=sum(map(len, chosen))) as advance:
            for split in chosen:
                for count, size in _export_split(split, shard_set.identity_names, partial / split.name):
                    advance(count, size)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sum(map(len, chosen))


def _export_split(split: Split, names: list[str], folder: Path) -> Iterator[tuple[int, int]]:
    """Shard after shard; yields (pictures, bytes) of each."""
    order = np.lexsort((split.samples["offset"], split.samples["shard"]))
    bounds = np.searchsorted(split.samples["shard"][order], np.arange(len(split.shards) + 1))
    for number, path in enumerate(split.shards):
        rows = split.samples[order[bounds[number] : bounds[number + 1]]]
        split.check_places(rows)
        with path.open("rb") as tar:
            for row in rows:
                tar.seek(int(row["offset"]) - BLOCK)
                name = header_name(tar.read(BLOCK))
                data = tar.read(int(row["size"]))
                if name is None or zlib.crc32(data) != row["crc32"]:
                    raise ValueError(
                        f"shard {path}: a picture at byte {row['offset']:,} is damaged: run `facescale verify`"
                    )
                key, extension = split_name(name)
                _write(
                    folder / _folder(names, int(row["identity"]), key), f"{key.rpartition('/')[2]}.{extension}", data
                )
        yield len(rows), int(rows["size"].sum())


def _folder(names: list[str], identity: int, key: str) -> str:
    name = names[identity] if identity < len(names) else ""
    usable = name not in ("", ".", "..") and not set(name) & {"/", "\0"} and len(os.fsencode(name)) < 256
    return name if usable else key.partition("/")[0]


def _write(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / name, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(data)
