"""One shard: its pictures are read, decoded once and written. Runs in the conversion's worker processes."""

import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.index import BLOCK, SAMPLE, HashedFile, Member, committed, write_dali_index
from data_shards.pictures import inspect_image, quiet_pillow
from data_shards.shard_plan import END, ShardPlan

MAX_IMAGE_BYTES = 2**30
"""A larger file is no picture of a face, and a worker reads a picture as a whole."""


class Failure(NamedTuple):
    """A picture left out of the shards."""

    path: str
    """Relative to the source."""
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
    samples: NDArray[Any]
    failures: list[Failure]


def write_shard(source: Path, directory: Path, plan: ShardPlan, max_pixels: int) -> Shard:
    """Writes one tar and its DALI index into `directory`/split; neither where no picture survives."""
    path = directory / plan.split / plan.name
    rows, samples, entries, failures = [], [], [], []
    with quiet_pillow(), committed(path) as tar:
        for picture, label, row in zip(plan.pictures, plan.labels, plan.rows, strict=True):
            try:
                if picture.size > MAX_IMAGE_BYTES:
                    raise ValueError(f"is {picture.size:,} bytes: allowed are {MAX_IMAGE_BYTES:,}")
                data = (source / picture.path).read_bytes()
                width, height = inspect_image(data, picture.extension, max_pixels)
            except (ValueError, OSError) as error:
                failures.append(Failure(picture.path, reason_of(error)))
                continue
            image = _append(tar, picture.key, picture.extension, data)
            entries.append((image, _append(tar, picture.key, "cls", b"%d" % label)))
            samples.append((image.offset, image.size, 0, label, zlib.crc32(data), width, height))
            rows.append(row)
        tar.write(END)
    idx_sha256 = write_dali_index(path.with_suffix(".idx"), entries) if entries else ""
    if not entries:
        path.unlink()
    return Shard(
        split=plan.split,
        name=plan.name,
        extension=plan.pictures[0].extension,
        bytes=tar.length,
        sha256=tar.sha256,
        idx_sha256=idx_sha256,
        rows=np.array(rows, np.int64),
        samples=np.array(samples, SAMPLE),
        failures=failures,
    )


def _append(tar: HashedFile, key: str, extension: str, data: bytes) -> Member:
    info = tarfile.TarInfo(f"{key}.{extension}")  # mode 0644, no owner, time 0
    info.size = len(data)
    tar.write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
    offset = tar.length
    tar.write(data)
    tar.write(bytes(-len(data) % BLOCK))
    return Member(extension, offset, len(data), info.name)


def reason_of(error: ValueError | OSError) -> str:
    """Why a picture is left out, in words that do not depend on the machine."""
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
