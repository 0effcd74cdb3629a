"""The only import of torch.distributed. With one process every function here is the identity.

NCCL is used where accelerate set it up (CUDA), gloo elsewhere; nothing here asks which.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of ranks, W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number in [0, W)."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(values: Tensor) -> Tensor:
    """Values of all ranks in rank order, without gradient: (b, …) -> (W*b, …). Every rank brings the same shape."""
    if world_size() == 1:
        return values
    gathered = values.new_empty((world_size() * len(values), *values.shape[1:]))
    dist.all_gather_single(gathered, values.contiguous())
    return gathered


def gather_with_grad(values: Tensor) -> Tensor:
    """`gather` whose backward sums, over all ranks, the gradient that each of them has for this rank's values.

    So the sum of all ranks' losses has the gradient that one process with all values would compute.
    """
    return values if world_size() == 1 else _GatherWithGrad.apply(values)


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return gather(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        summed = gradient.new_empty((len(gradient) // world_size(), *gradient.shape[1:]))
        dist.reduce_scatter_single(summed, gradient.contiguous())
        return summed


def gather_rows(values: Tensor) -> Tensor:
    """`gather` for a number of rows that differs between ranks: (b_r, …) -> (sum of b_r, …) in rank order."""
    if world_size() == 1:
        return values
    rows = gather(torch.tensor([len(values)], device=values.device)).tolist()
    padded = values.new_zeros((max(rows), *values.shape[1:]))
    padded[: len(values)] = values
    parts = gather(padded).reshape(world_size(), max(rows), *values.shape[1:])
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


def broadcast_buffers(module: nn.Module) -> None:
    """Gives every rank rank 0's buffers (BatchNorm's running statistics), which are those that checkpoints hold."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over all ranks; no gradient, the argument is left as it is."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def backends() -> list[str]:
    """Names of the backends that this PyTorch was built with."""
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, there in available.items() if there]
