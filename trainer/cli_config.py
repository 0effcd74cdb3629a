"""`facescale config`: the settings that a training command would have, and their schema."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

ADD = Callable[..., argparse.ArgumentParser]
TEXT = "Print the settings that `facescale train` with the same options would have, as YAML."


def add_config(add: ADD) -> None:
    """Lists it among the commands; `main` reads its options."""
    add("config", TEXT, None)


def main(args: Sequence[str]) -> int:
    """Exit code 0, or 2: a setting is not allowed."""
    from trainer.config import UsageError, changed, dumped, parse
    from trainer.schema import schema

    parser = argparse.ArgumentParser(
        prog="facescale config",
        description=f"{TEXT} `facescale train --help` tells each setting's meaning, unit and default.",
        usage="facescale config [--diff | --schema] [--config FILE] [--section.key VALUE ...]",
        allow_abbrev=False,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--diff", action="store_true", help="only what is not the default")
    choice.add_argument("--schema", action="store_true", help="a JSON schema of settings files instead, for editors")
    try:
        own, rest = parser.parse_known_args(list(args))
        if own.schema and rest:
            parser.error(f"--schema takes no settings, found {rest[0]}")
        if own.schema:
            print(json.dumps(schema(), indent=1))
            return 0
        config = parse(rest, "facescale config")
    except SystemExit as stop:  # --help, and what argparse refuses
        return int(stop.code or 0)
    except UsageError as error:
        print(f"facescale: {error}", file=sys.stderr)
        return 2
    print(dumped(changed(config)) if own.diff else dumped(config), end="")
    return 0
