"""How well everything of an identity is found, and how well a threshold groups a set: average precision, clusters."""

import torch
from torch import Tensor

from trainer.collectives import gather_rows, rank, world_size
from trainer.evaluation.draws import draw_identities
from trainer.evaluation.measures import Scalars, Set
from trainer.metric.retrieval import Retrieval, retrieval

_BLOCK = 1 << 22
"""Similarities held at once: 32 MiB."""


def retrieved(samples: Set, queries: int, seed: int) -> Scalars:
    """map, r_precision and map_at_r: each query against all other images of the set; ranks share the queries.

    Queries are all images of identities with two or more, or so many of them, drawn uniformly; the gallery is always whole. Of
    equally similar images the one that comes first in the set is nearer (see `index`).
    Source: see `metric.retrieval`.
    """
    identities = samples[1]
    _, inverse, counts = identities.unique(return_inverse=True, return_counts=True)
    there = (counts[inverse] >= 2).nonzero().squeeze(1)
    drawn = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))[:queries]
    chosen = there[drawn.sort().values]
    places = torch.arange(len(chosen))
    mine = chosen[places[rank() :: world_size()]]
    blocks = mine.split(max(1, _BLOCK // len(identities)))
    values = [torch.stack(_ranked(samples, rows), 1) for rows in blocks if len(rows)]  # (q, 3) each
    everyones = gather_rows(torch.cat([torch.empty((0, 3), dtype=torch.float64), *values]))
    dealt = torch.cat([places[number :: world_size()] for number in range(world_size())])
    means = everyones[dealt.argsort()].mean(0)  # in the order of the queries: the same sum for any number of ranks
    names = ("map", "r_precision", "map_at_r")
    return dict(zip(names, means.tolist(), strict=True)) | {"retrieval_queries": len(chosen)}


def _ranked(samples: Set, queries: Tensor) -> Retrieval:
    embeddings, identities = samples
    wide = embeddings[queries].double()
    similarities = torch.cat([wide @ part.double().T for part in embeddings.split(4096)], 1).float()  # (q, n)
    similarities[torch.arange(len(queries)), queries] = -torch.inf  # itself comes last
    order = similarities.sort(dim=1, descending=True, stable=True).indices[:, :-1]
    return retrieval(identities[order], identities[queries])


def clusters(samples: Set, threshold: float, most: int, seed: int) -> Scalars:
    """nmi and pairwise_f of the clusters that average linkage makes of the set below a root distance.

    Args:
        threshold: clusters whose images lie further apart on average stay apart.
        most: images up to which the whole set is grouped; of a larger one whole identities are drawn, for it takes
            most^2 / 2 distances of 8 bytes.
    Returns:
        nmi: mutual information over the arithmetic mean of the entropies. pairwise_precision, pairwise_recall and their
        harmonic mean pairwise_f, over all pairs of images: together in a cluster against of the same identity.
    Source: NMI: Manning, Raghavan, Schütze 2008, 16.3; pairwise F: Amigó et al. 2009; linkage: Otto, Wang, Jain 2018 for faces.
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # here: they take seconds, and training imports this module
    from scipy.spatial.distance import pdist
    from sklearn.metrics import normalized_mutual_info_score

    embeddings, identities = samples
    if len(identities) > most:
        chosen = draw_identities(identities, most, seed)
        embeddings, identities = embeddings[chosen], identities[chosen]
    tree = linkage(pdist(embeddings.double().numpy()), method="average")
    found = torch.from_numpy(fcluster(tree, t=threshold, criterion="distance")).long()
    together, same, both = (_pairs(labels) for labels in (found, identities, _crossed(found, identities)))
    precision, recall = both / together if together else 1.0, both / same if same else 1.0
    return {
        "nmi": float(normalized_mutual_info_score(identities.numpy(), found.numpy())),
        "pairwise_f": 2 * precision * recall / (precision + recall) if both else 0.0,
        "pairwise_precision": precision,
        "pairwise_recall": recall,
        "clusters": int(found.max()),
        "cluster_threshold": threshold,
        "cluster_samples": len(identities),
    }


def _crossed(one: Tensor, other: Tensor) -> Tensor:
    """A label for each pair of labels."""
    return torch.stack([one, other], 1).unique(dim=0, return_inverse=True)[1]


def _pairs(labels: Tensor) -> int:
    """Pairs with the same label."""
    counts = labels.unique(return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())
