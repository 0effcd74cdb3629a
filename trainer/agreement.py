"""Before the first step: do all ranks have the same settings, plan, shards and packages?"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from trainer.collectives import gather_objects
from trainer.config import TrainConfig

PACKAGES = ("facescale", "torch", "torchvision", "timm", "nvidia-dali-cuda130", "accelerate", "deepspeed", "numpy")
_OF_THE_MACHINE = ("data.shards", "data.stream", "data.decode_threads", "run.folder", "run.device", "model.weights")
"""Settings that may differ from machine to machine."""
_NAMED = 8


def comparable(config: TrainConfig) -> dict[str, Any]:
    """What all ranks must agree on: settings by their dotted name, and the versions of packages."""
    sections = dataclasses.asdict(config)
    settings = {f"{section}.{name}": value for section, found in sections.items() for name, value in found.items()}
    packages = {f"version of {name}": _version(name) for name in PACKAGES}
    return {name: value for name, value in settings.items() if name not in _OF_THE_MACHINE} | packages


def check_ranks_agree(mine: Mapping[str, Any]) -> None:
    """Every rank calls it with its values by name.

    Raises:
        ValueError: they differ; on every rank, naming what, and the ranks that differ from most.
    """
    everyone = gather_objects({name: str(value) for name, value in mine.items()})
    for name in everyone[0]:
        values = [found.get(name, "nothing") for found in everyone]
        usual = Counter(values).most_common(1)[0][0]
        others = [number for number, value in enumerate(values) if value != usual]
        if others:
            ranks = ", ".join(map(str, others[:_NAMED])) + (
                f" and {len(others) - _NAMED} more" * (len(others) > _NAMED)
            )
            raise ValueError(
                f"ranks differ in {name}: {values[others[0]]} on rank {ranks}, {usual} on the other {len(values) - len(others)}"
            )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
