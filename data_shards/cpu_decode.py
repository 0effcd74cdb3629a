"""Encoded bytes and augmentation parameters in, uint8 batches out, on CPU cores: libjpeg-turbo and `resize.c` in threads.

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

from data_shards.augment import central_square
from data_shards.decode import DecodeError, Encoded, Source
from data_shards.resize import Pixels, resize_into

_TOGETHER = 16
"""Images that a thread takes at a time, at most: more of them wait less for the interpreter's lock."""
_TASKS = 4
"""Such tasks for each thread, at least, among the batches that are in work."""
_HEAD, _LONG_HEAD = 1024, 1 << 18
"""Bytes of a JPEG whose segments are gone through, and those in which Exif is looked for where that does not end at tables."""
_TABLES = (b"\xff\xdb", b"\xff\xc4", b"\xff\xc0", b"\xff\xc2")
"""Markers that follow the application segments: quantisation, Huffman codes, a frame."""


class CpuDecoder:
    """Decodes, crops, resizes and mirrors batches in threads, some batches ahead of their use.

    Args:
        source: called for the next batch, up to `ahead` calls before its result leaves `next`; raises StopIteration at the end.
        image_size: width and height of the output, in pixels.
        device: where the output lies; to a GPU it is copied from page-locked memory (not yet run, for want of a GPU).
        threads: CPU threads.
    """

    ahead = 4
    """Batches held at most: those in work and the one that leaves."""

    def __init__(self, source: Source, image_size: int, device: torch.device | str = "cpu", threads: int = 2) -> None:
        self._source, self._size, self._device, self._threads = source, image_size, torch.device(device), threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._coming: deque[tuple[Tensor, list[Future[None]]]] = deque()
        self._ended = False
        self._buffers = _Buffers()

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
        return images.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else images

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
        out = self._buffers.array((len(encoded), self._size, self._size, 3))
        columns = (parameters.anchor, parameters.shape, parameters.mirror)
        places = list(zip(*(column.tolist() for column in columns), strict=True))
        together = min(max(1, (self.ahead - 1) * len(encoded) // (_TASKS * self._threads)), _TOGETHER)
        parts = [
            self._pool.submit(_fill, out[part], encoded[part], places[part])
            for begin in range(0, len(encoded), together)
            for part in [slice(begin, begin + together)]
        ]
        self._coming.append((torch.from_numpy(out).permute(0, 3, 1, 2), parts))  # (b, 3, H, W)


class _Scratch(threading.local):
    """A thread's rooms for decoded pictures; new ones for each would cost page faults as dear as half their decoding."""

    def __init__(self) -> None:
        self._rooms = [np.empty(0, np.uint8)] * _TOGETHER

    def room(self, number: int, count: int) -> NDArray[np.uint8]:
        """At least `count` bytes."""
        if len(self._rooms[number]) < count:
            self._rooms[number] = np.empty(count, np.uint8)
        return self._rooms[number]


_scratch = _Scratch()


class _Buffers:
    """Memory of batches, used again once nobody holds a tensor over it; new memory costs a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._free: deque[NDArray[np.uint8]] = deque()

    def array(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """For `torch.from_numpy`; what else is to write into it must keep it, too: a slice of it does not."""
        count = int(np.prod(shape))
        memory = self._free.popleft() if self._free else np.empty(count, np.uint8)
        if len(memory) < count:
            memory = np.empty(count, np.uint8)
        array = memory[:count].reshape(shape)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array


def _fill(out: NDArray[np.uint8], encoded: Encoded, places: list[tuple[list[float], list[float], int]]) -> None:
    """Decodes some pictures into out, shape (n, size, size, 3); a place is anchor, shape and mirror."""
    size = out.shape[1]
    crops = [
        crop(picture, anchor, shape, size, number)
        for number, (picture, (anchor, shape, _)) in enumerate(zip(encoded, places, strict=True))
    ]
    resize_into(out, crops, [mirror for _, _, mirror in places])


def central_crop(picture: NDArray[np.uint8], width: int, height: int, size: int) -> Pixels:
    """One picture as evaluation takes it: its largest central square at size x size pixels, shape (size, size, 3).

    Args:
        picture: encoded, shape (bytes,), or RGB, shape (height, width, 3).
        width, height: of the whole picture as displayed, in pixels.
    Raises:
        DecodeError: it does not decode.
    """
    parameters = central_square(np.array([width]), np.array([height]))
    anchor, shape = parameters.anchor[0].tolist(), parameters.shape[0].tolist()
    out = np.empty((1, size, size, 3), np.uint8)
    if picture.ndim == 1:
        _fill(out, [picture], [(anchor, shape, 0)])
    else:
        resize_into(out, [_cut(picture, anchor, shape)], [0])
    return out[0]


def crop(
    encoded: NDArray[np.uint8], anchor: Sequence[float], shape: Sequence[float], size: int, room: int = 0
) -> Pixels:
    """A crop of a picture, or of the picture at a half, a quarter or an eighth of its size where the crop stays `size` large.

    It is a view, good until this thread's next call with the same `room`.

    Args:
        anchor: left and top of the crop as fractions of the picture's width and height.
        shape: its width and height, likewise.
        size: pixels that each side of the crop is to have at least, if it has.
        room: which of this thread's rooms is used, from 0 to 15.
    Raises:
        DecodeError: the picture does not decode.
    """
    return _cut(decoded(encoded, shape, size, room), anchor, shape)


def _cut(pixels: Pixels, anchor: Sequence[float], shape: Sequence[float]) -> Pixels:
    height, width, _ = pixels.shape
    left, right = _span(anchor[0], shape[0], width)
    top, bottom = _span(anchor[1], shape[1], height)
    return pixels[top:bottom, left:right]


def _span(anchor: float, shape: float, extent: int) -> tuple[int, int]:
    """First pixel and the one behind the last; at least one."""
    first = min(round(anchor * extent), extent - 1)
    return first, max(round((anchor + shape) * extent), first + 1)


def decoded(encoded: NDArray[np.uint8], shape: Sequence[float] | None = None, size: int = 0, room: int = 0) -> Pixels:
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
                buffer = _scratch.room(room, 3 * height * width)
                return simplejpeg.decode_jpeg(
                    encoded, "RGB", min_height=height, min_width=width, min_factor=factor, buffer=buffer
                )
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
    """A JPEG whose application segments, in front of its tables, are none of Exif's."""
    head = encoded[:_HEAD].tobytes()
    if head[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 8 <= len(head) and head[at] == 0xFF and (0xE0 <= head[at + 1] <= 0xEF or head[at + 1] == 0xFE):
        if head[at + 4 : at + 8] == b"Exif":
            return False
        at += 2 + 256 * head[at + 2] + head[at + 3]
    return head[at : at + 2] in _TABLES or b"Exif" not in encoded[:_LONG_HEAD].tobytes()
