"""Shards of pictures that a test gives, and pictures that a test can read off again."""

import io

import numpy as np
import pytest
from collections_on_disk import PIL_FORMATS, encoded
from PIL import Image
from remote_sets import COUNTS, TOTAL
from store_server import store_of

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet


def encode(pixels, extension=".png", **options):
    """A uint8 array of shape (h, w) or (h, w, 3) as a file's bytes, shape (n,)."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, PIL_FORMATS[extension], **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.fixture
def split_of(tmp_path):
    """Converts {identity: its pictures, encoded} to shards and opens the training split; a second call overwrites nothing."""

    def make(pictures, extension=".png", name="collection", **settings):
        for identity, images in pictures.items():
            folder = tmp_path / name / identity
            folder.mkdir(parents=True)
            for number, image in enumerate(images):
                (folder / f"{number:03d}{extension}").write_bytes(bytes(image))
        out = tmp_path / f"{name}-shards"
        convert(tmp_path / name, out, ConvertConfig(workers=1, **settings))
        return ShardSet.open(out).split("train")

    return make


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A converted set of 40 pictures in several tars."""
    root = tmp_path_factory.mktemp("remote")
    number = iter(range(TOTAL))
    for name, count in COUNTS.items():
        (root / "pictures" / name).mkdir(parents=True)
        for place in range(count):
            picture = encoded(31 * next(number), size=(64, 48), mode="RGB")
            (root / "pictures" / name / f"{place:03d}.jpg").write_bytes(picture)
    convert(root / "pictures", root / "shards", ConvertConfig(workers=1, shard_bytes=25_000))
    split = ShardSet.open(root / "shards").split("train")
    assert len(split.shards) >= 4
    assert len(split) == TOTAL
    return root / "shards"


@pytest.fixture
def store(shards):
    with store_of(shards) as server:
        yield server
