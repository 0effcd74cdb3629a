"""The one place where model, collectives and metric meet."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data_shards.loader import Batch
from trainer.collectives import all_reduce_sum, gather, gather_with_grad, rank, world_size
from trainer.config import LossConfig
from trainer.metric.losses import active_triplets, triplet_loss
from trainer.metric.mining import Triplets, batch_hard, smooth_hard


class StepStats(NamedTuple):
    """What one rank saw in a step, still on the device."""

    loss_sum: Tensor
    """0-d, over this rank's anchors."""
    divisor: Tensor
    """By which, summed over ranks, the loss was divided; 0-d."""
    active: Tensor
    """This rank's anchors whose hardest triplet is active; 0-d."""
    hardest: Triplets
    """The hardest triplet of each of this rank's anchors, without gradient."""


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: Optimizer,
    config: LossConfig,
    backward: Callable[[Tensor], None],
) -> StepStats:
    """One optimiser update on this rank's slice of a global PK batch.

    Equals the single-process step on the whole global batch: candidates are gathered in rank order, the gather's backward sums
    over ranks, DDP averages over ranks, and the loss is divided by the count of *all* ranks (design idea 4).
    """
    embeddings = model(batch.images)  # (b, d) unit norm
    candidates = gather_with_grad(embeddings)  # (W*b, d) in rank order
    candidate_identities = gather(batch.identities)  # (W*b,)
    columns = self_columns(embeddings)  # (b,)
    triplets = miner(config)(embeddings, batch.identities, candidates, candidate_identities, columns)
    loss_sum, count = triplet_loss(triplets, config.effective_margin, config.effective_sharpness)  # 0-d, 0-d
    loss = loss_sum * world_size() / all_reduce_sum(count).clamp(min=1)
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    hardest = Triplets(*(part.detach() for part in triplets))
    if config.effective_sharpness is not None:
        with torch.no_grad():
            hardest = batch_hard(
                embeddings, batch.identities, candidates, candidate_identities, columns, squared=config.squared
            )
    return StepStats(loss_sum.detach(), count, active_triplets(hardest, config.effective_margin), hardest)


def miner(config: LossConfig) -> Callable[..., Triplets]:
    """How the settings choose triplets: (embeddings, identities, candidates, candidate identities, self columns) -> Triplets."""
    if config.effective_sharpness is not None:
        return partial(smooth_hard, sharpness=config.effective_sharpness, squared=config.squared)
    return partial(batch_hard, squared=config.squared)


def self_columns(embeddings: Tensor) -> Tensor:
    """Where this rank's embeddings lie among the gathered candidates, shape (b,)."""
    return torch.arange(len(embeddings), device=embeddings.device) + rank() * len(embeddings)
