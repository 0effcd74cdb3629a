"""The largest of each row, found window by window."""

import pytest
import torch

from trainer.metric.pool import largest


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 127, 128, 129, 200, 640])
def test_largest_is_the_first_of_the_largest(columns, transposed):
    """Few different values, so that most rows hold their largest several times; one row holds nothing but -inf."""
    generator = torch.Generator().manual_seed(columns)
    values = torch.randint(0, 1 + columns // 3, (50, columns), generator=generator).float()
    values[7] = -torch.inf
    if transposed:
        values = values.T.contiguous().T
    found, at = largest(values)
    rows = values.tolist()
    assert found.tolist() == [max(row) for row in rows]
    assert at.tolist() == [row.index(max(row)) for row in rows]
