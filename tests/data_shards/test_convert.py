import errno
import io
import json
import os
import shutil
import tarfile
import zlib
from contextlib import nullcontext as does_not_raise
from pathlib import Path

import numpy as np
import pytest
from collections_on_disk import ORL, draw_collection, encoded, every_file, needs_orl
from PIL import Image

from data_shards import finish as finish_module
from data_shards import store as store_module
from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.pictures import inspect_image, quiet_pillow
from data_shards.sources import folders


def one(**settings):
    return ConvertConfig(workers=1, **settings)


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
        (source / "a" / f"p{number}.png").write_bytes(encoded(number, ".jpg"))  # misnamed: the name decides
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
    really = os.open

    def open_(path, *rest, **more):
        if str(path).endswith("001.jpg"):
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *rest, **more)

    monkeypatch.setattr(os, "open", open_)
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
    assert sorted(path.name for path in split.directory.iterdir()) == ["000001.idx", "000001.tar", "wids.json"]
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
    assert manifest["options"]["seed"] == 7
    assert not {"workers", "readable_by"} & manifest["options"].keys()
    assert manifest["source"] == {"kind": "folders", "location": str(source)}
    assert manifest["images"] == [4, 1, 2]
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
        ({"order": "sorted"}, "order is 'sorted'; it must be one of groups, identity, random, source"),
        ({"check": "maybe"}, "check is 'maybe'"),
        ({"shard_samples": 0}, "shard_samples is 0"),
        ({"min_images": 0}, "min_images is 0"),
        ({"near_distance": 17}, "near_distance is 17"),
        ({"regions": ("boxes.csv",)}, "crop is 'none' with 1 region files: give both or none"),
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


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(folders.Folders, "pictures", lambda _: pytest.fail("work began"))


def test_an_output_that_exists_is_not_touched(tmp_path, no_work):
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


def test_a_finished_output_is_refused(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    convert(source, tmp_path / "out", one())
    before = every_file(tmp_path)
    with pytest.raises(ValueError, match="out exists and is finished: nothing was touched"):
        convert(source, tmp_path / "out", one())
    assert every_file(tmp_path) == before


def test_an_output_that_cannot_be_made_is_refused_before_any_work(tmp_path, monkeypatch, no_work):
    def mkdir(path, mode, parents, exist_ok):
        raise PermissionError(13, "Permission denied", str(path))

    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ValueError, match=r"output .*out cannot be written: Permission denied"):
        convert(source, tmp_path / "out", one())


def test_an_empty_output_folder_or_a_link_to_one_is_used(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(source, tmp_path / "link", one())
    assert len(ShardSet.open(tmp_path / "link").split("train")) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "link", "real"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_fails_keeps_what_it_has_and_the_same_command_goes_on(tmp_path, monkeypatch, error):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2})
    convert(source, tmp_path / "undisturbed", one())

    def write_table(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(finish_module, "write_table", write_table)
        with pytest.raises(type(error)) as caught:
            convert(source, tmp_path / "out", one())
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"output {tmp_path}/out: No space left on device; what is written stays, the same command goes on from there"
        )
    with pytest.raises(ValueError, match=r"holds no manifest\.json: it is no finished output"):
        ShardSet.open(tmp_path / "out")
    written = (tmp_path / "out" / "train" / "000000.tar").stat()
    convert(source, tmp_path / "out", one())
    assert (tmp_path / "out" / "train" / "000000.tar").stat() == written, "it was not written again"
    assert every_file(tmp_path / "out") == every_file(tmp_path / "undisturbed")


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A source and the output of a conversion of it that was interrupted before its index was written."""
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3})

    def write_table(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finish_module, "write_table", write_table)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", one())
    return source, tmp_path / "out"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 3}, "was begun with seed 0, now it is 3"),
        ({"order": "random"}, "was begun with order 'groups', now it is 'random'"),
        ({"leave_out_identities": ("a",)}, r"was begun with leave_out_identities \[\], now it is \['a'\]"),
    ],
)
def test_other_settings_are_refused_with_the_difference_named(interrupted, settings, message):
    source, out = interrupted
    before = every_file(out)
    with pytest.raises(ValueError, match=f"the unfinished conversion in {out} {message}: go on with"):
        convert(source, out, one(**settings))
    assert every_file(out) == before
    assert convert(source, out, one()).written == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: (source / "b" / "001.jpg").unlink(), "b/001.jpg is gone"),
        (lambda source: (source / "a" / "new.jpg").write_bytes(encoded(1)), "a/new.jpg is new"),
        (lambda source: (source / "a" / "000.jpg").write_bytes(b"x"), "a/000.jpg has 1 bytes, before"),
        (lambda source: os.utime(source / "b" / "002.jpg", (1, 1)), "b/002.jpg was modified"),
    ],
)
def test_a_source_that_has_changed_is_refused_with_the_difference_named(interrupted, change, message):
    source, out = interrupted
    change(source)
    before = every_file(out)
    with pytest.raises(ValueError, match=f"source {source} has changed since the conversion in {out} began: {message}"):
        convert(source, out, one())
    assert every_file(out) == before


@pytest.mark.parametrize("loss", ["gone", "short", "no index"])
def test_a_shard_that_a_power_cut_took_is_written_again(interrupted, tmp_path, loss):
    source, out = interrupted
    tar = out / "train" / "000000.tar"
    whole = tar.read_bytes()
    if loss == "no index":
        tar.with_suffix(".idx").unlink()
    else:
        tar.unlink()
    if loss == "short":
        tar.write_bytes(whole[:700])
    convert(source, out, one())
    convert(source, tmp_path / "undisturbed", one())
    assert every_file(out) == every_file(tmp_path / "undisturbed")


def test_another_source_is_refused(interrupted, tmp_path):
    source, out = interrupted
    other = draw_collection(tmp_path / "other", {"a": 3, "b": 3})
    with pytest.raises(ValueError, match=f"reads a source whose location was '{source}', now it is '{other}'"):
        convert(other, out, one())


def test_another_number_of_workers_may_go_on(interrupted):
    source, out = interrupted
    assert convert(source, out, ConvertConfig(workers=2)).written == 6


def test_an_output_that_another_process_writes_is_refused(tmp_path, monkeypatch, no_work):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3})
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(store_module, "LOCK_PATIENCE_S", 0.2)
    with (
        store_module.Store(str(tmp_path / "out")).locked(),
        pytest.raises(ValueError, match="out is being written by another conversion: nothing was touched"),
    ):
        convert(source, tmp_path / "out", one())
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("who", "file_mode", "folder_mode"), [("owner", 0o600, 0o700), ("all", 0o644, 0o755)])
def test_the_output_is_readable_by_those_it_is_meant_for(tmp_path, who, file_mode, folder_mode):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3})
    (source / "a" / "bad.jpg").write_text("bad")
    umask = os.umask(0)
    try:
        convert(source, tmp_path / "out", one(readable_by=who))
    finally:
        os.umask(umask)
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {file_mode}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {folder_mode}
    assert len(modes) > 6


def test_an_evaluation_set_needs_no_training_identity(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 3})
    convert(source, tmp_path / "out", one(holdout_identities=1.0))
    shard_set = ShardSet.open(tmp_path / "out")
    assert shard_set.splits == ("unseen_identities",)
    assert len(shard_set.split("unseen_identities")) == 6


def test_what_the_settings_leave_out_is_counted_and_everything_adds_up(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 4, "Zoë_Müller": 3, "few": 1, "d": 2})
    (source / "a" / "small.jpg").write_bytes(encoded(1, size=(24, 9)))
    (source / "b" / "bad.jpg").write_text("bad")
    (source / "b" / "gone.jpg").symlink_to("nowhere")
    config = one(min_images=2, min_size=10, leave_out_identities=("zoe mueller", "ZOE MULLER", "d"), check="header")
    summary = convert(source, tmp_path / "out", config)
    assert summary.filtered == {
        "identity in leave_out_identities": 5,
        "identity with fewer than min_images": 1,
        "smaller than min_size": 1,
    }
    assert [path for path, _ in summary.failures] == ["b/bad.jpg", "b/gone.jpg"]
    assert (summary.read, summary.written) == (16, 7)
    assert summary.read == summary.written + summary.failed + sum(summary.filtered.values())
    assert ShardSet.open(tmp_path / "out").identity_names == ["a", "b"]


def test_keep_and_leave_out_match_by_id_and_by_the_names_of_identity_meta(tmp_path):
    source = draw_collection(tmp_path / "in", {f"n00000{number}": 2 for number in range(1, 6)})
    names = ("14th_Dalai_Lama", "A_Fine_Frenzy", "Abel_Ferrara", "Ed_Harris", "Zoë_Kravitz")
    rows = [f'n00000{at},"{name}",{at},1,m' for at, name in enumerate(names, start=1)]
    meta = "Class_ID, Name, Sample_Num, Flag, Gender\n" + "\n".join(rows)
    (source / "identity_meta.csv").write_text(meta)
    convert(source, tmp_path / "left", one(leave_out_identities=("abel ferrara", "n000004", "Somebody Else")))
    assert ShardSet.open(tmp_path / "left").identity_names == ["n000001", "n000002", "n000005"]
    assert ShardSet.open(tmp_path / "left").manifest["names"] == ["14th_Dalai_Lama", "A_Fine_Frenzy", "Zoë_Kravitz"]
    convert(source, tmp_path / "kept", one(keep_identities=("zoe-kravitz", "n000001")))
    assert ShardSet.open(tmp_path / "kept").identity_names == ["n000001", "n000005"]
    with pytest.raises(ValueError, match="keep_identities names 'Nobody', which is not among the 5 identities"):
        convert(source, tmp_path / "none", one(keep_identities=("Nobody",)))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
def test_identity_meta_is_found_beside_an_archive_and_lists_filter_it(tmp_path, ending):
    draw_collection(tmp_path / "in" / "train", {f"n00000{number}": 2 for number in range(1, 5)})
    kind = {"zip": "zip", "tar": "tar", "tar.gz": "gztar"}[ending]
    shutil.make_archive(str(tmp_path / "vggface2_train"), kind, tmp_path / "in")
    people = ("14th_Dalai_Lama", "A_Fine_Frenzy", "Abel_Ferrara", "Ed_Harris")
    meta = [f'n00000{at}, "{name}",2,1,m' for at, name in enumerate(people, start=1)]
    (tmp_path / "identity_meta.csv").write_text("\n".join(["Class_ID, Name, Sample_Num, Flag, Gender", *meta]))
    (tmp_path / "train_list.txt").write_text("n000001/000.jpg\nn000002/001.jpg\nn000003/000.jpg\n")
    config = one(leave_out_identities=("abel ferrara",), only_pictures=str(tmp_path / "train_list.txt"))
    summary = convert(tmp_path / f"vggface2_train.{ending}", tmp_path / "out", config)
    assert ShardSet.open(tmp_path / "out").manifest["names"] == ["14th_Dalai_Lama", "A_Fine_Frenzy"]
    assert (summary.read, summary.written) == (8, 2)


def test_only_the_pictures_of_a_list_are_taken(tmp_path):
    source = draw_collection(tmp_path / "in" / "train", {"n1": 3, "n2": 3, "n3": 2}).parent
    (tmp_path / "train_list.txt").write_text("n1/000.jpg\nn1/002.jpg\n\nn2/001.jpg\nn2/000.jpg\n")
    summary = convert(source, tmp_path / "out", one(only_pictures=str(tmp_path / "train_list.txt")))
    split = ShardSet.open(tmp_path / "out").split("train")
    assert [split.key(row) for row in range(len(split))] == ["n1/000", "n1/002", "n2/000", "n2/001"]
    assert summary.filtered == {"picture not in only_pictures": 4}


def test_pseudonyms_leave_no_name_in_the_shards(tmp_path):
    source = draw_collection(tmp_path / "in", {"Ada_Lovelace": 3, "Grace_Hopper": 3, "Mary_Shelley": 2})
    (source / "Ada_Lovelace" / "bad_Ada.jpg").write_text("bad")
    (source / "Ada_Lovelace" / "gone_Ada.jpg").symlink_to("nowhere")
    mapping = tmp_path / "names.csv"
    convert(source, tmp_path / "out", one(pseudonyms=str(mapping), duplicates="keep"))
    everything = b"".join(every_file(tmp_path / "out").values())
    for name in (b"Ada", b"Lovelace", b"Grace", b"Hopper", b"Mary", b"Shelley", str(tmp_path).encode()):
        assert name not in everything
    assert mapping.stat().st_mode & 0o777 == 0o600
    rows = dict(line.split(",") for line in mapping.read_text().splitlines()[1:])
    assert sorted(rows.values()) == ["Ada_Lovelace", "Grace_Hopper", "Mary_Shelley"]
    split = ShardSet.open(tmp_path / "out").split("train")
    ada = next(pseudonym for pseudonym, name in rows.items() if name == "Ada_Lovelace")
    pictures = {path.read_bytes() for path in (source / "Ada_Lovelace").glob("0*.jpg")}
    stored = {
        split.shards[row["shard"]].read_bytes()[row["offset"] :][: row["size"]]
        for at, row in enumerate(split.samples)
        if split.key(at).startswith(f"{ada}/")
    }
    assert stored == pictures
    with pytest.raises(ValueError, match=r"names\.csv exists: nothing was touched"):
        convert(source, tmp_path / "again", one(pseudonyms=str(mapping)))


def test_a_url_gives_and_takes_the_same_bytes(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 4})
    convert(source, tmp_path / "out", one(shard_samples=2))
    system.put(str(source), "/faces", recursive=True)
    try:
        convert("memory://faces", "memory://shards", ConvertConfig(shard_samples=2))
        stored = {path.removeprefix("/shards/"): system.cat_file(path) for path in system.find("/shards")}
        here = every_file(tmp_path / "out")
        assert stored.keys() == here.keys()
        assert {name for name in here if stored[name] != here[name]} == {"manifest.json"}  # it names the source
        again = json.loads(stored["manifest.json"])
        assert again["splits"] == json.loads(here["manifest.json"])["splits"]
        with pytest.raises(ValueError, match="memory://shards exists and is finished"):
            convert("memory://faces", "memory://shards", one())
    finally:
        system.rm("/faces", recursive=True)
        system.rm("/shards", recursive=True)


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "pipe://cat", "ftp://host/x", "simplecache::s3://b/x", "sftp://h/x"]
)
def test_a_scheme_that_is_not_listed_is_refused_and_runs_nothing(tmp_path, url):
    canary = tmp_path / "canary"
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 4})
    for bad in (url, f"pipe:touch {canary}"):
        with pytest.raises(ValueError, match="is not a URL that we read or write: allowed are abfs://"):
            convert(bad, tmp_path / "out", one())
        with pytest.raises(ValueError, match="is not a URL that we read or write: allowed are abfs://"):
            convert(source, bad, one())
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("orientation", [1, 6])
def test_dali_reads_a_webp_with_exif_unless_it_lies_behind_a_chunk_of_odd_length(orientation):
    verdicts = set()
    for width in range(8, 30):
        pixels = np.random.default_rng(width).integers(0, 255, (9, width, 3)).astype(np.uint8)
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, exif=exif)
        taken = dali_decode([buffer.getvalue()]) != [None]
        expected = does_not_raise() if taken else pytest.raises(ValueError, match="behind a chunk of odd length")
        with expected:
            inspect_image(buffer.getvalue(), "webp")
        verdicts.add(taken)
    assert verdicts == {True, False}


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


def test_one_process_converts_different_things_at_the_same_place_one_after_the_other(tmp_path):
    for number, counts in enumerate(({"a": 9, "b": 9}, {"c": 2, "d": 3})):
        source = draw_collection(tmp_path / f"in{number}", counts)
        convert(source, tmp_path / "out", one(shard_samples=2))
        assert ShardSet.open(tmp_path / "out").identity_names == list(counts)
        convert(source, tmp_path / f"apart{number}", one(shard_samples=2))
        assert every_file(tmp_path / "out") == every_file(tmp_path / f"apart{number}")
        shutil.rmtree(tmp_path / "out")
