"""One encoded picture: does it decode completely, and how large is it."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535
"""Pixels: the index keeps width and height in 16 bits."""
SWAPS_SIDES = (5, 6, 7, 8)
"""EXIF orientations that turn a picture by a quarter. DALI applies them, so a picture's width is that after it."""

_EXIF_ORIENTATION = 0x0112
_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "pgm": "PPM", "bmp": "BMP", "webp": "WEBP"}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PGM_HEADER = re.compile(rb"P[25](?:\s+(?:#[^\r\n]*\s+)*(\d+)){3}")
_BMP_INFO_HEADER = 40
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_END = b"\xff\xd9"
_JPEG_TAIL = 65_536
"""Bytes at the end of a JPEG in which its end marker is looked for: some cameras append data."""


class Refused(ValueError):
    """A picture that could be decoded, but that we do not take; the message is the reason."""


def inspect_image(data: bytes, extension: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Decodes a picture completely; returns its width and height as displayed, that is after EXIF orientation.

    Taken is what DALI's decoder takes: any colour mode, CMYK and 16-bit grey PNG or PGM too, the first frame of an
    animation. Refused is what Pillow takes but DALI does not: a PNG cut inside its last chunk, a 16-bit BMP, a WebP with
    EXIF behind a chunk of odd length; and a PGM that DALI would not scale to the full range.

    Args:
        data: the encoded picture.
        extension: jpg, png, pgm, bmp or webp, by content.
        max_pixels: width times height above which a picture is refused before it is decoded.
    Raises:
        ValueError: it does not decode or is refused; the message is the reason.
    """
    return _inspect(data, extension, max_pixels, whole=True)


def probe_image(data: bytes, extension: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """As `inspect_image`, but looks at the header and, of a JPEG, at the end only; what is damaged between is not found."""
    if extension != "jpg" or b"Exif" in data[:4096]:
        return _inspect(data, extension, max_pixels, whole=False)
    width, height = _jpeg_size(data)
    _refuse_size(width, height, max_pixels)
    if data.rfind(_JPEG_END, -_JPEG_TAIL) < 0:
        raise ValueError("is cut short: it has no end-of-image marker")
    return width, height


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silences Pillow's warnings and its own pixel limit, for `inspect_image` has one."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _inspect(data: bytes, extension: str, max_pixels: int, whole: bool) -> tuple[int, int]:
    if extension not in _PIL_FORMATS:
        raise Refused(f"has the extension {extension!r}: allowed are {', '.join(_PIL_FORMATS)}")
    _refuse_what_stops_dali(data, extension)
    try:
        with Image.open(io.BytesIO(data), formats=(_PIL_FORMATS[extension],)) as image:
            width, height = image.size
            _refuse_size(width, height, max_pixels)
            if whole:
                if image.format == "JPEG":  # every bit of it is read, an eighth of its sides computed: 30 % faster
                    image.draft("L", (1, 1))
                image.load()
            return (height, width) if _orientation(image) in SWAPS_SIDES else (width, height)
    except Refused:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds: SyntaxError, struct.error, IndexError, …
        reason = re.sub(r"<.*>", "the data", str(error))  # an object's address differs per run
        raise ValueError(f"does not decode as {_PIL_FORMATS[extension]}: {reason or type(error).__name__}") from None


def _refuse_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise Refused(f"is {width} x {height} pixels: allowed are {max_pixels:,} and {MAX_SIDE:,} a side")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height in a JPEG's first frame header (ITU T.81, B.2.2)."""
    at = 2
    try:
        while True:
            if data[at] != 0xFF:
                raise ValueError("does not decode as JPEG: no marker where one must be")
            marker = data[at + 1]
            if marker in _FRAME_HEADERS:
                size = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
                if 0 in size:
                    raise ValueError("does not decode as JPEG: it has no width or height")
                return size
            at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    except IndexError:
        raise ValueError("is cut short: it has no frame header") from None


def _refuse_what_stops_dali(data: bytes, extension: str) -> None:
    if extension == "png" and _PNG_END not in data:
        raise Refused("is cut short: its IEND chunk is missing or damaged")
    if extension == "bmp" and len(data) > 30:
        header, bits = int.from_bytes(data[14:18], "little"), int.from_bytes(data[28:30], "little")
        if header >= _BMP_INFO_HEADER and bits == 16:
            raise Refused("is a BMP of 16 bits per pixel, which DALI does not decode")
    if extension == "pgm" and (header_match := _PGM_HEADER.match(data)) and int(header_match[1]) not in (255, 65_535):
        raise Refused(f"is a PGM with maximum {int(header_match[1])}: allowed are 255 and 65535")
    if extension == "webp" and _exif_behind_odd_chunk(data):
        raise Refused("is a WebP with EXIF behind a chunk of odd length, which DALI does not decode")


def _exif_behind_odd_chunk(data: bytes) -> bool:
    """Chunks of odd length are padded by a byte (RIFF), which DALI does not skip on its way to the orientation."""
    at, odd = 12, False
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"EXIF":
            return odd
        odd = odd or size % 2 == 1
        at += 8 + size + size % 2
    return False


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data must not cost a picture that decodes
        return 1
