"""Every loss by hand, and value and gradient against plain loops; what is defined where there is nothing to learn from."""

import math

import pytest
import torch
from torch import Tensor

from tests.trainer.metric import oracle
from tests.trainer.metric.oracle import chord, on_circle, points
from trainer.metric import pool as pool_module
from trainer.metric.losses import Objective, active_anchors, effective_rank, spread, triplet_loss
from trainer.metric.mining import Triplets, batch_hard
from trainer.metric.pool import Pool

MINING = ("batch_hard", "batch_all", "semi_hard", "hardest_semi_hard")


def objective(kind: str = "margin", mining: str = "batch_hard", margin: float = 0.4, **more) -> Objective:
    given = {"sharpness": 3.0, "squared": False, "average": "active"} | more
    return Objective(kind=kind, mining=mining, margin=None if kind == "soft_margin" else margin, **given)


def result(
    loss: Objective, embeddings: Tensor, ids: Tensor, most: int | None = None, draws: Tensor | None = None
) -> tuple[float, int, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    found = loss(Pool.of(leaf, ids), most, draws)
    (gradient,) = torch.autograd.grad(found.total, leaf)
    return float(found.total.detach()), int(found.divisor), gradient


def of_oracle(function, embeddings: Tensor, *args) -> tuple[float, int, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    total, divisor = function(leaf, *args)
    (gradient,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), divisor, gradient


def assert_equal(ours: tuple[float, int, Tensor], theirs: tuple[float, int, Tensor]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    assert ours[1] == theirs[1]
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-10)


IDS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 0, 1]  # 3 is alone

BATCHES = {"all sizes": (points(14, seed=5), IDS), "four each": (points(16, 8, seed=6), [n // 4 for n in range(16)])}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("average", ["active", "valid"])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [0.4, None])
@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("at_once", [20, 2**20])
def test_triplet_losses_against_the_oracle(monkeypatch, at_once, mining, margin, squared, average, batch):
    monkeypatch.setattr(pool_module, "SIMILARITIES", at_once)
    embeddings, ids = BATCHES[batch]
    kind = "soft_margin" if margin is None else "margin"
    ours = result(objective(kind, mining, squared=squared, average=average), embeddings, torch.tensor(ids))
    assert_equal(ours, of_oracle(oracle.loss_of, embeddings, ids, mining, margin, squared, average))
    assert ours[2].norm() > 0.1


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [0.4, None])
@pytest.mark.parametrize("mining", ["distance_weighted", "random"])
@pytest.mark.parametrize("at_once", [20, 2**20])
def test_losses_of_drawn_triplets_against_the_oracle(monkeypatch, at_once, mining, margin, squared, batch):
    monkeypatch.setattr(pool_module, "SIMILARITIES", at_once)
    embeddings, ids = BATCHES[batch]
    numbers = torch.rand(len(ids), 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    loss = objective("soft_margin" if margin is None else "margin", mining, squared=squared)

    def theirs(leaf: Tensor) -> tuple[Tensor, int]:
        return oracle.loss_of(leaf, ids, mining, margin, squared, "active", numbers=numbers)

    assert_equal(result(loss, embeddings, torch.tensor(ids), draws=numbers), of_oracle(theirs, embeddings))


@pytest.mark.parametrize("mining", ["batch_all", "semi_hard"])
def test_knowing_the_images_of_one_identity_changes_nothing(mining):
    embeddings, ids = BATCHES["four each"]
    loss = objective(mining=mining)
    assert_equal(result(loss, embeddings, torch.tensor(ids), 4), result(loss, embeddings, torch.tensor(ids)))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("at_once", [20, 2**20])
def test_smooth_and_contrastive_against_the_oracle(monkeypatch, at_once, squared, batch):
    monkeypatch.setattr(pool_module, "SIMILARITIES", at_once)
    embeddings, ids = BATCHES[batch]
    ours = result(objective("smooth", squared=squared), embeddings, torch.tensor(ids))
    assert_equal(ours, of_oracle(oracle.smooth, embeddings, ids, 0.4, 3.0, squared))
    ours = result(objective("contrastive", margin=1.1, squared=squared), embeddings, torch.tensor(ids))
    assert_equal(ours, of_oracle(oracle.contrastive, embeddings, ids, 1.1, squared))


@pytest.mark.parametrize("kind", ["smooth", "contrastive", "margin"])
def test_gradients_of_dense_losses_against_differences(kind):
    ids = torch.arange(4).repeat_interleave(3)
    loss = objective(kind, "batch_all", margin=0.9)
    assert torch.autograd.gradcheck(lambda e: loss(Pool.of(e, ids)).total, points(12, 3).requires_grad_(), atol=1e-7)


def test_anchors_and_candidates_get_their_gradients_apart():
    """What the gather's backward needs: derivatives by this rank's anchors, and by everyone's candidates."""
    embeddings, ids = points(12), torch.arange(4).repeat_interleave(3)
    for kind, mining in (("smooth", ""), ("contrastive", ""), ("margin", "batch_all"), ("margin", "batch_hard")):
        loss, whole = objective(kind, mining, margin=0.9), torch.zeros(12, 5, dtype=torch.float64)
        total = 0.0
        for start in (0, 4, 8):
            anchors, candidates = embeddings[start : start + 4].clone(), embeddings.clone()
            anchors.requires_grad_(), candidates.requires_grad_()
            columns = torch.arange(start, start + 4)
            part = loss(Pool(anchors, ids[columns], candidates, ids, columns)).total
            by_anchors, by_candidates = torch.autograd.grad(part, (anchors, candidates))
            whole += by_candidates
            whole[start : start + 4] += by_anchors
            total += float(part.detach())
        found = result(loss, embeddings, ids)
        assert total == pytest.approx(found[0])
        torch.testing.assert_close(whole, found[2])


def test_margin_by_hand():
    """Chords: 60 degrees are 1 long, 90 sqrt(2), 180 2. The third anchor's triplet is at rest."""
    pool = Pool.of(on_circle([0, 60, 180, 180]), torch.tensor([0, 0, 1, 1]))
    triplets = Triplets(*(torch.tensor(x) for x in ([0, 2, 1], [1, 3, 0], [2, 0, 3], [True, True, False])))
    loss, active = triplet_loss(triplets, pool, 1.5)
    assert (float(loss), int(active)) == (pytest.approx(1 - 2 + 1.5), 1)  # the second: 0 - 2 + 1.5 < 0
    assert int(triplet_loss(triplets, pool, 1.5, average="valid")[1]) == 2
    loss, active = triplet_loss(triplets, pool, None)
    assert (float(loss), int(active)) == (pytest.approx(math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))), 2)
    loss, active = triplet_loss(triplets, pool, 3.5, squared=True)
    assert (float(loss), int(active)) == (pytest.approx(1 - 4 + 3.5), 1)


def test_smooth_by_hand():
    """At 0, 60, 180 degrees with identities 0, 0, 1: one positive and one negative for each of the first two anchors."""
    ids = torch.tensor([0, 0, 1])
    total, divisor, _ = result(objective("smooth", margin=0.2, sharpness=10.0), on_circle([0, 60, 180]), ids)
    expected = [math.log(1 + math.exp(10 * (1 - d_an + 0.2))) / 10 for d_an in (2, math.sqrt(3))]
    assert (total, divisor) == (pytest.approx(sum(expected)), 2)


def test_smooth_bounds_batch_hard_and_becomes_it():
    """Its exponents sum over 3 x 20 triplets, so it is above the hinge by at most log(1 + 60) / s an anchor."""
    embeddings, ids = points(24, 8), torch.arange(6).repeat_interleave(4)
    hinge, _, _ = result(objective(average="valid"), embeddings, ids)
    for sharpness in (1.0, 30.0, 300.0):
        smooth, divisor, _ = result(objective("smooth", sharpness=sharpness), embeddings, ids)
        assert 0 <= smooth - hinge <= divisor * math.log(61) / sharpness


def test_contrastive_by_hand():
    """Chords of 60, 120 and 60 degrees: 1, sqrt(3), 1. Margin 1.5: the anchor alone with its identity does not count."""
    total, divisor, _ = result(objective("contrastive", margin=1.5), on_circle([0, 60, 120]), torch.tensor([0, 0, 1]))
    assert divisor == 2
    assert total == pytest.approx((0.5 + 0) + (0.5 + 0.5**2 / 2))


def test_batch_all_by_hand():
    """Two anchors with one negative each, as above: d_ap - d_an + 1.5 is 1.5 - sqrt(3) + 1 and 1.5."""
    ids, embeddings = torch.tensor([0, 0, 1]), on_circle([0, 60, 120])
    total, divisor, _ = result(objective(mining="batch_all", margin=1.5), embeddings, ids)
    assert (total, divisor) == (pytest.approx(2.5 - chord(120) + 1.5), 2)
    total, divisor, _ = result(objective(mining="batch_all", margin=0.5), embeddings, ids)
    assert (total, divisor) == (pytest.approx(0.5), 1)
    _, divisor, _ = result(objective(mining="batch_all", margin=0.5, average="valid"), embeddings, ids)
    assert divisor == 2


ALL = [(kind, "batch_hard") for kind in ("smooth", "contrastive")]
ALL += [(kind, mining) for kind in ("margin", "soft_margin") for mining in MINING]


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("kind", "mining"), ALL)
@pytest.mark.parametrize("ids", [[0, 0, 0, 0], [0, 1, 2, 3]], ids=["one identity", "no positive"])
def test_without_a_valid_anchor_all_is_zero(ids, kind, mining, squared):
    embeddings = on_circle([0, 20, 50, 90])
    total, divisor, gradient = result(objective(kind, mining, squared=squared), embeddings, torch.tensor(ids))
    assert (total, divisor) == (0, 0)
    assert not gradient.any()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("mining", MINING)
def test_where_every_triplet_is_easy_all_is_zero(mining, squared):
    embeddings, ids = on_circle([0, 1, 180, 181]), torch.tensor([0, 0, 1, 1])
    total, divisor, gradient = result(objective(mining=mining, squared=squared), embeddings, ids)
    assert (total, divisor) == (0, 0)
    assert not gradient.any()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("kind", "mining"), ALL)
def test_identical_embeddings_have_finite_loss_and_gradient(kind, mining, squared):
    embeddings = torch.tensor([[0.6, 0.8]]).repeat(6, 1)
    total, _, gradient = result(objective(kind, mining, squared=squared), embeddings, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert math.isfinite(total)
    assert gradient.isfinite().all()


def test_a_triplet_exactly_at_the_margin_is_not_active():
    embeddings = torch.eye(4)[[0, 1, 2, 3]]  # all sqrt(2) apart
    pool = Pool.of(embeddings, torch.tensor([0, 0, 1, 1]))
    found, hardest = batch_hard(pool)
    loss, active = triplet_loss(found, pool, 0.0)
    assert (loss.item(), active.item()) == (0, 0)
    assert active_anchors(hardest, 0.0, False) == 0
    assert active_anchors(hardest, 0.1, False) == active_anchors(hardest, None, False) == 4


def test_sum_and_divisor_are_scalars_and_the_divisor_is_a_whole_number():
    for kind, mining in ALL:
        found = objective(kind, mining)(Pool.of(points(8).requires_grad_(), torch.arange(4).repeat_interleave(2)))
        assert found.total.shape == found.divisor.shape == ()
        assert found.divisor.dtype == torch.int64
        assert found.total.requires_grad
        assert not found.divisor.requires_grad


def test_spread_and_effective_rank_by_hand():
    assert spread(torch.tensor([[1.0, 0.0]]).repeat(5, 1)) == 0
    assert effective_rank(torch.tensor([[1.0, 0.0]]).repeat(5, 1)) == 1
    cross = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert spread(cross) == 1
    assert effective_rank(cross).item() == pytest.approx(2)
    assert effective_rank(cross[:2]).item() == pytest.approx(1)
    close = on_circle([-5, 5])
    assert spread(close).item() == pytest.approx(math.sin(math.radians(5)))
