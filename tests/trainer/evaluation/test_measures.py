"""Galleries, open set, weighted votes, bands and histograms of one set: by hand and against scikit-learn."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from benchmarks.measure import memory, reset_peak
from tests.trainer.evaluation.test_protocols import circle, people
from trainer.evaluation.draws import draw_pairs
from trainer.evaluation.measures import fold_accuracy, open_set_points, operating_points, rank_k, triplet_loss
from trainer.evaluation.protocols import ProtocolConfig, closed_set, open_set
from trainer.evaluation.search.finder import Finder

HAND = {"ranks": (1, 2), "knn": (1,), "knn_gallery_images": 1, "folds": 2, "pairs": 8, "fars": (), "fpirs": ()}


def judged(embeddings, identities, **settings):
    return open_set(embeddings, identities, margin=0.2, squared=False, config=ProtocolConfig(**(HAND | settings)))


def test_the_mean_of_two_is_enrolled_by_hand():
    # means of the first two: identity 1 at 10 (0, 20), identity 2 at 100 (90, 110)
    # probes: 40 (1) -> 10 right; 70 (1) -> 100 wrong; 95 (2) right. Of single images 70 is nearest to 90, too
    embeddings, identities = circle(0, 90, 20, 110, 40, 70, 95), torch.tensor([1, 2, 1, 2, 1, 1, 2])
    found = judged(embeddings, identities, gallery="mean", gallery_images_per_identity=2).scalars
    assert (found["gallery"], found["probes"]) == (2, 3)
    assert (found["rank1"], found["rank2"]) == (2 / 3, 1)


def test_all_but_self_by_hand():
    # 0 and 30 of identity 1, 40 and 70 of identity 2, 72 of identity 3 alone
    # 0 -> 30 right; 30 -> 40 wrong, then 0: rank 2; 40 -> 30 wrong, then 70: rank 2; 70 -> 72 wrong, then 40: rank 2
    embeddings, identities = circle(0, 30, 40, 70, 72), torch.tensor([1, 1, 2, 2, 3])
    found = judged(embeddings, identities, gallery="all_but_self")
    assert (found.scalars["gallery"], found.scalars["probes"]) == (5, 4)
    assert (found.scalars["rank1"], found.scalars["rank2"]) == (1 / 4, 1)
    assert found.curves["identity_labels"].tolist() == [1, 2]
    assert found.curves["identity_rank1"].tolist() == [1 / 2, 0]
    assert found.curves["identity_probes"].tolist() == [2, 2]


@pytest.mark.parametrize(("gallery", "images", "rank1"), [("first", 1, 1), ("mean", 3, 2), ("all_but_self", 1, 3)])
def test_closed_set_galleries_by_hand(gallery, images, rank1):
    """How many of three probes find their identity.

    Enrolled are 0, 40, 80 degrees of identity 1 and 100, 140, 180 of identity 2; the first of each: 0, 100; the means: 40, 140.
    85 (identity 1): first 100, wrong; mean 40, right (45 away, not 55); all: 80, right.
    60 (identity 1): first 100, wrong; mean 40, right; all: right.
    88 (identity 2): first 100, right; mean 40, wrong (48 away, not 52); for all 96 stands in its place: 100, right.
    """
    enrolled, owners = circle(0, 40, 80, 100, 140, 180), torch.tensor([1, 1, 1, 2, 2, 2])
    third = 96 if gallery == "all_but_self" else 88
    probes, own = circle(85, 60, third), torch.tensor([1, 1, 2])
    config = ProtocolConfig(**(HAND | {"gallery": gallery, "gallery_images_per_identity": images}))
    found = closed_set(enrolled, owners, probes, own, margin=0.2, squared=False, config=config).scalars
    assert found["rank1"] == rank1 / 3


def test_open_set_identification_against_loops():
    samples = people(identities=40, images=6, spread=1.2)
    found = open_set_points(samples, 1, (0.1, 0.05, 0.01), 3, Finder())
    embeddings, identities = samples
    unique = identities.unique()
    known = set(unique[torch.randperm(40, generator=torch.Generator().manual_seed(3))][:20].tolist())
    seen, gallery, mated, strangers = set(), [], [], []
    for place, identity in enumerate(identities.tolist()):
        if identity not in known:
            strangers.append(place)
        elif identity in seen:
            mated.append(place)
        else:
            seen.add(identity)
            gallery.append(place)
    assert (found["open_set_enrolled"], found["open_set_mated"], found["open_set_nonmated"]) == (20, 100, 120)
    scores = (embeddings.double() @ embeddings[gallery].double().T).float()
    best, owner = scores.max(1)
    for point in found["tpir_at_fpir"][:1]:
        allowed = int(120 * point["target"] + 1e-9)
        threshold = best[strangers].sort(descending=True).values[allowed]
        alarms = [
            place
            for place in mated
            if best[place] > threshold and identities[gallery][owner[place]] == identities[place]
        ]
        assert point["tpir"] == len(alarms) / 100
        assert point["fpir"] == int((best[strangers] > threshold).sum()) / 120 <= point["target"]
        assert point["low"] < point["tpir"] < point["high"]
    assert [point["refused"] is None for point in found["tpir_at_fpir"]] == [True, False, False]
    assert "120 non-mated probes at FPIR 0.05 are 6 false accepts" in found["tpir_at_fpir"][1]["refused"]


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_votes_agree_with_scikit_learn(weights):
    embeddings, identities = people(identities=15, images=8, spread=1.6)
    found = judged(embeddings, identities, knn=(1, 7), knn_gallery_images=6).scalars
    position = torch.zeros(len(identities), dtype=torch.long)
    for identity in identities.unique():
        mine = (identities == identity).nonzero().squeeze(1)
        position[mine] = torch.arange(len(mine))
    enrolled = position < 6
    judge = KNeighborsClassifier(7, weights=weights, algorithm="brute").fit(
        embeddings[enrolled].double(), identities[enrolled]
    )
    right = judge.predict(embeddings[~enrolled].double()) == identities[~enrolled].numpy()
    if weights == "distance":  # a majority's ties go to the nearer here, to the smaller label there
        assert found["knn_gallery_weighted_7"] == pytest.approx(right.mean())
    else:
        assert found["knn_gallery_7"] == pytest.approx(right.mean(), abs=2.5 / len(right))
    assert 0.3 < right.mean() < 0.98


def test_weighted_leave_one_out_agrees_with_scikit_learn():
    embeddings, identities = people(identities=15, images=6, spread=1.6)
    found = judged(embeddings, identities, knn=(1, 5)).scalars
    hits = []
    for left_out in range(len(identities)):
        others = np.arange(len(identities)) != left_out
        judge = KNeighborsClassifier(5, weights="distance", algorithm="brute")
        judge.fit(embeddings[others].double(), identities[others])
        hits.append(judge.predict(embeddings[[left_out]].double())[0] == int(identities[left_out]))
    assert found["knn_leave_one_out_weighted_5"] == pytest.approx(np.mean(hits))


def test_the_band_holds_the_curve_and_the_curves_their_identities():
    found = judged(*people(identities=30, images=5, spread=1.5), band_draws=200).curves
    assert (found["cmc_low"] <= found["cmc"]).all()
    assert (found["cmc"] <= found["cmc_high"]).all()
    assert found["cmc_low"][0] < found["cmc"][0] < found["cmc_high"][0]
    weighted = (found["identity_rank1"] * found["identity_probes"]).sum() / found["identity_probes"].sum()
    assert weighted == pytest.approx(found["cmc"][0])


def test_no_band_where_none_is_asked_for():
    assert "cmc_low" not in judged(*people(), band_draws=0).curves


def test_histograms_count_every_pair_at_its_distance():
    embeddings, identities = samples = people(identities=12, images=5, spread=1.2)
    scalars, curves = operating_points(samples, (0.1,), 5000, 0, "cpu")
    assert curves["histogram_genuine"].sum() == scalars["genuine_pairs"] == 12 * 10
    assert curves["histogram_impostor"].sum() == scalars["impostor_pairs"] == 60 * 59 / 2 - 120
    upper = np.triu_indices(60, 1)
    same = (identities[:, None] == identities[None, :]).numpy()[upper]
    distances = torch.cdist(embeddings.double(), embeddings.double()).numpy()[upper]
    for name, which in (("histogram_genuine", same), ("histogram_impostor", ~same)):
        expected, _ = np.histogram(distances[which], curves["histogram_edges"])
        assert np.abs(curves[name] - expected).max() <= 1  # a distance at an edge may fall on either side of it


def test_the_threshold_divides_the_pairs():
    """Blobs far apart: every genuine pair is nearer than it, every impostor pair further."""
    embeddings, identities = people(identities=10, images=5, d=64, spread=0.2)
    found = judged(embeddings, identities, pairs=400).scalars
    distances = torch.cdist(embeddings, embeddings)
    same = identities[:, None] == identities[None, :]
    assert found["verification_accuracy"] == 1
    assert distances[same].max() < found["verification_threshold"] < distances[~same].min()
    assert found["nmi"] == pytest.approx(1)
    assert found["pairwise_f"] == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fpirs": (0.1, 1.0)}, r"evaluation.fpirs has 1.0; each must lie between 0 and 1"),
        ({"cluster_samples": 3}, r"evaluation.cluster_samples is 3; it must be at least 4"),
        ({"retrieval_queries": -1}, r"evaluation.retrieval_queries is -1; it must be at least 0"),
        ({"band_draws": -1}, r"evaluation.band_draws is -1; it must be at least 0"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(ValueError, match=said):
        ProtocolConfig(**settings)


def test_nothing_is_measured_that_is_switched_off():
    off = {"roc_samples": 0, "retrieval_queries": 0, "cluster_samples": 0, "band_draws": 0}
    found = judged(*people(), **off)
    assert not {"auc", "map", "nmi", "tar_at_far", "tpir_at_fpir"} & found.scalars.keys()
    assert found.curves.keys() == {"cmc", "identity_labels", "identity_rank1", "identity_probes"}


@pytest.mark.parametrize("method", ["ivf", "hnsw"])
def test_approximate_search_comes_with_its_recall(method):
    samples = people(identities=60, images=10, d=32, spread=1.5)
    exact, found = (judged(*samples, knn=(1, 5), search=name).scalars for name in ("exact", method))
    assert (exact["search"], "search_recall" in exact) == ("exact", False)
    assert found["search"] == method
    assert 0.5 < found["search_recall"] <= 1
    assert found["search_recall_probes"] > 0
    assert found["rank1"] == pytest.approx(exact["rank1"], abs=0.1)


def test_an_index_that_finds_too_few_gives_no_false_owners():
    class Half:
        """Finds one neighbour of the two asked for."""

        def __call__(self, gallery, probes, k):
            similarities, positions = Finder()(gallery, probes, k)
            return similarities.index_fill(1, torch.tensor([1]), -torch.inf), positions.index_fill(
                1, torch.tensor([1]), -1
            )

        def told(self):
            return {}

    gallery, probes = (circle(0, 90), torch.tensor([5, 7])), (circle(80, 10, 100), torch.tensor([5, 5, 7]))
    scalars, _ = rank_k(gallery, probes, (1, 2), Half())
    # 80 (5) -> 90 and nothing more: not found; 10 (5) right; 100 (7) right
    assert (scalars["rank1"], scalars["rank2"]) == (2 / 3, 2 / 3)


def test_a_search_that_does_not_exist():
    with pytest.raises(ValueError, match=r"evaluation.search is 'lsh'; allowed are exact, split, ivf, hnsw, ivfpq"):
        ProtocolConfig(search="lsh")


def grown() -> None:
    """Prints by how many MiB drawn triplets and pairs make the peak of this process grow."""
    generator = torch.Generator().manual_seed(0)
    identities = torch.arange(20).repeat_interleave(20)
    samples = normalize(torch.randn(400, 12_288, generator=generator), dim=1), identities
    pairs = draw_pairs(identities, 6_000, 10, seed=0)
    before = reset_peak()
    triplet_loss(samples, 0.2, False, seed=0)
    fold_accuracy(samples, pairs)
    print(round(memory("VmHWM") - before))


def test_drawn_triplets_and_pairs_of_raw_pixels_stay_small():
    """Holes in the heap once took 24 GB here; pairs all at once, in float64, 1.7 GB."""
    command = "from tests.trainer.evaluation.test_measures import grown; grown()"
    told = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 200
