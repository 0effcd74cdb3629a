"""What is in a shard set: images per identity, sizes, bytes; as a table and as a picture. Read from manifest and index alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.index import ShardSet, Split

CHUNK_ROWS = 2**20
BINS = 256
_QUANTILES = (0, 0.1, 0.5, 0.9, 1)


@dataclass(frozen=True)
class SplitStats:
    """Of one split; five numbers are smallest, first decile, median, last decile, largest."""

    name: str
    shards: int
    tar_bytes: int
    identities: int
    samples: int
    formats: dict[str, int]
    images_per_identity: tuple[float, ...]
    mean_images: float
    width: tuple[float, ...]
    height: tuple[float, ...]
    bytes: tuple[float, ...]


@dataclass(frozen=True)
class Stats:
    splits: tuple[SplitStats, ...]

    def __str__(self) -> str:
        lines = []
        for split in self.splits:
            formats = ", ".join(f"{count:,} {name}" for name, count in split.formats.items())
            lines += [
                f"{split.name}: {split.samples:,} images of {split.identities:,} identities ({formats}); "
                f"shards: {split.shards:,}, {split.tar_bytes / 1e6:,.1f} MB",
                f"  {'':22}{'min':>10}{'10 %':>10}{'median':>10}{'90 %':>10}{'max':>10}",
                _row("images per identity", split.images_per_identity) + f"   mean {split.mean_images:,.1f}",
                _row("width in pixels", split.width),
                _row("height in pixels", split.height),
                _row("bytes per image", split.bytes),
            ]
        return "\n".join(lines)


def stats(directory: Path | str) -> Stats:
    """Counts and spreads of every split.

    Raises:
        ValueError: it is no shard set, or damaged.
    """
    shard_set = ShardSet.open(directory)
    return Stats(tuple(_split_stats(shard_set, name) for name in shard_set.splits))


def plot_stats(directory: Path | str, out: Path | str) -> None:
    """Draws images per identity, width and height, and bytes per image into a PNG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shard_set = ShardSet.open(directory)
    splits = [shard_set.split(name) for name in shard_set.splits]
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _plot_identities(left, splits)
        figure.colorbar(_plot_sizes(middle, splits), ax=middle, label="images")
        _plot_bytes(right, splits)
        total, identities = sum(map(len, splits)), len(np.unique(np.concatenate([s.identities for s in splits])))
        figure.suptitle(f"{Path(directory).resolve().name}: {total:,} images of {identities:,} identities", fontsize=12)
        figure.savefig(out, dpi=130)


def _split_stats(shard_set: ShardSet, name: str) -> SplitStats:
    split, entry = shard_set.split(name), shard_set.manifest["splits"][name]
    formats: dict[str, int] = {}
    for shard in entry["shards"]:
        formats[shard["extension"]] = formats.get(shard["extension"], 0) + shard["samples"]
    return SplitStats(
        name=name,
        shards=len(split.shards),
        tar_bytes=sum(shard["bytes"] for shard in entry["shards"]),
        identities=len(split.identities),
        samples=len(split),
        formats=dict(sorted(formats.items())),
        images_per_identity=_five(split.counts),
        mean_images=float(split.counts.mean()),
        width=_five(_column(split, "width")),
        height=_five(_column(split, "height")),
        bytes=_five(_column(split, "size")),
    )


def _column(split: Split, name: str) -> NDArray[Any]:
    return np.array(split.samples[name])


def _five(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, _QUANTILES, method="lower"))


def _row(name: str, values: tuple[float, ...]) -> str:
    return f"  {name:22}" + "".join(f"{value:>10,.0f}" for value in values)


def _chunks(splits: list[Split]) -> Iterator[NDArray[Any]]:
    for split in splits:
        for start in range(0, len(split), CHUNK_ROWS):
            yield split.samples[start : start + CHUNK_ROWS]


def _plot_identities(axes: Any, splits: list[Split]) -> None:
    largest = max(int(split.counts.max()) for split in splits)
    step = -(-largest // 60)  # whole numbers of images in each bar
    edges = 0.5 + step * np.arange(-(-largest // step) + 1)
    for split in splits:
        axes.hist(split.counts, bins=edges, histtype="stepfilled", alpha=0.45, label=split.name.replace("_", " "))
    axes.set(title="Images per identity", xlabel="images", ylabel="identities")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.legend(frameon=False, fontsize=9)


def _plot_sizes(axes: Any, splits: list[Split]) -> Any:
    from matplotlib.colors import LogNorm

    sides = [max(int(chunk[name].max()) for chunk in _chunks(splits)) for name in ("width", "height")]
    edges = [np.linspace(0, side * 1.08 + 1, min(64, side + 2)) for side in sides]
    counts = np.zeros((len(edges[0]) - 1, len(edges[1]) - 1))
    for chunk in _chunks(splits):
        counts += np.histogram2d(chunk["width"], chunk["height"], edges)[0]
    mesh = axes.pcolormesh(
        *edges, np.ma.masked_equal(counts.T, 0), norm=LogNorm(1, max(2, counts.max())), cmap="viridis"
    )
    axes.set(title="Size of the images", xlabel="width in pixels", ylabel="height in pixels")
    return mesh


def _plot_bytes(axes: Any, splits: list[Split]) -> None:
    smallest = min(int(chunk["size"].min()) for chunk in _chunks(splits))
    largest = max(int(chunk["size"].max()) for chunk in _chunks(splits))
    edges = np.linspace(smallest, largest + 1, min(BINS, 60) + 1)
    counts = np.zeros(len(edges) - 1)
    for chunk in _chunks(splits):
        counts += np.histogram(chunk["size"], edges)[0]
    axes.stairs(counts, edges / 1000, fill=True, alpha=0.6)
    axes.set(title="Bytes of an image", xlabel="kB", ylabel="images")
