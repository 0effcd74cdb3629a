"""Figures of the site, drawn from the program's own plan, mining and measurements when the site is built."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parent.parent
COLOURS = matplotlib.colormaps["tab20"]
RANKS = ("#0f766e", "#c2410c", "#4338ca", "#a16207")
STYLE = {"svg.hashsalt": "facescale", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def svg(draw: Callable[[], Figure]) -> Callable[[], bytes]:
    """The figure that a function draws, as the bytes of an SVG that are the same each time."""

    def drawn() -> bytes:
        target = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            draw().savefig(target, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")
        return target.getvalue()

    return drawn


@svg
def plan() -> Figure:
    """An epoch of a small set: which identity has which slot, and what ranks take of one batch."""
    from data_shards.plan import Plan, PlanConfig

    counts = np.random.default_rng(5).integers(7, 25, 16)
    starts = np.concatenate([[0], counts.cumsum()])
    made = Plan(starts, PlanConfig(identities_per_batch=6, images_per_identity=4), seed=1)
    batches = np.stack([made.global_batch(step).samples for step in range(made.steps_per_epoch)])  # (T, P*K)
    identities = np.searchsorted(starts, batches, side="right") - 1  # (T, P*K)
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    _epoch(above, batches, identities, starts)
    _slices(below, made, starts, step=2)
    return figure


def _epoch(axes: Axes, batches: np.ndarray, identities: np.ndarray, starts: np.ndarray) -> None:
    seen: set[int] = set()
    for step, (samples, owners) in enumerate(zip(batches, identities, strict=True)):
        for place, (sample, owner) in enumerate(zip(samples, owners, strict=True)):
            again = int(sample) in seen
            seen.add(int(sample))
            box = Rectangle(
                (place + place // 4 * 0.4, step), 0.92, 0.86, facecolor=COLOURS(owner % 20), edgecolor="white", lw=0.5
            )
            box.set_hatch("////" if again else None)
            axes.add_patch(box)
            number = str(sample - starts[owner])
            axes.text(box.get_x() + 0.46, step + 0.45, number, ha="center", va="center", fontsize=6.5)
    axes.set(
        xlim=(-0.2, 26.2), ylim=(len(batches), -0.2), ylabel="step", xticks=[], yticks=np.arange(len(batches)) + 0.43
    )
    axes.set_yticklabels([str(step) for step in range(len(batches))])
    drawn, total = batches.size, int(starts[-1])
    title = f"One epoch of {total} pictures of {len(starts) - 1} identities: {len(batches)} batches of P = 6 (colours) x K = 4"
    axes.set_title(f"{title}; hatched: drawn again ({drawn - len(np.unique(batches))})", fontsize=9, loc="left")


def _slices(axes: Axes, made: object, starts: np.ndarray, step: int) -> None:
    for row, world in enumerate((1, 2, 3, 4)):
        for rank in range(world):
            samples = made.batch(step, rank, world).samples
            for place, sample in enumerate(samples):
                owner = int(np.searchsorted(starts, sample, side="right")) - 1
                at = rank * len(samples) + place
                axes.add_patch(Rectangle((at + rank * 0.5, row), 0.92, 0.6, facecolor=COLOURS(owner % 20)))
            left = rank * len(samples) + rank * 0.5
            axes.text(left, row + 0.8, f"rank {rank}", fontsize=7, va="center", color=RANKS[rank])
    axes.set(xlim=(-0.2, 26.2), ylim=(4, -0.2), xticks=[], yticks=[0.3, 1.3, 2.3, 3.3], ylabel="processes")
    axes.set_yticklabels(["1", "2", "3", "4"])
    axes.set_title(f"Step {step} on 1 to 4 processes: the same pictures in the same order, cut", fontsize=9, loc="left")


@svg
def exact_gather() -> Figure:
    """Distances of a batch on three ranks, with what batch-hard mining picks among all ranks and on each rank alone."""
    import torch
    from torch.nn.functional import normalize

    from trainer.metric.mining import batch_hard
    from trainer.metric.pool import Pool

    generator = torch.Generator().manual_seed(4)
    identities = torch.arange(6).repeat_interleave(4)
    centres = torch.randn(6, 8, generator=generator)
    embeddings = normalize(centres[identities] + 0.9 * torch.randn(24, 8, generator=generator), dim=1)
    distances = (2 - 2 * embeddings @ embeddings.T).clamp(min=0).sqrt()
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    everyone, _ = batch_hard(Pool.of(embeddings, identities))
    alone = [batch_hard(Pool.of(embeddings[rows], identities[rows]))[0] for rows in torch.arange(24).split(8)]
    own = [torch.cat([part[at] + 8 * rank for rank, part in enumerate(alone)]) for at in (1, 2)]
    _distances(panels[0], distances, everyone.positives, everyone.negatives, "candidates of all ranks")
    _distances(panels[1], distances, own[0], own[1], "of the own rank alone")
    further = (distances.gather(1, own[1][:, None]) - distances.gather(1, everyone.negatives[:, None])).mean()
    panels[1].set_xlabel(f"its nearest negatives lie {further:.2f} farther away on average")
    panels[0].set_ylabel("anchors, by rank")
    panels[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False)
    return figure


def _distances(axes: Axes, distances: object, positives: object, negatives: object, title: str) -> None:
    axes.imshow(distances.numpy(), cmap="Greys_r", vmin=0, vmax=2)
    rows = np.arange(24)
    axes.plot(positives.numpy(), rows, "o", ms=6, mfc="none", mec="#2dd4bf", mew=1.6, label="farthest positive")
    axes.plot(negatives.numpy(), rows, "x", ms=6, color="#f97316", mew=1.8, label="nearest negative")
    for rank in range(3):
        axes.add_patch(Rectangle((rank * 8 - 0.5, rank * 8 - 0.5), 8, 8, fill=False, ec=RANKS[2], lw=1.2))
    ticks, names = [3.5, 11.5, 19.5], ["rank 0", "rank 1", "rank 2"]
    axes.set(xticks=ticks, yticks=ticks, title=title)
    axes.set_xticklabels(names)
    axes.set_yticklabels(names)


@svg
def gradient_caching() -> Figure:
    """What is done in which order, and the memory that was measured."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _order(left)
    rows = json.loads((ROOT / "benchmarks/results/train_step.json").read_text())["memory"]
    for part, name, colour in ((None, "all at once", RANKS[1]), (32, "in parts of 32", RANKS[0])):
        mine = [row for row in rows if row["micro_batch"] == part]
        right.plot([row["images"] for row in mine], [row["peak_mib"] for row in mine], "o-", color=colour, label=name)
    right.set(xlabel="images of a rank in a batch", ylabel="peak memory, MiB", xscale="log", ylim=(0, None))
    sizes = sorted({row["images"] for row in rows})
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.minorticks_off()
    right.legend(frameon=False)
    right.set_title("Measured (benchmarks/results/train_step.json)", fontsize=9, loc="left")
    return figure


def _order(axes: Axes) -> None:
    steps = [(part, 3, f"{part + 1}", RANKS[0], 0.35) for part in range(4)]
    steps += [(4, 2, "mining,\nloss", RANKS[2], 0.5), (6, 1, "of each\nembedding", RANKS[2], 0.5)]
    steps += [(8 + part, 0, f"{part + 1}", RANKS[1], 0.6) for part in range(4)]
    for at, row, text, colour, alpha in steps:
        width = 0.9 if row in (0, 3) else 1.9
        axes.add_patch(Rectangle((at, row + 0.15), width, 0.7, facecolor=colour, alpha=alpha))
        axes.text(at + width / 2, row + 0.5, text, ha="center", va="center", fontsize=7)
    names = [
        "forward with graph,\nbackward of each part",
        "gradients, kept",
        "whole batch,\nall ranks",
        "forward\nwithout graph",
    ]
    axes.set(xlim=(-0.1, 12.1), ylim=(0, 4), xticks=[], xlabel="time")
    axes.set_yticks([0.5, 1.5, 2.5, 3.5], names)
    axes.set_title("One step in four parts, 1 to 4", fontsize=9, loc="left")


@svg
def partial_fc() -> Figure:
    """Which centres lie on which rank, and which of them take part in three steps."""
    from data_shards.counter_random import uniform
    from data_shards.plan import contiguous_slice

    centres, world, rate = 120, 4, 0.2
    figure = Figure(figsize=(8.4, 2.6), layout="constrained")
    axes = figure.subplots()
    for step in range(3):
        batch = np.random.default_rng(step).choice(centres, 8, replace=False)
        drawn = uniform(1, 104, step, np.arange(centres)) < rate
        for rank in range(world):
            for at in contiguous_slice(centres, rank, world):
                colour = RANKS[1] if at in batch else RANKS[0] if drawn[at] else "#d6d3d1"
                axes.add_patch(Rectangle((at + 3 * rank, step), 0.85, 0.7, facecolor=colour))
    middles = [15 + 33 * rank for rank in range(world)]
    axes.set(xlim=(-1, 130), ylim=(3, -0.2), xticks=middles, yticks=[0.35, 1.35, 2.35])
    axes.set_xticklabels([f"centres of rank {rank}" for rank in range(world)])
    axes.set_yticklabels([f"step {step}" for step in range(3)])
    names = (
        ("of the batch's identities: always", RANKS[1]),
        (f"drawn with chance {rate}", RANKS[0]),
        ("left alone", "#d6d3d1"),
    )
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, label=name) for name, colour in names]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    return figure


FIGURES: dict[str, Callable[[], bytes]] = {
    "plan": plan,
    "exact-gather": exact_gather,
    "gradient-caching": gradient_caching,
    "partial-fc": partial_fc,
}
"""Name of the file, and what draws it."""
