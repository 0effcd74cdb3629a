import io

import numpy as np
import pytest
from PIL import Image

from data_shards.duplicates import exact_groups, fingerprint, near_groups, perceptual_hash


def picture(seed, quality=90, size=120, change=0):
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)).astype(int) + change
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def differing_bits(a, b):
    return (a ^ b).bit_count()


def test_look_alikes_have_near_hashes_and_others_have_not():
    hashes = [perceptual_hash(picture(1, quality)) for quality in (95, 60)] + [perceptual_hash(picture(1, size=90))]
    assert max(differing_bits(a, b) for a in hashes for b in hashes) <= 4
    others = [perceptual_hash(picture(seed)) for seed in range(2, 12)]
    assert min(differing_bits(hashes[0], other) for other in others) > 12


def test_a_blank_picture_has_no_hash_and_one_that_does_not_decode_a_reason():
    blank = io.BytesIO()
    Image.new("RGB", (50, 50), (9, 9, 9)).save(blank, "PNG")
    assert perceptual_hash(blank.getvalue()) is None
    with pytest.raises(ValueError, match="does not decode"):
        perceptual_hash(picture(1)[:200])


def test_fingerprints_tell_files_apart():
    assert fingerprint(b"a") == fingerprint(b"a") != fingerprint(b"b")
    assert len(fingerprint(b"")) == 16


def test_exact_groups_by_hand():
    a, b, c = (1, 2), (1, 3), (0, 2)
    assert exact_groups(np.array([a, b, a, c, b, a], np.uint64)).tolist() == [0, 1, 0, 3, 1, 0]
    assert exact_groups(np.zeros((0, 2), np.uint64)).tolist() == []


def oracle(hashes, distance, labels):
    group = list(range(len(hashes)))
    for i in range(len(hashes)):
        for j in range(i):
            if labels[i] == labels[j] and differing_bits(int(hashes[i]), int(hashes[j])) <= distance:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if at == old else at for at in group]
    return group


@pytest.mark.parametrize("distance", [0, 1, 4, 9, 16])
def test_near_groups_are_those_of_the_slow_way(distance):
    random = np.random.default_rng(distance)
    hashes = random.integers(0, 2**64, 150, np.uint64)
    for row in range(50, 150):  # most of them are near an earlier one, some by a chain
        flips = random.choice(64, random.integers(0, distance + 3), replace=False)
        hashes[row] = hashes[random.integers(0, row)]
        for bit in flips:
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    labels = random.integers(0, 2, 150)
    found = near_groups(hashes, distance, labels)
    assert found.tolist() == oracle(hashes, distance, labels)
    assert len(set(found)) < 150


def test_many_equal_hashes_are_one_group():
    hashes = np.full(3000, 77, np.uint64)
    assert set(near_groups(hashes, 4, np.zeros(3000, np.int64))) == {0}
