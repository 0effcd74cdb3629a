"""Takes identities out of embeddings on disk: those of a split (`facescale embed RUN`) and of photographs (`--network`)."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.commit import HashedFile
from data_shards.replacing import Replacement, finish_replacing
from trainer.evaluation.embedding_store import EMBEDDINGS, IDENTITIES, KEYS, MANIFEST, read_embeddings
from trainer.photos import NAMES, SKIPPED, UNDER_WAY, identity_of, is_gallery, read_gallery

_ROWS = 2**16


def check_embeddings(folder: Path) -> None:
    """Raises:
    ValueError: the folder has no whole embeddings.
    """
    finish_replacing(folder)
    if not is_gallery(folder):
        read_embeddings(folder)


def forget_embeddings(folder: Path, labels: Mapping[str, int]) -> int:
    """Deletes the rows of identities, atomically; returns how many. Names that the folder does not have are no error.

    Args:
        folder: written by `embed_to` or `embed_photos`.
        labels: of each name in the shards, as the rows of a split have them.
    Raises:
        ValueError: the folder has no whole embeddings.
    """
    check_embeddings(folder)
    gallery = read_gallery(folder) if is_gallery(folder) else None
    if gallery is not None:
        identities = gallery.identities
        gone = np.isin(identities, [label for label, name in enumerate(gallery.names) if name in labels])
    else:
        identities = read_embeddings(folder).identities.numpy()
        gone = np.isin(identities, list(labels.values()))
    left_out = gallery is not None and _skipped(folder, labels)[1]
    if not gone.any() and not left_out:
        return 0
    keys = (folder / KEYS).read_bytes().decode(errors="surrogateescape").splitlines()
    kept = [key for key, goes in zip(keys, gone, strict=True) if not goes]
    manifest = json.loads((folder / MANIFEST).read_text())
    with Replacement(folder, (folder / MANIFEST).stat().st_mode & 0o666) as aside:
        aside.put(KEYS, _text(kept))
        stored = np.load(folder / EMBEDDINGS, mmap_mode="r")
        aside.write(EMBEDDINGS, partial(_write_rows, stored, np.flatnonzero(~gone)))
        if gallery is not None:
            names = sorted({identity_of(key) for key in kept})
            place = {name: label for label, name in enumerate(names)}
            aside.put(NAMES, _text(names))
            aside.put(IDENTITIES, _npy(np.array([place[identity_of(key)] for key in kept], np.int64)))
            aside.put(SKIPPED, _skipped(folder, labels)[0])
            aside.delete(*UNDER_WAY)
        else:
            aside.put(IDENTITIES, _npy(identities[~gone]))
        aside.put(
            MANIFEST, json.dumps({**manifest, "samples": len(kept), "forgotten": True}, indent=1).encode() + b"\n"
        )
        aside.commit({})
    return int(gone.sum())


def _skipped(folder: Path, names: Mapping[str, int]) -> tuple[bytes, int]:
    """skipped.csv without the pictures of identities, and how many those are."""
    text = (folder / SKIPPED).read_bytes().decode(errors="surrogateescape")
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    kept = [row for row in rows if identity_of(row[0]) not in names]
    found = io.StringIO()
    csv.writer(found).writerows([head, *kept])
    return found.getvalue().encode(errors="surrogateescape"), len(rows) - len(kept)


def _text(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")


def _write_rows(stored: np.ndarray, rows: np.ndarray, file: HashedFile) -> None:
    """Some rows of a table as .npy, without holding them all."""
    head = io.BytesIO()
    shape = (len(rows), stored.shape[1])
    np.lib.format.write_array_header_1_0(head, {"descr": stored.dtype.str, "fortran_order": False, "shape": shape})
    file.write(head.getvalue())
    for begin in range(0, len(rows), _ROWS):
        file.write(stored[rows[begin : begin + _ROWS]].tobytes())


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
