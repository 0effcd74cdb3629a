"""Runs a function in real gloo processes."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` in each of `world_size` ranks of one gloo group; what each returned, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, folder, function, args), nprocs=world_size)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save(function(*args), f"{folder}/{rank}")
    dist.destroy_process_group()
