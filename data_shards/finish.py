"""The end of a conversion: one index for all shards, and last of all the manifest, which commits the set."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.index import FORMAT, IDENTITIES, IDENTITY, INDEX, MANIFEST, SAMPLE, SPLITS, VERSION, WIDS, write_table
from data_shards.shard_writer import Failure, Shard
from data_shards.sources.base import EXTENSIONS
from data_shards.store import Store
from data_shards.work import PLAN, TOOL, WORK, Work

FAILURES = "failures.jsonl"
DUPLICATES = "duplicates.csv"
PAIRS = "pairs.csv"
NAMED_FAILURES = 10
"""Of the pictures left out so many are named in the summary."""


class SplitSummary(NamedTuple):
    identities: int
    samples: int
    shards: int


@dataclass(kw_only=True, frozen=True)
class Summary:
    """What a conversion did; `read` = `written` + `failed` + the sum of `filtered`."""

    read: int
    written: int
    filtered: dict[str, int]
    """Pictures left out because the settings say so, by the rule."""
    splits: dict[str, SplitSummary]
    single_image_identities: int
    """Training identities with one image: kept, but no training batch can use them."""
    failures: tuple[Failure, ...]
    """Sorted by path."""
    duplicates: int = 0
    """Pictures found to repeat another one, whether left out or not."""
    seconds: float = field(compare=False, default=0.0)

    @property
    def failed(self) -> int:
        return len(self.failures)

    def __str__(self) -> str:
        rate = self.read / max(self.seconds, 1e-9)
        counts = [f"{self.written:,} written", f"{self.failed:,} left out"]
        counts += [f"{sum(self.filtered.values()):,} filtered"] * bool(self.filtered)
        lines = [f"{self.read:,} pictures read, {', '.join(counts)} ({rate:,.0f} images/s)"]
        for name, split in self.splits.items():
            lines.append(
                f"{name}: {split.samples:,} images of {split.identities:,} identities, shards: {split.shards:,}"
            )
        if self.single_image_identities:
            lines.append(
                f"training identities with one image, which training leaves out: {self.single_image_identities:,}"
            )
        lines += [f"filtered: {rule}: {count:,}" for rule, count in self.filtered.items()]
        if self.duplicates:
            lines.append(f"duplicates: {self.duplicates:,}, listed in {DUPLICATES}")
        lines += [f"left out: {path} {reason}" for path, reason in self.failures[:NAMED_FAILURES]]
        if self.failed > NAMED_FAILURES:
            lines.append(f"… and {self.failed - NAMED_FAILURES:,} more, all in {FAILURES}")
        return "\n".join(lines).encode(errors="backslashreplace").decode()


class _Counts:
    """What the records say together, without the samples."""

    def __init__(self, work: Work) -> None:
        facts = json.loads(work.store.read(PLAN))
        self.listed = {split: list[dict[str, Any]]() for split in SPLITS}
        self.alive = np.zeros(len(work.listing), bool)
        self.failures = [Failure(*failure) for failure in facts["refused"]]
        self.filtered: dict[str, int] = dict(facts["filtered"])
        self.sides: list[NDArray[np.uint16]] = []
        for shard in _shards(work):
            self.failures += shard.failures
            for rule, count in shard.filtered.items():
                self.filtered[rule] = self.filtered.get(rule, 0) + count
            if len(shard.rows):
                self.alive[shard.rows] = True
                names = ("name", "bytes", "extension", "sha256", "idx_sha256")
                entry = {name: getattr(shard, name) for name in names}
                self.listed[shard.split].append(entry | {"samples": len(shard.rows)})
        self.failures.sort(key=lambda failure: (os.fsencode(failure.path), failure.reason))


def finish(work: Work) -> Summary:
    """Writes index, failures and manifest of a conversion whose shards are all committed.

    Raises:
        ValueError: fewer than two identities are left to train on, or no picture at all.
    """
    counts = _Counts(work)
    store, listing = work.store, work.listing
    require_pictures(str(work.job["found"].get("location", "the source")), int(counts.alive.sum()), counts.failures)
    split_of, starts, table = _places(work, counts)
    labels = work.plan.labels[listing.rows["identity"]]
    identities = identity_table(split_of, labels)
    train = identities["count"][identities["split"] == 0]
    if len(train) < 2 and not work.config.evaluation_only:
        have = "1 training identity has" if len(train) else "no training identity has"
        raise ValueError(f"{have} a picture that decodes: triplets need at least 2")
    facts = json.loads(store.read(PLAN))
    files = _write_tables(work, counts, facts, {INDEX: table, IDENTITIES: identities})
    entries = {}
    for code, split in enumerate(SPLITS):
        if counts.listed[split]:
            entries[split] = split_entry(code, counts.listed[split], starts, table, identities)
            files[f"{split}/{WIDS}"] = store.write(f"{split}/{WIDS}", wids(split, counts.listed[split]))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tool": TOOL,
        "source": _shown_source(work),
        "options": work.job["options"],
        "read": len(listing) + len(facts["refused"]),
        "written": len(table),
        "failures": len(counts.failures),
        "filtered": counts.filtered,
        "duplicates": facts["duplicates"],
        "single_image_identities": int((train == 1).sum()),
        "image_sizes": {side: spread(table[side]) for side in ("width", "height")},
        "files": files,
        "splits": entries,
        "identities": facts["names"],
        "images": np.bincount(table["identity"], minlength=len(facts["names"])).tolist(),
    } | ({"names": facts["people"]} if facts["people"] else {})
    assert manifest["read"] == len(table) + len(counts.failures) + sum(counts.filtered.values()), "nothing is lost"
    for split in entries:
        store.sync(split)
    store.write(MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    store.sync()
    return summary_of(store)


def _write_tables(
    work: Work, counts: _Counts, facts: dict[str, Any], tables: dict[str, NDArray[Any]]
) -> dict[str, str]:
    """Writes what lies beside the shards; returns the SHA-256 of each file."""
    store, hashes = work.store, {}
    for name, table in tables.items():
        with store.writing(name) as file:
            write_table(file, table)
        hashes[name] = file.sha256
    if counts.failures:
        lines = (json.dumps(failure._asdict()).encode() + b"\n" for failure in counts.failures)
        hashes[FAILURES] = store.write(FAILURES, b"".join(lines))
    if facts["duplicates"]:
        hashes[DUPLICATES] = store.write(DUPLICATES, store.read(f"{WORK}/{DUPLICATES}"))
    if work.job["found"]["kind"] == "bin":
        hashes[PAIRS] = store.write(PAIRS, _pairs_table(work))
    return hashes


def summary_of(store: Store, seconds: float = 0.0) -> Summary:
    """The summary of a finished conversion, from its manifest."""
    manifest = json.loads(store.read(MANIFEST))
    lines = store.read(FAILURES).splitlines() if manifest["failures"] else []
    splits = {
        name: SplitSummary(entry["identities"], entry["samples"], len(entry["shards"]))
        for name, entry in manifest["splits"].items()
    }
    return Summary(
        read=manifest["read"],
        written=manifest["written"],
        filtered=manifest["filtered"],
        splits=splits,
        single_image_identities=manifest["single_image_identities"],
        failures=tuple(Failure(**json.loads(line)) for line in lines),
        duplicates=manifest["duplicates"],
        seconds=seconds,
    )


def require_pictures(source: str, left: int, failures: list[Failure]) -> None:
    """Raises ValueError where no picture of the source can be used."""
    if not left and not failures:
        raise ValueError(f"source {source} holds no pictures ({' '.join(EXTENSIONS)}) that belong to an identity")
    if not left:
        path, reason = failures[0]
        raise ValueError(f"none of the {len(failures):,} pictures of {source} can be used; {path} {reason}")


def _shards(work: Work) -> Iterator[Shard]:
    return (work.shard(number) for number in range(len(work.plan.shards)))


def _places(work: Work, counts: _Counts) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[Any]]:
    """Split of each listed picture (255: none), first row of each split in the index, and the index."""
    split_of = np.full(len(work.listing), 255, np.uint8)
    for shard in work.plan.shards:
        split_of[work.plan.order[int(shard["start"]) : int(shard["stop"])]] = shard["split"]
    split_of[~counts.alive] = 255
    place = np.zeros(len(split_of), np.int64)
    starts = np.zeros(len(SPLITS) + 1, np.int64)
    for code in range(len(SPLITS)):
        own = np.flatnonzero(split_of == code)
        place[own] = starts[code] + np.arange(len(own))
        starts[code + 1] = starts[code] + len(own)
    table = np.empty(int(starts[-1]), SAMPLE)
    numbers = dict.fromkeys(SPLITS, 0)
    for shard in _shards(work):
        if len(shard.rows):
            shard.samples["shard"] = numbers[shard.split]
            numbers[shard.split] += 1
            table[place[shard.rows]] = shard.samples
    return split_of, starts, table


def identity_table(split_of: NDArray[np.uint8], labels: NDArray[np.uint32]) -> NDArray[Any]:
    """Rows of identities.npy.

    Args:
        split_of: position in SPLITS of each picture, in the order of the index, shape (n,).
        labels: of each picture, shape (n,).
    """
    parts = []
    for code in range(len(SPLITS)):
        found, first, counts = np.unique(labels[split_of == code], return_index=True, return_counts=True)
        part = np.empty(len(found), IDENTITY)
        part["split"], part["identity"], part["start"], part["count"] = code, found, first, counts
        parts.append(part)
    return np.concatenate(parts)


def split_entry(
    code: int,
    shards: list[dict[str, Any]],
    starts: NDArray[np.int64],
    table: NDArray[Any],
    identities: NDArray[Any],
) -> dict[str, Any]:
    """What the manifest says of a split.

    Args:
        code: position in SPLITS.
        shards: entries of its tars.
        starts: first row of each split in the index and, last, their number.
        table: the index.
        identities: identities.npy.
    """
    own = table[starts[code] : starts[code + 1]]
    return {
        "start": int(starts[code]),
        "identities": int((identities["split"] == code).sum()),
        "samples": len(own),
        "index_sha256": hashlib.sha256(own.tobytes()).hexdigest(),
        "shards": shards,
    }


def wids(split: str, shards: list[dict[str, Any]]) -> bytes:
    """The list of a split's shards in the form that `wids.ShardListDataset` reads."""
    listed = [{"url": shard["name"], "nsamples": shard["samples"], "filesize": shard["bytes"]} for shard in shards]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": split, "shardlist": listed}
    return json.dumps(index, indent=1).encode() + b"\n"


def spread(values: NDArray[Any]) -> dict[str, int]:
    """Smallest, middle (the lower of two) and largest."""
    low, middle, high = (int(np.quantile(values, q, method="lower")) for q in (0, 0.5, 1))
    return {"min": low, "median": middle, "max": high}


def _shown_source(work: Work) -> dict[str, Any]:
    """Of pseudonymous sets the kind alone: a path may name somebody."""
    found: dict[str, Any] = work.job["found"]
    return {"kind": found["kind"]} if work.config.pseudonyms else found


def duplicates_table(work: Work, duplicates: list[tuple[int, int, str]]) -> bytes:
    """CSV of the pictures that repeat others; keys where pseudonyms are asked for."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("picture", "repeats", "kind", "same_identity"))
    listing, hidden = work.listing, bool(work.config.pseudonyms)
    for row, of, kind in duplicates:
        names = [_called(work, number, hidden) for number in (row, of)]
        rows.writerow((*names, kind, str(listing.rows["identity"][row] == listing.rows["identity"][of]).lower()))
    return os.fsencode(text.getvalue())


def _pairs_table(work: Work) -> bytes:
    """CSV of a verification set's pairs by key; of pictures that are in no shard, too."""
    from data_shards.sources.insightface_bin import InsightFaceBin

    assert isinstance(work.source, InsightFaceBin)
    keys = {place.name: key for place, key, _ in work.listing.entries(work.listing.rows)}
    lines = [f"{keys[a]},{keys[b]},{same:d}" for a, b, same in work.source.pairs() if a in keys and b in keys]
    return "\n".join(["a,b,same", *lines, ""]).encode()


def _called(work: Work, row: int, hidden: bool) -> str:
    place, key, _ = next(work.listing.entries(work.listing.rows[row : row + 1]))
    return key if hidden else place.name
