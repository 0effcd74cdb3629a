"""Pure: (listing, settings) -> which picture goes into which shard of which split."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from typing import Literal, NamedTuple

from data_shards.index import BLOCK, SPLITS
from data_shards.pictures import MAX_PIXELS
from data_shards.sources import SourceImage

MAX_SHARDS = 1_000_000
"""Of one split: names have six digits."""
END = bytes(2 * BLOCK)
"""Two zero blocks end a tar."""


@dataclass(kw_only=True, frozen=True)
class ConvertConfig:
    """Settings of a conversion; all but `workers` decide the bytes that come out."""

    holdout_identities: int | float | tuple[str, ...] = 0
    """Identities kept out of training as a whole: how many, a fraction in (0, 1), or their names."""
    holdout_images: int = 0
    """Images of each training identity kept out of training; identities with fewer than this + 2 images give none."""
    shard_bytes: int = 256 * 2**20
    """A shard is closed before it would grow beyond this many bytes; a sample larger than that gets its own."""
    images_per_group: int = 4
    """K: images of one identity that lie together in a shard; the K of the PK batches for streaming."""
    order: Literal["groups", "identity"] = "groups"
    """groups: each identity's images in groups of K, groups shuffled over all shards. identity: as listed."""
    seed: int = 0
    """Draws the held-out identities and images and the shuffle."""
    workers: int | None = None
    """Processes; None: as many as this process may use cores. Does not change a byte of the output."""
    max_pixels: int = MAX_PIXELS
    """Width times height above which a picture is refused as a decompression bomb."""

    def __post_init__(self) -> None:
        held = self.holdout_identities
        if isinstance(held, float) and not 0 < held < 1:
            raise ValueError(f"holdout_identities is {held}; a fraction is between 0 and 1, a count is a whole number")
        if isinstance(held, int) and held < 0:
            raise ValueError(f"holdout_identities is {held}; a count is 0 or more")
        if self.holdout_images < 0:
            raise ValueError(f"holdout_images is {self.holdout_images}; a count is 0 or more")
        for name in ("shard_bytes", "images_per_group", "max_pixels"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if self.order not in ("groups", "identity"):
            raise ValueError(f"order is {self.order!r}; it must be 'groups' or 'identity'")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be 1 or more")


class ShardPlan(NamedTuple):
    """What goes into one shard, in this order."""

    split: str
    name: str
    pictures: tuple[SourceImage, ...]
    labels: tuple[int, ...]
    rows: tuple[int, ...]
    """Positions in the planned listing, whose order is that of (identity, key)."""


def plan_shards(pictures: Sequence[SourceImage], config: ConvertConfig) -> tuple[list[str], list[ShardPlan]]:
    """Identity names, whose positions are the labels, and every shard of every split.

    A shard holds pictures of one extension only, since `datasets` takes the columns from a tar's first samples. Shards
    are cut by the size that they have if every picture survives.

    Args:
        pictures: sorted by identity, then key, as `scan` returns them.
    Raises:
        ValueError: a hold-out that does not fit, or fewer than two identities left for training.
    """
    names = list(dict.fromkeys(picture.identity for picture in pictures))
    labels = {name: label for label, name in enumerate(names)}
    plans = []
    for split, rows in _split(pictures, names, config).items():
        contents = list(_shard_rows(pictures, rows, config))
        if len(contents) > MAX_SHARDS:
            raise ValueError(f"shard_bytes is {config.shard_bytes:,}: {len(contents):,} shards, allowed is a million")
        for number, chosen in enumerate(contents):
            images = tuple(pictures[row] for row in chosen)
            owners = tuple(labels[picture.identity] for picture in images)
            plans.append(ShardPlan(split, f"{number:06d}.tar", images, owners, tuple(chosen)))
    return names, plans


def _split(pictures: Sequence[SourceImage], names: list[str], config: ConvertConfig) -> dict[str, list[int]]:
    """Rows of each split, ascending."""
    unseen = _held_out_identities(names, config)
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for name, group in groupby(range(len(pictures)), key=lambda row: pictures[row].identity):
        members = list(group)
        if name in unseen:
            rows["unseen_identities"] += members
            continue
        drawn = _shuffled(members, pictures, f"{config.seed} held-out image")
        held = set(drawn[: config.holdout_images]) if len(members) >= config.holdout_images + 2 else set()
        rows["unseen_images"] += sorted(held)
        rows["train"] += [row for row in members if row not in held]
    if config.holdout_images and not rows["unseen_images"]:
        need = config.holdout_images + 2
        raise ValueError(f"holdout_images is {config.holdout_images}, but no training identity has {need} images")
    return rows


def _held_out_identities(names: list[str], config: ConvertConfig) -> set[str]:
    held = config.holdout_identities
    if isinstance(held, tuple):
        missing = sorted(set(held) - set(names))
        if missing:
            raise ValueError(
                f"holdout_identities names {missing[0]!r}, which is not among the {len(names):,} identities"
            )
        chosen = set(held)
    else:
        count = max(1, round(held * len(names))) if isinstance(held, float) else held
        chosen = set(sorted(names, key=lambda name: _draw(f"{config.seed} held-out identity", name))[:count])
        if count > len(chosen):
            raise ValueError(f"holdout_identities is {held}, but there are {len(names):,} identities")
    if (left := len(names) - len(chosen)) < 2:
        held_out = f" after holding out {len(chosen):,}" if chosen else ""
        only = f"{left} identity" if left else "no identity"
        raise ValueError(f"{only} left for training{held_out}: triplets need at least 2")
    return chosen


def _shard_rows(pictures: Sequence[SourceImage], rows: list[int], config: ConvertConfig) -> Iterator[list[int]]:
    """Rows of each shard, in the order in which they lie in it."""
    by_extension: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        by_extension[pictures[row].extension].append(row)
    for _, same in sorted(by_extension.items()):
        shard: list[int] = []
        length = len(END)
        for row in _ordered(pictures, same, config):
            need = _sample_bytes(pictures[row].size)
            if shard and length + need > config.shard_bytes:
                yield shard
                shard, length = [], len(END)
            shard.append(row)
            length += need
        yield shard


def _ordered(pictures: Sequence[SourceImage], rows: list[int], config: ConvertConfig) -> Iterable[int]:
    if config.order == "identity":
        return rows
    groups = []
    for _, group in groupby(rows, key=lambda row: pictures[row].identity):
        shuffled = _shuffled(list(group), pictures, f"{config.seed} image")
        k = config.images_per_group
        groups += [shuffled[start : start + k] for start in range(0, len(shuffled), k)]
    groups.sort(key=lambda members: _draw(f"{config.seed} group", pictures[members[0]].key))
    return [row for members in groups for row in members]


def _shuffled(rows: list[int], pictures: Sequence[SourceImage], purpose: str) -> list[int]:
    return sorted(rows, key=lambda row: _draw(purpose, pictures[row].key))


def _draw(purpose: str, name: str) -> bytes:
    """Random bits that depend on these words alone: the same on every machine and numpy, whatever else is listed."""
    return blake2b(os.fsencode(f"{purpose} {name}"), digest_size=16).digest()


def _sample_bytes(size: int) -> int:
    """Bytes that a picture and its label take in a tar: two headers, the label's block, the picture in whole blocks."""
    return 3 * BLOCK + -(-size // BLOCK) * BLOCK
