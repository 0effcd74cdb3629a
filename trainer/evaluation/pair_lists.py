"""Lists of pairs to verify: LFW's pairs.txt and its development files, and any CSV."""

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_shards.index import ShardSet, Split

CSV_COLUMNS = ("first", "second", "same")
"""Columns that a CSV needs; `fold`, counted from 0, may be there, too."""
_YES, _NO = ("1", "true", "yes", "same"), ("0", "false", "no", "different")
_NAMED = 5
"""Missing images that an error names."""


class Pair(NamedTuple):
    first: str
    """Name of an image: IDENTITY/IMAGE as in the folders that were sharded, without extension."""
    second: str
    same: bool
    fold: int
    """From 0."""
    line: int
    """Of the file, from 1."""


class PairList(NamedTuple):
    path: Path
    pairs: list[Pair]

    @property
    def folds(self) -> int:
        return 1 + max(pair.fold for pair in self.pairs)

    def names(self) -> list[str]:
        """Every image once, sorted."""
        return sorted({name for pair in self.pairs for name in (pair.first, pair.second)})


def read_pairs(path: Path) -> PairList:
    """Reads a list of pairs, whatever its format.

    - LFW view 2 (`pairs.txt`): a line with the numbers of folds and of pairs of each kind; then, for each fold, lines of
      NAME, N, M (same person) and NAME, N, OTHER, M (different ones), tabs between. Image N of NAME is NAME/NAME_000N.
    - LFW view 1 (`pairsDevTrain.txt`, `pairsDevTest.txt`): the same without folds; its first line has one number.
    - CSV with the columns first, second, same (1/0, true/false, yes/no) and, if it has folds, fold.

    Raises:
        ValueError: the file is missing, holds no pair, or a line is not what its format asks for.
    Source: Huang et al. 2007, "Labeled Faces in the Wild", and the README of its lists.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"pair list {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"pair list {path} is not UTF-8 text; a list of pairs (LFW's or CSV) is needed") from None
    if not any(lines):
        raise ValueError(f"pair list {path} is empty")
    head = lines[0].split("\t")
    numbers = all(part.strip().isdigit() for part in head) and len(head) in (1, 2)
    pairs = list(_lfw(path, lines) if numbers else _from_csv(path, lines))
    if not pairs:
        raise ValueError(f"pair list {path} holds no pair")
    return PairList(path, pairs)


def find_images(wanted: PairList, source: ShardSet) -> tuple[Split, NDArray[np.int64], NDArray[np.int64]]:
    """Where the images of a list lie in a set of shards.

    Returns:
        the split that has them all; the samples to embed, ascending, shape (n,); and, for each pair, which two of those they
        are, shape (p, 2).
    Raises:
        ValueError: no split has all images; those are named that the best one lacks.
    """
    names = wanted.names()
    best: tuple[Split, dict[str, int]] | None = None
    for name in source.splits:
        split = source.split(name)
        found = _samples_of(source, split, names)
        if best is None or len(found) > len(best[1]):
            best = split, found
    assert best is not None, "a set of shards has a split"
    split, found = best
    missing = [name for name in names if name not in found]
    if missing:
        some = ", ".join(missing[:_NAMED]) + (" …" if len(missing) > _NAMED else "")
        raise ValueError(
            f"pair list {wanted.path} names {len(missing):,} images that {source.path} does not have: {some}"
        )
    samples = np.unique(np.array([found[name] for name in names], np.int64))
    places = {name: int(np.searchsorted(samples, found[name])) for name in names}
    pairs = np.array([(places[pair.first], places[pair.second]) for pair in wanted.pairs], np.int64)
    return split, samples, pairs


def _samples_of(source: ShardSet, split: Split, names: list[str]) -> dict[str, int]:
    """Samples by name; only identities that the names mention are looked at. A name may end in its file's extension."""
    labels = {name: label for label, name in enumerate(source.identity_names)}
    rows = {int(label): row for row, label in enumerate(split.identities)}
    found: dict[str, int] = {}
    for identity, mentioned in itertools.groupby(names, key=lambda name: name.rpartition("/")[0]):
        row = rows.get(labels.get(identity, -1))
        if row is not None:
            keys = {split.key(sample): sample for sample in range(split.starts[row], split.starts[row + 1])}
            for name in mentioned:
                sample = keys.get(name, keys.get(name.rpartition(".")[0]))
                if sample is not None:
                    found[name] = sample
    return found


def _lfw(path: Path, lines: list[str]) -> Iterator[Pair]:
    head = [int(part) for part in lines[0].split("\t")]
    folds, each = (head[0], head[1]) if len(head) == 2 else (1, head[0])
    expected = 2 * folds * each
    body = [(number, line) for number, line in enumerate(lines[1:], start=2) if line.strip()]
    if len(body) != expected or not expected:
        raise ValueError(
            f"pair list {path} says {folds} x 2 x {each} = {expected} pairs in line 1 and has {len(body)}; it is cut or not LFW's"
        )
    for place, (number, line) in enumerate(body):
        parts = line.split("\t")
        same = len(parts) == 3
        numbers = (parts[1], parts[2]) if same else (parts[1], parts[3]) if len(parts) == 4 else ()
        if not numbers or not all(part.isdigit() for part in numbers):
            raise ValueError(
                f"{path}, line {number}: {line!r} is neither NAME, N, M nor NAME, N, OTHER, M with tabs between"
            )
        first, second = (
            f"{name}/{name}_{int(part):04d}"
            for name, part in zip((parts[0], parts[0 if same else 2]), numbers, strict=True)
        )
        yield Pair(first, second, same, place // (2 * each), number)


def _from_csv(path: Path, lines: Iterable[str]) -> Iterator[Pair]:
    reader = csv.DictReader(lines)
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    lacking = [name for name in CSV_COLUMNS if name not in columns]
    if lacking:
        raise ValueError(
            f"pair list {path}: line 1 is neither LFW's nor names the column {lacking[0]!r}; a CSV needs {', '.join(CSV_COLUMNS)}"
        )
    for row in reader:
        said = (row["same"] or "").strip().lower()
        if said not in _YES + _NO:
            raise ValueError(
                f"{path}, line {reader.line_num}: same is {row['same']!r}; allowed is 1 or 0, true or false"
            )
        first, second = ((row[name] or "").strip() for name in ("first", "second"))
        if not first or not second:
            raise ValueError(f"{path}, line {reader.line_num}: first and second must both name an image")
        fold = (row.get("fold") or "0").strip()
        if not fold.isdigit():
            raise ValueError(f"{path}, line {reader.line_num}: fold is {fold!r}; allowed are integers from 0")
        yield Pair(first, second, said in _YES, int(fold), reader.line_num)


def folds_of(wanted: PairList, otherwise: int) -> torch.Tensor:
    """Each pair's fold, int64, shape (p,); a list without folds is dealt out, same and different pairs in turn."""
    if wanted.folds > 1:
        return torch.tensor([pair.fold for pair in wanted.pairs])
    seen = [0, 0]
    folds = []
    for pair in wanted.pairs:
        folds.append(seen[pair.same] % otherwise)
        seen[pair.same] += 1
    return torch.tensor(folds)
