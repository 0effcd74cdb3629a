"""Template protocols: many images of a person become one vector, and a few genuine pairs stand beside millions of impostors."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.metric.verification import Roc


def template_means(embeddings: Tensor, templates: Tensor, media: Tensor, weights: Tensor | None = None) -> Tensor:
    """One unit vector for each template: images of a medium are averaged first, then the template's media.

    So a video of a thousand frames counts as much as a still.

    Args:
        embeddings: unit vectors, shape (n, d).
        templates: which template each image belongs to, 0 to t - 1, every one of them there, shape (n,).
        media: label of the photograph or video that it comes from, shape (n,); told apart within a template alone.
        weights: factor of each image, as a detector's score, shape (n,); None: 1. A medium's sum is divided by its images.
    Returns:
        float32, shape (t, d). Images that cancel out leave a vector that is shorter, or zero.
    Source: Whitelam et al. 2017, "IARPA Janus Benchmark-B"; Maze et al. 2018, "IARPA Janus Benchmark-C"; Crosswhite et al. 2017,
        "Template adaptation".
    Example: images [1, 0], [0, 1] of one medium and [1, 0] of another: ([.5, .5] + [1, 0]) scaled to [.949, .316].
    """
    values = embeddings.double() if weights is None else embeddings.double() * weights.double()[:, None]
    both, medium, counts = torch.stack([templates, media], 1).unique(dim=0, return_inverse=True, return_counts=True)
    means = values.new_zeros(len(both), values.shape[1]).index_add_(0, medium, values) / counts[:, None]
    total = int(templates.max()) + 1
    return normalize(values.new_zeros(total, values.shape[1]).index_add_(0, both[:, 0], means), dim=1).float()


def roc_at_genuine(genuine: Tensor, impostor: Tensor) -> Roc:
    """The curve of `verification.roc` without the points that lie on a straight line between two others.

    Between two neighbouring genuine similarities only the FAR changes, so two points for each genuine similarity hold it all,
    and memory is that of sorting the impostors.

    Args:
        genuine: similarities of same-identity pairs, shape (g,), g at least 1.
        impostor: similarities of different-identity pairs, shape (m,), m at least 1.
    """
    values = genuine.unique()  # ascending
    rates = []
    for scores in (impostor, genuine):
        ascending = scores.sort().values
        below = [torch.searchsorted(ascending, values, right=right) for right in (True, False)]
        reached = torch.stack(below, 1).flip(0).view(-1)  # above the highest value, at it, above the next, …
        rate = (len(scores) - reached).double() / len(scores)
        ends = rate.new_tensor([0.0]), rate.new_tensor([1.0])
        rates.append(torch.cat([ends[0], rate, ends[1]]))
    return Roc(*rates)
