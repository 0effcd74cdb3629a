"""results.md: the report as Markdown."""

from collections.abc import Sequence

from trainer.evaluation.report.notes import Terms, headlines, left_out, protocol_notes, training
from trainer.evaluation.report.plots import Plot
from trainer.evaluation.report.records import Record
from trainer.evaluation.report.tables import bullets, full_table, points_table, refusals, settings_table, summary_table


def results_markdown(records: Sequence[Record], plots: Sequence[Plot], galleries: Sequence[str] = ()) -> str:
    """The whole of results.md.

    Args:
        records: runs, in the order in which they are listed.
        plots: each drawn as NAME.png beside it.
        galleries: names of further pictures beside it, without their ending.
    """
    title = " and ".join(f"`{record.name}`" for record in records)
    told = [training(record) if len(records) == 1 else f"**{record.name}**: {training(record)}" for record in records]
    parts = [f"# Results of {title}", "\n\n".join(told), summary_table(records).markdown(), _terms(headlines(records))]
    parts += ["## Curves", *(f"![{plot.title}]({plot.name}.png)\n\n{plot.caption}" for plot in plots)]
    if galleries:
        parts += ["## Hardest pictures", *(f"![{name.replace('_', ' ')}]({name}.png)" for name in galleries)]
    points = [points_table(records, name) for name in ("tar_at_far", "tpir_at_fpir")]
    parts += ["## Operating points" * any(points), *(table.markdown() for table in points if table)]
    parts += ["## Full results", full_table(records).markdown()]
    reasons = refusals(records) + left_out(records)
    parts += ["Not measured:", bullets(reasons)] if reasons else []
    parts += ["## How it was measured", _terms(protocol_notes(records))]
    settings = settings_table(records)
    parts += ["## Settings", settings.markdown()] if settings.body else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _terms(terms: Terms) -> str:
    return bullets(f"**{name}**: {text}" for name, text in terms)
