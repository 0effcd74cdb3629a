"""Anchors and what they are compared with, some rows at a time: nothing here ever holds all similarities at once."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SIMILARITIES = 2**20
"""Comparisons held at once (at least one anchor's): bounds the extra memory of mining, whatever the batch."""


class Pool(NamedTuple):
    """This rank's anchors, and the candidates of all ranks."""

    anchors: Tensor
    """Embeddings of this rank, unit norm, shape (b, d)."""
    anchor_identities: Tensor
    """Their labels, shape (b,)."""
    candidates: Tensor
    """Embeddings of all ranks in rank order, shape (N, d)."""
    candidate_identities: Tensor
    """Their labels, shape (N,)."""
    self_columns: Tensor
    """Which candidate each anchor is itself, shape (b,)."""

    @classmethod
    def of(cls, embeddings: Tensor, identities: Tensor) -> "Pool":
        """Every embedding is an anchor, among all of them: what one process with the whole batch has."""
        return cls(embeddings, identities, embeddings, identities, torch.arange(len(embeddings)).to(embeddings.device))

    def detach(self) -> "Pool":
        return self._replace(anchors=self.anchors.detach(), candidates=self.candidates.detach())

    def rows(self, at_once: int | None = None) -> Iterator[slice]:
        """Ranges of anchors whose comparisons with all candidates are made together."""
        step = max(1, (at_once or SIMILARITIES) // max(1, len(self.candidates)))
        return (slice(begin, begin + step) for begin in range(0, len(self.anchors), step))

    def same(self, rows: slice) -> Tensor:
        """Whether candidates have the anchor's identity, the anchor itself included; bool, shape (rows, N)."""
        return self.anchor_identities[rows, None] == self.candidate_identities[None]

    def positive_columns(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Columns of each anchor's positives in ascending order, and which of them are there; shape (b, most) each.

        Args:
            most: images of one identity among the candidates, at most; None counts them, which waits for the device.
        """
        order = self.candidate_identities.argsort(stable=True)  # (N,)
        ordered = self.candidate_identities[order]
        begin = torch.searchsorted(ordered, self.anchor_identities)  # (b,)
        end = torch.searchsorted(ordered, self.anchor_identities, right=True)  # (b,)
        width = int((end - begin).max()) if most is None and len(begin) else most or 0
        places = begin[:, None] + torch.arange(width, device=order.device)  # (b, most)
        columns = order[places.clamp(max=len(order) - 1)]
        return columns, (places < end[:, None]) & (columns != self.self_columns[:, None])


class Hardest(NamedTuple):
    """The farthest positive and the nearest negative of each anchor, without gradient; each of shape (b,)."""

    positives: Tensor
    """Columns."""
    negatives: Tensor
    positive_similarity: Tensor
    """Of an anchor that is not valid it means nothing, as do the others."""
    negative_similarity: Tensor
    valid: Tensor
    """Whether the anchor has a positive and a negative among the candidates, bool."""

    def distances(self, squared: bool) -> tuple[Tensor, Tensor]:
        """d_ap and d_an, shape (b,) each: 2 - 2 s, or its root."""
        both = (2 - 2 * self.positive_similarity, 2 - 2 * self.negative_similarity)
        d_ap, d_an = (distance.clamp(min=0) for distance in both)
        return (d_ap, d_an) if squared else (d_ap.sqrt(), d_an.sqrt())


def hardest_of(similarity: Tensor, same: Tensor, self_columns: Tensor) -> Hardest:
    """Of a block of anchors; of equally distant candidates the first, so that the choice does not depend on the ranks.

    Args:
        similarity: to all candidates, shape (rows, N). same: as `Pool.same`. self_columns: shape (rows,).
    """
    negative, negatives = similarity.masked_fill(same, -torch.inf).max(1)
    farthest = similarity.masked_fill(~same, torch.inf)
    farthest.scatter_(1, self_columns[:, None], torch.inf)
    positive, positives = farthest.min(1)
    return Hardest(positives, negatives, positive, negative, (positive < torch.inf) & (negative > -torch.inf))


def joined(parts: list[Hardest]) -> Hardest:
    return Hardest(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
