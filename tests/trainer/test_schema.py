"""The JSON schema of settings files against `trainer.config.load`, and `facescale config`."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.trainer.test_config import UNUSUAL
from trainer.cli import main
from trainer.config import TrainConfig, UsageError, changed, dumped, load, parse
from trainer.schema import SCHEMA, docstrings, schema, sections

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    found = schema()
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def test_the_one_in_the_repository_is_up_to_date():
    assert json.loads((ROOT / SCHEMA).read_text()) == schema(), f"facescale config --schema > {SCHEMA}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid_and_name_it(validator, path):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []
    assert "# yaml-language-server: $schema=schema.json" in path.read_text().splitlines()


@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL], ids=["default", "unusual"])
def test_whatever_is_saved_is_valid(validator, config):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(dumped(config)))] == []


def test_every_setting_is_described():
    for name, kind in [("", TrainConfig), *sections(TrainConfig)]:
        hints = {field.name for field in dataclasses.fields(kind)} - {
            below.split(".")[-1] for below, _ in sections(kind)
        }
        assert hints <= docstrings(kind).keys(), name


@pytest.mark.parametrize(
    "text",
    [
        "data: {image_sise: 64}",
        "dta: {}",
        "data: 3",
        "run: {epochs: 2.5}",
        "run: {epochs: '3'}",
        "run: {compile: 1}",
        "run: {precision: fp16}",
        "run: {trackers: [comet]}",
        "run: {trackers: wandb}",
        "augment: {crop_area: [0.5]}",
        "augment: {crop_area: [0.5, a]}",
        "optimizer: {learning_rate: fast}",
        "model: {dropout: high}",
        "data: {stream: {cache_gb: much}}",
    ],
)
def test_what_it_refuses_is_refused_by_training(validator, text, tmp_path):
    assert not validator.is_valid(yaml.safe_load(text))
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        load(path)


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: {learning_rate: 1e-3}",  # text to YAML 1.1
        "optimizer: {learning_rate: 1}",
        "model: {dropout: null, weights: some/file.pth}",
        "run: {steps: null, trackers: []}",
        "{}",
    ],
)
def test_what_training_takes_is_valid(validator, text, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    load(path)
    assert validator.is_valid(yaml.safe_load(text))


def test_changed_is_what_differs_and_makes_the_same_settings(tmp_path):
    config = parse(["--data.stream.timeout-s", "7", "--run.trackers", "wandb", "--model.trunk", "resnet18"])
    assert changed(config) == {
        "data": {"stream": {"timeout_s": 7.0}},
        "model": {"trunk": "resnet18"},
        "run": {"trackers": ("wandb",)},
    }
    assert changed(TrainConfig()) == {}
    path = tmp_path / "settings.yaml"
    for settings in (config, UNUSUAL, TrainConfig()):
        path.write_text(dumped(changed(settings)))
        assert load(path) == settings


def test_the_command_prints_what_training_would_have(tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("run: {steps: 7}\n")
    given = ["--config", str(file), "--model.trunk", "resnet18"]
    assert main(["config", *given]) == 0
    whole = capsys.readouterr().out
    assert main(["config", *given, "--diff"]) == 0
    short = capsys.readouterr().out
    assert short == "model:\n  trunk: resnet18\nrun:\n  steps: 7\n"
    for text in (whole, short):
        file.write_text(text)
        assert load(file) == parse(["--run.steps", "7", "--model.trunk", "resnet18"])
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run.steps", "none"], "steps"),
        (["--run.steps", "0"], "run.steps is 0; it must be at least 1, or None"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["--diff", "--schema"], "not allowed with argument"),
        (["--schema", "--run.steps", "3"], "--schema takes no settings, found --run.steps"),
    ],
)
def test_what_is_wrong_is_one_line(words, said, capsys):
    assert main(["config", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert len(told.splitlines()) <= 2
