"""Byte ranges out of shards: memory-mapped, read ahead by the kernel, never copied in Python; and the choice of the reader."""

import mmap
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from data_shards.index import Split
from data_shards.plan import Ints
from data_shards.remote_reader import RemoteReader
from data_shards.tar_members import BLOCK, header_name, split_name


class TarReader:
    """Encoded images of a split by sample id. The split's tars were checked to be as long as the manifest says."""

    read_ahead_batches = 4
    """Batches whose bytes the kernel is asked for before they are needed."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._map = cache(self._open)

    def _open(self, shard: int) -> tuple[mmap.mmap, NDArray[np.uint8]]:
        with self._split.shards[shard].open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        return mapped, np.frombuffer(mapped, np.uint8)

    def read(self, samples: Ints) -> list[NDArray[np.uint8]]:
        """The encoded bytes of each sample, views of the mapped tar, in the order asked for.

        Raises:
            ValueError: the index points outside a tar.
        """
        rows = self._split.samples[samples]
        self._split.check_places(rows)
        images = []
        for shard, offset, size in zip(*(rows[name].tolist() for name in ("shard", "offset", "size")), strict=True):
            images.append(self._map(shard)[1][offset : offset + size])
        return images

    def read_ahead(self, samples: Ints) -> None:
        """Asks the kernel to bring these samples into the page cache; returns at once."""
        rows = self._split.samples[samples]
        self._split.check_places(rows)
        for shard, offset, size in zip(*(rows[name].tolist() for name in ("shard", "offset", "size")), strict=True):
            begin = offset - offset % mmap.PAGESIZE
            self._map(shard)[0].madvise(mmap.MADV_WILLNEED, begin, offset + size - begin)

    def hold(self, shards: Sequence[int]) -> None:
        """Nothing: the tars are here."""


def open_reader(split: Split) -> TarReader | RemoteReader:
    """The reader that suits where the split's tars are."""
    return TarReader(split) if split.remote is None else RemoteReader(split)


def keys_of(split: Split, samples: Ints) -> list[str]:
    """`Split.key` of many samples: each tar is opened once.

    Raises:
        ValueError: there is no USTAR header at a sample's place.
    """
    if split.remote is not None:
        return RemoteReader(split).keys(samples)
    rows = split.samples[samples]
    keys = [""] * len(samples)
    for shard in np.unique(rows["shard"]).tolist():
        with split.shards[shard].open("rb") as tar:
            for place in np.flatnonzero(rows["shard"] == shard).tolist():
                tar.seek(int(rows["offset"][place]) - BLOCK)
                name = header_name(tar.read(BLOCK))
                if name is None:
                    raise ValueError(
                        f"shard {split.shards[shard]} has no tar header where one is: run `facescale verify`"
                    )
                keys[place] = split_name(name)[0]
    return keys
