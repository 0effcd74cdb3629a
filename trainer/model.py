"""Trunk -> pooling -> linear -> (batch norm) -> unit-norm embedding."""

from pathlib import Path
from pickle import UnpicklingError

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.config import ModelConfig

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, in [0, 1] per channel: what torchvision's weights expect
_STD = (0.229, 0.224, 0.225)


class Embedder(nn.Module):
    """Pictures to points on the unit sphere.

    The first operation recolours and normalises, on the device, so that batches travel as uint8. With `bf16` the layers run
    under autocast here, and not in a wrapper, so that DDP, DeepSpeed and evaluation compute alike; parameters and embeddings
    stay float32.

    Raises:
        ValueError: the weights' file is missing, is no state dict, or belongs to another architecture.
    Source: FaceNet (Schroff et al. 2015), section 3; trunk: He et al. 2016, torchvision's implementation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, bf16: bool = False) -> None:
        super().__init__()
        self.config, self.bf16 = config, bf16
        trunk = getattr(torchvision.models, config.trunk)(weights=None)
        width = trunk.fc.in_features
        trunk.fc = nn.Identity()
        if config.weights is not None:
            _load_trunk(trunk, config)
        self.trunk = trunk
        self.head = nn.Linear(width, config.embedding_size)
        size = config.embedding_size
        self.head_norm = nn.BatchNorm1d(size, affine=False) if config.head_batchnorm else nn.Identity()
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, colour: Tensor | None = None) -> Tensor:
        """Unit-norm embeddings, float32 or wider, shape (b, d).

        Args:
            images: uint8 in [0, 255], shape (b, 3, H, W).
            colour: see `data_shards.augment.colour_matrices`, shape (b, 3, 4); None leaves colours as they are.
        """
        with torch.autocast(images.device.type, enabled=False):
            pixels = normalised(images, self.mean, self.std, colour)  # (b, 3, H, W)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.head_norm(self.head(self.trunk(pixels)))  # (b, d)
        return normalize(embeddings.to(self.mean.dtype))


def normalised(images: Tensor, mean: Tensor, std: Tensor, colour: Tensor | None = None) -> Tensor:
    """Recoloured, cut to [0, 255], scaled to [0, 1] and normalised, as one product and one cut.

    Args:
        images, colour: see `Embedder.forward`.
        mean, std: of each channel, of values in [0, 1], shape (3, 1, 1).
    Returns:
        In the type of `mean`, shape (b, 3, H, W), channels-last in memory.
    """
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


def _load_trunk(trunk: nn.Module, config: ModelConfig) -> None:
    path = config.weights
    assert path is not None
    state = read_state(path, "model.weights")
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    try:
        trunk.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"model.weights {path} is not a state dict of torchvision's {config.trunk}") from None


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
    """Weight decay for matrices and filters only, not for biases and normalisation."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
