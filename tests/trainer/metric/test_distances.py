import math
import operator

import pytest
import torch
from torch.nn.functional import normalize

from trainer.metric import distances
from trainer.metric.distances import cosines_of_pairs, paired_distance, pairwise_squared

X = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
Y = torch.tensor([[0.0, 1.0], [0.6, -0.8]], dtype=torch.float64)


def test_paired_distance_by_hand():
    assert paired_distance(X, Y, squared=True).tolist() == pytest.approx([2.0, 2.56], abs=1e-15)
    assert paired_distance(X, Y, squared=False).tolist() == pytest.approx([math.sqrt(2), 1.6], abs=1e-15)


def test_pairwise_squared_by_hand():
    expected = [[1 + 1, 0.4**2 + 0.8**2], [0.6**2 + 0.2**2, 1.6**2]]  # row i of x against row j of y
    assert pairwise_squared(X, Y).tolist() == [pytest.approx(row, abs=1e-15) for row in expected]
    assert pairwise_squared(X[:1], Y).shape == (1, 2)


def test_the_range_is_reached_at_opposite_points():
    assert paired_distance(X, -X, squared=True).tolist() == pytest.approx([4, 4])
    assert paired_distance(X, -X, squared=False).tolist() == pytest.approx([2, 2])


def test_pairwise_is_never_negative():
    points = normalize(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
    raw = points.square().sum(1)[:, None] + points.square().sum(1)[None] - 2 * points @ points.T
    assert raw.min() < 0, "rounding goes below 0 here, so the test can fail"
    assert pairwise_squared(points, points).min() >= 0


@pytest.mark.parametrize("squared", [False, True])
def test_gradient_at_identical_rows_is_zero(squared):
    x = X.clone().requires_grad_()
    distance = paired_distance(x, X, squared)
    assert distance.tolist() == pytest.approx([0, 0], abs=1e-5)
    distance.sum().backward()
    assert x.grad.tolist() == [[0, 0], [0, 0]]


def test_gradient_of_the_root_is_the_unit_difference():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    paired_distance(x, y, squared=False).sum().backward()
    by_hand = [[math.sqrt(0.5), -math.sqrt(0.5)], [0, 1]]  # (x - y) / |x - y|
    assert x.grad.tolist() == [pytest.approx(row, abs=1e-15) for row in by_hand]
    assert torch.equal(y.grad, -x.grad)


def test_gradient_of_the_square_is_twice_the_difference():
    x = X.clone().requires_grad_()
    paired_distance(x, Y, squared=True).sum().backward()
    assert x.grad.tolist() == [pytest.approx([2, -2]), pytest.approx([0, 3.2])]


def test_close_points_keep_their_distance_in_float32():
    """2 - 2 cos would say 0: in float32 the cosine of these two is 1."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]])
    assert 2 - 2 * float(x @ y.T) == 0
    assert float(paired_distance(x, y, squared=True)) == pytest.approx(1e-10, rel=1e-5)
    assert float(paired_distance(x, y, squared=False)) == pytest.approx(1e-5, rel=1e-5)


def test_cosines_of_pairs_are_their_products_in_any_blocks(monkeypatch):
    embeddings = normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    first, second = torch.randint(50, (2, 333), generator=torch.Generator().manual_seed(1))
    whole = cosines_of_pairs(embeddings, first, second)
    one, other = embeddings[first].tolist(), embeddings[second].tolist()
    products = [math.fsum(map(operator.mul, *rows)) for rows in zip(one, other, strict=True)]
    assert whole.dtype == torch.float64
    assert whole.tolist() == pytest.approx(products, abs=1e-15)
    monkeypatch.setattr(distances, "_CACHED", 8 * 7)
    assert torch.equal(cosines_of_pairs(embeddings, first, second), whole)
    assert cosines_of_pairs(embeddings, first[:0], second[:0]).shape == (0,)
