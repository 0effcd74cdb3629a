"""Design idea 4: the distributed loss and every parameter's gradient equal plain loops over the whole batch."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from data_shards.counter_random import uniform
from data_shards.loader import Batch
from data_shards.plan import PlanConfig
from tests.distributed.processes import in_processes
from tests.trainer.metric import oracle
from trainer import train_step
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


MEMORIES = {"memory": 50, "memory of batch-hard": 20}
LOSSES = {
    "real network": LossConfig(kind="smooth", margin=0.3),
    "smooth root": LossConfig(kind="smooth", margin=0.1, sharpness=10, distance="root"),
    "smooth squared": LossConfig(kind="smooth", margin=0.1, sharpness=5, distance="squared"),
    "contrastive": LossConfig(kind="contrastive", margin=1.0),
    "contrastive squared": LossConfig(kind="contrastive", margin=1.5, distance="squared"),
    "batch-all, all averaged": LossConfig(kind="margin", mining="batch_all", average="valid"),
    "batch-hard, all averaged": LossConfig(kind="margin", average="valid"),
    "memory": LossConfig(kind="smooth", margin=0.1, memory=MEMORIES["memory"], memory_start=2),
    "memory of batch-hard": LossConfig(kind="margin", memory=MEMORIES["memory of batch-hard"], memory_start=0),
}
for _mining in ("batch_hard", "batch_all", "semi_hard", "hardest_semi_hard", "distance_weighted", "random"):
    for _kind in ("margin", "soft_margin"):
        for _distance in ("root", "squared"):
            _loss = LossConfig(kind=_kind, mining=_mining, margin=0.2, distance=_distance)
            LOSSES[f"{_mining} {_kind} {_distance}"] = _loss


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


def _by_loops(embeddings: Tensor, ids: list[int], loss: LossConfig) -> tuple[Tensor, int]:
    """Sum and divisor of the first P x K embeddings; those behind them are remembered ones."""
    count, margin = min(P * K, len(ids)), loss.effective_margin
    if loss.kind == "smooth":
        return oracle.smooth(embeddings, ids, loss.margin, loss.sharpness, loss.squared, anchors=count)
    if loss.kind == "contrastive":
        return oracle.contrastive(embeddings, ids, loss.margin, loss.squared)
    numbers = None
    if loss.mining in ("distance_weighted", "random"):
        drawn = uniform(RunConfig().seed, train_step._MINING, 1, torch.arange(count)[:, None].numpy(), range(K))
        numbers = torch.from_numpy(drawn)
    average = loss.average if margin is not None else "valid"
    return oracle.loss_of(embeddings, ids, loss.mining, margin, loss.squared, average, numbers=numbers, anchors=count)


def _expected(images: Tensor, identities: Tensor, config: TrainConfig) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of all parameters by plain loops over the whole batch."""
    module = network(real=config.loss == LOSSES["real network"])
    if not config.loss.memory:
        embeddings = module(images)
    else:  # the second step's pictures are rolled, and it remembers the newest of the first's
        newest = slice(max(0, len(images) - config.loss.memory), None)
        embeddings = torch.cat([module(images.roll(1, 3)), module(images).detach()[newest]])
        identities = torch.cat([identities, identities[newest]])
    total, divisor = _by_loops(embeddings, identities.tolist(), config.loss)
    loss = total / max(divisor, 1)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in module.parameters()]


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def steps(request) -> tuple[int, dict[str, tuple], list[dict[str, tuple]]]:
    """World size, the single process's results by case, and those of every rank."""
    return request.param, _all_cases(request.param), in_processes(request.param, _all_cases, request.param)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_plain_loops_over_the_whole_batch(steps, name):
    world, single, ranks = steps
    loss, gradients = _expected(*_case(name, world))
    active = single[name][1]
    if world > 1 or name in LOSSES:
        assert active > 0
        assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-6
    for found_loss, _, found, _ in (single[name], *(found[name] for found in ranks)):
        torch.testing.assert_close(found_loss.nan_to_num(0.0), loss, rtol=1e-10, atol=0)  # 0 / 0 where none counts
        for ours, expected in zip(found, gradients, strict=True):
            assert (ours - expected).norm() <= 1e-10 * expected.norm()
    assert sum(found[name][1] for found in ranks) == active


def test_micro_batches_change_nothing(steps):
    _, _, ranks = steps
    for found in ranks:
        whole, parts = found["smooth root"], found["micro-batches"]
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


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("part", [5, 8])
def test_micro_batches_replay_dropout_and_update_statistics_once(part, ranks):
    ours, wanted = in_processes(ranks, _with_dropout, part), in_processes(ranks, _in_parts_with_one_graph, part)
    for (gradients, buffers), (wanted_gradients, wanted_buffers) in zip(ours, wanted, strict=True):
        for found, expected in zip(gradients, wanted_gradients, strict=True):
            assert (found - expected).norm() <= 1e-10 * expected.norm()
        assert buffers.keys() == wanted_buffers.keys()
        for name, found in buffers.items():
            torch.testing.assert_close(found, wanted_buffers[name], rtol=1e-12, atol=0)


def _travels(micro_batch: int | None) -> int:
    """How often gradients went to the other ranks in a step."""
    model, times = DistributedDataParallel(network(), broadcast_buffers=False), [0]

    def counted(state, bucket):
        times[0] += 1
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counted)
    step = TrainStep(
        PlainEngine(model, _Capture(model.parameters(), lr=1.0)),
        config_of(LossConfig(kind="smooth"), micro_batch=micro_batch),
    )
    mine = slice(12 * rank(), 12 * rank() + 12)
    step(Batch(_images()[mine], _identities()[mine], torch.arange(24)[mine]))
    return times[0]


def test_gradients_travel_once_however_many_micro_batches():
    """All parameters fit one bucket; without no_sync it would be 4 times."""
    assert in_processes(2, _travels, 3) == in_processes(2, _travels, None) == [1, 1]


def test_another_size_of_parts_has_other_batch_norm_statistics():
    """So that the test above says something about BatchNorm."""
    assert not torch.allclose(_with_dropout(8)[0][0], _with_dropout(None)[0][0], rtol=1e-3)
