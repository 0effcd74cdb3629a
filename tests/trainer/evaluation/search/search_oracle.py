"""Vectors, and a slow exact search to judge others by."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def vectors(rows: int, d: int = 32, seed: int = 0) -> Tensor:
    return normalize(torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def oracle(gallery: Tensor, probes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every inner product in float64, rounded to float32, one probe at a time, sorted by (-similarity, position)."""
    rows = []
    for probe in probes.double():
        similarities = (gallery.double() * probe).sum(dim=1).float().tolist()
        rows.append(sorted(enumerate(similarities), key=lambda pair: (-pair[1], pair[0]))[:k])
    return torch.tensor([[s for _, s in row] for row in rows]), torch.tensor([[p for p, _ in row] for row in rows])


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])
