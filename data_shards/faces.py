"""Draws one face: an `Identity` (what the person fixes) seen in a `View` (what the image varies).

Head coordinates: x to the image's right, y down, z to the viewer; the head's half height is 1. The head is an
ellipsoid whose width follows a cubic in y. Every pixel's ray is intersected with it, so that skin, hair and shading move
in 3-D, and the outlines of eyes, brows, nose and mouth are projected from points on the same surface.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from data_shards.face_model import Array, Identity, Image, View
from data_shards.face_occluders import Occluders
from data_shards.face_surface import Camera, Shell, blur, draw_line, fill, noise_tile, sample, shade, smooth_step


class Face(Occluders):
    """One picture in the making."""

    def __init__(self, who: Identity, view: View, size: int) -> None:
        self.who, self.view, self.size = who, view, size
        self.camera = Camera(view, size)
        self.rng = np.random.Generator(np.random.PCG64(view.texture_seed))
        self.skull = Shell((who.width, 1.0, who.depth), who.profile)
        self.u, self.v = self.camera.grid()
        self.unit = self.camera.scale  # pixels per half head height
        self.key, self.ambient = np.array(view.key, np.float32), np.array(view.ambient, np.float32)

    def paint(self) -> Image:
        """The finished picture, (size, size, 3) RGB."""
        canvas = self._background()
        self._behind(canvas)
        face, mask = self._skin()
        self._features(face)
        face = blur(face, max(0.3, 0.008 * self.unit))
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
            fill(canvas, hull, self._dull(rng.uniform(10, 245, 3)))
        return blur(canvas, rng.uniform(0.004, 0.03) * size)

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
            fill(canvas, self.camera.project(back), shade(who.hair, 0.75) * light)
        neck = 0.62 * who.width
        column = np.array([[-neck, 0.3], [neck, 0.3], [neck * 1.05, 1.7], [-neck * 1.05, 1.7]], np.float32)
        foot = self.camera.flat(np.array([[0, 1.0, -0.25]], np.float32))[0] - (0, 1.0)
        fill(canvas, self.camera.pixels(column + foot), shade(who.skin, 0.78) * light)
        s = np.linspace(-1, 1, 24, dtype=np.float32)
        collar = np.stack([1.9 * s, 1.42 + 0.35 * s**4 - 0.22 * np.exp(-((np.abs(s) - 0.3) ** 2) * 30)], axis=1)
        shirt = np.concatenate([collar, [[2.2, 4.0], [-2.2, 4.0]]]).astype(np.float32) + foot
        fill(canvas, self.camera.pixels(shirt), np.array(self.view.clothes) * light)
        self._far_hair(canvas)
        self._ears(canvas)

    def _far_hair(self, canvas: Image) -> None:
        """The hair's far side, which shows between the near side and the skull."""
        who = self.who
        top, sides = who.hair_volume
        shell = Shell((who.width + sides, 1 + top, who.depth + sides), who.profile, -0.02)
        self.hair_hit = shell.hit(self.camera, self.u, self.v)
        _, y, _, _, edge = self.hair_hit
        end = who.hairline[2] if who.hair_length else min(who.hairline[1] + 0.3, who.hairline[2])
        thin = (sides + 0.02) * self.unit * (1 - smooth_step(0.0, 0.4, end - y))
        cover = np.clip(edge - thin + 0.5, 0, 1) * smooth_step(-0.03, 0.03, end - y)
        if who.hairline[0] < -0.8:
            cover = cover * smooth_step(-0.1, 0.1, y + 0.3)
        colour = shade(who.hair, 0.6) * self._flat_light((0, -0.3, 0.6))
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
            fill(canvas, pixels, shade(who.skin, 0.92) * light)
            fill(canvas, pixels.mean(0) + (pixels - pixels.mean(0)) * 0.55, shade(who.skin, 0.7) * light)

    # -- skin and light

    def _skin(self) -> tuple[Image, Array]:
        """The lit part's albedo, (size, size, 3), and how much of each pixel it covers."""
        who = self.who
        self.x, self.y, self.z, self.f, edge = self.skull.hit(self.camera, self.u, self.v)
        mask = np.clip(edge + 0.5, 0, 1)
        grain, _ = noise_tile()
        mottle = sample(grain, self.x * 60 + np.float32(7.3 * who.number % 256), self.y * 60)
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
        cover = jaw * smooth_step(-0.05, 0.08, ragged - (edge + 0.75 * (0.85 - side)))
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
        hair_shadow = 1 - 0.3 * smooth_step(-0.12, 0.0, self._hairline(self.x, self.z) - self.y)
        gain = self.ambient + (lamp * hair_shadow + who.gloss * shine)[..., None] * self.key
        return gain.astype(np.float32)

    # -- features

    def _at(self, x: Array, y: Array, out: float = 0.0) -> Array:
        return self.camera.project(self.skull.on(x.astype(np.float32), y.astype(np.float32), out))

    def _features(self, face: Image) -> None:
        who = self.who
        for marks, colour in ((who.freckles, shade(who.skin, 0.74)), (who.moles, shade(who.skin, 0.33))):
            if marks:
                spots = np.array(marks, np.float32)
                a = np.linspace(0, 2 * np.pi, 10, endpoint=False, dtype=np.float32)
                rings = spots[:, None, :2] + spots[:, None, 2:] * np.stack([np.cos(a), np.sin(a)], axis=1)
                for ring in self._at(*rings.reshape(-1, 2).T).reshape(-1, 10, 2):
                    fill(face, ring, colour)
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
            draw_line(face, fold_at, shade(who.skin, 0.68), 0.03 * self.unit * depth)
            ex, ey, ew = who.eye[:3]
            x = side * (ex + ew * (1.6 * t - 0.8))
            y = ey + 0.1 + 0.05 * np.sin(np.pi * t)
            draw_line(face, self._at(x, y), shade(who.skin, 0.7), 0.035 * self.unit * who.bags)
        if who.age > 0.5:
            for row in range(3):
                x = who.width * (1.1 * t - 0.55)
                y = -0.45 + 0.09 * row + 0.02 * np.cos(6 * t)
                draw_line(face, self._at(x, y), shade(who.skin, 0.75), 0.02 * self.unit * who.age)
        if who.chin[1] > 0:
            draw_line(face, self._at(0 * t, 0.8 + 0.1 * t), shade(who.skin, 0.65), 0.04 * self.unit * who.chin[1])

    def _eye(self, face: Image, side: int) -> None:
        who, view = self.who, self.view
        ex, ey, ew, eh, tilt = who.eye
        eh = eh * (1 - 0.9 * view.blink) * (1 - 0.25 * max(0.0, view.smile))
        t = np.linspace(-1, 1, 13, dtype=np.float32)
        lid = np.sqrt(np.maximum(1 - t * t, 0))
        upper, lower = -eh * lid**1.2 - tilt * ew * t, 0.6 * eh * lid - tilt * ew * t
        x = side * (ex + ew * t)
        outline = self._at(np.concatenate([x, x[::-1]]), ey + np.concatenate([upper, lower[::-1]]))
        fill(face, outline, (232, 226, 222))
        hull = cv2.convexHull(outline)
        gx, gy = ex * side + view.gaze[0] * ew * 0.35, ey - 0.1 * eh + view.gaze[1] * eh * 0.4
        a = np.linspace(0, 2 * np.pi, 20, endpoint=False, dtype=np.float32)
        for radius, colour in ((1.0, shade(who.iris, 0.55)), (0.86, np.array(who.iris)), (0.42, np.full(3, 14.0))):
            disc = self._at(gx + radius * who.iris_radius * np.cos(a), gy + radius * who.iris_radius * np.sin(a))
            area, part = cv2.intersectConvexConvex(hull, cv2.convexHull(disc))
            if area > 0:
                fill(face, np.asarray(part[:, 0], np.float32), colour)
        if view.blink < 0.6:
            spot = self._at(np.array([gx - 0.03]), np.array([gy - 0.03]))[0]
            centre = (round(float(spot[0]) * 16), round(float(spot[1]) * 16))
            cv2.circle(face, centre, max(6, round(0.016 * self.unit * 16)), (250, 250, 250), -1, cv2.LINE_AA, 4)
        draw_line(face, self._at(x, ey + upper), shade(who.brow_colour, 0.35), 0.035 * self.unit)
        draw_line(face, self._at(x, ey + upper - who.crease), shade(who.skin, 0.66), 0.025 * self.unit)
        draw_line(face, self._at(x, ey + lower), shade(who.skin, 0.62), 0.018 * self.unit)

    def _brow(self, face: Image, side: int) -> None:
        who = self.who
        gap, half, thick, arch, slope = who.brow
        t = np.linspace(-1, 1, 12, dtype=np.float32)
        y = who.eye[1] - gap - 0.07 * self.view.brows - arch * (1 - (t - 0.3) ** 2) - slope * half * t
        x = side * (who.eye[0] + 0.02 + half * t)
        taper = thick * (1 - 0.75 * np.clip(t, 0, 1) ** 1.5) * np.clip(3.5 * (1.12 + t), 0, 1)
        outline = self._at(np.concatenate([x, x[::-1]]), np.concatenate([y - taper, (y + taper)[::-1]]), 0.02)
        fill(face, outline, who.brow_colour)

    def _nose(self, face: Image) -> None:
        who = self.who
        tip, wide, out, bridge, _ = who.nose
        a = np.linspace(0, 2 * np.pi, 12, dtype=np.float32)
        t = np.linspace(0, 1, 9, dtype=np.float32)
        for side in (-1, 1):
            wing_x = side * (wide * (0.95 + 0.12 * np.sin(np.pi * t)) - 0.35 * wide * t**3)
            draw_line(
                face, self._at(wing_x, tip - 0.07 + 0.13 * t, out * 0.35), shade(who.skin, 0.72), 0.026 * self.unit
            )
            hole_x = side * wide * 0.5 + 0.3 * wide * np.cos(a)
            fill(face, self._at(hole_x, tip + 0.065 + 0.022 * np.sin(a), out * 0.6), shade(who.skin, 0.32))
            ridge = np.linspace(who.eye[1], tip - 0.08, 9, dtype=np.float32)
            x = side * (bridge * 1.1 + 0.02 * np.sin(np.pi * t))
            draw_line(face, self._at(x + 0 * ridge, ridge, out * 0.3), shade(who.skin, 0.86), 0.022 * self.unit)

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
        fill(face, self._at(both, np.concatenate([upper, (line - gap * 0.3)[::-1]]), 0.05), shade(who.lips, 0.88))
        fill(face, self._at(both, np.concatenate([line + gap, lower[::-1]]), 0.05), who.lips)
        if view.open > 0.05:
            inner = np.concatenate([line - gap * 0.3, (line + gap)[::-1]])
            fill(face, self._at(both, inner, 0.04), (62, 22, 24))
            teeth = np.concatenate([line - gap * 0.3, (line + gap * 0.35)[::-1]])
            fill(face, self._at(both * 0.86, teeth, 0.04), (228, 222, 210))
        else:
            draw_line(face, self._at(x, line, 0.05), shade(who.lips, 0.45), 0.025 * self.unit)

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
        line = line + (side - line) * smooth_step(temple - 0.22, temple + 0.22, turn)
        return line + (nape - side) * smooth_step(1.5, 1.8, turn)

    def _hair(self, picture: Array) -> None:
        """Lays hair over the lit picture, in place."""
        who, m = self.who, self.camera.rotation
        sides = who.hair_volume[1]
        x, y, z, _, edge = self.hair_hit
        grain, strands = noise_tile()
        rough = sample(grain, x * 45 + np.float32(3.1 * who.number % 256), y * 45)
        angle = np.arctan2(x, z)
        flow = angle * np.float32(46) + y * np.float32(6) + rough * np.float32(3 * who.curl)
        along = y * np.float32(40) + rough * np.float32(6 * who.curl)
        strand = sample(strands, flow + np.float32(13.7 * who.number % 256), along)
        line = self._hairline(x, z) + (0.008 + 0.022 * who.curl) * rough + 0.01 * strand
        thin = (sides + 0.02) * self.unit * (1 - smooth_step(0.0, 0.3, line - y))  # hair lies flat where it ends
        outline = edge - thin + rough * np.float32(0.03 * who.curl * self.unit)
        cover = smooth_step(-0.03, 0.03, line - y) * np.clip(outline + 0.5, 0, 1)
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
            canvas = blur(canvas, view.blur * size)
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
    return Face(identity, view, size).paint()
