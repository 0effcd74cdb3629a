"""Measures of pairs: by hand, against scikit-learn, against a plain loop over folds."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from trainer.evaluation.sets.pair_sets import PairSet, consecutive_folds, judge_scores, root_distance
from trainer.evaluation.sets.prepared import Report
from trainer.metric.templates import roc_at_genuine
from trainer.metric.verification import area_under_curve, equal_error_rate, roc

REPORT = Report(margin=0.2, squared=False)


def judged(embeddings, pairs, genuine, folds, fars=(), **more):
    class Split:
        name = "made up"

    made = PairSet(
        "made",
        [(Split(), np.arange(len(embeddings)))],
        np.array(pairs),
        np.array(genuine),
        np.array(folds),
        None,
        **more,
    )
    made = PairSet(**{**vars(made), "fars": fars})
    return made.judge(lambda split, samples: (torch.as_tensor(embeddings).float()[samples], None), REPORT)


def on_circle(*degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_eight_pairs_by_hand():
    """Two folds of two genuine and two impostor pairs; every pair is image 0 and another one, at so many degrees."""
    degrees = (10, 20, 40, 50, 15, 60, 30, 90)
    genuine = (True, True, False, False, True, True, False, False)
    result = judged(on_circle(0, *degrees), [(0, n) for n in range(1, 9)], genuine, [0] * 4 + [1] * 4)
    found = result.scalars
    # fold 1 is best cut between 15 and 30 degrees, at (cos 15 + cos 30) / 2 = .916 < cos 20 = .940: fold 0 is all right;
    # fold 0 between 20 and 40, at (cos 20 + cos 40) / 2 = .853 < cos 30 = .866: of fold 1, 30 is let in and 60 is not, both wrong
    assert found["verification_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["verification_std"] == pytest.approx(np.std([1, 0.5], ddof=1))
    # all eight: accepting 10, 15, 20 is right in 7 of 8, limit between cos 20 and cos 30
    limit = (np.cos(np.radians(20)) + np.cos(np.radians(30))) / 2
    assert found["verification_threshold"] == pytest.approx(np.sqrt(2 - 2 * limit))
    assert (found["verification_pairs"], found["verification_folds"]) == (8, 2)
    # of the 16 (genuine, impostor) couples the genuine one is more alike in 4 + 4 + 4 + 1: 60 degrees beat only 90
    assert found["auc"] == pytest.approx(13 / 16)
    # after 10, 15, 20 come the impostors 30, 40, 50: at TAR 3/4 the FAR passes 1/4
    assert found["eer"] == pytest.approx(1 / 4)
    assert (found["genuine_pairs"], found["impostor_pairs"], found["samples"]) == (4, 4, 9)
    edges = result.curves["histogram_edges"]
    assert len(edges) == 101
    assert (edges[0], edges[-1]) == (0, 2)
    assert result.curves["histogram_genuine"].sum() == 4
    ten_degrees = 2 * np.sin(np.radians(5))
    assert result.curves["histogram_genuine"][int(ten_degrees / 0.02)] == 1


def random_pairs(count, images=60, size=8, rounded=False, seed=0):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(images, size))
    if rounded:  # few directions, so that many pairs tie
        embeddings = np.sign(embeddings[:, :3])
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    pairs = rng.integers(0, images, (count, 2))
    scores = (embeddings[pairs[:, 0]] * embeddings[pairs[:, 1]]).sum(1)
    genuine = scores + rng.normal(size=count) * 0.3 > 0.2
    return embeddings.astype(np.float32), pairs, genuine


def plain_folds(scores, genuine, folds):
    """Tries every threshold between two scores, the highest first."""
    accuracies = []
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        values = np.unique(scores[train])[::-1]
        limits = [np.inf, *((values[:-1] + values[1:]) / 2), -np.inf]
        right = [((scores[train] > limit) == genuine[train]).sum() for limit in limits]
        limit = limits[int(np.argmax(right))]
        accuracies.append(((scores[test] > limit) == genuine[test]).mean())
    return accuracies


@pytest.mark.parametrize("rounded", [False, True])
def test_against_scikit_learn_and_a_plain_loop(rounded):
    embeddings, pairs, genuine = random_pairs(1000, rounded=rounded)
    folds = np.arange(1000) % 10
    result = judged(embeddings, pairs, genuine, folds, fars=(0.1, 0.001))
    unit = torch.nn.functional.normalize(torch.from_numpy(embeddings)).double().numpy()
    scores = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)
    accuracies = plain_folds(scores, genuine, folds)
    found = result.scalars
    assert found["verification_accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["verification_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert found["auc"] == pytest.approx(roc_auc_score(genuine, scores))
    far, tar, _ = roc_curve(genuine, scores, drop_intermediate=False)
    at = np.flatnonzero(far <= 0.1)[-1]
    point, refused = found["tar_at_far"]
    assert point["tar"] == pytest.approx(tar[at])
    assert point["far"] == pytest.approx(far[at])
    assert point["low"] < point["tar"] < point["high"]
    assert refused["tar"] is None
    assert "at least 10 are needed" in refused["refused"]
    # every point of the thinned curve is one of scikit-learn's
    theirs = {(round(a, 9), round(b, 9)) for a, b in zip(far, tar, strict=True)}
    ours = zip(result.curves["roc_far"].round(9), result.curves["roc_tar"].round(9), strict=True)
    assert set(ours) <= theirs
    counts = np.histogram(np.sqrt(np.clip(2 - 2 * scores[genuine], 0, 4)), np.linspace(0, 2, 101))[0]
    assert result.curves["histogram_genuine"].tolist() == counts.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_short_curve_is_the_long_one(seed):
    rng = np.random.default_rng(seed)
    genuine, impostor = (torch.from_numpy(rng.integers(0, 12, rng.integers(1, 40)) / 12) for _ in range(2))
    short, long = roc_at_genuine(genuine, impostor), roc(genuine, impostor)
    assert area_under_curve(short) == pytest.approx(area_under_curve(long))
    assert equal_error_rate(short) == pytest.approx(equal_error_rate(long))
    whole = set(zip(long.far.tolist(), long.tar.tolist(), strict=True))
    assert set(zip(short.far.tolist(), short.tar.tolist(), strict=True)) <= whole
    assert len(short.far) == 2 * len(genuine.unique()) + 2


def test_folds_that_are_empty_are_none():
    embeddings, pairs, genuine = random_pairs(90)
    numbers = np.arange(90) % 3
    assert (
        judged(embeddings, pairs, genuine, numbers * 5 + 1).scalars["verification_accuracy"]
        == judged(embeddings, pairs, genuine, numbers).scalars["verification_accuracy"]
    )
    alone = judged(embeddings, pairs, genuine, np.zeros(90, int)).scalars
    assert alone["verification_accuracy"] is None
    assert alone["refusals"]["verification_std"] == "all pairs are in one fold; at least 2 are needed"
    assert alone["eer"] is not None


@pytest.mark.parametrize(
    ("genuine", "said"), [([True] * 3, "3 genuine and 0 impostor"), ([False] * 3, "0 genuine and 3")]
)
def test_pairs_of_one_kind_are_refused(genuine, said):
    with pytest.raises(ValueError, match=f"made has {said} .*pairs; at least one of each is needed"):
        judged(on_circle(0, 1, 2, 3), [(0, 1), (1, 2), (2, 3)], genuine, [0, 1, 2])


@pytest.mark.parametrize(("value", "said"), [(np.nan, "1 of 4 embeddings of made hold NaN"), (0, "1 of 4 .* are zero")])
def test_embeddings_that_are_none_are_refused(value, said):
    embeddings = on_circle(0, 1, 2, 3)
    embeddings[2] = value
    with pytest.raises(ValueError, match=said):
        judged(embeddings, [(0, 1), (1, 2), (2, 3)], [True, False, False], [0, 1, 2])


def test_distances_of_equal_and_opposite_vectors():
    scores = torch.tensor([1 + 1e-9, 1.0, 0.0, -1.0, -1 - 1e-9], dtype=torch.float64)
    assert root_distance(scores).tolist() == pytest.approx([0, 0, np.sqrt(2), 2, 2])
    counted = judge_scores(scores[:3], scores[3:], ())[1]
    assert (counted["histogram_genuine"].sum(), counted["histogram_impostor"][-1]) == (3, 2)


def test_folds_of_consecutive_pairs_are_those_of_kfold():
    for pairs in (10, 23, 99, 6000):
        dealt = consecutive_folds(pairs, 10)
        for fold, (_, test) in enumerate(KFold(10).split(np.arange(pairs))):
            assert np.flatnonzero(dealt == fold).tolist() == test.tolist()
