"""A plan as text and as JSON."""

from collections.abc import Sequence
from typing import Any

from trainer.planner.advice import advice
from trainer.planner.capacity import Capacity, Scaled
from trainer.planner.hardware import PRICES_ASSUMED
from trainer.planner.published import Checked
from trainer.planner.rates import FITTED, traffic_share, utilisation

PREDICTED = "Everything about GPUs is a prediction from published data; facescale's authors have measured none of it."
_WIDTHS = (38, 9, 9, 7, 9, 7, 12, 6)
CALIBRATED = "A prediction from what `facescale profile` measured on this machine."


def text(capacity: Capacity) -> str:
    """What `facescale plan` prints."""
    parts = [_headline(capacity), _stages(capacity), _memory(capacity), _dataset(capacity), _scaling(capacity.scaling)]
    lines = ["Advice", *(f"  - {line}" for line in advice(capacity))]
    return "\n\n".join([*parts, "\n".join(lines)])


def _headline(capacity: Capacity) -> str:
    step, cluster, job = capacity.step, capacity.cluster, capacity.workload
    world, on_cpu = cluster.world_size, capacity.rates.shares_cores
    what = (
        f"{world:,} rank(s) on this machine's CPU"
        if on_cpu
        else f"{world:,} x {cluster.gpu.name}, {cluster.nodes:,} node(s)"
    )
    price, epochs = cluster.price_per_gpu_hour, job.epochs
    assumed = f" ({PRICES_ASSUMED})" if cluster.price is None and price else ""
    cost = f"cost: {capacity.epoch_cost:,.2f} an epoch, {epochs * capacity.epoch_cost:,.2f} in all, at {price:g} per GPU and hour"
    measured = capacity.rates.source.startswith("calibrated")
    return "\n".join(
        [
            f"{what}; {job.trunk} at {job.image_size} px in {job.precision}, d = {job.embedding_size}; "
            f"P x K = {job.p:,} x {job.k}, {step.images:,} images for each rank",
            f"{step.images_per_s:,.0f} images/s; limited by: {step.limit}",
            *_cautious(capacity),
            f"epoch: {capacity.dataset.steps_per_epoch:,} steps, {duration(capacity.epoch_s)}; {epochs} epochs: "
            f"{duration(epochs * capacity.epoch_s)}",
            *([cost + assumed] if price else []),
            f"rates: {capacity.rates.source}",
            CALIBRATED if measured else PREDICTED,
        ]
    )


def _cautious(capacity: Capacity) -> list[str]:
    """What it would be on the cautious basis, where that is another figure."""
    if capacity.cautious is None or capacity.cautious.images_per_s > 0.97 * capacity.step.images_per_s:
        return []
    return [
        f"cautious: {capacity.cautious.images_per_s:,.0f} images/s, if memory and not arithmetic limited the GPU that this is "
        "fitted to (--basis cautious)"
    ]


def _stages(capacity: Capacity) -> str:
    step = capacity.step
    aside = "adds up: the same cores" if step.shares_cores else "runs ahead"
    rows = [(name, seconds, aside if name != "read" else "runs ahead") for name, seconds in step.loader.items()]
    rows += [(name, seconds, "critical path") for name, seconds in step.critical.items()]
    lines = [f"  {'stage of a step':24}{'ms':>10}{'alone, images/s':>18}   how"]
    for name, seconds, how in rows:
        alone = f"{step.images * step.world_size / seconds:,.0f}" if seconds > 1e-9 else "-"
        lines.append(f"  {name:24}{1000 * seconds:10,.2f}{alone:>18}   {how}")
    lines.append(f"  {'step':24}{1000 * step.seconds:10,.2f}{step.images_per_s:18,.0f}")
    lines.append(
        f"  all-reduce of the gradients: {1000 * step.all_reduce_s:,.2f} ms, mostly hidden by the backward where it can be"
    )
    return "\n".join(lines)


def _memory(capacity: Capacity) -> str:
    lines = [f"  {'memory of a rank':34}{'MB':>12}"]
    lines += [f"  {name:34}{size / 1e6:12,.1f}" for name, size in capacity.memory.items()]
    lines.append(f"  {'peak':34}{capacity.memory_bytes / 1e6:12,.1f} of {capacity.available_bytes / 1e6:,.0f} usable")
    if capacity.fits:
        lines.append(f"  fits; the largest --p that would is {capacity.largest_p:,}")
    else:
        most = f"the largest --p that would is {capacity.largest_p:,}" if capacity.largest_p else "no --p would"
        lines.append(f"  DOES NOT FIT; {most}")
    return "\n".join(lines)


def _dataset(capacity: Capacity) -> str:
    data, job = capacity.dataset, capacity.workload
    how = "from the manifest" if data.exact else "estimated"
    return (
        f"  data, {how}: {job.images:,} images of {job.identities:,} identities; {data.shards:,} shards, "
        f"{data.tar_bytes / 1e9:,.2f} GB; index {data.index_bytes:,} bytes, identities {data.identities_bytes:,} bytes"
    )


def _scaling(rows: Sequence[Scaled]) -> str:
    what = "ranks" if rows[0].weak.shares_cores else "GPUs"
    lines = [f"  {what:>6}{'weak: images/s':>18}{'efficiency':>12}{'strong: images/s':>20}{'efficiency':>12}"]
    for row in rows:
        strong = f"{'-':>20}{'-':>12}"
        if row.strong is not None:
            strong = f"{row.strong.images_per_s:20,.0f}{row.strong_efficiency:12.1%}"
        lines.append(f"  {row.gpus:6,}{row.weak.images_per_s:18,.0f}{row.weak_efficiency:12.1%}{strong}")
    return "\n".join([*lines, "  weak: the same batch for each; strong: P x K shared (- where it cannot be)"])


def published(rows: Sequence[Checked]) -> str:
    """Predictions beside what others published, and their errors."""
    shares = ", ".join(f"{family} {utilisation(family):.1%} or {traffic_share(family):.0%}" for family in FITTED)
    heads = ("published, images/s", "", "predicted", "error", "cautious", "error", "how", "source")
    marks = ("-", ":", ":", ":", ":", ":", "-", "-")
    lines = ["| " + " | ".join(f"{head:{width}}" for head, width in zip(heads, _WIDTHS, strict=True)) + " |"]
    lines.append("|" + "|".join("-" * (width + 1) + mark for width, mark in zip(_WIDTHS, marks, strict=True)) + "|")
    for row in rows:
        how = ("fitted" if row.fitted else "predicted") + ("" if row.point.certain else ", ?")
        note = f" ({row.point.note})" if row.point.note else ""
        lines.append(
            f"| {row.point.name:38} | {row.point.images_per_s:9,.0f} | {row.predicted:9,.0f} | {row.error:+7.1%} | "
            f"{row.cautious:9,.0f} | {row.cautious_error:+7.1%} | {how:12} | "
            f"{row.point.source}{note} |"
        )
    errors = [abs(row.error) for row in rows if not row.fitted]
    return "\n".join(
        [
            *lines,
            "",
            f"Of the {len(errors)} predicted: {sum(errors) / len(errors):.1%} off on average, {max(errors):.1%} at most. Fitted "
            f"shares of the peak FLOP/s, or of the bandwidth (cautious): {shares}.",
            "?: the published figure was written down from memory or second hand, and not read again at its source.",
        ]
    )


def as_json(capacity: Capacity, checks: Sequence[Checked] = ()) -> dict[str, Any]:
    """Everything that `text` says, in SI units."""
    step, data = capacity.step, capacity.dataset
    return {
        "what": CALIBRATED if capacity.rates.source.startswith("calibrated") else PREDICTED,
        "rates": capacity.rates.source,
        "gpu": capacity.cluster.gpu.name,
        "gpus": capacity.cluster.world_size,
        "nodes": capacity.cluster.nodes,
        "images_per_rank": step.images,
        "images_per_s": step.images_per_s,
        "cautious_images_per_s": capacity.cautious.images_per_s if capacity.cautious else None,
        "limit": step.limit,
        "step_s": step.seconds,
        "stages_s": {"loader": step.loader, "critical_path": step.critical},
        "all_reduce_total_s": step.all_reduce_s,
        "steps_per_epoch": data.steps_per_epoch,
        "epoch_s": capacity.epoch_s,
        "epoch_cost": capacity.epoch_cost,
        "price_per_gpu_hour": capacity.cluster.price_per_gpu_hour,
        "price_assumed": capacity.cluster.price is None,
        "memory_bytes": capacity.memory,
        "peak_memory_bytes": capacity.memory_bytes,
        "available_memory_bytes": capacity.available_bytes,
        "fits": capacity.fits,
        "largest_p": capacity.largest_p,
        "shards": data.shards,
        "tar_bytes": data.tar_bytes,
        "index_bytes": data.index_bytes,
        "identities_bytes": data.identities_bytes,
        "dataset_exact": data.exact,
        "scaling": [_scaled(row) for row in capacity.scaling],
        "advice": advice(capacity),
        "published": [_checked(row) for row in checks],
    }


def _scaled(row: Scaled) -> dict[str, Any]:
    return {
        "gpus": row.gpus,
        "weak_images_per_s": row.weak.images_per_s,
        "weak_efficiency": row.weak_efficiency,
        "strong_images_per_s": row.strong.images_per_s if row.strong else None,
        "strong_efficiency": row.strong_efficiency,
    }


def _checked(row: Checked) -> dict[str, Any]:
    point = row.point
    return {
        "name": point.name,
        "published_images_per_s": point.images_per_s,
        "predicted_images_per_s": row.predicted,
        "error": row.error,
        "cautious_images_per_s": row.cautious,
        "cautious_error": row.cautious_error,
        "fitted": row.fitted,
        "certain": point.certain,
        "source": point.source,
        "note": point.note,
    }


def duration(seconds: float) -> str:
    """With the two largest units that it takes."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
