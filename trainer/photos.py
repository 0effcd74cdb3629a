"""A folder of photographs and their embeddings on disk: the gallery of `facescale search`.

embeddings.json   what was embedded with what; `complete` is written last
embeddings.npy    (n, d), float32, in the order of keys.txt
keys.txt          n paths below the folder of photographs
identities.npy    labels, (n,), int64: lines of identities.txt, from 0
identities.txt    names: the folder that a picture lies in, or its own name where it lies in none
skipped.csv       pictures that could not be read, and why
embeddings.raw, position.json   while it is under way
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.progress import progress
from data_shards.replacing import check_whole
from trainer.embedder import PhotoEmbedder
from trainer.evaluation.embedding_store import EMBEDDINGS, IDENTITIES, KEYS, MANIFEST, write_json
from trainer.network_inputs import pictures_in

FORMAT = "facescale-photos"
NAMES, SKIPPED = "identities.txt", "skipped.csv"
UNDER_WAY = _RAW, _POSITION = "embeddings.raw", "position.json"
"""Files that are there while pictures are embedded; a kill at the very end leaves them beside the finished ones."""
CHUNK = 1024
"""Pictures between two looks at the disk: what an interruption costs."""


@dataclass(frozen=True)
class Gallery:
    """Embeddings of photographs, with where they lie and whose they are."""

    photos: Path
    keys: Sequence[str]
    """Paths below `photos`."""
    names: Sequence[str]
    """Of the identities."""
    identities: NDArray[np.int64]
    """Of each picture, a position in `names`, shape (n,)."""
    embeddings: NDArray[np.float32]
    """Shape (n, d); memory-mapped where read from disk."""
    weights: str
    """SHA-256 of those of the network."""
    skipped: int = 0
    """Pictures that could not be read."""


def identity_of(key: str) -> str:
    """The folder that a picture lies in; its name without extension where it lies in none.

    Example: "anna/1.jpg" -> "anna", "team/anna/1.jpg" -> "team/anna", "anna.jpg" -> "anna".
    """
    path = Path(key)
    return path.stem if path.parent == Path() else path.parent.as_posix()


def embed_photos(photos: Path, out: Path, embedder: PhotoEmbedder) -> Gallery:
    """Embeds every picture below a folder into another; the same call again goes on where it was interrupted.

    Raises:
        ValueError: `photos` has no pictures, none of them can be read, or `out` holds something else.
        OSError: it cannot be written.
    """
    if not photos.is_dir():
        raise ValueError(f"{photos} is no folder of pictures")
    keys = [path.relative_to(photos).as_posix() for path in pictures_in(photos)]
    wanted = {
        "format": FORMAT,
        "photos": str(photos.absolute()),
        "pictures": _fingerprint(photos, keys),
        "dimensions": embedder.embedding_size,
        "image_size": embedder.image_size,
        "weights": embedder.weights,
    }
    begun = _begin(out, wanted)
    if not begun.get("complete"):
        _fill(photos, keys, out, embedder)
        _finish(out, wanted)
    for name in UNDER_WAY:
        (out / name).unlink(missing_ok=True)
    return read_gallery(out)


def gallery_of(photos: Path, embedder: PhotoEmbedder) -> Gallery:
    """The same in memory.

    Raises:
        ValueError: as `embed_photos`.
    """
    keys = [path.relative_to(photos).as_posix() for path in pictures_in(photos)]
    found, kept, skipped = [np.empty((0, embedder.embedding_size), np.float32)], list[str](), 0
    with progress("embed", len(keys)) as advance:
        for chunk in _chunks(keys, 0):
            found.append(embedder.embed([photos / key for key in chunk], errors="skip"))
            left_out = {skipped.position for skipped in embedder.skipped}
            kept += [key for position, key in enumerate(chunk) if position not in left_out]
            skipped += len(left_out)
            advance(len(chunk))
    if not kept:
        raise ValueError(f"none of the {len(keys):,} pictures in {photos} can be read")
    names, identities = _labels(kept)
    return Gallery(photos, kept, names, identities, np.concatenate(found), embedder.weights, skipped)


def is_gallery(folder: Path) -> bool:
    """Whether `embed_photos` made, or began, this folder."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def read_gallery(folder: Path) -> Gallery:
    """What `embed_photos` wrote.

    Raises:
        ValueError: it is not whole, or damaged.
    """
    check_whole(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} holds no embeddings of photographs: it has no {MANIFEST}") from None
    if manifest.get("format") != FORMAT or not manifest.get("complete"):
        raise ValueError(f"{folder} holds no whole embeddings of photographs: facescale embed PHOTOS {folder} goes on")
    try:
        keys, names = (_lines(folder / name) for name in (KEYS, NAMES))
        with (folder / SKIPPED).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            skipped = sum(1 for _ in csv.reader(file)) - 1
        embeddings, identities = np.load(folder / EMBEDDINGS, mmap_mode="r"), np.load(folder / IDENTITIES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({' '.join(str(error).split())}): delete it and embed again") from None
    if not len(keys) == len(embeddings) == len(identities) or embeddings.shape[1:] != (manifest["dimensions"],):
        raise ValueError(f"{folder} is damaged (its files are of different lengths): delete it and embed again")
    return Gallery(Path(manifest["photos"]), keys, names, identities, embeddings, manifest["weights"], skipped)


def _begin(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    if (out / MANIFEST).is_file():
        if not is_gallery(out):
            raise ValueError(f"{out} holds other embeddings; choose another folder")
        found: dict[str, Any] = json.loads((out / MANIFEST).read_text())
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(f"{out} holds other embeddings: {name} was {found.get(name)}, now it is {value}")
        return found
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MANIFEST, {**wanted, "complete": False})
    return {}


def _fill(photos: Path, keys: Sequence[str], out: Path, embedder: PhotoEmbedder) -> None:
    """Appends chunk by chunk; `position.json` says up to where the three files count."""
    files = (out / _RAW, out / KEYS, out / SKIPPED)
    done, sizes = 0, [0, 0, 0]
    if (out / _POSITION).is_file():
        done, sizes = json.loads((out / _POSITION).read_text())
    for path, size in zip(files, sizes, strict=True):
        with path.open("ab") as file:
            file.truncate(size)
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with files[0].open("ab") as raw, files[1].open("a", **text) as kept, files[2].open("a", **text) as left:
        table = csv.writer(left)
        if not done:
            table.writerow(["path", "reason"])
        with progress("embed", len(keys)) as advance:
            advance(done)
            for chunk in _chunks(keys, done):
                raw.write(embedder.embed([photos / key for key in chunk], errors="skip").data)
                reasons = {skipped.position: skipped.reason for skipped in embedder.skipped}
                table.writerows([key, reasons[position]] for position, key in enumerate(chunk) if position in reasons)
                kept.writelines(f"{key}\n" for position, key in enumerate(chunk) if position not in reasons)
                for file in (raw, kept, left):
                    file.flush()
                    os.fsync(file.fileno())
                done += len(chunk)
                write_json(out / _POSITION, [done, [path.stat().st_size for path in files]])
                advance(len(chunk))


def _finish(out: Path, wanted: dict[str, Any]) -> None:
    keys = _lines(out / KEYS)
    if not keys:
        shutil.rmtree(out)
        raise ValueError(f"none of the pictures in {wanted['photos']} can be read")
    names, identities = _labels(keys)
    (out / NAMES).write_bytes("".join(f"{name}\n" for name in names).encode(errors="surrogateescape"))
    np.save(out / IDENTITIES, identities)
    with (out / EMBEDDINGS).open("wb") as file, (out / _RAW).open("rb") as raw:
        shape = (len(keys), wanted["dimensions"])
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        shutil.copyfileobj(raw, file)
    write_json(out / MANIFEST, {**wanted, "samples": len(keys), "complete": True})


def _labels(keys: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the identities, sorted, and the label of each picture."""
    of_each = [identity_of(key) for key in keys]
    names = sorted(set(of_each))
    place = {name: label for label, name in enumerate(names)}
    return names, np.array([place[name] for name in of_each], np.int64)


def _fingerprint(photos: Path, keys: Sequence[str]) -> str:
    """Of names, sizes and times of the files."""
    found = hashlib.sha256()
    for key in keys:
        status = (photos / key).stat()
        found.update(f"{key}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def _chunks(keys: Sequence[str], done: int) -> Iterator[Sequence[str]]:
    yield from (keys[begin : begin + CHUNK] for begin in range(done, len(keys), CHUNK))


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode(errors="surrogateescape").splitlines()
