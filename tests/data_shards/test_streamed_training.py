"""`python -m trainer.train` from a real HTTP server: the run that the folder gives, or one line and exit code 1."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from collections_on_disk import encoded
from store_server import drops, fails, lies, store_of, truncates, well

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--data.image-size", "32", "--plan.identities-per-batch", "4", "--plan.images-per-identity", "2"]
TINY += ["--model.trunk", "resnet18", "--model.embedding-size", "8", "--data.decode-threads", "1"]
TINY += ["--run.steps", "6", "--run.checkpoint-every", "3", "--run.log-every", "1", "--data.stream.backoff-s", "0.01"]
TINY += ["--run.device", "cpu", "--run.precision", "fp32", "--run.no-tensorboard"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("streamed")
    for identity in range(12):
        (root / "pictures" / f"n{identity}").mkdir(parents=True)
        for place in range(8):
            picture = encoded(31 * identity + 7 * place, size=(48, 40), mode="RGB")
            (root / "pictures" / f"n{identity}" / f"{place}.jpg").write_bytes(picture)
    config = ConvertConfig(
        workers=1, shard_bytes=25_000, images_per_group=2, holdout_identities=("n3", "n4", "n5", "n6", "n7")
    )
    convert(root / "pictures", root / "shards", config)
    assert len(ShardSet.open(root / "shards").split("train").shards) >= 5
    return root / "shards"


@pytest.fixture
def store(shards):
    with store_of(shards) as server:
        yield server


def command(module, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def trained(folder, location, *options):
    """Losses of a run, and the hash of its last weights."""
    code, said = command("trainer.train", *TINY, "--data.shards", location, "--run.folder", folder, *options)
    assert code == 0, said
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("step-00000006/*.safetensors"))
    ]
    assert weights
    return losses, weights


def test_training_from_a_failing_store_is_training_from_the_folder(store, shards, tmp_path):
    store.faults = [fails(503), well, drops, lies, well, well, truncates, fails(500)]
    here = trained(tmp_path / "here", shards)
    cache = ["--data.stream.cache-dir", tmp_path / "cache"]
    assert trained(tmp_path / "there", store.url, *cache) == here
    assert not store.faults
    assert len(here[0]) == 6
    code, said = command("trainer.cli", "evaluate", tmp_path / "there", "--device", "cpu")
    assert code == 0, said
    assert (tmp_path / "there" / "evaluation").is_dir()
    assert store.asked("/unseen_identities/000000.tar")


def test_windows_from_a_store_are_windows_of_the_folder_also_when_resumed(store, shards, tmp_path):
    window = ["--plan.window-shards", "3", "--run.keep-checkpoints", "3"]
    cache = ["--data.stream.cache-dir", tmp_path / "cache"]
    here = trained(tmp_path / "here", shards, *window)
    assert trained(tmp_path / "there", store.url, *window, *cache) == here
    ranges = [request for request in store.asked(".tar") if "/train/" in request[0]]
    assert len({path for path, _, _ in ranges}) == len(ranges) >= 5  # each tar is fetched whole, once
    checkpoints = tmp_path / "there" / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000006")
    (checkpoints / "latest").write_text((checkpoints / "latest").read_text().replace("6", "3"))
    assert trained(tmp_path / "there", store.url, *window, *cache, "--run.resume") == here


def test_two_ranks_share_the_cache_and_fetch_each_tar_once(store, shards, tmp_path):
    launch = ["launch", "--config_file", "launch/accelerate/cpu.yaml", "--num_processes", 2, "-m", "trainer.train"]
    options = [*TINY, "--data.shards", store.url, "--data.stream.cache-dir", tmp_path / "cache"]
    folder = ["--run.folder", tmp_path / "run", "--plan.window-shards", "3"]
    code, said = command("accelerate.commands.accelerate_cli", *launch, *options, *folder)
    assert code == 0, said
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 6
    ranges = [request for request in store.asked(".tar") if "/train/" in request[0]]
    assert len({path for path, _, _ in ranges}) == len(ranges) >= 5
    assert len(store.asked("index.npy")) == 1


def test_a_store_that_goes_on_failing_ends_the_run_in_one_line(store, tmp_path):
    store.faults, store.stays = [fails(503)], True
    options = [
        "--data.shards",
        store.url,
        "--run.folder",
        tmp_path / "run",
        "--data.stream.cache-dir",
        tmp_path / "cache",
    ]
    code, said = command("trainer.train", *TINY, *options, "--data.stream.retries", 2)
    assert code == 1
    (line,) = [line for line in said.splitlines() if "attempts" in line]
    assert line.startswith(f"facescale: {store.url}/train/")
    assert "the server answered 503 Service Unavailable; that was the last of 3 attempts in" in line
    assert said.splitlines()[-1] == line


def test_a_missing_set_is_told_before_anything_is_made(store, tmp_path):
    options = ["--data.shards", f"{store.url}/none", "--run.folder", tmp_path / "run"]
    code, said = command("trainer.train", *TINY, *options, "--data.stream.cache-dir", tmp_path / "cache")
    assert (code, said) == (1, f"facescale: {store.url}/none/manifest.json: there is no such file\n")
    assert not (tmp_path / "run").exists()
