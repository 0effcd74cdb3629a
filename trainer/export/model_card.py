"""README.md of an exported network: a model card with the Hub's YAML front matter."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trainer.export.config import ExportedConfig

TAGS = ("face-recognition", "face-verification", "metric-learning", "image-feature-extraction")
_METRICS = {
    "rank1": "Rank-1",
    "rank5": "Rank-5",
    "knn": "kNN",
    "verification_accuracy": "verification accuracy, 10 folds",
    "triplet_loss": "triplet loss",
}


def model_card(
    name: str,
    config: ExportedConfig,
    results: Mapping[str, Mapping[str, float]],
    settings: Mapping[str, Any],
) -> str:
    """Markdown with YAML front matter.

    Args:
        name: of the network.
        results: headline figures by set, see `SetResult.headline`; rates in [0, 1].
        settings: sections and settings of training that are shown.
    """
    front = yaml.safe_dump(_front(name, results), sort_keys=False, allow_unicode=True)
    parts = [f"# {name}", _about(config), _use(config), _evaluation(config, results), _training(settings), _LIMITS]
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _front(name: str, results: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "library_name": "facescale",
        "pipeline_tag": "image-feature-extraction",
        "tags": list(TAGS),
    }
    if results:
        found["metrics"] = sorted({metric for figures in results.values() for metric in figures})
        found["model-index"] = [{"name": name, "results": [_result(of, figures) for of, figures in results.items()]}]
    return found


def _result(of: str, figures: Mapping[str, float]) -> dict[str, Any]:
    named = [{"type": key, "name": _METRICS.get(key, key), "value": float(value)} for key, value in figures.items()]
    task = {"type": "image-feature-extraction", "name": "face identification and verification"}
    return {"task": task, "dataset": {"name": of, "type": "webdataset"}, "metrics": named}


def _about(config: ExportedConfig) -> str:
    model, side = config.model, config.image_size
    trained = "" if config.step is None else f", after {config.step:,} steps of training"
    return (
        f"A face-embedding network: pictures of faces to points on the unit sphere, where small distances mean one person. Trunk "
        f"`{model.trunk}`, head `{model.head_kind}`, {model.embedding_size} dimensions{trained}. Made by facescale.\n\n"
        f"- **Input**: RGB, {side} x {side} pixels, values in [0, 255]; mean {list(config.mean)} and standard deviation "
        f"{list(config.std)} (of values in [0, 1]) are applied inside. Faces cut out as in training.\n"
        f"- **Output**: {model.embedding_size} numbers of L2 norm 1. The distance is L2, "
        + ("squared, in [0, 4]." if config.distance == "squared" else "in [0, 2].")
    )


def _use(config: ExportedConfig) -> str:
    return (
        "## Use\n\n```python\nfrom pathlib import Path\n\nimport torch\n"
        "from trainer.export.huggingface import read_exported\n\n"
        'model, config = read_exported(Path("."))  # this folder\n'
        f"images = torch.zeros(2, 3, {config.image_size}, {config.image_size}, dtype=torch.uint8)\n"
        f"embeddings = model(images)  # (2, {config.model.embedding_size})\n```\n\n"
        "`facescale evaluate FOLDER --shards SHARDS` judges it on other pictures."
    )


def _evaluation(config: ExportedConfig, results: Mapping[str, Mapping[str, float]]) -> str:
    if not results:
        return "## Evaluation\n\nNone was made of these weights."
    columns = list(dict.fromkeys(metric for figures in results.values() for metric in figures))
    lines = ["| set | " + " | ".join(_METRICS.get(column, column) for column in columns) + " |"]
    lines += ["| --- |" + " ---: |" * len(columns)]
    lines += [
        f"| {of} | " + " | ".join(_cell(figures, key) for key in columns) + " |" for of, figures in results.items()
    ]
    text = "## Evaluation\n\n" + "\n".join(lines)
    if config.thresholds:
        told = ", ".join(f"{name} {value:.4f}" for name, value in config.thresholds.items())
        text += f"\n\nThresholds, L2 distances in [0, 2], measured on those pictures and good for such pictures alone: {told}."
    return text


def _cell(figures: Mapping[str, float], key: str) -> str:
    if key not in figures:
        return ""
    return f"{figures[key]:.4f}" if key == "triplet_loss" else f"{100 * figures[key]:.2f} %"


def _training(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = [
        f"| `{section}.{key}` | `{json.dumps(value)}` |"
        for section, of in settings.items()
        for key, value in of.items()
    ]
    return "## Training\n\n| setting | value |\n| --- | --- |\n" + "\n".join(rows)


_LIMITS = """## Intended use and limits

For research on face embeddings, and for comparing pictures of people who agreed to it. Not for finding out who strangers are, and
not for decisions about people without a human who checks them.

- Embeddings of faces are biometric data: in many places the law asks for consent and a purpose before they are made or kept.
- Error rates differ between groups of people, ages, cameras and light. Measure them on pictures like yours; set thresholds there.
- Nothing here notices a printed photograph, a mask or a made-up face.
- The pictures of training have terms of their own; look them up before you pass the network on, and state a licence here."""


def shown_settings(sections: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of nested settings the sections with these names, without paths."""
    return {
        section: {key: value for key, value in sections[section].items() if isinstance(value, str | int | float | None)}
        for section in names
    }
