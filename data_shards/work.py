"""What an unfinished conversion has done so far, in OUT/.work: each step is committed, so that any process can go on.

    job.json        settings, source and tool
    listing/        the sorted listing; listing.json commits it
    survey/         what duplicates are found by, one file for each stretch of the listing
    plan/           what goes into every shard; plan.json commits it
    done/           one record for each written shard, which commits the shard

A task is one stretch to survey or one shard to write: it depends on what is committed before it alone, so it can be done
anywhere, in any order and more than once.
"""

import io
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.convert_config import ConvertConfig
from data_shards.face_regions import Regions
from data_shards.index import SAMPLE
from data_shards.listing import Listing
from data_shards.shard_plan import Plan, job
from data_shards.shard_writer import Failure, Shard, Tools, write_shard
from data_shards.sources.base import Source
from data_shards.sources.detect import from_spec, spec_of
from data_shards.store import Store
from data_shards.survey import SURVEY_ROWS, survey_rows
from data_shards.transform import TransformConfig

WORK = ".work"
JOB, LISTING, PLAN = f"{WORK}/job.json", f"{WORK}/listing.json", f"{WORK}/plan.json"
Stage = Literal["survey", "done"]
TOOL = f"facescale {version('facescale')}"

_PLAN_ARRAYS = ("order", "shards", "labels")


class Task(NamedTuple):
    """One stretch to survey or one shard to write; `run_task` does it."""

    location: str
    """Of the output."""
    file_mode: int
    stage: Stage
    number: int
    token: str
    """Of the conversion: a process may do tasks of several, one after the other, at the same place."""


class Done(NamedTuple):
    """What a task has got through."""

    pictures: int
    bytes: int


def run_task(task: Task) -> Done:
    """Does a task and commits its record. May be repeated: it writes the same bytes again.

    Raises:
        OSError: the output cannot be written.
    """
    work = _opened(task.location, task.file_mode, task.token)
    return work.survey(task.number) if task.stage == "survey" else work.write(task.number)


def close_work() -> None:
    """Closes what this process has opened for the tasks that it has done."""
    for work in _open_works.values():
        work.close()
    _open_works.clear()


_open_works: dict[tuple[str, int, str], "Work"] = {}
"""The conversion that this process does tasks of: one at most."""


def _opened(*place: Any) -> "Work":
    if place not in _open_works:
        close_work()
        location, file_mode, token = place
        work = Work(Store(location, file_mode))
        assert work.job["token"] == token, "the tasks are those of the conversion at this place"
        _open_works[place] = work
    return _open_works[place]


class Work:
    """The committed state of an unfinished conversion; everything is read when it is first asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def job(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.read(JOB))
        return found

    @cached_property
    def config(self) -> ConvertConfig:
        return config_of(self.job["config"])

    @cached_property
    def source(self) -> Source:
        return from_spec(self.job["source"])

    @cached_property
    def listing(self) -> Listing:
        return Listing(self._local("listing"))

    @cached_property
    def plan(self) -> Plan:
        folder = self._local("plan")
        return Plan(
            *(np.load(folder / f"{name}.npy", mmap_mode=None if name == "labels" else "r") for name in _PLAN_ARRAYS)
        )

    @cached_property
    def tools(self) -> Tools:
        kind = self.config.transform.crop
        regions = (
            None if kind == "none" else Regions.open(self._local("regions"), "box" if kind == "box" else "landmarks")
        )
        return Tools(self.listing, self.plan.labels, self.source.open(), self.source.streams, regions, self.config)

    def close(self) -> None:
        if "tools" in vars(self):
            self.tools.reader.close()

    def _local(self, name: str) -> Path:
        folder = self.store.local_folder(f"{WORK}/{name}")
        self.store.download(f"{WORK}/{name}", folder)
        return folder

    def write(self, number: int) -> Done:
        shard = write_shard(self.store, job(self.plan, number), self.tools)
        self.store.write(_record(number), _packed(shard))
        left_out = len(shard.failures) + sum(shard.filtered.values())
        return Done(len(shard.rows) + left_out, int(shard.samples["size"].sum()) if len(shard.rows) else 0)

    def shard(self, number: int) -> Shard:
        """The record of a written shard."""
        return _unpacked(self.store.read(_record(number)))

    def survey(self, number: int) -> Done:
        rows = self.listing.rows[number * SURVEY_ROWS : (number + 1) * SURVEY_ROWS]
        table = survey_rows(self.listing, rows, self.source, near=self.config.near_duplicates != "keep")
        self.store.write(f"{WORK}/survey/{number:07d}", table.tobytes())
        return Done(len(rows), int(rows["size"].sum()))

    def survey_table(self, number: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.frombuffer(self.store.read(f"{WORK}/survey/{number:07d}"), dtype)

    def open_tasks(self, stage: Stage, count: int) -> list[Task]:
        """The tasks of a stage that have not been committed."""
        committed = {int(name) for name in self.store.names(f"{WORK}/{stage}") if name.isdigit()}
        if stage == "done":
            committed = {number for number in committed if self._is_there(number)}
        numbers = (number for number in range(count) if number not in committed)
        place = self.store.location, self.store.file_mode
        return [Task(*place, stage, number, self.job["token"]) for number in numbers]

    def _is_there(self, number: int) -> bool:
        """Whether a shard lies where its record says: after a power cut the record may have come through alone."""
        with self.store.reading(_record(number)) as file:
            head = json.loads(file.readline())
        path = f"{head['split']}/{head['name']}"
        if not head["count"]:
            return True
        return self.store.size(path) == head["bytes"] and self.store.exists(f"{path[:-4]}.idx")

    def begin(self, source: Source, config: ConvertConfig) -> None:
        for name in ("", "/listing", "/survey", "/plan", "/done", "/regions"):
            self.store.make_folder(WORK + name)
        begun = {
            "token": secrets.token_hex(8),
            "tool": TOOL,
            "options": config.options(),
            "source": spec_of(source),
            "found": source.describe(),
        }
        self.store.write(JOB, json.dumps(begun | {"config": asdict(config)}, indent=1).encode())

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A local folder to write files of the work into."""
        folder = self.store.local_folder(f"{WORK}/{name}")
        try:
            yield folder
            self.store.upload(folder, f"{WORK}/{name}")
        finally:
            if self.store.remote:
                shutil.rmtree(folder)

    def commit_plan(self, plan: Plan, facts: dict[str, Any]) -> None:
        with self.folder("plan") as folder:
            for name in _PLAN_ARRAYS:
                np.save(folder / f"{name}.npy", getattr(plan, name))
        self.store.write(PLAN, json.dumps(facts).encode())


def config_of(saved: dict[str, Any]) -> ConvertConfig:
    """The settings that `asdict` and JSON have saved."""
    known = {field.name for field in fields(ConvertConfig)}
    values: dict[str, Any] = {name: _tuple(value) for name, value in saved.items() if name in known}
    values["transform"] = TransformConfig(**{name: _tuple(value) for name, value in saved["transform"].items()})
    return ConvertConfig(**values)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _record(number: int) -> str:
    return f"{WORK}/done/{number:07d}"


def _packed(shard: Shard) -> bytes:
    """A record: one line of JSON, then rows and samples as they are."""
    head = {name: value for name, value in shard._asdict().items() if name not in ("rows", "samples")}
    line = json.dumps(head | {"count": len(shard.rows)}).encode() + b"\n"
    return line + shard.rows.tobytes() + shard.samples.tobytes()


def _unpacked(record: bytes) -> Shard:
    file = io.BytesIO(record)
    head = json.loads(file.readline())
    count = head.pop("count")
    rows = np.frombuffer(file.read(8 * count), np.int64)
    samples = np.frombuffer(file.read(SAMPLE.itemsize * count), SAMPLE).copy()
    failures = [Failure(*failure) for failure in head.pop("failures")]
    return Shard(**head, rows=rows, samples=samples, failures=failures)
