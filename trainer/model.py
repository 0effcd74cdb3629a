"""Trunk -> head -> unit-norm embedding."""

import dataclasses
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize
from torch.utils.flop_counter import FlopCounterMode

from trainer.backbones import Trunk, difference, make_trunk, shadow
from trainer.config import ModelConfig
from trainer.iresnet import DEPTHS, ArcFaceHead

_OWN = ("trunk.", "head.", "head_norm.")


class Embedder(nn.Module):
    """Pictures to points on the unit sphere.

    The first operation recolours and normalises, on the device, so that batches travel as uint8. With `bf16` the layers run
    under autocast here, and not in a wrapper, so that DDP, DeepSpeed and evaluation compute alike; parameters and embeddings
    stay float32.

    Args:
        image_size: `data.image_size`, in pixels; shapes of a head arcface and of trunks with a fixed size depend on it.
        with_norms: in training mode the norm that each embedding had is its last column, without gradient: (b, d + 1).
    Raises:
        ValueError: timm has no such trunk; it does not go with the image size or the head; or the weights' file is missing, is no
            state dict, or belongs to another architecture.
    Source: FaceNet (Schroff et al. 2015), section 3: linear layer and L2 norm; head facenet: davidsandberg/facenet and
    timesler/facenet-pytorch; head arcface: Deng et al. 2019, "option E".
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: ModelConfig, bf16: bool = False, image_size: int = 112, with_norms: bool = False
    ) -> None:
        super().__init__()
        self.with_norms = with_norms
        self.config, self.bf16, self.image_size = config, bf16, image_size
        trunk = make_trunk(config.trunk, image_size, maps=config.head_kind == "arcface")
        self.trunk = trunk.network
        self.head, self.head_norm = _make_head(trunk, config)
        self._dropout = 0.0 if config.head_kind == "arcface" else config.effective_dropout
        if config.weights is not None:
            self._load(trunk, config.weights)
        self.register_buffer("mean", torch.tensor(trunk.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(trunk.std).view(3, 1, 1), persistent=False)

    def _load_own(self, state: dict[str, Tensor], path: Path) -> None:
        """Of a checkpoint or an export of ours the trunk, and the head where all of it is of the same shapes."""
        found: dict[str, dict[str, Tensor]] = {start: {} for start in _OWN}
        for name, value in state.items():
            start = next(start for start in _OWN if name.startswith(start))
            found[start][name.removeprefix(start)] = value
        if said := difference(self.trunk.state_dict(), found["trunk."]):
            raise ValueError(
                f"model.weights {path} is not of a network with trunk {self.config.trunk}: its trunk {said}"
            )
        self.trunk.load_state_dict(found["trunk."], strict=False)  # files of others lack counts of batches
        if difference(self.head.state_dict(), found["head."]) is None:
            self.head.load_state_dict(found["head."], strict=False)
            if difference(self.head_norm.state_dict(), found["head_norm."]) is None:
                self.head_norm.load_state_dict(found["head_norm."], strict=False)

    def _load(self, trunk: Trunk, path: Path) -> None:
        published = read_state(path, "model.weights")
        if all(name.startswith(_OWN) for name in published):
            self._load_own(published, path)
            return
        parts = [self.trunk]
        if self.config.trunk in DEPTHS and self.config.head_kind == "arcface":  # InsightFace's file has this head, too
            parts, trunk = [self.trunk, self.head], dataclasses.replace(trunk, classifier=())
        state, own = trunk.own(published), {name: value for part in parts for name, value in part.state_dict().items()}
        if said := difference(own, state):
            raise ValueError(f"model.weights {path} is not a state dict of {self.config.trunk}: it {said}")
        for part in parts:
            part.load_state_dict({name: state[name] for name in part.state_dict() if name in state})

    def forward(self, images: Tensor, colour: Tensor | None = None) -> Tensor:
        """Unit-norm embeddings, float32 or wider, shape (b, d).

        Args:
            images: uint8 in [0, 255], shape (b, 3, H, W).
            colour: see `data_shards.augment.colour_matrices`, shape (b, 3, 4); None leaves colours as they are.
        """
        with torch.autocast(images.device.type, enabled=False):
            pixels = normalised(images, self.mean, self.std, colour)  # (b, 3, H, W)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.trunk(pixels)  # (b, width), or maps
            if self._dropout:
                features = dropout(features, self._dropout, self.training)
            embeddings = self.head_norm(self.head(features))  # (b, d)
        embeddings = embeddings.to(self.mean.dtype)
        return unit_and_norm(embeddings) if self.with_norms and self.training else normalize(embeddings)


def unit_and_norm(vectors: Tensor) -> Tensor:
    """Vectors (b, d) scaled to 1, and behind them in column d the norms that they had, without gradient: (b, d + 1)."""
    return torch.cat([normalize(vectors), vectors.detach().norm(dim=1, keepdim=True)], 1)


def normalised(images: Tensor, mean: Tensor, std: Tensor, colour: Tensor | None = None) -> Tensor:
    """Recoloured, cut to [0, 255], scaled to [0, 1] and normalised, as one product and one cut.

    Args:
        images, colour: see `Embedder.forward`.
        mean, std: of each channel, of values in [0, 1], shape (3, 1, 1).
    Returns:
        In the type of `mean`, shape (b, 3, H, W), channels-last in memory.
    """
    on_cpu = images.device.type == "cpu" and images.dtype == torch.uint8
    if on_cpu and type(images) is Tensor and not torch.compiler.is_compiling():  # fake tensors have nothing for OpenCV
        return _normalised_on_cpu(images, mean, std, colour)
    scale, shift = 1 / (255 * std.view(3)), -(mean / std).view(3)
    if colour is None:
        matrix, offset = scale.diag().expand(len(images), 3, 3), shift.expand(len(images), 3)
    else:
        colour = colour.to(mean.dtype)
        matrix, offset = colour[:, :, :3] * scale[:, None], colour[:, :, 3] * scale + shift  # (b, 3, 3), (b, 3)
    flat = images.contiguous().flatten(2).to(mean.dtype)  # (b, 3, H*W)
    pixels = torch.baddbmm(offset[:, :, None], matrix, flat).view(images.shape)
    if colour is not None:
        pixels = pixels.clamp(-mean / std, (1 - mean) / std)
    return pixels.contiguous(memory_format=torch.channels_last)


def _normalised_on_cpu(images: Tensor, mean: Tensor, std: Tensor, colour: Tensor | None) -> Tensor:
    """The same by OpenCV, in less than half the time, and in one thread: PyTorch is slow at products of three by three, and its
    threads wait for cores that decode (`benchmarks/README.md`)."""
    kind = np.float64 if mean.dtype == torch.float64 else np.float32
    scale, shift = 1 / (255 * std.view(3)), -(mean / std).view(3)
    last = torch.cat([scale.diag(), shift[:, None]], 1).to(torch.float64).numpy()  # (3, 4)
    recolouring = None if colour is None else colour.to(torch.float64).numpy()
    pictures = images.permute(0, 2, 3, 1).numpy()
    pixels = np.empty(pictures.shape, kind)
    for number, picture in enumerate(pictures):
        values: cv2.typing.MatLike = np.ascontiguousarray(picture, kind)
        if recolouring is not None:
            values = np.clip(cv2.transform(values, recolouring[number]), 0, 255)
        cv2.transform(values, last, dst=pixels[number])
    return torch.from_numpy(pixels).to(mean.dtype).permute(0, 3, 1, 2)


def _make_head(trunk: Trunk, config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """The head, and the norm behind it."""
    size = config.embedding_size
    if config.head_kind == "arcface":
        return ArcFaceHead(trunk.width, trunk.side, size, config.effective_dropout), nn.Identity()
    if config.head_kind == "facenet":
        return nn.Linear(trunk.width, size, bias=False), nn.BatchNorm1d(size, eps=1e-3)
    return nn.Linear(trunk.width, size), nn.BatchNorm1d(size, affine=False) if config.head_batchnorm else nn.Identity()


class Size(NamedTuple):
    """What a network costs, before anything runs."""

    parameters: int
    multiply_adds: int
    """Of trunk and head for one picture: of convolutions and matrix products. FLOPs are twice as many."""


def size_of(model: Embedder) -> Size:
    """Source: torch.utils.flop_counter, on tensors without memory."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        pixels = torch.empty((1, 3, model.image_size, model.image_size), device="meta")
        shadow(model.head).eval()(shadow(model.trunk).eval()(pixels))
    return Size(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)


def read_state(path: Path, setting: str) -> dict[str, Tensor]:
    """Tensors by name out of a .safetensors or a torch.save file, read without unpickling objects.

    Raises:
        ValueError: the file is missing or is neither.
    """
    if not path.is_file():
        raise ValueError(
            f"{setting} {path} does not exist; it must be a local .safetensors or .pth file, nothing is downloaded"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(
            f"{setting} {path} cannot be read: it holds objects, which could run code, not tensors alone"
        ) from None
    except Exception as error:  # a file of something else makes torch's unpickler raise almost anything
        found = f"{type(error).__name__} {error}".splitlines()[0]
        raise ValueError(f"{setting} {path} cannot be read: {found}") from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{setting} {path} is not a state dict: a file of named tensors is needed")
    return state


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and filters only, not for biases, normalisation and what timm excepts in a trunk."""
    excepted = {
        f"{start}.{name}" for start, part in model.named_children() for name in getattr(part, "no_weight_decay", set)()
    }
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if parameter.ndim > 1 and name not in excepted]
    others = [parameter for name, parameter in trained if parameter.ndim <= 1 or name in excepted]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
