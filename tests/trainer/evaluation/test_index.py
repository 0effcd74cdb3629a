"""Search by each engine against a slow oracle; what is refused; without faiss."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.trainer.evaluation.search.search_oracle import assert_same, oracle, vectors
from trainer.evaluation import index
from trainer.evaluation.index import SLACK, engine_line, engine_of, gpu_count, search

ENGINES = pytest.mark.parametrize("engine", ["torch", "faiss"])


@ENGINES
@pytest.mark.parametrize(("m", "k"), [(500, 1), (500, 7), (500, 500), (5, 5), (1, 1), (SLACK + 3, 3)])
def test_agrees_with_a_plain_oracle(m, k, engine):
    gallery, probes = vectors(m), vectors(40, seed=1)
    found = search(gallery, probes, k, engine=engine)
    assert_same(found, oracle(gallery, probes, k))
    assert (found[0].dtype, found[1].dtype) == (torch.float32, torch.int64)


@ENGINES
def test_ties_go_to_the_lowest_position(engine):
    gallery = vectors(3000)
    copies = [2999, 7, 1500, 42]
    gallery[copies] = gallery[100].clone()
    _, positions = search(gallery, gallery[[100, 7]], k=3, engine=engine)
    assert positions.tolist() == [[7, 42, 100], [7, 42, 100]]  # the cut falls among the five


@ENGINES
def test_collapsed_embeddings_still_give_the_lowest_positions(engine):
    gallery = vectors(1).repeat(200, 1)
    similarities, positions = search(gallery, gallery[:5], k=4, engine=engine)
    assert positions.tolist() == [[0, 1, 2, 3]] * 5
    assert torch.allclose(similarities, torch.ones(5, 4))


@ENGINES
def test_near_ties_beyond_the_slack_are_found(engine):
    """More rows than the slack differ by less than float32 can order; the best is the last of them."""
    gallery = torch.zeros(SLACK + 60, 4)
    gallery[:, 0] = 1
    gallery[:, 1] = torch.linspace(3e-4, 0, len(gallery))  # cosine to (1, 0, 0, 0) before scaling: 1 for all
    gallery = normalize(gallery.double(), dim=1).float()
    probe = torch.tensor([[1.0, -1e-3, 0.0, 0.0]])
    assert torch.equal(search(gallery, probe, k=2, engine=engine)[1], oracle(gallery, probe, 2)[1])


@ENGINES
def test_probe_order_and_company_do_not_matter(engine):
    gallery, probes = vectors(400), vectors(64, seed=2)
    gallery[200:300] = gallery[:100]
    together = search(gallery, probes, 6, engine=engine)
    alone = [search(gallery, probe[None], 6, engine=engine) for probe in probes]
    assert torch.equal(together[1], torch.cat([positions for _, positions in alone]))
    assert torch.equal(together[0], torch.cat([similarities for similarities, _ in alone]))


@ENGINES
@pytest.mark.parametrize(
    ("gallery", "probes", "k", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 5), 1, "same d"),
        (torch.ones(3, 4), torch.ones(4), 1, "same d"),
        (torch.ones(3, 4), torch.ones(2, 4), 4, "4 neighbours asked of a gallery of 3"),
        (torch.ones(3, 4), torch.ones(2, 4), 0, "0 neighbours"),
        (torch.full((3, 4), torch.nan), torch.ones(2, 4), 1, "not finite"),
        (torch.ones(3, 4), torch.tensor([[1, 1, 1, torch.inf]]), 1, "not finite"),
        (np.full((3, 4), np.nan, np.float16), torch.ones(2, 4), 1, "not finite"),
    ],
)
def test_refuses_what_has_no_neighbours(gallery, probes, k, message, engine):
    with pytest.raises(ValueError, match=message):
        search(gallery, probes, k, engine=engine)


def test_an_engine_that_does_not_exist():
    with pytest.raises(ValueError, match="engine is 'annoy'; allowed are 'auto', 'faiss' and 'torch'"):
        search(torch.eye(3), torch.eye(3), 1, engine="annoy")


def test_which_engine_searches(monkeypatch):
    """GPUs that are there: faiss for what lies in memory and not too many neighbours."""
    gallery = torch.eye(4)
    assert engine_of(gallery, 5) == "torch"
    monkeypatch.setattr(index, "gpu_count", lambda: 8)
    assert engine_of(gallery, 5) == "torch"
    assert engine_of(gallery, 5, "cuda:all") == "faiss"
    assert engine_of(gallery, 5000, "cuda") == "torch"
    assert engine_of(gallery.numpy(), 5, "cuda") == "torch"
    assert engine_line(gallery, 5, "cuda:all") == "exact search: faiss on 8 GPUs, decided in float64"
    monkeypatch.setattr(index, "gpu_count", lambda: 0)
    assert engine_of(gallery, 5, "cuda") == "torch"


def test_the_engine_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr(index.torch_search, "cpu_has_bf16", lambda: False)
    gallery = torch.empty(1000, 4)
    assert engine_line(gallery, 5) == "exact search: matrix products (float32) on cpu, decided in float64"
    assert engine_line(gallery, 900) == "exact search: matrix products (float64) on cpu, decided in float64"


WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None
import torch
from tests.trainer.evaluation.search.search_oracle import assert_same, oracle, vectors
from trainer.evaluation.search.approximate import ApproximateConfig, search_approximately
from trainer.evaluation.index import engine_line, gpu_count, search
gallery, probes = vectors(3000), vectors(50, seed=1)
gallery[2000:2100] = gallery[:100]
assert_same(search(gallery, probes, 7), oracle(gallery, probes, 7))
for refused, given in ((search, {"engine": "faiss"}), (search_approximately, {"config": ApproximateConfig()})):
    try:
        refused(gallery, probes, 7, **given)
    except ValueError as reason:
        print(reason)
print(gpu_count(), engine_line(gallery, 7))
"""


def test_without_faiss_the_same_neighbours_are_found():
    done = subprocess.run([sys.executable, "-c", WITHOUT_FAISS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "engine is 'faiss', which is not installed here; 'torch' gives the same neighbours"
    assert said[1] == "ivf search needs faiss, which is not installed; exact search works without it"
    assert said[2].startswith("0 exact search: matrix products (")
    assert said[2].endswith("on cpu, decided in float64; faiss is not installed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:all"])
@pytest.mark.parametrize("k", [1, 50, 2500])
def test_gpu_gives_the_same_neighbours(k, device):
    gallery, probes = vectors(5000, d=128), vectors(300, d=128, seed=1)
    gallery[4000:4100] = gallery[:100]
    assert gpu_count()
    assert_same(search(gallery, probes, k, device), search(gallery, probes, k))
