"""`facescale shard`, `facescale verify` and `facescale shards …`: everything about shards on the command line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADD = Callable[..., argparse.ArgumentParser]

_SOURCE = (
    "folder of identity/image.jpg, or zip, tar, tar.gz, MXNet .rec, InsightFace .bin, LMDB, Parquet, Arrow, WebDataset tars, "
    "or a CSV list; a path or a URL"
)


def add_shard(add: ADD) -> None:
    parser = add("shard", "Pack pictures sorted by identity into WebDataset tar shards.", _shard)
    parser.add_argument("source", metavar="SOURCE", help=_SOURCE)
    parser.add_argument("out", metavar="OUT", help="folder or URL to make; an interrupted conversion goes on")
    _add_source(parser.add_argument_group("source"))
    _add_split(parser.add_argument_group("what is kept out of training"))
    _add_layout(parser.add_argument_group("layout of the shards"))
    _add_filters(parser.add_argument_group("which pictures"))
    _add_transform(parser.add_argument_group("changing pictures on the way (not done by default)"))
    _add_work(parser.add_argument_group("work"))


def _add_source(group: Any) -> None:
    from data_shards.sources.detect import FORMATS

    group.add_argument("--format", choices=FORMATS, default="auto", help="kind of the source; auto: found out")
    group.add_argument("--image-column", default="", metavar="NAME", help="of Parquet and Arrow")
    group.add_argument(
        "--label-column", default="", metavar="NAME", help="of Parquet and Arrow; json:FIELD of WebDataset"
    )
    group.add_argument(
        "--list-root", default="", metavar="FOLDER", help="what a list's paths are relative to, if not its folder"
    )
    group.add_argument(
        "--identity-meta",
        default="",
        metavar="FILE",
        help="VGGFace2's identity_meta.csv, if it does not lie with SOURCE",
    )


def _add_split(group: Any) -> None:
    group.add_argument(
        "--holdout-identities",
        default="0",
        metavar="N|FRACTION|FILE",
        help="identities kept out as a whole: a count, a fraction (1.0: all), or a file of names, or of pictures, one a line",
    )
    group.add_argument("--holdout-images", type=int, default=0, metavar="N", help="images of each training identity")


def _add_layout(group: Any) -> None:
    group.add_argument(
        "--shard-mib", type=float, default=256, help="largest size of a shard in MiB; all get about the same"
    )
    group.add_argument("--shard-samples", type=int, metavar="N", help="largest number of samples in a shard")
    group.add_argument("--images-per-group", type=int, default=4, help="images of an identity that lie together")
    group.add_argument(
        "--order",
        choices=["groups", "identity", "random", "source"],
        default="groups",
        help="groups: shuffled groups of an identity's images",
    )
    group.add_argument("--seed", type=int, default=0, help="draws what is held out, and the shuffle")
    group.add_argument(
        "--readable-by", choices=["owner", "group", "all"], default="owner", help="who may read what is written"
    )
    group.add_argument(
        "--pseudonyms", default="", metavar="FILE", help="made-up names instead of real ones, whose list goes into FILE"
    )


def _add_filters(group: Any) -> None:
    group.add_argument(
        "--check",
        choices=["decode", "header"],
        default="decode",
        help="decode: every picture, completely; header: only its header and its end",
    )
    group.add_argument("--max-pixels", type=int, default=100_000_000, help="pictures with more are refused")
    group.add_argument("--min-images", type=int, default=1, metavar="N", help="identities with fewer are left out")
    group.add_argument(
        "--min-size", type=int, default=1, metavar="PIXELS", help="pictures with a shorter side are left out"
    )
    group.add_argument("--keep-identities", metavar="FILE", help="only these, a name or id a line")
    group.add_argument("--leave-out-identities", metavar="FILE", help="not these, for instance those of a test set")
    group.add_argument(
        "--only-pictures", default="", metavar="FILE", help="only these, such as VGGFace2's train_list.txt"
    )
    group.add_argument(
        "--duplicates", choices=["keep", "report", "drop"], default="keep", help="pictures with the same bytes"
    )
    group.add_argument(
        "--near-duplicates",
        choices=["keep", "report", "drop"],
        default="keep",
        help="of an identity, by perceptual hash",
    )
    group.add_argument(
        "--near-distance", type=int, default=2, metavar="BITS", help="of 64 in which their hashes may differ"
    )


def _add_transform(group: Any) -> None:
    group.add_argument("--shortest-edge", type=int, metavar="PIXELS", help="shrink larger pictures to this")
    group.add_argument("--crop", choices=["none", "box", "align"], default="none", help="by --regions")
    group.add_argument(
        "--regions",
        nargs="+",
        default=[],
        metavar="CSV",
        help="VGGFace2's loose_bb_*.csv for box, loose_landmark_*.csv for align",
    )
    group.add_argument("--box-margin", type=float, default=1.3, help="factor by which a box's sides grow")
    group.add_argument("--size", type=int, metavar="PIXELS", help="side of cropped pictures; aligned ones: 112")
    group.add_argument("--quality", type=int, default=95, help="of JPEG, where pictures are encoded again")
    group.add_argument(
        "--image-format", choices=["keep", "jpg", "png", "webp"], default="keep", help="encode pictures as"
    )


def _add_work(group: Any) -> None:
    group.add_argument("--workers", type=int, help="processes; one a core if not given")
    group.add_argument(
        "--executor",
        choices=["processes", "ray", "slurm-array"],
        default="processes",
        help="who does the work; ray and slurm-array: many machines that share OUT",
    )


def _shard(args: argparse.Namespace) -> int:
    from data_shards.convert import convert
    from data_shards.executors import engine
    from data_shards.sources.detect import open_source

    config = _config(args)
    named = {"image": args.image_column, "label": args.label_column, "root": args.list_root}
    source = open_source(args.source, args.format, **named)
    if args.executor == "slurm-array":
        from data_shards.executor_slurm import submit

        print(submit(source, args.out, config, sys.argv[1:]))
        return 0
    print(convert(source, args.out, config, engine(args.executor)))
    return 0


def _config(args: argparse.Namespace) -> Any:
    from data_shards.convert import ConvertConfig
    from data_shards.identity_lists import read_identities
    from data_shards.transform import TransformConfig

    keep, leave_out = args.keep_identities, args.leave_out_identities
    transform = TransformConfig(
        shortest_edge=args.shortest_edge,
        crop=args.crop,
        box_margin=args.box_margin,
        size=args.size,
        quality=args.quality,
        format=args.image_format,
    )
    same: tuple[str, ...] = (
        "holdout_images",
        "shard_samples",
        "images_per_group",
        "order",
        "seed",
        "check",
        "max_pixels",
        "min_images",
    )
    same += (
        "min_size",
        "only_pictures",
        "duplicates",
        "near_duplicates",
        "near_distance",
        "identity_meta",
        "pseudonyms",
    )
    return ConvertConfig(
        holdout_identities=_holdout(args.holdout_identities),
        shard_bytes=_mebibytes(args.shard_mib),
        keep_identities=read_identities(keep, "--keep-identities") if keep else None,
        leave_out_identities=read_identities(leave_out, "--leave-out-identities") if leave_out else (),
        transform=transform,
        regions=tuple(args.regions),
        workers=args.workers,
        readable_by=args.readable_by,
        **{name: getattr(args, name) for name in same},
    )


def _mebibytes(size: float) -> int:
    if not 2**-20 <= size < 2**40:
        raise ValueError(f"--shard-mib is {size}; it must be above 0 and finite")
    return int(size * 2**20)


def _holdout(text: str) -> int | float | tuple[str, ...]:
    from data_shards.identity_lists import read_identities

    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if not Path(text).is_file():
        raise ValueError(f"--holdout-identities {text} is neither a number nor a file of names")
    return read_identities(text, "--holdout-identities")


def add_verify(add: ADD) -> None:
    parser = add("verify", "Check shards against their manifest: sizes, checksums, counts, keys.", _verify)
    parser.add_argument("shards", type=Path, metavar="DIR", help="folder written by `facescale shard`")
    parser.add_argument("--decode", action="store_true", help="decode every picture, too")
    parser.add_argument("--workers", type=int, help="processes; one a core if not given")


def _verify(args: argparse.Namespace) -> int:
    from data_shards.verify import verify

    problems = verify(args.shards, decode=args.decode, workers=args.workers)
    for problem in problems:
        print(problem.encode(errors="backslashreplace").decode(), file=sys.stderr)
    print(f"{args.shards}: {f'{len(problems):,} problems' if problems else 'all as the manifest says'}")
    return 1 if problems else 0


def add_shards(add: ADD, parser_class: type[argparse.ArgumentParser]) -> None:
    parser = add("shards", "Look into shards, get the pictures back, or delete people.", None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=parser_class)
    stats = commands.add_parser("stats", help="images per identity, sizes, bytes: printed and plotted")
    stats.add_argument("shards", type=Path, metavar="DIR", help="folder written by `facescale shard`")
    stats.add_argument("--plot", type=Path, default=Path("shard_stats.png"), metavar="PNG", help="picture to write")
    stats.set_defaults(command=_stats)
    index = commands.add_parser("index", help="DALI's index (.idx) beside any WebDataset tar")
    index.add_argument("tars", type=Path, nargs="+", metavar="TAR", help="uncompressed tars, ours or another tool's")
    index.set_defaults(command=_index)
    export = commands.add_parser("export", help="the pictures as folders again, byte-identical")
    export.add_argument("shards", type=Path, metavar="DIR", help="folder written by `facescale shard`")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make: OUT/split/identity/image.jpg")
    export.add_argument("--split", nargs="+", metavar="NAME", help="these splits only")
    export.set_defaults(command=_export)
    forget = commands.add_parser("forget", help="delete identities from tars, index, manifest and embeddings for good")
    forget.add_argument("shards", type=Path, metavar="DIR", help="folder written by `facescale shard`")
    forget.add_argument(
        "identities", nargs="+", metavar="IDENTITY", help="names, as the folders of pictures were called"
    )
    text = "folders of `facescale embed` whose rows of them are deleted, too"
    forget.add_argument("--embeddings", type=Path, nargs="+", default=[], metavar="OUT", help=text)
    forget.set_defaults(command=_forget)


def _stats(args: argparse.Namespace) -> int:
    from data_shards.shard_stats import plot_stats, stats

    print(stats(args.shards))
    plot_stats(args.shards, args.plot)
    print(f"Plot: {args.plot}")
    return 0


def _index(args: argparse.Namespace) -> int:
    from data_shards.tar_index import write_tar_index

    for tar in args.tars:
        print(f"{write_tar_index(tar):,} samples in {tar}: {tar.with_suffix('.idx')}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from data_shards.export import export

    print(f"{export(args.shards, args.out, args.split):,} pictures in {args.out}")
    return 0


def _forget(args: argparse.Namespace) -> int:
    from data_shards.forget import forget, labels_of
    from data_shards.index import ShardSet
    from data_shards.replacing import is_interrupted

    rows = 0
    if args.embeddings and not is_interrupted(args.shards):  # then they are done
        from trainer.forget_embeddings import check_embeddings, forget_embeddings

        for folder in args.embeddings:
            check_embeddings(folder)
        labels = labels_of(ShardSet.open(args.shards), args.identities)
        rows = sum(forget_embeddings(folder, labels) for folder in args.embeddings)
    found = forget(args.shards, args.identities)
    print(f"{found}; {rows:,} rows out of embeddings" if args.embeddings else found)
    print("Elsewhere they may still be: docs/pages/face-data.md lists where.")
    return _verify(argparse.Namespace(shards=args.shards, decode=False, workers=None))
