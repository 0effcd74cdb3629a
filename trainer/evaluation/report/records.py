"""What a run left behind, read for its report: settings, log, evaluations during training, results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.config import CONFIG
from trainer.evaluation.results import EVALUATION, Results, load_results

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run."""

    name: str
    """Of its folder; with that of the folder around it where two runs would have the same."""
    label: str
    """Name and margin, for a legend."""
    config: Entry
    """Settings, nested as in config.yaml."""
    log: list[Entry]
    """By ascending step, at least one."""
    evaluations: list[Entry]
    """During training, by ascending step; perhaps none."""
    results: Results

    @property
    def distance(self) -> str:
        """ "root" or "squared"."""
        return self.config.get("loss", {}).get("distance", "root")


def read_records(runs: Sequence[Path]) -> list[Record]:
    """Reads runs that were trained and evaluated.

    Raises:
        ValueError: no run, the same one twice, or one without settings, log or evaluation, or with a damaged one.
    """
    if not runs:
        raise ValueError("no run is given; a report needs at least one")
    folders = [run.resolve() for run in runs]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise ValueError(f"{runs[number]} is given twice; each run is reported once")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    return [_record(run, name) for run, name in zip(runs, names, strict=True)]


def _record(run: Path, name: str) -> Record:
    config = _settings(run / CONFIG)
    log = _json_lines(run / "log.jsonl", ("step", "images_seen", "loss", "active_fraction", "d_ap", "d_an"))
    if not log:
        raise ValueError(f"{run / 'log.jsonl'} is missing or holds no step; train with `facescale train` first")
    evaluations = _json_lines(run / "evaluations.jsonl", ("step", "images_seen"))
    results = load_results(run / EVALUATION)
    label = f"{name} ({margin_words(results)})"
    return Record(name=name, label=label, config=config, log=log, evaluations=evaluations, results=results)


def margin_words(results: Results) -> str:
    margins = [row.result.scalars["margin"] for row in results.rows if "margin" in row.result.scalars]
    if not margins:
        return "margin unknown"
    return "soft margin" if margins[0] is None else f"margin {margins[0]:g}"


def _settings(path: Path) -> Entry:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {path.parent} is not the folder of a run")
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a mapping of settings")
    return found


def _json_lines(path: Path, needed: tuple[str, ...]) -> list[Entry]:
    """The objects of a file with one per line, by ascending step; none where there is no file.

    A last line that a kill cut short is passed over. Of two lines for a step, which a resumed run may leave, the later
    one holds.
    """
    if not path.is_file():
        return []
    text = path.read_text()
    lines = text.splitlines()
    by_step: dict[int, Entry] = {}
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
