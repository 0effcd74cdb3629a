"""Whole tars fetched one after the other ahead of their use, once for each machine."""

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from data_shards.remote_ranges import Place, Ranges, runs
from data_shards.remote_set import CHUNK, DaemonPool

_TOGETHER = 4
"""Parts of one tar that are fetched at once: a single connection to an object store does not fill the line."""
_SPARE = 1.2
"""Room in the cache for each byte of the tars that are held."""


class WholeTars:
    """Fetches tars into the cache in the order in which they are asked for.

    What a cache of another process, or this one, already has of a tar is not fetched again: a kill costs the part in work.
    """

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._held: tuple[int, ...] = ()
        self._coming: dict[int, Future[None]] = {}
        self._order = DaemonPool(1)
        self._parts = DaemonPool(min(_TOGETHER, ranges.remote.config.connections))

    def hold(self, shards: Sequence[int]) -> None:
        """Starts to fetch these tars; returns at once. What was held and is not named goes first when the cache is full.

        Raises:
            ValueError: the cache has no room for all of them.
        """
        if tuple(shards) == self._held:
            return
        self._check_room(shards)
        self._held = tuple(shards)
        for shard in shards:
            self._ranges.cache.touch(self._ranges.copy(shard))
        # what is still on its way comes, too: read-ahead may be windows ahead of what is read
        coming = {shard: job for shard, job in self._coming.items() if shard in shards or not job.done()}
        self._coming = coming | {
            shard: self._order.submit(self._fetch, shard) for shard in shards if shard not in coming
        }

    def _check_room(self, shards: Sequence[int]) -> None:
        cache, need = self._ranges.cache, int(self._ranges.split.shard_bytes[list(shards)].sum())
        if need * _SPARE > cache.limit:
            raise ValueError(
                f"data.stream.cache_gb is {cache.limit / 1e9:g}; the {len(shards)} tars of two windows have {need / 1e9:g} GB "
                f"and want {_SPARE:g} times as much: allow it, or set plan.window_shards lower"
            )

    def wait(self, shard: int) -> bool:
        """Until a tar that is held has come; returns at once, False, where it is not held.

        Raises:
            ValueError: it could not be fetched or kept.
        """
        if (job := self._coming.get(shard)) is None:
            return False
        job.result()
        return True

    def _fetch(self, shard: int) -> None:
        samples = np.flatnonzero(self._ranges.split.samples["shard"] == shard)
        if not len(samples):
            return
        with self._ranges.cache.fetching(self._ranges.copy(shard)):
            places = self._ranges.places(samples)[shard]
            missing = []
            for run in runs(places, CHUNK):
                have = self._ranges.cached(shard, run)
                missing += [place for place in run if place.sample not in have]
            parts = [self._parts.submit(self._part, shard, run) for run in runs(missing, CHUNK)]
            for part in parts:
                part.result()

    def _part(self, shard: int, run: Sequence[Place]) -> None:
        if not self._ranges.fetch(shard, run)[1]:
            cache = self._ranges.cache
            raise ValueError(
                f"data.stream.cache_gb is {cache.limit / 1e9:g}: the cache in {cache.folder} has no room for the tars of "
                "a window; allow more, or set plan.window_shards lower"
            )
