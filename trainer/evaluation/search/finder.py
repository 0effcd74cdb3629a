"""How the protocols find neighbours: exactly, the probes or the gallery shared among the ranks, or by an approximate index whose
recall goes with the results."""

from typing import Any

import torch
from torch import Tensor

from trainer.collectives import gather_objects, gather_rows
from trainer.evaluation.search import rank_search
from trainer.evaluation.search.approximate import METHODS, ApproximateConfig, search_approximately

EXACT, SPLIT = "exact", "split"
"""Both exact: each rank searches the whole gallery for its slice of the probes, or its slice of the gallery for all probes."""
SEARCHES = (EXACT, SPLIT, *METHODS)


class Finder:
    """Finds neighbours with all ranks together; every rank calls it with the same arguments and has the same result.

    Args:
        method: "exact", "split" (a device then holds only its rank's slice of the gallery), or one of `approximate.METHODS`.
        device: see `index.search`.
    """

    def __init__(self, method: str = EXACT, device: str = "cpu") -> None:
        self._method, self._device = method, device
        self._recalls: list[tuple[float, int]] = []

    def __call__(self, gallery: Tensor, probes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Similarities and positions of the k nearest, shape (n, k) each; -inf and -1 where an index found fewer.

        Raises:
            ValueError: see `index.search` and `approximate.search_approximately`.
        """
        if self._method == EXACT:
            return rank_search.search(gallery, probes, k, self._device)
        if self._method == SPLIT:
            begin, end = rank_search.slice_of(len(gallery))
            return rank_search.search_split_gallery(gallery[begin:end], begin, probes, k, self._device)
        begin, end = rank_search.slice_of(len(probes))
        config = ApproximateConfig(method=self._method)
        if begin == end:
            found, recall = (torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)), (0.0, 0)
        else:
            got = search_approximately(gallery, probes[begin:end], k, config, self._device)
            found, recall = (got.similarities, got.positions), (got.recall, got.sampled)
        sampled: list[tuple[float, int]] = gather_objects(recall)
        count = sum(number for _, number in sampled)
        self._recalls.append((sum(share * number for share, number in sampled) / max(count, 1), count))
        similarities, positions = (gather_rows(part) for part in found)
        return similarities, positions

    def told(self) -> dict[str, Any]:
        """What results say of their search: `search` and, of approximate ones, the lowest recall among the searches so far."""
        if self._method not in METHODS:
            return {"search": self._method}
        recall, sampled = min(self._recalls, default=(None, 0))
        return {"search": self._method, "search_recall": recall, "search_recall_probes": sampled}


def owners(identities: Tensor, positions: Tensor) -> Tensor:
    """Identities at these positions; -1, which no identity is, where there is none."""
    return torch.where(positions < 0, -1, identities[positions])
