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


def save_for_ever(folder: str, start: int) -> None:
    """Weights of step n are all n."""
    trained = made()
    writer = Writer(Path(folder), trained, keep=1)
    for step in range(start, start + 1000):
        nn.init.constant_(trained.model.weight, step)
        writer.save(step, wait=True)
        Path(folder, "..", "saved").write_text(str(step))


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


def test_fifty_kills_inside_a_write(tmp_path):
    draw, folder, saved = random.Random(3), tmp_path / CHECKPOINTS, tmp_path / "saved"
    nn_step, inside = 0, 0
    for kill in range(50):
        process = _context.Process(target=save_for_ever, args=(str(folder), nn_step + 1))
        before = saved.read_text() if kill else ""
        process.start()
        until = time.monotonic() + 20
        while not saved.is_file() or saved.read_text() in ("", before) or not list(folder.glob(".step-*")):
            assert time.monotonic() < until
        time.sleep(draw.random() * 0.008)
        process.kill()
        process.join()
        inside += bool(list(folder.glob(".step-*")))
        nn_step = assert_whole(folder, at_least=int(saved.read_text() or 0))
    assert nn_step >= 50
    assert inside >= 15, "many of the kills hit a write"


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
