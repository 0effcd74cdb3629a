"""Pictures changed on the way, duplicates, and the same through the command line."""

import csv
import io
import json

import numpy as np
import pytest
from collections_on_disk import draw_collection, encoded, every_file
from PIL import Image

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.transform import TEMPLATE, TransformConfig
from data_shards.verify import verify
from trainer.cli import main


def stored(out, split="train"):
    """{key: (bytes, width, height)}"""
    opened = ShardSet.open(out).split(split)
    return {
        opened.key(row): (
            opened.shards[sample["shard"]].read_bytes()[sample["offset"] :][: sample["size"]],
            int(sample["width"]),
            int(sample["height"]),
        )
        for row, sample in enumerate(opened.samples)
    }


def picture(width, height, seed):
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """VGGFace2's layout with boxes and landmarks; one picture has neither."""
    root, boxes, points = (
        tmp_path / "vgg" / "train",
        ["NAME_ID,X,Y,W,H"],
        ["NAME_ID," + ",".join(f"P{p}{a}" for p in range(1, 6) for a in "XY")],
    )
    for identity in (1, 2, 3):
        folder = root / f"n00000{identity}"
        folder.mkdir(parents=True)
        for number in (1, 2, 3):
            picture(200, 240, 10 * identity + number).save(folder / f"000{number}_01.jpg", quality=95)
            if (identity, number) != (3, 3):
                name = f'"n00000{identity}/000{number}_01"'
                boxes.append(f"{name},50,60,80,100")
                points.append(f"{name}," + ",".join(f"{value:.3f}" for value in np.add(TEMPLATE, (40, 60)).ravel()))
    (tmp_path / "loose_bb.csv").write_text("\n".join(boxes))
    (tmp_path / "loose_landmark.csv").write_text("\n".join(points))
    return root.parent


@pytest.mark.parametrize("workers", [1, 2])
def test_pictures_are_aligned_to_112(photos, tmp_path, workers):
    config = ConvertConfig(
        transform=TransformConfig(crop="align", format="png"),
        regions=(str(tmp_path / "loose_landmark.csv"),),
        workers=workers,
        shard_samples=2,
    )
    summary = convert(photos, tmp_path / "out", config)
    assert summary.failures[0].path == "train/n000003/0003_01.jpg"
    assert (summary.read, summary.written, summary.failed) == (9, 8, 1)
    found = stored(tmp_path / "out")
    assert {(width, height) for _, width, height in found.values()} == {(112, 112)}
    # the landmarks lie as in the template, 40 and 60 pixels further: aligning is cutting
    with (
        Image.open(photos / "train" / "n000002" / "0001_01.jpg") as whole,
        Image.open(io.BytesIO(found["n000002/0001_01"][0])) as face,
    ):
        cut = np.asarray(whole.convert("RGB")).astype(int)[60:172, 40:152]
        assert face.format == "PNG"
        assert np.abs(np.asarray(face).astype(int) - cut).max() <= 2
    assert all(path.suffix != ".jpg" for path in (tmp_path / "out" / "train").iterdir())
    assert verify(tmp_path / "out", decode=True) == []


def test_pictures_are_cropped_to_their_boxes_by_the_command(photos, tmp_path, capsys):
    args = ["shard", str(photos), str(tmp_path / "out"), "--crop", "box", "--regions", str(tmp_path / "loose_bb.csv")]
    assert main([*args, "--box-margin", "1.5", "--size", "64", "--quality", "90", "--workers", "1"]) == 0
    assert "left out: train/n000003/0003_01.jpg has no box" in capsys.readouterr().out
    assert {size for _, *size in map(list, stored(tmp_path / "out").values()) for size in [tuple(size)]} == {(64, 64)}


def test_pictures_are_shrunk_by_the_command(photos, tmp_path):
    assert main(["shard", str(photos), str(tmp_path / "out"), "--shortest-edge", "50", "--workers", "1"]) == 0
    assert {(width, height) for _, width, height in stored(tmp_path / "out").values()} == {(50, 60)}
    again = tmp_path / "again"
    assert (
        main(["shard", str(photos), str(again), "--shortest-edge", "50", "--workers", "2", "--shard-mib", "256"]) == 0
    )
    assert every_file(again) == every_file(tmp_path / "out")


def test_bytes_are_untouched_by_default(photos, tmp_path):
    convert(photos, tmp_path / "out", ConvertConfig(workers=1))
    for key, (data, *_) in stored(tmp_path / "out").items():
        assert data == (photos / "train" / f"{key}.jpg").read_bytes()


@pytest.fixture
def repeated(tmp_path):
    """b/copy repeats a/one byte by byte; a/near is a/one at another quality; c/near too, but of another identity."""
    root = tmp_path / "in"
    for identity in "abc":
        (root / identity).mkdir(parents=True)
        for number in range(3):
            picture(120, 120, ord(identity) * 10 + number).save(root / identity / f"{number}.jpg", quality=92)
    one = (root / "a" / "0.jpg").read_bytes()
    (root / "a" / "copy.jpg").write_bytes(one)
    (root / "b" / "copy.jpg").write_bytes(one)
    for identity, quality in (("a", 70), ("c", 60)):
        picture(120, 120, ord("a") * 10).save(root / identity / "near.jpg", quality=quality)
    return root


def table(out):
    with open(out / "duplicates.csv", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("workers", [1, 2])
def test_exact_duplicates_are_dropped_of_any_identity(repeated, tmp_path, workers):
    summary = convert(repeated, tmp_path / "out", ConvertConfig(duplicates="drop", workers=workers))
    assert table(tmp_path / "out") == [
        ["a/copy.jpg", "a/0.jpg", "exact", "true"],
        ["b/copy.jpg", "a/0.jpg", "exact", "false"],
    ]
    assert summary.filtered == {"exact duplicate": 2}
    assert (summary.read, summary.written, summary.duplicates) == (13, 11, 2)
    assert not {"a/copy", "b/copy"} & stored(tmp_path / "out").keys()
    assert verify(tmp_path / "out") == []


def test_near_duplicates_are_dropped_within_an_identity(repeated, tmp_path):
    summary = convert(repeated, tmp_path / "out", ConvertConfig(near_duplicates="drop", workers=1))
    assert table(tmp_path / "out") == [
        ["a/copy.jpg", "a/0.jpg", "near", "true"],
        ["a/near.jpg", "a/0.jpg", "near", "true"],
    ]
    assert summary.filtered == {"near duplicate": 2}
    assert "c/near" in stored(tmp_path / "out")


def test_duplicates_are_reported_and_kept(repeated, tmp_path):
    config = ConvertConfig(duplicates="report", near_duplicates="report", workers=1)
    summary = convert(repeated, tmp_path / "out", config)
    assert (summary.written, summary.filtered, summary.duplicates) == (13, {}, 4)
    assert len(table(tmp_path / "out")) == 4
    assert f"duplicates: {summary.duplicates}, listed in duplicates.csv" in str(summary)


def test_unreadable_pictures_are_no_duplicates_of_each_other(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    for number in range(3):
        (source / "a" / f"empty{number}.jpg").write_bytes(b"")
    summary = convert(source, tmp_path / "out", ConvertConfig(duplicates="drop", near_duplicates="drop", workers=1))
    assert summary.failed == 3
    assert sum(summary.filtered.values()) + summary.written == 4


def test_lists_and_filters_by_the_command(tmp_path, capsys):
    source = draw_collection(tmp_path / "in", {"Ann_Lee": 4, "Bob": 3, "Cy": 3, "Dan": 1})
    (tmp_path / "test.txt").write_text('"ann lee"\nNobody Here\n')
    args = ["shard", str(source), str(tmp_path / "out"), "--workers", "1"]
    assert main([*args, "--leave-out-identities", str(tmp_path / "test.txt"), "--min-images", "2"]) == 0
    said = capsys.readouterr().out
    assert "11 pictures read, 6 written, 0 left out, 5 filtered" in said
    assert "filtered: identity in leave_out_identities: 4" in said
    assert "filtered: identity with fewer than min_images: 1" in said
    assert ShardSet.open(tmp_path / "out").identity_names == ["Bob", "Cy"]


def test_held_out_identities_from_vggface2s_list_of_pictures(tmp_path):
    source = draw_collection(tmp_path / "in", {"n1": 2, "n2": 2, "n3": 2})
    (tmp_path / "test_list.txt").write_text("n2/000.jpg\nn2/001.jpg\n")
    args = ["shard", str(source), str(tmp_path / "out"), "--holdout-identities", str(tmp_path / "test_list.txt")]
    assert main(args) == 0
    assert {key[:2] for key in stored(tmp_path / "out", "unseen_identities")} == {"n2"}


def test_stats_export_and_index_by_the_command(tmp_path, capsys):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 2})
    assert main(["shard", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert main(["shards", "stats", str(tmp_path / "out"), "--plot", str(tmp_path / "p.png")]) == 0
    assert main(["shards", "export", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert every_file(tmp_path / "back" / "train") == every_file(source)
    tar = tmp_path / "out" / "train" / "000000.tar"
    before = tar.with_suffix(".idx").read_text()
    tar.with_suffix(".idx").unlink()
    assert main(["shards", "index", str(tar)]) == 0
    assert tar.with_suffix(".idx").read_text() == before
    capsys.readouterr()
    (tmp_path / "none.tar").write_bytes(b"x" * 600)
    assert main(["shards", "index", str(tmp_path / "none.tar")]) == 1
    assert capsys.readouterr().err.startswith(f"facescale: {tmp_path}/none.tar is no tar or damaged")


def test_a_source_of_another_kind_by_the_command(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 2})
    rows = [f"{path},{path.parent.name}" for path in sorted(source.rglob("*.jpg"))]
    (tmp_path / "faces.data").write_text("\n".join(["path,identity", *rows]))
    out = str(tmp_path / "out")
    assert (
        main(["shard", str(tmp_path / "faces.data"), out, "--format", "list", "--order", "random", "--seed", "3"]) == 0
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["source"]["kind"], manifest["written"]) == ("list", 5)


def test_a_picture_that_is_called_otherwise_keeps_its_name_and_is_decoded_by_its_bytes(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    (source / "a" / "p.jpg").write_bytes(encoded(1, ".png", size=(30, 20)))
    convert(source, tmp_path / "out", ConvertConfig(workers=1))
    data, width, height = stored(tmp_path / "out")["a/p"]
    assert (data[:4], width, height) == (b"\x89PNG", 30, 20)
    assert verify(tmp_path / "out", decode=True) == []
