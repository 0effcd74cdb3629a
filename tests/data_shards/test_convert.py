import io
import json
import tarfile
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from collections_on_disk import ORL, draw_collection, encoded, every_file, needs_orl
from PIL import Image

from data_shards import convert as module
from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.pictures import inspect_image, quiet_pillow
from data_shards.shard_plan import plan_shards
from data_shards.sources import SourceImage


def one(**settings):
    return ConvertConfig(workers=1, **settings)


def listing(counts, size=1000, extension="jpg"):
    return [
        SourceImage(name, f"{name}/{number:03d}", f"{name}/{number:03d}.jpg", size, extension)
        for name, count in sorted(counts.items())
        for number in range(count)
    ]


def planned(pictures, **settings):
    _, plans = plan_shards(pictures, ConvertConfig(**settings))
    return {split: [p.key for plan in plans if plan.split == split for p in plan.pictures] for split in module.SPLITS}


def tar_members(path):
    with tarfile.open(path, "r:") as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]


def test_shards_hold_the_pictures_bytes_and_their_labels(tmp_path):
    source = draw_collection(tmp_path / "in", {"ann": 3, "bob": 2, "cy": 4})
    summary = convert(source, tmp_path / "out", one(shard_bytes=6_000))
    assert (summary.read, summary.written, summary.failed) == (9, 9, 0)
    shard_set = ShardSet.open(tmp_path / "out")
    assert shard_set.identity_names == ["ann", "bob", "cy"]
    split = shard_set.split("train")
    assert len(split.shards) > 1
    found = {}
    for path in split.shards:
        members = tar_members(path)
        assert path.stat().st_size <= 6_000
        for (image, data), (label, text) in zip(members[::2], members[1::2], strict=True):
            key = image.name.removesuffix(".jpg")
            assert label.name == f"{key}.cls"
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in (image, label)} == {
                (0, 0, 0, "", "", 0o644)
            }
            found[key] = (data, text)
    assert found == {
        f"{name}/{path.stem}": (path.read_bytes(), str(label).encode())
        for label, name in enumerate(("ann", "bob", "cy"))
        for path in (source / name).iterdir()
    }


def test_index_rows_point_at_the_bytes_in_order_of_identity_and_key(tmp_path):
    source = draw_collection(tmp_path / "in", {"b": 5, "a": 4, "c": 3})
    convert(source, tmp_path / "out", one(shard_bytes=5_000))
    split = ShardSet.open(tmp_path / "out").split("train")
    assert [split.key(row) for row in range(len(split))] == [
        f"{name}/{number:03d}" for name, count in (("a", 4), ("b", 5), ("c", 3)) for number in range(count)
    ]
    for row, sample in enumerate(split.samples):
        stored = split.shards[sample["shard"]].read_bytes()[sample["offset"] :][: sample["size"]]
        assert stored == (source / f"{split.key(row)}.jpg").read_bytes()
        assert zlib.crc32(stored) == sample["crc32"]
        assert (sample["width"], sample["height"]) == (24, 16)
    assert split.counts.tolist() == [4, 5, 3]


def test_the_output_does_not_depend_on_workers_or_run(tmp_path):
    source = draw_collection(tmp_path / "in", {f"id{number}": 3 + number % 4 for number in range(12)})
    (source / "id3" / "bad.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (source / "id4" / "text.jpg").write_text("no picture")
    outputs = []
    for name, workers in (("one", 1), ("three", 3), ("again", 3)):
        config = ConvertConfig(shard_bytes=9_000, holdout_identities=2, holdout_images=1, workers=workers)
        convert(source, tmp_path / name, config)
        outputs.append(every_file(tmp_path / name))
    assert outputs[0] == outputs[1] == outputs[2]
    assert sum(name.endswith(".tar") for name in outputs[0]) > 5


def test_another_seed_gives_another_order(tmp_path):
    pictures = listing({f"id{n}": 6 for n in range(10)})
    assert planned(pictures, seed=0)["train"] != planned(pictures, seed=1)["train"]
    assert sorted(planned(pictures, seed=0)["train"]) == sorted(planned(pictures, seed=1)["train"])


def test_groups_order_keeps_k_images_of_an_identity_together_and_mixes_identities():
    keys = planned(listing({f"id{n:02d}": 8 for n in range(20)}), images_per_group=4)["train"]
    owners = [key.split("/")[0] for key in keys]
    groups = [set(owners[start : start + 4]) for start in range(0, len(owners), 4)]
    assert all(len(group) == 1 for group in groups)
    order = [group.pop() for group in groups]
    assert sum(a == b for a, b in pairwise(order)) < 10  # identity order would have 20
    assert [key for key in keys if key.startswith("id00")] != sorted(key for key in keys if key.startswith("id00"))


def test_identity_order_is_the_listings():
    pictures = listing({"a": 5, "b": 6})
    assert planned(pictures, order="identity")["train"] == [picture.key for picture in pictures]


def test_shards_are_cut_before_they_grow_too_large():
    # 3 header and label blocks + 1000 bytes in 2 blocks = 2560; the end takes 1024: 3 fit in 8704, a byte less holds 2
    _, plans = plan_shards(listing({"a": 4, "b": 4}), ConvertConfig(shard_bytes=8704))
    assert [len(plan.pictures) for plan in plans] == [3, 3, 2]
    _, plans = plan_shards(listing({"a": 4, "b": 4}), ConvertConfig(shard_bytes=8703))
    assert [len(plan.pictures) for plan in plans] == [2, 2, 2, 2]
    _, plans = plan_shards(listing({"a": 2, "b": 1}), ConvertConfig(shard_bytes=1))
    assert [plan.name for plan in plans] == ["000000.tar", "000001.tar", "000002.tar"]


def test_held_out_identities_share_nothing_with_training():
    pictures = listing({f"id{n:02d}": 5 for n in range(20)})
    splits = planned(pictures, holdout_identities=0.25)
    owners = {split: {key.split("/")[0] for key in keys} for split, keys in splits.items()}
    assert len(owners["unseen_identities"]) == 5
    assert len(owners["train"]) == 15
    assert not owners["unseen_identities"] & owners["train"]
    assert splits["unseen_images"] == []


def test_held_out_identities_by_count_and_by_name():
    pictures = listing({"a": 3, "b": 3, "c": 3, "d": 3})
    assert len({key[0] for key in planned(pictures, holdout_identities=2)["unseen_identities"]}) == 2
    named = planned(pictures, holdout_identities=("b", "d"))
    assert {key[0] for key in named["unseen_identities"]} == {"b", "d"}


def test_a_new_identity_moves_at_most_one_other_out_of_the_hold_out():
    counts = {f"id{n:02d}": 2 for n in range(30)}
    before = {key[:4] for key in planned(listing(counts), holdout_identities=5)["unseen_identities"]}
    after = {key[:4] for key in planned(listing({**counts, "id99": 2}), holdout_identities=5)["unseen_identities"]}
    assert len(before & after) >= 4


def test_held_out_images_leave_two_for_training():
    splits = planned(listing({"a": 5, "b": 4, "c": 3}), holdout_images=2)
    assert Counter(key[0] for key in splits["unseen_images"]) == {"a": 2, "b": 2}
    assert Counter(key[0] for key in splits["train"]) == {"a": 3, "b": 2, "c": 3}
    assert not set(splits["train"]) & set(splits["unseen_images"])


def test_unseen_images_keep_the_training_labels(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 4, "b": 4, "c": 4})
    convert(source, tmp_path / "out", one(holdout_images=1, holdout_identities=("a",)))
    shard_set = ShardSet.open(tmp_path / "out")
    assert shard_set.splits == ("train", "unseen_identities", "unseen_images")
    assert {name: shard_set.split(name).identities.tolist() for name in shard_set.splits} == {
        "train": [1, 2],
        "unseen_identities": [0],
        "unseen_images": [1, 2],
    }


def test_every_shard_holds_one_extension(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 4, "b": 4})
    for number in range(4):
        (source / "a" / f"p{number}.jpg").write_bytes(encoded(number, ".png"))  # misnamed: the bytes decide
        (source / "b" / f"w{number}.webp").write_bytes(encoded(number, ".webp"))
    convert(source, tmp_path / "out", one())
    kinds = [
        {info.name.split(".")[1] for info, _ in tar_members(path)}
        for path in ShardSet.open(tmp_path / "out").split("train").shards
    ]
    assert kinds == [{"jpg", "cls"}, {"png", "cls"}, {"webp", "cls"}]


def test_what_does_not_decode_is_named_and_left_out(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3})
    (source / "a" / "text.jpg").write_text("hello")
    (source / "a" / "empty.png").write_bytes(b"")
    (source / "b" / "cut.jpg").write_bytes(encoded(5)[:-40])
    (source / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    summary = convert(source, tmp_path / "out", one())
    assert (summary.read, summary.written, summary.failed) == (10, 6, 4)
    reasons = dict(summary.failures)
    assert list(reasons) == ["a/empty.png", "a/text.jpg", "b/cut.jpg", "b/gone.jpg"]
    assert reasons["a/empty.png"] == "is empty"
    assert reasons["a/text.jpg"] == "is no JPEG, PNG, PGM, BMP or WebP by its first bytes"
    assert reasons["b/cut.jpg"].startswith("does not decode as JPEG: image file is truncated")
    assert reasons["b/gone.jpg"] == "cannot be read: No such file or directory"
    lines = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [(line["path"], line["reason"]) for line in lines] == list(summary.failures)
    assert "left out: b/cut.jpg does not decode" in str(summary)


def test_a_picture_that_cannot_be_opened_is_left_out(tmp_path, monkeypatch):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3})
    read = Path.read_bytes

    def read_bytes(path):
        if path.name == "001.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    summary = convert(source, tmp_path / "out", one())
    assert summary.failures == (
        ("a/001.jpg", "cannot be read: Permission denied"),
        ("b/001.jpg", "cannot be read: Permission denied"),
    )


def test_a_shard_without_survivors_is_not_written(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    (source / "a" / "bad.bmp").write_bytes(b"BM no picture")
    convert(source, tmp_path / "out", one())
    split = ShardSet.open(tmp_path / "out").split("train")
    assert [path.name for path in split.shards] == ["000001.tar"]
    assert sorted(path.name for path in split.directory.iterdir()) == ["000001.idx", "000001.tar", "index.npy"]
    assert split.samples["shard"].tolist() == [0] * 4


def test_the_manifest_counts_and_names_no_time_or_host(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 1, "c": 2})
    (source / "a" / "wide.jpg").write_bytes(encoded(9, size=(40, 10)))
    summary = convert(source, tmp_path / "out", one(seed=7))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["image_sizes"] == {
        "width": {"min": 24, "median": 24, "max": 40},
        "height": {"min": 10, "median": 16, "max": 16},
    }
    assert summary.single_image_identities == manifest["single_image_identities"] == 1
    assert (manifest["read"], manifest["written"], manifest["failures"]) == (7, 7, 0)
    assert manifest["options"] == {
        "holdout_identities": 0,
        "holdout_images": 0,
        "shard_bytes": 2**28,
        "images_per_group": 4,
        "order": "groups",
        "seed": 7,
        "max_pixels": 100_000_000,
    }
    assert manifest["source"] == str(source)
    assert list(manifest)[:3] == ["format", "version", "tool"]
    assert not (tmp_path / "out" / "failures.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"holdout_identities": 1.5}, "holdout_identities is 1.5"),
        ({"holdout_identities": -1}, "holdout_identities is -1"),
        ({"holdout_images": -1}, "holdout_images is -1"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"images_per_group": 0}, "images_per_group is 0"),
        ({"order": "sorted"}, "order is 'sorted'"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"holdout_identities": 3}, "1 identity left for training after holding out 3"),
        ({"holdout_identities": 5}, "holdout_identities is 5, but there are 4"),
        ({"holdout_identities": ("zoe",)}, "names 'zoe', which is not among the 4"),
        ({"holdout_images": 2}, "no training identity has 4 images"),
    ],
)
def test_hold_outs_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, settings, message):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3, "c": 3, "d": 3})
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", one(**settings))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_one_identity_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 identity left for training: triplets need at least 2"):
        convert(draw_collection(tmp_path / "in", {"a": 5}), tmp_path / "out", one())


def test_nothing_that_decodes_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"none of the 2 pictures of .* can be used; a/1.jpg is no JPEG"):
        convert(tmp_path / "in", tmp_path / "out", one())
    for name in ("a", "b"):
        (tmp_path / "in" / name / "1.jpg").write_bytes(encoded(1)[:-30])
    with pytest.raises(ValueError, match=r"none of the 2 pictures of .* can be used; a/1.jpg does not decode as JPEG"):
        convert(tmp_path / "in", tmp_path / "out", one())


def test_one_identity_that_decodes_is_refused(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 1})
    (source / "b" / "000.jpg").write_bytes(encoded(1)[:-30])
    with pytest.raises(ValueError, match="1 training identity has a picture that decodes: triplets need at least 2"):
        convert(source, tmp_path / "out", one())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_that_exists_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "scan", lambda _: pytest.fail("work began"))
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = every_file(tmp_path)
    with pytest.raises(ValueError, match="exists and is not empty: nothing was touched"):
        convert(source, tmp_path / "out", one())
    with pytest.raises(ValueError, match="file exists and is no folder"):
        convert(source, tmp_path / "file", one())
    assert every_file(tmp_path) == before


def test_an_output_that_cannot_be_made_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "scan", lambda _: pytest.fail("work began"))

    def mkdir(path, parents):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ValueError, match=r"output .*out cannot be made: .*Permission denied"):
        convert(tmp_path, tmp_path / "out", one())


def test_a_mount_point_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(ValueError, match="out is a mount point"):
        convert(tmp_path, tmp_path / "out", one())


def test_an_empty_output_folder_or_a_link_to_one_is_used(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(source, tmp_path / "link", one())
    assert len(ShardSet.open(tmp_path / "link").split("train")) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "link", "real"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, error):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})

    def write_index(*_):
        raise error

    monkeypatch.setattr(module, "write_index", write_index)
    with pytest.raises(type(error)):
        convert(source, tmp_path / "out", one())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_names_that_are_no_utf8_survive_in_manifest_and_summary(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b\udce9": 2})
    (source / "b\udce9" / "bad\udcff.jpg").write_text("text")
    summary = convert(source, tmp_path / "out", one())
    assert ShardSet.open(tmp_path / "out").identity_names == ["a", "b\udce9"]
    assert r"b\udce9/bad\udcff.jpg" in str(summary)


PICTURES = {
    "grey.jpg": ("L", "JPEG", {}),
    "progressive.jpg": ("RGB", "JPEG", {"progressive": True}),
    "cmyk.jpg": ("CMYK", "JPEG", {}),
    "grey_alpha.png": ("LA", "PNG", {}),
    "palette.png": ("P", "PNG", {"transparency": 3}),
    "bit.png": ("1", "PNG", {}),
    "sixteen.png": ("I;16", "PNG", {}),
    "sixteen.pgm": ("I;16", "PPM", {}),
    "grey.pgm": ("L", "PPM", {}),
    "palette.bmp": ("P", "BMP", {}),
    "alpha.bmp": ("RGBA", "BMP", {}),
    "alpha.webp": ("RGBA", "WEBP", {}),
    "lossless.webp": ("RGB", "WEBP", {"lossless": True}),
}


def picture(mode, kind, options, orientation=1):
    image = Image.fromarray((np.indices((12, 20)).sum(0) * 5).astype(np.uint8))
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    if orientation != 1:
        options = {**options, "exif": Image.Exif()}
        options["exif"][0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dali_decode(pictures):
    """Shape that DALI's CPU decoder gives each picture, or None where it raises."""
    from nvidia.dali import fn, pipeline_def, types

    shapes = []
    for data in pictures:

        @pipeline_def(batch_size=1, num_threads=1, device_id=None)
        def decode(data=data):
            encoded_bytes = fn.external_source(source=[[np.frombuffer(data, np.uint8)]], batch=True)
            return fn.decoders.image(encoded_bytes, device="cpu", output_type=types.RGB)

        pipeline = decode()
        pipeline.build()
        try:
            shapes.append(np.array(pipeline.run()[0][0]).shape)
        except RuntimeError:
            shapes.append(None)
    return shapes


def test_dali_decodes_what_the_conversion_takes_in_the_size_of_the_index():
    cases = [(name.split(".")[1], picture(*spec)) for name, spec in PICTURES.items()]
    cases += [(kind, picture("RGB", pil, {}, 6)) for kind, pil in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))]
    with quiet_pillow():
        sizes = [inspect_image(data, extension) for extension, data in cases]
    assert sizes == [(20, 12)] * len(PICTURES) + [(12, 20)] * 3
    assert dali_decode([data for _, data in cases]) == [(height, width, 3) for width, height in sizes]


def bmp_of_16_bits():
    header = b"BM" + (54 + 24).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    info = b"".join(v.to_bytes(n, "little") for v, n in ((40, 4), (4, 4), (3, 4), (1, 2), (16, 2), (0, 4), (24, 4)))
    return header + info + bytes(16) + bytes(range(24))


@pytest.mark.parametrize(
    ("extension", "data", "reason"),
    [
        ("png", picture("RGB", "PNG", {})[:-20], "IEND"),
        ("bmp", bmp_of_16_bits(), "16 bits per pixel"),
        ("jpg", picture("RGB", "JPEG", {})[:-2], "does not decode as JPEG"),
        ("webp", picture("RGB", "WEBP", {})[:-5], "does not decode as WEBP"),
        ("pgm", picture("L", "PPM", {})[:-1], "does not decode as PPM"),
    ],
)
def test_what_stops_dali_is_refused(extension, data, reason):
    with quiet_pillow(), pytest.raises(ValueError, match=reason):
        inspect_image(data, extension)
    assert dali_decode([data]) == [None]


def test_a_pgm_that_dali_would_leave_dark_is_refused():
    with pytest.raises(ValueError, match="PGM with maximum 100"):
        inspect_image(b"P5\n# a comment\n3 2\n100\n" + bytes(6), "pgm")
    assert inspect_image(b"P5\n# a comment\n3 2\n255\n" + bytes(6), "pgm") == (3, 2)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = encoded(1, ".png", size=(300, 200))
    assert inspect_image(data, "png", max_pixels=60_000) == (300, 200)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="is 300 x 200 pixels: allowed are 59,999"):
        inspect_image(data, "png", max_pixels=59_999)


@pytest.mark.filterwarnings("error")
def test_pillows_own_limit_neither_warns_nor_stops(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with quiet_pillow():
        assert inspect_image(encoded(1, ".png", size=(300, 200)), "png") == (300, 200)
    assert Image.MAX_IMAGE_PIXELS == 100


@needs_orl
def test_orl_faces(tmp_path):
    summary = convert(ORL, tmp_path / "out", ConvertConfig(holdout_identities=20, shard_bytes=10**6, workers=2))
    assert (summary.read, summary.written, summary.failed) == (400, 400, 0)
    assert {name: split[:2] for name, split in summary.splits.items()} == {
        "train": (20, 200),
        "unseen_identities": (20, 200),
    }
    split = ShardSet.open(tmp_path / "out").split("train")
    row = int(split.starts[3])
    name = ShardSet.open(tmp_path / "out").identity_names[split.samples["identity"][row]]
    stored = split.shards[split.samples["shard"][row]].read_bytes()[split.samples["offset"][row] :]
    assert stored[: split.samples["size"][row]] == (ORL / f"{split.key(row)}.pgm").read_bytes()
    assert split.key(row).split("/")[0] == name
    assert set(zip(split.samples["width"].tolist(), split.samples["height"].tolist(), strict=True)) == {(92, 112)}
