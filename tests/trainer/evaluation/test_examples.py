from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from trainer.evaluation import examples
from trainer.evaluation.examples import Examples, Miss, Pair, find_examples, hardest_pairs, shown_samples, worst_misses


def on_circle(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def crowd(count, identities, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(identities, (count,), generator=generator)


def every_pair(embeddings, identities):
    """(genuine, impostor), each hardest first: plain loops in float64."""
    points = normalize(embeddings.double(), dim=1).numpy()
    genuine, impostor = [], []
    for first, second in combinations(range(len(points)), 2):
        pair = Pair(first, second, float(np.sqrt(((points[first] - points[second]) ** 2).sum())))
        (genuine if identities[first] == identities[second] else impostor).append(pair)
    return sorted(genuine, key=lambda pair: -pair.distance), sorted(impostor, key=lambda pair: pair.distance)


def test_hardest_pairs_on_a_circle():
    genuine, impostor = hardest_pairs(on_circle(0, 60, 90, 100), torch.tensor([7, 7, 5, 5]), 2)
    assert [(pair.first, pair.second) for pair in genuine] == [(0, 1), (2, 3)]
    assert genuine[0].distance == pytest.approx(1)
    assert [(pair.first, pair.second) for pair in impostor] == [(1, 2), (1, 3)]
    assert impostor[0].distance == pytest.approx(2 * np.sin(np.deg2rad(15)))


@pytest.mark.parametrize("tile", [1, 7, 64, 2048])
@pytest.mark.parametrize("count", [1, 10, 5000])
def test_hardest_pairs_are_those_of_plain_loops(monkeypatch, tile, count):
    monkeypatch.setattr(examples, "_TILE", tile)
    embeddings, identities = crowd(60, 9, seed=3)
    for found, expected in zip(
        hardest_pairs(embeddings, identities, count), every_pair(embeddings, identities), strict=True
    ):
        assert [(pair.first, pair.second) for pair in found] == [(p.first, p.second) for p in expected[:count]]
        np.testing.assert_allclose([p.distance for p in found], [p.distance for p in expected[:count]], atol=1e-12)


@pytest.mark.parametrize("tile", [1, 3, 2048])
def test_of_equally_hard_pairs_the_first_in_the_set_are_taken(monkeypatch, tile):
    monkeypatch.setattr(examples, "_TILE", tile)
    genuine, impostor = hardest_pairs(on_circle(0, 0, 0, 0, 0), torch.tensor([1, 1, 1, 2, 2]), 3)
    assert [(pair.first, pair.second) for pair in genuine] == [(0, 1), (0, 2), (1, 2)]
    assert [(pair.first, pair.second) for pair in impostor] == [(0, 3), (0, 4), (1, 3)]


def test_a_set_with_no_pair_of_a_kind_gives_none():
    genuine, impostor = hardest_pairs(on_circle(0, 10), torch.tensor([1, 2]), 3)
    assert (genuine, len(impostor)) == ([], 1)
    genuine, impostor = hardest_pairs(on_circle(0, 10), torch.tensor([1, 1]), 3)
    assert (len(genuine), impostor) == (1, [])


def test_a_miss_on_a_circle():
    """Seven enrolled at 0, 10 ... 60 degrees; a second image of the first, at 61 degrees, has it at rank 7."""
    embeddings = on_circle(0, 10, 20, 30, 40, 50, 60, 61)
    misses, probes, missed = worst_misses(embeddings, torch.tensor([9, 1, 2, 3, 4, 5, 6, 9]), 10)
    assert (probes, missed, len(misses)) == (1, 1, 1)
    miss = misses[0]
    assert (miss.probe, miss.right, miss.found, miss.rank) == (7, 0, 6, 7)
    assert miss.right_distance == pytest.approx(2 * np.sin(np.deg2rad(30.5)))
    assert miss.found_distance == pytest.approx(2 * np.sin(np.deg2rad(0.5)))


def every_miss(embeddings, identities):
    points = normalize(embeddings.double(), dim=1).numpy()
    gallery = [place for place in range(len(points)) if identities[place] not in identities[:place]]
    found = []
    for probe in set(range(len(points))) - set(gallery):
        cosine = {place: float(points[probe] @ points[place]) for place in gallery}
        order = sorted(gallery, key=lambda place: (-cosine[place], place))
        right = next(place for place in gallery if identities[place] == identities[probe])
        rank = order.index(right) + 1
        if rank > 5:
            far, near = (float(np.linalg.norm(points[probe] - points[place])) for place in (right, order[0]))
            found.append(Miss(probe, right, order[0], rank, far, near))
    return sorted(found, key=lambda miss: (-miss.rank, miss.found_distance - miss.right_distance, miss.probe))


@pytest.mark.parametrize("tile", [1, 8, 2048])
def test_misses_are_those_of_plain_loops(monkeypatch, tile):
    monkeypatch.setattr(examples, "_TILE", tile)
    embeddings, identities = crowd(80, 12, seed=5)
    expected = every_miss(embeddings, identities.tolist())
    misses, probes, missed = worst_misses(embeddings, identities, 20)
    assert (probes, missed) == (68, len(expected))
    assert missed > 20
    for found, wanted in zip(misses, expected[:20], strict=True):
        assert (found.probe, found.right, found.found, found.rank) == (
            wanted.probe,
            wanted.right,
            wanted.found,
            wanted.rank,
        )
        assert (found.right_distance, found.found_distance) == pytest.approx(
            (wanted.right_distance, wanted.found_distance)
        )


def test_where_all_are_found_or_none_is_probe_there_is_no_miss():
    assert worst_misses(*crowd(50, 5, seed=0), 9)[0::2] == ([], 0)
    assert worst_misses(on_circle(0, 10, 20), torch.tensor([1, 2, 3]), 9) == ([], 0, 0)


def test_examples_come_back_from_json_and_know_who_takes_part():
    found = find_examples(*crowd(80, 12, seed=5))
    assert Examples.from_json(found.as_json()) == found
    assert (found.samples, found.identities, found.probes) == (80, 12, 68)
    assert {found.genuine[0].first, found.impostor[-1].second, found.misses[0].found} <= found.positions()


def test_shown_samples_are_few_and_of_identities_with_several_images():
    identities = np.repeat(np.arange(100), 30)
    shown = shown_samples(identities)
    assert (len(shown), len(np.unique(identities[shown]))) == (400, 20)
    assert (np.diff(shown) > 0).all()
    np.testing.assert_array_equal(shown, shown_samples(identities))
    assert (shown != shown_samples(identities, seed=1)).any()
    assert set(np.repeat([3, 8, 9], [1, 6, 4])[shown_samples(np.repeat([3, 8, 9], [1, 6, 4]))]) == {8}
