"""Lists of pairs and InsightFace's .bin sets: from the pairs' similarities to accuracy in folds, EER, AUC, TAR@FAR and curves.

The score of a pair is the float64 inner product of its unit embeddings. Memory: the embeddings of the images named, 32 bytes a
pair, and a block of vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.index import ShardSet
from data_shards.reader import keys_of
from data_shards.sources.insightface_bin import InsightFaceBin
from trainer.evaluation.measures import Curves, Scalars, operating_point, thinned
from trainer.evaluation.protocols import SetResult
from trainer.evaluation.sets.pair_lists import find_images, folds_of, folds_share_identities, read_pairs
from trainer.evaluation.sets.prepared import Embed, Part, Report, embed_parts, named_missing
from trainer.metric.distances import cosines_of_pairs
from trainer.metric.templates import roc_at_genuine
from trainer.metric.verification import area_under_curve, best_threshold, equal_error_rate, fold_accuracies

BINS = 100
"""Of the histograms of distances, over [0, 2]."""


@dataclass(frozen=True)
class PairSet:
    """Pairs of images that are found; see `Prepared`."""

    name: str
    parts: list[Part]
    """Samples to embed, n in all."""
    pairs: NDArray[np.int64]
    """Which two of those n each pair is, shape (p, 2)."""
    genuine: NDArray[np.bool_]
    """Shape (p,)."""
    folds: NDArray[np.int64]
    """Labels, shape (p,)."""
    share_identities: bool | None
    """Whether pairs of two folds show the same identity; None: not known."""
    left_out: int = 0
    """Pairs not judged, since an image is missing."""
    fars: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        genuine = int(self.genuine.sum())
        if genuine in (0, len(self.genuine)):
            counts = f"{genuine} genuine and {len(self.genuine) - genuine} impostor pairs"
            raise ValueError(f"{self.name} has {counts}; at least one of each is needed")

    def judge(self, embedded: Embed, report: Report) -> SetResult:
        embeddings = embed_parts(embedded, self.parts, self.name)
        scores = cosines_of_pairs(embeddings, *torch.from_numpy(self.pairs.T))
        genuine = torch.from_numpy(self.genuine)
        labels, folds = np.unique(self.folds, return_inverse=True)
        protocol = {"folds": len(labels), "fars": list(self.fars), "pairs": len(scores)}
        scalars = report.about(len(embeddings), {"pairs_left_out": self.left_out}, protocol)
        scalars |= {"verification_pairs": len(scores), "folds_share_identities": self.share_identities}
        scalars |= _fold_accuracy(scalars, scores, genuine, torch.from_numpy(folds))
        measured, curves = judge_scores(scores[genuine], scores[~genuine], self.fars)
        return SetResult(scalars | measured | {"roc_pairs_are": "all pairs of the list"}, curves)


def pair_list(path: Path, images: ShardSet, folds: int, fars: tuple[float, ...], skip_missing: bool) -> PairSet:
    """A list of pairs whose images lie in a set of shards.

    Raises:
        ValueError: see `read_pairs`, `find_images`; or all pairs are genuine, or all impostors.
    """
    wanted = read_pairs(path)
    found = find_images(wanted, images, skip_missing)
    dealt, same = folds_of(wanted, folds), np.array([pair.same for pair in wanted.pairs])
    share = folds_share_identities(wanted, dealt)
    left_out = int((~found.kept).sum())
    kept = same[found.kept], dealt[found.kept]
    return PairSet(path.name, found.parts, found.pairs, *kept, share, left_out, fars)


def bin_labels(path: Path) -> NDArray[np.bool_]:
    """Which pairs of a .bin set are genuine, shape (p,).

    Raises:
        ValueError: the file is no verification set.
    """
    source = InsightFaceBin(str(path))
    same = np.array([pair[2] for pair in source.pairs()], bool)
    source.open().close()  # it holds the file's pictures in memory
    return same


def bin_set(
    path: Path, same: NDArray[np.bool_], shards: ShardSet, folds: int, fars: tuple[float, ...], skip_missing: bool
) -> PairSet:
    """A .bin set whose pictures have been converted: its pairs in their order, in folds of consecutive pairs.

    Args:
        same: of `bin_labels`. shards: what `open_or_convert` has made of it.
    Raises:
        ValueError: pictures in it cannot be used.
    Source: the folds are those of insightface's verification.py: scikit-learn's KFold without shuffling.
    """
    (split,) = map(shards.split, shards.splits)
    sample_of = np.full(2 * len(same), -1)
    samples = np.arange(len(split))
    sample_of[[int(key.rpartition("/")[2]) for key in keys_of(split, samples)]] = samples
    pairs = sample_of.reshape(-1, 2)
    kept = (pairs >= 0).all(axis=1)
    if not kept.all() and not skip_missing:
        missing = [f"image {row}" for row in np.flatnonzero(sample_of < 0)]
        raise ValueError(f"{len(missing)} pictures of {path} cannot be used: {named_missing(missing)}")
    dealt = consecutive_folds(len(same), folds)
    wanted, places = np.unique(pairs[kept], return_inverse=True)
    places = places.reshape(-1, 2)
    return PairSet(path.name, [(split, wanted)], places, same[kept], dealt[kept], None, int((~kept).sum()), fars)


def consecutive_folds(pairs: int, folds: int) -> NDArray[np.int64]:
    """Fold of each pair, ascending; sizes differ by one at most, the larger ones come first.

    Example: 5 pairs, 2 folds -> [0, 0, 0, 1, 1].
    """
    return np.concatenate(
        [np.full(len(part), fold) for fold, part in enumerate(np.array_split(np.arange(pairs), folds))]
    )


def judge_scores(genuine: Tensor, impostor: Tensor, fars: Sequence[float]) -> tuple[Scalars, Curves]:
    """EER, AUC, TAR at each FAR, the ROC and the histograms of root distances.

    Args:
        genuine: scores of the same-identity pairs, shape (g,). impostor: of the others, shape (m,).
    """
    curve = roc_at_genuine(genuine, impostor)
    scalars = {
        "eer": equal_error_rate(curve),
        "auc": area_under_curve(curve),
        "tar_at_far": [operating_point(genuine, impostor, far) for far in fars],
        "genuine_pairs": len(genuine),
        "impostor_pairs": len(impostor),
    }
    curves = dict(zip(("roc_far", "roc_tar"), thinned(curve), strict=True))
    edges = np.linspace(0, 2, BINS + 1)
    curves |= {"histogram_edges": edges}
    for name, scores in (("genuine", genuine), ("impostor", impostor)):
        curves[f"histogram_{name}"] = np.histogram(root_distance(scores).numpy(), edges)[0]
    return scalars, curves


def root_distance(scores: Tensor) -> Tensor:
    """L2 distance, in [0, 2], of unit vectors with these inner products."""
    return (2 - 2 * scores).clamp(0, 4).sqrt()


def _fold_accuracy(scalars: Scalars, scores: Tensor, genuine: Tensor, folds: Tensor) -> Scalars:
    """Accuracy over folds, each with the threshold that is best on the others; the threshold that is best on all pairs."""
    limit = best_threshold(scores, genuine)
    distance = sqrt(max(0.0, 2 - 2 * limit)) if isfinite(limit) else None
    found: Scalars = {"verification_threshold": distance, "verification_folds": int(folds.max()) + 1}
    if found["verification_folds"] < 2:
        names = ("verification_accuracy", "verification_std")
        scalars["refusals"] |= dict.fromkeys(names, "all pairs are in one fold; at least 2 are needed")
        return found | dict.fromkeys(names)
    accuracies = fold_accuracies(scores, genuine, folds)
    return found | {"verification_accuracy": float(accuracies.mean()), "verification_std": float(accuracies.std())}
