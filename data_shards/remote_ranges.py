"""Pictures of a split that lies elsewhere, by place: from the cache where it has them, else fetched, checked and kept."""

import warnings
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from data_shards.index import Split
from data_shards.plan import Ints
from data_shards.remote_cache import TarCache
from data_shards.remote_set import CHUNK
from data_shards.tar_members import BLOCK

Record = NDArray[np.uint8]
"""A picture's tar header and, from byte `BLOCK` on, its encoded bytes."""


class Place(NamedTuple):
    """Where a picture's record lies in its tar, and how the picture is recognised."""

    start: int
    stop: int
    crc32: int
    sample: int


class Ranges:
    """Records of a split's samples.

    Args:
        split: whose `remote` is given.
    """

    def __init__(self, split: Split) -> None:
        assert split.remote is not None
        self.split, self.remote = split, split.remote
        self.requests = 0
        """Ranges fetched so far."""
        self.fetched = 0
        """Bytes of them."""
        self.hits = 0
        """Pictures that the cache had."""
        self._lock = Lock()
        self._keeps = self.cache.limit > 0

    @property
    def cache(self) -> TarCache:
        return self.remote.cache

    def places(self, samples: Ints) -> dict[int, list[Place]]:
        """Of different samples, by shard, in the order of each tar.

        Raises:
            ValueError: the index points outside a tar.
        """
        rows = self.split.samples[samples]
        self.split.check_places(rows)
        order = np.lexsort((rows["offset"], rows["shard"]))
        found: dict[int, list[Place]] = {}
        columns = (rows[name][order].tolist() for name in ("shard", "offset", "size", "crc32"))
        for shard, offset, size, checksum, sample in zip(*columns, samples[order].tolist(), strict=True):
            found.setdefault(shard, []).append(Place(offset - BLOCK, offset + size, checksum, sample))
        return found

    def file(self, shard: int) -> str:
        """Name of a tar below the set's location."""
        return f"{self.split.name}/{self.split.shards[shard].name}"

    def copy(self, shard: int) -> str:
        """Name of a tar's copy in the cache."""
        return f"{self.remote.name}/{self.file(shard)}"

    def cached(self, shard: int, places: Sequence[Place]) -> dict[int, Record]:
        """Those that the cache has whole, by sample."""
        if not self._keeps:
            return {}
        spans = [(place.start, place.stop) for place in places]
        found = {
            place.sample: np.frombuffer(data, np.uint8)
            for place, data in zip(places, self.cache.read(self.copy(shard), spans), strict=True)
            if _is(place, memoryview(data))
        }
        if found:
            self.cache.touch(self.copy(shard))
            with self._lock:
                self.hits += len(found)
        return found

    def fetch(self, shard: int, run: Sequence[Place]) -> tuple[dict[int, Record], bool]:
        """One range from the first place to the last, by sample; and whether the cache has kept it.

        Raises:
            ValueError: it could not be fetched, or what came is not what was converted.
        """
        start, stop = run[0].start, run[-1].stop

        def flaw(data: bytes) -> str | None:
            view = memoryview(data)
            wrong = sum(not _is(place, view[place.start - start : place.stop - start]) for place in run)
            return f"{wrong} of {len(run)} pictures differ from the index (CRC-32)" if wrong else None

        data = self.remote.fetcher.read(self.file(shard), start, stop, flaw)
        with self._lock:
            self.requests += 1
            self.fetched += len(data)
        kept = self._keep(shard, start, data)
        whole = np.frombuffer(data, np.uint8)
        return {place.sample: whole[place.start - start : place.stop - start] for place in run}, kept

    def _keep(self, shard: int, start: int, data: bytes) -> bool:
        if not self._keeps:
            return False
        try:
            return self.cache.write(self.copy(shard), start, data)
        except OSError as error:
            self._keeps = False
            warnings.warn(f"data.stream.cache_dir is not used any more: {error}", RuntimeWarning, stacklevel=2)
            return False


def runs(places: Sequence[Place], gap: int, most: int = CHUNK) -> Iterator[list[Place]]:
    """Neighbours, in their order, that are at most `gap` bytes apart and at most `most` bytes long together (or alone)."""
    run: list[Place] = []
    for place in places:
        if run and (place.start - run[-1].stop > gap or place.stop - run[0].start > most):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _is(place: Place, data: memoryview) -> bool:
    return len(data) == place.stop - place.start and crc32(data[BLOCK:]) == place.crc32
