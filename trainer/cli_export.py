"""`facescale export` and `facescale import` on the command line."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpoint
    from trainer.config import TrainConfig
    from trainer.export.config import ExportedConfig
    from trainer.export.original import Progress
    from trainer.model import Embedder

ADD = Callable[..., argparse.ArgumentParser]
FORMATS = ("huggingface", "onnx", "torch-export", "original")


def add_export(add: ADD) -> None:
    text = (
        "Write a trained network for others: Hugging Face Hub layout, ONNX, torch.export, the original checkpoint.pth."
    )
    parser = add("export", text, _export)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `facescale train`")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what is written")
    parser.add_argument("--checkpoint", default="latest", help="latest, best (of run.best_metric), or a step's number")
    text = "upload the folder to this repository (OWNER/NAME) of the Hub, huggingface only; nothing is uploaded if not given"
    parser.add_argument("--push", metavar="REPO_ID", help=text)


def add_import(add: ADD) -> None:
    text = "Make an exported network, in Hugging Face Hub layout, of the original project's checkpoint.pth."
    parser = add("import", text, _import)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT.pth", help="read without unpickling objects")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of the pictures it was trained with")


def _export(args: argparse.Namespace) -> int:
    _check(args)
    from trainer import checkpoint
    from trainer.config import CONFIG
    from trainer.evaluation.run import load_run
    from trainer.export.network import float32

    if not (args.run / CONFIG).is_file():
        raise ValueError(f"{args.run} is no run folder: it has no {CONFIG}")
    found = checkpoint.chosen(args.run / checkpoint.CHECKPOINTS, args.checkpoint)
    config, model = load_run(args.run, which=str(found.step))
    difference = _write(args, config, float32(model), found)
    checked = "" if difference is None else f"; differs from the network by at most {difference:.1e}"
    files = ", ".join(sorted(path.name for path in args.out.iterdir()))
    print(f"step {found.step:,} of {args.run} as {args.format} in {args.out}: {files}{checked}")
    if args.push:
        from trainer.export.huggingface import push

        print(f"pushed: {push(args.out, args.push)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    from trainer.export.network import check_out

    check_out(args.out)
    if args.push and args.format != "huggingface":
        raise ValueError(f"--push goes with --format huggingface, not {args.format}")
    if args.push:
        from trainer.export.huggingface import check_repo

        check_repo(args.push)
    if args.format == "onnx":
        from trainer.export.onnx import check_packages

        check_packages()


def _write(args: argparse.Namespace, config: "TrainConfig", model: "Embedder", found: "Checkpoint") -> float | None:
    """Writes the folder; the largest difference where the format is checked by running it."""
    from trainer.export import huggingface, onnx, original, torch_export
    from trainer.export.config import ExportedConfig

    if args.format == "original":
        return original.write(model, _progress(args.run, config, found.step), args.out)
    results, thresholds = _evaluated(args.run, found)
    about = ExportedConfig.of(model, distance=config.loss.distance, step=found.step, thresholds=thresholds)
    if args.format == "onnx":
        return onnx.write(model, about, args.out)
    if args.format == "torch-export":
        return torch_export.write(model, about, args.out)
    name = args.push.split("/")[-1] if args.push else args.out.absolute().name
    huggingface.write(model, about, _card(name, about, results, asdict(config)), args.out)
    return None


def _card(name: str, about: "ExportedConfig", results: dict[str, dict[str, float]], settings: dict[str, Any]) -> str:
    from trainer.export.model_card import model_card, shown_settings

    sections = ("plan", "augment", "model", "loss", "optimizer")
    return model_card(name, about, results, shown_settings(settings, sections) if settings else {})


def _evaluated(run: Path, found: "Checkpoint") -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Headline figures by set and thresholds, from RUN/evaluation where that is of these weights."""
    from trainer.evaluation.embedding_store import MANIFEST
    from trainer.evaluation.results import EVALUATION, FACESCALE, load_results, thresholds_of
    from trainer.evaluation.run import EMBEDDINGS

    if not (run / EVALUATION / "results.json").is_file():
        return {}, {}
    manifests = (run / EMBEDDINGS).glob(f"*/{MANIFEST}")
    if found.weights_sha256 not in {json.loads(path.read_text()).get("weights") for path in manifests}:
        print(f"facescale: {run / EVALUATION} is not known to be of these weights; left out", file=sys.stderr)
        return {}, {}
    own = [row for row in load_results(run / EVALUATION).rows if row.embedder == FACESCALE]
    figures = {row.set: row.result.headline() for row in own}
    return figures, thresholds_of(own[0].result.scalars) if own else {}


def _progress(run: Path, config: "TrainConfig", step: int) -> "Progress":
    from trainer.export.original import Progress
    from trainer.telemetry import LOG

    last: dict[str, Any] = {"epoch": 0, "loss": None}
    for text in (run / LOG).read_text().splitlines() if (run / LOG).is_file() else ():
        with contextlib.suppress(ValueError):  # the last line, cut short by a kill
            line = json.loads(text)
            last = line if line["step"] <= step else last
    return Progress(
        epoch=int(last["epoch"]),
        loss=last["loss"],
        optimizer=config.optimizer.kind,
        learning_rate=config.optimizer.learning_rate,
    )


def _import(args: argparse.Namespace) -> int:
    from trainer.export import huggingface, original
    from trainer.export.config import ExportedConfig
    from trainer.export.network import check_out

    if args.image_size < 32:
        raise ValueError(f"--image-size is {args.image_size}; it must be at least 32 pixels")
    check_out(args.out)
    model = original.read(args.checkpoint, args.image_size)
    about = replace(ExportedConfig.of(model), step=None)
    huggingface.write(model, about, _card(args.out.absolute().name, about, {}, {}), args.out)
    size = about.model.embedding_size
    print(
        f"{about.model.trunk} with {size} dimensions of {args.checkpoint} in {args.out}; `facescale evaluate` takes it"
    )
    return 0
