"""Distances between embeddings: squared L2 of unit vectors, 2 - 2 cos, in [0, 4], or its root, in [0, 2]."""

import torch
from torch import Tensor

_SMALLEST = 1e-12


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
