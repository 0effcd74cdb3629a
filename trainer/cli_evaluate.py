"""`facescale embed` and `facescale evaluate` on the command line, on one process or on all ranks that a launcher starts."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli_sets import add_set_options, sets_of

if TYPE_CHECKING:
    from trainer.evaluation.run import EmbedOptions

ADD = Callable[..., argparse.ArgumentParser]
_MANY = "On many processes: accelerate launch --num_processes N -m trainer.cli {} with the same options."


def add_embed(add: ADD) -> None:
    text = (
        "Write the embeddings of a split of shards, or with --network those of a folder of photographs; the same command again "
        "goes on where it was interrupted."
    )
    parser = add("embed", f"{text} {_MANY.format('embed')}", _embed)
    text = "run folder of `facescale train`, or an exported network; with --network: a folder of photographs"
    parser.add_argument("run", type=Path, metavar="RUN_OR_PHOTOS", help=text)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder to make: embeddings.npy, identities.npy, keys.txt"
    )
    text = "run folder, checkpoint, or exported network that embeds photographs, in one process"
    parser.add_argument("--network", type=Path, help=text)
    parser.add_argument("--shards", help="shards to embed, folder or URL; the run's own if not given")
    parser.add_argument("--split", default="unseen_identities", help="train, unseen_identities or unseen_images")
    _add_options(parser)


def _embed(args: argparse.Namespace) -> int:
    if args.network is not None:
        return _embed_photos(args)
    from trainer.collectives import rank
    from trainer.evaluation.run import tell_pace, write_embeddings

    with _ranks(args.device) as device:
        options = {"shards": args.shards, "split": args.split, "options": _options(args)}
        found = write_embeddings(args.run, args.out, device=device, **options)
        tell_pace(found, args.split)
        if rank() == 0:
            count, size = found.embeddings.shape
            print(f"{count:,} embeddings of {size} dimensions in {args.out}")
    return 0


def _embed_photos(args: argparse.Namespace) -> int:
    usual = {"shards": None, "split": "unseen_identities", "mirror": False, "dtype": "fp32"}
    for name, value in usual.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name} goes with a run's shards, not with --network")
    from trainer.embedder import load_embedder
    from trainer.photos import SKIPPED, embed_photos

    embedder = load_embedder(args.network, device=args.device, checkpoint=args.checkpoint)
    found = embed_photos(args.run, args.out, embedder)
    skipped = f"; {found.skipped:,} could not be read: {args.out / SKIPPED}" if found.skipped else ""
    count, size = found.embeddings.shape
    print(f"{count:,} embeddings of {size} dimensions, {len(found.names):,} identities, in {args.out}{skipped}")
    return 0


def add_evaluate(add: ADD) -> None:
    text = "Judge a checkpoint on held-out identities and images, raw pixels beside it, and on the field's test sets."
    parser = add("evaluate", f"{text} {_MANY.format('evaluate')}", _evaluate)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `facescale train`, or an exported network")
    parser.add_argument("--shards", help="shards to evaluate on, folder or URL; the run's own if not given")
    _add_options(parser)
    _add_protocol(parser.add_argument_group("protocol"))
    add_set_options(parser)


def _add_protocol(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gallery", choices=("first", "mean", "all_but_self"), default="first", help="Rank-k: see below"
    )
    group.add_argument(
        "--gallery-images", type=int, default=1, help="first images of each identity: enrolled, or averaged"
    )
    text = "closed set: training images of each identity enrolled for kNN"
    group.add_argument("--closed-gallery-images", type=int, default=20, help=text)
    group.add_argument(
        "--knn", type=int, nargs="+", default=[1, 5, 20], metavar="K", help="numbers of voting neighbours"
    )
    text = "how neighbours are found; all but exact are approximate, and told with their recall"
    group.add_argument("--search", choices=("exact", "split", "ivf", "hnsw", "ivfpq"), default="exact", help=text)
    rates = [0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6]
    group.add_argument("--fars", type=float, nargs="+", default=rates, metavar="FAR", help="false-accept rates of TAR")
    group.add_argument("--seed", type=int, default=0, help="draws the verification pairs")


def _evaluate(args: argparse.Namespace) -> int:
    from trainer.collectives import rank
    from trainer.evaluation.protocols import ProtocolConfig
    from trainer.evaluation.report.tables import main_table, rank1_line
    from trainer.evaluation.run import evaluate

    with _ranks(args.device) as device:
        protocol = ProtocolConfig(
            gallery=args.gallery,
            gallery_images_per_identity=args.gallery_images,
            closed_gallery_images=args.closed_gallery_images,
            knn=tuple(sorted(set(args.knn))),
            fars=tuple(args.fars),
            search=args.search,
            seed=args.seed,
        )
        sets, options = sets_of(args), _options(args)
        rows = evaluate(args.run, shards=args.shards, protocol=protocol, sets=sets, options=options, device=device)
        if rank() == 0:
            print(f"{main_table(rows)}\n\n{rank1_line(rows)}")
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="latest", help="latest, best (of run.best_metric), or a step's number")
    parser.add_argument("--mirror", action="store_true", help="average each embedding with that of the mirror image")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="in which embeddings are stored")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: the GPU where there is one")


def _options(args: argparse.Namespace) -> "EmbedOptions":
    from trainer.evaluation.run import EmbedOptions

    return EmbedOptions(checkpoint=args.checkpoint, mirror=args.mirror, dtype=args.dtype)


@contextmanager
def _ranks(device: str) -> Iterator[str]:
    """Joins the ranks of the launcher, if there is one; yields this rank's device."""
    from trainer.collectives import join, shutdown
    from trainer.devices import resolve, share_cores

    found = resolve(device)
    share_cores()
    join(found.startswith("cuda"))
    try:
        yield found
    finally:
        shutdown()
