"""`facescale align`: every picture is aligned or listed, an interrupted job goes on, and nothing of another's is touched."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from collections_on_disk import encoded, every_file
from PIL import Image

from data_shards.align import FACES, NOT_FOUND, AlignConfig, align_faces
from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.sources.detect import open_source
from data_shards.synthetic import synthesize
from data_shards.transform import TEMPLATE, TransformConfig
from trainer.cli import main


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Four people, 24 pictures each: more than one part."""
    folder = tmp_path_factory.mktemp("photographs") / "in"
    synthesize(folder, identities=4, images_per_identity=24, size=120, seed=5, workers=1)
    return folder


def aligned(source, out, **config):
    return align_faces(open_source(source), out, AlignConfig(**{"workers": 1} | config))


@pytest.fixture(scope="module")
def undisturbed(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    told = aligned(photographs, out)
    return out, told


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_picture_is_aligned_or_listed(photographs, undisturbed):
    out, told = undisturbed
    faces, missing = rows_of(out / FACES), rows_of(out / NOT_FOUND)
    assert told.faces == len(faces) >= 92
    assert told.faces + told.not_found == 96 == len(faces) + len(missing)
    assert {row["NAME_ID"] + ".jpg" for row in faces} == {str(path.relative_to(out)) for path in out.rglob("*.jpg")}, (
        "the names of the source"
    )
    assert sorted(path.name for path in out.iterdir() if not path.is_dir()) == [FACES, NOT_FOUND]
    for path in out.rglob("*.jpg"):
        with Image.open(path) as image:
            assert image.size == (112, 112)


def test_processes_write_the_same_bytes(photographs, undisturbed, tmp_path):
    aligned(photographs, tmp_path / "out", workers=2)
    assert every_file(tmp_path / "out") == every_file(undisturbed[0])


def test_its_landmarks_align_the_same_pictures_in_a_conversion(photographs, undisturbed, tmp_path):
    """faces.csv given to `facescale shard --crop align --regions`."""
    out, told = undisturbed
    config = ConvertConfig(transform=TransformConfig(crop="align"), regions=(str(out / FACES),), workers=1)
    convert(open_source(photographs), tmp_path / "shards", config)
    split = ShardSet.open(tmp_path / "shards").split("train")
    assert len(split) == told.faces
    row = split.samples[7]
    with split.shards[row["shard"]].open("rb") as tar:
        tar.seek(int(row["offset"]))
        data = tar.read(int(row["size"]))
    assert data in {path.read_bytes() for path in out.rglob("*.jpg")}


def test_what_has_no_face_is_listed_with_the_reason(photographs, tmp_path):
    source = tmp_path / "in"
    good = sorted(next(iter(sorted(photographs.iterdir()))).iterdir())[0]
    for identity in ("a", "b b"):
        (source / identity).mkdir(parents=True)
    (source / "a" / "good.jpg").write_bytes(good.read_bytes())
    (source / "a" / "flat.jpg").write_bytes(encoded(1, size=(200, 160)))
    (source / "a" / "point.png").write_bytes(encoded(1, ".png", size=(1, 1)))
    (source / "b b" / "cut.jpg").write_bytes(good.read_bytes()[:900])
    (source / "b b" / "text.jpg").write_text("no picture")
    (source / "b b" / "good.jpg").write_bytes(good.read_bytes())
    told = aligned(source, tmp_path / "out")
    assert (told.faces, told.not_found) == (2, 4)
    found = {row["picture"]: row["reason"] for row in rows_of(tmp_path / "out" / NOT_FOUND)}
    assert found.keys() == {"a/flat.jpg", "a/point.png", "b b/cut.jpg", "b b/text.jpg"}
    assert found["a/flat.jpg"] == found["a/point.png"] == "has no face that was found"
    assert "does not decode as JPEG" in found["b b/cut.jpg"]
    assert found["b b/text.jpg"] == "is no picture that we know"
    assert (tmp_path / "out" / "a" / "good.jpg").read_bytes() == (tmp_path / "out" / "b b" / "good.jpg").read_bytes()


def test_landmarks_from_a_csv_skip_detection(tmp_path):
    """A picture without any face, whose landmarks are the template twice as large: the result is the picture at half its size."""
    source, landmarks = tmp_path / "in", tmp_path / "landmarks.csv"
    (source / "n1").mkdir(parents=True)
    pixels = np.indices((224, 224)).sum(axis=0) // 2
    for name in ("known", "unknown"):
        Image.fromarray(pixels.astype(np.uint8)).save(source / "n1" / f"{name}.png")
    points = (TEMPLATE + 0.5) * 2 - 0.5
    head = "NAME_ID," + ",".join(f"P{point}{axis}" for point in range(1, 6) for axis in "XY")
    landmarks.write_text(head + "\nn1/known," + ",".join(f"{value:.4f}" for value in points.ravel()) + "\n")
    told = aligned(source, tmp_path / "out", landmarks=(str(landmarks),))
    assert (told.faces, told.not_found) == (1, 1)
    assert rows_of(tmp_path / "out" / NOT_FOUND)[0]["reason"] == "has no landmarks in the CSV files"
    with Image.open(tmp_path / "out" / "n1" / "known.jpg") as image:
        half = np.asarray(image).astype(int)
    expected = pixels.reshape(112, 2, 112, 2).mean(axis=(1, 3))
    assert np.abs(half - expected).max() <= 3


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(photographs, undisturbed, tmp_path):
    out, draw, kills = tmp_path / "out", np.random.default_rng(1), 0
    for attempt in range(6):
        job = subprocess.Popen(
            [sys.executable, "-m", "trainer.cli", "align", str(photographs), str(out), "--workers", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        begun = time.monotonic()
        while job.poll() is None and len(list(out.rglob("*.jpg"))) <= 14 * attempt and time.monotonic() < begun + 60:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        job.send_signal(signal.SIGKILL)
        kills += job.wait() == -signal.SIGKILL
        assert not (out / FACES).exists() or job.returncode == 0
    assert kills >= 4
    aligned(photographs, out)
    leftover = {name for name in every_file(out) if name.endswith(".tmp")}
    assert {name: data for name, data in every_file(out).items() if name not in leftover} == every_file(undisturbed[0])
    assert not leftover


def test_other_folders_and_other_settings_are_left_alone(photographs, undisturbed, tmp_path, capsys):
    def said(*args):
        assert main(["align", str(photographs), *map(str, args)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    out = undisturbed[0]
    before = every_file(out)
    assert "is finished: nothing was touched" in said(out)
    assert every_file(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is not empty: nothing was touched" in said(tmp_path / "mine")
    assert "is no folder" in said(tmp_path / "mine" / "notes.txt")
    assert "size is 8; allowed are 32 to 1024 pixels" in said(tmp_path / "new", "--size", 8)
    assert "min_score is 1.5" in said(tmp_path / "new", "--min-score", 1.5)
    assert "detector" in said(tmp_path / "new", "--detector", tmp_path / "none.onnx")
    assert not (tmp_path / "new").exists()
    begun = tmp_path / "begun" / ".align"
    begun.mkdir(parents=True)
    (begun / "job.json").write_text("{}")
    assert "was begun with another source or settings" in said(tmp_path / "begun")


def test_of_two_at_once_one_works(photographs, tmp_path, capsys):
    import fcntl

    work = tmp_path / "out" / ".align"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert main(["align", str(photographs), str(tmp_path / "out")]) == 1
    assert "is being written by another job: nothing was touched" in capsys.readouterr().err
    assert os.listdir(work) == ["lock"]
