"""ONNX and torch.export: the same embeddings as the network, in any batch size, also where facescale is not."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.trainer.export.conftest import network, pictures
from trainer.cli import main
from trainer.export import onnx as onnx_format
from trainer.export import torch_export
from trainer.export.config import ExportedConfig
from trainer.export.network import Exported

TRUNKS = [
    ("resnet18", 40, {}),
    ("iresnet18", 32, {}),
    ("timm:mobilenetv3_small_050", 32, {"head": "facenet"}),
]


def exported(format_, make_run, tmp_path, size, **settings):
    run, model = make_run(size, **settings)
    assert main(["export", str(run), str(tmp_path / "out"), "--format", format_]) == 0
    return tmp_path / "out", model.eval()


def says_what_it_is(out, trunk, size):
    assert [path.name for path in out.iterdir()] == ["model.onnx"]
    stored = onnx.load(out / "model.onnx")
    onnx.checker.check_model(stored)
    assert {entry.domain: entry.version for entry in stored.opset_import}[""] == onnx_format.OPSET
    (entry,) = [entry for entry in stored.metadata_props if entry.key == "facescale"]
    about = json.loads(entry.value)
    assert (about["model"]["trunk"], about["image_size"], about["step"]) == (trunk, size, 7)
    assert about["input"].startswith("RGB")


@pytest.mark.parametrize(("trunk", "size", "settings"), TRUNKS)
def test_onnx_gives_the_embeddings_of_pytorch(make_run, tmp_path, capfd, trunk, size, settings):
    out, model = exported("onnx", make_run, tmp_path, size, trunk=trunk, **settings)
    said = capfd.readouterr()
    assert said.err == ""
    assert said.out.startswith(
        f"step 7 of {tmp_path}/run as onnx in {out}: model.onnx; differs from the network by at m"
    )
    says_what_it_is(out, trunk, size)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(given.name, given.type) for given in session.get_inputs()] == [("images", "tensor(float)")]
    assert session.get_inputs()[0].shape == ["batch", 3, size, size]
    assert session.get_outputs()[0].shape == ["batch", 8]
    for batch in (1, 3, 4):
        images = pictures(batch, size)
        (found,) = session.run(["embeddings"], {"images": images.float().numpy()})
        np.testing.assert_allclose(found, model(images).detach().numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


ALONE = """
import json, sys, torch
about, found = {"facescale.json": ""}, {}
for folder, batches in torch.load("pictures.pt").items():
    run = torch.export.load(f"{folder}/model.pt2", extra_files=about).module()
    with torch.no_grad():
        found[folder] = [run(images.float()) for images in batches]
torch.save(found, "found.pt")
assert not {"trainer", "timm", "torchvision"} & set(sys.modules), "PyTorch alone"
print(about["facescale.json"])
"""


def test_torch_export_runs_where_facescale_is_not(tmp_path):
    asked, expected = {}, {}
    for number, (trunk, size, settings) in enumerate(TRUNKS):
        model = network(size, trunk=trunk, **settings)
        assert torch_export.write(model, ExportedConfig.of(model), tmp_path / str(number)) < 1e-4
        asked[str(number)] = [pictures(batch, size) for batch in (1, 3, 4)]
        expected[str(number)] = [model(images).detach() for images in asked[str(number)]]
    torch.save(asked, tmp_path / "pictures.pt")
    words = [sys.executable, "-I", "-c", ALONE]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert ExportedConfig.from_json(done.stdout).model.trunk == TRUNKS[-1][0]
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format_", [onnx_format, torch_export])
def test_a_file_that_gives_something_else_is_refused_and_not_left(tmp_path, monkeypatch, format_):
    class Wrong(Exported):
        def forward(self, images):
            return super().forward(images) + 2e-4

    monkeypatch.setattr(format_, "Exported", Wrong)
    model = network()
    with pytest.raises(
        ValueError, match=r"differs from the network by 2\.\de-04 of 1 pictures; allowed is 1e-04; not exp"
    ):
        format_.write(model, ExportedConfig.of(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_gives_nan_is_refused(tmp_path):
    model = network()
    model.head.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the network's embeddings of 1 pictures are not finite; not exported"):
        torch_export.write(model, ExportedConfig.of(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_batch_size_is_not_frozen_in_either(tmp_path, monkeypatch):
    """A network whose result depends on the traced batch is caught by the batches of the check."""

    class Frozen(Exported):
        def forward(self, images):
            return super().forward(images.reshape(2, 3, 32, 32))

    monkeypatch.setattr(torch_export, "Exported", Frozen)
    model = network()
    with pytest.raises(ValueError, match=r"export: resnet18 cannot be written by torch\.export"):
        torch_export.write(model, ExportedConfig.of(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_its_packages(make_run, tmp_path, monkeypatch, capsys):
    run, _ = make_run()
    monkeypatch.setattr(onnx_format, "find_spec", lambda name: None if name.startswith("onnxr") else object())
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "onnx"]) == 1
    said = "facescale: export: onnx needs onnxruntime, which is not installed: pip install 'facescale[export]'\n"
    assert capsys.readouterr().err == said
