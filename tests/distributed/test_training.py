"""Whole training runs under the real launcher: DDP and DeepSpeed, two gloo processes, saved and resumed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.synthetic import synthesize
from tests.distributed.launching import CPU, DEEPSPEED, launch, log, rewind
from trainer.evaluation.run import evaluate_in_training, load_run

STEPS = 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=16, images_per_identity=6, size=48, seed=5)
    convert(folder / "pictures", folder / "shards", ConvertConfig(holdout_identities=6, images_per_group=2))
    return folder / "shards"


def _options(shards: Path, run: Path) -> list[object]:
    """SGD, for AdamW's first steps turn rounding into whole steps; fp32."""
    fixed = (
        "--data.image-size 64 --plan.identities-per-batch 10 --plan.images-per-identity 4 --model.trunk resnet18 "
        "--model.embedding-size 32 --optimizer.kind sgd --optimizer.learning-rate 0.005 --optimizer.warmup-steps 2 "
        "--optimizer.momentum 0.5 --loss.kind soft_margin --run.precision fp32 --run.log-every 1 "
        f"--run.steps {STEPS} --run.checkpoint-every 10 --run.evaluate-every 10"
    )
    return [*fixed.split(), "--data.shards", shards, "--run.folder", run]


def _weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def ddp(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("ddp") / "run"
    launch(CPU, 2, *_options(shards, run))
    return run


@pytest.fixture(scope="module")
def deepspeed(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("deepspeed") / "run"
    launch(DEEPSPEED, 2, *_options(shards, run))
    return run


def test_run_folder(ddp):
    names = {path.name for path in ddp.iterdir()}
    assert names == {"config.yaml", "log.jsonl", "evaluations.jsonl", "checkpoints", "tensorboard", "logs"}
    assert list((ddp / "tensorboard").rglob("events.out.tfevents.*"))
    lines = log(ddp)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    wanted = "loss active_fraction d_ap d_an images_per_s data_wait_percent learning_rate epoch images_seen"
    assert all(set(wanted.split()) < set(line) for line in lines)
    assert [line["images_seen"] for line in lines] == [40 * step for step in range(1, STEPS + 1)]
    assert [line["step"] for line in log(ddp, "evaluations.jsonl")] == [10, 20]


def test_evaluation_in_training_equals_one_process_with_the_checkpoint(ddp, deepspeed, shards):
    """Both ranks embed with rank 0's BatchNorm statistics, those of the checkpoint."""
    for run in (ddp, deepspeed):
        config, model = load_run(run)
        alone = evaluate_in_training(
            model, ShardSet.open(shards).split("unseen_identities"), config, torch.device("cpu")
        )
        together = log(run, "evaluations.jsonl")[-1]
        assert {name: together[name] for name in alone} == pytest.approx(alone, rel=1e-4)


def test_it_learns(ddp):
    losses = [line["loss"] for line in log(ddp)]
    assert sum(losses[-5:]) < 0.985 * sum(losses[:5])


def _resumed(run: Path, copy: Path, shards: Path, config_file: str, processes: int) -> Path:
    """A copy of a run, gone on with from its checkpoint at step 10."""
    shutil.copytree(run, copy)
    rewind(copy, 10)
    launch(config_file, processes, *_options(shards, copy), "--run.resume")
    return copy


def test_resumed_on_two_ranks_ends_bit_identical(ddp, shards, tmp_path):
    resumed = _resumed(ddp, tmp_path / "run", shards, CPU, 2)
    before, after = _weights(ddp), _weights(resumed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [line["loss"] for line in log(resumed)] == [line["loss"] for line in log(ddp)]


def test_resumed_on_one_rank_goes_on(ddp, shards, tmp_path):
    """That its batches are the same is what tests/data_shards/test_plan.py sweeps over world sizes."""
    lines, resumed = log(ddp), log(_resumed(ddp, tmp_path / "run", shards, CPU, 1))
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    # BatchNorm sees 40 pictures where each of two ranks saw 20, so the losses are close, not equal
    for ours, theirs in zip(resumed[10:], lines[10:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1)


def test_deepspeed_follows_ddp(ddp, deepspeed):
    ours, theirs = log(deepspeed), log(ddp)
    assert len(ours) == STEPS
    assert max(abs(a["d_ap"] / ours[0]["d_ap"] - 1) for a in ours) > 0.02, (
        "it must have moved for this to mean anything"
    )
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "d_ap", "d_an"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)


def test_deepspeed_saves_and_loads(deepspeed, shards, tmp_path):
    folder = deepspeed / "checkpoints" / "step-00000020" / "deepspeed"
    parts = sorted(path.name for path in folder.glob("*optim_states.pt"))
    assert len(parts) == 2, "ZeRO-1 keeps one part of the optimiser state a rank"
    resumed = _resumed(deepspeed, tmp_path / "run", shards, DEEPSPEED, 2)
    ours, theirs = ([line["loss"] for line in log(run)] for run in (resumed, deepspeed))
    assert ours == pytest.approx(theirs, rel=1e-6)
    before, after = _weights(deepspeed), _weights(resumed)
    assert all(torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-7) for name in before)


def test_deepspeed_trains_with_default_precision(shards, tmp_path):
    """bf16 where this CPU has it: parameters stay float32, so the checkpoint is DDP's."""
    options = _options(shards, tmp_path / "run")
    at = options.index("--run.precision")
    options[at : at + 2] = ["--run.precision", "bf16"]
    launch(DEEPSPEED, 2, *options, "--run.steps", 3)
    assert all(value.dtype != torch.bfloat16 for value in _weights(tmp_path / "run", 3).values())
    assert len(log(tmp_path / "run")) == 3


def test_a_batch_that_the_ranks_cannot_share_is_refused(shards, tmp_path):
    done = launch(CPU, 3, *_options(shards, tmp_path / "run"), check=False)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("facescale: ")]
    assert said == ["facescale: plan: P*K = 10 * 4 = 40 is not divisible by the world size 3"]
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_trains_on_all_gpus(shards, tmp_path):
    """Mixed decode, bf16 or fp32 by the GPU, and NCCL where there is more than one."""
    gpus = torch.cuda.device_count()
    options = [*_options(shards, tmp_path / "run"), "--plan.identities-per-batch", min(2 * gpus, 10)]
    launch("launch/accelerate/ddp.yaml", gpus, *options, gpu=True)
    assert len(log(tmp_path / "run")) == STEPS
