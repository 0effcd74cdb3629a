"""From storage to the device: read, plan, decode, copy. The loader runs ahead of the step, so its slowest stage counts."""

from trainer.planner.rates import Rates
from trainer.planner.workload import Cluster, Workload

CPU_S_PER_PIXEL = 2 / 6590 / 224**2
"""Of a stored picture, one core. Measured here: DALI decoded 6,590 pictures of 224 px a second on two cores (design.md)."""
CPU_S_PER_OUTPUT_PIXEL = (2 / 3460 - 2 / 6590) / 112**2
"""Resize, colour, mirror: the whole pipeline to 112 px in uint8 made 3,460 a second (ibid.)."""
ENGINE_PIXELS_PER_S, ENGINE_S = 200e6, 50e-6
"""Of one core of the GPU's JPEG decoder, and its time for a picture of any size. Assumed: nobody publishes it for faces."""
HYBRID_SHARE = 0.5
"""Of the CPU's decoding that stays on the CPU where the GPU has no such decoder: Huffman codes (assumed)."""


def cpu_decode_s(pixels: float, image_size: int) -> float:
    """CPU seconds of one picture of so many pixels through DALI's pipeline on one core."""
    return CPU_S_PER_PIXEL * pixels + CPU_S_PER_OUTPUT_PIXEL * image_size**2


def loader_s(cluster: Cluster, workload: Workload, rates: Rates, images: int, local_ranks: int) -> dict[str, float]:
    """Seconds of each stage for one rank's batch while `local_ranks` of its machine load theirs.

    Returns:
        read, plan (CPU), decode and copy, which work side by side but where `Rates.shares_cores`.
    """
    together = images * local_ranks
    storage = cluster.storage
    read = together * max(workload.picture_bytes / (1e6 * storage.mb_s), 1 / storage.reads_per_s)
    on_cpu = rates.decode_scale * cpu_decode_s(workload.pixels, workload.image_size)
    decode = images * on_cpu / cluster.cores_per_gpu
    sent = 3.0 * workload.image_size**2
    if cluster.decode == "gpu":
        sent = workload.picture_bytes
        if cluster.jpeg_per_s is not None:
            decode = images / cluster.jpeg_per_s
        elif cluster.gpu.jpeg_engines:
            decode = images * (workload.pixels / ENGINE_PIXELS_PER_S + ENGINE_S) / cluster.gpu.jpeg_engines
        else:
            decode *= HYBRID_SHARE
    threads = cluster.cores_per_gpu if rates.shares_cores else 1  # a rank's plan is one thread's work
    return {
        "read": read,
        "plan": images * rates.plan_s / threads,
        "decode": decode,
        "copy": images * sent / (1e9 * cluster.gpu.host_gb_s),
    }
