import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from trainer.metric.identification import (
    centroids,
    cumulative_match,
    cumulative_match_band,
    distance_vote,
    majority_vote,
    mated_ranks,
    occurrence,
    split_gallery,
    tpir_at_fpir,
    without_self,
)


def test_occurrence_counts_earlier_samples_of_the_identity():
    assert occurrence(torch.tensor([7, 3, 7, 7, 3])).tolist() == [0, 0, 1, 2, 1]


def test_gallery_is_the_first_images_of_each_identity_in_the_order_given():
    identities = torch.tensor([5, 9, 5, 5, 9, 2])
    gallery, probes = split_gallery(identities, 1)
    assert gallery.tolist() == [0, 1, 5]
    assert probes.tolist() == [2, 3, 4]
    gallery, probes = split_gallery(identities, 2)
    assert gallery.tolist() == [0, 1, 2, 4, 5]
    assert probes.tolist() == [3]


def test_rank_counts_identities_before_the_first_mate():
    neighbours = torch.tensor([[4, 4, 9, 1], [4, 1, 4, 9], [9, 4, 1, 9], [1, 4, 1, 4]])
    assert mated_ranks(neighbours, torch.tensor([9, 9, 9, 9])).tolist() == [2, 3, 1, 0]


def test_rank_agrees_with_a_loop():
    generator = torch.Generator().manual_seed(1)
    neighbours = torch.randint(6, (200, 9), generator=generator)
    probes = torch.randint(6, (200,), generator=generator)
    expected = []
    for row, own in zip(neighbours.tolist(), probes.tolist(), strict=True):
        seen = list(dict.fromkeys(row))  # distinct identities in order of appearance
        expected.append(seen.index(own) + 1 if own in seen else 0)
    assert 0 in expected
    assert mated_ranks(neighbours, probes).tolist() == expected


def test_cmc_by_hand():
    curve = cumulative_match(torch.tensor([1, 3, 0, 2, 7]), longest=4)
    assert curve.tolist() == pytest.approx([1 / 5, 2 / 5, 3 / 5, 3 / 5])


def test_without_self_drops_the_probe_or_else_the_last():
    neighbours = torch.tensor([[0, 5, 6], [7, 1, 8], [3, 4, 9], [5, 6, 3]])
    assert without_self(neighbours, torch.tensor([0, 1, 2, 3])).tolist() == [[5, 6], [7, 8], [3, 4], [5, 6]]


@pytest.mark.parametrize(("k", "winner"), [(1, 5), (2, 5), (3, 8), (4, 5), (5, 8)])
def test_vote_goes_to_the_most_frequent_then_to_the_nearer(k, winner):
    assert majority_vote(torch.tensor([[5, 8, 8, 5, 8]]), k).tolist() == [winner]


def test_vote_agrees_with_a_loop(monkeypatch):
    monkeypatch.setattr("trainer.metric.identification._BLOCK", 7 * 7 * 10)  # several blocks
    neighbours = torch.randint(4, (95, 9), generator=torch.Generator().manual_seed(0))
    expected = []
    for row in neighbours.tolist():
        voters = row[:7]
        expected.append(max(voters, key=lambda identity: (voters.count(identity), -voters.index(identity))))
    assert majority_vote(neighbours, 7).tolist() == expected


def test_centroid_is_the_unit_mean_of_the_first_images():
    embeddings = normalize(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [-1.0, 0.0], [3.0, 0.0]]), dim=1)
    means, identities = centroids(embeddings, torch.tensor([8, 2, 8, 8, 2]), images=2)
    assert identities.tolist() == [2, 8]
    root = 0.5**0.5
    assert torch.allclose(means, torch.tensor([[root, root], [root, root]]))  # the fourth image is left out


def test_distance_vote_by_hand():
    """Distances 0.2, 0.5, 0.5 of 7, 8, 8: weights 5 against 4; of the nearest three of another probe two at distance 0."""
    cosine = [1 - d * d / 2 for d in (0.2, 0.5, 0.5)]
    neighbours = torch.tensor([[7, 8, 8], [9, 8, 7]])
    similarities = torch.tensor([cosine, [1.0, 1.0, 0.99]], dtype=torch.float64)
    assert distance_vote(neighbours, similarities, 3).tolist() == [7, 9]
    assert distance_vote(neighbours[:, [1, 2, 0]], similarities[:, [0, 1, 2]], 3).tolist()[0] == 8


def test_distance_vote_is_scikit_learns():
    generator = torch.Generator().manual_seed(3)
    gallery = normalize(torch.randn(200, 8, generator=generator, dtype=torch.float64))
    probes = normalize(torch.randn(100, 8, generator=generator, dtype=torch.float64))
    labels = torch.randint(5, (200,), generator=generator)
    expected = KNeighborsClassifier(9, weights="distance", algorithm="brute").fit(gallery, labels).predict(probes)
    similarities, order = (probes @ gallery.T).topk(9)
    assert distance_vote(labels[order], similarities, 9).tolist() == expected.tolist()
    assert (majority_vote(labels[order], 9) != torch.from_numpy(expected)).any(), "weights must matter here"


def test_tpir_by_hand():
    """Of 20 strangers 10 may raise an alarm at FPIR 0.5: the threshold is the 11th highest, 0.09."""
    strangers = torch.arange(20) / 100
    mated, right = torch.tensor([0.05, 0.095, 0.5, 0.9]), torch.tensor([True, True, False, True])
    point = tpir_at_fpir(mated, right, strangers, 0.5)
    assert point.threshold == pytest.approx(0.09)
    assert point.fpir == 0.5
    assert point.tpir == 0.5, "0.095 and 0.9; 0.5 finds somebody else"
    with pytest.raises(
        ValueError, match=r"20 non-mated probes at FPIR 0\.1 are 2 false accepts; at least 10 are needed"
    ):
        tpir_at_fpir(mated, right, strangers, 0.1)
    with pytest.raises(ValueError, match="no mated probe"):
        tpir_at_fpir(mated[:0], right[:0], strangers, 0.5)


def test_band_of_the_cmc_holds_it_and_narrows():
    generator = torch.Generator().manual_seed(0)

    def band(identities: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        of = torch.arange(identities).repeat_interleave(5)
        ranks = torch.randint(0, 8, (identities,), generator=generator).repeat_interleave(5)
        return cumulative_match(ranks, 10), *cumulative_match_band(ranks, of, 10, draws=400)

    curve, low, high = band(20)
    assert ((low <= curve) & (curve <= high)).all()
    assert (low[1:] >= low[:-1]).all()
    _, lower, higher = band(500)
    assert (higher - lower)[2] < (high - low)[2] / 3


def test_band_covers_identities_not_images():
    """All probes of an identity agree, so 1,000 probes of 10 identities tell as much as 10: their share is binomial / 10."""
    ranks = torch.tensor([1, 0] * 5).repeat_interleave(100)
    low, high = cumulative_match_band(ranks, torch.arange(10).repeat_interleave(100), 1, draws=4000)
    assert (float(low), float(high)) == (0.2, 0.8), "the 2.5th and 97.5th percentiles of Binomial(10, 1/2) are 2 and 8"
