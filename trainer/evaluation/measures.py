"""One measure each, on unit vectors: ranks, neighbours, triplet loss, verification. Each returns JSON-able scalars.

Not yet run, for want of a GPU: the pair similarities on a CUDA `device` (in `operating_points`).
"""

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from trainer.evaluation.draws import Pairs, draw_identities, draw_triplets
from trainer.evaluation.search.all_pairs import Refused, operating_points_of_all_pairs
from trainer.evaluation.search.distance_histograms import BINS, distance_histograms
from trainer.evaluation.search.finder import Finder, owners
from trainer.evaluation.search.pair_blocks import sorted_by_identity
from trainer.metric.distances import cosines_of_pairs, paired_distance, pairwise_squared, rows_at_once
from trainer.metric.identification import (
    centroids,
    cumulative_match,
    cumulative_match_band,
    distance_vote,
    majority_vote,
    mated_ranks,
    split_gallery,
    tpir_at_fpir,
    without_self,
)
from trainer.metric.verification import (
    OperatingPoint,
    Roc,
    area_under_curve,
    best_threshold,
    equal_error_rate,
    fold_accuracies,
    pair_similarities,
    roc,
    tar_at_far,
)

LONGEST_RANK = 50
"""Where the CMC ends."""
MOST_TRIPLETS = 1_000_000
"""Valid triplets up to which the triplet loss averages all of them."""
DRAWN_TRIPLETS = 100_000
"""Triplets drawn for it beyond that."""

Scalars = dict[str, Any]
Curves = dict[str, np.ndarray]
Set = tuple[Tensor, Tensor]
"""Unit embeddings, shape (n, d), and their identities, shape (n,)."""


def rank_k(
    gallery: Set,
    probes: Set,
    ranks: Sequence[int],
    find: Finder,
    own: Tensor | None = None,
    draws: int = 0,
    seed: int = 0,
) -> tuple[Scalars, Curves]:
    """rank1, ... and the CMC up to rank 50; a rank counts identities, each at the place of its best gallery image.

    Args:
        own: each probe's own place in the gallery, which does not count; None where probes are not enrolled.
        draws: of the bootstrap over identities for the band of the CMC; 0 draws none.
    Returns:
        curves cmc and, with draws, cmc_low and cmc_high, shape (ranks,); and, by ascending identity, identity_labels,
        identity_rank1 and identity_probes, shape (identities,).
    """
    enrolled, counts = gallery[1].unique(return_counts=True)
    longest = min(len(enrolled), max(LONGEST_RANK, ranks[-1]))
    others = len(gallery[1]) - (own is not None)
    reach = min(others, longest * int(counts.max()))  # so many images hold `longest` identities in any case
    _, positions = find(gallery[0], probes[0], reach + (own is not None))
    positions = positions if own is None else without_self(positions, own)
    found = mated_ranks(owners(gallery[1], positions), probes[1])
    curve = cumulative_match(found, longest)
    scalars: Scalars = {f"rank{k}": float(curve[k - 1]) for k in ranks}
    scalars |= {"gallery": len(gallery[1]), "gallery_identities": len(enrolled), "probes": len(probes[1])}
    curves = {"cmc": curve[:LONGEST_RANK].numpy()} | _by_identity(found == 1, probes[1])
    if draws:
        band = cumulative_match_band(found, probes[1], longest, draws, seed)
        curves |= {name: end[:LONGEST_RANK].numpy() for name, end in zip(("cmc_low", "cmc_high"), band, strict=True)}
    return scalars, curves


def _by_identity(hits: Tensor, identities: Tensor) -> Curves:
    labels, inverse, counts = identities.unique(return_inverse=True, return_counts=True)
    right = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, inverse, hits.double())
    return {
        "identity_labels": labels.numpy(),
        "identity_rank1": (right / counts).numpy(),
        "identity_probes": counts.numpy(),
    }


def knn_leave_one_out(samples: Set, knn: Sequence[int], find: Finder) -> Scalars:
    """knn_leave_one_out_K: the vote of the K nearest other samples, and …_weighted_K: by 1 / distance; an identity with one
    image is only a distractor."""
    embeddings, identities = samples
    _, inverse, counts = identities.unique(return_inverse=True, return_counts=True)
    probes = (counts[inverse] >= 2).nonzero().squeeze(1)
    similarities, positions = find(embeddings, embeddings[probes], knn[-1] + 1)
    places = torch.arange(positions.shape[1]).expand_as(positions)
    itself = (
        places.masked_fill(positions != probes[:, None], positions.shape[1] - 1).min(1).values
    )  # else the last goes
    others = without_self(places, itself)
    neighbours = owners(identities, positions.gather(1, others))
    scalars = _votes("knn_leave_one_out", neighbours, similarities.gather(1, others), identities[probes], knn)
    return scalars | {"leave_one_out_probes": len(probes), "single_image_identities": int((counts == 1).sum())}


def knn_gallery(gallery: Set, probes: Set, knn: Sequence[int], find: Finder) -> Scalars:
    """knn_gallery_K: the vote of the K nearest gallery images, and …_weighted_K: by 1 / distance."""
    similarities, positions = find(gallery[0], probes[0], knn[-1])
    scalars = _votes("knn_gallery", owners(gallery[1], positions), similarities, probes[1], knn)
    return scalars | {"knn_gallery": len(gallery[1]), "knn_probes": len(probes[1])}


def _votes(name: str, neighbours: Tensor, similarities: Tensor, truth: Tensor, knn: Sequence[int]) -> Scalars:
    majority = {f"{name}_{k}": _share(majority_vote(neighbours, k) == truth) for k in knn}
    weighted = {f"{name}_weighted_{k}": _share(distance_vote(neighbours, similarities, k) == truth) for k in knn}
    return majority | weighted


def open_set_points(samples: Set, images: int, fpirs: Sequence[float], seed: int, find: Finder) -> Scalars:
    """tpir_at_fpir: half of the identities, drawn, are enrolled with their first `images`; the others must raise no alarm.

    Each point is a dict of `OpenSetPoint` with `refused`, None or the reason why there is none.
    Source: ISO/IEC 19795-1; IJB-C 1:N (Maze et al. 2018), where the two galleries halve the subjects likewise.
    """
    embeddings, identities = samples
    unique = identities.unique()
    drawn = unique[torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))]
    known = torch.isin(identities, drawn[: (len(unique) + 1) // 2])
    gallery, mated = (known.nonzero().squeeze(1)[part] for part in split_gallery(identities[known], images))
    strangers = (~known).nonzero().squeeze(1)
    probes = torch.cat([mated, strangers])
    similarities, positions = find(embeddings[gallery], embeddings[probes], 1)
    right = owners(identities[gallery], positions[:, 0]) == identities[probes]
    best = similarities[:, 0]
    points = [open_set_point(best[: len(mated)], right[: len(mated)], best[len(mated) :], fpir) for fpir in fpirs]
    counts = {"open_set_enrolled": len(gallery), "open_set_mated": len(mated), "open_set_nonmated": len(strangers)}
    return {"tpir_at_fpir": points, **counts}


def open_set_point(mated: Tensor, right: Tensor, nonmated: Tensor, fpir: float) -> Scalars:
    """`tpir_at_fpir` as a dict with `refused`, None or the reason why there is none."""
    try:
        return asdict(tpir_at_fpir(mated, right, nonmated, fpir)) | {"refused": None}
    except ValueError as reason:
        return {"target": fpir, "tpir": None, "refused": str(reason)}


def nearest_centroid(gallery: Set, probes: Set, images: int, find: Finder) -> Scalars:
    """centroid_accuracy: whether the nearest mean of `images` gallery images is the probe's identity."""
    means, identities = centroids(*gallery, images)
    _, nearest = find(means, probes[0], 1)
    return {"centroid_accuracy": _share(owners(identities, nearest[:, 0]) == probes[1])}


def triplets_exist(identities: Tensor) -> int:
    """Valid triplets: anchor and another image of its identity, and an image of any other identity."""
    counts = identities.unique(return_counts=True)[1]
    return int((counts * (counts - 1) * (len(identities) - counts)).sum())


def triplet_loss(samples: Set, margin: float | None, squared: bool, seed: int) -> Scalars:
    """Mean loss, zeros included, over all valid triplets, or over a uniform draw of 100,000 where they are over a million.

    Source: Hermans et al. 2017, "batch all", with the whole set as one batch.
    """
    embeddings, identities = samples
    exist = triplets_exist(identities)
    if exist > MOST_TRIPLETS:
        mean = _drawn_loss(embeddings, draw_triplets(identities, DRAWN_TRIPLETS, seed), margin, squared)
        return {"triplet_loss": mean, "triplets": DRAWN_TRIPLETS, "triplets_are": "drawn"}
    embeddings = embeddings.double()
    sums = []
    for anchors in torch.arange(len(identities)).split(256):
        distances = pairwise_squared(embeddings[anchors], embeddings)  # (256, n)
        distances = distances if squared else distances.sqrt()
        for anchor, row in zip(anchors, distances, strict=True):
            same = identities == identities[anchor]
            positives = same.index_fill(0, anchor, False)
            sums.append(_loss(row[positives][:, None] - row[~same][None, :], margin).sum())
    return {"triplet_loss": float(torch.stack(sums).sum()) / exist, "triplets": exist, "triplets_are": "all valid"}


def _drawn_loss(
    embeddings: Tensor, triplets: tuple[Tensor, Tensor, Tensor], margin: float | None, squared: bool
) -> float:
    count, block = len(triplets[0]), rows_at_once(embeddings)
    # made once: small tensors kept between large ones leave holes in the heap, 24 GB of them
    losses = torch.empty(count)
    for begin in range(0, count, block):
        anchor, positive, negative = (embeddings[rows[begin : begin + block]] for rows in triplets)  # (block, d) each
        near, far = (paired_distance(anchor, other, squared) for other in (positive, negative))
        losses[begin : begin + block] = _loss(near - far, margin)
    return float(losses.double().mean())


def fold_accuracy(samples: Set, pairs: Pairs) -> Scalars:
    """verification_accuracy: mean over the folds, each with the threshold that is best on the others; its deviation.

    verification_threshold is the root distance that divides all pairs best: for pictures and clusters, not for the accuracy.
    """
    similarities = cosines_of_pairs(samples[0], pairs.first, pairs.second)
    accuracies = fold_accuracies(similarities, pairs.genuine, pairs.fold)
    threshold = best_threshold(similarities, pairs.genuine)
    return {
        "verification_accuracy": float(accuracies.mean()),
        "verification_std": float(accuracies.std()),
        "verification_threshold": sqrt(max(0.0, 2 - 2 * threshold)) if isfinite(threshold) else None,
        "verification_pairs": len(pairs.first),
        "verification_folds": len(accuracies),
        "folds_share_identities": not pairs.disjoint,
    }


def operating_points(samples: Set, fars: Sequence[float], most: int, seed: int, device: str) -> tuple[Scalars, Curves]:
    """TAR at each FAR and the histograms of distances from all pairs of the set; EER, AUC and the ROC from all pairs, too, or
    from those of `most` of its samples (whole identities).

    Returns:
        curves roc_far and roc_tar, thinned, shape (points,); histogram_edges, root distances, shape (bins + 1,),
        histogram_genuine and histogram_impostor, pairs, shape (bins,).
    """
    embeddings, identities = samples
    large = len(identities) > most
    if large:
        everything = sorted_by_identity(*samples, device)
        found = operating_points_of_all_pairs(everything, fars, seed)
        points = [point_told(point, everything.impostor_pairs) for point in found]
        counted = everything.genuine_pairs, everything.impostor_pairs
        histograms = [part.cpu() for part in distance_histograms(everything)]
        chosen = draw_identities(identities, most, seed)
        embeddings, identities = embeddings[chosen], identities[chosen]
    genuine, impostor = (side.cpu() for side in pair_similarities(embeddings.to(device), identities.to(device)))
    if not large:
        points = [operating_point(genuine, impostor, far) for far in fars]
        counted = len(genuine), len(impostor)
        histograms = [torch.linspace(0, 2, BINS + 1, dtype=torch.float64), *map(_histogram, (genuine, impostor))]
    which = f"all pairs of {len(identities):,} samples, whole identities drawn" if large else "all pairs"
    curve = roc(genuine, impostor)
    scalars = {
        "eer": equal_error_rate(curve),
        "auc": area_under_curve(curve),
        "tar_at_far": points,
        "genuine_pairs": counted[0],
        "impostor_pairs": counted[1],
        "roc_genuine_pairs": len(genuine),
        "roc_impostor_pairs": len(impostor),
        "roc_pairs_are": which,
    }
    counts = dict(zip(_HISTOGRAMS, (part.numpy() for part in histograms), strict=True))
    return scalars, counts | dict(zip(("roc_far", "roc_tar"), thinned(curve), strict=True))


def _histogram(similarities: Tensor) -> Tensor:
    """Pairs in each bin of the root distance, int64, shape (bins,)."""
    distances = (2 - 2 * similarities.double()).clamp(min=0).sqrt()
    return torch.bincount((distances * (BINS / 2)).long().clamp(max=BINS - 1), minlength=BINS)


_HISTOGRAMS = ("histogram_edges", "histogram_genuine", "histogram_impostor")


def point_told(point: OperatingPoint | Refused, impostors: int) -> Scalars:
    """An operating point as a dict with `refused`, None or the reason why there is none."""
    if isinstance(point, Refused):
        return {"target": point.target, "tar": None, "impostor_pairs": impostors, "refused": point.reason}
    return asdict(point) | {"refused": None}


def operating_point(genuine: Tensor, impostor: Tensor, far: float) -> Scalars:
    """`tar_at_far` as a dict with `refused`, None or the reason why there is none."""
    try:
        return asdict(tar_at_far(genuine, impostor, far)) | {"refused": None}
    except ValueError as reason:
        return {"target": far, "tar": None, "impostor_pairs": len(impostor), "refused": str(reason)}


def thinned(curve: Roc, points: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 x `points` points of the curve: the last at or under each FAR of a logarithmic and of a linear grid."""
    far = curve.far.contiguous()
    smallest = float(far[far > 0].min())
    grid = torch.cat([torch.logspace(np.log10(smallest), 0, points).double(), torch.linspace(0, 1, points).double()])
    chosen = (torch.searchsorted(far, grid, right=True) - 1).clamp(min=0)
    chosen = torch.cat([chosen, torch.tensor([0, len(far) - 1])]).unique()
    return far[chosen].numpy(), curve.tar[chosen].numpy()


def _loss(difference: Tensor, margin: float | None) -> Tensor:
    return softplus(difference) if margin is None else relu(difference + margin)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
