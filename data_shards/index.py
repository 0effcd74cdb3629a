"""Byte index of every sample in every tar of a shard set: written by the conversion, memory-mapped by the reader."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

FORMAT = "facescale-shards"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
BLOCK = 512
"""Bytes of a tar block: a member is one header block and its data, padded to whole blocks."""

SPLITS = ("train", "unseen_identities", "unseen_images")
SAMPLE = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in its tar
        ("size", "<u4"),  # of the image, in bytes
        ("shard", "<u4"),  # position in the split's list of shards
        ("identity", "<u4"),  # label
        ("crc32", "<u4"),  # of the image's bytes
        ("width", "<u2"),  # pixels
        ("height", "<u2"),
    ]
)

_SHARD_NAME = re.compile(r"\d{6}\.tar")
_SHARD_FIELDS = (("bytes", int), ("samples", int), ("sha256", str), ("idx_sha256", str))
_SPLIT_FIELDS = (("identities", int), ("samples", int), ("index_sha256", str), ("shards", list))


class Member(NamedTuple):
    """One file of a sample as DALI's index wants it."""

    extension: str
    offset: int
    """Of the file's first byte in the tar, behind its header."""
    size: int
    name: str


class ShardSet:
    """A converted collection: its manifest and its splits, without any tar opened yet."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Reads and checks `path`/manifest.json.

        Raises:
            ValueError: no manifest there, not ours, of another version, or a field missing or of the wrong type.
        """
        path = Path(path)
        return cls(path, read_manifest(path))

    @cached_property
    def identity_names(self) -> list[str]:
        """Name of each identity as its folder was called; the position is the label."""
        return self.manifest["identities"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training split's index, which has the checksum of every picture."""
        return self.manifest["splits"]["train"]["index_sha256"]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that this set has, in the order of `SPLITS`."""
        return tuple(name for name in SPLITS if name in self.manifest["splits"])

    def split(self, name: str) -> "Split":
        """Opens one split and checks that its files are as long as the manifest says.

        Raises:
            ValueError: no such split here, or a tar or the index is missing, of the wrong size or inconsistent.
        """
        if name not in self.splits:
            raise ValueError(f"{self.path} has no split {name!r}: it has {', '.join(self.splits)}")
        return Split(self.path, name, self.manifest["splits"][name])


class Split:
    """One split of a shard set; the row number in `samples` is the sample's id.

    Attributes:
        name: one of `SPLITS`.
        shards: path of each tar; `samples["shard"]` points into it.
        samples: read-only memory map of `SAMPLE`, shape (n,), sorted by (identity, key).
        identities: labels present, ascending, shape (i,).
        starts: first row of each of them and, last, n: shape (i + 1,).
        counts: samples of each of them, shape (i,).
    """

    def __init__(self, root: Path, name: str, entry: dict[str, Any]) -> None:
        self.name = name
        self.directory = root / name
        self._root = root
        self._entry = entry
        self.shards = [self.directory / shard["name"] for shard in entry["shards"]]
        self.check_sizes()
        self.samples = map_index(self.directory / INDEX, entry["samples"])
        self._check_ranges()
        self.identities, first = np.unique(self.samples["identity"], return_index=True)
        self.starts = np.append(first, len(self.samples)).astype(np.int64)
        self.counts = np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, sample: int) -> str:
        """`__key__` of a sample, read from the tar header in front of its image.

        Raises:
            ValueError: there is no USTAR header at that place.
        """
        row = self.samples[sample]
        shard = self.shards[row["shard"]]
        with shard.open("rb") as tar:
            tar.seek(int(row["offset"]) - BLOCK)
            name = header_name(tar.read(BLOCK))
        if name is None:
            raise ValueError(f"shard {shard} has no tar header before byte {row['offset']:,}: run `facescale verify`")
        return split_name(name)[0]

    def check_sizes(self) -> None:
        """Compares every tar's size with the manifest, so that nothing too short is ever mapped.

        Raises:
            ValueError: a tar is missing, shorter or longer.
        """
        hint = f"Run `facescale verify {self._root}` and convert again."
        for path, shard in zip(self.shards, self._entry["shards"], strict=True):
            if not path.is_file():
                raise ValueError(f"shard {path} is missing, the manifest lists it. {hint}")
            found, expected = path.stat().st_size, shard["bytes"]
            if found != expected:
                how = "cut short" if found < expected else "changed"
                message = f"shard {path} is {found:,} bytes, its manifest says {expected:,}: it was {how}. {hint}"
                raise ValueError(message)

    def _check_ranges(self) -> None:
        samples = self.samples
        sizes = np.array([shard["bytes"] for shard in self._entry["shards"]], dtype=np.uint64)
        inside = bool((samples["shard"] < len(sizes)).all())
        inside = inside and bool((samples["offset"] >= BLOCK).all())
        inside = inside and bool((samples["offset"] + samples["size"] <= sizes[samples["shard"]]).all())
        if not inside or (samples["identity"][1:] < samples["identity"][:-1]).any():
            raise ValueError(f"{self.directory / INDEX} does not fit its tars: run `facescale verify {self._root}`")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads and checks `directory`/manifest.json; see `ShardSet.open`."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST}: it is no finished output of `facescale shard`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} does not say format {FORMAT!r}: it was not written by `facescale shard`")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{path} is of version {manifest.get('version')!r}, this facescale reads version {VERSION}")
    flaw = _flaw(manifest)
    if flaw:
        raise ValueError(f"{path} is damaged: {flaw}. Convert again.")
    return manifest


def write_index(path: Path, samples: NDArray[Any]) -> str:
    """Writes `samples` (of `SAMPLE`, sorted by identity, then key) as .npy; returns the file's SHA-256."""
    assert samples.dtype == SAMPLE, samples.dtype
    assert len(samples), "an empty array cannot be mapped"
    header = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False, "shape": samples.shape}
    with committed(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(samples.tobytes())
    return file.sha256


def write_dali_index(path: Path, samples: Sequence[Iterable[Member]]) -> str:
    """Writes one tar's index in DALI's format v1.2, a line for each sample in the tar's order; returns its SHA-256."""
    lines = [f"v1.2 {len(samples)}"]
    lines += [" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members) for members in samples]
    with committed(path) as file:
        file.write("\n".join([*lines, ""]).encode("ascii"))
    return file.sha256


class HashedFile:
    """A file being written, with its length and SHA-256 so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.length += len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def committed(path: Path) -> Iterator[HashedFile]:
    """A file that gets its name only when it is whole and on the disk; an exception leaves nothing behind."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield HashedFile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def map_index(path: Path, rows: int) -> np.memmap[Any, Any]:
    """Read-only map of an index of so many rows.

    Raises:
        ValueError: it is missing, no array, or of another length or type.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: convert again")
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no index: {error}") from None
    if not isinstance(samples, np.memmap) or samples.dtype != SAMPLE or samples.shape != (rows,):
        found = f"{getattr(samples, 'shape', type(samples))} of {getattr(samples, 'dtype', 'no array')}"
        raise ValueError(f"{path} is {found}, the manifest says ({rows},) of {SAMPLE}: convert again")
    return samples


def _flaw(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the fields that opening relies on, or None."""
    names, splits = manifest.get("identities"), manifest.get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "'identities' is not a list of names"
    if not isinstance(splits, dict) or not splits or set(splits) - set(SPLITS):
        return f"'splits' is not an object of {', '.join(SPLITS)}"
    for split, entry in splits.items():
        for field, kind in _SPLIT_FIELDS:
            if not isinstance(entry, dict) or type(entry.get(field)) is not kind:
                return f"split {split} lacks {field!r}"
        for number, shard in enumerate(entry["shards"]):
            if not isinstance(shard, dict) or any(type(shard.get(field)) is not kind for field, kind in _SHARD_FIELDS):
                return f"split {split}, shard {number} lacks one of name, bytes, samples, sha256, idx_sha256"
            if not _SHARD_NAME.fullmatch(str(shard.get("name"))):
                return f"split {split}, shard {number} is named {shard.get('name')!r}, not like 000000.tar"
    return None
