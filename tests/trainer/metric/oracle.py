"""Losses and mining by plain loops over anchors, positives and negatives: slow, and as the papers write them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize


def points(count: int, size: int = 5, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def on_circle(degrees: list[float]) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def distances(embeddings: Tensor, squared: bool) -> Tensor:
    """Of every pair, with gradient, from differences; shape (n, n). The diagonal has no gradient."""
    square = (embeddings[:, None] - embeddings[None]).square().sum(2)
    return square if squared else (square + torch.eye(len(embeddings), dtype=square.dtype)).sqrt()


def positives(ids: list[int], anchor: int) -> list[int]:
    return [other for other in range(len(ids)) if ids[other] == ids[anchor] and other != anchor]


def negatives(ids: list[int], anchor: int) -> list[int]:
    return [other for other in range(len(ids)) if ids[other] != ids[anchor]]


def triples(ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """Every valid triplet: anchor, positive, negative."""
    return ((a, p, n) for a in range(len(ids)) for p in positives(ids, a) for n in negatives(ids, a))


def term(d_ap: Tensor, d_an: Tensor, margin: float | None) -> Tensor:
    return torch.log(1 + torch.exp(d_ap - d_an)) if margin is None else torch.clamp(d_ap - d_an + margin, min=0)


def chosen(d: Tensor, ids: list[int], mining: str) -> list[tuple[int, int, int]]:
    """The triplets that a way of mining takes, of a matrix of distances."""
    if mining == "batch_all":
        return list(triples(ids))
    found = []
    for anchor in range(len(ids)):
        far, near = positives(ids, anchor), negatives(ids, anchor)
        if not far or not near:
            continue
        hardest = max(far, key=lambda p: float(d[anchor, p]))
        for positive in far if mining == "semi_hard" else [hardest]:
            beyond = [n for n in near if d[anchor, n] > d[anchor, positive]]
            pool = near if mining == "batch_hard" or (mining == "hardest_semi_hard" and not beyond) else beyond
            if pool:
                found.append((anchor, positive, min(pool, key=lambda n: float(d[anchor, n]))))
    return found


def picked(weights: dict[int, float], number: float) -> int:
    """Of columns with weights the one that a uniform number in [0, 1) falls on."""
    reached, wanted = 0.0, number * sum(weights.values())
    for column, weight in weights.items():
        reached += weight
        if reached > wanted:
            return column
    return list(weights)[-1]


def drawn(embeddings: Tensor, ids: list[int], mining: str, numbers: Tensor) -> list[tuple[int, int, int]]:
    """The triplets that uniform numbers, one for each anchor and each image of its identity in order, choose.

    Distance-weighted as in Wu et al. 2017: 1 / q(d), q(d) = d^(n - 2) (1 - d^2 / 4)^((n - 3) / 2), with d at least 0.5 and less
    than 1.4 unless all are farther.
    """
    root, size, found = distances(embeddings, squared=False), embeddings.shape[1], []
    for anchor in range(len(numbers)):
        far, near = positives(ids, anchor), negatives(ids, anchor)
        if not far or not near:
            continue
        if mining == "random":
            positive = picked(dict.fromkeys(far, 1.0), float(numbers[anchor, 0]))
            found.append((anchor, positive, picked(dict.fromkeys(near, 1.0), float(numbers[anchor, 1]))))
            continue
        cut = {n: max(0.5, float(root[anchor, n])) for n in near}
        close = {n: d ** (2 - size) * (1 - d**2 / 4) ** ((3 - size) / 2) for n, d in cut.items() if d < 1.4}
        for place, column in enumerate(sorted([*far, anchor])):
            if column != anchor:
                negative = picked(close or dict.fromkeys(near, 1.0), float(numbers[anchor, place]))
                found.append((anchor, column, negative))
    return found


def loss_of(
    embeddings: Tensor,
    ids: list[int],
    mining: str,
    margin: float | None,
    squared: bool,
    average: str = "active",
    *,
    numbers: Tensor | None = None,
    anchors: int | None = None,
) -> tuple[Tensor, int]:
    """Sum and divisor of the triplet loss.

    Args:
        numbers: what `drawn` takes. anchors: so many of the first embeddings are anchors; None all.
    """
    d = distances(embeddings, squared)
    fixed = embeddings.detach()
    triplets = chosen(d.detach(), ids, mining) if numbers is None else drawn(fixed, ids, mining, numbers)
    terms = [term(d[a, p], d[a, n], margin) for a, p, n in triplets if anchors is None or a < anchors]
    total = torch.stack(terms).sum() if terms else embeddings.sum() * 0
    counted = [one for one in terms if one > 0] if average == "active" else terms
    return total, len(counted)


def smooth(
    embeddings: Tensor, ids: list[int], margin: float, sharpness: float, squared: bool, *, anchors: int | None = None
) -> tuple[Tensor, int]:
    d = distances(embeddings, squared)
    terms = []
    for anchor in range(len(ids) if anchors is None else anchors):
        if positives(ids, anchor) and negatives(ids, anchor):
            sums = [
                torch.exp(sharpness * (d[anchor, p] - d[anchor, n] + margin))
                for p in positives(ids, anchor)
                for n in negatives(ids, anchor)
            ]
            terms.append(torch.log(1 + torch.stack(sums).sum()) / sharpness)
    return (torch.stack(terms).sum() if terms else embeddings.sum() * 0), len(terms)


def contrastive(embeddings: Tensor, ids: list[int], margin: float, squared: bool) -> tuple[Tensor, int]:
    d = distances(embeddings, squared)
    terms = []
    for anchor in range(len(ids)):
        far, near = positives(ids, anchor), negatives(ids, anchor)
        if far and near:
            pulls = [d[anchor, p] ** 2 / 2 for p in far]
            pushes = [(margin - d[anchor, n]) ** 2 / 2 for n in near if d[anchor, n] < margin]
            terms.append(sum(pulls) / len(pulls) + (sum(pushes) / len(pushes) if pushes else 0))
    return (torch.stack(terms).sum() if terms else embeddings.sum() * 0), len(terms)


def chord(degrees: float, squared: bool = False) -> float:
    """Distance of two points of the circle that are so many degrees apart: 2 sin(a / 2), or 2 - 2 cos a."""
    length = 2 * math.sin(math.radians(degrees) / 2)
    return length**2 if squared else length
