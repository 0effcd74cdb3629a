"""What `facescale evaluate` leaves for `facescale report`.

A folder with results.json, curves.npz, embeddings.npz and, where the samples' split was given, examples.json and thumbnails/.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from data_shards.index import Split
from trainer.evaluation.examples import Examples, find_examples, shown_samples
from trainer.evaluation.protocols import SetResult
from trainer.evaluation.thumbnails import thumbnails

EVALUATION = "evaluation"
"""Name of the folder of results in a run's folder."""

UNSEEN_IDENTITIES = "unseen identities"
UNSEEN_IMAGES = "unseen images of training identities"
SETS = (UNSEEN_IDENTITIES, UNSEEN_IMAGES)
"""What shards hold out. Any other name may be a set, too."""
FACESCALE = "facescale"
RAW_PIXELS = "raw pixels"
EMBEDDERS = (FACESCALE, RAW_PIXELS)


Names = Mapping[int, str] | Sequence[str]


@dataclass(frozen=True)
class ResultRow:
    """One embedder on one set."""

    set: str
    """Name of the set, such as UNSEEN_IDENTITIES or "LFW"."""
    embedder: str
    """FACESCALE or RAW_PIXELS."""
    result: SetResult

    def __post_init__(self) -> None:
        if not self.set.strip():
            raise ValueError("a result's set has no name")
        if self.embedder not in EMBEDDERS:
            raise ValueError(f"a result's embedder is {self.embedder!r}; allowed are {', '.join(EMBEDDERS)}")


@dataclass(frozen=True)
class Results:
    rows: list[ResultRow]
    embeddings: Tensor | None
    """Of the first set that has any, by the trained network, float32, shape (n, d)."""
    identities: Tensor | None
    """int64, shape (n,)."""
    examples: Examples | None = None
    names: dict[int, str] = field(default_factory=dict)
    """Of identities, by their label."""
    keys: dict[int, str] = field(default_factory=dict)
    """Of the samples that the report shows, by their position among the embeddings."""
    thumbnails: dict[int, bytes] = field(default_factory=dict)
    """Of the same samples: JPEG."""


def save_results(
    folder: Path,
    rows: Sequence[ResultRow],
    embeddings: Tensor | None,
    identities: Tensor | None,
    *,
    split: Split | None = None,
    samples: np.ndarray | None = None,
    names: Names | None = None,
) -> None:
    """Writes the folder, replacing an earlier one once everything is written.

    Args:
        folder: RUN/evaluation.
        rows: results in the order in which the report shall list them.
        embeddings: of the first row's set by the trained network, shape (n, d); None where no set has any.
        identities: shape (n,).
        split: where the embedded samples lie; with it examples and thumbnails are written, too.
        samples: rows of the split that were embedded, shape (n,); all of them where None.
        names: of the identities, by label.
    Raises:
        ValueError: not as many samples as embeddings.
    """
    listed = [{"set": row.set, "embedder": row.embedder} | row.result.scalars for row in rows]
    curves = {f"{number}.{name}": curve for number, row in enumerate(rows) for name, curve in row.result.curves.items()}
    with replaced_folder(folder) as partial:
        (partial / "results.json").write_text(json.dumps(listed, indent=1, allow_nan=False) + "\n")
        np.savez_compressed(partial / "curves.npz", allow_pickle=False, **curves)
        if embeddings is None or identities is None:
            return
        faces = {"embeddings": embeddings.cpu().float().numpy(), "identities": identities.cpu().numpy()}
        np.savez_compressed(partial / "embeddings.npz", allow_pickle=False, **faces)
        if split is not None:
            places = np.arange(len(split)) if samples is None else samples
            _save_examples(partial, rows, embeddings.cpu(), identities.cpu(), split, places, names)


def _save_examples(
    folder: Path,
    rows: Sequence[ResultRow],
    embeddings: Tensor,
    identities: Tensor,
    split: Split,
    samples: np.ndarray,
    names: Names | None,
) -> None:
    if len(samples) != len(embeddings):
        raise ValueError(f"{len(samples)} samples of the split and {len(embeddings)} embeddings; they must be as many")
    examples = find_examples(embeddings, identities)
    shown = sorted(examples.positions() | set(shown_samples(identities.numpy()).tolist()))
    labels = set(identities.tolist()).union(*(row.result.curves.get("identity_labels", ()) for row in rows))
    found = {
        "examples": examples.as_json(),
        "names": {int(label): _name(names, int(label)) for label in sorted(labels)} if names is not None else {},
        "keys": {place: split.key(int(samples[place])) for place in shown},
    }
    (folder / "examples.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    (folder / "thumbnails").mkdir()
    for place, picture in zip(shown, thumbnails(split, samples[shown]), strict=True):
        if picture is not None:
            (folder / "thumbnails" / f"{place}.jpg").write_bytes(picture)


def _name(names: Names, label: int) -> str:
    if isinstance(names, Mapping):
        return names.get(label, str(label))
    return names[label] if 0 <= label < len(names) else str(label)


def load_results(folder: Path) -> Results:
    """Reads what `save_results` wrote, or an earlier version of it, which wrote no examples.

    Raises:
        ValueError: the folder is missing or damaged.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run `facescale evaluate {folder.parent}` first")
    try:
        listed = json.loads(path.read_text())
        curves = _arrays(folder / "curves.npz")
        faces = {
            name: torch.from_numpy(array) for name, array in _arrays(folder / "embeddings.npz", needed=False).items()
        }
        rows = [_row(number, entry, curves) for number, entry in enumerate(listed)]
        if "embeddings" in faces and len(faces["embeddings"]) == 0:
            faces = {}
        results = Results(rows, faces.get("embeddings"), faces.get("identities"), **_examples(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadZipFile) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is damaged ({reason}); run `facescale evaluate {folder.parent}` again") from None
    if not rows:
        raise ValueError(f"{path} holds no result; run `facescale evaluate {folder.parent}` again")
    return results


def _arrays(path: Path, needed: bool = True) -> dict[str, np.ndarray]:
    if not needed and not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _examples(folder: Path) -> dict[str, Any]:
    path = folder / "examples.json"
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    pictures = {int(file.stem): file.read_bytes() for file in sorted((folder / "thumbnails").glob("*.jpg"))}
    named = {field: {int(key): str(value) for key, value in found[field].items()} for field in ("names", "keys")}
    return {"examples": Examples.from_json(found["examples"]), "thumbnails": pictures, **named}


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


def thresholds_of(scalars: Mapping[str, Any]) -> dict[str, float]:
    """Root L2 distances in [0, 2] up to which a pair counts as one identity: `verification`, which divided pairs best, and
    `far_0.001` and the like, at that false-accept rate. Of a similarity s that is sqrt(2 - 2 s)."""
    found = {"verification": scalars.get("verification_threshold")}
    for point in scalars.get("tar_at_far") or ():
        if point.get("threshold") is not None:
            found[f"far_{point['target']:g}"] = max(0.0, 2 - 2 * point["threshold"]) ** 0.5
    return {name: round(float(value), 6) for name, value in found.items() if value is not None}
