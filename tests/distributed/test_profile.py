"""`facescale profile` under the real launcher: both ranks record, and the gradients' all-reduce is seen."""

import json

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_shards.convert import ConvertConfig, convert
from data_shards.synthetic import synthesize
from tests.distributed.launching import CPU, launch
from tests.distributed.processes import in_processes
from trainer.collectives import rank, time_all_reduce
from trainer.phases import Recorder, next_step, phase, recording

COMMAND = ("trainer.cli", "profile")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=10, images_per_identity=4, size=48, seed=5)
    convert(folder / "pictures", folder / "shards", ConvertConfig(images_per_group=2))
    return folder / "shards"


def _options(shards, out):
    fixed = (
        "--steps 4 --warmup 2 --data.image-size 32 --plan.identities-per-batch 8 --plan.images-per-identity 2 "
        "--model.trunk resnet18 --model.embedding-size 32 --run.precision fp32"
    )
    return [*fixed.split(), "--data.shards", shards, "--out", out]


def test_two_ranks(shards, tmp_path):
    done = launch(CPU, 2, *_options(shards, tmp_path), command=COMMAND)
    found = json.loads((tmp_path / "profile.json").read_text())
    path, step = found["critical_path_s"], found["step_s"]["median"]
    assert (found["ranks"], found["images_per_rank"], found["steps"]) == (2, 8, 4)
    assert 0 < path["all_reduce_exposed"] < step
    assert 0 < found["all_reduce_total_s"] < step
    assert sum(path.values()) == pytest.approx(step, rel=1e-4)
    assert path["copy"] == 0, "libjpeg decodes into the batch"
    assert all(cost > 0 for cost in found["loader"]["cpu_s_per_image"].values())
    assert path["other"] < max(0.15 * step, 0.01)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for number in (0, 1):
        mine = [event for event in events if event["pid"] == number]
        assert {"all_reduce", "backward", "wait", "bucket"} < {event["name"] for event in mine}
        began, ended = ({event["id"]: event["ts"] for event in mine if event["ph"] == ph} for ph in "be")
        assert len(began) >= 4
        assert began.keys() == ended.keys()
        assert all(began[each] < ended[each] for each in began)
    assert "all-reduce, exposed" in done.stdout
    assert done.stdout.count("quartiles of the step") == 1, "rank 0 alone prints"
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "profile.png", "trace.json"}


def _averaged() -> list[tuple[list[float], int, float]]:
    """Gradients of a linear map after `time_all_reduce`, the number of buckets told, and the seconds of all-reduce exposed."""
    found = []
    for compression in ("none", "bf16"):
        linear = nn.Linear(2, 1, bias=False)
        model = DistributedDataParallel(linear)
        time_all_reduce(model, compression)
        with recording(Recorder(1)) as seen:
            next_step()
            with phase("backward"):
                model(torch.tensor([[1.0, 2.0]]) * (1 + 2 * rank())).sum().backward()
            next_step()
        (step,) = seen.steps()
        found.append((linear.weight.grad[0].tolist(), len(step.buckets), step.seconds()["all_reduce"]))
        model(torch.ones(1, 2)).sum().backward()  # nothing records
    return found


def test_a_timed_all_reduce_is_the_mean():
    """Of [1, 2] and [3, 6], exact in bf16, too."""
    for ranks in in_processes(2, _averaged):
        for gradient, buckets, exposed in ranks:
            assert (gradient, buckets) == ([2.0, 4.0], 1)
            assert exposed > 0
