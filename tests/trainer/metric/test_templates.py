"""Averages of templates by hand and by loops."""

import numpy as np
import pytest
import torch

from trainer.metric.templates import template_means


def test_the_example_of_the_docstring():
    made = template_means(torch.tensor([(1.0, 0), (0, 1), (1, 0)]), torch.zeros(3).long(), torch.tensor([7, 7, 9]))
    assert made.tolist() == [pytest.approx([1.5 / 2.5**0.5, 0.5 / 2.5**0.5])]


def test_a_video_counts_as_much_as_a_still_and_media_are_told_apart_within_a_template():
    images = torch.tensor([(1.0, 0)] + [(0, 1.0)] * 99 + [(0, 1.0)])
    made = template_means(images, torch.tensor([0] * 100 + [1]), torch.tensor([1] + [2] * 99 + [2]))
    assert made.tolist() == [pytest.approx([0.5**0.5, 0.5**0.5]), [0, 1]]


def test_weights():
    images, media = torch.tensor([(1.0, 0), (0, 1.0)]), torch.tensor([1, 2])
    made = template_means(images, torch.tensor([0, 0]), media, torch.tensor([0.3, 0.4]))
    assert made.tolist() == [pytest.approx([0.6, 0.8])]


@pytest.mark.parametrize("weighted", [False, True])
def test_against_loops(weighted):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(200, 5))
    templates = np.concatenate([np.arange(20), rng.integers(0, 20, 180)])
    media, weights = rng.integers(0, 4, 200), rng.uniform(0.2, 1, 200)
    expected = []
    for template in range(20):
        total = np.zeros(5)
        for medium in np.unique(media[templates == template]):
            rows = np.flatnonzero((templates == template) & (media == medium))
            total += np.mean([images[row] * (weights[row] if weighted else 1) for row in rows], axis=0)
        expected.append(total / np.linalg.norm(total))
    given = (torch.from_numpy(values) for values in (images, templates, media))
    made = template_means(*given, torch.from_numpy(weights) if weighted else None)
    assert made.dtype == torch.float32
    assert np.allclose(made.numpy(), expected, atol=1e-7)


def test_images_that_cancel_out_give_no_number_that_is_none():
    made = template_means(torch.tensor([(1.0, 0), (-1, 0)]), torch.zeros(2).long(), torch.zeros(2).long())
    assert made.tolist() == [[0, 0]]
