"""Synthetic identities: faces drawn by the program in the layout of VGGFace2; everything runs without a download."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from data_shards.face_model import OCCLUDERS, Colour, Identity, Image, View
from data_shards.faces import paint
from data_shards.progress import progress

_IDENTITY, _VIEW = 1, 2  # SeedSequence pads with zeros, so the two kinds of draw are told apart by a leading word

_SKINS = np.array(
    [(246, 214, 196), (233, 190, 162), (208, 160, 122), (166, 116, 82), (118, 78, 56), (82, 54, 42)], float
)
_DARK_HAIR = np.array([(18, 15, 16), (38, 26, 22), (66, 42, 28), (94, 60, 38)], float)
_LIGHT_HAIR = np.array(
    [(142, 92, 52), (160, 70, 34), (204, 158, 92), (232, 204, 150), (150, 148, 146), (222, 220, 216)], float
)
_IRISES = np.array([(58, 34, 20), (96, 60, 30), (128, 104, 50), (84, 118, 74), (74, 112, 158), (132, 152, 168)], float)


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def _colour(value: np.ndarray) -> Colour:
    r, g, b = (float(c) for c in np.clip(value, 0, 255))
    return r, g, b


def draw_identity(seed: int, identity: int) -> Identity:
    """Person number `identity` (from 1) of the population `seed`. Pure."""
    rng = _generator(_IDENTITY, seed, identity)

    def n(mean: float, deviation: float) -> float:
        """A normal draw within two deviations."""
        return float(mean + deviation * np.clip(rng.standard_normal(), -2, 2))

    def u(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    tone = rng.uniform(0, len(_SKINS) - 1.001)
    low = int(tone)
    skin = (_SKINS[low] + (_SKINS[low + 1] - _SKINS[low]) * (tone - low)) * (1 + rng.normal(0, 0.045, 3))
    palette = _LIGHT_HAIR if rng.random() < 0.75 - 0.1 * tone else _DARK_HAIR
    hair = palette[rng.integers(len(palette))] * u(0.75, 1.2) * (1 + rng.normal(0, 0.07, 3))
    brow_colour = hair * u(0.5, 0.95) if hair.mean() > 60 else hair * u(0.8, 1.2)
    female = rng.random() < 0.5
    painted = female and rng.random() < 0.5
    lips = skin * np.array([u(0.82, 1), u(0.5, 0.74), u(0.52, 0.78)])
    if painted:
        lips = np.array([u(130, 215), u(20, 70), u(35, 110)])
    bald = not female and rng.random() < 0.2
    long = rng.random() < (0.75 if female else 0.12)
    fringe = rng.random() < 0.3
    bearded = not female and rng.random() < 0.55
    beard_kind = rng.integers(4)
    jaw, chin, moustache = ((0.85, 1, 0.9), (0, 1, 0.9), (0, 0, 1), (0.35, 0.4, 0.35))[beard_kind]
    full = u(0.6, 1.0) if bearded else 0.0
    front = u(-0.98, -0.85) if bald else (u(-0.42, -0.28) if fringe else u(-0.78, -0.5))
    curl = u(0, 1) ** 2
    volume = (0.02, 0.01) if bald else (u(0.04, 0.2) + 0.15 * curl, u(0.02, 0.12) + 0.12 * curl)
    freckled = 60 if rng.random() < 0.2 else 0
    freckles = rng.normal((0, 0.2), (0.34, 0.16), (freckled, 2))
    moles = [(u(-0.5, 0.5), u(-0.4, 0.8), u(0.018, 0.042)) for _ in range(rng.integers(0, 4))]
    return Identity(
        number=identity,
        width=n(0.76, 0.07),
        depth=n(0.86, 0.05),
        profile=(n(-0.03, 0.08), n(0.04, 0.07), n(-0.02, 0.07)),
        skin=_colour(skin),
        blush=u(0, 0.8),
        gloss=u(0.0, 0.22),
        age=max(0.0, u(-0.5, 1.0)),
        freckles=tuple((float(x), float(y), u(0.009, 0.016)) for x, y in freckles),
        moles=tuple(moles),
        eye=(n(0.33, 0.04), n(-0.03, 0.05), n(0.155, 0.022), n(0.09, 0.019), n(0.05, 0.12)),
        iris=_colour(_IRISES[rng.integers(len(_IRISES))] + rng.normal(0, 10, 3)),
        iris_radius=n(0.074, 0.007),
        crease=u(0.015, 0.065),
        socket=u(0.2, 1.5),
        bags=max(0.0, u(-0.6, 0.9)),
        brow=(n(0.2, 0.04), n(0.19, 0.03), n(0.036, 0.016), n(0.035, 0.035), n(0.0, 0.14)),
        brow_colour=_colour(brow_colour),
        nose=(n(0.33, 0.06), n(0.135, 0.032), n(0.2, 0.06), n(0.055, 0.013), n(0.085, 0.016)),
        mouth=(n(0.59, 0.045), n(0.25, 0.05), n(0.055, 0.02), n(0.07, 0.024), u(0, 0.5)),
        lips=_colour(lips),
        chin=(u(0, 1.5), max(0.0, u(-1.5, 1.0))),
        cheekbone=u(-0.4, 1.4),
        ear=(n(0.19, 0.03), u(0.04, 0.15), n(0.08, 0.04)),
        hair=_colour(hair),
        hair_volume=volume,
        hairline=(front, u(0.3, 0.75) if long else u(-0.2, 0.25), u(0.5, 0.9), n(1.0, 0.12)),
        fringe=(n(0, 0.12), u(0, 0.05), u(3, 14), max(0.0, u(-0.15, 0.12))),
        curl=curl,
        streaks=u(0, 1),
        hair_length=u(0.9, 2.2) if long else 0.0,
        parting=u(-0.5, 0.5) if rng.random() < 0.5 else 9.0,
        beard=(jaw * full, chin * full, moustache * full, u(0.3, 0.6)),
        beard_colour=_colour(hair * u(0.7, 1.0)),
    )


def draw_view(seed: int, identity: int, image: int) -> View:
    """What image number `image` (from 1) of person `identity` varies. Pure; it does not look at the person."""
    rng = _generator(_VIEW, seed, identity, image)

    def n(deviation: float, limit: float) -> float:
        return float(np.clip(rng.normal(0, deviation), -limit, limit))

    def u(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    azimuth, height = n(0.5, 1.0), u(-0.1, 0.8)
    light = (np.sin(azimuth) * np.cos(height), -np.sin(height), np.cos(azimuth) * np.cos(height))
    gain, share, warm, tint = u(0.86, 1.14), u(0.25, 0.5), n(0.025, 0.05), n(0.01, 0.02)
    cast = np.array([1 + warm, 1 + tint, 1 - warm])
    opposite = np.array([1 - 0.5 * warm, 1, 1 + 0.5 * warm])
    return View(
        yaw=n(0.11, 0.28),
        pitch=n(0.06, 0.15),
        roll=n(0.06, 0.16),
        scale=u(0.38, 0.43),
        centre=(0.5 + n(0.02, 0.05), 0.51 + n(0.02, 0.05)),
        smile=n(0.45, 1.0),
        open=max(0.0, u(-1.2, 1.0)),
        blink=max(0.0, u(-5, 1.0)) if rng.random() < 0.5 else u(0, 0.2),
        brows=n(0.4, 1.0),
        gaze=(n(0.4, 1), n(0.3, 1)),
        light=(float(light[0]), float(light[1]), float(light[2])),
        key=_colour(1.0 * gain * share * 1.3 * cast),
        ambient=_colour(gain * (1 - share) * opposite),
        gamma=float(np.exp(n(0.05, 0.1))),
        saturation=u(0.9, 1.1),
        clothes=_colour(rng.uniform(15, 240, 3)),
        occluder=str(rng.choice(OCCLUDERS)) if rng.random() < 0.08 else "",
        occluder_at=(u(0, 1), u(0, 1), u(0, 1)),
        occluder_colour=_colour(rng.uniform(20, 235, 3)),
        blur=max(0.0, u(-0.008, 0.005)),
        motion=(u(0.01, 0.03) if rng.random() < 0.06 else 0.0, u(0, np.pi)),
        noise=u(0, 6),
        quality=int(rng.integers(60, 96)),
        texture_seed=int(rng.integers(2**62)),
    )


def render(identity: Identity, seed: int, image: int, size: int) -> Image:
    """Image number `image` (from 1) of `identity`: (size, size, 3) uint8, RGB. A pure function of its arguments."""
    return paint(identity, draw_view(seed, identity.number, image), size)


def encode(identity: Identity, seed: int, image: int, size: int) -> bytes:
    """`render` as the bytes of a JPEG in the view's quality."""
    picture = render(identity, seed, image, size)
    quality = draw_view(seed, identity.number, image).quality
    done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return data.tobytes()


def _write_identity(out: Path, seed: int, images: int, size: int, identity: int) -> int:
    """Writes all images of one identity; returns their number."""
    folder = out / f"n{identity:06d}"
    folder.mkdir()
    person = draw_identity(seed, identity)
    for image in range(1, images + 1):
        (folder / f"{image:04d}_01.jpg").write_bytes(encode(person, seed, image, size))
    return images


def _check(out: Path, numbers: dict[str, tuple[int, int, int | None]]) -> None:
    for name, (value, low, high) in numbers.items():
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"synthesize: {name} is {value}; it must be {allowed}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; synthesize writes a new folder")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; synthesize writes a new folder")


def synthesize(
    out: Path, *, identities: int, images_per_identity: int, size: int = 160, seed: int = 0, workers: int | None = None
) -> int:
    """Writes synthetic identities as `out/n000001/0001_01.jpg`, the layout of VGGFace2.

    Every file depends on (seed, identity, image, size) alone: more of each, or of workers, keep the others.
    The folder appears under its name when it is complete; an interrupted run leaves none.

    Args:
        out: folder to create; it may exist if it is empty.
        identities: number of people, at least 1.
        images_per_identity: images of each, at least 1.
        size: side of the pictures in pixels, 32 to 1024.
        seed: which population is drawn, at least 0.
        workers: processes; all cores this process may use if None.
    Returns:
        Number of images written.
    Raises:
        ValueError: a number out of range, or an `out` that is a file or not empty.
    """
    out = Path(out).resolve()
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    _check(
        out,
        {
            "identities": (identities, 1, None),
            "images_per_identity": (images_per_identity, 1, None),
            "size": (size, 32, 1024),
            "seed": (seed, 0, None),
            "workers": (workers, 1, None),
        },
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.partial-{os.getpid()}")
    aside.mkdir()
    try:
        write = partial(_write_identity, aside, seed, images_per_identity, size)
        written = _write_all(write, identities, images_per_identity, workers)
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return written


def _write_all(write: Callable[[int], int], identities: int, images_per_identity: int, workers: int) -> int:
    """Runs `write` for identities 1 to `identities`; returns the number of images."""
    numbers = range(1, identities + 1)
    written = 0
    with progress("synthesize", identities * images_per_identity) as advance:
        if workers == 1:
            for done in map(write, numbers):
                written += done
                advance(done)
            return written
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, identities), context, initializer=cv2.setNumThreads, initargs=(1,))
        try:
            futures = [pool.submit(write, number) for number in numbers]
            for future in as_completed(futures):
                written += future.result()
                advance(future.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return written
