"""What settings there are: sections, their docstrings, and a JSON schema by which editors complete and check YAML files."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from trainer.config import TRUNKS, TrainConfig

SCHEMA = "launch/recipes/schema.json"
"""Where the repository keeps it, for its own recipes."""
_NUMBER_IN_WORDS = (
    r"^[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?$"  # YAML 1.1 reads 1e-3 as text, and `trainer.config` as a number
)


def sections(kind: type, name: str = "") -> Iterator[tuple[str, type]]:
    """Dotted names and classes of all sections below a class of settings, each before those in it."""
    for field in dataclasses.fields(kind):
        if is_section(kind, field.name):
            below, place = typing.get_type_hints(kind)[field.name], f"{name}.{field.name}".strip(".")
            yield place, below
            yield from sections(below, place)


def is_section(kind: type, name: str) -> bool:
    """Whether a field holds settings of its own."""
    return dataclasses.is_dataclass(typing.get_type_hints(kind)[name])


def docstrings(kind: type) -> dict[str, str]:
    """The strings that stand below the fields of a class and those it derives from, each on one line."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for above, below in pairwise(tree.body):
            if not (isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[above.target.id] = " ".join(str(below.value.value).split())
    return found


def default_of(field: dataclasses.Field) -> Any:
    """A setting's default."""
    return field.default_factory() if callable(field.default_factory) else field.default


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a settings file: names, types, choices, defaults, docstrings; no ranges, which
    `trainer.config.load` checks."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of facescale train",
        **_section(TrainConfig),
    }


def _section(kind: type) -> dict[str, Any]:
    hints, told = typing.get_type_hints(kind), docstrings(kind)
    properties = {}
    for field in dataclasses.fields(kind):
        if is_section(kind, field.name):
            properties[field.name] = _section(hints[field.name])
        else:
            properties[field.name] = {"description": told[field.name], **_type(hints[field.name], field)}
    if "trunk" in properties:
        properties["trunk"]["examples"] = [*TRUNKS, "timm:convnext_tiny"]
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _type(hint: Any, field: dataclasses.Field) -> dict[str, Any]:
    default = default_of(field)
    if isinstance(default, tuple):
        default = list(default)
    return {**_allowed(hint), "default": str(default) if isinstance(default, Path) else default}


def _allowed(hint: Any) -> dict[str, Any]:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        of = [_allowed(member) for member in members if member is not type(None)]
        return {"anyOf": [*of, {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(members)}
    if origin is tuple and members[1:] == (...,):
        return {"type": "array", "items": _allowed(members[0]), "uniqueItems": True}
    if origin is tuple:
        return {"type": "array", "items": _allowed(members[0]), "minItems": len(members), "maxItems": len(members)}
    if hint is float:
        return {"type": ["number", "string"], "pattern": _NUMBER_IN_WORDS}
    return {"type": {int: "integer", bool: "boolean", str: "string", Path: "string"}[hint]}
