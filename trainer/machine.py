"""What a figure belongs to: the machine and the versions, the spread of what was measured, and memory."""

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine(*packages: str) -> dict[str, object]:
    """CPU, cores and versions, to be kept with every figure."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) if has(name) else "not installed" for name in ("facescale", *packages)},
    }


def has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {
        "median": round(median, digits),
        "lower_quartile": round(low, digits),
        "upper_quartile": round(high, digits),
    }


def memory(field: str) -> float:
    """MiB of this process; a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def reset_peak() -> float:
    """Makes VmHWM the present size; returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
