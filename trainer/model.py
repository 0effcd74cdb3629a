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

    The first operation normalises, on the device, so that batches travel as uint8. With `bf16` the layers run under autocast
    here, and not in a wrapper, so that DDP, DeepSpeed and evaluation compute alike; parameters and embeddings stay float32.

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

    def forward(self, images: Tensor) -> Tensor:
        """uint8 in [0, 255], shape (b, 3, H, W) -> unit-norm embeddings, float32 or wider, shape (b, d)."""
        pixels = (images.to(self.mean.dtype) / 255 - self.mean) / self.std  # (b, 3, H, W)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.head_norm(self.head(self.trunk(pixels)))  # (b, d)
        return normalize(embeddings.to(self.mean.dtype))


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
