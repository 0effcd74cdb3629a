"""Triplet selection: which positive and which negative each anchor is compared with.

Selection has no gradient and never holds more than a few rows of similarities (`pool.SIMILARITIES`); the gradient then flows
through the selected triplets alone. Extra memory: O(SIMILARITIES + N d + t d) for t triplets, with t = b for one triplet an
anchor and b (K - 1) for one a positive pair.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from trainer.metric.distances import paired_distance
from trainer.metric.pool import Collected, Hardest, Pool, hardest_of, largest

DISTANCE_CUTOFF, LOSS_CUTOFF = 0.5, 1.4
"""Distance-weighted sampling: nearer negatives are weighted as at the first, farther than the second none is drawn."""


class Triplets(NamedTuple):
    """Selected triplets; each of shape (t,). Those that are not valid mean nothing."""

    anchors: Tensor
    """Rows of the pool's anchors, as many triplets each, in order."""
    positives: Tensor
    """Columns of its candidates."""
    negatives: Tensor
    valid: Tensor
    """bool."""

    def distances(self, pool: Pool, squared: bool) -> tuple[Tensor, Tensor]:
        """d_ap and d_an with gradient, shape (t,) each. (`embedding` takes rows as indexing does, but its backward is faster.)"""
        anchors = pool.anchors  # (b, d)
        if len(self.anchors) != len(anchors):
            anchors = embedding(self.anchors, anchors)  # (t, d)
        return (
            paired_distance(anchors, embedding(self.positives, pool.candidates), squared),
            paired_distance(anchors, embedding(self.negatives, pool.candidates), squared),
        )


class _Block(NamedTuple):
    """Some anchors compared with all candidates."""

    rows: slice
    negatives: Tensor
    """Similarities, -inf where the candidate has the anchor's identity, shape (rows, N)."""
    columns: Tensor
    """See `Runs.columns`, shape (rows, most)."""
    there: Tensor
    same: Tensor
    """Similarities of `columns`."""
    hardest: Hardest


_Picked = tuple[Tensor, Tensor, Tensor]
"""Columns of positives and negatives and whether the triplet is valid, shape (rows, w) each: w triplets an anchor."""


def batch_hard(pool: Pool, most: int | None = None) -> tuple[Triplets, Hardest]:
    """The farthest positive and the nearest negative of each anchor; of equally distant ones the first.

    Args:
        most: here and below, images of one identity among the candidates, at most; None counts them, which waits for the
            device.
    Source: Hermans, Beyer, Leibe 2017, "In Defense of the Triplet Loss", equation 5.
    """

    def pick(block: _Block) -> _Picked:
        hardest = block.hardest
        return hardest.positives[:, None], hardest.negatives[:, None], hardest.valid[:, None]

    return _mined(pool, pick, most)


def semi_hard(pool: Pool, most: int | None = None) -> tuple[Triplets, Hardest]:
    """For every pair of an anchor and a positive the nearest negative that is farther away than the positive.

    A pair without such a negative is not valid. Beyond the margin its loss is 0, so those within remain: semi-hard ones.

    Source: FaceNet (Schroff et al. 2015), section 3.2, equation 4.
    """

    def pick(block: _Block) -> _Picked:
        found = [_nearest_beyond(block.same[:, at, None], block.negatives) for at in range(block.same.shape[1])]
        nearest = torch.stack([similarity for similarity, _ in found], 1)  # (rows, most)
        negatives = torch.stack([negative for _, negative in found], 1)
        return block.columns, negatives, block.there & (nearest > -torch.inf)

    return _mined(pool, pick, most)


def hardest_semi_hard(pool: Pool, most: int | None = None) -> tuple[Triplets, Hardest]:
    """The farthest positive of each anchor with the nearest negative beyond it; where none lies beyond, the nearest of all.

    Keeps the hard positives of `batch_hard` and takes its hardest negatives only where no semi-hard one exists, which are
    what makes plain batch-hard collapse early in training.

    Source: Hermans et al. 2017, equation 5 (positives); FaceNet (Schroff et al. 2015), section 3.2 (negatives).
    """

    def pick(block: _Block) -> _Picked:
        hardest = block.hardest
        beyond, negatives = _nearest_beyond(hardest.positive_similarity[:, None], block.negatives)
        negatives = torch.where(beyond > -torch.inf, negatives, hardest.negatives)
        return hardest.positives[:, None], negatives[:, None], hardest.valid[:, None]

    return _mined(pool, pick, most)


def distance_weighted(pool: Pool, draws: Tensor) -> tuple[Triplets, Hardest]:
    """For every pair of an anchor and a positive a negative drawn with a probability that evens out its distance.

    The probability is inverse to the density q(d) of distances between random points of the sphere, log q(d) =
    (n - 2) log d + (n - 3) / 2 log(1 - d^2 / 4), with d at least 0.5; negatives beyond 1.4 are drawn, evenly, only where there is
    none nearer.

    Args:
        draws: uniform numbers in [0, 1), one for each anchor and each of its identity's images, shape (b, most).
    Source: Wu, Manmatha, Smola, Krähenbühl 2017, "Sampling Matters in Deep Embedding Learning", equations 3 to 5 and 4.1.
    """
    size = pool.anchors.shape[1]

    def pick(block: _Block) -> _Picked:
        negative = block.negatives > -torch.inf  # (rows, N)
        distance = (2 - 2 * block.negatives).clamp(min=DISTANCE_CUTOFF**2).sqrt()  # (rows, N)
        shape = (1 - distance.square() / 4).clamp(min=1e-8).log()
        weight = (2 - size) * distance.log() - (size - 3) / 2 * shape
        weight = weight.masked_fill(~negative | (distance >= LOSS_CUTOFF), -torch.inf)
        near = (weight > -torch.inf).any(1, keepdim=True)
        weight = torch.where(near, (weight - weight.amax(1, keepdim=True)).exp(), negative.to(weight.dtype))
        return block.columns, _drawn(weight, draws[block.rows]), block.there & block.hardest.valid[:, None]

    return _mined(pool, pick, draws.shape[1])


def random_triplets(pool: Pool, draws: Tensor) -> tuple[Triplets, Hardest]:
    """One positive and one negative for each anchor, drawn evenly: the way that mining is compared with.

    Args:
        draws: uniform numbers in [0, 1), shape (b, most), with at least two columns.
    """

    def pick(block: _Block) -> _Picked:
        place = _drawn(block.there.double(), draws[block.rows, :1])
        negatives = _drawn((block.negatives > -torch.inf).double(), draws[block.rows, 1:2])
        return block.columns.gather(1, place), negatives, block.hardest.valid[:, None]

    return _mined(pool, pick, draws.shape[1])


@torch.no_grad()
def _mined(pool: Pool, pick: Callable[[_Block], _Picked], most: int | None) -> tuple[Triplets, Hardest]:
    pool, runs = pool.detach(), pool.runs(most)
    picked, hardest = Collected(len(pool.anchors)), Collected(len(pool.anchors))
    for rows, similarity in pool.blocks():
        columns, there = runs.columns(rows)
        found, same = hardest_of(similarity, columns, there)
        hardest.put(rows, *found)
        picked.put(rows, *pick(_Block(rows, similarity, columns, there, same, found)))
    positives, chosen, valid = picked  # (b, w) each
    anchors = torch.arange(len(positives), device=positives.device)[:, None].expand_as(positives)
    return Triplets(*(part.flatten() for part in (anchors, positives, chosen, valid))), Hardest(*hardest)


def _nearest_beyond(limit: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity and column of the nearest negative that is less similar than the limit (rows, 1); -inf: none."""
    return largest(negatives.masked_fill(negatives >= limit, -torch.inf))


def _drawn(weight: Tensor, draws: Tensor) -> Tensor:
    """Columns drawn in proportion to the weights (rows, N), at least 0, with uniform numbers (rows, w); shape (rows, w)."""
    cumulative = weight.double().contiguous().cumsum(1)  # (rows, N)
    total = cumulative[:, -1:]
    wanted = torch.minimum(draws.double() * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True).clamp(max=weight.shape[1] - 1)
