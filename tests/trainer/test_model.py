"""The network: unit norm, normalisation inside, weights read from local files and nothing run out of them."""

import math
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from trainer.config import ModelConfig
from trainer.model import Embedder, normalised, parameter_groups, read_state


def noise(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def resnet18() -> dict[str, torch.Tensor]:
    """A state dict of torchvision's resnet18 whose weights are no other's."""
    torch.manual_seed(77)
    return torchvision.models.resnet18(weights=None).state_dict()


def refusal(config: ModelConfig) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        Embedder(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("trunk", "width"), [("resnet18", 512), ("resnet50", 2048)])
def test_embeddings_are_unit_vectors(trunk, width):
    model = Embedder(ModelConfig(trunk=trunk, embedding_size=24)).eval()
    assert model.head.weight.shape == (24, width)
    with torch.inference_mode():
        points = model(noise(3))
    assert points.shape == (3, 24)
    assert points.dtype == torch.float32
    assert points.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert not torch.allclose(points[0], points[1], atol=1e-4)


class Spy(nn.Module):
    """Stands in for the trunk and keeps what it is given."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.pixels = pixels
        return pixels.mean((2, 3)).repeat(1, 171)[:, :512]


def test_colours_change_before_normalisation_by_hand():
    """(0, 128, 255): one picture as it is; one with red and blue swapped, doubled, and cut; one with 51 added."""
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=4)).double().eval()
    model.trunk = spy = Spy()
    pictures = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(3, 3, 2, 5)
    colour = torch.zeros(3, 3, 4)
    colour[0, :, :3] = torch.eye(3)
    colour[1, :, :3] = 2 * torch.eye(3).flip(0)
    colour[2, :, :3], colour[2, :, 3] = torch.eye(3), 51
    model(pictures, colour)
    wanted = torch.tensor([[0, 128 / 255, 1], [1, 1, 0], [0.2, 179 / 255, 1]], dtype=torch.float64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    assert spy.pixels.is_contiguous(memory_format=torch.channels_last)
    for found in spy.pixels.unbind(3):
        assert torch.allclose(found[:, :, 0], (wanted - mean) / std, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("recolours", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_cpu_normalises_as_other_devices_do(monkeypatch, dtype, recolours, layout):
    """By OpenCV, and by the product that everything else takes; also half of each picture, which is not contiguous."""
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (5, 3, 12, 18), dtype=torch.uint8, generator=draw).contiguous(memory_format=layout)
    colour = torch.eye(3, 4).repeat(5, 1, 1) + 0.4 * torch.randn(5, 3, 4, generator=draw)
    colour[:, :, 3] *= 100
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    given = [(images, mean, std, colour if recolours else None)]
    given += [(images[:, :, :, ::2], *given[0][1:]), (images[:0], mean, std, colour[:0] if recolours else None)]
    found = [normalised(*one) for one in given]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for one, by_opencv in zip(given, found, strict=True):
        wanted = normalised(*one)
        assert by_opencv.dtype == wanted.dtype == dtype
        assert by_opencv.is_contiguous(memory_format=torch.channels_last) or not len(by_opencv)
        tolerance = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 0.04}[dtype]
        torch.testing.assert_close(by_opencv, wanted, rtol=0, atol=tolerance)


def spied(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the trunk and the caller get of a picture of the constant colour (0, 128, 255)."""
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=4)).to(dtype).eval()
    model.trunk = Spy()
    picture = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 5)
    return model(picture), model.trunk.pixels


def test_pictures_are_normalised_with_imagenets_constants():
    """By hand: (0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225."""
    points, pixels = spied(torch.float64)
    assert pixels.shape == (1, 3, 2, 5)
    expected = torch.tensor([-2.1179039301, 0.2051820728, 2.6400000000], dtype=torch.float64)
    torch.testing.assert_close(pixels, expected.view(1, 3, 1, 1).expand(1, 3, 2, 5), rtol=0, atol=2e-7)
    assert points.dtype == pixels.dtype == torch.float64


def test_double_makes_the_whole_network_double():
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=4)).double().eval()
    points = model(noise(2))
    assert points.dtype == torch.float64
    assert points.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-15)


def test_under_bf16_the_embedding_is_normalised_in_float32():
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=64)).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        points = model(noise(2))
    assert points.dtype == torch.float32
    assert points.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_constants_are_no_part_of_a_checkpoint():
    names = Embedder(ModelConfig(trunk="resnet18")).state_dict().keys()
    assert {name.split(".")[0] for name in names} - {"head_norm"} == {"trunk", "head"}


def test_batch_norm_of_the_head_standardises_each_dimension_over_the_batch():
    torch.manual_seed(0)
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=4, head_batchnorm=True)).double()
    points = []
    model.head.register_forward_hook(lambda module, given, found: points.append(found.detach()))
    found = model(noise(6)).detach()
    centred = points[0] - points[0].mean(0)
    standard = centred / (centred.square().mean(0) + 1e-5).sqrt()
    torch.testing.assert_close(found, standard / standard.norm(dim=1, keepdim=True), rtol=0, atol=1e-12)


def test_without_batch_norm_of_the_head_a_picture_is_embedded_alone():
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=4, head_batchnorm=False)).double()
    model.trunk.eval()  # the head is still in training mode
    torch.testing.assert_close(model(noise(3))[:1], model(noise(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(tmp_path, resnet18, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(resnet18, path) if suffix == ".pth" else save_file(resnet18, path)
    own = Embedder(ModelConfig(trunk="resnet18", weights=path)).trunk.state_dict()
    assert own.keys() == {name for name in resnet18 if not name.startswith("fc.")}
    assert all(torch.equal(own[name], resnet18[name]) for name in own)


@pytest.mark.parametrize("trunk", ["resnet34", "resnet50"])
def test_weights_of_another_architecture_are_refused(tmp_path, resnet18, trunk):
    path = tmp_path / "weights.pth"
    torch.save(resnet18, path)
    message = refusal(ModelConfig(trunk=trunk, weights=path))
    first = {"resnet34": "layer1.2.conv1.weight", "resnet50": "layer1.0.conv3.weight"}[trunk]
    assert message.startswith(f"model.weights {path} is not a state dict of {trunk}: it lacks {first} (")


def test_weights_that_are_missing_are_refused(tmp_path):
    message = refusal(ModelConfig(trunk="resnet18", weights=tmp_path / "none.pth"))
    assert message.startswith(f"model.weights {tmp_path}/none.pth does not exist")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04broken", b"hello\n"])
def test_files_of_something_else_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = refusal(ModelConfig(trunk="resnet18", weights=tmp_path / name))
    assert message.startswith(f"model.weights {tmp_path / name} cannot be read: ")


def test_a_file_cut_short_is_refused(tmp_path, resnet18):
    path = tmp_path / "weights.pth"
    torch.save(resnet18, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(ModelConfig(trunk="resnet18", weights=path)).startswith(f"model.weights {path} cannot be read: ")


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {"state": {"a": torch.zeros(3)}}, {1: torch.zeros(3)}]
)
def test_tensors_without_names_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    message = refusal(ModelConfig(trunk="resnet18", weights=tmp_path / "w.pth"))
    assert message == f"model.weights {tmp_path}/w.pth is not a state dict: a file of named tensors is needed"


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "inside a state dict", "named safetensors"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, resnet18, how):
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    if how == "torch.save":
        torch.save(RunsCode(made), path)
    elif how == "inside a state dict":
        torch.save(resnet18 | {"conv1.weight": RunsCode(made)}, path)
    else:
        path = path.with_suffix(".safetensors") if how == "named safetensors" else path
        path.write_bytes(pickle.dumps(RunsCode(made), protocol=2))  # the one that torch's reader knows
    message = refusal(ModelConfig(trunk="resnet18", weights=path))
    assert message.startswith(f"model.weights {path} cannot be read: ")
    assert how == "named safetensors" or message.endswith("it holds objects, which could run code, not tensors alone")
    assert not made.exists()


def test_that_pickle_does_run_code_if_it_is_let(tmp_path):
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


def test_read_state_names_the_setting_it_reads_for(tmp_path):
    with pytest.raises(ValueError, match=rf"^checkpoint {tmp_path}/x\.pth does not exist"):
        read_state(tmp_path / "x.pth", "checkpoint")


def test_parameter_groups_hold_every_parameter_once():
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=8))
    decayed, others = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_decayed, in_others = ([names[id(p)] for p in group["params"]] for group in (decayed, others))
    assert sorted(in_decayed + in_others) == sorted(names.values())
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms
    assert set(in_others) == {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")} | {"head.bias"}
    kernels = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum(p.numel() for p in decayed["params"]) == sum(math.prod(module.weight.shape) for module in kernels)


def test_bf16_computes_in_bf16_and_keeps_parameters_and_embeddings_in_float32():
    torch.manual_seed(0)
    model = Embedder(ModelConfig(trunk="resnet18", embedding_size=24), bf16=True).eval()
    inside = []
    model.head.register_forward_hook(lambda *found: inside.append(found[-1].dtype))
    with torch.inference_mode():
        rough = model(noise(4))
        model.bf16 = False
        exact = model(noise(4))
    assert inside == [torch.bfloat16, torch.float32]
    assert rough.dtype == torch.float32
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    torch.testing.assert_close(rough.norm(dim=1), torch.ones(4))
    assert 0.99 < float((rough * exact).sum(1).min()) < 1
