"""Hugging Face Hub layout: what is written is what is read, damage is named, and nothing is uploaded unless it is asked for."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.trainer.export.conftest import network, pictures
from trainer.cli import main
from trainer.config import ModelConfig
from trainer.export import huggingface
from trainer.export.config import ExportedConfig
from trainer.export.model_card import model_card
from trainer.model import Embedder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test speaks to the real Hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    model = network()
    config = ExportedConfig.of(model, distance="squared", step=7, thresholds={"far_0.001": 1.25})
    huggingface.write(model, config, model_card("mine", config, {}, {}), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (32, {}),
        (48, {"trunk": "iresnet18", "dropout": 0.3}),
        (32, {"trunk": "timm:mobilenetv3_small_050", "head_batchnorm": False}),
        (32, {"head": "facenet", "embedding_size": 5}),
    ],
)
def test_an_export_read_back_is_the_same_network(make_run, tmp_path, size, settings):
    run, model = make_run(size, **settings)
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    found, config = huggingface.read_exported(tmp_path / "out")
    assert not found.training
    assert config.model == model.config
    assert (config.image_size, config.step, config.distance, config.thresholds) == (size, 7, "root", {})
    images = pictures(3, size)
    torch.testing.assert_close(found(images), model(images), rtol=0, atol=0)
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} <= {
        torch.float32,
        torch.int64,
    }


def test_config_and_normalisation_come_back_equal(folder):
    model, config = huggingface.read_exported(folder)
    assert config == ExportedConfig.of(model, distance="squared", step=7, thresholds={"far_0.001": 1.25})
    assert config.mean == (0.485, 0.456, 0.406)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0]}))
    other, _ = huggingface.read_exported(folder)
    assert (other.mean.flatten().tolist(), other.std.flatten().tolist()) == ([0.5] * 3, [0.25, 0.5, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library": "other"}, "config.json: it is not of a network of facescale"),
        ({"version": 2}, "config.json: version is 2; this facescale reads 1"),
        ({"image_size": 0}, "config.json: image_size is 0; it must be a whole number of pixels from 1"),
        ({"distance": "cosine"}, "config.json: distance is 'cosine'; allowed are root and squared"),
        ({"std": [1, 1]}, r"config.json: mean and std are .*; three numbers each are needed"),
        ({"model": {}}, "config.json: it lacks trunk"),
        ({"model": None}, "config.json: it has a value of a wrong type"),
    ],
)
def test_a_config_that_is_not_allowed_is_named(folder, change, message):
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | change))
    with pytest.raises(ValueError, match=message):
        huggingface.read_exported(folder)


def test_damage_is_named(folder, tmp_path):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    save_file(state | {"head.bias": torch.zeros(9)}, weights)
    with pytest.raises(
        ValueError, match=r"safetensors is not of the network of .*: it has head.bias of shape \(9,\), the n"
    ):
        huggingface.read_exported(folder)
    weights.write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"exported network .*model\.safetensors cannot be read"):
        huggingface.read_exported(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: it is not JSON"):
        huggingface.read_exported(folder)
    with pytest.raises(ValueError, match=r"is no exported network: it must have config\.json and model\.safetensors"):
        huggingface.read_exported(tmp_path)


def test_an_export_is_a_start_for_training(folder):
    """`model.weights`: the trunk always; the head where it is the same."""
    trained, _ = huggingface.read_exported(folder)
    weights = folder / "model.safetensors"
    same = Embedder(ModelConfig(trunk="resnet18", embedding_size=8, weights=weights), image_size=32).eval()
    images = pictures(2, 32)
    torch.testing.assert_close(same(images), trained(images), rtol=0, atol=0)
    other = Embedder(ModelConfig(trunk="resnet18", embedding_size=16, weights=weights)).eval()
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(other.trunk(pixels), trained.trunk(pixels), rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"is not of a network with trunk resnet34: its trunk lacks layer1\.2\.conv1\.weight"
    ):
        Embedder(ModelConfig(trunk="resnet34", embedding_size=8, weights=weights))


def test_the_card_has_front_matter_and_figures():
    config = ExportedConfig.of(network(), step=1200, thresholds={"verification": 1.0625})
    results = {"unseen identities": {"rank1": 0.5, "triplet_loss": 0.125}, "LFW": {"verification_accuracy": 0.875}}
    text = model_card("mine", config, results, {"loss": {"margin": 0.2}})
    _, front, body = text.split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["library_name"] == "facescale"
    assert "face-recognition" in told["tags"]
    assert told["metrics"] == ["rank1", "triplet_loss", "verification_accuracy"]
    (index,) = told["model-index"]
    assert index["results"][0]["dataset"]["name"] == "unseen identities"
    assert index["results"][0]["metrics"][0] == {"type": "rank1", "name": "Rank-1", "value": 0.5}
    assert "| unseen identities | 50.00 % | 0.1250 |  |" in body
    assert "| LFW |  |  | 87.50 % |" in body
    assert "verification 1.0625" in body
    assert "| `loss.margin` | `0.2` |" in body
    assert "after 1,200 steps" in body
    assert "## Intended use and limits" in body
    assert "None was made" not in body
    assert "None was made" in model_card("mine", config, {}, {})


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small and large files needs; keeps what it was asked."""

    asked: list[tuple[str, str, bytes]] = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, self.path, body))
        self.answer(body)

    def do_GET(self):
        self.asked.append((self.command, self.path, b""))
        self.answer(b"")

    def answer(self, body):
        here = f"http://127.0.0.1:{self.server.server_port}/some/mine"
        reply = {"url": here, "name": "mine", "id": "some/mine", "sha": "0" * 40}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            reply = {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        if "/commit/" in self.path:
            reply = {"success": True, "commitOid": "1" * 40, "commitUrl": f"{here}/commit/1"}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine that the Hub's client takes for the Hub."""
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield Hub.asked
    server.shutdown()
    server.server_close()


def test_push_uploads_the_three_files_to_a_private_repository(make_run, tmp_path, hub, capsys):
    run, _ = make_run()
    assert main(["export", str(run), str(tmp_path / "a"), "--format", "huggingface"]) == 0
    assert hub == [], "nothing is sent by default"
    assert main(["export", str(run), str(tmp_path / "b"), "--format", "huggingface", "--push", "some/mine"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("/some/mine/commit/1")
    (made,) = [json.loads(body) for _, path, body in hub if path == "/api/repos/create"]
    assert made["visibility"] == "private"
    (commit,) = [body for _, path, body in hub if path.startswith("/api/models/some/mine/commit/main")]
    sent = [json.loads(line) for line in commit.splitlines()]
    files = {line["value"]["path"] for line in sent if line["key"] == "file"}
    assert files == {"README.md", "config.json", "model.safetensors"}


def test_push_that_cannot_reach_the_hub_leaves_the_folder(make_run, tmp_path, monkeypatch, capsys):
    run, _ = make_run()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--format", "huggingface", "--push", "some/mine"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"facescale: {out} is written, but could not be pushed to some/mine: ")
    huggingface.read_exported(out)


@pytest.mark.parametrize(
    ("format_", "repo", "message"),
    [
        ("onnx", "some/mine", "--push goes with --format huggingface, not onnx"),
        ("huggingface", "a/b/c", "--push is 'a/b/c'; OWNER/NAME of a repository is needed"),
    ],
)
def test_push_that_cannot_be_meant_is_refused_before_anything_is_written(
    make_run, tmp_path, capsys, format_, repo, message
):
    run, _ = make_run()
    assert main(["export", str(run), str(tmp_path / "out"), "--format", format_, "--push", repo]) == 1
    assert capsys.readouterr().err.startswith(f"facescale: {message}")
    assert not (tmp_path / "out").exists()
