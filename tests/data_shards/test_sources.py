import os
import re

import pytest
from collections_on_disk import encoded

from data_shards.sources import MAX_KEY, SourceImage, scan, sniff, unique_keys


def put(root, name, data=b"\xff\xd8\xff\xe0 jpeg"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_lists_identities_and_pictures_sorted_by_bytes(tmp_path):
    for name in ("b/2.jpg", "b/10.jpg", "a/1.jpg", "Z/1.jpg"):
        put(tmp_path, name)
    assert scan(tmp_path) == [
        SourceImage("Z", "Z/1", "Z/1.jpg", 9, "jpg"),
        SourceImage("a", "a/1", "a/1.jpg", 9, "jpg"),
        SourceImage("b", "b/10", "b/10.jpg", 9, "jpg"),
        SourceImage("b", "b/2", "b/2.jpg", 9, "jpg"),
    ]


def test_vggface2_parts_are_one_level_further_down_and_merge_by_name(tmp_path):
    put(tmp_path, "train/n000002/0001_01.jpg")
    put(tmp_path, "test/n000001/0001_01.jpg")
    put(tmp_path, "test/n000002/0001_01.jpg")
    put(tmp_path, "notes/read.txt")
    assert [(image.identity, image.key, image.path) for image in scan(tmp_path)] == [
        ("n000001", "n000001/0001_01", "test/n000001/0001_01.jpg"),
        ("n000002", "n000002/0001_01", "test/n000002/0001_01.jpg"),
        ("n000002", "n000002/0001_01_2", "train/n000002/0001_01.jpg"),
    ]


def test_passes_over_hidden_files_folders_and_other_kinds(tmp_path):
    for name in ("a/1.jpg", "a/.2.jpg", ".git/3.jpg", "a/notes.txt", "README", "a/.DS_Store"):
        put(tmp_path, name)
    assert [image.path for image in scan(tmp_path)] == ["a/1.jpg"]


@pytest.mark.parametrize(
    ("name", "extension"),
    [("x.JPG", "jpg"), ("x.jpeg", "jpg"), ("x.png", "png"), ("x.pgm", "pgm"), ("x.bmp", "bmp"), ("x.webp", "webp")],
)
def test_every_kind_in_any_case(tmp_path, name, extension):
    suffix = "." + name.split(".")[1].lower()
    put(tmp_path, f"a/{name}", encoded(1, suffix))
    assert [(image.key, image.extension) for image in scan(tmp_path)] == [("a/x", extension)]


def test_the_kind_is_that_of_the_bytes_not_of_the_name(tmp_path):
    put(tmp_path, "a/1.jpg", encoded(1, ".png"))
    put(tmp_path, "a/2.jpg", b"just a text")
    put(tmp_path, "a/3.jpg", b"")
    assert [image.extension for image in scan(tmp_path)] == ["png", "", ""]


def test_a_broken_link_or_pipe_is_listed_as_of_no_kind_and_does_not_hang(tmp_path):
    put(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "a" / "3.jpg")
    assert [(image.path, image.extension) for image in scan(tmp_path)] == [
        ("a/1.jpg", "jpg"),
        ("a/2.jpg", ""),
        ("a/3.jpg", ""),
    ]


def test_keys_are_unique_and_of_plain_characters_whatever_the_names(tmp_path):
    names = ("a b/x.y.jpg", "a_b/x_y.jpg", "a_b/x_y.png", "a_b/x_y_2.jpg", "Zoë/é.jpg", f"{'n' * 120}/{'m' * 200}.jpg")
    for name in names:
        put(tmp_path, name)
    keys = {image.path: image.key for image in scan(tmp_path)}
    assert len(set(keys.values())) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+/[A-Za-z0-9_-]+", key) and len(key) <= MAX_KEY for key in keys.values())
    assert keys["a b/x.y.jpg"] == "a_b/x_y"
    assert keys["a_b/x_y_2.jpg"] == "a_b/x_y_2"
    assert sorted(keys[name] for name in ("a_b/x_y.jpg", "a_b/x_y.png")) == ["a_b/x_y_3", "a_b/x_y_4"]


def test_long_names_that_begin_alike_stay_apart_and_short():
    keys = unique_keys([("i" * 60, "s" * 80 + end) for end in "abc"] + [("i", "s" * 92), ("i", "s" * 93)])
    assert len(set(keys)) == 5
    assert all(len(f"{key}.webp") < 100 for key in keys)
    assert keys[3] == "i/" + "s" * 92  # exactly MAX_KEY characters: kept


def test_a_suffix_does_not_make_a_key_too_long():
    keys = unique_keys([("i", "s" * 92)] * 12)
    assert len(set(keys)) == 12
    assert max(map(len, keys)) == MAX_KEY


def test_a_name_that_is_no_utf8_is_kept_apart(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    with open(os.path.join(folder, b"\xff.jpg"), "wb") as file:
        file.write(encoded(1))
    (image,) = scan(tmp_path)
    assert os.fsencode(image.identity) == b"caf\xe9"
    assert image.key == "caf_/_"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, r"holds no pictures .*SOURCE/identity/image.jpg"),
        ("loose.jpg", r"loose.jpg does not lie as SOURCE/identity"),
        ("a/b/c/1.jpg", r"a/b/c/1.jpg does not lie as SOURCE/identity"),
        ("a/b/1.jpg", r"a holds pictures and so does a/b in it"),
    ],
)
def test_other_layouts_are_refused_in_one_line(tmp_path, name, message):
    if name:
        put(tmp_path, name)
        put(tmp_path, "a/0.jpg")
    with pytest.raises(ValueError, match=message) as caught:
        scan(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_folder_or_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not there"):
        scan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"1\.jpg is no folder"):
        scan(put(tmp_path, "1.jpg"))


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    put(tmp_path, "open/1.jpg")
    put(tmp_path, "shut/1.jpg")
    listing = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"source folder .*/shut cannot be read: Permission denied"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("head", "extension"),
    [(b"P5\n2 2\n255\n", "pgm"), (b"P2 2 2 255 ", "pgm"), (b"P52", ""), (b"P6\n", ""), (b"GIF89a", ""), (b"", "")],
)
def test_sniff_by_hand(head, extension):
    assert sniff(head) == extension
