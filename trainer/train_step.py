"""The one place where model, collectives and metric meet."""

from typing import NamedTuple

import torch
from torch import Tensor

from data_shards.counter_random import random_bits, uniform
from data_shards.loader import Batch
from trainer.centres import Centres, SoftmaxLoss
from trainer.collectives import all_reduce_sum, gather_labelled, rank, world_size
from trainer.config import TrainConfig
from trainer.engine import Engine
from trainer.gradient_cache import GradientCache, Statistics
from trainer.metric.losses import Loss, Objective, active_anchors
from trainer.metric.memory import CrossBatchMemory
from trainer.metric.pool import Pool
from trainer.phases import backward_until, phase

_NETWORK, _MINING = 101, 102
"""What random numbers are for."""


class StepStats(NamedTuple):
    """What one rank saw in a step, still on the device."""

    loss_sum: Tensor
    """0-d, over this rank's anchors."""
    divisor: Tensor
    """By which, summed over ranks, the loss was divided; 0-d."""
    active: Tensor
    """This rank's anchors whose hardest triplet is active; 0-d."""
    valid: Tensor
    """This rank's anchors with a positive and a negative; 0-d."""
    d_ap: Tensor
    """Sum over the valid anchors of the distance to their farthest positive; 0-d."""
    d_an: Tensor
    """Sum over the valid anchors of the distance to their nearest negative; 0-d."""
    flags: Tensor
    """The same on all ranks: whether the update was left out; how many ranks were asked to stop; for each rank 2 where its
    embeddings are not finite, 1 where its loss is not. Shape (2 + W,)."""
    embeddings: Tensor
    """Of all ranks (of this one where it mines alone), shape (N, d)."""
    softmax: Tensor | None = None
    """Of this rank's images, summed: the softmax loss, the cosine with the own centre, their number; and of its centres those
    that took part; shape (4,). None in a step without softmax."""


class TrainStep:
    """One optimiser update on this rank's slice of a global PK batch.

    Equals the single-process step on the whole global batch: candidates are gathered in rank order, the gather's backward sums
    over ranks, DDP averages over ranks, and the loss is divided by the count of *all* ranks (design idea 4).
    """

    def __init__(
        self,
        engine: Engine,
        config: TrainConfig,
        memory: CrossBatchMemory | None = None,
        centres: Centres | None = None,
    ) -> None:
        self._engine, self._config, self._centres = engine, config, centres
        self._memory = memory or CrossBatchMemory(config.loss.memory)
        self._cache = GradientCache(engine, config.run.micro_batch)
        self._statistics = Statistics(engine.model)
        self.objective = objective_of(config)

    def __call__(self, batch: Batch, step: int = 1, asked_to_stop: bool = False) -> StepStats:
        """
        Args:
            step: number of the update, from 1: what random numbers depend on.
            asked_to_stop: whether somebody has asked this rank to.
        """
        shared = self._config.loss.candidates == "all_ranks"
        torch.manual_seed(int(random_bits(self._config.run.seed, _NETWORK, step, rank())[0] >> 1))
        with phase("forward"):
            self._statistics.keep()
            rows = self._cache.forward(batch.images, batch.colour)  # (b, d) unit norm, or with norms (b, d + 1)
            backward_until(rows, "gather_mining_loss")
        with phase("gather_mining_loss"):
            everyone, labels = gather_labelled(rows, batch.identities) if shared else (rows, batch.identities)
            embeddings, gathered = self._bare(rows), (self._bare(everyone), labels)
            pool = make_pool(embeddings, batch.identities, gathered, self._remembered(step))
            loss = self.objective(pool, self._images_of_one(pool), self._draws(pool, step))
            softmax = self._softmax(everyone, labels, step)
            sums = all_reduce_sum(_sums(loss, softmax, embeddings.detach(), asked_to_stop))  # (2 + W,)
            total, divisor = (loss.total * world_size(), sums[0]) if shared else (loss.total, loss.divisor)
            mean = self._together(total / divisor.clamp(min=1), softmax, step)
        with phase("backward"):
            self._cache.backward(mean.to(embeddings.dtype))
        with phase("optimizer"):
            left_out = self._engine.update(sums[2:].sum())
            self._statistics.restore(left_out)
            if softmax is not None and self._centres is not None:
                self._centres.update(torch.maximum(left_out, (sums[2:].sum() > 0).to(left_out)))
        if self._memory.size and not left_out:  # waits for the device
            self._memory.add(*gathered)
        d_ap, d_an = loss.hardest.distances(self.objective.squared)  # (b,)
        return StepStats(
            loss.total.detach(),
            loss.divisor,
            active_anchors(loss.hardest, self.objective.margin, self.objective.squared),
            loss.hardest.valid.sum(),
            d_ap.where(loss.hardest.valid, 0).sum(),
            d_an.where(loss.hardest.valid, 0).sum(),
            torch.cat([left_out.to(sums.dtype)[None], sums[1:]]),
            gathered[0].detach(),
            None if softmax is None else _softmax_sums(softmax, len(embeddings)),
        )

    def _bare(self, rows: Tensor) -> Tensor:
        """Embeddings without the norms that AdaFace has behind them."""
        return rows[:, :-1] if self._config.softmax.kind == "adaface" else rows

    def _softmax(self, everyone: Tensor, identities: Tensor, step: int) -> SoftmaxLoss | None:
        if self._centres is None or not self._config.softmax.weights(step)[1]:
            return None
        norms = everyone[:, -1].detach() if self._config.softmax.kind == "adaface" else None
        return self._centres.loss(self._bare(everyone), identities, norms, step)

    def _together(self, triplets: Tensor, softmax: SoftmaxLoss | None, step: int) -> Tensor:
        """The loss that is trained: each rank has the whole sum's gradient through its own centres; DDP averages over ranks."""
        if softmax is None:
            return triplets
        triplet_weight, weight = self._config.softmax.weights(step)
        mean = weight * softmax.total * world_size() / len(softmax.losses)
        return mean + triplet_weight * triplets if triplet_weight else mean

    def _remembered(self, step: int) -> tuple[Tensor, Tensor] | None:
        return self._memory.contents() if step >= self._config.loss.memory_start else None

    def _images_of_one(self, pool: Pool) -> int | None:
        """Most images of one identity among the candidates, where that is known."""
        plan = self._config.plan
        return plan.images_per_identity if len(pool.candidates) <= plan.batch_size else None

    def _draws(self, pool: Pool, step: int) -> Tensor | None:
        """Uniform numbers that depend on the seed, the step and the anchor's place in the global batch alone, shape (b, w)."""
        if not self.objective.draws:
            return None
        rows = rank() * len(pool.anchors) + torch.arange(len(pool.anchors)).numpy()
        columns = torch.arange(self._config.plan.images_per_identity).numpy()
        drawn = uniform(self._config.run.seed, _MINING, step, rows[:, None], columns)
        return torch.from_numpy(drawn).to(pool.anchors.device, non_blocking=True)


def objective_of(config: TrainConfig) -> Objective:
    loss = config.loss
    return Objective(
        kind=loss.kind,
        mining=loss.mining,
        margin=loss.effective_margin,
        sharpness=loss.sharpness,
        squared=loss.squared,
        average=loss.average,
    )


def make_pool(
    embeddings: Tensor,
    identities: Tensor,
    gathered: tuple[Tensor, Tensor],
    remembered: tuple[Tensor, Tensor] | None = None,
) -> Pool:
    """This rank's anchors among what was gathered (or its own) and, behind it, what is remembered."""
    candidates, labels = gathered
    first = rank() * len(embeddings) if len(candidates) > len(embeddings) else 0
    columns = torch.arange(first, first + len(embeddings), device=embeddings.device)  # (b,)
    if remembered is not None:
        candidates, labels = torch.cat([candidates, remembered[0]]), torch.cat([labels, remembered[1]])
    return Pool(embeddings, identities, candidates, labels, columns)


def _sums(loss: Loss, softmax: SoftmaxLoss | None, embeddings: Tensor, asked_to_stop: bool) -> Tensor:
    """What is summed over the ranks: the divisor; whether to stop; and at this rank's place 2 where its embeddings are not
    finite, 1 where its loss alone is not, for which another rank's embeddings can be the reason; (2 + W,)."""
    sums = torch.zeros(2 + world_size(), dtype=torch.float64, device=embeddings.device)
    sums[0], sums[1] = loss.divisor, float(asked_to_stop)
    finite = loss.total.detach().isfinite()
    if softmax is not None:
        finite = finite & softmax.finite
    sums[2 + rank()] = torch.where(embeddings.isfinite().all(), (~finite).double(), 2.0)
    return sums


def _softmax_sums(softmax: SoftmaxLoss, count: int) -> Tensor:
    mine = slice(rank() * count, (rank() + 1) * count)
    parts = (
        softmax.losses[mine].sum(),
        softmax.cosine[mine].sum(),
        torch.full_like(softmax.sampled, count),
        softmax.sampled,
    )
    return torch.stack([part.double() for part in parts])
