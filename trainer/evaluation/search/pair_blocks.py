"""All pairs of a set, each once, in blocks of products that the ranks share."""

from collections.abc import Callable, Iterator
from math import inf
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from trainer.collectives import rank, world_size
from trainer.evaluation.search.threads import workers

ROWS, COLUMNS = 512, 2048
"""Similarities that a thread holds at once."""
PAIRS = 1 << 17
"""Genuine pairs listed at a time."""
_CACHED = 1 << 18
"""Numbers of each side held at once while pairs are compared: 2 MiB as float64, which stays in a core's cache."""


class Sorted(NamedTuple):
    """A set in the order of its identities, so that genuine pairs lie beside the diagonal."""

    embeddings: Tensor
    """Unit vectors, float32, shape (n, d)."""
    begins: Tensor
    """Where each sample's identity begins, shape (n,), int64, on the CPU."""
    ends: Tensor
    """Where it ends."""

    @property
    def genuine_pairs(self) -> int:
        return int((self.ends - torch.arange(len(self.ends)) - 1).sum())

    @property
    def impostor_pairs(self) -> int:
        return len(self.ends) * (len(self.ends) - 1) // 2 - self.genuine_pairs


def sorted_by_identity(embeddings: Tensor, identities: Tensor, device: str = "cpu") -> Sorted:
    """
    Args:
        embeddings: unit vectors, shape (n, d). identities: shape (n,).
    Raises:
        ValueError: a number is not finite.
    """
    if not torch.isfinite(embeddings).all():
        raise ValueError("the embeddings hold a number that is not finite; pairs of them have no similarity")
    order = identities.cpu().argsort(stable=True)
    _, counts = torch.unique_consecutive(identities.cpu()[order], return_counts=True)
    ends = counts.cumsum(0)
    at = embeddings.to("cpu", torch.float32)[order].contiguous().to(device)
    return Sorted(at, (ends - counts).repeat_interleave(counts), ends.repeat_interleave(counts))


Block = tuple[int, int, Tensor]
"""First row, first column and float32 similarities of a block, overwritten by the next; -inf where no impostor pair is."""
Found = TypeVar("Found")


def from_impostor_blocks(samples: Sorted, function: Callable[[Iterator[Block]], Found]) -> list[Found]:
    """What a function makes of the blocks of each of this rank's stripes of rows; threads work on stripes of their own."""
    begins = range(rank() * ROWS, len(samples.embeddings), world_size() * ROWS)
    with workers(samples.embeddings.device) as (_, each):
        return each(lambda begin: function(_blocks(samples, begin)), begins)


def _blocks(samples: Sorted, row: int) -> Iterator[Block]:
    """Of the stripe that begins at a row."""
    embeddings, count = samples.embeddings, len(samples.embeddings)
    out = embeddings.new_empty(ROWS * COLUMNS)
    mine = embeddings[row : row + ROWS]
    last = int(samples.ends[min(row + ROWS, count) - 1])  # from here on all columns are of other identities
    for begin, end in ((row, last), (last, count)):
        for column in range(begin, end, COLUMNS):
            theirs = embeddings[column : min(column + COLUMNS, end)]
            block = out[: len(mine) * len(theirs)].view(len(mine), len(theirs))
            torch.mm(mine, theirs.T, out=block)
            if begin == row:
                ends = samples.ends[row : row + len(mine), None]
                columns = torch.arange(column, column + len(theirs))
                block.masked_fill_((columns < ends).to(block.device), -inf)
            yield row, column, block


def genuine_pairs(samples: Sorted) -> Iterator[Tensor]:
    """This rank's share of the genuine pairs, some at a time, shape (k, 2)."""
    later = samples.ends - torch.arange(len(samples.ends)) - 1  # partners behind each sample
    before = later.cumsum(0) - later
    total = int(later.sum())
    for begin in range(rank() * PAIRS, total, world_size() * PAIRS):
        numbers = torch.arange(begin, min(begin + PAIRS, total))
        first = torch.searchsorted(before, numbers, right=True) - 1
        yield torch.stack([first, first + 1 + numbers - before[first]], 1)


def similarities_of(embeddings: Tensor, pairs: Tensor) -> Tensor:
    """The similarity by definition (see `similarity`) of each pair of rows, float32, shape (k,)."""

    def of_some(some: Tensor) -> Tensor:
        first, second = (embeddings[rows.long()].double() for rows in some.unbind(1))  # (some, d) each
        return first.mul_(second).sum(1).float()

    parts = pairs.to(embeddings.device).split(max(1, _CACHED // embeddings.shape[1]))
    with workers(embeddings.device) as (_, each):
        return torch.cat([embeddings.new_empty(0), *each(of_some, parts)])
