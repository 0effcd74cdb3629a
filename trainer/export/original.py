"""`checkpoint.pth` of the original project, written and read: epoch, model_state_dict, optimizer_state_dict, loss.

Its network is a ResNet of torchvision whose `fc` gives the embedding, before its L2 norm. It takes pixels that were normalised by
ImageNet's mean and standard deviation before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.backbones import difference
from trainer.config import ModelConfig
from trainer.export.network import Exported, check, new_folder
from trainer.model import Embedder

FILE = "checkpoint.pth"
IMAGE_SIZE = 224
"""Pixels for which torchvision's networks were made: taken where nothing else is said."""
TRUNKS = ("resnet18", "resnet34", "resnet50", "resnet101")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "resnet.")
"""Starts of names that wrappers leave, taken off as often as every name has one."""
_STATES = ("model_state_dict", "state_dict")
_BLOCKS = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50", (True, 23): "resnet101"}

State = dict[str, Tensor]


@dataclass(kw_only=True, frozen=True)
class Progress:
    """How far training was."""

    epoch: int = 0
    """Whole passes of the data."""
    loss: float | None = None
    """That of the last line of the log."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3


def check_model(config: ModelConfig) -> None:
    """Raises ValueError unless the original project's network can be this one."""
    if config.trunk not in TRUNKS:
        raise ValueError(
            f"export: model.trunk is {config.trunk}; the original project's checkpoint holds {', '.join(TRUNKS)}: "
            "choose another --format"
        )
    if config.head_kind == "arcface":
        raise ValueError(
            "export: model.head is arcface; the original project's checkpoint holds heads linear and facenet: "
            "choose another --format"
        )


def write(model: Embedder, progress: Progress, out: Path) -> float:
    """Writes OUT/checkpoint.pth. A batch norm behind the linear layer is folded into it, so the optimiser's state is a new one.

    Returns:
        the largest difference from the network, of an embedding's component.
    Raises:
        ValueError: `out` exists and is not empty, see `check_model`, or the file does not give what the network gives.
    """
    check_model(model.config)
    network = _network(model.config.trunk, model.config.embedding_size)
    network.load_state_dict(folded(model))
    kind = torch.optim.AdamW if progress.optimizer == "adamw" else torch.optim.SGD
    payload = {
        "epoch": progress.epoch,
        "model_state_dict": network.state_dict(),
        "optimizer_state_dict": kind(network.parameters(), lr=progress.learning_rate).state_dict(),
        "loss": progress.loss,
    }
    first = Exported(model)
    with new_folder(out) as folder:
        torch.save(payload, folder / FILE)
        network.load_state_dict(torch.load(folder / FILE, weights_only=True)["model_state_dict"])
        return check(FILE, lambda images: normalize(network(images * first.scale + first.shift)), model)


def folded(model: Embedder) -> State:
    """The weights under torchvision's names, with the batch norm behind the linear layer folded into `fc`.

    norm(W x + b) = s W x + s (b - mean) + shift, with s = scale / sqrt(variance + epsilon).
    """
    head, norm = model.head, model.head_norm
    assert isinstance(head, nn.Linear), "check_model refuses other heads"
    weight = head.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if head.bias is None else head.bias.detach().double()
    if isinstance(norm, nn.BatchNorm1d):
        assert norm.running_mean is not None, "a batch norm of a head has statistics"
        assert norm.running_var is not None, "a batch norm of a head has statistics"
        factor = 1 / (norm.running_var.double() + norm.eps).sqrt()
        shift = torch.zeros_like(factor)
        if norm.affine:
            factor, shift = factor * norm.weight.detach().double(), norm.bias.detach().double()
        weight, bias = weight * factor[:, None], (bias - norm.running_mean.double()) * factor + shift
    trunk = {name: value.detach().contiguous() for name, value in model.trunk.state_dict().items()}
    return trunk | {"fc.weight": weight.float(), "fc.bias": bias.float()}


def read(path: Path, image_size: int = IMAGE_SIZE) -> Embedder:
    """The network of an original project's checkpoint, or of a bare state dict of it.

    Which ResNet it is, and d, are read off the weights.

    Raises:
        ValueError: the file is missing or holds objects, or a tensor does not fit, which is named.
    """
    state = stripped(_state(path))
    trunk = _trunk(state, path)
    fc = state.get("fc.weight")
    if fc is None or fc.ndim != 2:
        found = "lacks fc.weight" if fc is None else f"has fc.weight of shape {tuple(fc.shape)}"
        raise ValueError(f"{path} {found}; a linear layer from the trunk to the embedding is needed")
    size = len(fc)
    try:
        config = ModelConfig(trunk=trunk, embedding_size=size, head_batchnorm=False)
    except ValueError as error:
        raise ValueError(f"{path} has fc.weight of shape {tuple(fc.shape)}: {error}") from None
    network = _network(trunk, size)
    if said := difference(network.state_dict(), state):
        raise ValueError(f"{path} is not a {trunk} of torchvision with an embedding of {size}: it {said}")
    model = Embedder(config, image_size=image_size)
    parts: dict[bool, State] = {False: {}, True: {}}
    for name, value in state.items():
        parts[name.startswith("fc.")][name.removeprefix("fc.")] = value
    model.trunk.load_state_dict(parts[False], strict=False)  # older files lack counts of batches
    model.head.load_state_dict(parts[True])
    return model.eval()


def stripped(state: Mapping[str, Tensor]) -> State:
    """Names without what wrappers put before all of them: `module.`, `model.`, `backbone.`, `resnet.` …, in any order."""
    found = dict(state)
    while prefix := next((p for p in PREFIXES if found and all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _state(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a checkpoint.pth is needed")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path} cannot be read: it holds objects, which could run code, not tensors alone") from None
    except Exception as error:  # a file of something else makes torch's unpickler raise almost anything
        raise ValueError(f"{path} cannot be read: {f'{type(error).__name__} {error}'.splitlines()[0]}") from None
    if isinstance(found, dict):
        found = next((found[name] for name in _STATES if name in found), found)
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds no model_state_dict, and is no state dict either")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is of type {type(value).__name__}; a state dict of tensors is needed")
    return found


def _trunk(state: Mapping[str, Tensor], path: Path) -> str:
    blocks = {name.split(".")[1] for name in state if name.startswith("layer3.")}
    trunk = _BLOCKS.get(("layer1.0.conv3.weight" in state, len(blocks)))
    if trunk is None:
        found = f"it has {len(blocks)} blocks in layer3, and its first tensor is {next(iter(state))}"
        raise ValueError(f"{path} is none of {', '.join(TRUNKS)} of torchvision: {found}")
    return trunk


def _network(trunk: str, size: int) -> nn.Module:
    network: nn.Module = getattr(torchvision.models, trunk)(weights=None)
    classifier = network.get_submodule("fc")
    assert isinstance(classifier, nn.Linear), "torchvision's ResNets end in a linear layer"
    network.fc = nn.Linear(classifier.in_features, size)
    return network.eval()
