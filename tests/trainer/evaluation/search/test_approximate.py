"""Approximate indexes: their recall is counted right, their similarities are exact, and settings that do not fit are refused."""

import pytest
import torch

from tests.trainer.evaluation.search.search_oracle import oracle, vectors
from trainer.evaluation import index
from trainer.evaluation.search.approximate import ApproximateConfig, search_approximately


def recall_of(positions, gallery, probes, k):
    expected = oracle(gallery, probes, k)[1].tolist()
    found = [len(set(mine) & set(theirs)) for mine, theirs in zip(positions.tolist(), expected, strict=True)]
    return sum(found) / (k * len(probes))


@pytest.mark.parametrize(
    ("config", "least", "most"),
    [
        (ApproximateConfig(cells=40, probed=40), 1.0, 1.0),  # all cells: exact
        (ApproximateConfig(cells=40, probed=4), 0.2, 0.9),
        (ApproximateConfig(method="ivfpq", cells=4, probed=4, code_bytes=2, candidates=40), 0.2, 1.0),
        (ApproximateConfig(method="hnsw", effort=64), 0.9, 1.0),
    ],
)
def test_neighbours_come_with_their_recall(config, least, most):
    gallery, probes = vectors(3000), vectors(60, seed=1)
    found = search_approximately(gallery, probes, 5, config)
    assert found.sampled == 60
    assert found.recall == pytest.approx(recall_of(found.positions, gallery, probes, 5))
    assert least <= found.recall <= most
    assert torch.equal(found.similarities, found.similarities.sort(descending=True).values)
    expected = (gallery[found.positions].double() * probes[:, None].double()).sum(2).float()
    assert torch.equal(found.similarities, expected)


def test_the_recall_is_of_a_sample_of_the_probes():
    gallery, probes = vectors(2000), vectors(60, seed=1)
    found = search_approximately(gallery, probes, 3, ApproximateConfig(cells=20, probed=2, sample=20))
    sample = slice(None, None, 3)
    assert found.sampled == 20
    assert found.recall == pytest.approx(recall_of(found.positions[sample], gallery, probes[sample], 3))


def test_fewer_found_than_asked_for_is_shown():
    """One cell of a gallery in two far corners holds half of it."""
    gallery = torch.eye(2).repeat_interleave(50, 0)
    found = search_approximately(gallery, torch.eye(2), 60, ApproximateConfig(cells=2, probed=1))
    assert ((found.positions >= 0).sum(1) == 50).all()
    assert (found.similarities[:, 50:] == float("-inf")).all()
    assert found.recall == pytest.approx(50 / 60)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"method": "lsh"}, "method is 'lsh'; allowed are ivf, hnsw, ivfpq"),
        ({"sample": 0}, "sample is 0; it must be at least 1"),
        ({"method": "ivfpq", "code_bytes": 5}, "code_bytes is 5; it must divide the vectors' 32 dimensions"),
        ({"cells": 500}, "faiss refuses an index IVF500,Flat of 300 rows"),
    ],
)
def test_settings_that_do_not_fit(setting, said):
    with pytest.raises(ValueError, match=said):
        search_approximately(vectors(300), vectors(5), 3, ApproximateConfig(**setting))


def test_without_probes_there_is_no_recall_and_no_result():
    with pytest.raises(ValueError, match="not given without its recall"):
        search_approximately(vectors(300), torch.empty(0, 32), 3, ApproximateConfig())


@pytest.mark.parametrize(("rows", "cells"), [(100_000, 1264), (1_000_000, 4000), (39 * 7, 7), (5, 1)])
def test_cells_follow_the_gallery(rows, cells):
    assert ApproximateConfig().factory(rows) == f"IVF{cells},Flat"


@pytest.mark.gpu
@pytest.mark.skipif(not index.gpu_count(), reason="needs an NVIDIA GPU")
def test_an_index_on_a_gpu():
    found = search_approximately(vectors(3000), vectors(60, seed=1), 5, ApproximateConfig(cells=40, probed=40), "cuda")
    assert found.recall == 1
