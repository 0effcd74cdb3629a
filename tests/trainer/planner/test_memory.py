"""Memory of a rank, each part by hand."""

from dataclasses import replace

import pytest

from tests.trainer.planner.settings import COST, GPU, cluster
from trainer.planner.memory import memory_bytes
from trainer.planner.workload import Workload

JOB = Workload(image_size=100, embedding_size=128, picture_width=100, picture_height=200)


def test_parts():
    """One million parameters with AdamW: 16 bytes each; 1 MB of activations an image; 100 of 800 images on this rank."""
    found = memory_bytes(cluster(), JOB, COST, images=100, world_size=8)
    assert found["weights, gradients, optimiser"] == 16e6
    assert found["weights in bf16"] == 2e6
    assert found["activations"] == 100e6
    assert found["holes"] == pytest.approx(10e6)
    assert found["batches"] == 100 * (3 * 30_000 + 60_000) + 100 * 120_000
    assert found["gathered embeddings"] == 800 * (2 * (512 + 8) + 512)
    assert found["mining blocks"] == 4 * 12 * 100 * 800
    assert found["CUDA, NCCL, cuDNN"] == 2**30


def test_mining_never_holds_more_than_its_block():
    """benchmarks/README.md, "A rank of 1,024": 128 MiB with the gathered gradient's 32 MiB, 64 anchors, 65,536 candidates."""
    found = memory_bytes(cluster(), JOB, COST, images=64, world_size=1024)
    assert found["mining blocks"] + 4 * 128 * 65_536 == pytest.approx(128 * 2**20, rel=0.01)


def test_parts_of_the_batch_keep_activations_flat():
    one, four = (
        memory_bytes(cluster(), Workload(micro_batch=25), COST, images=images, world_size=1) for images in (25, 100)
    )
    assert one["activations"] == four["activations"] == 25e6


def test_sgd_and_one_rank_and_a_cpu():
    found = memory_bytes(cluster(gpu=replace(GPU, name="cpu")), Workload(optimizer="sgd"), COST, images=4, world_size=1)
    assert found["weights, gradients, optimiser"] == 12e6
    assert found["gathered embeddings"] == 0
    assert "CUDA, NCCL, cuDNN" not in found
