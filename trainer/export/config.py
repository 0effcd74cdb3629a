"""What an exported network says about itself."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.model import Embedder

_VERSION = 1
_MODEL = ("trunk", "head", "dropout", "embedding_size", "head_batchnorm")
_INPUT = "RGB, (b, 3, image_size, image_size), values in [0, 255]; normalised inside the network"
_OUTPUT = "unit-norm embeddings, (b, embedding_size)"

Colour = tuple[float, float, float]


@dataclass(kw_only=True, frozen=True)
class ExportedConfig:
    """All that is needed to build the network, and how to compare its embeddings."""

    model: ModelConfig
    image_size: int
    """Pixels, width and height."""
    mean: Colour
    """Of R, G and B, of values in [0, 1]: taken off inside the network."""
    std: Colour
    """What they are divided by."""
    distance: Literal["root", "squared"] = "root"
    """Which distance of embeddings the network was trained with."""
    step: int | None = None
    """Optimiser updates of training; None where not known."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Root L2 distances in [0, 2] up to which two pictures count as of one identity, as measured on the run's held-out
    identities: `verification`, best for accuracy, and `far_0.001` and the like, at that false-accept rate."""

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size!r}; it must be a whole number of pixels from 1")
        if self.distance not in ("root", "squared"):
            raise ValueError(f"distance is {self.distance!r}; allowed are root and squared")
        if not (len(self.mean) == len(self.std) == 3 and all(value > 0 for value in self.std)):
            raise ValueError(f"mean and std are {self.mean} and {self.std}; three numbers each are needed, std above 0")

    @classmethod
    def of(cls, model: Embedder, **more: Any) -> "ExportedConfig":
        """That of a network; `more`: distance, step, thresholds."""
        settings = dataclasses.replace(model.config, weights=None, sync_batchnorm=False)
        return cls(
            model=settings, image_size=model.image_size, mean=_colour(model.mean), std=_colour(model.std), **more
        )

    def json(self) -> str:
        """As JSON that `from_json` reads back equal."""
        found = dataclasses.asdict(self)
        found["model"] = {name: found["model"][name] for name in _MODEL}
        head = {"library": "facescale", "version": _VERSION, "input": _INPUT, "output": _OUTPUT}
        return json.dumps(head | found | {"thresholds": dict(self.thresholds)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ExportedConfig":
        """Raises ValueError: it is no such JSON, of a later version, or has a value that is not allowed."""
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from None
        if not isinstance(found, dict) or found.get("library") != "facescale":
            raise ValueError("it is not of a network of facescale: it has no library: facescale")
        if found.get("version") != _VERSION:
            raise ValueError(f"version is {found.get('version')!r}; this facescale reads {_VERSION}")
        try:
            settings = ModelConfig(**{name: found["model"][name] for name in _MODEL})
            mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
            rest = {name: found[name] for name in ("image_size", "distance", "step", "thresholds")}
        except KeyError as error:
            raise ValueError(f"it lacks {error.args[0]}") from None
        except TypeError as error:
            raise ValueError(f"it has a value of a wrong type: {error}") from None
        return cls(model=settings, mean=mean, std=std, **rest)  # type: ignore[arg-type]

    def network(self) -> Embedder:
        """The network with random weights, computing in float32.

        Raises:
            ValueError: see `Embedder`.
        """
        model = Embedder(self.model, image_size=self.image_size)
        model.mean.copy_(torch.tensor(self.mean).view(3, 1, 1))
        model.std.copy_(torch.tensor(self.std).view(3, 1, 1))
        return model.eval()


def _colour(values: Tensor) -> Colour:
    red, green, blue = (round(float(value), 6) for value in values.flatten())
    return red, green, blue
