"""Both ways to resize against a slow oracle, at the edges of memory, and the one that is compiled against sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_shards import resize

SOURCE = Path(resize.__file__).with_name("resize.c")
WAYS = {
    "c": pytest.param(resize.by_c, marks=pytest.mark.skipif(not resize.compiled(), reason="resize.c is not compiled")),
    "pytorch": resize.by_pytorch,
}
SHAPES = [
    (5, 9, 8),
    (64, 64, 64),
    (201, 200, 112),
    (200, 137, 17),
    (1, 1, 6),
    (3, 500, 30),
    (60, 61, 130),
    (90, 89, 88),
]
"""Height, width and the size of the square; sizes that are no multiple of the rows that go together, too."""


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request):
    return request.param


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def filter_of(count, size):
    """Weights of a triangle, two output pixels wide and at least two input pixels, shape (size, count)."""
    scale = count / size
    support = max(scale, 1.0)
    weights = np.zeros((size, count))
    for place in range(size):
        centre = (place + 0.5) * scale
        for pixel in range(count):
            weights[place, pixel] = max(0.0, 1 - abs(pixel + 0.5 - centre) / support)
    return weights / weights.sum(1, keepdims=True)


def oracle(picture, size, mirror=0):
    height, width, _ = picture.shape
    exact = np.einsum(
        "yi,xj,ijc->yxc", filter_of(height, size), filter_of(width, size), picture.astype(np.float64), optimize=True
    )
    return exact[:, ::-1] if mirror else exact


@pytest.mark.parametrize("mirror", [0, 1])
@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_the_triangle_filter(way, height, width, size, mirror):
    picture, out = noise(height, width), np.zeros((1, size, size, 3), np.uint8)
    way(out, [picture], [mirror])
    rounded = 0.501 if way is resize.by_c else 1.2  # PyTorch rounds its rows, too, and its weights
    assert np.abs(out[0] - oracle(picture, size, mirror)).max() <= rounded


def test_as_large_as_before_it_stays_as_it_is(way):
    picture, out = noise(40, 40), np.zeros((1, 40, 40, 3), np.uint8)
    way(out, [picture], [0])
    assert (out[0] == picture).all()


def test_of_two_pixels_by_hand(way):
    """2 x 1 to 1 x 1: both weigh a half; 10 and 21 make 15.5, which becomes 16."""
    picture, out = np.array([[[10, 0, 255], [21, 1, 255]]], np.uint8), np.zeros((1, 1, 1, 3), np.uint8)
    way(out, [picture], [0])
    assert out.flatten().tolist() == [16, 1, 255]


def test_many_of_different_sizes_at_once(way):
    pictures = [
        noise(height, width, seed) for seed, (height, width) in enumerate([(30, 200), (224, 50), (7, 7), (96, 96)])
    ]
    together, alone = (np.zeros((4, 48, 48, 3), np.uint8) for _ in range(2))
    way(together, pictures, [1, 0, 1, 0])
    for number, picture in enumerate(pictures):
        way(alone[number : number + 1], [picture], [int(number % 2 == 0)])
    assert (together == alone).all()


def test_crops_that_are_views(way):
    """Rows with a gap between them, columns with one, and rows from below upwards."""
    whole = noise(120, 140)
    views = [whole[10:70, 20:90], whole[:, ::2], whole[::-1]]
    seen, copied = (np.zeros((3, 32, 32, 3), np.uint8) for _ in range(2))
    way(seen, views, [0, 1, 0])
    way(copied, [np.ascontiguousarray(view) for view in views], [0, 1, 0])
    assert (seen == copied).all()


def test_nothing_beside_the_output_is_written(way):
    memory = np.full(3 * 30 * 30 * 3 + 64, 7, np.uint8)
    out = memory[32:-32].reshape(3, 30, 30, 3)
    way(out, [noise(50, 60)] * 3, [0, 1, 0])
    assert (memory[:32] == 7).all()
    assert (memory[-32:] == 7).all()


AT_THE_EDGE = """
import ctypes, mmap, sys
import numpy as np
from data_shards import resize
pages = mmap.mmap(-1, 64 * mmap.PAGESIZE)
whole = np.frombuffer(pages, np.uint8)
begin = whole.__array_interface__["data"][0]
libc = ctypes.CDLL(None, use_errno=True)
for page in (0, 63):
    assert libc.mprotect(ctypes.c_void_p(begin + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
if sys.argv[1] == "outside":
    print(whole[0])
inner = whole[mmap.PAGESIZE : -mmap.PAGESIZE]
for height, width in [(1, 1), (3, 5), (64, 64), (201, 199), (224, 224), (7, 500)]:
    count = height * width * 3
    for place in (inner[:count], inner[-count:]):
        for size in (16, 50, 112):
            picture, out = place.reshape(height, width, 3), np.zeros((2, size, size, 3), np.uint8)
            resize.by_c(out, [picture, picture], [0, 1])
print("done")
"""


@pytest.mark.skipif(not resize.compiled(), reason="resize.c is not compiled")
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_nothing_beside_a_picture_is_read(where):
    """Pictures lie directly behind and before a page that nobody may read; "outside" shows that reading it kills."""
    done = subprocess.run([sys.executable, "-c", AT_THE_EDGE, where], capture_output=True, text=True, check=False)
    assert (done.stdout == "done\n") == (where == "inside"), done.stderr
    assert (done.returncode == -11) == (where == "outside")


def test_without_a_compiled_file_pytorch_resizes(monkeypatch):
    monkeypatch.setattr(resize, "_compiled", lambda: None)
    assert not resize.compiled()
    picture = noise(50, 60)
    found, wanted = (np.zeros((1, 20, 20, 3), np.uint8) for _ in range(2))
    resize.resize_into(found, [picture], [1])
    resize.by_pytorch(wanted, [picture], [1])
    assert (found == wanted).all()


DRIVER = """
#include "resize.c"
#include <stdio.h>
static unsigned drawn(void) { static unsigned state = 1; return (state = state * 1664525u + 1013904223u) >> 8; }
int main(void)
{
    for (int turn = 0; turn < 400; turn++) {
        struct crop crops[3];
        uint8_t *pixels[3];
        for (int k = 0; k < 3; k++) {
            int width = 1 + drawn() % 300, height = 1 + drawn() % 300;
            pixels[k] = malloc((size_t)width * height * 3);
            for (int i = 0; i < width * height * 3; i++) pixels[k][i] = (uint8_t)(i * 31 + k);
            crops[k] = (struct crop){pixels[k], width * 3, width, height, k & 1};
        }
        int size = 1 + drawn() % 200;
        uint8_t *out = malloc((size_t)3 * size * size * 3);
        if (facescale_resize(crops, 3, size, out)) return 1;
        for (int k = 0; k < 3; k++) free(pixels[k]);
        free(out);
    }
    puts("clean");
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_under_the_sanitizers_of_addresses_and_of_undefined_behaviour(tmp_path):
    try:
        random_bits = int(Path("/proc/sys/vm/mmap_rnd_bits").read_text())
    except (OSError, ValueError):  # root alone may read it
        random_bits = None
    if random_bits is None or random_bits > 28:
        pytest.skip(f"vm.mmap_rnd_bits is {random_bits}: gcc's sanitizer bears 28 at most")
    (tmp_path / "driver.c").write_text(DRIVER)
    flags = ("-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-fsanitize=address,undefined")
    # a clone for each CPU is chosen before the sanitizer has begun, and dies there
    words = ["gcc", *flags, "-Dtarget_clones(...)=noinline", f"-I{SOURCE.parent}", "driver.c", "-o", "driver", "-lm"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    environment = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0"
    }  # that looks into the process, which containers forbid
    done = subprocess.run(
        [tmp_path / "driver"], capture_output=True, text=True, check=False, timeout=200, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr
