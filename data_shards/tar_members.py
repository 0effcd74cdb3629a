"""Members of a WebDataset tar: their names, and DALI's index of them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

BLOCK = 512
"""Bytes of a tar block: a member is one header block and its data, padded to whole blocks."""


class Member(NamedTuple):
    """One file of a sample as DALI's index wants it."""

    extension: str
    offset: int
    """Of the file's first byte in the tar, behind its header."""
    size: int
    name: str


def dali_index(samples: Sequence[Iterable[Member]]) -> bytes:
    """One tar's index in DALI's format v1.2, a line for each sample in the tar's order."""
    lines = [f"v1.2 {len(samples)}"]
    lines += [" ".join([f"{m[0]} {m[1]} {m[2]} {m[3]}" for m in members]) for members in samples]
    return "\n".join([*lines, ""]).encode("ascii")


def header_name(block: bytes) -> str | None:
    """Member name in a USTAR header block; None where the block is none."""
    if len(block) < BLOCK or block[257:263] != b"ustar\0":
        return None
    return block[:100].rstrip(b"\0").decode("ascii", "replace")


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member name, split at the first dot behind the last slash as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension
