import numpy as np
import pytest

from tests.trainer.evaluation.report.fake_runs import people
from trainer.evaluation.report.projections import PROJECTIONS, projection_plot, tsne, umap
from trainer.evaluation.report.records import read_records


@pytest.mark.parametrize("project", [tsne, umap])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_identities_stay_together_and_the_layout_is_the_same_again(project, dimensions):
    embeddings, identities = people(6, 12, 0.4, seed=0)
    found = project(embeddings.numpy(), dimensions)
    assert found.shape == (72, dimensions)
    distances = np.linalg.norm(found[:, None] - found[None], axis=2) + np.diag(np.full(72, np.inf))
    nearest = identities.numpy()[distances.argmin(axis=1)]
    assert (nearest == identities.numpy()).mean() > 0.95, (nearest == identities.numpy()).mean()
    np.testing.assert_array_equal(project(embeddings.numpy(), dimensions), found)


@pytest.mark.parametrize("project", [tsne, umap])
def test_few_points_and_equal_ones_are_laid_out_without_a_warning(project):
    assert np.isfinite(project(people(3, 2, 1.0, seed=0)[0].numpy(), 2)).all()
    assert np.isfinite(project(np.ones((8, 4), np.float32), 2)).all()


def test_a_plot_has_a_cloud_for_each_identity_with_pictures_and_keys(pictured, plain, monkeypatch):
    monkeypatch.setitem(PROJECTIONS, "tsne", ("t-SNE", lambda points, _: points[:, :2], 2))
    plot = projection_plot(read_records([pictured, plain]), "tsne")
    first, second = plot.panels
    assert len(first.lines) == len(second.lines) == 20
    assert all(all(line.pictures) and len(line.notes) == len(line.x) == 8 for line in first.lines)
    assert not any(any(line.pictures) for line in second.lines)
    assert len({(line.style.colour, line.style.marker) for line in first.lines}) == 20
    assert "160 images of 20 identities of unseen identities" in plot.caption
