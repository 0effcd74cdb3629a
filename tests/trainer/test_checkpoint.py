"""Checkpoints: exact, complete or not there, checked before they are used."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, Trained, Writer, latest
from trainer.metric.memory import CrossBatchMemory


def small(width: int = 6, layers: int = 1) -> nn.Module:
    torch.manual_seed(1)
    hidden = [nn.Linear(width, width) for _ in range(layers - 1)]
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), *hidden, nn.Linear(width, 2))


def with_optimizer(**shape: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small(**shape)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def save(folder, step, model, optimizer, *, engine=None, keep=2, **more) -> Checkpoint:
    trained = Trained(model=model, optimizer=optimizer, engine=engine, **more)
    Writer(folder, trained, keep=keep).save(step, wait=True)
    return Checkpoint(folder / f"step-{step:08d}", step)


def load(found: Checkpoint, model, optimizer, engine=None, **more) -> None:
    found.load_training(Trained(model=model, optimizer=optimizer, engine=engine, **more))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def every_file(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def saved(tmp_path):
    """RUN/checkpoints with step 3, and the model and optimiser that it was made of."""
    model, optimizer = with_optimizer()
    train(model, optimizer, range(3))
    save(tmp_path / "checkpoints", 3, model, optimizer)
    return tmp_path / "checkpoints", model, optimizer


def test_two_more_steps_equal_the_run_that_was_not_interrupted(saved):
    folder, model, optimizer = saved
    train(model, optimizer, range(3, 5))
    resumed, its_optimizer = with_optimizer()
    found = latest(folder)
    load(found, resumed, its_optimizer)
    assert found.step == 3
    train(resumed, its_optimizer, range(found.step, 5))
    assert same(state_of(resumed), state_of(model))
    ours, theirs = its_optimizer.state_dict()["state"], optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys() != set()
    assert all(same(ours[number], theirs[number]) for number in ours)


def test_weights_alone_would_not_continue_exactly(saved):
    """So that the test above says something about the optimiser."""
    folder, model, optimizer = saved
    train(model, optimizer, range(3, 5))
    resumed, its_optimizer = with_optimizer()
    latest(folder).load_model(resumed)
    train(resumed, its_optimizer, range(3, 5))
    assert not same(state_of(resumed), state_of(model))


def test_what_a_checkpoint_holds(saved):
    folder, _, _ = saved
    assert every_file(folder).keys() == {
        "latest",
        "step-00000003/model.safetensors",
        "step-00000003/optimizer.pt",
        "step-00000003/state.json",
    }
    state = json.loads((folder / "step-00000003" / "state.json").read_text())
    assert (state["step"], state["world_size"]) == (3, 1)
    assert state["sha256"].keys() == {"model.safetensors", "optimizer.pt"}


def test_it_holds_the_settings_of_its_run_too(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {seed: 3}\n")
    found = save(tmp_path / "checkpoints", 1, *with_optimizer())
    assert (found.folder / "config.yaml").read_text() == "run: {seed: 3}\n"
    (found.folder / "config.yaml").write_text("run: {seed: 4}\n")
    assert "config.yaml is missing or damaged" in refusal(latest, tmp_path / "checkpoints")


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_stay(tmp_path, keep, left):
    for step in range(1, 6):
        assert save(tmp_path, step, *with_optimizer(), keep=keep).step == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *(f"step-{step:08d}" for step in left)]
    assert latest(tmp_path).step == 5


def test_a_newer_one_that_a_killed_run_left_does_not_cost_the_one_just_saved(tmp_path):
    """Killed between the rename and `latest`, resumed from 10 with other intervals: 15 is the newest then, not 20."""
    for step in (10, 20):
        save(tmp_path, step, *with_optimizer(), keep=2)
    (tmp_path / "latest").write_text("step-00000010")
    save(tmp_path, 15, *with_optimizer(), keep=1)
    assert latest(tmp_path).step == 15
    assert not (tmp_path / "step-00000010").exists()


def test_saving_a_step_again_replaces_it(saved):
    folder, model, optimizer = saved
    train(model, optimizer, range(3, 5))
    save(folder, 3, model, optimizer)
    again = small()
    latest(folder).load_model(again)
    assert same(state_of(again), state_of(model))


@pytest.mark.parametrize("part", ["save_file", "_sha256", "_flush", "_write_atomically"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_failure_in_the_middle_leaves_the_one_before(saved, monkeypatch, part, keep):
    folder, model, optimizer = saved
    before, weights = every_file(folder), state_of(model)
    train(model, optimizer, range(3, 5))

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, part, fail)
        with pytest.raises(OSError, match="No space left"):
            save(folder, 5, model, optimizer, keep=keep)
    assert before.items() <= every_file(folder).items()
    found, restored = latest(folder), small()
    found.load_model(restored)
    assert found.step == 3
    assert same(state_of(restored), weights)

    save(folder, 5, model, optimizer, keep=keep)  # and the next attempt works, over what the failure left
    latest(folder).load_model(restored)
    assert same(state_of(restored), state_of(model))
    assert not [path.name for path in folder.iterdir() if "partial" in path.name]


def test_saving_changes_neither_weights_nor_optimiser(saved):
    folder, model, optimizer = saved
    weights, steps = state_of(model), optimizer.state_dict()["state"][0]["step"].clone()
    save(folder, 4, model, optimizer)
    assert same(state_of(model), weights)
    assert optimizer.state_dict()["state"][0]["step"] == steps


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_channels_last_goes_on_exactly(tmp_path, kind):
    """Fused optimisers go through memory: a state laid out in another way than the weights would be mixed up."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=0.1, fused=True, **more)

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
            model(images.to(memory_format=torch.channels_last)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = made()
    go_on(model, optimizer, range(2))
    save(tmp_path, 2, model, optimizer)
    other, its_optimizer = made()
    load(latest(tmp_path), other, its_optimizer)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)
    for which in ((model, optimizer), (other, its_optimizer)):
        go_on(*which, range(2, 5))
    assert same(state_of(other), state_of(model))


def refusal(call, *args) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        call(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_no_checkpoint(tmp_path):
    assert refusal(latest, tmp_path) == f"{tmp_path} has no checkpoint: train first"
    assert refusal(latest, tmp_path / "none") == f"{tmp_path}/none has no checkpoint: train first"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_files_are_named(saved, name, damage):
    folder, _, _ = saved
    path = folder / "step-00000003" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if damage == "flipped" else bytes(content[:-1]))
    assert refusal(latest, folder).startswith(f"checkpoint {folder}/step-00000003: {name} is missing or damaged")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step": 3}', '{"step": 3, "sha256": 1}', "7"])
def test_a_damaged_state_is_named(saved, content):
    folder, _, _ = saved
    (folder / "step-00000003" / "state.json").write_text(content)
    assert refusal(latest, folder).startswith(f"checkpoint {folder}/step-00000003 cannot be read: ")


@pytest.mark.parametrize("content", ["step-00000009", "", "\n"])
def test_a_pointer_to_nothing_is_named_and_what_is_there_is_taken(saved, content, capsys):
    folder, _, _ = saved
    (folder / "latest").write_text(content)
    assert latest(folder).step == 3
    said = capsys.readouterr().err
    assert said.startswith(f"facescale: checkpoint {folder}")
    assert said.endswith("; taking step 3 instead\n")


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "no state"])
def test_a_damaged_newest_falls_back_to_the_one_before(saved, damage, capsys):
    folder, model, optimizer = saved
    weights = state_of(model)
    train(model, optimizer, range(3, 6))
    save(folder, 6, model, optimizer)
    path = folder / "step-00000006" / ("state.json" if damage == "no state" else "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if damage in ("flipped", "cut"):
        path.write_bytes(bytes(content) if damage == "flipped" else bytes(content[:-1]))
    found, restored = latest(folder), small()
    found.load_model(restored)
    assert found.step == 3
    assert same(state_of(restored), weights)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"facescale: checkpoint {folder}/step-00000006")
    assert line.endswith("; taking step 3 instead")


def test_everything_that_training_changes_comes_back(tmp_path):
    model, optimizer = with_optimizer()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    memory, guard = CrossBatchMemory(5), {"acted": 1, "rate": 0.1}
    trained = Trained(model=model, optimizer=optimizer, ema=ema, memory=memory, guard=guard)

    def go_on(trained: Trained, steps: range) -> None:
        for step in steps:
            train(trained.model, trained.optimizer, range(step, step + 1))
            trained.average()
            trained.memory.add(torch.full((3, 2), float(step)), torch.arange(3) + step)

    go_on(trained, range(3))
    Writer(tmp_path, trained).save(3, wait=True)
    go_on(trained, range(3, 6))
    other, its_optimizer = with_optimizer()
    again = Trained(model=other, optimizer=its_optimizer, memory=CrossBatchMemory(5))
    again.ema = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    latest(tmp_path).load_training(again)
    assert again.guard == guard
    go_on(again, range(3, 6))
    assert same(state_of(again.model), state_of(model))
    assert same(state_of(again.ema.module), state_of(ema.module))
    assert not same(state_of(ema.module), state_of(model))
    assert all(torch.equal(a, b) for a, b in zip(memory.contents(), again.memory.contents(), strict=True))


def test_the_average_is_what_is_judged(tmp_path):
    model, optimizer = with_optimizer()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(model)
    train(model, optimizer, range(3))
    ema.update_parameters(model)
    save(tmp_path, 3, model, optimizer, ema=ema)
    judged = small()
    latest(tmp_path).load_model(judged)
    assert same(state_of(judged), state_of(ema.module))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is written is what was there when it was asked for."""
    model, optimizer = with_optimizer()
    train(model, optimizer, range(2))
    weights, go = state_of(model), threading.Event()
    flush = checkpoint._flush

    def slow(path):
        assert go.wait(20)
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", slow)
    writer = Writer(tmp_path, Trained(model=model, optimizer=optimizer))
    writer.save(2)
    train(model, optimizer, range(2, 4))
    assert not (tmp_path / "latest").exists()
    go.set()
    writer.wait()
    restored = small()
    latest(tmp_path).load_model(restored)
    assert same(state_of(restored), weights)
    assert not same(state_of(model), weights)


def test_what_fails_behind_training_is_told_where_it_asks_next(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    writer = Writer(tmp_path, Trained(**dict(zip(("model", "optimizer"), with_optimizer(), strict=True))))
    writer.save(1)
    with pytest.raises(OSError, match="No space left"):
        writer.save(2)


def test_a_folder_that_was_moved_still_loads(saved):
    folder, model, _ = saved
    moved = folder.parent / "moved"
    shutil.move(folder, moved)
    restored = small()
    latest(moved).load_model(restored)
    assert same(state_of(restored), state_of(model))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        # two of the first layer, four of the norm and the weight of the next layer
        ({"width": 7}, "it has another shape of 0.bias (7 such)"),
        ({"layers": 2}, "it lacks 3.bias (2 such)"),
    ],
)
def test_another_architecture_is_named_and_nothing_is_loaded(saved, shape, message):
    folder, _, _ = saved
    other, optimizer = with_optimizer(**shape)
    before = state_of(other)
    found = latest(folder)
    said = refusal(load, found, other, optimizer)
    assert said == (
        f"checkpoint {folder}/step-00000003 is of another architecture: {message}; "
        "check model.trunk, model.head, model.embedding_size and model.head_batchnorm"
    )
    assert same(state_of(other), before)


def test_an_architecture_that_is_part_of_the_saved_one_is_refused(tmp_path):
    save(tmp_path, 1, *with_optimizer(layers=2))
    assert "it has unknown 3.bias (2 such)" in refusal(latest(tmp_path).load_model, small())


class Engine:
    """What of DeepSpeed's engine a checkpoint uses."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "part-of-rank-0.pt").write_text("state")

    def load_checkpoint(self, folder: str, tag: str) -> None:
        self.loaded = (Path(folder) / tag / "part-of-rank-0.pt").read_text()


def test_deepspeeds_own_files_are_saved_checked_and_loaded(tmp_path):
    model = small()
    save(tmp_path, 1, model, None, engine=Engine())
    restored, engine = small(), Engine()
    nn.init.zeros_(restored[0].weight)
    load(latest(tmp_path), restored, None, engine)
    assert engine.loaded == "state"
    assert same(state_of(restored), state_of(model))
    (tmp_path / "step-00000001" / "deepspeed" / "part-of-rank-0.pt").write_text("other")
    assert "deepspeed/part-of-rank-0.pt is missing or damaged" in refusal(latest, tmp_path)


class _Object:
    """Runs code where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_deepspeed_unpickles_no_objects(tmp_path):
    class Loads(Engine):
        def load_checkpoint(self, folder: str, tag: str) -> None:
            torch.load(tmp_path / "objects.pt", weights_only=False)  # as DeepSpeed does

    torch.save(_Object(tmp_path / "ran"), tmp_path / "objects.pt")
    found = save(tmp_path / "run", 1, small(), None, engine=Engine())
    said = refusal(load, found, small(), None, Loads())
    assert said == f"checkpoint {found.folder}: deepspeed holds objects, which could run code"
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "objects.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "elsewhere it is as it was"


def test_the_kind_of_training_must_be_the_same(saved, tmp_path):
    folder, model, optimizer = saved
    ddp = latest(folder)
    said = refusal(load, ddp, model, optimizer, Engine())
    assert said == f"checkpoint {ddp.folder} was written under DDP; it cannot be resumed with DeepSpeed"
    deepspeed = save(tmp_path / "other", 1, model, None, engine=Engine())
    said = refusal(load, deepspeed, model, optimizer)
    assert said == f"checkpoint {deepspeed.folder} was written under DeepSpeed; it cannot be resumed without DeepSpeed"


def test_deepspeed_needs_as_many_ranks_as_wrote_it(tmp_path):
    found = save(tmp_path, 1, small(), None, engine=Engine())
    path = found.folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world_size": 4}))
    said = refusal(load, found, small(), None, Engine())
    assert said == f"checkpoint {found.folder} was written by 4 DeepSpeed ranks; this run has 1"


class TestChosen:
    @pytest.fixture
    def folder(self, tmp_path):
        model, optimizer = with_optimizer()
        writer = Writer(tmp_path, Trained(model=model, optimizer=optimizer), keep=3)
        for step in (5, 10, 15):
            writer.save(step, wait=True, best=step == 10)
        return tmp_path

    @pytest.mark.parametrize(("which", "step"), [("latest", 15), ("best", 10), ("5", 5)])
    def test_it_is_found(self, folder, which, step):
        assert checkpoint.chosen(folder, which).step == step

    @pytest.mark.parametrize(
        ("which", "said"),
        [
            ("7", "{} has no checkpoint step-00000007; there are step-00000005, step-00000010, step-00000015"),
            ("newest", "checkpoint is 'newest'; allowed are latest, best and the number of a step"),
        ],
    )
    def test_what_is_not_there_is_refused(self, folder, which, said):
        with pytest.raises(ValueError, match=r".*") as refused:
            checkpoint.chosen(folder, which)
        assert str(refused.value) == said.format(folder)

    def test_no_best_one(self, folder):
        (folder / "best").unlink()
        with pytest.raises(ValueError, match=r"has no best checkpoint: train with run.best_metric"):
            checkpoint.chosen(folder, "best")

    def test_a_damaged_best_one_is_refused(self, folder):
        (folder / "step-00000010" / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"model.safetensors is missing or damaged"):
            checkpoint.chosen(folder, "best")
