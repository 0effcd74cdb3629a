"""Augmentation parameters: a pure function of (seed, epoch, sample, visit), fed to DALI as data."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.counter_random import uniform
from data_shards.plan import Draws, Ints

Floats = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_AREA, _ASPECT, _LEFT, _TOP, _MIRROR, _BRIGHTNESS, _CONTRAST, _SATURATION, _GREYSCALE = range(100, 109)
_PURPOSES = np.arange(100, 109)[:, None]


@dataclass(kw_only=True, frozen=True)
class AugmentConfig:
    mirror: float = 0.5
    """Probability of a left-right mirror, in [0, 1]."""
    crop_area: tuple[float, float] = (0.6, 1.0)
    """Range of the random resized crop's area as a fraction of the largest square in the picture, in (0, 1]."""
    crop_aspect: tuple[float, float] = (0.85, 1.18)
    """Range of the crop's width over height, log-uniform, above 0."""
    brightness: float = 0.2
    """Brightness is scaled by a factor in [1 - this, 1 + this]; in [0, 1)."""
    contrast: float = 0.2
    """Contrast is scaled by a factor in [1 - this, 1 + this]; in [0, 1)."""
    saturation: float = 0.2
    """Saturation is scaled by a factor in [1 - this, 1 + this]; in [0, 1)."""
    greyscale: float = 0.02
    """Probability that the colour is taken away, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("mirror", "greyscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; a probability lies in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; allowed is [0, 1)")
        for name, most in (("crop_area", 1.0), ("crop_aspect", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise ValueError(f"augment.{name} is {low} {high}; allowed is 0 < low <= high <= {most}")


class Augmentation(NamedTuple):
    """Parameters of n samples, in the order in which the decoder takes them."""

    anchor: Floats
    """Left and top of the crop as fractions of width and height, shape (n, 2)."""
    shape: Floats
    """Width and height of the crop as fractions of width and height, shape (n, 2)."""
    mirror: NDArray[np.int32]
    """1 mirrors left and right, shape (n,)."""
    brightness: Floats
    contrast: Floats
    saturation: Floats
    """Factors, shape (n,); saturation 0 is greyscale."""


def central_square(width: Ints, height: Ints) -> Augmentation:
    """What evaluation uses: the largest central square, no mirror, colours as they are. Sizes in pixels, shape (n,)."""
    size = np.stack([width, height], 1)
    shape = size.min(1, keepdims=True) / size
    one = np.ones(len(size), np.float32)
    return Augmentation(_f32((1 - shape) / 2), _f32(shape), np.zeros(len(size), np.int32), one, one, one)


def augment(config: AugmentConfig, seed: int, draws: Draws, width: Ints, height: Ints) -> Augmentation:
    """Parameters of `draws`, whose pictures have these sizes in pixels, shape (b,)."""

    drawn = uniform(
        seed, _PURPOSES, draws.epoch, draws.samples, draws.visits
    )  # (purposes, b): one call, for small batches
    u = dict(zip(_PURPOSES.flatten().tolist(), drawn, strict=True))

    def factor(purpose: int, spread: float) -> NDArray[np.float64]:
        return 1 + spread * (2 * u[purpose] - 1)

    size = np.stack([width, height], 1)
    area = size.min(1) ** 2 * (config.crop_area[0] + (config.crop_area[1] - config.crop_area[0]) * u[_AREA])
    low, high = np.log(config.crop_aspect)
    aspect = np.exp(low + (high - low) * u[_ASPECT])
    crop = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)], 1)  # (b, 2) pixels
    shape = np.clip(crop, 1, size) / size  # a crop under one pixel can be empty, which kills DALI's pipeline
    anchor = (1 - shape) * np.stack([u[_LEFT], u[_TOP]], 1)
    saturation = np.where(u[_GREYSCALE] < config.greyscale, 0, factor(_SATURATION, config.saturation))
    return Augmentation(
        _f32(anchor),
        _f32(shape),
        (u[_MIRROR] < config.mirror).astype(np.int32),
        _f32(factor(_BRIGHTNESS, config.brightness)),
        _f32(factor(_CONTRAST, config.contrast)),
        _f32(saturation),
    )


def colour_matrices(parameters: Augmentation) -> Floats:
    """What brightness, contrast and saturation do to (r, g, b, 1) in [0, 255]; the product is then cut to [0, 255].

    Saturation scales the distance from the pixel's luma (ITU-R BT.601), then contrast that from 128, then brightness all,
    as DALI's `color_twist` has it.

    Returns:
        Shape (n, 3, 4).
    """
    factor = parameters.brightness * parameters.contrast
    matrices = np.empty((len(factor), 3, 4), np.float32)
    matrices[:, :, :3] = ((1 - parameters.saturation) * factor)[:, None, None] * _LUMA
    matrices[:, range(3), range(3)] += (parameters.saturation * factor)[:, None]
    matrices[:, :, 3] = (128 * (1 - parameters.contrast) * parameters.brightness)[:, None]
    return matrices


def _f32(values: NDArray[np.float64]) -> Floats:
    return values.astype(np.float32)
