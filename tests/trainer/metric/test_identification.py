import pytest
import torch
from torch.nn.functional import normalize

from trainer.metric.identification import (
    centroids,
    cumulative_match,
    majority_vote,
    mated_ranks,
    occurrence,
    split_gallery,
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
