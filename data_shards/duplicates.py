"""Which pictures are the same: byte for byte, or nearly, by perceptual hash."""

from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import ImageStat

from data_shards.pictures import MAX_PIXELS, quiet_pillow
from data_shards.sources.base import sniff
from data_shards.transform import decoded

MAX_DISTANCE = 16
"""Bits of 64. Of unrelated pictures 32 differ, give or take 4."""
BLANK = 1.0
"""Standard deviation of the grey values, of 255, below which a picture has no perceptual hash."""

_BITS = 64
_DRAFT = (128, 128)
"""Pixels from which `imagehash` averages its 32 x 32; a JPEG is decoded to no fewer."""


def fingerprint(data: bytes) -> bytes:
    """16 bytes that two different pictures do not share: BLAKE2b."""
    return blake2b(data, digest_size=16).digest()


def perceptual_hash(data: bytes) -> int | None:
    """64 bits of which few change when a picture is scaled, encoded again or lightened: `imagehash.phash`.

    Of the picture as displayed, in grey. The first bit, the mean's, is all but always 1.

    Returns:
        None of a blank picture: its bits would be noise, or be those of every other blank picture.
    Raises:
        ValueError: it does not decode, or has more than `MAX_PIXELS`; the message is the reason.
    """
    import imagehash

    extension = sniff(data[:12])
    if not extension:
        raise ValueError("is no JPEG, PNG, PGM, BMP or WebP by its first bytes" if data else "is empty")
    with quiet_pillow():
        grey = decoded(data, extension, draft=_DRAFT, max_pixels=MAX_PIXELS).convert("L")
    if ImageStat.Stat(grey).stddev[0] < BLANK:
        return None
    return int.from_bytes(np.packbits(imagehash.phash(grey).hash).tobytes(), "big")


def exact_groups(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row the first row with the same hash.

    Args:
        hashes: shape (n, 2).
    Example: hashes a, b, a -> 0, 1, 0.
    """
    return _first_of_equal(hashes[:, 0], hashes[:, 1])


def near_groups(
    phashes: NDArray[np.uint64], distance: int, within: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """For each row the first row of its group: rows are grouped that a chain of near ones joins.

    Near are hashes that differ in at most `distance` bits. None is missed: of `distance` + 1 bands of the bits two near
    hashes share at least one, so only rows that share a band are compared. Memory grows with n alone; time with the number
    of rows that share a band, so with the square of n where `distance` is large and `within` is not given.

    Args:
        phashes: shape (n,).
        distance: bits of 64, 0 to 16.
        within: labels, shape (n,); only rows with the same one are compared. None: all are.
    Raises:
        ValueError: `distance` is out of range.
    Example: hashes 0b0000, 0b0111, 0b0001, 0b0011 -> distance 1: 0, 0, 0, 0, for each differs from the next in one bit.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"near_distance is {distance}; it must be 0 to {MAX_DISTANCE} of {_BITS} bits")
    labels = np.zeros(len(phashes), np.int64) if within is None else within
    first = _first_of_equal(labels, phashes)
    if distance == 0:
        return first
    rows = np.flatnonzero(first == np.arange(len(first)))  # equal hashes are joined: a band's rows all differ
    groups = _Groups(len(rows))
    for shift, width in _bands(distance + 1):
        band = (phashes[rows] >> np.uint64(shift)) & np.uint64(2**width - 1)
        _join_near(phashes[rows], labels[rows], band, distance, groups)
    return rows[groups.first()][np.searchsorted(rows, first)]


def _bands(count: int) -> list[tuple[int, int]]:
    """Where each of the bands begins, and how many bits it has."""
    edges = [_BITS * number // count for number in range(count + 1)]
    return [(start, end - start) for start, end in pairwise(edges)]


def _join_near(
    hashes: NDArray[np.uint64],
    labels: NDArray[np.integer],
    band: NDArray[np.uint64],
    distance: int,
    groups: "_Groups",
) -> None:
    """Joins the near rows among those of one label and band: each is compared with the next, the next but one, and so on."""
    order = np.lexsort((band, labels))
    starts = _starts(labels[order], band[order])
    ends = np.append(np.flatnonzero(starts)[1:], len(order))
    left = np.repeat(ends, np.diff(ends, prepend=0)) - np.arange(len(order))  # rows to the end of the run
    hashes = hashes[order]
    at = np.flatnonzero(left > 1)
    step = 1
    while len(at):
        near = at[np.bitwise_count(hashes[at] ^ hashes[at + step]) <= distance]
        groups.join(order[near], order[near + step])
        step += 1
        at = at[left[at] > step]


class _Groups:
    """Rows joined to groups, a bounded number of pairs at a time."""

    def __init__(self, count: int) -> None:
        self._first = np.arange(count)
        self._pairs: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._waiting = 0

    def join(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        """Joins row a[i] with row b[i]."""
        apart = self._first[a] != self._first[b]
        a, b = a[apart], b[apart]
        if len(a):
            self._pairs.append((a, b))
            self._waiting += len(a)
        if self._waiting > len(self._first):
            self._settle()

    def first(self) -> NDArray[np.int64]:
        """The first row of each row's group."""
        self._settle()
        return self._first

    def _settle(self) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if not self._pairs:
            return
        count = len(self._first)
        a, b = (self._first[np.concatenate(side)] for side in zip(*self._pairs, strict=True))
        graph = coo_array((np.ones(len(a), bool), (a, b)), (count, count))
        labels = connected_components(graph, directed=False)[1]
        self._first = np.unique(labels, return_index=True)[1][labels][self._first]
        self._pairs, self._waiting = [], 0


def _first_of_equal(major: NDArray[np.integer], minor: NDArray[np.integer]) -> NDArray[np.int64]:
    """For each row the first row with the same pair of values."""
    order = np.lexsort((minor, major))  # stable: rows with the same pair stay in order
    starts = _starts(major[order], minor[order])
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return first


def _starts(major: NDArray[np.integer], minor: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Where in sorted pairs a new one begins."""
    starts = np.ones(len(major), bool)
    starts[1:] = (major[1:] != major[:-1]) | (minor[1:] != minor[:-1])
    return starts
