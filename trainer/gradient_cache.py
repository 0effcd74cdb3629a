"""Batches larger than memory: the loss sees the whole batch, the network a part of it at a time, and gradients stay exact."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.engine import Engine
from trainer.phases import phase


class GradientCache:
    """Forward without graph in parts, then once more with graph, part by part, against the cached gradient of the embeddings.

    The gradients are those of one forward of the whole batch whose BatchNorm takes its statistics from each part (with BatchNorm
    in evaluation mode: those of the whole batch). Random numbers of both forwards are the same, running statistics are
    updated once. Memory: the activations of one part and the embeddings.

    Args:
        part: images of this rank that go through the network at once; None all, then nothing is done twice.
    Source: Gao, Zhang, Han, Callan 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".
    """

    def __init__(self, engine: Engine, part: int | None) -> None:
        self._engine, self._part = engine, part
        self._parts: list[tuple[Tensor, ...]] = []
        self._states: list[_RandomState] = []
        self._embeddings: Tensor | None = None

    def forward(self, images: Tensor, colour: Tensor | None = None) -> Tensor:
        """Embeddings (b, d) of this rank's images, whose gradient `backward` carries on to the weights.

        Args:
            images, colour: what the network takes; see `Embedder.forward`.
        """
        inputs = (images,) if colour is None else (images, colour)
        if self._part is None or self._part >= len(images):
            self._embeddings = None
            embeddings: Tensor = self._engine.model(*inputs)
            return embeddings
        self._parts, self._states, parts = list(zip(*(rows.split(self._part) for rows in inputs), strict=True)), [], []
        with torch.no_grad():
            for part in self._parts:
                self._states.append(_RandomState(images.device))
                parts.append(self._engine.model(*part))
        self._embeddings = torch.cat(parts).requires_grad_()
        return self._embeddings

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss on what `forward` gave."""
        if self._embeddings is None:
            with self._engine.part(last=True):
                self._engine.backward(loss)
            return
        with phase("gather_mining_loss"):
            loss.backward()
        assert self._embeddings.grad is not None
        cached = self._embeddings.grad.split(self._part)
        with statistics_frozen(self._engine.model):
            for number, (part, gradient) in enumerate(zip(self._parts, cached, strict=True), start=1):
                self._states[number - 1].restore()
                with self._engine.part(last=number == len(self._parts)):
                    with phase("forward"):
                        embeddings = self._engine.model(*part)
                    self._engine.backward((embeddings * gradient).sum())
        self._embeddings, self._parts = None, []


class _RandomState:
    """Of the CPU's generator and, on a GPU, of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@contextmanager
def statistics_frozen(model: nn.Module) -> Iterator[None]:
    """BatchNorm in training mode goes on with the statistics of what it sees, but does not update its running ones."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class Statistics:
    """BatchNorm's running statistics, which a forward changes even where the update is then left out."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, _NormBase)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        self._kept = [buffer.clone() for buffer in self._buffers]

    def restore(self, left_out: Tensor) -> None:
        """Puts back what was kept, where `left_out` (0-d) is above 0; does not wait for the device."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            torch.where(left_out > 0, kept, buffer, out=buffer)
