"""IJB-B and IJB-C as insightface distributes them: its lists are read and checked, its loose crops aligned into shards.

    meta/ijbc_face_tid_mid.txt              image, template, medium
    meta/ijbc_name_5pts_score.txt           image, five points as x y, the detector's score
    meta/ijbc_template_pair_label.txt       template, template, 1 for the same subject
    meta/ijbc_1N_gallery_G1.csv, …_G2.csv   template, subject (IJB-B: S1, S2)
    meta/ijbc_1N_probe_mixed.csv            template, subject
    loose_crop/                             the images

Source: Whitelam et al. 2017, "IARPA Janus Benchmark-B Face Dataset"; Maze et al. 2018, "IARPA Janus Benchmark - C: Face Dataset
and Protocol"; the layout: insightface, recognition/_evaluation_/ijb.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_shards.convert import ConvertConfig
from data_shards.face_regions import COLUMNS, NAME_COLUMN
from data_shards.index import ShardSet, committed
from data_shards.sources.lists import PictureList
from data_shards.transform import TransformConfig
from trainer.evaluation.sets.pair_lists import samples_of
from trainer.evaluation.sets.prepared import named_missing
from trainer.evaluation.sets.set_shards import converted, on_all_ranks, on_first_rank
from trainer.evaluation.sets.templates import Gallery, TemplateSet

_MEDIA, _POINTS, _PAIRS = "face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt"
_NAMES = {"ijbb": "IJB-B", "ijbc": "IJB-C"}
_CROPS = "loose_crop"


class Lists(NamedTuple):
    """What the lists say. Templates and subjects are their numbers there."""

    name: str
    images: list[str]
    """Name of the file of each image of a template, shape (n,)."""
    templates: NDArray[np.int64]
    media: NDArray[np.int64]
    points: NDArray[np.float64]
    """Shape (n, 10)."""
    scores: NDArray[np.float64]
    pairs: NDArray[Any]
    """Templates, shape (p, 2)."""
    same: NDArray[np.bool_]
    galleries: dict[str, NDArray[np.int64]]
    """(template, subject) of each gallery by its name, shape (g, 2); empty where the distribution has none."""
    probes: NDArray[np.int64]
    """(template, subject), shape (q, 2)."""

    @property
    def keys(self) -> list[str]:
        """What each image is called in the shards: the first template that it belongs to is its identity."""
        home: dict[str, int] = {}
        return [
            f"{home.setdefault(name, template)}/{name}"
            for name, template in zip(self.images, self.templates.tolist(), strict=True)
        ]


def ijb_set(
    folder: Path,
    work: Path,
    *,
    image_size: int,
    detector_scores: bool,
    ranks: tuple[int, ...],
    fars: tuple[float, ...],
    fpirs: tuple[float, ...],
    skip_missing: bool,
) -> TemplateSet:
    """A distribution ready to be judged; every rank calls it. Its images are aligned once, into shards in `work`.

    Alignment is by the five points to ArcFace's places, in `image_size` pixels, stored without loss.

    Raises:
        ValueError: on all ranks: a list is missing or wrong, or images are (unless `skip_missing`), or a gallery is too small.
    """
    lists = on_all_ranks(lambda: read_lists(folder))
    beside = work / f"{lists.name}.images.csv", work / f"{lists.name}.points.csv"
    transform = TransformConfig(crop="align", size=image_size, format="png")
    config = ConvertConfig(holdout_identities=1.0, order="identity", transform=transform, regions=(str(beside[1]),))
    source = PictureList(str(beside[0]), root=str(folder))
    on_first_rank(lambda: _write_lists(lists, *beside))
    shards = converted(source, folder, work, config, lambda: [_state(folder), asdict(transform)])
    return on_all_ranks(
        lambda: _found(lists, shards, folder, skip_missing).checked(detector_scores, ranks, fars, fpirs)
    )


def read_lists(folder: Path) -> Lists:
    """Reads meta/ and checks that the lists fit together.

    Raises:
        ValueError: one is missing, a line is not what it should be, or a list names what another does not have.
    """
    meta = folder / "meta"
    found = sorted(meta.glob(f"*_{_MEDIA}"))
    if len(found) != 1:
        raise ValueError(f"{meta} has {len(found)} files *_{_MEDIA}; a distribution of IJB-B or IJB-C has one")
    prefix = found[0].name.removesuffix(f"_{_MEDIA}")
    media = _table(found[0], ("name", "template", "medium"), np.int64)
    rows = _table(meta / f"{prefix}_{_POINTS}", ("name", *COLUMNS["landmarks"], "score"), np.float64)
    place = {name: row for row, name in enumerate(rows.names)}
    images = media.names
    unknown = [name for name in images if name not in place]
    if unknown:
        raise ValueError(f"{meta / f'{prefix}_{_POINTS}'} lacks {len(unknown):,} images: {named_missing(unknown)}")
    chosen = np.array([place[name] for name in images])
    pairs = _table(meta / f"{prefix}_{_PAIRS}", ("template", "template", "label"), np.int32).numbers
    if not np.isin(pairs[:, 2], (0, 1)).all():
        raise ValueError(f"{meta / f'{prefix}_{_PAIRS}'}: a label is neither 1, the same subject, nor 0")
    galleries = {
        path.stem.rpartition("_")[2]: _subjects(path) for path in sorted(meta.glob(f"{prefix}_1N_gallery_*.csv"))
    }
    probes = _subjects(meta / f"{prefix}_1N_probe_mixed.csv") if galleries else np.zeros((0, 2), np.int64)
    numbers = media.numbers
    for path, named in ((_PAIRS, pairs[:, :2]), ("1N lists", np.concatenate([*galleries.values(), probes])[:, 0])):
        strange = np.setdiff1d(named, numbers[:, 0])
        if len(strange):
            some = named_missing([str(template) for template in strange[:6]])
            raise ValueError(f"{meta}, {path}: {len(strange):,} templates without an image in {found[0].name}: {some}")
    return Lists(
        _NAMES.get(prefix, prefix),
        images,
        numbers[:, 0],
        numbers[:, 1],
        rows.numbers[chosen, :10],
        rows.numbers[chosen, 10],
        pairs[:, :2],
        pairs[:, 2] == 1,
        galleries,
        probes,
    )


class _Table(NamedTuple):
    names: list[str]
    """Of the first column, where its title is name."""
    numbers: NDArray[Any]
    """All other columns, shape (n, columns)."""


def _table(path: Path, columns: Sequence[str], kind: type[np.number[Any]]) -> _Table:
    """A file of columns with a blank between.

    Raises:
        ValueError: it cannot be read, or a line is something else.
    """
    import pyarrow as pa
    from pyarrow import csv as pa_csv

    titles = [f"{number} {name}" for number, name in enumerate(columns)]
    named = columns[0] == "name"
    types = dict.fromkeys(titles, pa.from_numpy_dtype(kind)) | ({titles[0]: pa.string()} if named else {})
    try:
        table = pa_csv.read_csv(
            path,
            pa_csv.ReadOptions(column_names=titles),
            pa_csv.ParseOptions(delimiter=" ", quote_char=False),
            pa_csv.ConvertOptions(column_types=types, strings_can_be_null=False, null_values=[]),
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except pa.ArrowInvalid as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: a line is not {', '.join(columns)} with blanks between: {reason}") from None
    numbers = np.column_stack([table[title].to_numpy() for title in titles[named:]])
    return _Table(table[titles[0]].to_pylist() if named else [], numbers)


def _subjects(path: Path) -> NDArray[np.int64]:
    """(template, subject) of a gallery or of probes, each template once, shape (t, 2).

    Raises:
        ValueError: it cannot be read, a line has no two numbers, or a template has two subjects.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))[1:]
        rows = np.array([(int(line[0]), int(line[1])) for line in lines if line], np.int64).reshape(-1, 2)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: a line does not begin with a template's and a subject's number: {error}") from None
    rows = np.unique(rows, axis=0)
    twice = rows[1:, 0][rows[1:, 0] == rows[:-1, 0]]
    if len(twice) or not len(rows):
        what = f"template {twice[0]} is of two subjects" if len(twice) else "it names no template"
        raise ValueError(f"{path}: {what}")
    return rows


def _write_lists(lists: Lists, images: Path, points: Path) -> None:
    """Writes what the conversion reads: whose image each is, and its five points. Again the same does no harm."""
    images.parent.mkdir(parents=True, exist_ok=True)
    first = {key: row for row, key in reversed(list(enumerate(lists.keys)))}
    named = {f"{_CROPS}/{lists.images[row]}": (key.partition("/")[0], row) for key, row in first.items()}
    _write(images, ("path", "identity"), ((path, template) for path, (template, _) in named.items()))
    header = (NAME_COLUMN, *COLUMNS["landmarks"])
    _write(points, header, ((path, *lists.points[row].tolist()) for path, (_, row) in named.items()))


def _write(path: Path, header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    if not path.is_file() or path.read_text() != text.getvalue():
        with committed(path) as file:
            file.write(text.getvalue().encode())


def _state(folder: Path) -> Any:
    """What tells that the distribution has changed: its lists' sizes and times, and when an image last came or went."""
    files = [*sorted((folder / "meta").iterdir()), folder / _CROPS]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _found(lists: Lists, shards: ShardSet, folder: Path, skip_missing: bool) -> TemplateSet:
    """The lists in terms of samples and of templates counted from 0.

    Raises:
        ValueError: images are missing, and `skip_missing` does not say that they may be.
    """
    (split,) = map(shards.split, shards.splits)
    keys = lists.keys
    place = samples_of(shards, split, list(dict.fromkeys(keys)))
    samples = np.array([place.get(key, -1) for key in keys])
    missing = [lists.images[row] for row in np.flatnonzero(samples < 0)]
    if missing and not skip_missing:
        raise ValueError(
            f"{folder / _CROPS}: {len(missing):,} images are missing or cannot be aligned: {named_missing(missing)}"
        )
    there = samples >= 0
    numbers, templates = np.unique(lists.templates[there], return_inverse=True)

    def places(of: NDArray[Any]) -> NDArray[Any]:
        """From a template's number to its place, -1 where no image of it is left."""
        at = np.searchsorted(numbers, of).clip(max=len(numbers) - 1)
        return np.where(numbers[at] == of, at, -1)

    galleries = [Gallery(name, places(rows[:, 0]), rows[:, 1]) for name, rows in lists.galleries.items()]
    pairs = places(lists.pairs)
    whole = (pairs >= 0).all(axis=1)
    return TemplateSet(
        name=lists.name,
        split=split,
        samples=samples[there],
        templates=templates,
        media=lists.media[there],
        scores=lists.scores[there],
        pairs=pairs[whole],
        genuine=lists.same[whole],
        galleries=galleries,
        probes=Gallery("probes", places(lists.probes[:, 0]), lists.probes[:, 1]),
        left_out={"images_left_out": len(missing), "pairs_left_out": int((~whole).sum())},
    )
