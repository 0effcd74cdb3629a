"""Which pictures are the same: by their bytes, or nearly, by perceptual hash."""

import io
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLANK = 1.0
"""Standard deviation of the grey values below which a picture is blank: its perceptual hash would say nothing."""
_DRAFT = (128, 128)
_PAIRS = 2**22
"""Candidate pairs that are compared at once."""


def fingerprint(data: bytes) -> bytes:
    """16 bytes that only equal files share."""
    return blake2b(data, digest_size=16).digest()


def perceptual_hash(data: bytes) -> int | None:
    """64 bits that look-alikes nearly share (pHash: the signs of the lowest DCT frequencies of the grey picture at 32 x 32).

    None for a blank picture.

    Raises:
        ValueError: it does not decode.
    """
    import imagehash

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L", _DRAFT)
            grey = image.convert("L")
    except Exception as error:  # Pillow's plugins raise all kinds
        raise ValueError(f"does not decode: {error}") from None
    if np.asarray(grey).std() < BLANK:
        return None
    bits = np.asarray(imagehash.phash(grey).hash).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def exact_groups(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row the first row with the same hash, shape (n,).

    Args:
        hashes: shape (n, 2).
    """
    order = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    starts = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1)) if len(order) else np.zeros(0, bool)
    first = np.empty(len(hashes), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def near_groups(hashes: NDArray[np.uint64], distance: int, within: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the first row of its group, shape (n,).

    Rows of one label are in a group if they are joined by steps of at most `distance` differing bits. Two hashes that
    differ in at most d bits agree in one of d + 1 bands of bits; only such pairs are compared.

    Args:
        hashes: shape (n,).
        distance: 0 to 16 bits.
        within: label of each row; rows of different labels are never joined.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        for a, b in _band_pairs(band, within):
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            rows.append(a[close])
            columns.append(b[close])
    pairs = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(pairs[0]), np.int8), pairs), shape=(len(hashes), len(hashes)))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def _band_pairs(
    band: NDArray[np.uint64], within: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of rows with the same label and band value, some at a time."""
    order = np.lexsort((band, within))
    same = (band[order][1:] == band[order][:-1]) & (within[order][1:] == within[order][:-1])
    starts = np.flatnonzero(np.append(True, ~same)) if len(order) else np.zeros(0, np.int64)
    ends = np.append(starts[1:], len(order))
    left = np.repeat(ends, ends - starts) - np.arange(len(order))  # rows from here to the end of those that share it
    at, step = np.arange(len(order)), 1
    while len(at := at[left[at] > step]):
        for begin in range(0, len(at), _PAIRS):
            chunk = at[begin : begin + _PAIRS]
            yield order[chunk], order[chunk + step]
        step += 1
