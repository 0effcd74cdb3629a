"""Triplet selection: which positive and which negative each anchor is compared with.

Selection has no gradient and never holds more than a few rows of similarities (`pool.SIMILARITIES`); the gradient then flows
through the selected triplets alone. Extra memory: O(SIMILARITIES + N d + t d) for t triplets, with t = b for one triplet an
anchor and b (K - 1) for one a positive pair.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.metric.distances import paired_distance
from trainer.metric.pool import Hardest, Pool, hardest_of, joined

DISTANCE_CUTOFF, LOSS_CUTOFF = 0.5, 1.4
"""Distance-weighted sampling: nearer negatives are weighted as at the first, farther than the second none is drawn."""


class Triplets(NamedTuple):
    """Selected triplets; each of shape (t,). Those that are not valid mean nothing."""

    anchors: Tensor
    """Rows of the pool's anchors."""
    positives: Tensor
    """Columns of its candidates."""
    negatives: Tensor
    valid: Tensor
    """bool."""

    def distances(self, pool: Pool, squared: bool) -> tuple[Tensor, Tensor]:
        """d_ap and d_an with gradient, shape (t,) each."""
        anchors = pool.anchors[self.anchors]  # (t, d)
        return (
            paired_distance(anchors, pool.candidates[self.positives], squared),
            paired_distance(anchors, pool.candidates[self.negatives], squared),
        )


_Picked = tuple[Tensor, Tensor, Tensor]
"""Columns of positives and negatives and whether the triplet is valid, shape (rows, w) each: w triplets an anchor."""
_Pick = Callable[[slice, Tensor, Tensor, Hardest], _Picked]
"""(rows, their similarities to all candidates (rows, N), `Pool.same` of them, their hardest) -> what is picked."""


def batch_hard(pool: Pool) -> tuple[Triplets, Hardest]:
    """The farthest positive and the nearest negative of each anchor; of equally distant ones the first.

    Source: Hermans, Beyer, Leibe 2017, "In Defense of the Triplet Loss", equation 5.
    """

    def pick(rows: slice, similarity: Tensor, same: Tensor, hardest: Hardest) -> _Picked:
        return hardest.positives[:, None], hardest.negatives[:, None], hardest.valid[:, None]

    return _mined(pool, pick)


def semi_hard(pool: Pool, most: int | None = None) -> tuple[Triplets, Hardest]:
    """For every pair of an anchor and a positive the nearest negative that is farther away than the positive.

    A pair without such a negative is not valid. Beyond the margin its loss is 0, so those within remain: semi-hard ones.

    Args:
        most: images of one identity among the candidates, at most; None counts them.
    Source: FaceNet (Schroff et al. 2015), section 3.2, equation 4.
    """
    columns, there = pool.positive_columns(most)

    def pick(rows: slice, similarity: Tensor, same: Tensor, hardest: Hardest) -> _Picked:
        found = [
            _nearest_beyond(similarity.gather(1, columns[rows, at, None]), similarity, same)
            for at in range(columns.shape[1])
        ]
        nearest = torch.stack([similarity for similarity, _ in found], 1)  # (rows, w)
        negatives = torch.stack([negative for _, negative in found], 1)
        return columns[rows], negatives, there[rows] & (nearest > -torch.inf)

    return _mined(pool, pick)


def hardest_semi_hard(pool: Pool) -> tuple[Triplets, Hardest]:
    """The farthest positive of each anchor with the nearest negative beyond it; where none lies beyond, the nearest of all.

    Keeps the hard positives of `batch_hard` and takes its hardest negatives only where no semi-hard one exists, which are
    what makes plain batch-hard collapse early in training.

    Source: Hermans et al. 2017, equation 5 (positives); FaceNet (Schroff et al. 2015), section 3.2 (negatives).
    """

    def pick(rows: slice, similarity: Tensor, same: Tensor, hardest: Hardest) -> _Picked:
        beyond, negatives = _nearest_beyond(hardest.positive_similarity[:, None], similarity, same)
        negatives = torch.where(beyond > -torch.inf, negatives, hardest.negatives)
        return hardest.positives[:, None], negatives[:, None], hardest.valid[:, None]

    return _mined(pool, pick)


def distance_weighted(pool: Pool, draws: Tensor) -> tuple[Triplets, Hardest]:
    """For every pair of an anchor and a positive a negative drawn with a probability that evens out its distance.

    The probability is inverse to the density q(d) of distances between random points of the sphere, log q(d) =
    (n - 2) log d + (n - 3) / 2 log(1 - d^2 / 4), with d at least 0.5; negatives beyond 1.4 are drawn, evenly, only where there is
    none nearer.

    Args:
        draws: uniform numbers in [0, 1), one for each anchor and each of its identity's images, shape (b, most).
    Source: Wu, Manmatha, Smola, Krähenbühl 2017, "Sampling Matters in Deep Embedding Learning", equations 3 to 5 and 4.1.
    """
    columns, there = pool.positive_columns(draws.shape[1])
    size = pool.anchors.shape[1]

    def pick(rows: slice, similarity: Tensor, same: Tensor, hardest: Hardest) -> _Picked:
        distance = (2 - 2 * similarity).clamp(min=DISTANCE_CUTOFF**2).sqrt()  # (rows, N)
        shape = (1 - distance.square() / 4).clamp(min=1e-8).log()
        weight = (2 - size) * distance.log() - (size - 3) / 2 * shape
        weight = weight.masked_fill(same | (distance >= LOSS_CUTOFF), -torch.inf)
        near = (weight > -torch.inf).any(1, keepdim=True)
        weight = torch.where(near, (weight - weight.amax(1, keepdim=True)).exp(), (~same).to(weight.dtype))
        negatives = _drawn(weight, draws[rows])
        return columns[rows], negatives, there[rows] & hardest.valid[:, None]

    return _mined(pool, pick)


def random_triplets(pool: Pool, draws: Tensor) -> tuple[Triplets, Hardest]:
    """One positive and one negative for each anchor, drawn evenly: the way that mining is compared with.

    Args:
        draws: uniform numbers in [0, 1), shape (b, at least 2).
    """

    def pick(rows: slice, similarity: Tensor, same: Tensor, hardest: Hardest) -> _Picked:
        positive = same.to(similarity.dtype).scatter(1, pool.self_columns[rows, None], 0)
        positives = _drawn(positive, draws[rows, :1])
        return positives, _drawn((~same).to(similarity.dtype), draws[rows, 1:2]), hardest.valid[:, None]

    return _mined(pool, pick)


@torch.no_grad()
def _mined(pool: Pool, pick: _Pick) -> tuple[Triplets, Hardest]:
    pool, picked, hardest = pool.detach(), [], []
    for rows in pool.rows():
        similarity = pool.anchors[rows] @ pool.candidates.T  # (rows, N)
        same = pool.same(rows)  # (rows, N)
        hardest.append(hardest_of(similarity, same, pool.self_columns[rows]))
        picked.append(pick(rows, similarity, same, hardest[-1]))
    positives, negatives, valid = (torch.cat(parts) for parts in zip(*picked, strict=True))  # (b, w)
    anchors = torch.arange(len(positives), device=positives.device)[:, None].expand_as(positives)
    return Triplets(*(part.flatten() for part in (anchors, positives, negatives, valid))), joined(hardest)


def _nearest_beyond(limit: Tensor, similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity and column of the nearest negative that is less similar than the limit, shape (rows, 1); -inf: none."""
    return similarity.masked_fill(same | (similarity >= limit), -torch.inf).max(1)


def _drawn(weight: Tensor, draws: Tensor) -> Tensor:
    """Columns drawn in proportion to the weights (rows, N), at least 0, with uniform numbers (rows, w); shape (rows, w)."""
    cumulative = weight.double().cumsum(1)  # (rows, N)
    total = cumulative[:, -1:]
    wanted = torch.minimum(draws.double() * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True).clamp(max=weight.shape[1] - 1)
