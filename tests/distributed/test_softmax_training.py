"""Runs with class centres on several ranks: saved, resumed on as many and on other numbers, under DDP and DeepSpeed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import trainer.centres
from data_shards.convert import ConvertConfig, convert
from data_shards.synthetic import synthesize
from tests.distributed.launching import log, rewind
from tests.distributed.ranks import Job
from tests.distributed.test_faults import DEEPSPEED, options
from trainer import checkpoint
from trainer.config import SoftmaxConfig

STEPS, IDENTITIES = 6, 13
SOFTMAX = {
    "run.steps": STEPS,
    "run.checkpoint_every": 2,
    "run.keep_checkpoints": 9,
    "softmax.kind": "adaface",
    "softmax.weight": 0.5,
    "softmax.warmup_steps": 3,
    "softmax.sample_rate": 0.5,
    "softmax.scale": 16,
    "optimizer.warmup_steps": 1,
    "optimizer.learning_rate": 1e-3,
    "model.trunk": "timm:convnext_atto",  # no BatchNorm: over 8 pictures of 32 pixels it makes rounding grow 40-fold a step
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthesize(folder / "pictures", identities=IDENTITIES, images_per_identity=4, size=32, seed=5)
    convert(folder / "pictures", folder / "shards", ConvertConfig(images_per_group=2))
    return folder / "shards"


def run_of(shards: Path, folder: Path, ranks: int, **environment: str) -> Path:
    """A run in `folder`, gone on with where it has begun."""
    folder.mkdir(exist_ok=True)
    job = Job(folder, ranks, *options(shards, folder / "run", **SOFTMAX), **environment)
    assert job.wait() == [0] * ranks, job.said()
    return folder / "run"


def gone_on(shards: Path, run: Path, folder: Path, step: int, ranks: int) -> Path:
    folder.mkdir()
    shutil.copytree(run, folder / "run")
    rewind(folder / "run", step)
    return run_of(shards, folder, ranks)


def centres(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All centres of a checkpoint, and how many ranks wrote them."""
    files = sorted((run / "checkpoints" / f"step-{step:08d}").glob("centres-*.safetensors"))
    parts = [load_file(file) for file in files]
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("values", "momentum")}
    return whole | {"norms": parts[0]["norms"], "files": torch.tensor(len(files))}


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    return run_of(shards, tmp_path_factory.mktemp("undisturbed"), 2)


def test_the_log_tells_of_the_softmax(undisturbed):
    lines = log(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["softmax_loss"] > lines[-1]["softmax_loss"] > 0
    assert lines[0]["cos_own_centre"] < lines[-1]["cos_own_centre"] < 1
    assert all(12 / 13 <= line["centres_sampled"] <= 1 for line in lines), "12 of 13 identities are in each batch"


def test_resumed_on_as_many_ranks_it_ends_bit_identical(undisturbed, shards, tmp_path):
    resumed = gone_on(shards, undisturbed, tmp_path / "again", 4, 2)
    ours, theirs = centres(resumed), centres(undisturbed)
    assert ours["values"].shape == (IDENTITIES, 16)
    assert ours["momentum"].abs().sum(1).min() > 0
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    weights = [load_file(run / "checkpoints" / "step-00000006" / "model.safetensors") for run in (resumed, undisturbed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_centres_are_dealt_anew_to_another_number_of_ranks(undisturbed, shards, tmp_path):
    """From 2 ranks to 1 and on to 3; 13 centres are divided evenly by none but 1."""
    alone = gone_on(shards, undisturbed, tmp_path / "alone", 2, 1)
    three = gone_on(shards, alone, tmp_path / "three", 4, 3)
    assert [int(centres(three, step)["files"]) for step in (2, 4, 6)] == [2, 1, 3]
    names = ("loss", "softmax_loss", "cos_own_centre", "centres_sampled")
    for ours, before, theirs in zip(log(three), log(alone), log(undisturbed), strict=True):
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
            assert ours[name] == pytest.approx(before[name], rel=1e-5), (ours["step"], name)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 20])
def test_every_centre_finds_its_new_owner(undisturbed, monkeypatch, ranks):
    """Some of 20 ranks have none."""
    saved, parts = checkpoint.latest(undisturbed / "checkpoints"), []
    monkeypatch.setattr(trainer.centres, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(trainer.centres, "rank", lambda rank=rank: rank)
        mine = trainer.centres.Centres(SoftmaxConfig(kind="adaface"), np.arange(IDENTITIES), 16)
        saved.load_centres(mine)
        parts.append(mine.state())
    for name in ("values", "momentum"):
        assert torch.equal(torch.cat([part[name] for part in parts]), centres(undisturbed)[name])
    assert all(torch.equal(part["norms"], centres(undisturbed)["norms"]) for part in parts)


def test_centres_of_other_identities_are_refused(undisturbed):
    other = trainer.centres.Centres(SoftmaxConfig(kind="adaface"), np.arange(IDENTITIES + 2), 16)
    with pytest.raises(ValueError, match=r"centres-00000-of-00002.safetensors holds centres of other identities"):
        checkpoint.latest(undisturbed / "checkpoints").load_centres(other)


def test_deepspeed_trains_the_same(undisturbed, shards, tmp_path):
    zero = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "launch/deepspeed/zero1.json"}
    run = run_of(shards, tmp_path / "deepspeed", 2, **zero)
    for ours, theirs in zip(log(run), log(undisturbed), strict=True):
        for name in ("loss", "softmax_loss", "cos_own_centre"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    found, expected = centres(run), centres(undisturbed)
    assert all((found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm() for name in ("values", "momentum"))


def test_a_checkpoint_without_centres_is_refused(undisturbed, shards, tmp_path):
    """As it would be where somebody has taken them away and mended the checksums."""
    folder = tmp_path / "without"
    folder.mkdir()
    shutil.copytree(undisturbed, folder / "run")
    for step in (2, 4, 6):
        saved = folder / "run" / "checkpoints" / f"step-{step:08d}"
        state = json.loads((saved / "state.json").read_text())
        state["sha256"] = {name: value for name, value in state["sha256"].items() if "centres" not in name}
        (saved / "state.json").write_text(json.dumps(state))
        for file in saved.glob("centres-*"):
            file.unlink()
    job = Job(folder, 1, *options(shards, folder / "run", **SOFTMAX))
    assert job.wait() == [1]
    assert any("has no class centres (centres-00000-of-00002.safetensors)" in line for line in job.lines()), job.said()
