"""The conversion job: list, plan, write the shards in worker processes, commit with the manifest."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.index import FORMAT, INDEX, MANIFEST, SPLITS, VERSION, committed, sync_directory, write_index
from data_shards.progress import progress
from data_shards.shard_plan import ConvertConfig, ShardPlan, plan_shards
from data_shards.shard_writer import Failure, Shard, reason_of, write_shard
from data_shards.sources import SourceImage, read_head, scan

__all__ = ["ConvertConfig", "Failure", "SplitSummary", "Summary", "convert"]

FAILURES = "failures.jsonl"
NAMED_FAILURES = 10
"""Of the pictures left out so many are named in the summary."""


class SplitSummary(NamedTuple):
    identities: int
    samples: int
    shards: int


@dataclass(kw_only=True, frozen=True)
class Summary:
    """What a conversion did; `read` = `written` + `failed`."""

    read: int
    written: int
    splits: dict[str, SplitSummary]
    single_image_identities: int
    """Training identities with one image: kept, but no training batch can use them."""
    failures: tuple[Failure, ...]
    """Sorted by path."""
    seconds: float = field(compare=False)

    @property
    def failed(self) -> int:
        return len(self.failures)

    def __str__(self) -> str:
        rate = self.read / max(self.seconds, 1e-9)
        lines = [
            f"{self.read:,} pictures read, {self.written:,} written, {self.failed:,} left out ({rate:,.0f} images/s)"
        ]
        for name, split in self.splits.items():
            lines.append(
                f"{name}: {split.samples:,} images of {split.identities:,} identities, shards: {split.shards:,}"
            )
        if self.single_image_identities:
            lines.append(
                f"training identities with one image, which training leaves out: {self.single_image_identities:,}"
            )
        lines += [f"left out: {path} {reason}" for path, reason in self.failures[:NAMED_FAILURES]]
        if self.failed > NAMED_FAILURES:
            lines.append(f"… and {self.failed - NAMED_FAILURES:,} more, all in {FAILURES}")
        return "\n".join(lines).encode(errors="backslashreplace").decode()


def convert(source: Path | str, out: Path | str, config: ConvertConfig | None = None) -> Summary:
    """Writes the pictures under `source` as a shard set at `out`.

    Works in `out`.partial-PID beside it and renames that at the end: `out` is either whole or as it was before. Every
    picture is decoded once; one that does not decode is left out and reported.

    Raises:
        ValueError: `out` exists and is not empty or cannot be made, `source` is not usable (see `scan`), the settings do
            not fit it, or fewer than two identities are left to train on.
        OSError: the disk is full or fails.
    """
    started, config, root = time.monotonic(), config or ConvertConfig(), Path(source)
    out = Path(os.path.realpath(out))
    partial = _reserve(out)
    try:
        listing = scan(root)
        failures = [_unknown(root, picture) for picture in listing if not picture.extension]
        _require_pictures(root, len(listing) - len(failures), failures)
        names, plans = plan_shards([picture for picture in listing if picture.extension], config)
        shards = _write_shards(root, partial, plans, config)
        failures += [failure for shard in shards for failure in shard.failures]
        failures.sort(key=lambda failure: os.fsencode(failure.path))
        _require_pictures(root, len(listing) - len(failures), failures)
        summary, manifest = _commit_splits(partial, shards, failures)
        summary = replace(summary, seconds=time.monotonic() - started)
        assert summary.read == len(listing), "every listed picture is written or reported"
        _commit(partial, {"source": str(source), "options": _options(config), "identities": names} | manifest, failures)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(out.parent)
    return summary


def _reserve(out: Path) -> Path:
    """Makes the folder to work in, beside `out`; touches nothing that exists."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {out} exists and is no folder: give a new one")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"output {out} exists and is not empty: nothing was touched, give a new folder")
    if os.path.ismount(out):
        raise ValueError(f"output {out} is a mount point, which cannot be replaced in one step: give a folder in it")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"output {out} cannot be made: {partial}: {error.strerror}") from None
    return partial


def _unknown(root: Path, picture: SourceImage) -> Failure:
    """Why a picture's first bytes told no kind."""
    try:
        size, _ = read_head(root / picture.path)
    except OSError as error:
        return Failure(picture.path, reason_of(error))
    return Failure(picture.path, "is no JPEG, PNG, PGM, BMP or WebP by its first bytes" if size else "is empty")


def _require_pictures(root: Path, left: int, failures: list[Failure]) -> None:
    if not left:
        path, reason = failures[0]
        raise ValueError(f"none of the {len(failures):,} pictures of {root} can be used; {path} {reason}")


def _write_shards(source: Path, directory: Path, plans: list[ShardPlan], config: ConvertConfig) -> list[Shard]:
    """Every shard in the order of the plans, written by `config.workers` processes (by this one where that is 1)."""
    for split in {plan.split for plan in plans}:
        (directory / split).mkdir()
    workers = min(config.workers or len(os.sched_getaffinity(0)), len(plans))
    done: dict[int, Shard] = {}
    with progress("convert", total=sum(len(plan.pictures) for plan in plans)) as advance:
        if workers == 1:
            for number, plan in enumerate(plans):
                done[number] = write_shard(source, directory, plan, config.max_pixels)
                advance(len(plan.pictures))
            return list(done.values())
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's and DALI's threads
        with ProcessPoolExecutor(workers, context, _exit_on_interrupt) as pool:
            try:
                jobs = {
                    pool.submit(write_shard, source, directory, plan, config.max_pixels): number
                    for number, plan in enumerate(plans)
                }
                for job in as_completed(jobs):
                    done[jobs[job]] = job.result()
                    advance(len(plans[jobs[job]].pictures))
            except BrokenProcessPool:
                raise OSError("a conversion worker died, perhaps for lack of memory: try fewer `workers`") from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [done[number] for number in range(len(plans))]


def _exit_on_interrupt() -> None:
    """Ctrl-C reaches the workers too: they leave quietly and the parent cleans up."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _commit_splits(directory: Path, shards: list[Shard], failures: list[Failure]) -> tuple[Summary, dict[str, Any]]:
    """Writes each split's index; returns the summary (without its time) and the manifest's part about the splits."""
    entries: dict[str, Any] = {}
    tables: dict[str, NDArray[Any]] = {}
    for split in SPLITS:
        written = [shard for shard in shards if shard.split == split and len(shard.samples)]
        if not written:
            shutil.rmtree(directory / split, ignore_errors=True)
            continue
        entries[split], tables[split] = _commit_split(directory / split, written)
    _, counts = np.unique(tables["train"]["identity"] if "train" in tables else [], return_counts=True)
    if len(counts) < 2:
        have = "1 training identity has" if len(counts) else "no training identity has"
        raise ValueError(f"{have} a picture that decodes: triplets need at least 2")
    every = np.concatenate(list(tables.values()))
    summary = Summary(
        read=len(every) + len(failures),
        written=len(every),
        splits={name: SplitSummary(e["identities"], e["samples"], len(e["shards"])) for name, e in entries.items()},
        single_image_identities=int((counts == 1).sum()),
        failures=tuple(failures),
        seconds=0.0,
    )
    manifest = {
        "splits": entries,
        "image_sizes": {side: _spread(every[side]) for side in ("width", "height")},
        "read": summary.read,
        "written": summary.written,
        "failures": summary.failed,
        "single_image_identities": summary.single_image_identities,
    }
    return summary, manifest


def _commit_split(directory: Path, shards: list[Shard]) -> tuple[dict[str, Any], NDArray[Any]]:
    for number, shard in enumerate(shards):
        shard.samples["shard"] = number
    order = np.argsort(np.concatenate([shard.rows for shard in shards]))
    samples = np.concatenate([shard.samples for shard in shards])[order]
    index_sha256 = write_index(directory / INDEX, samples)
    sync_directory(directory)
    listed = [
        {
            "name": shard.name,
            "bytes": shard.bytes,
            "samples": len(shard.samples),
            "extension": shard.extension,
            "sha256": shard.sha256,
            "idx_sha256": shard.idx_sha256,
        }
        for shard in shards
    ]
    identities = len(np.unique(samples["identity"]))
    entry = {"identities": identities, "samples": len(samples), "index_sha256": index_sha256, "shards": listed}
    return entry, samples


def _spread(values: NDArray[Any]) -> dict[str, int]:
    """Smallest, middle (the lower of two) and largest."""
    low, middle, high = (int(np.quantile(values, q, method="lower")) for q in (0, 0.5, 1))
    return {"min": low, "median": middle, "max": high}


def _options(config: ConvertConfig) -> dict[str, Any]:
    """The settings that decide the bytes."""
    return {name: value for name, value in asdict(config).items() if name != "workers"}


def _commit(directory: Path, manifest: dict[str, Any], failures: list[Failure]) -> None:
    """Writes the failures, if any, and last the manifest: what has a manifest is whole."""
    if failures:
        with committed(directory / FAILURES) as file:
            for failure in failures:
                file.write(json.dumps(failure._asdict()).encode() + b"\n")
    head = {"format": FORMAT, "version": VERSION, "tool": f"facescale {version('facescale')}"}
    with committed(directory / MANIFEST) as file:
        file.write(json.dumps(head | manifest, indent=1).encode() + b"\n")
    sync_directory(directory)
