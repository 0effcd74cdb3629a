"""Identities taken out of shards: nothing of them is left, everything else is as it was, and a kill at any point does no harm."""

import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from collections_on_disk import draw_collection, encoded, every_file

from data_shards import forget as forgetting
from data_shards import replacing
from data_shards.convert import ConvertConfig, convert
from data_shards.export import export
from data_shards.forget import forget
from data_shards.index import ShardSet
from data_shards.reader import TarReader
from data_shards.verify import verify

COUNTS = {"ann": 9, "bob": 7, "cy clone": 12, "dee": 8, "eve": 4, "fay": 6, "guy": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """With pictures of two people that do not decode, one picture that two people have, and a list of people to leave out."""
    root = draw_collection(tmp_path_factory.mktemp("source") / "people", COUNTS)
    for name in ("ann", "bob"):
        (root / name / "bad.jpg").write_text(f"no picture of {name}")
        (root / name / "also.jpg").write_bytes(encoded(999, ".jpg"))
    return root


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "shards"
    lists = {"holdout_identities": ("dee", "eve"), "leave_out_identities": ("ann dromeda", "zoe")}
    convert(source, out, ConvertConfig(shard_bytes=9_000, holdout_images=1, duplicates="report", workers=1, **lists))
    return out


@pytest.fixture
def shards(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "shards"))


def pictures(shards: Path, folder: Path) -> dict[str, bytes]:
    """Every picture by split, identity and name, read through the index."""
    export(shards, folder)
    found = every_file(folder)
    shutil.rmtree(folder)
    return found


def traces(folder: Path, *needles: bytes) -> list[str]:
    return [
        f"{path.relative_to(folder)}: {needle[:20]!r}"
        for path in sorted(folder.rglob("*"))
        for needle in needles
        if needle in os.fsencode(path.relative_to(folder)) or (path.is_file() and needle in path.read_bytes())
    ]


@pytest.mark.parametrize("names", [["bob"], ["ann", "eve"], ["cy clone"], ["guy"]])
def test_nothing_of_them_is_left_and_the_rest_is_as_it_was(shards, source, tmp_path, names):
    before, was = pictures(shards, tmp_path / "before"), ShardSet.open(shards).manifest
    of_others = {path.read_bytes() for path in source.rglob("*.jpg") if path.parent.name not in names}
    gone = [
        data for name in names for path in (source / name).iterdir() if (data := path.read_bytes()) not in of_others
    ]
    assert gone
    needles = [name.encode() for name in names] + [name.replace(" ", "_").encode() for name in names]
    assert traces(shards, *needles), "they are there before"
    found = forget(shards, names)
    assert verify(shards, decode=True) == []
    assert found.identities == len(names)
    wanted = {path: data for path, data in before.items() if path.split("/")[1] not in names}
    assert pictures(shards, tmp_path / "after") == wanted
    assert found.pictures == len(before) - len(wanted) > 0
    manifest = (shards / "manifest.json").read_text().replace('"ann dromeda"', "")  # somebody else, of a longer name
    (shards / "manifest.json").rename(tmp_path / "manifest.json")
    assert traces(shards, *needles, *gone) == []
    assert not any(name in manifest for name in names)
    (tmp_path / "manifest.json").rename(shards / "manifest.json")
    now = ShardSet.open(shards).manifest
    assert now["read"] == now["written"] + now["failures"] + sum(now["filtered"].values())
    assert now["options"]["leave_out_identities"] == was["options"]["leave_out_identities"]
    left = [name for name in ("dee", "eve") if name not in names]
    assert now["options"]["holdout_identities"] == left
    assert not (shards / ".forget").exists()


def test_the_tars_are_those_that_others_read(shards):
    forget(shards, ["bob", "dee"])
    shard_set = ShardSet.open(shards)
    for name in shard_set.splits:
        split = shard_set.split(name)
        of_index = {}
        for sample, data in enumerate(TarReader(split).read(np.arange(len(split)))):
            of_index[split.key(sample)] = (bytes(data), int(split.samples["identity"][sample]))
        tars = [str(path) for path in split.shards]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its tars to the garbage collector
            read = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
            gc.collect()
        of_tars = {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in read}
        assert of_tars == of_index
        lists = [json.loads((split.directory / "wids.json").read_text())["shardlist"]]
        assert [shard["url"] for shard in lists[0]] == [path.name for path in split.shards]
        for tar in split.shards:
            again = tar.with_name("again.tar")
            shutil.copy(tar, again)
            from data_shards.tar_index import write_tar_index

            write_tar_index(again)
            assert again.with_suffix(".idx").read_bytes() == tar.with_suffix(".idx").read_bytes()
            again.unlink()
            again.with_suffix(".idx").unlink()
    assert verify(shards) == []


def test_labels_and_untouched_tars_stay(shards):
    before = ShardSet.open(shards)
    labels = {name: label for label, name in enumerate(before.identity_names)}
    tars = {path: path.stat().st_ino for split in before.splits for path in before.split(split).shards}
    found = forget(shards, ["eve"])
    after = ShardSet.open(shards)
    assert after.identity_names == [
        name if name != "eve" else f"(forgotten {labels['eve']})" for name in before.identity_names
    ]
    assert after.manifest["images"][labels["eve"]] == 0
    same = [path for path, inode in tars.items() if path.exists() and path.stat().st_ino == inode]
    assert len(tars) - len(same) == found.tars
    assert len(same) > 0
    assert after.fingerprint == before.fingerprint, "training has lost nothing"
    forget(shards, ["bob"])
    assert ShardSet.open(shards).fingerprint != before.fingerprint


def test_a_split_that_loses_everybody_goes(shards):
    forget(shards, ["dee", "eve"])
    assert ShardSet.open(shards).splits == ("train", "unseen_images")
    assert not (shards / "unseen_identities").exists()
    assert verify(shards) == []


def test_lists_lose_their_lines_and_go_when_nothing_is_left(shards):
    lines = (shards / "failures.jsonl").read_text().splitlines()
    assert len(lines) == 2
    duplicates = (shards / "duplicates.csv").read_text().splitlines()
    assert "bob/also.jpg,ann/also.jpg,exact,false" in duplicates
    found = forget(shards, ["bob"])
    wanted = [line for line in duplicates if "bob/" not in line]
    assert (shards / "duplicates.csv").read_text().splitlines() == wanted
    assert found.lines == 1 + len(duplicates) - len(wanted)
    assert [json.loads(line)["path"] for line in (shards / "failures.jsonl").read_text().splitlines()] == [
        "ann/bad.jpg"
    ]
    assert ShardSet.open(shards).manifest["duplicates"] == len(wanted) - 1
    forget(shards, ["ann", "dee", "eve"])
    assert not (shards / "duplicates.csv").exists(), "what is left repeats nothing"
    assert ShardSet.open(shards).manifest["duplicates"] == 0
    assert not (shards / "failures.jsonl").exists()
    assert verify(shards) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["nobody"], "has no identity 'nobody'; nothing was changed"),
        (["ann", "nobody"], "has no identity 'nobody'; nothing was changed"),
        (["ann", "bob", "cy clone", "fay"], "would have fewer than 2 training identities"),
        (list(COUNTS), "would be empty"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(shards, names, said):
    before = every_file(shards)
    with pytest.raises(ValueError, match=said):
        forget(shards, names)
    assert every_file(shards) == before


def test_damage_is_not_made_good_by_new_checksums(shards):
    split = ShardSet.open(shards).split("train")
    kept = int(np.flatnonzero(split.samples["identity"] == ShardSet.open(shards).identity_names.index("ann"))[0])
    row = split.samples[kept]
    with split.shards[row["shard"]].open("r+b") as tar:
        tar.seek(int(row["offset"]) + 5)
        tar.write(b"\xff\x00\xff")
    with_it = [
        name
        for name in ("bob", "cy clone", "fay")
        if row["shard"]
        in split.samples["shard"][split.samples["identity"] == ShardSet.open(shards).identity_names.index(name)]
    ]
    before = every_file(shards)
    with pytest.raises(ValueError, match="is damaged at byte"):
        forget(shards, with_it[:1])
    assert every_file(shards) == before


def test_without_room_nothing_changes(shards, monkeypatch):
    monkeypatch.setattr(forgetting.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    before = every_file(shards)
    with pytest.raises(ValueError, match=r"has 0\.00 GB free; this takes"):
        forget(shards, ["bob"])
    assert every_file(shards) == before


def test_a_full_disk_changes_nothing(shards, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = every_file(shards)
    monkeypatch.setattr(forgetting, "dali_index", full)
    with pytest.raises(OSError, match="No space left"):
        forget(shards, ["bob"])
    assert every_file(shards) == before


KILLED = """
import os, sys
from pathlib import Path
import data_shards.forget, data_shards.replacing, data_shards.commit
calls, last = 0, sys.argv[2]
def counted(function):
    def call(*args, **more):
        global calls
        calls += 1
        if str(calls) == last or (last == "closed" and data_shards.replacing.is_interrupted(Path(sys.argv[1]))):
            os._exit(9)
        return function(*args, **more)
    return call
os.replace, os.fsync = counted(os.replace), counted(os.fsync)
Path.unlink, Path.rmdir, Path.mkdir = counted(Path.unlink), counted(Path.rmdir), counted(Path.mkdir)
print(data_shards.forget.forget(sys.argv[1], ["bob", "eve", "dee"]))
"""


def test_killed_at_every_step_it_is_as_before_or_the_same_command_goes_on(shards, converted, tmp_path):
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    undisturbed = Path(shutil.copytree(converted, tmp_path / "undisturbed"))
    said = forget(undisturbed, ["bob", "eve", "dee"])
    wanted, before, states = every_file(undisturbed), every_file(converted), []
    for last in range(1, 1000):
        copy = Path(shutil.copytree(converted, tmp_path / "copy"))
        words = [sys.executable, str(program), str(copy), str(last)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == 0:
            assert done.stdout.strip() == str(said)
            break
        assert done.returncode == 9, done.stderr
        if replacing.is_interrupted(copy):
            states.append("closed")
            with pytest.raises(ValueError, match="the same command goes on"):
                ShardSet.open(copy)
            with pytest.raises(ValueError, match="the same command goes on"):
                verify(copy)
            assert forget(copy, ["bob", "eve", "dee"]) == said
        else:
            left = {name: data for name, data in every_file(copy).items() if not name.startswith(".forget/")}
            states.append("old" if left == before else "new")
            if states[-1] == "new":
                assert left == wanted
            else:
                assert forget(copy, ["bob", "eve", "dee"]) == said
        if states[-1] != "new":
            assert every_file(copy) == wanted
            assert not (copy / ".forget").exists()
        shutil.rmtree(copy)
    assert done.returncode == 0
    assert states.count("old") > 20
    assert states.count("closed") > 20


def test_other_names_after_a_kill_end_the_first_and_then_themselves(shards, tmp_path):
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    done = subprocess.run([sys.executable, str(program), str(shards), "closed"], check=False, timeout=60)
    assert done.returncode == 9
    found = forget(shards, ["cy clone"])
    assert (found.identities, found.pictures) == (1, 12)
    assert set(ShardSet.open(shards).identity_names) & set(COUNTS) == {"ann", "fay", "guy"}
    assert verify(shards) == []


def test_a_pseudonymous_set_and_one_of_pairs(source, tmp_path):
    config = ConvertConfig(pseudonyms=str(tmp_path / "secret.csv"), duplicates="report", workers=1)
    convert(source, tmp_path / "shards", config)
    names = ShardSet.open(tmp_path / "shards").identity_names
    forget(tmp_path / "shards", [names[1]])
    assert traces(tmp_path / "shards", names[1].encode()) == []
    assert verify(tmp_path / "shards") == []
    assert (tmp_path / "secret.csv").exists()


def test_a_url_and_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a URL"):
        forget("s3://bucket/shards", ["ann"])
    with pytest.raises(ValueError, match="is no folder"):
        forget(tmp_path / "none", ["ann"])
