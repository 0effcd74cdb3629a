"""The original project's checkpoint.pth: written for its network as torchvision builds it, and read from it."""

import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import normalize

from tests.trainer.export.conftest import network, pictures, used
from trainer.cli import main
from trainer.export import huggingface, original
from trainer.model import Embedder

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def theirs(trunk: str = "resnet18", size: int = 8) -> nn.Module:
    """The network of the original project: torchvision's, with a linear layer to the embedding."""
    found = getattr(torchvision.models, trunk)(weights=None)
    found.fc = nn.Linear(found.fc.in_features, size)
    return found.eval()


def embedded(found: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the original project does: scale, normalise, network, L2 norm."""
    with torch.no_grad():
        return normalize(found((images / 255 - MEAN) / STD))


@pytest.mark.parametrize("settings", [{}, {"head": "facenet"}, {"head_batchnorm": False}])
def test_the_written_file_is_their_network(make_run, tmp_path, settings):
    """Also where we have a batch norm behind the linear layer and they have none."""
    run, model = make_run(**settings)
    log = '{"step": 2, "epoch": 0.5, "loss": 0.9}\n{"step": 6, "epoch": 2.75, "loss": 0.25}\n{"step": 8, "epoch": 4, "loss": 0}\n'
    (run / "log.jsonl").write_text(log + '{"step": 9, "ep')
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "original"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint.pth"]
    stored = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert list(stored) == ["epoch", "model_state_dict", "optimizer_state_dict", "loss"]
    assert (stored["epoch"], stored["loss"]) == (2, 0.25)
    their = theirs()
    their.load_state_dict(stored["model_state_dict"])
    torch.optim.AdamW(their.parameters()).load_state_dict(stored["optimizer_state_dict"])
    images = pictures(3, 32)
    torch.testing.assert_close(embedded(their, images), model(images).detach(), rtol=0, atol=1e-5)


def test_folding_by_hand():
    """2 x + 1 normed with mean 3, variance 4 (epsilon aside), scale 6 and shift 5: 6 (2 x + 1 - 3) / 2 + 5 = 6 x - 1."""
    model = network(embedding_size=2)
    model.head.weight.data.fill_(2)
    model.head.bias.data.fill_(1)
    model.head_norm = nn.BatchNorm1d(2, eps=0.0).eval()
    model.head_norm.running_mean.fill_(3)
    model.head_norm.running_var.fill_(4)
    model.head_norm.weight.data.fill_(6)
    model.head_norm.bias.data.fill_(5)
    found = original.folded(model)
    assert found["fc.weight"].unique().tolist() == [6]
    assert found["fc.bias"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("model_state_dict", ""),
        ("model_state_dict", "module.model."),
        ("state_dict", "backbone."),
        (None, ""),
        (None, "module.resnet."),
    ],
)
def test_their_file_becomes_our_network(tmp_path, capsys, key, prefix):
    torch.manual_seed(4)
    their = used(theirs())
    state = {prefix + name: value for name, value in their.state_dict().items() if "num_batches" not in name}
    torch.save(state if key is None else {"epoch": 3, key: state, "loss": 0.5}, tmp_path / "checkpoint.pth")
    words = [str(tmp_path / "checkpoint.pth"), str(tmp_path / "out"), "--image-size", "40"]
    assert main(["import", *words]) == 0
    said = f"resnet18 with 8 dimensions of {words[0]} in {words[1]}; `facescale evaluate` takes it\n"
    assert capsys.readouterr().out == said
    found, config = huggingface.read_exported(tmp_path / "out")
    assert (config.image_size, config.step, config.model.head_batchnorm) == (40, None, False)
    images = pictures(3, 40)
    torch.testing.assert_close(found(images).detach(), embedded(their, images), rtol=0, atol=1e-5)


def test_there_and_back(tmp_path):
    model = network(head_batchnorm=False)
    original.write(model, original.Progress(), tmp_path / "out")
    back = original.read(tmp_path / "out" / "checkpoint.pth", 32)
    assert back.config == model.config
    for name, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("trunk", ["resnet34", "resnet50", "resnet101"])
def test_which_resnet_it_is_is_read_off_the_weights(tmp_path, trunk):
    torch.save({"model_state_dict": theirs(trunk, 16).state_dict()}, tmp_path / "c.pth")
    config = original.read(tmp_path / "c.pth").config
    assert (config.trunk, config.embedding_size) == (trunk, 16)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


CHANGES = {
    "lacks fc.weight": lambda state: without(state, "fc.weight"),
    "is not a resnet18 of torchvision with an embedding of 8: it lacks layer2.0.conv1.weight": (
        lambda state: without(state, "layer2.0.conv1.weight")
    ),
    "it has extra.weight, which the network has not": lambda state: state | {"extra.weight": torch.zeros(1)},
    "it has conv1.weight of shape (64, 1, 7, 7), the network (64, 3, 7, 7)": (
        lambda state: state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    ),
    "it has fc.bias of shape (9,), the network (8,)": lambda state: state | {"fc.bias": torch.zeros(9)},
    "has fc.weight of shape (8,)": lambda state: state | {"fc.weight": torch.zeros(8)},
    "has fc.weight of shape (1, 512): model.embedding_size is 1": (
        lambda state: state | {"fc.weight": torch.zeros(1, 512)}
    ),
    "it has 0 blocks in layer3, and its first tensor is a.weight": lambda _: {"a.weight": torch.zeros(1)},
    "conv1.weight is of type int": lambda state: state | {"conv1.weight": 3},
    "holds no model_state_dict, and is no state dict either": lambda _: [1, 2],
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_does_not_fit_is_named(tmp_path, capsys, message):
    torch.save(CHANGES[message](theirs().state_dict()), tmp_path / "c.pth")
    assert main(["import", str(tmp_path / "c.pth"), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"facescale: {tmp_path}/c.pth")
    assert message in line
    assert not (tmp_path / "out").exists()


class Harm:
    def __reduce__(self):
        return print, ("run",)


def test_a_file_that_is_none(tmp_path, capsys):
    (tmp_path / "objects.pth").write_bytes(pickle.dumps(Harm()))
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"model_state_dict": Harm()}, tmp_path / "harm.pth")
    for name in ("none.pth", "objects.pth", "text.pth", "harm.pth"):
        assert main(["import", str(tmp_path / name), str(tmp_path / "out")]) == 1
        said = capsys.readouterr()
        assert said.out == "", "nothing was run"
        (line,) = said.err.splitlines()
        assert line.startswith(f"facescale: {tmp_path}/{name} "), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trunk": "iresnet18"},
            "export: model.trunk is iresnet18; the original project's checkpoint holds resnet18, ",
        ),
        (
            {"head": "arcface"},
            "export: model.head is arcface; the original project's checkpoint holds heads linear and f",
        ),
    ],
)
def test_networks_that_the_original_has_not(make_run, tmp_path, capsys, settings, message):
    run, _ = make_run(**settings)
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "original"]) == 1
    assert capsys.readouterr().err.startswith(f"facescale: {message}")
    assert not (tmp_path / "out").exists()


def test_import_into_something_that_exists_or_of_no_size(tmp_path, capsys):
    torch.save(theirs().state_dict(), tmp_path / "c.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert main(["import", str(tmp_path / "c.pth"), str(tmp_path / "out")]) == 1
    assert main(["import", str(tmp_path / "c.pth"), str(tmp_path / "new"), "--image-size", "3"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"facescale: {tmp_path}/out exists and is not empty; choose another folder",
        "facescale: --image-size is 3; it must be at least 32 pixels",
    ]
    assert isinstance(original.read(tmp_path / "c.pth"), Embedder)
