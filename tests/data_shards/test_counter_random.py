"""Against plain Python integers, and a coarse look at whether the numbers are uniform."""

import numpy as np
import pytest

from data_shards.counter_random import random_bits, uniform

WORD = 2**64 - 1


def finalise(z):
    """One output of SplitMix64 for its state z, as in Steele, Lea and Flood 2014, figure 16."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def slow_bits(*counters):
    bits = 0
    for counter in counters:
        bits = finalise(((bits ^ (counter & WORD)) + 0x9E3779B97F4A7C15) & WORD)
    return bits


def test_one_counter_of_zero_is_the_published_first_output_of_splitmix64_seeded_with_zero():
    assert random_bits(0).tolist() == [0xE220A8397B1DCDAF]


@pytest.mark.parametrize(
    "counters", [(0,), (1,), (5, 0), (0, 5), (3, 1, 4, 1, 5), (2**63 - 1, 2**32), (-1, 7), (-(2**63), -2)]
)
def test_bits_equal_those_of_plain_integers(counters):
    assert random_bits(*counters).tolist() == [slow_bits(*counters)]


def test_arrays_broadcast_against_each_other():
    rows, columns = np.arange(3)[:, None], np.array([2, 9, 4, 7])
    expected = [[slow_bits(8, row, column) for column in (2, 9, 4, 7)] for row in range(3)]
    assert random_bits(8, rows, columns).tolist() == expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint16])
def test_the_type_of_a_counter_does_not_matter(dtype):
    assert random_bits(4, np.array([0, 1, 60_000], np.int64).astype(dtype)).tolist() == [
        slow_bits(4, counter) for counter in np.array([0, 1, 60_000]).astype(dtype).tolist()
    ]


def test_the_order_of_the_counters_matters():
    assert len({*random_bits(1, 2).tolist(), *random_bits(2, 1).tolist(), *random_bits(1, 2, 0).tolist()}) == 3


def test_uniform_is_the_upper_53_bits():
    numbers = uniform(11, np.arange(50))
    assert numbers.tolist() == [(slow_bits(11, counter) >> 11) / 2**53 for counter in range(50)]


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_neighbouring_counters_fill_256_bins_evenly(varied):
    counters = [np.int64(17), np.int64(2), np.int64(1_000_003)]
    counters[varied] = np.arange(2**18)
    observed = np.bincount((uniform(*counters) * 256).astype(int), minlength=256)
    chi_square = ((observed - 1024) ** 2 / 1024).sum()
    assert len(observed) == 256
    assert 173 < chi_square < 354  # 255 degrees of freedom: outside with probability 1e-4 at both ends together


def test_numbers_of_neighbouring_counters_are_uncorrelated():
    numbers = uniform(3, np.arange(2)[:, None], np.arange(100_000))
    table = [numbers[0], numbers[1], np.roll(numbers[0], 1)]
    off_diagonal = np.corrcoef(table)[np.triu_indices(3, 1)]
    assert (np.abs(off_diagonal) < 4 / np.sqrt(100_000)).all()
