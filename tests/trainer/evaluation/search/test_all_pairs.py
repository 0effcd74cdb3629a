"""Operating points over all pairs against the definition on stored scores, on one to three processes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.distributed.processes import in_processes
from trainer.evaluation.search import all_pairs, pair_blocks
from trainer.evaluation.search.all_pairs import Refused, operating_points_of_all_pairs, sorted_by_identity
from trainer.metric.verification import OperatingPoint, tar_at_far

FARS = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)
SMALL = {"DRAWN": 4000, "MOST_ABOVE": 50}
"""So that a set of 700 goes the way that one of millions goes."""
BLOCKS = {"ROWS": 37, "COLUMNS": 101, "PAIRS": 64}


def small(put: Callable[..., None], **others: int) -> None:
    for name, value in (SMALL | others).items():
        put(all_pairs, name, value)
    for name, value in BLOCKS.items():
        put(pair_blocks, name, value)


def faces(count: int = 700, identities: int = 60, seed: int = 0, step: float = 0.0) -> tuple[Tensor, Tensor]:
    """Embeddings around their identities' centres, in no order; with `step`, coarse ones among which many pairs tie."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (count,), generator=generator)
    centres = torch.randn(identities, 16, generator=generator)
    points = centres[labels] + 1.2 * torch.randn(count, 16, generator=generator)
    if step:
        points = (points / step).round() * step + 1e-3
    return normalize(points), labels


def stored(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities of all genuine and of all impostor pairs, one by one, as `evaluation.index` defines them."""
    genuine, impostor = [], []
    for row in range(len(labels)):
        products = (embeddings[row].double() * embeddings[row + 1 :].double()).sum(1).float()
        same = labels[row + 1 :] == labels[row]
        genuine.append(products[same])
        impostor.append(products[~same])
    return torch.cat(genuine), torch.cat(impostor)


def assert_as_defined(found: list[OperatingPoint | Refused], embeddings: Tensor, labels: Tensor) -> None:
    genuine, impostor = stored(embeddings, labels)
    for far, point in zip(FARS, found, strict=True):
        if isinstance(point, Refused):
            with pytest.raises(ValueError, match=re.escape(point.reason)):
                tar_at_far(genuine, impostor, far)
        else:
            assert point == tar_at_far(genuine, impostor, far)


@pytest.mark.parametrize("step", [0.0, 0.8], ids=["all different", "many ties"])
def test_it_is_the_definition(step, monkeypatch):
    embeddings, labels = faces(step=step)
    small(monkeypatch.setattr)
    found = operating_points_of_all_pairs(sorted_by_identity(embeddings, labels), FARS)
    assert_as_defined(found, embeddings, labels)
    assert isinstance(found[-1], Refused)
    assert 0.2 < found[3].tar < 0.99, "a point that means something"


def test_brackets_keep_few_pairs(monkeypatch):
    """Of 240,000 pairs those around the thresholds, not those above."""
    embeddings, labels = faces()
    kept = []
    inner = all_pairs._pass
    monkeypatch.setattr(all_pairs, "_pass", lambda *given: kept.append(inner(*given)) or kept[-1])
    small(monkeypatch.setattr, DRAWN=100_000)
    operating_points_of_all_pairs(sorted_by_identity(embeddings, labels), (0.1, 0.01))
    assert len(kept) == 1, "one pass"
    assert sum(len(part.scores) for part in kept[0]) < 6000
    assert kept[0][0].above > 10_000


def test_a_wrong_bracket_is_noticed_and_widened(monkeypatch):
    embeddings, labels = faces()
    passes = []
    inner = all_pairs._pass
    monkeypatch.setattr(all_pairs, "_pass", lambda *given: passes.append(1) or inner(*given))
    monkeypatch.setattr(all_pairs, "SURE", 0.01)
    small(monkeypatch.setattr)
    found = operating_points_of_all_pairs(sorted_by_identity(embeddings, labels), FARS)
    assert_as_defined(found, embeddings, labels)
    assert len(passes) > 1


@pytest.mark.parametrize("sure", [4.0, 0.01], ids=["right brackets", "wrong brackets"])
def test_brackets_that_hold_too_many_pairs_are_cut_down(sure, monkeypatch):
    """What would be kept of a set of 10^11 pairs is too much; the result is the same."""
    embeddings, labels = faces()
    kept, counted = [], []
    inner, above = all_pairs._pass, all_pairs._above
    monkeypatch.setattr(all_pairs, "_pass", lambda *given: kept.append(inner(*given)) or kept[-1])
    monkeypatch.setattr(all_pairs, "_above", lambda *given: counted.append(1) or above(*given))
    small(monkeypatch.setattr, MOST_EXPECTED=300, MOST_KEPT=10_000, MOST_ABOVE=5)
    monkeypatch.setattr(all_pairs, "SURE", sure)
    found = operating_points_of_all_pairs(sorted_by_identity(embeddings, labels), FARS[:3])
    for far, point in zip(FARS[:3], found, strict=True):
        assert point == tar_at_far(*stored(embeddings, labels), far)
    assert counted or sure < 1
    assert max(len(part.scores) for part in kept[-1]) < 1000


def test_where_all_pairs_fit_all_are_kept():
    embeddings, labels = faces(200, 20)
    found = operating_points_of_all_pairs(sorted_by_identity(embeddings, labels), FARS)
    assert_as_defined(found, embeddings, labels)


def on_a_rank() -> list[Any]:
    small(setattr)
    return operating_points_of_all_pairs(sorted_by_identity(*faces()), FARS)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_has_the_same_result(ranks):
    embeddings, labels = faces()
    for found in in_processes(ranks, on_a_rank):
        assert_as_defined(found, embeddings, labels)


def test_a_hand_computed_case():
    """Identities 0 and 1 on an axis each, 2 between: impostors at cosine 0 (4 pairs) and 0.6 and 0.8 (2 x 2 each)."""
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8]])
    samples = sorted_by_identity(embeddings, torch.tensor([5, 5, 7, 7, 6, 6]))
    assert (samples.genuine_pairs, samples.impostor_pairs) == (3, 12)
    (point,) = operating_points_of_all_pairs(samples, [0.9])  # 10 of 12 may pass; the 11th highest is 0
    assert point.threshold == 0
    assert point.far == 8 / 12, "the pairs at 0 tie with the threshold"
    assert point.tar == 1


def collapsed() -> str:
    small(setattr, MOST_KEPT=1000)
    one_point = normalize(torch.ones(700, 16) + 1e-7 * torch.arange(700)[:, None])
    try:
        operating_points_of_all_pairs(sorted_by_identity(one_point, torch.arange(700) % 60), [0.1])
    except ValueError as reason:
        return str(reason)
    return "it was computed"


def test_a_collapsed_network_is_said_by_all_ranks():
    for said in in_processes(2, collapsed):
        assert said.startswith("more than 1,000 impostor pairs lie within")
        assert said.endswith("the embeddings have collapsed")


@pytest.mark.parametrize(
    ("labels", "fars", "said"),
    [
        ([0, 1, 2], [0.1], "0 genuine and 3 impostor pairs; at least one of each is needed"),
        ([0, 0, 0], [0.1], "3 genuine and 0 impostor pairs; at least one of each is needed"),
        ([0, 0, 1], [1.5], "FAR is 1.5; it must lie between 0 and 1, both excluded"),
    ],
)
def test_what_has_no_answer_is_refused(labels, fars, said):
    with pytest.raises(ValueError, match=said):
        operating_points_of_all_pairs(sorted_by_identity(torch.eye(3), torch.tensor(labels)), fars)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="the embeddings hold a number that is not finite"):
        sorted_by_identity(torch.tensor([[1.0, torch.nan]]), torch.tensor([0]))
