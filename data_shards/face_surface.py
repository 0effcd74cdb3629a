"""Geometry and brushes of the drawn faces: camera, ellipsoids, noise, antialiased polygons and lines.

Head coordinates: x to the image's right, y down, z to the viewer; the head's half height is 1.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from data_shards.face_model import Array, Colour, Image, View


class Camera:
    """Head coordinates -> view coordinates (turned by yaw and pitch, orthographic) -> pixels (rolled, scaled, moved)."""

    def __init__(self, view: View, size: int) -> None:
        cy, sy, cp, sp = np.cos(view.yaw), np.sin(view.yaw), np.cos(view.pitch), np.sin(view.pitch)
        turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        self.rotation = (np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ turn).astype(np.float32)
        self.scale = view.scale * size
        self.origin = np.array(view.centre) * size - 0.5
        self.cos, self.sin = float(np.cos(view.roll)), float(np.sin(view.roll))
        self.size = size

    def flat(self, points: Array) -> Array:
        """Head coordinates (n, 3) -> view coordinates (n, 2)."""
        return points @ self.rotation[:2].T

    def pixels(self, flat: Array) -> Array:
        """View coordinates (n, 2) -> pixels (n, 2), columns first."""
        x, y = flat[:, 0], flat[:, 1]
        rolled = np.stack([self.cos * x - self.sin * y, self.sin * x + self.cos * y], axis=1)
        return (rolled * self.scale + self.origin).astype(np.float32)

    def project(self, points: Array) -> Array:
        """Head coordinates (n, 3) -> pixels (n, 2)."""
        return self.pixels(self.flat(points))

    def grid(self) -> tuple[Array, Array]:
        """View coordinates of every pixel: x and y, each (size, size)."""
        steps = np.arange(self.size, dtype=np.float32)
        x = ((steps - self.origin[0]) / self.scale).astype(np.float32)[None, :]
        y = ((steps - self.origin[1]) / self.scale).astype(np.float32)[:, None]
        return self.cos * x + self.sin * y, self.cos * y - self.sin * x


@dataclass(frozen=True)
class Shell:
    """An ellipsoid shaped by a profile: the skull, or the hair's surface around it."""

    axes: tuple[float, float, float]
    profile: tuple[float, float, float]
    lift: float = 0.0  # y of its centre

    def factor(self, y: Array) -> Array:
        p0, p1, p2 = self.profile
        return np.clip(1 + y * (p0 + y * (p1 + y * p2)), 0.5, 1.5)

    def on(self, x: Array, y: Array, out: float | Array = 0.0) -> Array:
        """Points (n, 3) on the front surface at x, y, moved outwards by `out` along z."""
        f = self.factor(y)
        rest = 1 - (x / (self.axes[0] * f)) ** 2 - ((y - self.lift) / self.axes[1]) ** 2
        z = self.axes[2] * f * np.sqrt(np.maximum(rest, 0.02)) + out
        return np.stack([x, y, z], axis=1).astype(np.float32)

    def hit(self, camera: Camera, u: Array, v: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Where each pixel's ray meets the shell: x, y, z, profile factor, and pixels to the outline (inside: positive)."""
        m = camera.rotation
        o0, o1, o2 = (m[0, i] * u + m[1, i] * v for i in range(3))
        o1 = o1 - np.float32(self.lift)
        d0, d1, d2 = (float(m[2, i]) for i in range(3))
        a, b, c = self.axes
        f: Array = np.ones(1, np.float32)
        for _ in range(2):  # the profile varies slowly: a second pass places y to within a pixel
            g = 1 / (f * f)
            k0, k2 = g * np.float32(1 / a**2), g * np.float32(1 / c**2)
            qa = k0 * d0**2 + np.float32(d1**2 / b**2) + k2 * d2**2
            qb = k0 * o0 * d0 + o1 * np.float32(d1 / b**2) + k2 * o2 * d2
            qc = k0 * o0 * o0 + o1 * o1 * np.float32(1 / b**2) + k2 * o2 * o2 - 1
            inside = (qb * qb - qa * qc) / qa
            t = (np.sqrt(np.maximum(inside * qa, 0)) - qb) / qa
            f = self.factor(o1 + t * d1 + self.lift)
        edge = inside * np.float32(0.5 * a * camera.scale)
        return o0 + t * d0, o1 + t * d1 + np.float32(self.lift), o2 + t * d2, f, edge


@lru_cache(maxsize=1)
def noise_tile() -> tuple[Array, Array]:
    """A fixed grain (isotropic) and fixed strands (long in y), (256, 256), unit deviation; they wrap around."""
    raw = np.random.Generator(np.random.PCG64(7)).standard_normal((256, 256)).astype(np.float32)
    tiled = np.tile(raw, (3, 3))
    grain = cv2.GaussianBlur(tiled, (0, 0), 2.0)[256:512, 256:512]
    strands = cv2.GaussianBlur(tiled, (0, 0), sigmaX=1.5, sigmaY=24)[256:512, 256:512]
    return grain / grain.std(), strands / strands.std()


def sample(tile: Array, x: Array, y: Array) -> Array:
    """The tile at x, y in its pixels, repeated; OpenCV holds them in 16 bits, so they must stay within 32,767."""
    return np.asarray(cv2.remap(tile, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP), np.float32)


def blur(canvas: Image, deviation: float) -> Image:
    return np.asarray(cv2.GaussianBlur(canvas, (0, 0), deviation), np.uint8)


def fill(canvas: Image, pixels: Array, colour: Colour | NDArray) -> None:
    points = np.rint(pixels * 16).astype(np.int32)
    cv2.fillPoly(canvas, [points], tuple(float(c) for c in colour), cv2.LINE_AA, 4)


def draw_line(canvas: Image, pixels: Array, colour: Colour | NDArray, width: float) -> None:
    """A stroke `width` pixels wide; under one pixel it fades instead, as a thin line does."""
    points = np.rint(pixels * 16).astype(np.int32)
    thick = max(1, round(width))
    if width >= 1:
        cv2.polylines(canvas, [points], False, tuple(float(c) for c in colour), thick, cv2.LINE_AA, 4)
        return
    faint = canvas.copy()
    cv2.polylines(faint, [points], False, tuple(float(c) for c in colour), 1, cv2.LINE_AA, 4)
    cv2.addWeighted(faint, width, canvas, 1 - width, 0, dst=canvas)


def smooth_step(low: float, high: float, value: Array) -> Array:
    t = np.clip((value - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def shade(colour: Colour, by: float) -> NDArray:
    return np.clip(np.array(colour) * by, 0, 255)
