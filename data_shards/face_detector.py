"""Faces and their five landmarks in a picture: YuNet, through OpenCV."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_shards.transform import moved, similarity, template_for

YUNET = Path(__file__).parent / "yunet" / "face_detection_yunet_2023mar.onnx"
"""Comes with the package. Source: Wu et al. 2023, YuNet; OpenCV's model zoo, MIT licence."""
Choice = Literal["largest", "central", "one"]

_FIRST_SIDE, _SECOND_SIDE = 640, 1920
"""Pixels of the longer side at which faces are looked for, first and where none was found."""
_BORDER = 0.3
"""Of the longer side, added all around where none was found: YuNet misses faces that fill their picture."""
_UPRIGHT, _FILLED = 320, 0.7
"""Side in pixels of the pictures in which landmarks are refined, and the share of it that an aligned face's crop fills."""
_FAR = 0.5
"""Distances of the eyes by which landmarks may move."""
_SUPPRESSION, _MOST = 0.3, 500


@dataclass(frozen=True)
class Face:
    """One face, in pixels of the picture as displayed, whole numbers at pixel centres."""

    box: tuple[float, float, float, float]
    """x, y, width, height; it may stick out of the picture."""
    landmarks: NDArray[np.float64]
    """As (x, y): the eye on the picture's left, the other, the nose, the corners of the mouth; shape (5, 2). To a
    hundredth, and as float32 knows it: what a file of them gives, when it is read."""
    score: float
    """Of the detector, in (0, 1]."""


class FaceDetector:
    """Finds faces of some 30 pixels and more (of the picture at 1,920 pixels, where it is larger), turned by up to some 45
    degrees.

    Args:
        path: YuNet as an ONNX file, in the form of 2023 or later.
        min_score: faces that the detector gives less are left out, in (0, 1).
    Raises:
        ValueError: the file is not there or is no such network.
    """

    def __init__(self, path: Path = YUNET, min_score: float = 0.6) -> None:
        if not path.is_file():
            raise ValueError(f"detector {path} is not there; without it YuNet comes with the package")
        cv2.setNumThreads(1)
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # it warns of a backend that we do not choose
        try:
            self._network = cv2.FaceDetectorYN.create(str(path), "", (32, 32), min_score, _SUPPRESSION, _MOST)
            self._look(np.zeros((64, 64, 3), np.uint8), 0)
        except cv2.error as error:
            raise ValueError(f"detector {path} is no YuNet of 2023 in ONNX: {_brief(error)}") from None

    def faces(self, image: Image.Image) -> list[Face]:
        """All faces found, the largest first.

        Args:
            image: mode L or RGB.
        """
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        longest = max(image.size)
        sides = [_FIRST_SIDE, *([_SECOND_SIDE] if longest > _FIRST_SIDE else [])]
        for side, border in [*((side, 0.0) for side in sides), (_FIRST_SIDE, _BORDER)]:
            factor = min(1.0, side / longest)
            found = self._look(_scaled(pixels, factor), math.ceil(border * factor * longest))
            if len(found):
                return sorted((_face(row, factor) for row in found), key=lambda face: -face.box[2] * face.box[3])
        return []

    def refined(self, image: Image.Image, face: Face) -> Face:
        """The face with landmarks that were looked for again, twice, in pictures of it that are upright and of one size.

        At first they shift by a tenth of the distance of the eyes when the picture is turned by 20 degrees, and by 8 % when it is
        enlarged four times; so by 3 % (20 ORL faces; `benchmarks/README.md`).
        """
        target = (template_for((_UPRIGHT, _UPRIGHT)) - _UPRIGHT / 2) * _FILLED + _UPRIGHT / 2
        landmarks = face.landmarks
        for _ in range(2):
            matrix = similarity(landmarks, target)
            upright = np.asarray(moved(image, matrix, (_UPRIGHT, _UPRIGHT)).convert("RGB"))[:, :, ::-1]
            found = self._look(np.ascontiguousarray(upright), 0)
            if not len(found):
                break
            there = found[np.argmax(found[:, 2] * found[:, 3]), 4:14].reshape(5, 2)
            if np.linalg.norm(there - target, axis=1).mean() > _FAR * np.linalg.norm(target[0] - target[1]):
                break  # of another face
            landmarks = (there - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
        return Face(face.box, _rounded(landmarks), face.score)

    def _look(self, pixels: NDArray[np.uint8], border: int) -> NDArray[np.float64]:
        """A row of 15 for each face: box, landmarks, score; in the picture without its border."""
        if border:
            pixels = cv2.copyMakeBorder(pixels, border, border, border, border, cv2.BORDER_REPLICATE)  # type: ignore[assignment]
        self._network.setInputSize((pixels.shape[1], pixels.shape[0]))
        _, found = self._network.detect(pixels)
        rows = np.zeros((0, 15)) if found is None else np.array(found, np.float64)
        rows = rows[np.isfinite(rows).all(axis=1)]
        rows[:, [0, 1, *range(4, 14)]] -= border
        return rows


def choose(faces: list[Face], which: Choice, size: tuple[int, int]) -> Face:
    """The face that a picture is of.

    Args:
        which: largest; central: nearest to the middle, by its box's centre; one: the only one.
        size: width and height of the picture.
    Raises:
        ValueError: there is none, or several where there must be one; the message is the reason.
    """
    assert which in get_args(Choice), which
    if not faces:
        raise ValueError("has no face that was found")
    if which == "one" and len(faces) > 1:
        raise ValueError(f"has {len(faces)} faces")
    if which != "central":
        return faces[0]
    return min(faces, key=lambda face: _off_centre(face, size))


def _off_centre(face: Face, size: tuple[int, int]) -> float:
    x, y, width, height = face.box
    return math.hypot(x + width / 2 - size[0] / 2, y + height / 2 - size[1] / 2)


def _scaled(pixels: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    if factor == 1:
        return pixels
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _face(row: NDArray[np.float64], factor: float) -> Face:
    """In the picture's own pixels; `factor` times as large it was looked at."""
    x, y, width, height = (row[:4] / factor).tolist()
    return Face((x, y, width, height), _rounded((row[4:14].reshape(5, 2) + 0.5) / factor - 0.5), float(row[14]))


def _rounded(landmarks: NDArray[np.float64]) -> NDArray[np.float64]:
    return landmarks.round(2).astype(np.float32).astype(np.float64)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
