"""What the real network costs: counted by running it on fake tensors, which have shapes but no memory."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_FEW, _MORE = 2, 4
"""Batch sizes that are looked at: what does not grow between them is of the weights."""


@dataclass(kw_only=True, frozen=True)
class NetworkCost:
    """Of one network at one image size. FLOPs count a multiplication and an addition as two."""

    parameters: int
    forward_flops: float
    """Of one image."""
    backward_flops: float
    """Of one image."""
    saved_bytes: float
    """What the backward needs of one image: activations, each storage once."""
    saved_once_bytes: float
    """What it needs whatever the batch: the weights' bf16 copies."""
    traffic_bytes: float
    """Of one image forward: what each layer reads and writes, where nothing is fused."""
    layers: int
    """Modules without parts: what is launched, at least."""

    @property
    def flops(self) -> float:
        """Of one image, forward and backward."""
        return self.forward_flops + self.backward_flops


@lru_cache(maxsize=64)
def measure(trunk: str, image_size: int, embedding_size: int, bf16: bool) -> NetworkCost:
    """Counts one training step of `trainer.model.Embedder`.

    Args:
        trunk: see `ModelConfig.trunk`; with its `auto` head. image_size: pixels, 16 to 1024. embedding_size: d, 2 to 4096.
    Raises:
        ValueError: see `Embedder`.
    Source: FLOPs of torch.utils.flop_counter; saved bytes of torch.autograd.graph.saved_tensors_hooks.
    """
    few, more = (_look(trunk, image_size, embedding_size, bf16, batch) for batch in (_FEW, _MORE))
    growth = (more["saved"] - few["saved"]) / (_MORE - _FEW)
    return NetworkCost(
        parameters=few["parameters"],
        forward_flops=few["forward"] / _FEW,
        backward_flops=few["backward"] / _FEW,
        saved_bytes=growth,
        saved_once_bytes=few["saved"] - _FEW * growth,
        traffic_bytes=(more["traffic"] - few["traffic"]) / (_MORE - _FEW),
        layers=few["layers"],
    )


def _look(trunk: str, image_size: int, embedding_size: int, bf16: bool, batch: int) -> dict[str, int]:
    """What one step of so many images computes, moves and keeps."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from trainer.backbones import shadow
    from trainer.config import ModelConfig
    from trainer.model import Embedder

    found = {"traffic": 0, "layers": 0}
    kept: dict[int, Any] = {}

    def add(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
        found["layers"] += 1
        found["traffic"] += sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, output))

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"):
        real = Embedder(ModelConfig(trunk=trunk, embedding_size=embedding_size), bf16, image_size)
    with FakeTensorMode():
        model = shadow(real, "cpu")
        for module in model.modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(add)
        images = torch.zeros((batch, 3, image_size, image_size), dtype=torch.uint8)
        with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            total = model(images).sum()
        with FlopCounterMode(display=False) as backward:
            total.backward()
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        found["saved"] = sum(t.untyped_storage().nbytes() for name, t in kept.items() if name not in own)
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        grouped = any(isinstance(module, torch.nn.Conv2d) and module.groups > 1 for module in model.modules())
    forwards, backwards = forward.get_total_flops(), backward.get_total_flops()
    if (
        grouped
    ):  # torch's counter forgets the groups of a backward: of depthwise convolutions it says tens of times too much
        backwards = 2 * forwards
    return found | {"forward": forwards, "backward": backwards}
