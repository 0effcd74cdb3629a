"""What would make a plan faster, cheaper or possible: each line is itself a prediction, made by planning anew."""

from dataclasses import replace
from math import ceil

from trainer.planner.capacity import Capacity, with_cores
from trainer.planner.step import Step, step_of
from trainer.planner.workload import Cluster

WORTH = 1.03
"""Only what makes a step so many times as fast is told."""
GOOD_EFFICIENCY = 0.8


def advice(capacity: Capacity) -> list[str]:
    """Lines, most urgent first."""
    lines = [*_memory(capacity), *_loader(capacity), *_precision(capacity), *_network(capacity), *_batch(capacity)]
    return lines or ["nothing here is worth changing: the network's own arithmetic limits"]


def _memory(capacity: Capacity) -> list[str]:
    """Parts of the batch, for what does not fit."""
    if capacity.fits:
        return []
    most = f"the largest --p that fits is {capacity.largest_p:,}" if capacity.largest_p else "no --p fits"
    return [
        f"memory: does not fit: {most}; --micro-batch 32 (run.micro_batch) keeps activations flat for a second forward"
    ]


def _loader(capacity: Capacity) -> list[str]:
    step, cluster = capacity.step, capacity.cluster
    limit = step.limit
    if step.shares_cores or limit not in step.loader:
        return []
    path = sum(step.critical.values())
    if limit == "decode" and (cluster.decode == "cpu" or not cluster.gpu.jpeg_engines):
        cores = ceil(cluster.cores_per_node * step.loader["decode"] / path)
        lifted = with_cores(capacity, cores)
        more = (cores - cluster.cores_per_node) / cluster.gpus_per_node
        return [
            f"decode limits: {more:.1f} more cores for each GPU ({cores:,} a machine) would lift {step.images_per_s:,.0f} to "
            f"{lifted.images_per_s:,.0f} images/s"
        ]
    bound = step.images * step.world_size / path
    how = {
        "read": f"a faster --storage, or {capacity.dataset.tar_bytes / 1e9:,.0f} GB of memory to keep shards in (--storage ram)",
        "decode": "more GPUs, smaller pictures in the shards, or --decode cpu beside it",
        "plan": "more ranks: the plan of a rank is one thread's work",
        "copy": "nothing but smaller pictures",
    }[limit]
    return [f"{limit} limits: {how}; without it {step.images_per_s:,.0f} would be {bound:,.0f} images/s"]


def _precision(capacity: Capacity) -> list[str]:
    job, gpu = capacity.workload, capacity.cluster.gpu
    if not job.bf16 and gpu.half_tflops and not gpu.bf16:
        return [f"precision: {gpu.name} has no bf16 and facescale offers no fp16: its tensor cores stay idle"]
    return []


def _network(capacity: Capacity) -> list[str]:
    """Ten times the links, if the gradients' way shows."""
    step, cluster = capacity.step, capacity.cluster
    if step.world_size == 1 or step.critical["all-reduce, exposed"] + step.critical["gather"] < 0.03 * step.seconds:
        return []
    faster = replace(cluster, network=replace(cluster.network, gbit_s=10 * cluster.network.gbit_s))
    lifted = _again(capacity, faster)
    alone = next(row.weak for row in capacity.scaling if row.gpus >= min(cluster.gpus_per_node, 1024))
    if alone.images_per_s > step.images_per_s:
        return [
            f"network: one machine alone would be faster: {alone.images_per_s:,.0f} images/s with as many images for each GPU; "
            "a faster --network or larger batches"
        ]
    share = (step.critical["all-reduce, exposed"] + step.critical["gather"]) / step.seconds
    line = f"network: {share:.0%} of the step waits for other GPUs"
    if lifted.seconds * WORTH < step.seconds:
        line += f"; ten times its bandwidth would lift {step.images_per_s:,.0f} to {lifted.images_per_s:,.0f} images/s"
    return [f"{line}; larger batches for each GPU, or run.gradient_compression bf16, make it less"]


def _batch(capacity: Capacity) -> list[str]:
    """What twice the batch would bring, where launches or exchange dominate."""
    step, job = capacity.step, capacity.workload
    most = min(capacity.largest_p, 16 * job.p)
    if most < 2 * job.p:
        return []
    larger = most - most % job.p
    images = larger * job.k // step.world_size
    lifted = _again(capacity, capacity.cluster, images)
    if lifted.images_per_s < WORTH * step.images_per_s:
        return []
    return [
        f"batch: {step.images} images for each rank are few beside what a step costs anyway; --p {larger:,} ({images:,} images) "
        f"would lift {step.images_per_s:,.0f} to {lifted.images_per_s:,.0f} images/s"
    ]


def _again(capacity: Capacity, cluster: Cluster, images: int | None = None) -> Step:
    each = capacity.step.images if images is None else images
    world = cluster.world_size
    return step_of(cluster, capacity.workload, capacity.rates, capacity.cost, images=each, world_size=world)
