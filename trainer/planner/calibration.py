"""Rates of the machine at hand, out of the profile.json of `facescale profile`: predictions then start from what was measured."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.planner.exchange import LINK_SHARE, all_gather_s, gradients_s, paths
from trainer.planner.hardware import NETWORKS, PCIE_LATENCY_S, STORAGE, Gpu
from trainer.planner.loading import cpu_decode_s
from trainer.planner.memory import CONTEXT_BYTES, memory_bytes
from trainer.planner.network import NetworkCost, measure
from trainer.planner.rates import CPU_MINING_S, LAUNCH_S, LAUNCHES_PER_LAYER, Rates, mining_s, optimizer_s
from trainer.planner.workload import Cluster, Workload

LEAST_SHARE = 0.5
"""Of the network's measured time that stays when the loader's share is taken off it, whatever the loader says."""
CPU_WEIGHT_BYTES, CPU_TRAFFIC_SHARE = 88.0, 0.21
"""Of a CPU, in the optimiser's own bandwidth: what weights cost a parameter and a step, and at which share layers' outputs move.
Fitted here, to CPU seconds of ResNet-50 and ResNet-18 at 112 px on one core of an AMD EPYC; other machines will differ."""
_CPU_PEER_GB_S = 2.0
"""Loopback between processes, where a profile of one process cannot say (assumed)."""
_PHASES = ("wait", "copy", "forward", "gather_mining_loss", "backward", "all_reduce_exposed", "optimizer", "other")


@dataclass(kw_only=True, frozen=True)
class Profile:
    """What profile.json says, checked."""

    device: str
    ranks: int
    cores: int
    workload: Workload
    images_per_rank: int
    images_per_s: float
    """Of all ranks."""
    phases: dict[str, float]
    """Seconds of a step on the critical path; they add up to the step."""
    all_reduce_s: float
    plan_s: float
    """CPU seconds of an image."""
    decode_s: float
    """CPU seconds of an image."""
    loader_images_per_s: float
    """Of one rank's loader alone."""
    picture_pixels: float
    peak_memory_bytes: int

    @property
    def step_s(self) -> float:
        return sum(self.phases.values())

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


def read_profile(path: Path) -> Profile:
    """
    Raises:
        ValueError: the file is missing, is not JSON, or lacks a field or has one of another type; the line names it.
    """
    if not path.is_file():
        raise ValueError(
            f"--calibrate is {path}, which does not exist; it must be the profile.json of `facescale profile`"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--calibrate {path} is not JSON: {error}") from None
    get = _Reader(path, found)
    phases = {name: get.number("critical_path_s", name) for name in _PHASES}
    threads, ranks, each = (
        int(get.number(*name, least=1)) for name in (("loader", "threads"), ("ranks",), ("images_per_rank",))
    )
    workload = _workload(path, get)
    if each * ranks != workload.batch_size or sum(phases.values()) <= 0:
        raise ValueError(
            f"--calibrate {path}: ranks x images_per_rank is {ranks} x {each}; it must be p x k = {workload.batch_size}, and the "
            "sum of critical_path_s above 0"
        )
    return Profile(
        device=get.text("device"),
        ranks=ranks,
        cores=int(get.number("machine", "cores", least=1, default=threads * ranks)),
        workload=workload,
        images_per_rank=each,
        images_per_s=get.number("images_per_s"),
        phases=phases,
        all_reduce_s=get.number("all_reduce_total_s"),
        plan_s=get.number("loader", "cpu_s_per_image", "plan_and_bytes"),
        decode_s=get.number("loader", "cpu_s_per_image", "decode"),
        loader_images_per_s=get.number("loader", "images_per_s"),
        picture_pixels=get.number("loader", "mean_picture_pixels", least=1),
        peak_memory_bytes=int(get.number("peak_memory_bytes")),
    )


def _workload(path: Path, get: "_Reader") -> Workload:
    """As it was profiled; of pictures the mean size alone is known."""
    side = max(1, round(math.sqrt(get.number("loader", "mean_picture_pixels", least=1))))
    whole: dict[str, Any] = {name: int(get.number(name)) for name in ("image_size", "p", "k", "embedding_size")}
    words: dict[str, Any] = {name: get.text(name) for name in ("trunk", "precision")}
    size = get.number("loader", "mean_picture_bytes", least=1)
    images, identities = max(Workload.images, 2 * whole["p"]), max(Workload.identities, whole["p"])
    try:
        return Workload(
            **whole,
            **words,
            picture_width=side,
            picture_height=side,
            picture_bytes=size,
            images=images,
            identities=identities,
        )
    except ValueError as error:
        raise ValueError(f"--calibrate {path}: {error}") from None


class _Reader:
    """Fields of a profile by name, checked."""

    def __init__(self, path: Path, found: Any) -> None:
        self._path, self._found = path, found

    def number(self, *names: str, least: float = 0.0, default: float | None = None) -> float:
        value = self._value(names)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise ValueError(
                f"--calibrate {self._path}: {'.'.join(names)} is {value!r}; it must be a number from {least:g} on"
            )
        return value

    def text(self, name: str) -> str:
        value = self._value((name,))
        if not isinstance(value, str):
            raise ValueError(f"--calibrate {self._path}: {name} is {value!r}; it must be a text")
        return value

    def _value(self, names: tuple[str, ...]) -> Any:
        value = self._found
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def cpu_device(profile: Profile) -> Gpu:
    """This machine's CPU in a GPU's place: only what calibration needs of it."""
    ranks, exchanged = profile.ranks, 4.0 * _cost(profile.workload).parameters
    peer = _CPU_PEER_GB_S
    if ranks > 1 and profile.all_reduce_s > 0:
        peer = 2 * (ranks - 1) / ranks * exchanged / profile.all_reduce_s / LINK_SHARE / 1e9
    return Gpu(
        name="cpu", half_tflops=0, fp32_tflops=0, bandwidth_gb_s=0, memory_gb=_memory_gb(), peer_gb_s=peer,
        peer_latency_s=PCIE_LATENCY_S, host_gb_s=10, price=0, source="calibrated by facescale profile",
    )  # fmt: skip


def own_cluster(profile: Profile, gpu: Gpu) -> Cluster:
    """The machine that the profile was taken on, with as many ranks."""
    return Cluster(
        gpu=gpu,
        gpus_per_node=profile.ranks,
        network=NETWORKS["ethernet10"],
        storage=STORAGE["ram"],
        cores_per_node=profile.cores,
        decode="cpu" if profile.on_cpu else "gpu",
        jpeg_per_s=None if profile.on_cpu else max(1.0, profile.loader_images_per_s),
    )


def calibrated(profile: Profile, gpu: Gpu, ranks: int | None = None) -> Rates:
    """Rates of one of `ranks` ranks (None: as many as were profiled) of that machine.

    On a CPU the ranks share the machine's cores, so what all of them attain together stays; the loader's CPU seconds are taken
    off the network's measured time and come back, for their own workload, in `Step`.
    """
    cluster, cost, images = own_cluster(profile, gpu), _cost(profile.workload), profile.images_per_rank
    phases, share = profile.phases, profile.ranks / (ranks or profile.ranks) if profile.on_cpu else 1.0
    network = phases["forward"] + phases["backward"]
    if profile.on_cpu:
        loader = images * (profile.plan_s + profile.decode_s) / cluster.cores_per_gpu
        network = max(network + phases["wait"] - loader, LEAST_SHARE * network)
    parts = _network_parts(network, profile, cost)
    way = paths(cluster, profile.ranks)
    dimensions = profile.workload.embedding_size
    gather = 2 * all_gather_s(way, images * profile.ranks * (dimensions + 2) * 4) if profile.ranks > 1 else 0.0
    _, exposed = gradients_s(way, 4.0 * cost.parameters, phases["backward"])
    launch = 0.0 if profile.on_cpu else min(LAUNCH_S, parts.arithmetic_s / (LAUNCHES_PER_LAYER * cost.layers))
    return Rates(
        flops_per_s=share * cost.flops * images / parts.arithmetic_s,
        bytes_per_s=share * parts.bytes_per_s,
        traffic_bytes_per_s=share * 3 * cost.traffic_bytes * images / parts.traffic_s,
        weight_bytes=parts.weight_bytes,
        overlaps=not profile.on_cpu,
        launch_s=launch,
        mining_s=CPU_MINING_S * 2 / cluster.cores_per_gpu / share if profile.on_cpu else mining_s(gpu),
        mining_floor_s=max(0.0, phases["gather_mining_loss"] - gather),
        mining_base=images * images * profile.ranks * dimensions,
        fixed_s=phases["other"] + phases["copy"],
        exposed_share=phases["all_reduce_exposed"] / exposed if exposed else 1.0,
        shares_cores=profile.on_cpu,
        plan_s=profile.plan_s,
        decode_scale=profile.decode_s / cpu_decode_s(profile.picture_pixels, profile.workload.image_size)
        if profile.on_cpu
        else 1.0,
        memory_bytes=_unexplained_bytes(profile, cluster, cost),
        source=f"calibrated: {profile.images_per_s:,.1f} images/s measured on {profile.device}, {profile.ranks} rank(s)",
    )


class _Parts(NamedTuple):
    """What the network's measured seconds are put down to."""

    arithmetic_s: float
    traffic_s: float
    bytes_per_s: float
    weight_bytes: float


def _network_parts(seconds: float, profile: Profile, cost: NetworkCost) -> _Parts:
    """Splits forward and backward so that the parts give `seconds` again; arithmetic keeps at least `LEAST_SHARE`."""
    bandwidth = optimizer_s(cost, 1.0) / profile.phases["optimizer"] if profile.phases["optimizer"] > 0 else math.inf
    if not profile.on_cpu:
        weights = min(Rates.weight_bytes * cost.parameters / bandwidth, (1 - LEAST_SHARE) * seconds)
        rest = seconds - weights
        return _Parts(rest, rest, bandwidth, weights * bandwidth / cost.parameters if weights else 0.0)
    weights = CPU_WEIGHT_BYTES * cost.parameters / bandwidth
    traffic = 3 * cost.traffic_bytes * profile.images_per_rank / (CPU_TRAFFIC_SHARE * bandwidth)
    fitting = min(1.0, (1 - LEAST_SHARE) * seconds / (weights + traffic)) if weights + traffic else 1.0
    weights, traffic = fitting * weights, max(fitting * traffic, 1e-12)
    return _Parts(seconds - weights - traffic, traffic, bandwidth, CPU_WEIGHT_BYTES * fitting)


def _unexplained_bytes(profile: Profile, cluster: Cluster, cost: NetworkCost) -> float:
    """Of the measured peak: on a CPU the process with its libraries; on a GPU what `memory` forgets."""
    counted = sum(memory_bytes(cluster, profile.workload, cost, profile.images_per_rank, profile.ranks).values())
    return max(0.0, profile.peak_memory_bytes - counted + CONTEXT_BYTES * (not profile.on_cpu))


def _cost(workload: Workload) -> NetworkCost:
    return measure(workload.trunk, workload.image_size, workload.embedding_size, workload.bf16)


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
