"""Which samples make up global batch t: a pure function of (seed, t), the same on any number of ranks.

One epoch of P x K batches, for identities with n_i >= 2 images each:

- An identity's images are shuffled and cut into groups of K; its last group is topped up with its own images. So every image
  has its place in a group, and at most K - 1 of an identity's images have two (more only where n_i < K).
- A batch holds one group of each of P *different* identities.
- The epoch has T steps. T is the smallest number for which P * T slots hold all groups, T of an identity at most, and at
  most P / 2 identities have more than T groups: that minimises groups left out plus groups repeated. Slots that remain are
  filled with one further group of identities drawn anew each epoch (in rounds, where all have had one); an identity with
  more than T groups shows T of them, other images in every epoch. Where none has, every image is drawn in every epoch.
- Identities with one image have no positive and are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.counter_random import random_bits

Ints = NDArray[np.int64]

_ORDER, _COLUMNS, _IMAGES = range(3)  # what a random number is drawn for
_AT_ONCE = 1 << 16
"""Numbers that a schedule draws in one call, about: small epochs take few calls, large ones little memory."""


@dataclass(kw_only=True, frozen=True)
class PlanConfig:
    identities_per_batch: int = 64
    """P: identities in the *global* batch, at least 2."""
    images_per_identity: int = 4
    """K: images of each identity in the global batch, at least 2, or no anchor has a positive."""
    window_shards: int = 0
    """Draw batches out of so many tars at a time, which are fetched whole, one window after the other: for stores that are far
    away. 0 draws out of all tars."""

    def __post_init__(self) -> None:
        for name in ("identities_per_batch", "images_per_identity"):
            if getattr(self, name) < 2:
                raise ValueError(f"plan.{name} is {getattr(self, name)}; batch-hard mining needs at least 2")
        if self.window_shards < 0:
            raise ValueError(f"plan.window_shards is {self.window_shards}; allowed is 0 (all tars) or more")

    @property
    def batch_size(self) -> int:
        """P * K, images in the global batch."""
        return self.identities_per_batch * self.images_per_identity


class Draws(NamedTuple):
    """The samples that one rank takes in one step."""

    epoch: int
    samples: Ints
    """Sample ids (rows of the split's index), shape (b,)."""
    visits: Ints
    """Number, from 0, of this draw among this epoch's draws of the sample, shape (b,): 0 but for top-ups."""
    shards: tuple[int, ...] = ()
    """Tars that are drawn from now and next, in the order of need; none where all are drawn from all the time."""


class PlanSummary(NamedTuple):
    identities: int
    single_image_identities: int
    steps_per_epoch: int
    groups: int
    groups_repeated: int
    groups_left_out: int


@dataclass(frozen=True)
class Schedule:
    """Slots of one epoch, each of shape (T, P): which group of which identity."""

    identities: NDArray[np.int32]
    groups: NDArray[np.int32]


class Plan:
    """P x K batches over one split.

    Args:
        starts: first sample id of every identity, and the number of samples last, shape (identities + 1,). Sample ids of an
            identity are consecutive.
        config: P and K.
        seed: chooses the order.
        steps: T, where the rule is not to choose it; with too few of them, further groups are left out, others in each epoch.
    Raises:
        ValueError: fewer than P identities have two images.
    """

    def __init__(self, starts: Ints, config: PlanConfig, seed: int = 0, steps: int | None = None) -> None:
        self.config, self.seed = config, seed
        self._starts = np.asarray(starts, np.int64)
        counts = np.diff(self._starts)
        self._eligible = np.flatnonzero(counts >= 2)
        if len(self._eligible) < config.identities_per_batch:
            raise ValueError(
                f"plan.identities_per_batch is {config.identities_per_batch}; the shards have "
                f"{len(self._eligible)} training identities with at least 2 images"
            )
        self._group_counts = -(-counts[self._eligible] // config.images_per_identity)
        self.steps_per_epoch = steps or steps_of(self._group_counts, config.identities_per_batch)
        self._schedule = lru_cache(maxsize=2)(self._make_schedule)
        self._places = lru_cache(maxsize=2)(self._make_places)

    def summary(self) -> PlanSummary:
        """What an epoch holds, repeats and leaves out, in groups of K images."""
        groups = int(self._group_counts.sum())
        slots = self.steps_per_epoch * self.config.identities_per_batch
        left_out = groups - min(slots, int(np.minimum(self._group_counts, self.steps_per_epoch).sum()))
        singles = int((np.diff(self._starts) == 1).sum())
        repeated = slots - (groups - left_out)
        return PlanSummary(len(self._eligible), singles, self.steps_per_epoch, groups, repeated, left_out)

    def global_batch(self, step: int) -> Draws:
        """All P*K draws of a step: P groups of K consecutive draws."""
        return self.batch(step, rank=0, world_size=1)

    def batch(self, step: int, rank: int, world_size: int) -> Draws:
        """The b = P*K/W draws of `rank` out of `world_size`: a contiguous slice of the global batch.

        Raises:
            ValueError: P*K is not divisible by the world size.
        """
        size = per_rank(self.config, world_size)
        epoch, row = divmod(step, self.steps_per_epoch)
        schedule = self._schedule(epoch)
        column, within, first, last = self._places(rank * size, (rank + 1) * size)
        identities, groups = schedule.identities[row, first:last], schedule.groups[row, first:last]
        images, counts = self._shuffled(epoch, identities)
        nth = groups[column] * self.config.images_per_identity + within
        visits, nth = np.divmod(nth, counts[column])
        return Draws(epoch, images[(np.cumsum(counts) - counts)[column] + nth], visits)

    def batches(self, start: int, rank: int, world_size: int, stop: int | None = None) -> Iterator[Draws]:
        """`batch(step, rank, world_size)` for the steps from `start` on, up to `stop` (none: for ever)."""
        step = start
        while stop is None or step < stop:
            yield self.batch(step, rank, world_size)
            step += 1

    def _make_places(self, begin: int, end: int) -> tuple[Ints, Ints, int, int]:
        """Of some draws of a batch the identity, from the first one on, and the image in its group; that one, the last + 1."""
        identity, within = np.divmod(np.arange(begin, end), self.config.images_per_identity)
        first = int(identity[0])
        return identity - first, within, first, int(identity[-1]) + 1

    def _shuffled(self, epoch: int, identities: NDArray[np.int32]) -> tuple[Ints, Ints]:
        """Sample ids of some identities, each identity's shuffled for this epoch, one after the other; and their counts."""
        begin, end = self._starts[identities], self._starts[identities + 1]
        counts = end - begin
        segment = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first = begin[segment]
        bits = random_bits(self.seed, _IMAGES, epoch, first + within)
        # one sort of numbers, which is much faster than one of places: segment, random bits, and the place in the segment
        low, high = (np.uint64(max(1, int(most).bit_length())) for most in (counts.max() - 1, len(counts) - 1))
        keys = (segment.astype(np.uint64) << (np.uint64(64) - high)) | (bits >> (high + low) << low)
        keys |= within.astype(np.uint64)
        keys.sort()
        return first + (keys & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64), counts

    def _make_schedule(self, epoch: int) -> Schedule:
        """Lays the groups, identity by identity, into P rows of T slots, then shuffles each row over the T steps.

        An identity has at most T groups, so it lies in one row or at the seam of two; the second row's shuffle keeps its
        part of the identity off the steps that the first row's part took. So no step has an identity twice.
        """
        steps, p = self.steps_per_epoch, self.config.identities_per_batch
        order = np.argsort(random_bits(self.seed, _ORDER, epoch, np.arange(len(self._eligible))), kind="stable")
        take = _fit(np.minimum(self._group_counts[order], steps), steps * p, steps)
        slot = np.repeat(np.arange(len(order)), take)
        group = np.arange(steps * p) - np.repeat(np.cumsum(take) - take, take)
        schedule = Schedule(np.empty((steps, p), np.int32), np.empty((steps, p), np.int32))
        identity = self._eligible[order][slot]
        taken = np.zeros(steps, bool)
        together = max(1, _AT_ONCE // steps)  # rows
        for row in range(p):
            begin, end = row * steps, (row + 1) * steps
            if row % together == 0:
                rows = np.arange(row, min(row + together, p))[:, None]
                shuffled = np.argsort(random_bits(self.seed, _COLUMNS, epoch, rows, np.arange(steps)), kind="stable")
            columns = shuffled[row % together]
            if row and slot[begin] == slot[begin - 1]:
                head = int(np.searchsorted(slot[begin:end], slot[begin], side="right"))
                free = np.flatnonzero(~taken[columns])[:head]
                columns = np.concatenate([columns[free], np.delete(columns, free)])
            schedule.identities[columns, row], schedule.groups[columns, row] = identity[begin:end], group[begin:end]
            tail = int(np.searchsorted(slot[begin:end], slot[end - 1]))
            taken[:] = False
            taken[columns[tail:]] = True
        return schedule


def per_rank(config: PlanConfig, world_size: int) -> int:
    """b = P*K/W, the images of one rank's slice of a global batch.

    Raises:
        ValueError: P*K is not divisible by the world size.
    """
    if config.batch_size % world_size:
        raise ValueError(
            f"plan: P*K = {config.identities_per_batch} * {config.images_per_identity} = {config.batch_size} is not "
            f"divisible by the world size {world_size}"
        )
    return config.batch_size // world_size


def contiguous_slice(total: int, rank: int, world_size: int) -> range:
    """Rank's slice of range(total) for passes that visit everything once: disjoint, complete, sizes differ by at most 1."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def steps_of(groups: Ints, p: int) -> int:
    """T of the module's rule, by bisection: both of its conditions hold for every larger T."""

    def enough(steps: int) -> bool:
        return p * steps >= np.minimum(groups, steps).sum() and (groups > steps).sum() <= p / 2

    low, high = 0, int(max(groups.max(), -(-groups.sum() // p)))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _fit(take: Ints, slots: int, most: int) -> Ints:
    """Adds groups, one an identity and in order, none beyond `most`, until all slots are taken; or takes away from the end."""
    take = take.copy()
    while (surplus := int(take.sum()) - slots) > 0:
        take[np.flatnonzero(take)[-surplus:]] -= 1
    while (missing := slots - int(take.sum())) > 0:
        take[np.flatnonzero(take < most)[:missing]] += 1
    return take
