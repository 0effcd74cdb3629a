"""Anchors and what they are compared with, some rows at a time: nothing here ever holds all similarities at once."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SIMILARITIES = 2**21
"""Comparisons held at once (at least one anchor's): bounds the extra memory of mining, whatever the batch."""
_WINDOW = 64
"""Neighbouring candidates of which the nearest is found at once."""


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

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some anchors at a time: their rows, and their similarities to all candidates (rows, N), overwritten by the next.

        They lie in memory candidate by candidate: of many candidates and few anchors that product is the faster one.
        """
        count = len(self.candidates)
        step = min(max(1, SIMILARITIES // max(1, count)), len(self.anchors))
        memory = self.candidates.new_empty(count, step)
        for begin in range(0, len(self.anchors), max(1, step)):
            mine = self.anchors[begin : begin + step]  # (rows, d)
            similarity = memory[:, : len(mine)]  # (N, rows)
            torch.mm(self.candidates, mine.T, out=similarity)
            yield slice(begin, begin + len(mine)), similarity.T

    def runs(self, most: int | None = None) -> "Runs":
        """Where each anchor's identity is among the candidates.

        Args:
            most: images of one identity among the candidates, at most; None counts them, which waits for the device.
        """
        order = self.candidate_identities.argsort(stable=True)  # (N,)
        ordered = self.candidate_identities[order]
        begin = torch.searchsorted(ordered, self.anchor_identities)  # (b,)
        end = torch.searchsorted(ordered, self.anchor_identities, right=True)  # (b,)
        if most is None:
            most = int((end - begin).max()) if len(begin) else 0
        return Runs(order, begin, end, self.self_columns, most)


class Runs(NamedTuple):
    """The candidates in the order of their identities, and the stretch of them that has each anchor's."""

    order: Tensor
    """Columns, shape (N,); ascending within an identity."""
    begin: Tensor
    """Shape (b,)."""
    end: Tensor
    self_columns: Tensor
    most: int
    """Longest stretch."""

    def columns(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Columns of the candidates with the anchor's identity, ascending, and which of them are positives; (rows, most) each.

        The anchor itself is among them, once in its place and wherever its identity has fewer images.
        """
        places = self.begin[rows, None] + torch.arange(self.most, device=self.order.device)
        inside = places < self.end[rows, None]
        own = self.self_columns[rows, None]
        columns = torch.where(inside, self.order[places.clamp(max=len(self.order) - 1)], own)
        return columns, columns != own


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


def hardest_of(similarity: Tensor, columns: Tensor, there: Tensor) -> tuple[Hardest, Tensor]:
    """Of a block of anchors; of equally distant candidates the first, so that the choice does not depend on the ranks.

    Writes -inf in the place of everything of the anchor's identity.

    Args:
        similarity: to all candidates, shape (rows, N). columns, there: see `Runs.columns`.
    Returns:
        The hardest, and the similarities of `columns` as they were, shape (rows, most).
    """
    same = similarity.gather(1, columns)  # (rows, most)
    positive, at = same.masked_fill(~there, torch.inf).min(1)
    negative, nearest = largest(similarity.scatter_(1, columns, -torch.inf))
    valid = (positive < torch.inf) & (negative > -torch.inf)
    return Hardest(columns.gather(1, at[:, None])[:, 0], nearest, positive, negative, valid), same


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values.max(1)`, of equal ones the first, ten times as fast on a CPU, where an index is what costs: the best window first.

    Args:
        values: shape (rows, n), without NaN; fast where they lie column by column, as `Pool.blocks` gives them.
    Returns:
        Values and columns, shape (rows,) each.
    """
    whole = values.shape[1] // _WINDOW * _WINDOW
    if whole <= _WINDOW:
        return values.max(1)
    windows = values.T[:whole].unflatten(0, (-1, _WINDOW)).amax(1)  # (n / 64, rows)
    begin = windows.argmax(0) * _WINDOW  # (rows,)
    columns = begin[:, None] + torch.arange(_WINDOW, device=values.device)  # (rows, 64)
    found, at = values.gather(1, columns).max(1)
    column = begin + at
    if whole < values.shape[1]:
        rest, at = values[:, whole:].max(1)
        column = torch.where(rest > found, whole + at, column)
        found = torch.maximum(found, rest)
    return found, column


class Collected:
    """Puts the results of blocks of rows together, in memory that is taken once: small pieces that stay between large ones that
    go leave holes, and the process grows by a matrix that nobody holds."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._whole: list[Tensor] = []

    def put(self, rows: slice, *values: Tensor) -> None:
        if not self._whole:
            self._whole = [value.new_empty((self._rows, *value.shape[1:])) for value in values]
        for whole, value in zip(self._whole, values, strict=True):
            whole[rows] = value

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._whole)
