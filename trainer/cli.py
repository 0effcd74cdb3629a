"""The `facescale` command. Every subcommand checks its arguments first; exit code 0, 1 (failed) or 2 (usage)."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from trainer.cli_report import add_report
from trainer.cli_shards import add_shard, add_shards, add_verify

_DESCRIPTION = "Train face-embedding networks from WebDataset shards: pictures -> shards -> network -> report."
_DISTRIBUTED = "More than one process: accelerate launch -m trainer.train, with the same options."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. A user's mistake is told in one line; FACESCALE_TRACEBACK=1 shows where it was found."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["train"]:
        from trainer.train import main as train

        return train(args[1:], prog="facescale train")
    try:
        parsed = _parser().parse_args(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    run: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return run(parsed)
    except (ValueError, OSError) as error:
        if os.environ.get("FACESCALE_TRACEBACK"):
            raise
        print(f"facescale: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("facescale: interrupted", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="facescale", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (
        _add_synthesize,
        _add_shards,
        _add_train,
        _add_embed,
        _add_evaluate,
        lambda added: add_report(partial(_command, added)),
        _add_doctor,
    ):
        add(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, text: str, run: Callable | None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    if run:
        parser.set_defaults(command=run)
    return parser


def _add_shards(commands: argparse._SubParsersAction) -> None:
    add = partial(_command, commands)
    add_shard(add)
    add_verify(add)
    add_shards(add, _Parser)


def _add_synthesize(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "synthesize", "Draw synthetic identities, in VGGFace2's folder layout.", _synthesize)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make: OUT/n000001/0001_01.jpg")
    parser.add_argument("--identities", type=int, required=True, help="how many people")
    parser.add_argument("--images-per-identity", type=int, required=True, help="how many images of each")
    parser.add_argument("--size", type=int, default=160, help="side of the pictures in pixels, 32 to 1024")
    parser.add_argument("--seed", type=int, default=0, help="which population is drawn")
    _add_workers(parser)


def _synthesize(args: argparse.Namespace) -> int:
    from data_shards.synthetic import synthesize

    written = synthesize(
        args.out,
        identities=args.identities,
        images_per_identity=args.images_per_identity,
        size=args.size,
        seed=args.seed,
        workers=args.workers,
    )
    print(f"{written:,} images of {args.identities:,} identities in {args.out}")
    return 0


def _add_train(commands: argparse._SubParsersAction) -> None:
    text = "Train on one process (`facescale train --help` lists every setting)."
    _command(commands, "train", f"{text} {_DISTRIBUTED}", lambda _: 0)


def _add_embed(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "embed", "Write the embeddings of a split with a run's newest checkpoint.", _embed)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `facescale train`")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder to make: embeddings.npy, identities.npy, keys.txt"
    )
    parser.add_argument("--shards", type=Path, help="shards to embed; the run's own if not given")
    parser.add_argument("--split", default="unseen_identities", help="train, unseen_identities or unseen_images")
    _add_device(parser)


def _embed(args: argparse.Namespace) -> int:
    from trainer.evaluation.run import write_embeddings

    count, size = write_embeddings(
        args.run, args.out, shards=args.shards, split=args.split, device=_device(args.device)
    )
    print(f"{count:,} embeddings of {size} dimensions in {args.out}")
    return 0


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    text = "Judge a run's newest checkpoint on held-out identities and images, raw pixels beside it."
    parser = _command(commands, "evaluate", text, _evaluate)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `facescale train`")
    parser.add_argument("--shards", type=Path, help="shards to evaluate on; the run's own if not given")
    parser.add_argument("--gallery-images", type=int, default=1, help="Rank-k: first images of each identity enrolled")
    parser.add_argument(
        "--closed-gallery-images",
        type=int,
        default=20,
        help="closed set: training images of each identity enrolled for kNN",
    )
    parser.add_argument("--knn", type=int, nargs="+", default=[1, 5, 20], help="numbers of voting neighbours")
    parser.add_argument("--seed", type=int, default=0, help="draws the verification pairs")
    _add_device(parser)


def _evaluate(args: argparse.Namespace) -> int:
    from trainer.evaluation.protocols import ProtocolConfig
    from trainer.evaluation.run import evaluate
    from trainer.evaluation.tables import main_table, rank1_line

    protocol = ProtocolConfig(
        gallery_images_per_identity=args.gallery_images,
        closed_gallery_images=args.closed_gallery_images,
        knn=tuple(sorted(set(args.knn))),
        seed=args.seed,
    )
    rows = evaluate(args.run, shards=args.shards, protocol=protocol, device=_device(args.device))
    print(f"{main_table(rows)}\n\n{rank1_line(rows)}")
    return 0


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    _command(
        commands, "doctor", "Say what of the stack works on this machine, and what to do where it does not.", _doctor
    )


def _doctor(args: argparse.Namespace) -> int:
    from trainer.doctor import examine

    checks = examine()
    for check in checks:
        print(f"{'ok' if check.ok else 'PROBLEM':8}{check.name:14}{check.found}")
        if not check.ok:
            print(f"{'':22}{check.advice}")
    return 0 if all(check.ok for check in checks) else 1


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="processes; one a core if not given")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: the GPU where there is one")


def _device(name: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda:0" if available else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device is {name!r}; allowed are auto, cpu, cuda and cuda:N")
    if name.startswith("cuda") and not available:
        raise ValueError(f"--device is {name}, but PyTorch sees no GPU here; use cpu")
    return name


if __name__ == "__main__":
    sys.exit(main())
