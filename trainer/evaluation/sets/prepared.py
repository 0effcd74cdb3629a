"""What the sets of `sets` have in common: found and checked before anything is embedded, then judged by each embedder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from data_shards.index import Split
from trainer.evaluation.measures import Scalars
from trainer.evaluation.protocols import HEADLINE_NEIGHBOURS, SetResult

Embed = Callable[[Split, np.ndarray | None], tuple[Tensor, Tensor]]
"""Embeds (a part of) a split over all ranks; whole on every rank: embeddings (n, d) and labels (n,)."""
Part = tuple[Split, NDArray[np.int64]]
"""Samples of a split."""


@dataclass(kw_only=True, frozen=True)
class Report:
    """What results say beside their figures, and where they are computed."""

    margin: float | None
    """Of the training's loss; None: soft margin."""
    squared: bool
    """Whether the loss's distance is the squared one."""
    device: str = "cpu"

    def about(self, samples: int, left_out: dict[str, int], protocol: dict[str, Any]) -> Scalars:
        """The scalars that every result begins with."""
        return {
            "samples": samples,
            "margin": self.margin,
            "distance": "squared" if self.squared else "root",
            "knn_headline": None,
            "headline_neighbours": HEADLINE_NEIGHBOURS,
            "refusals": {},
            "protocol": {"ranks": [], "knn": [], "fars": []} | protocol,
            **left_out,
        }


class Prepared(Protocol):
    """A set whose pictures are found."""

    @property
    def name(self) -> str: ...

    def judge(self, embedded: Embed, report: Report) -> SetResult:
        """What an embedder does on it; every rank calls it and has the same result."""
        ...


def embed_parts(embedded: Embed, parts: Sequence[Part], what: str) -> Tensor:
    """Embeddings of all parts, one after the other, unit norm, float32, shape (n, d), on the CPU.

    Raises:
        ValueError: one is not finite or zero; `what` names the set.
    """
    found = torch.cat([embedded(split, samples)[0] for split, samples in parts if len(samples)]).float()
    broken = int((~torch.isfinite(found).all(dim=1)).sum())
    if broken:
        raise ValueError(
            f"{broken} of {len(found)} embeddings of {what} hold NaN or infinity; the model diverged or is damaged"
        )
    zero = int((~found.any(dim=1)).sum())
    if zero:
        raise ValueError(f"{zero} of {len(found)} embeddings of {what} are zero; they have no direction")
    return normalize(found, dim=1)


def named_missing(missing: Sequence[str], named: int = 5) -> str:
    """The first of them, for an error."""
    return ", ".join(missing[:named]) + (" …" if len(missing) > named else "")
