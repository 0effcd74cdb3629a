"""`facescale align`: raw photographs into pictures of aligned faces."""

import argparse
from collections.abc import Callable
from pathlib import Path

ADD = Callable[..., argparse.ArgumentParser]


def add_align(add: ADD) -> None:
    parser = add("align", "Find the face in each photograph and align it, by five points, for training.", _align)
    parser.add_argument("source", metavar="SOURCE", help="pictures by identity, as `facescale shard` takes them")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make: OUT/identity/image.jpg")
    parser.add_argument("--size", type=int, default=112, help="side of the aligned pictures in pixels, 32 to 1024")
    parser.add_argument(
        "--faces",
        choices=("largest", "central", "one"),
        default="largest",
        help="which where there are several; one: such a picture is left out",
    )
    parser.add_argument("--min-score", type=float, default=0.6, help="of the detector, 0 to 1; below it is no face")
    parser.add_argument(
        "--landmarks",
        nargs="+",
        default=[],
        metavar="CSV",
        help="align by these and detect nothing: VGGFace2's loose_landmark_*.csv",
    )
    parser.add_argument(
        "--detector", type=Path, metavar="ONNX", help="YuNet's weights; if not given, those of the package"
    )
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")
    parser.add_argument("--workers", type=int, help="processes; one a core if not given")


def _align(args: argparse.Namespace) -> int:
    from data_shards.align import AlignConfig, align_faces
    from data_shards.sources.detect import open_source

    config = AlignConfig(
        size=args.size,
        quality=args.quality,
        faces=args.faces,
        min_score=args.min_score,
        landmarks=tuple(args.landmarks),
        detector=args.detector,
        workers=args.workers,
    )
    print(align_faces(open_source(args.source), args.out, config))
    return 0
