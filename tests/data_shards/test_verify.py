import hashlib
import json

import numpy as np
import pytest
from collections_on_disk import draw_collection

from data_shards.convert import ConvertConfig, convert
from data_shards.decode import SizeProbe
from data_shards.index import ShardSet
from data_shards.verify import verify


@pytest.fixture
def shards(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 4, "b": 4, "c": 4, "d": 4})
    convert(source, tmp_path / "out", ConvertConfig(shard_bytes=12_000, holdout_images=1, workers=1))
    return tmp_path / "out"


def place(shards, row):
    """(tar, offset, size, key) of a training sample."""
    split = ShardSet.open(shards).split("train")
    sample = split.samples[row]
    return split.shards[sample["shard"]], int(sample["offset"]), int(sample["size"]), split.key(row)


def overwrite(path, offset, data):
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(data)


def label_header(offset, size):
    return offset + size + -size % 512


def reseal(shards):
    """Makes the manifest agree with the files as they are, so that only what lies within them can be wrong."""
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    index, names = np.load(shards / "index.npy"), len(manifest["identities"])
    manifest["images"] = np.bincount(index["identity"].clip(max=names - 1), minlength=names).tolist()
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((shards / name).read_bytes()).hexdigest()
    for split, entry in manifest["splits"].items():
        rows = index[entry["start"] : entry["start"] + entry["samples"]]
        entry["index_sha256"] = hashlib.sha256(rows.tobytes()).hexdigest()
        for shard in entry["shards"]:
            data = (shards / split / shard["name"]).read_bytes()
            shard |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    path.write_text(json.dumps(manifest))


def test_what_was_just_written_is_whole(shards):
    assert verify(shards) == []
    assert verify(shards, decode=True) == []


def test_flipped_picture_bytes_are_named_by_key(shards):
    path, offset, size, key = place(shards, 5)
    overwrite(path, offset + size // 2, b"\x01\x02\x03")
    assert verify(shards) == [
        f"{path}: differs from what was written (SHA-256)",
        f"{path}: {key}: the picture's bytes differ (CRC-32)",
    ]


def test_a_bit_flipped_inside_a_jpeg_that_still_decodes_is_found(shards):
    path, offset, size, key = place(shards, 5)
    whole = path.read_bytes()
    harmless = 0
    for at in range(size - 40, size - 2):
        flipped = bytearray(whole)
        flipped[offset + at] ^= 1
        if SizeProbe().sizes([np.frombuffer(flipped[offset : offset + size], np.uint8)]) != [(24, 16)]:
            continue
        harmless += 1
        path.write_bytes(flipped)
        assert verify(shards, decode=True, workers=1) == [
            f"{path}: differs from what was written (SHA-256)",
            f"{path}: {key}: the picture's bytes differ (CRC-32)",
        ]
    assert harmless >= 5


def test_a_damaged_label_is_named_by_key(shards):
    path, offset, size, key = place(shards, 5)
    overwrite(path, label_header(offset, size) + 512, b"3")
    assert verify(shards)[1:] == [f"{path}: {key}: its label or the label's header is damaged"]


@pytest.mark.parametrize("at", [0, 126, 150, 257])
def test_a_damaged_label_header_is_named_by_key(shards, at):
    path, offset, size, key = place(shards, 2)
    overwrite(path, label_header(offset, size) + at, b"\xff")
    assert verify(shards)[1:] == [f"{path}: {key}: its label or the label's header is damaged"]


def test_a_damaged_picture_header_is_named_by_its_place(shards):
    path, offset, _, _ = place(shards, 2)
    overwrite(path, offset - 512, b"\xff")
    assert verify(shards)[1:] == [
        f"{path}: sample at byte {offset:,}: the index does not fit the tar, or the picture's header is damaged"
    ]


def test_damaged_padding_costs_no_picture(shards):
    path, offset, size, _ = place(shards, 2)
    assert size % 512
    overwrite(path, offset + size, b"\xff")
    assert verify(shards)[1:] == [f"{path}: no picture is damaged, but padding or end is"]


@pytest.mark.parametrize("keep", [*np.linspace(0, 0.999, 20), 0.9999])
def test_a_truncated_tar_names_the_samples_behind_its_end(shards, keep):
    path = shards / "train" / "000000.tar"
    data = path.read_bytes()
    left = int(len(data) * keep)
    path.write_bytes(data[:left])
    split = ShardSet.open(shards).manifest["splits"]["train"]
    index = np.load(shards / "index.npy")[: split["samples"]]
    ends = [label_header(int(s["offset"]), int(s["size"])) + 1024 for s in index[index["shard"] == 0]]
    problems = verify(shards, decode=True)
    assert problems[0] == f"{path}: {left:,} bytes, the manifest says {split['shards'][0]['bytes']:,}"
    assert len(problems) == 1 + sum(end > left for end in ends)
    assert all("lies behind the end of the file" in problem for problem in problems[1:])


def test_missing_and_foreign_files_are_named(shards):
    (shards / "train" / "000001.tar").unlink()
    (shards / "train" / "000000.idx").unlink()
    (shards / "train" / "extra.tar").write_bytes(b"")
    (shards / "other").mkdir()
    (shards / "other" / "000000.tar").write_bytes(b"")
    assert verify(shards) == [
        f"{shards}/other: holds tars, but the manifest knows no such split",
        f"{shards}/train/extra.tar: not in the manifest",
        f"{shards}/train/000000.idx: missing",
        f"{shards}/train/000001.tar: missing",
    ]


def test_a_split_whose_folder_is_gone_is_reported(shards):
    for path in (shards / "unseen_images").iterdir():
        path.unlink()
    (shards / "unseen_images").rmdir()
    problems = verify(shards)
    assert f"{shards}/unseen_images/000000.tar: missing" in problems
    assert f"{shards}/unseen_images/wids.json: missing" in problems
    assert all(problem.startswith(f"{shards}/unseen_images/") for problem in problems)


def test_a_changed_dali_index_is_named(shards):
    path = shards / "train" / "000000.idx"
    path.write_text(path.read_text().replace("jpg", "png"))
    assert verify(shards) == [f"{path}: differs from what was written (SHA-256)"]


def test_an_index_that_cannot_be_used_is_named_and_the_tars_are_still_checked(shards):
    path, offset, _, _ = place(shards, 0)
    overwrite(path, offset, b"\x00")
    index = shards / "index.npy"
    index.write_bytes(index.read_bytes()[:-1])
    problems = verify(shards)
    assert problems[0] == f"{index}: differs from what was written (SHA-256)"
    assert problems[1].endswith(": convert again")
    assert problems[2:] == [f"{path}: differs from what was written (SHA-256)"]


def changed_index(shards, change):
    path = shards / "index.npy"
    rows = np.load(path)
    change(rows)
    np.save(path, rows)
    return path


def test_an_index_that_does_not_match_the_tars_is_found_even_if_the_manifest_agrees(shards):
    path, _, _, key = place(shards, 2)  # the last of the first identity
    changed_index(shards, lambda rows: rows["identity"].__setitem__(2, 1))
    problems = verify(shards)
    assert f"{shards}/index.npy: differs from what was written (SHA-256)" in problems
    assert f"{shards}/index.npy, train: differs from what was written (SHA-256)" in problems
    assert f"{shards}/index.npy: 3 images of 'a', the manifest says 4" in problems
    reseal(shards)
    assert verify(shards) == [f"{path}: {key}: its label or the label's header is damaged"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shard", 99, "rows point to no shard"),
        ("identity", 77, "rows have an identity that the manifest does not name"),
        ("offset", 2**63, "lies behind the end"),
        ("offset", 0, "the index does not fit the tar"),
        ("size", 2**31, "lies behind the end"),
        ("size", 1, "the index does not fit the tar"),
    ],
)
def test_nonsense_in_the_index_is_reported_not_followed(shards, field, value, message):
    changed_index(shards, lambda rows: rows[field].__setitem__(-1, value))
    reseal(shards)
    assert any(message in problem for problem in verify(shards, decode=True))


def test_wrong_counts_in_the_manifest_are_found(shards):
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0]["samples"] += 1
    manifest["splits"]["train"]["identities"] = 3
    path.write_text(json.dumps(manifest))
    listed = manifest["splits"]["train"]["shards"][0]["samples"]
    assert verify(shards) == [
        f"{shards}/index.npy, train: 4 identities, the manifest says 3",
        f"{shards}/identities.npy is 328 bytes, one of 7 rows has 311: convert again",
        f"{shards}/train/000000.tar: {listed - 1} samples in the index, the manifest says {listed}",
    ]


def test_a_tar_with_more_than_the_index_lists_is_found(shards):
    path = shards / "train" / "000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1024] + data[:3072] + data[-1024:])
    reseal(shards)
    assert verify(shards) == [f"{path}: holds more than the index lists"]


def test_duplicate_keys_are_named(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 2}, extension=".pgm")
    convert(source, tmp_path / "out", ConvertConfig(order="identity", workers=1))
    path, first, size, key = place(tmp_path / "out", 0)
    _, last, _, _ = place(tmp_path / "out", 3)
    data = path.read_bytes()
    overwrite(path, last - 512, data[first - 512 : first])
    overwrite(path, label_header(last, size), data[label_header(first, size) :][:512])
    reseal(tmp_path / "out")
    assert verify(tmp_path / "out") == [f"{path}: {key}: the key occurs before"]


def test_decode_finds_what_checksums_cannot(shards):
    path, offset, size, key = place(shards, 1)
    overwrite(path, offset + 3, bytes(size - 3))
    reseal(shards)
    assert verify(shards) == []
    (problem,) = verify(shards, decode=True)
    assert problem == f"{path}: {key}: does not decode with DALI"


def test_decode_compares_the_size_with_the_index(shards):
    path, _, _, key = place(shards, 1)
    changed_index(shards, lambda rows: rows["height"].__setitem__(1, 99))
    reseal(shards)
    assert verify(shards, decode=True) == [f"{path}: {key}: is 24 x 16 pixels, the index says 24 x 99"]


def test_many_damaged_samples_do_not_flood(shards, monkeypatch):
    from data_shards import verify as module

    monkeypatch.setattr(module, "NAMED", 2)
    path = shards / "train" / "000000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    samples = json.loads((shards / "manifest.json").read_text())["splits"]["train"]["shards"][0]["samples"]
    problems = verify(shards)
    assert len(problems) == 4
    assert problems[-1].startswith(f"{path}: and ")
    assert samples > 2


def test_no_shard_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        verify(tmp_path)


def test_an_unfinished_conversion_is_called_so(shards):
    (shards / "manifest.json").unlink()
    (shards / ".work").mkdir()
    with pytest.raises(
        ValueError, match="is an unfinished conversion: the same `facescale shard` command goes on with it"
    ):
        verify(shards)


def test_several_processes_find_the_same_in_the_same_order(shards):
    for row in (0, 4, 9, 11):
        path, offset, size, _ = place(shards, row)
        overwrite(path, offset + size // 2, b"\x01\x02\x03")
    one = verify(shards, decode=True, workers=1)
    assert len(one) > 4
    assert verify(shards, decode=True, workers=3) == one


def files_that_count(shards):
    return sorted(path for path in shards.rglob("*") if path.is_file() and path.name != "manifest.json")


def test_any_flipped_bit_is_found(shards, monkeypatch):
    random = np.random.default_rng(5)
    paths = files_that_count(shards)
    assert {path.suffix for path in paths} == {".tar", ".idx", ".npy", ".json"}
    for path in paths:
        whole = path.read_bytes()
        for at in random.integers(0, len(whole), 8):
            overwrite(path, int(at), bytes([whole[at] ^ (1 << random.integers(8))]))
            problems = verify(shards, workers=1)
            assert any(str(path) in problem for problem in problems), (path, at)
            overwrite(path, int(at), whole[at : at + 1])
    assert verify(shards, workers=1) == []
