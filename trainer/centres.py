"""Class centres of the margin softmax, spread over the ranks: each holds, samples and trains a slice of them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.counter_random import uniform
from trainer.collectives import all_reduce_max, all_reduce_sum, rank, world_size
from trainer.config import SoftmaxConfig
from trainer.metric.margin_softmax import (
    MARGINS,
    Attached,
    Margin,
    Norms,
    margin_softmax,
    quality_of,
    remembered_norms,
)

_INITIAL, _SAMPLE = 103, 104
"""What random numbers are for; `train_step` has 101 and 102."""
_AT_ONCE = 1 << 22
"""Numbers drawn at once."""
_DEVIATION = 0.01
"""Of the numbers that centres start with, as InsightFace's PartialFC has it: the shorter they are, the more a step turns them."""


class SoftmaxLoss(NamedTuple):
    """What a step's softmax gave, on the device."""

    total: Tensor
    """Sum over the images of *all* ranks, 0-d; its gradient by their embeddings is what flows through this rank's centres."""
    losses: Tensor
    """Of each image of all ranks, without gradient, shape (n,)."""
    cosine: Tensor
    """Of each image of all ranks with its own centre, shape (n,)."""
    sampled: Tensor
    """This rank's centres that took part, 0-d."""
    finite: Tensor
    """Whether losses and the gradient of this rank's centres are, 0-d, bool."""


class Centres:
    """One centre for each training identity. Rank r of W owns those at the places floor(r C / W) to floor((r + 1) C / W) - 1.

    Loss and gradients, those of the centres included, are those of one process with all C centres, whatever W is; which centres
    take part in a step and where they start depends on the seed, the step and the identity alone. A centre that takes no part
    stays as it is: neither gradient, decay nor momentum reaches it, and its momentum waits for the next time.

    Args:
        identities: labels of the training identities, ascending, shape (C,).
        size: d, dimensions of an embedding.
    Source: An et al. 2022, "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by
        Partial FC". Exactly so many are drawn there; here so many on average.
    """

    def __init__(
        self,
        config: SoftmaxConfig,
        identities: NDArray[np.integer],
        size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.total, self._seed = config, len(identities), seed
        self.first, self.stop = slice_of(self.total, rank(), world_size())
        self._labels = identities[self.first : self.stop].astype(np.int64)
        self._sorted = torch.from_numpy(self._labels).to(device)
        self.values = torch.from_numpy(initial(self._labels, size, seed)).to(device, dtype)  # (c, d)
        self.momentum = torch.zeros_like(self.values)
        self.norms = Norms(*torch.full((2,), torch.nan, dtype=torch.float64, device=device))
        self._rate = config.learning_rate
        margin = MARGINS[config.kind] if config.margin is None else config.margin
        self._margin = Margin(kind=config.kind, margin=margin)
        self._pending: tuple[Tensor | None, Tensor, Norms] | None = None

    def follow(self, share: float) -> None:
        """Sets the learning rate to this share of its highest."""
        self._rate = share * self.config.learning_rate

    def loss(self, embeddings: Tensor, identities: Tensor, norms: Tensor | None, step: int) -> SoftmaxLoss:
        """Every rank calls it with the same; `update` then takes the gradient of the *mean* loss to the centres.

        Args:
            embeddings: of all ranks, unit norm, shape (n, d).
            identities: int64, shape (n,).
            norms: before they were scaled to 1, shape (n,); for adaface.
            step: number of the update.
        """
        config, rows = self.config, None
        own = self._places(identities)
        centres = self.values
        if config.sample_rate < 1:
            rows = self._sampled(own, step)
            centres = self.values[rows]
            own = torch.searchsorted(rows, own).where(own >= 0, own)
        remembered, quality = self.norms, None
        if config.kind == "adaface":
            assert norms is not None
            remembered = remembered_norms(norms, self.norms, config.quality_memory)
            quality = quality_of(norms, remembered, config.quality_h)
        found = margin_softmax(
            embeddings.detach(), own, centres, self._margin, config.scale, quality, all_reduce_max, all_reduce_sum
        )
        self._pending = rows, found.by_centres / len(embeddings), remembered
        finite = found.loss.isfinite().all() & found.by_centres.isfinite().all()
        total: Tensor = Attached.apply(embeddings, found.loss.sum(), found.by_embeddings)
        return SoftmaxLoss(total, found.loss, found.cosine, torch.full_like(own[0], len(centres)), finite)

    def update(self, left_out: Tensor) -> None:
        """SGD with momentum on the centres that took part in the last `loss`; nothing where `left_out` (0-d) is above 0.

        Does not wait for the device.
        """
        if self._pending is None:
            return
        (rows, gradient, remembered), self._pending = self._pending, None
        config, keep = self.config, left_out > 0
        values, momentum = (self.values, self.momentum) if rows is None else (self.values[rows], self.momentum[rows])
        changed = config.momentum * momentum + gradient + config.weight_decay * values
        moved = values - self._rate * changed
        for whole, old, new in ((self.momentum, momentum, changed), (self.values, values, moved)):
            chosen = torch.where(keep, old, new)
            _ = whole.copy_(chosen) if rows is None else whole.index_copy_(0, rows, chosen)
        self.norms = Norms(*(torch.where(keep, old, new) for old, new in zip(self.norms, remembered, strict=True)))

    def _places(self, identities: Tensor) -> Tensor:
        """Row of each identity among this rank's centres, -1 where another rank has it, shape (n,)."""
        if not len(self._sorted):
            return torch.full_like(identities, -1)
        places = torch.searchsorted(self._sorted, identities).clamp(max=len(self._sorted) - 1)
        return places.where(self._sorted[places] == identities, -1)

    def _sampled(self, own: Tensor, step: int) -> Tensor:
        """Rows that take part, ascending: those of the batch's identities, and each other with chance `sample_rate`. Waits for
        the device, for it alone knows how many."""
        drawn = uniform(self._seed, _SAMPLE, step, self._labels) < self.config.sample_rate
        chosen = torch.cat([torch.from_numpy(drawn), torch.zeros(1, dtype=torch.bool)]).to(own.device)
        chosen[own] = True  # -1: the one behind the last
        return chosen[:-1].nonzero()[:, 0]

    def state(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint."""
        return {"values": self.values, "momentum": self.momentum, "norms": torch.stack(self.norms)}

    def load(self, rows: Callable[[str, int, int], Tensor], norms: Tensor) -> None:
        """
        Args:
            rows: gives "values" or "momentum" of the centres from one place to before another among all C.
            norms: as `state` has them.
        """
        for name, own in (("values", self.values), ("momentum", self.momentum)):
            own.copy_(rows(name, self.first, self.stop))
        self.norms = Norms(*norms.to(self.values.device))


def slice_of(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """First place of a rank's centres, and the place behind its last."""
    return rank * total // world_size, (rank + 1) * total // world_size


def initial(identities: NDArray[np.int64], size: int, seed: int) -> NDArray[np.float32]:
    """Where centres start: normal numbers of deviation 0.01, a function of seed and identity, shape (len(identities), size).

    Source: Box, Muller 1958, "A Note on the Generation of Random Normal Deviates".
    """
    found = np.empty((len(identities), size), np.float32)
    pairs = np.arange((size + 1) // 2)
    for begin in range(0, len(identities), max(1, _AT_ONCE // size)):
        some = identities[begin : begin + max(1, _AT_ONCE // size), None]
        radius = np.sqrt(-2 * np.log1p(-uniform(seed, _INITIAL, some, pairs, 0)))
        turn = 2 * np.pi * uniform(seed, _INITIAL, some, pairs, 1)
        normal = np.concatenate([radius * np.cos(turn), radius * np.sin(turn)], 1)[:, :size]
        found[begin : begin + len(some)] = _DEVIATION * normal
    return found
