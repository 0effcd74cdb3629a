"""`facescale report RUN`: tables and pictures of one run, from its log and its evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from data_shards.progress import progress
from trainer.config import CONFIG
from trainer.evaluation.figures import accuracy_figure, cmc_figure, loss_figure, roc_figure, tsne_figure
from trainer.evaluation.results import EVALUATION, load_results, replaced_folder
from trainer.evaluation.tables import PUBLISHED, results_markdown


def write_report(run: Path) -> Path:
    """Writes RUN/report with results.json, results.md, loss.png, accuracy.png, roc.png, cmc.png and tsne.png.

    A report written before stays until the new one is whole, and is then replaced.

    Args:
        run: folder of a run that was trained and evaluated.
    Returns:
        the folder of the report.
    Raises:
        ValueError: the run has no settings, no log or no evaluation, or one of them is damaged.
    """
    config = _settings(run / CONFIG)
    log = _json_lines(run / "log.jsonl", ("step", "images_seen", "loss", "active_fraction", "d_ap", "d_an"))
    if not log:
        raise ValueError(f"{run / 'log.jsonl'} is missing or holds no step; train with `facescale train` first")
    evaluations = _json_lines(run / "evaluations.jsonl", ("step", "images_seen"))
    found = load_results(run / EVALUATION)
    rows = found.rows
    listed = [{"set": row.set, "embedder": row.embedder} | row.result.scalars for row in rows]
    name = run.resolve().name
    summary = {"run": name, "settings": config, "last_step": log[-1], "rows": listed, "published": PUBLISHED}
    distance = config.get("loss", {}).get("distance", "root")
    makers: dict[str, Callable[[], Figure]] = {
        "loss": lambda: loss_figure(log, evaluations, distance),
        "accuracy": lambda: accuracy_figure(log, evaluations, rows),
        "roc": lambda: roc_figure(rows),
        "cmc": lambda: cmc_figure(rows),
        "tsne": lambda: tsne_figure(found.embeddings.numpy(), found.identities.numpy(), rows[0].set),
    }
    pictures: dict[str, Figure] = {}
    with progress("report", len(makers), "pictures") as advance:
        for picture, make in makers.items():
            pictures[picture] = make()
            advance(1)
    with replaced_folder(run / "report") as folder:
        (folder / "results.json").write_text(json.dumps(summary, indent=1, default=str) + "\n")
        (folder / "results.md").write_text(results_markdown(name, config, log, rows), encoding="utf-8")
        for picture, figure in pictures.items():
            figure.savefig(folder / f"{picture}.png")
    return run / "report"


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {path.parent} is not the folder of a run")
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a mapping of settings")
    return found


def _json_lines(path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The objects of a file with one per line, by ascending step; none where there is no file.

    A last line that a kill cut short is passed over. Of two lines for a step, which a resumed run may leave, the later
    one holds.
    """
    if not path.is_file():
        return []
    text = path.read_text()
    lines = text.splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            by_step[entry["step"]] = {name: entry[name] for name in needed} | entry
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            reason = f"no {error}" if isinstance(error, KeyError) else "not a JSON object"
            raise ValueError(f"{path}, line {number}: {reason}; the log is damaged") from None
    return [by_step[step] for step in sorted(by_step)]
