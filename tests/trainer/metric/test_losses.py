import math

import pytest
import torch

from trainer.metric.losses import triplet_loss
from trainer.metric.mining import Triplets


def triplets(positive: list[float], negative: list[float], valid: list[bool]) -> Triplets:
    def leaf(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)

    return Triplets(leaf(positive), leaf(negative), torch.tensor(valid))


def three() -> Triplets:
    """d_ap - d_an is -0.1, -0.6, 0.5; the last anchor, whose difference is 1, is not valid."""
    return triplets([0.5, 0.3, 0.9, 1.0], [0.6, 0.9, 0.4, 0.0], [True, True, True, False])


def gradients(found: Triplets) -> tuple[list[float], list[float]]:
    return found.positive_distance.grad.tolist(), found.negative_distance.grad.tolist()


def test_margin_by_hand():
    found = three()
    loss, active = triplet_loss(found, 0.2)
    assert loss.item() == pytest.approx(0.1 + 0 + 0.7, abs=1e-15)
    assert active.item() == 2
    loss.backward()
    assert gradients(found) == ([1, 0, 1, 0], [-1, 0, -1, 0])


def test_soft_margin_by_hand():
    found = three()
    loss, active = triplet_loss(found, None)
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(x)) for x in (-0.1, -0.6, 0.5)), abs=1e-14)
    assert active.item() == 3, "every valid anchor is active"
    loss.backward()
    slopes = [1 / (1 + math.exp(-x)) for x in (-0.1, -0.6, 0.5)]
    ap, an = gradients(found)
    assert ap == pytest.approx([*slopes, 0])
    assert an == pytest.approx([*(-slope for slope in slopes), 0])


def test_a_triplet_exactly_at_the_margin_is_not_active():
    loss, active = triplet_loss(triplets([0.25], [0.5], [True]), 0.25)
    assert (loss.item(), active.item()) == (0, 0)


@pytest.mark.parametrize(
    ("found", "margin"),
    [
        (triplets([0.1, 0.2], [0.9, 0.8], [True, True]), 0.2),
        (triplets([0.9, 0.8], [0.1, 0.2], [False, False]), 0.2),
        (triplets([0.9, 0.8], [0.1, 0.2], [False, False]), None),
    ],
    ids=["all easy", "none valid", "none valid, soft margin"],
)
def test_no_active_triplet_is_zero_with_zero_gradient(found, margin):
    loss, active = triplet_loss(found, margin)
    assert (loss.item(), active.item()) == (0, 0)
    loss.backward()  # every rank calls backward, or the gather of the others would wait for ever
    assert gradients(found) == ([0, 0], [0, 0])


def test_sum_and_count_are_scalars_and_the_count_is_a_whole_number():
    loss, active = triplet_loss(three(), 0.2)
    assert loss.shape == active.shape == ()
    assert active.dtype == torch.int64
    assert not active.requires_grad


def test_soft_margin_counts_the_easiest_triplet_there_is_in_float32():
    """Squared distances differ by at most 4, so that the soft margin never rounds to 0."""
    _, active = triplet_loss(Triplets(torch.tensor([0.0]), torch.tensor([4.0]), torch.tensor([True])), None)
    assert active.item() == 1


def test_sharpness_by_hand():
    """Margin 0.2 and sharpness 10: the exponents are 10 (-0.1 + 0.2) = 1, 10 (-0.6 + 0.2) = -4, 10 (0.5 + 0.2) = 7."""
    found = three()
    loss, active = triplet_loss(found, 0.2, 10.0)
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(x)) / 10 for x in (1, -4, 7)), abs=1e-14)
    assert active.item() == 3, "every valid anchor is active"
    loss.backward()
    slopes = [1 / (1 + math.exp(-x)) for x in (1, -4, 7)]
    ap, an = gradients(found)
    assert ap == pytest.approx([*slopes, 0])
    assert an == pytest.approx([*(-slope for slope in slopes), 0])


def test_the_sharp_loss_becomes_the_hinge():
    """The two differ by at most log(2) / sharpness for each anchor, where the hinge bends."""
    hinge, _ = triplet_loss(three(), 0.2)
    for sharpness in (10.0, 100.0, 1000.0):
        sharp, _ = triplet_loss(three(), 0.2, sharpness)
        assert 0 <= sharp.item() - hinge.item() <= 3 * math.log(2) / sharpness
