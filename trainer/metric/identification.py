"""Closed-set identification: ranks, the CMC, votes of neighbours, centroids. Neighbours are found elsewhere.

Terms as in ISO/IEC 19795-1: a *gallery* is enrolled, a *probe* is searched for, a probe is *mated* when its identity is
enrolled. "Rank-k" counts identities, not images: an identity stands where its best gallery image stands.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.metric.verification import threshold_at, wilson_interval

_BLOCK = 1 << 24
"""Comparisons held at once while voting."""


def occurrence(identities: Tensor) -> Tensor:
    """How many earlier samples have the same identity; shape (n,), int64, in the order given.

    Example: identities [7, 3, 7, 7] -> [0, 0, 1, 2].
    """
    order = identities.argsort(stable=True)
    _, counts = torch.unique_consecutive(identities[order], return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)  # (n,)
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device) - starts
    return result


def split_gallery(identities: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Positions of the gallery (the first `images` of each identity, in the order given) and of the probes (the rest).

    An identity with no more than `images` samples is enrolled, as a distractor, and has no probe.

    Args:
        identities: shape (n,).
        images: gallery images of each identity, at least 1.
    Returns:
        gallery positions, shape (m,), and probe positions, shape (n - m,), both ascending.
    """
    enrolled = occurrence(identities) < images
    return enrolled.nonzero().squeeze(1), (~enrolled).nonzero().squeeze(1)


def mated_ranks(neighbours: Tensor, probes: Tensor) -> Tensor:
    """The rank of each probe's own identity among the identities of its neighbours.

    Args:
        neighbours: identities of the gallery images nearest to each probe, nearest first, shape (n, k).
        probes: identities of the probes, shape (n,).
    Returns:
        ranks from 1, shape (n,), int64; 0 where the identity is not among the neighbours.
    Example: neighbours [4, 4, 9], probe 9 -> 2: identity 4 stands before it, once.
    """
    by_identity = neighbours.argsort(dim=1, stable=True)
    sorted_ids = neighbours.gather(1, by_identity)
    starts = torch.ones_like(sorted_ids)
    starts[:, 1:] = (sorted_ids[:, 1:] != sorted_ids[:, :-1]).long()
    first_seen = torch.empty_like(starts).scatter_(1, by_identity, starts)  # (n, k): 1 at an identity's best image
    mates = neighbours == probes[:, None]
    ranks = first_seen.cumsum(dim=1).masked_fill(~mates, neighbours.shape[1] + 1).min(dim=1).values
    return torch.where(mates.any(dim=1), ranks, torch.zeros_like(ranks))


def cumulative_match(ranks: Tensor, longest: int) -> Tensor:
    """The CMC: entry r - 1 is the fraction of probes whose identity stands at rank r or better.

    Args:
        ranks: as `mated_ranks` gives them, shape (n,); 0 counts as a miss at every rank.
        longest: the last rank, at least 1.
    Returns:
        fractions in [0, 1], non-decreasing, shape (longest,), float64.
    """
    hits = torch.bincount(ranks.clamp(max=longest + 1), minlength=longest + 2)[1 : longest + 1]
    return hits.cumsum(0).double() / len(ranks)


def without_self(neighbours: Tensor, own: Tensor) -> Tensor:
    """Leave-one-out: each row of k + 1 neighbours without the probe itself, or without the last where it is absent.

    Args:
        neighbours: gallery positions, nearest first, shape (n, k + 1).
        own: each probe's own gallery position, shape (n,).
    Returns:
        gallery positions, shape (n, k), order kept.
    """
    drop = neighbours == own[:, None]
    drop[:, -1] |= ~drop.any(dim=1)
    return neighbours[~drop].view(len(neighbours), -1)


def majority_vote(neighbours: Tensor, k: int) -> Tensor:
    """The identity most frequent among the k nearest; a tie goes to the one whose best image is nearer.

    Args:
        neighbours: identities, nearest first, shape (n, at least k).
        k: how many of them vote.
    Returns:
        identities, shape (n,).
    Example: [5, 8, 8, 5], k = 4 -> 5; k = 3 -> 8; k = 2 -> 5.
    """
    voters = neighbours[:, :k]
    nearness = torch.arange(k, 0, -1, device=voters.device)  # unique, so that argmax has no ties
    winners = []
    for block in voters.split(max(1, _BLOCK // (k * k))):
        votes = (block[:, :, None] == block[:, None, :]).sum(dim=2)  # (rows, k)
        winners.append(block.gather(1, (votes * (k + 1) + nearness).argmax(dim=1, keepdim=True)).squeeze(1))
    return torch.cat(winners) if winners else voters[:, 0]


def distance_vote(neighbours: Tensor, similarities: Tensor, k: int) -> Tensor:
    """The identity whose images among the k nearest have the largest sum of 1 / distance; a tie goes to the nearer one.

    Where neighbours lie at distance 0, only they vote.

    Args:
        neighbours: identities, nearest first, shape (n, at least k).
        similarities: cosines to them, in the same order, shape (n, at least k).
        k: how many of them vote.
    Returns:
        identities, shape (n,).
    Source: Dudani 1976, "The Distance-Weighted k-Nearest-Neighbor Rule", in the form of scikit-learn's weights="distance".
    """
    voters = neighbours[:, :k]
    distance = (2 - 2 * similarities[:, :k].double()).clamp(min=0).sqrt()  # (n, k)
    at_zero = distance == 0
    weights = torch.where(at_zero.any(1, keepdim=True), at_zero.double(), 1 / distance.masked_fill(at_zero, 1))
    winners = []
    for rows, weight in zip(*(part.split(max(1, _BLOCK // (k * k))) for part in (voters, weights)), strict=True):
        votes = ((rows[:, :, None] == rows[:, None, :]) * weight[:, None, :]).sum(dim=2)  # (rows, k)
        winners.append(rows.gather(1, votes.argmax(dim=1, keepdim=True)).squeeze(1))  # of equal ones the first
    return torch.cat(winners) if winners else voters[:, 0]


@dataclass(frozen=True)
class OpenSetPoint:
    """TPIR at an FPIR of at most `target`."""

    target: float
    fpir: float
    """Attained, at most `target`."""
    tpir: float
    low: float
    high: float
    """95 % Wilson interval of `tpir`."""
    threshold: float
    """Similarity that the best gallery image must exceed."""


def tpir_at_fpir(mated: Tensor, right: Tensor, nonmated: Tensor, fpir: float) -> OpenSetPoint:
    """Open-set identification: probes whose identity is not enrolled must raise no alarm.

    A probe raises an alarm when its best gallery similarity exceeds the threshold. FPIR is the share of non-mated probes that
    do; TPIR that of mated probes that do and whose best gallery image is of their identity. The threshold is the lowest whose
    FPIR is at most the target.

    Args:
        mated: best gallery similarity of each probe that is enrolled, shape (n,).
        right: whether that image is of the probe's identity, bool, shape (n,).
        nonmated: best gallery similarity of each probe that is not enrolled, shape (m,).
        fpir: target in (0, 1); m * fpir must be at least 10.
    Raises:
        ValueError: `fpir` is not in (0, 1), there is no mated probe, or too few non-mated ones for it.
    Source: ISO/IEC 19795-1; NIST FRVT part 2; IJB-C 1:N (Maze et al. 2018), with rank 1.
    """
    if not len(mated):
        raise ValueError("there is no mated probe; at least one is needed")
    threshold, attained = threshold_at(nonmated, fpir, "non-mated probes", "FPIR")
    found = int(((mated > threshold) & right).sum())
    return OpenSetPoint(fpir, attained, found / len(mated), *wilson_interval(found, len(mated)), threshold)


def cumulative_match_band(
    ranks: Tensor, identities: Tensor, longest: int, draws: int = 1000, seed: int = 0, coverage: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Confidence band of the CMC by the bootstrap over identities: probes of one identity are not independent.

    Args:
        ranks: as `mated_ranks` gives them, shape (n,); 0 counts as a miss at every rank.
        identities: of the probes, shape (n,).
        longest: the last rank.
        draws: of as many identities as there are, with replacement.
    Returns:
        lower and upper ends at each rank (pointwise percentiles), shape (longest,) each, float64.
    Source: Bolle, Ratha, Pankanti 2004, "Error analysis of pattern recognition systems - the subsets bootstrap".
    """
    _, inverse = identities.unique(return_inverse=True)
    count = int(inverse.max()) + 1
    place = torch.where(ranks == 0, longest + 1, ranks.clamp(max=longest + 1)) - 1  # (n,)
    hits = torch.zeros(count * (longest + 1), dtype=torch.float64)
    hits.index_add_(0, inverse * (longest + 1) + place, torch.ones(len(ranks), dtype=torch.float64))
    matched = hits.view(count, -1).cumsum(1)  # (identities, longest + 1); the last column counts the probes
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for _ in range(draws):
        drawn = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count).double()
        sums = drawn @ matched
        curves.append(sums[:longest] / sums[longest])
    ends = torch.tensor([(1 - coverage) / 2, (1 + coverage) / 2], dtype=torch.float64)
    low, high = torch.stack(curves).quantile(ends, dim=0)
    return low, high


def centroids(embeddings: Tensor, identities: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """The unit-length mean of the first `images` embeddings of each identity (of all, where it has fewer).

    Args:
        embeddings: unit vectors, shape (n, d).
        identities: shape (n,).
        images: at least 1.
    Returns:
        centroids, shape (c, d), and their identities, shape (c,), ascending.
    """
    chosen = occurrence(identities) < images
    unique, inverse = identities[chosen].unique(return_inverse=True)
    sums = torch.zeros(len(unique), embeddings.shape[1], dtype=embeddings.dtype, device=embeddings.device)
    return normalize(sums.index_add_(0, inverse, embeddings[chosen]), dim=1), unique
