"""Settings: YAML there and back, what is refused and in which words, command line over file."""

import dataclasses
import io
import os
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from data_shards.augment import AugmentConfig
from trainer.config import LossConfig, ModelConfig, RunConfig, TrainConfig, UsageError, load, parse, save


def another(kind: Any, value: Any) -> Any:
    """A value of a setting of this type that is allowed and is not `value`."""
    members = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return next(member for member in members if member != value)
    if value is None:
        return {int: 3, float: 0.25, Path: Path("weights.pth")}[members[0]]
    if isinstance(value, bool | Path):
        return not value if isinstance(value, bool) else Path("some where/shärds")
    if isinstance(value, str):
        return "timm:any" if value == ModelConfig.trunk else "http://host/some where/shärds"
    if dataclasses.is_dataclass(kind):
        return all_other(kind)
    if isinstance(value, tuple):
        if members[1:] == (...,):
            return typing.get_args(members[0])[::-1]
        return tuple(item / 2 for item in value)
    return value + 1 if isinstance(value, int) else value / 2 or 0.5


def all_other(kind: type) -> Any:
    """Settings of which none is the default."""
    hints, usual = typing.get_type_hints(kind), kind()
    names = [
        field.name for field in dataclasses.fields(kind) if field.name != "candidates"
    ]  # own_rank: neither memory nor softmax
    return kind(**{name: another(hints[name], getattr(usual, name)) for name in names})


UNUSUAL = TrainConfig(**{name: all_other(kind) for name, kind in typing.get_type_hints(TrainConfig).items()})


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def refusal(call, *args) -> str:
    """The one line with which `call` refuses."""
    with pytest.raises(UsageError) as refused:
        call(*args)
    message = str(refused.value)
    assert message == " ".join(message.split())
    assert not set(message) & set("│╭╮╰╯─")
    return message


@pytest.mark.parametrize("config", [TrainConfig(), UNUSUAL], ids=["defaults", "unusual"])
def test_saved_settings_load_equal(tmp_path, config):
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_the_unusual_settings_are_all_unusual():
    """So that the round trip above would notice a setting that is not read or not written."""
    for section in dataclasses.fields(TrainConfig):
        unusual, usual = getattr(UNUSUAL, section.name), getattr(TrainConfig(), section.name)
        for setting in dataclasses.fields(unusual):
            if setting.name != "candidates":  # see all_other
                assert getattr(unusual, setting.name) != getattr(usual, setting.name), (section.name, setting.name)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "run: {}"])
def test_what_a_file_does_not_say_is_the_default(tmp_path, text):
    assert load(written(tmp_path, text)) == TrainConfig()


def test_values_get_the_type_of_their_setting(tmp_path):
    text = """
      optimizer: {learning_rate: 1e-3, weight_decay: 1}
      augment: {crop_area: [5e-1, 1], greyscale: 0}
      model: {weights: null}
      run: {steps: null, folder: runs/x}
    """
    config = load(written(tmp_path, text))
    assert config.optimizer.learning_rate == 0.001
    assert config.augment.crop_area == (0.5, 1.0)
    floats = [config.optimizer.learning_rate, config.optimizer.weight_decay, *config.augment.crop_area]
    assert {type(value) for value in floats} == {float}
    assert (config.model.weights, config.run.steps, config.run.folder) == (None, None, Path("runs/x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "modle: {}",
            "unknown key 'modle'; allowed are data, plan, augment, model, loss, softmax, guard, optimizer, run",
        ),
        ("model: {trnk: resnet18}", "unknown key 'model.trnk'; allowed are trunk, head, "),
        ("run: {7: 7}", "unknown key 'run.7'; allowed are folder, steps"),
        ("null: {}", "unknown key 'None'"),
        ("- run", "the file is ['run']; a mapping of settings is needed"),
        ("frog", "the file is 'frog'; a mapping of settings is needed"),
        ("run: 5", "run is 5; a mapping of settings is needed"),
        ("run:", "run is None; a mapping of settings is needed"),
    ],
)
def test_unknown_keys_and_other_shapes_are_named(tmp_path, text, message):
    path = written(tmp_path, text)
    assert refusal(load, path).startswith(f"config file {path}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {steps: '5'}", "run.steps is '5'; allowed is int"),
        ("run: {steps: 5.0}", "run.steps is 5.0; allowed is int"),
        ("run: {epochs: null}", "run.epochs is None; allowed is int"),
        ("run: {epochs: true}", "run.epochs is True; allowed is int"),
        ("run: {resume: 1}", "run.resume is 1; allowed is bool"),
        ("run: {resume: 'yes'}", "run.resume is 'yes'; allowed is bool"),
        ("run: {folder: 5}", "run.folder is 5; allowed is Path"),
        ("run: {folder: 2024-01-02}", "run.folder is datetime.date(2024, 1, 2); allowed is Path"),
        ("run: {precision: fp64}", "run.precision is 'fp64'; allowed is auto or bf16 or fp32"),
        ("model: {trunk: [resnet18]}", "model.trunk is ['resnet18']; allowed is str"),
        ("model: {weights: [a]}", "model.weights is ['a']; allowed is Path"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate is 'fast'; allowed is float"),
        ("optimizer: {learning_rate: true}", "optimizer.learning_rate is True; allowed is float"),
        ("optimizer: {learning_rate: 1" + "0" * 400 + "}", "optimizer.learning_rate is 1000"),
        ("augment: {crop_area: 0.5}", "augment.crop_area is 0.5; allowed is a list of 2 numbers"),
        ("augment: {crop_area: [0.5]}", "augment.crop_area is [0.5]; allowed is a list of 2 numbers"),
        ("augment: {crop_area: [0.5, x]}", "augment.crop_area is 'x'; allowed is float"),
    ],
)
def test_wrong_types_are_named(tmp_path, text, message):
    path = written(tmp_path, text)
    assert refusal(load, path).startswith(f"config file {path}: {message}")


OUT_OF_RANGE = [
    ("data.image_size", "15", "16 to 1024"),
    ("data.image_size", "1025", "16 to 1024"),
    ("data.decode_threads", "-1", "0 (automatic) or more"),
    ("plan.identities_per_batch", "1", "at least 2"),
    ("plan.images_per_identity", "1", "at least 2"),
    ("augment.mirror", "1.5", "[0, 1]"),
    ("augment.greyscale", "-0.5", "[0, 1]"),
    ("augment.contrast", "1.0", "[0, 1)"),
    ("model.embedding_size", "1", "2 to 4096"),
    ("model.embedding_size", "4097", "2 to 4096"),
    ("loss.margin", "0.0", "above 0 and at most 4"),
    ("loss.margin", "4.5", "above 0 and at most 4"),
    ("loss.margin", "nan", "above 0 and at most 4"),
    ("loss.sharpness", "0.0", "above 0 and at most 1000"),
    ("loss.sharpness", "1001.0", "above 0 and at most 1000"),
    ("loss.sharpness", "nan", "above 0 and at most 1000"),
    ("optimizer.learning_rate", "0.0", "above 0"),
    ("optimizer.learning_rate", "nan", "above 0"),
    ("optimizer.learning_rate", "inf", "above 0 and finite"),
    ("optimizer.warmup_steps", "-1", "at least 0"),
    ("optimizer.weight_decay", "-0.5", "at least 0"),
    ("optimizer.weight_decay", "nan", "at least 0"),
    ("optimizer.momentum", "1.0", "[0, 1)"),
    ("optimizer.momentum", "-0.5", "[0, 1)"),
    ("run.steps", "0", "at least 1, or None"),
    ("run.epochs", "0", "at least 1"),
    ("run.log_every", "0", "at least 1"),
    ("run.evaluate_images", "0", "at least 1"),
    ("run.evaluate_every", "-1", "at least 0"),
    ("run.checkpoint_every", "0", "at least 1"),
    ("run.keep_checkpoints", "0", "at least 1"),
    ("run.seed", "-1", "0 to 4294967295"),
    ("run.seed", "4294967296", "0 to 4294967295"),
]


@pytest.mark.parametrize(("setting", "value", "allowed"), OUT_OF_RANGE)
def test_out_of_range_by_file_and_by_option(tmp_path, setting, value, allowed):
    section, name = setting.split(".")
    text = {"nan": ".nan", "inf": ".inf"}.get(value, value)
    path = written(tmp_path, f"{section}: {{{name}: {text}}}")
    by_file = refusal(load, path)
    assert f"{setting} is {value};" in by_file
    assert by_file.endswith(allowed) or allowed in by_file
    by_option = refusal(parse, [f"--{section}.{name.replace('_', '-')}", value])
    assert f"{setting} is {value};" in by_option
    assert allowed in by_option


@pytest.mark.parametrize(("low", "high"), [("0.0", "0.5"), ("0.9", "0.5"), ("0.5", "1.5"), ("nan", "nan")])
def test_ranges_of_the_crop(low, high):
    assert f"augment.crop_area is {low} {high}; allowed is" in refusal(parse, ["--augment.crop-area", low, high])


@pytest.mark.parametrize(
    "content",
    [b"run: [", b"a: b: c", b"\xff\xfe\x00run", b"run: \x00", b"run: {folder: 2024-13-45}", b"[" * 5000, b"{[1]: 2}"],
    ids=["open", "colons", "bytes", "nul", "date", "deep", "key"],
)
def test_a_file_that_is_not_yaml_is_named(tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    assert refusal(load, path).startswith(f"config file {path} is not YAML: ")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, tag):
    path = written(tmp_path, f"run: {tag} ['{tmp_path / 'made'}']")
    assert "could not determine a constructor for the tag" in refusal(load, path)
    assert os.listdir(tmp_path) == ["settings.yaml"]


@pytest.mark.parametrize("made", [False, True])
def test_a_file_that_is_missing_or_a_folder_is_named(tmp_path, made):
    path = tmp_path / "settings.yaml"
    if made:
        path.mkdir()
    assert refusal(parse, ["--config", str(path)]) == f"config file {path} does not exist"


def test_options_win_over_the_file_which_wins_over_the_defaults(tmp_path):
    path = written(tmp_path, "run: {steps: 7, seed: 3}\naugment: {crop_area: [0.1, 0.2]}\nmodel: {weights: a.pth}")
    options = ["--run.steps", "8", "--model.trunk", "resnet18", "--augment.crop-aspect", "0.5", "2"]
    expected = TrainConfig(
        run=RunConfig(steps=8, seed=3),
        augment=AugmentConfig(crop_area=(0.1, 0.2), crop_aspect=(0.5, 2.0)),
        model=ModelConfig(trunk="resnet18", weights=Path("a.pth")),
    )
    assert parse(["--config", str(path), *options]) == expected
    assert parse([*options, "--config", str(path)]) == expected
    assert parse([*options[:2], f"--config={path}", *options[2:]]) == expected
    assert parse(["--config", str(path), "--run.steps", "None"]).run.steps is None


def test_without_arguments_the_defaults_hold():
    assert parse([]) == TrainConfig()


def test_arguments_are_left_as_they_are(tmp_path):
    args = ["--config", str(written(tmp_path, ""))]
    parse(args)
    assert args[0] == "--config"
    assert len(args) == 2


@pytest.fixture(params=["utf-8", "UTF-8", "ascii"])
def encoding(request, monkeypatch):
    """tyro frames its messages by the encoding of stdout."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=request.param))


@pytest.mark.usefixtures("encoding")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--run.stepz", "3"], "Unrecognized options: --run.stepz, 3"),
        (["frog"], "Unrecognized options: frog"),
        (["--model.trunk", "vgg"], "Error parsing model: model.trunk is 'vgg'; allowed are resnet18, resnet34, "),
        (["--model.head", "big"], "invalid choice 'big' for argument '--model.head'. Expected one of ('auto',"),
        (["--run.epochs", "many"], "Error parsing --run.epochs: invalid literal for int() with base 10: 'many'"),
        (["--run.steps", "-1"], "Error parsing run: run.steps is -1; it must be at least 1, or None"),
        (["--augment.crop-area", "0.5"], "Missing value for argument '--augment.crop-area'. Expected 2 values."),
        (["--run.folder"], "Missing value for argument '--run.folder'. Expected 1 values."),
        (["--config"], "--config needs a file"),
    ],
)
def test_usage_errors_are_one_line_however_they_are_framed(args, message):
    assert refusal(parse, args).startswith(message)


@pytest.mark.parametrize("columns", ["20", "40", "300"])
def test_usage_errors_do_not_lose_words_on_a_narrow_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    said = refusal(parse, ["--run.seed", "-1"])
    assert said == "Error parsing run: run.seed is -1; allowed is 0 to 4294967295"


def test_help_lists_every_setting_and_exits_0(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], prog="facescale train")
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "usage: facescale train" in said
    assert "--config FILE" in said
    for section in dataclasses.fields(TrainConfig):
        for setting in dataclasses.fields(getattr(TrainConfig(), section.name)):
            assert f"--{section.name}.{setting.name}".replace("_", "-") in said


def test_what_a_loss_says_of_itself():
    assert LossConfig(kind="margin", margin=0.3).effective_margin == 0.3
    assert LossConfig(kind="smooth", margin=0.3).effective_margin == 0.3
    assert LossConfig(kind="soft_margin", margin=0.3).effective_margin is None
    assert (LossConfig(distance="squared").squared, LossConfig(distance="root").squared) == (True, False)


def test_trackers_come_from_both_and_are_named_once(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("run: {trackers: [wandb, mlflow]}\n")
    assert parse(["--config", str(file)]).run.trackers == ("wandb", "mlflow")
    assert parse(["--config", str(file), "--run.trackers", "trackio"]).run.trackers == ("trackio",)
    assert parse(["--run.trackers"]).run.trackers == ()
    with pytest.raises(UsageError, match=r"run\.trackers is wandb wandb; each may be named once"):
        parse(["--run.trackers", "wandb", "wandb"])
    file.write_text("run: {trackers: [comet]}\n")
    with pytest.raises(UsageError, match=r"run\.trackers is 'comet'; allowed is wandb or mlflow or trackio"):
        load(file)
    file.write_text("run: {trackers: wandb}\n")
    with pytest.raises(UsageError, match=r"run\.trackers is 'wandb'; allowed is a list"):
        load(file)
    save(parse(["--run.trackers", "wandb"]), file)
    assert load(file).run.trackers == ("wandb",)
