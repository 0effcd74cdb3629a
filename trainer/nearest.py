"""The identities of a gallery that a picture is nearest to, and a contact sheet of them."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.evaluation.index import search
from trainer.network_inputs import Unreadable, network_input
from trainer.photos import Gallery

TILE, _MARGIN, _TEXT = 128, 12, 34
_SAME, _OTHER, _PLAIN, _INK = (0, 158, 115), (213, 94, 0), (150, 150, 150), (20, 20, 20)


class Found(NamedTuple):
    """An identity, by its picture that is nearest to the probe."""

    identity: str
    distance: float
    """Root L2 of unit vectors, in [0, 2]."""
    key: str
    """Path of the picture below the gallery's photographs."""


@dataclass(frozen=True)
class Answer:
    """What was found for one probe."""

    probe: Path
    nearest: Sequence[Found]
    """Of different identities, the nearest first."""


def nearest_identities(
    gallery: Gallery, probes: NDArray[np.float32], top: int, device: str = "cpu"
) -> list[list[Found]]:
    """For each probe the `top` nearest identities, each with its nearest picture; ties go to the picture that comes first.

    Args:
        gallery: n embedded pictures.
        probes: unit vectors, shape (p, d).
        top: at least 1; all identities where the gallery has fewer.
    """
    top, k = min(top, len(gallery.names)), min(4 * top, len(gallery.keys))
    answers: list[list[Found]] = []
    for probe in probes:
        while True:
            similarities, positions = search(gallery.embeddings, probe[None], k, device)
            order = positions[0].numpy()
            first = np.sort(np.unique(gallery.identities[order], return_index=True)[1])
            if len(first) >= top or k == len(gallery.keys):
                break
            k = min(4 * k, len(gallery.keys))  # one identity may have all the nearest pictures
        found = []
        for place in first[:top]:
            position = int(order[place])
            distance = max(0.0, 2 - 2 * float(similarities[0, place])) ** 0.5
            found.append(Found(gallery.names[gallery.identities[position]], distance, gallery.keys[position]))
        answers.append(found)
    return answers


def contact_sheet(answers: Sequence[Answer], photos: Path, threshold: float | None) -> Image.Image:
    """A row for each probe: itself, then the nearest identities with name and distance, framed green up to the threshold and
    orange beyond; grey where there is none.

    Args:
        photos: where the gallery's pictures lie; one that is gone leaves a grey square.
        threshold: root L2 distance.
    """
    columns = 1 + max(len(answer.nearest) for answer in answers)
    width, height = columns * (TILE + _MARGIN) + _MARGIN, len(answers) * (TILE + _TEXT + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    for row, answer in enumerate(answers):
        y = _MARGIN + row * (TILE + _TEXT + _MARGIN)
        _tile(sheet, _MARGIN, y, answer.probe, answer.probe.name, "searched for", _INK)
        for column, found in enumerate(answer.nearest, 1):
            colour = _PLAIN if threshold is None else _SAME if found.distance <= threshold else _OTHER
            x = _MARGIN + column * (TILE + _MARGIN)
            _tile(sheet, x, y, photos / found.key, found.identity, f"{found.distance:.3f}", colour)
    return sheet


def _tile(sheet: Image.Image, x: int, y: int, path: Path, name: str, below: str, colour: tuple[int, int, int]) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((x - 4, y - 4, x + TILE + 3, y + TILE + 3), fill=colour)
    try:
        sheet.paste(Image.fromarray(network_input(path, TILE)), (x, y))
    except Unreadable:
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=(230, 230, 230))
    font = ImageFont.load_default(13)
    draw.text((x, y + TILE + 5), _fitting(_drawable(name), font), _INK, font)
    draw.text((x, y + TILE + 19), below, _INK, font)


def _drawable(name: str) -> str:
    """The font has Latin letters: others lose their accents, or become question marks."""
    plain = unicodedata.normalize("NFKD", name)
    return "".join(letter for letter in plain if not unicodedata.combining(letter)).encode("ascii", "replace").decode()


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= TILE:
        return text
    while text and font.getlength(f"{text}…") > TILE:
        text = text[:-1]
    return f"{text}…"
