"""Backward and update, by DDP (or none) and by DeepSpeed: what the step needs of them, in the same words.

An update is left out on all ranks alike where any gradient is not finite: gradients are the same on every rank by then.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer


class Engine(Protocol):
    """A network that is being trained."""

    @property
    def model(self) -> nn.Module:
        """As it is called in training."""

    def part(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one part of an update's batch; the last averages the gradients over the ranks."""

    def backward(self, loss: Tensor) -> None:
        """Adds a loss's gradients to those of earlier parts."""

    def update(self, bad: Tensor) -> Tensor:
        """Changes the weights unless `bad` (0-d) is above 0 or a gradient is not finite; returns 1 where it left that out, 0-d.

        Gradients are cleared.
        """


class PlainEngine:
    """DDP, or one process. Nothing here waits for the device.

    Args:
        optimizer: a fused one, for these can leave out an update without asking the host.
        clip_norm: gradients of a larger norm over all parameters are scaled down to it; 0 never.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, clip_norm: float = 0.0) -> None:
        self.model, self._optimizer, self._clip_norm = model, optimizer, clip_norm
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(self, last: bool) -> AbstractContextManager[Any]:
        model = self.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, bad: Tensor) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)  # 0-d
        left_out = ((bad > 0) | ~norm.isfinite()).float()
        if self._clip_norm:
            clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        self._optimizer.found_inf = left_out  # type: ignore[attr-defined]  # what GradScaler tells fused optimisers, too
        self._optimizer.step()
        self._optimizer.zero_grad()
        return left_out


class DeepSpeedEngine:
    """DeepSpeed's ZeRO-1 or -2, which looks at the gradients itself and clips as its JSON file says."""

    def __init__(self, engine: Any) -> None:
        self.model = self._engine = engine
        engine.optimizer.check_grad_overflow = True

    def part(self, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def update(self, bad: Tensor) -> Tensor:
        self._engine.step()
        return torch.tensor(float(self._engine.optimizer.overflow), device=bad.device)
