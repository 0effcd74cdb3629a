"""Published figures against the planner's prediction. Three of them are what utilisation was fitted to, and say so."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trainer.planner.hardware import GPUS, NETWORKS, STORAGE, Precision
from trainer.planner.network import NetworkCost, measure
from trainer.planner.rates import FITTED, README, TENSORFLOW, Basis, gpu_rates
from trainer.planner.step import step_of
from trainer.planner.workload import Cluster, Workload

ARCFACE = "https://github.com/deepinsight/insightface/blob/master/recognition/arcface_torch"
MXNET = "https://developer.nvidia.com/deep-learning-performance-training-inference"


@dataclass(kw_only=True, frozen=True)
class Point:
    """One published measurement of training, images/s of all GPUs."""

    name: str
    gpu: str
    gpus: int
    precision: Precision
    network: Callable[[], NetworkCost]
    batch: int
    """Images of one GPU."""
    images_per_s: float
    source: str
    certain: bool = True
    """False: written down from memory or second hand; the source has not been read again for it."""
    note: str = ""


@dataclass(kw_only=True, frozen=True)
class Checked:
    point: Point
    fitted: bool
    predicted: float
    """Images/s."""
    cautious: float
    """Images/s, on that basis."""

    @property
    def cautious_error(self) -> float:
        return self.cautious / self.point.images_per_s - 1

    @property
    def error(self) -> float:
        """Predicted / published - 1."""
        return self.predicted / self.point.images_per_s - 1


def _resnet50(bf16: bool) -> NetworkCost:
    return measure("resnet50", 224, 1000, bf16)


_HALF, _FULL = partial(_resnet50, True), partial(_resnet50, False)
_R50, _R100 = partial(measure, "iresnet50", 112, 512, True), partial(measure, "iresnet100", 112, 512, True)
_PFC = "arcface_torch, Partial FC 0.1; its class layer is not counted"

POINTS: tuple[Point, ...] = (
    Point(name="ResNet-50, A100", gpu="a100", gpus=1, precision="bf16", network=_HALF, batch=256, images_per_s=2470,
          source=README),
    Point(name="ResNet-50, 8 x A100", gpu="a100", gpus=8, precision="bf16", network=_HALF, batch=256,
          images_per_s=16_621, source=README),
    Point(name="ResNet-50, A100, TF32", gpu="a100", gpus=1, precision="fp32", network=_FULL, batch=256,
          images_per_s=938, source=README, certain=False),
    Point(name="ResNet-50, 8 x A100, TF32", gpu="a100", gpus=8, precision="fp32", network=_FULL, batch=256,
          images_per_s=7248, source=README, certain=False),
    Point(name="ResNet-50, V100, fp16", gpu="v100", gpus=1, precision="bf16", network=_HALF, batch=256,
          images_per_s=1200, source=README, certain=False),
    Point(name="ResNet-50, 8 x V100, fp16", gpu="v100", gpus=8, precision="bf16", network=_HALF, batch=256,
          images_per_s=8322, source=README, certain=False),
    Point(name="ResNet-50, V100, fp32", gpu="v100", gpus=1, precision="fp32", network=_FULL, batch=128,
          images_per_s=367, source=README, certain=False),
    Point(name="ResNet-50, P100, fp32", gpu="p100", gpus=1, precision="fp32", network=_FULL, batch=64,
          images_per_s=219, source=TENSORFLOW, certain=False, note="TensorFlow, synthetic data"),
    Point(name="ResNet-50, 8 x P100, fp32", gpu="p100", gpus=8, precision="fp32", network=_FULL, batch=64,
          images_per_s=1734, source=TENSORFLOW, certain=False, note="TensorFlow, synthetic data"),
    Point(name="ResNet-50, 8 x H100", gpu="h100", gpus=8, precision="bf16", network=_HALF, batch=256,
          images_per_s=56_056, source=MXNET, certain=False, note="second hand; MXNet with fused layers, we believe"),
    Point(name="IResNet-50 112 px, 8 x V100, fp16", gpu="v100", gpus=8, precision="bf16", network=_R50, batch=128,
          images_per_s=5004, source=f"{ARCFACE}/docs/speed_benchmark.md", note=f"{_PFC} (3 M identities)"),
    Point(name="IResNet-50 112 px, 8 x V100, fp16", gpu="v100", gpus=8, precision="bf16", network=_R50, batch=128,
          images_per_s=4385, source=f"{ARCFACE}/README.md", note=f"{_PFC} (4 M identities)"),
    Point(name="IResNet-100 112 px, 8 x V100, fp16", gpu="v100", gpus=8, precision="bf16", network=_R100, batch=128,
          images_per_s=3247, source=f"{ARCFACE}/README.md", note=f"{_PFC} (2 M identities)"),
)  # fmt: skip


def check() -> tuple[Checked, ...]:
    """Every published point with its prediction; the loader is taken to keep up."""
    return tuple(_checked(point) for point in POINTS)


def _checked(point: Point) -> Checked:
    fit = FITTED[GPUS[point.gpu].family(point.precision)]
    fitted = (point.gpu, point.precision, point.gpus) == (fit.gpu, fit.precision, 1)
    return Checked(
        point=point, fitted=fitted, predicted=_predict(point, "arithmetic"), cautious=_predict(point, "cautious")
    )


def _predict(point: Point, basis: Basis) -> float:
    """Images/s; a classifier: no embeddings are gathered and nothing is mined."""
    gpu = GPUS[point.gpu]
    cluster = Cluster(gpu=gpu, gpus_per_node=point.gpus, network=NETWORKS["hdr"], storage=STORAGE["ram"])
    job, rates = Workload(optimizer="sgd"), gpu_rates(gpu, point.precision, basis)
    step = step_of(cluster, job, rates, point.network(), images=point.batch, world_size=point.gpus)
    seconds = sum(value for name, value in step.critical.items() if name not in ("gather", "mining and loss"))
    return point.gpus * point.batch / seconds
