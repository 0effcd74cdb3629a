"""The counted network against figures that are known from elsewhere."""

import pytest

from trainer.planner.network import measure


def test_resnet50_has_its_published_size():
    """torchvision: 25,557,032 parameters and 4.09 GFLOPS (multiply-adds) for ResNet50_Weights."""
    cost = measure("resnet50", 224, 1000, bf16=True)
    assert cost.parameters == 25_557_032
    assert cost.forward_flops == pytest.approx(2 * 4.09e9, rel=2e-3)
    colours, first = (
        2 * 9 * 224**2,
        2 * 7 * 7 * 3 * 64 * 112**2,
    )  # neither recolouring nor the first convolution has one by its input
    assert cost.backward_flops == pytest.approx(2 * (cost.forward_flops - colours) - first, rel=1e-9)


@pytest.mark.parametrize(("trunk", "macs"), [("resnet18", 1.81e9), ("resnet34", 3.66e9), ("resnet101", 7.80e9)])
def test_other_trunks_too(trunk, macs):
    assert measure(trunk, 224, 1000, bf16=False).forward_flops == pytest.approx(2 * macs, rel=5e-3)


def test_activations_grow_with_the_area_and_shrink_with_bf16():
    large, small = (measure("resnet18", size, 64, bf16=True) for size in (128, 64))
    assert large.saved_bytes == pytest.approx(4 * small.saved_bytes, rel=0.02)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.01)
    full = measure("resnet18", 64, 64, bf16=False)
    assert 1.5 < full.saved_bytes / small.saved_bytes < 2.1
    matrices = 11_176_512 - 9_600 + 512 * 64  # of the trunk without its batch norms, and the head
    assert small.saved_once_bytes == pytest.approx(2 * matrices, rel=0.01)


def test_activations_of_resnet50_are_those_that_were_measured():
    """benchmarks/README.md: 1,045 MiB with 64 and 1,830 MiB with 128 images of 112 px in bf16."""
    measured = (1830 - 1045) / 64 * 2**20
    assert measure("resnet50", 112, 128, bf16=True).saved_bytes == pytest.approx(measured, rel=0.2)


def test_iresnets_have_their_published_size():
    """InsightFace's model zoo: 6.33 (r50) and 12.12 (r100) x 10^9 multiply-adds, 43.6 and 65.2 million parameters."""
    for trunk, macs, parameters in (("iresnet50", 6.33e9, 43.6e6), ("iresnet100", 12.12e9, 65.2e6)):
        cost = measure(trunk, 112, 512, bf16=True)
        assert cost.forward_flops == pytest.approx(2 * macs, rel=0.01)
        assert cost.backward_flops == pytest.approx(2 * cost.forward_flops, rel=0.01)
        assert cost.parameters == pytest.approx(parameters, rel=0.01)


def test_timms_trunks_count_too():
    """torch's counter takes the backward of a depthwise convolution for one of all channels: some tens of times too much."""
    for trunk in ("timm:test_vit", "timm:test_efficientnet"):
        cost = measure(trunk, 64, 32, bf16=True)
        assert cost.backward_flops == pytest.approx(2 * cost.forward_flops, rel=0.1)
        assert cost.saved_bytes > 0
