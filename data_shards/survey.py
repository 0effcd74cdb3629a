"""Reads every picture once before the shards are planned, to find duplicates."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.duplicates import exact_groups, fingerprint, near_groups, perceptual_hash
from data_shards.listing import Listing
from data_shards.sources.base import MAX_IMAGE_BYTES, Source

SURVEY_ROWS = 8192
"""Pictures of one task."""
SURVEY = np.dtype([("exact", "<u8", (2,)), ("near", "<u8"), ("readable", "?"), ("hashed", "?")])


def survey_rows(listing: Listing, rows: NDArray[Any], source: Source, near: bool) -> NDArray[Any]:
    """Fingerprints of pictures, of `SURVEY`, shape (len(rows),). What cannot be read is never a duplicate."""
    table = np.zeros(len(rows), SURVEY)
    reader = source.open()
    order = np.lexsort((rows["offset"], rows["part"])) if source.streams else np.arange(len(rows))
    for row, (place, _, _) in zip(order, listing.entries(rows[order]), strict=True):
        try:
            data = reader.read(place) if place.size <= MAX_IMAGE_BYTES else b""
        except (ValueError, OSError):
            continue
        table["exact"][row] = np.frombuffer(fingerprint(data), "<u8")
        table["readable"][row] = bool(data)
        if near and (value := _perceptual(data)) is not None:
            table["near"][row], table["hashed"][row] = value, True
    reader.close()
    return table


def first_rows(table: NDArray[Any], identities: NDArray[Any], distance: int | None) -> NDArray[np.int64]:
    """For each row the first row that it is a duplicate of, itself where it is none.

    Args:
        table: of `SURVEY`, shape (n,).
        identities: of each row, shape (n,).
        distance: bits in which the perceptual hashes of near duplicates of one identity may differ; None: byte-identical
            pictures alone, of any identity.
    """
    first = np.arange(len(table))
    usable = np.flatnonzero(table["readable"] if distance is None else table["hashed"])
    if distance is None:
        groups = exact_groups(table["exact"][usable])
    else:
        groups = near_groups(table["near"][usable], distance, within=identities[usable])
    first[usable] = usable[groups]
    return first


def _perceptual(data: bytes) -> int | None:
    try:
        return perceptual_hash(data)
    except ValueError:
        return None
