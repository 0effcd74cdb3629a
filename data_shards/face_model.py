"""What a drawn person fixes, and what an image of it varies."""

from dataclasses import dataclass

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
