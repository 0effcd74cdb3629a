"""Margin softmax over class centres that lie on many ranks: value and gradients in two passes, some centres at a time.

Each rank holds the centres of some identities and the embeddings of all. What crosses the ranks is a maximum and three sums for
each embedding; the caller brings both collectives. Memory beyond centres and gradients: O(LOGITS).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

LOGITS = 1 << 22
"""Logits held at once."""
MARGINS = {"arcface": 0.5, "cosface": 0.35, "adaface": 0.4}
"""Kinds, and the margin that each paper recommends."""
_CLIP = 1e-3
"""AdaFace keeps angles so far from 0 and from pi, and norms above it."""

Collective = Callable[[Tensor], Tensor]


@dataclass(kw_only=True, frozen=True)
class Margin:
    """What stands in place of the cosine between an embedding and its own centre."""

    kind: str
    """arcface, cosface or adaface."""
    margin: float
    """An angle in radians (arcface), a cosine (cosface), or the largest of either (adaface)."""

    def __call__(self, cosine: Tensor, quality: Tensor | None = None) -> Tensor:
        """Smaller cosines, with gradient, shape (n,).

        - arcface: cos(t + m). Beyond t = pi - m, where that would rise again, cosine - m sin(m), as InsightFace does.
        - cosface: cosine - m.
        - adaface: cos(t - m q) - m - m q, the angle kept within [0.001, pi - 0.001].

        Args:
            cosine: cos(t) of each embedding with its own centre, shape (n,).
            quality: q of each embedding in [-1, 1], shape (n,); for adaface.
        Source: Deng et al. 2019, "ArcFace", equation 3; Wang et al. 2018, "CosFace", equation 4; Kim et al. 2022, "AdaFace",
            section 4.3.
        """
        m = self.margin
        if self.kind == "cosface":
            return cosine - m
        if self.kind == "arcface":
            sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
            return torch.where(cosine > cos(pi - m), cosine * cos(m) - sine * sin(m), cosine - m * sin(m))
        assert quality is not None
        edge = torch.finfo(cosine.dtype).eps
        angle = cosine.clamp(edge - 1, 1 - edge).acos() - m * quality
        return angle.clamp(_CLIP, pi - _CLIP).cos() - m - m * quality


class Norms(NamedTuple):
    """What AdaFace remembers of the norms that embeddings had before they were scaled to 1; float64, 0-d each, NaN before any."""

    mean: Tensor
    std: Tensor


def remembered_norms(norms: Tensor, before: Norms, memory: float) -> Norms:
    """Moving averages of mean and standard deviation; those of this batch where there are none before.

    The published code starts at 20 and 100 whatever the network, which takes 1 / `memory` steps to forget.

    Args:
        norms: of the whole batch, shape (n,), n at least 2.
        memory: weight of the new batch, in (0, 1].
    Source: Kim et al. 2022, "AdaFace", section 4.3.
    """
    norms = norms.double().clamp(_CLIP, 100)
    new = norms.mean(), norms.std()
    return Norms(*(now.where(old.isnan(), old.lerp(now, memory)) for old, now in zip(before, new, strict=True)))


def quality_of(norms: Tensor, remembered: Norms, h: float) -> Tensor:
    """How good AdaFace takes pictures to be, in [-1, 1], shape (n,): h times the standard score of the norm.

    Args:
        h: in (0, 1]; 0.333 puts one standard deviation in three within.
    Source: Kim et al. 2022, "AdaFace", section 4.3; 0.001 is added to the deviation as in the published code.
    """
    score = (norms.double().clamp(_CLIP, 100) - remembered.mean) / (remembered.std + 1e-3)
    return (h * score).clamp(-1, 1).to(norms.dtype)


class Softmax(NamedTuple):
    """Of all embeddings, n; the same on every rank but for the gradients."""

    loss: Tensor
    """-log softmax of each embedding's own identity, shape (n,)."""
    cosine: Tensor
    """Of each embedding with its own centre, before the margin, shape (n,)."""
    by_embeddings: Tensor
    """Derivative of the losses' sum by each embedding, as far as it flows through this rank's centres, shape (n, d)."""
    by_centres: Tensor
    """Derivative of the losses' sum by this rank's centres, shape (c, d)."""


def margin_softmax(
    embeddings: Tensor,
    own: Tensor,
    centres: Tensor,
    margin: Margin,
    scale: float,
    quality: Tensor | None = None,
    reduce_max: Collective = lambda values: values,
    reduce_sum: Collective = lambda values: values,
) -> Softmax:
    """Cross-entropy of softmax(scale * cosine) over the centres of all ranks, the cosine with the own centre lowered by a margin.

    Args:
        embeddings: unit vectors of all ranks, the same on each, shape (n, d).
        own: row of each embedding's identity among `centres`, -1 where another rank has it; one rank must; int64, shape (n,).
        centres: this rank's, of any length above 0, shape (c, d); c may be 0.
        scale: s, above 0.
        quality: see `Margin`.
        reduce_max, reduce_sum: over all ranks, of shapes (n,) and (k, n).
    """
    with torch.no_grad():
        directions = normalize(centres)  # (c, d)
        here = own >= 0
        place = own.clamp(min=0)
        cosine = embeddings.new_zeros(len(embeddings))
        if len(centres):
            cosine = ((embeddings * directions[place]).sum(1)).where(here, cosine)  # (n,)
    with torch.enable_grad():
        leaf = cosine.detach().requires_grad_()
        lowered = margin(leaf, quality)
        (slope,) = torch.autograd.grad(lowered.sum(), leaf)
    with torch.no_grad():
        target = (scale * lowered).where(here, 0)
        highest = reduce_max(_highest(embeddings, directions, own, target, scale))  # (n,)
        total = embeddings.new_zeros(len(embeddings))
        for _, logits, _ in _blocks(embeddings, directions, own, target, scale):
            total += (logits - highest[:, None]).exp_().sum(1)
        total, target, cosine = reduce_sum(torch.stack([total, target, cosine]))
        by_embeddings, by_directions = torch.zeros_like(embeddings), torch.zeros_like(directions)
        for rows, logits, at in _blocks(embeddings, directions, own, target, scale):
            shares = (logits - highest[:, None]).exp_().div_(total[:, None])
            shares = _replaced(shares, at, lambda share: (share - 1) * slope).mul_(scale)  # (n, block)
            by_embeddings += shares @ directions[rows]
            by_directions[rows] = shares.T @ embeddings
        along = (by_directions * directions).sum(1, keepdim=True)
        length = centres.norm(dim=1, keepdim=True).clamp(min=1e-12)
        by_centres = (by_directions - along * directions) / length
    return Softmax(total.log() + highest - target, cosine, by_embeddings, by_centres)


def _blocks(embeddings: Tensor, directions: Tensor, own: Tensor, target: Tensor, scale: float) -> Any:
    """Some centres at a time: their rows, logits (n, block) with the margin, and each own centre's column or -1 (n,)."""
    size = max(1, LOGITS // max(1, len(embeddings)))
    for begin in range(0, len(directions), size):
        rows = slice(begin, min(begin + size, len(directions)))
        at = (own - begin).where((own >= begin) & (own < rows.stop), -1)
        yield rows, _replaced(scale * (embeddings @ directions[rows].T), at, lambda _: target), at


def _replaced(values: Tensor, at: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    """Values (n, m) in place, of each row the one in column `at` (-1: none) changed; does not wait for the device."""
    columns = at.clamp(min=0)[:, None]
    old = values.gather(1, columns)[:, 0]
    return values.scatter_(1, columns, by(old).where(at >= 0, old)[:, None])


def _highest(embeddings: Tensor, directions: Tensor, own: Tensor, target: Tensor, scale: float) -> Tensor:
    found = torch.full_like(target, torch.finfo(target.dtype).min)
    for _, logits, _ in _blocks(embeddings, directions, own, target, scale):
        found = torch.maximum(found, logits.amax(1))
    return found


class Attached(torch.autograd.Function):
    """A value whose gradient by the embeddings is known already: `Attached.apply(embeddings, value, gradient)`."""

    @staticmethod
    def forward(context: Any, embeddings: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        context.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(context: Any, by_value: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return by_value * gradient, None, None
