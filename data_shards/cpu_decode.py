"""Encoded bytes and augmentation parameters in, uint8 batches out, on CPU cores: libjpeg-turbo and PyTorch's resize in threads.

The same pictures as `decode`'s DALI pipeline gives (the crop's pixels, a triangle filter when shrinking, the mirror), in less
than half the time: DALI's resize on the CPU costs more than its decoding. A JPEG whose crop is at least twice the output is
halved, quartered or eighthed while it is decoded, by libjpeg-turbo's scaled inverse DCT; the edges of its crop then lie up to
half an output pixel elsewhere.
"""

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_shards.decode import DecodeError, Encoded, Source

Pixels = NDArray[np.uint8]
"""RGB, shape (height, width, 3)."""

_TOGETHER = 8
"""Images that a thread takes at a time."""
_HEAD = 4096
"""Bytes of a JPEG in which Exif is looked for."""


class CpuDecoder:
    """Decodes, crops, resizes and mirrors batches in threads, some batches ahead of their use.

    Args:
        source: called for the next batch, up to `ahead` calls before its result leaves `next`; raises StopIteration at the end.
        image_size: width and height of the output, in pixels.
        device: where the output lies; to a GPU it is copied from page-locked memory (not yet run, for want of a GPU).
        threads: CPU threads.
    """

    ahead = 3
    """Batches held at most: those in work and the one that leaves."""

    def __init__(self, source: Source, image_size: int, device: torch.device | str = "cpu", threads: int = 2) -> None:
        self._source, self._size, self._device = source, image_size, torch.device(device)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._coming: deque[tuple[Tensor, list[Future[None]]]] = deque()
        self._ended = False

    def next(self) -> Tensor:
        """The next batch: uint8 in [0, 255], shape (b, 3, H, W), channels-last in memory.

        Raises:
            StopIteration: the source has ended.
            DecodeError: a picture of this batch does not decode.
        """
        while not self._ended and len(self._coming) < self.ahead:
            self._feed()
        if not self._coming:
            raise StopIteration
        images, parts = self._coming.popleft()
        for part in parts:
            part.result()
        return images.to(self._device, non_blocking=True)

    def decodes(self, encoded: NDArray[np.uint8]) -> bool:
        """Whether this decoder can read one picture."""
        try:
            decoded(encoded)
        except DecodeError:
            return False
        return True

    def _feed(self) -> None:
        try:
            encoded, parameters = self._source()
        except StopIteration:
            self._ended = True
            return
        with torch.inference_mode(False):  # the mode is a thread's own, and those that fill this are not in it
            images = torch.empty((len(encoded), self._size, self._size, 3), dtype=torch.uint8)
        if self._device.type == "cuda":
            images = images.pin_memory()
        columns = (parameters.anchor, parameters.shape, parameters.mirror)
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        parts = [
            self._pool.submit(_fill, images[part], encoded[part], places[part])
            for begin in range(0, len(encoded), _TOGETHER)
            for part in [slice(begin, begin + _TOGETHER)]
        ]
        self._coming.append((images.permute(0, 3, 1, 2), parts))  # (b, 3, H, W)


class _Scratch(threading.local):
    """A thread's room for one decoded picture; a new one for each would cost page faults as dear as half its decoding."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def of(self, count: int) -> NDArray[np.uint8]:
        """At least so many bytes."""
        if len(self._room) < count:
            self._room = np.empty(count, np.uint8)
        return self._room


_scratch = _Scratch()


def _fill(out: Tensor, encoded: Encoded, places: list[tuple[list[float], list[float], int]]) -> None:
    """Decodes some pictures into out, shape (n, size, size, 3); a place is anchor, shape and mirror."""
    size, views = out.shape[1], out.numpy()
    slots = out.permute(0, 3, 1, 2).split(1)  # (1, 3, size, size) each
    for picture, slot, view, (anchor, shape, mirror) in zip(encoded, slots, views, places, strict=True):
        # turned by NumPy: each operation of PyTorch's gives the interpreter's lock away
        rows = torch.from_numpy(crop(picture, anchor, shape, size).transpose(2, 0, 1)[None])  # (1, 3, height, width)
        torch.ops.aten._upsample_bilinear2d_aa.out(rows, [size, size], False, None, None, out=slot)
        if mirror:
            cv2.flip(view, 1, dst=view)


def crop(encoded: NDArray[np.uint8], anchor: Sequence[float], shape: Sequence[float], size: int) -> Pixels:
    """A crop of a picture, or of the picture at a half, a quarter or an eighth of its size where the crop stays `size` large.

    It is a view, good until this thread's next call.

    Args:
        anchor: left and top of the crop as fractions of the picture's width and height.
        shape: its width and height, likewise.
        size: pixels that each side of the crop is to have at least, if it has.
    Raises:
        DecodeError: the picture does not decode.
    """
    pixels = decoded(encoded, shape, size)
    height, width, _ = pixels.shape
    left, right = _span(anchor[0], shape[0], width)
    top, bottom = _span(anchor[1], shape[1], height)
    return pixels[top:bottom, left:right]


def _span(anchor: float, shape: float, extent: int) -> tuple[int, int]:
    """First pixel and the one behind the last; at least one."""
    first = min(round(anchor * extent), extent - 1)
    return first, max(round((anchor + shape) * extent), first + 1)


def decoded(encoded: NDArray[np.uint8], shape: Sequence[float] | None = None, size: int = 0) -> Pixels:
    """A whole picture as displayed, that is after EXIF orientation; with `shape` and `size`, maybe smaller. See `crop`.

    Raises:
        DecodeError: it does not decode.
    """
    try:
        if _plain_jpeg(encoded):
            height, width, kind, _ = simplejpeg.decode_jpeg_header(encoded)
            if kind not in ("CMYK", "YCCK"):
                factor = 1 if shape is None else _shrinking(min(shape[0] * width, shape[1] * height) / size)
                height, width = -(-height // factor), -(-width // factor)
                smaller = {"min_height": height, "min_width": width, "min_factor": factor}
                return simplejpeg.decode_jpeg(encoded, "RGB", buffer=_scratch.of(3 * height * width), **smaller)
        found: Pixels | None = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)  # type: ignore[assignment]
    except (ValueError, cv2.error) as error:
        raise DecodeError(str(error)) from None
    if found is None:
        raise DecodeError("OpenCV does not decode it")
    return found


def _shrinking(times: float) -> int:
    """The factor, of those that libjpeg-turbo has SIMD code for, by which a crop `times` too large may shrink."""
    return next((factor for factor in (8, 4, 2) if times >= factor), 1)


def _plain_jpeg(encoded: NDArray[np.uint8]) -> bool:
    head = encoded[:_HEAD].tobytes()
    return head[:2] == b"\xff\xd8" and b"Exif" not in head
