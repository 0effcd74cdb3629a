"""Finds out what kind of source something is."""

import os
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from data_shards.files import is_remote, local, name_of
from data_shards.sources.base import Source, extension_of

_CLASSES = {
    "folders": ("folders", "Folders"),
    "zip": ("archives", "ZipArchive"),
    "tar": ("archives", "TarArchive"),
    "tar.gz": ("archives", "GzipTarArchive"),
    "webdataset": ("webdataset", "WebDatasetShards"),
    "recordio": ("recordio", "RecordIO"),
    "bin": ("insightface_bin", "InsightFaceBin"),
    "lmdb": ("lmdb_source", "Lmdb"),
    "tables": ("tables", "Tables"),
    "list": ("lists", "PictureList"),
}
FORMATS = ("auto", *_CLASSES)
"""Names of the kinds of source; `auto` finds out."""


def _class(kind: str) -> Any:
    module, name = _CLASSES[kind]
    return getattr(import_module(f"data_shards.sources.{module}"), name)


def spec_of(source: Source) -> dict[str, Any]:
    """A source as JSON, for a process that goes on with the conversion."""
    kind = next(kind for kind, (_, name) in _CLASSES.items() if name == type(source).__name__)
    return {"format": kind, **asdict(source)}  # type: ignore[call-overload]


def from_spec(spec: dict[str, Any]) -> Source:
    """The source that `spec_of` has described."""
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in spec.items() if name != "format"
    }
    source: Source = _class(spec["format"])(**values)
    return source


def open_source(location: str | os.PathLike[str], format: str = "auto", **named: str) -> Source:
    """The source at a path or URL.

    Args:
        location: a folder, an archive, a list, … or a folder of such files.
        format: one of `FORMATS`.
        named: `image`, `label` (columns of tables, field of WebDataset samples) and `root` (of a list's paths), where given.
    Raises:
        ValueError: nothing is there, its kind is not known, or a setting does not belong to that kind.
    """
    text = os.fspath(location)
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if not is_remote(text):
        text = str(local(text))
        if not os.path.exists(text):
            raise ValueError(f"source {text} is not there")
    kind, places = (format, _places(text, format)) if format != "auto" else _detect(text)
    kept = {name: value for name, value in named.items() if value}
    takes = {field.name for field in fields(_class(kind))}
    for name in kept:
        if name not in takes:
            raise ValueError(f"source {text} is read as {kind}, which has no setting {name!r}")
    source: Source = _class(kind)(places if "locations" in takes else text, **kept)
    return source


def _detect(location: str) -> tuple[str, tuple[str, ...]]:
    """(kind, the files that make up the source)."""
    if _is_folder(location):
        return _detect_folder(location)
    lower = name_of(location).lower()
    if lower.endswith(".rec"):
        return "recordio", (location,)
    if lower.endswith(".bin"):
        return "bin", (location,)
    if lower.endswith((".mdb", ".lmdb")):
        return "lmdb", (location,)
    if lower.endswith((".csv", ".tsv", ".txt")):
        return "list", (location,)
    if lower.endswith(".arrow"):
        return "tables", (location,)
    if lower.endswith(".parquet"):
        return ("tables" if _has_pictures(location) else "list"), (location,)
    if kind := _archive_kind(location):
        return kind, (location,)
    raise ValueError(
        f"source {location} is of no kind that we know: name it with --format, one of {', '.join(FORMATS[1:])}"
    )


def _detect_folder(location: str) -> tuple[str, tuple[str, ...]]:
    names = _children(location)
    ends = {name: name.lower() for name in names}
    for kind, endings in (("recordio", (".rec",)), ("lmdb", ("data.mdb",))):
        if any(lower.endswith(endings) for lower in ends.values()):
            return kind, (location,)
    if tables := _files(location, (".parquet", ".arrow")):
        return "tables", tables
    archives = _files(location, (".tar", ".zip", ".tar.gz", ".tgz"))
    if archives and not _holds_pictures(location):
        kinds = {_archive_kind(archive) for archive in archives}
        if len(kinds) != 1:
            found = ", ".join(sorted(str(kind) for kind in kinds))
            raise ValueError(f"source {location} holds archives of several kinds ({found}): give one of them")
        if kind_found := kinds.pop():
            return kind_found, archives
    return "folders", (location,)


def _places(location: str, kind: str) -> tuple[str, ...]:
    endings = {
        "zip": (".zip",),
        "tar": (".tar",),
        "tar.gz": (".tar.gz", ".tgz"),
        "webdataset": (".tar",),
        "tables": _TABLES,
    }
    if kind not in endings or not _is_folder(location):
        return (location,)
    if not (found := _files(location, endings[kind])):
        raise ValueError(f"source {location} holds no files *{' *'.join(endings[kind])}, which the format {kind} wants")
    return found


_TABLES = (".parquet", ".arrow")


def _files(location: str, endings: tuple[str, ...]) -> tuple[str, ...]:
    """Files with such names in a folder, or where it has none in the folders in it, sorted."""
    names = _children(location)
    if found := sorted(name for name in names if name.lower().endswith(endings) and not name.startswith(".")):
        return tuple(f"{location.rstrip('/')}/{name}" for name in found)
    if len(names) > _FEW:
        return ()
    inner = [f"{location.rstrip('/')}/{name}" for name in sorted(names) if not name.startswith(".")]
    return tuple(
        f"{folder}/{name}"
        for folder in inner
        if _is_folder(folder)
        for name in sorted(_children(folder))
        if name.lower().endswith(endings)
    )


_FEW = 20
"""A folder of more folders than this holds identities and not the parts of a data set."""


def _holds_pictures(location: str) -> bool:
    inner = [f"{location.rstrip('/')}/{name}" for name in _children(location)[:_FEW]]
    return any(extension_of(name) for folder in inner if _is_folder(folder) for name in _children(folder))


def _archive_kind(location: str) -> str | None:
    from data_shards.sources.archives import archive_kind
    from data_shards.sources.webdataset import looks_like_webdataset

    kind = archive_kind(location)
    return "webdataset" if kind == "tar" and looks_like_webdataset(location) else kind


def _has_pictures(parquet: str) -> bool:
    from data_shards.sources.tables import has_pictures

    return has_pictures(parquet)


def _is_folder(location: str) -> bool:
    if not is_remote(location):
        return Path(local(location)).is_dir()
    from data_shards.files import filesystem

    system, path = filesystem(location)
    return bool(system.isdir(path))


def _children(location: str) -> list[str]:
    if not is_remote(location):
        try:
            return os.listdir(local(location))
        except OSError as error:
            raise ValueError(f"source folder {location} cannot be read: {error.strerror}") from None
    from data_shards.files import filesystem

    system, path = filesystem(location)
    return [name_of(child) for child in system.ls(path, detail=False)]
