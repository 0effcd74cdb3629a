"""How well everything of an identity is retrieved: average precision, R-precision. Neighbours are found elsewhere."""

from typing import NamedTuple

import torch
from torch import Tensor


class Retrieval(NamedTuple):
    """Of each query, float64, shape (n,). Queries without another image of their identity have NaN."""

    average_precision: Tensor
    """Mean, over the relevant images, of the precision at the place of each; needs the whole ranking."""
    r_precision: Tensor
    """Share of relevant images among the first R, R the number of relevant images."""
    average_precision_at_r: Tensor
    """Mean over the first R places of the precision there, places of other identities counted 0."""


def retrieval(ranked: Tensor, queries: Tensor) -> Retrieval:
    """
    Args:
        ranked: identities of all other images, nearest first, shape (n, m).
        queries: identities of the queries, shape (n,).
    Source: average precision: Manning, Raghavan, Schütze 2008, 8.4; the others: Musgrave, Belongie, Lim 2020, "A Metric
        Learning Reality Check", 3.2 (MAP@R).
    Example: ranked [a, b, a], query a: R = 2, average precision (1/1 + 2/3) / 2, R-precision 1/2, at R 1/2.
    """
    hits = ranked == queries[:, None]  # (n, m)
    relevant = hits.sum(1)  # (n,) R
    place = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    precision = hits.cumsum(1).double() / place  # (n, m)
    first = hits & (place <= relevant[:, None])
    divisor = relevant.double()
    divisor[relevant == 0] = torch.nan
    return Retrieval(
        (precision * hits).sum(1) / divisor, first.sum(1).double() / divisor, (precision * first).sum(1) / divisor
    )
