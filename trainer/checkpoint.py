"""Checkpoints: written aside, flushed and renamed; `latest` is changed last, and only then do older ones go.

RUN/checkpoints/step-00000500/
    model.safetensors    weights
    ema.safetensors      their moving average, where there is one
    memory.safetensors   the cross-batch memory, where there is one
    centres-00000-of-00003.safetensors    class centres of the margin softmax, where there are some: one file a rank
    optimizer.pt         optimiser state (DDP), read with weights_only=True
    deepspeed/           the engine's own files (DeepSpeed), one optimiser part a rank
    config.yaml          settings of the run
    state.json           step, world size, fingerprint of the training pictures, collapse guard, SHA-256 of every other file
RUN/checkpoints/latest   name of the newest
RUN/checkpoints/best     name of the one that was best on held-out identities, where training chooses one (`run.best_metric`)

Everything else that a step depends on follows from the settings and the step's number: the position in the plan, augmentation,
the learning rate, random numbers. There is no loss scaler: bf16 has the range of float32.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.serialization import safe_globals

from trainer.centres import Centres, slice_of
from trainer.collectives import barrier, rank, world_size
from trainer.config import CONFIG
from trainer.metric.memory import CrossBatchMemory
from trainer.model import read_state

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run's folder."""

_MODEL, _EMA, _MEMORY = "model.safetensors", "ema.safetensors", "memory.safetensors"
_OPTIMIZER, _ENGINE, _STATE = "optimizer.pt", "deepspeed", "state.json"
LATEST, BEST = "latest", "best"
"""Names of the files in it that name the newest and the best."""


_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(kw_only=True)
class Trained:
    """Everything that training changes."""

    model: nn.Module
    """Unwrapped."""
    optimizer: Any
    engine: Any = None
    """DeepSpeed's engine, or None."""
    ema: AveragedModel | None = None
    """Moving average of the model."""
    memory: CrossBatchMemory = field(default_factory=lambda: CrossBatchMemory(0))
    centres: Centres | None = None
    """Class centres of the margin softmax: this rank's."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the collapse guard has done."""

    def average(self) -> None:
        """Brings the moving average up to date, where there is one."""
        if self.ema is not None:
            self.ema.update_parameters(self.model)


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint whose files were checked."""

    folder: Path
    step: int

    def check_shards(self, fingerprint: str) -> None:
        """Raises ValueError unless the checkpoint was trained on the training pictures with this fingerprint."""
        if self._state().get("shards") != fingerprint:
            raise ValueError(f"checkpoint {self.folder} was trained on other pictures than data.shards now holds")

    @property
    def weights_sha256(self) -> str:
        """Of the weights that `load_model` takes by default."""
        digests = self._state()["sha256"]
        found: str = digests.get(_EMA) or digests[_MODEL]
        return found

    def load_model(self, model: nn.Module, averaged: bool = True) -> None:
        """Puts the weights into an unwrapped model: where there is a moving average of them and `averaged`, that.

        Raises:
            ValueError: the checkpoint belongs to another architecture.
        """
        name = _EMA if averaged and (self.folder / _EMA).is_file() else _MODEL
        state = read_state(self.folder / name, "checkpoint")
        own = model.state_dict()
        missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
        shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        for what, names in (("lacks", missing), ("has unknown", foreign), ("has another shape of", shapes)):
            if names:
                raise ValueError(
                    f"checkpoint {self.folder} is of another architecture: it {what} {min(names)} "
                    f"({len(names)} such); check model.trunk, model.head, model.embedding_size and model.head_batchnorm"
                )
        model.load_state_dict(state)

    def load_training(self, trained: Trained) -> None:
        """Puts back everything that training had changed: weights and optimiser state of DeepSpeed's engine, if there is one.

        Raises:
            ValueError: written by the other kind of training, by DeepSpeed on another number of ranks, or not by DeepSpeed; or it
                lacks class centres.
        """
        state, engine = self._state(), trained.engine
        if (self.folder / _ENGINE).is_dir() != (engine is not None):
            wrote, wants = ("DeepSpeed", "without") if engine is None else ("DDP", "with")
            raise ValueError(
                f"checkpoint {self.folder} was written under {wrote}; it cannot be resumed {wants} DeepSpeed"
            )
        self.load_model(trained.model, averaged=False)
        if trained.ema is not None:
            self.load_model(trained.ema.module)
            trained.ema.n_averaged.fill_(1)  # not the first: that one copies
        if (self.folder / _MEMORY).is_file():
            device = next(trained.model.parameters()).device
            trained.memory.load(load_file(self.folder / _MEMORY), device)
        if trained.centres is not None:
            self.load_centres(trained.centres)
        trained.guard.update(state["guard"])
        if engine is None:
            found = torch.load(self.folder / _OPTIMIZER, map_location="cpu", weights_only=True)
            trained.optimizer.load_state_dict(found)
            return
        if state["world_size"] != world_size():
            raise ValueError(
                f"checkpoint {self.folder} was written by {state['world_size']} DeepSpeed ranks; this run has {world_size()}"
            )
        try:
            with _tensors_alone():
                engine.load_checkpoint(str(self.folder), tag=_ENGINE)
        except UnpicklingError:
            raise ValueError(f"checkpoint {self.folder}: {_ENGINE} holds objects, which could run code") from None

    def load_centres(self, centres: Centres) -> None:
        """This rank's slice out of the files of the ranks that wrote them, whatever their number.

        Raises:
            ValueError: there are none, or they are of other identities.
        """
        writers = self._state()["world_size"]
        paths = [self.folder / _centres(number, writers) for number in range(writers)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(
                f"checkpoint {self.folder} has no class centres ({missing[0]}): it was trained without softmax.kind"
            )
        bounds = [slice_of(centres.total, number, writers) for number in range(writers)]

        def rows(name: str, first: int, stop: int) -> Tensor:
            parts = []
            for path, (begin, end) in zip(paths, bounds, strict=True):
                with safe_open(path, "pt") as file:
                    part = file.get_slice(name)
                    if part.get_shape() != [end - begin, centres.values.shape[1]]:
                        raise ValueError(f"checkpoint {self.folder}: {path.name} holds centres of other identities")
                    if (low := max(first, begin)) < (high := min(stop, end)):
                        parts.append(part[low - begin : high - begin])
            return torch.cat(parts) if parts else torch.empty(0, centres.values.shape[1])

        centres.load(rows, load_file(paths[0])["norms"])

    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / _STATE).read_text())
        return found


class Writer:
    """Writes the checkpoints of a run. Without DeepSpeed rank 0 does it in a thread, on a copy, while training goes on.

    Args:
        folder: RUN/checkpoints.
        keep: newest checkpoints that stay.
        shards: fingerprint of the training pictures.
    """

    def __init__(self, folder: Path, trained: Trained, *, keep: int = 2, shards: str = "") -> None:
        self._folder, self._trained, self._keep, self._shards = folder, trained, keep, shards
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, wait: bool = False, best: bool = False) -> None:
        """Every rank calls it; the checkpoint is there when `wait` returns.

        Args:
            best: it is the best so far, and stays until there is a better one.
        Raises:
            OSError: this checkpoint or, without `wait`, the one before could not be written.
        """
        self.wait()
        if self._trained.centres is not None or self._trained.engine is not None:
            self._save_parts(step, self._trained.centres)
        if self._trained.engine is not None:
            self._save_engine(step, best)
        elif rank() == 0:
            tensors, optimizer = self._copies()
            arguments = (step, tensors, optimizer, self._state(step), best)
            self._thread = threading.Thread(target=self._try_write, args=arguments, name="checkpoint")
            self._thread.start()
        if wait:
            self.wait()
            barrier()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copies(self) -> tuple[dict[str, dict[str, Tensor]], Any]:
        trained = self._trained
        tensors = {_MODEL: _copied(trained.model.state_dict())}
        if trained.ema is not None:
            tensors[_EMA] = _copied(trained.ema.module.state_dict())
        if memory := trained.memory.state():
            tensors[_MEMORY] = _copied(memory)
        return tensors, None if trained.engine is not None else _copied(trained.optimizer.state_dict())

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "world_size": world_size(),
            "torch": torch.__version__,
            "shards": self._shards,
            "guard": dict(self._trained.guard),
        }

    def _try_write(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # raised where training asks next
            self._error = error

    def _save_parts(self, step: int, centres: Centres | None) -> None:
        """Begins the folder with what each rank writes itself."""
        aside = self._aside(step)
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        barrier()
        if centres is not None:
            save_file(_copied(centres.state()), aside / _centres(rank(), world_size()))
            barrier()

    def _save_engine(self, step: int, best: bool) -> None:
        aside = self._aside(step)
        self._trained.engine.save_checkpoint(str(aside), tag=_ENGINE, save_latest=False)
        barrier()
        if rank() == 0:
            tensors, _ = self._copies()
            self._write(step, tensors, None, self._state(step), best)
        barrier()

    def _write(
        self, step: int, tensors: dict[str, dict[str, Tensor]], optimizer: Any, state: dict[str, Any], best: bool
    ) -> None:
        aside, final = self._aside(step), self._folder / _name(step)
        if optimizer is not None:
            if self._trained.centres is None:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            torch.save(optimizer, aside / _OPTIMIZER)
        if (self._folder.parent / CONFIG).is_file():
            shutil.copyfile(self._folder.parent / CONFIG, aside / CONFIG)
        for name, values in tensors.items():
            save_file({key: value.contiguous() for key, value in values.items()}, aside / name)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        state["sha256"] = {str(path.relative_to(aside)): _sha256(path) for path in files}
        (aside / _STATE).write_text(json.dumps(state, indent=1))
        for path in [*files, aside / _STATE, aside]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _write_atomically(self._folder / LATEST, final.name)
        if best:
            _write_atomically(self._folder / BEST, final.name)
        for old in _folders(self._folder, newest=final.name)[self._keep :]:
            if old.name != _named(self._folder / BEST):
                shutil.rmtree(old)
        for interrupted in self._folder.glob(".step-*.partial"):
            shutil.rmtree(interrupted)

    def _aside(self, step: int) -> Path:
        return self._folder / f".{_name(step)}.partial"


def latest(folder: Path) -> Checkpoint:
    """The newest checkpoint of RUN/checkpoints whose files match their checksums; says so where that is not the very newest.

    Raises:
        ValueError: there is none.
    """
    pointer = folder / LATEST
    if not pointer.is_file():
        raise ValueError(f"{folder} has no checkpoint: train first")
    newest = pointer.read_text().strip()
    damages = []
    if not (folder / newest / _STATE).is_file() or not newest:
        damages.append(f"checkpoint {folder / newest} cannot be read: it has no {_STATE}")
    for found in _folders(folder, newest or "step-9"):
        try:
            checkpoint = _checked(found)
        except ValueError as error:
            damages.append(str(error))
            continue
        if damages and rank() == 0:
            print(f"facescale: {damages[0]}; taking step {checkpoint.step} instead", file=sys.stderr)
        return checkpoint
    raise ValueError(f"{damages[0]}; there is no older one that is whole")


def chosen(folder: Path, which: str) -> Checkpoint:
    """A checkpoint of RUN/checkpoints: "latest", "best", or the one of a step, such as "500".

    Raises:
        ValueError: there is no such checkpoint, or it is damaged; of damaged newest ones the one before is taken.
    """
    if which == LATEST:
        return latest(folder)
    if which == BEST:
        name = _named(folder / BEST)
        if not name:
            raise ValueError(f"{folder} has no best checkpoint: train with run.best_metric and run.evaluate_every")
    elif which.isdigit():
        name = _name(int(which))
    else:
        raise ValueError(f"checkpoint is {which!r}; allowed are {LATEST}, {BEST} and the number of a step")
    if not (folder / name).is_dir():
        there = ", ".join(path.name for path in reversed(_folders(folder, "step-9"))) or "none"
        raise ValueError(f"{folder} has no checkpoint {name}; there are {there}")
    return _checked(folder / name)


def at(folder: Path) -> Checkpoint:
    """The checkpoint that is this folder.

    Raises:
        ValueError: it is none, or it is damaged.
    """
    return _checked(folder)


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder looks like a checkpoint."""
    return (folder / _STATE).is_file() and (folder / _MODEL).is_file()


def _named(pointer: Path) -> str:
    return pointer.read_text().strip() if pointer.is_file() else ""


def _centres(rank: int, world_size: int) -> str:
    return f"centres-{rank:05d}-of-{world_size:05d}.safetensors"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _folders(folder: Path, newest: str) -> list[Path]:
    """Checkpoints up to the newest, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.name <= newest), reverse=True)


def _checked(found: Path) -> Checkpoint:
    """Raises ValueError where a file of the checkpoint is missing or has changed."""
    try:
        state = json.loads((found / _STATE).read_text())
        step, digests = int(state["step"]), dict(state["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {found} cannot be read: {_STATE}: {type(error).__name__} {error}") from None
    for name, expected in digests.items():
        path = found / name
        if not path.is_file() or _sha256(path) != expected:
            raise ValueError(f"checkpoint {found}: {name} is missing or damaged (its SHA-256 differs from {_STATE})")
    return Checkpoint(found, step)


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """DeepSpeed asks `torch.load` for any object, which could run code; inside, it gets tensors and three classes of its own."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[_WEIGHTS_ONLY]
        if before is not None:
            os.environ[_WEIGHTS_ONLY] = before


def _copied(value: Any) -> Any:
    """A copy on the CPU of tensors in nested containers, in the same memory format: fused optimisers take their state's and the
    weights' numbers in the order in which they lie."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    _flush(aside)
    aside.rename(path)
    _flush(path.parent)
