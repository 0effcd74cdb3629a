"""Average precision and R-precision, by hand and against scikit-learn."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from trainer.metric.retrieval import retrieval


def test_by_hand():
    found = retrieval(torch.tensor([[1, 2, 1, 3], [2, 2, 1, 1], [3, 1, 2, 4]]), torch.tensor([1, 1, 9]))
    assert found.average_precision[:2].tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2])
    assert found.r_precision[:2].tolist() == [0.5, 0]
    assert found.average_precision_at_r[:2].tolist() == [0.5, 0]
    assert all(value[2].isnan() for value in found), "nothing of identity 9 is there"


def test_average_precision_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 80, generator=generator)
    identities, queries = torch.randint(6, (80,), generator=generator), torch.randint(6, (50,), generator=generator)
    ranked = identities[scores.argsort(dim=1, descending=True)]
    found = retrieval(ranked, queries)
    expected = [average_precision_score(identities == query, row) for query, row in zip(queries, scores, strict=True)]
    assert found.average_precision.tolist() == pytest.approx(expected)


def test_against_plain_loops():
    generator = torch.Generator().manual_seed(1)
    ranked, queries = torch.randint(4, (30, 25), generator=generator), torch.randint(4, (30,), generator=generator)
    found = retrieval(ranked, queries)
    for row, query in enumerate(queries.tolist()):
        relevant = ranked[row].tolist().count(query)
        first = [int(identity) == query for identity in ranked[row][:relevant]]
        at_r = sum(sum(first[: place + 1]) / (place + 1) for place, hit in enumerate(first) if hit) / relevant
        assert found.r_precision[row] == pytest.approx(sum(first) / relevant)
        assert found.average_precision_at_r[row] == pytest.approx(at_r)
