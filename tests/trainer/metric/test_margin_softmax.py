"""Margins at angles that anyone can check, and softmax over two centres by hand."""

from math import cos, exp, log, pi, sin, sqrt

import pytest
import torch

from trainer.metric.margin_softmax import Margin, Norms, margin_softmax, quality_of, remembered_norms


def lowered(kind: str, margin: float, angle: float, quality: float | None = None) -> tuple[float, float]:
    """The cosine with the margin, and its derivative by the cosine."""
    cosine = torch.tensor([cos(angle)], dtype=torch.float64, requires_grad=True)
    found = Margin(kind=kind, margin=margin)(cosine, None if quality is None else torch.tensor([quality]).double())
    (slope,) = torch.autograd.grad(found.sum(), cosine)
    return float(found.detach()), float(slope)


@pytest.mark.parametrize(
    ("kind", "margin", "angle", "quality", "expected", "slope"),
    [
        ("cosface", 0.35, pi / 3, None, 0.15, 1.0),
        ("arcface", pi / 6, pi / 3, None, 0.0, 1 / sin(pi / 3)),  # cos 90 degrees; sin(t + m) / sin(t)
        ("arcface", pi / 6, pi / 2, None, -0.5, sqrt(3) / 2),
        ("arcface", pi / 3, 3 * pi / 4, None, -sqrt(0.5) - pi / 3 * sqrt(0.75), 1.0),  # beyond pi - m
        ("adaface", 0.4, pi / 2, 0.0, -0.4, 1.0),  # CosFace in the middle
        ("adaface", pi / 6, pi / 3, -1.0, 0.0, 1 / sin(pi / 3)),  # a bad picture: ArcFace's angle, nothing subtracted
        ("adaface", pi / 6, pi / 2, 1.0, 0.5 - pi / 3, sqrt(3) / 2),  # a good one: a smaller angle, minus 2 m
        ("adaface", 0.5, pi - 0.1, -1.0, cos(pi - 1e-3), 0.0),  # the angle would pass pi
    ],
)
def test_the_cosine_with_the_own_centre_is_lowered(kind, margin, angle, quality, expected, slope):
    assert lowered(kind, margin, angle, quality) == pytest.approx((expected, slope), abs=1e-9)


def test_arcface_falls_all_the_way_to_the_opposite_point():
    cosines = torch.linspace(1, -1, 2001, dtype=torch.float64)
    assert (Margin(kind="arcface", margin=0.5)(cosines).diff() < 0).all()


@pytest.mark.parametrize("kind", ["arcface", "adaface"])
@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0 + 1e-7, -1.0 - 1e-7])
def test_the_poles_have_finite_gradients(kind, cosine):
    value = torch.tensor([cosine], requires_grad=True)
    Margin(kind=kind, margin=0.5)(value, torch.zeros(1)).sum().backward()
    assert value.grad.isfinite().all()


def test_two_centres_by_hand():
    """Cosines 0.6 (own, 0.1 with the margin) and 0.8, scale 10; centres of lengths 2 and 0.5."""
    centres = torch.tensor([[2.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    embedding = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    found = margin_softmax(embedding, torch.tensor([0]), centres, Margin(kind="cosface", margin=0.5), 10.0)
    wrong = exp(8) / (exp(1) + exp(8))
    assert float(found.loss) == pytest.approx(log(1 + exp(7)))
    assert float(found.cosine) == pytest.approx(0.6)
    assert found.by_embeddings.tolist()[0] == pytest.approx([-10 * wrong, 10 * wrong])
    # across the centre's direction, divided by its length
    assert found.by_centres.tolist()[0] == pytest.approx([0, -10 * wrong * 0.8 / 2])
    assert found.by_centres.tolist()[1] == pytest.approx([10 * wrong * 0.6 / 0.5, 0])


def test_large_scales_neither_overflow_nor_vanish():
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = margin_softmax(embeddings, torch.tensor([0, 0]), centres, Margin(kind="cosface", margin=0.0), 1000.0)
    assert found.loss.tolist() == [0.0, 1000.0]


def test_norms_begin_with_the_first_batch_and_then_move():
    none = Norms(*torch.full((2,), torch.nan).double())
    first = remembered_norms(torch.tensor([2.0, 4.0]), none, 0.25)
    assert [float(value) for value in first] == pytest.approx([3, sqrt(2)])
    second = remembered_norms(torch.tensor([7.0, 7.0]), first, 0.25)
    assert [float(value) for value in second] == pytest.approx([4, 0.75 * sqrt(2)])


def test_quality_is_a_third_of_the_standard_score_cut_to_one():
    norms = Norms(torch.tensor(10.0).double(), torch.tensor(1.999).double())
    found = quality_of(torch.tensor([10.0, 12.0, 4.0, 99.0]), norms, 0.333)
    assert found.tolist() == pytest.approx([0, 0.333, -0.999, 1])
