"""Weights & Biases, MLflow and Trackio off line: two ranks train, are asked to stop, go on; what was written is read back."""

import json
import os
import signal
import sqlite3
import struct
from pathlib import Path

import pytest

from data_shards.convert import ConvertConfig, convert
from data_shards.synthetic import synthesize
from tests.distributed.ranks import Job, steps_logged
from trainer.preemption import EXIT_PREEMPTED
from trainer.trackers import IDENTITY

STEPS = 6
TRACKERS = ["wandb", "mlflow", "trackio"]
pytestmark = pytest.mark.timeout(600)


def options(shards: Path, run: Path, *more: object) -> list[object]:
    words = f"--data.shards {shards} --run.folder {run} --data.image-size 32 --plan.identities-per-batch 4 "
    words += "--plan.images-per-identity 2 --model.trunk resnet18 --model.embedding-size 16 --run.log-every 1 "
    words += f"--run.steps {STEPS} --run.checkpoint-every 2 --run.precision fp32 --run.device cpu --run.resume-if-begun"
    return [*words.split(), *more]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=8, images_per_identity=4, size=40, seed=5)
    convert(folder / "pictures", folder / "shards", ConvertConfig(images_per_group=2))
    return folder / "shards"


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """Asked to stop after its third step, and gone on with."""
    folder = tmp_path_factory.mktemp("tracked")
    given = options(shards, folder / "run", "--run.trackers", *TRACKERS, "--run.tracker-project", "faces of tests")
    job = Job(folder, 2, *given, prepare=_slowly)
    job.until(lambda: steps_logged(folder / "run") >= 3, timeout=120)
    job.signal(0, signal.SIGTERM)
    assert job.wait() == [EXIT_PREEMPTED] * 2
    again = Job(folder, 2, *given)
    assert again.wait(200) == [0, 0], again.said()[-3000:]
    return folder / "run"


def _slowly(rank: int) -> None:
    import time

    from trainer.telemetry import Telemetry

    log = Telemetry.log

    def slow(self, *given):
        found = log(self, *given)
        time.sleep(0.5)
        return found

    Telemetry.log = slow


@pytest.fixture(scope="module")
def written(run) -> dict[int, float]:
    """The loss of each step, as the run folder has it."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {line["step"]: line["loss"] for line in lines}


def test_all_three_are_the_run_s_own(run):
    assert set(json.loads((run / IDENTITY).read_text())) == {"id", *TRACKERS}
    assert {"wandb", "mlflow", "trackio", "tensorboard"} <= {path.name for path in run.iterdir()}


def test_weights_and_biases(run, written):
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((run / IDENTITY).read_text())["id"]
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2, "both starts are the same run"
    first, second = (records(file) for file in files)
    start = next(record.run for record in first if record.HasField("run"))
    assert (start.project, start.run_id, start.display_name) == ("faces of tests", identity, "run")
    config = {
        item.key: item.value_json for record in first for item in record.run.config.update if record.HasField("run")
    }
    config |= {
        item.key: item.value_json for record in first for item in record.config.update if record.HasField("config")
    }
    assert (config["model.trunk"], config["optimizer.learning_rate"]) == ('"resnet18"', "0.001")
    found = history(first) | history(second)
    assert found == pytest.approx(written)
    assert sorted(history(first) | history(second)) == sorted([*history(first), *history(second)]), "no step twice"


def history(records) -> dict[int, float]:
    found = {}
    for record in records:
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in items:
                found[record.history.step.num] = items["train/loss"]
    return found


def records(path: Path) -> list:
    """Of a .wandb file: protobuf messages in LevelDB's log format, after a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, parts = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):  # whole, or the last of several
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


@pytest.mark.filterwarnings("ignore")
def test_mlflow(run, written):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("faces of tests")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert (found.data.params["model.trunk"], found.data.params["softmax.margin"]) == ("resnet18", "None")
    assert found.info.artifact_uri.startswith((run / "mlflow").as_uri())
    steps = {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "train/loss")}
    assert steps == pytest.approx(written)


def test_trackio(run, written):
    (database,) = (run / "trackio").glob("*.db")
    with sqlite3.connect(database) as found:
        rows = found.execute("select run_name, step, metrics from metrics").fetchall()
        ((config,),) = found.execute("select config from configs").fetchall()
    identity = json.loads((run / IDENTITY).read_text())["id"]
    assert {name for name, _, _ in rows} == {f"run-{identity}"}
    losses = {step: json.loads(values)["train/loss"] for _, step, values in rows if "train/loss" in json.loads(values)}
    assert losses == pytest.approx(written)
    assert json.loads(config)["model.trunk"] == "resnet18"


def test_a_tracker_that_fails_does_not_stop_training(shards, tmp_path):
    job = Job(tmp_path, 2, *options(shards, tmp_path / "run", "--run.trackers", "mlflow", "trackio"), prepare=_breaks)
    assert job.wait(200) == [0, 0], job.said()[-3000:]
    said = "tracker mlflow failed and is told no more: ConnectionError: the server is gone"
    assert job.lines().count(said) == 1
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events.count(said) == 1
    (database,) = (tmp_path / "run" / "trackio").glob("*.db")
    with sqlite3.connect(database) as found:
        assert len(found.execute("select step from metrics").fetchall()) == STEPS, "the other one goes on"
    assert steps_logged(tmp_path / "run") == STEPS


def _breaks(rank: int) -> None:
    from accelerate.tracking import MLflowTracker

    log = MLflowTracker.log

    def gone(self, values, step=None, **more):
        if step == 3:
            raise ConnectionError("the server is gone\nand more")
        return log(self, values, step, **more)

    MLflowTracker.log = gone


def test_a_tracker_that_does_not_start_is_one_line_and_nothing_is_lost(shards, tmp_path):
    """A server that nobody runs, as the user's own variable names it."""
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    job = Job(tmp_path, 2, *options(shards, tmp_path / "run", "--run.trackers", "mlflow"), **environment)
    assert job.wait(200) == [1, 1]
    said = [line for line in job.lines() if line.startswith("run.trackers: mlflow does not start: ")]
    assert len(said) == 1, job.said()
    assert "127.0.0.1" in said[0]
    assert "Traceback" not in job.said()
    again = Job(tmp_path, 2, *options(shards, tmp_path / "run"))
    assert again.wait(200) == [0, 0], "without the tracker it begins"


def test_nothing_is_written_elsewhere(run):
    assert not [name for name in os.listdir() if name in ("wandb", "mlruns", "mlflow.db", "trackio")]
