"""What is to be trained and on what: the planner's input, checked. Errors name the option of `facescale plan`."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from trainer.config import unknown_trunk
from trainer.planner.hardware import Gpu, Network, Precision, Storage

Decode = Literal["cpu", "gpu"]
MOST = {"--nodes": 65_536, "--gpus-per-node": 64, "--images": 10**11, "--identities": 10**9, "--picture-bytes": 10**8}


@dataclass(kw_only=True, frozen=True)
class Workload:
    """The training job; sizes in pixels and bytes.

    Raises:
        ValueError: a value is not allowed; one line that names its option.
    """

    trunk: str = "resnet50"
    image_size: int = 112
    p: int = 64
    """P: identities of the global batch."""
    k: int = 4
    """K: images of each of them."""
    embedding_size: int = 128
    precision: Precision = "bf16"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    micro_batch: int | None = None
    """Images of a rank that go through the network at once (`run.micro_batch`); None: all."""
    images: int = 3_141_890
    """Of the training split. The defaults are VGGFace2's training set (Cao et al. 2018)."""
    identities: int = 8_631
    picture_width: int = 137
    picture_height: int = 180
    picture_bytes: float = 15_000
    epochs: int = 20

    def __post_init__(self) -> None:
        if said := unknown_trunk(self.trunk):
            raise ValueError(f"--trunk is {said}")
        _among("--precision", self.precision, get_args(Precision))
        _among("--optimizer", self.optimizer, ("adamw", "sgd"))
        for option, value, least, most in (
            ("--image-size", self.image_size, 16, 1024),
            ("--p", self.p, 2, 10**7),
            ("--k", self.k, 2, 10**5),
            ("--dim", self.embedding_size, 2, 4096),
            ("--images", self.images, 4, MOST["--images"]),
            ("--identities", self.identities, 2, MOST["--identities"]),
            ("--picture-size", self.picture_width, 1, 65_535),
            ("--picture-size", self.picture_height, 1, 65_535),
            ("--picture-bytes", self.picture_bytes, 1, MOST["--picture-bytes"]),
            ("--epochs", self.epochs, 1, 10**6),
            ("--micro-batch", self.micro_batch or 1, 1, 10**7),
        ):
            between(option, value, least, most)
        if self.identities * 2 > self.images:
            raise ValueError(
                f"--identities is {self.identities:,}; with --images {self.images:,} at most {self.images // 2:,} are "
                "allowed: an identity needs two images"
            )
        if self.p > self.identities:
            raise ValueError(f"--p is {self.p:,}; allowed is at most --identities, {self.identities:,}")

    @property
    def batch_size(self) -> int:
        """N = P * K images of the global batch."""
        return self.p * self.k

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def pixels(self) -> float:
        """Of a picture as it is stored."""
        return float(self.picture_width * self.picture_height)


@dataclass(kw_only=True, frozen=True)
class Cluster:
    """Machines of one kind.

    Raises:
        ValueError: as `Workload`.
    """

    gpu: Gpu
    gpus_per_node: int = 8
    nodes: int = 1
    network: Network
    storage: Storage
    cores_per_node: int = 96
    decode: Decode = "gpu"
    links_per_node: int | None = None
    """Of the network; None: what is usual for it."""
    jpeg_per_s: float | None = None
    """Pictures that one GPU decodes a second; None: the assumption in `loading`."""
    price: float | None = None
    """Per GPU and hour; None: the assumed one."""

    def __post_init__(self) -> None:
        _among("--decode", self.decode, get_args(Decode))
        between("--gpus-per-node", self.gpus_per_node, 1, MOST["--gpus-per-node"])
        between("--nodes", self.nodes, 1, MOST["--nodes"])
        between("--cores-per-node", self.cores_per_node, 1, 4096)
        between("--links-per-node", 1 if self.links_per_node is None else self.links_per_node, 1, 64)
        between("--price", self.gpu.price if self.price is None else self.price, 0, 10_000)
        between("--jpeg-per-s", 1 if self.jpeg_per_s is None else self.jpeg_per_s, 1, 10**7)

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def cores_per_gpu(self) -> float:
        return self.cores_per_node / self.gpus_per_node

    @property
    def price_per_gpu_hour(self) -> float:
        return self.gpu.price if self.price is None else self.price


def images_per_rank(workload: Workload, cluster: Cluster) -> int:
    """b = P*K/W.

    Raises:
        ValueError: W does not divide P*K.
    """
    images, world = workload.batch_size, cluster.world_size
    if images % world:
        step = world // math.gcd(world, workload.k)
        raise ValueError(
            f"--p is {workload.p}, --k {workload.k}: P*K = {images:,} is not divisible by the {world:,} GPUs; "
            f"--p must be a multiple of {step}"
        )
    return images // world


def between(option: str, value: float, least: float, most: float) -> None:
    """Refuses what is outside, and what is no number."""
    if not least <= value <= most:
        raise ValueError(f"{option} is {value:,}; allowed is {least:,} to {most:,}")


def _among(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; allowed are {', '.join(allowed)}")
