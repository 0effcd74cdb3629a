"""Pure: (listing, settings) -> which picture goes into which shard of which split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.convert_config import ConvertConfig
from data_shards.counter_random import random_bits
from data_shards.index import SPLITS
from data_shards.listing import name_draw
from data_shards.tar_members import BLOCK

MAX_SHARDS = 1_000_000
"""Of one split: names have six digits."""
END = bytes(2 * BLOCK)
"""Two zero blocks end a tar."""
NO_LABEL = np.uint32(2**32 - 1)
SHARD = np.dtype([("split", "u1"), ("number", "<u4"), ("extension", "u1"), ("start", "<u8"), ("stop", "<u8")])

_HELD_IDENTITY, _HELD_IMAGE, _IMAGE, _GROUP = range(4)
"""What a draw is for: the first counter behind the seed."""
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Plan:
    """What goes into every shard.

    Attributes:
        order: rows of the listing, shard after shard, in the order in which they lie in the tars, shape (m,).
        shards: of `SHARD`, shape (s,): a range of `order` each.
        labels: label of each identity of the listing, `NO_LABEL` where none of its pictures is kept, shape (i,).
    """

    order: NDArray[np.int64]
    shards: NDArray[Any]
    labels: NDArray[np.uint32]


class Job(NamedTuple):
    """One shard to write."""

    split: str
    name: str
    extension: int
    rows: NDArray[np.int64]


def plan_shards(rows: NDArray[Any], identities: Sequence[str], kept: NDArray[np.bool_], config: ConvertConfig) -> Plan:
    """Cuts the kept pictures into the shards of every split.

    A shard holds pictures of one extension only, since `datasets` takes the columns from a tar's first samples. Shards
    are cut by the size that they have if every picture survives as it is.

    Args:
        rows: of `listing.ROW`, sorted by identity, then key, shape (n,).
        identities: their names.
        kept: which rows no filter has taken out, shape (n,).
    Raises:
        ValueError: a hold-out that does not fit, or fewer than two identities left for training.
    """
    chosen = np.flatnonzero(kept)
    owners = rows["identity"][chosen]
    present = np.unique(owners)
    labels = np.full(len(identities), NO_LABEL)
    labels[present] = np.arange(len(present), dtype=np.uint32)
    splits = _splits(rows["draw"][chosen], owners, [identities[number] for number in present], present, config)
    parts, shards, length = [], [], 0
    for code in range(len(SPLITS)):
        number = 0
        in_split = chosen[splits == code]
        for extension in np.unique(rows["extension"][in_split]):
            order = _ordered(rows, in_split[rows["extension"][in_split] == extension], config)
            parts.append(order)
            for start, stop in _cuts(rows["size"][order], config):
                shards.append((code, number, extension, length + start, length + stop))
                number += 1
            length += len(order)
        if number > MAX_SHARDS:
            raise ValueError(f"shard_bytes is {config.shard_bytes:,}: {number:,} shards, allowed is a million")
    return Plan(np.concatenate(parts), np.array(shards, SHARD), labels)


def job(plan: Plan, number: int) -> Job:
    """Shard `number` of the plan."""
    shard = plan.shards[number]
    rows = np.asarray(plan.order[int(shard["start"]) : int(shard["stop"])])
    return Job(SPLITS[shard["split"]], f"{shard['number']:06d}.tar", int(shard["extension"]), rows)


def _splits(
    draws: NDArray[np.uint64], owners: NDArray[Any], names: list[str], present: NDArray[Any], config: ConvertConfig
) -> NDArray[np.uint8]:
    """Position in `SPLITS` of each picture."""
    unseen = present[_held_out_identities(names, config)]
    splits = np.where(np.isin(owners, unseen), np.uint8(1), np.uint8(0))
    if config.holdout_images:
        order = np.lexsort((random_bits(config.seed & _MASK, _HELD_IMAGE, draws), owners))
        place, counts = _places(owners[order])
        held = order[(place < config.holdout_images) & (counts >= config.holdout_images + 2)]
        splits[held[splits[held] == 0]] = 2
        if not (splits == 2).any():
            need = config.holdout_images + 2
            raise ValueError(f"holdout_images is {config.holdout_images}, but no training identity has {need} images")
    return splits


def _held_out_identities(names: list[str], config: ConvertConfig) -> NDArray[np.int64]:
    """Positions among the names."""
    held = config.holdout_identities
    if isinstance(held, tuple):
        missing = sorted(set(held) - set(names))
        if missing:
            raise ValueError(
                f"holdout_identities names {missing[0]!r}, which is not among the {len(names):,} identities"
            )
        chosen = np.flatnonzero(np.isin(np.array(names, object), list(held))) if held else np.zeros(0, np.int64)
    else:
        count = max(1, round(held * len(names))) if isinstance(held, float) else held
        draws = random_bits(
            config.seed & _MASK, _HELD_IDENTITY, np.array([name_draw(name) for name in names], np.uint64)
        )
        chosen = np.argsort(draws, kind="stable")[:count] if names else np.zeros(0, np.int64)
        if count > len(names):
            raise ValueError(f"holdout_identities is {held}, but there are {len(names):,} identities")
    left = len(names) - len(chosen)
    if left < 2 and not config.evaluation_only:
        held_out = f" after holding out {len(chosen):,}" if len(chosen) else ""
        only = f"{left} identity" if left else "no identity"
        raise ValueError(f"{only} left for training{held_out}: triplets need at least 2")
    return chosen


def _ordered(rows: NDArray[Any], chosen: NDArray[np.int64], config: ConvertConfig) -> NDArray[np.int64]:
    if config.order == "identity":
        return chosen
    if config.order == "source":
        return chosen[np.lexsort((rows["offset"][chosen], rows["part"][chosen]))]
    draws = rows["draw"][chosen]
    mixed = random_bits(config.seed & _MASK, _IMAGE, draws)
    if config.order == "random":
        return chosen[np.argsort(mixed, kind="stable")]
    owners = rows["identity"][chosen]
    shuffled = np.lexsort((mixed, owners))
    place, _ = _places(owners[shuffled])
    starts = place % config.images_per_group == 0
    group = np.cumsum(starts) - 1
    first_draws = random_bits(config.seed & _MASK, _GROUP, draws[shuffled[starts]])
    rank = np.empty(len(first_draws), np.int64)
    rank[np.argsort(first_draws, kind="stable")] = np.arange(len(rank))
    return chosen[shuffled[np.argsort(rank[group], kind="stable")]]


def _places(owners: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of each picture within its identity, and how many the identity has; `owners` is sorted."""
    starts = np.flatnonzero(np.append(True, owners[1:] != owners[:-1])) if len(owners) else np.zeros(0, np.int64)
    counts = np.diff(np.append(starts, len(owners)))
    return np.arange(len(owners)) - np.repeat(starts, counts), np.repeat(counts, counts)


def _cuts(sizes: NDArray[Any], config: ConvertConfig) -> Iterator[tuple[int, int]]:
    """Ranges that make a shard each: as few as can be, of even sizes, so that workers and readers finish together."""
    ends = np.cumsum(_sample_bytes(sizes))
    room = config.shard_bytes - len(END)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        left = int(ends[-1]) - before
        share = left / max(1, -(-left // max(1, room)))
        fits = int(np.searchsorted(ends, before + room, side="right"))
        even = int(np.searchsorted(ends, before + share)) + 1
        stop = max(start + 1, min(fits, even))
        if config.shard_samples is not None:
            stop = min(stop, start + config.shard_samples)
        yield start, stop
        start = stop


def _sample_bytes(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Bytes that pictures and labels take in a tar: two headers, the label's block, the picture in whole blocks."""
    return 3 * BLOCK + -(-sizes.astype(np.int64) // BLOCK) * BLOCK
