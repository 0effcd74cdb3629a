"""`facescale profile`: where each step's time goes, on the command line, on one process or all that a launcher starts."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ADD = Callable[..., argparse.ArgumentParser]
TEXT = "Say where each training step's time goes; takes every option of `facescale train`, too."
MANY = "On many processes: accelerate launch --num_processes N -m trainer.cli profile with the same options."


def add_profile(add: ADD) -> None:
    """Lists it among the commands; `main` reads its options."""
    add("profile", f"{TEXT} {MANY}", None)


def main(args: Sequence[str]) -> int:
    """Exit codes are those of `trainer.train.main`."""
    from trainer.profile import Profile
    from trainer.train import main as with_training

    parser = argparse.ArgumentParser(
        prog="facescale profile",
        description=f"{TEXT} {MANY} Nothing of the run is kept but OUT; run.folder, run.steps and evaluation are not read.",
        usage="facescale profile [--steps N] [--warmup N] [--out OUT] [--config FILE] [--section.key VALUE ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--steps", type=int, default=30, help="steps that count, at least 2")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, at least 1")
    text = "folder for profile.json, profile.png and trace.json; files of these names are replaced"
    parser.add_argument("--out", type=Path, default=Path("profile"), help=text)
    try:
        own, rest = parser.parse_known_args(list(args))
        work = Profile(own.steps, own.warmup, own.out)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except (argparse.ArgumentError, ValueError) as error:
        print(f"facescale profile: {error} (see facescale profile --help)", file=sys.stderr)
        return 2
    return with_training(rest, "facescale profile", work)
