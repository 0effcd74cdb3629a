"""Collectives of a step by the usual cost model, bytes over bandwidth plus hops times latency, within machines and between them.

Source: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH" (ring); NCCL's double binary trees
between machines, so latency grows with log2 (Jeaugey 2019, "Massively Scale Your Deep Learning Training with NCCL 2.4").
"""

from dataclasses import dataclass
from math import ceil, log2

from trainer.planner.workload import Cluster

LINK_SHARE = 0.8
"""Of a link's line rate that collectives attain (assumed)."""
BUCKET_BYTES = 25 * 2**20
"""DDP's bucket_cap_mb: gradients travel in so large parts while the backward goes on."""


@dataclass(kw_only=True, frozen=True)
class Paths:
    """Between `local` GPUs of each of `nodes` machines."""

    local: int
    nodes: int
    peer_bytes_per_s: float
    """Of one GPU to its neighbours in the machine."""
    peer_latency_s: float
    node_bytes_per_s: float
    """Of one machine to the others, all its links together."""
    node_latency_s: float

    @property
    def world_size(self) -> int:
        return self.local * self.nodes


def paths(cluster: Cluster, world_size: int) -> Paths:
    """Of the first so many GPUs of a cluster, machine after machine; a last machine counts as a full one."""
    local = min(world_size, cluster.gpus_per_node)
    usual = cluster.gpus_per_node if cluster.network.link_for_each_gpu else 1
    links = usual if cluster.links_per_node is None else cluster.links_per_node
    return Paths(
        local=local,
        nodes=ceil(world_size / local),
        peer_bytes_per_s=LINK_SHARE * 1e9 * cluster.gpu.peer_gb_s,
        peer_latency_s=cluster.gpu.peer_latency_s,
        node_bytes_per_s=LINK_SHARE * links * cluster.network.gbit_s * 1e9 / 8,
        node_latency_s=cluster.network.latency_s,
    )


def all_gather_s(way: Paths, size: float) -> float:
    """Until every rank has `size` bytes, of which it brought 1/W; a reduce-scatter of as many takes as long.

    (W-1)/W of them come in through each GPU's links, (n-1)/n through each machine's.
    """
    world, nodes = way.world_size, way.nodes
    bandwidth = size * ((world - 1) / world / way.peer_bytes_per_s + (nodes - 1) / nodes / way.node_bytes_per_s)
    return bandwidth + _hops_s(way)


def all_reduce_s(way: Paths, size: float) -> float:
    """Sum of `size` bytes over all ranks: 2 (g-1)/g of them within machines of g GPUs, 2 (n-1)/n between n machines."""
    within = 2 * (way.local - 1) / way.local * size / way.peer_bytes_per_s
    between = 2 * (way.nodes - 1) / way.nodes * size / way.node_bytes_per_s
    return within + between + 2 * _hops_s(way)


def gradients_s(way: Paths, size: float, backward_s: float) -> tuple[float, float]:
    """All-reduce of the weights' gradients in DDP's buckets: its whole time, and what of it the backward does not hide.

    The first bucket is ready after 1/m of the backward, the last at its end: exposed is what exceeds (m-1)/m of the
    backward, and at least the last bucket.
    """
    if way.world_size == 1:
        return 0.0, 0.0
    buckets = max(1, ceil(size / BUCKET_BYTES))
    total = buckets * all_reduce_s(way, size / buckets)
    return total, max(total / buckets, total - backward_s * (buckets - 1) / buckets)


def _hops_s(way: Paths) -> float:
    return (way.local - 1) * way.peer_latency_s + ceil(log2(way.nodes)) * way.node_latency_s
