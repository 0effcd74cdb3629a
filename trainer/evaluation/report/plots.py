"""What a figure shows, described once: `figures` draws it with matplotlib, `charts` with plotly.

Colours are those of Okabe and Ito (2008), told apart with any colour vision; dashes and markers say the same again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from trainer.evaluation.report.records import Record
from trainer.evaluation.report.tables import headline
from trainer.evaluation.results import FACESCALE, RAW_PIXELS, ResultRow

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#B8A900")
"""On white. The last is a darker yellow: theirs hardly shows."""
DARK = ("#4BA3E3", "#F0803C", "#1FC79A", "#F2B134", "#A6DAFA", "#E59CC4", "#F4F4F4", "#F0E442")
"""On black: the same hues, lighter."""
BLUE, VERMILLION, GREEN, ORANGE = range(4)
MOST_POINTS = 1000
"""Of a line."""

Kind = Literal["line", "faint", "steps", "points", "across", "upright"]


@dataclass(frozen=True, kw_only=True)
class Style:
    colour: int | None
    """Position in `LIGHT` and `DARK`; None: grey."""
    dash: int = 0
    marker: int | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One entry of the legend. x, y and z have shape (points,)."""

    label: str
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray | None = None
    style: Style
    kind: Kind = "line"
    """across: a level at y[0]; upright: a mark at x[0]; steps: y[i] from x[i] to x[i+1], filled down to 0."""
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    """Of a line: a band. Of points: error bars."""
    notes: Sequence[str] = ()
    """Said of each point where one points at it."""
    pictures: Sequence[bytes | None] = ()
    """Shown with the note: JPEG."""
    hidden: bool = False
    """On the page until asked for; left out elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str = ""
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_range: tuple[float, float] | None = None
    y_range: tuple[float | None, float | None] = (None, None)
    log_x: bool = False
    square: bool = False
    """Both axes to one scale, without numbers."""

    @property
    def solid(self) -> bool:
        """Whether it has three dimensions."""
        return any(line.z is not None for line in self.lines)


@dataclass(frozen=True, kw_only=True)
class Plot:
    name: str
    """Of its file."""
    title: str
    caption: str
    """What is measured and on how much."""
    alt: str
    """What can be seen, for who cannot see it."""
    panels: Sequence[Panel]
    legend_title: str = ""
    tall: bool = False

    def legend(self) -> list[Line]:
        """The first line of each label over all panels."""
        first: dict[str, Line] = {}
        for panel in self.panels:
            for line in panel.lines:
                if line.label and line.kind != "faint":
                    first.setdefault(line.label, line)
        return list(first.values())


@dataclass(frozen=True)
class Series:
    """One result as a line of a figure."""

    label: str
    row: ResultRow
    style: Style
    hidden: bool = False


@dataclass(frozen=True)
class Group:
    """The results that share a panel."""

    title: str
    series: list[Series] = field(default_factory=list)


def groups(records: Sequence[Record]) -> list[Group]:
    """How results share panels: all sets of one run in one; of several runs, a panel for each set.

    Raw pixels are grey. Several runs on the same set share one line of raw pixels where these measured the same.
    """
    if len(records) == 1:
        rows = records[0].results.rows
        names = list(dict.fromkeys(row.set for row in rows))
        many = len(names) > 3
        return [Group("", [_of_set(row, names.index(row.set), many) for row in _raw_last(rows)])]
    sets = dict.fromkeys(row.set for record in records for row in record.results.rows)
    return [Group(name, _of_runs(records, name)) for name in sets]


def _of_set(row: ResultRow, number: int, many: bool) -> Series:
    if row.embedder == RAW_PIXELS:
        return Series(f"{row.set}, raw pixels", row, Style(colour=None, dash=number + 1, marker=number), hidden=many)
    return Series(row.set, row, Style(colour=number, dash=number, marker=number))


def _of_runs(records: Sequence[Record], name: str) -> list[Series]:
    found: list[Series] = []
    seen: list[dict[str, float]] = []
    for number, record in enumerate(records):
        for row in record.results.rows:
            if row.set == name and row.embedder == FACESCALE:
                found.append(Series(record.label, row, run_style(number)))
    for number, record in enumerate(records):
        for row in record.results.rows:
            measured = {key: value for key, value in headline(row).items() if key != "triplet_loss"}
            if row.set == name and row.embedder == RAW_PIXELS and measured not in seen:
                label = "raw pixels" if not seen else f"raw pixels of {record.name}"
                found.append(Series(label, row, Style(colour=None, dash=number + 1)))
                seen.append(measured)
    return found


def run_style(number: int) -> Style:
    return Style(colour=number, dash=number, marker=number)


def ours(records: Sequence[Record]) -> list[tuple[int, Record, ResultRow]]:
    """(number of the run, run, row) of every result of a trained network."""
    return [
        (number, record, row)
        for number, record in enumerate(records)
        for row in record.results.rows
        if row.embedder == FACESCALE
    ]


def told(records: Sequence[Record], tell: Callable[[dict[str, Any]], str | None]) -> str:
    """What `tell` says of the scalars of each of our results, by set, told once where runs agree."""
    by_set: dict[str, dict[str, None]] = {}
    for _, _, row in ours(records):
        words = tell(row.result.scalars)
        if words:
            by_set.setdefault(row.set, {})[words] = None
    return "; ".join(f"{name}: {' / '.join(words)}" for name, words in by_set.items())


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """At most that many points of the line, evenly taken, its last one among them."""
    count = len(line.x)
    if count <= most:
        return line
    kept = np.unique(np.linspace(0, count - 1, most).round().astype(int))
    return replace(
        line,
        **{
            name: getattr(line, name)[kept]
            for name in ("x", "y", "z", "low", "high")
            if getattr(line, name) is not None
        },
        notes=[line.notes[place] for place in kept] if line.notes else (),
        pictures=[line.pictures[place] for place in kept] if line.pictures else (),
    )


def _raw_last(rows: Sequence[ResultRow]) -> list[ResultRow]:
    return sorted(rows, key=lambda row: row.embedder == RAW_PIXELS)
