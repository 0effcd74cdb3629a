"""Embedding and evaluation over real ranks: no picture twice or missing, killed and gone on with, the same results."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing import ProcessExitedException
from torch.nn.functional import normalize

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.loader import LoaderConfig
from data_shards.synthetic import synthesize
from tests.distributed.launching import CPU, ROOT, free_port
from tests.distributed.processes import in_processes
from trainer.cli import main
from trainer.collectives import rank
from trainer.evaluation import embedding_store
from trainer.evaluation.embedding_store import Encoder, embed_to


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=16, images_per_identity=6, size=48, seed=5)
    convert(folder / "pictures", folder / "shards", ConvertConfig(holdout_identities=8, holdout_images=1))
    return folder / "shards"


def _embeds(shards: Path, out: Path, seen: Path, killed: tuple[int, int] | None) -> None:
    """Embeds with a small network; notes each batch; `killed` is a rank and the batch at which it dies."""
    embedding_store.BATCH = 4
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 5, 2)

    def network(images):
        with (seen / str(rank())).open("a") as file:
            file.write(f"{len(images)}\n")
            batches = file.tell() // 2
        if killed == (rank(), batches):
            os.kill(os.getpid(), signal.SIGKILL)
        return normalize(layer(images.float()).mean((2, 3)))

    split = ShardSet.open(shards).split("train")
    encoder = Encoder(network, 8, LoaderConfig(image_size=24, decode_threads=1), {"embedder": "small"})
    embed_to(out, encoder, split, fingerprint=split.fingerprint)


def _images(seen: Path) -> int:
    return sum(int(line) for path in seen.iterdir() for line in path.read_text().split())


@pytest.fixture
def alone(shards, tmp_path) -> bytes:
    (tmp_path / "seen1").mkdir()
    in_processes(1, _embeds, shards, tmp_path / "alone", tmp_path / "seen1", None)
    return (tmp_path / "alone" / "embeddings.npy").read_bytes()


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes_and_embeds_each_picture_once(shards, alone, tmp_path, world_size):
    seen = tmp_path / "seen"
    seen.mkdir()
    in_processes(world_size, _embeds, shards, tmp_path / "out", seen, None)
    assert (tmp_path / "out" / "embeddings.npy").read_bytes() == alone
    assert _images(seen) == len(ShardSet.open(shards).split("train"))
    assert len(list(seen.iterdir())) == world_size, "every rank had its share"


@pytest.mark.parametrize(("killed", "then"), [((1, 3), 3), ((0, 4), 1)])
def test_killed_it_goes_on_with_another_number_of_ranks(shards, alone, tmp_path, killed, then):
    seen, again, out = tmp_path / "seen", tmp_path / "again", tmp_path / "out"
    for folder in (seen, again):
        folder.mkdir()
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_processes(2, _embeds, shards, out, seen, killed)
    done = int(np.fromfile(out / "done", np.uint8).sum())
    assert done >= killed[1] - 1
    in_processes(then, _embeds, shards, out, again, None)
    assert (out / "embeddings.npy").read_bytes() == alone
    assert _images(again) == len(ShardSet.open(shards).split("train")) - 4 * done


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = (
        f"train --data.shards {shards} --run.folder {folder} --run.steps 2 --data.image-size 32 --model.trunk resnet18 "
        "--plan.identities-per-batch 4 --plan.images-per-identity 2 --model.embedding-size 16 --run.device cpu "
        "--run.precision fp32 --run.no-tensorboard"
    )
    done = subprocess.run(
        [sys.executable, "-m", "trainer.cli", *options.split()], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder


def _launched(processes: int, *args: object) -> subprocess.CompletedProcess[str]:
    where = ["--config_file", CPU, "--num_processes", str(processes), "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *where, "-m", "trainer.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *map(str, args)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def _results(run: Path) -> list[dict]:
    return json.loads((run / "evaluation" / "results.json").read_text())


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluate_gives_the_same_results_on_any_number_of_ranks(run, world_size, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["evaluate", run, "--device", "cpu", "--knn", "1", "5", "--fars", "0.1", "0.01"]
    assert main([str(part) for part in options]) == 0
    alone = _results(run)
    done = _launched(world_size, *options)
    assert done.returncode == 0, done.stderr
    assert _results(run) == alone
    assert done.stdout.count("Rank-1: ") == 1, "one rank speaks"


def test_a_mistake_is_told_once(run, tmp_path):
    done = _launched(2, "embed", run, tmp_path / "out", "--split", "nothing")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("facescale: ")]
    assert len(said) == 1
    assert said[0].endswith("has no split 'nothing': it has train, unseen_identities, unseen_images")
