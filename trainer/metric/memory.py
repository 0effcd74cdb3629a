"""Embeddings of past batches, which are candidates of later ones."""

import torch
from torch import Tensor


class CrossBatchMemory:
    """The newest `size` embeddings and their labels, oldest overwritten first. Of all ranks, so it is the same on each.

    Source: Wang, Zhang, Huang, Scott 2020, "Cross-Batch Memory for Embedding Learning", section 3.3.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._embeddings: Tensor | None = None
        self._identities: Tensor | None = None
        self._next = 0

    def contents(self) -> tuple[Tensor, Tensor] | None:
        """Embeddings (m, d) and labels (m,) in no particular order, m at most `size`; None before anything was added."""
        if self._embeddings is None or self._identities is None:
            return None
        return self._embeddings, self._identities

    def add(self, embeddings: Tensor, identities: Tensor) -> None:
        """Remembers embeddings (n, d), without gradient, and their labels (n,); nothing where `size` is 0."""
        if not self.size:
            return
        new, labels = embeddings.detach()[-self.size :], identities[-self.size :]
        if self._embeddings is None or self._identities is None:
            self._embeddings, self._identities = new.clone(), labels.clone()
            return
        room = self.size - len(self._embeddings)
        self._embeddings = torch.cat([self._embeddings, new[:room]])
        self._identities = torch.cat([self._identities, labels[:room]])
        new, labels = new[room:], labels[room:]
        if len(new):
            places = (self._next + torch.arange(len(new), device=new.device)) % self.size
            self._embeddings[places], self._identities[places] = new, labels
            self._next = (self._next + len(new)) % self.size

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; empty before anything was added."""
        if self._embeddings is None or self._identities is None:
            return {}
        return {
            "embeddings": self._embeddings,
            "identities": self._identities,
            "next": torch.tensor(self._next),
        }

    def load(self, state: dict[str, Tensor], device: torch.device | str) -> None:
        if state:
            self._embeddings, self._identities = state["embeddings"].to(device), state["identities"].to(device)
            self._next = int(state["next"])
