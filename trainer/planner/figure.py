"""The plan as one PNG: how efficiency falls, and where a step's time goes. Touches no global state of matplotlib."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from trainer.planner.capacity import Capacity, Scaled

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#8C8C8C")
"""Okabe and Ito (2008), and grey."""
HATCHES = ("", "//", "..", "xx", "", "\\\\", "")


def write_png(capacity: Capacity, path: Path) -> None:
    """Efficiency over 1 to 1,024 GPUs on the left; on the right the critical path of a weak step, and the loader beside it."""
    figure = Figure(figsize=(13, 5), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _efficiency(left, capacity.scaling)
    _stages(right, capacity.scaling)
    job, cluster = capacity.workload, capacity.cluster
    figure.suptitle(
        f"Predicted: {job.trunk}, {job.image_size} px, {job.precision} on {cluster.gpu.name}, {cluster.gpus_per_node} a machine; "
        f"{capacity.step.images:,} images each (weak), P x K = {job.batch_size:,} (strong)",
        fontsize=11,
    )
    figure.savefig(path)


def _efficiency(axes: Axes, rows: tuple[Scaled, ...]) -> None:
    shared = [row for row in rows if row.strong_efficiency is not None]
    axes.plot(
        [row.gpus for row in rows], [100 * row.weak_efficiency for row in rows], "-o", color=COLOURS[0], label="weak"
    )
    strong = [100 * row.strong_efficiency for row in shared if row.strong_efficiency is not None]
    axes.plot([row.gpus for row in shared], strong, "--s", color=COLOURS[1], label="strong")
    axes.set_ylim(0, 5 + max(100.0, *strong, *(100 * row.weak_efficiency for row in rows)))
    axes.set(xlabel=_what(rows), ylabel="efficiency against one of them, %", title="Scaling")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#E5E5E5")
    axes.legend(frameon=False, loc="lower left")


def _stages(axes: Axes, rows: tuple[Scaled, ...]) -> None:
    places, bottom = list(range(len(rows))), [0.0] * len(rows)
    for name, colour, hatch in zip(rows[0].weak.critical, COLOURS, HATCHES, strict=True):
        heights = [1000 * row.weak.critical[name] for row in rows]
        axes.bar(places, heights, 0.7, bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    slowest = [1000 * max(row.weak.loader.values()) for row in rows]
    shared = rows[0].weak.shares_cores
    if shared:
        slowest = [1000 * (sum(row.weak.loader.values()) - row.weak.loader["read"]) for row in rows]
        axes.bar(places, slowest, 0.7, bottom, color="#000000", label="loader, on the same cores")
    else:
        axes.plot(places, slowest, "kD", markersize=5, label="slowest stage of the loader (runs ahead)")
    axes.set_xticks(places, [f"{row.gpus:,}" for row in rows])
    axes.set(xlabel=_what(rows), ylabel="ms", title="A step, weak scaling")
    axes.set_ylim(0, 1.45 * max(*bottom, *slowest))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _what(rows: tuple[Scaled, ...]) -> str:
    return "ranks on CPUs" if rows[0].weak.shares_cores else "GPUs"
