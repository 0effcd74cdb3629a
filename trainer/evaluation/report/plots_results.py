"""Figures of what was measured: CMC, ROC, distances of genuine and impostor pairs, accuracy of each identity."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.evaluation.report.plots import BLUE, VERMILLION, Line, Panel, Plot, Series, Style, groups, ours, told
from trainer.evaluation.report.records import Record
from trainer.evaluation.results import FACESCALE, ResultRow

CHANCE = Style(colour=None, dash=3)
MOST_HISTOGRAMS = 12


def cmc_plot(records: Sequence[Record]) -> Plot | None:
    """Cumulative match characteristic up to rank 50, with its confidence band; None where no set has one."""
    panels = []
    for group in groups(records):
        lines, sizes = [], set()
        for series in group.series:
            curves, scalars = series.row.result.curves, series.row.result.scalars
            if "cmc" not in curves:
                continue
            cmc = 100 * curves["cmc"]
            low, high = (100 * curves[side] if side in curves else None for side in ("cmc_low", "cmc_high"))
            low, high = (None, None) if series.row.embedder != FACESCALE else (low, high)
            ranks = np.arange(1, len(cmc) + 1)
            sizes.add(scalars.get("gallery_identities", 0))
            lines.append(_line(series, ranks, cmc, low=low, high=high))
        longest = max((len(line.x) for line in lines), default=0)
        for enrolled in sorted(sizes - {0}):
            ranks = np.arange(1, min(longest, enrolled) + 1)
            label = f"chance, {enrolled:,} enrolled"
            lines.append(Line(label=label, x=ranks, y=100 * ranks / enrolled, style=CHANCE))
        if lines:
            axes: dict[str, Any] = {"x_label": "rank (identities)", "y_label": "probes identified (%)"}
            panels.append(Panel(title=group.title, lines=lines, x_range=(0.5, longest + 0.5), y_range=(0, 101), **axes))
    if not panels:
        return None
    band = any("cmc_low" in row.result.curves for _, _, row in ours(records))
    words = " Shaded: 95 % band by bootstrap over identities." if band else ""
    return Plot(
        name="cmc",
        title="Identification: cumulative match characteristic",
        caption=f"Probes whose identity is found at this rank or better, closed set. {told(records, _enrolled)}.{words}",
        alt=f"CMC. {told(records, lambda s: _rates(s, ('rank1', 'rank5')))}.",
        panels=panels,
    )


def roc_plot(records: Sequence[Record]) -> Plot | None:
    """ROC with a logarithmic FAR, from where at least 10 impostor pairs are accepted; None where no set has one."""
    panels = []
    for group in groups(records):
        lines, least = [], 1.0
        for series in group.series:
            curves, scalars = series.row.result.curves, series.row.result.scalars
            pairs = scalars.get("roc_impostor_pairs", scalars.get("impostor_pairs"))
            if "roc_far" not in curves:
                continue
            start = min(0.1, 10 / pairs) if pairs else 1e-4
            shown = curves["roc_far"] >= start
            least = min(least, start)
            lines.append(_line(series, 100 * curves["roc_far"][shown], 100 * curves["roc_tar"][shown]))
            lines += _operating_points(series)
        if lines:
            chance = 100 * np.geomspace(least, 1, 50)
            lines.append(Line(label="chance", x=chance, y=chance, style=CHANCE))
            axes: dict[str, Any] = {"x_label": "false-accept rate, FAR (%)", "y_label": "true-accept rate, TAR (%)"}
            axes |= {"x_range": (100 * least, 100), "y_range": (0, 101)}
            panels.append(Panel(title=group.title, lines=lines, log_x=True, **axes))
    if not panels:
        return None
    return Plot(
        name="roc",
        title="Verification: receiver operating characteristic",
        caption=f"Genuine pairs accepted over impostor pairs accepted. {told(records, _compared)}. Drawn from where 10 impostor "
        "pairs are accepted. Open marks: TAR at a FAR of at most the target, with 95 % Wilson interval.",
        alt=f"ROC. {told(records, lambda s: _rates(s, ('auc', 'eer')))}.",
        panels=panels,
    )


def histogram_plot(records: Sequence[Record]) -> Plot | None:
    """Distances of genuine and impostor pairs with the threshold, a panel for each of our results; None without any."""
    panels: list[Panel] = []
    words: list[str] = []
    for _, record, row in ours(records):
        curves, scalars = row.result.curves, row.result.scalars
        if "histogram_edges" not in curves or len(panels) == MOST_HISTOGRAMS:
            continue
        title = f"{record.name}: {row.set}" if len(records) > 1 else row.set
        panels.append(_distances(title, curves, scalars.get("verification_threshold")))
        genuine, impostor = (int(curves[f"histogram_{kind}"].sum()) for kind in ("genuine", "impostor"))
        words.append(f"{title}: {genuine:,} genuine and {impostor:,} impostor pairs")
    if not panels:
        return None
    return Plot(
        name="histogram",
        title="Distances of genuine and impostor pairs",
        caption=f"Share of the pairs of each kind in each bin of the L2 distance. {'; '.join(words)}. Upright: the "
        "threshold that divides the pairs of the verification accuracy best.",
        alt="Histograms of distances: genuine pairs to the left of impostor pairs as far as they are told apart. "
        f"{told(records, lambda s: _rates(s, ('eer',)))}.",
        panels=panels,
    )


def identities_plot(records: Sequence[Record]) -> Plot | None:
    """Rank-1 of each identity, worst first; None where no set has it."""
    panels, words = [], []
    for group in groups(records):
        lines = []
        for series in group.series:
            curves = series.row.result.curves
            if "identity_rank1" not in curves or series.row.embedder != FACESCALE:
                continue
            rates, probes = curves["identity_rank1"], curves["identity_probes"]
            order = np.argsort(rates, kind="stable")
            x = 100 * (np.arange(len(rates)) + 1) / len(rates)
            names = _record_of(records, series.row).results.names
            notes = [
                f"{names.get(int(label), str(int(label)))}: {100 * rate:.0f} % of {int(count)} probes"
                for label, rate, count in zip(
                    curves["identity_labels"][order], rates[order], probes[order], strict=True
                )
            ]
            lines.append(_line(series, x, 100 * rates[order], notes=notes))
            words.append(
                f"{series.row.set if len(records) == 1 else series.label + ', ' + series.row.set}: {len(rates):,} identities, "
                f"{int(probes.sum()):,} probes, {int((rates == 1).sum()):,} identities without an error"
            )
        if lines:
            axes: dict[str, Any] = {"x_label": "identities, worst first (%)", "y_label": "Rank-1 of the identity (%)"}
            panels.append(Panel(title=group.title, lines=lines, x_range=(0, 100), y_range=(0, 101), **axes))
    if not panels:
        return None
    return Plot(
        name="identities",
        title="Accuracy of each identity",
        caption=f"Rank-1 of the probes of each identity, identities in ascending order. {'; '.join(words)}.",
        alt=f"Rank-1 of each identity in ascending order. {'; '.join(words)}.",
        panels=panels,
    )


def _line(series: Series, x: np.ndarray, y: np.ndarray, **more: Any) -> Line:
    return Line(label=series.label, x=x, y=y, style=series.style, hidden=series.hidden, **more)


def _operating_points(series: Series) -> list[Line]:
    points = [point for point in series.row.result.scalars.get("tar_at_far") or [] if point.get("tar") is not None]
    points = [point for point in points if point.get("low") is not None and point.get("far")]
    if not points or series.row.embedder != FACESCALE:
        return []
    far, tar, low, high = (100 * np.array([point[name] for point in points]) for name in ("far", "tar", "low", "high"))
    notes = [f"TAR at FAR at most {100 * point['target']:g} %" for point in points]
    style = Style(colour=series.style.colour, marker=series.style.marker)
    return [Line(label="", x=far, y=tar, low=low, high=high, style=style, kind="points", notes=notes)]


def _distances(title: str, curves: dict[str, np.ndarray], threshold: float | None) -> Panel:
    edges = curves["histogram_edges"]
    lines = []
    for kind, style in (("genuine", Style(colour=BLUE)), ("impostor", Style(colour=VERMILLION, dash=1))):
        counts = curves[f"histogram_{kind}"].astype(float)
        share = 100 * counts / max(counts.sum(), 1)
        lines.append(Line(label=f"{kind} pairs", x=edges, y=np.append(share, 0), style=style, kind="steps"))
    if threshold is not None:
        mark = np.array([threshold])
        label = "threshold of verification"
        lines.append(Line(label=label, x=mark, y=mark, style=Style(colour=None, dash=2), kind="upright"))
    filled = np.flatnonzero(curves["histogram_genuine"] + curves["histogram_impostor"])
    reach = (float(edges[filled[0]]), float(edges[filled[-1] + 1])) if len(filled) else (0.0, 2.0)
    axes: dict[str, Any] = {"x_label": "root L2 distance (0 to 2)", "y_label": "pairs of the kind (%)"}
    return Panel(
        title=title, lines=lines, x_range=(max(0, reach[0] - 0.05), min(2, reach[1] + 0.05)), y_range=(0, None), **axes
    )


def _record_of(records: Sequence[Record], row: ResultRow) -> Record:
    return next(record for record in records if any(row is own for own in record.results.rows))


def _enrolled(s: dict[str, Any]) -> str | None:
    if "probes" not in s:
        return None
    return f"{s.get('gallery_identities', 0):,} identities enrolled, {s['probes']:,} probes"


def _compared(s: dict[str, Any]) -> str | None:
    if s.get("genuine_pairs") is None:
        return None
    return f"{s['genuine_pairs']:,} genuine and {s.get('impostor_pairs', 0):,} impostor pairs"


def _rates(s: dict[str, Any], names: tuple[str, ...]) -> str | None:
    words = {"rank1": "Rank-1", "rank5": "Rank-5", "auc": "AUC", "eer": "EER"}
    found = [f"{words[name]} {100 * s[name]:.1f} %" for name in names if s.get(name) is not None]
    return ", ".join(found) or None
