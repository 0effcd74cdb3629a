"""`facescale profile` for real, on one process with a small network: what it finds adds up, and its files can be read."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image

from tests.data_shards.collections_on_disk import every_file
from trainer import cli
from trainer.config import TrainConfig
from trainer.phases import OTHER, PHASES, Span, Step
from trainer.profile import Profile, RankProfile, summary, typical
from trainer.profile_output import trace

OPTIONS = (
    "--data.image-size 32 --plan.identities-per-batch 4 --plan.images-per-identity 2 --model.trunk resnet18 "
    "--run.precision fp32 --run.log-every 2"
)
KEYS = {
    "critical_path_s": {
        "wait",
        "copy",
        "forward",
        "gather_mining_loss",
        "backward",
        "all_reduce_exposed",
        "optimizer",
        "other",
    },
    "loader": {"cpu_s_per_image", "images_per_s", "threads", "mean_picture_bytes", "mean_picture_pixels"},
    "step_s": {"median", "lower_quartile", "upper_quartile"},
}


@pytest.fixture(scope="module")
def out(shards, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
            patch.delenv(name, raising=False)
        folder = tmp_path_factory.mktemp("profile") / "deep" / "out"
        extra = [
            "--run.device",
            "cpu",
            "--data.shards",
            str(shards),
            "--run.micro-batch",
            "4",
            "--data.decoder",
            "dali",
        ]
        where = ["--steps", "8", "--warmup", "2", "--out", str(folder)]
        assert cli.main(["profile", *OPTIONS.split(), *extra, *where]) == 0
        return folder


@pytest.fixture(scope="module")
def found(out):
    return json.loads((out / "profile.json").read_text())


@pytest.fixture(autouse=True)
def _fresh(fresh_accelerate):
    pass


def test_only_its_files_are_left(out):
    assert {path.name for path in out.iterdir()} == {"profile.json", "profile.png", "trace.json"}


def test_the_schema_that_others_read(found):
    numbers = (
        "images_per_s all_reduce_total_s peak_memory_bytes ranks image_size images_per_rank p k embedding_size steps"
    )
    assert all(isinstance(found[name], int | float) for name in numbers.split())
    assert {name: set(found[name]) for name in KEYS} == KEYS
    assert set(found["loader"]["cpu_s_per_image"]) == {"plan_and_bytes", "decode"}
    texts = ("device", "trunk", "precision")
    assert [found[name] for name in texts] == ["cpu", "resnet18", "fp32"]
    assert [found[name] for name in ("ranks", "images_per_rank", "p", "k", "steps")] == [1, 8, 4, 2, 8]
    assert found["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_shares_add_up_to_the_step(found):
    path, step = found["critical_path_s"], found["step_s"]["median"]
    assert sum(path.values()) == pytest.approx(step, rel=1e-4)
    assert found["images_per_s"] == pytest.approx(8 / step, rel=1e-4)
    assert path["all_reduce_exposed"] == found["all_reduce_total_s"] == 0, "there is one rank"
    assert all(path[name] > 0 for name in path if name != "all_reduce_exposed")
    assert path["backward"] > path["copy"]
    assert path["other"] < max(0.15 * step, 0.005)


def test_the_loader_alone(found, shards):
    loader = found["loader"]
    assert loader["images_per_s"] > 0
    assert all(0 < cost < 0.1 for cost in loader["cpu_s_per_image"].values())
    assert loader["mean_picture_pixels"] == 24 * 16
    sizes = [len(data) for name, data in every_file(shards).items() if name.endswith(".tar")]
    assert 0 < loader["mean_picture_bytes"] < sum(sizes)


def test_the_picture(out):
    with Image.open(out / "profile.png") as picture:
        assert picture.width >= 1000
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 8


def nested(spans: list[dict]) -> bool:
    """Whether slices of one thread lie one within the other or apart, as trace viewers want them; 10 ns are rounding."""
    around: list[float] = []
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        while around and around[-1] <= span["ts"] + 0.01:
            around.pop()
        if around and span["ts"] + span["dur"] > around[-1] + 0.01:
            return False
        around.append(span["ts"] + span["dur"])
    return True


def test_the_trace_is_one_that_viewers_open(out):
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    assert all({"name", "ph", "pid", "tid"} <= event.keys() for event in events)
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in spans)
    assert sum(event["name"] == "step" for event in spans) == 8
    wanted = {"wait", "copy", "forward", "gather_mining_loss", "backward", "optimizer"}
    assert {event["name"] for event in spans} == wanted | {"step"}
    assert nested(spans)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "1"], "--steps is 1; it must be at least 2"),
        (["--warmup", "0"], "--warmup is 0; it must be at least 1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--plan.identities-per-batch", "1"], "identities_per_batch is 1"),
        (["--no.such-setting", "1"], "no.such-setting"),
    ],
)
def test_mistakes_are_told_in_one_line(options, said, tmp_path, capsys):
    assert cli.main(["profile", "--out", str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help(capsys):
    assert cli.main(["profile", "--help"]) == 0
    assert "--warmup" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert "profile" in capsys.readouterr().out


def test_deepspeed_is_refused(tmp_path):
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"under DeepSpeed.*allowed are DDP and one process"):
        Profile(2, 1, tmp_path)(TrainConfig(), accelerator, None, None)


def step(begin: float, **seconds: float) -> Step:
    spans, at = [], begin
    for name, length in seconds.items():
        spans.append(Span(name, at, at + length))
        at += length
    return Step(Span("step", begin, at), spans, [Span("bucket", begin + 1, begin + 2)])


def test_medians_are_brought_to_the_median_step():
    """Forward's median is 2, backward's 3, the step's 6: both are stretched by 6/5."""
    steps = [step(0, forward=1, backward=9), step(0, forward=2, backward=2), step(0, forward=3, backward=3)]
    zero = dict.fromkeys((*PHASES, OTHER), 0.0)
    found = typical([each.seconds() for each in steps])
    assert found == pytest.approx(zero | {"forward": 2.4, "backward": 3.6})


def test_the_slowest_rank_is_the_one_that_waits_least():
    loader = {"images_per_s": 1.0}
    fast = RankProfile([step(0, forward=1, gather_mining_loss=4)] * 2, 50.0, loader, 10)
    slow = RankProfile([step(0, forward=4, gather_mining_loss=1)] * 2, 50.0, loader | {"images_per_s": 2.0}, 5)
    found = summary([fast, slow], TrainConfig(), torch.device("cpu"))
    assert found["slowest_rank"] == 1
    assert found["critical_path_s"]["forward"] == 4
    assert found["critical_path_mean_s"]["forward"] == 2.5
    assert (found["loader"], found["peak_memory_bytes"]) == (loader | {"images_per_s": 2.0}, 10)
    assert found["all_reduce_total_s"] == 1
    assert (found["images_per_rank"], found["images_per_s"]) == (128, 256 / 5)


def test_ranks_of_a_trace_share_a_clock():
    ranks = [RankProfile([step(3, forward=1)], start, {}, 0) for start in (1e9, 1e9 + 2)]
    events = [event for event in trace(ranks) if event["ph"] == "X" and event["name"] == "step"]
    assert [(event["pid"], event["ts"]) for event in events] == [(0, 0), (1, 2e6)]
