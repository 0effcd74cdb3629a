"""Embeddings laid out in two and three dimensions: t-SNE and UMAP of a few images of a few identities."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from trainer.evaluation.examples import shown_samples
from trainer.evaluation.report.plots import LIGHT, Line, Panel, Plot, Style
from trainer.evaluation.report.records import Record

FEWEST = 6
"""Points below which nothing is laid out."""
_MARKERS = 8
_NEIGHBOURS = 15
"""As many as an image of an identity that is shown has of its own, or a few less."""


def tsne(points: np.ndarray, dimensions: int, seed: int = 0) -> np.ndarray:
    """t-SNE by cosine, shape (n, dimensions); the same for the same points and seed.

    Args:
        points: shape (n, d), n at least `FEWEST`.
        dimensions: 2 or 3.
    Source: van der Maaten and Hinton 2008; started from the principal components as Kobak and Berens 2019 advise.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = max(1.0, min(float(_NEIGHBOURS), (len(points) - 1) / 3))
    start = 1e-4 * _principal(points, dimensions, seed)
    layout = TSNE(dimensions, metric="cosine", perplexity=perplexity, init=start, random_state=seed)
    with threadpool_limits(1):  # a few hundred points: threads would wait for each other longer than they work
        return layout.fit_transform(points)


def umap(points: np.ndarray, dimensions: int, seed: int = 0) -> np.ndarray:
    """UMAP by cosine, shape (n, dimensions); the same for the same points and seed.

    Args: as for `tsne`.
    Source: McInnes, Healy and Melville 2018.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # umap offers a part that wants Tensorflow
        from umap import UMAP

    start = _principal(points, dimensions, seed)
    neighbours = min(_NEIGHBOURS, len(points) - 1)
    layout = UMAP(neighbours, dimensions, metric="cosine", init=start, random_state=seed, n_jobs=1)
    return layout.fit_transform(points)


PROJECTIONS: dict[str, tuple[str, Callable[[np.ndarray, int], np.ndarray], int]] = {
    "tsne": ("t-SNE", tsne, 2),
    "umap": ("UMAP", umap, 2),
    "tsne3d": ("t-SNE in three dimensions", tsne, 3),
}


def _principal(points: np.ndarray, dimensions: int, seed: int) -> np.ndarray:
    """Principal components to start from, the first of deviation 1, float32; a trace of noise parts equal points."""
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    found = np.zeros((len(points), dimensions))
    kept = min(dimensions, len(values))
    found[:, :kept] = left[:, :kept] * values[:kept]
    deviation = found[:, 0].std()
    noise = np.random.default_rng(seed).normal(size=found.shape)
    return ((found / deviation if deviation > 1e-9 else 0 * found) + 1e-3 * noise).astype(np.float32)


def projection_plot(records: Sequence[Record], name: str) -> Plot | None:
    """One of `PROJECTIONS`, a panel for each run; None where no run has embeddings enough.

    Args:
        name: a key of `PROJECTIONS`.
    """
    title, project, dimensions = PROJECTIONS[name]
    panels, words = [], []
    for record in records:
        found = record.results
        if found.embeddings is None or found.identities is None:
            continue
        identities = found.identities.numpy()
        shown = shown_samples(identities)
        if len(shown) < FEWEST:
            continue
        points = project(found.embeddings.numpy()[shown], dimensions)  # (s, dimensions)
        lines = _clouds(record, shown, identities[shown], points)
        x, y = (f"{title} {axis} (no unit)" for axis in (1, 2))
        own = record.label if len(records) > 1 else ""
        panels.append(Panel(title=own, x_label=x, y_label=y, lines=lines, square=True))
        judged = f"{len(shown):,} images of {len(lines)} identities of {found.rows[0].set}"
        words.append(f"{record.name}: {judged}" if len(records) > 1 else judged)
    if not panels:
        return None
    return Plot(
        name=name,
        title=title,
        caption=f"{title} by cosine of {'; '.join(words)}, drawn with a seed. Colour and marker tell identities apart; only "
        "who is near whom has a meaning, not the axes.",
        alt=f"{title}: images of the same identity lie in the same cloud as far as the network tells identities apart.",
        panels=panels,
        legend_title="identity",
        tall=True,
    )


def _clouds(record: Record, shown: np.ndarray, identities: np.ndarray, points: np.ndarray) -> list[Line]:
    lines = []
    found = record.results
    for number, identity in enumerate(np.unique(identities).tolist()):
        own = np.flatnonzero(identities == identity)
        label = found.names.get(identity, str(identity))
        places = shown[own].tolist()
        style = Style(colour=number % len(LIGHT), marker=(number // len(LIGHT) + number) % _MARKERS)
        axes = {axis: points[own, place] for place, axis in zip(range(points.shape[1]), "xyz", strict=False)}
        notes = [found.keys.get(place, label) for place in places]
        pictures = [found.thumbnails.get(place) for place in places]
        lines.append(Line(label=label, style=style, kind="points", notes=notes, pictures=pictures, **axes))
    return lines
