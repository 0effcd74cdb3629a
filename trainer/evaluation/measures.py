"""One measure each, on unit vectors: ranks, neighbours, triplet loss, verification. Each returns JSON-able scalars.

Not yet run, for want of a GPU: the pair similarities on a CUDA `device` (in `operating_points`).
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from trainer.evaluation.draws import Pairs, draw_identities, draw_triplets
from trainer.evaluation.index import search
from trainer.metric.distances import paired_distance, pairwise_squared
from trainer.metric.identification import centroids, cumulative_match, majority_vote, mated_ranks, without_self
from trainer.metric.verification import (
    Roc,
    area_under_curve,
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

_CACHED = 1 << 18
"""Numbers of each side held at once while distances are taken: 1 MiB, which stays in a core's cache."""

Scalars = dict[str, Any]
Curves = dict[str, np.ndarray]
Set = tuple[Tensor, Tensor]
"""Unit embeddings, shape (n, d), and their identities, shape (n,)."""


def rank_k(gallery: Set, probes: Set, ranks: Sequence[int], device: str) -> tuple[Scalars, Curves]:
    """rank1, ... and the CMC up to rank 50; a rank counts identities, each at the place of its best gallery image."""
    enrolled, counts = gallery[1].unique(return_counts=True)
    longest = min(len(enrolled), max(LONGEST_RANK, ranks[-1]))
    reach = min(len(gallery[1]), longest * int(counts.max()))  # so many images hold `longest` identities in any case
    _, positions = search(gallery[0], probes[0], reach, device)
    curve = cumulative_match(mated_ranks(gallery[1][positions], probes[1]), longest)
    scalars: Scalars = {f"rank{k}": float(curve[k - 1]) for k in ranks}
    scalars |= {"gallery": len(gallery[1]), "gallery_identities": len(enrolled), "probes": len(probes[1])}
    return scalars, {"cmc": curve[:LONGEST_RANK].numpy()}


def knn_leave_one_out(samples: Set, knn: Sequence[int], device: str) -> Scalars:
    """knn_leave_one_out_K: the vote of the K nearest other samples; an identity with one image is only a distractor."""
    embeddings, identities = samples
    _, inverse, counts = identities.unique(return_inverse=True, return_counts=True)
    probes = (counts[inverse] >= 2).nonzero().squeeze(1)
    _, positions = search(embeddings, embeddings[probes], knn[-1] + 1, device)
    neighbours = identities[without_self(positions, probes)]
    scalars = {f"knn_leave_one_out_{k}": _share(majority_vote(neighbours, k) == identities[probes]) for k in knn}
    return scalars | {"leave_one_out_probes": len(probes), "single_image_identities": int((counts == 1).sum())}


def knn_gallery(gallery: Set, probes: Set, knn: Sequence[int], device: str) -> Scalars:
    """knn_gallery_K: the vote of the K nearest gallery images."""
    _, positions = search(gallery[0], probes[0], knn[-1], device)
    neighbours = gallery[1][positions]
    scalars: Scalars = {f"knn_gallery_{k}": _share(majority_vote(neighbours, k) == probes[1]) for k in knn}
    return scalars | {"knn_gallery": len(gallery[1]), "knn_probes": len(probes[1])}


def nearest_centroid(gallery: Set, probes: Set, images: int, device: str) -> Scalars:
    """centroid_accuracy: whether the nearest mean of `images` gallery images is the probe's identity."""
    means, identities = centroids(*gallery, images)
    _, nearest = search(means, probes[0], 1, device)
    return {"centroid_accuracy": _share(identities[nearest[:, 0]] == probes[1])}


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
    losses = []
    block = max(1, _CACHED // embeddings.shape[1])
    for rows in zip(*(part.split(block) for part in triplets), strict=True):
        anchor, positive, negative = (embeddings[row] for row in rows)  # (block, d) each
        near, far = (paired_distance(anchor, other, squared) for other in (positive, negative))
        losses.append(_loss(near - far, margin))
    return float(torch.cat(losses).double().mean())


def fold_accuracy(samples: Set, pairs: Pairs) -> Scalars:
    """verification_accuracy: mean over the folds, each with the threshold that is best on the others; its deviation."""
    first, second = (samples[0][side].double() for side in (pairs.first, pairs.second))  # (p, d)
    accuracies = fold_accuracies((first * second).sum(dim=1), pairs.genuine, pairs.fold)
    return {
        "verification_accuracy": float(accuracies.mean()),
        "verification_std": float(accuracies.std()),
        "verification_pairs": len(pairs.first),
        "verification_folds": len(accuracies),
        "folds_share_identities": not pairs.disjoint,
    }


def operating_points(samples: Set, fars: Sequence[float], most: int, seed: int, device: str) -> tuple[Scalars, Curves]:
    """EER, AUC, TAR at each FAR and the ROC, from all pairs of the set, or of `most` of its samples (whole identities)."""
    embeddings, identities = samples
    which = "all pairs"
    if len(identities) > most:
        chosen = draw_identities(identities, most, seed)
        embeddings, identities = embeddings[chosen], identities[chosen]
        which = f"all pairs of {len(chosen):,} samples, whole identities drawn"
    genuine, impostor = (side.cpu() for side in pair_similarities(embeddings.to(device), identities.to(device)))
    curve = roc(genuine, impostor)
    scalars = {
        "eer": equal_error_rate(curve),
        "auc": area_under_curve(curve),
        "tar_at_far": [_operating_point(genuine, impostor, far) for far in fars],
        "genuine_pairs": len(genuine),
        "impostor_pairs": len(impostor),
        "roc_pairs_are": which,
    }
    return scalars, dict(zip(("roc_far", "roc_tar"), _thinned(curve), strict=True))


def _operating_point(genuine: Tensor, impostor: Tensor, far: float) -> Scalars:
    try:
        return asdict(tar_at_far(genuine, impostor, far)) | {"refused": None}
    except ValueError as reason:
        return {"target": far, "tar": None, "impostor_pairs": len(impostor), "refused": str(reason)}


def _thinned(curve: Roc, points: int = 500) -> tuple[np.ndarray, np.ndarray]:
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
