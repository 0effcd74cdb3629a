"""What of the stack works on this machine."""

import importlib.metadata
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

_PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "accelerate",
    "deepspeed",
    "webdataset",
    "numpy",
    "faiss-gpu",
)


class Check(NamedTuple):
    name: str
    ok: bool
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Tries each part for real; a part that fails is a Check with what to do about it, never an exception."""
    parts: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("packages", _packages),
        ("cpu", _cpu),
        ("gpu", _gpu),
        ("dali", _dali),
        ("faiss", _faiss),
        ("gather", _gather),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
    )
    return [_tried(name, part) for name, part in parts]


def _tried(name: str, part: Callable[[], Check]) -> Check:
    try:
        return part()
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(
            name,
            False,
            f"{type(error).__name__}: {' '.join(str(error).split())}",
            "reinstall: rm -rf .venv && make setup",
        )


def _packages() -> Check:
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return Check("packages", True, found)


def _cpu() -> Check:
    from trainer.precision import cpu_has_bf16

    cores = len(os.sched_getaffinity(0))
    return Check(
        "cpu", True, f"{cores} cores, bf16 {'in hardware' if cpu_has_bf16() else 'emulated: training uses fp32'}"
    )


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", True, "none: everything runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("gpu", True, ", ".join(names))


def _dali() -> Check:
    import io

    import torch
    from PIL import Image

    from data_shards.augment import central_square
    from data_shards.decode import Decoder

    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 50)).save(file, "JPEG", quality=95)
    encoded = [np.frombuffer(file.getvalue(), np.uint8)]
    side = np.array([32])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = Decoder(lambda: (encoded, central_square(side, side)), 1, 16, device, threads=1).next()
    found = images.float().mean((0, 2, 3)).round().int().tolist()
    right = all(abs(value - wanted) <= 3 for value, wanted in zip(found, (200, 100, 50), strict=True))
    return Check("dali", right, f"decodes JPEG on the {device}", f"mean colour {found} instead of [200, 100, 50]")


def _faiss() -> Check:
    import torch

    from trainer.evaluation.index import gpu_count, search

    points = torch.eye(8)
    _, found = search(points, points, 1)
    right = found[:, 0].tolist() == list(range(8))
    return Check("faiss", right, f"exact search on the CPU and {gpu_count()} GPUs", "reinstall faiss-gpu")


def _gather() -> Check:
    from trainer.collectives import backends

    return Check(
        "gather", "gloo" in backends(), f"backends {', '.join(backends())}", "this PyTorch was built without gloo"
    )


def _shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    advice = "NCCL and worker processes need /dev/shm: docker run --shm-size=8g"
    return Check("shared memory", free >= 2**28, f"{free / 2**30:.1f} GiB free in /dev/shm", advice)


def _open_files() -> Check:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Check("open files", limit >= 1024, f"at most {limit:,}", "each mapped shard needs one: ulimit -n 65536")
