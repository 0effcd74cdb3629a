"""What stands before an entry of a legend on the page: its dash and marker, in the colour of the theme."""

from math import cos, pi, sin

from markupsafe import Markup

from trainer.evaluation.report.charts import DASHES, symbol
from trainer.evaluation.report.plots import Line

_WIDTH, _HEIGHT, _RADIUS = 34, 14, 4.5


def swatch(line: Line, solid: bool) -> Markup:
    """An SVG, hidden from screen readers.

    Args:
        line: the entry's line.
        solid: whether the figure has three dimensions, whose markers are others.
    """
    colour = "var(--grey)" if line.style.colour is None else f"var(--c{line.style.colour % 8})"
    drawn = ""
    if line.kind == "steps":
        drawn += (
            f'<rect x="1" y="3" width="{_WIDTH - 2}" height="{_HEIGHT - 4}" style="fill: {colour}; opacity: 0.25"/>'
        )
    if line.kind != "points":
        dash = DASHES[line.style.dash % len(DASHES)]
        dashes = "" if dash == "solid" else f' stroke-dasharray="{dash.replace("px", "")}"'
        y = 3 if line.kind == "steps" else _HEIGHT / 2
        drawn += f'<path d="M1 {y:g}H{_WIDTH - 1}" style="stroke: {colour}; stroke-width: 2"{dashes}/>'
    if line.style.marker is not None:
        drawn += _marker(symbol(line.style, solid), colour)
    width = _WIDTH if line.kind != "points" else _HEIGHT
    left = 0 if line.kind != "points" else (_WIDTH - _HEIGHT) / 2
    box = f'viewBox="{left:g} 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}"'
    return Markup(f'<svg {box} aria-hidden="true" focusable="false">{drawn}</svg>')


def _marker(name: str, colour: str) -> str:
    x, y, r = _WIDTH / 2, _HEIGHT / 2, _RADIUS
    shape, is_open = name.removesuffix("-open"), name.endswith("-open")
    style = f"fill: none; stroke: {colour}; stroke-width: 1.8" if is_open else f"fill: {colour}"
    if shape == "circle":
        return f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" style="{style}"/>'
    if shape in ("cross", "x"):
        reach = r if shape == "cross" else 0.75 * r
        d = f"M{x} {y - reach}V{y + reach}M{x - reach} {y}H{x + reach}"
        if shape == "x":
            d = f"M{x - reach} {y - reach}L{x + reach} {y + reach}M{x - reach} {y + reach}L{x + reach} {y - reach}"
        return f'<path d="{d}" style="fill: none; stroke: {colour}; stroke-width: 2.6"/>'
    corners, turned, pointed = {
        "square": (4, pi / 4, False),
        "diamond": (4, 0.0, False),
        "triangle-up": (3, -pi / 2, False),
        "triangle-down": (3, pi / 2, False),
        "star": (10, -pi / 2, True),
    }[shape]
    points = []
    for corner in range(corners):
        radius = 1.15 * r * (0.45 if pointed and corner % 2 else 1)
        angle = turned + 2 * pi * corner / corners
        points.append(f"{x + radius * cos(angle):.2f},{y + radius * sin(angle):.2f}")
    return f'<polygon points="{" ".join(points)}" style="{style}"/>'
