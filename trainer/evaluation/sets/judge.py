"""The field's own test sets beside what the run holds out: lists of pairs, .bin sets, IJB-B and IJB-C, distractors.

Whatever is not shards is converted once, by our own conversion, into a folder that is kept; then all goes through one loader.
Everything is found and checked before the first picture is embedded.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_shards.index import ShardSet
from trainer.evaluation.results import ResultRow
from trainer.evaluation.sets.distractors import distractor_set
from trainer.evaluation.sets.ijb import ijb_set
from trainer.evaluation.sets.pair_sets import bin_labels, bin_set, pair_list
from trainer.evaluation.sets.prepared import Embed, Prepared, Report
from trainer.evaluation.sets.set_shards import on_all_ranks, open_or_convert


@dataclass(kw_only=True, frozen=True)
class SetsConfig:
    """Which sets are judged, and how."""

    pairs: tuple[Path, ...] = ()
    """Lists of pairs: LFW's pairs.txt, pairsDevTrain.txt, pairsDevTest.txt, or CSV of first, second, same and perhaps fold."""
    images: Path | None = None
    """Where their pictures lie: shards, or whatever `facescale shard` reads, such as the folder lfw-deepfunneled. None: in the
    run's own shards."""
    bins: tuple[Path, ...] = ()
    """InsightFace's verification sets: lfw.bin, cfp_fp.bin, agedb_30.bin, calfw.bin, cplfw.bin."""
    ijb: tuple[Path, ...] = ()
    """Folders of IJB-B or IJB-C as insightface distributes them: meta/ and loose_crop/."""
    ijb_detector_scores: bool = False
    """Weight each image of a template by the score of the detector that found the face."""
    ijb_ranks: tuple[int, ...] = (1, 5, 10)
    """Ranks of 1:N, ascending, counted in subjects."""
    ijb_fars: tuple[float, ...] = (0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
    """False-accept rates of 1:1, each between 0 and 1."""
    ijb_fpirs: tuple[float, ...] = (0.1, 0.01)
    """False-positive identification rates of 1:N, each between 0 and 1."""
    distractors: Path | None = None
    """Pictures or shards, any number, that join the gallery of unseen identities (MegaFace)."""
    fars: tuple[float, ...] = (0.1, 0.01, 0.001)
    """False-accept rates of pair lists and .bin sets, each between 0 and 1."""
    folds: int = 10
    """Into which .bin sets, and lists without folds, are dealt; at least 2."""
    skip_missing: bool = False
    """Leave out what needs a missing picture, and say how much, instead of refusing the set."""
    seed: int = 0
    """Of the order in which distractors join."""

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"sets.{name} is {getattr(self, name)}; it must be at least {least}")
        ranks = list(self.ijb_ranks)
        if not ranks or ranks != sorted(set(ranks)) or ranks[0] < 1:
            raise ValueError(f"sets.ijb_ranks is {ranks}; it must be ascending integers from 1")
        for name in ("fars", "ijb_fars", "ijb_fpirs"):
            for rate in getattr(self, name):
                if not 0 < rate < 1:
                    raise ValueError(f"sets.{name} has {rate}; each must lie between 0 and 1, both excluded")
        _refuse_twins(path.name for path in (*self.pairs, *self.bins, *self.ijb))
        if self.images is not None and not self.pairs:
            raise ValueError(
                f"sets.images is {self.images}, but there is no list of pairs that needs it; give sets.pairs"
            )


def _refuse_twins(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"sets: {name} is there {count} times; results are told apart by the name")


def judge_sets(
    sets: SetsConfig,
    source: ShardSet,
    embedders: Sequence[tuple[str, Embed]],
    *,
    work: Path,
    image_size: int,
    margin: float | None,
    squared: bool,
    device: str = "cpu",
) -> list[ResultRow]:
    """Each set by each embedder; every rank calls it and has the same rows.

    Args:
        source: the run's own shards.
        embedders: name and function, in the order in which rows shall come.
        work: folder for what is converted; it may be kept and is used again.
        image_size: width and height of the network's input, at which IJB is aligned.
        margin, squared: of the training's loss; reported.
        device: where pairs are compared and neighbours searched.
    Raises:
        ValueError: on all ranks, in one line: a list, a set or a picture is missing or wrong.
        OSError: on all ranks: the disk is full or fails.
    """
    report = Report(margin=margin, squared=squared, device=device)
    prepared = list(_prepared(sets, source, work, image_size))
    _refuse_twins(one.name for one in prepared)
    return [ResultRow(one.name, name, one.judge(embedded, report)) for one in prepared for name, embedded in embedders]


def _prepared(sets: SetsConfig, source: ShardSet, work: Path, image_size: int) -> Iterator[Prepared]:
    if sets.pairs:
        images = source if sets.images is None else open_or_convert(sets.images, work)
        for path in sets.pairs:
            yield on_all_ranks(partial(pair_list, path, images, sets.folds, sets.fars, sets.skip_missing))
    for path in sets.bins:
        same = on_all_ranks(partial(bin_labels, path))
        shards = open_or_convert(path, work, format="bin")
        yield on_all_ranks(partial(bin_set, path, same, shards, sets.folds, sets.fars, sets.skip_missing))
    for path in sets.ijb:
        yield ijb_set(
            path,
            work,
            image_size=image_size,
            detector_scores=sets.ijb_detector_scores,
            ranks=sets.ijb_ranks,
            fars=sets.ijb_fars,
            fpirs=sets.ijb_fpirs,
            skip_missing=sets.skip_missing,
        )
    if sets.distractors is not None:
        location, joining = sets.distractors, open_or_convert(sets.distractors, work)
        yield on_all_ranks(lambda: distractor_set(location.name, source, joining, sets.seed))
