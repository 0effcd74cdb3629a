"""Deterministic draws for the protocols: verification pairs in folds, triplets, whole identities. No embeddings here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Verification pairs, half genuine, half impostor, dealt to folds."""

    first: Tensor
    second: Tensor
    """Positions of the two samples, each of shape (p,)."""
    genuine: Tensor
    """bool, shape (p,)."""
    fold: Tensor
    """From 0, shape (p,)."""
    disjoint: bool
    """Whether no identity is in two folds."""


class _Layout:
    """Samples grouped by identity: identity i has the positions order[start[i] : start[i] + count[i]]."""

    def __init__(self, identities: Tensor) -> None:
        self.order = identities.argsort(stable=True)
        _, self.count = torch.unique_consecutive(identities[self.order], return_counts=True)
        self.start = self.count.cumsum(0) - self.count


def draw_pairs(identities: Tensor, pairs: int, folds: int, seed: int) -> Pairs:
    """Distinct pairs, as many genuine as impostor in each fold.

    A genuine pair is an identity with two or more images, uniformly, and two of its images; an impostor pair is two
    identities, uniformly, and an image of each: so an identity with many images does not fill the list (Huang et al.
    2007). Identities are dealt to the folds first, at random, and pairs drawn within a fold, when there are at least
    two identities for each fold and at least one of them with two images; otherwise pairs are drawn over all
    identities and then dealt to the folds. A fold with fewer distinct pairs than asked for gives what it has.

    Args:
        identities: shape (n,).
        pairs: wanted in all.
        folds: at least 2.
        seed: of the draw.
    Raises:
        ValueError: there are not even enough pairs for one genuine and one impostor in each fold.
    """
    layout = _Layout(identities)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(layout.count), generator=generator)
    several = shuffled[layout.count[shuffled] >= 2]
    disjoint = len(several) >= folds and len(shuffled) >= 2 * folds
    if disjoint:
        dealt = torch.cat([several, shuffled[layout.count[shuffled] < 2]])  # those with two images first, round robin
        drawn = [_balanced(layout, dealt[fold::folds], pairs // (2 * folds), generator) for fold in range(folds)]
        fold = torch.cat([torch.full((2 * len(g),), number) for number, (g, _) in enumerate(drawn)])
        keys = torch.cat([torch.cat([g, i]) for g, i in drawn])
        genuine = torch.cat([torch.arange(2 * len(g)) < len(g) for g, _ in drawn])
    else:
        same, different = _balanced(layout, shuffled, pairs // 2, generator)
        if len(same) < folds:
            found = f"{len(same)} genuine and as many impostor pairs"
            raise ValueError(f"{len(identities)} samples give {found}; {folds} folds need one of each at least")
        fold = (torch.arange(len(same)) % folds).repeat(2)
        keys = torch.cat([same, different])
        genuine = torch.arange(len(keys)) < len(same)
    return Pairs(keys // len(identities), keys % len(identities), genuine, fold, disjoint)


def draw_triplets(identities: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, positives and negatives, uniformly from all valid triplets, with replacement; positions, each (count,)."""
    layout, samples = _Layout(identities), len(identities)
    generator = torch.Generator().manual_seed(seed)
    size = layout.count.double()
    weights = size * (size - 1) * (samples - size)
    shares = (weights / weights.sum()).cumsum(0)
    chosen = torch.searchsorted(shares, _uniform(count, generator), right=True).clamp(max=len(size) - 1)
    start, size = layout.start[chosen], layout.count[chosen]
    anchor, positive = _two_different(size, generator)
    negative = _below(samples - size, generator)
    negative += torch.where(negative >= start, size, 0)
    return layout.order[start + anchor], layout.order[start + positive], layout.order[negative]


def draw_identities(identities: Tensor, samples: int, seed: int) -> Tensor:
    """Positions, ascending, of all samples of randomly drawn identities: as many as fit into `samples`, at least two.

    The first of them has two images or more, so that there is a genuine pair.
    """
    unique, inverse, counts = identities.unique(return_inverse=True, return_counts=True)
    shuffled = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
    first = int((counts[shuffled] >= 2).nonzero()[0])
    shuffled = torch.cat([shuffled[first : first + 1], shuffled[:first], shuffled[first + 1 :]])
    fits = counts[shuffled].cumsum(0) <= samples
    fits[:2] = True
    return torch.isin(inverse, shuffled[fits]).nonzero().squeeze(1)


def _balanced(layout: _Layout, members: Tensor, half: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys, first * n + second with first < second, of equally many genuine and impostor pairs among these identities."""
    several = members[layout.count[members] >= 2]
    sizes = layout.count[members]
    genuine = int((layout.count[several] * (layout.count[several] - 1) // 2).sum())
    impostor = int((sizes.sum() ** 2 - (sizes**2).sum()) // 2)
    target = min(half, genuine, impostor)

    def draw_genuine(number: int) -> Tensor:
        chosen = several[_below(torch.full((number,), len(several)), generator)]
        a, b = _two_different(layout.count[chosen], generator)
        return _keys(layout, layout.start[chosen] + a, layout.start[chosen] + b)

    def draw_impostor(number: int) -> Tensor:
        a, b = (members[side] for side in _two_different(torch.full((number,), len(members)), generator))
        one, other = (layout.start[side] + _below(layout.count[side], generator) for side in (a, b))
        return _keys(layout, one, other)

    def all_genuine() -> Tensor:
        slots = [torch.combinations(_slots(layout, member), 2) for member in several]
        return _keys(layout, *torch.cat(slots).unbind(1))

    def all_impostor() -> Tensor:
        slots = torch.cat([_slots(layout, member) for member in members])
        ends = sizes.cumsum(0)
        crossed = [torch.cartesian_prod(slots[e - s : e], slots[e:]) for s, e in zip(sizes, ends, strict=True)]
        return _keys(layout, *torch.cat([pairs.view(-1, 2) for pairs in crossed]).unbind(1))

    return (
        _distinct(draw_genuine, all_genuine, genuine, target, generator),
        _distinct(draw_impostor, all_impostor, impostor, target, generator),
    )


def _distinct(
    draw: Callable[[int], Tensor], everything: Callable[[], Tensor], exist: int, target: int, generator: torch.Generator
) -> Tensor:
    """`target` different keys; drawn again and again while at least half of those that exist stay free, else shuffled."""
    if target == 0:
        return torch.empty(0, dtype=torch.int64)
    if exist < 2 * target:
        keys = everything()
        return keys[torch.randperm(len(keys), generator=generator)[:target]]
    keys = draw(2 * target)
    while True:
        order = keys.argsort(stable=True)
        fresh = torch.ones_like(order, dtype=torch.bool)
        fresh[1:] = keys[order][1:] != keys[order][:-1]
        keys = keys[order[fresh].sort().values]  # first occurrences, in the order drawn
        if len(keys) >= target:
            return keys[:target]
        keys = torch.cat([keys, draw(2 * target)])


def _keys(layout: _Layout, a: Tensor, b: Tensor) -> Tensor:
    a, b = layout.order[a], layout.order[b]
    return torch.minimum(a, b) * len(layout.order) + torch.maximum(a, b)


def _slots(layout: _Layout, member: Tensor) -> Tensor:
    return torch.arange(int(layout.start[member]), int(layout.start[member] + layout.count[member]))


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _below(limits: Tensor, generator: torch.Generator) -> Tensor:
    """One integer in [0, limit) for each limit."""
    return torch.minimum((_uniform(len(limits), generator) * limits).long(), limits - 1)


def _two_different(limits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    one, other = _below(limits, generator), _below(limits - 1, generator)
    return one, other + (other >= one).long()
