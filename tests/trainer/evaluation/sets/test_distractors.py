"""Rank-k among distractors against a loop that sorts the whole gallery; counts, duplicates, memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from trainer.evaluation.sets import distractors
from trainer.evaluation.sets.distractors import distractor_set
from trainer.evaluation.sets.judge import SetsConfig, judge_sets
from trainer.evaluation.sets.prepared import Report

REPORT = Report(margin=None, squared=True)
SIZE = 4


def draw(root: Path, counts: dict[str, int]) -> None:
    """So many pictures of each identity, no two alike."""
    for identity, count in counts.items():
        (root / identity).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng([number, *identity.encode()]).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / identity / f"{number:02d}.png")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ShardSet:
    """Six unseen identities of three images and one of a single image; four training identities."""
    folder = tmp_path_factory.mktemp("run")
    counts = {f"u{n}": 3 for n in range(6)} | {"u6": 1} | {f"t{n}": 4 for n in range(4)}
    draw(folder / "pictures", counts)
    held = tuple(name for name in counts if name.startswith("u"))
    convert(folder / "pictures", folder / "shards", ConvertConfig(holdout_identities=held, holdout_images=1, workers=1))
    return ShardSet.open(folder / "shards")


@pytest.fixture(scope="module")
def crowd(tmp_path_factory) -> ShardSet:
    """1,207 strangers, in two splits."""
    folder = tmp_path_factory.mktemp("crowd")
    draw(folder / "pictures", {f"s{n}": 17 for n in range(71)})
    convert(folder / "pictures", folder / "shards", ConvertConfig(holdout_images=3, workers=1))
    return ShardSet.open(folder / "shards")


def made_up(split, samples):
    """Unseen images of an identity lie about a direction of its own, all others anywhere."""
    rows = split.samples[samples]
    seeds = rows["crc32"].astype(np.int64)
    vectors = np.stack([np.random.default_rng(seed).normal(size=SIZE) for seed in seeds])
    if split.name == "unseen_identities":
        centres = np.stack([np.random.default_rng(label).normal(size=SIZE) for label in rows["identity"].tolist()])
        vectors = centres + 0.5 * vectors
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors).float())
    return unit, torch.from_numpy(rows["identity"].astype(np.int64))


def by_sorting(source, crowd, order):
    """Rank-1 and Rank-5 at every number of distractors."""
    unseen = source.split("unseen_identities")
    ours, labels = (values.numpy() for values in made_up(unseen, np.arange(len(unseen))))
    everyone = np.concatenate(
        [made_up(split, np.arange(len(split)))[0].numpy() for split in map(crowd.split, crowd.splits)]
    )
    first = np.unique(labels, return_index=True)[1]
    found = []
    for count in (0, 10, 100, 1000, len(order)):
        gallery = np.concatenate([ours[first], everyone[order[:count]]]).astype(np.float64)
        names = [*labels[first].tolist(), *[-1] * count]
        places = []
        for probe in np.setdiff1d(np.arange(len(ours)), first):
            ranked = np.argsort(-(gallery @ ours[probe].astype(np.float64)), kind="stable")
            places.append([names[row] for row in ranked].index(labels[probe]))
        found.append({"count": count} | {f"rank{k}": float(np.mean(np.array(places) < k)) for k in (1, 5)})
    return found


@pytest.mark.parametrize("numbers", [1 << 26, 1024 * SIZE])
def test_against_sorting_the_gallery(source, crowd, monkeypatch, numbers):
    monkeypatch.setattr(distractors, "NUMBERS", numbers)
    prepared = distractor_set("crowd", source, crowd, seed=3)
    assert sorted(prepared.order.tolist()) == list(range(1207))
    result = prepared.judge(made_up, REPORT)
    found = result.scalars
    expected = by_sorting(source, crowd, prepared.order)
    assert found["distractors"] == expected
    assert [row["count"] for row in expected] == [0, 10, 100, 1000, 1207]
    rates = [row["rank5"] for row in expected]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[2] > rates[4], "the crowd makes it harder"
    assert (found["rank1"], found["rank5"]) == (expected[4]["rank1"], expected[4]["rank5"])
    assert (found["gallery"], found["gallery_identities"], found["probes"]) == (1214, 7, 12)
    assert (found["margin"], found["distance"], found["distractors_left_out"]) == (None, "squared", 0)


def test_only_so_many_are_held_at_once(source, crowd, monkeypatch):
    monkeypatch.setattr(distractors, "NUMBERS", 0)
    asked = []

    def counted(split, samples):
        if samples is not None:  # the whole set is asked for once, so that it can be kept
            asked.append((split.name, len(samples)))
        return made_up(split, samples)

    distractor_set("crowd", source, crowd, seed=0).judge(counted, REPORT)
    assert asked[0] == ("unseen_identities", 19)
    assert sum(count for _, count in asked[1:]) == 1207
    assert max(count for _, count in asked) <= 1024


def test_images_of_the_unseen_identities_are_no_distractors(source):
    prepared = distractor_set("itself", source, source, seed=0)
    assert prepared.left_out == len(source.split("unseen_identities"))
    assert len(prepared.order) == sum(len(source.split(name)) for name in ("train", "unseen_images"))
    assert prepared.judge(made_up, REPORT).scalars["distractors"][-1]["count"] == 16


def test_equal_checksums_are_not_equal_images(source, crowd, monkeypatch):
    monkeypatch.setattr(distractors, "_checksums", lambda split: np.zeros(len(split), np.uint64))
    assert distractor_set("crowd", source, crowd, seed=0).left_out == 0
    assert distractor_set("itself", source, source, seed=0).left_out == 19


def test_pictures_are_converted(source, tmp_path):
    draw(tmp_path / "crowd", {"x": 3, "y": 9})
    sets = SetsConfig(distractors=tmp_path / "crowd", seed=1)
    given = {"work": tmp_path / "work", "image_size": 32, "margin": 0.2, "squared": False}
    (row,) = judge_sets(sets, source, [("facescale", made_up)], **given)
    assert row.set == "unseen identities among crowd"
    assert [entry["count"] for entry in row.result.scalars["distractors"]] == [0, 10, 12]


def test_a_mate_that_is_as_near_as_a_distractor_comes_first(source, crowd):
    def all_alike(split, samples):
        rows = split.samples[samples]
        return torch.eye(1, SIZE).repeat(len(rows), 1), None

    found = distractor_set("crowd", source, crowd, seed=0).judge(all_alike, REPORT).scalars["distractors"]
    # equal similarities go by place in the gallery, enrolled ones first: identity 0 is at rank 1, identity 4 at rank 5
    assert {(row["rank1"], row["rank5"]) for row in found} == {(2 / 12, 10 / 12)}


def test_sets_that_cannot_be_judged(source, crowd, tmp_path):
    with pytest.raises(ValueError, match="holds no identities out for distractors to join"):
        distractor_set("crowd", crowd, source, seed=0)
    draw(tmp_path / "few", {f"n{number}": 2 for number in range(4)})
    convert(tmp_path / "few", tmp_path / "shards", ConvertConfig(holdout_identities=1.0))
    few = ShardSet.open(tmp_path / "shards")
    with pytest.raises(ValueError, match="has 4 unseen identities, the largest of 2 images; distractors need 5"):
        distractor_set("crowd", few, crowd, seed=0)
    draw(tmp_path / "six", {f"n{number}": 2 for number in range(6)})
    convert(tmp_path / "six", tmp_path / "alone", ConvertConfig(holdout_identities=1.0))
    alone = ShardSet.open(tmp_path / "alone")
    with pytest.raises(ValueError, match="hold nothing but images of the unseen identities themselves"):
        distractor_set("itself", alone, alone, seed=0)
