from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from data_shards.convert_config import ConvertConfig
from data_shards.index import SPLITS
from data_shards.listing import ROW, name_draw
from data_shards.shard_plan import job, plan_shards


def listing(counts, size=1000):
    """Rows, identities and keys of so many pictures of each identity."""
    names = sorted(counts)
    keys = [f"{name}/{number:03d}" for name in names for number in range(counts[name])]
    rows = np.zeros(len(keys), ROW)
    rows["identity"] = [names.index(key.split("/")[0]) for key in keys]
    rows["draw"] = [name_draw(key) for key in keys]
    rows["size"] = size
    return rows, names, keys


def plan_of(pictures, kept=None, **settings):
    rows, names, _ = pictures
    return plan_shards(rows, names, np.ones(len(rows), bool) if kept is None else kept, ConvertConfig(**settings))


def jobs(pictures, **settings):
    plan = plan_of(pictures, **settings)
    return [job(plan, number) for number in range(len(plan.shards))]


def planned(pictures, **settings):
    """Keys of each split in the order in which they are written."""
    _, _, keys = pictures
    written = jobs(pictures, **settings)
    return {split: [keys[row] for one in written if one.split == split for row in one.rows] for split in SPLITS}


@pytest.mark.parametrize("order", ["groups", "identity", "random", "source"])
def test_every_picture_goes_into_one_shard(order):
    pictures = listing({f"id{n:02d}": 1 + n % 7 for n in range(30)})
    splits = planned(pictures, order=order, holdout_identities=4, holdout_images=2, shard_bytes=20_000)
    assert sorted(key for keys in splits.values() for key in keys) == pictures[2]


def test_another_seed_gives_another_order():
    pictures = listing({f"id{n}": 6 for n in range(10)})
    assert planned(pictures, seed=0)["train"] != planned(pictures, seed=1)["train"]
    assert sorted(planned(pictures, seed=0)["train"]) == sorted(planned(pictures, seed=1)["train"])


def test_groups_order_keeps_k_images_of_an_identity_together_and_mixes_identities():
    keys = planned(listing({f"id{n:02d}": 8 for n in range(20)}), images_per_group=4)["train"]
    owners = [key.split("/")[0] for key in keys]
    groups = [set(owners[start : start + 4]) for start in range(0, len(owners), 4)]
    assert all(len(group) == 1 for group in groups)
    order = [group.pop() for group in groups]
    assert sum(a == b for a, b in pairwise(order)) < 10  # identity order would have 20
    assert [key for key in keys if key.startswith("id00")] != sorted(key for key in keys if key.startswith("id00"))


def test_what_is_left_of_an_identity_makes_a_smaller_group():
    keys = planned(listing({"a": 5, "b": 2, "c": 4}), images_per_group=4)["train"]
    runs = [len(list(run)) for run in _runs([key[0] for key in keys])]
    assert sorted(runs) in ([1, 2, 4, 4], [2, 4, 5])  # the two groups of a may meet


def _runs(owners):
    run = [owners[0]]
    for before, now in pairwise(owners):
        if before != now:
            yield run
            run = []
        run.append(now)
    yield run


def test_identity_order_is_the_listings():
    pictures = listing({"a": 5, "b": 6})
    assert planned(pictures, order="identity")["train"] == pictures[2]


def test_random_order_mixes_identities():
    keys = planned(listing({"a": 50, "b": 50}), order="random")["train"]
    assert 25 < sum(a[0] == b[0] for a, b in pairwise(keys)) < 75  # 49 expected; identity order has 98


def test_source_order_is_that_of_the_parts_and_offsets():
    pictures = listing({"a": 3, "b": 3})
    pictures[0]["part"] = [1, 0, 1, 0, 0, 0]
    pictures[0]["offset"] = [5, 7, 4, 9, 1, 8]
    assert planned(pictures, order="source")["train"] == ["b/001", "a/001", "b/002", "b/000", "a/002", "a/000"]


def test_shards_are_cut_before_they_grow_too_large():
    # 3 header and label blocks + 1000 bytes in 2 blocks = 2560; the end takes 1024: 3 fit in 8704, a byte less holds 2
    four = listing({"a": 4, "b": 4})
    assert [len(one.rows) for one in jobs(four, shard_bytes=8704)] == [3, 3, 2]
    assert [len(one.rows) for one in jobs(four, shard_bytes=8703)] == [2, 2, 2, 2]
    names = [one.name for one in jobs(listing({"a": 2, "b": 1}), shard_bytes=1)]
    assert names == ["000000.tar", "000001.tar", "000002.tar"]


def test_shards_are_cut_after_so_many_samples_too():
    pictures = listing({"a": 4, "b": 4})
    assert [len(one.rows) for one in jobs(pictures, shard_samples=3)] == [3, 3, 2]
    assert [len(one.rows) for one in jobs(pictures, shard_samples=3, shard_bytes=8703)] == [2, 2, 2, 2]


def test_every_split_and_extension_begins_a_shard():
    pictures = listing({"a": 4, "b": 4})
    pictures[0]["extension"] = [1, 1, 2, 2, 1, 1, 2, 2]
    made = [(one.split, one.name, one.extension, len(one.rows)) for one in jobs(pictures, holdout_identities=0)]
    assert made == [("train", "000000.tar", 1, 4), ("train", "000001.tar", 2, 4)]


def test_rows_that_are_not_kept_are_in_no_shard_and_give_no_label():
    pictures = listing({"a": 2, "b": 2, "c": 2})
    plan = plan_of(pictures, kept=np.array([True, False, False, False, True, True]))
    assert sorted(plan.order) == [0, 4, 5]
    assert plan.labels.tolist() == [0, 2**32 - 1, 1]


def test_held_out_identities_share_nothing_with_training():
    pictures = listing({f"id{n:02d}": 5 for n in range(20)})
    splits = planned(pictures, holdout_identities=0.25)
    owners = {split: {key.split("/")[0] for key in keys} for split, keys in splits.items()}
    assert len(owners["unseen_identities"]) == 5
    assert len(owners["train"]) == 15
    assert not owners["unseen_identities"] & owners["train"]
    assert splits["unseen_images"] == []


def test_held_out_identities_by_count_and_by_name():
    pictures = listing({"a": 3, "b": 3, "c": 3, "d": 3})
    assert len({key[0] for key in planned(pictures, holdout_identities=2)["unseen_identities"]}) == 2
    named = planned(pictures, holdout_identities=("b", "d"))
    assert {key[0] for key in named["unseen_identities"]} == {"b", "d"}


def test_a_new_identity_moves_at_most_one_other_out_of_the_hold_out():
    counts = {f"id{n:02d}": 2 for n in range(30)}
    before = {key[:4] for key in planned(listing(counts), holdout_identities=5)["unseen_identities"]}
    after = {key[:4] for key in planned(listing({**counts, "id99": 2}), holdout_identities=5)["unseen_identities"]}
    assert len(before & after) >= 4


def test_held_out_images_leave_two_for_training():
    splits = planned(listing({"a": 5, "b": 4, "c": 3}), holdout_images=2)
    assert Counter(key[0] for key in splits["unseen_images"]) == {"a": 2, "b": 2}
    assert Counter(key[0] for key in splits["train"]) == {"a": 3, "b": 2, "c": 3}
    assert not set(splits["train"]) & set(splits["unseen_images"])


def test_shards_are_as_few_as_can_be_and_even():
    """A sample of 1,000 bytes takes 2,560; 39 of them fit 100,000 bytes, so 50 need two shards: 25 and 25, not 39 and 11."""
    sizes = [len(one.rows) for one in jobs(listing({f"id{n:02d}": 5 for n in range(10)}), shard_bytes=100_000)]
    assert sizes == [25, 25]
    sizes = [len(one.rows) for one in jobs(listing({f"id{n:02d}": 5 for n in range(4)}), shard_bytes=20_000)]
    assert sizes == [7, 7, 6]
