import numpy as np
import pytest

from data_shards.face_regions import Regions, build_regions

BOXES = (
    'NAME_ID,X,Y,W,H\n"n000002/0001_01",161,140,224,324\n"n000002/0002_01",-8,5,10,12\n"n000003/0001_01",1.5,2,3,4\n'
)
POINTS = "NAME_ID,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y\n" + '"n1/1",' + ",".join(map(str, range(10))) + "\n"


def write(path, text):
    path.write_text(text)
    return path


def test_boxes_as_vggface2_writes_them(tmp_path):
    built = build_regions([write(tmp_path / "loose_bb_train.csv", BOXES)], "box", tmp_path)
    for regions in (built, Regions.open(tmp_path, "box")):
        assert regions.find("n000002", "0001_01").tolist() == [161, 140, 224, 324]
        assert regions.find("n000002", "0002_01").tolist() == [-8, 5, 10, 12]
        assert regions.find("n000003", "0001_01").tolist() == [1.5, 2, 3, 4]
        assert regions.find("n000003", "0002_01") is None
        assert regions.find("zzz", "0") is None


def test_landmarks_by_path_with_extension_and_other_columns(tmp_path):
    text = "score,P1X,P1Y,P2X,P2Y,P3X,P3Y,P4X,P4Y,P5X,P5Y,NAME_ID\n9,0,1,2,3,4,5,6,7,8,9,faces/Ann Lee/a.b.JPG\n"
    regions = build_regions([write(tmp_path / "a.csv", text), write(tmp_path / "b.csv", POINTS)], "landmarks", tmp_path)
    assert regions.find("Ann Lee", "a.b").tolist() == list(range(10))
    assert regions.find("n1", "1").tolist() == list(range(10))


def test_what_is_no_number_is_nan(tmp_path):
    regions = build_regions([write(tmp_path / "a.csv", "NAME_ID,X,Y,W,H\nn/1,1,,x,4\nn/2,1,2,3,4\n")], "box", tmp_path)
    assert np.array_equal(regions.find("n", "1"), np.array([1, np.nan, np.nan, 4], np.float32), equal_nan=True)
    assert regions.find("n", "2").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NAME_ID,X,Y,W\nn/1,1,2,3\n", "has the columns NAME_ID, X, Y, W: H is missing for a box"),
        ("", "NAME_ID is missing for a box"),
        ("NAME_ID,X,Y,W,H\nn/1,1,2,3\n", "is no CSV file of regions"),
        ("NAME_ID,X,Y,W,H\nn/1,1,2,3,4\nn/1.jpg,1,2,3,5\n", "n/1 has two different entries"),
        ("\x00\x01\x02", "is missing for a box"),
    ],
)
def test_a_file_of_no_use_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_regions([write(tmp_path / "a.csv", text)], "box", tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.csv") in str(caught.value)


def test_the_same_entry_twice_is_one(tmp_path):
    path = write(tmp_path / "a.csv", "NAME_ID,X,Y,W,H\nn/1,1,2,3,4\nn/1,1,2,3,4\n")
    assert build_regions([path], "box", tmp_path).find("n", "1").tolist() == [1, 2, 3, 4]


def test_no_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"regions .*none.csv cannot be read: No such file"):
        build_regions([tmp_path / "none.csv"], "box", tmp_path)
