"""Tables of the report, as data and as Markdown. Numbers come in, text goes out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.report.records import Record
from trainer.evaluation.results import FACESCALE, RAW_PIXELS, ResultRow

PUBLISHED = {
    "note": "published by the original project, other data",
    "knn": 0.7955,
    "lfw_verification_accuracy": 0.8933,
    "rank5": {"VGGFace2": 0.7233, "LFW": 0.5785},
}
MISSING = "–"  # noqa: RUF001

Scalars = dict[str, Any]


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[str]
    body: list[list[str]]
    left: int
    """Columns, from the first, whose cells are words; the others are numbers."""
    published: tuple[list[str], ...] = ()
    """Further rows that are not ours."""

    def markdown(self) -> str:
        rule = ["---" if column < self.left else "---:" for column in range(len(self.head))]
        rows = (self.head, rule, *self.body, *self.published)
        return "\n".join("| " + " | ".join(_cell(cell) for cell in cells) + " |" for cells in rows)


def main_table(rows: Sequence[ResultRow]) -> str:
    """kNN / Contrastive / Rank5 / Loss for each margin, set and embedder, as Markdown."""
    return Table("", ["Margin", "Set", "Embedding", *_HEADLINES], [_summary(row) for row in rows], left=3).markdown()


def summary_table(records: Sequence[Record]) -> Table:
    """The table of the original project: kNN, Contrastive, Rank5 and Loss by margin, its published values below."""
    several = len(records) > 1
    body = []
    for name in dict.fromkeys(row.set for record in records for row in record.results.rows):
        for record in records:
            own = [row for row in record.results.rows if row.set == name]
            body += [[record.name] * several + _summary(row) for row in own]
    rank5: dict[str, float] = PUBLISHED["rank5"]  # type: ignore[assignment]
    theirs = [
        [MISSING, "set not told", percent(PUBLISHED["knn"]), MISSING, MISSING, MISSING],
        [MISSING, "VGGFace2", MISSING, MISSING, percent(rank5["VGGFace2"]), MISSING],
        [MISSING, "LFW", MISSING, percent(PUBLISHED["lfw_verification_accuracy"]), percent(rank5["LFW"]), MISSING],
    ]
    published = [[MISSING] * several + [*row[:2], "published, not ours", *row[2:]] for row in theirs]
    head = ["Run"] * several + ["Margin", "Set", "Embedding", *_HEADLINES]
    caption = f"kNN, verification, Rank-5 and triplet loss by margin and set. Last rows: {PUBLISHED['note']}, for orientation."
    return Table(caption, head, body, 3 + several, tuple(published))


def full_table(records: Sequence[Record]) -> Table:
    """Every measure as a row, every run, set and embedder as a column."""
    rows = [(record, row) for record in records for row in record.results.rows]
    several = len(records) > 1
    head = ["Measure"]
    for record, row in rows:
        told = f"{row.set}: {row.embedder}, margin {margin(row.result.scalars.get('margin', MISSING))}"
        head.append(f"{record.name}, {told}" if several else told)
    columns = [measures(row.result.scalars) for _, row in rows]
    names = list(dict.fromkeys(label for column in sorted(columns, key=len, reverse=True) for label in column))
    kept = [name for name in names if any(column.get(name, MISSING) != MISSING for column in columns)]
    body = [[name, *(column.get(name, MISSING) for column in columns)] for name in kept]
    return Table("Every measure of every set.", head, body, left=1)


def points_table(records: Sequence[Record], name: str) -> Table | None:
    """Operating points of our results, with intervals and refusals; None where there are none.

    Args:
        name: "tar_at_far" or "tpir_at_fpir".
    """
    hit, false = ("TAR", "FAR") if name == "tar_at_far" else ("TPIR", "FPIR")
    several = len(records) > 1
    body = []
    for record in records:
        for row in record.results.rows:
            for point in row.result.scalars.get(name) or []:
                own = [record.name] * several + [row.set, row.embedder, f"{100 * point['target']:g} %"]
                body.append(own + _point(point, hit.lower(), false.lower(), row.result.scalars))
    if not body:
        return None
    counts = ["Genuine pairs", "Impostor pairs"] if hit == "TAR" else ["Mated probes", "Non-mated probes"]
    head = ["Run"] * several + ["Set", "Embedding", f"{false} at most", f"{false} reached", f"{hit}", "95 % interval"]
    caption = (
        f"{hit} at a {false} of at most the target, with Wilson intervals; refused where there are too few to say."
    )
    return Table(caption, [*head, "Threshold (cosine)", *counts], body, 2 + several)


def settings_table(records: Sequence[Record]) -> Table:
    """The settings of a run; of several those in which they differ."""
    flat = [dict(_flat(record.config)) for record in records]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = [[name, *(settings.get(name, MISSING) for settings in flat)] for name in names]
    if len(records) == 1:
        return Table("Settings of the run.", ["Setting", "Value"], rows, 2)
    differ = [row for row in rows if len(set(row[1:])) > 1]
    caption = "Settings in which the runs differ."
    return Table(caption, ["Setting", *(record.name for record in records)], differ, 1 + len(records))


def identities_table(records: Sequence[Record], most: int = 10) -> Table | None:
    """The identities of our results that are found least, by Rank-1; None where no set has it."""
    several = len(records) > 1
    body = []
    for record in records:
        for row in record.results.rows:
            curves = row.result.curves
            if row.embedder != FACESCALE or "identity_rank1" not in curves:
                continue
            for place in curves["identity_rank1"].argsort(kind="stable")[:most].tolist():
                label = int(curves["identity_labels"][place])
                rate, probes = float(curves["identity_rank1"][place]), int(curves["identity_probes"][place])
                name = record.results.names.get(label, str(label))
                body.append([record.name] * several + [row.set, name, percent(rate), f"{probes:,}"])
    if not body:
        return None
    head = ["Run"] * several + ["Set", "Identity", "Rank-1", "Probes"]
    return Table(f"The {most} identities of each set that are found least.", head, body, 2 + several)


def rank1_line(rows: Sequence[ResultRow]) -> str:
    """Rank-1 of each set that has one, ours beside raw pixels and how many times theirs it is."""
    parts = []
    for name in dict.fromkeys(row.set for row in rows if row.result.scalars.get("rank1") is not None):
        ours, pixels = (
            next((row.result.scalars.get("rank1") for row in rows if (row.set, row.embedder) == (name, embedder)), None)
            for embedder in (FACESCALE, RAW_PIXELS)
        )
        times = f", {ours / pixels:.1f} x raw pixels' {percent(pixels)}" if ours is not None and pixels else ""
        parts.append(f"{name} {percent(ours)}{times}")
    return f"Rank-1: {'; '.join(parts) or 'not measured'}."


def refusals(records: Sequence[Record]) -> list[str]:
    """What was not measured and why, each reason once."""
    reasons: dict[str, None] = {}
    for record in records:
        of = f" of {record.name}" if len(records) > 1 else ""
        for row in record.results.rows:
            scalars = row.result.scalars
            for name, reason in (scalars.get("refusals") or {}).items():
                reasons[f"{name}, {row.set}{of}: {reason}."] = None
            for points, words in (("tar_at_far", "TAR at FAR"), ("tpir_at_fpir", "TPIR at FPIR")):
                for point in scalars.get(points) or []:
                    if point.get("refused"):
                        reasons[f"{words} {100 * point['target']:g} %, {row.set}{of}: {point['refused']}."] = None
    return list(reasons)


def headline(row: ResultRow) -> dict[str, float]:
    """rank1, rank5, knn, verification_accuracy and triplet_loss, those that were measured."""
    s = row.result.scalars
    names = ("rank1", "rank5", "verification_accuracy", "triplet_loss")
    found = {name: s.get(name) for name in names}
    found["knn"] = s.get(f"knn_{s.get('knn_headline')}_{s.get('headline_neighbours')}")
    return {name: value for name, value in found.items() if value is not None}


def percent(value: Any, deviation: float | None = None) -> str:
    """A rate in [0, 1] as per cent; with its standard deviation where one is given."""
    if value is None:
        return MISSING
    return f"{100 * value:.2f} %" if deviation is None else f"{100 * value:.2f} ± {100 * deviation:.2f} %"


def number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def margin(value: float | str | None) -> str:
    if value is None:
        return "soft"
    return value if isinstance(value, str) else f"{value:g}"


def measures(s: Scalars) -> dict[str, str]:
    """Label -> text, in the order of the full table."""
    found = {f"Rank-{k}": percent(s[f"rank{k}"]) for k in _asked(s, "rank")}
    for kind, words in (("leave_one_out", "leave-one-out"), ("gallery", "against a gallery")):
        for weighted, how in (("", ""), ("weighted_", ", weighted by distance")):
            start = f"knn_{kind}_{weighted}"
            found |= {f"kNN {words}{how}, k = {k}": percent(s[f"{start}{k}"]) for k in _asked(s, start)}
    found |= _galleries(s)
    found["Nearest centroid"] = percent(s.get("centroid_accuracy"))
    found["Mean average precision"] = percent(s.get("map"))
    found["R-precision"] = percent(s.get("r_precision"))
    found["MAP@R"] = percent(s.get("map_at_r"))
    found["Verification accuracy"] = percent(s.get("verification_accuracy"), s.get("verification_std"))
    found["Verification threshold (root L2)"] = number(s.get("verification_threshold"))
    found["EER"] = percent(s.get("eer"))
    found["AUC"] = number(s.get("auc"))
    for points, words in (("tar_at_far", "TAR at FAR"), ("tpir_at_fpir", "TPIR at FPIR")):
        for point in s.get(points) or []:
            found[f"{words} ≤ {100 * point['target']:g} % [95 % interval]"] = _interval(point, points.split("_")[0])
    found["Clusters: NMI"] = number(s.get("nmi"))
    if s.get("pairwise_f") is not None:
        rates = [number(s.get(f"pairwise_{name}")) for name in ("f", "precision", "recall")]
        found["Clusters: pairwise F / precision / recall"] = " / ".join(rates)
    found["Triplet loss"] = number(s.get("triplet_loss"))
    return found | _counts(s)


_HEADLINES = ["kNN", "Contrastive", "Rank5", "Loss"]


def _galleries(s: Scalars) -> dict[str, str]:
    """Rank-k against each gallery of a template set, and as distractors join."""
    found: dict[str, str] = {}
    for part in s.get("identification") or []:
        found |= {f"Rank-{k}, gallery {part['gallery']}": percent(part[f"rank{k}"]) for k in _asked(part, "rank")}
    for row in s.get("distractors") or []:
        found |= {f"Rank-{k} among {row['count']:,} distractors": percent(row[f"rank{k}"]) for k in _asked(row, "rank")}
    return found


def _summary(row: ResultRow) -> list[str]:
    s, found = row.result.scalars, headline(row)
    contrastive = percent(s.get("verification_accuracy"), s.get("verification_std"))
    rates = [percent(found.get("knn")), contrastive, percent(s.get("rank5"))]
    return [margin(s.get("margin", MISSING)), row.set, row.embedder, *rates, number(s.get("triplet_loss"))]


def _flat(settings: dict[str, Any], start: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", str(value)


def _asked(s: Scalars, start: str) -> list[int]:
    """The numbers that follow `start` in the names of scalars, ascending."""
    return sorted(int(name[len(start) :]) for name in s if name.startswith(start) and name[len(start) :].isdigit())


def _counts(s: Scalars) -> dict[str, str]:
    def whole(*names: str) -> str:
        told = [MISSING if s.get(name) is None else f"{s[name]:,}" for name in names]
        return MISSING if set(told) == {MISSING} else " / ".join(told)

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
        "Clusters": whole("clusters"),
        "Triplets": f"{whole('triplets')} ({s['triplets_are']})" if "triplets_are" in s else MISSING,
    }


def _interval(point: Scalars, rate: str) -> str:
    pairs = f", {point['impostor_pairs']:,} impostor pairs" if point.get("impostor_pairs") is not None else ""
    if point.get(rate) is None:
        return f"refused{pairs.replace(',', ':', 1)}"
    span = f" [{100 * point['low']:.2f}, {100 * point['high']:.2f}]" if point.get("low") is not None else ""
    return f"{percent(point[rate])}{span}{pairs}"


def _point(point: Scalars, hit: str, false: str, s: Scalars) -> list[str]:
    counts = [point.get("genuine_pairs", s.get("genuine_pairs")), point.get("impostor_pairs", s.get("impostor_pairs"))]
    if hit == "tpir":
        counts = [s.get("open_set_mated"), s.get("open_set_nonmated")]
    told = [MISSING if count is None else f"{count:,}" for count in counts]
    if point.get(hit) is None:
        return [MISSING, "refused", MISSING, MISSING, *told]
    span = f"{100 * point['low']:.2f} to {100 * point['high']:.2f} %" if point.get("low") is not None else MISSING
    return [f"{100 * point[false]:.3g} %", percent(point[hit]), span, number(point.get("threshold")), *told]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
