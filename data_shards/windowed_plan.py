"""P x K batches out of a few tars at a time, so that tars can be fetched whole: a pure function of (seed, t), as `plan` is.

- In each epoch the tars are shuffled and cut into windows: as few as hold W tars at most, of even sizes.
- A window is drawn from to its end by the exact plan's rule, applied to the images that lie in its tars alone. So every batch
  has P different identities x K images; an image that is its identity's only one in the window is left out of this epoch, and
  an identity's images are cut into groups, and topped up, in each window anew.
- The epoch has T steps: as many as the rule gives the windows of epoch 0. In another epoch the windows, which hold other images,
  share these T steps in proportion to what the rule would give them: some have a step more or less than it, and repeat or leave
  out up to P groups. A window with fewer than P identities of two images has no step in that epoch.

A rank takes its slice of each batch. Whatever the number of ranks, all have T steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.counter_random import random_bits
from data_shards.index import Split
from data_shards.plan import Draws, Ints, Plan, PlanConfig, PlanSummary, contiguous_slice, steps_of

_SHARDS = 100
"""What a random number is drawn for; apart from those of `plan`."""


@dataclass(frozen=True)
class Windows:
    """Of one epoch.

    Attributes:
        shards: of each window, in their shuffled order.
        samples: ids in each window, ascending.
        steps: that the rule gives each window, shape (windows,); 0 where it has too few identities.
    """

    shards: list[tuple[int, ...]]
    samples: list[Ints]
    steps: Ints


class WindowedPlan:
    """P x K batches out of W tars at a time. Memory: about 20 bytes for each sample.

    Args:
        starts: as `plan.Plan`'s.
        shards: tar of each sample, shape (n,).
        config: P, K and W.
        seed: chooses the order.
    Raises:
        ValueError: a window of the first epoch has fewer than P identities of two images.
    """

    def __init__(self, starts: Ints, shards: NDArray[Any], config: PlanConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self._starts = np.asarray(starts, np.int64)
        self._owners = np.repeat(np.arange(len(self._starts) - 1, dtype=np.int32), np.diff(self._starts))
        self._shards = np.asarray(shards)
        self._count = int(self._shards.max()) + 1
        self._windows = lru_cache(maxsize=2)(self._make_windows)
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        first = self._windows(0)
        if not first.steps.all():
            raise ValueError(
                f"plan.window_shards is {config.window_shards}; a window of the first epoch has fewer than "
                f"plan.identities_per_batch = {config.identities_per_batch} identities with at least 2 images: take more tars, "
                "or shard with --order groups"
            )
        self.steps_per_epoch = int(first.steps.sum())

    def summary(self) -> PlanSummary:
        """What epoch 0 holds, repeats and leaves out, in the groups into which its windows cut the identities."""
        parts = [self._plan(0, window)[0].summary() for window in range(len(self._windows(0).steps))]
        groups, repeated, left_out = (sum(part[column] for part in parts) for column in (3, 4, 5))
        counts = np.diff(self._starts)
        singles = int((counts == 1).sum())
        return PlanSummary(int((counts > 1).sum()), singles, self.steps_per_epoch, groups, repeated, left_out)

    def global_batch(self, step: int) -> Draws:
        """All P*K draws of a step: P groups of K consecutive draws."""
        return self.batch(step, rank=0, world_size=1)

    def batch(self, step: int, rank: int, world_size: int) -> Draws:
        """The b = P*K/W draws of `rank` out of `world_size`, with the tars of its window and of the next.

        Raises:
            ValueError: P*K is not divisible by the world size; or no window of this epoch has P identities of two images.
        """
        return self._batch(step, rank, world_size, None)

    def _batch(self, step: int, rank: int, world_size: int, stop: int | None) -> Draws:
        epoch, row = divmod(step, self.steps_per_epoch)
        ends = np.cumsum(self._steps(epoch))
        window = int(np.searchsorted(ends, row, side="right"))
        plan, samples = self._plan(epoch, window)
        turn = epoch * len(ends) + window
        within = row - int(ends[window]) + plan.steps_per_epoch
        draws = plan.batch(turn * plan.steps_per_epoch + within, rank, world_size)
        last = stop is not None and epoch * self.steps_per_epoch + int(ends[window]) >= stop
        shards = self._windows(epoch).shards[window] if last else self._shards_from(epoch, window)
        return Draws(epoch, samples[draws.samples], draws.visits, shards)

    def batches(self, start: int, rank: int, world_size: int, stop: int | None = None) -> Iterator[Draws]:
        """`batch(step, rank, world_size)` for the steps from `start` on, up to `stop` (none: for ever); the last window names no
        further tars."""
        step = start
        while stop is None or step < stop:
            yield self._batch(step, rank, world_size, stop)
            step += 1

    def _steps(self, epoch: int) -> Ints:
        """Of each window, T together."""
        return _shared_out(self.steps_per_epoch, self._windows(epoch).steps)

    def _shards_from(self, epoch: int, window: int) -> tuple[int, ...]:
        """Tars of a window and, behind them, those of the next that has steps."""
        steps = self._steps(epoch)
        later = window + 1 + np.flatnonzero(steps[window + 1 :])
        following = (
            (epoch, int(later[0])) if len(later) else (epoch + 1, int(np.flatnonzero(self._steps(epoch + 1))[0]))
        )
        now, then = self._windows(epoch).shards[window], self._windows(following[0]).shards[following[1]]
        return tuple(dict.fromkeys(now + then))

    def _make_windows(self, epoch: int) -> Windows:
        order = np.argsort(random_bits(self.seed, _SHARDS, epoch, np.arange(self._count)), kind="stable")
        count = -(-self._count // self.config.window_shards)
        window_of = np.empty(self._count, np.min_scalar_type(count))
        shards = []
        for window in range(count):
            own = order[slice_of(self._count, window, count)]
            window_of[own] = window
            shards.append(tuple(own.tolist()))
        places = window_of[self._shards]
        by_window = np.argsort(places, kind="stable")
        samples = np.split(by_window, np.cumsum(np.bincount(places, minlength=count))[:-1])
        return Windows(shards, samples, np.array([self._steps_alone(part) for part in samples]))

    def _steps_alone(self, samples: Ints) -> int:
        """T that the exact plan has for these samples; 0 where they do not do for a batch."""
        counts = np.diff(self._starts_of(samples))
        groups = -(-counts[counts > 1] // self.config.images_per_identity)
        p = self.config.identities_per_batch
        return steps_of(groups, p) if len(groups) >= p else 0

    def _starts_of(self, samples: Ints) -> Ints:
        """Where each identity's begin among ascending sample ids and, last, their number."""
        owners = self._owners[samples]
        return np.append(np.flatnonzero(np.diff(owners, prepend=-1)), len(owners))

    def _make_plan(self, epoch: int, window: int) -> tuple[Plan, Ints]:
        samples = self._windows(epoch).samples[window]
        return Plan(self._starts_of(samples), self.config, self.seed, int(self._steps(epoch)[window])), samples


AnyPlan = Plan | WindowedPlan


def plan_of(split: Split, config: PlanConfig, seed: int = 0) -> AnyPlan:
    """The plan that `plan.window_shards` asks for.

    Raises:
        ValueError: see `Plan` and `WindowedPlan`.
    """
    if 0 < config.window_shards < len(split.shards):
        return WindowedPlan(split.starts, split.samples["shard"], config, seed)
    return Plan(split.starts, config, seed)


def slice_of(total: int, part: int, parts: int) -> slice:
    """One of so many even parts of range(total)."""
    own = contiguous_slice(total, part, parts)
    return slice(own.start, own.stop)


def _shared_out(total: int, shares: Ints) -> Ints:
    """Whole numbers in proportion to `shares` that add up to `total`: the largest remainders get what rounding down leaves.

    Raises:
        ValueError: all shares are 0.
    """
    if not shares.any():
        raise ValueError("plan.window_shards: no window of this epoch has enough identities; take more tars")
    whole, rest = np.divmod(shares.astype(np.int64) * total, int(shares.sum()))
    whole[np.argsort(-rest, kind="stable")[: total - int(whole.sum())]] += 1
    return whole
