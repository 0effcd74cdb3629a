"""results.md: Markdown from result rows. Numbers come in, text goes out."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from trainer.evaluation.results import FACESCALE, RAW_PIXELS, ResultRow

PUBLISHED = {
    "note": "published by the original project, other data",
    "knn": 0.7955,
    "lfw_verification_accuracy": 0.8933,
    "rank5": {"VGGFace2": 0.7233, "LFW": 0.5785},
}
FIGURES = {
    "loss.png": "Triplet loss, distances and active fraction over the images seen",
    "accuracy.png": "Rank-1, Rank-5, kNN and verification accuracy over the images seen, beside raw pixels",
    "roc.png": "True-accept rate over false-accept rate, beside raw pixels",
    "cmc.png": "Cumulative match characteristic, beside raw pixels",
    "tsne.png": "t-SNE of embeddings of unseen identities, one colour and marker for each",
}
MISSING = "–"  # noqa: RUF001

Scalars = dict[str, Any]


def results_markdown(
    name: str, config: dict[str, Any], log: Sequence[dict[str, Any]], rows: Sequence[ResultRow]
) -> str:
    """The whole of results.md.

    Args:
        name: of the run folder.
        config: the run's settings, nested as in config.yaml.
        log: training log lines, oldest first, at least one.
        rows: in the order in which they are listed.
    """
    parts = [f"# Results of `{name}`", _training(config, log), main_table(rows), _notes(rows)]
    parts += ["## Curves", *(f"![{text}]({file})" for file, text in FIGURES.items())]
    parts += ["## Full results", full_table(rows), *_refusals(rows), "## How it was measured", _protocol(rows)]
    return "\n\n".join(parts) + "\n"


def main_table(rows: Sequence[ResultRow]) -> str:
    """kNN / Contrastive / Rank5 / Loss for each margin, set and embedder."""
    body = []
    for row in rows:
        s = row.result.scalars
        contrastive = percent(s.get("verification_accuracy"), s.get("verification_std"))
        rates = [percent(row.result.headline_knn()), contrastive, percent(s.get("rank5"))]
        body.append([margin(s["margin"]), row.set, row.embedder, *rates, number(s.get("triplet_loss"))])
    return _table(["Margin", "Set", "Embedding", "kNN", "Contrastive", "Rank5", "Loss"], body, left=3)


def rank1_line(rows: Sequence[ResultRow]) -> str:
    """Rank-1 of each set, ours beside raw pixels and how many times theirs it is."""
    parts = []
    for name in dict.fromkeys(row.set for row in rows):
        ours, pixels = (
            next((row.result.scalars.get("rank1") for row in rows if (row.set, row.embedder) == (name, embedder)), None)
            for embedder in (FACESCALE, RAW_PIXELS)
        )
        times = f", {ours / pixels:.1f} x raw pixels' {percent(pixels)}" if ours is not None and pixels else ""
        parts.append(f"{name} {percent(ours)}{times}")
    return f"Rank-1: {'; '.join(parts)}."


def full_table(rows: Sequence[ResultRow]) -> str:
    """Every measure as a row, every margin, set and embedder as a column."""
    head = ["", *(f"{row.set}: {row.embedder}, margin {margin(row.result.scalars['margin'])}" for row in rows)]
    names = list(dict.fromkeys(label for row in rows for label in _measures(row.result.scalars)))
    columns = [_measures(row.result.scalars) for row in rows]
    return _table(head, [[name, *(column.get(name, MISSING) for column in columns)] for name in names], left=1)


def percent(value: float | None, deviation: float | None = None) -> str:
    """A rate in [0, 1] as per cent; with its standard deviation where one is given."""
    if value is None:
        return MISSING
    return f"{100 * value:.2f} %" if deviation is None else f"{100 * value:.2f} ± {100 * deviation:.2f} %"


def number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def margin(value: float | None) -> str:
    return "soft" if value is None else f"{value:g}"


def _measures(s: Scalars) -> dict[str, str]:
    """Label -> text, in the order of the full table."""
    protocol = s["protocol"]
    found = {f"Rank-{k}": percent(s.get(f"rank{k}")) for k in protocol["ranks"]}
    for kind, words in (("leave_one_out", "leave-one-out"), ("gallery", "against a gallery")):
        found |= {f"kNN {words}, k = {k}": percent(s.get(f"knn_{kind}_{k}")) for k in protocol["knn"]}
    found["Nearest centroid"] = percent(s.get("centroid_accuracy"))
    found["Verification accuracy"] = percent(s.get("verification_accuracy"), s.get("verification_std"))
    found["EER"] = percent(s.get("eer"))
    found["AUC"] = number(s.get("auc"))
    for point in s.get("tar_at_far") or []:
        found[f"TAR at FAR ≤ {100 * point['target']:g} % [95 % interval]"] = _operating_point(point)
    found["Triplet loss"] = number(s.get("triplet_loss"))
    return found | _counts(s)


def _counts(s: Scalars) -> dict[str, str]:
    def whole(*names: str) -> str:
        return " / ".join(MISSING if s.get(name) is None else f"{s[name]:,}" for name in names)

    return {
        "Images / identities": whole("samples", "identities"),
        "Rank-k: gallery images / gallery identities / probes": whole("gallery", "gallery_identities", "probes"),
        "Identities without a Rank-k probe": whole("identities_without_probe"),
        "Leave-one-out: probes / identities of one image": whole("leave_one_out_probes", "single_image_identities"),
        "kNN against a gallery: images / probes": whole("knn_gallery", "knn_probes"),
        "Verification pairs": whole("verification_pairs"),
        "Identities shared between folds": {True: "yes", False: "no", None: MISSING}[s.get("folds_share_identities")],
        "ROC: genuine / impostor pairs": whole("genuine_pairs", "impostor_pairs"),
        "ROC pairs are": s.get("roc_pairs_are", MISSING),
        "Triplets": f"{whole('triplets')} ({s['triplets_are']})" if "triplets_are" in s else MISSING,
    }


def _operating_point(point: Scalars) -> str:
    pairs = f"{point['impostor_pairs']:,} impostor pairs"
    if point["tar"] is None:
        return f"refused: {pairs}"
    return f"{percent(point['tar'])} [{100 * point['low']:.2f}, {100 * point['high']:.2f}], {pairs}"


def _training(config: dict[str, Any], log: Sequence[dict[str, Any]]) -> str:
    model, loss, last = config.get("model", {}), config.get("loss", {}), log[-1]
    words = {
        "soft_margin": "batch-hard, soft margin",
        "margin": f"batch-hard, margin {loss.get('margin', MISSING)}",
        "smooth": f"smooth batch-hard, margin {loss.get('margin', MISSING)}, sharpness {loss.get('sharpness', MISSING)}",
    }.get(loss.get("kind", ""), MISSING)
    network = f"Trunk {model.get('trunk', MISSING)}, {model.get('embedding_size', MISSING)} dimensions"
    trained = f"{last['step']:,} steps, {last['images_seen']:,} images"
    text = f"{network}; triplet loss ({words}) on the {loss.get('distance', MISSING)} distance; {trained}."
    rates = [(line["images_per_s"], line["data_wait_percent"]) for line in log if "images_per_s" in line]
    if rates:
        speed, wait = (median(values) for values in zip(*rates, strict=True))
        text += f" Median {speed:,.0f} images/s with {wait:.1f} % data wait."
    return text


def _notes(rows: Sequence[ResultRow]) -> str:
    s = rows[0].result.scalars
    folds, k = s["protocol"]["folds"], s["headline_neighbours"]
    return f"""\
- **kNN**: vote of the {k} nearest images: of all the others for unseen identities (leave-one-out), of the enrolled training
  images for unseen images of training identities.
- **Contrastive**: same/different verification accuracy on pairs, half of them genuine: mean ± standard deviation over
  {folds} folds, each with the threshold that is best on the other {folds - 1}.
- **Rank5**: the right identity is among the best 5, enrolled images per identity: \
{s["protocol"]["gallery_images_per_identity"]}.
- **Loss**: mean triplet loss over triplets of the set, zeros included, at the row's margin on the {s["distance"]} distance.
- **raw pixels**: the baseline: the same protocol on the pixels themselves.

For orientation, *{PUBLISHED["note"]}*, and so not comparable row by row: kNN 79.55 %, LFW verification 89.33 %,
Rank-5 72.33 % / 57.85 % (VGGFace2 / LFW)."""


def _refusals(rows: Sequence[ResultRow]) -> list[str]:
    reasons: dict[str, None] = {}
    for row in rows:
        for name, reason in row.result.scalars["refusals"].items():
            reasons[f"- {name}, {row.set}: {reason}."] = None
        for point in row.result.scalars.get("tar_at_far") or []:
            if point["tar"] is None:
                reasons[f"- TAR at FAR {100 * point['target']:g} %, {row.set}: {point['refused']}."] = None
    return ["Not measured:", "\n".join(reasons)] if reasons else []


def _protocol(rows: Sequence[ResultRow]) -> str:
    p = rows[0].result.scalars["protocol"]
    return f"""\
- Similarity is the cosine. Neighbours are exact; of equally similar ones the one that comes first in the set is nearer.
- **Rank-k, CMC**: gallery: the first {p["gallery_images_per_identity"]} image(s) of each identity (of its training images
  in the closed set); probes: the rest (the unseen images). Ranks count identities, each at the place of its best image.
- **kNN**: majority vote; a tie goes to the nearer. Leave-one-out: an identity with one image is no probe, only a distractor.
  Against a gallery: the first {p["knn_gallery_images"]} images of each unseen identity; the first
  {p["closed_gallery_images"]} training images of each identity in the closed set.
- **Nearest centroid**: mean of the first {p["centroid_images"]} training images of each identity.
- **Verification accuracy**: at most {p["pairs"]:,} distinct pairs, half genuine; identities drawn uniformly, then their
  images; seed {p["seed"]}. Each fold has identities of its own where at least two identities per fold, one of them with two
  images, allow it; else pairs of all identities are dealt to the folds, and the table says so.
- **During training**: on the part of the set that `run.evaluate_images` gives, so the last point of a curve need not meet the
  figure of the whole set at the end.
- **EER, AUC, TAR@FAR, ROC**: all pairs of the set, up to {p["roc_samples"]:,} images; of a larger set, of whole identities
  drawn up to that. A pair is accepted above the threshold; the FAR attained is at most the target, also where pairs tie.
  No TAR below 10 expected false accepts. Wilson intervals take pairs for independent; those that share an image are not,
  so the intervals are too narrow.
- **Loss**: all valid triplets up to a million; otherwise 100,000 drawn uniformly from them."""


def _table(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *body))
