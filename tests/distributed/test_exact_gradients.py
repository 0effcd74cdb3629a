"""Design idea 4: the distributed loss and every parameter's gradient equal those of one process with the whole batch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_shards.loader import Batch
from tests.distributed.processes import in_processes
from trainer.collectives import all_reduce_sum, rank, world_size
from trainer.config import LossConfig, ModelConfig
from trainer.model import Embedder
from trainer.train_step import train_step

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


def _step(images: Tensor, identities: Tensor, loss: LossConfig) -> tuple[Tensor, int, list[Tensor], int]:
    """Loss sum, active count and gradients of this rank's step; BatchNorm in evaluation mode, float64."""
    torch.manual_seed(0)
    module: nn.Module = Embedder(ModelConfig(trunk="resnet18", embedding_size=16)).double().eval()
    optimizer = _Capture(module.parameters(), lr=1.0)
    model = DistributedDataParallel(module) if world_size() > 1 else module
    size = len(images) // world_size()
    mine = slice(rank() * size, (rank() + 1) * size)
    batch = Batch(images[mine], identities[mine], torch.arange(len(images))[mine])
    stats = train_step(model, batch, optimizer, loss, lambda value: value.backward())
    total = all_reduce_sum(stats.loss_sum) / all_reduce_sum(stats.divisor)
    return total, int(stats.active), optimizer.gradients, int(stats.hardest.valid.sum())


LOSSES = {
    "margin root": LossConfig(kind="margin", margin=0.2, distance="root"),
    "margin squared": LossConfig(kind="margin", margin=0.05, distance="squared"),
    "soft margin root": LossConfig(kind="soft_margin", distance="root"),
    "soft margin squared": LossConfig(kind="soft_margin", distance="squared"),
    "smooth root": LossConfig(kind="smooth", margin=0.1, sharpness=10, distance="root"),
    "smooth squared": LossConfig(kind="smooth", margin=0.1, sharpness=5, distance="squared"),
}


def _case(name: str, world: int) -> tuple[Tensor, Tensor, LossConfig]:
    if name == "one identity a rank":
        return _images()[: 4 * world], torch.arange(world).repeat_interleave(4), LOSSES["soft margin root"]
    if name != "inactive rank":
        return _images(), _identities(), LOSSES[name]
    identities, images = _identities(), _images()
    size = len(images) // world  # rank 0: two identities of one black and one white picture each, over and over
    identities[: size // 2], identities[size // 2 : size] = 0, 1
    images[: size // 2], images[size // 2 : size] = 0, 255
    identities[size:] = 2 + torch.arange(len(images) - size) // K
    return images, identities, LossConfig(kind="margin", margin=1e-4, distance="squared")


CASES = (*LOSSES, "one identity a rank", "inactive rank")


def _all_cases(world: int) -> dict[str, tuple]:
    return {name: _step(*_case(name, world)) for name in CASES}


@pytest.fixture(scope="module", params=[1, 2, 3])
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


def test_the_inactive_rank_is_inactive_and_another_is_not(steps):
    world, _, ranks = steps
    actives = [found["inactive rank"][1] for found in ranks]
    assert actives[0] == 0
    assert world == 1 or actives[-1] > 0


def test_one_identity_a_rank_finds_its_negatives_on_other_ranks(steps):
    world, _, ranks = steps
    valid = [found["one identity a rank"][3] for found in ranks]
    assert valid == ([0] if world == 1 else [4] * world)
