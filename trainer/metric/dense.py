"""Losses over *all* pairs or triplets, some rows at a time: value and gradient in one pass, without ever holding b x N.

Each rule turns a block of distances (rows, N) into its loss and the loss's derivative by every distance. The derivatives by
the embeddings follow from matrix products and are all that is kept: O(SIMILARITIES + N d) of extra memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainer.metric.pool import Collected, Hardest, Pool, Runs, hardest_of

_SMALLEST_SQUARED = 1e-6
"""Squared distances below this have no gradient through the root: single precision knows them no better."""


class Block(NamedTuple):
    """Some anchors and their distances to all candidates."""

    distance: Tensor
    """In the loss's unit, shape (rows, N)."""
    same: Tensor
    """Same identity, the anchor itself included, bool, shape (rows, N)."""
    positive: Tensor
    """`same` without the anchor itself, bool, shape (rows, N)."""
    columns: Tensor
    """Columns of its identity's candidates, shape (rows, most)."""
    there: Tensor
    """Which of them are positives, bool, shape (rows, most)."""
    valid: Tensor
    """Whether the anchor has a positive and a negative, bool, shape (rows,)."""


class Part(NamedTuple):
    """What a rule makes of a block."""

    loss: Tensor
    """Sum, 0-d."""
    divisor: Tensor
    """What the sum is to be divided by in the end, 0-d, int64."""
    slope: Tensor
    """Derivative of the sum by each distance, shape (rows, N)."""


Rule = Callable[[Block], Part]


def smooth_hard(margin: float, sharpness: float) -> Rule:
    """log(1 + sum over positives and negatives of exp(s (d_ap - d_an + margin))) / s of each valid anchor.

    The log-sum-exp of all positives' and of all negatives' distances in place of their maximum and minimum, which it becomes
    as the sharpness s (in 1 / distance, above 0) grows. All pairs carry gradient, which trains a network from random weights
    where the hardest triplets alone do not (benchmarks/README.md). Counts valid anchors.

    Source: Sun et al. 2020, "Circle Loss", equations 1 to 3 (there on similarities); Hermans et al. 2017, equation 8.
    """

    def rule(block: Block) -> Part:
        keep = block.valid[:, None]
        d_ap = (sharpness * block.distance).masked_fill(~(block.positive & keep), -torch.inf)
        d_an = (-sharpness * block.distance).masked_fill(block.same | ~keep, -torch.inf)
        far, near = d_ap.logsumexp(1, keepdim=True), d_an.logsumexp(1, keepdim=True)  # (rows, 1)
        exponent = (far + near + sharpness * margin).masked_fill(~keep, -torch.inf)
        shares = (d_ap - far.masked_fill(~keep, 0)).exp() - (d_an - near.masked_fill(~keep, 0)).exp()
        return Part(softplus(exponent).sum() / sharpness, block.valid.sum(), exponent.sigmoid() * shares)

    return rule


def batch_all(margin: float | None, average: str) -> Rule:
    """Every triplet of the batch: max(0, d_ap - d_an + margin), or log(1 + exp(d_ap - d_an)) where the margin is None.

    Args:
        average: active counts the triplets with a positive loss, valid counts all triplets.
    Source: Hermans, Beyer, Leibe 2017, equation 6; averaging over active triplets: its section 3.2 and "batch all != 0".
    """

    def rule(block: Block) -> Part:
        slope = torch.zeros_like(block.distance)  # (rows, N)
        loss = slope.new_zeros((), dtype=torch.float64)
        count = torch.zeros((), dtype=torch.int64, device=slope.device)
        for at in range(block.columns.shape[1]):
            column = block.columns[:, at, None]  # (rows, 1)
            usable = ~block.same & block.there[:, at, None]  # (rows, N)
            excess = block.distance.gather(1, column) - block.distance + (margin or 0)
            pull = excess.sigmoid() if margin is None else (excess > 0).to(excess.dtype)
            pull = pull.masked_fill(~usable, 0)
            terms = softplus(excess).masked_fill(~usable, 0) if margin is None else excess * pull
            loss += terms.sum(dtype=torch.float64)
            count += (pull > 0).sum() if margin is not None and average == "active" else usable.sum()
            slope -= pull
            slope.scatter_add_(1, column, pull.sum(1, keepdim=True))
        return Part(loss, count, slope)

    return rule


def contrastive(margin: float) -> Rule:
    """Half the squared distance of positives; of negatives half the square of what they are nearer than the margin.

    For each valid anchor the mean over its positives plus the mean over its negatives with a loss, so that the few positives are
    not drowned. Counts valid anchors.

    Source: Hadsell, Chopra, LeCun 2006, equation 4 (there summed over pairs).
    """

    def rule(block: Block) -> Part:
        gap = (margin - block.distance).clamp(min=0).masked_fill(block.same, 0)  # (rows, N)
        keep = block.valid[:, None]
        positives = block.positive.sum(1, keepdim=True).clamp(min=1)
        near = (gap > 0).sum(1, keepdim=True).clamp(min=1)
        pull = (block.distance / positives).masked_fill(~(block.positive & keep), 0)
        push = (gap / near).masked_fill(~keep, 0)
        return Part((pull * block.distance + push * gap).sum() / 2, block.valid.sum(), pull - push)

    return rule


def dense_loss(pool: Pool, rule: Rule, squared: bool, most: int | None = None) -> tuple[Tensor, Tensor, Hardest]:
    """Sum of a rule's loss over this rank's anchors, with gradient; its divisor; and each anchor's hardest triplet.

    Args:
        squared: the rule sees squared distances in [0, 4] instead of their root in [0, 2].
        most: images of one identity among the candidates, at most; None counts them, which waits for the device.
    Returns:
        loss_sum: 0-d. divisor: 0-d, int64. hardest: without gradient.
    """
    learns = torch.is_grad_enabled() and (pool.anchors.requires_grad or pool.candidates.requires_grad)
    found = _accumulated(pool.detach(), pool.runs(most), rule, squared, learns)
    loss = _Known.apply(pool.anchors, pool.candidates, found.loss, found.by_anchors, found.by_candidates)
    return loss, found.divisor, found.hardest


class _Found(NamedTuple):
    loss: Tensor
    divisor: Tensor
    hardest: Hardest
    by_anchors: Tensor
    by_candidates: Tensor


@torch.no_grad()
def _accumulated(pool: Pool, runs: Runs, rule: Rule, squared: bool, learns: bool) -> _Found:
    anchors, candidates = pool.anchors, pool.candidates
    by_anchors, by_candidates = torch.zeros_like(anchors), torch.zeros_like(candidates)
    squares = candidates.square().sum(1)  # (N,)
    hardest, loss, divisor = Collected(len(anchors)), _zero(anchors, torch.float64), _zero(anchors, torch.int64)
    for rows, similarity in pool.blocks():
        mine = anchors[rows]
        columns, there = runs.columns(rows)
        found, of_identity = hardest_of(similarity, columns, there)
        hardest.put(rows, *found)
        similarity.scatter_(1, columns, of_identity)
        same = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, columns, True)
        distance = torch.add(squares, similarity, alpha=-2, out=similarity)  # (rows, N)
        distance.add_(mine.square().sum(1, keepdim=True)).clamp_(min=0)
        if not squared:
            distance.clamp_(min=_SMALLEST_SQUARED).sqrt_()
        positive = same.scatter(1, pool.self_columns[rows, None], False)
        part = rule(Block(distance, same, positive, columns, there, found.valid))
        loss += part.loss
        divisor += part.divisor
        if learns:
            slope = part.slope if squared else _by_square(part.slope, distance)  # (rows, N), by the squared distance
            by_anchors[rows] = 2 * (slope.sum(1, keepdim=True) * mine - slope @ candidates)
            by_candidates.add_(slope.sum(0)[:, None] * candidates - slope.T @ mine, alpha=2)
    return _Found(loss.to(anchors.dtype), divisor, Hardest(*hardest), by_anchors, by_candidates)


def _zero(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=like.device)


def _by_square(slope: Tensor, distance: Tensor) -> Tensor:
    known = distance > _SMALLEST_SQUARED**0.5
    return torch.where(known, slope / (2 * distance), torch.zeros_like(slope))


class _Known(torch.autograd.Function):
    """A number whose derivatives are known already."""

    @staticmethod
    def forward(context: Any, anchors: Tensor, candidates: Tensor, loss: Tensor, by_a: Tensor, by_c: Tensor) -> Tensor:
        context.save_for_backward(by_a, by_c)
        return loss.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_anchors, by_candidates = context.saved_tensors
        return gradient * by_anchors, gradient * by_candidates, None, None, None
