"""Nearest neighbours by inner product; the only module that imports faiss, which may be missing.

`search` is exact, by what `similarity` defines: on a CPU by matrix products (`torch_search`), on GPUs by faiss where it is
installed. faiss finds candidates by float32 products, and a float64 re-ranking of those decides. Where the k-th neighbour and the
last candidate are too close to tell apart in float32 (duplicates, collapsed embeddings), that probe goes to `torch_search`.
`candidates` are those of an approximate index, for `approximate`.

This is the search of one process; `rank_search` shares it among all ranks.

Not yet run, for want of a GPU: `_to_gpus`, and all that follows a `device` of "cuda", "cuda:N" or "cuda:all".
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from trainer.evaluation.search import torch_search
from trainer.evaluation.search.similarity import Rows, chunks, keys_of, neighbours_of, read, similarities, summing_error

SLACK = 16
"""Candidates asked of faiss beyond k, so that a close call at the k-th place seldom needs the whole gallery."""
GPU_MOST_NEIGHBOURS = 2048
"""The most neighbours that faiss' GPU index returns; more are searched for by products."""
MOST_TRAINED = 1 << 18
"""Rows from which an approximate index learns its cells and codes."""
ALL_GPUS = "cuda:all"
_PROBES = 4096
"""Probes whose candidates are re-ranked together."""


def search(gallery: Rows, probes: Rows, k: int, device: str = "cpu", *, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """The k gallery rows with the largest inner product for each probe; exact, ties to the lowest position.

    Args:
        gallery: unit vectors, shape (m, d); a tensor, or an array, which may be a memory map and is then read in parts.
        probes: unit vectors, shape (n, d).
        k: neighbours for each probe, 1 to m.
        device: "cpu"; "cuda" or "cuda:N" for one GPU; "cuda:all" for the gallery split over all GPUs of this machine.
        engine: "torch", "faiss", or "auto": see `engine_of`. The result is the same.
    Returns:
        similarities, shape (n, k), float32, descending, and positions in the gallery, shape (n, k), int64; on the CPU.
    Raises:
        ValueError: shapes do not fit, k is outside 1..m, or a number is not finite; faiss is asked for and not installed.
    """
    check(gallery, probes, k)
    if engine_of(gallery, k, device, engine) == "faiss":
        return _by_faiss(gallery, read(probes), k, device)
    return torch_search.nearest(gallery, probes, k, "cuda" if device == ALL_GPUS else device)


def engine_of(gallery: Rows, k: int, device: str = "cpu", engine: str = "auto") -> str:
    """Which engine searches: faiss for a gallery in memory on GPUs; products by torch on the CPU, where they are faster, for a
    gallery that is read in parts, for many neighbours, and where faiss is not installed or has no GPUs.

    Raises:
        ValueError: an engine that does not exist, or faiss, and it is not installed.
    """
    if engine not in ("auto", "faiss", "torch"):
        raise ValueError(f"engine is {engine!r}; allowed are 'auto', 'faiss' and 'torch'")
    if engine == "faiss" and not faiss_installed():
        raise ValueError("engine is 'faiss', which is not installed here; 'torch' gives the same neighbours")
    if engine != "auto":
        return engine
    on_gpu = device.startswith("cuda") and isinstance(gallery, Tensor) and k + SLACK <= GPU_MOST_NEIGHBOURS
    return "faiss" if on_gpu and gpu_count() else "torch"


def engine_line(gallery: Rows, k: int, device: str = "cpu") -> str:
    """What will search, for the log, such as "exact search: matrix products (bfloat16, float32) on cpu, decided in float64"."""
    if engine_of(gallery, k, device) == "faiss":
        gpus = f"{gpu_count()} GPUs" if device == ALL_GPUS else device
        return f"exact search: faiss on {gpus}, decided in float64"
    tried = torch_search.products(
        len(gallery), torch_search.WORTH_ROUNDING, k, "cuda" if device == ALL_GPUS else device
    )
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in tried) or "float64"
    missing = "" if faiss_installed() else "; faiss is not installed"
    return f"exact search: matrix products ({names}) on {device}, decided in float64{missing}"


def faiss_installed() -> bool:
    return find_spec("faiss") is not None


def gpu_count() -> int:
    """Number of GPUs that faiss can use; 0 where faiss is not installed."""
    return int(_faiss().get_num_gpus()) if faiss_installed() else 0


def check(gallery: Rows, probes: Rows, k: int) -> None:
    """
    Raises:
        ValueError: shapes do not fit, or k is outside 1..m.
    """
    if gallery.ndim != 2 or probes.ndim != 2 or gallery.shape[1] != probes.shape[1]:
        shapes = f"gallery has shape {tuple(gallery.shape)}, probes have {tuple(probes.shape)}"
        raise ValueError(f"{shapes}; both must be (rows, d) with the same d")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"{k} neighbours asked of a gallery of {len(gallery)} images; allowed is 1 to its size")


def candidates(
    factory: str, settings: Mapping[str, float], gallery: Rows, probes: Tensor, count: int, device: str
) -> Tensor:
    """Positions that an approximate index gives, shape (n, count), in no order that counts; -1 where it found fewer.

    Args:
        factory: faiss' description of the index, such as "IVF1024,Flat". settings: its search-time parameters, by faiss' names.
    """
    faiss = _faiss()
    try:
        index = faiss.index_factory(gallery.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        for name, value in settings.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        if not index.is_trained:
            index.train(_spread(gallery, MOST_TRAINED).numpy())
        for _, rows in chunks(gallery):
            index.add(rows.numpy())
        _, positions = _to_gpus(faiss, index, device).search(probes.numpy(), count)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"faiss refuses an index {factory} of {len(gallery):,} rows: {reason}") from None
    return torch.from_numpy(positions)


def _spread(gallery: Rows, most: int) -> Tensor:
    """At most so many rows, evenly spread over the gallery."""
    return read(gallery[:: -(-len(gallery) // most)])


def _by_faiss(gallery: Rows, probes: Tensor, k: int, device: str) -> tuple[Tensor, Tensor]:
    wanted = min(k + SLACK, len(gallery))
    rough, found, longest = _flat(gallery, probes, wanted, device)
    keys = torch.cat(
        [ranked(gallery, *both, k) for both in zip(found.split(_PROBES), probes.split(_PROBES), strict=True)]
    )
    if wanted < len(gallery):
        near = 2 * summing_error(probes.shape[1]) * longest * probes.norm(dim=1)
        unsure = rough[:, -1] > rough[:, k - 1] - near
        if unsure.any():
            keys[unsure] = torch_search.in_float64(gallery, probes[unsure], k)
    return neighbours_of(keys)


def _flat(gallery: Rows, probes: Tensor, k: int, device: str) -> tuple[Tensor, Tensor, float]:
    """Products and positions of a flat index, shape (n, k), and the length of the longest row."""
    faiss, longest = _faiss(), 0.0
    index = faiss.IndexFlatIP(gallery.shape[1])
    for _, rows in chunks(gallery):
        index.add(rows.numpy())
        longest = max(longest, float(rows.norm(dim=1).max()))
    rough, positions = _to_gpus(faiss, index, device).search(probes.numpy(), k)
    return torch.from_numpy(rough), torch.from_numpy(positions), longest


def ranked(gallery: Rows, found: Tensor, probes: Tensor, k: int) -> Tensor:
    """Keys of the k nearest of each probe's candidates, shape (n, k).

    Args:
        found: positions, shape (n, c), c at least k; none twice in a row, but -1.
    """
    rows = torch.arange(len(found)).repeat_interleave(found.shape[1])
    values = similarities(gallery, found.flatten().clamp(min=0), probes, rows).view_as(found)
    keys = keys_of(values.masked_fill_(found < 0, float("-inf")), found.clamp(min=0))
    return keys.topk(k).values


def _faiss() -> Any:
    import faiss  # here and nowhere else: importing it takes half a second

    faiss.omp_set_num_threads(torch.get_num_threads())  # faiss brings an OpenMP of its own
    return faiss


def _to_gpus(faiss: Any, index: Any, device: str) -> Any:
    """The index where `device` says; on all GPUs each holds a part of the gallery."""
    if not device.startswith("cuda"):
        return index
    if device != ALL_GPUS:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), torch.device(device).index or 0, index)
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    return faiss.index_cpu_to_all_gpus(index, co=options)
