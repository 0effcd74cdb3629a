"""Exact nearest neighbours by inner product; the only module that imports faiss.

faiss finds the candidates, a float64 re-ranking of those candidates decides. Reason: BLAS gives two equal gallery rows
inner products that differ in the last bit, by where they lie in its blocks, and faiss orders exact ties by its heap. So
the similarity of a pair is *defined* as its float64 inner product rounded to float32, neighbours are ordered by
descending similarity, and equal similarities by ascending gallery position. The answer then depends neither on the
number of threads, nor on the order of the probes, nor on whether faiss ran on a CPU or a GPU.

Where the k-th neighbour and the last candidate are too close to tell apart in float32 (duplicates, collapsed
embeddings), that probe is compared with the whole gallery in float64.

Not yet run, for want of a GPU: the body of `_gpu_search` (StandardGpuResources, index_cpu_to_gpu).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

SLACK = 16
"""Candidates asked of faiss beyond k, so that a close call at the k-th place seldom needs the whole gallery."""
TOLERANCE = 2e-5
"""Twice the largest error admitted for a float32 inner product of two unit vectors."""
GPU_MOST_NEIGHBOURS = 2048
"""The most neighbours that faiss' GPU index returns; more are searched for on the CPU."""
_CACHED = 1 << 19
"""Numbers held at once while re-ranking: 4 MiB as float64, which stays in a core's cache."""
_BLOCK = 1 << 22
"""Similarities held at once where a probe is compared with the whole gallery."""


def search(gallery: Tensor, probes: Tensor, k: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The k gallery rows with the largest inner product for each probe; exact, ties to the lowest position.

    Args:
        gallery: unit vectors, shape (m, d).
        probes: unit vectors, shape (n, d).
        k: neighbours for each probe, 1 to m.
        device: "cpu", or "cuda" / "cuda:N" for faiss' GPU index.
    Returns:
        similarities, shape (n, k), float32, descending, and positions in the gallery, shape (n, k), int64; on the CPU.
    Raises:
        ValueError: shapes do not fit, k is outside 1..m, or a number is not finite.
    """
    _check(gallery, probes, k)
    gallery, probes = (rows.detach().to("cpu", torch.float32).contiguous() for rows in (gallery, probes))
    wanted = min(k + SLACK, len(gallery))
    rough, candidates = _faiss_search(gallery.numpy(), probes.numpy(), wanted, device)
    similarities, positions = _rerank(gallery, probes, candidates, k)
    unsure = (rough[:, -1] > rough[:, k - 1] - TOLERANCE) if wanted < len(gallery) else torch.zeros(len(probes)).bool()
    if unsure.any():
        similarities[unsure], positions[unsure] = _whole_gallery(gallery, probes[unsure], k)
    return similarities, positions


def gpu_count() -> int:
    """Number of GPUs that faiss can use."""
    import faiss

    return faiss.get_num_gpus()


def _check(gallery: Tensor, probes: Tensor, k: int) -> None:
    if gallery.ndim != 2 or probes.ndim != 2 or gallery.shape[1] != probes.shape[1]:
        shapes = f"gallery has shape {tuple(gallery.shape)}, probes have {tuple(probes.shape)}"
        raise ValueError(f"{shapes}; both must be (rows, d) with the same d")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"{k} neighbours asked of a gallery of {len(gallery)} images; allowed is 1 to its size")
    if not (torch.isfinite(gallery).all() and torch.isfinite(probes).all()):
        raise ValueError("gallery or probes hold a number that is not finite; neighbours are not defined")


def _faiss_search(gallery: np.ndarray, probes: np.ndarray, k: int, device: str) -> tuple[Tensor, Tensor]:
    import faiss  # here and nowhere else: importing it takes half a second

    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    if torch.device(device).type == "cuda" and k <= GPU_MOST_NEIGHBOURS:
        similarities, positions = _gpu_search(faiss, index, probes, k, torch.device(device).index or 0)
    else:
        similarities, positions = index.search(probes, k)
    return torch.from_numpy(similarities), torch.from_numpy(positions)  # (n, k), (n, k)


def _gpu_search(faiss: Any, index: Any, probes: np.ndarray, k: int, gpu: int) -> tuple[np.ndarray, np.ndarray]:
    resources = faiss.StandardGpuResources()
    result: tuple[np.ndarray, np.ndarray] = faiss.index_cpu_to_gpu(resources, gpu, index).search(probes, k)
    return result


def _rerank(gallery: Tensor, probes: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of each probe's candidates by the definition above."""
    candidates = candidates.sort(dim=1).values  # (n, c): ascending, so that a stable sort breaks ties by position
    rows = max(1, _CACHED // (candidates.shape[1] * gallery.shape[1]))
    similarities = torch.empty(len(probes), k)
    positions = torch.empty(len(probes), k, dtype=torch.int64)
    for start in range(0, len(probes), rows):
        block = slice(start, start + rows)
        pairs = gallery[candidates[block]].double() * probes[block, None, :].double()  # (rows, c, d)
        similarities[block], best = _top(pairs.sum(dim=-1).float(), k)
        positions[block] = candidates[block].gather(1, best)
    return similarities, positions


def _whole_gallery(gallery: Tensor, probes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    blocks = []
    for block in probes.double().split(max(1, _BLOCK // len(gallery))):
        similarities = torch.cat([block @ part.double().T for part in gallery.split(4096)], dim=1)  # (rows, m)
        blocks.append(_top(similarities.float(), k))
    return torch.cat([values for values, _ in blocks]), torch.cat([positions for _, positions in blocks])


def _top(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, columns = similarities.sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns[:, :k]
