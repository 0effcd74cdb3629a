"""Boxes and landmarks of faces out of CSV files, looked up by picture; memory-mapped, so that processes share them."""

import csv
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_shards.files import open_file
from data_shards.sources.base import EXTENSIONS

Kind = Literal["box", "landmarks"]

NAME_COLUMN = "NAME_ID"
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "box": ("X", "Y", "W", "H"),
    "landmarks": tuple(f"P{point}{axis}" for point in range(1, 6) for axis in "XY"),
}
"""As in VGGFace2's loose_bb_train.csv and loose_landmark_train.csv, found by header in any case and order. Pixels, x to the
right, y down; a box may stick out of its picture. Landmarks: the eye on the picture's left, the other, the nose, the
corners of the mouth."""

_USUAL = {"box": "VGGFace2's loose_bb_train.csv", "landmarks": "VGGFace2's loose_landmark_train.csv"}
_EXTENSION = rf"(?i)\.({'|'.join(suffix[1:] for suffix in EXTENSIONS)})$"
_LAST_TWO_PARTS = r"(?s)^.*/([^/]*/[^/]*)$"
_HEADER_BYTES = 65_536
_BLOCK_BYTES = 4 * 2**20
_ROWS_AT_ONCE = 2**18


@dataclass(frozen=True)
class Regions:
    """Where the face is in each picture."""

    kind: Kind
    keys: NDArray[np.uint64]
    """Sorted hashes of "identity/stem", shape (n,)."""
    values: NDArray[np.float32]
    """In `COLUMNS`' order, shape (n, 4) or (n, 10); a row that makes no sense is NaN."""

    @classmethod
    def open(cls, folder: Path, kind: Kind) -> "Regions":
        """What `build_regions` has left in a folder, memory-mapped.

        Raises:
            ValueError: it is not there, or not whole.
        """
        try:
            keys, values = (np.load(path, mmap_mode="r") for path in _paths(folder, kind))
        except (OSError, ValueError) as error:
            raise ValueError(f"regions in {folder} cannot be opened: {error}") from None
        if values.shape != (len(keys), len(COLUMNS[kind])):
            raise ValueError(f"regions in {folder} are damaged: {len(keys)} keys, values of shape {values.shape}")
        return cls(kind, keys, values)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, identity: str, stem: str) -> NDArray[np.float32] | None:
        """x, y, width, height of the face's box, or its five landmarks; None where no file names the picture.

        Args:
            stem: the picture's name without extension.
        Raises:
            ValueError: a file names it, but with a box of no size, or with what is no number.
        """
        key = _hashes([f"{identity}/{stem}".encode("utf-8", "surrogateescape")])[0]
        row = int(np.searchsorted(self.keys, key))
        if row == len(self.keys) or self.keys[row] != key:
            return None
        found = np.array(self.values[row])
        if np.isnan(found[0]):
            raise ValueError("has no usable box" if self.kind == "box" else "has no usable landmarks")
        return found


def build_regions(files: Sequence[str | Path], kind: Kind, folder: Path) -> Regions:
    """Reads regions out of CSV files, here or at a URL, into a folder, as two .npy files.

    A picture is named `identity/image`, with or without extension and folders before it; the same again with the same
    values does no harm. A row that makes no sense costs its own picture only.

    Raises:
        ValueError: a file cannot be read, is no CSV file with these columns, or gives a picture another region than before.
    """
    assert files
    folder.mkdir(parents=True, exist_ok=True)
    batches = list(itertools.chain.from_iterable(_batches(file, kind) for file in files))
    keys = np.concatenate([_hashes(batch.names.to_pylist()) for batch in batches])
    values = np.concatenate([batch.values for batch in batches])
    order = np.argsort(keys, kind="stable")
    first = _first_of_each(keys[order])
    _refuse_contradictions(batches, kind, keys, values, order)
    kept = order[first]
    key_path, value_path = _paths(folder, kind)
    np.save(key_path, keys[kept])
    _save_rows(value_path, values, kept)
    return Regions.open(folder, kind)


@dataclass(frozen=True)
class _Batch:
    """Some rows of one file."""

    file: str
    start: int
    """Rows of the file before it."""
    names: Any
    """pyarrow array of "identity/stem" as bytes."""
    values: NDArray[np.float32]


def _batches(file: str | Path, kind: Kind) -> Iterator[_Batch]:
    import pyarrow as pa

    label, start = f"regions {os.fspath(file)}", 0
    try:
        for table in _tables(file, kind, label):
            values = np.empty((len(table), len(COLUMNS[kind])), np.float32)
            with np.errstate(over="ignore"):
                for column, name in enumerate(COLUMNS[kind]):
                    values[:, column] = _numbers(table[name])
            values[~_usable(values, kind)] = np.nan
            yield _Batch(label, start, _names(table[NAME_COLUMN], label, start), values)
            start += len(table)
    except OSError as error:
        raise ValueError(f"{label} cannot be read: {error.strerror or error}") from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{label} is no usable CSV file: {_brief(str(error))}") from None
    if not start:
        raise ValueError(f"{label} has a header but no rows")


def _tables(file: str | Path, kind: Kind, label: str) -> Iterator[Any]:
    """The rows in batches, with columns named as in `COLUMNS`: the picture's name as bytes, the rest as text."""
    import pyarrow as pa
    from pyarrow import csv as pa_csv

    with open_file(file) as stream:
        titles = _titles(stream.readline(_HEADER_BYTES), kind, label)
        if not stream.read(1):
            return
        stream.seek(0)
        wanted = (NAME_COLUMN, *COLUMNS[kind])
        types = {name: pa.binary() if name == NAME_COLUMN else pa.string() for name in wanted}
        reader = pa_csv.open_csv(
            pa.PythonFile(stream, "r"),
            read_options=pa_csv.ReadOptions(column_names=titles, skip_rows=1, block_size=_BLOCK_BYTES),
            convert_options=pa_csv.ConvertOptions(column_types=types, include_columns=list(wanted), check_utf8=False),
        )
        yield from reader


def _titles(line: bytes, kind: Kind, label: str) -> list[str]:
    """The columns' names, in capitals; those that are not needed get unique ones."""
    text = line.decode("utf-8-sig", "replace")
    try:
        found = [title.strip() for title in next(csv.reader([text], skipinitialspace=True), [])]
    except csv.Error:
        found = []
    titles, wanted = [title.upper() for title in found], (NAME_COLUMN, *COLUMNS[kind])
    if any(titles.count(name) != 1 for name in wanted):
        shown = _brief(", ".join(found)) or "none"
        raise ValueError(f"{label} has the columns {shown}: needed are {', '.join(wanted)}, as in {_USUAL[kind]}")
    return [title if title in wanted else f"unused {number}" for number, title in enumerate(titles)]


def _numbers(column: Any) -> NDArray[np.float64]:
    """A column of text as numbers, NaN where it is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        numbers = pc.cast(pc.utf8_trim_whitespace(column), pa.float64())
        return np.asarray(numbers.to_numpy(zero_copy_only=False), np.float64)
    except pa.ArrowInvalid:
        return np.array([_number(cell) for cell in column.cast(pa.binary()).to_pylist()], np.float64)


def _number(cell: bytes | None) -> float:
    try:
        return float(cell) if cell and b"_" not in cell else np.nan
    except ValueError:
        return np.nan


def _usable(values: NDArray[np.float32], kind: Kind) -> NDArray[np.bool_]:
    usable = np.asarray(np.isfinite(values).all(axis=1))
    if kind == "box":
        usable &= (values[:, 2:] > 0).all(axis=1)
    return usable


def _names(column: Any, label: str, start: int) -> Any:
    """ "identity/stem" of pictures that may have an extension and folders before them."""
    import pyarrow.compute as pc

    bare = pc.replace_substring_regex(column, _EXTENSION, "")
    without = pc.invert(pc.match_substring(bare, "/"))
    if pc.any(without).as_py():
        row = pc.index(without, True).as_py()
        name = _brief(column[row].as_py().decode("utf-8", "replace"))
        raise ValueError(f"{label}: row {start + row + 1:,} names the picture {name!r}: needed is identity/image")
    return pc.replace_substring_regex(bare, _LAST_TWO_PARTS, r"\1")


def _hashes(names: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join([blake2b(name, digest_size=8).digest() for name in names]), "<u8").astype(np.uint64)


def _first_of_each(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Where a new value begins in sorted ones."""
    return np.concatenate([[True], keys[1:] != keys[:-1]])


def _refuse_contradictions(
    batches: Sequence[_Batch],
    kind: Kind,
    keys: NDArray[np.uint64],
    values: NDArray[np.float32],
    order: NDArray[np.int64],
) -> None:
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    before, after = values[order[again - 1]], values[order[again]]
    differs = ~((before == after) | (np.isnan(before) & np.isnan(after))).all(axis=1)
    if not differs.any():
        return
    row = int(order[again[differs]].min())
    for batch in batches:
        if row < len(batch.names):
            break
        row -= len(batch.names)
    name = batch.names[row].as_py().decode("utf-8", "replace")
    what = "another box" if kind == "box" else "other landmarks"
    raise ValueError(f"{batch.file}: row {batch.start + row + 1:,} gives {name} {what} than a row before it")


def _save_rows(path: Path, values: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    """Saves some rows without holding a second copy of them."""
    out = np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), values.shape[1]))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        out[start : start + len(part)] = values[part]
    out.flush()


def _paths(folder: Path, kind: Kind) -> tuple[Path, Path]:
    return folder / f"{kind}_keys.npy", folder / f"{kind}_values.npy"


def _brief(text: str) -> str:
    """One printable line of at most 200 characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= 200 else f"{line[:200]}…"
