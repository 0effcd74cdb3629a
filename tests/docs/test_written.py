"""Every command line, setting and path that the pages and recipes name exists."""

import argparse
import dataclasses
import re
import sys
import typing
from itertools import pairwise

import pytest

from tests.docs.pending import PENDING_COMMANDS, PENDING_PATHS, PENDING_SETTINGS
from tests.docs.written import ROOT, Command, commands, paths, settings
from trainer.cli import _parser
from trainer.config import TrainConfig, UsageError, parse

OWN_OF_PROFILE = ("--steps", "--warmup", "--out")
"""Options of `facescale profile` that are no settings."""


def leaf(words: list[str]) -> tuple[str, argparse.ArgumentParser | None, list[str]]:
    """Name and parser of the command that words begin with, and the words that remain; no parser: there is no such command."""
    name, parser, rest = "facescale", _parser(), list(words)
    while (below := _below(parser)) is not None and rest:
        word = rest.pop(0)
        name, parser = f"{name} {word}", below.get(word)
        if parser is None:
            break
    return name, parser, rest


def _below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return actions[0].choices if actions else None


def wrong(command: Command) -> str | None:
    """What is wrong with a command line, or None. One written in passing has its name and options checked alone."""
    several = next((word for word in command.words if "|" in word), None)
    if several is not None:
        line = command.line.replace("\\|", "|")
        lines = [line.replace(several, one) for one in several.split("|")]
        return next((said for line in lines if (said := wrong(command._replace(line=line)))), None)
    name, parser, rest = leaf(command.words)
    if pending_of(name, rest):
        return None
    if parser is None:
        return f"there is no command {name!r}"
    if name in ("facescale train", "facescale profile", "facescale config"):
        return _wrong_training(name, rest) if command.whole else None
    known = {option for action in parser._actions for option in action.option_strings}
    for word in rest:
        option = word.strip("[]").split("=")[0]
        if option.startswith("--") and option not in known:
            return f"{name} has no {option}"
    return _refused(parser, rest) if command.whole else None


def pending_of(name: str, rest: list[str]) -> set[str]:
    """Names in `PENDING_COMMANDS` that a command line needs."""
    return {
        pending for pending in PENDING_COMMANDS if pending == name or pending in {f"{name} {word}" for word in rest}
    }


def _refused(parser: argparse.ArgumentParser, rest: list[str]) -> str | None:
    words = [word for word in (word.strip("[]") for word in rest) if word != "..."]
    counts = {option for action in parser._actions if action.type in (int, float) for option in action.option_strings}
    words = [
        "1" if word.isupper() and before in counts else word for before, word in zip(["", *words], words, strict=False)
    ]
    try:
        parser.parse_args(words)
    except SystemExit as stop:
        return f"refused with exit code {stop.code}"
    return None


def _wrong_training(name: str, rest: list[str]) -> str | None:
    words = [word for word in rest if word not in ("...", "…")]
    if name == "facescale profile":
        for option in OWN_OF_PROFILE:
            if option in words:
                at = words.index(option)
                del words[at : at + 2]
    if name == "facescale config":
        words = [word for word in words if word not in ("--diff", "--schema")]
    if any(f"--{pending.replace('_', '-')}" in words for pending in PENDING_SETTINGS) or _pending_recipe(words):
        return None
    try:
        parse(words)
    except UsageError as error:
        return str(error)
    return None


def _pending_recipe(words: list[str]) -> bool:
    """Whether a recipe has settings that are not there yet."""
    named = [word for before, word in pairwise(words) if before == "--config"]
    sections = {pending.split(".")[0] for pending in PENDING_SETTINGS}
    texts = [(ROOT / path).read_text() for path in named if (ROOT / path).is_file()]
    return any(re.search(rf"^{section}:", text, re.MULTILINE) for text in texts for section in sections)


def setting_exists(name: str) -> bool:
    kind: object = TrainConfig
    for part in name.split("."):
        if not dataclasses.is_dataclass(kind) or part not in (hints := typing.get_type_hints(kind)):
            return False
        kind = hints[part]
    return True


def pending_setting(name: str) -> bool:
    return any(name == pending or name.startswith(f"{pending}.") for pending in PENDING_SETTINGS)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Where the command lines are to be typed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["facescale"])


def test_every_command_line_is_taken(capsys):
    found = {(command.place, command.line): said for command in commands() if (said := wrong(command))}
    assert found == {}, capsys.readouterr().err


def test_every_recipe_goes_from_pictures_to_a_report():
    for recipe in ROOT.glob("launch/recipes/*.yaml"):
        own = [command for command in commands() if command.place == f"launch/recipes/{recipe.name}"]
        names = [leaf(command.words)[0].removeprefix("facescale ") for command in own]
        wanted = ("shard", "train", "evaluate", "report")
        assert [name for name in names if name in wanted] == list(wanted), recipe.name


def test_every_setting_exists():
    assert {
        (place, name) for place, name in settings() if not setting_exists(name) and not pending_setting(name)
    } == set()


def test_every_path_exists():
    missing = {
        (place, name) for place, name in paths() if not list(ROOT.glob(name.rstrip("/"))) and name not in PENDING_PATHS
    }
    assert missing == set()


def test_nothing_pending_has_come():
    come = {name for name in PENDING_SETTINGS if setting_exists(name)}
    come |= {name for name in PENDING_PATHS if (ROOT / name).exists()}
    for pending in PENDING_COMMANDS:
        words = pending.split()[1:]
        _, parser, rest = leaf(words)
        if parser is not None and all(
            any(word in action.option_strings for action in parser._actions) for word in rest
        ):
            come.add(pending)
    assert come == set(), "now there: take it out of tests/docs/pending.py"


def test_what_is_pending_is_named_somewhere():
    written = commands()
    for pending in PENDING_COMMANDS:
        assert any(pending in pending_of(*leaf(command.words)[::2]) for command in written), pending


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("facescale shard PICTURES shards --holdout-people 3", "no --holdout-people"),
        ("facescale evaluate", "exit code 2"),
        ("facescale dance now", "no command 'facescale dance'"),
        ("facescale shards dance", "no command 'facescale shards dance'"),
        ("facescale shards stats|dance", "no command 'facescale shards dance'"),
        ("facescale train --run.step 3", "run.step"),
        ("accelerate launch -m trainer.train --config launch/recipes/none.yaml", "none.yaml"),
        ("accelerate launch --num_processes 2 -m trainer.cli evaluate RUN --knn five", "exit code 2"),
    ],
)
def test_a_wrong_line_is_found(line, said):
    assert said in (wrong(Command("here", line, "|" not in line)) or "")
