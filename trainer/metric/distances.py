"""Distances between embeddings: squared L2 of unit vectors, 2 - 2 cos, in [0, 4], or its root, in [0, 2]."""

import torch
from torch import Tensor

_SMALLEST = 1e-12
_CACHED = 1 << 18
"""Numbers of each side held at once: 1 MiB in float32, which stays in a core's cache."""


def paired_distance(x: Tensor, y: Tensor, squared: bool) -> Tensor:
    """L2 distance of row i of x and row i of y, squared or its root.

    Computed from the difference, which keeps its precision and its gradient where the two are close. The root's gradient at
    identical rows is 0, not infinite.

    Args:
        x, y: shape (n, d).
    Returns:
        Shape (n,).
    """
    distance = (x - y).square().sum(1)
    return distance if squared else distance.clamp(min=_SMALLEST).sqrt()


def pairwise_squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared L2 distance of every row of x (n, d) to every row of y (m, d), shape (n, m), at least 0."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None]
    return torch.addmm(squares, x, y.T, alpha=-2).clamp(min=0)


def cosines_of_pairs(embeddings: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Inner product, in float64, of row first[i] and row second[i] of unit embeddings (n, d); shape (p,), any number of pairs.

    The result is made once and filled: small tensors kept between large ones leave holes in glibc's heap.
    """
    cosines, block = torch.empty(len(first), dtype=torch.float64), rows_at_once(embeddings)
    for begin in range(0, len(first), block):
        one, other = (embeddings[rows[begin : begin + block]].double() for rows in (first, second))  # (block, d)
        cosines[begin : begin + block] = (one * other).sum(1)
    return cosines


def rows_at_once(embeddings: Tensor) -> int:
    """How many rows of two sides to take at a time where there are too many to hold."""
    return max(1, _CACHED // embeddings.shape[1])
