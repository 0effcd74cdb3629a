"""A trained network from Python: the same embeddings as the evaluation's, from every kind of picture."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.convert import ConvertConfig, convert
from tests.data_shards.collections_on_disk import encoded
from trainer import load_embedder
from trainer.cli import main
from trainer.network_inputs import network_input

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six identities of four pictures each: sizes, shapes and formats mixed, some turned by EXIF, some to be shrunk a lot."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    sizes = [(40, 30), (24, 60), (200, 170), (33, 33)]
    for person in range(6):
        folder = root / f"person {person}"
        folder.mkdir(parents=True)
        for number, size in enumerate(sizes):
            kind = [".jpg", ".png"][(person + number) % 2]
            (folder / f"{number}{kind}").write_bytes(encoded(7 * person + number, kind, size, "RGB"))
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(folder / ("0.jpg" if person % 2 == 0 else "1.jpg")).save(folder / "turned.jpg", exif=exif)
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    """Two steps of training; three identities are held out."""
    root = tmp_path_factory.mktemp("run")
    convert(photos, root / "shards", ConvertConfig(holdout_identities=3, workers=1))
    options = (
        f"train --data.shards {root}/shards --run.folder {root}/run --run.steps 2 --run.checkpoint-every 1 --data.image-size 32 "
        "--model.trunk resnet18 --plan.identities-per-batch 3 --plan.images-per-identity 2 --model.embedding-size 16 "
        "--run.device cpu --run.precision fp32 --run.no-tensorboard"
    )
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            environment.delenv(name, raising=False)
        assert main(options.split()) == 0
    return root / "run"


def test_a_file_gets_the_embedding_that_the_run_gives_its_picture_in_shards(run, photos, tmp_path):
    assert main(["embed", str(run), str(tmp_path / "out"), "--split", "train", "--device", "cpu"]) == 0
    keys = (tmp_path / "out" / "keys.txt").read_text().split()
    of_key = {f"{path.parent.name.replace(' ', '_')}/{path.stem}": path for path in photos.rglob("*.*")}
    files = [of_key[key] for key in keys]
    assert {path.stem for path in files} == {"0", "1", "2", "3", "turned"}
    found = load_embedder(run, device="cpu").embed(files)
    stored = np.load(tmp_path / "out" / "embeddings.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, stored)
    assert len(np.unique(found.round(4), axis=0)) == len(files), "pictures are told apart"


def same(found, wanted) -> None:
    """But for rounding, which the place in a batch decides."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_every_kind_of_picture_gives_the_same_embedding(run, photos):
    embedder = load_embedder(run, device="cpu")
    path = photos / "person 1" / "0.png"
    with Image.open(path) as image:
        pixels = np.asarray(image)
        kinds = [path, str(path), path.read_bytes(), image, pixels, torch.from_numpy(pixels.copy())]
        kinds.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        found = embedder.embed(kinds)
    assert found.shape == (7, 16)
    same(found, np.repeat(found[:1], 7, 0))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    batch = torch.from_numpy(np.stack([pixels, pixels]))
    for images in (batch, batch.permute(0, 3, 1, 2), batch.numpy(), [pixels] * 2):
        same(embedder.embed(images), np.repeat(found[:1], 2, 0))
    same(embedder.embed(path), found[:1])
    grey = pixels[:, :, 0]
    same(embedder.embed([grey] * 2), embedder.embed([np.stack([grey] * 3, 2)] * 2))


def test_a_pil_image_is_turned_as_its_exif_says(run, photos):
    path = photos / "person 0" / "turned.jpg"
    with Image.open(path) as image:
        assert image.size == (40, 30)
        found = load_embedder(run, device="cpu").embed([path, image])
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_a_folder_is_embedded_in_the_order_of_its_paths_and_batches_do_not_matter(run, photos):
    embedder = load_embedder(run, device="cpu")
    (photos / "person 0" / ".hidden.jpg").write_bytes(b"")
    whole = embedder.embed(photos)
    assert len(whole) == 30
    np.testing.assert_allclose(embedder.embed(sorted(photos.rglob("[!.]*.*")), batch_size=7), whole, atol=1e-5)


def test_a_picture_that_cannot_be_read_is_named_or_left_out(run, photos, tmp_path):
    good = photos / "person 0" / "0.jpg"
    (tmp_path / "cut.png").write_bytes(encoded(1, ".png")[:60])
    (tmp_path / "text.jpg").write_text("no picture")
    embedder = load_embedder(run, device="cpu")
    for bad, reason in (("cut.png", "cut short"), ("text.jpg", "no JPEG"), ("missing.jpg", "No such file")):
        with pytest.raises(ValueError, match=f"{bad} .*{reason}"):
            embedder.embed([good, tmp_path / bad])
    with pytest.raises(ValueError, match="picture 1 is empty"):
        embedder.embed([good, b""])
    found = embedder.embed([tmp_path / "cut.png", good, b"nothing", good], errors="skip")
    np.testing.assert_array_equal(found, embedder.embed([good, good]))
    assert embedder.skipped == []
    assert embedder.embed([tmp_path / "cut.png"], errors="skip").shape == (0, 16)
    assert [(skipped.position, skipped.name) for skipped in embedder.skipped] == [(0, str(tmp_path / "cut.png"))]


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((20, 20, 3), np.float32), "float32; needed is uint8"),
        (np.zeros((20, 20, 4), np.uint8), r"shape \(20, 20, 4\)"),
        (np.zeros((3, 20, 3), np.uint8), "may be"),
        (5, "images is a int"),
        ([None], "a picture is a NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(run, images, reason):
    with pytest.raises(ValueError, match=reason):
        load_embedder(run, device="cpu").embed(images)


def test_distances_are_the_runs_own():
    from trainer.embedder import PhotoEmbedder

    a, b = np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([0.0, 1.0])

    def of(squared: bool) -> PhotoEmbedder:
        embedder = object.__new__(PhotoEmbedder)
        embedder.squared, embedder.thresholds = squared, {"verification": 0.5}
        return embedder

    np.testing.assert_allclose(of(False).distance(a, b), [2**0.5, 0.4**0.5])
    np.testing.assert_allclose(of(True).distance(a, b), [2, 0.4])
    assert (of(False).threshold, of(True).threshold) == (0.5, 0.25)
    with pytest.raises(ValueError, match="last dimensions"):
        of(False).distance(a, np.zeros(3))


def test_a_checkpoint_is_chosen_by_step_or_by_its_folder(run, photos):
    picture = photos / "person 0" / "0.jpg"
    first = load_embedder(run, device="cpu", checkpoint=1).embed(picture)
    newest = load_embedder(run, device="cpu").embed(picture)
    assert np.abs(first - newest).max() > 1e-3
    of_folder = load_embedder(run / "checkpoints" / "step-00000001", device="cpu")
    np.testing.assert_array_equal(of_folder.embed(picture), first)
    assert (of_folder.image_size, of_folder.embedding_size, of_folder.thresholds) == (32, 16, {})
    bf16 = load_embedder(run, device="cpu", precision="bf16").embed(picture)
    assert 0 < np.abs(bf16 - newest).max() < 0.1


def test_thresholds_come_from_the_evaluation_of_the_same_weights(run, tmp_path):
    from trainer.evaluation.results import FACESCALE, UNSEEN_IDENTITIES

    judged = tmp_path / "run"
    shutil.copytree(run, judged)
    weights = load_embedder(judged, device="cpu").weights
    (judged / "evaluation").mkdir()
    row = {"set": UNSEEN_IDENTITIES, "embedder": FACESCALE, "verification_threshold": 0.75}
    row["tar_at_far"] = [{"target": 0.001, "threshold": 0.92}, {"target": 1e-06, "threshold": None}]
    (judged / "evaluation" / "results.json").write_text(json.dumps([row]))
    assert load_embedder(judged, device="cpu").thresholds == {}, "nothing says whose results these are"
    (judged / "embeddings" / "x").mkdir(parents=True)
    (judged / "embeddings" / "x" / "embeddings.json").write_text(json.dumps({"weights": weights}))
    assert load_embedder(judged, device="cpu").thresholds == {"verification": 0.75, "far_0.001": 0.4}
    assert load_embedder(judged, device="cpu", checkpoint=1).thresholds == {}


def test_what_is_no_network_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="holds no network"):
        load_embedder(tmp_path)
    with pytest.raises(ValueError, match="checkpoint is 2, but"):
        load_embedder(run / "checkpoints" / "step-00000001", checkpoint=2)
    with pytest.raises(ValueError, match="has no checkpoint step-00000009"):
        load_embedder(run, checkpoint=9)
    with pytest.raises(ValueError, match="precision is 'fp16'"):
        load_embedder(run, precision="fp16")


def test_an_exported_network_embeds_the_same(run, photos, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "huggingface"]) == 0
    picture = photos / "person 0" / "0.jpg"
    exported = load_embedder(tmp_path / "out", device="cpu")
    np.testing.assert_array_equal(exported.embed(picture), load_embedder(run, device="cpu").embed(picture))


def test_importing_the_package_imports_no_pytorch():
    code = "import sys, trainer; print('torch' in sys.modules, callable(trainer.load_embedder), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_a_jpeg_in_memory_differs_little_from_its_pixels():
    """Its file is shrunk by half in decoding, the pixels by averaging: a smooth picture comes out alike."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize((200, 170)).convert("RGB").save(file, "JPEG", quality=95)
    with Image.open(file) as image:
        of_file, of_pixels = network_input(file.getvalue(), 32).astype(int), network_input(image, 32).astype(int)
    assert 0 < np.abs(of_file - of_pixels).mean() < 2
