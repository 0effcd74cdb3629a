"""One step of one rank, composed of its stages."""

from dataclasses import dataclass
from math import ceil

from trainer.planner.exchange import all_gather_s, all_reduce_s, gradients_s, paths
from trainer.planner.loading import loader_s
from trainer.planner.network import NetworkCost
from trainer.planner.rates import Rates, launch_bound, network_s, optimizer_s
from trainer.planner.workload import Cluster, Workload


@dataclass(kw_only=True, frozen=True)
class Step:
    """Seconds of one optimiser update.

    The loader runs ahead, so a GPU's step takes max(its slowest stage, the critical path). Where both compute on the same cores
    their CPU seconds add up instead.
    """

    images: int
    """b, of this rank."""
    world_size: int
    loader: dict[str, float]
    critical: dict[str, float]
    all_reduce_s: float
    """Of the gradients, hidden or not."""
    shares_cores: bool = False
    launch_bound: bool = False
    """Whether the network waits for its kernels to be started, not for the GPU."""

    @property
    def seconds(self) -> float:
        path = sum(self.critical.values())
        if self.shares_cores:
            return max(self.loader["read"], path + sum(self.loader.values()) - self.loader["read"])
        return max(path, *self.loader.values())

    @property
    def images_per_s(self) -> float:
        """Of all ranks."""
        return self.images * self.world_size / self.seconds

    @property
    def limit(self) -> str:
        """The stage to make faster first."""
        slowest = max(self.loader, key=lambda name: self.loader[name])
        path = sum(self.critical.values())
        if self.loader[slowest] > path and not (self.shares_cores and slowest != "read"):
            return slowest
        both = self.critical | (self.loader if self.shares_cores else {})
        most = max(both, key=lambda name: both[name])
        return "launching kernels" if self.launch_bound and most in ("forward", "backward") else most


def step_of(
    cluster: Cluster, workload: Workload, rates: Rates, cost: NetworkCost, *, images: int, world_size: int
) -> Step:
    """A step of `images` a rank on the first `world_size` GPUs of a cluster."""
    way = paths(cluster, world_size)
    forward, backward, last_backward = _network(workload, rates, cost, images)
    gathered = images * world_size * (workload.embedding_size + 2) * 4
    gather = 0.0
    if world_size > 1:  # there, and the gradient back; and the sums of loss and flags
        gather = 2 * all_gather_s(way, gathered) + all_reduce_s(way, 8 * (2 + world_size))
    total, exposed = gradients_s(way, 4.0 * cost.parameters, last_backward)
    return Step(
        images=images,
        world_size=world_size,
        loader=loader_s(cluster, workload, rates, images, way.local),
        critical={
            "forward": forward,
            "gather": gather,
            "mining and loss": mining_and_loss_s(rates, images, images * world_size, workload.embedding_size),
            "backward": backward,
            "all-reduce, exposed": rates.exposed_share * exposed,
            "optimiser": optimizer_s(cost, rates.bytes_per_s, workload.optimizer),
            "other": rates.fixed_s,
        },
        all_reduce_s=total,
        shares_cores=rates.shares_cores,
        launch_bound=launch_bound(rates, cost, min(images, workload.micro_batch or images)),
    )


def mining_and_loss_s(rates: Rates, images: int, candidates: int, embedding_size: int) -> float:
    """b anchors against N candidates: work grows as b * N * d beyond what the small operations take anyway."""
    product = images * candidates * embedding_size
    return rates.mining_floor_s + rates.mining_s * max(0.0, product - rates.mining_base)


def _network(workload: Workload, rates: Rates, cost: NetworkCost, images: int) -> tuple[float, float, float]:
    """Forward, backward, and the backward of the last part, which alone hides the all-reduce.

    In parts of `micro_batch` images the forward runs twice (GradCache).
    """
    at_once = workload.micro_batch
    if at_once is None or at_once >= images:
        forward, backward = network_s(rates, cost, images)
        return forward, backward, backward
    parts = ceil(images / at_once)
    forward, backward = network_s(rates, cost, at_once)
    share = images / at_once  # the last part may be smaller
    return 2 * max(share, parts - 1) * forward, max(share, parts - 1) * backward, backward
