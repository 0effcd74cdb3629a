"""How good the P x K batches of a plan, or of a plain stream, are: measured from the byte index alone."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
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
    parts = [
        _measured((plan.global_batch(step).samples for step in range(epoch * steps, (epoch + 1) * steps)), owners)
        for epoch in range(epochs)
    ]
    return _mean(parts)


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
    parts = []
    for epoch in range(epochs):
        stream = _stream(samples, epoch, buffer, seed)
        batches = (stream[at : at + batch_size] for at in range(0, len(stream) - batch_size + 1, batch_size))
        parts.append(_measured(batches, samples["identity"]))
    return _mean(parts)


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


def _measured(batches: Iterable[Ints], owners: NDArray[Any]) -> Quality:
    numbers = np.unique(owners, return_inverse=True)[1]
    counts = np.bincount(numbers)
    followed = np.zeros(len(counts), bool)
    followed[np.linspace(0, len(counts) - 1, min(_FOLLOWED, len(counts))).astype(int)] = True
    drawn = np.zeros(len(numbers), np.int64)
    different, alone, met = [], 0, [np.zeros((0, 2), np.int64)]
    for batch in batches:
        np.add.at(drawn, batch, 1)
        present, times = np.unique(numbers[batch], return_counts=True)
        different.append(len(present))
        alone += int((times == 1).sum())
        own = present[followed[present]]
        met.append(np.stack(np.meshgrid(own, present, indexing="ij"), -1).reshape(-1, 2))
    pairs = np.unique(np.concatenate(met), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    usable = counts[numbers] > 1
    total = int(drawn.sum())
    return Quality(
        len(different),
        float(np.mean(different)),
        float(np.min(different)),
        alone / total,
        (total - int((drawn > 0).sum())) / total,
        float((drawn[usable] == 0).mean()),
        len(pairs) / int((followed & (counts > 1)).sum()),
    )


def _mean(parts: list[Quality]) -> Quality:
    return Quality(*(float(np.mean([getattr(part, field.name) for part in parts])) for field in fields(Quality)))
