"""Pictures made smaller, cropped, aligned and encoded again: geometry against hand computation, scipy and OpenCV."""

import hashlib
import io
import math
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from scipy.optimize import least_squares

from data_shards.transform import (
    TEMPLATE,
    TransformConfig,
    align,
    box_to_crop,
    decoded,
    similarity,
    template_for,
    transform,
)

FORMATS = {"jpg": "JPEG", "png": "PNG", "pgm": "PPM", "bmp": "BMP", "webp": "WEBP"}


def encode(pixels, extension="png", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[extension], **options)
    return buffer.getvalue()


def pixels_of(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def ramp(height, width, channels=3):
    """Every channel differs, and so does every row and column."""
    rows, columns = np.indices((height, width))
    planes = [(rows * 2 + columns * (channel + 1) + channel * 40) % 256 for channel in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8).squeeze()


def smooth(height, width):
    rows, columns = np.indices((height, width)) / 20
    return (128 + 60 * np.sin(rows + 0.3 * columns) + 60 * np.cos(columns)).astype(np.uint8)


def turned(points, degrees, scale, shift):
    angle = math.radians(degrees)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([(cos * x - sin * y + shift[0], sin * x + cos * y + shift[1]) for x, y in points])


def dot(height, width, at, radius):
    """A soft disc whose centre of mass is `at`, whole numbers at pixel centres."""
    rows, columns = np.indices((height, width))
    return (255 * np.exp(-((columns - at[0]) ** 2 + (rows - at[1]) ** 2) / (2 * radius**2))).astype(np.uint8)


def centre_of_mass(pixels):
    weight = pixels.astype(float)
    rows, columns = np.indices(pixels.shape)
    return np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "face"}, "crop is 'face'; it must be one of none, box, align"),
        ({"format": "gif"}, "format is 'gif'; it must be one of jpg, png, webp, keep"),
        ({"shortest_edge": 0}, "shortest_edge is 0; it must be 1 to 65535 pixels"),
        ({"crop": "box", "size": 0}, "size is 0; it must be 1 to 65535 pixels"),
        ({"crop": "box", "size": (10, -1)}, r"size is \(10, -1\); it must be 1 to"),
        ({"crop": "box", "size": (1, 2, 3)}, r"size is \(1, 2, 3\); it must be one side or a width and a height"),
        ({"crop": "box", "size": 20_000}, "size is 20000; it must be at most 100,000,000 pixels"),
        ({"quality": 101, "format": "jpg"}, "quality is 101; it must be 1 to 100"),
        ({"quality": 80}, "quality is 80, but nothing is encoded again"),
        ({"crop": "box", "box_margin": 0.0}, "box_margin is 0.0; it must be above 0 and at most 10"),
        ({"crop": "box", "box_margin": math.nan}, "box_margin is nan"),
        ({"crop": "align", "box_margin": 2.0}, "box_margin is 2.0 with crop 'align'"),
        ({"size": 112}, "size is 112 with crop 'none'"),
        ({"crop": "box", "size": 112, "shortest_edge": 50}, "shortest_edge is 50 with crop 'box', size 112; give one"),
        ({"crop": "align", "shortest_edge": 50}, "shortest_edge is 50 with crop 'align'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        TransformConfig(**settings)
    assert "\n" not in str(error.value)


def test_bytes_change_only_when_asked_to():
    assert not TransformConfig().changes_bytes
    for settings in ({"shortest_edge": 9}, {"crop": "box"}, {"crop": "align"}, {"format": "png"}):
        assert TransformConfig(**settings).changes_bytes


def test_extension_and_size_follow_from_the_settings():
    assert TransformConfig(shortest_edge=9).extension("pgm") == "pgm"
    assert TransformConfig(format="jpg").extension("pgm") == "jpg"
    assert TransformConfig(crop="align").output_size == (112, 112)
    assert TransformConfig(crop="box").output_size is None
    assert TransformConfig(crop="box", size=(96, 112)).output_size == (96, 112)


# --- shrinking


@pytest.mark.parametrize(
    ("width", "height", "edge", "expected"),
    [
        (300, 200, 100, (150, 100)),
        (200, 300, 100, (100, 150)),
        (101, 50, 25, (51, 25)),  # 50.5 is rounded up
        (200, 200, 64, (64, 64)),
        (300, 200, 200, (300, 200)),
        (30, 20, 100, (30, 20)),  # never enlarged
    ],
)
def test_the_shortest_edge_is_what_was_asked_for(width, height, edge, expected):
    data, extension, *size = transform(encode(ramp(height, width)), "png", TransformConfig(shortest_edge=edge))
    assert (extension, tuple(size)) == ("png", expected)
    assert pixels_of(data).shape == (expected[1], expected[0], 3)


def test_shrinking_averages_and_does_not_skip_pixels():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    data, *_ = transform(encode(stripes), "png", TransformConfig(shortest_edge=8))
    assert abs(pixels_of(data).astype(int) - 127.5).max() < 2


def test_a_picture_that_is_small_enough_keeps_its_pixels():
    picture = ramp(20, 30)
    data, *_ = transform(encode(picture), "png", TransformConfig(shortest_edge=100))
    np.testing.assert_array_equal(pixels_of(data), picture)


# --- colours and depths


def test_grey_stays_grey_and_colour_colour():
    for picture in (ramp(8, 9, 1), ramp(8, 9)):
        for extension in ("jpg", "png", "bmp"):
            data, *_ = transform(encode(picture, extension), extension, TransformConfig(shortest_edge=100))
            assert pixels_of(data).shape == picture.shape


@pytest.mark.parametrize("extension", ["png", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(extension):
    wide = np.array([[0, 128, 129, 257, 32_896, 65_535]], np.uint16)  # in 257ths: 0, 0.498, 0.502, 1, 128, 255
    data, kept, *_ = transform(encode(wide, extension), extension, TransformConfig(shortest_edge=9))
    assert kept == extension
    assert pixels_of(data).tolist() == [[0, 0, 1, 1, 128, 255]]


def test_a_palette_becomes_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    data, *_ = transform(encode(image), "png", TransformConfig(shortest_edge=9))
    assert pixels_of(data).tolist() == [[[200, 100, 50], [10, 20, 30]]]


@pytest.mark.parametrize(("mode", "expected"), [("RGBA", [[[9, 8, 7]]]), ("LA", [[9]])])
def test_alpha_is_dropped(mode, expected):
    image = Image.new(mode, (1, 1), {"RGBA": (9, 8, 7, 0), "LA": (9, 0)}[mode])
    data, *_ = transform(encode(image), "png", TransformConfig(shortest_edge=9))
    assert pixels_of(data).tolist() == expected


def test_one_bit_becomes_black_and_white():
    image = Image.new("1", (2, 1))
    image.putdata([0, 255])
    data, *_ = transform(encode(image), "png", TransformConfig(shortest_edge=9))
    assert pixels_of(data).tolist() == [[0, 255]]


def test_cmyk_becomes_rgb():
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpg", quality=100)
    data, *_ = transform(data, "jpg", TransformConfig(format="png"))
    assert abs(pixels_of(data).astype(int) - (255, 0, 0)).max() <= 3


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encode(frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True)
    data, *_ = transform(data, "webp", TransformConfig(format="png"))
    assert pixels_of(data)[0, 0].tolist() == [250, 0, 0]


# --- encoding


@pytest.mark.parametrize(("chosen", "name"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("keep", "BMP")])
def test_the_format_is_what_was_asked_for(chosen, name):
    data, extension, *_ = transform(encode(ramp(9, 9), "bmp"), "bmp", TransformConfig(format=chosen, shortest_edge=9))
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == name
    assert extension == ("bmp" if chosen == "keep" else chosen)


@pytest.mark.parametrize("chosen", ["jpg", "webp"])
def test_a_lower_quality_gives_fewer_bytes(chosen):
    picture = encode(ramp(64, 64))
    sizes = [len(transform(picture, "png", TransformConfig(format=chosen, quality=q))[0]) for q in (20, 60, 95)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("chosen", ["jpg", "png", "webp"])
def test_no_metadata_and_no_profile_survive(chosen):
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = PngInfo()
    text.add_text("Comment", "SecretPlace")
    tagged = {
        "jpg": encode(ramp(9, 9), "jpg", exif=exif, icc_profile=profile, comment=b"SecretPlace", dpi=(300, 300)),
        "png": encode(ramp(9, 9), "png", exif=exif, icc_profile=profile, pnginfo=text, dpi=(300, 300)),
        "webp": encode(ramp(9, 9), "webp", exif=exif, icc_profile=profile),
    }
    for extension, data in tagged.items():
        assert b"SecretCamera" in data
        result, *_ = transform(data, extension, TransformConfig(format=chosen))
        assert b"Secret" not in result
        with Image.open(io.BytesIO(result)) as image:
            assert not {"icc_profile", "exif", "comment", "Comment", "dpi"} & set(image.info) - {"dpi"}
            assert image.info.get("dpi") != (300, 300)


def test_what_a_format_cannot_hold_costs_the_picture():
    with pytest.raises(ValueError, match="cannot be encoded as webp of 17000 x 1"):
        transform(encode(np.zeros((1, 17_000), np.uint8)), "png", TransformConfig(format="webp"))


@pytest.mark.parametrize("extension", list(FORMATS))
def test_damaged_pictures_cost_only_themselves(extension):
    whole = encode(ramp(40, 40, 1), extension)
    for data in (b"", whole[:10], whole[: len(whole) // 2], b"\0" * 100):
        with pytest.raises(ValueError, match=f"^does not decode as {FORMATS[extension]}: ") as error:
            transform(data, extension, TransformConfig(format="jpg"))
        assert "\n" not in str(error.value)


def test_damaged_exif_data_does_not_cost_the_picture():
    whole = encode(ramp(9, 9), "jpg")
    data = whole[:2] + b"\xff\xe1\0\x10Exif\0\0MM\0*\xff\xff\xff\xff" + whole[2:]
    assert transform(data, "jpg", TransformConfig(format="png"))[2:] == (9, 9)


def test_another_process_gives_the_same_bytes():
    program = (
        "import hashlib, numpy as np, sys; sys.path.insert(0, 'tests/data_shards'); import test_transform as t;"
        "print(t.digest_of_everything())"
    )
    for seed in ("1", "2"):
        environment = {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": ":".join(p for p in sys.path if p),
            "OMP_NUM_THREADS": seed,
        }
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == digest_of_everything(), done.stderr


def digest_of_everything():
    digest = hashlib.sha256()
    landmarks = turned(TEMPLATE, 20, 2.3, (30, -10)).ravel()
    for chosen in ("jpg", "png", "webp"):
        for settings, region in (
            ({"shortest_edge": 50}, None),
            ({"crop": "box", "size": 60}, np.array([20, 30, 100, 120])),
            ({"crop": "align"}, landmarks),
        ):
            config = TransformConfig(format=chosen, **settings)
            digest.update(transform(encode(ramp(300, 320), "jpg"), "jpg", config, region)[0])
    return digest.hexdigest()


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_before_all_else(orientation):
    """The picture as displayed is 30 x 20 with a white box at 20, 5; it is stored turned, as a camera would."""
    shown = np.zeros((20, 30), np.uint8)
    shown[5:10, 20:25] = 255
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(undo[orientation](shown), exif=exif)
    assert transform(data, "png", TransformConfig(format="png"))[2:] == (30, 20)
    config = TransformConfig(crop="box", box_margin=1.0)
    cropped, _, *size = transform(data, "png", config, np.array([20, 5, 5, 5], np.float32))
    assert size == [5, 5]
    assert (pixels_of(cropped) == 255).all()


# --- boxes


@pytest.mark.parametrize(
    ("box", "margin", "aspect", "expected"),
    [
        ((40, 30, 20, 10), 1.5, 1.0, (35, 20, 65, 50)),  # side 20 x 1.5 about (50, 35)
        ((40, 30, 10, 20), 1.5, 1.0, (30, 25, 60, 55)),
        ((40, 30, 20, 20), 1.0, 1.0, (40, 30, 60, 50)),
        ((40, 30, 20, 20), 1.3, 1.0, (37, 27, 63, 53)),  # 26 about (50, 40)
        ((0, 30, 20, 20), 1.3, 1.0, (0, 27, 26, 53)),  # -3: shifted to the right
        ((-6, 100, 20, 20), 1.0, 1.0, (0, 90, 20, 110)),  # up by 10
        ((10, 20, 60, 70), 2.0, 1.0, (-30, -15, 110, 125)),  # 140 about (40, 55) holds 100 x 110
        ((60, 20, 40, 70), 1.5, 1.0, (0, 3, 105, 108)),  # 28..133: shifted till it holds 0..100; 2.5 up
        ((40, 30, 20, 20), 1.0, 0.5, (40, 20, 60, 60)),  # twice as high as wide
        ((40, 30, 20, 20), 1.0, 2.0, (30, 30, 70, 50)),
    ],
)
def test_crop_of_a_box_in_100_x_110(box, margin, aspect, expected):
    assert box_to_crop(np.array(box, float), margin, (100, 110), aspect) == expected


def test_the_crop_is_the_pixels_of_the_box():
    picture = ramp(110, 100)
    config = TransformConfig(crop="box", box_margin=1.5)
    data, *_ = transform(encode(picture), "png", config, np.array([40, 30, 20, 10], np.float32))
    np.testing.assert_array_equal(pixels_of(data), picture[20:50, 35:65])


def test_a_crop_larger_than_the_picture_is_black_around_it():
    picture = np.full((10, 20), 200, np.uint8)
    config = TransformConfig(crop="box", box_margin=1.0)
    data, _, *size = transform(encode(picture), "png", config, np.array([0, 0, 20, 10], np.float32))
    expected = np.zeros((20, 20), np.uint8)
    expected[5:15] = 200
    assert size == [20, 20]
    np.testing.assert_array_equal(pixels_of(data), expected)


@pytest.mark.parametrize("size", [8, 16, 300, (30, 60)])
def test_a_crop_gets_the_size_asked_for(size):
    config = TransformConfig(crop="box", size=size)
    data, _, width, height = transform(encode(ramp(110, 100)), "png", config, np.array([40, 30, 20, 10], np.float32))
    assert (width, height) == (size if isinstance(size, tuple) else (size, size))
    assert pixels_of(data).shape == (height, width, 3)


def test_a_crop_without_size_is_shrunk_to_the_shortest_edge():
    config = TransformConfig(crop="box", box_margin=1.0, shortest_edge=30)
    for side, expected in ((60, 30), (20, 20)):
        box = np.array([5, 5, side, side], np.float32)
        assert transform(encode(ramp(100, 100)), "png", config, box)[2:] == (expected, expected)


def test_a_circle_stays_round_in_a_size_that_is_not_square():
    config = TransformConfig(crop="box", box_margin=1.0, size=(40, 80))
    data, *_ = transform(encode(dot(200, 200, (100, 100), 8)), "png", config, np.array([80, 80, 40, 40], np.float32))
    bright = pixels_of(data) > 128
    assert abs(int(bright.any(axis=0).sum()) - int(bright.any(axis=1).sum())) <= 1


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((200, 0, 10, 10), "has a box of 10 x 10 at 200, 0, which does not fit its 100 x 110 pixels"),
        ((-20, 0, 10, 10), "does not fit"),
        ((0, 0, 1e9, 1e9), "does not fit"),
        ((0, 0, 0, 10), "has a box of 0 x 10 at 0, 0"),
        ((math.nan, 0, 10, 10), "has a box of 10 x 10 at nan, 0"),
        ((0, math.inf, 10, 10), "has a box of"),
    ],
)
def test_a_box_that_makes_no_sense_costs_the_picture(box, message):
    with pytest.raises(ValueError, match=message):
        transform(encode(ramp(110, 100)), "png", TransformConfig(crop="box"), np.array(box))


def test_a_crop_is_never_larger_than_a_picture_may_be():
    with pytest.raises(ValueError, match="has a box whose crop would be 12000 x 12000 pixels"):
        box_to_crop(np.array([0.0, 0, 1200, 1200]), 10.0, (1200, 1200))


@pytest.mark.parametrize(("crop", "what"), [("box", "box"), ("align", "landmarks")])
def test_a_picture_without_region_is_refused(crop, what):
    with pytest.raises(ValueError, match=f"^has no {what} in the region files$"):
        transform(encode(ramp(9, 9)), "png", TransformConfig(crop=crop), None)


# --- alignment


def test_similarity_by_hand():
    """Turned by 30 degrees, twice as large, moved by (10, -5)."""
    target = turned(TEMPLATE, 30, 2, (10, -5))
    root = math.sqrt(3)
    np.testing.assert_allclose(similarity(TEMPLATE, target), [(root, -1, 10), (1, root, -5)], atol=1e-9)


def test_similarity_of_two_points_by_hand():
    """(0, 0) to (1, 1) and (2, 0) to (1, 5): a quarter turn, twice as large."""
    matrix = similarity(np.array([(0.0, 0), (2, 0)]), np.array([(1.0, 1), (1, 5)]))
    np.testing.assert_allclose(matrix, [(0, -2, 1), (2, 0, 1)], atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_similarity_is_the_least_squares_solution(seed):
    random = np.random.default_rng(seed)
    source = turned(TEMPLATE, random.uniform(-180, 180), random.uniform(0.3, 8), random.uniform(-50, 300, 2))
    source += random.normal(0, 0.1 * source.std(), source.shape)

    def residuals(parameters):
        a, b, x, y = parameters
        return (np.array([(a, -b), (b, a)]) @ source.T + np.array([(x,), (y,)]) - TEMPLATE.T).ravel()

    a, b, x, y = least_squares(residuals, (0.1, 0.1, 0, 0), xtol=1e-15, ftol=1e-15, gtol=1e-15).x
    np.testing.assert_allclose(similarity(source, TEMPLATE), [(a, -b, x), (b, a, y)], rtol=1e-5, atol=1e-4)


def test_the_template_grows_with_the_height_and_keeps_to_the_middle():
    np.testing.assert_allclose(template_for((112, 112)), TEMPLATE)
    np.testing.assert_allclose(template_for((224, 224)), TEMPLATE * 2)
    np.testing.assert_allclose(template_for((96, 112)), TEMPLATE - (8, 0))


@pytest.mark.parametrize("size", [(112, 112), (224, 224), (96, 112)])
@pytest.mark.parametrize(("degrees", "scale"), [(0, 1), (25, 0.4), (-140, 1.7), (10, 2.6), (80, 7.3)])
@pytest.mark.parametrize("point", range(5))
def test_landmarks_come_to_lie_on_the_template(size, degrees, scale, point):
    landmarks = turned(TEMPLATE - TEMPLATE.mean(axis=0), degrees, scale, (400.3, 380.8))
    picture = dot(800, 800, landmarks[point], radius=3 * max(scale, 1))
    aligned = align(Image.fromarray(picture), landmarks, size)
    assert aligned.size == size
    assert np.hypot(*(centre_of_mass(np.asarray(aligned)) - template_for(size)[point])) < 0.1 * size[1] / 112


def test_five_coloured_dots_through_the_whole_transformation():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    landmarks = turned(TEMPLATE, 15, 1.8, (60, 20))
    picture = np.zeros((300, 300, 3), np.uint8)
    for at, colour in zip(landmarks, colours, strict=True):
        picture = np.maximum(picture, (dot(300, 300, at, 4)[..., None] / 255 * colour).astype(np.uint8))
    region = landmarks.astype(np.float32).ravel()
    data, _, width, height = transform(encode(picture), "png", TransformConfig(crop="align"), region)
    assert (width, height) == (112, 112)
    aligned = pixels_of(data).astype(int)
    for at, colour in zip(TEMPLATE, colours, strict=True):
        column, row = np.round(at).astype(int)
        window = aligned[row - 6 : row + 7, column - 6 : column + 7]
        others = [channel for channel in range(3) if not colour[channel]]
        assert window[..., others].max() <= 1
        middle = centre_of_mass(window.max(axis=2)) + np.array((column - 6, row - 6))
        assert np.hypot(*(middle - at)) < 0.5


@pytest.mark.parametrize(("degrees", "scale"), [(0, 0.7), (33, 1.0), (-70, 1.2)])
def test_pixels_are_opencvs(degrees, scale):
    """Without averaging, for the picture is hardly shrunk; OpenCV rounds positions to 1/32 pixel."""
    picture = smooth(400, 400)
    landmarks = turned(TEMPLATE - TEMPLATE.mean(axis=0), degrees, scale, (200, 210))
    expected = cv2.warpAffine(picture, similarity(landmarks, TEMPLATE), (112, 112), flags=cv2.INTER_LINEAR)
    difference = np.asarray(align(Image.fromarray(picture), landmarks, (112, 112))).astype(int) - expected
    assert abs(difference).max() <= 2
    assert abs(difference.mean()) < 0.6


def test_aligning_a_large_face_averages_and_does_not_skip_pixels():
    rows, columns = np.indices((1800, 1800))
    checks = ((rows + columns) % 2 * 255).astype(np.uint8)
    landmarks = turned(TEMPLATE - TEMPLATE.mean(axis=0), 7, 8.2, (900, 900))
    aligned = np.asarray(align(Image.fromarray(checks), landmarks, (112, 112))).astype(int)
    assert abs(aligned - 127.5).max() <= 2


def test_what_lies_outside_the_picture_is_black():
    landmarks = TEMPLATE - (40, 0)
    aligned = np.asarray(align(Image.new("L", (112, 112), 200), landmarks, (112, 112)))
    assert (aligned[:, :40] == 0).all()
    assert (aligned[:, 40:] == 200).all()


@pytest.mark.parametrize(
    ("landmarks", "message"),
    [
        (np.full((5, 2), 40.0), "has landmarks that all lie in one point"),
        (np.full((5, 2), 40.0) + np.eye(5, 2) * 0.5, "has landmarks that all lie in one point"),
        (TEMPLATE * (-1, 1) + (112, 0), "has landmarks that lie unlike a face's"),
        (TEMPLATE[[2, 4, 0, 1, 3]], "has landmarks that lie unlike a face's"),
        (TEMPLATE + 500, "has landmarks outside its 112 x 112 pixels"),
        (TEMPLATE * math.nan, "has landmarks outside its 112 x 112 pixels"),
        (TEMPLATE * 1e30, "has landmarks outside its 112 x 112 pixels"),
    ],
)
def test_landmarks_that_make_no_sense_cost_the_picture(landmarks, message):
    with pytest.raises(ValueError, match=message):
        transform(encode(ramp(112, 112)), "png", TransformConfig(crop="align"), landmarks.ravel())


@pytest.mark.parametrize("squeeze", [0.0, -0.3])
def test_a_profile_is_aligned(squeeze):
    """All landmarks on a line, or the eyes a little past one another."""
    profile = (TEMPLATE - (56, 0)) * (squeeze, 1) + (56, 0)
    assert align(Image.fromarray(smooth(112, 112)), profile, (112, 112)).size == (112, 112)


def test_a_result_of_one_pixel_is_no_error():
    config = TransformConfig(crop="align", size=1)
    assert transform(encode(ramp(112, 112)), "png", config, TEMPLATE.ravel())[2:] == (1, 1)


def test_a_draft_is_never_smaller_than_asked_for():
    image = decoded(encode(ramp(600, 400), "jpg"), "jpg", draft=(90, 90))
    assert (image.mode, image.size) == ("L", (100, 150))
