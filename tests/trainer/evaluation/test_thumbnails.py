from io import BytesIO

import numpy as np
from PIL import Image

from data_shards.index import ShardSet
from trainer.evaluation.thumbnails import thumbnail, thumbnails


def encoded(mode="RGB", size=(200, 100), kind="JPEG", orientation=None):
    picture = Image.new(mode, size, 90)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = BytesIO()
    picture.save(file, kind, exif=exif)
    return file.getvalue()


def opened(found):
    picture = Image.open(BytesIO(found))
    assert (picture.format, picture.mode) == ("JPEG", "RGB")
    return picture


def test_the_longest_side_becomes_64_pixels_and_nothing_is_enlarged():
    assert opened(thumbnail(encoded())).size == (64, 32)
    assert opened(thumbnail(encoded(size=(20, 10)))).size == (20, 10)


def test_modes_and_formats_become_rgb_jpeg():
    for mode, kind in (("L", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG")):
        opened(thumbnail(encoded(mode, kind=kind)))


def test_a_picture_is_turned_as_its_exif_says():
    assert opened(thumbnail(encoded(orientation=6))).size == (32, 64)


def test_a_thumbnail_is_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    file = BytesIO()
    noise.save(file, "PNG")
    assert len(thumbnail(file.getvalue())) < 6000


def test_what_does_not_decode_gives_none():
    assert thumbnail(b"") is None
    assert thumbnail(b"no picture") is None
    assert thumbnail(encoded()[:200]) is None


def test_samples_of_a_split_in_the_order_asked_for(shards):
    split = ShardSet.open(shards).split("unseen_identities")
    found = thumbnails(split, np.array([3, 0]))
    assert [opened(picture).size for picture in found] == [(24, 16)] * 2
    assert found == [thumbnails(split, np.array([place]))[0] for place in (3, 0)]
    assert found[0] != found[1]
