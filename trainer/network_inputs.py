"""Pictures of every kind that people hold in their hands, as a network takes them: uint8, RGB, size x size."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data_shards.cpu_decode import central_crop
from data_shards.decode import DecodeError
from data_shards.pictures import probe_image
from data_shards.resize import Pixels
from data_shards.sources.base import extension_of, sniff

_KINDS = "a path, bytes, a PIL image, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (H, W, 3) or (3, H, W)"


class Unreadable(ValueError):
    """A picture that does not decode or is not there; the message is the reason and begins with a verb."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.name = name


def expanded(images: Any) -> Sequence[Any]:
    """The pictures that `PhotoEmbedder.embed` was given, one by one.

    Raises:
        ValueError: a folder without pictures, or something of another kind.
    """
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        return pictures_in(path) if path.is_dir() else [path]
    if isinstance(images, bytes | bytearray | memoryview | Image.Image):
        return [images]
    if isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim == 4:
            return list(images)
        return [images]
    try:
        return list(images)
    except TypeError:
        raise ValueError(
            f"images is a {type(images).__name__}; needed is {_KINDS}, several of them, or a folder"
        ) from None


def pictures_in(folder: Path) -> list[Path]:
    """Every picture in a folder and the folders in it, sorted by path; hidden ones are passed over.

    Raises:
        ValueError: there is none.
    """
    found: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in names if extension_of(name) and not name.startswith(".")]
    if not found:
        raise ValueError(f"{folder} holds no pictures")
    return sorted(found)


def network_input(picture: Any, size: int) -> Pixels:
    """One picture's central square, uint8, shape (size, size, 3).

    Raises:
        Unreadable: it is not there, does not decode or is refused.
        ValueError: it is of another kind.
    """
    if isinstance(picture, str | os.PathLike):
        name = os.fspath(picture)
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}", name) from None
        return _decoded(data, size, name)
    if isinstance(picture, bytes | bytearray | memoryview):
        return _decoded(bytes(picture), size, "")
    pixels = np.ascontiguousarray(_of_image(picture) if isinstance(picture, Image.Image) else _of_array(picture))
    height, width, _ = pixels.shape
    return central_crop(pixels, width, height, size)


def _decoded(data: bytes, size: int, name: str) -> Pixels:
    extension = sniff(data[:12])
    if not extension:
        reason = "is no JPEG, PNG, PGM, BMP or WebP by its first bytes" if data else "is empty"
        raise Unreadable(reason, name)
    try:
        width, height = probe_image(data, extension)
        return central_crop(np.frombuffer(data, np.uint8), width, height, size)
    except DecodeError as error:
        raise Unreadable(f"does not decode: {' '.join(str(error).split())}", name) from None
    except ValueError as error:
        raise Unreadable(str(error), name) from None


def _of_image(image: Image.Image) -> NDArray[np.uint8]:
    name = os.fspath(getattr(image, "filename", ""))
    if image.mode.startswith(("I", "F")):
        raise Unreadable(f"is a PIL image of mode {image.mode}, not of 8 bits: give its file", name)
    try:
        return np.asarray((ImageOps.exif_transpose(image) or image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes only now
        raise Unreadable(f"does not decode: {error}", name) from None


def _of_array(picture: Any) -> NDArray[np.uint8]:
    tensor = isinstance(picture, torch.Tensor)
    if not tensor and not isinstance(picture, np.ndarray):
        raise ValueError(f"a picture is a {type(picture).__name__}; needed is {_KINDS}")
    array: NDArray[Any] = picture.detach().cpu().numpy() if tensor else picture
    shape = tuple(array.shape)
    if array.dtype != np.uint8:
        raise ValueError(f"a picture is of type {array.dtype}; needed is uint8, in [0, 255]")
    if array.ndim == 2 and array.size:
        return np.repeat(array[:, :, None], 3, 2)
    if array.ndim != 3 or not array.size or 3 not in (shape[0], shape[2]):
        raise ValueError(f"a picture has shape {shape}; needed is (H, W, 3), (3, H, W) or (H, W)")
    if shape[0] == shape[2] == 3:
        raise ValueError(f"a picture has shape {shape}, which may be (H, W, 3) or (3, H, W): give larger ones")
    return array if shape[2] == 3 else array.transpose(1, 2, 0)
