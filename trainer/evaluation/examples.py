"""Which pictures a report shows: the hardest pairs, the worst Rank-5 misses, and the samples of the projections.

Pure functions of embeddings and identities: exact, in blocks, so that memory does not grow with the square of the set.
"""

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

PAIRS, MISSES = 24, 24
"""How many of each are kept."""
MISSED_RANK = 5
"""A probe whose identity stands beyond this rank is missed."""
SHOWN_IDENTITIES, SHOWN_IMAGES = 20, 20
"""What a projection shows: so many identities, of each at most so many images."""

_TILE = 2048
"""Rows and columns compared at once: 32 MiB of float64."""


@dataclass(frozen=True)
class Pair:
    """Two images, by their positions among the embeddings, first < second."""

    first: int
    second: int
    distance: float
    """Root L2 distance of the unit vectors, in [0, 2]."""


@dataclass(frozen=True)
class Miss:
    """A probe whose identity is not among the best `MISSED_RANK`; positions among the embeddings."""

    probe: int
    right: int
    """The gallery image of the probe's identity."""
    found: int
    """The gallery image found first."""
    rank: int
    """Of the probe's identity, from 1."""
    right_distance: float
    found_distance: float


@dataclass(frozen=True)
class Examples:
    genuine: list[Pair]
    """Most distant first."""
    impostor: list[Pair]
    """Nearest first."""
    misses: list[Miss]
    """Worst rank first."""
    samples: int
    identities: int
    probes: int
    missed: int
    """Probes missed in all, of `probes`."""

    def positions(self) -> set[int]:
        """Every image that takes part."""
        pairs = {place for pair in self.genuine + self.impostor for place in (pair.first, pair.second)}
        return pairs | {place for miss in self.misses for place in (miss.probe, miss.right, miss.found)}

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        genuine, impostor = ([Pair(**pair) for pair in found[name]] for name in ("genuine", "impostor"))
        counts = [int(found[name]) for name in ("samples", "identities", "probes", "missed")]
        return cls(genuine, impostor, [Miss(**miss) for miss in found["misses"]], *counts)


def find_examples(embeddings: Tensor, identities: Tensor) -> Examples:
    """The hardest pairs and worst misses of one set.

    Args:
        embeddings: shape (n, d), finite, not zero; scaled to unit length here.
        identities: shape (n,).
    """
    genuine, impostor = hardest_pairs(embeddings, identities, PAIRS)
    misses, probes, missed = worst_misses(embeddings, identities, MISSES)
    return Examples(genuine, impostor, misses, len(identities), len(identities.unique()), probes, missed)


def hardest_pairs(embeddings: Tensor, identities: Tensor, count: int) -> tuple[list[Pair], list[Pair]]:
    """The `count` genuine pairs with the largest distance and the `count` impostor pairs with the smallest, of all pairs.

    Of equally distant pairs the one whose images come first in the set comes first.

    Args:
        embeddings: shape (n, d), finite, not zero.
        identities: shape (n,).
        count: how many of each, at least 1; fewer where the set has fewer.
    """
    points = normalize(embeddings.double(), dim=1)
    genuine, impostor = _Best(count), _Best(count)
    for rows in torch.arange(len(points)).split(_TILE):
        for columns in torch.arange(int(rows[0]), len(points)).split(_TILE):
            cosines = points[rows] @ points[columns].T  # (t, t)
            same = identities[rows][:, None] == identities[columns][None, :]
            left_out = same if rows[0] != columns[0] else same | (columns[None, :] < rows[:, None])
            if bool(same.any()):
                once = same & (columns[None, :] > rows[:, None])
                genuine.offer((-cosines).masked_fill(~once, -inf), rows, columns)
                cosines.masked_fill_(left_out, -inf)
            impostor.offer(cosines, rows, columns)
    return _pairs(points, genuine), _pairs(points, impostor)


def worst_misses(embeddings: Tensor, identities: Tensor, count: int) -> tuple[list[Miss], int, int]:
    """Probes whose identity stands beyond rank 5 of a gallery that has the first image of each identity.

    Of two misses at the same rank, the one whose wrong find is nearer by more comes first.

    Args:
        embeddings, identities: as for `hardest_pairs`.
        count: how many at most.
    Returns:
        the misses, worst first; how many probes there are; how many of them are missed.
    """
    points = normalize(embeddings.double(), dim=1)
    _, own, images = np.unique(identities.numpy(), return_index=True, return_inverse=True)
    order = np.argsort(own)  # ties go to the image that comes first, so the gallery is in the set's order
    gallery, mate = torch.from_numpy(own[order]), torch.from_numpy(np.argsort(order)[images])  # (g,), (n,)
    probes = torch.ones(len(points), dtype=torch.bool).index_fill(0, gallery, False).nonzero().squeeze(1)
    found = [_missed(points, gallery, mate, block) for block in probes.split(max(1, _TILE**2 // len(gallery)))]
    table = np.concatenate([np.empty((0, 6)), *found])  # (missed, 6) as in Miss
    order = np.lexsort((table[:, 0], table[:, 5] - table[:, 4], -table[:, 3]))[:count]
    misses = [Miss(*(int(value) for value in row[:4]), *(float(value) for value in row[4:])) for row in table[order]]
    return misses, len(probes), len(table)


def shown_samples(identities: np.ndarray, seed: int = 0) -> np.ndarray:
    """Positions, ascending, of up to 20 images of each of up to 20 identities drawn with the seed, shape (s,).

    An identity with few images shows no cluster: where others have five, those with fewer are not drawn.
    """
    if not len(identities):
        return np.empty(0, np.int64)
    unique, counts = np.unique(identities, return_counts=True)
    several = unique[counts >= min(5, counts.max())]
    chosen = np.random.default_rng(seed).permutation(several)[:SHOWN_IDENTITIES]
    return np.sort(np.concatenate([np.flatnonzero(identities == identity)[:SHOWN_IMAGES] for identity in chosen]))


class _Best:
    """The `count` cells with the highest scores of all tiles offered; of equal ones those that come first."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._bound = -inf
        self.cells = np.empty((0, 3))  # score, row, column

    def offer(self, scores: Tensor, rows: Tensor, columns: Tensor) -> None:
        best = float(scores.max())
        if best == -inf or best < self._bound:
            return
        bound = self._bound
        if bound == -inf:
            bound = float(scores.flatten().topk(min(self._count, scores.numel())).values[-1])
        places = ((scores >= bound) & (scores > -inf)).nonzero()  # (m, 2)
        values = scores[places[:, 0], places[:, 1]]
        new = torch.stack([values, rows[places[:, 0]].double(), columns[places[:, 1]].double()], dim=1)
        cells = np.concatenate([self.cells, new.numpy()])
        self.cells = cells[np.lexsort((cells[:, 2], cells[:, 1], -cells[:, 0]))[: self._count]]
        if len(self.cells) == self._count:
            self._bound = float(self.cells[-1, 0])


def _pairs(points: Tensor, best: _Best) -> list[Pair]:
    places = [(int(row), int(column)) for _, row, column in best.cells]
    return [Pair(row, column, float((points[row] - points[column]).norm())) for row, column in places]


def _missed(points: Tensor, gallery: Tensor, mate: Tensor, probes: Tensor) -> np.ndarray:
    """probe, right, found, rank, right distance, found distance of each missed one, shape (m, 6)."""
    cosines = points[probes] @ points[gallery].T  # (b, g)
    own = mate[probes][:, None]
    right = cosines.gather(1, own)
    earlier = torch.arange(len(gallery))[None, :] < own
    ranks = 1 + ((cosines > right) | ((cosines == right) & earlier)).sum(dim=1)
    missed = (ranks > MISSED_RANK).nonzero().squeeze(1)
    probes, right_at = probes[missed], gallery[own[missed, 0]]
    found_at = gallery[cosines[missed].argmax(dim=1)] if len(missed) else right_at
    distances = [(points[probes] - points[place]).norm(dim=1) for place in (right_at, found_at)]
    whole = [column.double() for column in (probes, right_at, found_at, ranks[missed])]
    return torch.stack([*whole, *distances], dim=1).numpy()
