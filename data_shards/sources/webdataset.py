"""WebDataset tars, ours or another tool's, as a source: a re-shard."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from data_shards.files import name_of, open_file
from data_shards.sources.archives import RangeReader, describe_files, require_end, tar_flaw
from data_shards.sources.base import Found, Reader, extension_of, flaw_of_member

_LABEL_FIELDS = ("identity", "label", "cls", "class", "id")
_MAX_LABEL_BYTES = 2**20
_LOOKED_AT = 200


class _Member(NamedTuple):
    name: str
    key: str
    suffix: str
    """Behind the first dot of the last part of the name, in lower case."""
    size: int
    offset: int
    flaw: str
    text: bytes
    """Content of a label file."""


@dataclass(frozen=True)
class WebDatasetShards:
    """Samples are members that follow each other and share the name up to the first dot.

    Whose picture it is: the field that `label` names; else the folder in the key (`identity/image`); else `.cls`; else one of
    the usual fields of `.json`.
    """

    locations: tuple[str, ...]
    label: str = ""
    """json:FIELD; empty: found out."""
    streams = False

    def describe(self) -> dict[str, str | int]:
        return {"kind": "webdataset", **describe_files(self.locations)}

    def pictures(self) -> Iterator[Found]:
        if self.label and not self.label.startswith("json:"):
            raise ValueError(f"label is {self.label!r}: of WebDataset shards it must be json:FIELD")
        for part, location in enumerate(self.locations):
            for sample in _samples(location, part):
                yield from [sample] if isinstance(sample, Found) else self._of_sample(location, part, sample)

    def open(self) -> Reader:
        return RangeReader(self.locations)

    def _of_sample(self, location: str, part: int, sample: list[_Member]) -> Iterator[Found]:
        pictures = [member for member in sample if extension_of(member.name)]
        for number, picture in enumerate(pictures):
            name = f"{name_of(location)}/{picture.name}"
            folder, _, stem = picture.key.rpartition("/")
            flaw = (
                picture.flaw or flaw_of_member(picture.name) or ("is a second picture of its sample" if number else "")
            )
            identity = self._identity(folder.rpartition("/")[2], sample)
            if not flaw and not identity:
                flaw = "has no label (.cls or .json)"
            extension = extension_of(picture.name) or ""
            yield Found(identity or "", name, stem, picture.size, extension, part, picture.offset, 0, flaw)

    def _identity(self, folder: str, sample: list[_Member]) -> str | None:
        if not self.label and folder:
            return folder
        texts = {member.suffix: member.text for member in sample}
        if not self.label and (text := texts.get("cls", b"").strip()).isdigit():
            return f"{int(text):07d}"
        try:
            fields = json.loads(texts.get("json", b""))
        except ValueError:
            return None
        wanted = (self.label.removeprefix("json:"),) if self.label else _LABEL_FIELDS
        value = next((fields[name] for name in wanted if name in fields), None) if isinstance(fields, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            return None
        return f"{value:07d}" if isinstance(value, int) else value


def looks_like_webdataset(location: str) -> bool:
    """Whether pictures of a tar have label files (.cls, .json) beside them."""
    try:
        for sample in islice(_samples(location, 0), _LOOKED_AT):
            if not isinstance(sample, Found):
                suffixes = {member.suffix for member in sample}
                if suffixes & {"cls", "json"} and any(extension_of(member.name) for member in sample):
                    return True
    except ValueError:
        pass
    return False


def _samples(location: str, part: int) -> Iterator[list[_Member] | Found]:
    """The members of each sample; last of all what is wrong with the tar, if anything is."""
    sample: list[_Member] = []
    try:
        for member in _members(location):
            if sample and member.key != sample[0].key:
                yield sample
                sample = []
            sample.append(member)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if not sample:
            raise ValueError(f"source {location} is no whole tar of samples: {error}") from None
        yield sample
        reason = f"is cut short or damaged behind {sample[-1].name}: {error}"
        yield Found("", name_of(location), "", 0, "", part, refused=" ".join(reason.split()))
        return
    if sample:
        yield sample


def _members(location: str) -> Iterator[_Member]:
    with (
        open_file(location) as file,
        tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar,
    ):
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep every member
            folder, slash, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem or member.isdir():
                continue
            text = b""
            if suffix.lower() in ("cls", "json") and member.isreg() and member.size <= _MAX_LABEL_BYTES:
                after = file.tell()
                file.seek(member.offset_data)
                text = file.read(member.size)
                file.seek(after)
            yield _Member(
                member.name,
                folder + slash + stem,
                suffix.lower(),
                member.size,
                member.offset_data,
                tar_flaw(member),
                text,
            )
        require_end(tar, file)
