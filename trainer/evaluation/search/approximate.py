"""Approximate nearest neighbours by faiss, for galleries where exact search takes too long; never without its recall.

Not yet run, for want of a GPU: `device` other than "cpu". HNSW has no GPU form; faiss says so.
"""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.evaluation import index
from trainer.evaluation.search.similarity import Rows, neighbours_of, read

METHODS = ("ivf", "hnsw", "ivfpq")


@dataclass(kw_only=True, frozen=True)
class ApproximateConfig:
    """How an approximate index is built and searched."""

    method: str = "ivf"
    """ivf: cells around k-means centres, of which the nearest are searched (Sivic and Zisserman 2003). ivfpq: the same with
    vectors kept as product-quantised codes (Jegou et al. 2011). hnsw: a graph of neighbours (Malkov and Yashunin 2018); its build
    on several threads is not the same every time, so neither is its result."""
    cells: int | None = None
    """ivf, ivfpq: cells; the default is 4 sqrt(m), but at most m / 39, below which faiss warns of too few points for k-means."""
    probed: int = 32
    """ivf, ivfpq: cells searched for each probe."""
    code_bytes: int = 32
    """ivfpq: bytes of a vector's code; must divide d."""
    links: int = 32
    """hnsw: neighbours of a node."""
    effort: int = 128
    """hnsw: nodes kept in view during a search, efSearch."""
    candidates: int = 10
    """Candidates asked of the index for each neighbour; the exact order of them is then taken in float64."""
    sample: int = 1000
    """Probes, evenly spread, that are searched exactly, too, to say the recall; all, where there are fewer."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; allowed are {', '.join(METHODS)}")
        for name in ("probed", "code_bytes", "links", "effort", "candidates", "sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def factory(self, size: int) -> str:
        """faiss' description of the index for a gallery of so many rows."""
        if self.method == "hnsw":
            return f"HNSW{self.links},Flat"
        cells = self.cells or max(1, min(int(4 * sqrt(size)), size // 39))
        return f"IVF{cells},Flat" if self.method == "ivf" else f"IVF{cells},PQ{self.code_bytes}"

    def settings(self) -> dict[str, float]:
        return {"efSearch": self.effort} if self.method == "hnsw" else {"nprobe": self.probed}


class Approximated(NamedTuple):
    """Neighbours that an approximate index found, and how far they are to be trusted."""

    similarities: Tensor
    """By definition, as of exact search; shape (n, k), float32, descending; -inf where the index found fewer than k."""
    positions: Tensor
    """Shape (n, k), int64; -1 where the index found fewer than k."""
    recall: float
    """Share of the exact k nearest neighbours of the sampled probes that were found."""
    sampled: int
    """Probes in that sample."""


def search_approximately(
    gallery: Rows, probes: Rows, k: int, config: ApproximateConfig, device: str = "cpu"
) -> Approximated:
    """About the k gallery rows with the largest inner product for each probe. The index holds the gallery or its codes in memory.

    Args:
        gallery, probes, k, device: see `index.search`.
    Raises:
        ValueError: see `index.search`; there is no probe to take the recall from; a setting does not fit the gallery; faiss is
            not installed.
    """
    index.check(gallery, probes, k)
    asked = read(probes)
    if not len(asked):
        raise ValueError(
            "no probes: an approximate search is not given without its recall, and there is none to be had"
        )
    if not index.faiss_installed():
        raise ValueError(f"{config.method} search needs faiss, which is not installed; exact search works without it")
    if config.method == "ivfpq" and gallery.shape[1] % config.code_bytes:
        raise ValueError(
            f"code_bytes is {config.code_bytes}; it must divide the vectors' {gallery.shape[1]} dimensions"
        )
    wanted = min(k * config.candidates, len(gallery))
    found = index.candidates(config.factory(len(gallery)), config.settings(), gallery, asked, wanted, device)
    keys = torch.cat(
        [index.ranked(gallery, *both, k) for both in zip(found.split(4096), asked.split(4096), strict=True)]
    )
    similarities, positions = neighbours_of(keys)
    positions = positions.masked_fill(similarities == float("-inf"), -1)
    sample = torch.arange(0, len(asked), -(-len(asked) // config.sample))
    exact = index.search(gallery, asked[sample], k, device)[1]
    hits = (positions[sample][:, :, None] == exact[:, None, :]).any(1)
    return Approximated(similarities, positions, float(hits.double().mean()), len(sample))
