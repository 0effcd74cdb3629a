"""Draws one face: an `Identity` (what the person fixes) seen in a `View` (what the image varies).

Head coordinates: x to the image's right, y down, z to the viewer; the head's half height is 1. The head is an
ellipsoid whose width follows a cubic in y. Every pixel's ray is intersected with it, so that skin, hair and shading move
in 3-D, and the outlines of eyes, brows, nose and mouth are projected from points on the same surface.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Image = NDArray[np.uint8]
Colour = tuple[float, float, float]  # RGB, 0 to 255


@dataclass(frozen=True)
class Identity:
    """Everything that a person fixes. Lengths in half head heights, angles in radians, colours RGB 0-255."""

    number: int
    width: float
    depth: float
    profile: tuple[float, float, float]  # width factor at height y: 1 + p0 y + p1 y^2 + p2 y^3
    skin: Colour
    blush: float
    gloss: float
    age: float  # how deep folds and lines are
    freckles: tuple[tuple[float, float, float], ...]  # x, y, radius
    moles: tuple[tuple[float, float, float], ...]  # x, y, radius
    eye: tuple[float, float, float, float, float]  # half distance, height y, half width, half opening, tilt
    iris: Colour
    iris_radius: float
    crease: float  # distance of the lid's fold above the eye
    socket: float  # how deep and dark the sockets are
    bags: float
    brow: tuple[float, float, float, float, float]  # gap above the eye, half length, thickness, arch, slope
    brow_colour: Colour
    nose: tuple[float, float, float, float, float]  # tip y, half width, protrusion, bridge width, tip size
    mouth: tuple[float, float, float, float, float]  # height y, half width, upper lip, lower lip, cupid's bow
    lips: Colour
    chin: tuple[float, float]  # size, cleft
    cheekbone: float
    ear: tuple[float, float, float]  # height, stand-off, height y
    hair: Colour
    hair_volume: tuple[float, float]  # at the top, at the sides
    hairline: tuple[float, float, float, float]  # y in front, at the sideburns, behind the ears; angle of the temple
    fringe: tuple[float, float, float, float]  # slope, waves' amplitude, waves' frequency, widow's peak
    curl: float
    streaks: float
    hair_length: float  # y to which hair hangs behind the head; under 0.6: none hangs
    parting: float  # angle; beyond 1: none
    beard: tuple[float, float, float, float]  # cheeks and jaw, chin, moustache, height of its upper edge
    beard_colour: Colour


@dataclass(frozen=True)
class View:
    """Everything that an image varies. Angles in radians, lengths as parts of the picture's side, colours RGB 0-255."""

    yaw: float
    pitch: float
    roll: float
    scale: float  # half head height
    centre: tuple[float, float]
    smile: float
    open: float
    blink: float
    brows: float
    gaze: tuple[float, float]
    light: tuple[float, float, float]  # unit vector towards the lamp
    key: Colour  # gain of the lamp by channel, about 1
    ambient: Colour
    gamma: float
    saturation: float
    clothes: Colour
    occluder: str  # one of OCCLUDERS, or ""
    occluder_at: tuple[float, float, float]  # each in [0, 1]; what they move depends on the occluder
    occluder_colour: Colour
    blur: float  # standard deviation, parts of the side
    motion: tuple[float, float]  # length as a part of the side, angle
    noise: float  # standard deviation, grey levels
    quality: int  # JPEG
    texture_seed: int  # background and pixel noise


OCCLUDERS = ("sunglasses", "glasses", "cap", "scarf", "hand", "bar")


class _Camera:
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
class _Shell:
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

    def hit(self, camera: _Camera, u: Array, v: Array) -> tuple[Array, Array, Array, Array, Array]:
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
def _noise_tile() -> tuple[Array, Array]:
    """A fixed grain (isotropic) and fixed strands (long in y), (256, 256), unit deviation; they wrap around."""
    raw = np.random.Generator(np.random.PCG64(7)).standard_normal((256, 256)).astype(np.float32)
    tiled = np.tile(raw, (3, 3))
    grain = cv2.GaussianBlur(tiled, (0, 0), 2.0)[256:512, 256:512]
    strands = cv2.GaussianBlur(tiled, (0, 0), sigmaX=1.5, sigmaY=24)[256:512, 256:512]
    return grain / grain.std(), strands / strands.std()


def _sample(tile: Array, x: Array, y: Array) -> Array:
    """The tile at x, y in its pixels, repeated; OpenCV holds them in 16 bits, so they must stay within 32,767."""
    return np.asarray(cv2.remap(tile, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP), np.float32)


def _blur(canvas: Image, deviation: float) -> Image:
    return np.asarray(cv2.GaussianBlur(canvas, (0, 0), deviation), np.uint8)


def _fill(canvas: Image, pixels: Array, colour: Colour | NDArray) -> None:
    points = np.rint(pixels * 16).astype(np.int32)
    cv2.fillPoly(canvas, [points], tuple(float(c) for c in colour), cv2.LINE_AA, 4)


def _line(canvas: Image, pixels: Array, colour: Colour | NDArray, width: float) -> None:
    """A stroke `width` pixels wide; under one pixel it fades instead, as a thin line does."""
    points = np.rint(pixels * 16).astype(np.int32)
    thick = max(1, round(width))
    if width >= 1:
        cv2.polylines(canvas, [points], False, tuple(float(c) for c in colour), thick, cv2.LINE_AA, 4)
        return
    faint = canvas.copy()
    cv2.polylines(faint, [points], False, tuple(float(c) for c in colour), 1, cv2.LINE_AA, 4)
    cv2.addWeighted(faint, width, canvas, 1 - width, 0, dst=canvas)


def _step(low: float, high: float, value: Array) -> Array:
    t = np.clip((value - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def _shade(colour: Colour, by: float) -> NDArray:
    return np.clip(np.array(colour) * by, 0, 255)


class _Face:
    """One picture in the making."""

    def __init__(self, who: Identity, view: View, size: int) -> None:
        self.who, self.view, self.size = who, view, size
        self.camera = _Camera(view, size)
        self.rng = np.random.Generator(np.random.PCG64(view.texture_seed))
        self.skull = _Shell((who.width, 1.0, who.depth), who.profile)
        self.u, self.v = self.camera.grid()
        self.unit = self.camera.scale  # pixels per half head height
        self.key, self.ambient = np.array(view.key, np.float32), np.array(view.ambient, np.float32)

    def paint(self) -> Image:
        """The finished picture, (size, size, 3) RGB."""
        canvas = self._background()
        self._behind(canvas)
        face, mask = self._skin()
        self._features(face)
        face = _blur(face, max(0.3, 0.008 * self.unit))
        lit = face.astype(np.float32) * self._lighting()
        picture = canvas.astype(np.float32)
        picture += (lit - picture) * mask[..., None]
        self._hair(picture)
        return self._develop(self._occlude(picture))

    # -- around the face

    def _background(self) -> Image:
        rng, size = self.rng, self.size
        cells = int(rng.integers(2, 9))
        coarse = self._dull(rng.uniform(20, 235) + rng.normal(0, 1, (cells, cells, 3)) * rng.uniform(10, 60))
        smooth = cv2.resize(coarse.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        canvas = np.clip(smooth, 0, 255).astype(np.uint8)
        for _ in range(int(rng.integers(0, 6))):
            corners = (rng.uniform(-0.2, 1.2, (1, 2)) + rng.normal(0, 0.25, (4, 2))) * size
            hull = np.asarray(cv2.convexHull(corners.astype(np.float32))[:, 0], np.float32)
            _fill(canvas, hull, self._dull(rng.uniform(10, 245, 3)))
        return _blur(canvas, rng.uniform(0.004, 0.03) * size)

    def _dull(self, colours: NDArray) -> NDArray:
        """Draws colours towards grey, as walls and gardens are."""
        grey = colours.mean(axis=-1, keepdims=True)
        return np.clip(grey + (colours - grey) * self.rng.uniform(0.1, 0.8), 0, 255)

    def _flat_light(self, normal: tuple[float, float, float]) -> NDArray:
        """Light on a whole part that is shaded as one: gain by channel."""
        lamp = max(0.0, float(np.dot(normal, self.view.light)))
        return self.ambient + self.key * lamp

    def _behind(self, canvas: Image) -> None:
        who, light = self.who, self._flat_light((0, -0.2, 0.8))
        if who.hair_length > 0.6:
            t = np.linspace(0, 2 * np.pi, 48, dtype=np.float32)
            middle, half = (who.hair_length - 0.9) / 2, (who.hair_length + 0.9) / 2
            wave = 1 + 0.05 * who.curl * np.sin(11 * t)
            x = (who.width + 1.3 * who.hair_volume[1]) * np.sign(np.cos(t)) * np.abs(np.cos(t)) ** 0.6 * wave
            back = np.stack([x, middle + half * np.sin(t), np.full_like(t, -0.3)], axis=1)
            _fill(canvas, self.camera.project(back), _shade(who.hair, 0.75) * light)
        neck = 0.62 * who.width
        column = np.array([[-neck, 0.3], [neck, 0.3], [neck * 1.05, 1.7], [-neck * 1.05, 1.7]], np.float32)
        foot = self.camera.flat(np.array([[0, 1.0, -0.25]], np.float32))[0] - (0, 1.0)
        _fill(canvas, self.camera.pixels(column + foot), _shade(who.skin, 0.78) * light)
        s = np.linspace(-1, 1, 24, dtype=np.float32)
        collar = np.stack([1.9 * s, 1.42 + 0.35 * s**4 - 0.22 * np.exp(-((np.abs(s) - 0.3) ** 2) * 30)], axis=1)
        shirt = np.concatenate([collar, [[2.2, 4.0], [-2.2, 4.0]]]).astype(np.float32) + foot
        _fill(canvas, self.camera.pixels(shirt), np.array(self.view.clothes) * light)
        self._far_hair(canvas)
        self._ears(canvas)

    def _far_hair(self, canvas: Image) -> None:
        """The hair's far side, which shows between the near side and the skull."""
        who = self.who
        top, sides = who.hair_volume
        shell = _Shell((who.width + sides, 1 + top, who.depth + sides), who.profile, -0.02)
        self.hair_hit = shell.hit(self.camera, self.u, self.v)
        _, y, _, _, edge = self.hair_hit
        end = who.hairline[2] if who.hair_length else min(who.hairline[1] + 0.3, who.hairline[2])
        thin = (sides + 0.02) * self.unit * (1 - _step(0.0, 0.4, end - y))
        cover = np.clip(edge - thin + 0.5, 0, 1) * _step(-0.03, 0.03, end - y)
        if who.hairline[0] < -0.8:
            cover = cover * _step(-0.1, 0.1, y + 0.3)
        colour = _shade(who.hair, 0.6) * self._flat_light((0, -0.3, 0.6))
        canvas[:] = (canvas + (colour.astype(np.float32) - canvas) * cover[..., None]).clip(0, 255).astype(np.uint8)

    def _ears(self, canvas: Image) -> None:
        who = self.who
        height, stand, y = who.ear
        t = np.linspace(0, 2 * np.pi, 20, dtype=np.float32)
        for side in (-1, 1):
            root = who.width * float(self.skull.factor(np.array(y))) * 0.97
            out = side * (root + stand * (0.5 - 0.5 * np.cos(t + 0.3)))
            ear = np.stack([out, y + height * np.sin(t), -0.12 - 0.25 * height * np.cos(t)], axis=1).astype(np.float32)
            light = self._flat_light((side * 0.6, 0, 0.6))
            pixels = self.camera.project(ear)
            _fill(canvas, pixels, _shade(who.skin, 0.92) * light)
            _fill(canvas, pixels.mean(0) + (pixels - pixels.mean(0)) * 0.55, _shade(who.skin, 0.7) * light)

    # -- skin and light

    def _skin(self) -> tuple[Image, Array]:
        """The lit part's albedo, (size, size, 3), and how much of each pixel it covers."""
        who = self.who
        self.x, self.y, self.z, self.f, edge = self.skull.hit(self.camera, self.u, self.v)
        mask = np.clip(edge + 0.5, 0, 1)
        grain, _ = _noise_tile()
        mottle = _sample(grain, self.x * 60 + np.float32(7.3 * who.number % 256), self.y * 60)
        face = np.array(who.skin, np.float32) * (1 + 0.025 * mottle)[..., None]
        aside = np.abs(self.x) - 0.55 * who.width
        cheeks = cv2.exp((np.square(aside) + np.square(self.y - 0.3)) * -14)
        nose_tip = cv2.exp((np.square(self.x) + np.square(self.y - who.nose[0])) * -40)
        rosy = (who.blush * (cheeks + 0.6 * nose_tip)).astype(np.float32)
        face *= 1 - rosy[..., None] * np.array([0.02, 0.28, 0.22], np.float32)
        hairy = self._beard(mottle)[..., None]
        face += (np.array(who.beard_colour, np.float32) - face) * hairy
        return np.clip(face, 0, 255).astype(np.uint8), mask

    def _beard(self, mottle: Array) -> Array:
        jaw, chin, moustache, edge = self.who.beard
        if jaw + chin + moustache == 0:
            return np.zeros_like(self.x)
        mouth_y, mouth_w = self.who.mouth[:2]
        side = np.abs(self.x) / self.who.width
        ragged = self.y + 0.02 * mottle
        cover = jaw * _step(-0.05, 0.08, ragged - (edge + 0.75 * (0.85 - side)))
        for amount, below, half, high in ((chin, 0.3, 0.26, 0.24), (moustache, -0.11, mouth_w * 1.15, 0.075)):
            across, along = np.square(self.x * (1 / half)), np.square((self.y - (mouth_y + below)) * (1 / high))
            cover = np.maximum(cover, amount * cv2.exp(-(across * across + along * along)))
        return np.clip(cover * (0.92 + 0.12 * mottle), 0, 1)

    def _bumps(self) -> list[tuple[float, float, float, float, float, float]]:
        """Relief of the face: x, y, how far out, half widths across and along, height."""
        who = self.who
        tip, wide, out, bridge, ball = who.nose
        ex, ey, ew = who.eye[:3]
        mouth = who.mouth
        relief: list[tuple[float, float, float, float, float, float]] = [
            (0, tip, out, ball, ball * 0.9, 0.55 * out),
            (0, (ey + tip) / 2, out * 0.6, bridge, abs(tip - ey) * 0.5, 0.3 * out),
            (0, mouth[0], 0.05, mouth[1], 0.13, 0.05),
            (0, 0.84, 0.05, 0.16, 0.1, 0.06 * who.chin[0]),
            (0, mouth[0] + mouth[3] + 0.05, 0.03, 0.15, 0.05, -0.02),
        ]
        for side in (-1, 1):
            relief += [
                (side * wide * 0.75, tip + 0.02, out * 0.5, 0.05, 0.05, 0.25 * out),
                (side * ex, ey, 0, ew * 1.1, 0.12, -0.045 * who.socket),
                (side * ex, ey - 0.2, 0.03, ew * 1.4, 0.07, 0.025 * who.socket),
                (side * 0.62 * who.width, 0.22, 0, 0.17, 0.14, 0.05 * who.cheekbone),
            ]
        return relief

    def _lighting(self) -> Array:
        """Gain of each pixel and channel, (size, size, 3): ambient, one lamp with a soft terminator, and a gloss."""
        who, m = self.who, self.camera.rotation
        g = 1 / (self.f * self.f)
        nh = (self.x * g / who.width**2, self.y, self.z * g / who.depth**2)
        nx, ny, nz = (m[i, 0] * nh[0] + m[i, 1] * nh[1] + m[i, 2] * nh[2] for i in range(3))
        norm = 1 / np.sqrt(nx * nx + ny * ny + nz * nz + 1e-6)
        nx, ny, nz = nx * norm, ny * norm, nz * norm
        relief = np.array(self._bumps(), np.float32)
        flat = self.camera.flat(self.skull.on(relief[:, 0], relief[:, 1], relief[:, 2]))
        for (cx, cy), (_, _, _, sx, sy, height) in zip(flat.tolist(), relief.tolist(), strict=True):
            dx, dy = (self.u - cx) * (1 / sx), (self.v - cy) * (1 / sy)
            bump = cv2.exp((dx * dx + dy * dy) * -0.5)
            nx += bump * dx * (height / sx)
            ny += bump * dy * (height / sy)
        norm = 1 / np.sqrt(nx * nx + ny * ny + nz * nz + 1e-6)
        lx, ly, lz = self.view.light
        lamp = (nx * lx + ny * ly + nz * lz) * norm
        hx, hy, hz = (np.array([lx, ly, lz + 1]) / np.linalg.norm([lx, ly, lz + 1])).tolist()
        shine = np.maximum((nx * hx + ny * hy + nz * hz) * norm, 0)
        for _ in range(4):
            shine = shine * shine
        lamp = np.maximum((lamp + 0.15) * np.float32(1 / 1.15), 0)
        hair_shadow = 1 - 0.3 * _step(-0.12, 0.0, self._hairline(self.x, self.z) - self.y)
        gain = self.ambient + (lamp * hair_shadow + who.gloss * shine)[..., None] * self.key
        return gain.astype(np.float32)

    # -- features

    def _at(self, x: Array, y: Array, out: float = 0.0) -> Array:
        return self.camera.project(self.skull.on(x.astype(np.float32), y.astype(np.float32), out))

    def _features(self, face: Image) -> None:
        who = self.who
        for marks, colour in ((who.freckles, _shade(who.skin, 0.74)), (who.moles, _shade(who.skin, 0.33))):
            if marks:
                spots = np.array(marks, np.float32)
                a = np.linspace(0, 2 * np.pi, 10, endpoint=False, dtype=np.float32)
                rings = spots[:, None, :2] + spots[:, None, 2:] * np.stack([np.cos(a), np.sin(a)], axis=1)
                for ring in self._at(*rings.reshape(-1, 2).T).reshape(-1, 10, 2):
                    _fill(face, ring, colour)
        self._folds(face)
        for side in (-1, 1):
            self._eye(face, side)
            self._brow(face, side)
        self._nose(face)
        self._mouth(face)

    def _folds(self, face: Image) -> None:
        who = self.who
        t = np.linspace(0, 1, 10, dtype=np.float32)
        tip, wide = who.nose[:2]
        mouth_y, mouth_w = who.mouth[:2]
        depth = min(1.0, who.age + 0.35 * max(0.0, self.view.smile))
        for side in (-1, 1):
            fold = wide * 1.1 + (mouth_w * 1.15 - wide * 1.1) * t + 0.05 * np.sin(np.pi * t)
            fold_at = self._at(side * fold, tip + (mouth_y - tip) * t)
            _line(face, fold_at, _shade(who.skin, 0.68), 0.03 * self.unit * depth)
            ex, ey, ew = who.eye[:3]
            x = side * (ex + ew * (1.6 * t - 0.8))
            y = ey + 0.1 + 0.05 * np.sin(np.pi * t)
            _line(face, self._at(x, y), _shade(who.skin, 0.7), 0.035 * self.unit * who.bags)
        if who.age > 0.5:
            for row in range(3):
                x = who.width * (1.1 * t - 0.55)
                y = -0.45 + 0.09 * row + 0.02 * np.cos(6 * t)
                _line(face, self._at(x, y), _shade(who.skin, 0.75), 0.02 * self.unit * who.age)
        if who.chin[1] > 0:
            _line(face, self._at(0 * t, 0.8 + 0.1 * t), _shade(who.skin, 0.65), 0.04 * self.unit * who.chin[1])

    def _eye(self, face: Image, side: int) -> None:
        who, view = self.who, self.view
        ex, ey, ew, eh, tilt = who.eye
        eh = eh * (1 - 0.9 * view.blink) * (1 - 0.25 * max(0.0, view.smile))
        t = np.linspace(-1, 1, 13, dtype=np.float32)
        lid = np.sqrt(np.maximum(1 - t * t, 0))
        upper, lower = -eh * lid**1.2 - tilt * ew * t, 0.6 * eh * lid - tilt * ew * t
        x = side * (ex + ew * t)
        outline = self._at(np.concatenate([x, x[::-1]]), ey + np.concatenate([upper, lower[::-1]]))
        _fill(face, outline, (232, 226, 222))
        hull = cv2.convexHull(outline)
        gx, gy = ex * side + view.gaze[0] * ew * 0.35, ey - 0.1 * eh + view.gaze[1] * eh * 0.4
        a = np.linspace(0, 2 * np.pi, 20, endpoint=False, dtype=np.float32)
        for radius, colour in ((1.0, _shade(who.iris, 0.55)), (0.86, np.array(who.iris)), (0.42, np.full(3, 14.0))):
            disc = self._at(gx + radius * who.iris_radius * np.cos(a), gy + radius * who.iris_radius * np.sin(a))
            area, part = cv2.intersectConvexConvex(hull, cv2.convexHull(disc))
            if area > 0:
                _fill(face, np.asarray(part[:, 0], np.float32), colour)
        if view.blink < 0.6:
            spot = self._at(np.array([gx - 0.03]), np.array([gy - 0.03]))[0]
            centre = (round(float(spot[0]) * 16), round(float(spot[1]) * 16))
            cv2.circle(face, centre, max(6, round(0.016 * self.unit * 16)), (250, 250, 250), -1, cv2.LINE_AA, 4)
        _line(face, self._at(x, ey + upper), _shade(who.brow_colour, 0.35), 0.035 * self.unit)
        _line(face, self._at(x, ey + upper - who.crease), _shade(who.skin, 0.66), 0.025 * self.unit)
        _line(face, self._at(x, ey + lower), _shade(who.skin, 0.62), 0.018 * self.unit)

    def _brow(self, face: Image, side: int) -> None:
        who = self.who
        gap, half, thick, arch, slope = who.brow
        t = np.linspace(-1, 1, 12, dtype=np.float32)
        y = who.eye[1] - gap - 0.07 * self.view.brows - arch * (1 - (t - 0.3) ** 2) - slope * half * t
        x = side * (who.eye[0] + 0.02 + half * t)
        taper = thick * (1 - 0.75 * np.clip(t, 0, 1) ** 1.5) * np.clip(3.5 * (1.12 + t), 0, 1)
        outline = self._at(np.concatenate([x, x[::-1]]), np.concatenate([y - taper, (y + taper)[::-1]]), 0.02)
        _fill(face, outline, who.brow_colour)

    def _nose(self, face: Image) -> None:
        who = self.who
        tip, wide, out, bridge, _ = who.nose
        a = np.linspace(0, 2 * np.pi, 12, dtype=np.float32)
        t = np.linspace(0, 1, 9, dtype=np.float32)
        for side in (-1, 1):
            wing_x = side * (wide * (0.95 + 0.12 * np.sin(np.pi * t)) - 0.35 * wide * t**3)
            _line(face, self._at(wing_x, tip - 0.07 + 0.13 * t, out * 0.35), _shade(who.skin, 0.72), 0.026 * self.unit)
            hole_x = side * wide * 0.5 + 0.3 * wide * np.cos(a)
            _fill(face, self._at(hole_x, tip + 0.065 + 0.022 * np.sin(a), out * 0.6), _shade(who.skin, 0.32))
            ridge = np.linspace(who.eye[1], tip - 0.08, 9, dtype=np.float32)
            x = side * (bridge * 1.1 + 0.02 * np.sin(np.pi * t))
            _line(face, self._at(x + 0 * ridge, ridge, out * 0.3), _shade(who.skin, 0.86), 0.022 * self.unit)

    def _mouth(self, face: Image) -> None:
        who, view = self.who, self.view
        my, mw, up, low, bow = who.mouth
        mw = mw * (1 + 0.22 * view.smile - 0.12 * view.open)
        t = np.linspace(-1, 1, 17, dtype=np.float32)
        arc = 1 - t * t
        line = my + 0.07 * view.smile * (arc - 0.6)
        gap = 0.14 * view.open * arc
        upper = line - gap * 0.3 - up * arc**0.7 * (1 - bow * np.exp(-((t / 0.16) ** 2)))
        lower = line + gap + low * arc**0.8
        x = mw * t
        both = np.concatenate([x, x[::-1]])
        _fill(face, self._at(both, np.concatenate([upper, (line - gap * 0.3)[::-1]]), 0.05), _shade(who.lips, 0.88))
        _fill(face, self._at(both, np.concatenate([line + gap, lower[::-1]]), 0.05), who.lips)
        if view.open > 0.05:
            inner = np.concatenate([line - gap * 0.3, (line + gap)[::-1]])
            _fill(face, self._at(both, inner, 0.04), (62, 22, 24))
            teeth = np.concatenate([line - gap * 0.3, (line + gap * 0.35)[::-1]])
            _fill(face, self._at(both * 0.86, teeth, 0.04), (228, 222, 210))
        else:
            _line(face, self._at(x, line, 0.05), _shade(who.lips, 0.45), 0.025 * self.unit)

    # -- hair

    def _hairline(self, x: Array, z: Array) -> Array:
        """y above which hair covers the head, at each point of a surface."""
        who = self.who
        front, side, nape, temple = who.hairline
        slope, amplitude, frequency, peak = who.fringe
        angle = np.arctan2(x * np.float32(1 / who.width), z * np.float32(1 / who.depth))
        turn = np.abs(angle)
        line = front + slope * angle + peak * np.exp(-12 * angle**2)
        line = line + amplitude * np.sin(frequency * angle + who.number)
        line = line + (side - line) * _step(temple - 0.22, temple + 0.22, turn)
        return line + (nape - side) * _step(1.5, 1.8, turn)

    def _hair(self, picture: Array) -> None:
        """Lays hair over the lit picture, in place."""
        who, m = self.who, self.camera.rotation
        sides = who.hair_volume[1]
        x, y, z, _, edge = self.hair_hit
        grain, strands = _noise_tile()
        rough = _sample(grain, x * 45 + np.float32(3.1 * who.number % 256), y * 45)
        angle = np.arctan2(x, z)
        flow = angle * np.float32(46) + y * np.float32(6) + rough * np.float32(3 * who.curl)
        along = y * np.float32(40) + rough * np.float32(6 * who.curl)
        strand = _sample(strands, flow + np.float32(13.7 * who.number % 256), along)
        line = self._hairline(x, z) + (0.008 + 0.022 * who.curl) * rough + 0.01 * strand
        thin = (sides + 0.02) * self.unit * (1 - _step(0.0, 0.3, line - y))  # hair lies flat where it ends
        outline = edge - thin + rough * np.float32(0.03 * who.curl * self.unit)
        cover = _step(-0.03, 0.03, line - y) * np.clip(outline + 0.5, 0, 1)
        nx, ny, nz = (m[i, 0] * x / who.width + m[i, 1] * y + m[i, 2] * z / who.depth for i in range(3))
        lx, ly, lz = self.view.light
        norm = 1 / np.sqrt(nx * nx + ny * ny + nz * nz + 1e-6)
        lamp = np.maximum((nx * lx + ny * ly + nz * lz) * norm + 0.1, 0)
        strand = strand * np.clip(1.6 * nz * norm, 0, 1)  # strands crowd at the outline and would alias
        tone = 1 + (0.1 + 0.12 * who.streaks) * strand + 0.12 * who.curl * rough
        if abs(who.parting) < 1:
            tone = tone * (1 - 0.45 * np.exp(-(((x - who.parting * who.width) / 0.035) ** 2)) * (y < who.hairline[0]))
        gain = self.ambient + (lamp * 0.9 * tone + 0.18 * lamp**8)[..., None] * self.key
        lit = np.array(who.hair, np.float32) * tone[..., None] * gain
        picture += (lit - picture) * cover[..., None]

    # -- in front of the face

    def _occlude(self, picture: Array) -> Image:
        """The lit picture as 8 bit, with the view's occluder in front."""
        canvas = np.clip(picture, 0, 255).astype(np.uint8)
        if self.view.occluder:
            colour = np.array(self.view.occluder_colour) * self._flat_light((0, -0.2, 0.9))
            getattr(self, f"_{self.view.occluder}")(canvas, colour)
        return canvas

    def _lenses(self) -> list[Array]:
        ex, ey, ew = self.who.eye[:3]
        a = np.linspace(0, 2 * np.pi, 28, dtype=np.float32)
        power = 0.55 + 0.45 * self.view.occluder_at[0]
        wide, high = ew * 1.6, 0.14 + 0.08 * self.view.occluder_at[1]
        cx, cy = np.sign(np.cos(a)) * np.abs(np.cos(a)) ** power, np.sign(np.sin(a)) * np.abs(np.sin(a)) ** power
        return [self._at(side * ex + wide * cx, ey + 0.03 + high * cy, 0.1) for side in (-1, 1)]

    def _temples(self, canvas: Image, colour: NDArray) -> None:
        ex, ey, ew = self.who.eye[:3]
        gap = ex - ew * 1.6
        _line(canvas, self._at(np.array([-gap, 0, gap]), np.array([ey, ey - 0.02, ey]), 0.12), colour, 0.04 * self.unit)
        for side in (-1, 1):
            arm = np.array([[side * (ex + ew * 1.6), ey, 0.55], [side * self.who.width * 1.02, ey, -0.1]], np.float32)
            _line(canvas, self.camera.project(arm), colour, 0.04 * self.unit)

    def _sunglasses(self, canvas: Image, colour: NDArray) -> None:
        self._temples(canvas, colour * 0.4)
        for lens in self._lenses():
            _fill(canvas, lens, colour * 0.25)

    def _glasses(self, canvas: Image, colour: NDArray) -> None:
        self._temples(canvas, colour * 0.4)
        for lens in self._lenses():
            _line(canvas, lens, colour * 0.4, (0.025 + 0.03 * self.view.occluder_at[2]) * self.unit)

    def _cap(self, canvas: Image, colour: NDArray) -> None:
        rim = -0.5 + 0.15 * self.view.occluder_at[0]
        cover = (np.clip((rim - self.hair_hit[1]) * self.unit, 0, 1) * np.clip(self.hair_hit[4] + 0.5, 0, 1))[..., None]
        canvas[:] = (canvas + (colour - canvas) * cover * 0.97).clip(0, 255).astype(np.uint8)
        t = np.linspace(-1, 1, 16, dtype=np.float32)
        base = np.stack([0.75 * t, rim + 0 * t, 0.75 * np.sqrt(1 - 0.8 * t * t)], axis=1)
        brim = np.stack([0.8 * t, rim + 0.1 + 0 * t, 0.7 + 0.55 * np.sqrt(1 - 0.9 * t * t)], axis=1)
        _fill(canvas, self.camera.project(np.concatenate([base, brim[::-1]]).astype(np.float32)), colour * 0.7)

    def _scarf(self, canvas: Image, colour: NDArray) -> None:
        top = 0.3 + 0.45 * self.view.occluder_at[0]
        t = np.linspace(-1, 1, 20, dtype=np.float32)
        edge = np.stack([1.08 * self.who.width * t, top + 0.12 * (1 - t * t) - 0.1, 0.9 - 1.0 * t * t], axis=1)
        foot = np.stack([1.1 * t, 1.6 + 0 * t, 0.2 + 0 * t], axis=1)
        _fill(canvas, self.camera.project(np.concatenate([edge, foot[::-1]]).astype(np.float32)), colour * 0.85)

    def _hand(self, canvas: Image, colour: NDArray) -> None:
        """Four fingers laid over a part of the face, in the person's skin."""
        px, py, turn = self.view.occluder_at
        skin = _shade(self.who.skin, 0.95) * self._flat_light((0.1, 0, 0.9))
        side = -1.0 if px < 0.5 else 1.0
        base = np.array([side * (0.75 + 0.3 * abs(px - 0.5)), 0.9 - 0.6 * py], np.float32)
        for finger in range(4):
            angle = -np.pi / 2 - side * (0.15 + 0.7 * turn + 0.14 * finger)
            along = np.array([np.cos(angle), np.sin(angle)], np.float32)
            start = base + np.array([0.13 * finger * -side, 0.1 * finger], np.float32)
            tip = start + along * (0.6 - 0.07 * abs(finger - 1.5))
            points = self.camera.pixels(np.stack([start - along * 0.5, tip]))
            _line(canvas, points, skin * 0.75, 0.19 * self.unit)
            _line(canvas, points, skin, 0.155 * self.unit)

    def _bar(self, canvas: Image, colour: NDArray) -> None:
        """Something in front of the lens: a strip at a border of the picture."""
        at, wide, turn = self.view.occluder_at
        angle = 2 * np.pi * turn
        normal, along = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        middle = np.array(self.view.centre) + normal * (0.2 + 0.2 * at)
        wide = 0.05 + 0.07 * wide
        corners = [middle + normal * n * wide + along * a for n, a in ((-1, -2), (1, -2), (1, 2), (-1, 2))]
        _fill(canvas, np.array(corners, np.float32) * self.size, colour)

    # -- camera

    def _develop(self, canvas: Image) -> Image:
        view, size = self.view, self.size
        if view.motion[0] * size >= 2:
            reach = round(view.motion[0] * size)
            kernel = np.zeros((2 * reach + 1, 2 * reach + 1), np.float32)
            tip = np.array([np.cos(view.motion[1]), np.sin(view.motion[1])]) * reach / 2
            a, b = (tuple(int(i) for i in np.rint(reach + s * tip)) for s in (-1, 1))
            cv2.line(kernel, a, b, 1.0, 1)
            canvas = np.asarray(cv2.filter2D(canvas, -1, kernel / kernel.sum()), np.uint8)
        if view.blur * size > 0.25:
            canvas = _blur(canvas, view.blur * size)
        curve = (255 * (np.arange(256) / 255) ** view.gamma).astype(np.float32)
        toned = curve[canvas]
        grey = cv2.cvtColor(toned, cv2.COLOR_RGB2GRAY)[..., None]
        picture = grey + (toned - grey) * np.float32(view.saturation)
        picture += self.rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(view.noise)
        return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def paint(identity: Identity, view: View, size: int) -> Image:
    """The face of `identity` as `view` sees it.

    Args:
        identity: what the person fixes.
        view: what the image varies.
        size: side of the picture in pixels.
    Returns:
        (size, size, 3) uint8, RGB. A pure function of its arguments.
    """
    return _Face(identity, view, size).paint()
