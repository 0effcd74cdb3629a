"""YuNet on drawn and on real faces: what is found moves as the picture does, however large the picture is."""

import numpy as np
import pytest
from collections_on_disk import ORL, needs_orl
from PIL import Image

from data_shards.face_detector import YUNET, Face, FaceDetector, choose
from data_shards.transform import TEMPLATE, align


@pytest.fixture(scope="module")
def detector():
    return FaceDetector()


@pytest.fixture(scope="module")
def picture():
    """A real face, 184 x 224, on grey of 240 x 240."""
    if not ORL.is_dir():
        pytest.skip(f"the ORL faces are not at {ORL}")
    whole = Image.new("RGB", (240, 240), (128, 128, 128))
    with Image.open(ORL / "s2" / "1.pgm") as image:
        whole.paste(image.resize((184, 224), Image.Resampling.BICUBIC), (28, 8))
    return whole


def landmarks(detector, image):
    faces = detector.faces(image)
    assert len(faces) == 1
    return detector.refined(image, faces[0]).landmarks


def test_landmarks_lie_in_their_order(detector, picture):
    left_eye, right_eye, nose, left_mouth, right_mouth = landmarks(detector, picture)
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < nose[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_they_turn_with_the_picture(detector, picture):
    upright = landmarks(detector, picture)
    middle, angle = 119.5, np.deg2rad(20)
    turned = landmarks(detector, picture.rotate(20, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)))
    x, y = (upright - middle).T  # counter-clockwise, as seen; y points down
    expected = np.stack([x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)], 1) + middle
    assert np.abs(turned - expected).max() < 6, "pixels of 240"


@pytest.mark.parametrize("factor", [4, 10])
def test_a_large_picture_has_them_at_its_own_scale(detector, picture, factor):
    """Looked at in 640 pixels."""
    small = landmarks(detector, picture)
    large = landmarks(detector, picture.resize((240 * factor, 240 * factor), Image.Resampling.BICUBIC))
    assert np.abs((large + 0.5) / factor - 0.5 - small).max() < 3


def test_a_small_face_in_a_large_photograph(detector, picture):
    """26 pixels at 640, too few; found where it is looked at again in 1,920."""
    photograph = Image.new("RGB", (3000, 2000), (90, 120, 140))
    photograph.paste(picture.resize((120, 120)), (2000, 1500))
    face = detector.faces(photograph)[0]
    assert 2000 < face.landmarks[:, 0].min() < face.landmarks[:, 0].max() < 2120
    assert 1500 < face.landmarks[:, 1].min() < face.landmarks[:, 1].max() < 1620


def test_two_faces_come_the_largest_first(detector, picture):
    both = Image.new("RGB", (420, 240), (128, 128, 128))
    both.paste(picture.resize((100, 100)), (20, 50))
    both.paste(picture, (180, 0))
    large, small = detector.faces(both)
    assert large.box[0] > 180 > small.box[0]
    assert choose([large, small], "largest", both.size) is large
    assert choose([large, small], "central", (140, 200)) is small
    with pytest.raises(ValueError, match="has 2 faces"):
        choose([large, small], "one", both.size)


def test_central_goes_by_the_middle_of_the_box():
    left, right = (Face((x, 10, 20, 20), np.zeros((5, 2)), 0.9) for x in (0, 60))
    assert choose([left, right], "central", (100, 40)) is right  # 70 is nearer to 50 than 10
    assert choose([left, right], "central", (40, 40)) is left


def test_nothing_is_found_where_no_face_is(detector):
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    for image in (Image.fromarray(noise), Image.new("L", (1, 1)), Image.new("RGB", (900, 30), "white")):
        assert detector.faces(image) == []
        with pytest.raises(ValueError, match="has no face that was found"):
            choose([], "largest", image.size)


@needs_orl
def test_every_orl_face_is_found_and_lies_in_the_template(detector):
    """Found again after it was aligned, each landmark within 6 pixels of its place, 2.5 on average."""
    off = []
    for path in sorted(ORL.glob("s*/[16].pgm")):
        with Image.open(path) as image:
            aligned = align(image, landmarks(detector, image), (112, 112))
        off.append(np.abs(landmarks(detector, aligned) - TEMPLATE))
    assert len(off) == 80
    assert np.mean(off) < 2.5
    assert np.median(np.max(off, axis=(1, 2))) < 6


def test_a_file_that_is_no_yunet_is_refused(tmp_path):
    other = tmp_path / "other.onnx"
    other.write_bytes(YUNET.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"detector .*other\.onnx is no YuNet of 2023 in ONNX"):
        FaceDetector(other)
    with pytest.raises(ValueError, match=r"detector .*none\.onnx is not there"):
        FaceDetector(tmp_path / "none.onnx")
