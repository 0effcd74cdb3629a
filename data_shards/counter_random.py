"""Random numbers as a pure function of counters, so that any rank can compute any sample's without a generator's state."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_ALL = (1 << 64) - 1


def _mixed(x: int) -> int:
    """`_mix` of one number; what NumPy does with one takes ten times as long."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _ALL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _ALL
    return x ^ (x >> 31)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(*counters: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for every tuple of counters; arrays broadcast against each other.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained over the counters.
    """
    alone, first = 0, 0
    while first < len(counters) and isinstance(counter := counters[first], int):
        alone = _mixed(((alone ^ counter & _ALL) + _GOLDEN) & _ALL)
        first += 1
    bits = np.array([alone], np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters[first:]:
            bits = _mix((bits ^ np.asarray(counter).astype(np.uint64)) + np.uint64(_GOLDEN))
    return bits


def uniform(*counters: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for every tuple of counters (see `random_bits`)."""
    return (random_bits(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
