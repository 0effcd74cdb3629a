"""The `facescale` command. Every subcommand checks its arguments first; exit code 0, 1 (failed) or 2 (usage)."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from trainer.cli_align import add_align
from trainer.cli_config import add_config
from trainer.cli_evaluate import add_embed, add_evaluate
from trainer.cli_export import add_export, add_import
from trainer.cli_plan import add_plan
from trainer.cli_profile import add_profile
from trainer.cli_report import add_report
from trainer.cli_search import add_search
from trainer.cli_shards import add_shard, add_shards, add_verify
from trainer.extras import missing

_DESCRIPTION = "Train face-embedding networks from WebDataset shards: pictures -> shards -> network -> report."
_DISTRIBUTED = "More than one process: accelerate launch -m trainer.train, with the same options."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. A user's mistake is told in one line; FACESCALE_TRACEBACK=1 shows where it was found."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        said = missing(error)
        if said is None or os.environ.get("FACESCALE_TRACEBACK"):
            raise
        print(f"facescale: {said}", file=sys.stderr)
        return 1


def _main(args: list[str]) -> int:
    if args[:1] == ["train"]:
        from trainer.train import main as train

        return train(args[1:], prog="facescale train")
    if args[:1] == ["profile"]:
        from trainer.cli_profile import main as profile

        return profile(args[1:])
    try:
        run = _chosen(args)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return run()
    except (ValueError, OSError) as error:
        if os.environ.get("FACESCALE_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"facescale: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("facescale: interrupted", file=sys.stderr)
        return 1


def _chosen(args: list[str]) -> Callable[[], int]:
    """The subcommand with its arguments."""
    if args[:1] == ["config"]:
        from trainer.cli_config import main as config

        return partial(config, args[1:])
    parsed = _parser().parse_args(args)
    return partial(parsed.command, parsed)


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
        _add_evaluation,
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
    add_align(add)
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
    add_config(partial(_command, commands))
    add_profile(partial(_command, commands))


def _add_evaluation(commands: argparse._SubParsersAction) -> None:
    for add in (add_embed, add_search, add_evaluate, add_report, add_export, add_import, add_plan):
        add(partial(_command, commands))


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    text = "Say what of the stack works on this machine, and what to do where it does not."
    parser = _command(commands, "doctor", text, _doctor)
    parser.add_argument("--folder", type=Path, default=Path(), help="whose disk is measured: where shards or runs lie")
    parser.add_argument("--json", action="store_true", help="print JSON, to be kept or sent with a question")


def _doctor(args: argparse.Namespace) -> int:
    from trainer.doctor import examine

    checks = examine(args.folder)
    if args.json:
        from trainer.machine import machine

        print(json.dumps({**machine(), "checks": [check._asdict() for check in checks]}, indent=1))
    for check in [] if args.json else checks:
        print(f"{'ok' if check.ok else 'PROBLEM':8}{check.name:14}{check.found}")
        if not check.ok:
            print(f"{'':22}{check.advice}")
    return 0 if all(check.ok for check in checks) else 1


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="processes; one a core if not given")


if __name__ == "__main__":
    sys.exit(main())
