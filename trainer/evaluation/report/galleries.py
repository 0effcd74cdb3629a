"""The hardest pairs and the worst misses as pictures: cards for the page, and one figure of each kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from trainer.evaluation.examples import MISSED_RANK, Pair
from trainer.evaluation.report.records import Record
from trainer.evaluation.results import Results

GALLERIES = {
    "genuine_pairs": "Hardest genuine pairs",
    "impostor_pairs": "Hardest impostor pairs",
    "misses": f"Worst Rank-{MISSED_RANK} misses",
}
_FIGURE_CARDS, _FIGURE_COLUMNS = 12, 4


@dataclass(frozen=True)
class Side:
    """One picture of a card."""

    role: str
    identity: str
    key: str
    picture: bytes | None
    """JPEG."""


@dataclass(frozen=True)
class Card:
    text: str
    sides: list[Side]


def cards(record: Record, name: str) -> list[Card]:
    """The cards of one of `GALLERIES`, hardest first; none where the run has no examples."""
    found = record.results
    if found.examples is None:
        return []
    if name == "misses":
        return [
            Card(
                f"rank {miss.rank}; right at {miss.right_distance:.2f}, found at {miss.found_distance:.2f}",
                [
                    _side(found, miss.probe, "probe"),
                    _side(found, miss.right, "enrolled"),
                    _side(found, miss.found, "found first"),
                ],
            )
            for miss in found.examples.misses
        ]
    pairs: list[Pair] = getattr(found.examples, name.removesuffix("_pairs"))
    sides = [[_side(found, place, "") for place in (pair.first, pair.second)] for pair in pairs]
    return [Card(f"distance {pair.distance:.3f}", own) for pair, own in zip(pairs, sides, strict=True)]


def gallery_caption(record: Record, name: str) -> str:
    """What is shown, and out of how much."""
    examples = record.results.examples
    assert examples is not None
    judged = f"{examples.samples:,} images of {examples.identities:,} identities of {record.results.rows[0].set}"
    if name == "misses":
        share = f"{examples.missed:,} of {examples.probes:,} probes are missed"
        return f"Probes whose identity is not among the best {MISSED_RANK}, worst rank first: {share}; {judged}."
    if name == "genuine_pairs":
        return f"The most distant two images of one identity, of all pairs of {judged}; root L2 distance, 0 to 2."
    return f"The nearest two images of different identities, of all pairs of {judged}; root L2 distance, 0 to 2."


def gallery_figure(records: Sequence[Record], name: str) -> Figure | None:
    """The first cards of each run with matplotlib; None where there is none with a picture."""
    shown = [(record, _with_pictures(cards(record, name))) for record in records]
    shown = [(record, own) for record, own in shown if own]
    if not shown:
        return None
    columns = _FIGURE_COLUMNS if name != "misses" else 3
    rows = [-(-len(own) // columns) for _, own in shown]
    heights = [height for count in rows for height in (0.35, 1.75 * count)]  # a title and its cards, in inches
    figure = Figure(figsize=(10.5, sum(heights)), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (record, own), title, part, count in zip(shown, parts[::2], parts[1::2], rows, strict=True):
        words = f"{GALLERIES[name]}{f': {record.name}' if len(records) > 1 else ''}"
        title.text(0.5, 0.5, words.replace("$", r"\$"), ha="center", va="center", fontsize=12)
        for card, place in zip(own, part.subfigures(count, columns, squeeze=False).flat, strict=False):
            _draw_card(place, card)
    return figure


def _with_pictures(found: Sequence[Card]) -> list[Card]:
    return [card for card in found if all(side.picture for side in card.sides)][:_FIGURE_CARDS]


def _draw_card(part: SubFigure, card: Card) -> None:
    part.suptitle(card.text.replace("; ", "\n", 1), fontsize=7, y=0.98)
    for axes, side in zip(part.subplots(1, len(card.sides), squeeze=False).flat, card.sides, strict=True):
        axes.set_axis_off()
        assert side.picture is not None
        axes.imshow(np.asarray(Image.open(BytesIO(side.picture))))
        label = f"{side.role}\n{side.identity}" if side.role else side.identity
        axes.set_title(label.replace("$", r"\$"), fontsize=6, y=-0.32)
    part.subplots_adjust(left=0.04, right=0.96, top=0.82, bottom=0.2, wspace=0.06)


def _side(found: Results, place: int, role: str) -> Side:
    label = int(found.identities[place]) if found.identities is not None else -1
    key = found.keys.get(place, f"image {place}")
    return Side(role, found.names.get(label, str(label)), key, found.thumbnails.get(place))
