"""What `facescale evaluate` leaves for `facescale report`: a folder with results.json, curves.npz and embeddings.npz."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from trainer.evaluation.protocols import SetResult

EVALUATION = "evaluation"
"""Name of the folder of results in a run's folder."""

UNSEEN_IDENTITIES = "unseen identities"
UNSEEN_IMAGES = "unseen images of training identities"
SETS = (UNSEEN_IDENTITIES, UNSEEN_IMAGES)
FACESCALE = "facescale"
RAW_PIXELS = "raw pixels"
EMBEDDERS = (FACESCALE, RAW_PIXELS)


@dataclass(frozen=True)
class ResultRow:
    """One embedder on one set."""

    set: str
    """UNSEEN_IDENTITIES or UNSEEN_IMAGES."""
    embedder: str
    """FACESCALE or RAW_PIXELS."""
    result: SetResult

    def __post_init__(self) -> None:
        for name, value, allowed in (("set", self.set, SETS), ("embedder", self.embedder, EMBEDDERS)):
            if value not in allowed:
                raise ValueError(f"a result's {name} is {value!r}; allowed are {', '.join(allowed)}")


@dataclass(frozen=True)
class Results:
    rows: list[ResultRow]
    embeddings: Tensor
    """Of the first row's set by the trained network, float32, shape (n, d)."""
    identities: Tensor
    """int64, shape (n,)."""


def save_results(folder: Path, rows: Sequence[ResultRow], embeddings: Tensor, identities: Tensor) -> None:
    """Writes the folder, replacing an earlier one once everything is written.

    Args:
        folder: RUN/evaluation.
        rows: results in the order in which the report shall list them.
        embeddings: of the first row's set by the trained network, shape (n, d).
        identities: shape (n,).
    """
    listed = [{"set": row.set, "embedder": row.embedder} | row.result.scalars for row in rows]
    curves = {f"{number}.{name}": curve for number, row in enumerate(rows) for name, curve in row.result.curves.items()}
    with replaced_folder(folder) as partial:
        (partial / "results.json").write_text(json.dumps(listed, indent=1, allow_nan=False) + "\n")
        np.savez_compressed(partial / "curves.npz", allow_pickle=False, **curves)
        faces = {"embeddings": embeddings.cpu().float().numpy(), "identities": identities.cpu().numpy()}
        np.savez_compressed(partial / "embeddings.npz", allow_pickle=False, **faces)


def load_results(folder: Path) -> Results:
    """Reads what `save_results` wrote.

    Raises:
        ValueError: the folder is missing or damaged.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run `facescale evaluate {folder.parent}` first")
    try:
        listed = json.loads(path.read_text())
        with np.load(folder / "curves.npz", allow_pickle=False) as stored:
            curves = {name: stored[name] for name in stored.files}
        with np.load(folder / "embeddings.npz", allow_pickle=False) as stored:
            embeddings, identities = torch.from_numpy(stored["embeddings"]), torch.from_numpy(stored["identities"])
        rows = [_row(number, entry, curves) for number, entry in enumerate(listed)]
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is damaged ({reason}); run `facescale evaluate {folder.parent}` again") from None
    if not rows:
        raise ValueError(f"{path} holds no result; run `facescale evaluate {folder.parent}` again")
    return Results(rows, embeddings, identities)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` only when the block ends without an error."""
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _row(number: int, entry: dict[str, object], curves: dict[str, np.ndarray]) -> ResultRow:
    own = {name.split(".", 1)[1]: curve for name, curve in curves.items() if name.startswith(f"{number}.")}
    scalars = {name: value for name, value in entry.items() if name not in ("set", "embedder")}
    return ResultRow(str(entry["set"]), str(entry["embedder"]), SetResult(scalars, own))
