"""Photographs embedded into a folder and searched: interrupted, damaged, compared with a search by hand."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.convert import ConvertConfig, convert
from data_shards.synthetic import synthesize
from trainer import load_embedder, nearest, photos
from trainer.cli import main
from trainer.nearest import Found, nearest_identities
from trainer.photos import Gallery, embed_photos, gallery_of, identity_of, read_gallery

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faces") / "faces"
    synthesize(folder, identities=7, images_per_identity=5, size=40, seed=3, workers=1)
    return folder


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    convert(faces, root / "shards", ConvertConfig(holdout_identities=2, workers=1))
    options = (
        f"train --data.shards {root}/shards --run.folder {root}/run --run.steps 2 --data.image-size 32 --model.trunk resnet18 "
        "--plan.identities-per-batch 4 --plan.images-per-identity 2 --model.embedding-size 16 --run.device cpu "
        "--run.precision fp32 --run.no-tensorboard"
    )
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            environment.delenv(name, raising=False)
        assert main(options.split()) == 0
    return root / "run"


@pytest.fixture(scope="module")
def embedder(run):
    return load_embedder(run, device="cpu")


@pytest.fixture
def some(faces, tmp_path) -> Path:
    """The faces with one that is cut short, one that is text, one in no folder, one in a folder within a folder."""
    folder = Path(shutil.copytree(faces, tmp_path / "some faces"))
    people = sorted(folder.iterdir())
    picture = sorted(people[0].iterdir())[0]
    shutil.copy(picture, folder / "álone.jpg")
    (folder / "team" / "anna").mkdir(parents=True)
    shutil.copy(picture, folder / "team" / "anna" / "1.jpg")
    os.truncate(picture, 300)
    (people[1] / "text.png").write_text("no picture")
    return folder


def test_whose_a_picture_is():
    assert [identity_of(key) for key in ("anna/1.jpg", "team/anna/1.jpg", "anna.jpg")] == ["anna", "team/anna", "anna"]


def test_the_folder_holds_every_readable_picture_once(some, embedder, tmp_path):
    found = embed_photos(some, tmp_path / "out", embedder)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "embeddings.json",
        "embeddings.npy",
        "identities.npy",
        "identities.txt",
        "keys.txt",
        "skipped.csv",
    }
    files = sorted(path for path in some.rglob("*.*") if path.stat().st_size > 300)
    assert [some / key for key in found.keys] == files
    np.testing.assert_allclose(found.embeddings, embedder.embed(files), atol=1e-5)
    named = [found.names[label] for label in found.identities]
    assert named == [identity_of(key) for key in found.keys]
    assert "álone" in named
    assert "team/anna" in named
    with (tmp_path / "out" / "skipped.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["path"]).suffix, row["reason"].split(":")[0]) for row in rows] == [
        (".jpg", "is cut short"),
        (".png", "is no JPEG, PNG, PGM, BMP or WebP by its first bytes"),
    ]
    assert found.skipped == 2
    in_memory = gallery_of(some, embedder)
    np.testing.assert_allclose(in_memory.embeddings, found.embeddings, atol=1e-5)
    assert (in_memory.keys, in_memory.names, in_memory.skipped) == (list(found.keys), list(found.names), 2)


KILLED = """
import sys
from pathlib import Path
from trainer import load_embedder, photos
photos.CHUNK = 4
embed = photos.PhotoEmbedder.embed
def slow(self, *given, **more):
    import time
    print("chunk", flush=True)
    time.sleep(0.05)
    return embed(self, *given, **more)
photos.PhotoEmbedder.embed = slow
photos.embed_photos(Path(sys.argv[1]), Path(sys.argv[2]), load_embedder(sys.argv[3], device="cpu"))
print("done", flush=True)
"""


def test_killed_again_and_again_it_ends_with_the_same_files(some, run, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "CHUNK", 4)
    whole = embed_photos(some, tmp_path / "whole", embedder)
    words = [sys.executable, "-c", KILLED, str(some), str(tmp_path / "out"), str(run)]
    for chunks in (1, 2, 3):
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        for _ in range(chunks):
            assert child.stdout.readline() == "chunk\n"
        time.sleep(0.02 * chunks)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with pytest.raises(ValueError, match="holds no whole embeddings"):
            read_gallery(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "position.json").read_text())[0] >= 4, "it has not begun anew each time"
    found = embed_photos(some, tmp_path / "out", embedder)
    np.testing.assert_allclose(found.embeddings, whole.embeddings, atol=1e-5)
    for path in (tmp_path / "whole").iterdir():
        if path.suffix != ".npy":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_does_not_fit_is_refused_and_left_alone(some, embedder, tmp_path):
    with pytest.raises(ValueError, match="is no folder of pictures"):
        embed_photos(tmp_path / "none", tmp_path / "out", embedder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        embed_photos(some, tmp_path / "full", embedder)
    embed_photos(some, tmp_path / "out", embedder)
    before = (tmp_path / "out" / "embeddings.json").read_bytes()
    shutil.copy(some / "álone.jpg", some / "more.jpg")
    with pytest.raises(ValueError, match="holds other embeddings: pictures was"):
        embed_photos(some, tmp_path / "out", embedder)
    assert (tmp_path / "out" / "embeddings.json").read_bytes() == before
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"none of the pictures in .*bad can be read"):
        embed_photos(tmp_path / "bad", tmp_path / "new", embedder)
    assert not (tmp_path / "new").exists()
    os.truncate(tmp_path / "out" / "keys.txt", 30)
    with pytest.raises(ValueError, match="is damaged"):
        read_gallery(tmp_path / "out")


def unit(*angles: float) -> np.ndarray:
    """Unit vectors in the plane by their angles in degrees."""
    return np.stack([np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))], 1).astype(np.float32)


def test_nearest_identities_by_hand():
    """Pictures at 0, 10, 20 degrees of a, 40 of b, 90 of c; the probe at 12: a by 2 degrees, b by 28, c by 78."""
    keys = ["a/0", "a/1", "a/2", "b/0", "c/0"]
    gallery = Gallery(Path(), keys, ["a", "b", "c"], np.array([0, 0, 0, 1, 2]), unit(0, 10, 20, 40, 90), "")
    (found,) = nearest_identities(gallery, unit(12), 2)
    assert [(near.identity, near.key) for near in found] == [("a", "a/1"), ("b", "b/0")]
    chords = [2 * np.sin(np.deg2rad(angle / 2)) for angle in (2, 28, 78)]
    assert [near.distance for near in found] == pytest.approx(chords[:2], abs=1e-3)
    (found,) = nearest_identities(gallery, unit(12), 9)
    assert [near.identity for near in found] == ["a", "b", "c"]


def test_an_identity_with_all_the_nearest_pictures_does_not_hide_the_others():
    rng = np.random.default_rng(0)
    names = [f"p{label}" for label in range(6)]
    labels = np.repeat(np.arange(6), [200, 1, 1, 1, 1, 1])
    angles = np.concatenate([rng.uniform(0, 10, 200), [20, 30, 40, 50, 60]])
    keys = [f"{names[label]}/{row}" for row, label in enumerate(labels)]
    gallery = Gallery(Path(), keys, names, labels, unit(*angles), "")
    answers = nearest_identities(gallery, unit(0, 61), 3)
    assert [[near.identity for near in found] for found in answers] == [["p0", "p1", "p2"], ["p5", "p4", "p3"]]


def test_nearest_identities_are_those_of_a_slow_search(some, embedder):
    gallery = gallery_of(some, embedder)
    for probe, found in zip(
        gallery.embeddings[:9], nearest_identities(gallery, gallery.embeddings[:9], 4), strict=True
    ):
        distances = np.linalg.norm(gallery.embeddings - probe, axis=1)
        best = {name: min(distances[gallery.identities == label]) for label, name in enumerate(gallery.names)}
        wanted = sorted(best.values())[:4]
        assert [near.distance for near in found] == pytest.approx(wanted, abs=2e-3)
        assert [best[near.identity] for near in found] == pytest.approx(wanted, abs=1e-5)


def test_the_sheet_shows_pictures_and_decisions(faces, tmp_path):
    people = sorted(faces.iterdir())
    pictures = [sorted(person.iterdir())[0] for person in people[:3]]
    keys = [path.relative_to(faces).as_posix() for path in pictures]
    found = [Found("ünge", 0.5, keys[0]), Found("a name that is much too long for its place", 1.5, keys[1])]
    answers = [
        nearest.Answer(pictures[0], found),
        nearest.Answer(pictures[2], [*found, Found("gone", 1.9, "not/there.jpg")]),
    ]
    sheet = nearest.contact_sheet(answers, faces, 1.0)
    tile, margin, text = nearest.TILE, 12, 34
    assert sheet.size == (4 * (tile + margin) + margin, 2 * (tile + text + margin) + margin)

    def at(row: int, column: int) -> tuple[int, int]:
        return margin + column * (tile + margin), margin + row * (tile + text + margin)

    for row, column, colour in (
        (0, 0, (20, 20, 20)),
        (0, 1, (0, 158, 115)),
        (0, 2, (213, 94, 0)),
        (1, 3, (213, 94, 0)),
    ):
        x, y = at(row, column)
        assert sheet.getpixel((x - 2, y + 9)) == colour
    x, y = at(0, 1)
    with Image.open(pictures[0]) as image:
        shown = np.asarray(sheet.crop((x, y, x + tile, y + tile)), int)
        wanted = np.asarray(image.convert("RGB").resize((tile, tile), Image.Resampling.BILINEAR), int)
    assert np.abs(shown - wanted).mean() < 6
    x, y = at(1, 3)
    assert sheet.getpixel((x + 60, y + 60)) == (230, 230, 230), "its picture is gone"
    x, y = at(0, 3)
    assert sheet.getpixel((x + 60, y + 60)) == (255, 255, 255), "the first probe has two"
    grey = nearest.contact_sheet(answers, faces, None)
    x, y = at(0, 1)
    assert grey.getpixel((x - 2, y + 9)) == (150, 150, 150)


def test_the_commands(some, run, tmp_path, capsys):
    probes = [str(sorted(sorted(some.iterdir())[3].iterdir())[1]), str(some / "álone.jpg")]
    network = ["--network", str(run), "--device", "cpu"]
    assert main(["embed", str(some), str(tmp_path / "out"), *network]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    counted = f"36 embeddings of 16 dimensions, 9 identities, in {out}"
    assert said == f"{counted}; 2 could not be read: {out}/skipped.csv\n"
    found = {}
    for gallery in (some, tmp_path / "out"):
        sheet = tmp_path / "sheet.png"
        assert main(["search", str(gallery), *probes, *network, "--sheet", str(sheet), "--json", "--top", "3"]) == 0
        found[gallery] = json.loads(capsys.readouterr().out)["answers"]
        with Image.open(sheet) as image:
            assert image.size[0] > 4 * nearest.TILE
        sheet.unlink()
    for one, other in zip(*found.values(), strict=True):
        assert [near["identity"] for near in one["nearest"]] == [near["identity"] for near in other["nearest"]]
        assert one["nearest"][0]["distance"] < 0.01, "the picture itself is in the gallery"
        assert len(one["nearest"]) == 3
    options = [*network, "--sheet", str(tmp_path / "sheet.png"), "--threshold", "0.9"]
    assert main(["search", str(tmp_path / "out"), *probes, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == probes[0]
    assert lines[1].split()[:4] == ["1", Path(probes[0]).parent.name, "0.000", "within"]
    assert lines[-1] == (
        f"36 pictures of 9 identities; 2 could not be read; threshold 0.900. Sheet: {tmp_path}/sheet.png"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "FACES", "PROBE", "--top", "0"], "--top is 0; it must be at least 1"),
        (["search", "FACES", "PROBE", "--threshold", "3"], "--threshold is 3.0; allowed is above 0 and at most 2"),
        (
            ["search", "FACES", "PROBE", "--sheet", "x.jpg"],
            "--sheet is x.jpg; it must be a .png in a folder that exists",
        ),
        (["search", "nowhere", "PROBE"], "nowhere is no folder: neither pictures nor embeddings"),
        (["search", "FACES", "missing.jpg"], "missing.jpg cannot be read: No such file or directory"),
        (["embed", "FACES", "OUT", "--mirror"], "--mirror goes with a run's shards, not with --network"),
        (["embed", "FACES", "OUT", "--shards", "x"], "--shards goes with a run's shards, not with --network"),
        (["embed", "nowhere", "OUT"], "nowhere is no folder of pictures"),
    ],
)
def test_mistakes_are_one_line(faces, run, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    probe = str(sorted(sorted(faces.iterdir())[0].iterdir())[0])
    names = {"FACES": str(faces), "PROBE": probe, "OUT": str(tmp_path / "out")}
    assert main([*[names.get(word, word) for word in words], "--network", str(run), "--device", "cpu"]) == 1
    assert capsys.readouterr().err == f"facescale: {said}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_gallery_of_another_network_is_refused(some, run, embedder, tmp_path, capsys):
    embed_photos(some, tmp_path / "out", embedder)
    manifest = json.loads((tmp_path / "out" / "embeddings.json").read_text())
    (tmp_path / "out" / "embeddings.json").write_text(json.dumps(manifest | {"weights": "0" * 64}))
    words = ["search", str(tmp_path / "out"), str(some / "álone.jpg"), "--network", str(run), "--device", "cpu"]
    assert main([*words, "--sheet", str(tmp_path / "sheet.png")]) == 1
    assert "was embedded with other weights" in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()
