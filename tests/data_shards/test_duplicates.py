"""Equal and nearly equal pictures, against comparing every pair."""

import io
import time

import numpy as np
import pytest
from collections_on_disk import PIL_FORMATS, encoded
from PIL import Image, ImageEnhance

from data_shards.duplicates import exact_groups, fingerprint, near_groups, perceptual_hash


def oracle(hashes, distance, labels=None):
    """First row of each row's connected component, by visiting."""
    labels = [0] * len(hashes) if labels is None else list(labels)
    numbers = [int(value) for value in hashes]
    first = [-1] * len(numbers)
    for row in range(len(numbers)):
        waiting = [row] if first[row] < 0 else []
        while waiting:
            one = waiting.pop()
            first[one] = row
            waiting += [
                other
                for other in range(len(numbers))
                if first[other] < 0
                and labels[one] == labels[other]
                and (numbers[one] ^ numbers[other]).bit_count() <= distance
                and other not in waiting
            ]
    return first


def planted(rng, count, distance):
    """Random hashes, and as many again that differ from one of them in up to `distance` + 2 bits."""
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    copies = hashes[rng.integers(0, count, count)].copy()
    for row in range(count):
        for bit in rng.choice(64, rng.integers(0, distance + 3), replace=False):
            copies[row] ^= np.uint64(1) << np.uint64(bit)
    both = np.concatenate([hashes, copies])
    return both[rng.permutation(len(both))]


def face(width=200, height=240, seed=0):
    """Soft blobs, the like of which keep their perceptual hash when scaled."""
    rows, columns = np.indices((height, width))
    picture = np.full((height, width), 90.0)
    for x, y, size, value in np.random.default_rng(seed).uniform((0, 0, 0.05, -90), (1, 1, 0.3, 150), (12, 4)):
        picture += value * np.exp(-((columns / width - x) ** 2 + (rows / height - y) ** 2) / (2 * size**2))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def save(image, extension=".jpg", **options):
    buffer = io.BytesIO()
    image.save(buffer, PIL_FORMATS[extension], **options)
    return buffer.getvalue()


def bits_apart(a, b):
    return (a ^ b).bit_count()


# --- byte for byte


def test_a_fingerprint_is_blake2b_of_16_bytes():
    """Expected value: `b2sum -l 128 /dev/null` and `printf abc | b2sum -l 128`."""
    assert fingerprint(b"").hex() == "cae66941d9efbd404e4d88758ea67670"
    assert fingerprint(b"abc").hex() == "cf4ab791c62b8d2b2109c90275287816"


def test_exact_groups_by_hand():
    hashes = np.array([(1, 2), (2, 1), (1, 2), (1, 1), (2, 1), (1, 2)], np.uint64)
    assert exact_groups(hashes).tolist() == [0, 1, 0, 3, 1, 0]


def test_exact_groups_of_many():
    hashes = np.random.default_rng(0).integers(0, 12, (2000, 2), dtype=np.uint64) << np.uint64(60)
    seen = {}
    expected = [seen.setdefault(tuple(pair), row) for row, pair in enumerate(hashes.tolist())]
    assert exact_groups(hashes).tolist() == expected


def test_no_rows_and_one_row():
    assert exact_groups(np.zeros((0, 2), np.uint64)).tolist() == []
    assert exact_groups(np.zeros((1, 2), np.uint64)).tolist() == [0]
    for distance in (0, 4):
        assert near_groups(np.zeros(0, np.uint64), distance).tolist() == []
        assert near_groups(np.zeros(1, np.uint64), distance).tolist() == [0]
        assert near_groups(np.zeros(0, np.uint64), distance, np.zeros(0, np.int64)).tolist() == []


# --- nearly


def test_near_groups_by_hand():
    hashes = np.array([0b0000, 0b0111, 0b0001, 0b0011, 1 << 63], np.uint64)
    assert near_groups(hashes, 0).tolist() == [0, 1, 2, 3, 4]
    assert near_groups(hashes, 1).tolist() == [0, 0, 0, 0, 0]
    assert near_groups(hashes[[0, 1, 3, 4]], 1).tolist() == [0, 1, 1, 0]
    assert near_groups(hashes, 1, within=np.array([5, 5, 9, 5, 5])).tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 4, 7, 8, 11, 16])
def test_near_groups_are_those_of_comparing_every_pair(distance):
    rng = np.random.default_rng(distance)
    hashes = planted(rng, 150, distance)
    labels = rng.integers(0, 3, len(hashes)) * 1000
    expected = oracle(hashes, distance)
    assert 1 < len(set(expected)) < len(hashes)
    assert near_groups(hashes, distance).tolist() == expected
    assert near_groups(hashes, distance, labels).tolist() == oracle(hashes, distance, labels)


@pytest.mark.parametrize("distance", [1, 4, 16])
def test_two_rows_at_every_place_of_the_bits(distance):
    """Exactly `distance` bits apart are near, one more is not, wherever the bits are."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        value = int(rng.integers(0, 2**64, dtype=np.uint64))
        bits = rng.choice(64, distance + 1, replace=False).tolist()
        near = value ^ sum(1 << bit for bit in bits[:-1])
        far = value ^ sum(1 << bit for bit in bits)
        assert near_groups(np.array([value, near], np.uint64), distance).tolist() == [0, 0]
        assert near_groups(np.array([value, far], np.uint64), distance).tolist() == [0, 1]


@pytest.mark.parametrize("distance", [1, 3])
def test_hashes_that_share_almost_every_band(distance):
    """All in 12 bits: one run holds all rows of most bands, and far more pairs are near than there are rows."""
    hashes = np.random.default_rng(2).integers(0, 2**12, 400, dtype=np.uint64) << np.uint64(30)
    assert near_groups(hashes, distance).tolist() == oracle(hashes, distance)


def test_equal_hashes_are_one_group_however_many():
    hashes = np.zeros(200_000, np.uint64)
    hashes[7] = 2**64 - 1
    groups = near_groups(hashes, 4)
    assert groups[7] == 7
    assert (np.delete(groups, 7) == 0).all()


@pytest.mark.parametrize("distance", [-1, 17])
def test_a_distance_out_of_range_is_refused(distance):
    with pytest.raises(ValueError, match=f"near_distance is {distance}; it must be 0 to 16 of 64 bits"):
        near_groups(np.zeros(3, np.uint64), distance)


def test_a_hundred_thousand_take_seconds():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[-1] = hashes[0] ^ np.uint64(0b1111)
    began = time.perf_counter()
    groups = near_groups(hashes, 4)
    print(f"{time.perf_counter() - began:.2f} s for 100,000 hashes")
    assert groups[-1] == 0
    assert (groups[:-1] == np.arange(99_999)).all()


# --- perceptual hashes


def test_a_perceptual_hash_is_imagehashs():
    """As text `imagehash` gives the bits row by row, the first as the highest."""
    import imagehash

    image = face(100, 120)
    assert f"{perceptual_hash(save(image, '.png')):016x}" == str(imagehash.phash(image))


@pytest.mark.parametrize(
    "changed",
    [
        lambda image: save(image, quality=40),
        lambda image: save(image.resize((130, 156))),
        lambda image: save(image.resize((900, 1080))),  # decoded at a quarter
        lambda image: save(image.convert("RGB"), ".webp", quality=70),
        lambda image: save(ImageEnhance.Brightness(image).enhance(0.85)),
        lambda image: save(image.transpose(Image.Transpose.ROTATE_90), exif=_turned_back()),
    ],
)
def test_a_changed_picture_is_near_and_another_is_not(changed):
    image = face()
    own = perceptual_hash(save(image, ".png"))
    assert bits_apart(own, perceptual_hash(changed(image))) <= 4
    assert bits_apart(own, perceptual_hash(changed(face(seed=1)))) > 16


def _turned_back():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("extension", [".jpg", ".png", ".pgm", ".bmp", ".webp"])
def test_every_format_is_hashed(extension):
    assert bits_apart(perceptual_hash(save(face(), extension)), perceptual_hash(save(face(), ".png"))) <= 2


def test_sixteen_bits_hash_as_eight():
    eight = np.asarray(face())
    wide = Image.fromarray(eight.astype(np.uint16) * 257)
    assert perceptual_hash(save(wide, ".png")) == perceptual_hash(save(face(), ".png"))


def test_a_blank_picture_has_no_hash():
    for value in (0, 128, 255):
        assert perceptual_hash(save(Image.new("L", (64, 64), value))) is None
    speckled = np.full((64, 64), 128, np.uint8)
    speckled[::2] += 1  # standard deviation 0.5
    assert perceptual_hash(save(Image.fromarray(speckled), ".png")) is None
    speckled[::2] += 2  # 1.5
    assert perceptual_hash(save(Image.fromarray(speckled), ".png")) is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello", "is no JPEG, PNG, PGM, BMP or WebP"),
        (encoded(1)[:40], "does not decode as JPEG"),
        (encoded(1, ".png")[:50], "does not decode as PNG"),
        (b"P5 20000 20000 255\n", "is 20000 x 20000 pixels: allowed are 100,000,000"),
    ],
)
def test_damaged_pictures_have_a_reason(data, message):
    with pytest.raises(ValueError, match=message):
        perceptual_hash(data)
