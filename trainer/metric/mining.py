"""Triplet selection: local anchors against the candidates of all ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.metric.distances import paired_distance, pairwise_squared

BLOCK = 4096
"""Candidates compared at a time: bounds the extra memory at b x BLOCK."""


_SMALLEST_SQUARED = 1e-6
"""Squared distances below this have no gradient through the root: single precision knows them no better."""


class Triplets(NamedTuple):
    """One triplet for each anchor; distances of anchors that are not valid mean nothing."""

    positive_distance: Tensor
    """d_ap, shape (b,), with gradient."""
    negative_distance: Tensor
    """d_an, shape (b,), with gradient."""
    valid: Tensor
    """Whether the anchor has a positive and a negative among the candidates, bool, shape (b,)."""


def batch_hard(
    embeddings: Tensor,
    identities: Tensor,
    candidates: Tensor,
    candidate_identities: Tensor,
    self_columns: Tensor,
    *,
    squared: bool = False,
) -> Triplets:
    """The farthest positive and the nearest negative of each anchor.

    Candidates are compared in blocks and without gradient; the gradient then flows through the selected triplets alone. Of
    equally distant candidates the first is taken, so that the choice does not depend on the number of ranks.

    Args:
        embeddings: anchors of this rank, unit norm, shape (b, d).
        identities: their labels, shape (b,).
        candidates: embeddings of all ranks in rank order, shape (N, d).
        candidate_identities: their labels, shape (N,).
        self_columns: which candidate each anchor is itself, shape (b,).
        squared: squared distance in [0, 4] instead of its root in [0, 2].
    Source: Hermans, Beyer, Leibe 2017, "In Defense of the Triplet Loss", equation 5.
    """
    positives, negatives, valid = select_hardest(
        embeddings.detach(), identities, candidates.detach(), candidate_identities, self_columns
    )
    return Triplets(
        paired_distance(embeddings, candidates[positives], squared),
        paired_distance(embeddings, candidates[negatives], squared),
        valid,
    )


def smooth_hard(
    embeddings: Tensor,
    identities: Tensor,
    candidates: Tensor,
    candidate_identities: Tensor,
    self_columns: Tensor,
    *,
    sharpness: float,
    squared: bool = False,
) -> Triplets:
    """The log-sum-exp of all positives' and of all negatives' distances in place of their maximum and minimum.

    `positive_distance` is log(sum exp(s d_ap)) / s, `negative_distance` is -log(sum exp(-s d_an)) / s, so they bound
    `batch_hard`'s from above and below and become them as the sharpness s grows. All pairs carry gradient, which trains a network
    from random weights where the hardest triplets alone do not (benchmarks/README.md). Takes some five arrays of b x N.

    Args:
        embeddings, identities, candidates, candidate_identities, self_columns, squared: as for `batch_hard`.
        sharpness: s, above 0, in 1 / distance.
    Source: Sun et al. 2020, "Circle Loss", equations 1 to 3 (there on similarities); Hermans et al. 2017, equation 8.
    """
    distance = pairwise_squared(embeddings, candidates)  # (b, N)
    distance = distance if squared else distance.clamp(min=_SMALLEST_SQUARED).sqrt()
    same = identities[:, None] == candidate_identities[None]  # (b, N)
    columns = torch.arange(len(candidates), device=embeddings.device)
    positive = same & (columns[None] != self_columns[:, None])
    d_ap = (sharpness * distance).masked_fill(~positive, -torch.inf)
    d_an = (-sharpness * distance).masked_fill(same, -torch.inf)
    valid = positive.any(1) & ~same.all(1)
    d_ap, d_an = (d.masked_fill(~valid[:, None], 0) for d in (d_ap, d_an))  # no gradient of an empty sum
    return Triplets(d_ap.logsumexp(1) / sharpness, -d_an.logsumexp(1) / sharpness, valid)


@torch.no_grad()
def select_hardest(
    embeddings: Tensor, identities: Tensor, candidates: Tensor, candidate_identities: Tensor, self_columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the least similar positive and of the most similar negative, and whether both exist; each of shape (b,)."""
    infinity = torch.full((len(embeddings),), torch.inf, dtype=embeddings.dtype, device=embeddings.device)
    hardest_positive, hardest_negative = infinity, -infinity
    positives = torch.zeros_like(self_columns)
    negatives = torch.zeros_like(self_columns)
    for begin in range(0, len(candidates), BLOCK):
        block = slice(begin, begin + BLOCK)
        similarity = embeddings @ candidates[block].T  # (b, block)
        same = identities[:, None] == candidate_identities[None, block]  # (b, block)
        columns = torch.arange(begin, begin + similarity.shape[1], device=embeddings.device)
        not_positive = ~same | (columns[None] == self_columns[:, None])
        least, where = similarity.masked_fill(not_positive, torch.inf).min(1)
        positives = torch.where(least < hardest_positive, where + begin, positives)
        hardest_positive = torch.minimum(least, hardest_positive)
        most, where = similarity.masked_fill(same, -torch.inf).max(1)
        negatives = torch.where(most > hardest_negative, where + begin, negatives)
        hardest_negative = torch.maximum(most, hardest_negative)
    return positives, negatives, (hardest_positive < torch.inf) & (hardest_negative > -torch.inf)
