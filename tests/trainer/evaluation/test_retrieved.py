"""Average precision of whole sets and clusters: by hand, against plain loops and scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import average_precision_score, normalized_mutual_info_score

from tests.trainer.evaluation.test_protocols import circle, people
from trainer.evaluation import retrieved as module
from trainer.evaluation.retrieved import clusters, retrieved


def test_retrieved_by_hand():
    # identity 1 at 0, 10, 60 degrees; identity 2 at 25, 30; identity 3 alone at 90. Nearest first, without itself:
    # 0 -> 10 25 30 60 90: 1 2 2 1 3   10 -> 0 25 30 60 90: 1 2 2 1 3   (15 and 20 degrees: 25, 30; then 50, 80)
    # 60 -> 30 90 25 10 0: 2 3 2 1 1   (30 and 90 are both 30 away: the first in the set is nearer)
    # 25 -> 30 10 0 60 90: 2 first     30 -> 25 first
    samples = circle(0, 10, 60, 25, 30, 90), torch.tensor([1, 1, 1, 2, 2, 3])
    found = retrieved(samples, 100, seed=0)
    precisions = [(1 + 2 / 4) / 2, (1 + 2 / 4) / 2, (1 / 4 + 2 / 5) / 2, 1, 1]
    assert found["map"] == pytest.approx(sum(precisions) / 5)
    assert found["r_precision"] == pytest.approx((1 / 2 + 1 / 2 + 0 + 1 + 1) / 5)
    assert found["map_at_r"] == pytest.approx((1 / 2 + 1 / 2 + 0 + 1 + 1) / 5)
    assert found["retrieval_queries"] == 5  # identity 3 has nothing to find


def test_average_precision_is_scikit_learns(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 1000)  # many blocks
    embeddings, identities = people(identities=20, images=5, spread=1.5)
    wide = embeddings.double() @ embeddings.double().T
    expected = []
    for query in range(len(identities)):
        others = np.arange(len(identities)) != query
        expected.append(average_precision_score((identities == identities[query])[others], wide[query][others]))
    assert retrieved((embeddings, identities), 1000, 0)["map"] == pytest.approx(np.mean(expected))
    assert 0.2 < np.mean(expected) < 0.95


def test_drawn_queries_search_the_whole_set():
    samples = people(identities=30, images=6, spread=1.5)
    everything = retrieved(samples, 1000, 0)
    some = [retrieved(samples, 60, seed)["map"] for seed in range(30)]
    assert all(retrieved(samples, 60, seed)["retrieval_queries"] == 60 for seed in range(2))
    assert len(set(some)) > 20
    assert np.mean(some) == pytest.approx(everything["map"], abs=3 * np.std(some) / 30**0.5)


def test_clusters_by_hand():
    # chords: 0, 4 of identity 1 and 8 of identity 2 join; 100 of identity 2 and 104 of 3 join; 200 of 3 stays alone
    samples = circle(0, 4, 8, 100, 104, 200), torch.tensor([1, 1, 2, 2, 3, 3])
    found = clusters(samples, 2 * np.sin(np.radians(20) / 2), 100, 0)
    assert found["clusters"] == 3
    # together: 3 + 1 pairs; of the same identity: 1 + 1 + 1; both: one, (0, 4)
    assert (found["pairwise_precision"], found["pairwise_recall"]) == (1 / 4, 1 / 3)
    assert found["pairwise_f"] == pytest.approx(2 / 7)


@pytest.mark.parametrize("spread", [0.4, 1.0])
def test_clusters_against_scikit_learn_and_plain_loops(spread):
    embeddings, identities = people(identities=12, images=6, spread=spread)
    found = clusters((embeddings, identities), 0.9, 1000, 0)
    chosen = {"n_clusters": None, "distance_threshold": 0.9, "linkage": "average", "metric": "euclidean"}
    labels = AgglomerativeClustering(**chosen).fit_predict(embeddings.double().numpy())
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(identities, labels))
    pairs = [(labels[a] == labels[b], identities[a] == identities[b]) for a, b in itertools.combinations(range(72), 2)]
    both = sum(bool(one and other) for one, other in pairs)
    precision, recall = both / sum(one for one, _ in pairs), both / sum(bool(other) for _, other in pairs)
    assert found["pairwise_precision"] == pytest.approx(precision)
    assert found["pairwise_recall"] == pytest.approx(recall)
    assert found["pairwise_f"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["clusters"] == len(set(labels))


def test_a_large_set_is_clustered_in_part():
    found = clusters(people(identities=40, images=5), 0.9, 60, 0)
    assert found["cluster_samples"] == 60


def test_everything_alone():
    found = clusters((circle(0, 90, 180, 270), torch.tensor([1, 1, 2, 2])), 0.1, 100, 0)
    assert (found["clusters"], found["pairwise_f"], found["pairwise_precision"]) == (4, 0.0, 1.0)
