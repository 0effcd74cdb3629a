import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from trainer.evaluation.draws import draw_identities, draw_pairs, draw_triplets
from trainer.evaluation.measures import triplet_loss
from trainer.evaluation.protocols import ProtocolConfig, check_open_set, closed_set, open_set

SMALL = ProtocolConfig(ranks=(1, 2), knn=(1, 3), knn_gallery_images=2, centroid_images=2, folds=2, pairs=40)


def circle(*degrees):
    """Unit vectors at these angles."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def people(identities=30, images=8, d=16, spread=0.5, seed=0):
    """Gaussian blobs on the sphere: embeddings, identities."""
    generator = torch.Generator().manual_seed(seed)
    means = normalize(torch.randn(identities, d, generator=generator), dim=1)
    ids = torch.arange(identities).repeat_interleave(images)
    order = torch.randperm(len(ids), generator=generator)
    noise = torch.randn(len(ids), d, generator=generator) * spread / d**0.5
    return normalize(means[ids] + noise, dim=1)[order], ids[order] * 10


def test_open_set_by_hand():
    # identity 1 at 0, 10, 80 degrees; identity 2 at 90, 60, 100; identity 3 at 40, alone
    embeddings = circle(0, 90, 10, 60, 80, 100, 40)
    result = open_set(embeddings, torch.tensor([1, 2, 1, 2, 1, 2, 3]), margin=0.2, squared=True, config=SMALL).scalars
    # gallery 0 (1), 90 (2), 40 (3); probes 10 -> 1 first; 60 -> 40, then 90: rank 2; 80 -> 90, 40, 0: rank 3; 100 -> rank 1
    assert (result["gallery"], result["probes"], result["identities_without_probe"]) == (3, 4, 1)
    assert (result["rank1"], result["rank2"]) == (2 / 4, 3 / 4)
    assert (result["leave_one_out_probes"], result["single_image_identities"]) == (6, 1)
    # gallery of two images each: 0, 10 (1), 90, 60 (2), 40 (3); probes 80 (1) -> 90; 100 (2) -> 90
    assert (result["knn_gallery"], result["knn_probes"], result["knn_gallery_1"]) == (5, 2, 1 / 2)
    assert (result["samples"], result["identities"]) == (7, 3)
    assert (result["genuine_pairs"], result["impostor_pairs"]) == (6, 15)
    assert result["triplets"] == 6 * 4 + 6 * 4
    assert result["tar_at_far"][0]["tar"] is None
    assert "15 impostor pairs at FAR 0.1 are 1.5" in result["tar_at_far"][0]["refused"]


def test_leave_one_out_votes_by_hand():
    # 0, 1, 3.2 are identity 1; 4, 8.5, 9 are identity 2. The three nearest others, nearest first:
    # 0 -> 1, 3.2, 4: 1 1 2 right       1 -> 0, 3.2, 4: 1 1 2 right     3.2 -> 4, 1, 0: 2 1 1 right, the nearest wrong
    # 4 -> 3.2, 1, 0: 1 1 1 wrong       8.5 -> 9, 4, 3.2: 2 2 1 right   9 -> 8.5, 4, 3.2: 2 2 1 right
    embeddings, identities = circle(0, 1, 3.2, 4, 8.5, 9), torch.tensor([1, 1, 1, 2, 2, 2])
    result = open_set(embeddings, identities, margin=None, squared=False, config=SMALL).scalars
    assert result["knn_leave_one_out_1"] == 4 / 6
    assert result["knn_leave_one_out_3"] == 5 / 6
    assert result["headline_neighbours"] == 1  # 5 is not among the k


def test_closed_set_by_hand():
    gallery, owners = circle(0, 20, 180, 100, 120, 110), torch.tensor([1, 1, 1, 2, 2, 2])
    probes, own = circle(45, 70, 170, 115), torch.tensor([1, 1, 1, 2])
    config = ProtocolConfig(ranks=(1, 2), knn=(1, 3), centroid_images=2, folds=2, pairs=8)
    result = closed_set(gallery, owners, probes, own, margin=0.1, squared=False, config=config).scalars
    # centroids of the first two: 10 and 110 degrees; 45 -> 10 right, 70 -> 110 wrong, 170 -> 110 wrong, 115 right
    assert result["centroid_accuracy"] == 2 / 4
    # the first image of each as gallery: 0 and 100; 45 -> 0 right, 70 -> 100 wrong, 170 -> 100 wrong, 115 right
    assert (result["rank1"], result["rank2"]) == (2 / 4, 1)
    # nearest of all: 45 -> 20 right; 70 -> 100 wrong; 170 -> 180 right; 115 right. Three nearest: 45 -> 20, 0, 100: 1 1 2
    # right; 70 -> 100, 110 and a tie: 2 2 wrong; 170 -> 180, 120, 110: 1 2 2 wrong; 115: 2 right
    assert (result["knn_gallery_1"], result["knn_gallery_3"]) == (3 / 4, 2 / 4)
    assert (result["gallery"], result["knn_gallery"], result["probes"]) == (2, 6, 4)


def test_neighbours_and_area_agree_with_scikit_learn():
    embeddings, identities = people(spread=1.2)
    config = ProtocolConfig(knn=(1, 7))
    result = open_set(embeddings, identities, margin=0.2, squared=False, config=config).scalars
    hits = []
    for left_out in range(len(identities)):
        others = np.arange(len(identities)) != left_out
        nearest = KNeighborsClassifier(1, metric="cosine").fit(embeddings[others], identities[others])
        hits.append(nearest.predict(embeddings[left_out : left_out + 1])[0] == int(identities[left_out]))
    assert result["knn_leave_one_out_1"] == pytest.approx(np.mean(hits))
    assert 0.2 < np.mean(hits) < 0.95
    upper = np.triu_indices(len(identities), 1)
    same = (identities[:, None] == identities[None, :]).numpy()[upper]
    assert result["auc"] == pytest.approx(roc_auc_score(same, (embeddings @ embeddings.T).numpy()[upper]), abs=1e-6)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("margin", [0.2, 0.0, None])
def test_triplet_loss_is_the_mean_of_all_valid_triplets(margin, squared):
    embeddings, identities = people(identities=4, images=3, d=4)
    losses = []
    for a in range(12):
        for p in range(12):
            for n in range(12):
                if a != p and identities[a] == identities[p] and identities[a] != identities[n]:
                    near, far = (float((embeddings[a] - embeddings[x]).norm()) for x in (p, n))
                    gap = near**2 - far**2 if squared else near - far
                    losses.append(math.log1p(math.exp(gap)) if margin is None else max(0.0, gap + margin))
    result = triplet_loss((embeddings, identities), margin, squared, seed=0)
    assert (result["triplets"], result["triplets_are"]) == (len(losses), "all valid")
    assert result["triplet_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_drawn_triplets_are_valid_uniform_and_estimate_the_mean(monkeypatch):
    identities = torch.tensor([4, 4, 4, 8, 8, 9, 8, 8, 8])
    anchor, positive, negative = draw_triplets(identities, 60_000, seed=1)
    keys = anchor * 81 + positive * 9 + negative
    triplets, counts = keys.unique(return_counts=True)
    valid = 3 * 2 * 6 + 5 * 4 * 4
    assert len(triplets) == valid
    assert ((identities[anchor] == identities[positive]) & (anchor != positive)).all()
    assert (identities[anchor] != identities[negative]).all()
    expected = 60_000 / valid  # 517: six standard deviations are 136
    assert (counts - expected).abs().max() < 6 * expected**0.5
    samples = people()
    exact = triplet_loss(samples, 0.5, False, seed=0)["triplet_loss"]
    monkeypatch.setattr("trainer.evaluation.measures.MOST_TRIPLETS", 10)
    drawn = triplet_loss(samples, 0.5, False, seed=0)
    assert (drawn["triplets"], drawn["triplets_are"]) == (100_000, "drawn")
    assert drawn["triplet_loss"] == pytest.approx(exact, rel=0.02)


def check_pairs(pairs, identities):
    same = identities[pairs.first] == identities[pairs.second]
    assert torch.equal(same, pairs.genuine)
    assert (pairs.first < pairs.second).all()
    assert len(torch.stack([pairs.first, pairs.second]).unique(dim=1)[0]) == len(same)  # no pair twice
    for fold in pairs.fold.unique():
        assert same[pairs.fold == fold].sum() * 2 == (pairs.fold == fold).sum()


@pytest.mark.parametrize("images", [2, 3, 40])
def test_pairs_of_a_large_set_have_identities_of_their_own_in_each_fold(images):
    _, identities = people(identities=60, images=images, d=2)
    pairs = draw_pairs(identities, pairs=600, folds=10, seed=4)
    check_pairs(pairs, identities)
    assert pairs.disjoint
    assert len(pairs.first) == {2: 2 * 60, 3: 2 * 180, 40: 600}[images]  # all genuine pairs that there are, or as asked
    seen = [
        set(identities[torch.cat([pairs.first, pairs.second])[pairs.fold.repeat(2) == f]].tolist()) for f in range(10)
    ]
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_each_fold_gets_an_identity_with_two_images_when_some_have_one():
    identities = torch.cat([torch.arange(10).repeat(2), torch.arange(10, 30)])
    pairs = draw_pairs(identities, pairs=400, folds=10, seed=1)
    check_pairs(pairs, identities)
    assert pairs.disjoint
    assert pairs.fold.bincount().tolist() == [2] * 10  # one genuine pair each


def test_genuine_pairs_are_no_more_than_impostor_pairs():
    identities = torch.tensor([1] * 6 + [2])  # 15 genuine, 6 impostor pairs
    pairs = draw_pairs(identities, pairs=100, folds=2, seed=0)
    check_pairs(pairs, identities)
    assert len(pairs.first) == 12


def test_rank_reaches_every_identity_of_a_gallery_of_several_images():
    # gallery 0, 1 (identity 1), 10, 11 (2), 20, 21 (3); the probe of 3 at 2 degrees has four images of others before its own
    embeddings, identities = circle(0, 1, 10, 11, 20, 21, 2), torch.tensor([1, 1, 2, 2, 3, 3, 3])
    config = ProtocolConfig(gallery_images_per_identity=2, ranks=(1, 2, 3), knn=(1,), folds=2, pairs=8)
    result = open_set(embeddings, identities, margin=0.2, squared=True, config=config)
    assert result.curves["cmc"].tolist() == [0, 0, 1]


def test_pairs_of_a_small_set_share_identities_between_folds_and_say_so():
    _, identities = people(identities=7, images=5)
    pairs = draw_pairs(identities, pairs=100, folds=10, seed=4)
    check_pairs(pairs, identities)
    assert not pairs.disjoint
    assert len(pairs.first) == 100
    assert pairs.fold.bincount().tolist() == [10] * 10
    result = open_set(*people(identities=7, images=5), margin=0.2, squared=False, config=ProtocolConfig(pairs=100))
    assert result.scalars["folds_share_identities"] is True


def test_an_identity_with_many_images_does_not_fill_the_pairs():
    identities = torch.cat([torch.zeros(400, dtype=torch.int64), torch.arange(1, 40).repeat_interleave(20)])
    pairs = draw_pairs(identities, pairs=1000, folds=2, seed=0)
    share = float((identities[pairs.first[pairs.genuine]] == 0).double().mean())
    assert share < 0.1  # 1/40 by identity; 91 % if pairs were drawn alike


def test_pairs_depend_on_the_seed_alone():
    _, identities = people()
    one, two, other = (draw_pairs(identities, 300, 10, seed) for seed in (5, 5, 6))
    assert torch.equal(one.first, two.first)
    assert torch.equal(one.second, two.second)
    assert one.first.tolist() != other.first.tolist()


def test_too_few_pairs_for_the_folds_are_refused_by_name():
    embeddings, identities = circle(0, 10, 20, 100, 140, 200), torch.tensor([1, 1, 1, 2, 3, 4])
    config = ProtocolConfig(ranks=(1,), knn=(1,), knn_gallery_images=3)
    result = open_set(embeddings, identities, margin=0.2, squared=False, config=config)
    assert result.scalars["verification_accuracy"] is None
    assert "3 genuine" in result.scalars["refusals"]["verification_accuracy"]
    assert "0 probes" in result.scalars["refusals"]["knn_gallery_1"]
    assert result.scalars["auc"] == 1
    assert set(result.headline()) == {"rank1", "triplet_loss", "knn"}


def test_large_sets_take_whole_identities_for_the_roc():
    embeddings, identities = people(identities=40, images=5)
    chosen = draw_identities(identities, 103, seed=2)
    assert len(chosen) == 100
    assert identities[chosen].unique(return_counts=True)[1].tolist() == [5] * 20
    result = open_set(embeddings, identities, margin=0.2, squared=False, config=ProtocolConfig(roc_samples=103)).scalars
    assert (result["roc_genuine_pairs"], result["roc_impostor_pairs"]) == (20 * 10, 100 * 99 // 2 - 200)
    assert (result["genuine_pairs"], result["impostor_pairs"]) == (40 * 10, 200 * 199 // 2 - 400)
    assert result["roc_pairs_are"] == "all pairs of 100 samples, whole identities drawn"
    assert len(draw_identities(torch.arange(2).repeat(5), 4, seed=0)) == 10  # two identities even where they do not fit
    lonely = torch.tensor([1, 2, 3, 4, 4, 4, 5])
    assert (lonely[draw_identities(lonely, 4, seed=0)] == 4).sum() == 3  # the one with a genuine pair is always there


def test_result_is_json_deterministic_and_independent_of_the_length_of_vectors():
    embeddings, identities = people()
    one = open_set(embeddings, identities, margin=0.2, squared=True)
    two = open_set(embeddings * 7, identities, margin=0.2, squared=True)
    assert json.loads(json.dumps(one.scalars, allow_nan=False)) == one.scalars
    assert one.scalars["rank1"] == two.scalars["rank1"]
    assert one.scalars["triplet_loss"] == pytest.approx(two.scalars["triplet_loss"], rel=1e-4)
    assert open_set(embeddings, identities, margin=0.2, squared=True).scalars == one.scalars
    assert one.curves["cmc"].shape == (30,)
    assert one.curves["cmc"][0] == one.scalars["rank1"]
    assert (np.diff(one.curves["roc_far"]) >= 0).all()
    assert (np.diff(one.curves["roc_tar"]) >= 0).all()
    area = np.trapezoid(one.curves["roc_tar"], one.curves["roc_far"])
    assert area == pytest.approx(one.scalars["auc"], abs=2e-3)


def test_perfect_and_random_embeddings_score_as_they_must():
    _, identities = people(identities=40, images=6)
    perfect = torch.eye(40)[identities // 10]
    result = open_set(perfect, identities, margin=0.2, squared=True).scalars
    for name in ("rank1", "rank5", "knn_leave_one_out_5", "knn_gallery_5", "verification_accuracy", "auc"):
        assert result[name] == 1, name
    assert (result["eer"], result["triplet_loss"], result["tar_at_far"][2]["tar"]) == (0, 0, 1)
    noise = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    result = open_set(noise, identities, margin=0.2, squared=True).scalars
    assert result["rank1"] < 0.1
    assert result["auc"] == pytest.approx(0.5, abs=0.06)
    assert result["verification_accuracy"] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("embeddings", "identities", "message"),
    [
        (torch.eye(4), [1, 1, 1, 1], "1 identities; at least 2"),
        (torch.eye(4), [1, 2, 3, 4], "none of the 4 identities has 2 images"),
        (torch.full((4, 4), torch.nan), [1, 1, 2, 2], "4 of 4 embeddings hold NaN"),
        (torch.eye(4) * torch.tensor([1, 1, 1, 0]), [1, 1, 2, 2], "1 of 4 embeddings are zero"),
        (torch.eye(4), [1, 1, 2], r"shape \(4, 4\), their identities \(3,\)"),
        (torch.empty(0, 4), [], "embeddings are none"),
        (torch.eye(4), [1, 1, 2, 2], "evaluation.ranks goes up to 5, but there are 2 identities"),
    ],
)
def test_open_set_refuses_in_one_line(embeddings, identities, message):
    with pytest.raises(ValueError, match=message) as refusal:
        open_set(embeddings, torch.tensor(identities, dtype=torch.int64), margin=0.2, squared=True)
    assert "\n" not in str(refusal.value)


def test_a_gallery_smaller_than_k_is_refused_before_embedding():
    identities = torch.arange(6).repeat(2)
    with pytest.raises(ValueError, match=r"evaluation\.knn goes up to 20, but there are 11 other images"):
        check_open_set(identities, ProtocolConfig())
    with pytest.raises(
        ValueError, match=r"evaluation\.gallery_images_per_identity is 2 and the largest identity has 2"
    ):
        check_open_set(identities, ProtocolConfig(gallery_images_per_identity=2))
    check_open_set(identities, ProtocolConfig(knn=(1, 11)))


def test_closed_set_refuses_in_one_line():
    eye = torch.eye(4)

    def run(gallery=eye, owners=(1, 1, 2, 2), probes=eye[:2], own=(1, 2), margin=0.2):
        closed_set(gallery, torch.tensor(owners), probes, torch.tensor(own), margin=margin, squared=True, config=SMALL)

    run()
    with pytest.raises(ValueError, match=r"1 probe identities are not in the gallery \(7\)"):
        run(own=(1, 7))
    with pytest.raises(ValueError, match="gallery embeddings have 4 dimensions, probe embeddings 3"):
        run(probes=torch.eye(3)[:2])
    with pytest.raises(ValueError, match="goes up to 3, but there are 2 images in the gallery"):
        run(gallery=eye[:2], owners=(1, 2))
    with pytest.raises(ValueError, match="margin is nan"):
        run(margin=math.nan)


@pytest.mark.parametrize(("images", "right"), [(2, 0), (3, 1 / 2), (9, 1 / 2)])
def test_closed_set_enrols_only_so_many_images_of_an_identity(images, right):
    gallery, owners = circle(0, 90, 26, 27), torch.tensor([1, 1, 1, 2])
    probes, own = circle(80, 25), torch.tensor([2, 1])  # 80 -> 90 wrong; 25 -> 26 right, or else 27 wrong
    config = ProtocolConfig(closed_gallery_images=images, ranks=(1,), knn=(1,), folds=2, pairs=8)
    result = closed_set(gallery, owners, probes, own, margin=None, squared=True, config=config).scalars
    assert result["knn_gallery"] == min(images, 3) + 1
    assert result["knn_gallery_1"] == right


def test_closed_set_with_one_probe_each_says_what_it_cannot_measure():
    gallery, owners = people(identities=8, images=6)
    config = ProtocolConfig(knn=(1, 5))
    first = torch.tensor([int((owners == identity).nonzero()[0]) for identity in owners.unique()])
    result = closed_set(gallery, owners, gallery[first], owners[first], margin=0.2, squared=True, config=config).scalars
    assert result["rank1"] == 1
    assert result["verification_accuracy"] is result["triplet_loss"] is None
    assert "8 identities, the largest of 1 images" in result["refusals"]["triplet_loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 1}, "evaluation.folds is 1; it must be at least 2"),
        ({"pairs": 19}, "evaluation.pairs is 19; it must be at least 20"),
        ({"knn": (5, 1)}, r"evaluation.knn is \[5, 1\]"),
        ({"ranks": ()}, r"evaluation.ranks is \[\]"),
        ({"fars": (0.1, 1.0)}, "evaluation.fars has 1.0"),
        ({"centroid_images": 0}, "evaluation.centroid_images is 0"),
    ],
)
def test_settings_are_checked_on_creation(settings, message):
    with pytest.raises(ValueError, match=message):
        ProtocolConfig(**settings)
