"""From embeddings to results: identification, neighbours, verification and triplet loss of one set.

`open_set` is for identities that training never saw; `closed_set` for unseen images of training identities. What a set is
too small for is not given as a number but named under `refusals`, with the reason.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.evaluation.draws import draw_pairs
from trainer.evaluation.measures import (
    Curves,
    Scalars,
    Set,
    fold_accuracy,
    knn_gallery,
    knn_leave_one_out,
    nearest_centroid,
    open_set_points,
    operating_points,
    rank_k,
    triplet_loss,
    triplets_exist,
)
from trainer.evaluation.retrieved import clusters, retrieved
from trainer.evaluation.search.finder import EXACT, SEARCHES, Finder
from trainer.metric.identification import centroids, split_gallery

HEADLINE_NEIGHBOURS = 5
"""The k of the one kNN figure in `SetResult.headline`; the first of `ProtocolConfig.knn` where this is not among them."""


@dataclass(kw_only=True, frozen=True)
class ProtocolConfig:
    """How a set of embeddings is judged."""

    gallery: Literal["first", "mean", "all_but_self"] = "first"
    """Rank-k: enrolled are the first `gallery_images_per_identity` images of each identity, or their mean, and the rest are
    probes; or every image is a probe against all others."""
    gallery_images_per_identity: int = 1
    """Images of each identity that are enrolled, or averaged; at least 1."""
    ranks: tuple[int, ...] = (1, 5)
    """Ranks reported, ascending, counted in identities."""
    knn: tuple[int, ...] = (1, 5, 20)
    """Numbers of voting neighbours reported, ascending."""
    knn_gallery_images: int = 5
    """Unseen identities: images of each identity that make up the gallery for kNN against a gallery; at least 1."""
    centroid_images: int = 5
    """Training identities: images averaged into an identity's centroid; at least 1."""
    closed_gallery_images: int = 20
    """Training identities: images of each identity enrolled for kNN, the first ones; at least 1."""
    folds: int = 10
    """Folds of the verification accuracy; at least 2."""
    pairs: int = 6000
    """Verification pairs wanted in all folds together, half genuine, half impostor; at least 2 per fold."""
    fars: tuple[float, ...] = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
    """False-accept rates, each between 0 and 1, at which the true-accept rate over all pairs is reported."""
    fpirs: tuple[float, ...] = (0.1, 0.01)
    """Unseen identities: false-positive identification rates, each between 0 and 1, at which TPIR is reported."""
    roc_samples: int = 5000
    """Samples up to which ROC, EER and AUC use all pairs; of a larger set, whole identities drawn up to this. 0: neither those
    nor TAR nor histograms."""
    retrieval_queries: int = 1000
    """Images whose whole ranking is looked at for mean average precision and R-precision, drawn; 0: none."""
    cluster_samples: int = 5000
    """Images that are clustered for NMI and pairwise F; of a larger set, whole identities drawn up to this; 0: none."""
    band_draws: int = 1000
    """Draws of identities for the confidence band of the CMC; 0: no band."""
    search: str = EXACT
    """How neighbours are found: exact; split, where each rank searches its slice of the gallery, for one too large for a device;
    or ivf, hnsw, ivfpq (see `approximate`), whose recall the results then have."""
    seed: int = 0
    """Of every draw."""

    def __post_init__(self) -> None:
        images = ("gallery_images_per_identity", "knn_gallery_images", "closed_gallery_images", "centroid_images")
        smallest = dict.fromkeys(images, 1) | {"folds": 2, "pairs": 2 * self.folds, "seed": 0}
        smallest |= {"roc_samples": 4 if self.roc_samples else 0, "cluster_samples": 4 if self.cluster_samples else 0}
        smallest |= {"retrieval_queries": 0, "band_draws": 0}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.search not in SEARCHES:
            raise ValueError(f"evaluation.search is {self.search!r}; allowed are {', '.join(SEARCHES)}")
        for name in ("ranks", "knn"):
            values = list(getattr(self, name))
            if not values or values != sorted(set(values)) or values[0] < 1:
                raise ValueError(f"evaluation.{name} is {values}; it must be ascending integers from 1")
        for name in ("fars", "fpirs"):
            for rate in getattr(self, name):
                if not 0 < rate < 1:
                    raise ValueError(f"evaluation.{name} has {rate}; each must lie between 0 and 1, both excluded")


@dataclass(frozen=True)
class SetResult:
    """What one embedder does on one set."""

    scalars: Scalars
    """JSON-able. Rates in [0, 1]; None where refused, with the reason in `refusals`."""
    curves: Curves = field(default_factory=dict)
    """See `measures.rank_k` and `measures.operating_points`."""

    def headline(self) -> dict[str, float]:
        """rank1, rank5, knn, verification_accuracy and triplet_loss, for a log; what was not measured is left out."""
        names = ("rank1", "rank5", "verification_accuracy", "triplet_loss")
        found = {name: self.scalars.get(name) for name in names} | {"knn": self.headline_knn()}
        return {name: value for name, value in found.items() if value is not None}

    def headline_knn(self) -> float | None:
        """kNN accuracy, k of `headline_neighbours`: leave-one-out for unseen identities, against the gallery otherwise."""
        return self.scalars.get(f"knn_{self.scalars['knn_headline']}_{self.scalars['headline_neighbours']}")


def check_open_set(identities: Tensor, config: ProtocolConfig) -> None:
    """Refuses, before any embedding is computed, a set of identities that `open_set` would refuse.

    Raises:
        ValueError: fewer than two identities, none with two images, or fewer gallery images than ranks or neighbours.
    """
    unique, counts = identities.unique(return_counts=True)
    if len(unique) < 2:
        raise ValueError(f"the evaluation set has {len(unique)} identities; at least 2 are needed to tell them apart")
    if counts.max() < 2:
        raise ValueError(f"none of the {len(unique)} identities has 2 images; there is nothing to find again")
    if config.gallery != "all_but_self" and counts.max() <= config.gallery_images_per_identity:
        most = f"the largest identity has {int(counts.max())}"
        given = f"evaluation.gallery_images_per_identity is {config.gallery_images_per_identity}"
        raise ValueError(f"{given} and {most} images; no probe is left")
    _check_reach("ranks", config.ranks[-1], len(unique), "identities in the gallery")
    _check_reach("knn", config.knn[-1], len(identities) - 1, "other images in the evaluation set")


def open_set(
    embeddings: Tensor,
    identities: Tensor,
    *,
    margin: float | None,
    squared: bool,
    config: ProtocolConfig | None = None,
    device: str = "cpu",
) -> SetResult:
    """Identities that training never saw.

    Args:
        embeddings: shape (n, d), finite, not zero; scaled to unit length here.
        identities: shape (n,), integers. "First images" are the first in this order.
        margin: of the triplet loss, in units of the distance; None is the soft margin, log(1 + exp(d_ap - d_an)).
        squared: whether the distance is the squared one, in [0, 4], or its root, in [0, 2].
        config: default settings where None.
        device: where the neighbours are searched and the pairs compared: "cpu", "cuda" or "cuda:N".
    Returns:
        Rank-k and CMC with its band; open-set TPIR@FPIR; kNN leave-one-out and against a gallery, by majority and weighted;
        average precision and R-precision; verification accuracy in folds; EER, AUC, TAR@FAR, histograms; clusters; triplet loss;
        counts.
    Raises:
        ValueError: see `check_open_set`; or shapes do not fit, or an embedding is not finite or zero.
    """
    config = config or ProtocolConfig()
    samples = _unit(embeddings, identities, "embeddings")
    check_open_set(samples[1], config)
    find = Finder(config.search, device)
    gallery, probes, own = _enrolled(samples, config)
    ranks, curves = rank_k(gallery, probes, config.ranks, find, own, config.band_draws, config.seed)
    scalars = _about(samples[1], margin, squared, config, "leave_one_out") | ranks
    scalars["identities_without_probe"] = len(samples[1].unique()) - len(probes[1].unique())
    scalars |= knn_leave_one_out(samples, config.knn, find)
    if config.fpirs:
        scalars |= open_set_points(samples, config.gallery_images_per_identity, config.fpirs, config.seed, find)
    if config.retrieval_queries:
        scalars |= retrieved(samples, config.retrieval_queries, config.seed)
    gallery, probes = _split(samples, config.knn_gallery_images)
    if len(probes[1]) and len(gallery[1]) >= config.knn[-1]:
        scalars |= knn_gallery(gallery, probes, config.knn, find)
    else:
        sizes = f"{len(gallery[1])} gallery images and {len(probes[1])} probes"
        reason = f"the first {config.knn_gallery_images} images of each identity as gallery give {sizes}"
        _refuse(scalars, [f"knn_gallery_{k}" for k in config.knn], reason)
    scalars |= find.told()
    return SetResult(scalars, curves | _compare(scalars, samples, squared, config, device))


def closed_set(
    gallery: Tensor,
    gallery_identities: Tensor,
    probes: Tensor,
    probe_identities: Tensor,
    *,
    margin: float | None,
    squared: bool,
    config: ProtocolConfig | None = None,
    device: str = "cpu",
) -> SetResult:
    """Unseen images of training identities, every one of which is in the gallery.

    Args:
        gallery: embeddings of training images, shape (m, d); the first `closed_gallery_images` of each identity are used.
        gallery_identities: shape (m,).
        probes: embeddings of unseen images, shape (n, d).
        probe_identities: shape (n,).
        margin, squared, config, device: as for `open_set`.
    Returns:
        The nearest centroid's accuracy (centroids of the first `centroid_images` gallery images) and kNN against the
        gallery; Rank-k and CMC against the first `gallery_images_per_identity` gallery images of each identity, as for
        unseen identities; verification and triplet loss among the probes alone.
    Raises:
        ValueError: as for `open_set`, or a probe's identity is not in the gallery.
    """
    config = config or ProtocolConfig()
    enrolled, _ = _split(_unit(gallery, gallery_identities, "gallery embeddings"), config.closed_gallery_images)
    searched = _unit(probes, probe_identities, "probe embeddings")
    _check_closed_set(enrolled, searched, config)
    images = config.gallery_images_per_identity
    few = {
        "first": lambda: _split(enrolled, images)[0],
        "mean": lambda: centroids(*enrolled, images),
        "all_but_self": lambda: enrolled,
    }[config.gallery]()
    find = Finder(config.search, device)
    ranks, curves = rank_k(few, searched, config.ranks, find, None, config.band_draws, config.seed)
    scalars = _about(searched[1], margin, squared, config, "gallery") | ranks
    scalars |= knn_gallery(enrolled, searched, config.knn, find)
    scalars |= nearest_centroid(enrolled, searched, config.centroid_images, find) | find.told()
    return SetResult(scalars, curves | _compare(scalars, searched, squared, config, device))


def _enrolled(samples: Set, config: ProtocolConfig) -> tuple[Set, Set, Tensor | None]:
    """Gallery, probes and, where probes are enrolled themselves, their places in the gallery."""
    embeddings, identities = samples
    if config.gallery == "all_but_self":
        _, inverse, counts = identities.unique(return_inverse=True, return_counts=True)
        own = (counts[inverse] >= 2).nonzero().squeeze(1)
        return samples, (embeddings[own], identities[own]), own
    gallery, probes = _split(samples, config.gallery_images_per_identity)
    if config.gallery == "mean":
        gallery = centroids(*gallery, config.gallery_images_per_identity)
    return gallery, probes, None


def _split(samples: Set, images: int) -> tuple[Set, Set]:
    embeddings, identities = samples
    gallery, probes = split_gallery(identities, images)
    return (embeddings[gallery], identities[gallery]), (embeddings[probes], identities[probes])


def _unit(embeddings: Tensor, identities: Tensor, name: str) -> Set:
    if embeddings.ndim != 2 or identities.shape != embeddings.shape[:1]:
        shapes = f"{tuple(embeddings.shape)}, their identities {tuple(identities.shape)}"
        raise ValueError(f"{name} have shape {shapes}; they must be (n, d) and (n,)")
    if len(embeddings) == 0:
        raise ValueError(f"{name} are none; the set to evaluate is empty")
    embeddings = embeddings.detach().to("cpu", torch.float32)
    broken = int((~torch.isfinite(embeddings).all(dim=1)).sum())
    if broken:
        raise ValueError(f"{broken} of {len(embeddings)} {name} hold NaN or infinity; the model diverged or is damaged")
    zero = int((~embeddings.any(dim=1)).sum())
    if zero:
        raise ValueError(f"{zero} of {len(embeddings)} {name} are zero; they have no direction")
    return normalize(embeddings, dim=1), identities.detach().to("cpu", torch.int64)


def _check_closed_set(gallery: Set, probes: Set, config: ProtocolConfig) -> None:
    if gallery[0].shape[1] != probes[0].shape[1]:
        sizes = f"gallery embeddings have {gallery[0].shape[1]} dimensions, probe embeddings {probes[0].shape[1]}"
        raise ValueError(f"{sizes}; they must agree")
    enrolled = gallery[1].unique()
    if len(enrolled) < 2:
        raise ValueError(f"the gallery has {len(enrolled)} identities; at least 2 are needed to tell them apart")
    strangers = probes[1][~torch.isin(probes[1], enrolled)].unique()
    if len(strangers):
        some = ", ".join(str(int(identity)) for identity in strangers[:3])
        raise ValueError(f"{len(strangers)} probe identities are not in the gallery ({some}); in a closed set all are")
    _check_reach("ranks", config.ranks[-1], len(enrolled), "identities in the gallery")
    _check_reach("knn", config.knn[-1], len(gallery[1]), "images in the gallery")


def _check_reach(name: str, wanted: int, there: int, what: str) -> None:
    if wanted > there:
        raise ValueError(f"evaluation.{name} goes up to {wanted}, but there are {there} {what}; lower it or add images")


def _about(identities: Tensor, margin: float | None, squared: bool, config: ProtocolConfig, headline: str) -> Scalars:
    if margin is not None and not (isfinite(margin) and margin >= 0):
        raise ValueError(f"margin is {margin}; it must be 0 or more, or None for the soft margin")
    neighbours = HEADLINE_NEIGHBOURS if HEADLINE_NEIGHBOURS in config.knn else config.knn[0]
    return {
        "samples": len(identities),
        "identities": len(identities.unique()),
        "margin": margin,
        "distance": "squared" if squared else "root",
        "knn_headline": headline,
        "headline_neighbours": neighbours,
        "refusals": {},
        "protocol": asdict(config) | {name: list(getattr(config, name)) for name in ("ranks", "knn", "fars", "fpirs")},
    }


def _compare(scalars: Scalars, samples: Set, squared: bool, config: ProtocolConfig, device: str) -> Curves:
    """Adds to `scalars` what compares the samples of one set with each other; returns the ROC and histograms."""
    _, identities = samples
    if not triplets_exist(identities):
        counts = identities.unique(return_counts=True)[1]
        names = [
            "triplet_loss",
            "verification_accuracy",
            "verification_std",
            "eer",
            "auc",
            "tar_at_far",
            "nmi",
            "pairwise_f",
        ]
        _refuse(scalars, names, f"{len(counts)} identities, the largest of {int(counts.max())} images, give no triplet")
        return {}
    scalars |= triplet_loss(samples, scalars["margin"], squared, config.seed)
    try:
        pairs = draw_pairs(identities, config.pairs, config.folds, config.seed)
    except ValueError as reason:
        _refuse(scalars, ["verification_accuracy", "verification_std"], str(reason))
    else:
        scalars |= fold_accuracy(samples, pairs)
    _group(scalars, samples, config)
    if not config.roc_samples:
        return {}
    points, curves = operating_points(samples, config.fars, config.roc_samples, config.seed, device)
    scalars |= points
    return curves


def _group(scalars: Scalars, samples: Set, config: ProtocolConfig) -> None:
    if not config.cluster_samples:
        return
    threshold = scalars.get("verification_threshold")
    if threshold is None:
        _refuse(scalars, ["nmi", "pairwise_f"], "no threshold tells genuine from impostor pairs")
    else:
        scalars |= clusters(samples, threshold, config.cluster_samples, config.seed)


def _refuse(scalars: Scalars, names: Sequence[str], reason: str) -> None:
    scalars |= dict.fromkeys(names)
    scalars["refusals"] |= dict.fromkeys(names, reason)
