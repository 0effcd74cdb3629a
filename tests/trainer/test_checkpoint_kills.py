"""SIGKILL inside a checkpoint's write: what `latest` finds is whole, whatever was interrupted, even where one is kept."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer import checkpoint
from trainer.checkpoint import CHECKPOINTS, Trained, Writer, latest

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["trainer.checkpoint"])
POINTS = ("mkdir", "save", "save_file", "_sha256", "_flush", "rename", "_write_atomically", "rmtree")


def made() -> Trained:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    return Trained(model=model, optimizer=optimizer)


def save_and_die_at(folder: str, step: int, point: str, call: int) -> None:
    """Kills itself at the so-many-th call of a function that writing a checkpoint uses."""
    calls = [0]

    def wrapped(function):
        def counted(*args, **more):
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **more)

        return counted

    if point in ("mkdir", "rename"):
        setattr(Path, point, wrapped(getattr(Path, point)))
    elif point == "rmtree":
        checkpoint.shutil.rmtree = wrapped(checkpoint.shutil.rmtree)
    elif point == "save":
        checkpoint.torch.save = wrapped(checkpoint.torch.save)
    else:
        setattr(checkpoint, point, wrapped(getattr(checkpoint, point)))
    trained = made()
    nn.init.constant_(trained.model.weight, step)
    Writer(Path(folder), trained, keep=1).save(step, wait=True)


def assert_whole(folder: Path, at_least: int) -> int:
    found, model = latest(folder), nn.Linear(300, 300)
    found.load_model(model)
    assert model.weight.unique().tolist() == [found.step]
    found.load_training(made())
    assert found.step >= at_least
    return found.step


def save_one_more(folder: str, step: int, begun: str) -> None:
    """Saves in a process that has everything loaded, so that it is killed in the write and not before it."""
    trained = made()
    nn.init.constant_(trained.model.weight, step)
    Path(begun).touch()
    Writer(Path(folder), trained, keep=1).save(step, wait=True)
    Path(begun).unlink()
    time.sleep(60)


def test_fifty_kills_inside_a_write(tmp_path):
    """Each between the first and the last thing that a write does."""
    draw, folder, begun = random.Random(3), tmp_path / CHECKPOINTS, tmp_path / "begun"
    trained = made()
    nn.init.constant_(trained.model.weight, 1)
    Writer(folder, trained, keep=1).save(1, wait=True)
    step, inside, half_written = 1, 0, 0
    for _ in range(500):
        process = _context.Process(target=save_one_more, args=(str(folder), step + 1, str(begun)))
        process.start()
        until = time.monotonic() + 60
        while not begun.is_file():
            assert time.monotonic() < until
        time.sleep(draw.random() * 0.012)
        process.kill()
        process.join()
        inside += begun.is_file()
        half_written += bool(list(folder.glob(".step-*")))
        begun.unlink(missing_ok=True)
        step = assert_whole(folder, at_least=step)
        if inside == 50:
            break
    assert inside == 50
    assert half_written >= 15, "many of the kills left something half written"


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_call_that_writing_makes(tmp_path, point):
    """Until it gets through: then that point is behind it."""
    folder = tmp_path / CHECKPOINTS
    trained = made()
    nn.init.constant_(trained.model.weight, 1)
    Writer(folder, trained, keep=1).save(1, wait=True)
    for call in range(1, 40):
        before = latest(folder).step
        process = _context.Process(target=save_and_die_at, args=(str(folder), before + 1, point, call))
        process.start()
        process.join()
        step = assert_whole(folder, at_least=before)
        assert list(folder.glob("step-*")), "one is there"
        if process.exitcode == 0:
            assert step == before + 1
            assert [path.name for path in sorted(folder.iterdir())] == ["latest", f"step-{step:08d}"]
            assert call > 1, "it is called at all"
            return
        assert process.exitcode == -signal.SIGKILL
    raise AssertionError(f"{point} is called more than 40 times")
