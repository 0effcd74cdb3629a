"""Options of `facescale evaluate` that name further sets: lists of pairs, .bin sets, IJB, distractors."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.evaluation.sets.judge import SetsConfig


def add_set_options(parser: argparse.ArgumentParser) -> None:
    """Adds them to a command; `sets_of` reads them."""
    sets = parser.add_argument_group("further sets", "Each is judged beside what the shards hold out.")
    several = partial(sets.add_argument, type=Path, nargs="+", default=[])
    several("--pairs", metavar="FILE", help="LFW's pairs.txt or development lists, or CSV of first,second,same[,fold]")
    where = "shards or pictures of --pairs, such as lfw-deepfunneled; the run's own shards if not given"
    sets.add_argument("--images", type=Path, metavar="WHERE", help=where)
    several("--bin", metavar="FILE", help="InsightFace's verification sets: lfw.bin, cfp_fp.bin, agedb_30.bin …")
    several("--ijb", metavar="DIR", help="IJB-B or IJB-C as insightface distributes them: meta/ and loose_crop/")
    weighted = "weight a template's images by the detector's score"
    sets.add_argument("--ijb-detector-scores", action="store_true", help=weighted)
    sets.add_argument("--ijb-ranks", type=int, nargs="+", default=[1, 5, 10], metavar="K", help="ranks of 1:N")
    joining = "shards or pictures that join the gallery of unseen identities"
    sets.add_argument("--distractors", type=Path, metavar="WHERE", help=joining)
    sets.add_argument("--folds", type=int, default=10, help="folds of .bin sets and of lists without folds")
    skip = "leave out what needs a missing picture, and say how much"
    sets.add_argument("--skip-missing", action="store_true", help=skip)


def sets_of(args: argparse.Namespace) -> "SetsConfig":
    """What the options say; the default where they name no set. Its seed is the command's.

    Raises:
        ValueError: see `SetsConfig`.
    """
    from trainer.evaluation.sets.judge import SetsConfig

    if not (args.pairs or args.images or args.bin or args.ijb or args.distractors):
        return SetsConfig()
    return SetsConfig(
        pairs=tuple(args.pairs),
        images=args.images,
        bins=tuple(args.bin),
        ijb=tuple(args.ijb),
        ijb_detector_scores=args.ijb_detector_scores,
        ijb_ranks=tuple(sorted(set(args.ijb_ranks))),
        distractors=args.distractors,
        folds=args.folds,
        skip_missing=args.skip_missing,
        seed=args.seed,
    )
