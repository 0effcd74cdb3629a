"""Exact nearest neighbours by matrix products: faster than a flat faiss index on a CPU, and all there is without faiss.

Products in bf16 (where the CPU has instructions for it) or float32 only say which gallery rows *can* be among the k nearest: what
rounding takes from a row is measured, so by Cauchy and Schwarz no product is further off than a bound that is known (`near`), and
every row that may reach the k-th place is compared in float64 (`similarity`). A probe that too many rows come near to
(duplicates, collapsed embeddings) goes on to the next precision, in the end to the whole gallery in float64.

The gallery is read 65,536 rows at a time, also from a memory map of fp16 or fp32, and may have any size. Memory, besides what the
caller holds: the probes twice, 12 n k bytes of results, 65,536 rows as float32 and in the product's type (in float64 for what
collapsed), 16 MiB for each thread, and 24 bytes for each row near a probe: some beyond k, 256 + 4 k at most.

Not yet run, for want of a GPU: `device` "cuda".
"""

import collections
from functools import partial

import torch
from torch import Tensor

from trainer.evaluation.search import similarity
from trainer.evaluation.search.near import Near, Rounded, bound, rounded
from trainer.evaluation.search.similarity import NONE, Rows, chunks, keys_of, neighbours_of, read
from trainer.evaluation.search.threads import workers
from trainer.precision import cpu_has_bf16

ROWS, COLUMNS = 512, 2048
"""Probes and gallery rows of a product."""
FIRST = 4096
"""Gallery rows of the first product, which tells what is near; or 4 k."""
WORTH_ROUNDING = 1 << 24
"""Pairs from which on a pass in bf16 pays."""
_WHOLE = 1 << 22
"""Similarities held at once where probes are compared with the whole gallery in float64."""


@torch.inference_mode(False)  # a mode that the threads below would not share
def nearest(gallery: Rows, probes: Rows, k: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """See `index.search`, whose arguments these are, already checked for their shapes; the gallery may be a memory map.

    Raises:
        ValueError: a number is not finite.
    """
    asked = read(probes, device)
    if not len(asked):
        collections.deque(chunks(gallery), maxlen=0)  # read all the same, so that what is not finite is found
    keys = torch.full((len(asked), k), NONE, device=asked.device)
    left = torch.arange(len(asked), device=asked.device)
    for dtype in products(len(gallery), len(asked), k, device):
        if len(left):
            keys[left], unsure = _by_products(gallery, asked[left], k, dtype)
            left = left[unsure]
    if len(left):
        keys[left] = in_float64(gallery, asked[left], k)
    similarities, positions = neighbours_of(keys.cpu())
    return similarities, positions


def products(gallery: int, probes: int, k: int, device: str = "cpu") -> list[torch.dtype]:
    """The types in which products are tried, in turn, before float64 is."""
    if 4 * k >= min(gallery, similarity.CHUNK):
        return []
    rounding = gallery * probes >= WORTH_ROUNDING and torch.device(device).type == "cpu" and cpu_has_bf16()
    return [torch.bfloat16, torch.float32] if rounding else [torch.float32]


def _group(k: int) -> int:
    """Columns looked at together: the fewer, the more neighbours are asked for, since more groups then hold one."""
    return 32 if k <= 32 else 8 if k <= 512 else 1


def _by_products(gallery: Rows, probes: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys of the k nearest, shape (n, k), and of which probes they are not known, shape (n,)."""
    with workers(probes.device) as (threads, each):
        parts = probes.split(max(1, min(ROWS, -(-len(probes) // threads))))
        near = [Near(rounded(part, dtype), k) for part in parts]
        for begin, rows in chunks(gallery, probes.device):
            each(partial(_compare, gallery=rounded(rows, dtype), begin=begin), near)
        ranked = each(lambda some: some[0].ranked(gallery, some[1]), list(zip(near, parts, strict=True)))
    return torch.cat([keys for keys, _ in ranked]), torch.cat([unsure for _, unsure in ranked])


def _compare(near: Near, gallery: Rounded, begin: int) -> None:
    """Shows the probes a chunk of the gallery."""
    off, group, column = bound(near.probes, gallery), _group(near.k), 0
    height = len(near.probes.rows)
    usual = max(COLUMNS, min(ROWS * COLUMNS // height, len(gallery.rows)) // 32 * 32)
    out = near.probes.rows.new_empty(0)
    while column < len(gallery.rows):
        width = max(FIRST, 4 * near.k, usual) if begin + column == 0 else usual
        rows = gallery.rows[column : column + width]
        filled = -(-len(rows) // group) * group
        if len(out) < height * filled:
            out = out.new_empty(height * filled)
        block = out[: height * filled].view(height, filled)
        if filled == len(rows):
            torch.mm(near.probes.rows, rows.T, out=block)
        else:
            block.fill_(float("-inf"))[:, : len(rows)] = near.probes.rows @ rows.T
        near.see(block, begin + column, off, group)
        column += width


def in_float64(gallery: Rows, probes: Tensor, k: int) -> Tensor:
    """Keys of the k nearest, shape (n, k), each probe compared with the whole gallery by the definition."""
    width = max(8192, k)
    parts = probes.double().split(max(1, _WHOLE // (width + k)))
    best = [torch.empty((len(part), 0), dtype=torch.int64, device=probes.device) for part in parts]
    for begin, rows in chunks(gallery, probes.device):
        for column, some in zip(range(begin, begin + len(rows), width), rows.split(width), strict=True):
            theirs = some.double()
            positions = torch.arange(column, column + len(some), device=probes.device)
            for number, part in enumerate(parts):
                keys = torch.cat([best[number], keys_of((part @ theirs.T).float(), positions)], 1)
                best[number] = keys.topk(min(k, keys.shape[1])).values
    return torch.cat(best)
