"""Search by products against a slow oracle: every precision, block edges, ties, crowds, memory maps."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.trainer.evaluation.search.search_oracle import assert_same, oracle, vectors
from trainer.evaluation.search import near, similarity, torch_search
from trainer.evaluation.search.near import bound, rounded
from trainer.evaluation.search.torch_search import in_float64, nearest
from trainer.precision import cpu_has_bf16

SMALL = {"ROWS": 16, "COLUMNS": 32, "FIRST": 64, "_WHOLE": 20_000}
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def small(monkeypatch):
    """Many blocks and chunks of a gallery of a thousand."""
    for name, value in SMALL.items():
        monkeypatch.setattr(torch_search, name, value)
    monkeypatch.setattr(similarity, "CHUNK", 352)


@pytest.fixture(params=[[BF16, F32], [F32], []], ids=["bf16 first", "float32", "float64 alone"])
def tried(request, monkeypatch):
    monkeypatch.setattr(torch_search, "products", lambda m, n, k, _: request.param if 4 * k < 352 else [])
    return request.param


@pytest.mark.usefixtures("small", "tried")
@pytest.mark.parametrize("k", [1, 5, 40, 600])
def test_agrees_with_the_oracle(k):
    gallery, probes = vectors(1003), vectors(45, seed=1)
    assert_same(nearest(gallery, probes, k), oracle(gallery, probes, k))


@pytest.mark.usefixtures("small", "tried")
def test_a_gallery_that_comes_nearer_and_nearer():
    """Every block holds nearer rows than all before: the worst order there is."""
    probes = vectors(20, seed=1)
    gallery = vectors(900)
    gallery = gallery[(gallery @ probes[0]).argsort()]
    assert_same(nearest(gallery, probes, 5), oracle(gallery, probes, 5))


@pytest.mark.usefixtures("small", "tried")
def test_duplicates_all_over_the_gallery_come_in_order():
    gallery = vectors(900)
    gallery[100::100] = gallery[7].clone()
    found = nearest(gallery, gallery[[7, 8]], 5)
    assert found[1][0].tolist() == [7, 100, 200, 300, 400]
    assert_same(found, oracle(gallery, gallery[[7, 8]], 5))


@pytest.mark.usefixtures("small")
def test_collapsed_embeddings_beside_good_ones(monkeypatch, tried):
    """Probes in the crowd end in float64, the others do not."""
    monkeypatch.setattr(near, "MOST_NEAR", 8)
    asked = []
    whole = torch_search.in_float64
    monkeypatch.setattr(torch_search, "in_float64", lambda g, p, k: asked.append(len(p)) or whole(g, p, k))
    gallery = vectors(900)
    gallery[200:500] = normalize(gallery[7] + 1e-7 * vectors(300, seed=3))
    probes = gallery[[7, 300, 499, *range(600, 630)]]
    assert_same(nearest(gallery, probes, 1), oracle(gallery, probes, 1))
    assert asked == ([3] if tried else [33])


def test_few_rows_are_left_to_float64(monkeypatch):
    """What is compared in float64 is little more than what is asked for."""
    pairs = []
    inner = near.similarities
    monkeypatch.setattr(near, "similarities", lambda g, p, *rest: pairs.append(len(p)) or inner(g, p, *rest))
    monkeypatch.setattr(torch_search, "products", lambda *_: [F32])
    nearest(vectors(20_000, 128), vectors(100, 128, seed=1), 5)
    assert 500 <= sum(pairs) < 520


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [3, 128, 513, 2000])
def test_no_product_is_further_off_than_its_bound(dtype, size):
    gallery, probes = vectors(700, size), vectors(300, size, seed=1)
    gallery[:300] = normalize(probes + 0.1 * vectors(300, size, seed=2) / size**0.5)
    mine, theirs = rounded(probes, dtype), rounded(gallery, dtype)
    found = (mine.rows @ theirs.rows.T).double()
    relative = torch.finfo(dtype).eps / 2 if dtype == BF16 else 0.0
    off = (found - probes.double() @ gallery.double().T).abs() - found.abs() * relative / (1 - relative)
    assert (off <= bound(mine, theirs)[:, None]).all()
    if dtype == BF16:
        assert off.max() > 1e-5, "a bound that is needed"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_memory_map_is_read_in_parts(dtype, tmp_path, monkeypatch):
    gallery, probes = vectors(1003), vectors(45, seed=1)
    np.save(tmp_path / "gallery.npy", gallery.numpy().astype(dtype))
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    read = []
    inner = similarity.read
    monkeypatch.setattr(similarity, "read", lambda rows, *rest: read.append(len(rows)) or inner(rows, *rest))
    expected = oracle(torch.from_numpy(np.array(mapped)).float(), probes, 6)
    assert_same(nearest(mapped, probes, 6), expected)
    assert read == [352, 352, 299]


def test_rows_of_other_lengths_keep_their_order():
    """Not unit vectors: the bound grows with them."""
    gallery, probes = 40 * vectors(3000) * torch.rand(3000, 1), 30 * vectors(50, seed=1)
    assert_same(nearest(gallery, probes, 4), oracle(gallery, probes, 4))


@pytest.mark.usefixtures("small", "tried")
def test_embeddings_made_for_inference_are_searched_in_that_mode():
    with torch.inference_mode():
        gallery, probes = vectors(1003), vectors(45, seed=1)
        found = nearest(gallery, probes, 5)
    assert_same(found, oracle(gallery, probes, 5))
    assert_same(nearest(gallery, probes, 5), found)


def test_threads_are_given_back_and_do_not_matter():
    gallery, probes = vectors(3000), vectors(300, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = nearest(gallery, probes, 5)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        assert_same(nearest(gallery, probes, 5), found)
    finally:
        torch.set_num_threads(threads)


def test_no_probes_have_no_neighbours():
    similarities, positions = nearest(vectors(500), torch.empty(0, 32), 3)
    assert (similarities.shape, positions.shape) == ((0, 3), (0, 3))
    with pytest.raises(ValueError, match="not finite"):
        nearest(torch.full((500, 32), torch.nan), torch.empty(0, 32), 3)


def test_negative_zero_ties_with_zero():
    gallery = torch.tensor([[0.0, 1.0], [-0.0, -1.0], [-1.0, 0.0]])
    keys = in_float64(gallery, torch.tensor([[1.0, -0.0]]), 3)
    assert similarity.neighbours_of(keys)[1].tolist() == [[0, 1, 2]]


def test_bf16_is_tried_where_it_pays():
    rounding = [BF16, F32] if cpu_has_bf16() else [F32]
    assert torch_search.products(100_000, 10_000, 5) == rounding
    assert torch_search.products(1000, 1000, 5) == [F32]
    assert torch_search.products(1000, 1000, 250) == []
    assert torch_search.products(100_000, 10_000, 5, "cuda") == [F32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_products_on_a_gpu():
    gallery, probes = vectors(20_000, 128), vectors(300, 128, seed=1)
    assert_same(nearest(gallery, probes, 5, "cuda"), nearest(gallery, probes, 5))
