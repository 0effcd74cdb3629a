"""The plan of a cluster: pace, memory, epoch, cost, and what happens from 1 to 1,024 GPUs."""

from dataclasses import dataclass, replace
from math import gcd

from trainer.planner.dataset import Dataset
from trainer.planner.memory import memory_bytes
from trainer.planner.network import NetworkCost, measure
from trainer.planner.rates import Rates
from trainer.planner.step import Step, step_of
from trainer.planner.workload import Cluster, Workload, images_per_rank

WORLDS = tuple(2**power for power in range(11))
"""1 to 1,024 GPUs."""
USABLE = 0.95
"""Of a GPU's memory: the driver keeps some (assumed)."""
SMALLEST = 2
"""Images of a rank; with fewer BatchNorm has nothing to average."""


@dataclass(kw_only=True, frozen=True)
class Scaled:
    """Pace on some GPUs; efficiency is that against so many times one GPU. None: the batch cannot be shared among so many."""

    gpus: int
    weak: Step
    """As many images a GPU as planned; P grows with the GPUs."""
    weak_efficiency: float
    strong: Step | None
    """The planned P x K shared among them."""
    strong_efficiency: float | None


@dataclass(kw_only=True, frozen=True)
class Capacity:
    cluster: Cluster
    workload: Workload
    rates: Rates
    cost: NetworkCost
    dataset: Dataset
    step: Step
    cautious: Step | None
    """On the cautious basis of `rates.gpu_rates`; None for calibrated rates."""
    memory: dict[str, float]
    """Bytes of one rank, by what holds them."""
    available_bytes: float
    """Of one rank."""
    largest_p: int
    """That fits, with everything else as it is; 0: none."""
    scaling: tuple[Scaled, ...]

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.available_bytes

    @property
    def epoch_s(self) -> float:
        return self.dataset.steps_per_epoch * self.step.seconds

    @property
    def epoch_cost(self) -> float:
        return self.epoch_s / 3600 * self.cluster.world_size * self.cluster.price_per_gpu_hour


def plan(
    cluster: Cluster, workload: Workload, rates: Rates, dataset: Dataset, cautious: Rates | None = None
) -> Capacity:
    """What a cluster does with a workload.

    Args:
        cautious: rates to tell beside them.
    Raises:
        ValueError: W does not divide P*K.
    """
    images = images_per_rank(workload, cluster)
    if images < SMALLEST:
        raise ValueError(f"--p is {workload.p}: {images} image for each GPU; allowed is at least {SMALLEST}")
    cost = measure(workload.trunk, workload.image_size, workload.embedding_size, workload.bf16)
    world = cluster.world_size
    available = USABLE * 1e9 * cluster.gpu.memory_gb / (cluster.gpus_per_node if rates.shares_cores else 1)
    return Capacity(
        cluster=cluster,
        workload=workload,
        rates=rates,
        cost=cost,
        dataset=dataset,
        step=step_of(cluster, workload, rates, cost, images=images, world_size=world),
        cautious=step_of(cluster, workload, cautious, cost, images=images, world_size=world) if cautious else None,
        memory=memory_of(cluster, workload, rates, cost, images),
        available_bytes=available,
        largest_p=_largest_p(cluster, workload, rates, cost, available),
        scaling=scaling(cluster, workload, rates, cost),
    )


def memory_of(cluster: Cluster, workload: Workload, rates: Rates, cost: NetworkCost, images: int) -> dict[str, float]:
    """Bytes of one rank, what calibration found beside them included."""
    found = memory_bytes(cluster, workload, cost, images, cluster.world_size)
    return found | ({"libraries": rates.memory_bytes} if rates.memory_bytes else {})


def scaling(cluster: Cluster, workload: Workload, rates: Rates, cost: NetworkCost) -> tuple[Scaled, ...]:
    """From 1 to 1,024 GPUs, machines being filled one after the other; a GPU has its machine's share of the cores.

    One GPU's strong step holds the whole batch, whether or not that fits its memory.
    """
    each, whole = images_per_rank(workload, cluster), workload.batch_size

    def step(images: int, world: int) -> Step:
        return step_of(cluster, workload, rates, cost, images=images, world_size=world)

    alone, all_alone = step(each, 1), step(whole, 1)
    found = []
    for world in WORLDS:
        weak = step(each, world)
        shared = whole % world == 0 and whole // world >= SMALLEST
        strong = step(whole // world, world) if shared else None
        found.append(
            Scaled(
                gpus=world,
                weak=weak,
                weak_efficiency=weak.images_per_s / world / alone.images_per_s,
                strong=strong,
                strong_efficiency=strong.images_per_s / world / all_alone.images_per_s if strong else None,
            )
        )
    return tuple(found)


def _largest_p(cluster: Cluster, workload: Workload, rates: Rates, cost: NetworkCost, available: float) -> int:
    """Largest P up to the number of identities whose batch fits, by bisection over what the GPUs can share."""
    world = cluster.world_size
    unit = world // gcd(world, workload.k)

    def fits(multiple: int) -> bool:
        images = multiple * unit * workload.k // world
        return sum(memory_of(cluster, workload, rates, cost, images).values()) <= available

    low, high = 0, workload.identities // unit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def with_cores(capacity: Capacity, cores: int) -> Step:
    """The same step with so many cores in each machine."""
    cluster = replace(capacity.cluster, cores_per_node=cores)
    images = capacity.step.images
    return step_of(
        cluster, capacity.workload, capacity.rates, capacity.cost, images=images, world_size=cluster.world_size
    )
