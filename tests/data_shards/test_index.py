import hashlib
import io
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from collections_on_disk import draw_collection
from PIL import Image

from data_shards.commit import committed
from data_shards.convert import ConvertConfig, convert
from data_shards.index import (
    IDENTITY,
    SAMPLE,
    ShardSet,
    map_table,
    write_table,
)
from data_shards.reader import TarReader


@pytest.fixture
def shards(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 3, "b": 1, "c": 4, "d": 2})
    convert(source, tmp_path / "out", ConvertConfig(shard_bytes=8_000, holdout_identities=("b",), workers=1))
    return tmp_path / "out"


def edit_manifest(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_split_knows_its_identities_and_where_their_rows_begin(shards):
    shard_set = ShardSet.open(shards)
    assert shard_set.identity_names == ["a", "b", "c", "d"]
    assert shard_set.splits == ("train", "unseen_identities")
    split = shard_set.split("train")
    assert (split.name, len(split)) == ("train", 9)
    assert split.identities.tolist() == [0, 2, 3]
    assert split.starts.tolist() == [0, 3, 7, 9]
    assert split.counts.tolist() == [3, 4, 2]
    assert split.key(3) == "c/000"
    assert isinstance(split.samples, np.memmap)
    assert not split.samples.flags.writeable


def test_a_split_that_is_absent_is_answered_with_those_that_are_there(shards):
    with pytest.raises(ValueError, match="has no split 'unseen_images': it has train, unseen_identities"):
        ShardSet.open(shards).split("unseen_images")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "does not say format 'facescale-shards'"),
        (lambda m: m.update(version=1), "is of version 1, this facescale reads version 2"),
        (lambda m: m.pop("images"), "lacks 'files' or 'images'"),
        (lambda m: m.update(identities="abc"), "'identities' is not a list of names"),
        (lambda m: m.update(splits={}), "'splits' is not an object of train"),
        (lambda m: m["splits"].update(test={}), "'splits' is not an object of train"),
        (lambda m: m["splits"]["train"].pop("index_sha256"), "split train lacks 'index_sha256'"),
        (lambda m: m["splits"]["train"].update(samples="9"), "split train lacks 'samples'"),
        (lambda m: m["splits"]["train"]["shards"][1].pop("bytes"), "split train, shard 1 lacks one of name, bytes"),
        (lambda m: m["splits"]["train"]["shards"][0].update(name="../../etc/passwd"), "named '../../etc/passwd'"),
    ],
)
def test_a_manifest_that_is_not_as_it_should_be_is_refused_in_one_line(shards, change, message):
    edit_manifest(shards, change)
    with pytest.raises(ValueError, match=message) as caught:
        ShardSet.open(shards)
    assert "\n" not in str(caught.value)


def test_no_manifest_or_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        ShardSet.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ShardSet.open(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not say format"):
        ShardSet.open(tmp_path)


def test_a_tar_cut_short_is_refused_with_both_sizes(shards):
    path = shards / "train" / "000001.tar"
    size = path.stat().st_size
    with path.open("rb+") as tar:
        tar.truncate(size - 1024)
    with pytest.raises(ValueError, match=r"000001\.tar is") as caught:
        ShardSet.open(shards).split("train")
    assert f"is {size - 1024:,} bytes, its manifest says {size:,}: it was cut short" in str(caught.value)
    assert f"Run `facescale verify {shards}` and convert again." in str(caught.value)


def test_a_tar_that_is_missing_is_refused_and_a_cut_after_opening_is_found(shards):
    split = ShardSet.open(shards).split("train")
    (shards / "train" / "000000.tar").unlink()
    with pytest.raises(ValueError, match=r"000000.tar is missing, the manifest lists it"):
        split.check_sizes()


def test_an_index_that_does_not_fit_is_refused(shards):
    path = shards / "index.npy"
    whole = path.read_bytes()
    samples = np.load(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"index\.npy is 526 bytes, one of 10 rows has 536: convert again"):
        ShardSet.open(shards).split("train")
    np.save(path, samples[:-1])
    with pytest.raises(ValueError, match=r"index.npy is 508 bytes, one of 10 rows has 536"):
        ShardSet.open(shards).split("train")
    np.save(path, np.zeros(51))
    with pytest.raises(ValueError, match=r"index.npy does not begin like one of 10 rows"):
        ShardSet.open(shards).split("train")
    path.unlink()
    with pytest.raises(ValueError, match=r"index\.npy is missing"):
        ShardSet.open(shards).split("train")


@pytest.mark.parametrize(("field", "value"), [("shard", 99), ("offset", 2**63), ("offset", 0), ("size", 10**9)])
def test_rows_that_point_outside_the_tars_are_not_followed(shards, field, value):
    samples = np.load(shards / "index.npy")
    samples[field][2] = value
    np.save(shards / "index.npy", samples)
    reader = TarReader(ShardSet.open(shards).split("train"))
    assert len(reader.read(np.array([0, 1, 3]))) == 3
    for access in (reader.read, reader.read_ahead):
        with pytest.raises(ValueError, match=r"index\.npy does not fit its tars"):
            access(np.array([1, 2]))


@pytest.mark.parametrize(("field", "value"), [("count", 5), ("start", 1), ("identity", 0), ("split", 2)])
def test_a_table_of_identities_that_does_not_fit_is_refused(shards, field, value):
    table = np.load(shards / "identities.npy")
    assert table.tolist() == [(0, 0, 0, 3), (0, 2, 3, 4), (0, 3, 7, 2), (1, 1, 0, 1)]
    table[field][1] = value
    np.save(shards / "identities.npy", table)
    with pytest.raises(ValueError, match=r"identities\.npy does not fit the index"):
        ShardSet.open(shards).split("train")


OPEN = """
import os, sys, time
from data_shards.index import ShardSet

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

before, started = anonymous(), time.perf_counter()
split = ShardSet.open(sys.argv[1]).split("train")
seconds = time.perf_counter() - started
print(len(split), seconds, (anonymous() - before) / 1024)
"""


def test_42_million_samples_open_in_a_second_and_cost_a_rank_no_copy(shards, tmp_path):
    samples, identities = 42_000_000, 360_000
    with open(shards / "index.npy", "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(SAMPLE), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + samples * SAMPLE.itemsize)  # a file with holes: 1.2 GB that need no disk
    counts = np.full(identities, samples // identities)
    counts[: samples - counts.sum()] += 1
    table = np.zeros(identities, IDENTITY)
    table["identity"], table["count"] = np.arange(identities), counts
    table["start"] = np.cumsum(counts) - counts
    np.save(shards / "identities.npy", table)

    def enlarge(manifest):
        manifest["splits"].pop("unseen_identities")
        manifest["splits"]["train"] |= {"samples": samples, "identities": identities}
        manifest["identities"] = [f"n{number:07d}" for number in range(identities)]
        manifest["images"] = counts.tolist()

    edit_manifest(shards, enlarge)
    done = subprocess.run([sys.executable, "-c", OPEN, str(shards)], capture_output=True, text=True, check=True)
    rows, seconds, mebibytes = map(float, done.stdout.split())
    assert rows == samples
    assert seconds < 1
    assert mebibytes < 100  # names and counts; the index itself would be 1,121


def test_a_key_where_there_is_no_header_is_refused(shards):
    split = ShardSet.open(shards).split("train")
    path = split.shards[split.samples["shard"][4]]
    data = bytearray(path.read_bytes())
    start = int(split.samples["offset"][4]) - 512
    data[start : start + 512] = bytes(512)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="has no tar header before byte"):
        split.key(4)


def test_a_table_is_plain_npy_and_is_mapped_again(tmp_path, monkeypatch):
    monkeypatch.setattr("data_shards.index._TABLE_ROWS", 2)
    rows = np.array([(512 * n, 10 + n, 0, 1, 2, 3, 4) for n in range(5)], dtype=SAMPLE)
    with committed(tmp_path / "index.npy") as file:
        write_table(file, rows)
    assert np.load(tmp_path / "index.npy").tolist() == rows.tolist()
    assert file.sha256 == hashlib.sha256((tmp_path / "index.npy").read_bytes()).hexdigest()
    assert map_table(tmp_path / "index.npy", SAMPLE, 5).tolist() == rows.tolist()
    assert SAMPLE.itemsize == 28


def test_dali_index_is_what_dalis_own_tool_writes(shards, tmp_path):
    tool = tmp_path / "stock.idx"
    for path in ShardSet.open(shards).split("train").shards:
        script = f"{sys.prefix}/bin/wds2idx"
        subprocess.run([sys.executable, script, str(path), str(tool)], check=True, capture_output=True)
        assert path.with_suffix(".idx").read_text() == tool.read_text()


def _pngs_of_one_crc():
    """Two uncompressed PNGs of one size and one CRC-32. Their chunks end in CRC-32s, so that few values are left for the file."""
    seen = {}
    for seed in range(5000):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        key = len(file.getvalue()), zlib.crc32(file.getvalue())
        if key in seen:
            return seen[key], file.getvalue()
        seen[key] = file.getvalue()
    raise AssertionError("no two of 5,000 have one CRC-32")


def test_the_fingerprint_tells_apart_pictures_that_crc_32_does_not(tmp_path):
    opened = []
    for name, png in zip(("one", "other"), _pngs_of_one_crc(), strict=True):
        for number in range(2):
            picture = tmp_path / name / ("ann", "bob")[number] / "0.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(png)
        convert(tmp_path / name, tmp_path / f"{name}-shards", ConvertConfig(workers=1))
        opened.append(ShardSet.open(tmp_path / f"{name}-shards"))
    one, other = opened
    assert np.array_equal(one.split("train").samples, other.split("train").samples)
    assert one.fingerprint == one.split("train").fingerprint
    assert one.fingerprint != other.fingerprint
