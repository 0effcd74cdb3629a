"""The order of neighbours as integers, ragged rows side by side, and reading in parts, against what can be seen by eye."""

import numpy as np
import pytest
import torch

from trainer.evaluation.search import similarity
from trainer.evaluation.search.similarity import (
    NONE,
    chunks,
    keys_of,
    neighbours_of,
    padded,
    read,
    similarities,
    summing_error,
)


def test_keys_order_as_similarity_then_lowest_position():
    values = torch.tensor([1.0, 1.0, 0.5, 1e-30, 0.0, -0.0, -1e-30, -0.5, -1.0])
    positions = torch.tensor([3, 2**32 - 2, 9, 0, 7, 8, 5, 4, 1])
    keys = keys_of(values, positions)
    assert keys.tolist() == sorted(keys.tolist(), reverse=True)
    assert len(keys.unique()) == len(keys)
    assert (keys > NONE).all()
    found = neighbours_of(keys)
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], positions)


def test_rows_side_by_side():
    table = padded(torch.tensor([5.0, 1.0, 7.0, 2.0]), torch.tensor([2, 0, 2, 0]), 4, -1.0)
    assert table.tolist() == [[1, 2], [-1, -1], [5, 7], [-1, -1]]
    assert padded(torch.empty(0), torch.empty(0, dtype=torch.int64), 3, -1.0).shape == (3, 0)


def test_a_similarity_is_the_float64_product_rounded():
    """In float32 the small number would be lost in the sum before the large ones cancel."""
    gallery, probes = torch.tensor([[0.0] * 3, [1e8, 1.0, -1e8]]), torch.ones(2, 3)
    assert similarities(gallery, torch.tensor([1]), probes, torch.tensor([0])).tolist() == [1.0]
    assert similarities(gallery.numpy(), torch.tensor([1]), probes, torch.tensor([0])).tolist() == [1.0]


def test_reading_in_parts(monkeypatch):
    monkeypatch.setattr(similarity, "CHUNK", 4)
    rows = np.arange(18, dtype=np.float16).reshape(9, 2)
    parts = list(chunks(rows))
    assert [begin for begin, _ in parts] == [0, 4, 8]
    assert torch.equal(torch.cat([part for _, part in parts]), torch.arange(18.0).view(9, 2))
    assert [begin for begin, _ in chunks(torch.from_numpy(rows))] == [0, 4, 8]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_read(bad):
    rows = torch.ones(5, 3)
    rows[4, 2] = bad
    with pytest.raises(ValueError, match="a number that is not finite"):
        read(rows)


def test_numbers_whose_sum_overflows_are_read():
    rows = torch.full((2, 2), 3e38)
    assert torch.equal(read(rows), rows)


def test_the_error_of_a_sum_grows_with_its_length_up_to_a_block():
    assert summing_error(128) == 1e-5
    assert summing_error(512) == summing_error(12_288) == 2**-15
