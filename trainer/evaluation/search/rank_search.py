"""Exact search by all ranks together: every rank calls, and has the whole result, the same for any number of ranks.

`search` where every rank has the whole gallery: each rank takes a slice of the probes. `search_split_gallery` where each rank has
a slice of the gallery: each finds its own k nearest of all probes, and these are merged by the order that `similarity` defines.
With one process both are `index.search`.
"""

import torch
from torch import Tensor

from trainer.collectives import gather, gather_objects, gather_rows, rank, world_size
from trainer.evaluation import index
from trainer.evaluation.search.similarity import NONE, Rows, keys_of, neighbours_of, read

_MERGED = 1 << 22
"""Neighbours gathered at a time."""


def search(gallery: Rows, probes: Rows, k: int, device: str = "cpu", *, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """`index.search`, the probes shared among the ranks. Every rank calls it with the same arguments.

    Raises:
        ValueError: see `index.search`; on every rank.
    """
    index.check(gallery, probes, k)
    read(probes)  # so that all ranks find what is not finite, not the one whose slice it lies in
    begin, end = slice_of(len(probes))
    found = index.search(gallery, probes[begin:end], k, device, engine=engine)
    similarities, positions = (gather_rows(part) for part in found)
    return similarities, positions


def search_split_gallery(
    mine: Rows, first: int, probes: Rows, k: int, device: str = "cpu", *, engine: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`index.search` in a gallery of which each rank holds, or maps, a slice.

    Memory: that of `torch_search.nearest` for this rank's slice, and 8 n k bytes; ranks exchange 8 n k bytes each.

    Args:
        mine: this rank's rows, shape (m_r, d); m_r may be 0.
        first: position of the first of them in the whole gallery.
        probes: the same on every rank, shape (n, d).
        k: 1 to the size of the whole gallery.
    Raises:
        ValueError: see `index.search`; or the slices leave rows out or overlap. On every rank.
    """
    total = _whole_gallery(mine, first)
    if not 1 <= k <= total:
        raise ValueError(f"{k} neighbours asked of a gallery of {total} images; allowed is 1 to its size")
    keys, problem = torch.full((len(probes), k), NONE), ""
    here = min(k, len(mine))
    try:
        read(probes)
        if here:
            similarities, positions = index.search(mine, probes, here, device, engine=engine)
            keys[:, :here] = keys_of(similarities, positions + first)
    except ValueError as error:
        problem = str(error)
    for number, said in enumerate(gather_objects(problem)):
        if said:
            raise ValueError(said if world_size() == 1 else f"rank {number}: {said}")
    similarities, positions = neighbours_of(_merged(keys))
    return similarities, positions


def slice_of(count: int) -> tuple[int, int]:
    """Begin and end of this rank's part of so many rows; parts differ by one row at most and lie in rank order."""
    begin, end = (count * number // world_size() for number in (rank(), rank() + 1))
    return begin, end


def _whole_gallery(mine: Rows, first: int) -> int:
    """Rows of all slices together."""
    slices = sorted(
        (begin, length, number) for number, (begin, length) in enumerate(gather_objects((first, len(mine))))
    )
    reached = 0
    for begin, length, number in slices:
        if length and begin != reached:
            raise ValueError(
                f"rank {number}'s slice of the gallery begins at row {begin}; it must begin at row {reached}"
            )
        reached += length
    return reached


def _merged(keys: Tensor) -> Tensor:
    """The k largest keys of all ranks for each probe, shape (n, k); some probes at a time."""
    if world_size() == 1:
        return keys
    parts = []
    for part in keys.split(max(1, _MERGED // (world_size() * keys.shape[1]))):
        everyone = gather(part).view(world_size(), *part.shape).movedim(0, 1).flatten(1)  # (p, W k)
        parts.append(everyone.topk(keys.shape[1]).values)
    return torch.cat(parts) if parts else keys
