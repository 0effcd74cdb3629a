"""`facescale search` on the command line."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

FAR = "far_0.001"
"""The threshold taken, where the evaluation has it: a search compares with many, so few of those may pass by chance."""
ADD = Callable[..., argparse.ArgumentParser]


def add_search(add: ADD) -> None:
    text = "Show the identities of a gallery that photographs are nearest to, with distances and a contact sheet."
    parser = add("search", text, _search)
    told = "folder of pictures, a folder for each identity, or what `facescale embed PHOTOS OUT --network` made of it"
    parser.add_argument("gallery", type=Path, metavar="GALLERY", help=told)
    parser.add_argument("probes", type=Path, nargs="+", metavar="PROBE", help="pictures to search for")
    text = "run folder, checkpoint, or exported network that embeds the probes, and the gallery if it must"
    parser.add_argument("--network", type=Path, required=True, help=text)
    parser.add_argument("--checkpoint", default="latest", help="of a run: latest, best, or a step's number")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="identities shown for each probe")
    text = (
        "root L2 distance up to which a pair counts as one identity; if not given, that which let 1 of 1,000 pairs of "
    )
    text += "different identities through when the run was evaluated"
    parser.add_argument("--threshold", type=float, help=text)
    parser.add_argument("--sheet", type=Path, default=Path("search.png"), help="contact sheet to write, a PNG")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: the GPU where there is one")


def _search(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise ValueError(f"--top is {args.top}; it must be at least 1")
    if args.threshold is not None and not 0 < args.threshold <= 2:
        raise ValueError(f"--threshold is {args.threshold}; allowed is above 0 and at most 2")
    if args.sheet.suffix.lower() != ".png" or not args.sheet.absolute().parent.is_dir():
        raise ValueError(f"--sheet is {args.sheet}; it must be a .png in a folder that exists")
    if not args.gallery.is_dir():
        raise ValueError(f"{args.gallery} is no folder: neither pictures nor embeddings")
    from trainer.devices import resolve
    from trainer.embedder import load_embedder
    from trainer.nearest import Answer, contact_sheet, nearest_identities
    from trainer.photos import gallery_of, is_gallery, read_gallery

    device = resolve(args.device)
    embedder = load_embedder(args.network, device=device, checkpoint=args.checkpoint)
    probes = embedder.embed(args.probes)
    gallery = read_gallery(args.gallery) if is_gallery(args.gallery) else gallery_of(args.gallery, embedder)
    if gallery.weights != embedder.weights:
        raise ValueError(f"{args.gallery} was embedded with other weights than {args.network} has: embed it again")
    found = nearest_identities(gallery, probes, args.top, device)
    answers = [Answer(path, nearest) for path, nearest in zip(args.probes, found, strict=True)]
    measured = embedder.thresholds.get(FAR, embedder.thresholds.get("verification"))
    threshold = measured if args.threshold is None else args.threshold
    contact_sheet(answers, gallery.photos, threshold).save(args.sheet)
    if args.json:
        shown = [
            {"probe": str(answer.probe), "nearest": [near._asdict() for near in answer.nearest]} for answer in answers
        ]
        print(json.dumps({"threshold": threshold, "sheet": str(args.sheet), "answers": shown}, indent=1))
        return 0
    width = max(len(near.identity) for answer in answers for near in answer.nearest)
    for answer in answers:
        print(answer.probe)
        for place, near in enumerate(answer.nearest, 1):
            said = "" if threshold is None else "  within" if near.distance <= threshold else "  beyond"
            print(f"{place:>4}  {near.identity:{width}}  {near.distance:.3f}{said}  {near.key}")
    skipped = f"; {gallery.skipped:,} could not be read" if gallery.skipped else ""
    cut = "no threshold: evaluate the run, or say --threshold" if threshold is None else f"threshold {threshold:.3f}"
    print(f"{len(gallery.keys):,} pictures of {len(gallery.names):,} identities{skipped}; {cut}. Sheet: {args.sheet}")
    return 0
