"""Losses as a sum and a count: only `train_step` divides, by the count of all ranks."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainer.metric.dense import batch_all, contrastive, dense_loss, smooth_hard
from trainer.metric.mining import (
    Triplets,
    batch_hard,
    distance_weighted,
    hardest_semi_hard,
    random_triplets,
    semi_hard,
)
from trainer.metric.pool import Hardest, Pool

DRAWN = ("distance_weighted", "random")
"""Ways of mining that draw triplets with random numbers."""


class Loss(NamedTuple):
    """The loss of this rank's anchors."""

    total: Tensor
    """Sum, 0-d, with gradient."""
    divisor: Tensor
    """What the sum over all ranks is to be divided by, summed over all ranks; 0-d, int64."""
    hardest: Hardest
    """Hardest triplet of each anchor, however triplets were chosen: tells how training goes."""


@dataclass(kw_only=True, frozen=True)
class Objective:
    """A loss over the triplets or pairs that this rank's anchors form with all candidates.

    Without any valid anchor, and where every triplet is inactive, the sum is 0 and so is its gradient. Embeddings must be finite,
    which the caller looks after: comparisons with a NaN may leave anchors without a word.
    """

    kind: str
    """smooth, soft_margin, margin or contrastive."""
    mining: str
    """batch_hard, batch_all, semi_hard, hardest_semi_hard, distance_weighted or random; not read for smooth and contrastive."""
    margin: float | None
    """In the distance's own unit; None for the soft margin."""
    sharpness: float
    """Of smooth, in 1 / distance."""
    squared: bool
    """Squared L2 distance in [0, 4] instead of its root in [0, 2]."""
    average: str
    """Over the triplets that are active, or over all that are valid."""

    @property
    def draws(self) -> bool:
        """Whether it takes uniform numbers."""
        return self.kind in ("margin", "soft_margin") and self.mining in DRAWN

    def __call__(self, pool: Pool, most: int | None = None, draws: Tensor | None = None) -> Loss:
        """
        Args:
            most: images of one identity among the candidates, at most; None counts them, which waits for the device.
            draws: uniform numbers in [0, 1), shape (b, at least `most`), where `self.draws`.
        """
        if self.kind == "smooth":
            assert self.margin is not None
            return Loss(*dense_loss(pool, smooth_hard(self.margin, self.sharpness), self.squared, most))
        if self.kind == "contrastive":
            assert self.margin is not None
            return Loss(*dense_loss(pool, contrastive(self.margin), self.squared, most))
        if self.mining == "batch_all":
            return Loss(*dense_loss(pool, batch_all(self.margin, self.average), self.squared, most))
        triplets, hardest = self._mine(pool, most, draws)
        total, count = triplet_loss(triplets, pool, self.margin, self.squared, self.average)
        return Loss(total, count, hardest)

    def _mine(self, pool: Pool, most: int | None, draws: Tensor | None) -> tuple[Triplets, Hardest]:
        if self.mining in DRAWN:
            assert draws is not None
            return (random_triplets if self.mining == "random" else distance_weighted)(pool, draws)
        miners = {"batch_hard": batch_hard, "semi_hard": semi_hard, "hardest_semi_hard": hardest_semi_hard}
        return miners[self.mining](pool, most)


def triplet_loss(
    triplets: Triplets, pool: Pool, margin: float | None, squared: bool = False, average: str = "active"
) -> tuple[Tensor, Tensor]:
    """Sum of the triplet loss over valid triplets, and the number to divide it by.

    - With a margin: max(0, d_ap - d_an + margin); triplets with a positive loss count, or all valid ones.
    - With the soft margin: log(1 + exp(d_ap - d_an)); every valid triplet counts.

    Returns:
        0-d, with gradient; and 0-d, int64. Both stay on the device.
    Source: FaceNet (Schroff et al. 2015), equation 2; soft margin and the average over active triplets: Hermans et al. 2017.
    """
    d_ap, d_an = triplets.distances(pool, squared)  # (t,)
    difference = d_ap - d_an + (margin or 0)
    loss = softplus(difference) if margin is None else difference.clamp(min=0)
    loss = loss.masked_fill(~triplets.valid, 0)
    only_active = margin is not None and average == "active"
    return loss.sum(), (loss > 0 if only_active else triplets.valid).sum()


def active_anchors(hardest: Hardest, margin: float | None, squared: bool) -> Tensor:
    """Number of valid anchors whose hardest triplet has a positive loss with this margin: all with the soft margin. 0-d."""
    if margin is None:
        return hardest.valid.sum()
    d_ap, d_an = hardest.distances(squared)
    return (hardest.valid & (d_ap - d_an + margin > 0)).sum()


def effective_rank(embeddings: Tensor) -> Tensor:
    """exp of the entropy of the covariance's eigenvalues, in [1, d]: in how many dimensions the embeddings spread. 0-d.

    1 where all embeddings are equal. (The singular values' own entropy is Roy's; eigenvalues weigh small ones less.)

    Args:
        embeddings: shape (n, d), n at least 2.
    Source: Roy, Vetterli 2007, "The effective rank".
    """
    centred = (embeddings - embeddings.mean(0)).double()
    values = torch.linalg.svdvals(centred.T @ centred / len(centred))
    shares = values / values.sum().clamp(min=1e-12)
    return torch.special.entr(shares).sum().exp()


def spread(embeddings: Tensor) -> Tensor:
    """Root mean square distance of embeddings from their mean, in [0, 1] for unit vectors: 0 where all are equal. 0-d."""
    return (embeddings - embeddings.mean(0)).square().sum(1).mean().sqrt()
