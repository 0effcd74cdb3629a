"""Synthetic identities: determinism, layout, hardness, and that an identity is visible in its pictures."""

import dataclasses
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_shards import synthetic
from data_shards.face_model import OCCLUDERS
from data_shards.faces import paint
from data_shards.synthetic import draw_identity, draw_view, encode, render, synthesize


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three identities of two images, drawn in this process."""
    out = tmp_path_factory.mktemp("synthetic") / "small"
    assert synthesize(out, identities=3, images_per_identity=2, size=64, seed=5, workers=1) == 6
    return out


def test_layout_is_that_of_vggface2(small):
    names = [f"n{identity:06d}/{image:04d}_01.jpg" for identity in (1, 2, 3) for image in (1, 2)]
    assert list(files(small)) == names
    assert os.listdir(small.parent) == ["small"]
    for name in names:
        assert cv2.imread(str(small / name)).shape == (64, 64, 3)


def test_bytes_do_not_depend_on_the_number_of_workers(small, tmp_path):
    synthesize(tmp_path / "two", identities=3, images_per_identity=2, size=64, seed=5, workers=2)
    assert files(tmp_path / "two") == files(small)


def test_more_identities_and_images_keep_the_earlier_files(small, tmp_path):
    synthesize(tmp_path / "more", identities=4, images_per_identity=3, size=64, seed=5, workers=1)
    more = files(tmp_path / "more")
    assert len(more) == 12
    assert {name: more[name] for name in files(small)} == files(small)


def test_every_file_is_different_and_so_is_another_seed(small, tmp_path):
    synthesize(tmp_path / "other", identities=3, images_per_identity=2, size=64, seed=6, workers=1)
    pictures = [*files(small).values(), *files(tmp_path / "other").values()]
    assert len(set(pictures)) == 12


def test_files_are_the_renders():
    person = draw_identity(9, 4)
    stored = cv2.imdecode(np.frombuffer(encode(person, 9, 2, 96), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    error = np.abs(stored.astype(float) - render(person, 9, 2, 96)).mean()
    assert error < 12  # JPEG of quality 60 at worst; swapped channels differ by over 20


@pytest.mark.parametrize("size", [32, 33, 160, 512])
def test_render_is_pure_and_has_its_size(size):
    first = render(draw_identity(1, 2), 1, 3, size)
    assert (first.shape, first.dtype) == ((size, size, 3), np.uint8)
    render(draw_identity(1, 7), 1, 1, 48)  # a picture in between must leave no trace
    np.testing.assert_array_equal(render(draw_identity(1, 2), 1, 3, size), first)


def test_size_changes_the_resolution_only():
    person = draw_identity(0, 3)
    view = dataclasses.replace(draw_view(0, 3, 1), noise=0.0)
    large = cv2.resize(paint(person, view, 320), (80, 80), interpolation=cv2.INTER_AREA).astype(float)
    small = paint(person, view, 80).astype(float)
    assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.97


def test_identity_is_fixed_by_seed_and_number():
    assert draw_identity(3, 8) == draw_identity(3, 8)
    people = {draw_identity(seed, number) for seed in (0, 1) for number in range(1, 51)}
    assert len({dataclasses.replace(person, number=0) for person in people}) == 100


def test_views_vary_and_do_not_look_at_the_identity():
    views = [draw_view(0, 1, image) for image in range(1, 301)]
    assert views[0] == draw_view(0, 1, 1)
    assert len(set(views)) == 300
    yaws = np.array([view.yaw for view in views])
    assert yaws.min() < -0.25 < 0.25 < yaws.max()
    assert {view.quality for view in views} == set(range(60, 96))
    occluded = sum(view.occluder != "" for view in views)
    assert {view.occluder for view in views} == {"", *OCCLUDERS}
    assert 0.05 * 300 < occluded < 0.25 * 300  # a minority
    assert all(abs(np.linalg.norm(view.light) - 1) < 1e-6 for view in views)


@pytest.mark.parametrize("occluder", OCCLUDERS)
def test_an_occluder_hides_a_part_only(occluder):
    person = draw_identity(2, 5)
    view = dataclasses.replace(draw_view(2, 5, 1), occluder="", occluder_at=(0.4, 0.5, 0.3), yaw=0.1, pitch=0.0)
    covered = paint(person, dataclasses.replace(view, occluder=occluder), 128).astype(int)
    changed = (np.abs(covered - paint(person, view, 128)).max(axis=2) > 8).mean()
    assert 0.002 < changed < 0.45


def test_the_identity_shows_under_the_same_view():
    """Two people in exactly the same view differ by far more than one person drawn twice (which differs by nothing)."""
    view = dataclasses.replace(draw_view(0, 1, 1), occluder="", noise=0.0)
    people = [dataclasses.replace(draw_identity(0, number), number=1) for number in range(1, 9)]
    pictures = [paint(person, view, 64).astype(float) for person in people]
    gaps = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(gaps) > 4  # grey levels
    assert np.abs(pictures[0] - paint(people[0], view, 64)).max() == 0


def test_textures_survive_large_identity_numbers():
    """Texture offsets 7.3 n, 3.1 n and 13.7 n repeat after 256 pixels, so after 2,560 people."""
    person = draw_identity(0, 5)
    person = dataclasses.replace(person, fringe=(0.0, 0.0, 3.0, 0.0), curl=0.5, streaks=1.0)
    view = dataclasses.replace(draw_view(0, 5, 1), occluder="", noise=0.0)
    pictures = [paint(dataclasses.replace(person, number=number), view, 96).astype(int) for number in (5, 2565, 997)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.1
    assert np.abs(pictures[0] - pictures[2]).mean() > 0.5  # another number does move them


def raw_rank1(pictures: np.ndarray, images: int) -> float:
    """One-shot Rank-1 by cosine of raw pixels, (people * images, ...); each person's first picture is the gallery."""
    rows = pictures.reshape(len(pictures), -1).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    people = np.arange(len(rows)) // images
    first = np.arange(len(rows)) % images == 0
    best = (rows[~first] @ rows[first].T).argmax(axis=1)
    return float((best == people[~first]).mean())


def test_raw_rank1_on_known_vectors():
    # person 0: [1, 0], [.9, .1] (nearest is its own); person 1: [0, 1], [1, .2] (nearest is person 0): 1 of 2
    assert raw_rank1(np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0.2]]), 2) == 0.5


def test_raw_pixels_do_not_solve_it():
    """100 people, one-shot, 64 pixels: at most 25 % by raw pixels (chance: 1 %)."""
    people = [draw_identity(11, number) for number in range(1, 101)]
    pictures = np.stack([render(person, 11, image, 64) for person in people for image in range(1, 6)])
    assert raw_rank1(pictures, 5) <= 0.25


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("identities", 0, "at least 1"),
        ("images_per_identity", 0, "at least 1"),
        ("size", 31, "from 32 to 1024"),
        ("size", 1025, "from 32 to 1024"),
        ("seed", -1, "at least 0"),
        ("workers", 0, "at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_work(tmp_path, setting, value, allowed):
    settings = {"identities": 1, "images_per_identity": 1, "size": 32, "seed": 0, "workers": 1, setting: value}
    with pytest.raises(ValueError, match=rf"{setting} is {value};") as refusal:
        synthesize(tmp_path / "out", **settings)
    assert allowed in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"out is not empty"):
        synthesize(tmp_path / "out", identities=1, images_per_identity=1, size=32)
    assert files(tmp_path) == {"out/mine.txt": b"keep"}


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(ValueError, match=r"out is a file"):
        synthesize(tmp_path / "out", identities=1, images_per_identity=1, size=32)
    assert files(tmp_path) == {"out": b"keep"}


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path):
    (tmp_path / "out").mkdir()
    assert synthesize(tmp_path / "out", identities=1, images_per_identity=1, size=32, workers=1) == 1
    assert synthesize(tmp_path / "a" / "b", identities=1, images_per_identity=1, size=32, workers=1) == 1
    assert files(tmp_path / "out") == files(tmp_path / "a" / "b")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, interruption):
    real = synthetic.encode

    def fail_at_second(identity, seed, image, size):
        if identity.number == 2:
            assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["out.partial"]
            raise interruption
        return real(identity, seed, image, size)

    monkeypatch.setattr(synthetic, "encode", fail_at_second)
    with pytest.raises(interruption):
        synthesize(tmp_path / "out", identities=3, images_per_identity=1, size=32, workers=1)
    assert os.listdir(tmp_path) == []
