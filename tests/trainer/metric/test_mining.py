"""Which triplets are taken: by hand, against plain loops, and the statistics of what is drawn."""

import math
import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.metric.oracle import chord, chosen, distances, on_circle, points
from trainer.metric import pool as pool_module
from trainer.metric.losses import Objective, triplet_loss
from trainer.metric.mining import batch_hard, distance_weighted, hardest_semi_hard, random_triplets, semi_hard
from trainer.metric.pool import Pool

MINERS = {"batch_hard": batch_hard, "semi_hard": semi_hard, "hardest_semi_hard": hardest_semi_hard}


def taken(triplets) -> list[tuple[int, int, int]]:
    """Valid triplets as (anchor, positive, negative), in order."""
    columns = (triplets.anchors, triplets.positives, triplets.negatives, triplets.valid)
    return [(a, p, n) for a, p, n, valid in zip(*(column.tolist() for column in columns), strict=True) if valid]


@pytest.mark.parametrize("mining", MINERS)
@pytest.mark.parametrize("at_once", [1, 60, 2**20])
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_against_the_oracle(monkeypatch, mining, at_once, seed):
    monkeypatch.setattr(pool_module, "SIMILARITIES", at_once)
    draw = random.Random(seed)
    embeddings = points(31, seed=seed)
    ids = [draw.choice([0, 1, 2, 7, 9, 400 + i]) for i in range(31)]  # some are alone
    found, hardest = MINERS[mining](Pool.of(embeddings, torch.tensor(ids)))
    d = distances(embeddings, squared=True)
    wanted = chosen(d, ids, mining)
    assert sorted(taken(found)) == sorted(wanted)
    assert 0 < hardest.valid.sum() < 31, "both kinds of anchor are there"
    hard = chosen(d, ids, "batch_hard")
    assert [int(hardest.positives[a]) for a, _, _ in hard] == [p for _, p, _ in hard]
    assert [int(hardest.negatives[a]) for a, _, _ in hard] == [n for _, _, n in hard]


@pytest.mark.parametrize("mining", MINERS)
def test_some_anchors_among_more_candidates(mining):
    """A rank's slice: its triplets are those of the whole batch with its anchors."""
    embeddings, ids = points(24, seed=3), torch.arange(6).repeat_interleave(4)
    whole, _ = MINERS[mining](Pool.of(embeddings, ids))
    mine = slice(8, 16)
    part, _ = MINERS[mining](Pool(embeddings[mine], ids[mine], embeddings, ids, torch.arange(8, 16)))
    assert [(a + 8, p, n) for a, p, n in taken(part)] == [one for one in taken(whole) if 8 <= one[0] < 16]


CIRCLE = [0, 10, 40, 50, 90, 120, 180, 200, 300]  # degrees; the distance grows with the angle between two points
CIRCLE_IDS = [0, 0, 0, 1, 1, 1, 2, 2, 2]
FARTHEST_POSITIVE = [2, 2, 0, 5, 3, 3, 8, 8, 6]
NEAREST_NEGATIVE = [3, 3, 3, 2, 2, 6, 5, 5, 0]


@pytest.mark.parametrize("at_once", [1, 18, 2**20])
def test_nine_points_on_the_circle(monkeypatch, at_once):
    monkeypatch.setattr(pool_module, "SIMILARITIES", at_once)
    found, hardest = batch_hard(Pool.of(on_circle(CIRCLE), torch.tensor(CIRCLE_IDS)))
    assert taken(found) == list(zip(range(9), FARTHEST_POSITIVE, NEAREST_NEGATIVE, strict=True))
    for squared in (False, True):
        d_ap, d_an = hardest.distances(squared)
        assert d_ap.tolist() == pytest.approx([chord(a, squared) for a in (40, 30, 40, 70, 40, 70, 120, 100, 120)])
        assert d_an.tolist() == pytest.approx([chord(a, squared) for a in (50, 40, 10, 10, 50, 60, 60, 80, 60)])


def test_semi_hard_by_hand():
    """Anchor 0 at 0 degrees; positives at 20 and 60; negatives at 40, 70 and 350.

    Beyond 20: the one at 40. Beyond 60: the one at 70. The one at 350, nearer than both positives, is semi-hard for neither.
    """
    embeddings, ids = on_circle([0, 20, 60, 40, 70, 350]), torch.tensor([0, 0, 0, 1, 1, 1])
    found, _ = semi_hard(Pool.of(embeddings, ids))
    assert [one for one in taken(found) if one[0] == 0] == [(0, 1, 3), (0, 2, 4)]
    found, _ = hardest_semi_hard(Pool.of(embeddings, ids))
    assert taken(found)[0] == (0, 2, 4)


def test_without_a_negative_beyond_the_pair_is_left_out_or_the_hardest_is_taken():
    """The positive of 0 is opposite; no negative is farther away."""
    pool = Pool.of(on_circle([0, 180, 30, 60]), torch.tensor([0, 0, 1, 1]))
    assert not [one for one in taken(semi_hard(pool)[0]) if one[0] == 0]
    assert taken(hardest_semi_hard(pool)[0])[0] == (0, 1, 2)


@pytest.mark.parametrize("at_once", [1, 12, 2**20])
def test_of_equally_distant_candidates_the_first_is_taken(monkeypatch, at_once):
    """Axes: every two different ones are equally far apart, exactly."""
    monkeypatch.setattr(pool_module, "SIMILARITIES", at_once)
    found, _ = batch_hard(Pool.of(torch.eye(6), torch.tensor([0, 1, 0, 1, 0, 1])))
    assert taken(found) == [(0, 2, 1), (1, 3, 0), (2, 0, 1), (3, 1, 0), (4, 0, 1), (5, 1, 0)]


@pytest.mark.parametrize("mining", MINERS)
@pytest.mark.parametrize("squared", [False, True])
def test_all_embeddings_identical(mining, squared):
    """A collapsed network: distances are 0, gradients finite, and the anchor is still not its own positive."""
    embeddings = torch.tensor([[0.6, 0.8]]).repeat(4, 1).requires_grad_()
    pool = Pool.of(embeddings, torch.tensor([0, 0, 1, 1]))
    found, _ = MINERS[mining](pool)
    expected = [] if mining == "semi_hard" else [(0, 1, 2), (1, 0, 2), (2, 3, 0), (3, 2, 0)]  # none is farther than 0
    assert taken(found) == expected
    loss, active = triplet_loss(found, pool, 0.2, squared)
    assert (float(loss.detach()), int(active)) == (pytest.approx(0.2 * len(expected)), len(expected))
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert gradient.tolist() == [[0, 0]] * 4


@pytest.mark.parametrize("mining", MINERS)
def test_an_anchor_alone_with_its_identity_is_not_valid(mining):
    found, hardest = MINERS[mining](Pool.of(on_circle([0, 10, 90, 100]), torch.tensor([5, 6, 7, 7])))
    assert hardest.valid.tolist() == [False, False, True, True]
    assert {a for a, _, _ in taken(found)} <= {2, 3}


@pytest.mark.parametrize("mining", [*MINERS, "distance_weighted", "random"])
@pytest.mark.parametrize("margin", [0.2, None])
def test_one_identity_has_no_valid_anchor(mining, margin):
    embeddings = on_circle([0, 20, 50]).requires_grad_()
    pool = Pool.of(embeddings, torch.zeros(3, dtype=torch.int64))
    draws = torch.full((3, 3), 0.5)
    drawn = {"distance_weighted": distance_weighted, "random": random_triplets}
    found, hardest = drawn[mining](pool, draws) if mining in drawn else MINERS[mining](pool)
    assert taken(found) == []
    assert not hardest.valid.any()
    loss, active = triplet_loss(found, pool, margin)
    assert (float(loss.detach()), int(active)) == (0, 0)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert not gradient.any()


def test_the_anchors_place_among_the_candidates_is_the_callers():
    """Two ranks: the anchors of the second are columns 2 and 3; column 0 is another image that looks the same."""
    candidates, ids = on_circle([0, 90, 0, 30]), torch.tensor([0, 1, 0, 0])
    found, _ = batch_hard(Pool(candidates[2:], ids[2:], candidates, ids, torch.tensor([2, 3])))
    assert taken(found) == [(0, 3, 1), (1, 0, 1)]


def test_gradient_flows_through_the_selected_candidates_alone():
    anchors, candidates = on_circle(CIRCLE).requires_grad_(), on_circle(CIRCLE).requires_grad_()
    ids = torch.tensor(CIRCLE_IDS)
    pool = Pool(anchors[:1], ids[:1], candidates, ids, torch.tensor([0]))
    found, _ = batch_hard(pool)
    triplet_loss(found, pool, None)[0].backward()
    assert anchors.grad.any(1).tolist() == [True] + [False] * 8
    assert candidates.grad.any(1).nonzero().flatten().tolist() == [2, 3]


class _Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["margin", "smooth", "contrastive"])
@pytest.mark.parametrize("mining", [*MINERS, "batch_all", "distance_weighted", "random"])
def test_nothing_larger_than_allowed_is_made_forward_or_backward(monkeypatch, kind, mining):
    """64 anchors, 256 candidates of 2 dimensions, 512 similarities at once, where the full matrix has 16,384."""
    monkeypatch.setattr(pool_module, "SIMILARITIES", 512)
    candidates = points(256, 2).requires_grad_()
    pool = Pool(
        candidates[:64],
        torch.arange(16).repeat_interleave(4),
        candidates,
        torch.arange(64).repeat_interleave(4),
        torch.arange(64),
    )
    loss = Objective(kind=kind, mining=mining, margin=0.5, sharpness=5.0, squared=False, average="active")
    draws = torch.full((64, 4), 0.5, dtype=torch.float64)
    with _Largest() as largest:
        loss(pool, 4, draws).total.backward()
    assert largest.elements == 512


def test_identities_may_be_any_labels_and_embeddings_any_float_type():
    ids = torch.tensor([10**12, 10**12, -1, -1])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found, _ = batch_hard(Pool.of(on_circle([0, 10, 90, 120]).to(dtype), ids))
        assert taken(found) == [(0, 1, 2), (1, 0, 2), (2, 3, 1), (3, 2, 1)]


def test_the_columns_of_an_identity_with_and_without_their_number():
    ids = torch.tensor([4, 2, 4, 4, 9])
    pool = Pool.of(points(5), ids)
    for most in (None, 3):
        columns, there = pool.runs(most).columns(slice(0, 5))
        found = [
            [c for c, t in zip(row, ok, strict=True) if t] for row, ok in zip(columns.tolist(), there, strict=True)
        ]
        assert found == [[2, 3], [], [0, 3], [0, 2], []]
        assert columns.tolist() == [[0, 2, 3], [1, 1, 1], [0, 2, 3], [0, 2, 3], [4, 4, 4]]


def test_distance_weighted_draws_with_the_papers_probabilities():
    """In 3 dimensions q(d) is proportional to d, so a negative at distance d has weight 1 / d, with d at least 0.5."""
    angles = [0, 0.5, 20, 40, 60, 120]  # an anchor, its positive, and negatives at 0.347, 0.684, 1 and (too far) 1.732
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    embeddings = torch.stack([radians.cos(), radians.sin(), torch.zeros(6)], 1)
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    weights = {2: 1 / 0.5, 3: 1 / chord(40), 4: 1 / chord(60)}
    pool = Pool(embeddings[:1], ids[:1], embeddings, ids, torch.tensor([0]))
    drawn = [0] * 6
    steps = 2000
    for step in range(steps):
        found, _ = distance_weighted(pool, torch.full((1, 2), (step + 0.5) / steps))
        (triplet,) = taken(found)
        assert triplet[:2] == (0, 1)
        drawn[triplet[2]] += 1
    expected = [steps * weights.get(column, 0) / sum(weights.values()) for column in range(6)]
    assert drawn == pytest.approx(expected, abs=1.5)


def test_distance_weighted_takes_far_negatives_where_there_are_no_others():
    embeddings, ids = on_circle([0, 10, 150, 180, 210]), torch.tensor([0, 0, 1, 2, 3])
    pool = Pool(embeddings[:1], ids[:1], embeddings, ids, torch.tensor([0]))
    drawn = [taken(distance_weighted(pool, torch.full((1, 2), draw))[0])[0][2] for draw in (0.1, 0.5, 0.9)]
    assert drawn == [2, 3, 4]


def test_random_triplets_draw_every_positive_and_negative_evenly():
    embeddings, ids = points(7), torch.tensor([0, 1, 0, 0, 1, 2, 0])
    pool = Pool(embeddings[2:3], ids[2:3], embeddings, ids, torch.tensor([2]))
    for draw, positive, negative in (
        (0.0, 0, 1),
        (0.3, 0, 1),
        (0.4, 3, 4),
        (0.65, 3, 4),
        (0.7, 6, 5),
        (0.999999, 6, 5),
    ):
        found, _ = random_triplets(pool, torch.full((1, 4), draw))
        assert taken(found) == [(0, positive, negative)], draw


def test_draws_do_not_depend_on_how_many_anchors_are_compared_at_once(monkeypatch):
    pool = Pool.of(points(40), torch.arange(10).repeat_interleave(4))
    draws = torch.rand(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mining in (distance_weighted, random_triplets):
        whole = taken(mining(pool, draws)[0])
        with monkeypatch.context() as small:
            small.setattr(pool_module, "SIMILARITIES", 120)
            assert taken(mining(pool, draws)[0]) == whole
        assert len(whole) == (120 if mining is distance_weighted else 40)
        assert math.isclose(len(set(whole)), len(whole), rel_tol=0.1)
