import numpy as np
import pytest
from collections_on_disk import draw_collection, encoded
from PIL import Image

from data_shards import shard_stats as module
from data_shards.convert import ConvertConfig, convert
from data_shards.shard_stats import plot_stats, stats


@pytest.fixture
def shards(tmp_path):
    source = draw_collection(tmp_path / "in", {"a": 2, "b": 4, "c": 6, "d": 9})
    (source / "a" / "wide.png").write_bytes(encoded(1, ".png", size=(90, 30)))
    convert(source, tmp_path / "set", ConvertConfig(workers=1, holdout_identities=("d",), shard_samples=5))
    return tmp_path / "set"


def test_counts_and_spreads_by_hand(shards):
    train, unseen = stats(shards).splits
    assert (train.name, train.shards, train.identities, train.samples) == ("train", 4, 3, 13)
    assert train.formats == {"jpg": 12, "png": 1}
    assert train.images_per_identity == (3, 3, 4, 4, 6)
    assert train.mean_images == pytest.approx(13 / 3)
    assert train.width == (24, 24, 24, 24, 90)
    assert train.height == (16, 16, 16, 16, 30)
    assert train.tar_bytes == sum(path.stat().st_size for path in (shards / "train").glob("*.tar"))
    assert (unseen.identities, unseen.samples, unseen.images_per_identity[2]) == (1, 9, 9)


def test_the_table_names_every_split_and_unit(shards):
    text = str(stats(shards))
    assert "train: 13 images of 3 identities (12 jpg, 1 png); shards: 4" in text
    for name in ("images per identity", "width in pixels", "height in pixels", "bytes per image", "unseen_identities"):
        assert name in text
    assert max(map(len, text.splitlines())) < 110


def test_the_plot_is_a_picture_and_does_not_depend_on_the_chunks(shards, tmp_path, monkeypatch):
    plot_stats(shards, tmp_path / "a.png")
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    plot_stats(shards, tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.size == (1690, 520)
        assert np.asarray(a).std() > 10
        assert np.array_equal(np.asarray(a), np.asarray(b))
