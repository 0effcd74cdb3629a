"""Augmentation parameters as data: pure, within their ranges, with their probabilities."""

import numpy as np
import pytest

from data_shards.augment import Augmentation, AugmentConfig, augment, central_square, colour_matrices
from data_shards.plan import Draws

MANY = 40_000
SIZES = [(112, 112), (178, 218), (640, 360), (20, 19)]
FIELDS = Augmentation._fields


def draws_of(samples, epoch=0, visits=0):
    samples = np.asarray(samples, np.int64)
    return Draws(epoch, samples, np.broadcast_to(np.int64(visits), samples.shape))


def drawn(config=None, size=(112, 112), number=MANY, seed=0, epoch=0, visits=0):
    draws = draws_of(np.arange(number), epoch, visits)
    return augment(config or AugmentConfig(), seed, draws, np.full(number, size[0]), np.full(number, size[1]))


def equal(one, other):
    return all(np.array_equal(*columns) for columns in zip(one, other, strict=True))


def picked(parameters, rows):
    return Augmentation(*(column[rows] for column in parameters))


def pixels(parameters, size):
    """Width and height of each crop in pixels, shape (n,) each."""
    return parameters.shape[:, 0].astype(float) * size[0], parameters.shape[:, 1].astype(float) * size[1]


@pytest.mark.parametrize("rows", [np.arange(10)[::-1], [3], [7, 7, 0, 2], np.arange(4, 9)])
def test_a_samples_parameters_do_not_depend_on_its_batch(rows):
    samples, visits = np.array([5, 900, 3, 2**33, 44, 5, 7, 8, 2, 1]), np.array([0, 0, 1, 0, 0, 1, 2, 0, 0, 0])
    width, height = np.arange(100, 200, 10), np.arange(220, 120, -10)
    whole = augment(AugmentConfig(), 3, Draws(6, samples, visits), width, height)
    part = augment(AugmentConfig(), 3, Draws(6, samples[rows], visits[rows]), width[rows], height[rows])
    assert equal(part, picked(whole, rows))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_slices_of_any_world_size_get_the_parameters_of_the_whole(world_size):
    whole = drawn(number=24, seed=2, epoch=5)
    size = 24 // world_size
    for rank in range(world_size):
        samples = np.arange(rank * size, (rank + 1) * size)
        side = np.full(size, 112)
        assert equal(augment(AugmentConfig(), 2, draws_of(samples, 5), side, side), picked(whole, samples))


@pytest.mark.parametrize("change", [{"visits": 1}, {"epoch": 1}, {"seed": 1}])
def test_seed_epoch_and_visit_each_change_every_number(change):
    config = AugmentConfig(crop_area=(0.3, 0.8), greyscale=0)  # no crop is cut at the edge
    one, other = drawn(config, number=200), drawn(config, number=200, **change)
    for name in ("anchor", "shape", "brightness", "contrast", "saturation"):
        assert (getattr(one, name) != getattr(other, name)).all(), name
    assert 60 < (one.mirror != other.mirror).sum() < 140  # of 200, half expected: 5.6 standard deviations


def test_types_and_shapes_are_those_that_dali_takes():
    parameters = drawn(number=7)
    assert [column.shape for column in parameters] == [(7, 2), (7, 2), (7,), (7,), (7,), (7,)]
    assert [column.dtype for column in parameters] == [np.float32, np.float32, np.int32, *[np.float32] * 3]


@pytest.mark.parametrize("size", SIZES)
def test_a_crop_lies_in_the_picture(size):
    parameters = drawn(AugmentConfig(crop_area=(0.05, 1), crop_aspect=(0.4, 2.5)), size)
    assert (parameters.anchor >= 0).all()
    assert (parameters.shape > 0).all()
    ends = (parameters.anchor.astype(float) + parameters.shape) * size
    assert (ends <= np.array(size) + 1e-4).all()


@pytest.mark.parametrize("size", SIZES)
def test_area_and_aspect_fill_their_ranges(size):
    """No crop of these ranges reaches beyond the picture: 0.8 * 1.2 < 1."""
    config = AugmentConfig(crop_area=(0.3, 0.8), crop_aspect=(0.9, 1.2))
    width, height = pixels(drawn(config, size), size)
    area, aspect = width * height / min(size) ** 2, width / height
    assert (area.min(), area.max()) == (pytest.approx(0.3, abs=1e-3), pytest.approx(0.8, abs=1e-3))
    assert (aspect.min(), aspect.max()) == (pytest.approx(0.9, abs=1e-3), pytest.approx(1.2, abs=1e-3))
    assert area.mean() == pytest.approx(0.55, abs=4 * 0.5 / np.sqrt(12 * MANY))  # uniform
    middle = (np.log(0.9) + np.log(1.2)) / 2
    assert np.log(aspect).mean() == pytest.approx(middle, abs=4 * np.log(1.2 / 0.9) / np.sqrt(12 * MANY))


def test_the_default_ranges_hold_where_a_crop_is_cut_at_the_edge_of_a_square():
    config, size = AugmentConfig(), (112, 112)
    width, height = pixels(drawn(config, size), size)
    assert (width.max(), height.max()) == (pytest.approx(112), pytest.approx(112))
    area, aspect = width * height / 112**2, width / height
    assert area.min() >= config.crop_area[0] - 1e-6
    assert area.max() <= 1 + 1e-6
    assert aspect.min() >= config.crop_aspect[0] - 1e-6
    assert aspect.max() <= config.crop_aspect[1] + 1e-6


def test_a_crop_is_placed_anywhere_that_it_fits():
    parameters = drawn(AugmentConfig(crop_area=(0.25, 0.25), crop_aspect=(1, 1)), (200, 100))
    assert np.allclose(parameters.shape, [0.25, 0.5])  # 50 x 50 pixels
    for column, free in ((0, 0.75), (1, 0.5)):
        place = parameters.anchor[:, column] / free
        assert place.min() < 0.001
        assert place.max() > 0.999
        assert place.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * MANY))
    assert abs(np.corrcoef(parameters.anchor.T)[0, 1]) < 4 / np.sqrt(MANY)


def test_a_crop_of_the_whole_area_is_the_square_as_wide_as_the_picture():
    parameters = drawn(AugmentConfig(crop_area=(1, 1), crop_aspect=(1, 1)), (92, 112), number=50)
    assert np.allclose(parameters.shape, [1, 92 / 112])
    assert not parameters.anchor[:, 0].any()
    assert len(set(parameters.anchor[:, 1].tolist())) == 50


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_a_crop_has_a_pixel_even_in_the_thinnest_picture(size):
    """A crop narrower than that can fall between two pixels' edges, and DALI then refuses it."""
    width, height = pixels(drawn(AugmentConfig(crop_area=(0.1, 1)), size, number=2000), size)
    assert min(width.min(), height.min()) >= 1 - 1e-6


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_fill_their_range(name):
    config = AugmentConfig(**{"brightness": 0, "contrast": 0, "saturation": 0, "greyscale": 0, name: 0.3})
    parameters = drawn(config)
    factors = getattr(parameters, name)
    assert (factors.min(), factors.max()) == (pytest.approx(0.7, abs=1e-3), pytest.approx(1.3, abs=1e-3))
    assert factors.mean() == pytest.approx(1, abs=4 * 0.6 / np.sqrt(12 * MANY))
    for other in {"brightness", "contrast", "saturation"} - {name}:
        assert (getattr(parameters, other) == 1).all()


@pytest.mark.parametrize("probability", [0, 0.02, 0.5, 1])
def test_mirror_and_greyscale_come_with_their_probability(probability):
    parameters = drawn(AugmentConfig(mirror=probability, greyscale=probability))
    spread = 4 * np.sqrt(probability * (1 - probability) / MANY)
    assert set(parameters.mirror.tolist()) <= {0, 1}
    assert parameters.mirror.mean() == pytest.approx(probability, abs=spread)
    assert (parameters.saturation == 0).mean() == pytest.approx(probability, abs=spread)
    assert (parameters.saturation[parameters.saturation != 0] >= 0.8 - 1e-6).all()


def test_parameters_are_drawn_independently_of_each_other():
    parameters = drawn(AugmentConfig(crop_area=(0.3, 0.8), greyscale=0.5))
    width, height = pixels(parameters, (112, 112))
    place = parameters.anchor / (1 - parameters.shape)
    grey = parameters.saturation == 0
    colours = [parameters.mirror, parameters.brightness, parameters.contrast, grey]
    table = np.corrcoef([*colours, width * height, width / height, *place.T])
    assert np.abs(table[np.triu_indices(8, 1)]).max() < 4.5 / np.sqrt(MANY)


@pytest.mark.parametrize(
    ("width", "height", "anchor", "shape"),
    [
        (100, 100, (0, 0), (1, 1)),
        (100, 50, (0.25, 0), (0.5, 1)),
        (92, 112, (0, 10 / 112), (1, 92 / 112)),
        (300, 100, (1 / 3, 0), (1 / 3, 1)),
    ],
)
def test_central_square_by_hand(width, height, anchor, shape):
    parameters = central_square(np.array([width]), np.array([height]))
    assert parameters.anchor.tolist() == [pytest.approx(anchor)]
    assert parameters.shape.tolist() == [pytest.approx(shape)]
    assert [column.tolist() for column in parameters[2:]] == [[0], [1], [1], [1]]
    assert [column.dtype for column in parameters] == [np.float32, np.float32, np.int32, *[np.float32] * 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mirror": 1.1}, r"augment.mirror is 1.1; a probability lies in \[0, 1\]"),
        ({"mirror": -0.1}, r"augment.mirror is -0.1; a probability lies in \[0, 1\]"),
        ({"greyscale": float("nan")}, r"augment.greyscale is nan; a probability lies in \[0, 1\]"),
        ({"brightness": 1}, r"augment.brightness is 1; allowed is \[0, 1\)"),
        ({"contrast": -0.2}, r"augment.contrast is -0.2; allowed is \[0, 1\)"),
        ({"saturation": 7}, r"augment.saturation is 7; allowed is \[0, 1\)"),
        ({"crop_area": (0, 1)}, r"augment.crop_area is 0 1; allowed is 0 < low <= high <= 1.0"),
        ({"crop_area": (0.5, 1.2)}, r"augment.crop_area is 0.5 1.2; allowed is 0 < low <= high <= 1.0"),
        ({"crop_area": (0.9, 0.6)}, r"augment.crop_area is 0.9 0.6; allowed is 0 < low <= high <= 1.0"),
        ({"crop_aspect": (2, 1)}, r"augment.crop_aspect is 2 1; allowed is 0 < low <= high"),
        ({"crop_aspect": (-1, 1)}, r"augment.crop_aspect is -1 1; allowed is 0 < low <= high"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        AugmentConfig(**settings)


def test_the_ends_of_the_allowed_ranges_are_allowed():
    AugmentConfig(
        mirror=0, greyscale=1, brightness=0, contrast=0.99, saturation=0, crop_area=(1, 1), crop_aspect=(1, 1)
    )


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ({}, (200, 100, 40)),
        ({"brightness": 0.5}, (100, 50, 20)),
        ({"brightness": 1.2}, (240, 120, 48)),
        ({"brightness": 1.5}, (255, 150, 60)),  # 300 is cut
        ({"contrast": 0.5}, (164, 114, 84)),  # half the distance from 128
        ({"contrast": 1.5}, (236, 86, 0)),
        ({"saturation": 0}, (123.06, 123.06, 123.06)),  # 0.299 * 200 + 0.587 * 100 + 0.114 * 40 = 123.06
        ({"saturation": 0.5}, (162, 112, 82)),  # half the distance from 123.06
        ({"saturation": 1.5}, (238, 88, 0)),
        # saturation: 161.5, 111.5, 81.5; then contrast: 154.8, 114.8, 90.8; then brightness
        ({"brightness": 1.2, "contrast": 0.8, "saturation": 0.5}, (186, 138, 109)),
    ],
)
def test_colour_factors_by_hand(factors, expected):
    one = np.ones(1, np.float32)
    given = {"brightness": one, "contrast": one, "saturation": one} | {
        name: one * value for name, value in factors.items()
    }
    matrix = colour_matrices(Augmentation(one, one, one.astype(np.int32), **given))
    assert (matrix.shape, matrix.dtype) == ((1, 3, 4), np.float32)
    found = (matrix[0] @ np.array([200, 100, 40, 1], np.float32)).clip(0, 255)
    assert found == pytest.approx(expected, abs=0.6)


def test_each_picture_of_a_batch_gets_its_own_colours():
    whole = drawn(number=6)
    matrices = colour_matrices(whole)
    for number in range(6):
        assert np.array_equal(colour_matrices(picked(whole, [number])), matrices[[number]])
