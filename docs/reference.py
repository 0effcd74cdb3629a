"""Markdown of the reference: options out of the parsers, settings out of the dataclasses, the Python API by name."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

API = (
    ("Use a trained network", ("trainer.load_embedder", "trainer.PhotoEmbedder")),
    (
        "The plan and the loader",
        ("data_shards.plan", "data_shards.windowed_plan", "data_shards.augment", "data_shards.loader"),
    ),
    ("Distances, mining, losses", ("trainer.metric.distances", "trainer.metric.mining", "trainer.metric.losses")),
    ("Margin softmax", ("trainer.metric.margin_softmax",)),
    (
        "Measures",
        (
            "trainer.metric.identification",
            "trainer.metric.retrieval",
            "trainer.metric.verification",
            "trainer.metric.templates",
        ),
    ),
)
"""What is public, in the order of the page."""


def commands() -> str:
    """Every command with its arguments, as the parsers have them."""
    from trainer.cli import _parser

    lines = ["# Commands", "", "Written from the program's own parsers. `facescale COMMAND --help` says the same."]
    lines += ["", "`facescale train` takes the [settings](settings.md) as `--section.key value`, and `--config FILE`."]
    for name, parser in leaves(_parser()):
        lines += ["", f"## {name}", "", _text(parser.description or ""), "", f"    {_usage(name, parser)}", ""]
        lines += _table(parser)
    return "\n".join(lines) + "\n"


def leaves(parser: argparse.ArgumentParser, name: str = "facescale") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Commands without further commands, with their names."""
    further = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not further:
        yield name, parser
    for action in further:
        for word, below in action.choices.items():
            yield from leaves(below, f"{name} {word}")


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    shown = [_name(action) for action in _shown(parser) if not action.option_strings]
    return " ".join([name, *shown, "[options]"])


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def _name(action: argparse.Action) -> str:
    return ", ".join(action.option_strings) or str(action.metavar or action.dest)


def _table(parser: argparse.ArgumentParser) -> list[str]:
    rows = [_row(action) for action in _shown(parser)]
    return ["| argument | is | default |", "|---|---|---|", *rows] if rows else []


def _row(action: argparse.Action) -> str:
    told = _text(action.help or "").rstrip(".")
    if action.choices:
        told += f". One of {', '.join(f'`{choice}`' for choice in action.choices)}"
    empty = action.default in (None, argparse.SUPPRESS, "", [], ()) or action.default is False
    default = "" if empty else f"`{_plain(action.default)}`"
    return f"| `{_name(action)}` | {told}. | {'required' if action.required and action.option_strings else default} |"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _text(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")


def settings() -> str:
    """Every setting with its kind, default and docstring."""
    from trainer.config import TrainConfig
    from trainer.schema import is_section, sections

    lines = [
        "# Settings",
        "",
        "In a YAML file for `--config` under their section, or as `--section.key value` (`--data.image-size 64`).",
    ]
    for name, kind in sections(TrainConfig):
        lines += ["", f"## {name}", "", "| setting | is | kind | default |", "|---|---|---|---|"]
        lines += [_setting(field, kind) for field in dataclasses.fields(kind) if not is_section(kind, field.name)]
    return "\n".join(lines) + "\n"


def _setting(field: dataclasses.Field, kind: type) -> str:
    from trainer.schema import default_of, docstrings

    told, default = _text(docstrings(kind)[field.name]), _plain(default_of(field))
    shown = f"`{default}`" if default else ""
    return f"| `{field.name}` | {told} | {_kind(typing.get_type_hints(kind)[field.name])} | {shown} |"


def _kind(hint: Any) -> str:
    members = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{member}`" for member in members)
    if members[1:] == (...,):
        return f"any of {_kind(members[0])}"
    if typing.get_origin(hint) is tuple:
        return f"{len(members)} x {members[0].__name__}"
    return " or ".join("None" if member is type(None) else _kind(member) for member in members) or hint.__name__


def python() -> str:
    """Names for mkdocstrings to look up; what is not there is left out."""
    lines = [
        "# Python",
        "",
        "Shapes: b rows of this rank, N of all ranks, d dimensions. See each function for units and errors.",
    ]
    for heading, names in API:
        there = [found for name in names if (found := defined(name))]
        lines += ["", f"## {heading}", ""] * bool(there)
        lines += [line for name in there for line in (f"::: {name}", "    options:", "      heading_level: 3", "")]
    return "\n".join(lines) + "\n"


def defined(name: str) -> str | None:
    """Dotted name of a module, or of a function or class wherever below its package it is defined; nothing is imported."""
    package, _, last = name.rpartition(".")
    folder = ROOT / Path(*package.split("."))
    if (folder / f"{last}.py").is_file():
        return name
    for path in sorted(folder.rglob("*.py")):
        if re.search(rf"^(def|class) {last}\b", path.read_text(), re.MULTILINE):
            return ".".join([*path.relative_to(ROOT).with_suffix("").parts, last]).replace(".__init__", "")
    return None
