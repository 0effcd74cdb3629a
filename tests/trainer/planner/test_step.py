"""A step of round numbers, stage by stage."""

from dataclasses import replace

import pytest

from tests.trainer.planner.settings import COST, GPU, RATES, STORAGE, cluster
from trainer.planner.loading import ENGINE_S, MEASURED, cpu_decode_s, loader_s
from trainer.planner.rates import FITTED, Rates, gpu_rates, mining_s, network_s, optimizer_s, utilisation
from trainer.planner.step import mining_and_loss_s, step_of
from trainer.planner.workload import Workload

JOB = Workload(image_size=100, embedding_size=126, picture_width=100, picture_height=200, picture_bytes=10_000)


def test_network_takes_the_slowest_of_arithmetic_memory_and_launches():
    """100 images of 3 GFLOP at 30 TFLOP/s: 10 ms, a third of it forward."""
    assert network_s(RATES, COST, 100) == (pytest.approx(10e-3 / 3), pytest.approx(20e-3 / 3))
    slow_memory = replace(RATES, traffic_bytes_per_s=1e10)  # 3 x 1 MB x 100 over 10 GB/s: 30 ms
    assert sum(network_s(slow_memory, COST, 100)) == pytest.approx(30e-3)
    assert sum(network_s(replace(slow_memory, overlaps=False), COST, 100)) == pytest.approx(40e-3)
    slow_launches = replace(RATES, launch_s=1e-3)  # 3 x 100 layers: 300 ms
    assert sum(network_s(slow_launches, COST, 100)) == pytest.approx(0.3)
    weights = replace(RATES, weight_bytes=24)  # 24 MB over 1 TB/s
    assert sum(network_s(weights, COST, 100)) == pytest.approx(10e-3 + 24e-6)


def test_optimizer_moves_its_state():
    assert optimizer_s(COST, 1e9, "adamw") == pytest.approx(32e-3)
    assert optimizer_s(COST, 1e9, "sgd") == pytest.approx(24e-3)


def test_mining_grows_beyond_what_is_in_the_floor():
    rates = replace(RATES, mining_s=1e-9, mining_floor_s=0.5, mining_base=1000)
    assert mining_and_loss_s(rates, 10, 10, 10) == 0.5
    assert mining_and_loss_s(rates, 10, 20, 10) == pytest.approx(0.5 + 1000e-9)


def test_mining_on_a_gpu():
    """Four products of 2 b N d FLOP at half of 10 TFLOP/s; 20 passes of 4 bytes a similarity, d = 128, at 0.85 of 1 TB/s."""
    assert mining_s(GPU) == pytest.approx(8 / 5e12 + 80 / 128 / 0.85e12)


def test_loader():
    """100 images a rank, 4 ranks a machine: 400 x 10 KB at 1 GB/s; 20,000 pixels on 2 engines; 1 MB over 10 GB/s."""
    found = loader_s(cluster(), JOB, RATES, 100, 4)
    assert found["read"] == pytest.approx(4e-3)
    assert found["plan"] == pytest.approx(1e-4)
    assert found["decode"] == pytest.approx(0.65 * 100 * (20_000 / 200e6 + ENGINE_S) / 2)
    assert found["copy"] == pytest.approx(1e-4)
    by_hand = 70e-6 + 20_000 * 1.65e-9 + 10_000 * 2.3e-9
    on_cpu = loader_s(cluster(decode="cpu"), JOB, RATES, 100, 4)
    assert cpu_decode_s(20_000, 100) == pytest.approx(by_hand)
    assert on_cpu["decode"] == pytest.approx(100 * by_hand / 10)  # ten cores a GPU
    assert on_cpu["copy"] == pytest.approx(100 * 30_000 / 10e9)
    assert loader_s(cluster(jpeg_per_s=1000), JOB, RATES, 100, 4)["decode"] == pytest.approx(0.1)
    few_cores = loader_s(
        cluster(cores_per_node=1), JOB, RATES, 100, 4
    )  # a quarter core a GPU takes longer than its engines
    assert few_cores["decode"] == pytest.approx(0.35 * 0.5 * 100 * by_hand / 0.25)
    no_engines = cluster(gpu=replace(GPU, jpeg_engines=0))
    assert loader_s(no_engines, JOB, RATES, 100, 4)["decode"] == pytest.approx(on_cpu["decode"] / 2)
    disk = cluster(storage=replace(STORAGE, reads_per_s=100))
    assert loader_s(disk, JOB, RATES, 100, 4)["read"] == pytest.approx(4.0)


def test_the_cpu_s_defaults_are_near_what_was_measured():
    errors = [abs(cpu_decode_s(side**2, size) / seconds - 1) for (side, size), seconds in MEASURED.items()]
    assert sorted(errors)[-2] < 0.15
    assert max(errors) < 0.25


def test_the_loader_runs_ahead_of_a_gpu():
    step = step_of(cluster(), JOB, RATES, COST, images=100, world_size=8)
    path = sum(step.critical.values())
    assert step.seconds == path > max(step.loader.values())
    assert step.images_per_s == pytest.approx(800 / path)
    assert step.critical["gather"] > 0
    assert step.critical["all-reduce, exposed"] == pytest.approx(75e-6 + 500e-6)  # 4 MB, one bucket: within and between
    assert step.limit == "backward"
    slow = step_of(cluster(jpeg_per_s=10), JOB, RATES, COST, images=100, world_size=8)
    assert (slow.seconds, slow.limit) == (10.0, "decode")


def test_on_shared_cores_seconds_add_up():
    shared = replace(RATES, shares_cores=True)
    step = step_of(cluster(decode="cpu"), JOB, shared, COST, images=100, world_size=1)
    loader = sum(step.loader.values()) - step.loader["read"]
    assert step.seconds == pytest.approx(sum(step.critical.values()) + loader)


def test_in_parts_the_forward_runs_twice():
    whole = step_of(cluster(), JOB, RATES, COST, images=100, world_size=1)
    parts = step_of(cluster(), replace(JOB, micro_batch=25), RATES, COST, images=100, world_size=1)
    assert parts.critical["forward"] == pytest.approx(2 * whole.critical["forward"])
    assert parts.critical["backward"] == pytest.approx(whole.critical["backward"])


def test_launches_are_named_as_the_limit():
    rates = replace(RATES, launch_s=1e-3)
    assert step_of(cluster(), JOB, rates, COST, images=100, world_size=1).limit == "launching kernels"


@pytest.mark.parametrize("family", FITTED)
def test_a_family_is_fitted_to_its_point(family):
    assert 0.05 < utilisation(family) < 0.8


def test_cautious_rates_are_never_faster():
    for precision in ("bf16", "fp32"):
        fast, slow = (gpu_rates(GPU, precision, basis) for basis in ("arithmetic", "cautious"))
        assert sum(network_s(slow, COST, 100)) >= sum(network_s(fast, COST, 100))
        assert isinstance(slow, Rates)
