"""Figures of how training went: loss, accuracy, triplet health and throughput over the images seen."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from trainer.evaluation.report.plots import GREEN, ORANGE, VERMILLION, Line, Panel, Plot, Style, run_style
from trainer.evaluation.report.records import Record
from trainer.evaluation.report.tables import headline
from trainer.evaluation.results import FACESCALE, RAW_PIXELS

ACCURACIES = {
    "rank1": "Rank-1",
    "rank5": "Rank-5",
    "knn": "kNN",
    "verification_accuracy": "Verification (pairs)",
}
Entries = Sequence[dict[str, Any]]


def loss_plot(records: Sequence[Record]) -> Plot:
    """Training loss and, where it was evaluated, the loss on held-out identities; over the margin where margins differ."""
    scale, axis = _scale(records)
    panels = [Panel(**axis, y_label="triplet loss", lines=_losses(records, scale, "loss"), y_range=(0, None))]
    margins = {record.config.get("loss", {}).get("margin") for record in records}
    if len(margins) > 1 and all("loss_over_margin" in record.log[-1] for record in records):
        lines = _losses(records, scale, "loss_over_margin")
        panels.append(
            Panel(title="as a share of the margin", **axis, y_label="loss / margin", lines=lines, y_range=(0, None))
        )
    words = [f"{record.name}: from {_told(record, 'loss', '.3f')}" for record in records]
    return Plot(
        name="loss",
        title="Loss",
        caption=f"Triplet loss over the images seen in training, {_logged(records)}: mean over the active triplets of the "
        "steps between two lines of the log, as the loss of each run defines it; running mean over a fiftieth of the run. "
        f"Marks: {_evaluated(records, 'triplet_loss', 'the loss over all triplets of held-out identities, zeros included')}.",
        alt=f"Training loss, {'; '.join(words)}.",
        panels=panels,
    )


def accuracy_plot(records: Sequence[Record]) -> Plot | None:
    """Four accuracies over the images seen: during training, at the end, and of raw pixels; None where there is none."""
    scale, axis = _scale(records)
    panels = []
    for name, title in ACCURACIES.items():
        lines = _accuracies(records, name, scale)
        if lines:
            panels.append(Panel(title=title, **axis, y_label="accuracy (%)", lines=lines, y_range=(None, 101)))
    if not panels:
        return None
    end = "Marks at the right end: the finished run, on the whole set. Level lines: raw pixels."
    return Plot(
        name="accuracy",
        title="Accuracy while training",
        caption=f"Lines: {_evaluated(records, 'rank1', 'on the first images of held-out identities (run.evaluate_images)')}. "
        f"{end}",
        alt="Accuracy over the images seen; at the end "
        + "; ".join(f"{record.name}: {_end_words(record)}" for record in records)
        + ".",
        panels=panels,
    )


def health_plot(records: Sequence[Record]) -> Plot:
    """Active triplets, distances to the hardest positive and negative, spread and effective rank of the embeddings."""
    scale, axis = _scale(records)
    several = len(records) > 1

    def panel(title: str, unit: str, lines: list[Line], top: float | None = None) -> list[Panel]:
        kept = [line for line in lines if np.isfinite(line.y).any()]
        return [Panel(title=title, **axis, y_label=unit, lines=kept, y_range=(0, top))] if kept else []

    def traces(name: str, factor: float = 1) -> list[Line]:
        return [
            _smooth(record, name, scale, record.label if several else "", _trace_style(records, number), factor)
            for number, record in enumerate(records)
        ]

    panels = panel("Active triplets", "% of valid anchors", traces("active_fraction", 100), 103)
    panels += panel("Distances to the hardest", f"mean {records[0].distance} distance", _distances(records, scale))
    panels += panel("Spread of the embeddings", "1 - |mean|²", traces("embedding_spread"), 1.03)
    panels += panel("Effective rank", "dimensions", traces("effective_rank"))
    last = records[0].log[-1]
    return Plot(
        name="health",
        title="Triplet health",
        caption=f"Over the images seen, {_logged(records)}. Active: anchors whose hardest triplet has a loss; d_ap, d_an: mean "
        "distance of an anchor to its hardest positive and negative. Spread and effective rank are of the embeddings of the "
        "last step logged: near 0 and 1 they have collapsed to a point.",
        alt=f"At the end of {records[0].name} {100 * last['active_fraction']:.0f} % of triplets are active, d_ap is "
        f"{last['d_ap']:.2f} and d_an {last['d_an']:.2f}.",
        panels=panels,
    )


def throughput_plot(records: Sequence[Record]) -> Plot | None:
    """Images/s with data wait; None where no run logged them."""
    scale, axis = _scale(records)
    timed = [(number, record) for number, record in enumerate(records) if "images_per_s" in record.log[-1]]
    if not timed:
        return None
    units = {"images_per_s": "images/s", "data_wait_percent": "data wait (%)"}
    panels = []
    for name, unit in units.items():
        lines = []
        for number, record in timed:
            label, style = record.label if len(records) > 1 else "", _trace_style(records, number)
            lines += [*_faint(record, name, scale, style), _smooth(record, name, scale, label, style)]
        panels.append(Panel(**axis, y_label=unit, lines=lines, y_range=(0, None)))
    words = "; ".join(f"{record.name} {speed(record.log)}" for _, record in timed)
    return Plot(
        name="throughput",
        title="Throughput",
        caption=f"Images a second of all ranks together, and the share of the time that the step waited for data, "
        f"{_logged(records)}; evaluation and checkpoints are not counted. {words}.",
        alt=f"Throughput: {words}.",
        panels=panels,
    )


def speed(log: Entries) -> str:
    """Median images/s with data wait; empty where not logged."""
    rates = [(line["images_per_s"], line["data_wait_percent"]) for line in log if "images_per_s" in line]
    if not rates:
        return ""
    images, wait = (median(values) for values in zip(*rates, strict=True))
    return f"median {images:,.0f} images/s with {wait:.1f} % data wait"


def _trace_style(records: Sequence[Record], number: int) -> Style:
    return run_style(number) if len(records) > 1 else Style(colour=number)


def _losses(records: Sequence[Record], scale: float, name: str) -> list[Line]:
    lines = []
    for number, record in enumerate(records):
        style = run_style(number)
        label = record.label if len(records) > 1 else "training"
        lines += [*_faint(record, name, scale, style), _smooth(record, name, scale, label, Style(colour=style.colour))]
        over = 1.0
        if name == "loss_over_margin":
            over = record.config.get("loss", {}).get("margin") or 1.0
        measured = [line for line in record.evaluations if "triplet_loss" in line]
        if measured:
            held_out = Style(colour=number, dash=1, marker=number)
            told = f"{record.label}, held-out identities"
            if len(records) == 1:
                held_out, told = Style(colour=VERMILLION, dash=1, marker=0), "held-out identities"
            x, y = _column(measured, "images_seen") / scale, _column(measured, "triplet_loss") / over
            lines.append(Line(label=told, x=x, y=y, style=held_out))
    return lines


def _accuracies(records: Sequence[Record], name: str, scale: float) -> list[Line]:
    lines, levels = [], []
    for number, record in enumerate(records):
        single = len(records) == 1
        measured = [line for line in record.evaluations if name in line]
        if measured:
            label = "held-out identities, during training" if single else record.label
            x, y = _column(measured, "images_seen") / scale, 100 * _column(measured, name)
            lines.append(Line(label=label, x=x, y=y, style=run_style(number)))
        sets = list(dict.fromkeys(row.set for row in record.results.rows))
        for row in record.results.rows if single else [r for r in record.results.rows if r.set == sets[0]]:
            value = headline(row).get(name)
            if value is None:
                continue
            place = sets.index(row.set)
            y = np.array([100 * value])
            if row.embedder == RAW_PIXELS:
                told = f"{row.set}, raw pixels" if single else "raw pixels"
                levels.append(Line(label=told, x=y, y=y, style=Style(colour=None, dash=place + 1), kind="across"))
            else:
                told = f"{row.set}, at the end" if single else record.label
                style = Style(colour=place if single else number, marker=2 + place if single else number)
                x = np.array([record.log[-1]["images_seen"] / scale])
                lines.append(Line(label=told, x=x, y=y, style=style, kind="points"))
    different = {(line.label, float(line.y[0])): line for line in levels}
    return lines + list(different.values())


def _distances(records: Sequence[Record], scale: float) -> list[Line]:
    lines = []
    for number, record in enumerate(records):
        for name, words, colour, dash in (
            ("d_an", "d_an, hardest negative", ORANGE, 0),
            ("d_ap", "d_ap, hardest positive", GREEN, 1),
        ):
            label = words if len(records) == 1 else f"{record.label}, {name}"
            style = Style(colour=colour if len(records) == 1 else number, dash=dash)
            lines.append(_smooth(record, name, scale, label, style))
    return lines


def _smooth(record: Record, name: str, scale: float, label: str, style: Style, factor: float = 1) -> Line:
    """The running mean over a fiftieth of the run."""
    y = factor * _column(record.log, name)
    window = np.ones(2 * (len(y) // 100) + 1)
    known = np.isfinite(y)
    with np.errstate(invalid="ignore"):
        mean = np.convolve(np.where(known, y, 0), window, "same") / np.convolve(known.astype(float), window, "same")
    return Line(label=label, x=_column(record.log, "images_seen") / scale, y=np.where(known, mean, np.nan), style=style)


def _faint(record: Record, name: str, scale: float, style: Style) -> list[Line]:
    """The logged values behind their running mean, where the two differ."""
    if len(record.log) < 100:
        return []
    x, y = _column(record.log, "images_seen") / scale, _column(record.log, name)
    return [Line(label="", x=x, y=y, style=Style(colour=style.colour), kind="faint")]


def _column(lines: Entries, name: str) -> np.ndarray:
    """The values of a name, shape (lines,), float64, NaN where a line lacks it."""
    return np.array([float(line.get(name, np.nan)) for line in lines])


def _scale(records: Sequence[Record]) -> tuple[float, dict[str, Any]]:
    """What to divide images seen by, and the x axis of a panel."""
    most = max(record.log[-1]["images_seen"] for record in records)
    scale, unit = (1e6, " (millions)") if most >= 2_000_000 else (1e3, " (thousands)") if most >= 2_000 else (1.0, "")
    return scale, {"x_label": f"images seen{unit}", "x_range": (0, 1.03 * most / scale)}


def _logged(records: Sequence[Record]) -> str:
    return "; ".join(
        f"{record.name}: {record.log[-1]['step']:,} steps, {len(record.log):,} log lines" for record in records
    )


def _evaluated(records: Sequence[Record], name: str, words: str) -> str:
    times = [sum(name in line for line in record.evaluations) for record in records]
    return (
        f"{words}, {' / '.join(map(str, times))} evaluations"
        if any(times)
        else "no evaluation was made during training"
    )


def _told(record: Record, name: str, form: str) -> str:
    return f"{record.log[0][name]:{form}} to {record.log[-1][name]:{form}}"


def _end_words(record: Record) -> str:
    row = next((row for row in record.results.rows if row.embedder == FACESCALE), None)
    if row is None:
        return "not measured"
    found = headline(row)
    return ", ".join(f"{title} {100 * found[name]:.1f} %" for name, title in ACCURACIES.items() if name in found)
