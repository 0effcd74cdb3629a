"""InsightFace's verification sets (lfw.bin, cfp_fp.bin, agedb_30.bin): a pickle of pictures and of which pairs are the same."""

import codecs
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_shards.files import name_of, open_file
from data_shards.sources.archives import describe_files
from data_shards.sources.base import MAX_IMAGE_BYTES, Found, Place, Reader, sniff

MAX_BYTES = 2**34
"""A larger file is no verification set, and it is read as a whole."""


class _Set(NamedTuple):
    pictures: list[Any]
    same: list[bool]


@dataclass(frozen=True)
class InsightFaceBin:
    """Pictures 2 i and 2 i + 1 are pair i. The file knows no identities: they are recovered from what it says.

    Byte-identical pictures and those of genuine pairs are of one identity, named by its first picture. What nothing joins is
    taken for different people, although the same person may be there more than once.
    """

    location: str
    streams = False

    def describe(self) -> dict[str, str | int]:
        return {"kind": "bin", **describe_files((self.location,))}

    def pictures(self) -> Iterator[Found]:
        found = _load(self.location)
        name = name_of(self.location)
        for row, identity in enumerate(_identities(found)):
            data = found.pictures[row]
            called = f"{name} image {row}"
            try:
                encoded = _bytes_of(data)
            except ValueError as error:
                yield Found("", called, "", 0, "", refused=str(error))
                continue
            extension = sniff(encoded[:12])
            reason = "" if extension else "is no JPEG, PNG, PGM, BMP or WebP by its first bytes"
            yield Found(f"{identity:06d}", called, f"{row:06d}", len(encoded), extension, 0, row, 0, reason)

    def pairs(self) -> Iterator[tuple[str, str, bool]]:
        """Names, as in `Found`, of the two pictures of each pair, and whether they show the same person."""
        name = name_of(self.location)
        for number, same in enumerate(_load(self.location).same):
            yield f"{name} image {2 * number}", f"{name} image {2 * number + 1}", same

    def open(self) -> Reader:
        return _BinReader(self.location)


class _BinReader:
    def __init__(self, location: str) -> None:
        self._location = location

    def read(self, place: Place) -> bytes:
        return _bytes_of(_load(self._location).pictures[place.offset])

    def close(self) -> None:
        _load.cache_clear()


class _Unpickler(pickle.Unpickler):
    """Admits what a list of bytes, arrays and truth values needs, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
            ("numpy.core.multiarray", "scalar"): _scalar,
            ("numpy._core.multiarray", "scalar"): _scalar,
            ("numpy.core.numeric", "_frombuffer"): _frombuffer,
            ("numpy._core.numeric", "_frombuffer"): _frombuffer,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): _encode,
            ("builtins", "bytes"): _no_bytes,
            ("__builtin__", "bytes"): _no_bytes,
            ("builtins", "bytearray"): _bytearray,
            ("__builtin__", "bytearray"): _bytearray,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no verification set needs")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> Any:
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("it holds an array of an unusual kind")
    return np.ndarray((0,), np.uint8)


def _dtype(name: Any, *_: Any) -> Any:
    text = name.decode("ascii") if isinstance(name, bytes) else name
    if text not in ("u1", "b1", "i1", "|u1", "|b1", "bool", "uint8"):
        raise pickle.UnpicklingError(f"it holds an array of {text!r}: allowed are bytes and truth values")
    return np.dtype(text)


def _scalar(dtype: Any, data: Any = b"\0") -> Any:
    if not isinstance(dtype, np.dtype) or dtype.itemsize != 1 or not isinstance(data, bytes | str):
        raise pickle.UnpicklingError("it holds a number of an unusual kind")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw[:1], dtype)[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("it encodes text in an unusual way")
    return codecs.encode(text, "latin1")


def _no_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise pickle.UnpicklingError("it builds bytes in an unusual way")
    return b""


def _bytearray(data: Any = b"", encoding: Any = "latin1") -> bytes:
    if not isinstance(data, str | bytes):
        raise pickle.UnpicklingError("it builds bytes in an unusual way")
    return _encode(data, encoding) if isinstance(data, str) else data


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(buffer, bytes | bytearray):
        raise pickle.UnpicklingError("it holds an array of an unusual kind")
    return np.frombuffer(buffer, dtype).reshape(shape)


@lru_cache(maxsize=1)
def _load(location: str) -> _Set:
    try:
        with open_file(location) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"source {location} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"source {location} is larger than {MAX_BYTES:,} bytes: it is no verification set")
    try:
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"source {location} is refused or no verification set: {reason}") from None
    del data
    return _checked(location, found)


def _checked(location: str, found: Any) -> _Set:
    if (
        not isinstance(found, tuple | list)
        or len(found) != 2
        or not all(isinstance(part, list | np.ndarray) for part in found)
    ):
        raise ValueError(
            f"source {location} is no verification set: it must be two lists, of pictures and of truth values"
        )
    pictures, same = list(found[0]), list(found[1])
    if len(pictures) != 2 * len(same):
        counts = f"{len(pictures):,} pictures and {len(same):,} pairs"
        raise ValueError(f"source {location} is no whole verification set: it holds {counts}, two pictures make a pair")
    if not all(isinstance(value, bool | np.bool_ | int | np.integer) for value in same):
        raise ValueError(f"source {location} is no verification set: its second list must hold truth values")
    pictures = [bytes(data) if isinstance(data, bytearray) else data for data in pictures]
    return _Set(pictures, [bool(value) for value in same])


def _bytes_of(data: Any) -> bytes:
    if isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 1:
        data = data.tobytes()
    if not isinstance(data, bytes):
        raise ValueError(f"is no encoded picture but of the type {type(data).__name__}")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"is {len(data):,} bytes: allowed are {MAX_IMAGE_BYTES:,}")
    return data


def _identities(found: _Set) -> list[int]:
    """The first picture of each picture's identity."""
    first = list(range(len(found.pictures)))

    def root(row: int) -> int:
        while first[row] != row:
            first[row] = first[first[row]]
            row = first[row]
        return row

    def join(a: int, b: int) -> None:
        a, b = sorted((root(a), root(b)))
        first[b] = a

    seen: dict[Any, int] = {}
    for row, data in enumerate(found.pictures):
        key = data.tobytes() if isinstance(data, np.ndarray) else data
        if isinstance(key, bytes):
            join(seen.setdefault(key, row), row)
    for number, same in enumerate(found.same):
        if same:
            join(2 * number, 2 * number + 1)
    return [root(row) for row in range(len(first))]
