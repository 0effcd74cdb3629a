"""Hugging Face data sets: Parquet and Arrow files with an image and a label column."""

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_shards.files import is_remote, local, name_of, open_file
from data_shards.sources.archives import describe_files
from data_shards.sources.base import Found, Place, Reader, extension_of, sniff

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")
LABEL_COLUMNS = ("label", "identity", "identity_id", "id_label", "class", "cls", "name")
_BATCH = 64
_GROUPS_KEPT = 2


class _Layout(NamedTuple):
    image: str
    label: str
    names: list[str] | None
    """What the labels' numbers stand for."""


@dataclass(frozen=True)
class Tables:
    """Pictures are bytes, or a struct of bytes and path as `datasets` writes it; labels a number, the number of
    a ClassLabel, or a name."""

    locations: tuple[str, ...]
    image: str = ""
    """Column; empty: found out."""
    label: str = ""

    @property
    def streams(self) -> bool:
        return any(_is_parquet(location) for location in self.locations)

    def describe(self) -> dict[str, str | int]:
        return {"kind": "tables", **describe_files(self.locations)}

    def pictures(self) -> Iterator[Found]:
        for part, location in enumerate(self.locations):
            layout = _layout(location, _schema(location), self.image, self.label)
            name, row = name_of(location), 0
            for images, labels in _batches(location, layout):
                for value, label in zip(images, labels, strict=True):
                    yield _found(name, part, row, value, label, layout.names)
                    row += 1

    def open(self) -> Reader:
        layouts = [_layout(location, _schema(location), self.image, self.label) for location in self.locations]
        return _TableReader(self.locations, [layout.image for layout in layouts])


def has_pictures(location: str) -> bool:
    """Whether a Parquet file has a column of pictures, and not only of their paths."""
    try:
        return bool(_image_columns(_schema(location)))
    except ValueError:
        return False


def _found(name: str, part: int, row: int, value: Any, label: Any, names: list[str] | None) -> Found:
    called = f"{name} row {row}"
    path = value.get("path") if isinstance(value, dict) else None
    data = value.get("bytes") if isinstance(value, dict) else value
    refused, identity, extension = "", "", ""
    if data is None:
        refused = "has no bytes (only a path)" if path else "has no bytes"
    else:
        extension = (extension_of(path) if isinstance(path, str) else None) or sniff(data[:12])
        refused = "" if extension else "is no JPEG, PNG, PGM, BMP or WebP by its first bytes" if data else "is empty"
    try:
        identity = _identity(label, names)
    except ValueError as error:
        refused = refused or str(error)
    base = name_of(path) if isinstance(path, str) and path else ""
    stem = base[: base.rfind(".")] if "." in base else base or f"{part:05d}-{row:08d}"
    return Found(identity, called, stem, len(data or b""), extension, part, row, 0, refused)


def _identity(label: Any, names: list[str] | None) -> str:
    if isinstance(label, str) and label:
        return label
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ValueError(f"has the label {label!r}: allowed are names and numbers from 0")
    if names is None:
        return f"{label:07d}"
    if label >= len(names):
        raise ValueError(f"has the label {label}: the file names {len(names):,} classes")
    return names[label]


class _TableReader:
    """Keeps the last row groups of Parquet files; rows of Arrow files are read where they lie."""

    def __init__(self, locations: tuple[str, ...], columns: list[str]) -> None:
        self._locations, self._columns = locations, columns
        self._files: dict[int, Any] = {}
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def read(self, place: Place) -> bytes:
        import pyarrow as pa

        try:
            value = self._value(place.part, place.offset)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"is in a damaged part of the file: {_line(error)}") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise ValueError("has no bytes")
        return bytes(data)

    def _value(self, part: int, row: int) -> Any:
        if part not in self._files:
            self._files[part] = _open(self._locations[part])
        file = self._files[part]
        if not _is_parquet(self._locations[part]):
            return file.column(self._columns[part])[row].as_py()
        group = 0
        while row >= (rows := file.metadata.row_group(group).num_rows):
            row -= rows
            group += 1
        if (part, group) not in self._groups:
            self._groups[part, group] = file.read_row_group(group, columns=[self._columns[part]]).column(0)
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end((part, group))
        return self._groups[part, group][row].as_py()

    def close(self) -> None:
        for part, file in self._files.items():
            if _is_parquet(self._locations[part]):
                file.close(force=True)
        self._files.clear()
        self._groups.clear()


def _is_parquet(location: str) -> bool:
    return location.lower().endswith(".parquet")


def _open(location: str) -> Any:
    """A ParquetFile, or the table of an Arrow file, mapped.

    Raises:
        ValueError: it cannot be read.
    """
    import pyarrow as pa
    from pyarrow import ipc, parquet

    try:
        if _is_parquet(location):
            file = open_file(location)
            try:
                return parquet.ParquetFile(file, pre_buffer=False)
            except BaseException:
                file.close()
                raise
        if is_remote(location):
            raise ValueError(f"source {location} is a URL: Arrow files must lie on this machine, Parquet need not")
        mapped = pa.memory_map(str(local(location)), "r")
        try:
            return ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            return ipc.open_file(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source {location} is no Parquet or Arrow file that can be read: {_line(error)}") from None


def _schema(location: str) -> Any:
    opened = _open(location)
    schema = opened.schema_arrow if _is_parquet(location) else opened.schema
    if _is_parquet(location):
        opened.close(force=True)
    return schema


def _image_columns(schema: Any) -> list[str]:
    import pyarrow as pa

    found = []
    for field in schema:
        binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        struct = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if struct or (binary and field.name.lower() in IMAGE_COLUMNS):
            found.append(field.name)
    return found


def _layout(location: str, schema: Any, image: str, label: str) -> _Layout:
    """Which columns hold pictures and labels.

    Raises:
        ValueError: there are none, or several.
    """
    columns = ", ".join(schema.names)
    images = [image] if image else _image_columns(schema)
    labels = [label] if label else [name for name in LABEL_COLUMNS if name in schema.names][:1]
    for what, found, option in (("pictures", images, "--image-column"), ("labels", labels, "--label-column")):
        if len(found) != 1 or found[0] not in schema.names:
            raise ValueError(f"source {location} has the columns {columns}: name that of the {what} with {option}")
    return _Layout(images[0], labels[0], _names(schema, labels[0]))


def _names(schema: Any, label: str) -> list[str] | None:
    """Names of a ClassLabel column, which `datasets` keeps in the schema's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _batches(location: str, layout: _Layout) -> Iterator[tuple[list[Any], list[Any]]]:
    """Pictures and labels, some rows at a time."""
    import pyarrow as pa

    opened = _open(location)
    wanted = [layout.image, layout.label]
    try:
        batches = (
            opened.iter_batches(_BATCH, columns=wanted)
            if _is_parquet(location)
            else opened.select(wanted).to_batches(max_chunksize=_BATCH)
        )
        for batch in batches:
            yield batch.column(layout.image).to_pylist(), batch.column(layout.label).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"source {location} is damaged: {_line(error)}") from None
    finally:
        if _is_parquet(location):
            opened.close(force=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
