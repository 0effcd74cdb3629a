"""Predictions beside published figures, within the errors that were found."""

import pytest

from trainer.planner.hardware import GPUS
from trainer.planner.published import check
from trainer.planner.rates import FITTED
from trainer.planner.report import published

CHECKED = check()
FOUND = {
    ("ResNet-50, 8 x A100", 16_621): 0.186,
    ("ResNet-50, 8 x A100, TF32", 7248): 0.034,
    ("ResNet-50, V100, fp16", 1200): -0.175,
    ("ResNet-50, 8 x V100, fp16", 8322): -0.050,
    ("ResNet-50, V100, fp32", 367): -0.114,
    ("ResNet-50, 8 x P100, fp32", 1734): 0.008,
    ("ResNet-50, 8 x H100", 56_056): 0.033,
    ("IResNet-50 112 px, 8 x V100, fp16", 5004): 0.007,
    ("IResNet-50 112 px, 8 x V100, fp16", 4385): 0.149,
    ("IResNet-100 112 px, 8 x V100, fp16", 3247): -0.187,
}
"""Predicted / published - 1, as launch/README.md tells it."""


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: f"{row.point.name} {row.point.images_per_s}")
def test_the_error_is_what_was_found(row):
    """What is fitted comes out exactly, and nothing else is called fitted."""
    if row.fitted:
        assert row.error == pytest.approx(0, abs=2e-3)
        assert row.cautious_error == pytest.approx(0, abs=2e-3)
    else:
        assert row.error == pytest.approx(FOUND[(row.point.name, row.point.images_per_s)], abs=0.01)
        assert row.cautious <= row.predicted * (1 + 1e-9)


def test_one_point_a_family_is_fitted():
    fitted = [row.point for row in CHECKED if row.fitted]
    assert sorted(GPUS[point.gpu].family(point.precision) for point in fitted) == sorted(FITTED)
    assert all(point.gpus == 1 for point in fitted)
    assert all(point.source.startswith("https://") for point in (row.point for row in CHECKED))


def test_the_table_has_every_error():
    said = published(CHECKED)
    assert all(f"{row.error:+7.1%}" in said and row.point.source in said for row in CHECKED)
    assert said.count("| fitted") == 3
    assert "second hand" in said
