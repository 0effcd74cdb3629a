"""Class centres: where they start, who owns them, which take part, and what leaves them alone."""

import numpy as np
import pytest
import torch

from trainer.centres import Centres, initial, slice_of
from trainer.config import ModelConfig, SoftmaxConfig
from trainer.model import Embedder

LABELS = np.arange(0, 40, 2)


def centres_of(**settings: object) -> Centres:
    return Centres(SoftmaxConfig(**({"kind": "arcface"} | settings)), LABELS, 4, seed=3)


def a_step(centres: Centres, step: int = 1, norms: torch.Tensor | None = None, **changed: torch.Tensor):
    embeddings = torch.nn.functional.normalize(torch.randn(4, 4, generator=torch.Generator().manual_seed(step)))
    embeddings = changed.get("embeddings", embeddings)
    return centres.loss(embeddings, torch.tensor([0, 0, 6, 6]), norms, step)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20, 23])
def test_each_centre_has_one_owner(world_size):
    slices = [slice_of(20, rank, world_size) for rank in range(world_size)]
    assert [place for first, stop in slices for place in range(first, stop)] == list(range(20))
    assert max(stop - first for first, stop in slices) - min(stop - first for first, stop in slices) <= 1


def test_a_centre_starts_where_seed_and_identity_say():
    every = initial(np.arange(2000), 31, seed=3)
    assert np.array_equal(every[[5, 900]], initial(np.array([5, 900]), 31, seed=3))
    assert not np.isclose(every[5], initial(np.array([5]), 31, seed=4), atol=0).any()
    assert np.square(every).mean() == pytest.approx(0.01**2, rel=0.02)
    assert np.abs(every.mean(0)).max() < 5 * 0.01 / np.sqrt(2000)
    correlations = np.corrcoef(every.T) - np.eye(31)
    assert np.abs(correlations).max() < 5 / np.sqrt(2000)


def test_a_centre_that_takes_no_part_stays_with_its_momentum():
    centres = centres_of(sample_rate=0.2)
    a_step(centres, 1)
    centres.update(torch.tensor(0.0))
    values, momentum = centres.values.clone(), centres.momentum.clone()
    sampled = int(a_step(centres, 2).sampled)
    centres.update(torch.tensor(0.0))
    moved = (centres.values != values).any(1)
    assert moved[[0, 3]].all(), "the batch's own"
    assert 2 < int(moved.sum()) == sampled < 20
    assert torch.equal(centres.momentum[~moved], momentum[~moved])
    assert (momentum[~moved] != 0).any(), "one that took part before and not now"


def test_which_take_part_changes_from_step_to_step_and_is_as_many_as_asked_for():
    counts = [int(a_step(centres_of(sample_rate=0.5), step).sampled) for step in range(1, 101)]
    assert np.mean(counts) == pytest.approx(2 + 18 * 0.5, abs=0.6)
    assert len(set(counts)) > 3


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_an_update_that_is_left_out_changes_nothing(rate):
    centres = centres_of(kind="adaface", sample_rate=rate)
    a_step(centres, 1, torch.arange(1.0, 5.0))
    centres.update(torch.tensor(0.0))
    before = {name: value.clone() for name, value in centres.state().items()}
    assert before["norms"].tolist() == pytest.approx([2.5, np.std([1, 2, 3, 4], ddof=1)])
    bad = a_step(centres, 2, torch.tensor([1.0, torch.nan, 1.0, 1.0]), embeddings=torch.full((4, 4), torch.nan))
    assert not bad.finite
    centres.update(torch.tensor(1.0))
    assert all(torch.equal(value, before[name]) for name, value in centres.state().items())


def test_the_first_update_left_out_leaves_no_norms_behind():
    centres = centres_of(kind="adaface")
    a_step(centres, 1, torch.full((4,), torch.nan), embeddings=torch.full((4, 4), torch.nan))
    centres.update(torch.tensor(1.0))
    a_step(centres, 2, torch.arange(1.0, 5.0))
    centres.update(torch.tensor(0.0))
    assert float(centres.norms.mean) == 2.5


def test_the_network_gives_norms_in_training_alone():
    torch.manual_seed(0)
    model = Embedder(
        ModelConfig(trunk="resnet18", embedding_size=6, head_batchnorm=False), image_size=32, with_norms=True
    )
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = model(images)
    assert found.shape == (3, 7)
    torch.testing.assert_close(found[:, :6].norm(dim=1), torch.ones(3))
    assert (found[:, 6] > 0).all()
    assert not torch.isclose(found[:, 6], torch.ones(3), atol=1e-3).any()
    found[:, 6].sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    assert model.eval()(images).shape == (3, 6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"margin": 2.0}, r"softmax.margin is 2.0; allowed is \[0, 1.5\], or None"),
        ({"sample_rate": 0.0}, "softmax.sample_rate is 0.0; allowed is above 0 and at most 1"),
        ({"scale": -1.0}, "softmax.scale is -1.0; it must be above 0 and finite"),
        ({"weight": 0.0}, "softmax.weight is 0 .* nothing would be trained"),
        ({"weight": 0.0, "warmup_steps": 5, "triplet_weight": 0.0}, "nothing would be trained"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        SoftmaxConfig(kind="arcface", **settings)


def test_weights_of_triplets_and_softmax():
    config = SoftmaxConfig(kind="arcface", weight=0.1, triplet_weight=2, warmup_steps=3)
    assert [config.weights(step) for step in (1, 3, 4)] == [(0.0, 1.0), (0.0, 1.0), (2, 0.1)]
    assert SoftmaxConfig(weight=0.5, warmup_steps=3).weights(1) == (1.0, 0.0), "there is none"
