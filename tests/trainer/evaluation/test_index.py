import pytest
import torch
from torch.nn.functional import normalize

from trainer.evaluation.index import SLACK, search


def vectors(rows, d=32, seed=0):
    return normalize(torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def oracle(gallery, probes, k):
    """Every inner product in float64, rounded to float32, one probe at a time, sorted by (-similarity, position)."""
    rows = []
    for probe in probes.double():
        similarities = (gallery.double() * probe).sum(dim=1).float().tolist()
        rows.append(sorted(enumerate(similarities), key=lambda pair: (-pair[1], pair[0]))[:k])
    return torch.tensor([[s for _, s in row] for row in rows]), torch.tensor([[p for p, _ in row] for row in rows])


@pytest.mark.parametrize(("m", "k"), [(500, 1), (500, 7), (500, 500), (5, 5), (1, 1), (SLACK + 3, 3)])
def test_agrees_with_a_plain_oracle(m, k):
    gallery, probes = vectors(m), vectors(40, seed=1)
    similarities, positions = search(gallery, probes, k)
    expected, expected_positions = oracle(gallery, probes, k)
    assert torch.equal(positions, expected_positions)
    assert torch.equal(similarities, expected)
    assert (similarities.dtype, positions.dtype) == (torch.float32, torch.int64)


def test_ties_go_to_the_lowest_position():
    gallery = vectors(3000)
    copies = [2999, 7, 1500, 42]
    gallery[copies] = gallery[100].clone()
    _, positions = search(gallery, gallery[[100, 7]], k=3)
    assert positions.tolist() == [[7, 42, 100], [7, 42, 100]]  # the cut falls among the five


def test_collapsed_embeddings_still_give_the_lowest_positions():
    gallery = vectors(1).repeat(200, 1)
    similarities, positions = search(gallery, gallery[:5], k=4)
    assert positions.tolist() == [[0, 1, 2, 3]] * 5
    assert torch.allclose(similarities, torch.ones(5, 4))


def test_near_ties_beyond_the_slack_are_found():
    """More rows than the slack differ by less than float32 can order; the best is the last of them."""
    gallery = torch.zeros(SLACK + 60, 4)
    gallery[:, 0] = 1
    gallery[:, 1] = torch.linspace(3e-4, 0, len(gallery))  # cosine to (1, 0, 0, 0) before scaling: 1 for all
    gallery = normalize(gallery.double(), dim=1).float()
    probe = torch.tensor([[1.0, -1e-3, 0.0, 0.0]])
    assert torch.equal(search(gallery, probe, k=2)[1], oracle(gallery, probe, 2)[1])


def test_probe_order_and_company_do_not_matter():
    gallery, probes = vectors(400), vectors(64, seed=2)
    gallery[200:300] = gallery[:100]
    together, alone = search(gallery, probes, 6), [search(gallery, probe[None], 6) for probe in probes]
    assert torch.equal(together[1], torch.cat([positions for _, positions in alone]))
    assert torch.equal(together[0], torch.cat([similarities for similarities, _ in alone]))


@pytest.mark.parametrize(
    ("gallery", "probes", "k", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 5), 1, "same d"),
        (torch.ones(3, 4), torch.ones(4), 1, "same d"),
        (torch.ones(3, 4), torch.ones(2, 4), 4, "4 neighbours asked of a gallery of 3"),
        (torch.ones(3, 4), torch.ones(2, 4), 0, "0 neighbours"),
        (torch.full((3, 4), torch.nan), torch.ones(2, 4), 1, "not finite"),
    ],
)
def test_refuses_what_has_no_neighbours(gallery, probes, k, message):
    with pytest.raises(ValueError, match=message):
        search(gallery, probes, k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("k", [1, 50, 2500])
def test_gpu_gives_the_same_neighbours(k):
    gallery, probes = vectors(5000, d=128), vectors(300, d=128, seed=1)
    gallery[4000:4100] = gallery[:100]
    on_gpu, on_cpu = search(gallery, probes, k, "cuda"), search(gallery, probes, k)
    assert torch.equal(on_gpu[1], on_cpu[1])
    assert torch.equal(on_gpu[0], on_cpu[0])
