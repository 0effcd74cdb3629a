"""Plans as wholes: what must hold whatever the figures are."""

from dataclasses import replace

import pytest

from tests.trainer.planner.settings import cluster
from trainer.planner.advice import advice
from trainer.planner.capacity import WORLDS, plan
from trainer.planner.dataset import estimate
from trainer.planner.hardware import GPUS, NETWORKS, STORAGE
from trainer.planner.rates import gpu_rates
from trainer.planner.workload import Cluster, Workload

JOB = Workload(trunk="resnet18", image_size=64, p=512)


def planned(job: Workload = JOB, gpu: str = "h100", **changes):
    given = {"gpu": GPUS[gpu], "network": NETWORKS["ndr"], "storage": STORAGE["ram"], "jpeg_per_s": 1e7}
    where = Cluster(**(given | changes))
    return plan(where, job, gpu_rates(where.gpu, job.precision), estimate(job, 2**28))


@pytest.mark.parametrize("gpu", [name for name, gpu in GPUS.items() if gpu.bf16])
@pytest.mark.parametrize("network", NETWORKS)
def test_more_gpus_are_never_slower_in_total_with_weak_scaling(gpu, network):
    """The step from one machine to two over Ethernet is left out: NVLink within and 10 Gbit/s between can make two slower."""
    rows = planned(gpu=gpu, network=NETWORKS[network]).scaling
    assert tuple(row.gpus for row in rows) == WORLDS
    totals = [row.weak.images_per_s for row in rows]
    parts = [totals] if network in ("hdr", "ndr") else [totals[:4], totals[4:]]
    assert all(part == sorted(part) for part in parts)
    assert all(0 < row.weak_efficiency <= 1 + 1e-9 for row in rows)


def test_a_second_machine_over_slow_ethernet_does_not_pay_and_that_is_told():
    found = planned(network=NETWORKS["ethernet10"], nodes=2)
    eight = next(row for row in found.scaling if row.gpus == 8).weak
    assert found.step.images_per_s < eight.images_per_s
    assert any(line.startswith("network: one machine alone would be faster") for line in advice(found))


def test_efficiency_falls_with_the_gpus():
    rows = planned().scaling
    weak = [row.weak_efficiency for row in rows]
    assert weak == sorted(weak, reverse=True)
    strong = [row.strong_efficiency for row in rows if row.strong_efficiency is not None]
    assert strong == sorted(strong, reverse=True)
    assert rows[0].weak_efficiency == rows[0].strong_efficiency == 1
    assert all(row.strong is None for row in rows if 2048 // row.gpus < 2)
    assert next(row for row in rows if row.gpus == 8).weak.images_per_s == pytest.approx(planned().step.images_per_s)


def test_a_faster_network_is_never_slower():
    steps = [
        planned(nodes=16, network=NETWORKS[name]).step.seconds for name in ("ethernet10", "ethernet100", "hdr", "ndr")
    ]
    assert steps == sorted(steps, reverse=True)


def test_epoch_and_cost():
    """8 GPUs at 2 an hour."""
    found = planned(price=2.0)
    assert found.epoch_s == pytest.approx(found.dataset.steps_per_epoch * 512 * 4 / found.step.images_per_s)
    assert found.epoch_cost == pytest.approx(16 * found.epoch_s / 3600)


def test_the_largest_p_fits_and_the_next_does_not():
    job = Workload(image_size=224, p=16, identities=100_000)
    small = replace(GPUS["l4"], memory_gb=6.0)
    found = _on(small, job)
    assert found.fits
    assert _on(small, replace(job, p=found.largest_p)).fits
    too_large = _on(small, replace(job, p=found.largest_p + 1))
    assert not too_large.fits
    assert advice(too_large)[0].startswith(f"memory: does not fit: the largest --p that fits is {found.largest_p:,}")
    assert _on(small, replace(job, p=found.largest_p + 1, micro_batch=32)).fits


def _on(gpu, job):
    where = Cluster(gpu=gpu, gpus_per_node=2, network=NETWORKS["ndr"], storage=STORAGE["nvme"])
    return plan(where, job, gpu_rates(gpu, "bf16"), estimate(job, 2**28))


def test_nothing_fits_a_tiny_gpu():
    found = _on(replace(GPUS["l4"], memory_gb=0.5), JOB)
    assert (found.fits, found.largest_p) == (False, 0)
    assert "no --p fits" in advice(found)[0]


def test_more_cores_lift_a_step_that_decoding_limits():
    """The cores that the advice names give the pace that it names, and decoding no longer limits."""
    slow = planned(decode="cpu", cores_per_node=8, jpeg_per_s=None, gpus_per_node=8)
    assert slow.step.limit == "decode"
    line = next(line for line in advice(slow) if line.startswith("decode limits"))
    cores = int(line.split("(")[1].split(" a machine")[0].replace(",", ""))
    lifted = planned(decode="cpu", cores_per_node=cores, jpeg_per_s=None, gpus_per_node=8)
    assert f"{lifted.step.images_per_s:,.0f} images/s" in line
    assert lifted.step.limit != "decode"
    assert lifted.step.images_per_s > slow.step.images_per_s


def test_no_bf16_is_told():
    found = planned(replace(JOB, precision="fp32"), gpu="v100")
    assert any(line.startswith("precision: Tesla V100") for line in advice(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 1}, "--p is 1; allowed is 2 to 10,000,000"),
        ({"k": 1}, "--k is 1; allowed is 2 to 100,000"),
        ({"image_size": 8}, "--image-size is 8; allowed is 16 to 1,024"),
        ({"embedding_size": 1}, "--dim is 1; allowed is 2 to 4,096"),
        ({"trunk": "vgg"}, "--trunk is 'vgg'; allowed are resnet18, resnet34, resnet50, resnet101, iresnet18, "),
        ({"p": 9000}, "--p is 9,000; allowed is at most --identities, 8,631"),
        ({"images": 100}, "--identities is 8,631; with --images 100 at most 50 are allowed"),
        ({"picture_bytes": float("nan")}, "--picture-bytes is nan; allowed is 1 to 100,000,000"),
    ],
)
def test_a_workload_that_is_not_allowed(changes, message):
    with pytest.raises(ValueError, match="--") as error:
        Workload(**changes)
    assert str(error.value).startswith(message)


def test_clusters_that_are_not_allowed():
    for changes, message in (
        ({"nodes": 0}, "--nodes is 0; allowed is 1 to 65,536"),
        ({"price": -1}, "--price is -1; allowed is 0 to 10,000"),
        ({"links_per_node": 0}, "--links-per-node is 0; allowed is 1 to 64"),
        ({"decode": "tpu"}, "--decode is 'tpu'; allowed are cpu, gpu"),
    ):
        with pytest.raises(ValueError, match="--") as error:
            cluster(**changes)
        assert str(error.value) == message


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(ValueError, match="--") as error:
        planned(replace(JOB, p=63), nodes=2)
    assert str(error.value) == (
        "--p is 63, --k 4: P*K = 252 is not divisible by the 16 GPUs; --p must be a multiple of 4"
    )
    with pytest.raises(ValueError, match="--p is 4: 1 image for each GPU; allowed is at least 2"):
        planned(replace(JOB, p=4), nodes=2)
