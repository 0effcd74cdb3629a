"""How good the P x K batches of a plan, or of a plain stream, are: measured from the byte index alone."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.counter_random import random_bits
from data_shards.plan import Ints
from data_shards.windowed_plan import AnyPlan

_FOLLOWED = 200
"""Identities whose company is counted, evenly spaced."""
_STREAM = 200
"""What a random number is drawn for."""


@dataclass(frozen=True)
class Quality:
    """Means over epochs."""

    steps: float
    """Batches in an epoch."""
    identities: float
    """Different identities in a batch, mean."""
    fewest_identities: float
    """Of all batches."""
    without_positive: float
    """Share of images that are their identity's only one in the batch, in [0, 1]."""
    repeated: float
    """Share of an epoch's draws that show an image again, in [0, 1]."""
    left_out: float
    """Share of the images of identities with two or more that an epoch does not show, in [0, 1]."""
    company: float
    """Other identities that one shares a batch with in an epoch, mean."""
    mates: float
    """Other images of its identity that one shares a batch with in all epochs that were looked at, together, mean."""

    def plain(self) -> dict[str, float]:
        """For JSON."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


def quality_of(plan: AnyPlan, owners: NDArray[Any], epochs: int = 1) -> Quality:
    """Of a plan.

    Args:
        owners: identity of each sample, shape (n,), ascending.
        epochs: how many are looked at.
    """
    steps = plan.steps_per_epoch
    found = _Tally(owners)
    for epoch in range(epochs):
        found.add(plan.global_batch(step).samples for step in range(epoch * steps, (epoch + 1) * steps))
    return found.quality()


def stream_quality(
    samples: NDArray[Any], batch_size: int, *, buffer: int = 0, epochs: int = 1, seed: int = 0
) -> Quality:
    """Of what a reader gives that shuffles the tars of an epoch and takes batches off their stream, through a shuffle buffer if
    there is one; the rest of a batch at the end is dropped.

    Args:
        samples: rows of the index, of `index.SAMPLE`, shape (n,).
        batch_size: P * K.
        buffer: images in the shuffle buffer; 0 takes them as they lie.
    """
    found = _Tally(samples["identity"])
    for epoch in range(epochs):
        stream = _stream(samples, epoch, buffer, seed)
        found.add(stream[at : at + batch_size] for at in range(0, len(stream) - batch_size + 1, batch_size))
    return found.quality()


def _stream(samples: NDArray[Any], epoch: int, buffer: int, seed: int) -> Ints:
    tars = int(samples["shard"].max()) + 1
    turn = random_bits(seed, _STREAM, epoch, np.arange(tars))[samples["shard"]]
    stream = np.lexsort((samples["offset"], turn))
    return np.fromiter(_buffered(stream, buffer, np.random.default_rng([seed, epoch])), np.int64, len(stream))


def _buffered(stream: Ints, size: int, random: np.random.Generator) -> Iterator[int]:
    """WebDataset's shuffle: a random one of the buffer leaves, the next of the stream takes its place."""
    kept = stream[:size].tolist()
    for sample in stream[size:].tolist():
        if kept:
            place = int(random.integers(len(kept)))
            sample, kept[place] = kept[place], sample
        yield sample
    random.shuffle(kept)
    yield from kept


class _Tally:
    """Counts over epochs.

    Args:
        owners: identity of each sample, shape (n,), ascending.
    """

    def __init__(self, owners: NDArray[Any]) -> None:
        self._identities = np.unique(owners, return_inverse=True)[1]
        self._counts = np.bincount(self._identities)
        several = np.flatnonzero(self._counts > 1)
        self._followed = np.zeros(len(self._counts), bool)
        self._followed[several[np.linspace(0, len(several) - 1, min(_FOLLOWED, len(several))).astype(int)]] = True
        self._epochs: list[dict[str, float]] = []
        self._mates = np.zeros((0, 2), np.int64)

    def add(self, batches: Iterable[Ints]) -> None:
        """One epoch."""
        drawn = np.zeros(len(self._identities), np.int64)
        different, alone = [], 0
        met, mates = [np.zeros((0, 2), np.int64)], [self._mates]
        for batch in batches:
            np.add.at(drawn, batch, 1)
            owners = self._identities[batch]
            present, times = np.unique(owners, return_counts=True)
            different.append(len(present))
            alone += int((times == 1).sum())
            met.append(_pairs(present[self._followed[present]], present))
            followed = batch[self._followed[owners]]
            pairs = _pairs(followed, followed)
            mates.append(pairs[self._identities[pairs[:, 0]] == self._identities[pairs[:, 1]]])
        self._mates = np.unique(np.concatenate(mates), axis=0)
        total, several = int(drawn.sum()), self._counts[self._identities] > 1
        self._epochs.append(
            {
                "steps": len(different),
                "identities": float(np.mean(different)),
                "fewest_identities": min(different),
                "without_positive": alone / total,
                "repeated": (total - int((drawn > 0).sum())) / total,
                "left_out": float((drawn[several] == 0).mean()),
                "company": len(np.unique(np.concatenate(met), axis=0)) / int(self._followed.sum()),
            }
        )

    def quality(self) -> Quality:
        means = {name: float(np.mean([epoch[name] for epoch in self._epochs])) for name in self._epochs[0]}
        means["fewest_identities"] = min(epoch["fewest_identities"] for epoch in self._epochs)
        return Quality(**means, mates=len(self._mates) / int(self._counts[self._followed].sum()))


def _pairs(first: Ints, second: Ints) -> Ints:
    """Each of one with each other of the other, shape (pairs, 2)."""
    pairs = np.stack(np.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)
    return pairs[pairs[:, 0] != pairs[:, 1]]
