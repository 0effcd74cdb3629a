import numpy as np
import pytest
from collections_on_disk import draw_collection, encoded, every_file

from data_shards.convert import ConvertConfig, convert
from data_shards.export import export
from data_shards.index import ShardSet


@pytest.fixture
def made(tmp_path):
    source = draw_collection(tmp_path / "in", {"ann": 5, "bob lee": 4, "caf\udce9": 3})
    for number in range(3):
        (source / "ann" / f"p{number}.png").write_bytes(encoded(number, ".png"))
    convert(source, tmp_path / "set", ConvertConfig(workers=1, shard_samples=4, holdout_images=1))
    return source, tmp_path / "set"


def test_the_round_trip_gives_every_byte_back(made, tmp_path):
    source, shards = made
    assert export(shards, tmp_path / "back") == 15
    back = every_file(tmp_path / "back")
    assert {name.partition("/")[0] for name in back} == {"train", "unseen_images"}
    assert {name.partition("/")[2]: data for name, data in back.items()} == every_file(source)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "back").rglob("*") if path.is_file()} == {0o600}


def test_what_was_exported_converts_to_the_same_pictures(made, tmp_path):
    _, shards = made
    export(shards, tmp_path / "back", ["train"])
    convert(tmp_path / "back" / "train", tmp_path / "again", ConvertConfig(workers=1))
    before, after = (ShardSet.open(path).split("train").samples for path in (shards, tmp_path / "again"))
    for field in ("crc32", "size", "identity", "width", "height"):
        assert np.array_equal(before[field], after[field])


def test_names_that_cannot_be_folders_are_those_of_the_keys(made, tmp_path):
    _, shards = made
    path = shards / "manifest.json"
    path.write_text(path.read_text().replace('"ann"', '"../../ann"').replace('"bob lee"', '".."'))
    export(shards, tmp_path / "out" / "back")
    assert sorted(folder.name for folder in (tmp_path / "out" / "back" / "train").iterdir())[:2] == ["ann", "bob_lee"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["back"]


def test_a_damaged_picture_ends_it_and_leaves_nothing(made, tmp_path):
    _, shards = made
    split = ShardSet.open(shards).split("train")
    row = split.samples[3]
    path = split.shards[row["shard"]]
    data = bytearray(path.read_bytes())
    data[row["offset"] + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"a picture at byte {row['offset']:,} is damaged: run `facescale verify`"):
        export(shards, tmp_path / "back")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "set"]


def test_an_output_that_exists_and_a_split_that_does_not(made, tmp_path):
    _, shards = made
    with pytest.raises(ValueError, match="in exists and is not empty: nothing was touched"):
        export(shards, tmp_path / "in")
    with pytest.raises(ValueError, match="has no split 'test': it has train, unseen_images"):
        export(shards, tmp_path / "back", ["test"])
