"""Byte index of every sample in every tar of a shard set: written by the conversion, memory-mapped by the reader."""

import hashlib
import io
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_shards.commit import HashedFile
from data_shards.commit import committed as committed  # where others look for it
from data_shards.files import local
from data_shards.remote_set import RemoteTars, fetch_manifest, fetch_tables, is_streamed
from data_shards.replacing import check_whole
from data_shards.stream_config import StreamConfig
from data_shards.tar_members import BLOCK, header_name, split_name

FORMAT = "facescale-shards"
VERSION = 2
MANIFEST = "manifest.json"
INDEX = "index.npy"
IDENTITIES = "identities.npy"
WIDS = "wids.json"

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
IDENTITY = np.dtype(
    [
        ("split", "u1"),  # position in SPLITS
        ("identity", "<u4"),  # label
        ("start", "<u8"),  # first of its rows in the split
        ("count", "<u4"),
    ]
)

_TABLE_ROWS = 2**18
_SHARD_NAME = re.compile(r"\d{6}\.tar")
_SHARD_FIELDS = (("bytes", int), ("samples", int), ("sha256", str), ("idx_sha256", str))
_SPLIT_FIELDS = (("start", int), ("identities", int), ("samples", int), ("index_sha256", str), ("shards", list))


class ShardSet:
    """A converted collection: its manifest and its splits, without any tar opened yet.

    Attributes:
        path: folder of the manifest and the index; of a set that is streamed, their copies in the cache.
        location: where the tars are: folder or URL, for messages.
        remote: None where the tars lie in `path`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], remote: RemoteTars | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.remote = remote
        self.location = remote.fetcher.location if remote else str(path)

    @classmethod
    def open(cls, location: Path | str, stream: StreamConfig | None = None) -> Self:
        """Reads and checks the manifest of a folder or, through the cache, of a URL.

        Raises:
            ValueError: no manifest there, not ours, of another version, or a field missing or of the wrong type; or a URL
                whose scheme is not admitted, or that cannot be read.
        """
        stream = stream or StreamConfig()
        if not is_streamed(location, stream):
            path = local(location)
            return cls(path, read_manifest(path))
        remote, path = fetch_manifest(location, stream, MANIFEST)
        manifest = read_manifest(path, f"{remote.fetcher.location}/{MANIFEST}")
        tables = {
            INDEX: _table_bytes(SAMPLE, sum(split["samples"] for split in manifest["splits"].values())),
            IDENTITIES: _table_bytes(IDENTITY, sum(split["identities"] for split in manifest["splits"].values())),
        }
        fetch_tables(remote, path, tables, manifest["files"])
        return cls(path, manifest, remote)

    @cached_property
    def identity_names(self) -> list[str]:
        """Name of each identity as its folder was called; the position is the label."""
        return self.manifest["identities"]

    @property
    def fingerprint(self) -> str:
        """Of the training split, as `Split.fingerprint`."""
        return _fingerprint(self.manifest["splits"][self.splits[0]])

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that this set has, in the order of `SPLITS`."""
        return tuple(name for name in SPLITS if name in self.manifest["splits"])

    def split(self, name: str) -> "Split":
        """Opens one split and checks that its files are as long as the manifest says.

        Raises:
            ValueError: no such split here, or a tar or the index is missing, of the wrong size or inconsistent.
        """
        if name not in SPLITS or name not in self.splits:
            raise ValueError(f"{self.location} has no split {name!r}: it has {', '.join(self.splits)}")
        return Split(self.path, name, self.manifest, self.remote)

    def check_identities(self, name: str, samples: NDArray[Any]) -> None:
        """Compares identities.npy with a split's rows of the index, of `SAMPLE`.

        Raises:
            ValueError: they do not agree.
        """
        own = _identities(self.path, name, self.manifest)
        if (samples["identity"][own["start"].astype(np.int64)] != own["identity"]).any():
            raise ValueError(f"{self.path / IDENTITIES} does not fit the index: convert again")


def _fingerprint(entry: dict[str, Any]) -> str:
    digests = [entry["index_sha256"], *(shard["sha256"] for shard in entry["shards"])]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


class Split:
    """One split of a shard set; the row number in `samples` is the sample's id.

    Attributes:
        name: one of `SPLITS`.
        shards: path of each tar; `samples["shard"]` points into it. Where `remote` is given, no such file need be there.
        shard_bytes: length of each tar, uint64, shape (s,).
        remote: where the tars are instead, or None; `reader.open_reader` reads both.
        samples: read-only memory map of `SAMPLE`, shape (n,), sorted by (identity, key).
        identities: labels present, ascending, shape (i,).
        starts: first row of each of them and, last, n: shape (i + 1,).
        counts: samples of each of them, shape (i,).
    """

    def __init__(self, root: Path, name: str, manifest: dict[str, Any], remote: RemoteTars | None = None) -> None:
        self.name, self.remote = name, remote
        self.directory = root / name
        self._root = root
        self._entry = entry = manifest["splits"][name]
        self.shards = [self.directory / shard["name"] for shard in entry["shards"]]
        if remote is None:
            self.check_sizes()
        self.shard_bytes = np.array([shard["bytes"] for shard in entry["shards"]], dtype=np.uint64)
        total = sum(split["samples"] for split in manifest["splits"].values())
        self.samples = map_table(root / INDEX, SAMPLE, total)[entry["start"] : entry["start"] + entry["samples"]]
        own = _identities(root, name, manifest)
        self.identities, self.counts = own["identity"], own["count"]
        self.starts = np.append(own["start"], len(self.samples)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, sample: int) -> str:
        """`__key__` of a sample, read from the tar header in front of its image; `reader.keys_of` reads many.

        Raises:
            ValueError: there is no USTAR header at that place, or it could not be fetched.
        """
        row = self.samples[sample]
        shard, start = self.shards[row["shard"]], int(row["offset"]) - BLOCK
        if self.remote is not None:
            file = f"{self.name}/{shard.name}"
            name = header_name(self.remote.cache.read(f"{self.remote.name}/{file}", [(start, start + BLOCK)])[0])
            name = name or header_name(self.remote.fetcher.read(file, start, start + BLOCK))
        else:
            with shard.open("rb") as tar:
                tar.seek(start)
                name = header_name(tar.read(BLOCK))
        if name is None:
            raise ValueError(f"shard {shard} has no tar header before byte {row['offset']:,}: run `facescale verify`")
        return split_name(name)[0]

    @property
    def fingerprint(self) -> str:
        """Of every picture and its place: SHA-256 of the SHA-256s of the index' rows and of all tars.

        The rows' CRC-32 alone would not do: that of a PNG, whose chunks end in their own, says little more than their lengths.
        """
        return _fingerprint(self._entry)

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

    def check_places(self, rows: NDArray[Any]) -> None:
        """Compares rows of the index with the sizes of the tars, so that nothing is read from outside them.

        Raises:
            ValueError: a row points to no shard or outside its tar.
        """
        inside = bool((rows["shard"] < len(self.shard_bytes)).all())
        inside = inside and bool((rows["offset"] >= BLOCK).all())
        inside = inside and bool((rows["offset"] + rows["size"] <= self.shard_bytes[rows["shard"]]).all())
        if not inside:
            raise ValueError(f"{self._root / INDEX} does not fit its tars: run `facescale verify {self._root}`")


def _identities(root: Path, name: str, manifest: dict[str, Any]) -> NDArray[Any]:
    """A split's part of identities.npy, of `IDENTITY`.

    Raises:
        ValueError: it is missing, of another length, or its counts and starts do not make up the split.
    """
    rows = sum(split["identities"] for split in manifest["splits"].values())
    table = map_table(root / IDENTITIES, IDENTITY, rows)
    own = table[table["split"] == SPLITS.index(name)]
    ends = np.cumsum(own["count"], dtype=np.uint64)
    entry = manifest["splits"][name]
    whole = len(own) == entry["identities"] > 0 and int(ends[-1]) == entry["samples"]
    if not whole or (own["start"] != ends - own["count"]).any() or (own["identity"][1:] <= own["identity"][:-1]).any():
        raise ValueError(f"{root / IDENTITIES} does not fit the index: run `facescale verify {root}`")
    return own


def read_manifest(directory: Path, name: str | None = None) -> dict[str, Any]:
    """Reads and checks `directory`/manifest.json, which messages call `name`; see `ShardSet.open`."""
    path: Any = directory / MANIFEST
    check_whole(directory)
    if not path.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST}: it is no finished output of `facescale shard`")
    try:
        text, path = path.read_text(encoding="utf-8"), name or path
        manifest = json.loads(text)
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


def write_table(file: HashedFile, table: NDArray[Any]) -> None:
    """Writes a one-dimensional array as .npy."""
    file.write(_header(table.dtype, len(table)))
    for start in range(0, len(table), _TABLE_ROWS):
        file.write(table[start : start + _TABLE_ROWS].tobytes())


def map_table(path: Path, dtype: np.dtype[Any], rows: int) -> NDArray[Any]:
    """Read-only map of a table of so many rows.

    Raises:
        ValueError: it is missing or of another length or type.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: convert again")
    header = _header(dtype, rows)
    size, expected = path.stat().st_size, _table_bytes(dtype, rows)
    if size != expected:
        raise ValueError(f"{path} is {size:,} bytes, one of {rows:,} rows has {expected:,}: convert again")
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise ValueError(f"{path} does not begin like one of {rows:,} rows: convert again")
    return np.memmap(path, dtype, "r", offset=len(header), shape=(rows,))


def _table_bytes(dtype: np.dtype[Any], rows: int) -> int:
    return len(_header(dtype, rows)) + rows * dtype.itemsize


def _header(dtype: np.dtype[Any], rows: int) -> bytes:
    """What a one-dimensional .npy file begins with."""
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (rows,)})
    return file.getvalue()


def _flaw(manifest: dict[str, Any]) -> str | None:
    """What is wrong with the fields that opening relies on, or None."""
    names, splits = manifest.get("identities"), manifest.get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "'identities' is not a list of names"
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("images"), list):
        return "it lacks 'files' or 'images'"
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
