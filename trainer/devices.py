"""Which device a command computes on, and how the ranks of a machine share its CPU cores."""

import os
import re

import torch


def share_cores() -> None:
    """Gives PyTorch this rank's part of the machine's CPU cores."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))


def resolve(name: str) -> str:
    """The device that `--device` means for this rank: auto is its own GPU where there is one.

    Raises:
        ValueError: it is no device, or there is no such one.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if available else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device is {name!r}; allowed are auto, cpu, cuda and cuda:N")
    if name.startswith("cuda") and not available:
        raise ValueError(f"--device is {name}, but PyTorch sees no GPU here; use cpu")
    return name
