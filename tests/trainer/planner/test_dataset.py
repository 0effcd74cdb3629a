"""Shard counts and index sizes against `data_shards`' own code, and against a set that was really converted."""

import numpy as np
import pytest

from data_shards.convert_config import ConvertConfig
from data_shards.index import IDENTITIES, INDEX, ShardSet
from data_shards.plan import Plan, PlanConfig
from data_shards.shard_plan import _cuts, _sample_bytes
from trainer.planner.dataset import estimate, read_shards, sample_bytes
from trainer.planner.workload import Workload


@pytest.mark.parametrize("picture", [256, 6_912, 15_104])
@pytest.mark.parametrize("images", [40, 999, 5_000])
@pytest.mark.parametrize("shard_bytes", [200_000, 1_000_000, 2**28])
def test_as_many_shards_as_the_conversion_cuts(picture, images, shard_bytes):
    """Pictures whose padding is half a block, which is what the estimate takes for the mean."""
    sizes = np.full(images, picture)
    assert sample_bytes(picture) == _sample_bytes(sizes)[0]
    job = Workload(images=images, identities=10, p=4, k=2, picture_bytes=picture)
    cut = list(_cuts(sizes, ConvertConfig(shard_bytes=shard_bytes)))
    assert estimate(job, shard_bytes).shards == len(cut)


def test_index_by_hand():
    """28 bytes a picture and 17 an identity, behind the header of .npy."""
    found = estimate(Workload(images=1000, identities=100, p=4), 2**28)
    assert 28 * 1000 < found.index_bytes <= 28 * 1000 + 256
    assert 17 * 100 < found.identities_bytes <= 17 * 100 + 256


def test_a_converted_set(shards):
    found = read_shards(shards)
    split = ShardSet.open(shards).split("train")
    assert (found.images, found.identities) == (len(split), len(split.identities))
    assert found.index_bytes == (shards / INDEX).stat().st_size
    assert found.identities_bytes == (shards / IDENTITIES).stat().st_size
    tars = sorted(shards.glob("*/*.tar"))
    assert found.shards == len(tars)
    assert found.tar_bytes == sum(tar.stat().st_size for tar in tars)
    assert (found.picture_width, found.picture_height) == (24, 16)
    job = Workload(images=found.images, identities=found.identities, p=4, k=2)
    expected = Plan(split.starts, PlanConfig(identities_per_batch=4, images_per_identity=2)).steps_per_epoch
    assert found.dataset(job).steps_per_epoch == expected
    assert found.dataset(job).exact


def test_the_estimate_of_that_set_is_near(shards):
    """Of all splits: as many pictures, of their mean size."""
    rows = np.concatenate([ShardSet.open(shards).split(name).samples for name in ShardSet.open(shards).splits])
    job = Workload(images=len(rows), identities=13, p=4, k=2, picture_bytes=float(rows["size"].mean()))
    assert estimate(job, 2**28).tar_bytes == pytest.approx(read_shards(shards).tar_bytes, rel=0.1)


def test_epoch_by_hand():
    """100 identities of 10 pictures in groups of 4 are 300 groups, 4 a step."""
    assert estimate(Workload(images=1000, identities=100, p=4, k=4), 2**28).steps_per_epoch == 75


def test_too_few_identities_with_two_pictures(shards):
    found = read_shards(shards)
    with pytest.raises(ValueError, match="--p is 8; the shards have 7 training identities with at least 2 images"):
        found.dataset(Workload(images=found.images, identities=found.identities, p=8, k=2))
