"""The windowed plan against its module's rule, and what plan_quality says, by hand."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from collections_on_disk import encoded
from test_plan import slow_steps_per_epoch

from data_shards.index import SAMPLE
from data_shards.plan import Plan, PlanConfig, per_rank
from data_shards.plan_quality import quality_of, stream_quality
from data_shards.windowed_plan import WindowedPlan, _shared_out, plan_of


def laid_out(counts, tars, k, seed=0):
    """Tar of each sample as `--order groups` lays them: shuffled groups of K, cut into tars of even length."""
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(len(counts)), counts)
    groups = [
        part
        for identity in range(len(counts))
        for part in np.split(random.permutation(np.flatnonzero(owners == identity)), range(k, counts[identity], k))
    ]
    order = np.concatenate([groups[place] for place in random.permutation(len(groups))])
    shards = np.empty(len(owners), np.uint32)
    shards[order] = np.arange(len(owners)) * tars // len(owners)
    return shards


def make_plan(counts, shards, p, k, w, seed=0):
    starts = np.concatenate([[0], np.cumsum(counts)])
    config = PlanConfig(identities_per_batch=p, images_per_identity=k, window_shards=w)
    return WindowedPlan(starts, shards, config, seed)


COUNTS = [74, 29, 47, 36, 25, 90, 48, 61, 18, 39, 2, 1, 84, 120, 33, 12]
OWNERS = np.repeat(np.arange(len(COUNTS)), COUNTS)
SHARDS = laid_out(COUNTS, 10, 4)


def epoch_of(plan, epoch):
    return [plan.global_batch(s) for s in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)]


def windows_of(batches):
    """Runs of batches with the same tars announced, and which they are drawn from."""
    found = []
    for batch in batches:
        if not found or found[-1][0] != batch.shards:
            found.append((batch.shards, set()))
        found[-1][1].update(SHARDS[batch.samples].tolist())
    return found


def test_a_case_by_hand():
    """Two tars, a window each: tar 0 has 4 + 4 + 1 images of identities 0, 1, 2; tar 1 has 2 + 0 + 3 and 4 of identity 3.

    With P = 2 and K = 2 tar 0 has groups 2 + 2, so 2 steps, and leaves out identity 2's only image; tar 1 has 1 + 2 + 2 groups,
    so 3 steps, one group of which is a second of identity 0 or 2 or 3.
    """
    counts = [6, 4, 4, 4]
    shards = np.array([0, 0, 0, 0, 1, 1] + [0] * 4 + [0, 1, 1, 1] + [1] * 4)
    plan = make_plan(counts, shards, 2, 2, 1)
    assert plan.steps_per_epoch == 5
    for epoch in range(6):
        batches = epoch_of(plan, epoch)
        tars = [set(shards[batch.samples].tolist()) for batch in batches]
        assert sorted(map(sorted, tars)) == [[0], [0], [1], [1], [1]]
        assert tars in ([{0}] * 2 + [{1}] * 3, [{1}] * 3 + [{0}] * 2)
        drawn = Counter(np.concatenate([batch.samples for batch in batches]).tolist())
        assert 10 not in drawn
        assert set(drawn) == set(range(18)) - {10}
        assert sum(drawn.values()) == 20
        assert batches[0].shards in ((0, 1), (1, 0))
    assert {epoch_of(plan, epoch)[0].shards for epoch in range(20)} == {(0, 1), (1, 0)}
    assert plan.summary() == (4, 0, 5, 9, 1, 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("w", [2, 3, 4, 9])
def test_slices_of_all_ranks_are_the_global_batch_in_order(world_size, w):
    plan = make_plan(COUNTS, SHARDS, 6, 4, w, seed=3)
    for step in range(2 * plan.steps_per_epoch):
        whole = plan.global_batch(step)
        slices = [plan.batch(step, rank, world_size) for rank in range(world_size)]
        assert [len(part.samples) for part in slices] == [24 // world_size] * world_size
        assert np.concatenate([part.samples for part in slices]).tolist() == whole.samples.tolist()
        assert np.concatenate([part.visits for part in slices]).tolist() == whole.visits.tolist()
        assert {(part.epoch, part.shards) for part in slices} == {(step // plan.steps_per_epoch, whole.shards)}


@pytest.mark.parametrize("w", [2, 3, 4, 9])
def test_every_batch_has_p_identities_of_k_images_and_every_epoch_the_same_steps(w):
    plan = make_plan(COUNTS, SHARDS, 6, 4, w)
    for epoch in range(5):
        for batch in epoch_of(plan, epoch):
            rows = OWNERS[batch.samples].reshape(6, 4)
            assert (rows == rows[:, :1]).all()
            assert len(set(rows[:, 0].tolist())) == 6
            assert batch.epoch == epoch


@pytest.mark.parametrize("w", [2, 3, 4, 9])
def test_windows_are_disjoint_cover_all_tars_and_are_announced_one_ahead(w):
    plan = make_plan(COUNTS, SHARDS, 6, 4, w, seed=1)
    batches = [batch for epoch in range(3) for batch in epoch_of(plan, epoch)]
    found = windows_of(batches)
    per_epoch = -(-10 // w)
    assert len(found) == 3 * per_epoch
    for epoch in range(3):
        own = [tars for _, tars in found[epoch * per_epoch : (epoch + 1) * per_epoch]]
        assert sorted(tar for tars in own for tar in tars) == list(range(10))
        assert max(map(len, own)) <= w
        assert max(map(len, own)) - min(map(len, own)) <= 1
    for (announced, tars), (_, following) in pairwise(found):
        assert set(announced[: len(tars)]) == tars
        assert set(announced) == tars | following
        assert len(announced) == len(set(announced)) <= 2 * w


@pytest.mark.parametrize("short", [0, 1, 5])
def test_the_last_window_of_a_run_announces_no_further_tars(short):
    plan = make_plan(COUNTS, SHARDS, 6, 4, 3)
    stop = 2 * plan.steps_per_epoch - short
    *_, (before, _), (last, tars) = windows_of(list(plan.batches(0, 0, 1, stop)))
    assert set(last) == tars
    assert len(before) > len(last)


def test_steps_of_the_first_epoch_are_those_of_the_exact_rule_in_each_window():
    plan = make_plan(COUNTS, SHARDS, 6, 4, 3)
    steps = 0
    for _, tars in windows_of(epoch_of(plan, 0)):
        counts = np.bincount(OWNERS[np.isin(SHARDS, list(tars))], minlength=len(COUNTS))
        steps += slow_steps_per_epoch(counts.tolist(), 6, 4)
    assert plan.steps_per_epoch == steps


def test_what_an_epoch_leaves_out_and_repeats_is_what_the_rule_allows():
    """Left out: single images of a window, and groups beyond a window's steps; no image is drawn twice as often as its group."""
    plan = make_plan(COUNTS, SHARDS, 6, 4, 5)
    for epoch in range(8):
        batches = epoch_of(plan, epoch)
        drawn = np.bincount(np.concatenate([batch.samples for batch in batches]), minlength=len(OWNERS))
        single, groups = set(), 0
        for _, tars in windows_of(batches):
            inside = np.flatnonzero(np.isin(SHARDS, list(tars)))
            counts = np.bincount(OWNERS[inside], minlength=len(COUNTS))
            single |= {sample for sample in inside.tolist() if counts[OWNERS[sample]] == 1}
            groups += int((-(-counts[counts > 1] // 4)).sum())
        assert not drawn[sorted(single)].any()
        missed = set(np.flatnonzero(drawn == 0).tolist()) - single
        slots = 6 * len(batches)
        assert len(missed) <= 4 * max(0, groups - slots) + 4 * 6 * 2
        if epoch == 0:
            assert not missed


def test_images_that_an_epoch_leaves_out_come_in_others():
    plan = make_plan(COUNTS, SHARDS, 6, 4, 3)
    shown = [set(np.concatenate([batch.samples for batch in epoch_of(plan, epoch)]).tolist()) for epoch in range(12)]
    usable = {sample for sample in range(len(OWNERS)) if COUNTS[OWNERS[sample]] > 1}
    assert usable - shown[0]
    assert set.union(*shown) == usable


def test_visits_number_the_draws_of_a_sample_in_an_epoch():
    visits = {}
    for batch in epoch_of(make_plan(COUNTS, SHARDS, 6, 4, 3), 1):
        for sample, visit in zip(batch.samples.tolist(), batch.visits.tolist(), strict=True):
            visits.setdefault(sample, []).append(visit)
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in visits.values())


def test_a_step_is_the_same_in_a_new_plan_and_in_any_order():
    plan = make_plan(COUNTS, SHARDS, 6, 4, 3, seed=9)
    steps = plan.steps_per_epoch
    for step in [4 * steps + 1, 0, 2 * steps, steps - 1, 4 * steps + 1, 1, 7 * steps + 2, 0]:
        fresh, again = make_plan(COUNTS, SHARDS, 6, 4, 3, seed=9).global_batch(step), plan.global_batch(step)
        assert again.samples.tolist() == fresh.samples.tolist()
        assert (again.epoch, again.shards, again.visits.tolist()) == (fresh.epoch, fresh.shards, fresh.visits.tolist())


@pytest.mark.parametrize(("before", "after"), [(1, 4), (3, 2), (12, 1), (2, 24)])
def test_a_run_resumed_on_another_world_size_goes_on_with_the_next_draw(before, after):
    plan = make_plan(COUNTS, SHARDS, 6, 4, 3, seed=2)
    last = 2 * plan.steps_per_epoch + 5
    for stop in range(1, last, 7):
        drawn = []
        for start, end, world_size in ((0, stop, before), (stop, last, after)):
            ranks = [plan.batches(start, rank, world_size, end) for rank in range(world_size)]
            for slices in zip(*ranks, strict=True):  # strict: every rank has the same number of steps
                drawn.append(np.concatenate([part.samples for part in slices]).tolist())
        assert drawn == [plan.global_batch(step).samples.tolist() for step in range(last)]


def test_epochs_and_seeds_differ_in_tars_and_company():
    firsts = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**31, 0)):
        plan = make_plan(COUNTS, SHARDS, 6, 4, 3, seed)
        firsts.append(plan.global_batch(epoch * plan.steps_per_epoch).samples.tolist())
    assert len({tuple(first) for first in firsts}) == 4


def test_a_window_of_too_few_identities_is_refused_at_once_and_passed_over_later():
    counts = [8] * 6
    by_identity = np.repeat(np.arange(6), 8)  # a tar for each identity
    with pytest.raises(
        ValueError, match=r"^plan.window_shards is 2; a window of the first epoch has fewer than plan.id.* = 3 "
    ):
        make_plan(counts, by_identity, 3, 4, 2)
    shards = np.array([*[0, 0, 1, 1, 2, 2, 3, 3] * 4, *[4] * 8, *[5] * 8])  # tars 4 and 5 make no batch by themselves
    tried = [plan for seed in range(40) if (plan := make_plan_or_none(counts, shards, 3, 2, 2, seed)) is not None]
    assert 20 < len(tried) < 40
    epochs = [epoch_of(plan, epoch) for plan in tried for epoch in range(1, 5)]
    assert {len(batches) for batches in epochs} == {plan.steps_per_epoch for plan in tried}
    shown = [set(shards[np.concatenate([batch.samples for batch in batches])].tolist()) for batches in epochs]
    passed_over = [tars for tars in shown if tars == {0, 1, 2, 3}]
    assert 0.1 < len(passed_over) / len(epochs) < 0.3  # 1 in 5


def make_plan_or_none(*args):
    try:
        return make_plan(*args)
    except ValueError:
        return None


def test_other_world_sizes_and_negative_windows_are_refused():
    plan = make_plan(COUNTS, SHARDS, 6, 4, 3)
    with pytest.raises(ValueError, match="is not divisible by the world size 5"):
        plan.batch(0, 0, 5)
    assert per_rank(plan.config, 4) == 6
    with pytest.raises(ValueError, match=r"^plan.window_shards is -1; allowed is 0 \(all tars\) or more$"):
        PlanConfig(window_shards=-1)


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [(10, [1, 1, 2], [3, 2, 5]), (7, [3, 4], [3, 4]), (5, [0, 1, 0, 1], [0, 3, 0, 2]), (1, [5, 6], [0, 1])],
)
def test_steps_are_shared_out_by_hand(total, shares, expected):
    assert _shared_out(total, np.array(shares)).tolist() == expected


def test_the_setting_chooses_the_plan(split_of):
    pictures = {
        name: [encoded(7 * n + 31 * len(name), size=(40, 30)) for n in range(8)] for name in ("a", "bb", "ccc", "dddd")
    }
    split = split_of(pictures, ".jpg", shard_bytes=20_000)
    tars = len(split.shards)
    assert tars >= 3
    for w, kind in ((0, Plan), (tars, Plan), (tars + 5, Plan), (tars - 1, WindowedPlan)):
        config = PlanConfig(identities_per_batch=2, images_per_identity=2, window_shards=w)
        assert type(plan_of(split, config, 0)) is kind


# quality


def rows_of(tars, identities):
    """Index rows in the order of the samples: tar and identity of each; they lie in this order."""
    rows = np.zeros(len(tars), SAMPLE)
    rows["shard"], rows["identity"], rows["offset"] = tars, identities, np.arange(len(tars)) * 1000
    return rows


def test_quality_of_a_stream_by_hand():
    """One tar: 0 0 1 1 | 0 0 0 2 | 2 3: batches of 4 drop the last two."""
    identities = np.array([0, 0, 1, 1, 0, 0, 0, 2, 2, 3])
    order = np.argsort(identities, kind="stable")
    rows = rows_of([0] * 10, identities)[order]
    found = stream_quality(rows, 4)
    assert found.plain() == {
        "steps": 2,
        "identities": 2,
        "fewest_identities": 2,
        "without_positive": 0.125,  # the 2 in the second batch
        "repeated": 0,
        "left_out": round(1 / 9, 5),  # the second 2; 3 has one image and does not count
        "company": round(4 / 3, 5),  # 0 with 1 and 2; 1 with 0; 2 with 0
        "mates": round((2 * 1 + 3 * 2 + 2 * 1) / 9, 5),  # of the nine images of 0, 1 and 2: 0's two and three, 1's two
    }


def test_quality_of_an_exact_and_of_a_windowed_plan_by_hand():
    counts, owners = [4, 4, 4, 4], np.repeat(np.arange(4), 4)
    starts = np.concatenate([[0], np.cumsum(counts)])
    exact = quality_of(Plan(starts, PlanConfig(identities_per_batch=4, images_per_identity=2)), owners, epochs=30)
    assert exact.plain() == {
        "steps": 2,
        "identities": 4,
        "fewest_identities": 4,
        "without_positive": 0,
        "repeated": 0,
        "left_out": 0,
        "company": 3,
        "mates": 3,  # in 30 epochs each image of four meets all others
    }
    shards = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])  # identities 0 and 1 never meet 2 and 3
    windowed = quality_of(make_plan(counts, shards, 2, 2, 1), owners)
    assert (windowed.steps, windowed.identities, windowed.repeated, windowed.left_out, windowed.company) == (
        4,
        2,
        0,
        0,
        1,
    )


def test_a_shuffle_buffer_gives_every_image_once():
    rows = rows_of(SHARDS, OWNERS)
    for buffer in (0, 16, 5000):
        found = stream_quality(rows, 1, buffer=buffer)
        assert (found.steps, found.repeated, found.left_out) == (len(OWNERS), 0, 0)


def test_a_window_of_grouped_tars_gives_full_batches_where_a_buffer_does_not():
    counts = [40] * 30
    shards, owners = laid_out(counts, 20, 4), np.repeat(np.arange(30), 40)
    windowed = quality_of(make_plan(counts, shards, 8, 4, 4), owners, epochs=2)
    buffered = stream_quality(rows_of(shards, owners), 32, buffer=240, epochs=2)
    assert windowed.fewest_identities == 8
    assert windowed.without_positive == 0
    assert buffered.without_positive > 0.1
    assert (
        windowed.company
        > 0.8 * quality_of(Plan(np.arange(31) * 40, PlanConfig(identities_per_batch=8)), owners, 2).company
    )
