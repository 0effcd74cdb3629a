"""What the device says of a step, read by the host without making it wait: on a GPU two steps later."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

GPU_LAG = 2
"""Steps after which a GPU's flags are read."""


class Verdict(NamedTuple):
    """The same on every rank."""

    step: int
    left_out: bool
    """Whether the update was left out, since a loss or a gradient is not finite."""
    stop: bool
    """Whether a rank was asked to stop."""
    ranks: tuple[int, ...]
    """Those whose embeddings are not finite or, where all are, whose loss is not."""

    def reason(self) -> str:
        """Why the update was left out."""
        if not self.ranks:
            return f"step {self.step}: a gradient is not finite (every rank's loss is)"
        named = ", ".join(map(str, self.ranks[:8])) + (
            f" and {len(self.ranks) - 8} more" if len(self.ranks) > 8 else ""
        )
        return f"step {self.step}: embeddings or loss of rank {named} are not finite"


class Flags:
    """Flags of steps under way. Every rank reads those of the same step at the same time, so that all decide alike."""

    def __init__(self, device: torch.device) -> None:
        self._lag = GPU_LAG if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, flags: Tensor) -> list[Verdict]:
        """Takes a step's flags (see `StepStats.flags`); returns the verdicts on steps that are old enough."""
        if not self._lag:
            self._waiting.append((step, flags, None))
        else:
            copy = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting.append((step, copy, event))
        return self._read(self._lag)

    def settle(self) -> list[Verdict]:
        """The verdicts on all steps so far; waits for the device."""
        return self._read(0)

    def _read(self, leave: int) -> list[Verdict]:
        found = []
        while len(self._waiting) > leave:
            step, flags, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            left_out, stop, *ranks = flags.tolist()
            worst = max(ranks)
            bad = tuple(number for number, value in enumerate(ranks) if worst and value == worst)
            found.append(Verdict(step, left_out > 0, stop > 0, bad))
        return found
