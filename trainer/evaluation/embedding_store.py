"""Embeddings on disk: every picture of a split once, written by all ranks, gone on with where it was interrupted.

    embeddings.json   what was embedded with what, and how fast; `complete` is written last
    embeddings.npy    (n, d), float32 or float16, in the order of the samples
    identities.npy    labels, (n,), int64
    keys.txt          n lines
    done              while it is under way: a byte for each chunk, 1 where it is written

Which rank embeds which chunk follows from what is left and the number of ranks, which may be another each time. Batches are
always the same ones, so an embedding does not depend on the number of ranks nor on interruptions.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_shards.index import Split
from data_shards.loader import LoaderConfig, evaluation_loader
from data_shards.progress import progress
from data_shards.reader import keys_of
from data_shards.replacing import check_whole
from trainer.collectives import barrier, gather_objects, rank, world_size
from trainer.evaluation.embed import BATCH, Function, Pace, check_decoded, embeddings_of, evaluating, labels

MANIFEST, EMBEDDINGS, IDENTITIES, KEYS, _DONE = (
    "embeddings.json",
    "embeddings.npy",
    "identities.npy",
    "keys.txt",
    "done",
)
DTYPES: dict[str, Any] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
_CHUNK_BATCHES = 16
"""Batches between two syncs with the disk, at most: what an interruption costs each rank."""
_FEWEST_CHUNKS = 64
"""Chunks that a set is cut into, if it has so many batches, for ranks to share."""


@dataclass(frozen=True)
class Encoder:
    """What turns pictures into embeddings."""

    function: Function
    dimensions: int
    loader: LoaderConfig
    about: dict[str, Any]
    """What its embeddings depend on, JSON-able: name, weights, mirror …"""


class Stored(NamedTuple):
    embeddings: Tensor
    """Memory-mapped, float32 or float16, shape (n, d): all ranks of a machine share it."""
    identities: Tensor
    """int64, shape (n,)."""
    manifest: dict[str, Any]
    """With `images_per_s` and `data_wait_percent` of the last start that embedded something."""


def embed_to(
    folder: Path,
    encoder: Encoder,
    split: Split,
    *,
    fingerprint: str,
    samples: np.ndarray | None = None,
    dtype: str = "fp32",
    device: torch.device | str = "cpu",
    replace: bool = False,
) -> Stored:
    """Embeds what the folder lacks; every rank calls it.

    Args:
        folder: new, or what this function left there for the same pictures and encoder.
        fingerprint: of the pictures.
        samples: of the split, shape (n,); all where None.
        dtype: fp32 or fp16, of what is written.
        replace: deletes embeddings of something else in `folder`, which are refused otherwise.
    Raises:
        ValueError: on all ranks: `folder` holds something else; pictures do not decode; an embedding is not finite.
        OSError: on all ranks: it cannot be written.
    """
    wanted = _about(encoder, split, fingerprint, samples, dtype)
    _all_or_none(lambda: _begin(folder, wanted, split, samples, replace))
    manifest = json.loads((folder / MANIFEST).read_text())
    if not manifest.get("complete"):
        pace = _fill(folder, manifest, encoder, split, samples, device)
        images_per_s, waited = pace.of_all_ranks()
        pace_told = {"images_per_s": round(images_per_s, 2), "data_wait_percent": round(waited, 2)}
        _all_or_none(lambda: _finish(folder, manifest | pace_told))
    return read_embeddings(folder)


def read_embeddings(folder: Path) -> Stored:
    """
    Raises:
        ValueError: the folder has no complete embeddings.
    """
    manifest = _read_manifest(folder)
    if not manifest.get("complete"):
        raise ValueError(
            f"{folder} holds no whole embeddings: embed again into it, it goes on where it was interrupted"
        )
    try:  # mapped copy-on-write: never written to, and PyTorch wants it writable
        embeddings = np.load(folder / EMBEDDINGS, mmap_mode="c")
        identities = np.load(folder / IDENTITIES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({' '.join(str(error).split())}): delete it and embed again") from None
    shape = (manifest["samples"], manifest["dimensions"])
    for name, found, expected in ((EMBEDDINGS, embeddings, shape), (IDENTITIES, identities, shape[:1])):
        if found.shape != expected:
            raise ValueError(f"{folder / name} has shape {found.shape}, {MANIFEST} says {expected}: it is damaged")
    return Stored(torch.from_numpy(embeddings), torch.from_numpy(identities), manifest)


def is_whole(folder: Path) -> bool:
    """Whether `read_embeddings` would find something there."""
    return (folder / MANIFEST).is_file() and bool(_read_manifest(folder).get("complete"))


def folder_name(encoder: Encoder, split: Split, fingerprint: str, samples: np.ndarray | None, dtype: str) -> str:
    """A name of its own for everything that `embed_to` tells apart."""
    wanted = _about(encoder, split, fingerprint, samples, dtype)
    return f"{split.name}-{hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]}"


def _about(encoder: Encoder, split: Split, fingerprint: str, samples: np.ndarray | None, dtype: str) -> dict[str, Any]:
    count = len(split) if samples is None else len(samples)
    chosen = "all" if samples is None else hashlib.sha256(np.asarray(samples, "<i8").tobytes()).hexdigest()
    return {
        "format": "facescale-embeddings",
        "split": split.name,
        "pictures": fingerprint,
        "chosen": chosen,
        "samples": count,
        "dimensions": encoder.dimensions,
        "dtype": dtype,
        "image_size": encoder.loader.image_size,
        **encoder.about,
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    check_whole(folder)
    try:
        found = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{folder} holds no embeddings: it has no {MANIFEST}") from None
    except ValueError:
        raise ValueError(f"{path} is damaged: it is no JSON; delete {folder} and embed again") from None
    if not isinstance(found, dict) or found.get("format") != "facescale-embeddings":
        raise ValueError(f"{path} is not one of facescale's")
    return found


def _begin(folder: Path, wanted: dict[str, Any], split: Split, samples: np.ndarray | None, replace: bool) -> None:
    """Makes the files at their full size, unless they are there."""
    if (folder / MANIFEST).is_file():
        found = _read_manifest(folder)
        differs = [name for name in wanted if found.get(name) != wanted[name]]
        if not differs:
            return
        if not replace:
            name = differs[0]
            raise ValueError(f"{folder} holds other embeddings: {name} was {found.get(name)}, now it is {wanted[name]}")
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shape = (wanted["samples"], wanted["dimensions"])
    with (folder / EMBEDDINGS).open("wb") as file:
        first = _write_header(file, DTYPES[wanted["dtype"]], shape)
        os.posix_fallocate(file.fileno(), 0, first + shape[0] * shape[1] * DTYPES[wanted["dtype"]].itemsize)
    np.save(folder / IDENTITIES, labels(split, samples).numpy())
    with (folder / KEYS).open("w") as text:
        text.writelines(f"{key}\n" for key in keys_of(split, _ids(split, samples)))
    chunk = BATCH * min(_CHUNK_BATCHES, max(1, shape[0] // (BATCH * _FEWEST_CHUNKS)))
    (folder / _DONE).write_bytes(bytes(-(-shape[0] // chunk)))
    write_json(folder / MANIFEST, wanted | {"chunk": chunk, "first_byte": first, "complete": False})


def _ids(split: Split, samples: np.ndarray | None) -> np.ndarray:
    return np.arange(len(split)) if samples is None else np.asarray(samples, np.int64)


def _write_header(file: IO[bytes], dtype: Any, shape: tuple[int, int]) -> int:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return file.tell()


def _fill(
    folder: Path,
    manifest: dict[str, Any],
    encoder: Encoder,
    split: Split,
    samples: np.ndarray | None,
    device: torch.device | str,
) -> Pace:
    """Embeds this rank's share of the chunks that are not done."""
    ids = _ids(split, samples)
    barrier()  # no rank looks at what is done while another already writes
    left = np.flatnonzero(np.fromfile(folder / _DONE, np.uint8) == 0)
    barrier()
    mine, size, count = left[rank() :: world_size()], manifest["chunk"], manifest["samples"]
    rows = [(int(chunk) * size, min((int(chunk) + 1) * size, count)) for chunk in mine]
    chosen = np.concatenate([ids[begin:end] for begin, end in rows]) if rows else ids[:0]
    loader = evaluation_loader(split, encoder.loader, batch_size=BATCH, samples=chosen, device=device)
    pace = Pace()
    failure: Exception | None = None
    with evaluating(encoder.function), progress(f"embed {split.name}", count, enabled=rank() == 0) as advance:
        advance(min(count, count - len(left) * size))
        found = embeddings_of(encoder.function, loader, pace, advance)
        try:
            with _Writer(folder, manifest) as write:
                for chunk, (begin, end) in zip(mine, rows, strict=True):
                    parts = _rows(found, end - begin)
                    if loader.undecodable:
                        break
                    write(int(chunk), begin, parts.cpu())
        except OSError as error:
            failure = OSError(error.errno, error.strerror, str(folder / EMBEDDINGS))
        except ValueError as error:
            failure = error
    check_decoded(loader, split)
    _raise_first(failure)
    return pace


def _rows(found: Iterator[Tensor], count: int) -> Tensor:
    """So many embeddings, which end a batch."""
    parts: list[Tensor] = []
    while sum(len(part) for part in parts) < count:
        parts.append(next(found))
    return torch.cat(parts)  # (count, d)


class _Writer:
    """Writes chunks into place. Plain writes, not a memory map: a full disk then is an error and no signal."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder, self._manifest = folder, manifest

    def __enter__(self) -> "_Writer":
        self._data = os.open(self._folder / EMBEDDINGS, os.O_WRONLY)
        self._done = os.open(self._folder / _DONE, os.O_WRONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._data)
        os.close(self._done)

    def __call__(self, chunk: int, first: int, embeddings: Tensor) -> None:
        broken = int((~torch.isfinite(embeddings).all(1)).sum())
        if broken:
            raise ValueError(f"{broken} embeddings hold NaN or infinity; the weights have diverged or are damaged")
        rows = np.ascontiguousarray(embeddings.numpy(), DTYPES[self._manifest["dtype"]])
        row_bytes = rows.shape[1] * rows.itemsize
        view, at = rows.data.cast("B"), self._manifest["first_byte"] + first * row_bytes
        while view:
            written = os.pwrite(self._data, view, at)
            view, at = view[written:], at + written
        os.fdatasync(self._data)
        os.pwrite(self._done, b"\1", chunk)


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    left = int((np.fromfile(folder / _DONE, np.uint8) == 0).sum())
    assert not left, f"{left} chunks are missing"
    write_json(folder / MANIFEST, manifest | {"complete": True})
    (folder / _DONE).unlink()


def write_json(path: Path, manifest: Any) -> None:
    """Writes a small file, whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(manifest, indent=1) + "\n")
    aside.rename(path)


def _all_or_none(action: Any) -> None:
    """Rank 0 does something; what it fails with is raised on all ranks, which otherwise would wait for it."""
    failure: Exception | None = None
    if rank() == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            failure = error
    _raise_first(failure)


def _raise_first(failure: Exception | None) -> None:
    failures = [error for error in gather_objects(failure) if error is not None]
    if failures:
        raise failures[0]
