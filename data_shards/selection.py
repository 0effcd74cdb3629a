"""Which pictures of a listing are converted, and how many each rule leaves out."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.convert_config import ConvertConfig
from data_shards.identity_lists import listed_pictures, matching, unmatched
from data_shards.listing import Listing
from data_shards.survey import first_rows


class Selection(NamedTuple):
    """Attributes:
    kept: the pictures to convert, shape (n,).
    filtered: how many each rule has left out, by the rule.
    duplicates: (row, row that it repeats, "exact" or "near") of every picture found to be one.
    """

    kept: NDArray[np.bool_]
    filtered: dict[str, int]
    duplicates: list[tuple[int, int, str]]


def select(
    listing: Listing, config: ConvertConfig, names: Mapping[str, str], survey: NDArray[Any] | None = None
) -> Selection:
    """Applies the filters one after the other; a picture counts under the first that leaves it out.

    Args:
        names: name of each identity's id, as far as known.
        survey: of `survey.SURVEY`, shape (n,), where duplicates are asked for.
    Raises:
        ValueError: a list names an identity that is not there, or nothing is left.
    """
    kept = np.ones(len(listing), bool)
    filtered: dict[str, int] = {}

    def leave_out(rule: str, out: NDArray[np.bool_]) -> None:
        if count := int((kept & out).sum()):
            filtered[rule] = count
            np.logical_and(kept, ~out, out=kept)

    owners = listing.rows["identity"]
    if config.keep_identities is not None:
        if missing := unmatched(config.keep_identities, listing.identities, names):
            raise ValueError(
                f"keep_identities names {missing[0]!r}, which is not among the {len(listing.identities):,} identities"
            )
        leave_out(
            "identity not in keep_identities", ~matching(config.keep_identities, listing.identities, names)[owners]
        )
    if config.leave_out_identities:
        leave_out(
            "identity in leave_out_identities", matching(config.leave_out_identities, listing.identities, names)[owners]
        )
    if config.only_pictures:
        leave_out("picture not in only_pictures", ~listed_pictures(listing, config.only_pictures))
    duplicates = _duplicates(config, kept, owners, survey, leave_out)
    counts = np.bincount(owners[kept], minlength=len(listing.identities))
    leave_out("identity with fewer than min_images", counts[owners] < config.min_images)
    if not kept.any():
        raise ValueError(f"no picture is left: {', '.join(f'{rule}: {count:,}' for rule, count in filtered.items())}")
    return Selection(kept, filtered, duplicates)


def _duplicates(
    config: ConvertConfig, kept: NDArray[np.bool_], owners: NDArray[Any], survey: NDArray[Any] | None, leave_out: Any
) -> list[tuple[int, int, str]]:
    found = []
    for kind, choice, distance in (
        ("exact", config.duplicates, None),
        ("near", config.near_duplicates, config.near_distance),
    ):
        if choice == "keep":
            continue
        assert survey is not None
        rows = np.flatnonzero(kept)
        first = rows[first_rows(survey[rows], owners[rows], distance)]
        repeated = rows != first
        found += [(int(row), int(of), kind) for row, of in zip(rows[repeated], first[repeated], strict=True)]
        if choice == "drop":
            out = np.zeros(len(kept), bool)
            out[rows[repeated]] = True
            leave_out(f"{kind} duplicate", out)
    return found


def overlap(wanted: tuple[str, ...], listing: Listing, names: Mapping[str, str]) -> list[str]:
    """Identities of the listing that are among the wanted."""
    if not wanted:
        return []
    return sorted(np.array(listing.identities, object)[matching(wanted, listing.identities, names)], key=os.fsencode)
