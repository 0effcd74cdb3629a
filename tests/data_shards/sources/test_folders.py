import os

import pytest

from data_shards.sources.base import Found, Place, sniff
from data_shards.sources.folders import Folders


def scan(root):
    return list(Folders(str(root)).pictures())


def put(root, name, data=b"\xff\xd8\xff\xe0 jpeg"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_lists_identities_and_pictures_sorted_by_bytes(tmp_path):
    for name in ("b/2.jpg", "b/10.jpg", "a/1.jpg", "Z/1.jpg"):
        os.utime(put(tmp_path, name), ns=(5, 7))
    assert scan(tmp_path) == [
        Found("Z", "Z/1.jpg", "1", 9, "jpg", 0, 0, 7),
        Found("a", "a/1.jpg", "1", 9, "jpg", 0, 1, 7),
        Found("b", "b/10.jpg", "10", 9, "jpg", 0, 2, 7),
        Found("b", "b/2.jpg", "2", 9, "jpg", 0, 3, 7),
    ]


def test_vggface2_parts_are_one_level_further_down_and_merge_by_name(tmp_path):
    put(tmp_path, "train/n000002/0001_01.jpg")
    put(tmp_path, "test/n000001/0001_01.jpg")
    put(tmp_path, "test/n000002/0001_01.jpg")
    put(tmp_path, "notes/read.txt")
    assert [(image.identity, image.stem, image.name) for image in scan(tmp_path)] == [
        ("n000001", "0001_01", "test/n000001/0001_01.jpg"),
        ("n000002", "0001_01", "test/n000002/0001_01.jpg"),
        ("n000002", "0001_01", "train/n000002/0001_01.jpg"),
    ]


def test_many_identities_are_listed_in_order_one_by_one_and_by_threads(tmp_path, monkeypatch):
    names = [f"id{number:03d}/{image}.jpg" for number in range(60) for image in (1, 2)]
    for name in names:
        put(tmp_path, name)
    assert [image.name for image in scan(tmp_path)] == names
    monkeypatch.setattr("data_shards.sources.folders.SLOW_LISTING_S", 0.0)
    assert [image.name for image in scan(tmp_path)] == names


def test_passes_over_hidden_files_folders_and_other_kinds(tmp_path):
    for name in ("a/1.jpg", "a/.2.jpg", ".git/3.jpg", "a/notes.txt", "README", "a/.DS_Store"):
        put(tmp_path, name)
    assert [image.name for image in scan(tmp_path)] == ["a/1.jpg"]


@pytest.mark.parametrize(
    ("name", "extension"),
    [("x.JPG", "jpg"), ("x.jpeg", "jpg"), ("x.png", "png"), ("x.pgm", "pgm"), ("x.bmp", "bmp"), ("x.webp", "webp")],
)
def test_every_kind_in_any_case(tmp_path, name, extension):
    put(tmp_path, f"a/{name}")
    assert [(image.stem, image.extension) for image in scan(tmp_path)] == [("x", extension)]


def test_a_broken_link_or_pipe_is_refused_and_does_not_hang(tmp_path):
    put(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "a" / "3.jpg")
    (tmp_path / "a" / "4.jpg").symlink_to("4.jpg")
    assert [(image.name, image.refused) for image in scan(tmp_path)] == [
        ("a/1.jpg", ""),
        ("a/2.jpg", "cannot be read: No such file or directory"),
        ("a/3.jpg", "is no regular file"),
        ("a/4.jpg", "cannot be read: Too many levels of symbolic links"),
    ]


def test_links_to_folders_are_followed_but_not_round_in_circles(tmp_path):
    put(tmp_path, "in/a/1.jpg")
    put(tmp_path, "elsewhere/2.jpg")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    (tmp_path / "in" / "a" / "self").symlink_to(tmp_path / "in" / "a")
    assert [(image.name, image.refused) for image in scan(tmp_path / "in")] == [
        ("a/1.jpg", ""),
        ("b/2.jpg", ""),
        ("a/self", "is a link to a folder that holds it"),
        ("up", "is a link to a folder that holds it"),
    ]


def test_the_reader_gives_the_bytes_also_of_a_file_that_has_grown_or_shrunk(tmp_path):
    put(tmp_path, "a/1.jpg", b"0123456789" * 1000)
    reader = Folders(str(tmp_path)).open()
    for listed in (10_000, 9_000, 11_000, 0):
        assert reader.read(Place("a/1.jpg", 0, 0, listed)) == b"0123456789" * 1000
    os.mkfifo(tmp_path / "a" / "2.jpg")
    with pytest.raises(OSError, match="no regular file"):
        reader.read(Place("a/2.jpg", 0, 0, 5))
    with pytest.raises(FileNotFoundError):
        reader.read(Place("a/3.jpg", 0, 0, 5))


def test_a_name_that_is_no_utf8_is_kept_apart(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    with open(os.path.join(folder, b"\xff.jpg"), "wb") as file:
        file.write(b"picture")
    (image,) = scan(tmp_path)
    assert os.fsencode(image.identity) == b"caf\xe9"
    assert os.fsencode(image.name) == b"caf\xe9/\xff.jpg"
    assert Folders(str(tmp_path)).open().read(Place(image.name, 0, 0, 7)) == b"picture"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loose.jpg", r"loose.jpg does not lie as SOURCE/identity"),
        ("a/b/c/1.jpg", r"a/b/c/1.jpg does not lie as SOURCE/identity"),
        ("a/b/1.jpg", r"a holds pictures and so does a/b in it"),
    ],
)
def test_other_layouts_are_refused_in_one_line(tmp_path, name, message):
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


def test_a_url_is_listed_and_read_like_a_folder(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("train/a/1.jpg", "train/b/2.png", "train/b/.3.jpg", "notes.txt"):
        put(tmp_path, name, name.encode())
        system.pipe_file(f"/faces/{name}", name.encode())
    try:
        here, there = Folders(str(tmp_path)), Folders("memory://faces")
        assert [image._replace(stamp=0) for image in here.pictures()] == list(there.pictures())
        for image in there.pictures():
            place = Place(image.name, image.part, image.offset, image.size)
            assert there.open().read(place) == here.open().read(place) == image.name.encode()
        with pytest.raises(ValueError, match="memory://nothing is not there or empty"):
            list(Folders("memory://nothing").pictures())
    finally:
        system.rm("/faces", recursive=True)
