import math
import random
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.metric import mining
from trainer.metric.losses import triplet_loss
from trainer.metric.mining import Triplets, batch_hard, select_hardest, smooth_hard


def points(count: int, size: int = 5, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def on_circle(degrees: list[float]) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def mine_all(embeddings: Tensor, identities: Tensor) -> tuple[list[int], list[int], list[bool]]:
    """`select_hardest` with every point an anchor, among all points."""
    columns = torch.arange(len(embeddings))
    positives, negatives, valid = select_hardest(embeddings, identities, embeddings, identities, columns)
    return positives.tolist(), negatives.tolist(), valid.tolist()


def oracle(anchors, anchor_ids, candidates, candidate_ids, selves):
    """Columns (None where there is none) by three plain loops over anchors, candidates and dimensions."""
    positives, negatives = [], []
    for anchor, own, self_column in zip(anchors, anchor_ids, selves, strict=True):
        far, near, positive, negative = -1.0, math.inf, None, None
        for column, (candidate, other) in enumerate(zip(candidates, candidate_ids, strict=True)):
            distance = 0.0
            for a, b in zip(anchor, candidate, strict=True):
                distance += (a - b) ** 2
            if own == other and column != self_column and distance > far:
                far, positive = distance, column
            if own != other and distance < near:
                near, negative = distance, column
        positives.append(positive)
        negatives.append(negative)
    return positives, negatives


@pytest.mark.parametrize("block", [1, 3, 4096])
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_against_the_oracle(monkeypatch, block, seed):
    monkeypatch.setattr(mining, "BLOCK", block)
    draw = random.Random(seed)
    candidates = points(37, seed=seed)
    ids = torch.tensor([draw.choice([0, 1, 2, 7, 9, 400 + i]) for i in range(37)])  # some are alone
    mine = slice(11, 26)
    columns = torch.arange(11, 26)
    positives, negatives, valid = select_hardest(candidates[mine], ids[mine], candidates, ids, columns)
    wanted_p, wanted_n = oracle(*(t.tolist() for t in (candidates[mine], ids[mine], candidates, ids, columns)))
    assert valid.tolist() == [p is not None and n is not None for p, n in zip(wanted_p, wanted_n, strict=True)]
    assert 0 < valid.sum() < 15, "both kinds of anchor are there"
    assert [p for p, w in zip(positives.tolist(), wanted_p, strict=True) if w is not None] == [
        w for w in wanted_p if w is not None
    ]
    assert negatives.tolist() == wanted_n


CIRCLE = [0, 10, 40, 50, 90, 120, 180, 200, 300]  # degrees; the distance grows with the angle between two points
CIRCLE_IDS = [0, 0, 0, 1, 1, 1, 2, 2, 2]
FARTHEST_POSITIVE = [2, 2, 0, 5, 3, 3, 8, 8, 6]
NEAREST_NEGATIVE = [3, 3, 3, 2, 2, 6, 5, 5, 0]


@pytest.mark.parametrize("block", [1, 2, 4, 9])
def test_nine_points_on_the_circle(monkeypatch, block):
    monkeypatch.setattr(mining, "BLOCK", block)
    found = mine_all(on_circle(CIRCLE), torch.tensor(CIRCLE_IDS))
    assert found == (FARTHEST_POSITIVE, NEAREST_NEGATIVE, [True] * 9)


@pytest.mark.parametrize("squared", [False, True])
def test_distances_on_the_circle_are_chords(squared):
    """A chord over an angle a is 2 sin(a / 2) long; its square is 2 - 2 cos a."""
    embeddings, identities = on_circle(CIRCLE), torch.tensor(CIRCLE_IDS)
    found = batch_hard(embeddings, identities, embeddings, identities, torch.arange(9), squared=squared)

    def chords(angles: list[float]) -> list[float]:
        lengths = [2 * math.sin(math.radians(angle) / 2) for angle in angles]
        return [length**2 for length in lengths] if squared else lengths

    assert found.positive_distance.tolist() == pytest.approx(chords([40, 30, 40, 70, 40, 70, 120, 100, 120]), abs=1e-14)
    assert found.negative_distance.tolist() == pytest.approx(chords([50, 40, 10, 10, 50, 60, 60, 80, 60]), abs=1e-14)
    assert found.valid.tolist() == [True] * 9


@pytest.mark.parametrize("block", [1, 2, 3, 99])
def test_of_equally_distant_candidates_the_first_is_taken(monkeypatch, block):
    """Axes: every two different ones are equally far apart, exactly."""
    monkeypatch.setattr(mining, "BLOCK", block)
    embeddings = torch.eye(6)
    assert mine_all(embeddings, torch.tensor([0, 1, 0, 1, 0, 1])) == (
        [2, 3, 0, 1, 0, 1],
        [1, 0, 1, 0, 1, 0],
        [True] * 6,
    )


@pytest.mark.parametrize("block", [1, 2, 99])
def test_all_embeddings_identical(monkeypatch, block):
    """A collapsed network: distances are 0, gradients finite, and the anchor is still not its own positive."""
    monkeypatch.setattr(mining, "BLOCK", block)
    embeddings = torch.tensor([[0.6, 0.8]]).repeat(4, 1).requires_grad_()
    identities = torch.tensor([0, 0, 1, 1])
    assert mine_all(embeddings, identities) == ([1, 0, 3, 2], [2, 2, 0, 0], [True] * 4)
    for squared in (False, True):
        found = batch_hard(embeddings, identities, embeddings, identities, torch.arange(4), squared=squared)
        assert found.positive_distance.tolist() == pytest.approx([0] * 4, abs=1e-5)
        loss, active = triplet_loss(found, 0.2)
        assert (float(loss.detach()), int(active)) == (pytest.approx(0.8), 4)
        (gradient,) = torch.autograd.grad(loss, embeddings)
        assert gradient.tolist() == [[0, 0]] * 4


def test_an_anchor_alone_with_its_identity_is_not_valid():
    _, negatives, valid = mine_all(on_circle([0, 10, 90, 100]), torch.tensor([5, 6, 7, 7]))
    assert valid == [False, False, True, True]
    assert negatives == [1, 0, 1, 1]


def test_one_identity_has_no_valid_anchor():
    embeddings = on_circle([0, 20, 50]).requires_grad_()
    identities = torch.zeros(3, dtype=torch.int64)
    found = batch_hard(embeddings, identities, embeddings, identities, torch.arange(3))
    assert found.valid.tolist() == [False] * 3
    for margin in (0.2, None):
        loss, active = triplet_loss(found, margin)
        assert (float(loss.detach()), int(active)) == (0, 0)
        (gradient,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
        assert not gradient.any()


def test_the_anchors_place_among_the_candidates_is_the_callers():
    """Two ranks: the anchors of the second are columns 2 and 3; column 0 is another image that looks the same."""
    candidates = on_circle([0, 90, 0, 30])
    ids = torch.tensor([0, 1, 0, 0])
    positives, negatives, valid = select_hardest(candidates[2:], ids[2:], candidates, ids, torch.tensor([2, 3]))
    assert (positives.tolist(), negatives.tolist(), valid.tolist()) == ([3, 0], [1, 1], [True, True])


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [None, 0.3])
def test_gradient_equals_that_of_the_full_matrix(monkeypatch, squared, margin):
    monkeypatch.setattr(mining, "BLOCK", 7)
    identities = torch.arange(6).repeat_interleave(4)

    def ours(embeddings: Tensor) -> Tensor:
        found = batch_hard(embeddings, identities, embeddings, identities, torch.arange(24), squared=squared)
        return triplet_loss(found, margin)[0]

    def plain(embeddings: Tensor) -> Tensor:
        distances = (embeddings[:, None] - embeddings[None]).square().sum(2)  # (24, 24)
        same = identities[:, None] == identities[None]
        positive = distances.masked_fill(~same | torch.eye(24, dtype=torch.bool), -1).max(1).values
        negative = distances.masked_fill(same, 9).min(1).values
        if not squared:
            positive, negative = positive.sqrt(), negative.sqrt()
        difference = positive - negative
        return ((1 + difference.exp()).log() if margin is None else (difference + margin).relu()).sum()

    results = []
    for formula in (ours, plain):
        embeddings = points(24, 8).requires_grad_()
        loss = formula(embeddings)
        loss.backward()
        results.append((loss.detach(), embeddings.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    assert results[0][1].norm() > 1


def test_gradient_flows_through_the_selected_candidates_alone():
    anchors, candidates = on_circle(CIRCLE).requires_grad_(), on_circle(CIRCLE).requires_grad_()
    identities = torch.tensor(CIRCLE_IDS)
    found = batch_hard(anchors[:1], identities[:1], candidates, identities, torch.tensor([0]))
    (found.positive_distance + found.negative_distance).sum().backward()
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


def test_nothing_larger_than_a_block_is_made_forward_or_backward(monkeypatch):
    """16 anchors, 256 candidates of 2 dimensions, blocks of 32: at most 512 elements, where the full matrix has 4,096."""
    monkeypatch.setattr(mining, "BLOCK", 32)
    candidates = points(256, 2).requires_grad_()
    identities = torch.arange(64).repeat_interleave(4)
    with _Largest() as largest:
        found = batch_hard(candidates[:16], identities[:16], candidates, identities, torch.arange(16))
        triplet_loss(found, None)[0].backward()
    assert found.valid.all()
    assert largest.elements == 16 * 32


def test_identities_may_be_any_labels_and_embeddings_any_float_type():
    ids = torch.tensor([10**12, 10**12, -1, -1])
    assert mine_all(on_circle([0, 10, 90, 120]).float(), ids) == ([1, 0, 3, 2], [2, 2, 1, 1], [True] * 4)
    assert mine_all(on_circle([0, 10, 90, 120]).bfloat16(), ids) == ([1, 0, 3, 2], [2, 2, 1, 1], [True] * 4)


def smooth_all(embeddings: Tensor, identities: Tensor, sharpness: float, squared: bool) -> Triplets:
    columns = torch.arange(len(embeddings))
    mine = partial(smooth_hard, sharpness=sharpness, squared=squared)
    return mine(embeddings, identities, embeddings, identities, columns)


def smooth_oracle(embeddings: list, identities: list, sharpness: float, squared: bool) -> list[tuple[float, float]]:
    """(log sum exp of s d_ap) / s and -(log sum exp of -s d_an) / s of each anchor by plain loops."""
    found = []
    for i, (anchor, own) in enumerate(zip(embeddings, identities, strict=True)):
        positive = negative = 0.0
        for j, (candidate, other) in enumerate(zip(embeddings, identities, strict=True)):
            distance = sum((a - b) ** 2 for a, b in zip(anchor, candidate, strict=True))
            distance = distance if squared else math.sqrt(distance)
            if own == other and i != j:
                positive += math.exp(sharpness * distance)
            if own != other:
                negative += math.exp(-sharpness * distance)
        found.append((math.log(positive) / sharpness, -math.log(negative) / sharpness))
    return found


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("sharpness", [0.5, 10.0])
def test_smooth_against_the_oracle(squared, sharpness):
    embeddings, identities = points(18), torch.arange(6).repeat_interleave(3)
    found = smooth_all(embeddings, identities, sharpness, squared)
    wanted = smooth_oracle(embeddings.tolist(), identities.tolist(), sharpness, squared)
    assert found.positive_distance.tolist() == pytest.approx([positive for positive, _ in wanted], abs=1e-12)
    assert found.negative_distance.tolist() == pytest.approx([negative for _, negative in wanted], abs=1e-12)
    assert found.valid.all()


def test_smooth_with_one_positive_and_one_negative_is_their_distance():
    """At 0, 60, 180 degrees the chords are 1 and 2; the last point is alone with its identity."""
    found = smooth_all(on_circle([0, 60, 180]), torch.tensor([0, 0, 1]), 7.0, squared=False)
    assert found.positive_distance[:2].tolist() == pytest.approx([1, 1])
    assert found.negative_distance[:2].tolist() == pytest.approx([2, math.sqrt(3)])
    assert found.valid.tolist() == [True, True, False]


@pytest.mark.parametrize("squared", [False, True])
def test_smooth_bounds_batch_hard_and_becomes_it(squared):
    """A log-sum-exp of n numbers times s, over s, is above their maximum by at most log(n) / s."""
    embeddings, identities = points(24, 8), torch.arange(6).repeat_interleave(4)
    hard = batch_hard(embeddings, identities, embeddings, identities, torch.arange(24), squared=squared)
    for sharpness in (1.0, 30.0, 1000.0):
        smooth = smooth_all(embeddings, identities, sharpness, squared)
        above = smooth.positive_distance - hard.positive_distance
        below = hard.negative_distance - smooth.negative_distance
        assert -1e-12 < above.min() <= above.max() <= math.log(3) / sharpness
        assert -1e-12 < below.min() <= below.max() <= math.log(20) / sharpness


def test_smooth_knows_the_same_valid_anchors_and_the_anchors_own_column():
    candidates = on_circle([0, 90, 0, 30, 200])
    ids = torch.tensor([0, 1, 0, 0, 2])
    mine = torch.tensor([2, 3, 4])
    found = smooth_hard(candidates[2:], ids[2:], candidates, ids, mine, sharpness=1000.0)
    hard = batch_hard(candidates[2:], ids[2:], candidates, ids, mine)
    assert found.valid.tolist() == hard.valid.tolist() == [True, True, False]
    assert found.positive_distance[:2].tolist() == pytest.approx(hard.positive_distance[:2].tolist(), abs=1e-3)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(
    "identities", [[0, 0, 0], [0, 1, 2], [0, 0, 1]], ids=["one identity", "no positive", "one alone"]
)
def test_smooth_of_anchors_that_are_not_valid_is_finite_without_gradient(squared, identities):
    embeddings = on_circle([0, 20, 50]).requires_grad_()
    found = smooth_all(embeddings, torch.tensor(identities), 10.0, squared)
    for distance in (found.positive_distance, found.negative_distance):
        assert distance.isfinite().all()
        (gradient,) = torch.autograd.grad(distance[~found.valid].sum(), embeddings, retain_graph=True)
        assert not gradient.any()
    loss, active = triplet_loss(found, 0.2, 10.0)
    assert active == found.valid.sum() == (2 if identities == [0, 0, 1] else 0)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert gradient.isfinite().all()
    assert gradient.any() == found.valid.any()


@pytest.mark.parametrize("squared", [False, True])
def test_smooth_of_identical_embeddings_has_a_finite_gradient(squared):
    embeddings = torch.tensor([[0.6, 0.8]]).repeat(4, 1).requires_grad_()
    found = smooth_all(embeddings, torch.tensor([0, 0, 1, 1]), 10.0, squared)
    loss, active = triplet_loss(found, 0.2, 10.0)
    assert active == 4
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("squared", [False, True])
def test_smooth_gradient_against_differences(squared):
    """Every pair carries gradient: compared with central differences of the function, float64."""
    identities = torch.arange(4).repeat_interleave(3)

    def loss(embeddings: Tensor) -> Tensor:
        return triplet_loss(smooth_all(embeddings, identities, 3.0, squared), 0.2, 3.0)[0]

    embeddings = points(12, 3)
    assert torch.autograd.gradcheck(loss, embeddings.requires_grad_(), atol=1e-7)
    (gradient,) = torch.autograd.grad(loss(embeddings), embeddings)
    assert gradient.abs().min() > 1e-6


def test_smooth_has_no_gradient_between_points_that_single_precision_cannot_tell_apart():
    """0.01 degrees are 3e-8 in squared distance; the root's slope there would be 3,000 times a rounding error's sign."""
    embeddings = on_circle([0, 0.01, 180]).float().requires_grad_()
    found = smooth_all(embeddings, torch.tensor([0, 0, 1]), 10.0, squared=False)
    assert found.positive_distance[:2].tolist() == pytest.approx([1e-3, 1e-3], rel=1e-3)
    (gradient,) = torch.autograd.grad(found.positive_distance[:2].sum(), embeddings)
    assert not gradient.any()
