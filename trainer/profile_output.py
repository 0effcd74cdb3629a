"""What `facescale profile` leaves: a table, profile.json, profile.png with stacked bars, and trace.json for Perfetto.

trace.json is of the Trace Event Format (Google, "Trace Event Format", JSON object form): open it at ui.perfetto.dev or in
chrome://tracing. A process there is a rank, whose steps hold their phases; gradient buckets lie beside them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trainer.phases import Step
    from trainer.profile import RankProfile

LABELS = {
    "wait": "wait for data",
    "copy": "copy",
    "forward": "forward",
    "gather_mining_loss": "gather + mining + loss",
    "backward": "backward",
    "all_reduce_exposed": "all-reduce, exposed",
    "optimizer": "optimiser",
    "other": "other",
}


HATCHES = ("", "//", "", "..", "\\\\", "xx", "", "--")
"""That say the same as the colours."""


def write(out: Path, found: dict[str, Any], everyone: Sequence["RankProfile"]) -> None:
    """Writes all files into `out` and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "trace.json").write_text(json.dumps({"traceEvents": list(trace(everyone)), "displayTimeUnit": "ms"}))
    draw(found, out / "profile.png")
    print(table(found))
    print(
        f"\nFigure: {out / 'profile.png'}; timeline for ui.perfetto.dev: {out / 'trace.json'}; {out / 'profile.json'}"
    )


def table(found: dict[str, Any]) -> str:
    """The critical path, milliseconds a step, and what runs beside it."""
    path, average, step = found["critical_path_s"], found["critical_path_mean_s"], found["step_s"]
    slowest = f"rank {found['slowest_rank']} (slowest)"
    lines = [
        f"{found['trunk']}, {found['image_size']} px, {found['ranks']} x {found['images_per_rank']} images a step, "
        f"{found['precision']}, {found['device']}; {found['steps']} steps",
        "",
        f"{'ms a step':24}{slowest:>18}{'mean of ranks':>16}{'share':>9}",
    ]
    for name, label in LABELS.items():
        share = path[name] / step["median"]
        lines.append(f"{label:24}{1e3 * path[name]:18.2f}{1e3 * average[name]:16.2f}{share:9.1%}")
    lines.append(f"{'step':24}{1e3 * step['median']:18.2f}{1e3 * sum(average.values()):16.2f}{1:9.1%}")
    low, high = (1e3 * step[name] for name in ("lower_quartile", "upper_quartile"))
    lines += [
        f"quartiles of the step: {low:.2f} to {high:.2f} ms; {found['images_per_s']:.1f} images/s of all ranks",
        "",
    ]
    return "\n".join([*lines, *_beside(found)])


def _beside(found: dict[str, Any]) -> Iterator[str]:
    loader, cost = found["loader"], found["loader"]["cpu_s_per_image"]
    own = found["images_per_s"] / found["ranks"]
    if found["ranks"] > 1:
        total, exposed = found["all_reduce_total_s"], found["critical_path_s"]["all_reduce_exposed"]
        yield f"all-reduce under way: {1e3 * total:.2f} ms a step, of which {1e3 * exposed:.2f} ms add to the step"
    yield (
        f"read and decode, ahead of the step: {1e6 * cost['plan_and_bytes']:.0f} + {1e6 * cost['decode']:.0f} us of CPU an "
        f"image (plan and bytes + decode; {loader['mean_picture_bytes'] / 1024:.1f} KiB, "
        f"{loader['mean_picture_pixels']:,.0f} pixels)"
    )
    yield (
        f"loader alone: {loader['images_per_s']:,.0f} images/s on {loader['threads']} thread(s) of a rank, "
        f"{loader['images_per_s'] / own:,.3g} x what its training takes"
    )
    yield f"peak memory of a rank: {found['peak_memory_bytes'] / 2**20:,.0f} MiB"


def draw(found: dict[str, Any], path: Path) -> None:
    """Stacked bars of the slowest rank and of the mean; colours that differ to any eye, and hatches that say the same again."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    bars = {"mean of ranks": found["critical_path_mean_s"]} if found["ranks"] > 1 else {}
    bars[f"rank {found['slowest_rank']}" + (", slowest" if found["ranks"] > 1 else "")] = found["critical_path_s"]
    for row, seconds in enumerate(bars.values()):
        _stack(axes, row, seconds, legend=row == len(bars) - 1)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel("milliseconds a step (median)")
    axes.set_title(
        f"{found['trunk']}, {found['image_size']} px, {found['ranks']} x {found['images_per_rank']} images, "
        f"{found['precision']}, {found['device']}: {found['images_per_s']:.1f} images/s",
        loc="left",
        fontsize=11,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _stack(axes: "Axes", row: int, seconds: dict[str, float], legend: bool) -> None:
    """One bar of all phases; what takes 6 % or more is told in it."""
    from trainer.evaluation.report.plots import LIGHT

    left, whole = 0.0, sum(seconds.values())
    for (name, label), colour, hatch in zip(LABELS.items(), LIGHT, HATCHES, strict=True):
        text = f"{label}  {1e3 * seconds[name]:.1f} ms" if legend else None
        style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6}
        axes.barh(row, 1e3 * seconds[name], left=1e3 * left, height=0.6, label=text, **style)
        if seconds[name] >= 0.06 * whole:
            place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9}
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
            middle = (1e3 * (left + seconds[name] / 2), row)
            axes.annotate(f"{seconds[name] / whole:.0%}", middle, bbox=box, **place)
        left += seconds[name]


def trace(everyone: Sequence["RankProfile"]) -> Iterator[dict[str, Any]]:
    """Events, times in microseconds from the first rank's first step; ranks by the clocks of their machines."""
    first = everyone[0].started_at
    shifts = [each.started_at - first for each in everyone]
    origin = min(shift + each.steps[0].whole.begin for shift, each in zip(shifts, everyone, strict=True))
    for rank, each in enumerate(everyone):
        place = {"pid": rank, "tid": 0}
        yield {"ph": "M", "name": "process_name", **place, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": "step"}}
        for number, step in enumerate(each.steps):
            for event in _events(step, number, rank):
                yield {**event, "ts": 1e6 * (shifts[rank] + event["ts"] - origin), **place}


def _events(step: "Step", number: int, rank: int) -> Iterator[dict[str, Any]]:
    """Of one step, `ts` still in seconds on its rank's timeline."""
    for span, category in ((step.whole, "step"), *((span, "phase") for span in step.spans)):
        kind = {"ph": "X", "cat": category, "args": {"step": number}}
        yield {**kind, "name": span.name, "ts": span.begin, "dur": 1e6 * span.seconds}
    for bucket, span in enumerate(step.buckets):
        for ph, at in (("b", span.begin), ("e", span.end)):
            yield {"ph": ph, "cat": "all_reduce", "id": f"{rank}.{number}.{bucket}", "name": span.name, "ts": at}
