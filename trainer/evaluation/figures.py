"""The report's pictures. Each function returns a Figure of its own; no global matplotlib state is touched.

Colours are those of Okabe and Ito (2008), told apart with any colour vision; raw pixels are always grey.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from sklearn.manifold import TSNE

from trainer.evaluation.results import FACESCALE, RAW_PIXELS, UNSEEN_IDENTITIES, UNSEEN_IMAGES, ResultRow

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
DARK_YELLOW = "#B8A900"  # their yellow hardly shows on white
OKABE_ITO = (BLUE, VERMILLION, GREEN, ORANGE, "#56B4E9", "#CC79A7", "#000000", DARK_YELLOW)
GREY, TEXT = "#8C8C8C", "#333333"
MARKERS = "o^sDvP*X"
CHANCE: dict[str, Any] = {"color": "#BFBFBF", "linestyle": ":", "linewidth": 1.4}
TSNE_IDENTITIES, TSNE_IMAGES = 20, 50
SET_COLOURS = {UNSEEN_IDENTITIES: BLUE, UNSEEN_IMAGES: VERMILLION}
SET_LINES = {UNSEEN_IDENTITIES: "-", UNSEEN_IMAGES: "--"}

Line = Mapping[str, Any]


def loss_figure(log: Sequence[Line], evaluations: Sequence[Line], distance: str) -> Figure:
    """Training loss, distances and active fraction over the images seen; `distance` is "root" or "squared"."""
    figure, (top, middle, bottom) = _figure(7.2, 7.6, 3, sharex=True, height_ratios=[1.5, 1, 1])
    scale, unit = _scale(log)
    seen = _column(log, "images_seen") / scale
    _trace(top, seen, _column(log, "loss"), BLUE, "training")
    if any("triplet_loss" in line for line in evaluations):
        at = _column(evaluations, "images_seen") / scale
        style = {"color": VERMILLION, "marker": "o", "markersize": 5, "linewidth": 1.2}
        top.plot(at, _column(evaluations, "triplet_loss"), label="unseen identities, mean of all triplets", **style)
    _trace(middle, seen, _column(log, "d_an"), ORANGE, "anchor to hardest negative")
    _trace(middle, seen, _column(log, "d_ap"), GREEN, "anchor to hardest positive")
    _trace(bottom, seen, 100 * _column(log, "active_fraction"), BLUE, "")
    top.set_ylabel("triplet loss")
    middle.set_ylabel(f"mean {distance} distance")
    bottom.set_ylabel("active triplets (%)")
    bottom.set_ylim(0, 103)
    bottom.set_xlim(0, 1.02 * seen[-1])
    bottom.set_xlabel(f"images seen{unit}")
    for axes in (top, middle):
        axes.legend(frameon=False, fontsize=9, loc="best")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    top.set_title("Loss and triplet health")
    return figure


def accuracy_figure(log: Sequence[Line], evaluations: Sequence[Line], rows: Sequence[ResultRow]) -> Figure:
    """Four accuracies over the images seen: during training, at the end, and those of raw pixels."""
    figure, panels = _figure(8.4, 6.6, 2, 2, sharex=True, sharey=True)
    scale, unit = _scale(log)
    end = log[-1]["images_seen"] / scale
    titles = {"rank1": "Rank-1", "rank5": "Rank-5", "knn": "kNN", "verification_accuracy": "Verification (pairs)"}
    handles: dict[str, Any] = {}
    for axes, (name, title) in zip(panels.flat, titles.items(), strict=True):
        measured = [line for line in evaluations if name in line]
        if measured:
            at, values = _column(measured, "images_seen") / scale, 100 * _column(measured, name)
            label = f"{UNSEEN_IDENTITIES}, during training"
            (handles[label],) = axes.plot(at, values, color=BLUE, marker="o", markersize=3.5, linewidth=1.4)
        for row in rows:
            value = row.result.headline().get(name)
            if value is None:
                continue
            label = f"{row.set}, {RAW_PIXELS if row.embedder == RAW_PIXELS else 'at the end'}"
            if row.embedder == RAW_PIXELS:
                handles[label] = axes.axhline(100 * value, color=GREY, linestyle=SET_LINES[row.set], linewidth=1.6)
            else:
                style = {
                    "color": SET_COLOURS[row.set],
                    "marker": "D",
                    "markersize": 8,
                    "linestyle": "none",
                    "zorder": 5,
                }
                (handles[label],) = axes.plot(end, 100 * value, markeredgecolor="white", clip_on=False, **style)
        axes.set_title(title, fontsize=11)
    panels[0, 0].set_xlim(0, end * 1.03)
    panels[0, 0].set_ylim(max(0, 10 * np.floor(panels[0, 0].get_ylim()[0] / 10)), 101)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy (%)")
    for axes in panels[-1]:
        axes.set_xlabel(f"images seen{unit}")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def roc_figure(rows: Sequence[ResultRow]) -> Figure:
    """ROC with a logarithmic FAR, drawn from where at least 10 impostor pairs are accepted."""
    figure, axes = _figure(6.8, 5.2)
    least = 1.0
    for row in _raw_first(rows):
        curves, scalars = row.result.curves, row.result.scalars
        if "roc_far" not in curves:
            continue
        start = min(0.1, 10 / scalars["impostor_pairs"])
        shown = curves["roc_far"] >= start
        least = min(least, start)
        label = f"{row.embedder}, {row.set} (AUC {scalars['auc']:.3f})"
        axes.plot(100 * curves["roc_far"][shown], 100 * curves["roc_tar"][shown], label=label, **_style(row))
    chance = np.geomspace(least, 1, 100)
    axes.plot(100 * chance, 100 * chance, label="chance", **CHANCE)
    axes.set_xscale("log")
    axes.set_xlim(100 * least, 100)
    axes.set_ylim(0, 101)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("false-accept rate, FAR (% of impostor pairs)")
    axes.set_ylabel("true-accept rate, TAR (% of genuine pairs)")
    axes.set_title("Verification: receiver operating characteristic")
    _legend_below(figure)
    return figure


def cmc_figure(rows: Sequence[ResultRow]) -> Figure:
    """Cumulative match characteristic up to rank 50."""
    figure, axes = _figure(6.8, 5.2)
    longest, sizes = 1, set()
    for row in _raw_first(rows):
        cmc, scalars = row.result.curves["cmc"], row.result.scalars
        ranks = np.arange(1, len(cmc) + 1)
        longest = max(longest, len(cmc))
        label = f"{row.embedder}, {row.set} ({scalars['gallery_identities']:,} enrolled, {scalars['probes']:,} probes)"
        style = _style(row) | {"marker": "o", "markersize": 5, "markevery": [i for i in (0, 4) if i < len(cmc)]}
        axes.plot(ranks, 100 * cmc, label=label, **style)
        sizes.add(scalars["gallery_identities"])
    for enrolled in sorted(sizes):
        ranks = np.arange(1, min(longest, enrolled) + 1)
        axes.plot(ranks, 100 * ranks / enrolled, label=f"chance, {enrolled:,} enrolled", **CHANCE)
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_xticks([rank for rank in (1, 5, 10, 20, 30, 40, 50) if rank <= longest])
    axes.set_ylim(0, 101)
    axes.set_xlabel("rank (identities)")
    axes.set_ylabel("probes identified at this rank or better (%)")
    axes.set_title("Identification: cumulative match characteristic")
    _legend_below(figure)
    return figure


def tsne_figure(embeddings: np.ndarray, identities: np.ndarray, judged: str, seed: int = 0) -> Figure:
    """t-SNE, by cosine, of up to 50 images of each of up to 20 identities drawn with the seed.

    Args:
        embeddings: shape (n, d).
        identities: shape (n,).
        judged: name of the set.
    """
    unique, counts = np.unique(identities, return_counts=True)
    several = unique[counts >= min(5, counts.max())]  # an identity with few images shows no cluster
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.permutation(several)[:TSNE_IDENTITIES])
    positions = np.concatenate([np.flatnonzero(identities == identity)[:TSNE_IMAGES] for identity in chosen])
    perplexity = max(1.0, min(30.0, (len(positions) - 1) / 3))
    tsne = TSNE(metric="cosine", perplexity=perplexity, init="random", random_state=seed)
    points = tsne.fit_transform(embeddings[positions])  # (p, 2)
    figure, axes = _figure(8.0, 6.4)
    for number, identity in enumerate(chosen):
        own = points[identities[positions] == identity]
        colour = OKABE_ITO[number % len(OKABE_ITO)]
        marker = MARKERS[(number // len(OKABE_ITO) + number) % len(MARKERS)]
        style = {"color": colour, "marker": marker, "s": 26, "alpha": 0.85, "linewidths": 0.4, "edgecolors": "white"}
        axes.scatter(own[:, 0], own[:, 1], label=str(identity), **style)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("t-SNE 1 (no unit)")
    axes.set_ylabel("t-SNE 2 (no unit)")
    axes.set_title(f"t-SNE by cosine: {len(positions):,} images of {len(chosen)} identities\n({judged})")
    figure.legend(title="identity", loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """Axes: one, a 1-D array or a 2-D array, as `Figure.subplots` gives them."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, **grid)
    for each in np.atleast_1d(axes).flat:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(TEXT)
        each.tick_params(colors=TEXT, labelsize=9)
        each.grid(color="#E5E5E5", linewidth=0.7)
        each.set_axisbelow(True)
    return figure, axes


def _trace(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    """The logged values faintly, their running mean over a fiftieth of the run on top."""
    window = np.ones(2 * (len(y) // 100) + 1)
    if len(window) > 1:
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    mean = np.convolve(y, window, mode="same") / np.convolve(np.ones(len(y)), window, mode="same")
    axes.plot(x, mean, color=colour, linewidth=1.8, label=label)


def _style(row: ResultRow) -> dict[str, Any]:
    colour = GREY if row.embedder == RAW_PIXELS else SET_COLOURS[row.set]
    return {"color": colour, "linestyle": SET_LINES[row.set], "linewidth": 2.0 if row.embedder == FACESCALE else 1.6}


def _raw_first(rows: Sequence[ResultRow]) -> list[ResultRow]:
    return sorted(rows, key=lambda row: row.embedder != RAW_PIXELS)  # ours is drawn over it


def _legend_below(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=9)


def _column(lines: Sequence[Line], name: str) -> np.ndarray:
    """The values of a name, shape (lines,), float64, NaN where a line lacks it."""
    return np.array([float(line.get(name, np.nan)) for line in lines])


def _scale(log: Sequence[Line]) -> tuple[float, str]:
    most = log[-1]["images_seen"]
    if most >= 2_000_000:
        return 1e6, " (millions)"
    return (1e3, " (thousands)") if most >= 2_000 else (1.0, "")
