"""A made-up profile in, its own pace out; other settings from it by hand; and what is wrong with a file."""

import json
from dataclasses import replace

import pytest

from tests.trainer.planner.settings import PROFILE, write_profile
from trainer.planner.calibration import Profile, calibrated, cpu_device, own_cluster, read_profile
from trainer.planner.hardware import GPUS
from trainer.planner.network import measure
from trainer.planner.step import Step, step_of


def predicted(profile: Profile, ranks: int | None = None, images: int | None = None, **changes) -> Step:
    gpu = cpu_device(profile) if profile.on_cpu else GPUS["a100"]
    ranks = ranks or profile.ranks
    where = replace(own_cluster(profile, gpu), gpus_per_node=ranks)
    job = replace(profile.workload, **changes)
    cost = measure(job.trunk, job.image_size, job.embedding_size, job.bf16)
    rates = calibrated(profile, gpu, ranks)
    return step_of(where, job, rates, cost, images=images or profile.images_per_rank, world_size=ranks)


@pytest.fixture
def profile(tmp_path) -> Profile:
    return read_profile(write_profile(tmp_path / "profile.json"))


def test_the_profiled_setting_comes_out_as_it_was_measured(profile):
    step = predicted(profile)
    assert step.seconds == pytest.approx(profile.step_s, rel=0.01)
    assert step.critical["optimiser"] == pytest.approx(0.03)
    assert step.loader["decode"] == pytest.approx(16 * 4e-4)
    assert step.critical["forward"] + step.critical["backward"] == pytest.approx(0.41 - 16 * 4.5e-4)


def test_a_gpu_s_profile_comes_out_as_it_was_measured(tmp_path):
    found = read_profile(write_profile(tmp_path / "profile.json", device="NVIDIA A100"))
    step = predicted(found)
    assert step.critical["forward"] + step.critical["backward"] == pytest.approx(0.40)
    assert step.loader["decode"] == pytest.approx(16 / 2000)
    assert step.seconds == pytest.approx(found.step_s - 0.01, rel=0.02)  # without the wait for a loader that keeps up


def test_larger_pictures_and_batches_cost_as_much_more(profile):
    one = predicted(profile)
    twice = predicted(profile, images=32)
    network = one.critical["forward"] + one.critical["backward"]
    assert network < twice.critical["forward"] + twice.critical["backward"] < 2 * network  # the weights' part stays
    assert twice.critical["optimiser"] == one.critical["optimiser"]
    assert twice.images_per_s > one.images_per_s
    assert predicted(profile, image_size=64).images_per_s < one.images_per_s


def test_ranks_share_the_cores(profile):
    """One rank has both cores: its arithmetic is twice as fast, and nothing is exchanged."""
    one, two = predicted(profile, ranks=1), predicted(profile)
    assert one.critical["forward"] == pytest.approx(two.critical["forward"] / 2)
    assert one.critical["gather"] == one.all_reduce_s == 0
    assert one.images_per_s > two.images_per_s


def test_the_measured_all_reduce_comes_out(profile):
    assert predicted(profile).all_reduce_s == pytest.approx(profile.all_reduce_s, rel=0.01)


def test_memory_beyond_what_is_counted_is_the_libraries(profile):
    rates = calibrated(profile, cpu_device(profile))
    assert 0 < rates.memory_bytes < 900e6


def test_an_optimiser_that_took_no_time_and_a_loader_that_took_all(tmp_path):
    """Shares stay within what was measured."""
    phases = PROFILE["critical_path_s"] | {"optimizer": 0.0}
    found = read_profile(write_profile(tmp_path / "a.json", critical_path_s=phases))
    assert predicted(found).critical["optimiser"] == 0
    loader = PROFILE["loader"] | {"cpu_s_per_image": {"plan_and_bytes": 1.0, "decode": 1.0}}
    found = read_profile(write_profile(tmp_path / "b.json", loader=loader))
    assert predicted(found).critical["forward"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 0}, "ranks is 0; it must be a number from 1 on"),
        ({"ranks": 3}, "ranks x images_per_rank is 3 x 16; it must be p x k = 32"),
        ({"trunk": "vgg"}, "--trunk is 'vgg'; allowed are resnet18, resnet34, resnet50, resnet101, iresnet18, "),
        ({"trunk": 7}, "trunk is 7; it must be a text"),
        ({"image_size": True}, "image_size is True; it must be a number from 0 on"),
        ({"critical_path_s": {}}, "critical_path_s.wait is None; it must be a number from 0 on"),
        ({"loader": {}}, "loader.threads is None; it must be a number from 1 on"),
        ({"images_per_s": float("inf")}, "images_per_s is inf; it must be a number from 0 on"),
    ],
)
def test_a_profile_that_is_none(tmp_path, changes, message):
    path = write_profile(tmp_path / "profile.json", **changes)
    with pytest.raises(ValueError, match="--") as error:
        read_profile(path)
    assert str(error.value).startswith(f"--calibrate {path}: {message}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"--calibrate is .*missing.json, which does not exist"):
        read_profile(tmp_path / "missing.json")
    (tmp_path / "text").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_profile(tmp_path / "text")
    (tmp_path / "list").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="it must be a"):
        read_profile(tmp_path / "list")
