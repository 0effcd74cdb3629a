"""Lists of pairs to verify: LFW's pairs.txt and its development files, and any CSV."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.index import ShardSet, Split
from data_shards.listing import MAX_KEY, unique_stems
from data_shards.reader import keys_of
from data_shards.sources.base import extension_of
from trainer.evaluation.sets.prepared import Part, named_missing

CSV_COLUMNS = ("first", "second", "same")
"""Columns that a CSV needs; `fold`, counted from 0, may be there, too."""
_YES, _NO = ("1", "true", "yes", "same"), ("0", "false", "no", "different")


class Pair(NamedTuple):
    first: str
    """Name of an image: IDENTITY/IMAGE as in the folders that were sharded, with or without extension."""
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
        return len({pair.fold for pair in self.pairs})

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


class FoundPairs(NamedTuple):
    """Where the images of a list of pairs lie."""

    parts: list[Part]
    """Samples to embed, ascending, each once; n in all."""
    pairs: NDArray[np.int64]
    """Which two of those n each pair is, shape (p,2)."""
    kept: NDArray[np.bool_]
    """Which pairs of the list those p are: all, or those whose images are both there."""


def find_images(wanted: PairList, source: ShardSet, skip_missing: bool = False) -> FoundPairs:
    """Where the images of a list lie in a set of shards, in whichever of its splits.

    Raises:
        ValueError: images are missing, and `skip_missing` does not say that their pairs are to be left out, or no pair is left.
    """
    names = wanted.names()
    parts: list[Part] = []
    places: dict[str, int] = {}
    for split in map(source.split, source.splits):
        found = samples_of(source, split, [name for name in names if name not in places])
        if found:
            samples, rows = np.unique(np.array(list(found.values()), np.int64), return_inverse=True)
            places |= dict(zip(found, (rows + sum(len(part) for _, part in parts)).tolist(), strict=True))
            parts.append((split, samples))
    missing = [name for name in names if name not in places]
    kept = np.array([pair.first in places and pair.second in places for pair in wanted.pairs])
    if missing and (not skip_missing or not kept.any()):
        left = "; no pair is left without them" if skip_missing else ""
        some = f"{len(missing):,} images that {source.path} does not have: {named_missing(missing)}"
        raise ValueError(f"pair list {wanted.path} names {some}{left}")
    pairs = [(places[pair.first], places[pair.second]) for pair, keep in zip(wanted.pairs, kept, strict=True) if keep]
    return FoundPairs(parts, np.array(pairs, np.int64), kept)


def samples_of(source: ShardSet, split: Split, names: Sequence[str]) -> dict[str, int]:
    """The sample of each name IDENTITY/IMAGE that the split has; folders before the identity's are passed over.

    Only the keys of identities that are mentioned are read. What a key may not hold stands in it as `_` (see `unique_stems`).
    """
    labels = {name: label for label, name in enumerate(source.identity_names)}
    rows = {int(label): row for row, label in enumerate(split.identities)}
    mentioned: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        identity, _, image = name.rpartition("/")
        row = rows.get(labels.get(identity, labels.get(identity.rpartition("/")[2], -1)))
        if row is not None:
            mentioned.setdefault(row, []).append((name, image))
    ranges = [np.arange(split.starts[row], split.starts[row + 1]) for row in mentioned]
    keys = iter(keys_of(split, np.concatenate(ranges)) if ranges else [])
    found: dict[str, int] = {}
    for images, samples in zip(mentioned.values(), ranges, strict=True):
        stems = {}
        for sample, key in zip(samples.tolist(), keys, strict=False):
            prefix, _, stem = key.rpartition("/")
            stems[stem] = sample
        for name, image in images:
            sample = next((stems[stem] for stem in _stems(image, len(prefix)) if stem in stems), None)
            if sample is not None:
                found[name] = sample
    return found


def _stems(image: str, prefix: int) -> Iterator[str]:
    """How an image's name may stand in a key behind `prefix` characters and a slash."""
    if extension_of(image) is not None:
        yield unique_stems([image[: image.rfind(".")]], MAX_KEY - 1 - prefix)[0]
    yield unique_stems([image], MAX_KEY - 1 - prefix)[0]


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


def folds_of(wanted: PairList, otherwise: int) -> NDArray[np.int64]:
    """Each pair's fold, shape (p,); a list without folds is dealt out, same and different pairs in turn."""
    if wanted.folds > 1:
        return np.array([pair.fold for pair in wanted.pairs])
    seen = [0, 0]
    folds = []
    for pair in wanted.pairs:
        folds.append(seen[pair.same] % otherwise)
        seen[pair.same] += 1
    return np.array(folds)


def folds_share_identities(wanted: PairList, folds: NDArray[np.int64]) -> bool:
    """Whether pairs of two folds name the same identity."""
    home: dict[str, int] = {}
    named = (
        (name.rpartition("/")[0], int(fold))
        for pair, fold in zip(wanted.pairs, folds, strict=True)
        for name in pair[:2]
    )
    return any(home.setdefault(identity, fold) != fold for identity, fold in named)
