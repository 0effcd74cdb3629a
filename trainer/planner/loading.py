"""From storage to the device: read, plan, decode, copy. The loader runs ahead of the step, so its slowest stage counts."""

from trainer.planner.rates import Rates
from trainer.planner.workload import Cluster, Workload

CPU_S, CPU_S_PER_PIXEL, CPU_S_PER_OUTPUT_PIXEL = 70e-6, 1.65e-9, 2.3e-9
"""One core's seconds for a picture, a stored pixel of it and a pixel of the batch with data.decoder libjpeg. Least squares of the
relative errors over `MEASURED`: within 14 % but for 224 to 112 pixels (-21 %)."""
MEASURED = {
    (160, 56): 115e-6, (160, 112): 142e-6, (160, 224): 200e-6, (224, 112): 230e-6, (224, 224): 286e-6, (320, 56): 216e-6,
    (320, 112): 251e-6, (320, 224): 409e-6,
}  # fmt: skip
"""CPU seconds of the whole loader, by side of the picture and of the batch: one decoding thread, synthetic JPEGs of 5 to 12 KB, a
quiet AMD EPYC, 2026-11-28, medians of five. Calibrate for your pictures and machine."""
ENGINE_PIXELS_PER_S, ENGINE_S = 200e6, 50e-6
"""Of one core of the GPU's JPEG decoder, and its time for a picture of any size. Assumed: nobody publishes it for faces."""
HARDWARE_LOAD = 0.65
"""Of the pictures, by the hardware decoder (data.hardware_load); the cores have the others at the same time."""
HYBRID_SHARE = 0.5
"""Of the CPU's decoding that stays on the CPU where the GPU has no such decoder: Huffman codes (assumed)."""


def cpu_decode_s(pixels: float, image_size: int) -> float:
    """CPU seconds of one picture of so many pixels through libjpeg-turbo and the resize on one core."""
    return CPU_S + CPU_S_PER_PIXEL * pixels + CPU_S_PER_OUTPUT_PIXEL * image_size**2


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
            engine = (workload.pixels / ENGINE_PIXELS_PER_S + ENGINE_S) / cluster.gpu.jpeg_engines
            decode = max(HARDWARE_LOAD * images * engine, (1 - HARDWARE_LOAD) * HYBRID_SHARE * decode)
        else:
            decode *= HYBRID_SHARE
    threads = cluster.cores_per_gpu if rates.shares_cores else 1  # a rank's plan is one thread's work
    return {
        "read": read,
        "plan": images * rates.plan_s / threads,
        "decode": decode,
        "copy": images * sent / (1e9 * cluster.gpu.host_gb_s),
    }
