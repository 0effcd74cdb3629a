"""Plots drawn with matplotlib. Each call returns a Figure of its own; no global matplotlib state is touched."""

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from trainer.evaluation.report.plots import LIGHT, Line, Panel, Plot, Style

GREY, TEXT, GRID = "#8C8C8C", "#333333", "#E5E5E5"
MARKERS = "o^sDvPX*"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5)), (0, (9, 2)), (0, (9, 2, 1, 2, 1, 2)))
PANEL = (6.4, 4.4)
"""Inches."""
TALL = (6.8, 6.2)


def draw(plot: Plot) -> Figure:
    """The plot as one figure with a white background: a panel beside the other up to two, further ones below."""
    columns = min(2, len(plot.panels))
    rows = ceil(len(plot.panels) / columns)
    width, height = TALL if plot.tall else PANEL
    legend = [line for line in plot.legend() if not line.hidden]
    beside = bool(plot.legend_title)
    below = 0 if beside else 0.24 * ceil(len(legend) / columns)
    size = (columns * width + 1.2 * beside, rows * height + below)
    figure = Figure(figsize=size, dpi=150 if len(plot.panels) < 3 else 110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for number, panel in enumerate(plot.panels, start=1):
        axes = figure.add_subplot(rows, columns, number, projection="3d" if panel.solid else None)
        _draw_panel(axes, panel, handles)
    figure.suptitle(_plain(plot.title), color=TEXT, fontsize=12)
    named = {line.label: handles[line.label] for line in legend if line.label in handles}
    if named:
        place: dict[str, Any] = {"loc": "outside lower left", "ncols": columns}
        if beside:
            place = {"loc": "outside right upper", "title": plot.legend_title, "ncols": 1}
        labels = [_plain(label) for label in named]
        figure.legend(list(named.values()), labels, frameon=False, fontsize=8 if beside else 9, **place)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes PNG or PDF, by the name, without a date in it: the same figure gives the same bytes."""
    figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)


def _draw_panel(axes: Any, panel: Panel, handles: dict[str, Any]) -> None:
    _prepare(axes, panel)
    if panel.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for number, line in enumerate(sorted(panel.lines, key=lambda line: line.kind == "points")):
        if line.hidden:
            continue
        handle = _draw_line(axes, line, 2 + 0.01 * number)
        if line.label and line.kind != "faint":
            handles.setdefault(line.label, handle)
    if panel.x_range:
        axes.set_xlim(*panel.x_range)
    low, high = panel.y_range
    if low is not None:
        axes.set_ylim(bottom=low)
    if high is not None:
        axes.set_ylim(top=high)


def _prepare(axes: Any, panel: Panel) -> None:
    axes.set_title(_plain(panel.title), fontsize=10, color=TEXT)
    axes.tick_params(colors=TEXT, labelsize=9)
    axes.grid(color=GRID, linewidth=0.7)
    if panel.solid:
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_ticklabels([])
        return
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(TEXT)
    axes.set_xlabel(panel.x_label, color=TEXT)
    axes.set_ylabel(panel.y_label, color=TEXT)
    if panel.square:
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xticks([])
        axes.set_yticks([])


def _draw_line(axes: Any, line: Line, order: float) -> Any:
    colour, dash = colour_of(line.style), DASHES[line.style.dash % len(DASHES)]
    if line.z is not None:
        return axes.scatter(line.x, line.y, line.z, **_dots(line.style, 18))
    if line.kind == "points":
        if line.low is not None and line.high is not None:
            span = np.abs(np.stack([line.y - line.low, line.high - line.y]))
            axes.errorbar(line.x, line.y, span, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, zorder=order)
        return axes.scatter(line.x, line.y, zorder=order, **_dots(line.style, 46 if len(line.x) < 10 else 26))
    if line.kind == "across":
        return axes.axhline(line.y[0], color=colour, linestyle=dash, linewidth=1.6)
    if line.kind == "upright":
        return axes.axvline(line.x[0], color=colour, linestyle=dash, linewidth=1.6)
    if line.kind == "faint":
        return axes.plot(line.x, line.y, color=colour, alpha=0.25, linewidth=0.8)[0]
    if line.kind == "steps":
        axes.fill_between(line.x, line.y, step="post", color=colour, alpha=0.2, linewidth=0)
        return axes.plot(line.x, line.y, drawstyle="steps-post", color=colour, linestyle=dash, linewidth=1.6)[0]
    return _draw_curve(axes, line, colour, dash, order)


def _draw_curve(axes: Axes, line: Line, colour: str, dash: Any, order: float) -> Any:
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    style: dict[str, Any] = {"color": colour, "linestyle": dash, "linewidth": 1.8, "zorder": order}
    if line.style.marker is not None:
        marker = MARKERS[line.style.marker % len(MARKERS)]
        style |= {"marker": marker, "markersize": 4.5, "markevery": max(1, len(line.x) // 12)}
    return axes.plot(line.x, line.y, **style)[0]


def _dots(style: Style, size: float) -> dict[str, Any]:
    marker = MARKERS[(style.marker or 0) % len(MARKERS)]
    return {"color": colour_of(style), "marker": marker, "s": size, "linewidths": 0.4, "edgecolors": "white"}


def colour_of(style: Style) -> str:
    return GREY if style.colour is None else LIGHT[style.colour % len(LIGHT)]


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would set what stands between two as mathematics
