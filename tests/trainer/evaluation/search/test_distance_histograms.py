"""Histograms of distances against numpy's on all pairs, one by one; on one to three processes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.distributed.processes import in_processes
from tests.trainer.evaluation.search.test_all_pairs import faces, stored
from trainer.evaluation.search import distance_histograms as histograms
from trainer.evaluation.search import pair_blocks
from trainer.evaluation.search.distance_histograms import distance_histograms
from trainer.evaluation.search.pair_blocks import sorted_by_identity

SMALL = {"ROWS": 37, "COLUMNS": 101, "PAIRS": 64}


def by_numpy(embeddings: Tensor, labels: Tensor) -> list[list[int]]:
    edges = np.linspace(0, 2, 101)
    distances = [np.sqrt(np.clip(2 - 2 * side.double().numpy(), 0, 4)) for side in stored(embeddings, labels)]
    return [np.histogram(side, edges)[0].tolist() for side in distances]


def assert_as_numpy(found: tuple[Tensor, Tensor, Tensor], embeddings: Tensor, labels: Tensor) -> None:
    edges, genuine, impostor = found
    assert torch.allclose(edges, torch.arange(101).double() / 50)
    assert [genuine.tolist(), impostor.tolist()] == by_numpy(embeddings, labels)


@pytest.mark.parametrize("step", [0.0, 0.8], ids=["all different", "many ties"])
def test_counts_are_those_of_numpy(step, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(pair_blocks, name, value)
    embeddings, labels = faces(step=step)
    found = distance_histograms(sorted_by_identity(embeddings, labels))
    assert_as_numpy(found, embeddings, labels)
    assert int(found[1].sum() + found[2].sum()) == 700 * 699 // 2


def on_edges() -> tuple[Tensor, Tensor]:
    """Vectors whose distances to the first are the edges, as nearly as float32 can have them, and the last opposite to it."""
    distances = torch.arange(101).double() / 50
    cosines = 1 - distances**2 / 2
    rows = torch.stack([cosines, (1 - cosines**2).clamp(min=0).sqrt()], 1).float()
    return rows.repeat(3, 1), torch.arange(303) % 7


def test_pairs_on_an_edge_are_decided_in_float64(monkeypatch):
    embeddings, labels = on_edges()
    decided = []
    inner = histograms.counted
    monkeypatch.setattr(histograms, "counted", lambda values: decided.append(len(values)) or inner(values))
    assert_as_numpy(distance_histograms(sorted_by_identity(embeddings, labels)), embeddings, labels)
    assert sum(decided) > 300


def test_collapsed_embeddings_need_no_float64(monkeypatch):
    """Distance 0 parts no bins."""
    decided = []
    inner = histograms.counted
    monkeypatch.setattr(histograms, "counted", lambda values: decided.append(len(values)) or inner(values))
    samples = sorted_by_identity(torch.eye(4)[:1].repeat(200, 1), torch.arange(200))
    assert distance_histograms(samples)[2].tolist() == [200 * 199 // 2] + [0] * 99
    assert not sum(decided)


def test_a_hand_computed_case():
    """Two identities: genuine pairs at distances 0 and 2, impostors at the root of 2."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    _, genuine, impostor = distance_histograms(sorted_by_identity(embeddings, torch.tensor([3, 3, 1, 1])))
    assert genuine.nonzero()[:, 0].tolist() == [0, 99]
    assert impostor.nonzero()[:, 0].tolist() == [70]
    assert impostor[70] == 4


def on_a_rank() -> Any:
    for name, value in SMALL.items():
        setattr(pair_blocks, name, value)
    return distance_histograms(sorted_by_identity(*faces()))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_has_the_same_counts(ranks):
    for found in in_processes(ranks, on_a_rank):
        assert_as_numpy(found, *faces())
