"""Verification: are two images of the same identity? Similarities of genuine and impostor pairs in, rates out.

A pair is accepted when its similarity is *greater* than the threshold. Similarities are cosines; higher is more alike.
FAR is the accepted fraction of impostor pairs, TAR the accepted fraction of genuine pairs (ISO/IEC 19795-1).
"""

from dataclasses import dataclass
from math import floor, sqrt

import torch
from torch import Tensor

FEWEST_FALSE_ACCEPTS = 10
"""Impostor pairs x FAR below which no TAR is given: the threshold would hang on a handful of pairs."""
_BLOCK = 1 << 24
"""Similarities held at once."""


@dataclass(frozen=True)
class Roc:
    """Every operating point, from "accept nothing" (0, 0) to "accept everything" (1, 1); float64, shape (points,)."""

    far: Tensor
    tar: Tensor


@dataclass(frozen=True)
class OperatingPoint:
    """TAR at a FAR of at most `target`."""

    target: float
    far: float
    """FAR attained, at most `target`; lower where impostors tie at the threshold."""
    tar: float
    low: float
    high: float
    """95 % Wilson interval of `tar`, as though pairs were independent; pairs that share images are not, so it is narrow."""
    threshold: float
    """Similarity that an accepted pair exceeds."""
    genuine_pairs: int
    impostor_pairs: int


def pair_similarities(embeddings: Tensor, identities: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of all n (n - 1) / 2 pairs.

    Args:
        embeddings: unit vectors, shape (n, d).
        identities: shape (n,).
    Returns:
        cosines of the genuine pairs, shape (g,), and of the impostor pairs, shape (m,).
    """
    genuine, impostor = [], []
    columns = torch.arange(len(embeddings), device=embeddings.device)
    for rows in columns.split(max(1, _BLOCK // len(embeddings))):
        similarities = embeddings[rows] @ embeddings.T  # (rows, n)
        later = columns[None, :] > rows[:, None]
        same = identities[rows][:, None] == identities[None, :]
        genuine.append(similarities[later & same])
        impostor.append(similarities[later & ~same])
    return torch.cat(genuine), torch.cat(impostor)


def roc(genuine: Tensor, impostor: Tensor) -> Roc:
    """The receiver operating characteristic: one point for each distinct similarity, so ties are one slanted step.

    Args:
        genuine: similarities of same-identity pairs, shape (g,), g at least 1.
        impostor: similarities of different-identity pairs, shape (m,), m at least 1.
    """
    _check_pairs(genuine, impostor)
    values, order = torch.cat([genuine, impostor]).sort(descending=True)
    accepted = order < len(genuine)
    last = torch.ones_like(accepted)
    last[:-1] = values[:-1] != values[1:]  # the last of a run of equal similarities
    zero = torch.zeros(1, dtype=torch.float64, device=values.device)
    tar = accepted.cumsum(0)[last].double() / len(genuine)
    far = (~accepted).cumsum(0)[last].double() / len(impostor)
    return Roc(torch.cat([zero, far]), torch.cat([zero, tar]))


def area_under_curve(curve: Roc) -> float:
    """Probability that a genuine pair is more alike than an impostor pair, ties counted half, in [0, 1]."""
    return float(torch.trapezoid(curve.tar, curve.far))


def equal_error_rate(curve: Roc) -> float:
    """The rate, in [0, 1], at which FAR equals 1 - TAR; on the straight line between the two points around it."""
    gap = curve.far - (1 - curve.tar)  # ascends from -1 to 1
    above = int((gap >= 0).nonzero()[0])  # at least 1: gap[0] is -1
    share = float(-gap[above - 1] / (gap[above] - gap[above - 1]))
    return float(curve.far[above - 1] + share * (curve.far[above] - curve.far[above - 1]))


def tar_at_far(genuine: Tensor, impostor: Tensor, far: float) -> OperatingPoint:
    """True-accept rate at the lowest threshold whose false-accept rate is at most `far`.

    Args:
        genuine: similarities of same-identity pairs, shape (g,).
        impostor: similarities of different-identity pairs, shape (m,).
        far: target false-accept rate in (0, 1); m * far must be at least 10.
    Raises:
        ValueError: `far` is not in (0, 1), or there are too few impostor pairs for it.
    Source: ISO/IEC 19795-1; FaceNet (Schroff et al. 2015, section 4) calls it VAL at FAR.
    Example: 10 of 100 impostors may pass at FAR 0.1. The threshold is the 11th highest impostor similarity, which an
        accepted pair must exceed; if the 10th ties with it, both are rejected and the FAR attained is 0.09 or less.
    """
    _check_pairs(genuine, impostor)
    threshold, attained = threshold_at(impostor, far)
    accepts = int((genuine > threshold).sum())
    low, high = wilson_interval(accepts, len(genuine))
    return OperatingPoint(far, attained, accepts / len(genuine), low, high, threshold, len(genuine), len(impostor))


def threshold_at(impostor: Tensor, far: float, what: str = "impostor pairs", rate: str = "FAR") -> tuple[float, float]:
    """The lowest similarity that at most a share `far` of the impostors exceed, and the share that does.

    Raises:
        ValueError: see `tar_at_far`.
    """
    allowed = allowed_at(len(impostor), far, what, rate)
    threshold = impostor.kthvalue(len(impostor) - allowed).values
    return float(threshold), int((impostor > threshold).sum()) / len(impostor)


def allowed_at(impostors: int, far: float, what: str = "impostor pairs", rate: str = "FAR") -> int:
    """How many of so many impostors may exceed the threshold.

    Raises:
        ValueError: `far` is outside (0, 1), or there are too few impostors for it.
    """
    if not 0 < far < 1:
        raise ValueError(f"{rate} is {far}; it must lie between 0 and 1, both excluded")
    expected = impostors * far
    if expected < FEWEST_FALSE_ACCEPTS - 1e-9:
        pairs = f"{impostors:,} {what} at {rate} {far:g} are {expected:.3g}"
        raise ValueError(f"{pairs} false accepts; at least {FEWEST_FALSE_ACCEPTS} are needed for a rate worth reading")
    return floor(expected + 1e-9)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion, within [0, 1]; 95 % with the default z. Source: Wilson 1927, JASA 22."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def best_threshold(similarities: Tensor, genuine: Tensor) -> float:
    """The threshold that decides most pairs rightly; of equally good ones the highest.

    It lies midway between two neighbouring distinct similarities, or is infinite where accepting nothing or everything
    is best.

    Args:
        similarities: shape (p,).
        genuine: bool, shape (p,).
    """
    values, order = similarities.double().sort(descending=True)
    gains = torch.where(genuine[order], 1, -1).cumsum(0)  # rightly decided, beyond "accept nothing", after each pair
    ends = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)]).nonzero().squeeze(1)
    best = int(ends[(gains[ends] == gains[ends].max()).nonzero()[0]])
    if gains[best] <= 0:
        return float("inf")
    return float((values[best] + values[best + 1]) / 2) if best + 1 < len(values) else float("-inf")


def fold_accuracies(similarities: Tensor, genuine: Tensor, folds: Tensor) -> Tensor:
    """Same/different accuracy on each fold with the threshold that is best on all the other folds.

    Args:
        similarities: shape (p,).
        genuine: bool, shape (p,).
        folds: each pair's fold, from 0, shape (p,); at least two folds, none empty.
    Returns:
        accuracies in [0, 1], shape (folds,), float64.
    Source: Huang et al. 2007, Labeled Faces in the Wild, View 2.
    """
    count = int(folds.max()) + 1
    result = torch.empty(count, dtype=torch.float64)
    for fold in range(count):
        held_out = folds == fold
        threshold = best_threshold(similarities[~held_out], genuine[~held_out])
        right = (similarities[held_out].double() > threshold) == genuine[held_out]
        result[fold] = right.double().mean()
    return result


def _check_pairs(genuine: Tensor, impostor: Tensor) -> None:
    if len(genuine) == 0 or len(impostor) == 0:
        raise ValueError(f"{len(genuine)} genuine and {len(impostor)} impostor pairs; at least one of each is needed")
