"""Lists of identities and pictures that people keep in files, and the names that belong to ids."""

import csv
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_shards.listing import Listing

_ID_COLUMNS = ("class_id", "id", "identity", "name_id")
_NAME_COLUMNS = ("name", "names")


def read_lines(path: Path | str, setting: str) -> list[str]:
    """The lines of a text file that are not blank, without quotes and spaces around them.

    Raises:
        ValueError: it cannot be read or is no text; the message names the setting.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{setting} {path} is not a text file of names") from None
    except OSError as error:
        raise ValueError(f"{setting} {path} cannot be read: {error.strerror}") from None
    return [text for line in lines if (text := line.strip().strip('"').strip())]


def read_identities(path: Path | str, setting: str) -> tuple[str, ...]:
    """Identities that a file lists, each once: a name or id a line, or pictures as `identity/image.jpg`."""
    return tuple(dict.fromkeys(line.partition("/")[0] for line in read_lines(path, setting)))


def read_identity_meta(path: Path | str) -> dict[str, str]:
    """Name of each id in VGGFace2's identity_meta.csv (columns Class_ID and Name, a space behind each comma).

    Raises:
        ValueError: it cannot be read, or has no such columns.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file, skipinitialspace=True)
            header = [title.strip().lower() for title in next(rows, [])]
            columns = [
                next((header.index(t) for t in titles if t in header), -1) for titles in (_ID_COLUMNS, _NAME_COLUMNS)
            ]
            if -1 in columns:
                raise ValueError(
                    f"identity_meta {path} has the columns {', '.join(header) or 'none'}: needed are Class_ID, Name"
                )
            return {row[columns[0]].strip(): row[columns[1]].strip() for row in rows if len(row) > max(columns)}
    except OSError as error:
        raise ValueError(f"identity_meta {path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise ValueError(f"identity_meta {path} is no CSV file: {error}") from None


def matching(wanted: Sequence[str], identities: Sequence[str], names: Mapping[str, str]) -> NDArray[np.bool_]:
    """Which identities are wanted, by what they are called in the source or by the name that belongs to that id.

    Case, accents and the difference of blanks, underscores and hyphens do not count.

    Args:
        names: name of each id, as far as known.
    """
    keys = {_plain(text) for text in wanted}
    found = [_plain(identity) in keys or _plain(names.get(identity, "")) in keys for identity in identities]
    return np.array(found, bool)


def unmatched(wanted: Sequence[str], identities: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Those of the wanted that no identity is called."""
    have = {_plain(identity) for identity in identities} | {_plain(names.get(identity, "")) for identity in identities}
    return [text for text in wanted if _plain(text) not in have]


def listed_pictures(listing: Listing, path: str) -> NDArray[np.bool_]:
    """Which pictures of a listing a file names, by the end of their path: `identity/image.jpg`.

    Raises:
        ValueError: it names none of them.
    """
    wanted = {os.fsencode(line.strip("/")) for line in read_lines(path, "only_pictures")}
    kept = np.zeros(len(listing), bool)
    for row, (place, _, _) in enumerate(listing.entries(listing.rows)):
        name = os.fsencode(place.name)
        kept[row] = name in wanted or b"/".join(name.rsplit(b"/", 2)[-2:]) in wanted
    if not kept.any():
        raise ValueError(f"only_pictures {path} names none of the {len(listing):,} pictures, like {listing.name(0)}")
    return kept


def _plain(text: str) -> str:
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return re.sub(r"[\s_-]+", " ", bare).strip().casefold()
