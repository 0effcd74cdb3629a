"""Design idea 4: the distributed loss and every parameter's gradient equal those of one process with the whole batch."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from data_shards.loader import Batch
from data_shards.plan import PlanConfig
from tests.distributed.processes import in_processes
from trainer.collectives import all_reduce_sum, rank, world_size
from trainer.config import LossConfig, ModelConfig, RunConfig, TrainConfig
from trainer.engine import PlainEngine
from trainer.model import Embedder
from trainer.train_step import StepStats, TrainStep

P, K = 6, 4


def _identities() -> Tensor:
    return torch.arange(P).repeat_interleave(K)


def _images() -> Tensor:
    """P*K pictures of noise, uint8, shape (P*K, 3, 32, 32)."""
    return torch.randint(0, 256, (P * K, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


class _Capture(torch.optim.SGD):
    """Keeps the gradients that a step would use, and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def config_of(loss: LossConfig, **run) -> TrainConfig:
    plan = PlanConfig(identities_per_batch=P, images_per_identity=K)
    return dataclasses.replace(TrainConfig(), loss=loss, plan=plan, run=RunConfig(**run))


class Small(nn.Module):
    """Pictures to unit-norm embeddings of 8 dimensions, through everything that a real network has."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=4),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(6 * 64, 8),
            nn.BatchNorm1d(8),
        )

    def forward(self, images: Tensor) -> Tensor:
        return normalize(self.layers(images.double() / 255))


def network(dropout: float = 0.0, batch_norm: bool = False, real: bool = False) -> nn.Module:
    """An embedder in float64; BatchNorm in evaluation mode unless asked for."""
    torch.manual_seed(0)
    module = Embedder(ModelConfig(trunk="resnet18", embedding_size=16)) if real else Small(dropout)
    module.double().train()
    if not batch_norm:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.eval()
    return module


def steps_of(module: nn.Module, images: Tensor, identities: Tensor, config: TrainConfig, steps: int = 1):
    """Stats of this rank's last step of some, and the gradients of all parameters."""
    optimizer = _Capture(module.parameters(), lr=1.0)
    model = DistributedDataParallel(module, broadcast_buffers=False) if world_size() > 1 else module
    step = TrainStep(PlainEngine(model, optimizer), config)
    size = len(images) // world_size()
    mine = slice(rank() * size, (rank() + 1) * size)
    for number in range(1, steps + 1):
        batch = Batch(images[mine].roll(number - 1, 3), identities[mine], torch.arange(len(images))[mine])
        stats = step(batch, number)
    return stats, optimizer.gradients


def _step(images: Tensor, identities: Tensor, config: TrainConfig) -> tuple[Tensor, int, list[Tensor], int]:
    """Loss, active count and gradients of this rank's step, and how many of its anchors are valid."""
    stats: StepStats
    module = network(real=config.loss == LOSSES["real network"])
    stats, gradients = steps_of(module, images, identities, config, steps=2 if config.loss.memory else 1)
    total = all_reduce_sum(stats.loss_sum) / all_reduce_sum(stats.divisor)
    return total, int(stats.active), gradients, int(stats.valid)


LOSSES = {
    "real network": LossConfig(kind="smooth", margin=0.3),
    "smooth root": LossConfig(kind="smooth", margin=0.1, sharpness=10, distance="root"),
    "smooth squared": LossConfig(kind="smooth", margin=0.1, sharpness=5, distance="squared"),
    "contrastive": LossConfig(kind="contrastive", margin=1.0),
    "batch-all, all averaged": LossConfig(kind="margin", mining="batch_all", average="valid"),
    "memory": LossConfig(kind="smooth", margin=0.1, memory=50, memory_start=2),
    "memory of batch-hard": LossConfig(kind="margin", memory=20, memory_start=0),
}
for _mining in ("batch_hard", "batch_all", "semi_hard", "hardest_semi_hard", "distance_weighted", "random"):
    LOSSES |= {
        f"{_mining} margin root": LossConfig(kind="margin", mining=_mining, margin=0.2),
        f"{_mining} soft margin squared": LossConfig(kind="soft_margin", mining=_mining, distance="squared"),
    }


def _case(name: str, world: int) -> tuple[Tensor, Tensor, TrainConfig]:
    if name == "one identity a rank":
        loss = LossConfig(kind="soft_margin")
        return _images()[: 4 * world], torch.arange(world).repeat_interleave(4), config_of(loss)
    if name == "micro-batches":
        return _images(), _identities(), config_of(LOSSES["smooth root"], micro_batch=3)
    if name != "inactive rank":
        return _images(), _identities(), config_of(LOSSES[name])
    identities, images = _identities(), _images()
    size = len(images) // world  # rank 0: two identities of one black and one white picture each, over and over
    identities[: size // 2], identities[size // 2 : size] = 0, 1
    images[: size // 2], images[size // 2 : size] = 0, 255
    identities[size:] = 2 + torch.arange(len(images) - size) // K
    plan = PlanConfig(identities_per_batch=2, images_per_identity=12)
    config = config_of(LossConfig(kind="margin", margin=1e-4, distance="squared"))
    return images, identities, dataclasses.replace(config, plan=plan)


CASES = (*LOSSES, "micro-batches", "one identity a rank", "inactive rank")


def _all_cases(world: int) -> dict[str, tuple]:
    return {name: _step(*_case(name, world)) for name in CASES}


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def steps(request) -> tuple[int, dict[str, tuple], list[dict[str, tuple]]]:
    """World size, the single process's results by case, and those of every rank."""
    return request.param, _all_cases(request.param), in_processes(request.param, _all_cases, request.param)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_single_process(steps, name):
    world, single, ranks = steps
    loss, active, gradients, _ = single[name]
    if world > 1 or name in LOSSES:
        assert active > 0
        assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-6
    for rank_loss, _, rank_gradients, _ in (found[name] for found in ranks):
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=0, equal_nan=True)
        for ours, expected in zip(rank_gradients, gradients, strict=True):
            assert (ours - expected).norm() <= 1e-10 * expected.norm()
    assert sum(found[name][1] for found in ranks) == active


def test_micro_batches_change_nothing(steps):
    _, single, _ = steps
    whole, parts = single["smooth root"], single["micro-batches"]
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=0)
    for ours, expected in zip(parts[2], whole[2], strict=True):
        assert (ours - expected).norm() <= 1e-10 * expected.norm()


def test_the_inactive_rank_is_inactive_and_another_is_not(steps):
    world, _, ranks = steps
    actives = [found["inactive rank"][1] for found in ranks]
    assert actives[0] == 0
    assert world == 1 or actives[-1] > 0


def test_one_identity_a_rank_finds_its_negatives_on_other_ranks(steps):
    world, _, ranks = steps
    valid = [found["one identity a rank"][3] for found in ranks]
    assert valid == ([0] if world == 1 else [4] * world)


def test_the_memory_is_among_the_candidates(steps):
    """Negatives of the batch before, under other pictures: the loss is another one than without."""
    _, single, _ = steps
    assert single["memory"][0] != single["smooth root"][0]


def _own_rank_alone() -> tuple[Tensor, list[Tensor]]:
    config = config_of(LossConfig(kind="smooth", candidates="own_rank"))
    stats, gradients = steps_of(network(), _images(), _identities(), config)
    return stats.loss_sum / stats.divisor, gradients


def test_mining_on_the_own_rank_is_the_mean_over_ranks_of_what_each_finds_alone():
    ranks = in_processes(2, _own_rank_alone)
    for half, (loss, _) in enumerate(ranks):
        mine = slice(12 * half, 12 * half + 12)
        stats, gradients = steps_of(
            network(), _images()[mine], _identities()[mine], config_of(LossConfig(kind="smooth"))
        )
        torch.testing.assert_close(loss, stats.loss_sum / stats.divisor)
        ranks[half] += (gradients,)
    for ours, first, second in zip(ranks[0][1], ranks[0][2], ranks[1][2], strict=True):
        torch.testing.assert_close(ours, (first + second) / 2)


def _with_dropout(micro_batch: int | None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients and running statistics after a step with dropout and BatchNorm in training mode."""
    module = network(dropout=0.5, batch_norm=True)
    config = config_of(LossConfig(kind="smooth"), micro_batch=micro_batch)
    _, gradients = steps_of(module, _images(), _identities(), config)
    return gradients, {name: value.clone() for name, value in module.named_buffers()}


def _in_parts_with_one_graph(part: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What micro-batches must equal: all parts forward with graph, one after the other, then one backward."""
    module = network(dropout=0.5, batch_norm=True)
    whole = module.forward
    module.forward = lambda images: torch.cat([whole(one) for one in images.split(part)])
    _, gradients = steps_of(module, _images(), _identities(), config_of(LossConfig(kind="smooth")))
    return gradients, {name: value.clone() for name, value in module.named_buffers()}


@pytest.mark.parametrize("part", [5, 8])
def test_micro_batches_replay_dropout_and_update_statistics_once(part):
    gradients, buffers = _with_dropout(part)
    wanted, wanted_buffers = _in_parts_with_one_graph(part)
    for ours, expected in zip(gradients, wanted, strict=True):
        assert (ours - expected).norm() <= 1e-10 * expected.norm()
    assert buffers.keys() == wanted_buffers.keys()
    assert all(torch.allclose(buffers[name].double(), wanted_buffers[name].double(), rtol=1e-12) for name in buffers)


def test_another_size_of_parts_has_other_batch_norm_statistics():
    """So that the test above says something about BatchNorm."""
    assert not torch.allclose(_with_dropout(8)[0][0], _with_dropout(None)[0][0], rtol=1e-3)
