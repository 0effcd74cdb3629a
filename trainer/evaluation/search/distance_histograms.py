"""How the distances of genuine and of impostor pairs spread, over all pairs of a set: exact counts in one blocked pass."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainer.collectives import all_reduce_sum
from trainer.evaluation.search.pair_blocks import Block, Sorted, from_impostor_blocks, genuine_pairs, similarities_of
from trainer.evaluation.search.similarity import summing_error

BINS = 100
"""Between the distances 0 and 2."""
_SQUARED = BINS**2 / 2
"""A squared distance 2 - 2 s in squared bins is this x (1 - s)."""
_ROUNDED = 0.002
"""What float32 can take from or add to that."""
_NO_PAIR = 255


def distance_histograms(samples: Sorted) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs by their root L2 distance, sqrt(2 - 2 s) of the similarity s that `similarity` defines, in float64.

    Every rank calls it with the same set and has the same result. A product in float32 says of nearly every pair in which bin it
    is; the few that are closer to an edge than such a product can be off are compared in float64. Memory: the sorted embeddings
    and 20 MiB for each thread.

    Returns:
        edges, shape (101,), float64, from 0 to 2; genuine and impostor pairs in each bin, shape (100,) each, int64. A bin holds
        its lower edge, the last one both.
    """
    genuine, impostor = (torch.zeros(BINS, dtype=torch.int64) for _ in range(2))
    for counts in from_impostor_blocks(samples, lambda blocks: _of_stripe(samples, blocks)):
        impostor += counts
    for pairs in genuine_pairs(samples):
        genuine += counted(similarities_of(samples.embeddings, pairs).cpu())
    return _edges(), all_reduce_sum(genuine), all_reduce_sum(impostor)


def _of_stripe(samples: Sorted, blocks: Iterator[Block]) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    for row, column, block in blocks:
        sure, close = _binned(block.cpu().numpy(), samples)
        counts += sure + counted(similarities_of(samples.embeddings, close + torch.tensor([row, column])).cpu())
    return counts


def counted(similarities: Tensor) -> Tensor:
    """Similarities in each bin, shape (100,)."""
    distances = (2 - 2 * similarities.double()).clamp(min=0).sqrt()
    bins = torch.searchsorted(_edges(), distances, right=True) - 1
    return torch.bincount(bins.clamp(max=BINS - 1), minlength=BINS)


def _edges() -> Tensor:
    return torch.linspace(0, 2, BINS + 1, dtype=torch.float64)


def _binned(similarities: np.ndarray, samples: Sorted) -> tuple[Tensor, Tensor]:
    """Pairs surely in each bin, shape (100,), and the places of those too close to an edge, shape (k, 2)."""
    squared = np.subtract(1, similarities)
    np.clip(np.multiply(squared, _SQUARED, out=squared), 0, _NO_PAIR**2, out=squared)  # -inf, no pair, goes to the top
    root = np.sqrt(squared)
    bins = root.astype(np.uint8)
    nearest = np.clip(np.rint(root, out=root), 1, BINS - 1, out=root)  # 0 and 2 part no bins
    np.multiply(nearest, nearest, out=nearest)
    np.abs(np.subtract(nearest, squared, out=squared), out=squared)
    close = squared <= _SQUARED * summing_error(samples.embeddings.shape[1]) + _ROUNDED
    counts = _counts(bins) - np.bincount(bins[close], minlength=256)
    counts[BINS - 1] += counts[BINS]  # a similarity that rounding put below -1
    return torch.from_numpy(counts[:BINS]), torch.from_numpy(np.argwhere(close))


def _counts(bins: np.ndarray) -> np.ndarray:
    """How often each of 256 values occurs, shape (256,); two neighbours are counted as one number, which takes half the time."""
    flat = bins.ravel()
    even = len(flat) // 2 * 2
    pairs = np.bincount(flat[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: np.ndarray = pairs.sum(0) + pairs.sum(1) + np.bincount(flat[even:], minlength=256)
    return counts
