"""Pictures of a set to be judged as shards: taken where they are shards, converted once where they are anything else."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from data_shards.convert import ConvertConfig, convert
from data_shards.index import MANIFEST, ShardSet
from data_shards.listing import Listing, write_listing
from data_shards.sources.base import Source
from data_shards.sources.detect import open_source, spec_of
from trainer.collectives import gather_objects, rank, world_size

MEET_S = 10.0
"""Seconds between two meetings of the ranks while rank 0 works: well below the time limit of any process group."""
EVERYTHING = ConvertConfig(holdout_identities=1.0, images_per_group=1, order="source")
"""Conversion of a set that is there to be judged alone."""
_LISTED = ("folders", "list")
"""Kinds of source that do not say by themselves that a picture has changed."""

T = TypeVar("T")


def open_or_convert(location: Path, work: Path, config: ConvertConfig = EVERYTHING, format: str = "auto") -> ShardSet:
    """Shards at `location`, or those that its pictures are converted into, once, in `work`; every rank calls it.

    They are kept in WORK/NAME-… and used again while pictures and settings are the same. Where these have changed, the old ones
    are removed and new ones made. An interrupted conversion is gone on with.

    Args:
        format: of the source, one of `detect.FORMATS`.
    Raises:
        ValueError: on all ranks: nothing is there, or it cannot be converted, or a rank does not see what rank 0 has written.
        OSError: on all ranks: the disk is full or fails.
    """
    if (location / MANIFEST).is_file():
        return on_all_ranks(lambda: ShardSet.open(location))
    source = on_all_ranks(lambda: open_source(location, format))
    return converted(source, location, work, config, lambda: [_state(source), config.options()])


def converted(source: Source, location: Path, work: Path, config: ConvertConfig, state: Callable[[], Any]) -> ShardSet:
    """What `open_or_convert` does with a source that is at hand.

    Args:
        location: what the source is called.
        state: JSON that changes when the source or a setting does; asked for on rank 0 alone.
    """
    begin = f"{re.sub(r'[^A-Za-z0-9_-]', '_', location.name)}-{_digest(str(location.resolve()))}-"
    name: list[str] = []

    def make() -> None:
        name.append(begin + _digest(state()))
        work.mkdir(parents=True, exist_ok=True)
        for old in work.glob(f"{begin}*"):
            if old.name != name[0]:
                shutil.rmtree(old)
        if not (work / name[0] / MANIFEST).is_file():
            convert(source, work / name[0], config)

    on_first_rank(make)
    folder = work / gather_objects(name)[0][0]
    return on_all_ranks(lambda: ShardSet.open(folder))


def on_first_rank(function: Callable[[], None]) -> None:
    """Runs it on rank 0 while the others wait, however long that takes; every rank calls it.

    The ranks meet again and again meanwhile: one long wait would run into the process group's time limit.

    Raises:
        ValueError, OSError: on all ranks, what it raises on rank 0.
    """
    if world_size() == 1:
        function()
        return
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(function) if rank() == 0 else None
        done, error = False, None
        while not done:
            if running is not None:
                wait([running], timeout=MEET_S)
                done = running.done()
                error = _told(running.exception()) if done else None
            done, error = gather_objects((done, error))[0]
        if running is not None:
            running.result()
        _raise(error)


def on_all_ranks(function: Callable[[], T]) -> T:
    """Runs it on every rank; what it raises on one of them, all raise."""
    found, error = None, None
    try:
        found = function()
    except (ValueError, OSError) as caught:
        error = caught
    errors = [told for told in gather_objects(_told(error)) if told]
    if error is not None:
        raise error
    _raise(errors[0] if errors else None)
    return found  # type: ignore[return-value]


def _told(error: BaseException | None) -> tuple[bool, str] | None:
    return None if error is None else (isinstance(error, OSError), str(error) or type(error).__name__)


def _raise(told: tuple[bool, str] | None) -> None:
    if told is not None:
        raise (OSError if told[0] else ValueError)(told[1])


def _state(source: Source) -> Any:
    """What tells that a source has changed: its own words and, of folders and lists, names, sizes and times of the pictures."""
    described = source.describe()
    if described["kind"] not in _LISTED:
        return [spec_of(source), described]
    with tempfile.TemporaryDirectory(prefix="facescale-") as folder:
        write_listing(Path(folder), source.pictures())
        return [spec_of(source), described, Listing(Path(folder)).fingerprint()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
