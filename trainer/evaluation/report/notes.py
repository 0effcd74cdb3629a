"""What the report says in words: what the headline figures are, how everything was measured, how the run was trained."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from trainer.config import ModelConfig
from trainer.evaluation.protocols import ProtocolConfig
from trainer.evaluation.report.plots_training import speed
from trainer.evaluation.report.records import Record
from trainer.evaluation.report.tables import MISSING
from trainer.model import Embedder, size_of

Terms = list[tuple[str, str]]


def training(record: Record) -> str:
    """One paragraph on how a run was trained."""
    model, loss, last = record.config.get("model", {}), record.config.get("loss", {}), record.log[-1]
    words = {
        "soft_margin": "batch-hard, soft margin",
        "margin": f"batch-hard, margin {loss.get('margin', MISSING)}",
        "smooth": f"smooth batch-hard, margin {loss.get('margin', MISSING)}, sharpness {loss.get('sharpness', MISSING)}",
    }.get(loss.get("kind", ""), f"{loss.get('kind', MISSING)}, margin {loss.get('margin', MISSING)}")
    network = f"Trunk {model.get('trunk', MISSING)}, {model.get('embedding_size', MISSING)} dimensions{_size(record)}"
    trained = f"{last['step']:,} steps, {last['images_seen']:,} images"
    text = f"{network}; triplet loss ({words}) on the {loss.get('distance', MISSING)} distance; {trained}."
    pace = speed(record.log)
    return f"{text} {pace[0].upper()}{pace[1:]}." if pace else text


def _size(record: Record) -> str:
    """Parameters and multiply-adds of a run's network, in words; nothing where it cannot be made here."""
    try:
        model = ModelConfig(**(record.config["model"] | {"weights": None}))
        with torch.device("meta"):
            size = size_of(Embedder(model, image_size=record.config["data"]["image_size"]))
    except (ImportError, KeyError, TypeError, ValueError):
        return ""
    return f", {size.parameters / 1e6:.1f} million parameters, {size.multiply_adds / 1e9:.3g} x 10^9 multiply-adds an image"


def headlines(records: Sequence[Record]) -> Terms:
    """What the columns of the summary are."""
    protocol, scalars = _protocol(records)
    folds, k = protocol["folds"], scalars.get("headline_neighbours", MISSING)
    return [
        (
            "kNN",
            f"vote of the {k} nearest images: of all the others for unseen identities (leave-one-out), of the enrolled "
            "training images for unseen images of training identities.",
        ),
        (
            "Contrastive",
            "same/different verification accuracy on pairs (half of them genuine; of a list, its own): mean ± standard "
            f"deviation over {folds} folds, each with the threshold that is best on the other {folds - 1}.",
        ),
        (
            "Rank5",
            "the right identity is among the best 5, enrolled images per identity: "
            f"{protocol['gallery_images_per_identity']}.",
        ),
        (
            "Loss",
            "mean triplet loss over triplets of the set, zeros included, at the row's margin on the "
            f"{scalars.get('distance', MISSING)} distance.",
        ),
        ("raw pixels", "the baseline: the same protocol on the pixels themselves."),
    ]


def protocol_notes(records: Sequence[Record]) -> Terms:
    """How everything was measured."""
    p, _ = _protocol(records)
    return [
        (
            "Similarity",
            "the cosine. Neighbours are exact; of equally similar ones the one that comes first in the set is nearer.",
        ),
        (
            "Rank-k, CMC",
            f"gallery: the first {p['gallery_images_per_identity']} image(s) of each identity (of its training images in the "
            "closed set); probes: the rest (the unseen images). Ranks count identities, each at the place of its best image.",
        ),
        (
            "kNN",
            "majority vote; a tie goes to the nearer. Leave-one-out: an identity with one image is no probe, only a distractor. "
            f"Against a gallery: the first {p['knn_gallery_images']} images of each unseen identity; the first "
            f"{p['closed_gallery_images']} training images of each identity in the closed set.",
        ),
        ("Nearest centroid", f"mean of the first {p['centroid_images']} training images of each identity."),
        (
            "Verification accuracy",
            f"at most {p['pairs']:,} distinct pairs, half genuine; identities drawn uniformly, then their images; seed "
            f"{p['seed']}. Each fold has identities of its own where at least two identities per fold, one of them with two "
            "images, allow it; else pairs of all identities are dealt to the folds, and the table says so. Lists of pairs "
            "(LFW and the like) have their own pairs and folds.",
        ),
        (
            "During training",
            "on the part of the set that run.evaluate_images gives, so the last point of a curve need not meet the figure of "
            "the whole set at the end.",
        ),
        (
            "EER, AUC, ROC, TAR@FAR",
            f"all pairs of the set; ROC, EER and AUC up to {p['roc_samples']:,} images, of a larger set of whole identities "
            "drawn up to that. The FAR attained is at most the target, also where pairs tie. No TAR below 10 expected false "
            "accepts. Wilson intervals take pairs for independent; those that share an image are not, so the intervals are too "
            "narrow.",
        ),
        ("Loss", "all valid triplets up to a million; otherwise 100,000 drawn uniformly from them."),
        (
            "Hardest pairs, worst misses",
            "of all pairs of the first set, exact; misses against a gallery of the first image of each identity.",
        ),
    ]


def left_out(records: Sequence[Record]) -> list[str]:
    """Parts that the report lacks because the run does not have them."""
    told = []
    for record in records:
        if not any("rank1" in line for line in record.evaluations):
            told.append(f"{record.name} was not evaluated during training (run.evaluate_every).")
        if record.results.examples is None:
            told.append(
                f"{record.name} has no example pictures: its evaluation is of an earlier version or of pair lists only; "
                "`facescale evaluate` makes them."
            )
    return told


def _protocol(records: Sequence[Record]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and scalars of the first result that tells how it was judged; default settings where none does."""
    for record in records:
        for row in record.results.rows:
            found = row.result.scalars.get("protocol")
            if isinstance(found, dict):
                return asdict(ProtocolConfig()) | found, row.result.scalars
    return asdict(ProtocolConfig()), {}
