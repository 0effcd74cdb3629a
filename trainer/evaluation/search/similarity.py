"""What the similarity of two embeddings is, and the order of neighbours: for every search engine the same.

The similarity of a pair *is* its float64 inner product rounded to float32. Reason: BLAS gives two equal rows inner products that
differ in the last bit, by where they lie in its blocks. Neighbours are ordered by descending similarity, and equal similarities
by ascending gallery position.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

Rows = Tensor | np.ndarray
"""Vectors, shape (m, d), of any floating type; an array may be a memory map."""

CHUNK = 1 << 16
"""Rows read at a time."""
NONE = -(1 << 63)
"""A key below all keys: no neighbour."""

_CACHED = 1 << 19
"""Numbers held at once while pairs are compared: 4 MiB as float64, which stays in a core's cache."""
_LAST = (1 << 32) - 1
_SUMMED = 512
"""The most numbers that a BLAS adds up one after the other; beyond that it adds sums."""


def summing_error(size: int) -> float:
    """The largest error that a float32 inner product of two unit vectors of `size` numbers is taken to have, at torch's default
    precision of products, "highest".

    Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, eq. 3.5, for sums of at most 512; at least 1e-5.
    """
    return max(1e-5, min(size, _SUMMED) * 2.0**-24)


def read(rows: Rows, device: str | torch.device = "cpu") -> Tensor:
    """The rows as float32 on a device.

    Raises:
        ValueError: one of them is not finite.
    """
    held = torch.from_numpy(np.array(rows, dtype=np.float32)) if isinstance(rows, np.ndarray) else rows.detach()
    held = held.to(device, torch.float32).contiguous()
    if not (torch.isfinite(held.sum()) or torch.isfinite(held).all()):
        raise ValueError("gallery or probes hold a number that is not finite; neighbours are not defined")
    return held


def chunks(rows: Rows, device: str | torch.device = "cpu") -> Iterator[tuple[int, Tensor]]:
    """Where each chunk begins, and its rows as float32; see `read`."""
    for begin in range(0, len(rows), CHUNK):
        yield begin, read(rows[begin : begin + CHUNK], device)


def similarities(gallery: Rows, positions: Tensor, probes: Tensor, rows: Tensor) -> Tensor:
    """The similarity, by the definition above, of the gallery row at each position and a row of the probes, shape (p,)."""
    found = torch.empty(len(positions), device=probes.device)
    step = max(1, _CACHED // probes.shape[1])
    for begin in range(0, len(positions), step):
        some = slice(begin, begin + step)
        theirs = _picked(gallery, positions[some], probes.device)  # (p, d)
        found[some] = theirs.double().mul_(probes[rows[some]]).sum(1)
    return found


def _picked(gallery: Rows, positions: Tensor, device: torch.device) -> Tensor:
    if isinstance(gallery, np.ndarray):
        return torch.from_numpy(gallery[positions.cpu().numpy()].astype(np.float32)).to(device)
    return gallery.detach()[positions.to(gallery.device)].to(device, torch.float32)


def keys_of(similarities: Tensor, positions: Tensor) -> Tensor:
    """One int64 for a neighbour, larger for nearer ones: its similarity's bits, made monotone, above its negated position.

    Args:
        similarities: float32. positions: int64 below 2^32, of a shape that broadcasts to it.
    """
    bits = (similarities + 0.0).view(torch.int32).long()  # + 0.0: a negative zero is zero
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) | (_LAST - positions)


def neighbours_of(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities, float32, and positions, int64: `keys_of` undone."""
    bits = keys >> 32
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).int().view(torch.float32), _LAST - (keys & _LAST)


def padded(values: Tensor, rows: Tensor, count: int, fill: float) -> Tensor:
    """Values of the same row side by side, in their order, shape (count, most values of a row).

    Args:
        values: shape (p,). rows: shape (p,), in [0, count).
    """
    rows, order = rows.sort(stable=True)
    held = torch.bincount(rows, minlength=count)
    places = torch.arange(len(rows), device=rows.device) - (held.cumsum(0) - held)[rows]
    table = values.new_full((count, int(held.max()) if len(rows) else 0), fill)
    table[rows, places] = values[order]
    return table
