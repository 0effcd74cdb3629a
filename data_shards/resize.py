"""Crops to squares of one size, without the interpreter's lock: `resize.c`, or PyTorch where that was not compiled.

Both widen a triangle filter when shrinking. PyTorch rounds between its two passes, so that a value may differ by one level.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""RGB, shape (height, width, 3)."""

_pytorch: Callable[..., torch.Tensor] = torch._C._nn._upsample_bilinear2d_aa
"""What `torch.nn.functional.interpolate` calls for mode "bilinear" with antialias; that takes no `out`."""
_CROP = np.dtype(
    [
        ("pixels", np.uint64),
        ("stride", np.int64),
        ("width", np.int32),
        ("height", np.int32),
        ("mirror", np.int32),
    ],
    align=True,
)
"""As struct crop of `resize.c`, which ends on a multiple of 8 bytes."""


def compiled() -> bool:
    """Whether `resize.c` was compiled when facescale was installed, which needs a C compiler."""
    return _compiled() is not None


def resize_into(out: NDArray[np.uint8], crops: Sequence[Pixels], mirrors: Sequence[int]) -> None:
    """Resizes n pictures of any sizes; 1 in `mirrors` swaps left and right.

    Args:
        out: shape (n, size, size, 3), contiguous.
    """
    if _compiled() is not None:
        by_c(out, crops, mirrors)
    else:
        by_pytorch(out, crops, mirrors)


def by_c(out: NDArray[np.uint8], crops: Sequence[Pixels], mirrors: Sequence[int]) -> None:
    """`resize_into` with `resize.c`."""
    function = _compiled()
    assert function is not None
    assert out.flags.c_contiguous
    assert len(out) == len(crops) == len(mirrors)
    rows = []
    kept = []  # until the call has ended
    for crop, mirror in zip(crops, mirrors, strict=True):
        pixels = crop if crop.strides[1:] == (3, 1) else np.ascontiguousarray(crop)
        kept.append(pixels)
        height, width, _ = pixels.shape
        rows.append((_address(pixels), pixels.strides[0], width, height, mirror))
    described = np.array(rows, _CROP)
    if function(_address(described), len(rows), out.shape[1], _address(out)):
        raise MemoryError("no memory to resize pictures with")


def by_pytorch(out: NDArray[np.uint8], crops: Sequence[Pixels], mirrors: Sequence[int]) -> None:
    """`resize_into` with PyTorch."""
    size = out.shape[1]
    # made whole and turned by NumPy, and before: PyTorch's operations give the interpreter's lock away, and its copy of a crop
    # that is not contiguous starts threads of its own
    slots = [torch.from_numpy(slot) for slot in out.transpose(0, 3, 1, 2)[:, None]]  # (1, 3, size, size) each
    rows = [torch.from_numpy(np.ascontiguousarray(pixels).transpose(2, 0, 1)[None]) for pixels in crops]
    for picture, slot, view, mirror in zip(rows, slots, out, mirrors, strict=True):
        _pytorch(picture, [size, size], False, None, None, out=slot)
        if mirror:
            cv2.flip(view, 1, dst=view)


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


@cache
def _compiled() -> Callable[..., int] | None:
    found = importlib.util.find_spec("data_shards._resize")
    if found is None or found.origin is None:
        return None
    try:
        function = ctypes.CDLL(found.origin).facescale_resize
    except OSError:  # of another machine
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    function.restype = ctypes.c_int
    resize: Callable[..., int] = function
    return resize
