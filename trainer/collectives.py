"""The only import of torch.distributed. With one process every function here is the identity.

NCCL is used where accelerate set it up (CUDA), gloo elsewhere. Not yet run, for want of a GPU: `join` with `cuda`, and how CPU
tensors travel by way of the GPU in `_carrier`.
"""

import multiprocessing
import os
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.phases import recorder


def world_size() -> int:
    """Number of ranks, W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number in [0, W)."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(cuda: bool) -> None:
    """Enters the group of the ranks that a launcher started, unless that is done or there is one process alone.

    Args:
        cuda: whether ranks compute on GPUs; NCCL then carries what lies there.
    Raises:
        ValueError: the launcher's environment variables do not fit together, or ranks do not come.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the ranks of this job do not come together: {str(error).splitlines()[0]}") from None


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
    sent = values.contiguous().to(_carrier(values.device))
    gathered = sent.new_empty((world_size() * len(sent), *sent.shape[1:]))
    dist.all_gather_single(gathered, sent)
    return gathered.to(values.device)


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


def gather_labelled(embeddings: Tensor, identities: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of all ranks, with gradient as `gather_with_grad`, and their labels, in one collective.

    Args:
        embeddings: shape (b, d). identities: int64, shape (b,).
    Returns:
        Shapes (W*b, d) and (W*b,), in rank order.
    """
    return (embeddings, identities) if world_size() == 1 else _GatherLabelled.apply(embeddings, identities)


class _GatherLabelled(torch.autograd.Function):
    """The labels travel as the bits of further columns."""

    @staticmethod
    def forward(context: Any, embeddings: Tensor, identities: Tensor) -> tuple[Tensor, Tensor]:
        columns = identities.contiguous().view(embeddings.dtype).view(len(identities), -1)  # (b, 1 or 2)
        both = gather(torch.cat([embeddings, columns], 1))  # (W*b, d + 1 or 2)
        size = embeddings.shape[1]
        labels = both[:, size:].contiguous().view(torch.int64).view(-1)
        context.mark_non_differentiable(labels)
        return both[:, :size].contiguous(), labels

    @staticmethod
    def backward(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return _GatherWithGrad.backward(context, gradient), None


def gather_objects(value: Any) -> list[Any]:
    """A small picklable value of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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


def time_all_reduce(model: nn.Module, compression: str) -> None:
    """Has DDP's averaging of gradients told to whoever records: when each bucket sets out and when it is averaged.

    Args:
        model: with DDP around it, or left alone; without a hook of its own.
        compression: bf16 or none, as `run.gradient_compression`.
    """
    averaged = bf16_compress_hook if compression == "bf16" else allreduce_hook

    def timed(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        recording = recorder()
        if recording is None:
            return averaged(group, bucket)
        done = recording.bucket(bucket.is_last())

        def told(future: torch.futures.Future[Tensor]) -> Tensor:
            done()
            return future.value()

        return averaged(group, bucket).then(told)

    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, timed)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over all ranks; no gradient, the argument is left as it is."""
    return _all_reduce(value, dist.ReduceOp.SUM)


def all_reduce_max(value: Tensor) -> Tensor:
    """Largest of all ranks, element by element; no gradient, the argument is left as it is."""
    return _all_reduce(value, dist.ReduceOp.MAX)


def _all_reduce(value: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return value
    total = value.detach().to(_carrier(value.device), copy=True)
    dist.all_reduce(total, operation)
    return total.to(value.device)


def _carrier(device: torch.device) -> torch.device:
    """Where values of a device lie while they travel: a group of NCCL alone, as accelerate makes it, takes no CPU tensors."""
    return torch.device("cuda") if device.type == "cpu" and dist.get_backend() == "nccl" else device


def backends() -> list[str]:
    """Names of the backends that this PyTorch was built with."""
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, there in available.items() if there]


def try_all_reduce(backend: str, timeout_s: float = 60.0) -> float:
    """Seconds that two fresh processes of this machine take, start included, until each has the sum of 1 and 2 from the other.

    Raises:
        RuntimeError: they do not get it, for the reason that it says.
        TimeoutError: they are not done in time.
    """
    begun = time.perf_counter()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    try:
        asked = [pool.submit(_sum_of_ranks, backend, address, number) for number in range(2)]
        found = [future.result(timeout_s) for future in asked]
    finally:
        for process in list(pool._processes.values()):
            process.kill()  # one may wait for ever
        pool.shutdown(cancel_futures=True)
    if found != [3.0, 3.0]:
        raise RuntimeError(f"1 + 2 came out as {found[0]} and {found[1]}")
    return time.perf_counter() - begun


def _sum_of_ranks(backend: str, address: str, number: int) -> float:
    dist.init_process_group(backend, init_method=address, rank=number, world_size=2, timeout=timedelta(seconds=30))
    value = torch.tensor([number + 1.0], device=f"cuda:{number}" if backend == "nccl" else "cpu")
    dist.all_reduce(value)
    found = value.item()
    dist.destroy_process_group()
    return found


class Board:
    """A small text of every rank that all can read at any time, also while collectives hang: it has a connection of its own.

    Raises:
        RuntimeError: the process that keeps the board is gone (here and in `post` and `read`).
    """

    def __init__(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        start = os.environ.get(
            "TORCHELASTIC_RESTART_COUNT", "0"
        )  # torchrun's store outlives the ranks that it starts again
        self._place = f"facescale/{start}"

    @staticmethod
    def reachable() -> bool:
        """Whether there are other ranks, started by a launcher."""
        return world_size() > 1 and "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ

    def post(self, text: str) -> None:
        self._store.set(f"{self._place}/{rank()}", text)

    def read(self) -> list[str]:
        """Of each rank, in order; empty where one has not posted yet."""
        keys = [f"{self._place}/{number}" for number in range(world_size())]
        return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]
