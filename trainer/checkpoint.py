"""Checkpoints: written aside, flushed and renamed; `latest` is changed last.

RUN/checkpoints/step-00000500/
    model.safetensors    weights
    optimizer.pt         optimiser state (DDP), read with weights_only=True
    deepspeed/           the engine's own files (DeepSpeed), one optimiser part a rank
    state.json           step, world size, fingerprint of the training pictures, SHA-256 of every other file
RUN/checkpoints/latest   name of the newest
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.collectives import barrier, rank, world_size
from trainer.model import read_state

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints in a run's folder."""

_MODEL, _OPTIMIZER, _ENGINE, _STATE, _LATEST = "model.safetensors", "optimizer.pt", "deepspeed", "state.json", "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint whose files were checked."""

    folder: Path
    step: int

    def check_shards(self, fingerprint: str) -> None:
        """Raises ValueError unless the checkpoint was trained on the training pictures with this fingerprint."""
        if json.loads((self.folder / _STATE).read_text()).get("shards") != fingerprint:
            raise ValueError(f"checkpoint {self.folder} was trained on other pictures than data.shards now holds")

    def load_model(self, model: nn.Module) -> None:
        """Puts the weights into an unwrapped model.

        Raises:
            ValueError: the checkpoint belongs to another architecture.
        """
        state = read_state(self.folder / _MODEL, "checkpoint")
        own = model.state_dict()
        missing, foreign = own.keys() - state.keys(), state.keys() - own.keys()
        shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        for what, names in (("lacks", missing), ("has unknown", foreign), ("has another shape of", shapes)):
            if names:
                raise ValueError(
                    f"checkpoint {self.folder} is of another architecture: it {what} {min(names)} "
                    f"({len(names)} such); check model.trunk, model.embedding_size and model.head_batchnorm"
                )
        model.load_state_dict(state)

    def load_training(self, model: nn.Module, optimizer: Any, engine: Any = None) -> None:
        """Puts weights and optimiser state back: of DeepSpeed's engine if there is one.

        Raises:
            ValueError: written by the other kind of training, or by DeepSpeed on another number of ranks.
        """
        if (self.folder / _ENGINE).is_dir() != (engine is not None):
            wrote, wants = ("DeepSpeed", "without") if engine is None else ("DDP", "with")
            raise ValueError(
                f"checkpoint {self.folder} was written under {wrote}; it cannot be resumed {wants} DeepSpeed"
            )
        self.load_model(model)
        if engine is None:
            optimizer.load_state_dict(torch.load(self.folder / _OPTIMIZER, map_location="cpu", weights_only=True))
            return
        wrote = json.loads((self.folder / _STATE).read_text())["world_size"]
        if wrote != world_size():
            raise ValueError(
                f"checkpoint {self.folder} was written by {wrote} DeepSpeed ranks; this run has {world_size()}"
            )
        engine.load_checkpoint(str(self.folder), tag=_ENGINE)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Any,
    *,
    engine: Any = None,
    keep: int = 2,
    shards: str = "",
) -> Checkpoint:
    """Writes a checkpoint; every rank calls it. Older ones beyond `keep` go only after the new one is complete.

    Args:
        folder: RUN/checkpoints.
        model: unwrapped.
        engine: DeepSpeed's engine, or None.
        shards: fingerprint of the training pictures.
    """
    final, aside = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    if engine is not None:
        engine.save_checkpoint(str(aside), tag=_ENGINE, save_latest=False)
        barrier()
    if rank() == 0:
        save_file(_contiguous(model.state_dict()), aside / _MODEL)
        if engine is None:
            torch.save(optimizer.state_dict(), aside / _OPTIMIZER)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        digests = {str(path.relative_to(aside)): _sha256(path) for path in files}
        state = {
            "step": step,
            "world_size": world_size(),
            "torch": torch.__version__,
            "shards": shards,
            "sha256": digests,
        }
        (aside / _STATE).write_text(json.dumps(state, indent=1))
        for path in [*files, aside / _STATE, aside]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _write_atomically(folder / _LATEST, final.name)
        for old in sorted(path for path in folder.glob("step-*") if path.name <= final.name)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return Checkpoint(final, step)


def latest(folder: Path) -> Checkpoint:
    """The newest checkpoint of RUN/checkpoints, its files checked against their checksums.

    Raises:
        ValueError: there is none, or a file is missing or has changed.
    """
    pointer = folder / _LATEST
    if not pointer.is_file():
        raise ValueError(f"{folder} has no checkpoint: train first")
    found = folder / pointer.read_text().strip()
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


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


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
