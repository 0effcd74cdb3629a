"""Plots as plotly wants them: plain dictionaries, which the page's script gives to the plotly.js that is in it.

A colour is told as "$3" (position in `plots.LIGHT` and `DARK`), "$grey", "$text" or "$grid", "~0.2" behind it making it
transparent; the script puts in the one that the page's theme has.
"""

from base64 import b64encode
from html import escape
from typing import Any

import numpy as np

from trainer.evaluation.report.plots import Line, Panel, Plot, Style, thinned

SYMBOLS = ("circle", "triangle-up", "square", "diamond", "triangle-down", "cross", "x", "star")
SOLID_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "circle-open", "square-open", "diamond-open")
DASHES = ("solid", "8px,3px", "8px,3px,2px,3px", "2px,3px", "14px,4px", "14px,4px,2px,4px,2px,4px")
MOST_PICTURES = 1200
"""Of all charts of a page."""


class Album:
    """Pictures that charts show where one points at them, each once."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def number(self, picture: bytes | None) -> int | None:
        """Position of the picture in `urls`; None where there is no picture or no room."""
        if picture is None or (picture not in self._numbers and len(self._numbers) == MOST_PICTURES):
            return None
        return self._numbers.setdefault(picture, len(self._numbers))

    def urls(self) -> list[str]:
        return [jpeg_url(picture) for picture in self._numbers]


def jpeg_url(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{b64encode(picture).decode('ascii')}"


def chart(panel: Panel, plot: Plot, album: Album) -> dict[str, Any]:
    """data and layout of one panel; `legend` gives each trace the number of its entry in the plot's legend, or None."""
    entries = {line.label: number for number, line in enumerate(plot.legend())}
    traces: list[dict[str, Any]] = []
    legend: list[int | None] = []
    for line in panel.lines:
        made = _traces(thinned(line), panel, album)
        traces += made
        # a nameless line belongs to the entry in front of it
        last = legend[-1] if legend else None
        legend += [entries.get(line.label, last)] * len(made)
    return {"data": traces, "layout": _layout(panel), "legend": legend}


def colour(style: Style, opacity: float | None = None) -> str:
    name = "$grey" if style.colour is None else f"${style.colour % len(SYMBOLS)}"
    return name if opacity is None else f"{name}~{opacity:g}"


def symbol(style: Style, solid: bool) -> str:
    """Of a marker; in three dimensions plotly has others."""
    symbols = SOLID_SYMBOLS if solid else SYMBOLS
    return symbols[(style.marker or 0) % len(symbols)]


def _traces(line: Line, panel: Panel, album: Album) -> list[dict[str, Any]]:
    name = escape(line.label, quote=False)  # plotly reads a few tags
    trace: dict[str, Any] = {
        "name": name,
        "showlegend": False,
        "hoverinfo": "x+y+name",
        "hoverlabel": {"namelength": 60},
    }
    if line.hidden:
        trace["visible"] = "legendonly"
    if line.kind in ("across", "upright"):
        return [trace | _rule(line, panel)]
    trace |= {"x": _numbers(line.x), "y": _numbers(line.y), "type": "scatter"}
    pen = {"color": colour(line.style), "width": 2, "dash": DASHES[line.style.dash % len(DASHES)]}
    if line.kind == "points":
        return [trace | _points(line, album)]
    if line.kind == "faint":
        return [trace | {"mode": "lines", "line": pen | {"width": 1}, "opacity": 0.3, "hoverinfo": "skip"}]
    if line.kind == "steps":
        filled = {"fill": "tozeroy", "fillcolor": colour(line.style, 0.2), "line": pen | {"shape": "hv"}}
        return [trace | {"mode": "lines"} | filled]
    trace |= {"mode": "lines", "line": pen}
    if line.style.marker is not None:
        dots = {"symbol": symbol(line.style, False), "size": 7, "maxdisplayed": 12, "color": pen["color"]}
        trace |= {"mode": "lines+markers", "marker": dots}
    if line.notes:
        trace |= _noted(line, album)
    return [*_band(line), trace]


def _points(line: Line, album: Album) -> dict[str, Any]:
    solid = line.z is not None
    marker: dict[str, Any] = {"symbol": symbol(line.style, solid), "color": colour(line.style)}
    marker |= {"size": 5 if solid else 8, "line": {"width": 0 if solid else 0.7, "color": "$paper"}}
    if str(marker["symbol"]).endswith("-open"):
        marker["line"] = {"width": 2, "color": marker["color"]}
    found: dict[str, Any] = {"mode": "markers", "marker": marker}
    if line.z is not None:
        found |= {"type": "scatter3d", "z": _numbers(line.z)}
    if line.low is not None and line.high is not None:
        up, down = _numbers(line.high - line.y), _numbers(line.y - line.low)
        found["error_y"] = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.2}
        found["error_y"]["color"] = colour(line.style)
        found["marker"] = marker | {
            "symbol": f"{marker['symbol']}-open",
            "line": {"width": 1.6, "color": colour(line.style)},
        }
    return found | (_noted(line, album) if line.notes else {})


def _noted(line: Line, album: Album) -> dict[str, Any]:
    """The script shows these itself, beside the picture where there is one."""
    pictures = [album.number(picture) for picture in line.pictures]
    if any(picture is not None for picture in pictures):
        return {"hoverinfo": "none", "customdata": [list(pair) for pair in zip(line.notes, pictures, strict=True)]}
    return {"hoverinfo": "text", "text": [escape(note, quote=False) for note in line.notes]}


def _band(line: Line) -> list[dict[str, Any]]:
    if line.low is None or line.high is None:
        return []
    around = {
        "x": _numbers(np.concatenate([line.x, line.x[::-1]])),
        "y": _numbers(np.concatenate([line.high, line.low[::-1]])),
    }
    style = {"fill": "toself", "fillcolor": colour(line.style, 0.15), "line": {"width": 0}, "mode": "lines"}
    return [around | style | {"type": "scatter", "hoverinfo": "skip", "showlegend": False}]


def _rule(line: Line, panel: Panel) -> dict[str, Any]:
    """A level or a mark, drawn from one end of the panel to the other."""
    pen = {"color": colour(line.style), "width": 2, "dash": DASHES[line.style.dash % len(DASHES)]}
    if line.kind == "upright":
        tops = [float(other.y.max()) for other in panel.lines if other.kind == "steps"]
        where = {"x": _numbers(np.repeat(line.x[:1], 2)), "y": [0, max(tops, default=1.0)]}
    else:
        others = [other.x for other in panel.lines if other.kind in ("line", "points")]
        end = float(max((x.max() for x in others if len(x)), default=1.0))
        where = {"x": [0, end], "y": _numbers(np.repeat(line.y[:1], 2))}
    return where | {"type": "scatter", "mode": "lines", "line": pen}


def _layout(panel: Panel) -> dict[str, Any]:
    if panel.solid:
        axis = {
            "showticklabels": False,
            "title": {"text": ""},
            "gridcolor": "$grid",
            "zeroline": False,
            "showspikes": False,
        }
        scene: dict[str, Any] = dict.fromkeys(("xaxis", "yaxis", "zaxis"), axis)
        scene |= {"aspectmode": "cube", "camera": {"eye": {"x": 1.25, "y": 1.25, "z": 0.9}}}
        return {"scene": scene, "margin": {"l": 0, "r": 0, "t": 0, "b": 0}}
    x: dict[str, Any] = {"title": {"text": escape(panel.x_label, quote=False)}}
    y: dict[str, Any] = {"title": {"text": escape(panel.y_label, quote=False)}}
    if panel.x_range:
        x["range"] = [float(end) for end in (np.log10(panel.x_range) if panel.log_x else panel.x_range)]
    if panel.log_x:
        x |= {"type": "log", "dtick": 1, "tickformat": "~g"}
    low, high = panel.y_range
    if high is not None and low is not None:
        y["range"] = [low, high]
    elif low is not None:
        y["rangemode"] = "tozero"
    if panel.square:
        bare = {"showticklabels": False, "zeroline": False, "ticks": ""}
        x, y = x | bare, y | bare | {"scaleanchor": "x"}
    return {"xaxis": x, "yaxis": y}


def _numbers(values: np.ndarray) -> list[float | None]:
    """Five significant digits; None where not finite, which leaves a gap."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]
