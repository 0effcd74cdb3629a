"""Operating points over *all* pairs of a set, 10^9 and more: exact, in one blocked pass that stores few scores a threshold.

The threshold of a FAR is an order statistic of the impostor pairs' similarities. A draw of pairs says between which two values it
must lie, all but certainly; the pass then counts the pairs above that bracket and keeps those within it; and the order statistic
is picked among them. Where the bracket was wrong, which the counts show, it is widened and the pass made again: the result never
depends on the draw. Nor on blocks, ranks or threads: float32 products only sort out what is clearly above or below, and what is
closer than their error is compared in float64 (see `index`: a similarity *is* the float64 inner product rounded to float32).

All ranks share the blocks. Memory: O(n d) for the embeddings, a block of similarities, and what the brackets keep.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from data_shards.counter_random import uniform
from trainer.collectives import all_reduce_sum, gather_rows, rank, world_size
from trainer.evaluation.index import TOLERANCE
from trainer.metric.verification import OperatingPoint, allowed_at, wilson_interval

DRAWN = 1 << 20
"""Impostor pairs drawn to bracket the thresholds."""
SURE = 4.0
"""Standard deviations of the draw's order statistics that a bracket spans on either side."""
MOST_ABOVE = 1 << 20
"""Highest impostor pairs that are all kept, so that every small FAR is answered from them."""
ROWS, COLUMNS = 512, 4096
"""Similarities held at once."""
MOST_KEPT = 1 << 25
"""Pairs that a rank keeps in all brackets together; more share one similarity only where the embeddings have collapsed."""
_PAIRS = 1 << 14
"""Pairs compared one by one at a time."""
_LOWEST = -2.0
"""Below every similarity."""


@dataclass(frozen=True)
class Refused:
    """A FAR for which the set has too few impostor pairs."""

    target: float
    reason: str


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


class _Bracket(NamedTuple):
    low: float
    high: float


class _Kept(NamedTuple):
    """What a pass found of a bracket, on this rank."""

    above: int
    """Pairs whose float32 similarity exceeds the bracket."""
    scores: Tensor
    """Float32 similarities within, shape (k,)."""
    pairs: Tensor
    """Their rows in the sorted set, shape (k, 2)."""


def sorted_by_identity(embeddings: Tensor, identities: Tensor, device: str = "cpu") -> Sorted:
    """
    Args:
        embeddings: unit vectors, shape (n, d). identities: shape (n,).
    """
    order = identities.cpu().argsort(stable=True)
    _, counts = torch.unique_consecutive(identities.cpu()[order], return_counts=True)
    ends = counts.cumsum(0)
    at = embeddings.to("cpu", torch.float32)[order].contiguous().to(device)
    return Sorted(at, (ends - counts).repeat_interleave(counts), ends.repeat_interleave(counts))


def operating_points_of_all_pairs(
    samples: Sorted, fars: Sequence[float], seed: int = 0
) -> list[OperatingPoint | Refused]:
    """TAR at each FAR over all n (n - 1) / 2 pairs; every rank calls it with the same set and has the same result.

    Args:
        fars: targets in (0, 1). One that expects fewer than 10 false accepts is refused.
    Raises:
        ValueError: a FAR is outside (0, 1), the set has no genuine or no impostor pair, or so many pairs lie at a threshold that
            they cannot be kept.
    Source: ISO/IEC 19795-1; see `verification.tar_at_far`, whose definition this is.
    """
    genuine, impostors = samples.genuine_pairs, samples.impostor_pairs
    if not genuine or not impostors:
        raise ValueError(f"{genuine} genuine and {impostors} impostor pairs; at least one of each is needed")
    allowed: dict[float, int] = {}
    refused: dict[float, Refused] = {}
    for far in fars:
        try:
            allowed[far] = allowed_at(impostors, far)
        except ValueError as reason:
            if not 0 < far < 1:
                raise
            refused[far] = Refused(far, str(reason))
    found = _thresholds(samples, sorted(set(allowed.values())), seed) if allowed else {}
    accepts = dict(
        zip(allowed, _accepted(samples, [found[count].threshold for count in allowed.values()]), strict=True)
    )

    def point(far: float) -> OperatingPoint:
        threshold, exceeding = found[allowed[far]]
        low, high = wilson_interval(accepts[far], genuine)
        return OperatingPoint(
            far, exceeding / impostors, accepts[far] / genuine, low, high, threshold, genuine, impostors
        )

    return [refused[far] if far in refused else point(far) for far in fars]


class Threshold(NamedTuple):
    threshold: float
    exceeding: int
    """Impostor pairs above it."""


def _thresholds(samples: Sorted, allowed: Sequence[int], seed: int) -> dict[int, Threshold]:
    """For each count the similarity that at most so many impostor pairs exceed."""
    draw = _drawn(samples, seed)
    sure, found, left = SURE, dict[int, Threshold](), list(allowed)
    while left:
        brackets = [_bracket(draw, count, samples.impostor_pairs, sure) for count in left]
        merged = _merged(brackets)
        kept = _pass(samples, merged)
        for count, bracket in zip(list(left), brackets, strict=True):
            at = next(number for number, other in enumerate(merged) if other.low <= bracket.low <= other.high)
            if answer := _picked(samples, kept[at], merged[at], count):
                found[count] = answer
                left.remove(count)
        sure *= 4
    return found


def _drawn(samples: Sorted, seed: int) -> Tensor:
    """Similarities of impostor pairs drawn with equal chances, descending; all of them where there are few."""
    count = len(samples.embeddings)
    if samples.impostor_pairs <= DRAWN:
        return torch.empty(0)
    numbers = torch.arange(DRAWN + DRAWN // 4).numpy()
    first, second = ((torch.from_numpy(uniform(seed, which, numbers)) * count).long() for which in (0, 1))
    second = second.clamp(max=count - 1)
    impostors = (second < samples.begins[first]) | (second >= samples.ends[first])
    pairs = torch.stack([first[impostors], second[impostors]], 1)[:DRAWN]
    return _similarities(samples.embeddings, pairs).sort(descending=True).values


def _bracket(draw: Tensor, count: int, population: int, sure: float) -> _Bracket:
    """Where the similarity lies that `count` of the population exceed."""
    if population * len(draw) == 0:
        return _Bracket(_LOWEST, inf)
    share = count / population
    middle, deviation = share * len(draw), sqrt(share * (1 - share) * len(draw))
    low, high = ceil(middle + sure * deviation + sure), floor(middle - sure * deviation - sure)
    most = count <= MOST_ABOVE
    return _Bracket(
        float(draw[low]) - 2 * TOLERANCE if low < len(draw) else _LOWEST,
        float(draw[high]) + 2 * TOLERANCE if high >= 0 and not most else inf,
    )


def _merged(brackets: Sequence[_Bracket]) -> list[_Bracket]:
    """The same values in brackets that do not overlap, ascending."""
    merged: list[_Bracket] = []
    for low, high in sorted(brackets):
        if merged and low <= merged[-1].high:
            merged[-1] = _Bracket(merged[-1].low, max(merged[-1].high, high))
        else:
            merged.append(_Bracket(low, high))
    return merged


def _pass(samples: Sorted, brackets: Sequence[_Bracket]) -> list[_Kept]:
    """Compares all impostor pairs of this rank's blocks with the brackets; what all ranks found together."""
    device = samples.embeddings.device
    above = torch.zeros(len(brackets), dtype=torch.int64, device=device)
    scores: list[list[Tensor]] = [[] for _ in brackets]
    pairs: list[list[Tensor]] = [[] for _ in brackets]
    room = MOST_KEPT
    for row, column, block in _impostor_blocks(samples):
        for number, (low, high) in enumerate(brackets):
            if high < inf:
                above[number] += torch.count_nonzero(block > high)
            within = (block >= low).logical_and_(block <= high) if high < inf else block >= low
            places = within.nonzero()  # (k, 2)
            room -= len(places)
            if len(places) and room >= 0:
                scores[number].append(block[places[:, 0], places[:, 1]])
                pairs[number].append(places + torch.tensor([row, column], device=device))
    above = all_reduce_sum(above)
    if all_reduce_sum(torch.tensor(int(room < 0), device=device)):
        raise ValueError(
            f"more than {MOST_KEPT:,} impostor pairs lie within {2 * TOLERANCE:g} of a threshold: the embeddings have collapsed"
        )
    empty, none = torch.empty(0, device=device), torch.empty((0, 2), dtype=torch.int64, device=device)
    return [
        _Kept(
            int(above[number]),
            gather_rows(torch.cat([empty, *scores[number]])),
            gather_rows(torch.cat([none, *pairs[number]])),
        )
        for number in range(len(brackets))
    ]


def _impostor_blocks(samples: Sorted) -> Iterator[tuple[int, int, Tensor]]:
    """First row, first column and float32 similarities of each block of this rank; -inf where no impostor pair is."""
    embeddings, count = samples.embeddings, len(samples.embeddings)
    out = embeddings.new_empty(ROWS * COLUMNS)
    for row in range(rank() * ROWS, count, world_size() * ROWS):
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


def _picked(samples: Sorted, kept: _Kept, bracket: _Bracket, count: int) -> Threshold | None:
    """The value that `count` impostor pairs exceed, or None where the bracket does not hold it for certain."""
    place = count - kept.above  # in descending order of what was kept
    if not 0 <= place < len(kept.scores):
        return None
    middle = float(kept.scores.kthvalue(len(kept.scores) - place).values)
    low, high = middle - TOLERANCE, middle + TOLERANCE
    if low < bracket.low or high > bracket.high:
        return None
    surely = kept.above + int((kept.scores > high).sum())
    close = (kept.scores >= low) & (kept.scores <= high)
    exact = _similarities(samples.embeddings, kept.pairs[close]).sort(descending=True).values
    threshold = exact[count - surely]
    return Threshold(float(threshold), surely + int((exact > threshold).sum()))


def _accepted(samples: Sorted, thresholds: Sequence[float]) -> list[int]:
    """Genuine pairs above each threshold."""
    limits = torch.tensor(thresholds, dtype=torch.float32)
    counts = torch.zeros(len(limits), dtype=torch.int64)
    for pairs in _genuine_pairs(samples):
        scores = _similarities(samples.embeddings, pairs).cpu()
        counts += torch.stack([(scores > limit).sum() for limit in limits]) if len(limits) else 0
    found: list[int] = all_reduce_sum(counts.to(samples.embeddings.device)).tolist()
    return found


def _genuine_pairs(samples: Sorted) -> Iterator[Tensor]:
    """This rank's share of the genuine pairs, some at a time, shape (k, 2)."""
    later = samples.ends - torch.arange(len(samples.ends)) - 1  # partners behind each sample
    before = later.cumsum(0) - later
    total = int(later.sum())
    for begin in range(rank() * _PAIRS, total, world_size() * _PAIRS):
        numbers = torch.arange(begin, min(begin + _PAIRS, total))
        first = torch.searchsorted(before, numbers, right=True) - 1
        yield torch.stack([first, first + 1 + numbers - before[first]], 1)


def _similarities(embeddings: Tensor, pairs: Tensor) -> Tensor:
    """The similarity by definition of each pair of rows, float32, shape (k,)."""
    parts = [
        (embeddings[some[:, 0]].double() * embeddings[some[:, 1]].double()).sum(1).float()
        for some in pairs.to(embeddings.device).split(_PAIRS)
    ]
    return torch.cat(parts) if parts else embeddings.new_empty(0)
