"""Which gallery rows can be among the k nearest of some probes, by products that are rounded, with errors that are bounded."""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.evaluation.search.similarity import Rows, keys_of, padded, similarities, summing_error

MOST_NEAR = 256
"""Rows near a probe, beyond 4 k, from which on it is left to the next precision."""
_LOWEST = torch.finfo(torch.float32).min


class Rounded(NamedTuple):
    """Vectors in the type of a product, and how far they are from what they were."""

    rows: Tensor
    """Shape (r, d)."""
    lengths: Tensor
    """L2 norms before rounding, shape (r,)."""
    errors: Tensor
    """L2 norms of what rounding took away, shape (r,)."""


def rounded(rows: Tensor, dtype: torch.dtype) -> Rounded:
    """
    Args:
        rows: float32, shape (r, d).
    """
    held = rows.to(dtype)
    errors = torch.zeros(len(rows), device=rows.device) if dtype == rows.dtype else (rows - held.float()).norm(dim=1)
    return Rounded(held, rows.norm(dim=1), errors)


def bound(probes: Rounded, gallery: Rounded) -> Tensor:
    """How far, before it is itself rounded, the product of each probe and any of the gallery's rows is off at most, shape (r,).

    Source: with x' = x + e and y' = y + f, |xy - x'y'| <= |x||f| + |e||y'| (Cauchy, Schwarz); and `summing_error`.
    """
    lost = gallery.errors.max()
    longest = gallery.lengths.max() + lost
    summed = (probes.lengths + probes.errors) * longest * summing_error(probes.rows.shape[1])
    return 1.001 * (probes.lengths * lost + probes.errors * longest + summed)


class Near:
    """The gallery rows, as far as it has been seen, that can be among the k nearest of each probe of a block."""

    def __init__(self, probes: Rounded, k: int) -> None:
        self.probes, self.k = probes, k
        device = probes.rows.device
        self._relative = torch.finfo(probes.rows.dtype).eps / 2 if probes.rows.dtype != torch.float32 else 0.0
        self._floor = torch.full((len(probes.rows),), -inf, device=device)  # the k-th similarity is at least this
        self._crowded = torch.zeros(len(probes.rows), dtype=torch.bool, device=device)
        self._most = MOST_NEAR + 4 * k
        whole = torch.empty(0, dtype=torch.int64, device=device)
        self._found = [(whole, whole, torch.empty(0, device=device), torch.empty(0, device=device))]
        self._held, self._pruned = 0, 0

    def see(self, block: Tensor, first: int, off: Tensor, group: int) -> None:
        """Takes the products of all probes with some gallery rows.

        Args:
            block: shape (r, c), c a multiple of `group`, of the product's type; -inf where there is no row.
            first: position of its first column.
            off: see `bound`, shape (r,).
            group: columns of which first the largest product alone is looked at.
        """
        members = block.view(len(block), group, -1)  # (r, group, c / group)
        largest = members.amax(1) if group > 1 else block
        if not self._held:
            enough = largest if largest.shape[1] >= self.k else block
            self._floor = self._at_least(enough.topk(self.k).values[:, -1].float(), off)
            self._floor[self._crowded] = inf
        limit = self._limit(off)[:, None]  # (r, 1)
        near = largest >= limit
        self._leave(near.sum(1) > self._most, near)
        rows, groups = near.nonzero().unbind(1)
        values = members[rows, :, groups].float()  # (p, group)
        pairs, member = (values >= limit[rows]).nonzero().unbind(1)
        positions = first + member[...] * members.shape[2] + groups[pairs]
        self._keep(rows[pairs], positions, values[pairs, member], off)

    def ranked(self, gallery: Rows, probes: Tensor) -> tuple[Tensor, Tensor]:
        """The keys of each probe's k nearest, shape (r, k), descending, and of which probes they are not known, shape (r,).

        Args:
            probes: before rounding, float32, shape (r, d).
        """
        rows, positions = self._prune()
        keys = keys_of(similarities(gallery, positions, probes, rows), positions)
        table = padded(keys, rows, len(probes), keys_of(torch.tensor([-inf]), torch.tensor([0])).item())
        missing = self.k - table.shape[1]
        if missing > 0:  # all probes are crowded
            table = torch.cat([table, table.new_zeros(len(table), missing)], 1)
        return table.topk(self.k).values, self._crowded

    def _keep(self, rows: Tensor, positions: Tensor, values: Tensor, off: Tensor) -> None:
        slack = values.abs() * self._relative / (1 - self._relative) + off[rows]
        self._found.append((rows, positions, values - slack, values + slack))
        self._held += len(rows)
        if self._held > 2 * self._pruned + self.k * len(off):
            self._prune()

    def _prune(self) -> tuple[Tensor, Tensor]:
        """Drops what can no longer be among the k nearest; rows and positions of what is left."""
        rows, positions, least, most = (torch.cat(parts) for parts in zip(*self._found, strict=True))
        table = padded(least, rows, len(self._floor), -inf)  # (r, most near a probe)
        if table.shape[1] >= self.k:
            self._floor = torch.maximum(self._floor, table.topk(self.k).values[:, -1])
        kept = most >= self._floor[rows]
        self._leave(torch.bincount(rows[kept], minlength=len(self._floor)) > self._most)
        kept &= ~self._crowded[rows]
        self._found = [(rows[kept], positions[kept], least[kept], most[kept])]
        self._held = self._pruned = int(kept.sum())
        return self._found[0][:2]

    def _leave(self, crowded: Tensor, near: Tensor | None = None) -> None:
        self._crowded |= crowded
        self._floor[crowded] = inf
        if near is not None:
            near[crowded] = False

    def _at_least(self, values: Tensor, off: Tensor) -> Tensor:
        return values - values.abs() * self._relative / (1 - self._relative) - off

    def _limit(self, off: Tensor) -> Tensor:
        """The smallest value that a product may have whose pair has a similarity of the floor or more."""
        least = self._floor - off
        return (least - least.abs() * self._relative / (1 - 2 * self._relative)).clamp(min=_LOWEST)
