"""What of the stack works on this machine."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
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
    ("faiss-gpu", "faiss-cpu"),
)
"""Of alternatives one is enough."""
_CONVERTING = ("numpy", "pillow", "opencv-python-headless", "simplejpeg", "pyarrow")
"""What a machine needs that only turns pictures into shards."""
CGROUP = Path("/sys/fs/cgroup")
"""Where a container's limits are (cgroup v2)."""
DRIVER = Path("/proc/driver/nvidia/version")
"""There where NVIDIA's driver is loaded."""


class Check(NamedTuple):
    name: str
    ok: bool
    found: str
    advice: str = ""
    """What to do about it; where `ok`, what may be worth knowing."""


def examine(folder: Path = Path()) -> list[Check]:
    """Tries each part for real; a part that fails is a Check with what to do about it, never an exception.

    Args:
        folder: whose disk is measured: where the shards or runs are to lie.
    """
    training: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("gpu", _gpu),
        ("dali", _dali),
        ("faiss", _faiss),
        ("gather", _gather),
    )
    parts: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("packages", _packages),
        ("cpu", _cpu),
        ("memory", _memory),
        *(training if _trains() else ()),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
        ("disk", partial(_disk, folder)),
        ("clock", _clock),
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


def _trains() -> bool:
    """Whether this installation is for more than conversion."""
    return importlib.util.find_spec("torch") is not None


def _packages() -> Check:
    found = ", ".join(_version(names) for names in (_PACKAGES if _trains() else _CONVERTING))
    alone = "" if _trains() else "; conversion alone: training needs pip install 'facescale[gpu]'"
    return Check("packages", True, f"Python {platform.python_version()}, {found}{alone}")


def _version(names: str | tuple[str, ...]) -> str:
    first, *others = (names,) if isinstance(names, str) else names
    try:
        return f"{first} {importlib.metadata.version(first)}"
    except importlib.metadata.PackageNotFoundError:
        if not others:
            raise
        return _version(tuple(others))


def _cpu() -> Check:
    cores, allowed = len(os.sched_getaffinity(0)), _quota()
    found = f"{cores} cores"
    if _trains():
        from data_shards import resize
        from trainer.precision import cpu_has_bf16

        found += f", bf16 {'in hardware' if cpu_has_bf16() else 'emulated: training uses fp32'}"
        found += (
            f", pictures resized by {'compiled code' if resize.compiled() else 'PyTorch, for want of a C compiler'}"
        )
    if allowed is None or allowed >= cores:
        return Check("cpu", True, found)
    advice = (
        f"this container may use {allowed:g} cores' time, and threads are made for {cores}: docker run --cpuset-cpus"
    )
    return Check("cpu", False, f"{found}, of which the container may use {allowed:g}", advice)


def _quota() -> float | None:
    """Cores whose time a container may use, or None: all."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _memory() -> Check:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass  # no container, or one without a limit
    advice = "a process of training takes some 2 GiB: start fewer, or give the container more (docker run --memory)"
    return Check("memory", available >= 2 * 2**30, f"{available / 2**30:.1f} GiB available", advice)


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Check("gpu", True, f"{', '.join(names)}; CUDA {torch.version.cuda}")
    driver = DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else ""
    if not driver:
        return Check("gpu", True, "none: everything runs on the CPU")
    advice = (
        f"this PyTorch is for CUDA {torch.version.cuda}: a newer driver, docker run --gpus all, or CUDA_VISIBLE_DEVICES"
    )
    return Check("gpu", False, f"there is a driver, but PyTorch sees no GPU: {driver}", advice)


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
    right, seen, there = found[:, 0].tolist() == list(range(8)), gpu_count(), torch.cuda.device_count()
    advice = (
        "reinstall faiss-gpu"
        if seen >= there
        else f"FAISS sees {seen} of {there} GPUs: install faiss-gpu, not faiss-cpu"
    )
    return Check("faiss", right and seen >= there, f"exact search on the CPU and {seen} GPUs", advice)


def _gather() -> Check:
    import torch

    from trainer.collectives import backends, try_all_reduce

    tried = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    if tried not in backends():
        return Check("gather", False, f"backends {', '.join(backends())}", f"this PyTorch was built without {tried}")
    try:
        seconds = try_all_reduce(tried)
    except (RuntimeError, OSError) as error:  # a timeout is an OSError
        said = " ".join(str(error).split()) or type(error).__name__
        advice = "processes of this machine do not reach each other: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to one of "
        return Check(
            "gather", False, f"{tried}: {said[:300]}", advice + ", ".join(name for _, name in socket.if_nameindex())
        )
    return Check("gather", True, f"two processes added by {tried} in {seconds:.1f} s; backends {', '.join(backends())}")


def _shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    advice = "NCCL and worker processes need /dev/shm: docker run --shm-size=8g"
    return Check("shared memory", free >= 2**28, f"{free / 2**30:.1f} GiB free in /dev/shm", advice)


def _open_files() -> Check:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Check("open files", limit >= 1024, f"at most {limit:,}", "each mapped shard needs one: ulimit -n 65536")


def _disk(folder: Path) -> Check:
    """Sequential writing, waited for, and reading without the cache, MB/s of 10^6 bytes."""
    folder = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    block, blocks = os.urandom(2**20), 64
    free = shutil.disk_usage(folder).free
    advice = f"free some space, or say --folder with another place than {folder}"
    if free < 2**30:
        return Check("disk", False, f"{free / 1e9:.2f} GB free in {folder}", advice)
    with tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(2**20):
            pass
        read = time.perf_counter() - begin
    speeds = [blocks * 2**20 / seconds / 1e6 for seconds in (written, read)]
    found = f"{free / 1e9:,.0f} GB free in {folder}; writes {speeds[0]:,.0f} MB/s, reads {speeds[1]:,.0f} MB/s"
    slow = (
        "a GPU wants some 100 MB/s of pictures: keep shards on a local disk, or read them through data.stream.cache_dir"
    )
    return Check("disk", speeds[1] >= 100, found, slow)


def _clock() -> Check:
    """Stores refuse requests signed 15 minutes off, and logs of several machines are read side by side."""
    now = datetime.now(UTC)
    released = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    found = f"{now.isoformat(' ', 'seconds')}, {'kept by NTP' if _kept_by_ntp() else 'not known to be kept by NTP'}"
    advice = "set it, and have it kept: timedatectl set-ntp true"
    return Check("clock", now >= released - timedelta(days=1), found, advice)


def _kept_by_ntp() -> bool:
    """Whether the kernel takes its clock for synchronised (adjtimex(2); 5 is TIME_ERROR)."""
    room = ctypes.create_string_buffer(512)
    return 0 <= ctypes.CDLL(None).adjtimex(room) < 5
