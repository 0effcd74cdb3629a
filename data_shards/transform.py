"""One encoded picture into another: made smaller, cropped to its face or aligned by it, encoded again. Only if asked for."""

import io
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_shards.pictures import MAX_PIXELS, MAX_SIDE, Refused, quiet_pillow

Crop = Literal["none", "box", "align"]
Format = Literal["jpg", "png", "webp", "keep"]

DEFAULT_MARGIN = 1.3
DEFAULT_QUALITY = 95
ALIGNED_SIZE = 112
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
"""ArcFace's places of the eye on the left, that on the right, the nose and the mouth's corners in 112 x 112 pixels,
whole numbers at pixel centres, shape (5, 2) as (x, y). Source: Deng et al. 2019, insightface's `arcface_dst`."""

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "pgm": "PPM", "bmp": "BMP", "webp": "WEBP"}
_GREY = ("1", "L", "LA", "La")
_LARGEST_MARGIN = 10.0
_SMALLEST_SPREAD = 1.0
"""Pixels, root mean square distance of the landmarks from their centre."""
_LEAST_CORRELATION = 0.5
"""Of landmarks with the template: a mirrored face has 0.22, five points on the vertical of a profile 0.78."""
_REDUCING_GAP = 3.0
"""Pictures are averaged over whole pixels to this many times the wanted size before Lanczos; no difference can be seen."""


@dataclass(kw_only=True, frozen=True)
class TransformConfig:
    """With any of them set, every picture is encoded again, also one that is small enough, and loses its metadata."""

    shortest_edge: int | None = None
    """Pixels: pictures, or the crops of `crop` "box", whose shorter side is longer are shrunk to it; none is enlarged."""
    crop: Crop = "none"
    """box: to the face's box. align: turned, scaled and shifted so that five landmarks lie as in ArcFace's template."""
    box_margin: float = DEFAULT_MARGIN
    """Factor by which the box's sides grow about its centre; 1.3 as VGGFace2's authors do."""
    size: int | tuple[int, int] | None = None
    """Pixels, a side or (width, height): cropped pictures get exactly it, small ones are enlarged. None: a box's crop keeps
    its pixels, an aligned picture is 112 x 112."""
    quality: int = DEFAULT_QUALITY
    """1 to 100, of JPEG and WebP, where pictures are encoded again."""
    format: Format = "keep"
    """What pictures are encoded as; WebP is lossy."""

    def __post_init__(self) -> None:
        for name, allowed in (("crop", get_args(Crop)), ("format", get_args(Format))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        sides = (self.size,) if isinstance(self.size, int) else self.size or ()
        if self.size is not None and not isinstance(self.size, int) and len(sides) != 2:
            raise ValueError(f"size is {self.size}; it must be one side or a width and a height")
        for name, value in (("shortest_edge", self.shortest_edge), *(("size", side) for side in sides)):
            if value is not None and not 1 <= value <= MAX_SIDE:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 to {MAX_SIDE} pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it must be 1 to 100")
        if not 0 < self.box_margin <= _LARGEST_MARGIN:
            raise ValueError(f"box_margin is {self.box_margin}; it must be above 0 and at most {_LARGEST_MARGIN:g}")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if math.prod(self.output_size or ()) > MAX_PIXELS:
            raise ValueError(f"size is {self.size}; it must be at most {MAX_PIXELS:,} pixels")
        if self.size is not None and self.crop == "none":
            raise ValueError(
                f"size is {self.size} with crop 'none'; it needs crop 'box' or 'align' (or use shortest_edge)"
            )
        if self.shortest_edge is not None and (self.size is not None or self.crop == "align"):
            raise ValueError(
                f"shortest_edge is {self.shortest_edge} with crop {self.crop!r}, size {self.size}; give one"
            )
        if self.box_margin != DEFAULT_MARGIN and self.crop != "box":
            raise ValueError(f"box_margin is {self.box_margin} with crop {self.crop!r}; it needs crop 'box'")
        if self.quality != DEFAULT_QUALITY and not self.changes_bytes:
            raise ValueError(f"quality is {self.quality}, but nothing is encoded again; give a format, size or crop")

    @property
    def changes_bytes(self) -> bool:
        """Whether pictures do not go into the shards as they are."""
        return self.shortest_edge is not None or self.crop != "none" or self.format != "keep"

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Width and height that every picture gets; None: its own."""
        if self.size is None:
            return (ALIGNED_SIZE, ALIGNED_SIZE) if self.crop == "align" else None
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def extension(self, extension: str) -> str:
        """What a picture with this extension gets."""
        return extension if self.format == "keep" else self.format


def transform(
    data: bytes, extension: str, config: TransformConfig, region: NDArray[np.float32] | None = None
) -> tuple[bytes, str, int, int]:
    """A picture as `config` asks for it: its bytes, extension, width and height.

    The result has no metadata and no colour profile, 8 bits a channel, EXIF's orientation applied. Grey stays grey, all else
    becomes RGB; alpha is dropped. Equal bytes in give equal bytes out with the same libraries on the same kind of machine:
    all pixels are computed by Pillow, in one thread. The caller has compared the size with its limit.

    Args:
        data: the encoded picture; the first frame of an animation is taken.
        extension: jpg, png, pgm, bmp or webp, by content.
        region: for crop "box" x, y, width, height in pixels, shape (4,); for "align" the landmarks of `TEMPLATE` as x1, y1,
            x2, …, shape (10,). In the picture as displayed, that is after EXIF orientation, from the top left. None: unknown.
    Raises:
        ValueError: it does not decode, its region is missing or makes no sense; the message is the reason.
    """
    if region is None and config.crop != "none":
        raise ValueError(f"has no {'box' if config.crop == 'box' else 'landmarks'} in the region files")
    with quiet_pillow():
        image = decoded(data, extension)
        if region is not None:
            image = _cropped(image, np.asarray(region, np.float64), config)
        if config.shortest_edge is not None:
            image = _shrink(image, config.shortest_edge)
        extension = config.extension(extension)
        return encoded(image, extension, config.quality), extension, *image.size


def decoded(
    data: bytes, extension: str, draft: tuple[int, int] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """A picture in mode L or RGB, as displayed, with nothing of its metadata.

    Args:
        draft: a JPEG may be decoded smaller, but not below this size, and to grey.
        max_pixels: width times height above which it is refused before it is decoded; None: the caller has looked.
    Raises:
        ValueError: it does not decode or is refused; the message is the reason.
    """
    name = _PIL_FORMATS[extension]
    try:
        with Image.open(io.BytesIO(data), formats=(name,)) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise Refused(f"is {image.width} x {image.height} pixels: allowed are {max_pixels:,}")
            if draft is not None:
                image.draft("L", draft)
            image.load()
            orientation = _orientation(image)
            plain = _eight_bits(image)
    except Refused:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds: SyntaxError, struct.error, IndexError, …
        reason = re.sub(r"<.*>", "the data", str(error))  # an object's address differs per run
        raise ValueError(f"does not decode as {name}: {reason or type(error).__name__}") from None
    if orientation in _TURNS:
        plain = plain.transpose(_TURNS[orientation])
    plain.info = {}
    return plain


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65_535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    return image.convert("L" if image.mode in _GREY else "RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF data must not cost a picture that decodes
        return 1


def box_to_crop(
    box: NDArray[np.float64], margin: float, picture: tuple[int, int], aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """The pixels to crop to: left, top, right, bottom, the last two exclusive; some may lie outside the picture.

    The smallest crop of that aspect that holds the box, about the box's centre, its sides times `margin`. Where it would
    leave the picture, it is shifted back; where it is larger than the picture, it holds all of that, and more.

    Args:
        box: x, y, width, height in pixels; it may stick out of the picture.
        picture: its width and height.
        aspect: width by height of the crop.
    Raises:
        ValueError: the box lies outside the picture, is far larger than it, or is no box.
    Example: box 40, 30, 20, 10 in 100 x 100, margin 1.5 -> side 30 about (50, 35) -> 35, 20, 65, 50.
    """
    x, y, width, height = box.tolist()
    shown = f"{width:g} x {height:g} at {x:g}, {y:g}"
    if not (math.isfinite(x + y + width + height) and width > 0 and height > 0):
        raise ValueError(f"has a box of {shown}")
    inside = x < picture[0] and y < picture[1] and x + width > 0 and y + height > 0
    if not inside or max(width, height) > 2 * max(picture):
        raise ValueError(f"has a box of {shown}, which does not fit its {picture[0]} x {picture[1]} pixels")
    wide = max(width, height * aspect) * margin
    sides = max(1, _nearest(wide)), max(1, _nearest(wide / aspect))
    if sides[0] * sides[1] > MAX_PIXELS or max(sides) > MAX_SIDE:
        raise ValueError(f"has a box whose crop would be {sides[0]} x {sides[1]} pixels")
    left, top = (
        _shifted_back(_nearest(start + length / 2 - side / 2), side, available)
        for start, length, side, available in zip((x, y), (width, height), sides, picture, strict=True)
    )
    return left, top, left + sides[0], top + sides[1]


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _shifted_back(start: int, side: int, available: int) -> int:
    room = available - side
    return min(max(start, min(room, 0)), max(room, 0))


def _cropped(image: Image.Image, region: NDArray[np.float64], config: TransformConfig) -> Image.Image:
    """What of the crop lies outside the picture is black."""
    size = config.output_size
    if config.crop == "align":
        assert size is not None
        return align(image, region.reshape(5, 2), size)
    if config.crop == "box":
        image = image.crop(box_to_crop(region, config.box_margin, image.size, size[0] / size[1] if size else 1.0))
    return _resized(image, size) if size else image


def _shrink(image: Image.Image, shortest_edge: int) -> Image.Image:
    short, long = sorted(image.size)
    if short <= shortest_edge:
        return image
    other = (2 * long * shortest_edge + short) // (2 * short)
    return _resized(image, (shortest_edge, other) if image.width <= image.height else (other, shortest_edge))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)


def similarity(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation, scale and shift, without reflection, that bring points nearest to others in the least squares.

    As x + iy a similarity is w = a z + b, so the least squares have a closed form.

    Args:
        source: (n, 2) points as (x, y).
        target: (n, 2) where they should come to lie.
    Returns:
        (2, 3) matrix M: target is near M[:, :2] @ source + M[:, 2].
    Raises:
        ValueError: the points all but coincide, or lie quite differently from the target (mirrored, in another order).
    Source: Umeyama 1991, which in the plane is this.
    """
    z, w = source[:, 0] + 1j * source[:, 1], target[:, 0] + 1j * target[:, 1]
    middle, target_middle = z.mean(), w.mean()
    z, w = z - middle, w - target_middle
    spread, target_spread = float((abs(z) ** 2).sum()), float((abs(w) ** 2).sum())
    if not spread >= len(z) * _SMALLEST_SPREAD**2:
        raise ValueError("has landmarks that all lie in one point")
    product = (z.conj() * w).sum()
    if not abs(product) >= _LEAST_CORRELATION * math.sqrt(spread * target_spread):
        raise ValueError(
            "has landmarks that lie unlike a face's: eyes, nose, corners of the mouth, the picture's left first"
        )
    a = product / spread
    b = target_middle - a * middle
    return np.array([(a.real, -a.imag, b.real), (a.imag, a.real, b.imag)])


def template_for(size: tuple[int, int]) -> NDArray[np.float64]:
    """`TEMPLATE` for pictures of width x height: times height / 112, in the middle of the width; shape (5, 2).

    Example: 96 x 112, a size in use before 112 x 112, has it 8 pixels further left.
    """
    scale = size[1] / ALIGNED_SIZE
    return TEMPLATE * scale + ((size[0] - size[1]) / 2, 0.0)


def align(image: Image.Image, landmarks: NDArray[np.float64], size: tuple[int, int]) -> Image.Image:
    """A picture turned, scaled and shifted so that its landmarks lie as in the template; black where there is none of it.

    Args:
        landmarks: in `TEMPLATE`'s order, whole numbers at pixel centres, shape (5, 2).
        size: width and height of the result.
    Raises:
        ValueError: no similarity fits, or they lie far outside the picture.
    """
    sides = np.array(image.size)
    if not ((landmarks >= -sides) & (landmarks <= 2 * sides)).all():
        raise ValueError(f"has landmarks outside its {image.width} x {image.height} pixels")
    return moved(image, similarity(landmarks, template_for(size)), size)


def moved(image: Image.Image, matrix: NDArray[np.float64], size: tuple[int, int]) -> Image.Image:
    """What a similarity makes of a picture; black where there is none of it.

    Args:
        matrix: of `similarity`, from the picture's pixels to the result's, whole numbers at pixel centres.
        size: width and height of the result.
    """
    scale = math.hypot(*matrix[:, 0])
    back = matrix[:, :2].T / scale**2
    shift = 0.5 - (back * (matrix[:, 2] + 0.5)).sum(axis=1)  # Pillow counts from the pixels' edges
    factor = max(1, int(1 / scale))
    image = image.reduce(factor)  # averaged, or the bilinear samples would skip pixels
    inverse = np.column_stack([back, shift]) / factor
    return image.transform(size, Image.Transform.AFFINE, inverse.ravel().tolist(), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, extension: str, quality: int = DEFAULT_QUALITY) -> bytes:
    """A picture as a file's bytes, without metadata.

    Raises:
        ValueError: this format does not take it; the message is the reason.
    """
    options: dict[str, dict[str, Any]] = {
        "jpg": {"quality": quality, "subsampling": "4:2:0"},
        "png": {"compress_level": 6},
        "webp": {"quality": quality, "method": 4},
    }
    buffer = io.BytesIO()
    try:
        image.save(buffer, _PIL_FORMATS[extension], **options.get(extension, {}))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be encoded as {extension} of {image.width} x {image.height}: {error}") from None
    return buffer.getvalue()
