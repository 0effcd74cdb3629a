import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from trainer.metric.verification import (
    area_under_curve,
    best_threshold,
    equal_error_rate,
    fold_accuracies,
    pair_similarities,
    roc,
    tar_at_far,
    wilson_interval,
)


def scores(seed=0, genuine=300, impostor=900, digits=2):
    """Overlapping similarities with many ties."""
    generator = np.random.default_rng(seed)
    alike = np.round(generator.normal(0.5, 0.2, genuine), digits)
    other = np.round(generator.normal(0.2, 0.2, impostor), digits)
    return torch.tensor(alike), torch.tensor(other)


def test_all_pairs_by_hand(monkeypatch):
    monkeypatch.setattr("trainer.metric.verification._BLOCK", 8)  # two rows at a time
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    genuine, impostor = pair_similarities(embeddings, torch.tensor([1, 2, 1, 2]))
    assert sorted(genuine.tolist()) == pytest.approx([0.0, 0.6])  # 0-2, 1-3
    assert sorted(impostor.tolist()) == pytest.approx([-1.0, -0.6, 0.0, 0.8])  # 0-3, 2-3, 0-1, 1-2


def test_roc_by_hand_with_a_tie():
    curve = roc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]))
    assert curve.far.tolist() == [0, 0, 0.5, 1]
    assert curve.tar.tolist() == [0, 0.5, 1, 1]
    assert area_under_curve(curve) == pytest.approx(3.5 / 4)  # pairs (genuine, impostor): 3 won, 1 tied
    assert equal_error_rate(curve) == pytest.approx(0.25)  # slanted step from (0, .5) to (.5, 1)


def test_roc_and_area_agree_with_scikit_learn():
    genuine, impostor = scores()
    labels = np.r_[np.ones(len(genuine)), np.zeros(len(impostor))]
    values = torch.cat([genuine, impostor]).numpy()
    far, tar, _ = roc_curve(labels, values, drop_intermediate=False)
    curve = roc(genuine, impostor)
    np.testing.assert_allclose(curve.far.numpy(), far)
    np.testing.assert_allclose(curve.tar.numpy(), tar)
    assert area_under_curve(curve) == pytest.approx(roc_auc_score(labels, values))


@pytest.mark.parametrize(
    ("genuine", "impostor", "rate"),
    [([0.9, 0.8], [0.1, 0.2], 0.0), ([0.1, 0.2], [0.8, 0.9], 1.0), ([0.3, 0.3], [0.3, 0.3], 0.5)],
)
def test_equal_error_rate_at_the_extremes(genuine, impostor, rate):
    assert equal_error_rate(roc(torch.tensor(genuine), torch.tensor(impostor))) == pytest.approx(rate)


def test_tar_at_far_accepts_exactly_as_many_impostors_as_allowed():
    impostor = torch.arange(100) / 100  # 0.00 ... 0.99
    point = tar_at_far(torch.tensor([0.95, 0.895, 0.885, 0.2]), impostor, far=0.1)
    assert point.threshold == pytest.approx(0.89)  # the 11th highest: 0.90 ... 0.99 pass
    assert point.far == pytest.approx(0.1)
    assert point.tar == pytest.approx(0.5)
    assert (point.genuine_pairs, point.impostor_pairs) == (4, 100)
    assert tar_at_far(torch.ones(1), impostor, far=0.29).far == 0.29  # 100 * 0.29 is 28.999999999999996


def test_tar_at_far_rejects_impostors_tied_at_the_threshold():
    impostor = torch.cat([torch.full((5,), 0.9), torch.full((10,), 0.8), torch.zeros(85)])
    point = tar_at_far(torch.tensor([0.95, 0.8, 0.8, 0.7]), impostor, far=0.1)
    assert point.far == pytest.approx(0.05)  # all ten ties would make 0.15
    assert point.tar == pytest.approx(0.25)


@pytest.mark.parametrize("far", [0.02, 0.1, 0.3])
def test_tar_at_far_is_the_best_of_all_thresholds(far):
    genuine, impostor = scores(seed=3)
    best = 0.0
    for threshold in [-9.0, *torch.cat([genuine, impostor]).tolist()]:
        if float((impostor > threshold).double().mean()) <= far:
            best = max(best, float((genuine > threshold).double().mean()))
    point = tar_at_far(genuine, impostor, far)
    assert point.far <= far
    assert point.tar == best > 0


def test_tar_at_far_refuses_too_few_impostors_and_rates_out_of_range():
    with pytest.raises(ValueError, match=r"99 impostor pairs at FAR 0.1 are 9.9 false accepts; at least 10"):
        tar_at_far(torch.ones(5), torch.zeros(99), far=0.1)
    assert tar_at_far(torch.ones(5), torch.zeros(100), far=0.1).tar == 1
    for far in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            tar_at_far(torch.ones(5), torch.zeros(100), far=far)
    with pytest.raises(ValueError, match="0 genuine and 3 impostor pairs"):
        roc(torch.empty(0), torch.zeros(3))


def test_wilson_interval_solves_the_score_equation():
    for successes, trials in [(8, 10), (1, 40), (500, 1000)]:
        share = successes / trials
        for bound in wilson_interval(successes, trials):
            deviation = math.sqrt(bound * (1 - bound) / trials)
            assert abs(share - bound) / deviation == pytest.approx(1.959964)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # z² / (n + z²)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_best_threshold_by_hand():
    similarities = torch.tensor([0.1, 0.4, 0.6, 0.9])
    assert best_threshold(similarities, torch.tensor([False, False, True, True])) == pytest.approx(0.5)
    assert best_threshold(similarities, torch.tensor([False] * 4)) == math.inf
    assert best_threshold(similarities, torch.tensor([True] * 4)) == -math.inf
    tied = torch.tensor([0.5, 0.5, 0.5, 0.2])  # a threshold cannot part the three
    assert best_threshold(tied, torch.tensor([True, True, False, False])) == pytest.approx(0.35)


def test_best_threshold_decides_as_many_pairs_as_any_other():
    genuine, impostor = scores(seed=5, genuine=60, impostor=60)
    values, labels = torch.cat([genuine, impostor]), torch.arange(120) < 60
    right = max(int(((values > t) == labels).sum()) for t in [-9.0, *values.tolist()])
    assert int(((values > best_threshold(values, labels)) == labels).sum()) == right


def test_fold_accuracy_uses_the_threshold_of_the_other_folds():
    similarities = torch.tensor([0.9, 0.8, 0.3, 0.2])
    genuine = torch.tensor([True, False, True, False])
    folds = torch.tensor([0, 0, 1, 1])
    # fold 0: threshold 0.25 of fold 1 accepts both, 1 of 2 right; fold 1: 0.85 of fold 0 rejects both, 1 of 2 right;
    # a threshold chosen on the fold itself would score 2 of 2
    assert fold_accuracies(similarities, genuine, folds).tolist() == [0.5, 0.5]
    assert fold_accuracies(torch.tensor([0.9, 0.1, 0.7, 0.2]), genuine, folds).tolist() == [1, 1]
