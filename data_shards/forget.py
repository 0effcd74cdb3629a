"""Takes identities out of a shard set: pictures out of tars, rows out of the index, names out of manifest and lists."""

import csv
import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_shards.commit import HashedFile
from data_shards.files import is_remote, local
from data_shards.finish import DUPLICATES, FAILURES, PAIRS, identity_table, split_entry, spread, wids
from data_shards.index import IDENTITIES, INDEX, MANIFEST, SPLITS, WIDS, ShardSet, Split, write_table
from data_shards.progress import progress
from data_shards.replacing import Replacement, finish_replacing
from data_shards.shard_plan import END
from data_shards.sources.base import identity_and_stem
from data_shards.store import Store
from data_shards.tar_members import BLOCK, Member, dali_index, header_name, split_name

FORGOTTEN = "(forgotten {})"
"""Stands for a name afterwards, with its label: those of the others stay what they are in tars, checkpoints and centres."""


@dataclass(frozen=True)
class Forgotten:
    """What was taken out."""

    identities: int
    pictures: int
    tars: int
    """Written anew, or deleted where nothing was left."""
    lines: int
    """Of failures.jsonl, duplicates.csv and pairs.csv."""

    def __str__(self) -> str:
        lines = f", and {self.lines:,} lines out of lists" if self.lines else ""
        return f"{self.pictures:,} pictures of {self.identities:,} identities taken out of {self.tars:,} tars{lines}"


def forget(directory: Path | str, names: Sequence[str]) -> Forgotten:
    """Deletes identities for good: all that is asked for or, whenever it is killed, nothing or what the same call ends.

    Takes as much room on the disk as the tars that hold them, for a while.

    Args:
        directory: a folder written by the conversion.
        names: of identities, as their folders were called (pseudonyms, where the set has them).
    Raises:
        ValueError: no such set or identity; fewer than two training identities would be left; a tar is damaged; the disk has no
            room; another process is at it. Nothing is changed then.
    """
    if is_remote(directory):
        raise ValueError(f"{directory} is a URL; take identities out of a folder of this machine, and copy that there")
    root = local(directory)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    with Store(str(root)).locked():
        begun = finish_replacing(root)
        if begun is not None and begun["names"] == _digest(names):
            return Forgotten(**begun["found"])
        shards = ShardSet.open(root)
        with Replacement(root, (root / MANIFEST).stat().st_mode & 0o666) as aside:
            found = _replaced(aside, shards, set(names))
            aside.commit({"found": asdict(found), "names": _digest(names)})
    return found


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(sorted(set(names))).encode(errors="surrogateescape")).hexdigest()


def _replaced(aside: Replacement, shards: ShardSet, names: set[str]) -> Forgotten:
    """Writes everything that changes."""
    labels = sorted(labels_of(shards, sorted(names)).values())
    splits = {name: shards.split(name) for name in shards.splits}
    table = np.concatenate([np.asarray(split.samples) for split in splits.values()])
    sizes = [len(split) for split in splits.values()]
    codes = np.repeat([SPLITS.index(name) for name in splits], sizes).astype(np.uint8)
    gone = np.isin(table["identity"], labels)
    _check_rest(table["identity"][~gone], codes[~gone], aside.root)
    _check_room(aside.root, splits.values(), labels)
    listed, keys, tars = {}, set[str](), 0
    for name in splits:
        rows = np.flatnonzero(codes == SPLITS.index(name))
        left, changed, lost = _tars(aside, name, shards.manifest["splits"][name]["shards"], table, rows, gone)
        tars, keys = tars + changed, keys | lost
        if left:
            listed[name] = left
    lists, cut = _lists(aside, shards.manifest["files"], names, keys)
    entries, tables, facts = _tables(aside, listed, table[~gone], codes[~gone], splits)
    read, failures = shards.manifest["read"], shards.manifest["failures"]
    manifest = {
        **shards.manifest,
        "options": _scrubbed(shards.manifest["options"], names),
        "read": read - int(gone.sum()) - cut[FAILURES],
        "failures": failures - cut[FAILURES],
        "duplicates": shards.manifest["duplicates"] - cut[DUPLICATES],
        **facts,
        "files": tables | lists,
        "splits": entries,
        "identities": [
            FORGOTTEN.format(label) if label in labels else name for label, name in enumerate(shards.identity_names)
        ],
        "images": np.bincount(table["identity"][~gone], minlength=len(shards.identity_names)).tolist(),
    }
    if "names" in manifest:
        manifest["names"] = {name: person for name, person in manifest["names"].items() if name not in names}
    aside.put(MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    return Forgotten(len(labels), int(gone.sum()), tars, sum(cut.values()))


def labels_of(shards: ShardSet, names: Iterable[str]) -> dict[str, int]:
    """Label of each name.

    Raises:
        ValueError: the set has no identity of that name.
    """
    place = {name: label for label, name in enumerate(shards.identity_names)}
    for name in names:
        if name not in place:
            raise ValueError(f"{shards.location} has no identity {name!r}; nothing was changed")
    return {name: place[name] for name in names}


def _check_rest(labels: NDArray[Any], codes: NDArray[np.uint8], root: Path) -> None:
    if not len(labels):
        raise ValueError(f"{root} would be empty: delete the folder instead")
    if (codes == 0).any() and len(np.unique(labels[codes == 0])) < 2:
        raise ValueError(
            f"{root} would have fewer than 2 training identities, which triplets need: delete the folder instead"
        )


def _check_room(root: Path, splits: Iterable[Split], labels: list[int]) -> None:
    wanted = 0
    for split in splits:
        touched = np.unique(split.samples["shard"][np.isin(split.samples["identity"], labels)])
        wanted += int(split.shard_bytes[touched].sum()) + split.samples.nbytes
    free = shutil.disk_usage(root).free
    if free < wanted:
        raise ValueError(f"{root} has {free / 1e9:.2f} GB free; this takes {wanted / 1e9:.2f} GB for a while")


def _tars(
    aside: Replacement,
    split: str,
    listed: list[dict[str, Any]],
    table: NDArray[Any],
    rows: NDArray[np.int64],
    gone: NDArray[np.bool_],
) -> tuple[list[dict[str, Any]], int, set[str]]:
    """Writes the tars of a split that lose pictures; changes offsets and tars in `table`.

    Args:
        listed: the manifest's entries of the tars.
        table: the index.
        rows: of the split in the table.
        gone: which rows of the table go.
    Returns:
        entries of the tars that are left, how many were written or go, and keys of the pictures that go.
    """
    left, changed, lost = list[dict[str, Any]](), 0, set[str]()
    order = rows[np.lexsort((table["offset"][rows], table["shard"][rows]))]
    bounds = np.searchsorted(table["shard"][order], np.arange(len(listed) + 1))
    with progress(f"forget, {split}", len(listed), "tars") as advance:
        for number, entry in enumerate(listed):
            own = order[bounds[number] : bounds[number + 1]]
            kept = own[~gone[own]]
            tar, index = (f"{split}/{name}" for name in (entry["name"], Path(entry["name"]).with_suffix(".idx")))
            if len(kept) < len(own):
                changed += 1
                lost |= _keys(aside.root / tar, table["offset"][own[gone[own]]])
            if not len(kept):
                aside.delete(tar, index)
            elif len(kept) < len(own):
                entry = entry | _rewritten(aside, tar, index, table, kept)
            if len(kept):
                table["shard"][own] = len(left)
                left.append(entry)
            advance(1)
    return left, changed, lost


def _rewritten(
    aside: Replacement, tar: str, index: str, table: NDArray[Any], kept: NDArray[np.int64]
) -> dict[str, Any]:
    """Writes a tar with some of its pictures, whose bytes are compared with the index on the way, and DALI's index; returns what
    the manifest says of them. Changes offsets in `table`.

    Args:
        kept: rows of the table, in the tar's order.
    """
    entries: list[tuple[Member, Member]] = []
    length = 0

    def fill(file: HashedFile) -> None:
        nonlocal length
        with (aside.root / tar).open("rb") as old:
            for row in kept:
                entries.append(_copied(old, file, table[row : row + 1]))
        file.write(END)
        length = file.length

    sha256 = aside.write(tar, fill)
    idx_sha256 = aside.put(index, dali_index(entries))
    return {"bytes": length, "samples": len(entries), "sha256": sha256, "idx_sha256": idx_sha256}


def _copied(old: IO[bytes], file: HashedFile, sample: NDArray[Any]) -> tuple[Member, Member]:
    """Appends a picture and its label; changes the offset in its row of the index, a view of shape (1,)."""
    offset, size, label = int(sample["offset"][0]), int(sample["size"][0]), b"%d" % sample["identity"][0]
    padded = size + -size % BLOCK
    old.seek(offset - BLOCK)
    blocks = old.read(3 * BLOCK + padded)
    image, text = header_name(blocks[:BLOCK]), header_name(blocks[BLOCK + padded : 2 * BLOCK + padded])
    sound = zlib.crc32(blocks[BLOCK : BLOCK + size]) == sample["crc32"][0]
    if image is None or text is None or not sound or blocks[2 * BLOCK + padded :].rstrip(b"\0") != label:
        raise ValueError(f"shard {old.name} is damaged at byte {offset:,}: run `facescale verify`; nothing was changed")
    at = file.length + BLOCK
    file.write(blocks)
    sample["offset"] = at
    return Member(split_name(image)[1], at, size, image), Member("cls", at + padded + BLOCK, len(label), text)


def _keys(tar: Path, offsets: NDArray[Any]) -> set[str]:
    found = set()
    with tar.open("rb") as file:
        for offset in offsets.tolist():
            file.seek(offset - BLOCK)
            found.add(split_name(header_name(file.read(BLOCK)) or "")[0])
    return found


def _tables(
    aside: Replacement,
    listed: dict[str, list[dict[str, Any]]],
    table: NDArray[Any],
    codes: NDArray[np.uint8],
    splits: Iterable[str],
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Writes what lies beside the tars.

    Args:
        listed: entries of the tars, by split.
        table: the new index, and
        codes: the split of each of its rows.
        splits: names of those that were.
    Returns:
        the manifest's entries of splits, SHA-256 of files, and counts.
    """
    starts = np.searchsorted(codes, np.arange(len(SPLITS) + 1)).astype(np.int64)
    identities = identity_table(codes, table["identity"])
    files = {
        name: aside.write(name, lambda file, rows=rows: write_table(file, rows))  # type: ignore[misc]
        for name, rows in ((INDEX, table), (IDENTITIES, identities))
    }
    entries = {}
    for name in splits:
        if name in listed:
            entries[name] = split_entry(SPLITS.index(name), listed[name], starts, table, identities)
            files[f"{name}/{WIDS}"] = aside.put(f"{name}/{WIDS}", wids(name, listed[name]))
        else:
            aside.delete(f"{name}/{WIDS}")
    counts = {
        "written": len(table),
        "single_image_identities": int((identities["count"][identities["split"] == 0] == 1).sum()),
        "image_sizes": {side: spread(table[side]) for side in ("width", "height")},
    }
    return entries, files, counts


def _lists(
    aside: Replacement, files: dict[str, str], names: set[str], keys: set[str]
) -> tuple[dict[str, str], dict[str, int]]:
    """Takes lines out of failures.jsonl, duplicates.csv and pairs.csv; deletes those in which nothing is left.

    Returns:
        SHA-256 of those that stay, and how many lines went out of each.
    """
    stay, cut = {}, dict.fromkeys(_LISTS, 0)
    for name in _LISTS:
        if name not in files:
            continue
        text = (aside.root / name).read_bytes().decode(errors="surrogateescape")
        lines = list(_LISTS[name](text, names, keys))
        kept = [line for line, goes in lines if not goes]
        cut[name] = len(lines) - len(kept)
        if len(kept) > (name != FAILURES):  # a table's head is a line, too
            stay[name] = aside.put(name, "".join(kept).encode(errors="surrogateescape"))
        else:
            aside.delete(name)
    return stay, cut


def _failures(text: str, names: set[str], keys: set[str]) -> Iterator[tuple[str, bool]]:
    """Lines, and whether they are of an identity that goes."""
    for line in text.splitlines(keepends=True):
        yield line, _is_of(json.loads(line)["path"], names, keys)


def _pairs(text: str, names: set[str], keys: set[str]) -> Iterator[tuple[str, bool]]:
    """The same of a table whose first two columns are pictures."""
    for place, row in enumerate(csv.reader(io.StringIO(text, newline=""))):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        yield line.getvalue(), place > 0 and any(_is_of(picture, names, keys) for picture in row[:2])


_LISTS: dict[str, Callable[[str, set[str], set[str]], Iterator[tuple[str, bool]]]] = {
    FAILURES: _failures,
    DUPLICATES: _pairs,
    PAIRS: _pairs,
}


def _is_of(picture: str, names: set[str], keys: set[str]) -> bool:
    """Whether a path or key is a picture of an identity."""
    if picture in keys:
        return True
    try:
        return identity_and_stem(picture)[0] in names
    except ValueError:
        return False


def _scrubbed(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The conversion's settings without the names in lists of identities."""
    return {
        option: [item for item in value if item not in names] if isinstance(value, list) else value
        for option, value in options.items()
    }
