"""The face field's residual network, IResNet, and the head that ArcFace puts on it.

Names of parameters are InsightFace's, so that its `backbone.pth` is the state of `IResNet` and that of `ArcFaceHead` together.

Source: Deng et al. 2019, "ArcFace", 3.2.2 (block and "option E"); layer sizes and initial weights: deepinsight/insightface,
recognition/arcface_torch/backbones/iresnet.py.
"""

import torch
from torch import Tensor, nn

DEPTHS = {"iresnet18": (2, 2, 2, 2), "iresnet50": (3, 4, 14, 3), "iresnet100": (3, 13, 30, 3)}
"""Blocks of each of the four stages."""
WIDTHS = (64, 128, 256, 512)
"""Channels of each stage."""


class IResNet(nn.Module):
    """Pictures (b, 3, H, W) to maps (b, 512, ceil(H / 16), ceil(W / 16)), or to their means (b, 512).

    Args:
        depths: blocks of each stage; each stage halves the maps in its first block.
        pooled: give the means.
    """

    def __init__(self, depths: tuple[int, int, int, int], pooled: bool) -> None:
        super().__init__()
        self._pooled = pooled
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        before = WIDTHS[0]
        for number, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True), start=1):
            blocks = [
                Block(before if first else width, width, 2 if first else 1) for first in [True] + [False] * (depth - 1)
            ]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            before = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.prelu(self.bn1(self.conv1(pixels)))  # (b, 64, H, W)
        for number in range(1, len(WIDTHS) + 1):
            maps = self.get_submodule(f"layer{number}")(maps)
        return maps.mean((2, 3)) if self._pooled else maps


class Block(nn.Module):
    """x + (norm, convolution, norm, PReLU, convolution, norm)(x); where sizes change, x through a convolution and a norm."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride > 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.prelu(self.bn2(self.conv1(self.bn1(maps))))
        inner = self.bn3(self.conv2(inner))
        return inner + (maps if self.downsample is None else self.downsample(maps))


class ArcFaceHead(nn.Module):
    """Maps to embeddings before their L2 norm, ArcFace's "option E": norm, dropout, linear over all places, norm.

    The last norm's scale stays 1, for it is not trained.

    Args:
        width, side: of the maps, shape (b, width, side, side).
        dropout: share of its inputs that training puts to 0.
    """

    def __init__(self, width: int, side: int, embedding_size: int, dropout: float) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width * side**2, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)

    def forward(self, maps: Tensor) -> Tensor:
        flat = torch.flatten(self.bn2(maps), 1)  # (b, width * side^2), place by place of each channel
        embeddings: Tensor = self.features(self.fc(self.dropout(flat)))  # (b, d)
        return embeddings
