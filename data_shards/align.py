"""Raw photographs into pictures of aligned faces: found, turned and scaled until they lie as in ArcFace's template.

Work is done in parts of some pictures; a part whose record lies in OUT/.align is done, so an interrupted job goes on. The record
of all, with boxes and landmarks, and the list of what had no face are written last, and end the job.
"""

import csv
import errno
import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from PIL import Image

from data_shards.commit import TEMPORARY, committed
from data_shards.executors import begin_worker
from data_shards.face_detector import YUNET, Choice, Face, FaceDetector, choose
from data_shards.face_regions import COLUMNS, NAME_COLUMN, Regions, build_regions
from data_shards.listing import Listing, write_listing
from data_shards.pictures import MAX_PIXELS, quiet_pillow
from data_shards.progress import progress
from data_shards.sources.base import Place, Reader, Source, sniff
from data_shards.sources.detect import from_spec, spec_of
from data_shards.transform import ALIGNED_SIZE, DEFAULT_QUALITY, align, decoded, encoded

FACES, NOT_FOUND = "faces.csv", "not_found.csv"
FACE_COLUMNS = (NAME_COLUMN, *COLUMNS["landmarks"], *COLUMNS["box"], "SCORE", "FACES")
"""Of faces.csv: VGGFace2's, so that `facescale shard --crop align --regions` takes it, the score and the number of faces."""
_WORK = ".align"
_PART = 64
"""Pictures of a part."""
_SIDES = (32, 1024)


@dataclass(kw_only=True, frozen=True)
class AlignConfig:
    size: int = ALIGNED_SIZE
    """Pixels, side of the aligned pictures, 32 to 1024."""
    quality: int = DEFAULT_QUALITY
    """Of the JPEGs, 1 to 100."""
    faces: Choice = "largest"
    """Which face where there are several: the largest, the one nearest the middle, or none (one)."""
    min_score: float = 0.6
    """Detections with less are passed over, in (0, 1)."""
    landmarks: tuple[str, ...] = ()
    """CSV files such as VGGFace2's loose_landmark_train.csv; their pictures are aligned by them, and nothing is detected."""
    detector: Path | None = None
    """YuNet as an ONNX file in place of the one that comes with the package."""
    workers: int | None = None
    """Processes; None: one a core."""

    def __post_init__(self) -> None:
        if not _SIDES[0] <= self.size <= _SIDES[1]:
            raise ValueError(f"size is {self.size}; allowed are {_SIDES[0]} to {_SIDES[1]} pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it must be 1 to 100")
        if not 0 < self.min_score < 1:
            raise ValueError(f"min_score is {self.min_score}; allowed is between 0 and 1")
        if self.faces not in get_args(Choice):
            raise ValueError(f"faces is {self.faces!r}; it must be one of {', '.join(get_args(Choice))}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1, or None")


@dataclass(frozen=True)
class Aligned:
    """What a job has done."""

    out: Path
    faces: int
    not_found: int
    seconds: float

    def __str__(self) -> str:
        done = self.faces + self.not_found
        return (
            f"{self.faces:,} of {done:,} pictures aligned in {self.out} ({done / max(self.seconds, 1e-9):,.0f} pictures/s); "
            f"{self.not_found:,} not: {self.out / NOT_FOUND}; landmarks: {self.out / FACES}"
        )


class _Job(NamedTuple):
    """What a worker needs; small."""

    source: dict[str, Any]
    out: Path
    config: AlignConfig


def align_faces(source: Source, out: Path | str, config: AlignConfig) -> Aligned:
    """Writes OUT/identity/image.jpg for every picture with a face, OUT/faces.csv and OUT/not_found.csv.

    Grey pictures stay grey. A picture whose name is not fit for a key gets another (`data_shards/listing.py`); faces.csv has the
    names of the source. The same call goes on with what an interrupted one has left.

    Raises:
        ValueError: OUT holds something else or a job of other settings, another process works on it, or the source, the
            landmarks or the detector are not usable.
        OSError: the disk is full or fails, or a worker died.
    """
    out, begun = Path(os.path.realpath(out)), time.perf_counter()
    work = out / _WORK
    _refuse_other_things(out)
    if not config.landmarks:
        FaceDetector(config.detector or YUNET, config.min_score)
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(work, out):
        _begin(work, source, out, config)
        listing = Listing(work)
        job, parts = _Job(spec_of(source), out, config), range(0, len(listing), _PART)
        left = [part for part in parts if not _record(work, part).exists()]
        with progress("align", total=len(listing)) as advance:
            advance(len(listing) - sum(min(_PART, len(listing) - part) for part in left))
            for done in _run(job, left, config.workers):
                advance(done)
        faces, not_found = _end(work, out, parts)
        shutil.rmtree(work)
    return Aligned(out, faces, not_found, time.perf_counter() - begun)


def _refuse_other_things(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {out} is no folder")
    if (out / FACES).exists() and not (out / _WORK).exists():
        raise ValueError(f"output {out} is finished: nothing was touched, give a new folder")
    if out.exists() and not (out / _WORK).exists() and any(out.iterdir()):
        raise ValueError(f"output {out} exists and is not empty: nothing was touched, give a new folder")


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    with open(work / "lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(f"output {out} is being written by another job: nothing was touched") from None
        yield


def _begin(work: Path, source: Source, out: Path, config: AlignConfig) -> None:
    """Lists the source anew, and compares it and the settings with those of the job that was interrupted."""
    refused = write_listing(work, source.pictures())
    listing = Listing(work)
    if not len(listing):
        raise ValueError(f"source {source.describe()['location']} has no pictures")
    settings = {**asdict(config), "workers": None, "detector": str(config.detector), "listing": listing.fingerprint()}
    told, record = json.dumps(settings), work / "job.json"
    if record.exists() and record.read_text() != told:
        raise ValueError(f"output {out} was begun with another source or settings: give a new folder, or remove it")
    for remains in out.glob(f"*/*{TEMPORARY}"):  # of a job that was killed
        remains.unlink()
    if config.landmarks:
        build_regions(config.landmarks, "landmarks", work)
    with committed(work / "refused.json") as file:
        file.write(json.dumps(refused).encode())
    with committed(record) as file:
        file.write(told.encode())


def _run(job: _Job, parts: Sequence[int], workers: int | None) -> Iterator[int]:
    workers = min(workers or len(os.sched_getaffinity(0)), len(parts))
    if workers <= 1:
        hand = _Hand(job)
        try:
            yield from map(hand.do, parts)
        finally:
            hand.close()
        return
    context = get_context("spawn")  # OpenCV has threads
    with ProcessPoolExecutor(workers, context, _begin_worker, (os.getpid(), job)) as pool:
        try:
            yield from pool.map(_do, parts)
        except BrokenProcessPool:
            raise OSError(
                "a worker died, perhaps for lack of memory: try fewer --workers; what is written stays, the same command goes on"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_worker(parent: int, job: _Job) -> None:
    global _hand
    begin_worker(parent)
    _hand = _Hand(job)


def _do(part: int) -> int:
    assert _hand is not None
    return _hand.do(part)


class _Hand:
    """What a process needs for its parts."""

    def __init__(self, job: _Job) -> None:
        config, self._work = job.config, job.out / _WORK
        self._out, self._config, self._listing = job.out, config, Listing(self._work)
        self._folders = _folders(self._listing)
        self._reader: Reader = from_spec(job.source).open()
        self._regions = Regions.open(self._work, "landmarks") if config.landmarks else None
        self._detector = None if config.landmarks else FaceDetector(config.detector or YUNET, config.min_score)

    def close(self) -> None:
        self._reader.close()

    def do(self, part: int) -> int:
        """One part; returns how many pictures it has."""
        rows = self._listing.rows[part : part + _PART]
        identities = rows["identity"].tolist()
        record = [
            self._one(place, key, identity)
            for (place, key, _), identity in zip(self._listing.entries(rows), identities, strict=True)
        ]
        with committed(_record(self._work, part)) as file:
            file.write(json.dumps(record).encode())
        return len(rows)

    def _one(self, place: Place, key: str, identity: int) -> list[Any]:
        """A row of faces.csv, or the picture's name and why it has none."""
        name = self._listing.identities[identity]
        try:
            data, face, others = self._aligned(place, name)
        except ValueError as error:
            return [place.name, str(error)]
        except OSError as error:
            return [place.name, f"cannot be read: {error.strerror or error}"]
        folder = self._out / self._folders[identity]
        folder.mkdir(mode=0o700, exist_ok=True)
        with committed(folder / f"{key.rpartition('/')[2]}.jpg") as file:
            file.write(data)
        numbers = [*face.landmarks.ravel().round(2).tolist(), *(round(side, 2) for side in face.box)]
        return [f"{name}/{_stem(place.name)}", *numbers, round(face.score, 4), others]

    def _aligned(self, place: Place, name: str) -> tuple[bytes, Face, int]:
        """The aligned picture, its face and how many faces were found."""
        data = self._reader.read(place)
        with quiet_pillow():
            image = decoded(data, sniff(data[:12]) or _refuse_bytes(), max_pixels=MAX_PIXELS)
            face, count = self._face(image, name, _stem(place.name))
            size = self._config.size
            return encoded(align(image, face.landmarks, (size, size)), "jpg", self._config.quality), face, count

    def _face(self, image: Image.Image, identity: str, stem: str) -> tuple[Face, int]:
        if self._detector is not None:
            found = self._detector.faces(image)
            face = choose(found, self._config.faces, image.size)
            return self._detector.refined(image, face), len(found)
        assert self._regions is not None
        landmarks = self._regions.find(identity, stem)
        if landmarks is None:
            raise ValueError("has no landmarks in the CSV files")
        points = landmarks.astype(np.float64).reshape(5, 2)
        corner, extent = points.min(axis=0), np.ptp(points, axis=0)
        return Face((*corner.tolist(), *extent.tolist()), points, 1.0), 1


_hand: _Hand | None = None


def _refuse_bytes() -> str:
    raise ValueError("is no picture that we know")


def _folders(listing: Listing) -> list[str]:
    """Of each identity: its name where a folder can be called so, or the first part of its keys."""
    firsts = np.searchsorted(listing.rows["identity"], np.arange(len(listing.identities)))
    prefixes = [key.partition("/")[0] for _, key, _ in listing.entries(listing.rows[firsts])]
    return [
        name
        if name and not name.startswith(".") and not set(name) & {"/", "\0"} and len(os.fsencode(name)) < 256
        else prefix
        for name, prefix in zip(listing.identities, prefixes, strict=True)
    ]


def _stem(name: str) -> str:
    base = name.rpartition("/")[2]
    return base[: base.rfind(".")] if "." in base else base


def _record(work: Path, part: int) -> Path:
    return work / f"part-{part:010d}.json"


def _end(work: Path, out: Path, parts: Sequence[int]) -> tuple[int, int]:
    """Writes not_found.csv and then faces.csv, which says that the job is done; how many rows each has."""

    def rows(faces: bool) -> Iterator[list[Any]]:
        for part in parts:
            yield from (row for row in json.loads(_record(work, part).read_bytes()) if (len(row) != 2) == faces)

    refused = json.loads((work / "refused.json").read_bytes())
    missing = _write_csv(out / NOT_FOUND, ("picture", "reason"), chain(rows(False), refused))
    return _write_csv(out / FACES, FACE_COLUMNS, rows(True)), missing


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
    """Returns how many rows there were."""
    count = 0
    with committed(path) as file:
        for count, row in enumerate(chain([head], rows)):  # noqa: B007
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerow(row)
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    return count
