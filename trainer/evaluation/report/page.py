"""report.html: one page that needs no other file and no network. Everything from data is escaped by the template."""

import json
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.evaluation.report.charts import Album, chart, jpeg_url
from trainer.evaluation.report.galleries import GALLERIES, cards, gallery_caption
from trainer.evaluation.report.notes import headlines, left_out, protocol_notes, training
from trainer.evaluation.report.plots import DARK, LIGHT, Plot
from trainer.evaluation.report.records import Record
from trainer.evaluation.report.swatches import swatch
from trainer.evaluation.report.tables import (
    full_table,
    headline,
    identities_table,
    percent,
    points_table,
    refusals,
    settings_table,
    summary_table,
)
from trainer.evaluation.results import FACESCALE, RAW_PIXELS

_PARTS = Path(__file__).parent / "report_page"
SECTIONS = {
    "training": ("Training", ("loss", "accuracy", "health", "throughput")),
    "identification": ("Identification", ("cmc", "identities")),
    "verification": ("Verification", ("roc", "histogram")),
    "embeddings": ("Embeddings", ("tsne", "umap", "tsne3d")),
}
"""Sections with figures: id -> title, names of their plots."""


def page_html(records: Sequence[Record], plots: Sequence[Plot]) -> str:
    """The whole page.

    Args:
        records: runs, in the order in which they are listed.
        plots: of these runs.
    """
    album = Album()
    figures = {plot.name: _figure(plot, album) for plot in plots}
    charts = {panel["id"]: panel["chart"] for figure in figures.values() for panel in figure["panels"]}
    data = _json({"charts": charts, "pictures": album.urls()})
    scripts = [_plotly(), _part("page.js")]
    environment = Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=" · ".join(record.name for record in records),
        records=records,
        training=training,
        jpeg_url=jpeg_url,
        policy=_policy(scripts),
        style=Markup(_part("page.css").replace("/* colours */", _colours())),
        data=Markup(data),
        scripts=[Markup(script) for script in scripts],
        tiles=_tiles(records),
        sections=[
            {"id": name, "title": title, "figures": _rows(own), "tables": _tables(records, name)}
            for name, (title, names) in SECTIONS.items()
            if (own := [figures[plot] for plot in names if plot in figures])
        ],
        galleries=_galleries(records),
        summary=summary_table(records),
        everything=full_table(records),
        settings=settings_table(records),
        headlines=headlines(records),
        protocol=protocol_notes(records),
        missing=refusals(records) + left_out(records),
    )


def _figure(plot: Plot, album: Album) -> dict[str, Any]:
    panels = [
        {"id": f"{plot.name}-{number}", "title": panel.title, "solid": panel.solid, "chart": chart(panel, plot, album)}
        for number, panel in enumerate(plot.panels, start=1)
    ]
    solid = any(panel.solid for panel in plot.panels)
    legend = [{"label": line.label, "swatch": swatch(line, solid), "hidden": line.hidden} for line in plot.legend()]
    return {"plot": plot, "panels": panels, "legend": legend}


def _rows(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two figures of one panel share a row; all others have one of their own."""
    alone = [len(figure["panels"]) == 1 for figure in figures]
    paired = [False] * len(figures)
    for number in range(len(figures) - 1):
        if alone[number] and alone[number + 1] and not paired[number]:
            paired[number] = paired[number + 1] = True
    return [figure | {"wide": not beside} for figure, beside in zip(figures, paired, strict=True)]


def _tiles(records: Sequence[Record]) -> list[dict[str, str]]:
    """The headline figures of the first set that has any: the best run, its number, and that of raw pixels."""
    words = {"rank1": "Rank-1", "rank5": "Rank-5", "knn": "kNN", "verification_accuracy": "Verification"}
    sets = dict.fromkeys(row.set for record in records for row in record.results.rows)
    for name in sets:
        rows = [(record, row) for record in records for row in record.results.rows if row.set == name]
        tiles = []
        for measure, title in words.items():
            found = [(headline(row).get(measure), record.name, row.embedder) for record, row in rows]
            ours = [(value, run) for value, run, embedder in found if embedder == FACESCALE and value is not None]
            pixels = [value for value, _, embedder in found if embedder == RAW_PIXELS and value is not None]
            if ours:
                value, run = max(ours, key=lambda pair: pair[0])
                beside = f"raw pixels {percent(pixels[0])}" if pixels else ""
                run = f"best: {run}" if len(records) > 1 else ""
                tiles.append({"title": title, "value": f"{100 * value:.1f}", "run": run, "beside": beside, "set": name})
        if tiles:
            return tiles
    return []


def _tables(records: Sequence[Record], section: str) -> list[Any]:
    made = {
        "verification": lambda: [points_table(records, "tar_at_far")],
        "identification": lambda: [points_table(records, "tpir_at_fpir"), identities_table(records)],
    }.get(section, list)()
    return [table for table in made if table is not None]


def _galleries(records: Sequence[Record]) -> list[dict[str, Any]]:
    found = []
    for name, title in GALLERIES.items():
        for record in records:
            if record.results.examples is not None:
                told = {"id": name, "title": title, "run": record.name if len(records) > 1 else ""}
                found.append(told | {"cards": cards(record, name), "caption": gallery_caption(record, name)})
    return found


def _policy(scripts: Sequence[str]) -> str:
    """Content-Security-Policy: these scripts and no other, styles and pictures out of the page, nothing from anywhere."""
    hashes = [b64encode(sha256(script.encode()).digest()).decode("ascii") for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    pictures = "img-src data: blob:"  # plotly saves a chart through a blob of its own
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; {pictures}; base-uri 'none'; form-action 'none'"


def _json(value: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _colours() -> str:
    """The palettes as CSS variables."""
    light, dark = (
        "".join(f"--c{number}: {colour}; " for number, colour in enumerate(colours)) for colours in (LIGHT, DARK)
    )
    return f':root {{ {light}}}\n:root[data-theme="dark"] {{ {dark}}}'


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")  # as a browser reads it, or its hash would differ
