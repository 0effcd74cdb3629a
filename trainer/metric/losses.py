"""Losses as a sum and a count: only `train_step` divides, by the count of all ranks."""

from torch import Tensor
from torch.nn.functional import softplus

from trainer.metric.mining import Triplets


def triplet_loss(triplets: Triplets, margin: float | None) -> tuple[Tensor, Tensor]:
    """Sum of the triplet loss over valid anchors, and the number of active triplets.

    With a margin: max(0, d_ap - d_an + margin). With the soft margin: log(1 + exp(d_ap - d_an)), where every valid anchor is
    active. No active triplet: the sum is 0 and so is its gradient.

    Args:
        triplets: shape (b,) each.
        margin: in the distance's own unit; None for the soft margin.
    Returns:
        loss_sum: 0-d, with gradient. active: 0-d, int64. Both stay on the device.
    Source: FaceNet (Schroff et al. 2015), equation 2; soft margin and the average over active triplets: Hermans et al. 2017.
    """
    difference = triplets.positive_distance - triplets.negative_distance  # (b,)
    loss = softplus(difference) if margin is None else (difference + margin).clamp(min=0)
    loss = loss.masked_fill(~triplets.valid, 0)
    return loss.sum(), (loss > 0).sum()
