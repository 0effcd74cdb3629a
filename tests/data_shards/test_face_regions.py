"""Boxes and landmarks read out of CSV files as VGGFace2 ships them."""

import multiprocessing

import numpy as np
import pytest

from data_shards.face_regions import Regions, build_regions

BOX_HEADER = "NAME_ID,X,Y,W,H\n"
LANDMARK_HEADER = "NAME_ID,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y\n"


def boxes(tmp_path, *texts, name="regions"):
    files = []
    for number, text in enumerate(texts):
        files.append(tmp_path / f"{name}{number}.csv")
        files[-1].write_bytes(text if isinstance(text, bytes) else text.encode())
    return build_regions(files, "box", tmp_path / "built")


def test_boxes_as_vggface2_writes_them(tmp_path):
    found = boxes(tmp_path, BOX_HEADER + '"n000002/0001_01",161,140,224,324\n"n000002/0002_01",-7,-3.5,96,123\n')
    assert len(found) == 2
    assert found.find("n000002", "0001_01").tolist() == [161, 140, 224, 324]
    assert found.find("n000002", "0002_01").tolist() == [-7, -3.5, 96, 123]
    assert found.find("n000002", "0003_01") is None
    assert found.find("n000003", "0001_01") is None


def test_landmarks_as_vggface2_writes_them(tmp_path):
    file = tmp_path / "loose_landmark_train.csv"
    file.write_text(LANDMARK_HEADER + '"n000002/0001_01",75.81,110.24,103.66,104.93,90.0,1,2,3,4,5.25\n')
    found = build_regions([file], "landmarks", tmp_path / "built").find("n000002", "0001_01")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32([75.81, 110.24, 103.66, 104.93, 90.0, 1, 2, 3, 4, 5.25]))


@pytest.mark.parametrize(
    "name",
    ["a/b", '"a/b"', "a/b.jpg", "a/b.JPEG", "train/a/b.png", "/data/x/train/a/b.webp", "./a/b.pgm", "a/b.bmp"],
)
def test_a_picture_may_be_named_by_its_path(tmp_path, name):
    assert boxes(tmp_path, f"{BOX_HEADER}{name},1,2,3,4\n").find("a", "b").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("line", "identity", "stem"),
    [
        ("a/b.c,1,2,3,4", "a", "b.c"),  # no extension of a picture
        ("a/b.c.jpg,1,2,3,4", "a", "b.c"),
        ("a.jpg/b,1,2,3,4", "a.jpg", "b"),
        ('"a, b/c",1,2,3,4', "a, b", "c"),
        ("José/ñandú,1,2,3,4", "José", "ñandú"),
        ("a/b, 1 ,2 , 3,4", "a", "b"),
    ],
)
def test_names_and_numbers_of_all_kinds(tmp_path, line, identity, stem):
    assert boxes(tmp_path, f"{BOX_HEADER}{line}\n").find(identity, stem).tolist() == [1, 2, 3, 4]


def test_a_name_that_is_no_utf8_is_found_as_python_lists_it(tmp_path):
    found = boxes(tmp_path, BOX_HEADER.encode() + b"a\xff/b\xe9.jpg,1,2,3,4\n")
    assert found.find("a\udcff", "b\udce9").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "header",
    [
        "\ufeffNAME_ID,X,Y,W,H,score,score",
        'name_id,x,y,w,h,"a, b",',
        '"NAME_ID", "X", "Y", "W", "H", more, more',
    ],
)
def test_columns_are_found_by_header(tmp_path, header):
    assert boxes(tmp_path, f"{header}\na/b,1,2,3,4,x,\n").find("a", "b").tolist() == [1, 2, 3, 4]


def test_columns_in_another_order_and_windows_line_ends(tmp_path):
    text = "H,note,W,NAME_ID,Y,X\r\n4,hello,3,a/b,2,1\r\n8,,7,a/c,6,5\r\n"
    found = boxes(tmp_path, text)
    assert found.find("a", "b").tolist() == [1, 2, 3, 4]
    assert found.find("a", "c").tolist() == [5, 6, 7, 8]


def test_several_files_are_one_collection(tmp_path):
    found = boxes(tmp_path, BOX_HEADER + "a/b,1,2,3,4\n", BOX_HEADER + "c/d.jpg,5,6,7,8")
    assert found.find("a", "b").tolist() == [1, 2, 3, 4]
    assert found.find("c", "d").tolist() == [5, 6, 7, 8]


def test_every_one_of_many_is_found(tmp_path):
    """More rows than one block of the CSV reader, with a bad number in the middle of one."""
    rows = 300_000
    lines = [
        f"n{row // 300:06d}/{row:07d}.jpg,{row % 251},{row % 241},{row % 239 + 1},{row % 233 + 1}"
        for row in range(rows)
    ]
    lines[150_000] = "bad/row,1,2,x,4"
    found = boxes(tmp_path, BOX_HEADER + "\n".join(lines))
    assert len(found) == rows
    for row in [*range(0, 150_000, 997), *range(150_001, rows, 997), rows - 1]:
        expected = [row % 251, row % 241, row % 239 + 1, row % 233 + 1]
        assert found.find(f"n{row // 300:06d}", f"{row:07d}").tolist() == expected
    with pytest.raises(ValueError, match="has no usable box"):
        found.find("bad", "row")


def test_the_row_of_a_contradiction_is_counted_through_the_whole_file(tmp_path):
    lines = [f"a/{row},1,2,3,4" for row in range(600_000)]
    with pytest.raises(ValueError, match="row 600,001 gives a/7 another box than a row before it"):
        boxes(tmp_path, BOX_HEADER + "\n".join([*lines, "a/7,1,2,3,5"]))


def test_other_processes_map_the_same_files(tmp_path):
    built = boxes(tmp_path, BOX_HEADER + "a/b,1,2,3,4\n")
    assert isinstance(built.keys, np.memmap)
    assert isinstance(built.values, np.memmap)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_find_elsewhere, (tmp_path / "built",)) == [1, 2, 3, 4]
        pool.close()
        pool.join()


def _find_elsewhere(folder):
    return Regions.open(folder, "box").find("a", "b").tolist()


def test_boxes_and_landmarks_may_share_a_folder(tmp_path):
    boxes(tmp_path, BOX_HEADER + "a/b,1,2,3,4\n")
    file = tmp_path / "landmarks.csv"
    file.write_text(LANDMARK_HEADER + "a/b,1,2,3,4,5,6,7,8,9,10\n")
    build_regions([file], "landmarks", tmp_path / "built")
    assert Regions.open(tmp_path / "built", "box").find("a", "b").tolist() == [1, 2, 3, 4]
    assert Regions.open(tmp_path / "built", "landmarks").find("a", "b").tolist() == list(range(1, 11))


# --- rows that make no sense cost their own picture


@pytest.mark.parametrize(
    "numbers",
    [
        "1,2,0,4",
        "1,2,3,-4",
        "nan,2,3,4",
        "1,NaN,3,4",
        "1,2,inf,4",
        "1,-inf,3,4",
        "1,2,x,4",
        "1,,3,4",
        "1,2,3,1e99",
        "1,2,3,1_0",
        "1,2,1e-60,4",
    ],
)
def test_a_bad_row_costs_its_picture_only(tmp_path, numbers):
    found = boxes(tmp_path, f"{BOX_HEADER}a/bad,{numbers}\na/good,1,2,3,4\n")
    assert found.find("a", "good").tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"^has no usable box$"):
        found.find("a", "bad")


def test_a_number_that_is_no_text_costs_its_picture_only(tmp_path):
    found = boxes(tmp_path, BOX_HEADER.encode() + b"a/bad,1,2,\xff\xfe,4\na/good,1,2,3,4\n")
    assert found.find("a", "good").tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="has no usable box"):
        found.find("a", "bad")


def test_landmarks_may_be_zero_or_negative_but_not_missing(tmp_path):
    file = tmp_path / "landmarks.csv"
    file.write_text(LANDMARK_HEADER + "a/b,0,-2,3,4,5,6,7,8,9,10\na/c,1,2,3,4,5,6,7,8,9,nan\n")
    found = build_regions([file], "landmarks", tmp_path / "built")
    assert found.find("a", "b").tolist() == [0, -2, 3, 4, 5, 6, 7, 8, 9, 10]
    with pytest.raises(ValueError, match=r"^has no usable landmarks$"):
        found.find("a", "c")


# --- the same picture twice


def test_the_same_again_does_no_harm(tmp_path):
    found = boxes(
        tmp_path, BOX_HEADER + "a/b,1,2,3,4\na/c,5,6,7,8\n", BOX_HEADER + "t/a/b.jpg,1,2,3.0,4\na/c,5,6,7,8\n"
    )
    assert len(found) == 2
    assert found.find("a", "b").tolist() == [1, 2, 3, 4]


def test_the_same_bad_row_again_does_no_harm(tmp_path):
    assert len(boxes(tmp_path, BOX_HEADER + "a/b,1,2,0,4\na/b,1,2,0,4\n")) == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a/b,1,2,3,4\na/c,1,2,3,4\na/b,1,2,3,5\n"], "regions0.csv: row 3 gives a/b another box than a row before it"),
        (["a/b,1,2,3,4\n", "c/d,1,2,3,4\na/b.jpg,9,2,3,4\n"], "regions1.csv: row 2 gives a/b another box"),
        (["a/b,1,2,3,4\na/b,1,2,0,4\n"], "row 2 gives a/b another box"),
        (["a/b,1,2,3,4\na/b,1,2,3,4\na/b,1,2,3,9\n"], "row 3 gives a/b another box"),
    ],
)
def test_two_boxes_for_one_picture_are_refused(tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        boxes(tmp_path, *[BOX_HEADER + text for text in texts])


# --- files that are not usable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none: needed are NAME_ID, X, Y, W, H, as in VGGFace2's loose_bb_train.csv"),
        ("\n", "has the columns none"),
        ("NAME_ID,X,Y,W\na/b,1,2,3\n", "has the columns NAME_ID, X, Y, W: needed are NAME_ID, X, Y, W, H"),
        ("NAME_ID,X,X,Y,W,H\n", "has the columns NAME_ID, X, X, Y, W, H: needed"),
        (LANDMARK_HEADER, "has the columns NAME_ID, P1X, .*: needed are NAME_ID, X, Y, W, H"),
        ("n000002/0001_01,161,140,224,324\n", "has the columns n000002/0001_01, 161"),
        (b"\xff\xd8\xff\xe0" + bytes(range(256)) * 99, "has the columns "),
        (b"\0" * 100_000, "has the columns "),
        (BOX_HEADER, "has a header but no rows"),
        (BOX_HEADER + "\n\n", "has a header but no rows|is no usable CSV file"),
        (BOX_HEADER + "a/b,1,2,3,4\na/c,1,2\n", "is no usable CSV file: .*Expected 5 columns, got 3"),
        (BOX_HEADER + "a/b,1,2,3,4,5\n", "is no usable CSV file"),
        (BOX_HEADER + 'a/b,1,2,3,4\n"a/c', "is no usable CSV file"),
        (BOX_HEADER + "a/b,1,2,3,4\nc.jpg,1,2,3,4\n", "row 2 names the picture 'c.jpg': needed is identity/image"),
    ],
)
def test_a_file_that_is_not_usable_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        boxes(tmp_path, text)
    assert str(error.value).startswith(f"regions {tmp_path}/regions0.csv")
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"regions .*absent\.csv cannot be read: No such file"):
        build_regions([tmp_path / "absent.csv"], "box", tmp_path / "built")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        build_regions([tmp_path], "box", tmp_path / "built")
    with pytest.raises(ValueError, match="is not a URL that we read"):
        build_regions(["pipe:rm x"], "box", tmp_path / "built")


def test_a_file_may_lie_at_a_url(tmp_path):
    import fsspec

    with fsspec.open("memory://meta/boxes.csv", "wb") as file:
        file.write(f"{BOX_HEADER}a/b,1,2,3,4\n".encode())
    found = build_regions(["memory://meta/boxes.csv"], "box", tmp_path / "built")
    assert found.find("a", "b").tolist() == [1, 2, 3, 4]


def test_what_was_built_must_be_whole_to_be_opened(tmp_path):
    boxes(tmp_path, BOX_HEADER + "a/b,1,2,3,4\na/c,1,2,3,4\n")
    with pytest.raises(ValueError, match="cannot be opened"):
        Regions.open(tmp_path / "built", "landmarks")
    values = tmp_path / "built" / "box_values.npy"
    whole = values.read_bytes()
    values.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="cannot be opened"):
        Regions.open(tmp_path / "built", "box")
    np.save(values, np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="are damaged"):
        Regions.open(tmp_path / "built", "box")
