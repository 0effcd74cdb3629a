"""The conversion job: list, survey, plan, write the shards, commit with the manifest; and go on where it was interrupted."""

import csv
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.commit import committed
from data_shards.convert_config import ConvertConfig
from data_shards.executors import Engine, run_tasks
from data_shards.face_regions import Kind, build_regions
from data_shards.files import is_remote
from data_shards.finish import (
    DUPLICATES,
    FAILURES,
    SplitSummary,
    Summary,
    duplicates_table,
    finish,
    require_pictures,
    summary_of,
)
from data_shards.identity_lists import read_identity_meta
from data_shards.index import MANIFEST, SPLITS
from data_shards.listing import Listing, difference, pseudonym, write_listing
from data_shards.progress import progress
from data_shards.selection import select
from data_shards.shard_plan import NO_LABEL, plan_shards
from data_shards.shard_writer import Failure
from data_shards.sources.base import Found, Source
from data_shards.sources.detect import open_source, spec_of
from data_shards.store import Store
from data_shards.survey import SURVEY, SURVEY_ROWS
from data_shards.work import JOB, LISTING, PLAN, TOOL, WORK, Stage, Work

__all__ = ["FAILURES", "ConvertConfig", "Failure", "SplitSummary", "Summary", "convert", "prepare"]


def convert(
    source: Source | Path | str, out: Path | str, config: ConvertConfig | None = None, engine: Engine = run_tasks
) -> Summary:
    """Writes the pictures of a source as a shard set at `out`, a folder or a URL.

    Every picture is checked once; one that does not decode is left out and reported. Interrupted at any point, the same
    call goes on from what is committed and ends with the same bytes. What is under its final name is whole; the set is
    finished when it has a manifest.

    Raises:
        ValueError: `out` holds something else, is being written by another process or cannot be written; `source` is not
            usable; the settings do not fit it, or are not those of the conversion that was interrupted.
        OSError: the disk is full or fails; what is committed stays.
    """
    started, config = time.monotonic(), config or ConvertConfig()
    opened = open_source(source) if isinstance(source, str | Path) else source
    store = Store(str(out), config.file_mode)
    with _reserved(store) as finished:
        if not finished:
            work = prepare(store, opened, config, engine)
            run_stage(work, "done", len(work.plan.shards), engine)
            for split in SPLITS:
                store.remove_temporary(split)  # of workers that were killed and whose tasks others have done
            _write_mapping(work)
            finish(work)
        store.remove(WORK)
        return summary_of(store, seconds=time.monotonic() - started)


def plan_only(source: Source, out: Path | str, config: ConvertConfig) -> Work:
    """Everything of a conversion up to writing the shards, for others to write them; `convert` with the same arguments ends it.

    Raises:
        ValueError: as `convert` does.
    """
    store = Store(str(out), config.file_mode)
    with _reserved(store) as finished:
        if finished:
            raise ValueError(
                f"output {store.location} is finished but for cleaning up: run the same command with processes"
            )
        work = prepare(store, source, config)
        _make_split_folders(work)
        return work


@contextmanager
def _reserved(store: Store) -> Iterator[bool]:
    """Makes the output's folder and holds it; yields whether the set in it is finished but for cleaning up.

    What fails for the settings or the source leaves nothing behind; what is interrupted keeps all that it has done.

    Raises:
        ValueError: it holds something else, is being written by another process, or cannot be made.
        OSError: the disk is full or fails.
    """
    if not store.remote and store.path("").exists() and not store.path("").is_dir():
        raise ValueError(f"output {store.location} exists and is no folder: give a new one")
    made = not store.remote and not store.path("").exists()
    with _unwritable(store):
        store.make_folder("")
    with store.locked():
        names = store.names()
        if names and WORK not in names:
            kind = "is finished" if MANIFEST in names else "is not empty"
            raise ValueError(f"output {store.location} exists and {kind}: nothing was touched, give a new folder")
        begun = WORK in names
        with _unwritable(store):
            store.make_folder(WORK)
            store.write(f"{WORK}/writable", b"")
            store.remove(f"{WORK}/writable")
        for folder in ("", *SPLITS):
            store.remove_temporary(folder)
        try:
            yield MANIFEST in names
        except ValueError:
            if not begun:
                for name in (WORK, *SPLITS):
                    store.remove(name)
                if made:
                    store.path("").rmdir()
            raise
        except OSError as error:
            reason = f"{error.strerror or error}"
            raise OSError(
                f"output {store.location}: {reason}; what is written stays, the same command goes on from there"
            ) from None


@contextmanager
def _unwritable(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"output {store.location} cannot be written: {error.strerror or error}") from None


def prepare(store: Store, source: Source, config: ConvertConfig, engine: Engine = run_tasks) -> Work:
    """Everything before the shards are written: lists the source, finds duplicates, plans; or finds all that done.

    Raises:
        ValueError: the source or a setting is not usable, or is another than that of the interrupted conversion.
    """
    work = Work(store)
    if store.exists(JOB):
        _require_same(work, source, config)
    else:
        store.remove(WORK)
        if config.pseudonyms and os.path.exists(config.pseudonyms):
            raise ValueError(f"pseudonyms {config.pseudonyms} exists: nothing was touched, give a new file")
        work.begin(source, config)
    _list(work, source)
    if not store.exists(PLAN):
        survey = None
        if config.surveys:
            survey = _surveyed(work, engine)
        _plan(work, survey)
    return work


def run_stage(work: Work, stage: Stage, total: int, engine: Engine = run_tasks) -> None:
    """Does the tasks of a stage that are not done yet, with a progress bar."""
    tasks = work.open_tasks(stage, total)
    if stage == "done":
        _make_split_folders(work)
    pictures = len(work.plan.order) if stage == "done" else len(work.listing)
    with progress("convert" if stage == "done" else "survey", total=pictures) as advance:
        advance(pictures * (total - len(tasks)) // max(total, 1))
        if tasks:
            for done in engine(tasks, work.config.workers):
                advance(done.pictures, done.bytes)


def _make_split_folders(work: Work) -> None:
    for code in np.unique(work.plan.shards["split"]):
        work.store.make_folder(SPLITS[code])


def _require_same(work: Work, source: Source, config: ConvertConfig) -> None:
    where = f"the unfinished conversion in {work.store.location}"
    advice = "go on with what it was started with, or delete it"
    if work.job["tool"] != TOOL:
        raise ValueError(f"{where} was begun by {work.job['tool']}, this is {TOOL}: {advice}")
    options = json.loads(json.dumps(config.options()))
    for name, before in work.job["options"].items():
        if options.get(name) != before:
            raise ValueError(f"{where} was begun with {name} {before!r}, now it is {options.get(name)!r}: {advice}")
    now = {**spec_of(source), **source.describe()}
    for name, value in {**work.job["source"], **work.job["found"]}.items():
        if json.loads(json.dumps(now.get(name))) != value:
            raise ValueError(
                f"{where} reads a source whose {name} was {value!r}, now it is {now.get(name)!r}: {advice}"
            )


def _list(work: Work, source: Source) -> None:
    """Lists the source, or compares it with the listing that there is."""
    store, hidden = work.store, bool(work.config.pseudonyms)
    location = str(source.describe().get("location", source))
    if store.exists(LISTING):
        folder = Path(tempfile.mkdtemp(prefix="facescale-"))
        try:
            write_listing(folder, _counted(source), hidden)
            again = Listing(folder)
            if again.fingerprint() != json.loads(store.read(LISTING))["fingerprint"]:
                what = difference(work.listing, again)
                raise ValueError(
                    f"source {location} has changed since the conversion in {store.location} began: {what}"
                )
        finally:
            shutil.rmtree(folder)
        return
    with work.folder("listing") as folder:
        refused = write_listing(folder, _counted(source), hidden)
        listing = Listing(folder)
        fingerprint = listing.fingerprint()
    require_pictures(location, len(listing), [Failure(*picture) for picture in refused])
    store.write(LISTING, json.dumps({"fingerprint": fingerprint, "refused": refused}).encode())


def _counted(source: Source) -> Iterator[Found]:
    with progress("list", total=None) as advance:
        for number, found in enumerate(source.pictures(), start=1):
            if number % _SHOW_EVERY == 0:
                advance(_SHOW_EVERY)
            yield found


_SHOW_EVERY = 1000


def _surveyed(work: Work, engine: Engine) -> NDArray[Any]:
    count = -(-len(work.listing) // SURVEY_ROWS)
    run_stage(work, "survey", count, engine)
    return np.concatenate([work.survey_table(number, SURVEY) for number in range(count)])


def _plan(work: Work, survey: NDArray[Any] | None) -> None:
    config, listing = work.config, work.listing
    people = _people(work)
    if config.transform.crop != "none":
        kind: Kind = "box" if config.transform.crop == "box" else "landmarks"
        with work.folder("regions") as folder:
            build_regions(config.regions, kind, folder)
    selection = select(listing, config, people, survey)
    plan = plan_shards(listing.rows, listing.identities, selection.kept, config)
    if selection.duplicates:
        work.store.write(f"{WORK}/{DUPLICATES}", duplicates_table(work, selection.duplicates))
    labelled = np.flatnonzero(plan.labels != NO_LABEL).tolist()
    hidden = bool(config.pseudonyms)
    refused = json.loads(work.store.read(LISTING))["refused"]
    facts = {
        "names": [pseudonym(row) if hidden else listing.identities[row] for row in labelled],
        "people": [people.get(listing.identities[row], "") for row in labelled] if people and not hidden else [],
        "filtered": selection.filtered,
        "refused": [[f"unlisted/{number:07d}" if hidden else path, why] for number, (path, why) in enumerate(refused)],
        "duplicates": len(selection.duplicates),
    }
    work.commit_plan(plan, facts)


META = "identity_meta.csv"
_WITH_META = ("folders", "zip", "tar", "tar.gz")


def _people(work: Work) -> dict[str, str]:
    """Name of each id, where VGGFace2's identity_meta.csv lies in the source's folder or beside it."""
    path = work.config.identity_meta
    if not path and work.job["found"]["kind"] in _WITH_META:
        first = str(getattr(work.source, "locations", (work.job["found"]["location"],))[0])
        if not is_remote(first):
            beside = [Path(first, META), Path(first).parent / META]
            path = next((str(file) for file in beside if file.is_file()), "")
    return read_identity_meta(path) if path else {}


def _write_mapping(work: Work) -> None:
    """What the pseudonyms stand for, in a file that its owner alone may read."""
    path = work.config.pseudonyms
    if not path:
        return
    with committed(Path(path), 0o600) as file:
        file.write(b"pseudonym,identity\n")
        for row, name in enumerate(work.listing.identities):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerow((pseudonym(row), name))
            file.write(os.fsencode(text.getvalue()))
