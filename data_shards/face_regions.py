"""Boxes and landmarks of faces out of CSV files, memory-mapped for all workers."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["box", "landmarks"]

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "box": ("X", "Y", "W", "H"),
    "landmarks": tuple(f"P{point}{axis}" for point in range(1, 6) for axis in "XY"),
}
"""As VGGFace2's loose_bb_*.csv and loose_landmark_*.csv name them; the picture is in `NAME`."""
NAME = "NAME_ID"
_ENDINGS = (".jpg", ".jpeg", ".png", ".pgm", ".bmp", ".webp")


class Regions:
    """Box or landmarks of each picture, by identity and file name."""

    def __init__(self, names: NDArray[np.uint64], values: NDArray[np.float32]) -> None:
        self._names, self._values = names, values

    @classmethod
    def open(cls, folder: Path, kind: Kind) -> "Regions":
        """What `build_regions` has written into a folder."""
        return cls(*(np.load(path, mmap_mode="r") for path in _paths(folder, kind)))

    def find(self, identity: str, stem: str) -> NDArray[np.float32] | None:
        """x, y, width, height of the box, or x1, y1, …, x5, y5, in pixels; NaN where the file has no number.

        None where no file names the picture.
        """
        name = _hashed(f"{identity}/{stem}")
        row = int(np.searchsorted(self._names, name))
        return np.asarray(self._values[row]) if row < len(self._names) and self._names[row] == name else None


def build_regions(files: Sequence[str | Path], kind: Kind, folder: Path) -> Regions:
    """Reads CSV files with the columns NAME_ID (identity/image, with or without extension) and `COLUMNS`.

    Raises:
        ValueError: a file cannot be read, lacks a column, or a picture has two different regions.
    """
    parts = [_read(Path(file), kind) for file in files]
    texts = [name for names, _ in parts for name in names]
    names = np.array([_hashed(name) for name in texts], np.uint64)
    values = np.concatenate([values for _, values in parts])
    order = np.argsort(names, kind="stable")
    names, values = names[order], values[order]
    repeated = np.flatnonzero(names[1:] == names[:-1])
    same = (values[repeated] == values[repeated + 1]) | (np.isnan(values[repeated]) & np.isnan(values[repeated + 1]))
    if (different := repeated[~same.all(axis=1)]).size:
        raise ValueError(
            f"regions {', '.join(map(str, files))}: {texts[order[different[0]]]} has two different entries"
        )
    kept = np.append(True, names[1:] != names[:-1]) if len(names) else np.zeros(0, bool)
    for path, table in zip(_paths(folder, kind), (names[kept], values[kept]), strict=True):
        np.save(path, table)
    return Regions(names[kept], values[kept])


def _paths(folder: Path, kind: Kind) -> tuple[Path, Path]:
    return folder / f"{kind}.names.npy", folder / f"{kind}.values.npy"


def _hashed(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest(), "little"))


def _read(path: Path, kind: Kind) -> tuple[list[str], NDArray[np.float32]]:
    """Names without extension, and their numbers, shape (n, 4) or (n, 10)."""
    import pyarrow as pa
    from pyarrow import csv

    wanted = COLUMNS[kind]
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            header = [title.strip().strip('"').upper() for title in file.readline().split(",")]
        if missing := [name for name in (NAME, *wanted) if name not in header]:
            raise ValueError(
                f"regions {path} has the columns {', '.join(header)}: {missing[0]} is missing for a {kind}"
            )
        types = dict.fromkeys(header, pa.string())
        table = csv.read_csv(
            path,
            csv.ReadOptions(column_names=header, skip_rows=1),
            convert_options=csv.ConvertOptions(
                column_types=types, include_columns=[NAME, *wanted], strings_can_be_null=False
            ),
        )
    except OSError as error:
        raise ValueError(f"regions {path} cannot be read: {error.strerror or error}") from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"regions {path} is no CSV file of regions: {str(error).splitlines()[0]}") from None
    names = [_without_ending(name.strip()) for name in table[NAME].to_pylist()]
    return names, np.column_stack([_numbers(table[column]) for column in wanted])


def _numbers(column: Any) -> NDArray[np.float32]:
    """A column as numbers, NaN where it holds none."""
    texts = column.to_pylist()
    try:
        return np.array(texts, np.float32)
    except ValueError:
        return np.array([_number(text) for text in texts], np.float32)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _without_ending(name: str) -> str:
    """`identity/stem` of a path."""
    name = "/".join(name.replace("\\", "/").split("/")[-2:])
    return name[: name.rfind(".")] if name.lower().endswith(_ENDINGS) else name
