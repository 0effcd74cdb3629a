"""Losses as a sum and a count: only `train_step` divides, by the count of all ranks."""

from torch import Tensor
from torch.nn.functional import softplus

from trainer.metric.mining import Triplets


def triplet_loss(triplets: Triplets, margin: float | None, sharpness: float | None = None) -> tuple[Tensor, Tensor]:
    """Sum of the triplet loss over valid anchors, and the number to divide it by.

    - With a margin: max(0, d_ap - d_an + margin); triplets with a positive loss count.
    - With the soft margin: log(1 + exp(d_ap - d_an)); every valid anchor counts.
    - With a margin and a sharpness s: log(1 + exp(s (d_ap - d_an + margin))) / s, which becomes the first as s grows; every
      valid anchor is active.

    No active triplet: the sum is 0 and so is its gradient.

    Args:
        triplets: shape (b,) each.
        margin: in the distance's own unit; None for the soft margin.
        sharpness: s, in 1 / distance; None for the hinge.
    Returns:
        loss_sum: 0-d, with gradient. count: of active triplets, 0-d, int64. Both stay on the device.
    Source: FaceNet (Schroff et al. 2015), equation 2; soft margin and the average over active triplets: Hermans et al. 2017;
        with sharpness: Sun et al. 2020, equation 1.
    """
    difference = triplets.positive_distance - triplets.negative_distance + (margin or 0)  # (b,)
    if margin is None:
        loss = softplus(difference)
    elif sharpness is None:
        loss = difference.clamp(min=0)
    else:
        loss = softplus(sharpness * difference) / sharpness
    loss = loss.masked_fill(~triplets.valid, 0)
    hinge = margin is not None and sharpness is None
    return loss.sum(), (loss > 0 if hinge else triplets.valid).sum()


def active_triplets(triplets: Triplets, margin: float | None) -> Tensor:
    """Number of valid anchors whose triplet has a positive loss with this margin: all of them with the soft margin. 0-d."""
    if margin is None:
        return triplets.valid.sum()
    return (triplets.valid & (triplets.positive_distance - triplets.negative_distance + margin > 0)).sum()
