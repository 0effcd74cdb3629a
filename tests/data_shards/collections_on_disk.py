"""Small collections of pictures for the conversion's tests."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ORL = Path(__file__).resolve().parents[3] / "shared" / "data" / "orl_faces"
needs_orl = pytest.mark.skipif(not ORL.is_dir(), reason=f"the ORL faces are not at {ORL}")
PIL_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".pgm": "PPM", ".bmp": "BMP", ".webp": "WEBP"}


def encoded(number: int, extension: str = ".jpg", size: tuple[int, int] = (24, 16), mode: str = "L") -> bytes:
    """A picture of width x height that differs for each number."""
    rows, columns = np.indices((size[1], size[0]))
    image = Image.fromarray(((rows * 7 + columns * 3 + number * 29) % 256).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, PIL_FORMATS[extension])
    return buffer.getvalue()


def draw_collection(root: Path, counts: dict[str, int], extension: str = ".jpg") -> Path:
    """`root`/identity/000.jpg, 001.jpg, … with so many pictures for each identity."""
    for identity, count in counts.items():
        (root / identity).mkdir(parents=True)
        for number in range(count):
            path = root / identity / f"{number:03d}{extension}"
            path.write_bytes(encoded(number_of(identity) + number, extension))
    return root


def number_of(name: str) -> int:
    return sum(os.fsencode(name)) * 31


def every_file(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
