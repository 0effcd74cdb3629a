"""Small JPEGs of samples of a split, for the report."""

import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_shards.index import Split
from data_shards.reader import open_reader

SIDE = 64
"""Longest side in pixels."""
QUALITY = 80


def thumbnails(split: Split, samples: np.ndarray) -> list[bytes | None]:
    """A JPEG of each sample, its longest side 64 pixels at most; None where the picture does not decode.

    Args:
        split: where the samples lie.
        samples: rows of the split, shape (s,).
    Raises:
        ValueError: the index points outside a tar.
    """
    return [thumbnail(encoded.tobytes()) for encoded in open_reader(split).read(samples)]


def thumbnail(encoded: bytes) -> bytes | None:
    """The picture as it is looked at (turned as its EXIF says), as RGB, never enlarged; None where it does not decode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on metadata
            with Image.open(BytesIO(encoded)) as picture:
                picture.draft("RGB", (2 * SIDE, 2 * SIDE))
                turned = ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        return None
    turned.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = BytesIO()
    turned.save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()
