"""What may lie in front of a drawn face: one method for each of `OCCLUDERS`."""

import numpy as np
from numpy.typing import NDArray

from data_shards.face_model import Array, Identity, Image, View
from data_shards.face_surface import Camera, draw_line, fill, shade


class Occluders:
    """The part of a picture in the making that draws its occluder; `faces.Face` has the rest."""

    who: Identity
    view: View
    size: int
    camera: Camera
    unit: float
    hair_hit: tuple[Array, Array, Array, Array, Array]

    def _flat_light(self, normal: tuple[float, float, float]) -> NDArray:
        raise AssertionError("faces.Face defines it")

    def _at(self, x: Array, y: Array, out: float = 0.0) -> Array:
        raise AssertionError("faces.Face defines it")

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
        draw_line(
            canvas, self._at(np.array([-gap, 0, gap]), np.array([ey, ey - 0.02, ey]), 0.12), colour, 0.04 * self.unit
        )
        for side in (-1, 1):
            arm = np.array([[side * (ex + ew * 1.6), ey, 0.55], [side * self.who.width * 1.02, ey, -0.1]], np.float32)
            draw_line(canvas, self.camera.project(arm), colour, 0.04 * self.unit)

    def _sunglasses(self, canvas: Image, colour: NDArray) -> None:
        self._temples(canvas, colour * 0.4)
        for lens in self._lenses():
            fill(canvas, lens, colour * 0.25)

    def _glasses(self, canvas: Image, colour: NDArray) -> None:
        self._temples(canvas, colour * 0.4)
        for lens in self._lenses():
            draw_line(canvas, lens, colour * 0.4, (0.025 + 0.03 * self.view.occluder_at[2]) * self.unit)

    def _cap(self, canvas: Image, colour: NDArray) -> None:
        rim = -0.5 + 0.15 * self.view.occluder_at[0]
        cover = (np.clip((rim - self.hair_hit[1]) * self.unit, 0, 1) * np.clip(self.hair_hit[4] + 0.5, 0, 1))[..., None]
        canvas[:] = (canvas + (colour - canvas) * cover * 0.97).clip(0, 255).astype(np.uint8)
        t = np.linspace(-1, 1, 16, dtype=np.float32)
        base = np.stack([0.75 * t, rim + 0 * t, 0.75 * np.sqrt(1 - 0.8 * t * t)], axis=1)
        brim = np.stack([0.8 * t, rim + 0.1 + 0 * t, 0.7 + 0.55 * np.sqrt(1 - 0.9 * t * t)], axis=1)
        fill(canvas, self.camera.project(np.concatenate([base, brim[::-1]]).astype(np.float32)), colour * 0.7)

    def _scarf(self, canvas: Image, colour: NDArray) -> None:
        top = 0.3 + 0.45 * self.view.occluder_at[0]
        t = np.linspace(-1, 1, 20, dtype=np.float32)
        edge = np.stack([1.08 * self.who.width * t, top + 0.12 * (1 - t * t) - 0.1, 0.9 - 1.0 * t * t], axis=1)
        foot = np.stack([1.1 * t, 1.6 + 0 * t, 0.2 + 0 * t], axis=1)
        fill(canvas, self.camera.project(np.concatenate([edge, foot[::-1]]).astype(np.float32)), colour * 0.85)

    def _hand(self, canvas: Image, colour: NDArray) -> None:
        """Four fingers laid over a part of the face, in the person's skin."""
        px, py, turn = self.view.occluder_at
        skin = shade(self.who.skin, 0.95) * self._flat_light((0.1, 0, 0.9))
        side = -1.0 if px < 0.5 else 1.0
        base = np.array([side * (0.75 + 0.3 * abs(px - 0.5)), 0.9 - 0.6 * py], np.float32)
        for finger in range(4):
            angle = -np.pi / 2 - side * (0.15 + 0.7 * turn + 0.14 * finger)
            along = np.array([np.cos(angle), np.sin(angle)], np.float32)
            start = base + np.array([0.13 * finger * -side, 0.1 * finger], np.float32)
            tip = start + along * (0.6 - 0.07 * abs(finger - 1.5))
            points = self.camera.pixels(np.stack([start - along * 0.5, tip]))
            draw_line(canvas, points, skin * 0.75, 0.19 * self.unit)
            draw_line(canvas, points, skin, 0.155 * self.unit)

    def _bar(self, canvas: Image, colour: NDArray) -> None:
        """Something in front of the lens: a strip at a border of the picture."""
        at, wide, turn = self.view.occluder_at
        angle = 2 * np.pi * turn
        normal, along = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        middle = np.array(self.view.centre) + normal * (0.2 + 0.2 * at)
        wide = 0.05 + 0.07 * wide
        corners = [middle + normal * n * wide + along * a for n, a in ((-1, -2), (1, -2), (1, 2), (-1, 2))]
        fill(canvas, np.array(corners, np.float32) * self.size, colour)
