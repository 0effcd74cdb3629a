"""What a rank attains of its device's peaks: for GPUs fitted to three published points; `calibration` has this machine."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from trainer.planner.hardware import GPUS, Gpu, Precision
from trainer.planner.network import NetworkCost, measure

Basis = Literal["arithmetic", "cautious"]
BANDWIDTH_SHARE = 0.85
"""Of the memory's peak, as streaming kernels attain it (assumed; BabelStream reports 0.8 to 0.93 on GPUs like these)."""
PLAIN_SHARE = 0.5
"""Of the float32 peak, in the matrix products of mining (assumed)."""
LAUNCH_S = 10e-6
"""Of a kernel started from Python (assumed). A step cannot be shorter than its launches."""
MINING_LAUNCHES = 100
"""benchmarks/README.md: "a hundred small operations"."""
LAUNCHES_PER_LAYER = 3
"""One forward, two backward."""
CPU_MINING_S = 212e-3 / (65_536 * 64 * 128)
"""For one product of b * N * d on two CPU cores; benchmarks/README.md, "A rank of 1,024"."""
README = (
    "https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/Classification/ConvNets/resnet50v1.5/README.md"
)
TENSORFLOW = "https://www.tensorflow.org/guide/performance/benchmarks"


@dataclass(kw_only=True, frozen=True)
class Rates:
    """Of one rank, while the others of its machine work, too."""

    flops_per_s: float
    """Of the network, forward and backward."""
    bytes_per_s: float
    """Of memory, where it is streamed."""
    traffic_bytes_per_s: float
    """Of memory, between the network's layers."""
    weight_bytes: float = 24.0
    """Moved for each parameter in forward and backward, whatever the batch: casts and layouts of weights and gradients."""
    overlaps: bool = True
    """Whether arithmetic hides behind memory traffic or the other way round; else both add up."""
    launch_s: float = 0.0
    """Of one kernel."""
    mining_s: float
    """For one product of b * N * d, forward and backward."""
    mining_floor_s: float = 0.0
    """Mining and loss of a batch of `mining_base` or less, without the gather."""
    mining_base: float = 0.0
    """b * N * d that `mining_floor_s` includes."""
    fixed_s: float = 0.0
    """Of a step, whatever its size."""
    exposed_share: float = 1.0
    """Of the all-reduce that `exchange.gradients_s` calls exposed, as calibrated."""
    shares_cores: bool = False
    """Whether loader and network compute on the same cores: then their seconds add up."""
    plan_s: float = 30e-6
    """CPU seconds of an image for its place in the plan and its bytes: 20 to 43 us seen on one thread of an EPYC."""
    decode_scale: float = 1.0
    """CPU seconds of decoding, of what `loading.cpu_decode_s` says."""
    memory_bytes: float = 0.0
    """Of the process beyond what `memory` counts: Python, libraries (calibrated alone)."""
    source: str


class Fitted(NamedTuple):
    """The published point that a family's utilisation is fitted to: ResNet-50, 224 px, one GPU."""

    gpu: str
    precision: Precision
    batch: int
    images_per_s: float
    source: str


FITTED: dict[str, Fitted] = {
    "half": Fitted("a100", "bf16", 256, 2470, f"{README} (DGX A100, mixed precision, 1 GPU)"),
    "tf32": Fitted("a100", "fp32", 256, 938, f"{README} (DGX A100, TF32, 1 GPU)"),
    "fp32": Fitted("p100", "fp32", 64, 219, f"{TENSORFLOW} (DGX-1 P100, synthetic data, 1 GPU)"),
}


def utilisation(family: str) -> float:
    """Share of the peak FLOP/s that a ResNet attains in PyTorch: such that the fitted point comes out exactly.

    Args:
        family: half, tf32 or fp32.
    """
    point, (cost, seconds) = FITTED[family], _fitted(family)
    return point.batch * cost.flops / seconds / GPUS[point.gpu].peak_flops(point.precision)


def traffic_share(family: str) -> float:
    """Share of the peak bandwidth, such that the fitted point would come out exactly if memory had been what limited it."""
    point, (cost, seconds) = FITTED[family], _fitted(family)
    return 3 * cost.traffic_bytes * point.batch / seconds / (1e9 * GPUS[point.gpu].bandwidth_gb_s)


@lru_cache(maxsize=8)
def _fitted(family: str) -> tuple[NetworkCost, float]:
    """Network of the fitted point, and the seconds of its step that are forward and backward."""
    point = FITTED[family]
    cost, bandwidth = measure("resnet50", 224, 1000, point.precision == "bf16"), _bandwidth(GPUS[point.gpu])
    weights = Rates.weight_bytes * cost.parameters / bandwidth
    return cost, point.batch / point.images_per_s - weights - optimizer_s(cost, bandwidth, "sgd")


def gpu_rates(gpu: Gpu, precision: Precision, basis: Basis = "arithmetic") -> Rates:
    """Predicted from the data sheet and one fitted point of the family.

    Args:
        basis: arithmetic: the fitted GPU was limited by its arithmetic, so others attain the same share of theirs. cautious: it
            may as well have been limited by its memory, so others are no faster than either explains. A ResNet's batch norms
            and ReLUs, unfused in PyTorch, make the latter likely where arithmetic has grown faster than bandwidth.
    """
    family = gpu.family(precision)
    share, streamed = utilisation(family), BANDWIDTH_SHARE if basis == "arithmetic" else traffic_share(family)
    fit = FITTED[family]
    return Rates(
        flops_per_s=share * gpu.peak_flops(precision),
        bytes_per_s=_bandwidth(gpu),
        traffic_bytes_per_s=streamed * 1e9 * gpu.bandwidth_gb_s,
        launch_s=LAUNCH_S,
        mining_s=mining_s(gpu),
        mining_floor_s=MINING_LAUNCHES * LAUNCH_S,
        source=f"predicted: {share:.1%} of the {family} peak, {streamed:.0%} of the bandwidth at most; fitted to "
        f"{fit.images_per_s:,.0f} images/s of one {GPUS[fit.gpu].name}, ResNet-50 at 224 px",
    )


def mining_s(gpu: Gpu) -> float:
    """For one product of b * N * d: four matrix products (similarities twice, the gradient's two), and 20 passes over the
    similarities in float32 (assumed), at d = 128."""
    products = 8 / (PLAIN_SHARE * 1e12 * gpu.fp32_tflops)
    return products + 20 * 4 / 128 / _bandwidth(gpu)


def network_s(rates: Rates, cost: NetworkCost, images: int) -> tuple[float, float]:
    """Seconds forward and backward of so many images: the slowest of arithmetic, memory and launches (arithmetic and
    memory together where they do not overlap); the weights' own copies come on top.

    The backward is taken to move twice what the forward moves.
    """
    seconds = max(_busy_s(rates, cost, images), _launches_s(rates, cost)) + weights_s(cost, rates)
    forward = cost.forward_flops / cost.flops
    return seconds * forward, seconds * (1 - forward)


def launch_bound(rates: Rates, cost: NetworkCost, images: int) -> bool:
    """Whether starting the kernels of forward and backward takes longer than they do."""
    return _launches_s(rates, cost) > _busy_s(rates, cost, images)


def _busy_s(rates: Rates, cost: NetworkCost, images: int) -> float:
    moved = 3 * cost.traffic_bytes * images / rates.traffic_bytes_per_s
    computed = cost.flops * images / rates.flops_per_s
    return max(computed, moved) if rates.overlaps else computed + moved


def _launches_s(rates: Rates, cost: NetworkCost) -> float:
    return rates.launch_s * LAUNCHES_PER_LAYER * cost.layers


def optimizer_s(cost: NetworkCost, bytes_per_s: float, kind: str = "adamw") -> float:
    """AdamW reads weight, gradient and two moments and writes all but the gradient: 28 bytes; SGD with momentum 20; the norm
    of the gradients reads 4 more."""
    return cost.parameters * ({"adamw": 28, "sgd": 20}[kind] + 4) / bytes_per_s


def weights_s(cost: NetworkCost, rates: Rates) -> float:
    """Seconds of a step that forward and backward spend on the weights' own copies."""
    return rates.weight_bytes * cost.parameters / rates.bytes_per_s


def _bandwidth(gpu: Gpu) -> float:
    return BANDWIDTH_SHARE * 1e9 * gpu.bandwidth_gb_s
