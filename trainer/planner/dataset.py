"""Shards, index and epoch of a data set, by the formulas of `data_shards`."""

import io
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.index import IDENTITY, SAMPLE, ShardSet
from data_shards.plan import Plan, PlanConfig
from data_shards.shard_plan import END
from data_shards.tar_members import BLOCK
from trainer.planner.workload import Workload, between


@dataclass(kw_only=True, frozen=True)
class Dataset:
    steps_per_epoch: int
    shards: int
    tar_bytes: int
    index_bytes: int
    """Of index.npy, which all ranks of a machine map."""
    identities_bytes: int
    exact: bool
    """Read from a manifest, not estimated."""


def sample_bytes(picture_bytes: float) -> float:
    """Of one sample in its tar: two headers, the label's block, the picture padded to whole blocks, half a block on average."""
    return 3 * BLOCK + picture_bytes + BLOCK / 2


def table_bytes(dtype: np.dtype[Any], rows: int) -> int:
    """Of an .npy file of so many rows."""
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (rows,)})
    return len(file.getvalue()) + rows * dtype.itemsize


def estimate(workload: Workload, shard_bytes: int) -> Dataset:
    """Of a set that does not exist yet: identities of equally many pictures, pictures of one size.

    Raises:
        ValueError: `shard_bytes` is not allowed.
    """
    between("--target-shard-mb", shard_bytes / 1e6, 0.01, 10**6)
    one = sample_bytes(workload.picture_bytes)
    each = max(1, int((shard_bytes - len(END)) // one))
    shards = ceil(workload.images / each)
    counts = np.full(workload.identities, workload.images // workload.identities)
    counts[: workload.images % workload.identities] += 1
    starts = np.append(0, np.cumsum(counts))
    return Dataset(
        steps_per_epoch=_steps(starts, workload),
        shards=shards,
        tar_bytes=round(workload.images * one) + shards * len(END),
        index_bytes=table_bytes(SAMPLE, workload.images),
        identities_bytes=table_bytes(IDENTITY, workload.identities),
        exact=False,
    )


@dataclass(kw_only=True, frozen=True)
class Found:
    """What a manifest says of its training split."""

    images: int
    identities: int
    picture_width: int
    picture_height: int
    picture_bytes: float
    starts: np.ndarray
    shards: int
    tar_bytes: int
    index_bytes: int
    identities_bytes: int

    def dataset(self, workload: Workload) -> Dataset:
        return Dataset(
            steps_per_epoch=_steps(self.starts, workload),
            shards=self.shards,
            tar_bytes=self.tar_bytes,
            index_bytes=self.index_bytes,
            identities_bytes=self.identities_bytes,
            exact=True,
        )


def read_shards(folder: Path) -> Found:
    """Means over all pictures of the training split, or over 2^20 of them, evenly spaced.

    Raises:
        ValueError: the folder is no shard set, or has no training split.
    """
    shards = ShardSet.open(folder)
    split = shards.split("train")
    rows = split.samples[:: -(-len(split) // 2**20)]
    entries = shards.manifest["splits"].values()
    return Found(
        images=len(split),
        identities=len(split.identities),
        picture_width=max(1, round(float(rows["width"].mean()))),
        picture_height=max(1, round(float(rows["height"].mean()))),
        picture_bytes=float(rows["size"].mean()),
        starts=split.starts,
        shards=sum(len(entry["shards"]) for entry in entries),
        tar_bytes=sum(shard["bytes"] for entry in entries for shard in entry["shards"]),
        index_bytes=table_bytes(SAMPLE, sum(entry["samples"] for entry in entries)),
        identities_bytes=table_bytes(IDENTITY, sum(entry["identities"] for entry in entries)),
    )


def _steps(starts: np.ndarray, workload: Workload) -> int:
    """T of `data_shards.plan`, whose rule counts top-ups."""
    counts = np.diff(starts)
    if (enough := int((counts >= 2).sum())) < workload.p:
        raise ValueError(f"--p is {workload.p}; the shards have {enough} training identities with at least 2 images")
    return Plan(starts, PlanConfig(identities_per_batch=workload.p, images_per_identity=workload.k)).steps_per_epoch
