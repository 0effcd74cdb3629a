import os
import re

import numpy as np
import pytest

from data_shards import listing as module
from data_shards.listing import MAX_KEY, Listing, difference, unique_prefixes, unique_stems, write_listing
from data_shards.sources.base import Found


def found(path, size=9, **more):
    identity, _, name = path.rpartition("/")[0].rpartition("/")[2], "", path.rpartition("/")[2]
    return Found(identity, path, name.rpartition(".")[0], size, "jpg", **more)


def listed(folder, pictures, **options):
    folder.mkdir()
    refused = write_listing(folder, pictures, **options)
    return Listing(folder), refused


def keys(listing):
    return {place.name: key for place, key, _ in listing.entries(listing.rows)}


@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_rows_are_sorted_by_identity_and_key_whatever_the_order_and_batches(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(module, "BATCH_ROWS", batch)
    names = ["b/2.jpg", "Z/1.jpg", "a/9.jpg", "b/10.jpg", "a/1.jpg", "b/1.jpg"]
    pictures = [found(name, size=10 + at, part=at % 2, offset=100 * at, stamp=at) for at, name in enumerate(names)]
    listing, refused = listed(tmp_path / "one", pictures)
    assert refused == []
    assert listing.identities == ["Z", "a", "b"]
    expected = ["Z/1.jpg", "a/1.jpg", "a/9.jpg", "b/1.jpg", "b/10.jpg", "b/2.jpg"]
    entries = list(listing.entries(listing.rows))
    assert [place.name for place, _, _ in entries] == expected
    assert [key for _, key, _ in entries] == [name.removesuffix(".jpg") for name in expected]
    for place, _, extension in entries:
        at = names.index(place.name)
        assert (place.part, place.offset, place.size, extension) == (at % 2, 100 * at, 10 + at, "jpg")
    assert listing.rows["stamp"].tolist() == [names.index(name) for name in expected]
    assert listing.rows["identity"].tolist() == [0, 1, 1, 2, 2, 2]
    again, _ = listed(tmp_path / "two", pictures[::-1])
    assert again.fingerprint() == listing.fingerprint()
    assert np.array_equal(again.rows, listing.rows)


def test_refused_pictures_are_returned_and_not_listed(tmp_path):
    pictures = [
        found("b/1.jpg", refused="is bad"),
        found("a/1.jpg"),
        Found("", "a/loop", "", 0, "", refused="is a loop"),
    ]
    listing, refused = listed(tmp_path / "one", pictures)
    assert refused == [("a/loop", "is a loop"), ("b/1.jpg", "is bad")]
    assert listing.identities == ["a"]


def test_keys_are_unique_and_of_plain_characters_whatever_the_names(tmp_path):
    names = ("a b/x.y.jpg", "a_b/x_y.jpg", "a_b/x_y.png", "a_b/x_y_2.jpg", "Zoë/é.jpg", f"{'n' * 120}/{'m' * 200}.jpg")
    listing, _ = listed(tmp_path / "one", [found(name) for name in names])
    made = keys(listing)
    assert len(set(made.values())) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+", key) and len(key) <= MAX_KEY for key in made.values())
    assert made["a b/x.y.jpg"] == "a_b/x_y"
    assert made["a_b/x_y.jpg"] == "a_b_2/x_y"
    assert made["a_b/x_y.png"] == "a_b_2/x_y_3"
    assert made["a_b/x_y_2.jpg"] == "a_b_2/x_y_2"


def test_long_names_that_begin_alike_stay_apart_and_short():
    prefixes = unique_prefixes(["i" * 60 + end for end in "abc"])
    stems = unique_stems(["s" * 80 + end for end in "abc"], 47)
    assert len(set(prefixes)) == len(set(stems)) == 3
    assert all(len(f"{prefix}/{stem}.webp") < 100 for prefix in prefixes for stem in stems)
    assert unique_stems(["s" * 92], 92) == ["s" * 92]


def test_a_suffix_does_not_make_a_name_too_long():
    stems = unique_stems(["s" * 92] * 12, 92)
    assert len(set(stems)) == 12
    assert max(map(len, stems)) == 92


def test_pseudonyms_hold_no_name_and_do_not_follow_the_alphabet(tmp_path):
    names = [
        f"{person}/{person}_{number:04d}.jpg" for person in ("ann", "bob", "cy", "dan", "eve") for number in (1, 2)
    ]
    listing, _ = listed(tmp_path / "one", [found(name) for name in names], pseudonyms=True)
    assert sorted(listing.identities) == ["ann", "bob", "cy", "dan", "eve"] != listing.identities
    assert [key for _, key, _ in listing.entries(listing.rows)] == [
        f"p{row:07d}/{number:07d}" for row in range(5) for number in (0, 1)
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pictures: pictures, ""),
        (lambda pictures: pictures[1:], "a/1.jpg is gone"),
        (lambda pictures: pictures[:-1], "b/3.jpg is gone"),
        (lambda pictures: [*pictures, found("a/15.jpg")], "a/15.jpg is new"),
        (lambda pictures: [*pictures, found("c/1.jpg")], "c/1.jpg is new"),
        (lambda pictures: [found("a/1.jpg", size=1234), *pictures[1:]], "a/1.jpg has 1,234 bytes, before 9"),
        (lambda pictures: [found("a/1.jpg", stamp=3), *pictures[1:]], "a/1.jpg was modified"),
    ],
)
def test_a_difference_is_named(tmp_path, change, words):
    pictures = [found(f"{name}/{number}.jpg") for name in "ab" for number in (1, 2, 3)]
    old, _ = listed(tmp_path / "old", pictures)
    new, _ = listed(tmp_path / "new", change(pictures))
    assert difference(old, new) == words
    assert (old.fingerprint() == new.fingerprint()) == (not words)


def test_names_that_are_no_utf8_come_back(tmp_path):
    listing, _ = listed(tmp_path / "one", [found("caf\udce9/\udcff.jpg")])
    assert os.fsencode(listing.name(0)) == b"caf\xe9/\xff.jpg"
    assert listing.identities == ["caf\udce9"]
    assert keys(listing) == {"caf\udce9/\udcff.jpg": "caf_/_"}
