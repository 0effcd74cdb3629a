import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_shards.transform import ARCFACE, TransformConfig, align, crop_box, similarity, transform


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


def gradient(width, height, mode="RGB"):
    rows, columns = np.indices((height, width))
    pixels = np.stack([columns * 255 / width, rows * 255 / height, np.full((height, width), 128)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortest_edge": 0}, "shortest_edge is 0; it must be 1 to 4,096 pixels"),
        ({"crop": "face"}, "crop is 'face'; it must be one of none, box, align"),
        ({"crop": "box", "box_margin": 0.5}, "box_margin is 0.5"),
        ({"quality": 101}, "quality is 101"),
        ({"size": 112}, "size is 112 but crop is 'none'"),
        ({"crop": "box", "shortest_edge": 9}, "shortest_edge is 9 but crop is 'box': give size instead"),
        ({"format": "gif"}, "format is 'gif'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [({}, False), ({"quality": 80}, False), ({"shortest_edge": 9}, True), ({"format": "jpg"}, True)],
)
def test_nothing_is_changed_by_default(settings, changes):
    assert TransformConfig(**settings).changes_bytes == changes


@pytest.mark.parametrize(
    ("size", "edge", "expected"),
    [((200, 100), 50, (100, 50)), ((100, 200), 50, (50, 100)), ((301, 100), 50, (150, 50)), ((40, 30), 50, (40, 30))],
)
def test_the_shorter_side_shrinks_to_the_edge_and_never_grows(size, edge, expected):
    data, width, height = transform(encode(gradient(*size)), "png", TransformConfig(shortest_edge=edge), None)
    assert (width, height) == expected == opened(data).size


def test_similarity_by_hand():
    # a quarter turn (x, y) -> (-y, x), doubled, and moved by (10, 20)
    source = np.array([(0, 0), (1, 0), (1, 1), (0, 2), (3, 1)], float)
    target = np.stack([-2 * source[:, 1] + 10, 2 * source[:, 0] + 20], axis=1)
    assert similarity(source, target) == pytest.approx(np.array([[0, -2, 10], [2, 0, 20]]), abs=1e-12)


def test_similarity_is_the_least_squares_solution_and_never_a_reflection():
    from scipy.optimize import least_squares

    random = np.random.default_rng(3)
    for _ in range(20):
        source, target = random.normal(size=(2, 5, 2)) * 30
        target[:, 0] *= random.choice([-1, 1])

        def error(p, source=source, target=target):
            return (source @ np.array([[p[0], p[1]], [-p[1], p[0]]]) + p[2:] - target).ravel()

        best = least_squares(error, [1, 0, 0, 0], xtol=1e-14, ftol=1e-14)
        matrix = similarity(source, target)
        ours = np.square(source @ matrix[:, :2].T + matrix[:, 2] - target).sum()
        assert np.linalg.det(matrix[:, :2]) > 0
        assert ours <= 2 * best.cost * (1 + 1e-6)


@pytest.mark.parametrize("size", [112, 224])
@pytest.mark.parametrize("scale", [0.7, 1.0, 2.6, 5.2])
def test_aligned_landmarks_lie_where_the_template_says(size, scale):
    angle, shift = 0.4, np.array([60.0, 90.0]) * scale
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    landmarks = ARCFACE @ turn.T + shift
    rows, columns = np.indices((int(240 * scale), int(200 * scale)))
    for at, point in enumerate(landmarks):
        blob = np.exp(-((columns - point[0]) ** 2 + (rows - point[1]) ** 2) / (2 * (2 * scale) ** 2))
        found = np.asarray(align(Image.fromarray((blob * 255).astype(np.uint8)), landmarks, size)).astype(float)
        y, x = np.indices(found.shape)
        centre = np.array([(found * x).sum(), (found * y).sum()]) / found.sum()
        assert np.abs(centre - ARCFACE[at] * size / 112).max() < 0.5


def test_a_box_grows_about_its_centre_and_is_square():
    image = gradient(200, 200)
    square = crop_box(image, np.array([50.0, 60.0, 40.0, 80.0]), 1.5, None)
    # centre (70, 100), side 120: from (10, 40)
    assert square.size == (120, 120)
    assert np.array_equal(np.asarray(square), np.asarray(image)[40:160, 10:130])
    assert crop_box(image, np.array([50.0, 60.0, 40.0, 80.0]), 1.5, 64).size == (64, 64)


def test_a_box_over_the_edge_is_black_outside():
    image = Image.new("RGB", (100, 100), (255, 255, 255))
    square = np.asarray(crop_box(image, np.array([-10.0, 0.0, 40.0, 40.0]), 1.0, None))
    assert square.shape == (40, 40, 3)
    assert (square[:, :10] == 0).all()
    assert (square[:, 10:] == 255).all()


@pytest.mark.parametrize(
    ("crop", "region", "reason"),
    [
        ("box", None, "has no box in the regions' files"),
        ("box", [1, 2, 0, 5], "has a box in the regions' files that is of no use: 1, 2, 0, 5"),
        ("box", [1, 2, np.nan, 5], "of no use"),
        ("box", [300, 2, 5, 5], r"has a box at \(300, 2\) of 5 x 5 outside its 100 x 80 pixels"),
        ("align", None, "has no five landmarks"),
        ("align", [5] * 10, "has landmarks that lie at one point"),
        ("align", [5] * 9 + [np.inf], "of no use"),
    ],
)
def test_a_region_of_no_use_is_a_reason(crop, region, reason):
    region = None if region is None else np.array(region, np.float32)
    with pytest.raises(ValueError, match=reason):
        transform(encode(gradient(100, 80)), "png", TransformConfig(crop=crop), region)


def test_orientation_is_applied_before_the_box():
    image = Image.new("RGB", (60, 40))
    image.paste((255, 0, 0), (0, 0, 20, 20))  # top left as stored; a quarter turn clockwise puts it top right
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, "JPEG", exif=exif, quality=95)
    box = np.array([20, 0, 20, 20], np.float32)
    done, width, height = transform(data, "jpg", TransformConfig(crop="box", box_margin=1.0), box)
    assert (width, height) == (20, 20)
    assert np.asarray(opened(done)).reshape(-1, 3).mean(axis=0) == pytest.approx([255, 0, 0], abs=12)
    assert not opened(done).getexif()


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [
        ("L", "PNG", "L"),
        ("1", "PNG", "L"),
        ("LA", "PNG", "L"),
        ("P", "PNG", "RGB"),
        ("RGBA", "PNG", "RGB"),
        ("CMYK", "JPEG", "RGB"),
    ],
)
def test_every_colour_mode_becomes_grey_or_rgb(mode, kind, expected):
    data = encode(gradient(40, 30).convert(mode), kind)
    done, *_ = transform(data, "jpg", TransformConfig(shortest_edge=10, format="jpg"), None)
    assert opened(done).mode == expected


def test_16_bits_become_8_without_clipping():
    pixels = np.linspace(0, 65_535, 30 * 40).reshape(30, 40).astype(np.uint16)
    done, *_ = transform(encode(Image.fromarray(pixels)), "png", TransformConfig(format="png"), None)
    assert np.abs(np.asarray(opened(done)).astype(int) - pixels / 257).max() <= 1


@pytest.mark.parametrize(
    ("extension", "format", "kind"), [("jpg", "keep", "JPEG"), ("png", "keep", "PNG"), ("pgm", "webp", "WEBP")]
)
def test_pictures_are_encoded_as_asked(extension, format, kind):
    config = TransformConfig(shortest_edge=10, format=format)
    done, *_ = transform(encode(gradient(40, 30)), extension, config, None)
    assert opened(done).format == kind


def test_quality_decides_the_size():
    data = encode(gradient(300, 200).effect_spread(20))
    sizes = [len(transform(data, "jpg", TransformConfig(format="jpg", quality=q), None)[0]) for q in (20, 60, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_what_does_not_decode_is_a_reason():
    with pytest.raises(ValueError, match="does not decode"):
        transform(encode(gradient(100, 80), "JPEG")[:-200], "jpg", TransformConfig(shortest_edge=10), None)


SCRIPT = """
import hashlib, sys
import numpy as np
from data_shards.transform import TransformConfig, transform
data = open(sys.argv[1], "rb").read()
landmarks = np.array([30, 40, 60, 40, 45, 60, 32, 75, 58, 75], np.float32)
print(hashlib.sha256(transform(data, "jpg", TransformConfig(crop="align"), landmarks)[0]).hexdigest())
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(gradient(100, 120), "JPEG"))
    said = [subprocess.check_output([sys.executable, "-c", SCRIPT, str(tmp_path / "a.jpg")]) for _ in range(2)]
    assert said[0] == said[1]
