"""Both decoders, DALI's pipeline and libjpeg-turbo in threads, on pictures whose right pixels are known."""

import io

import numpy as np
import pytest
import torch
from collections_on_disk import encoded
from conftest import encode
from nvidia.dali import fn, pipeline_def
from PIL import Image

from data_shards import resize
from data_shards.augment import Augmentation, AugmentConfig, augment, central_square
from data_shards.cpu_decode import CpuDecoder, decoded
from data_shards.decode import DecodeError, Decoder
from data_shards.plan import Draws

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLOUR = (200, 100, 40)
DAMAGED = np.zeros(50, np.uint8)
MADE = {}


@pytest.fixture(params=["dali", "libjpeg", "libjpeg, PyTorch's resize"], autouse=True)
def kind(request, monkeypatch):
    """Which decoder `make` makes."""
    kind, _, resized = request.param.partition(",")
    monkeypatch.setitem(MADE, "kind", kind)
    if resized:
        monkeypatch.setattr(resize, "_compiled", lambda: None)
    return kind


def make(source, batch_size, image_size, threads=2):
    if MADE["kind"] == "dali":
        return Decoder(source, batch_size, image_size, "cpu", threads)
    return CpuDecoder(source, image_size, "cpu", threads)


def parameters(number=1, *, anchor=(0, 0), shape=(1, 1), mirror=0):
    """Of `number` pictures; each argument is one value for all or one for each."""
    one = np.ones(number, np.float32)

    def column(value, *width):
        return np.broadcast_to(np.asarray(value, np.float32), (number, *width)).copy()

    return Augmentation(
        column(anchor, 2),
        column(shape, 2),
        column(mirror).astype(np.int32),
        one,
        one,
        one,
    )


def decode(images, given=None, size=16):
    """One batch: (b, 3, size, size) of uint8."""
    given = given or parameters(len(images))
    return make(serve([(images, given)]), len(images), size).next()


def plain(colour, width=8, height=8):
    return np.full((height, width, 3), colour, np.uint8)


def quadrants(width, height):
    """Red, green above; blue, white below."""
    picture = plain(WHITE, width, height)
    picture[: height // 2, : width // 2] = RED
    picture[: height // 2, width // 2 :] = GREEN
    picture[height // 2 :, : width // 2] = BLUE
    return picture


def textured(width=200, height=150, phase=0.0):
    y, x = np.mgrid[:height, :width]
    red = 127 + 100 * np.sin(x / 7 + phase) * np.cos(y / 11)
    return np.stack([red, 127 + 90 * np.cos(x / 3 + phase), (x * 2 + y * 3 + 40 * phase) % 256], -1).clip(0, 255)


def serve(batches):
    """A source that gives these (images, parameters) and ends."""
    remaining = iter(batches)
    return lambda: next(remaining)


def colour_of(image):
    """The colour of an image that has only one, shape (3, H, W)."""
    flat = image.flatten(1)
    assert (flat == flat[:, :1]).all()
    return tuple(flat[:, 0].tolist())


def test_a_batch_is_uint8_and_channels_last_in_memory():
    images = decode([encode(plain(COLOUR))] * 3, size=24)
    assert (images.shape, images.dtype, images.device.type) == ((3, 3, 24, 24), torch.uint8, "cpu")
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("extension", [".png", ".bmp", ".jpg", ".webp"])
def test_known_colours_in_rgb_order(extension):
    options = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}.get(extension, {})
    images = decode([encode(plain(colour), extension, **options) for colour in (COLOUR, (10, 250, 90))])
    tolerance = 2 if extension == ".jpg" else 0
    for image, colour in zip(images, (COLOUR, (10, 250, 90)), strict=True):
        assert (image.int() - torch.tensor(colour)[:, None, None]).abs().max() <= tolerance


@pytest.mark.parametrize("extension", [".pgm", ".png", ".jpg", ".bmp"])
def test_a_grey_picture_gives_three_equal_channels(extension):
    picture = np.repeat(np.arange(0, 256, 16, dtype=np.uint8)[None], 16, 0)
    image = decode([encode(picture, extension)])[0]
    assert (image[0] == image[1]).all()
    assert (image[0] == image[2]).all()
    assert (image[0].int() - torch.from_numpy(picture).int()).abs().max() <= (2 if extension == ".jpg" else 0)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (80, 40), (30, 90)])
def test_a_crop_picks_its_quadrant(width, height):
    anchors = [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]
    picture = encode(quadrants(width, height))
    images = decode([picture] * 4, parameters(4, anchor=anchors, shape=(0.5, 0.5)))
    assert [colour_of(image) for image in images] == [RED, GREEN, BLUE, WHITE]


def test_the_shape_of_a_crop_is_width_and_height():
    """Of 80 x 40 pixels, the lower eighth over the left half, then the right eighth over the upper half."""
    given = parameters(2, anchor=[(0, 0.875), (0.875, 0)], shape=[(0.5, 0.125), (0.125, 0.5)])
    images = decode([encode(quadrants(80, 40))] * 2, given)
    assert [colour_of(image) for image in images] == [BLUE, GREEN]


def test_a_crop_is_of_the_picture_as_displayed():
    """EXIF orientation 6 turns 80 x 40 stored pixels into 40 x 80 displayed: blue, red above; white, green below."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = encode(quadrants(80, 40), ".jpg", quality=95, subsampling=0, exif=exif)
    anchors = [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]
    images = decode([picture] * 4, parameters(4, anchor=anchors, shape=(0.5, 0.5)))
    for image, colour in zip(images, (BLUE, RED, WHITE, GREEN), strict=True):
        assert (image.int() - torch.tensor(colour)[:, None, None]).abs().max() <= 3


SEGMENTS = {
    "behind nothing": b"",
    "behind JFIF": b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00",
    "behind a comment of 3,000 bytes": b"\xff\xfe" + (3002).to_bytes(2, "big") + b"c" * 3000,
    "behind a colour profile of 60,000 bytes": b"\xff\xe2" + (60_002).to_bytes(2, "big") + b"p" * 60_000,
    "behind bytes that fill": b"\xff\xff\xff",
}


@pytest.mark.parametrize("before", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_orientation_is_found_wherever_exif_lies(before):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encode(quadrants(80, 40), ".jpg", quality=95, subsampling=0, exif=exif).tobytes()
    begin = file.index(b"\xff\xe1")
    assert file[begin + 4 : begin + 8] == b"Exif"
    length = 2 + int.from_bytes(file[begin + 2 : begin + 4], "big")
    rest = file[2:begin] + file[begin + length :]  # without its Exif
    moved = np.frombuffer(file[:2] + before + file[begin : begin + length] + rest, np.uint8)
    image = decode([moved], parameters(1, anchor=(0, 0), shape=(0.5, 0.5)))[0]
    assert (image.int() - torch.tensor(BLUE)[:, None, None]).abs().max() <= 3


def test_a_mirror_swaps_left_and_right_of_the_pictures_it_is_given_for():
    picture = encode(quadrants(32, 32))
    kept, mirrored = decode([picture] * 2, parameters(2, mirror=[0, 1]), size=32)
    assert torch.equal(kept, torch.from_numpy(quadrants(32, 32)).permute(2, 0, 1))
    assert torch.equal(mirrored, kept.flip(2))


@pytest.mark.parametrize("box", [(0, 0, 200, 150), (50, 15, 150, 135)])
@pytest.mark.parametrize("size", [16, 64, 112, 224])
def test_resizing_agrees_with_pillows_antialiased_one(size, box):
    picture = Image.fromarray(textured().astype(np.uint8))
    left, top, right, bottom = box
    given = parameters(anchor=(left / 200, top / 150), shape=((right - left) / 200, (bottom - top) / 150))
    found = decode([encode(textured())], given, size)[0].permute(1, 2, 0).numpy().astype(int)
    wanted = np.asarray(picture.crop(box).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    inside = slice(1, -1)  # at the edge DALI repeats the outermost pixel, Pillow takes fewer
    assert np.abs(found - wanted)[inside, inside].mean() < 0.5


def test_a_checkerboard_of_single_pixels_shrinks_to_even_grey():
    """Without antialiasing, it would give some of its black and white pixels."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    image = decode([encode(board)])[0].int()
    assert (image - 127).abs().max() <= 5


def test_batches_of_varying_size_then_the_end():
    sizes = [3, 1, 4, 2, 4, 1]
    batches = [([encode(plain((number, 7, size)))] * size, parameters(size)) for number, size in enumerate(sizes)]
    decoder = make(serve(batches), batch_size=4, image_size=16)
    for number, size in enumerate(sizes):
        images = decoder.next()
        assert images.shape == (size, 3, 16, 16)
        assert {colour_of(image) for image in images} == {(number, 7, size)}
    for _ in range(2):
        with pytest.raises(StopIteration):
            decoder.next()


def test_a_source_that_ends_at_once():
    with pytest.raises(StopIteration):
        make(serve([]), batch_size=4, image_size=16).next()


def test_the_source_is_at_most_so_many_batches_ahead():
    asked = []

    def source():
        asked.append(None)
        return [encode(plain(COLOUR))], parameters()

    decoder = make(source, batch_size=1, image_size=16)
    for taken in range(8):
        decoder.next()
        assert taken + 2 <= len(asked) <= taken + decoder.ahead


def test_batches_stay_as_they_are_when_later_ones_arrive():
    """DALI hands out its own buffers and fills them again; ours are copies."""
    colours = [(10 * number, 255 - 10 * number, 77) for number in range(12)]
    batches = [([encode(plain(colour))] * 2, parameters(2)) for colour in colours]
    decoder = make(serve(batches), batch_size=2, image_size=32)
    kept = [decoder.next() for _ in colours]
    assert [colour_of(image) for images in kept for image in images] == [
        c for colour in colours for c in (colour, colour)
    ]
    assert len({images.data_ptr() for images in kept}) == 12
    del decoder
    assert [colour_of(images[0]) for images in kept] == colours


def test_encoded_bytes_may_change_once_their_batch_is_out():
    """The reader's views are of a file that may be replaced; DALI must have copied them."""
    image = encode(plain(COLOUR)).copy()
    decoder = make(serve([([image], parameters())]), batch_size=1, image_size=16)
    images = decoder.next()
    image[:] = 0
    assert colour_of(images[0]) == COLOUR


@pytest.mark.parametrize("damaged", [DAMAGED, encode(textured(), ".jpg")[:100], np.frombuffer(b"a letter", np.uint8)])
@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_picture_that_does_not_decode_is_an_error_at_its_batch(damaged, place):
    batches = [([encode(plain((number, 0, 0))), encode(plain(COLOUR))], parameters(2)) for number in range(6)]
    batches[place][0][1] = damaged
    decoder = make(serve(batches), batch_size=2, image_size=16)
    for number in range(place):
        assert colour_of(decoder.next()[0]) == (number, 0, 0)
    with pytest.raises(DecodeError):
        decoder.next()


def test_decodes_tells_which_pictures_decode():
    decoder = make(serve([]), batch_size=1, image_size=16)
    for extension in (".jpg", ".png", ".pgm", ".bmp", ".webp"):
        assert decoder.decodes(np.frombuffer(encoded(3, extension), np.uint8))
    for damaged in (DAMAGED, np.frombuffer(encoded(3, ".png"), np.uint8)[:40]):
        assert not decoder.decodes(damaged)


def in_mode(mode):
    return Image.fromarray(textured().astype(np.uint8)).convert(mode)


def as_jpeg(picture, **options):
    return encode_picture(picture, "JPEG", quality=90, **options)


def encode_picture(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FORMS = {
    "4:2:0": lambda: as_jpeg(in_mode("RGB")),
    "4:4:4": lambda: as_jpeg(in_mode("RGB"), subsampling=0),
    "progressive": lambda: as_jpeg(in_mode("RGB"), progressive=True),
    "grey JPEG": lambda: as_jpeg(in_mode("L")),
    "CMYK": lambda: as_jpeg(in_mode("CMYK")),
    "PNG": lambda: encode_picture(in_mode("RGB"), "PNG"),
    "palette": lambda: encode_picture(in_mode("P"), "PNG"),
    "transparent": lambda: encode_picture(in_mode("RGBA"), "PNG"),
    "grey PNG of 16 bits": lambda: encode_picture(Image.fromarray(textured()[..., 0].astype(np.uint16) * 257), "PNG"),
    "lossy WebP": lambda: encode_picture(in_mode("RGB"), "WEBP"),
} | {
    f"orientation {number}": lambda number=number: as_jpeg(in_mode("RGB"), exif=turned(number))
    for number in range(1, 9)
}


@pytest.mark.parametrize("form", FORMS)
def test_both_decode_every_form_to_the_same_pixels(form, kind):
    """At the picture's own size, where nothing is resized; CMYK within a grey level."""
    if kind == "dali":
        pytest.skip("compared with it in the other")
    picture = FORMS[form]()
    apart = whole_by_dali(picture).astype(int) - decoded(picture).astype(int)
    assert np.abs(apart).max() <= (1 if form == "CMYK" else 0)


def whole_by_dali(picture):
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def whole():
        return fn.decoders.image(fn.external_source(source=lambda: [picture], batch=True))

    return np.array(whole().run()[0].as_cpu().at(0))


def apart(width, height, size):
    """Grey levels between our pictures and DALI's, without the outermost pixels, shape (b, 3, size - 2, size - 2)."""
    number = 8
    y, x = np.mgrid[:height, :width] / max(width, height)
    pictures = [np.stack([x + phase, y - phase, x * y + phase], -1) for phase in np.arange(number) / number]
    images = [encode(127 + 120 * np.sin(20 * picture), ".jpg", quality=95, subsampling=0) for picture in pictures]
    draws = Draws(0, np.arange(number), np.zeros(number, np.int64))
    given = augment(AugmentConfig(), 1, draws, np.full(number, width), np.full(number, height))
    ours, dali = CpuDecoder(serve([(images, given)]), size), Decoder(serve([(images, given)]), number, size)
    return (ours.next().float() - dali.next().float())[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize(("width", "height", "size"), [(137, 180, 112), (224, 224, 112), (50, 80, 64), (300, 200, 160)])
def test_both_give_the_same_pictures(width, height, size):
    assert apart(width, height, size).abs().mean((1, 2, 3)).max() < 0.3


@pytest.mark.parametrize(("width", "height", "size"), [(500, 375, 112), (900, 900, 64), (1400, 1200, 64)])
def test_both_give_nearly_the_same_where_jpegs_are_shrunk_as_they_are_decoded(width, height, size):
    """A crop's edges then lie up to half an output pixel elsewhere: at most some 2 % of the contrast here."""
    found = apart(width, height, size)
    assert 0 < found.abs().mean((1, 2, 3)).max() < 5
    assert found.mean().abs() < 0.3


def test_threads_change_no_bit():
    batch = [encode(textured(phase=float(phase)), ".jpg") for phase in range(37)], parameters(37, shape=(0.9, 0.8))
    one, *others = (CpuDecoder(serve([batch] * 3), 48, threads=threads) for threads in (1, 2, 5))
    for _ in range(3):
        wanted = one.next()
        assert all(torch.equal(other.next(), wanted) for other in others)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_the_thinnest_pictures_decode_with_any_parameters(width, height):
    number = 50
    draws = Draws(0, np.arange(number), np.zeros(number, np.int64))
    sides = np.full(number, width), np.full(number, height)
    config = AugmentConfig(
        crop_area=(0.1, 1), crop_aspect=(0.5, 2), brightness=0, contrast=0, saturation=0, greyscale=0
    )
    picture = encode(plain(COLOUR, width, height))
    for given in (augment(config, 0, draws, *sides), central_square(*sides)):
        assert {colour_of(image) for image in decode([picture] * number, given)} == {COLOUR}


@pytest.mark.parametrize(("width", "height"), [(60, 20), (20, 60)])
def test_the_central_square_is_the_middle_third_of_a_long_picture(width, height):
    picture = plain(RED, width, height)
    picture[height // 2 - 10 : height // 2 + 10, width // 2 - 10 : width // 2 + 10] = GREEN
    image = decode([encode(picture)], central_square(np.array([width]), np.array([height])), size=20)[0]
    assert colour_of(image) == GREEN


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False")
@pytest.mark.parametrize("extension", [".jpg", ".png", ".pgm", ".bmp", ".webp"])
def test_cuda_gives_the_batch_of_the_cpu(extension):
    number = 8
    pictures = [textured(phase=float(phase)) for phase in range(number)]
    pictures = [picture.mean(-1) if extension == ".pgm" else picture for picture in pictures]
    draws = Draws(0, np.arange(number), np.zeros(number, np.int64))
    given = augment(AugmentConfig(), 1, draws, np.full(number, 200), np.full(number, 150))
    batch = [encode(picture, extension) for picture in pictures], given
    decoders = {device: Decoder(serve([batch] * 4), number, 64, device) for device in ("cpu", "cuda")}
    for _ in range(4):
        on_cpu, on_gpu = decoders["cpu"].next(), decoders["cuda"].next()
        assert on_gpu.device.type == "cuda"
        assert on_gpu.is_contiguous(memory_format=torch.channels_last)
        apart = (on_gpu.cpu().float() - on_cpu.float()).abs().mean((1, 2, 3))  # (b,) grey levels
        assert (apart < 3).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False")
def test_batches_on_cuda_stay_as_they_are_when_later_ones_arrive():
    colours = [(10 * number, 255 - 10 * number, 77) for number in range(12)]
    batches = [([encode(plain(colour))] * 2, parameters(2)) for colour in colours]
    decoder = Decoder(serve(batches), batch_size=2, image_size=32, device="cuda")
    kept = [decoder.next() for _ in colours]
    assert [colour_of(images[1].cpu()) for images in kept] == colours
    with pytest.raises(StopIteration):
        decoder.next()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False")
def test_a_picture_that_does_not_decode_on_cuda_is_an_error():
    batches = [([encode(plain(COLOUR), ".jpg"), DAMAGED], parameters(2))] * 4
    with pytest.raises(DecodeError):
        Decoder(serve(batches), batch_size=2, image_size=16, device="cuda").next()
