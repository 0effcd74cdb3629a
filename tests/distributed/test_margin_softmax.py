"""The margin softmax with its centres on many ranks equals plain loops over the whole batch and all identities."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from data_shards.counter_random import uniform
from data_shards.loader import Batch
from data_shards.plan import PlanConfig
from tests.distributed.processes import in_processes
from tests.trainer.metric import oracle
from trainer import centres as centres_module
from trainer.centres import Centres
from trainer.collectives import all_reduce_sum, gather_rows, rank, world_size
from trainer.config import LossConfig, RunConfig, SoftmaxConfig, TrainConfig
from trainer.engine import PlainEngine
from trainer.metric import margin_softmax
from trainer.model import unit_and_norm
from trainer.train_step import TrainStep

P, K, SIZE, STEPS, SEED = 6, 2, 5, 3, 7
LABELS = np.array([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31])
"""Of all identities: 11, which no number of ranks divides evenly."""
RATE = 0.05

CASES = {
    "arcface": SoftmaxConfig(kind="arcface", triplet_weight=0),
    "cosface": SoftmaxConfig(kind="cosface", triplet_weight=0, margin=0.3, scale=20, weight=0.5),
    "adaface": SoftmaxConfig(kind="adaface", triplet_weight=0, quality_memory=0.25, scale=10),
    "sampled": SoftmaxConfig(kind="arcface", triplet_weight=0, sample_rate=0.4, scale=8),
    "summed": SoftmaxConfig(kind="arcface", weight=0.25, triplet_weight=2.0, scale=16),
    "summed, parts": SoftmaxConfig(kind="adaface", weight=0.25, sample_rate=0.6, scale=16),
    "warm-up": SoftmaxConfig(kind="cosface", weight=0, warmup_steps=1, scale=16),
}
LOSS = LossConfig(kind="margin", mining="batch_hard", margin=0.4)


def config_of(name: str) -> TrainConfig:
    plan = PlanConfig(identities_per_batch=P, images_per_identity=K)
    run = RunConfig(seed=SEED, micro_batch=2 if name == "summed, parts" else None)
    return dataclasses.replace(TrainConfig(), plan=plan, loss=LOSS, softmax=CASES[name], run=run)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 (12, 3, 4, 4), and labels, other identities in each step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (P * K, 3, 4, 4), generator=generator, dtype=torch.uint8)
    order = torch.randperm(len(LABELS), generator=generator)[:P]
    return images, torch.from_numpy(LABELS)[order].repeat_interleave(K)


class Small(nn.Module):
    def __init__(self, with_norms: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.with_norms = nn.Sequential(nn.Flatten(), nn.Linear(48, SIZE)).double(), with_norms

    def forward(self, images: Tensor) -> Tensor:
        found = self.layers(images.double() / 255 - 0.5)
        return unit_and_norm(found) if self.with_norms else normalize(found)


def _run(name: str) -> dict[str, Tensor]:
    """Weights, centres, momentum, losses and cosines after some steps, as this rank has them."""
    config = config_of(name)
    module = Small(config.softmax.kind == "adaface")
    model = DistributedDataParallel(module, broadcast_buffers=False) if world_size() > 1 else module
    engine = PlainEngine(model, torch.optim.SGD(module.parameters(), lr=RATE, fused=True))
    centres = Centres(config.softmax, LABELS, SIZE, seed=SEED, dtype=torch.float64)
    step = TrainStep(engine, config, None, centres)
    told = []
    for number in range(1, STEPS + 1):
        images, labels = batch_of(number)
        mine = slice(rank() * len(images) // world_size(), (rank() + 1) * len(images) // world_size())
        stats = step(Batch(images[mine], labels[mine], torch.arange(len(images))[mine]), number)
        told.append(all_reduce_sum(torch.zeros(4).double() if stats.softmax is None else stats.softmax))
        assert stats.embeddings.shape == (P * K, SIZE)
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in module.parameters()]),
        "centres": gather_rows(centres.values),
        "momentum": gather_rows(centres.momentum),
        "norms": torch.stack(centres.norms),
        "told": torch.stack(told),
    }


def _all_cases() -> dict[str, dict[str, Tensor]]:
    before, margin_softmax.LOGITS = margin_softmax.LOGITS, 24  # two centres at a time
    found = {name: _run(name) for name in CASES}
    margin_softmax.LOGITS = before
    return found


def _lowered(kind: str, angle: Tensor, margin: float, quality: float) -> Tensor:
    if kind == "cosface":
        return angle.cos() - margin
    if kind == "adaface":
        return (angle - margin * quality).clamp(1e-3, math.pi - 1e-3).cos() - margin - margin * quality
    return (angle + margin).cos() if angle + margin < math.pi else angle.cos() - margin * math.sin(margin)


def _plain(name: str) -> dict[str, Tensor]:
    """The same by plain loops: one process, one logit at a time, gradients by autograd through everything."""
    config = config_of(name)
    softmax, module = config.softmax, Small(config.softmax.kind == "adaface")
    margin = softmax.margin or {"arcface": 0.5, "cosface": 0.35, "adaface": 0.4}[softmax.kind]
    values = torch.from_numpy(centres_module.initial(LABELS, SIZE, SEED)).double().requires_grad_()
    momentum, mean, std, told = torch.zeros_like(values), None, None, []
    for step in range(1, STEPS + 1):
        images, labels = batch_of(step)
        found = module.layers(images.double() / 255 - 0.5)
        embeddings, norms = normalize(found), found.detach().norm(dim=1)
        warm = step <= softmax.warmup_steps
        weight, triplet_weight = (1.0, 0.0) if warm else (softmax.weight, softmax.triplet_weight)
        if softmax.kind == "adaface":
            new = norms.mean(), norms.std()
            share = softmax.quality_memory if mean is not None else 1.0
            mean, std = (share * a + (1 - share) * (b or 0) for a, b in zip(new, (mean, std), strict=True))
        drawn = uniform(SEED, centres_module._SAMPLE, step, LABELS) < softmax.sample_rate
        takes_part = [bool(drawn[c]) or int(LABELS[c]) in labels.tolist() for c in range(len(LABELS))]
        losses, cosines = [], []
        for row, label in enumerate(labels.tolist()):
            logits, own = [], None
            for c in range(len(LABELS)):
                if not takes_part[c]:
                    continue
                cosine = (embeddings[row] * values[c]).sum() / values[c].norm()
                if LABELS[c] == label:
                    quality = 0.0
                    if softmax.kind == "adaface":
                        quality = float((softmax.quality_h * (norms[row] - mean) / (std + 1e-3)).clamp(-1, 1))
                    own = len(logits)
                    cosines.append(cosine.detach())
                    cosine = _lowered(softmax.kind, cosine.acos(), margin, quality)
                logits.append(softmax.scale * cosine)
            losses.append(-torch.stack(logits).log_softmax(0)[own])

        cross_entropy = torch.stack(losses).mean()
        triplets, count = oracle.loss_of(embeddings, labels.tolist(), "batch_hard", LOSS.margin, False, "active")
        (weight * cross_entropy + triplet_weight * triplets / max(count, 1)).backward(retain_graph=True)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
            values.grad = None
        if not weight:
            told.append(torch.zeros(4).double())
            continue
        (gradient,) = torch.autograd.grad(cross_entropy, values)
        with torch.no_grad():
            for c in range(len(LABELS)):
                if takes_part[c]:
                    momentum[c] = softmax.momentum * momentum[c] + gradient[c] + softmax.weight_decay * values[c]
                    values[c] -= softmax.learning_rate * momentum[c]
        parts = float(cross_entropy.detach()) * P * K, sum(map(float, cosines)), P * K, sum(takes_part)
        told.append(torch.tensor(parts, dtype=torch.float64))
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in module.parameters()]),
        "centres": values.detach(),
        "momentum": momentum,
        "norms": torch.full((2,), torch.nan).double() if mean is None else torch.stack([mean, std]),
        "told": torch.stack(told),
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Tensor]]:
    return {name: _plain(name) for name in CASES}


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request) -> list[dict[str, dict[str, Tensor]]]:
    return [_all_cases()] if request.param == 1 else in_processes(request.param, _all_cases)


@pytest.mark.parametrize("name", CASES)
def test_training_equals_plain_loops_over_the_whole_batch_and_all_centres(ranks, plain, name):
    for found in ranks:
        for what, expected in plain[name].items():
            torch.testing.assert_close(found[name][what], expected, rtol=1e-9, atol=1e-11, equal_nan=True, msg=what)


def test_the_cases_say_something(plain):
    """Sampling leaves centres out, triplets and softmax both reach the weights, and everything moves."""
    assert 0 < plain["sampled"]["told"][:, 3].sum() < STEPS * len(LABELS)
    assert (plain["sampled"]["momentum"].abs().sum(1) > 0).sum() > P
    start = torch.from_numpy(centres_module.initial(LABELS, SIZE, SEED)).double()
    for name in CASES:
        assert not torch.allclose(plain[name]["centres"], start, atol=1e-3)
    assert not torch.allclose(plain["summed"]["weights"], plain["arcface"]["weights"], atol=1e-4)
    assert plain["warm-up"]["told"][0, 0] > 0
    assert not plain["warm-up"]["told"][1:].any()
