"""Batches off real shards: the right pictures with the right labels, on any number of ranks, through damage."""

import os

import numpy as np
import pytest
import torch
from conftest import encode

from data_shards.augment import AugmentConfig, augment, colour_matrices
from data_shards.decode import DecodeError
from data_shards.loader import Loader, LoaderConfig, evaluation_loader, training_loader
from data_shards.plan import Draws, Plan, PlanConfig, per_rank

CONFIG = LoaderConfig(image_size=16, decode_threads=1)
PLACE_ONLY = AugmentConfig(brightness=0, contrast=0, saturation=0, greyscale=0)
COUNTS = {"ann": 5, "bob": 3, "cy": 6, "dee": 4, "eve": 1, "fay": 2}
LABELS = np.repeat(np.arange(len(COUNTS)), list(COUNTS.values()))
"""Label of each sample of `COUNTS`, read off it by hand."""


def coded(identity, number, width=24, height=20):
    """Red says the identity, green the number of the picture."""
    return np.full((height, width, 3), (20 + 30 * identity, 20 + 20 * number, 100), np.uint8)


def textured(number, width=40, height=32):
    """Red grows to the right, green downwards; blue is noise."""
    rows, columns = np.indices((height, width))
    noise = np.random.default_rng(number).integers(0, 256, (height, width))
    return np.stack([(2 * columns + 1) * 255 // (2 * width), (2 * rows + 1) * 255 // (2 * height), noise], -1)


@pytest.fixture
def coloured(split_of):
    pictures = {
        name: [encode(coded(label, number)) for number in range(count)]
        for label, (name, count) in enumerate(COUNTS.items())
    }
    split = split_of(pictures, shard_bytes=6_000)
    assert len(split.shards) > 2
    return split


@pytest.fixture
def noisy(split_of):
    rows = iter(range(100))
    return split_of({name: [encode(textured(next(rows))) for _ in range(n)] for name, n in COUNTS.items()})


def read_off(images):
    """(identity, number) of coded pictures, shape (b, 2)."""
    red, green, blue = images.flatten(2).permute(1, 0, 2).int()  # (b, H*W) each
    assert (blue == 100).all()
    assert (red == red[:, :1]).all()
    assert (green == green[:, :1]).all()
    return torch.stack([(red[:, 0] - 20) / 30, (green[:, 0] - 20) / 20], 1)


def numbers_of(samples):
    """Each sample's number within its identity."""
    return samples - np.searchsorted(LABELS, LABELS[samples])


def plan_of(split, p=4, k=3, seed=1):
    return Plan(split.starts, PlanConfig(identities_per_batch=p, images_per_identity=k), seed)


def train(split, plan, augmentation=None, **options):
    return list(training_loader(split, plan, CONFIG, augmentation or AugmentConfig(), **options))


def damage(split, *samples):
    """Overwrites pictures inside their tars; sizes and headers stay."""
    for sample in samples:
        row = split.samples[sample]
        with split.shards[row["shard"]].open("r+b") as tar:
            tar.seek(int(row["offset"]))
            tar.write(bytes(int(row["size"])))


def check_batch(batch, size):
    assert (batch.images.shape, batch.images.dtype) == ((size, 3, 16, 16), torch.uint8)
    assert (batch.identities.shape, batch.identities.dtype) == ((size,), torch.int64)
    assert (batch.samples.shape, batch.samples.dtype, batch.samples.device.type) == ((size,), torch.int64, "cpu")
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_training_batches_hold_the_pictures_that_plan_labels_and_samples_name(coloured):
    plan = plan_of(coloured)
    batches = train(coloured, plan, PLACE_ONLY, stop=2 * plan.steps_per_epoch)
    assert len(batches) == 2 * plan.steps_per_epoch
    for step, batch in enumerate(batches):
        check_batch(batch, 12)
        samples = batch.samples.numpy()
        assert samples.tolist() == plan.global_batch(step).samples.tolist()
        assert batch.identities.tolist() == LABELS[samples].tolist()
        assert read_off(batch.images).tolist() == np.stack([LABELS[samples], numbers_of(samples)], 1).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_visits_every_sample_once_in_order_over_all_ranks(coloured, world_size):
    seen, pictures = [], []
    for rank in range(world_size):
        loader = evaluation_loader(coloured, CONFIG, batch_size=4, rank=rank, world_size=world_size)
        batches = list(loader)
        sizes = [len(batch.samples) for batch in batches]
        assert set(sizes[:-1]) <= {4}
        for batch in batches:
            check_batch(batch, len(batch.samples))
            assert batch.identities.tolist() == LABELS[batch.samples.numpy()].tolist()
            seen += batch.samples.tolist()
            pictures += read_off(batch.images).tolist()
    assert seen == list(range(21))
    assert pictures == np.stack([LABELS, numbers_of(np.arange(21))], 1).tolist()


@pytest.mark.parametrize("decoder", ["libjpeg", "dali"])
def test_batches_can_be_made_in_inference_mode(coloured, decoder):
    config = LoaderConfig(image_size=16, decode_threads=1, decoder=decoder)
    with torch.inference_mode():
        batches = list(evaluation_loader(coloured, config, batch_size=4))
    assert len(batches) == 6


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_of_some_samples_keeps_their_order(coloured, world_size):
    samples = np.array([20, 3, 3, 11, 0, 7, 19])
    seen = [
        (sample, *picture)
        for rank in range(world_size)
        for batch in evaluation_loader(
            coloured, CONFIG, batch_size=2, samples=samples, rank=rank, world_size=world_size
        )
        for sample, picture in zip(batch.samples.tolist(), read_off(batch.images).tolist(), strict=True)
    ]
    assert seen == [(s, LABELS[s], numbers_of(np.array([s]))[0]) for s in samples.tolist()]


def test_a_rank_without_samples_gets_no_batch(coloured):
    samples = np.array([4, 9])
    seen = [
        [
            batch.samples.tolist()
            for batch in evaluation_loader(coloured, CONFIG, batch_size=2, samples=samples, rank=r, world_size=5)
        ]
        for r in range(5)
    ]
    assert sorted(seen) == [[], [], [], [[4]], [[9]]]


def test_evaluation_takes_the_central_square_as_it_is(split_of):
    """Of 40 x 32 pixels the middle 32 x 32: columns 4 to 35."""
    split = split_of({"ann": [encode(textured(0))] * 2, "bob": [encode(textured(1))] * 2})
    config = LoaderConfig(image_size=32, decode_threads=1)
    for batch in evaluation_loader(split, config, batch_size=4):
        for image, number in zip(batch.images, (0, 0, 1, 1), strict=True):
            assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(textured(number)[:, 4:36].astype(np.uint8)))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_get_slices_of_the_global_batch_bit_for_bit(noisy, world_size):
    plan = plan_of(noisy)
    whole = train(noisy, plan, stop=5)
    ranks = [train(noisy, plan, stop=5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = [ranks[rank][step] for rank in range(world_size)]
        assert {len(part.samples) for part in parts} == {12 // world_size}
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.identities for part in parts]), batch.identities)
        assert torch.equal(torch.cat([part.samples for part in parts]), batch.samples)
    assert not torch.equal(whole[0].images, whole[1].images)


@pytest.mark.parametrize("start", [1, 4, 7])
def test_a_new_loader_goes_on_at_any_step_bit_for_bit(noisy, start):
    plan = plan_of(noisy)
    whole = train(noisy, plan, stop=9)
    rest = train(noisy, plan_of(noisy), start=start, stop=9)
    assert len(rest) == 9 - start
    for batch, wanted in zip(rest, whole[start:], strict=True):
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(batch.samples, wanted.samples)


@pytest.mark.parametrize("threads", [2, 4])
def test_the_number_of_threads_does_not_change_a_bit(noisy, threads):
    plan = plan_of(noisy)
    config = LoaderConfig(image_size=16, decode_threads=threads)
    other = training_loader(noisy, plan, config, AugmentConfig(), stop=4)
    for batch, wanted in zip(other, train(noisy, plan, stop=4), strict=True):
        assert torch.equal(batch.images, wanted.images)


def test_each_picture_gets_the_crop_and_mirror_drawn_for_it(noisy):
    """Red tells the column and green the row: their means are the crop's centre, and red falls where it is mirrored."""
    plan = plan_of(noisy, seed=8)
    mirrored = 0
    for step, batch in enumerate(train(noisy, plan, PLACE_ONLY, stop=4)):
        given = augment(PLACE_ONLY, 8, plan.global_batch(step), np.full(12, 40), np.full(12, 32))
        centre = (given.anchor + given.shape / 2) * 255
        means = batch.images.float().mean((2, 3)).numpy()
        assert np.abs(means[:, :2] - centre).max() < 5  # a crop is cut at whole pixels, of 6 and 8 grey levels
        rightwards = batch.images[:, 0, :, -1].float().mean(1) - batch.images[:, 0, :, 0].float().mean(1)
        assert ((rightwards < 0).int().numpy() == given.mirror).all()
        mirrored += given.mirror.sum()
    assert 10 < mirrored < 38  # of 48


@pytest.mark.parametrize("decoder", ["dali", "libjpeg"])
def test_colours_come_with_the_pictures_that_they_were_drawn_for(coloured, decoder):
    """Also where a damaged picture makes batches be decoded again; pictures themselves keep their colours."""
    damage(coloured, 9)
    config, plan, colours = LoaderConfig(image_size=16, decode_threads=1, decoder=decoder), plan_of(coloured), 0
    for step, batch in enumerate(training_loader(coloured, plan, config, AugmentConfig(), stop=9)):
        draws = plan.global_batch(step)._replace(samples=batch.samples.numpy())
        size = len(draws.samples)
        given = augment(AugmentConfig(), plan.seed, draws, np.full(size, 24), np.full(size, 20))
        assert torch.equal(batch.colour, torch.from_numpy(colour_matrices(given)))
        places = zip(LABELS[draws.samples], numbers_of(draws.samples), strict=True)
        wanted = np.stack([coded(*place)[0, 0] for place in places])
        assert np.abs(batch.images.float().mean((2, 3)).numpy() - wanted).max() < 3
        colours += len(batch.colour.unique(dim=0))
    assert colours > 9 * 11  # what stands in for a damaged picture may be there itself
    assert next(evaluation_loader(coloured, CONFIG, batch_size=4)).colour is None


def test_the_same_picture_looks_different_in_the_next_epoch_and_at_its_next_visit(noisy):
    plan = plan_of(noisy)
    draws = plan.batches(0, 0, 1, 2 * plan.steps_per_epoch)
    looks = {}
    for batch, draw in zip(train(noisy, plan, stop=2 * plan.steps_per_epoch), draws, strict=True):
        for sample, visit, image in zip(draw.samples.tolist(), draw.visits.tolist(), batch.images, strict=True):
            looks.setdefault(sample, {})[draw.epoch, visit] = image.contiguous().numpy().tobytes()
    assert any(visit for seen in looks.values() for _, visit in seen)
    for seen in looks.values():
        assert len(set(seen.values())) == len(seen)


def test_a_loader_that_has_ended_stays_at_its_end(coloured):
    loader = training_loader(coloured, plan_of(coloured), CONFIG, PLACE_ONLY, stop=2)
    assert len(list(loader)) == 2
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)


def test_batches_stay_as_they_are_when_later_ones_arrive(coloured):
    batches = train(coloured, plan_of(coloured), PLACE_ONLY, stop=12)
    for batch in batches:
        assert read_off(batch.images)[:, 0].tolist() == batch.identities.tolist()


def replaced_once(sample):
    """The next sample of the same identity, round."""
    rows = np.flatnonzero(LABELS[sample] == LABELS).tolist()
    return rows[(rows.index(sample) + 1) % len(rows)]


@pytest.mark.parametrize("step", [0, 1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_picture_is_replaced_by_another_of_its_identity(coloured, step, world_size):
    """The damaged one comes first in some step; batches are decoded ahead of it, and the last step is one of those tried."""
    plan = plan_of(coloured)
    draws = [plan.batch(number, 0, world_size).samples for number in range(9)]
    fresh = sorted(set(draws[step].tolist()) - {s for before in draws[:step] for s in before.tolist()}) or [
        draws[step][0]
    ]
    bad = int(fresh[0])
    key = coloured.key(bad)
    damage(coloured, bad)
    loader = training_loader(coloured, plan, CONFIG, PLACE_ONLY, stop=9, world_size=world_size)
    batches = list(loader)
    assert loader.undecodable == {bad: key}
    assert len(batches) == 9
    for batch, drawn in zip(batches, draws, strict=True):
        wanted = [replaced_once(bad) if sample == bad else sample for sample in drawn.tolist()]
        assert batch.samples.tolist() == wanted
        assert batch.identities.tolist() == LABELS[drawn].tolist()
        assert read_off(batch.images).tolist() == np.stack([LABELS[wanted], numbers_of(np.array(wanted))], 1).tolist()


def test_damage_changes_no_other_picture_by_a_bit(noisy):
    plan = plan_of(noisy)
    before = train(noisy, plan, stop=6)
    bad = int(plan.global_batch(2).samples[5])
    damage(noisy, bad)
    after = train(noisy, plan, stop=6)
    changed = 0
    for old, new in zip(before, after, strict=True):
        same = old.samples != bad
        assert torch.equal(old.images[same], new.images[same])
        assert torch.equal(old.identities, new.identities)
        changed += int((~same).sum())
    assert changed


def test_several_damaged_pictures_also_of_one_identity_and_of_one_batch(coloured):
    """Sample 1 falls to 2, which is damaged too, and to 3; of the last identity 20 falls to 19; 9 and 13 far apart."""
    bad = {1: "ann/001", 2: "ann/002", 9: "cy/001", 13: "cy/005", 20: "fay/001"}
    damage(coloured, *bad)
    stand_in = {1: 3, 2: 3, 9: 10, 13: 8, 20: 19}
    plan = plan_of(coloured)
    loader = training_loader(coloured, plan, CONFIG, PLACE_ONLY, stop=12)
    for step, batch in enumerate(loader):
        drawn = plan.global_batch(step).samples.tolist()
        assert batch.samples.tolist() == [stand_in.get(sample, sample) for sample in drawn]
        assert read_off(batch.images)[:, 0].tolist() == batch.identities.tolist() == LABELS[drawn].tolist()
    assert step == 11
    assert loader.undecodable == bad


@pytest.mark.parametrize("bad", [0, 13, 20])
def test_evaluation_goes_on_past_a_damaged_picture(coloured, bad):
    damage(coloured, bad)
    loader = evaluation_loader(coloured, CONFIG, batch_size=4)
    seen = [sample for batch in loader for sample in batch.samples.tolist()]
    assert seen == [replaced_once(bad) if sample == bad else sample for sample in range(21)]
    assert loader.undecodable == {bad: coloured.key(bad)}


def test_an_identity_of_which_no_picture_decodes_is_an_error(coloured):
    damage(coloured, 18)  # eve's only one
    with pytest.raises(ValueError, match=r"^no image of eve/000's identity decodes: run `facescale verify --decode`$"):
        list(evaluation_loader(coloured, CONFIG, batch_size=4))
    damage(coloured, 19, 20)
    with pytest.raises(ValueError, match=r"^no image of fay/00\d's identity decodes: run `facescale verify --decode`$"):
        train(coloured, plan_of(coloured, p=5), stop=1)


class FakeDecoder:
    """Asks for `ahead` batches before it gives one, and dies at a picture of zeros."""

    def __init__(self, feed, ahead):
        self.feed, self.ahead, self.held = feed, ahead, []

    def next(self):
        while len(self.held) < self.ahead:
            self.held.append([bytes(image) for image in self.feed()[0]])
        batch = self.held.pop(0)
        if not all(map(any, batch)):
            raise DecodeError("damaged")
        return torch.zeros(len(batch), 3, 16, 16, dtype=torch.uint8)

    def decodes(self, encoded):
        return bool(encoded.any())


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_batches_that_wait_to_be_decoded_again_survive_a_second_failure(coloured, ahead, monkeypatch):
    """Sample 9 kills a pipeline that holds 3 batches; 10, which stands in for it, kills one that may hold fewer."""
    damage(coloured, 9, 10)
    batches = [[9, 0], [5, 1], [18, 2], [8, 9], [3, 10], [11, 12], [4, 6], [7, 19]]
    draws = (Draws(0, np.array(batch), np.zeros(2, np.int64)) for batch in batches)
    depths = iter([3, ahead, ahead])
    monkeypatch.setattr("data_shards.loader.CpuDecoder", lambda feed, *_: FakeDecoder(feed, next(depths)))
    loader = Loader(coloured, draws, 2, CONFIG)
    taken = [next(loader).samples.tolist() for _ in batches[:5]]
    assert taken == [[11, 0], [5, 1], [18, 2], [8, 11], [3, 11]]
    assert loader.undecodable == {9: "cy/001", 10: "cy/002"}
    assert next(depths, None) is None


def test_a_failure_without_a_damaged_picture_is_raised(coloured, monkeypatch):
    """Else the loader would rebuild its pipeline for ever."""

    class Failing(FakeDecoder):
        def next(self):
            self.feed()
            raise DecodeError("out of memory")

    monkeypatch.setattr("data_shards.loader.CpuDecoder", lambda feed, *_: Failing(feed, 1))
    loader = training_loader(coloured, plan_of(coloured), CONFIG, PLACE_ONLY)
    with pytest.raises(DecodeError, match="out of memory"):
        next(loader)


def test_damage_after_a_resume_is_found_again(coloured):
    plan = plan_of(coloured)
    damage(coloured, 9)
    whole = training_loader(coloured, plan, CONFIG, PLACE_ONLY, stop=12)
    batches = list(whole)
    rest = train(coloured, plan, PLACE_ONLY, start=5, stop=12)
    for batch, wanted in zip(rest, batches[5:], strict=True):
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(batch.samples, wanted.samples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 15}, "data.image_size is 15; allowed is 16 to 1024 pixels"),
        ({"image_size": 1025}, "data.image_size is 1025; allowed is 16 to 1024 pixels"),
        ({"image_size": -112}, "data.image_size is -112; allowed is 16 to 1024 pixels"),
        ({"decode_threads": -1}, r"data.decode_threads is -1; allowed is 0 \(automatic\) or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LoaderConfig(**settings)


def test_the_ends_of_the_allowed_range_are_allowed():
    assert [LoaderConfig(image_size=size).image_size for size in (16, 1024)] == [16, 1024]


@pytest.mark.parametrize(
    ("cores", "ranks", "setting", "threads"), [(8, None, 0, 8), (8, 2, 0, 4), (8, 3, 0, 2), (2, 4, 0, 1), (8, 2, 5, 5)]
)
def test_cores_are_shared_among_the_ranks_of_a_machine(monkeypatch, cores, ranks, setting, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert LoaderConfig(decode_threads=setting).threads == threads


def test_a_world_size_that_does_not_divide_the_batch_is_refused(coloured):
    plan = plan_of(coloured)
    with pytest.raises(ValueError, match=r"^plan: P\*K = 4 \* 3 = 12 is not divisible by the world size 5$"):
        training_loader(coloured, plan, CONFIG, PLACE_ONLY, rank=0, world_size=5)
    assert per_rank(plan.config, 4) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False")
def test_on_cuda_a_damaged_picture_is_replaced_and_every_batch_arrives(coloured):
    plan = plan_of(coloured)
    damage(coloured, 9)
    loader = training_loader(coloured, plan, CONFIG, PLACE_ONLY, stop=9, device="cuda")
    batches = list(loader)
    assert loader.undecodable == {9: "cy/001"}
    for step, batch in enumerate(batches):
        assert batch.images.device.type == batch.identities.device.type == "cuda"
        drawn = plan.global_batch(step).samples.tolist()
        assert batch.samples.tolist() == [10 if sample == 9 else sample for sample in drawn]
    assert step == 8
