"""`facescale report RUN [RUN ...]`: a page, tables and pictures of one run or several, from their logs and evaluations."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_shards.progress import progress
from trainer.evaluation.report.figures import draw, save
from trainer.evaluation.report.galleries import GALLERIES, gallery_figure
from trainer.evaluation.report.markdown import results_markdown
from trainer.evaluation.report.page import page_html
from trainer.evaluation.report.plots import Plot
from trainer.evaluation.report.plots_results import cmc_plot, histogram_plot, identities_plot, roc_plot
from trainer.evaluation.report.plots_training import accuracy_plot, health_plot, loss_plot, throughput_plot
from trainer.evaluation.report.projections import PROJECTIONS, projection_plot
from trainer.evaluation.report.records import Record, read_records
from trainer.evaluation.report.tables import PUBLISHED
from trainer.evaluation.results import replaced_folder

PAGE = "report.html"

Maker = Callable[[Sequence[Record]], Plot | None]
MAKERS: tuple[Maker, ...] = (
    loss_plot,
    accuracy_plot,
    health_plot,
    throughput_plot,
    cmc_plot,
    roc_plot,
    histogram_plot,
    identities_plot,
)


def write_report(runs: Path | Sequence[Path], *, out: Path | None = None, pdf: bool = False) -> Path:
    """Writes a folder with report.html, results.md, results.json and every figure as PNG.

    A report written before stays until the new one is whole, and is then replaced.

    Args:
        runs: folders of runs that were trained and evaluated; several are set side by side.
        out: the folder; RUN/report where None. Where it exists it must be a report.
        pdf: every figure as a vector PDF, too.
    Returns:
        the folder of the report.
    Raises:
        ValueError: several runs without `out`, or `out` is something else; or see `read_records`.
    """
    runs = [runs] if isinstance(runs, Path) else list(runs)
    folder = _folder(runs, out)
    records = read_records(runs)
    plots = _plots(records)
    pictures = {plot.name: draw(plot) for plot in plots}
    galleries = {name: figure for name in GALLERIES if (figure := gallery_figure(records, name))}
    with replaced_folder(folder) as partial:
        (partial / "results.json").write_text(json.dumps(_summary(records), indent=1, default=str) + "\n")
        (partial / "results.md").write_text(results_markdown(records, plots, list(galleries)), encoding="utf-8")
        (partial / PAGE).write_text(page_html(records, plots), encoding="utf-8")
        for name, figure in (pictures | galleries).items():
            save(figure, partial / f"{name}.png")
            if pdf:
                save(figure, partial / f"{name}.pdf")
    return folder


def _folder(runs: Sequence[Path], out: Path | None) -> Path:
    if out is None and len(runs) > 1:
        raise ValueError(f"{len(runs)} runs are given and no folder for their report; say --out FOLDER")
    if out is None:
        return runs[0] / "report"
    whole = out.is_dir() and (not any(out.iterdir()) or (out / "results.md").is_file())
    if out.exists() and not whole:
        raise ValueError(f"--out is {out}, which exists and is no report; choose another folder")
    return out


def _plots(records: Sequence[Record]) -> list[Plot]:
    projections = [lambda records, name=name: projection_plot(records, name) for name in PROJECTIONS]
    makers: list[Maker] = [*MAKERS, *projections]
    plots = []
    with progress("report", len(makers), "figures") as advance:
        for make in makers:
            plot = make(records)
            plots += [plot] if plot else []
            advance(1)
    return plots


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    """The results as JSON: of one run its own fields, of several a list of them under `runs`."""
    runs = [
        {
            "run": record.name,
            "settings": record.config,
            "last_step": record.log[-1],
            "rows": [{"set": row.set, "embedder": row.embedder} | row.result.scalars for row in record.results.rows],
        }
        for record in records
    ]
    return (runs[0] if len(runs) == 1 else {"runs": runs}) | {"published": PUBLISHED}
