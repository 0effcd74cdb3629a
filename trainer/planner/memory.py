"""Memory of one rank in a step, by what holds it."""

from trainer.planner.network import NetworkCost
from trainer.planner.workload import Cluster, Workload

CONTEXT_BYTES = 2**30
"""CUDA's context, NCCL's buffers, cuDNN's workspaces (assumed)."""
HOLES = 0.1
"""Of the activations, lost between blocks of the allocator (assumed)."""
MINING_TENSORS = 12
"""float32 blocks of similarities at once; benchmarks/README.md: 128 MiB at 65,536 candidates, gradient included."""
PREFETCHED = 3
"""Batches that DALI holds (`Decoder.ahead`)."""


def memory_bytes(
    cluster: Cluster, workload: Workload, cost: NetworkCost, images: int, world_size: int
) -> dict[str, float]:
    """Bytes at the peak of a step, where the backward begins.

    Args:
        images: b, of one rank. world_size: W; N = b * W candidates.
    """
    from trainer.metric.pool import SIMILARITIES

    at_once = min(images, workload.micro_batch or images)
    candidates, d = images * world_size, workload.embedding_size
    block = min(images * candidates, max(SIMILARITIES, candidates))
    moments = {"adamw": 8, "sgd": 4}[workload.optimizer]
    decoded = 3 * workload.pixels if cluster.decode == "gpu" else 0.0
    size = 3 * workload.image_size**2
    found = {
        "weights, gradients, optimiser": (8.0 + moments) * cost.parameters,
        "weights in bf16": cost.saved_once_bytes,
        "activations": cost.saved_bytes * at_once,
        "holes": HOLES * cost.saved_bytes * at_once,
        "batches": images * (PREFETCHED * size + decoded) + 4.0 * size * at_once,
        "gathered embeddings": candidates * (2 * (4 * d + 8) + 4 * d) * (world_size > 1),
        "mining blocks": 4.0 * MINING_TENSORS * block,
    }
    if cluster.gpu.name != "cpu":
        found["CUDA, NCCL, cuDNN"] = float(CONTEXT_BYTES)
    return found
