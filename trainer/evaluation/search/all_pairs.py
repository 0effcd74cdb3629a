"""Operating points over *all* pairs of a set, 10^9 and more: exact, in one blocked pass that stores few scores a threshold.

The threshold of a FAR is an order statistic of the impostor pairs' similarities. A draw of pairs says between which two values it
must lie, all but certainly; the pass then counts the pairs above that bracket and keeps those within it; and the order statistic
is picked among them. Where the bracket was wrong, which the counts show, it is widened and the pass made again: the result never
depends on the draw. Nor on blocks, ranks or threads: float32 products only sort out what is clearly above or below, and what is
closer than their error is compared in float64 (see `similarity`: it *is* the float64 inner product rounded to float32).

All ranks share the blocks. Memory: 4 n d bytes for the sorted embeddings, 8 MiB for each thread, and 24 bytes for each pair that
the brackets keep: some five million; a set of so many pairs that its brackets held more has them cut down by counts first.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.collectives import all_reduce_sum, gather_rows
from trainer.evaluation.search.distance_histograms import distance_histograms as distance_histograms
from trainer.evaluation.search.pair_blocks import Block, Sorted, from_impostor_blocks, genuine_pairs, similarities_of
from trainer.evaluation.search.pair_blocks import sorted_by_identity as sorted_by_identity
from trainer.evaluation.search.similarity import summing_error
from trainer.metric.verification import OperatingPoint, allowed_at, wilson_interval

DRAWN = 1 << 20
"""Impostor pairs drawn to bracket the thresholds."""
SURE = 4.0
"""Standard deviations of the draw's order statistics that a bracket spans on either side."""
MOST_ABOVE = 1 << 20
"""Highest impostor pairs that are all kept, so that every small FAR is answered from them."""
MOST_EXPECTED = 1 << 22
"""Pairs that a bracket may hold; where the draw expects more, it is cut down first."""
MOST_KEPT = 1 << 24
"""Pairs that a rank keeps in all brackets together; more share one similarity only where the embeddings have collapsed."""
CUTS = 16
"""Parts of a bracket that holds too many pairs, of which one stays."""
_LOWEST, _HIGHEST = -1.001, 1.001
"""Beyond all similarities."""


@dataclass(frozen=True)
class Refused:
    """A FAR for which the set has too few impostor pairs."""

    target: float
    reason: str


class _Bracket(NamedTuple):
    low: float
    high: float


class _Kept(NamedTuple):
    """What a pass found of a bracket, on this rank."""

    above: Tensor
    """Pairs whose float32 similarity exceeds the bracket, shape (); of a stripe, each bracket, shape (brackets,)."""
    scores: Tensor
    """Float32 similarities within, shape (k,)."""
    pairs: Tensor
    """Their rows in the sorted set, shape (k, 2)."""


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
        wanted = {count: _bracket(samples, draw, count, sure) for count in left}
        wanted = _narrowed(samples, draw, wanted)
        merged = _merged(list(wanted.values()))
        kept = _pass(samples, merged)
        for count, bracket in wanted.items():
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
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(count, (2, DRAWN + DRAWN // 4), generator=generator)
    impostors = (second < samples.begins[first]) | (second >= samples.ends[first])
    pairs = torch.stack([first[impostors], second[impostors]], 1)[:DRAWN]
    return similarities_of(samples.embeddings, pairs).sort(descending=True).values


def _margin(samples: Sorted) -> float:
    """Twice what a float32 product can be off."""
    return 2 * summing_error(samples.embeddings.shape[1])


def _bracket(samples: Sorted, draw: Tensor, count: int, sure: float) -> _Bracket:
    """Where the similarity lies that `count` of the impostor pairs exceed."""
    if not len(draw):
        return _Bracket(_LOWEST, inf)
    share = count / samples.impostor_pairs
    middle, deviation = share * len(draw), sqrt(share * (1 - share) * len(draw))
    low, high = ceil(middle + sure * deviation + sure), floor(middle - sure * deviation - sure)
    most, margin = count <= MOST_ABOVE, 2 * _margin(samples)
    return _Bracket(
        float(draw[low]) - margin if low < len(draw) else _LOWEST,
        float(draw[high]) + margin if high >= 0 and not most else inf,
    )


def _narrowed(samples: Sorted, draw: Tensor, wanted: Mapping[int, _Bracket]) -> dict[int, _Bracket]:
    """Brackets that hold too many pairs to keep are cut down to the part in which, by the counts of a pass, the place is."""
    brackets, population, margin = dict(wanted), samples.impostor_pairs, 2 * _margin(samples)

    def expected(bracket: _Bracket) -> float:
        return float(((draw >= bracket.low) & (draw <= bracket.high)).sum()) * population / max(1, len(draw))

    wide = [count for count, bracket in brackets.items() if expected(bracket) > MOST_EXPECTED]
    while wide:
        cuts = {count: _cuts(brackets[count]) for count in wide}
        counts = _above(samples, sorted({cut for some in cuts.values() for cut in some}))
        for count in list(wide):
            ends = [_LOWEST, *cuts[count], inf]
            held = [population, *(counts[cut] for cut in cuts[count]), 0]  # pairs above each end, descending
            at = next(number for number in range(len(held) - 1) if held[number] > count >= held[number + 1])
            brackets[count] = _Bracket(ends[at] - margin, ends[at + 1] + margin)
            if held[at] - held[at + 1] <= MOST_EXPECTED or ends[at + 1] - ends[at] < margin:
                wide.remove(count)
    return brackets


def _cuts(bracket: _Bracket) -> list[float]:
    ends = max(bracket.low, _LOWEST), min(bracket.high, _HIGHEST)
    return [float(cut) for cut in np.linspace(*ends, CUTS + 1, dtype=np.float32)]


def _merged(brackets: Sequence[_Bracket]) -> list[_Bracket]:
    """The same values in brackets that do not overlap, ascending."""
    merged: list[_Bracket] = []
    for low, high in sorted(brackets):
        if merged and low <= merged[-1].high:
            merged[-1] = _Bracket(merged[-1].low, max(merged[-1].high, high))
        else:
            merged.append(_Bracket(low, high))
    return merged


def _above(samples: Sorted, limits: Sequence[float]) -> dict[float, int]:
    """Impostor pairs whose float32 similarity exceeds each limit."""

    def of_stripe(blocks: Iterator[Block]) -> Tensor:
        counts = torch.zeros(len(limits), dtype=torch.int64)
        for _, _, block in blocks:
            values = _comparable(block)
            counts += torch.tensor([_count(values > limit) for limit in limits])
        return counts

    counts = sum(from_impostor_blocks(samples, of_stripe), torch.zeros(len(limits), dtype=torch.int64))
    return dict(zip(limits, all_reduce_sum(counts).tolist(), strict=True))


def _pass(samples: Sorted, brackets: Sequence[_Bracket]) -> list[_Kept]:
    """Compares all impostor pairs of this rank's blocks with the brackets; what all ranks found together."""
    room = _Room(MOST_KEPT)
    stripes = from_impostor_blocks(samples, lambda blocks: _of_stripe(blocks, brackets, room))
    if all_reduce_sum(torch.tensor(int(room.left < 0))):
        within = f"{MOST_KEPT:,} impostor pairs lie within {2 * _margin(samples):g} of a threshold"
        raise ValueError(f"more than {within}: the embeddings have collapsed")
    above = all_reduce_sum(sum((stripe.above for stripe in stripes), torch.zeros(len(brackets), dtype=torch.int64)))
    scores = gather_rows(torch.cat([_NONE[0], *(stripe.scores for stripe in stripes)]))
    pairs = gather_rows(torch.cat([_NONE[1], *(stripe.pairs for stripe in stripes)]))
    kept = []
    for number, (low, high) in enumerate(brackets):
        mine = (scores >= low) & (scores <= high)
        kept.append(_Kept(above[number], scores[mine], pairs[mine]))
    return kept


class _Room:
    """How many more pairs a rank keeps; threads share it."""

    def __init__(self, pairs: int) -> None:
        self.left = pairs
        self._lock = Lock()

    def take(self, pairs: int) -> bool:
        """Whether they still fit."""
        with self._lock:
            self.left -= pairs
            return self.left >= 0


_NONE = torch.empty(0), torch.empty((0, 2), dtype=torch.int32)


def _of_stripe(blocks: Iterator[Block], brackets: Sequence[_Bracket], room: _Room) -> _Kept:
    above = torch.zeros(len(brackets), dtype=torch.int64)
    scores, pairs = [_NONE[0]], [_NONE[1]]
    for row, column, block in blocks:
        places = _within(block, brackets, above)
        if len(places) and room.take(len(places)):
            scores.append(block.flatten()[places].cpu())
            width, at = block.shape[1], places.cpu()
            pairs.append(torch.stack([row + at // width, column + at % width], 1).int())
    return _Kept(above, torch.cat(scores), torch.cat(pairs))


def _within(block: Tensor, brackets: Sequence[_Bracket], above: Tensor) -> Tensor:
    """Where the pairs of a block lie that are in a bracket, shape (k,); counts those above each."""
    values, inside = _comparable(block), _comparable(torch.zeros_like(block, dtype=torch.bool))
    for number, (low, high) in enumerate(brackets):
        inside ^= values >= low  # brackets do not overlap
        if high < inf:
            over = values > high
            above[number] += _count(over)
            inside ^= over
    if isinstance(inside, np.ndarray):
        return torch.from_numpy(np.flatnonzero(inside))
    return inside.flatten().nonzero()[:, 0]


def _comparable(block: Tensor) -> Any:
    """On a CPU numpy's view of it: numpy compares five times as fast as torch."""
    return block.numpy() if block.device.type == "cpu" else block


def _count(mask: Any) -> int:
    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else torch.count_nonzero(mask))


def _picked(samples: Sorted, kept: _Kept, bracket: _Bracket, count: int) -> Threshold | None:
    """The value that `count` impostor pairs exceed, or None where the bracket does not hold it for certain."""
    place = count - int(kept.above)  # in descending order of what was kept
    if not 0 <= place < len(kept.scores):
        return None
    margin = _margin(samples)
    middle = float(kept.scores.kthvalue(len(kept.scores) - place).values)
    low, high = middle - margin, middle + margin
    if low < bracket.low or high > bracket.high:
        return None
    surely = int(kept.above) + int((kept.scores > high).sum())
    close = (kept.scores >= low) & (kept.scores <= high)
    exact = similarities_of(samples.embeddings, kept.pairs[close]).sort(descending=True).values
    threshold = exact[count - surely]
    return Threshold(float(threshold), surely + int((exact > threshold).sum()))


def _accepted(samples: Sorted, thresholds: Sequence[float]) -> list[int]:
    """Genuine pairs above each threshold."""
    limits = torch.tensor(thresholds, dtype=torch.float32)
    counts = torch.zeros(len(limits), dtype=torch.int64)
    for pairs in genuine_pairs(samples):
        scores = similarities_of(samples.embeddings, pairs).cpu()
        counts += torch.stack([(scores > limit).sum() for limit in limits]) if len(limits) else 0
    found: list[int] = all_reduce_sum(counts).tolist()
    return found
