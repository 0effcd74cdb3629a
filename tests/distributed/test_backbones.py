"""timm's and InsightFace's networks in whole runs: two real processes, parts, dropout, DeepSpeed, resume, evaluation."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.synthetic import synthesize
from tests.distributed.launching import CPU, DEEPSPEED, launch, log, rewind
from trainer.evaluation.run import evaluate_in_training, load_run, write_embeddings

STEPS = 4
SHORT = ["--run.steps", "2", "--run.evaluate-every", "2", "--plan.images-per-identity", "2", "--data.image-size", "16"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=12, images_per_identity=6, size=32, seed=5)
    convert(folder / "pictures", folder / "shards", ConvertConfig(holdout_identities=5, images_per_group=2))
    return folder / "shards"


def _options(shards: Path, run: Path) -> list[object]:
    fixed = (
        "--data.image-size 32 --plan.identities-per-batch 6 --plan.images-per-identity 4 --model.embedding-size 16 "
        f"--optimizer.warmup-steps 1 --run.log-every 1 --run.steps {STEPS} --run.checkpoint-every 2 --run.evaluate-every 4 "
        "--run.no-tensorboard"
    )
    return [*fixed.split(), "--data.shards", shards, "--run.folder", run]


def _judged(run: Path, shards: Path) -> None:
    """The evaluation of both ranks is that of one process with the checkpoint, and pictures can be embedded."""
    config, model = load_run(run)
    found = evaluate_in_training(model, ShardSet.open(shards).split("unseen_identities"), config, torch.device("cpu"))
    together = log(run, "evaluations.jsonl")[-1]
    assert {name: together[name] for name in found} == pytest.approx(found, rel=1e-3)
    assert len(write_embeddings(run, run / "embedded").embeddings) == 30
    assert (run / "embedded" / "embeddings.npy").is_file()


def test_a_trunk_of_timm_with_facenets_head(shards, tmp_path):
    """In parts of 5 and 5 and 2 images a rank; resumed at step 2 it draws the same dropout and ends bit-identical."""
    run, weights = tmp_path / "run", f"checkpoints/step-{STEPS:08d}/model.safetensors"
    network = ["--model.trunk", "timm:test_resnet", "--model.head", "facenet", "--run.precision", "fp32"]
    network += ["--run.micro-batch", "5"]
    done = launch(CPU, 2, *_options(shards, run), *network)
    line = next(line for line in done.stderr.splitlines() if "multiply-adds" in line)
    assert line.startswith("facescale: timm:test_resnet, head facenet, 16 dimensions: ")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    rewind(copy, 2)
    launch(CPU, 2, *_options(shards, copy), *network, "--run.resume")
    before, after = load_file(run / weights), load_file(copy / weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _judged(run, shards)


def test_an_iresnet_under_deepspeed(shards, tmp_path):
    """bf16; the last scale of ArcFace's head is not trained and stays 1."""
    run = tmp_path / "run"
    launch(DEEPSPEED, 2, *_options(shards, run), "--model.trunk", "iresnet18", "--run.precision", "bf16", *SHORT)
    state = load_file(run / "checkpoints/step-00000002/model.safetensors")
    assert state["head.features.weight"].eq(1).all()
    assert state["head.features.bias"].ne(0).any()
    assert state["head.fc.weight"].shape == (16, 512)
    assert not state["trunk.layer4.1.prelu.weight"].eq(0.25).any()
    _judged(run, shards)
