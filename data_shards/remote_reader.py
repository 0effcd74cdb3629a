"""The reader of a split that lies elsewhere: fetched ahead by threads. It has the methods of `reader.TarReader`."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from data_shards.index import Split
from data_shards.plan import Ints
from data_shards.remote_ranges import Place, Ranges, Record, runs
from data_shards.remote_whole import WholeTars
from data_shards.tar_members import BLOCK, header_name, split_name

Found = dict[int, Record | Future[dict[int, Record]]]
"""Records by sample, or what is to bring them."""
_LOOKED_UP = 32
"""Samples that one thread looks for in the cache: a job costs more than a few look-ups."""
_KEYS = 4096
"""Samples whose keys are read at once."""


class RemoteReader:
    """Encoded images of a split by sample id, from a store or a slow disk; `data.stream` has the settings.

    What `read_ahead` was asked for stays in memory until `read` takes it.

    Args:
        split: whose `remote` is given.
    """

    def __init__(self, split: Split) -> None:
        self.ranges = Ranges(split)
        config = self.ranges.remote.config
        self.read_ahead_batches = config.read_ahead_batches
        self._gap = 1000 * config.coalesce_kb
        self._pool = self.ranges.remote.pool
        self._whole = WholeTars(self.ranges)
        self._ahead: dict[int, Future[Found]] = {}
        self._wanted: Counter[int] = Counter()

    def read(self, samples: Ints) -> list[NDArray[np.uint8]]:
        """The encoded bytes of each sample in the order asked for; waits for those that are not there yet.

        Raises:
            ValueError: the index points outside a tar, or a range could not be fetched.
        """
        return [record[BLOCK:] for record in self._records(samples)]

    def read_ahead(self, samples: Ints) -> None:
        """Starts to fetch these samples; returns at once."""
        self._ahead |= self._start(samples)
        self._wanted.update(samples.tolist())

    def hold(self, shards: Sequence[int]) -> None:
        """Fetches these tars whole, in this order, into the cache; returns at once.

        Of all ranks of a machine one fetches each tar. Pictures of a tar that is on its way wait for it.
        """
        self._whole.hold(shards)

    def keys(self, samples: Ints) -> list[str]:
        """`__key__` of each sample, from the tar headers, which are fetched with the pictures.

        Raises:
            ValueError: as `read`; or there is no USTAR header in front of a picture.
        """
        rows = self.ranges.split.samples[samples]
        order = np.lexsort((rows["offset"], rows["shard"]))
        keys = [""] * len(samples)
        for start in range(0, len(order), _KEYS):
            part = order[start : start + _KEYS]
            for place, record in zip(part.tolist(), self._records(samples[part]), strict=True):
                if (name := header_name(record[:BLOCK].tobytes())) is None:
                    shard = self.ranges.file(int(rows["shard"][place]))
                    raise ValueError(f"{self.ranges.remote.fetcher.location}/{shard} has no tar header where one is")
                keys[place] = split_name(name)[0]
        return keys

    def _records(self, samples: Ints) -> list[Record]:
        ids = samples.tolist()
        coming = self._start(samples)
        records = []
        for sample in ids:
            found = (coming.get(sample) or self._ahead[sample]).result()[sample]
            records.append(found.result()[sample] if isinstance(found, Future) else found)
        self._wanted.subtract(ids)
        for sample in set(ids):
            if self._wanted[sample] <= 0:
                del self._wanted[sample]
                self._ahead.pop(sample, None)
        return records

    def _start(self, samples: Ints) -> dict[int, Future[Found]]:
        """A job for some of those that are not on their way yet, by sample."""
        new = np.array([sample for sample in dict.fromkeys(samples.tolist()) if sample not in self._ahead], np.int64)
        jobs: dict[int, Future[Found]] = {}
        chunk: list[tuple[int, list[Place]]] = []
        for shard, places in self.ranges.places(new).items():
            chunk.append((shard, places))
            if sum(len(part) for _, part in chunk) >= _LOOKED_UP:
                jobs |= self._submit(chunk)
                chunk = []
        return jobs | self._submit(chunk)

    def _submit(self, chunk: list[tuple[int, list[Place]]]) -> dict[int, Future[Found]]:
        job = self._pool.submit(self._look_up, chunk)
        return {place.sample: job for _, places in chunk for place in places}

    def _look_up(self, chunk: Sequence[tuple[int, list[Place]]]) -> Found:
        """What the cache has, and a job for each range that is to be fetched; waits for none."""
        found: Found = {}
        for shard, places in chunk:
            cached = self.ranges.cached(shard, places)
            found |= cached
            for run in runs([place for place in places if place.sample not in cached], self._gap):
                job = self._pool.submit(self._load, shard, run)
                found |= {place.sample: job for place in run}
        return found

    def _load(self, shard: int, run: list[Place]) -> dict[int, Record]:
        found: dict[int, Record] = {}
        if self._whole.wait(shard):
            found = self.ranges.cached(shard, run)
        for part in runs([place for place in run if place.sample not in found], self._gap):
            found |= self.ranges.fetch(shard, part)[0]
        return found
