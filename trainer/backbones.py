"""Trunks by name: torchvision's ResNets, any model of timm, InsightFace's IResNets."""

import copy
import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from trainer.config import TIMM
from trainer.iresnet import DEPTHS, WIDTHS, IResNet

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what torchvision's weights expect
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A network up to what the head takes."""

    network: nn.Module
    """Normalised pixels (b, 3, H, W) to features, shape (b, width), or to maps, shape (b, width, side, side)."""
    width: int
    side: int = 0
    """Of the maps; 0 for features."""
    mean: tuple[float, float, float]
    """Of each channel, of values in [0, 1]: what the network's published weights expect."""
    std: tuple[float, float, float]
    classifier: tuple[str, ...]
    """Starts of names in published weights of layers that are behind the trunk."""

    def own(self, published: Mapping[str, Tensor]) -> State:
        """Of published weights those of the trunk; of timm's, where they do not fit as they are, as timm itself adapts them: to
        newer names, and to another picture size."""
        mine = self.network.state_dict()
        kept = {name: value for name, value in published.items() if name in mine or not self._behind(name)}
        adapt = getattr(importlib.import_module(type(self.network).__module__), "checkpoint_filter_fn", None)
        if adapt is None or difference(mine, kept) is None:
            return kept
        try:
            adapted = adapt(dict(published), self.network)
        except Exception:  # of a file of something else, almost anything; `difference` then says what is wrong
            return kept
        return {name: value for name, value in adapted.items() if name in mine or not self._behind(name)}

    def _behind(self, name: str) -> bool:
        return name.startswith(tuple(f"{layer}." for layer in self.classifier))


def make_trunk(name: str, image_size: int, maps: bool) -> Trunk:
    """A trunk with random weights.

    Args:
        name: see `ModelConfig.trunk`.
        image_size: pixels; width and height of its input.
        maps: whether the head takes maps, or features pooled from them.
    Raises:
        ValueError: timm has no such model, or it does not take pictures of this size, or it has no maps.
    """
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), image_size, maps)
    if name in DEPTHS:
        side = -(-image_size // 2 ** len(WIDTHS)) if maps else 0
        behind, network = ("bn2", "fc", "features"), IResNet(DEPTHS[name], pooled=not maps)
        return Trunk(network=network, width=WIDTHS[-1], side=side, mean=_HALF[0], std=_HALF[1], classifier=behind)
    network = getattr(torchvision.models, name)(weights=None)
    width, side = network.fc.in_features, -(-image_size // 32) if maps else 0
    network.fc = nn.Identity()
    if maps:
        network.avgpool, network.fc = nn.Identity(), nn.Unflatten(1, (width, side, side))
    return Trunk(network=network, width=width, side=side, mean=_IMAGENET[0], std=_IMAGENET[1], classifier=("fc",))


def _timm(name: str, image_size: int, maps: bool) -> Trunk:
    import timm  # takes seconds

    if not timm.is_model(name):
        arch = name.split(".")[0]
        near = difflib.get_close_matches(arch, timm.list_models(), n=5) or timm.list_models(f"*{arch}*")[:5]
        raise ValueError(
            f"model.trunk is {TIMM + name!r}; timm {timm.__version__} has no such model"
            + (f", but {', '.join(near)}" if near else "; timm.list_models() has their names")
        )
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0} | ({"global_pool": ""} if maps else {})
    usual = ""
    try:
        stated = timm.get_pretrained_cfg(name)
        if stated is not None and stated.fixed_input_size and image_size != stated.input_size[-1]:
            options["img_size"], usual = image_size, f", whose own size is {stated.input_size[-1]},"
        with torch.device("meta"):  # draws no random numbers and takes no memory
            shape = _output_shape(timm.create_model(name, **options), image_size)
        network = timm.create_model(name, **options)
    except Exception as error:  # whatever its layers say to a size that they do not take
        found = " ".join(str(error).split())[:200] or type(error).__name__
        if "Invalid pretrained tag" in found:
            raise ValueError(f"model.trunk is {TIMM + name!r}; timm says: {found}") from None
        raise ValueError(
            f"data.image_size is {image_size}; model.trunk {TIMM}{name}{usual} cannot take it: {found}"
        ) from None
    square = len(shape) == 4 and shape[2] == shape[3] and getattr(network, "output_fmt", "NCHW") == "NCHW"
    if maps and not square:
        raise ValueError(f"model.trunk {TIMM}{name} has no square maps for model.head arcface; take linear or facenet")
    if not maps and len(shape) != 2:
        raise ValueError(
            f"model.trunk {TIMM}{name} gives no features of a picture, but {' x '.join(map(str, shape[1:]))}"
        )
    about: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    behind = about.get("classifier") or ()
    return Trunk(
        network=network,
        width=shape[1],
        side=shape[2] if maps else 0,
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        classifier=(behind,) if isinstance(behind, str) else tuple(behind),
    )


def _output_shape(network: nn.Module, image_size: int) -> tuple[int, ...]:
    """Of a network on the meta device, for one picture; ValueError where it gives something else than a tensor."""
    with torch.no_grad():
        found = network.eval()(torch.empty((1, 3, image_size, image_size), device="meta"))
    if not isinstance(found, Tensor):
        raise ValueError(f"it gives a {type(found).__name__}, not one tensor")
    return tuple(found.shape)


def with_sync_batchnorm(module: nn.Module, trunk: str) -> nn.Module:
    """Batch norms that take their statistics over all ranks; timm's, some of which hold their activation, by timm.

    Not yet run, for want of a GPU.
    """
    if trunk.startswith(TIMM):
        from timm.layers import convert_sync_batchnorm

        found: nn.Module = convert_sync_batchnorm(module)
        return found
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def shadow(module: nn.Module, device: str = "meta") -> nn.Module:
    """A copy whose tensors have the same shapes but no content: no memory either on the meta device or among fake tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def difference(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first tensor that `found` lacks, has too many or has in another shape, in words; None where all fit.

    Counts of batches, which older files do not have, may be missing: training does not use them.
    """
    missing = [name for name in own if name not in found and not name.endswith(".num_batches_tracked")]
    foreign = [name for name in found if name not in own]
    shapes = [name for name in own if name in found and own[name].shape != found[name].shape]
    if missing:
        return f"lacks {missing[0]} ({len(missing)} such)"
    if foreign:
        return f"has {foreign[0]}, which the network has not ({len(foreign)} such)"
    if shapes:
        name = shapes[0]
        return (
            f"has {name} of shape {tuple(found[name].shape)}, the network {tuple(own[name].shape)} ({len(shapes)} such)"
        )
    return None
