"""The plan against slow readings of the rule in its module's docstring."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from data_shards.counter_random import random_bits
from data_shards.plan import Plan, PlanConfig, PlanSummary, contiguous_slice, per_rank

HEAVY_TAIL = [40, 23, 11, 9, 8, 7, 7, 6, 5, 5, 4, 4, 4, 3, 3, 2, 2, 2, 1, 1]


def make_plan(counts, p, k, seed=0):
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Plan(starts, PlanConfig(identities_per_batch=p, images_per_identity=k), seed)


def owners(counts):
    """The identity of each sample id."""
    return np.repeat(np.arange(len(counts)), counts)


def epoch_of(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [plan.global_batch(step) for step in steps]


def groups_of(counts, k):
    return [-(-count // k) for count in counts if count >= 2]


def slow_steps_per_epoch(counts, p, k):
    """T, tried from 1 upwards in the words of the rule."""
    groups = groups_of(counts, k)
    steps = 1
    while True:
        hold_all = p * steps >= sum(min(group, steps) for group in groups)
        if hold_all and sum(group > steps for group in groups) <= p / 2:
            return steps
        steps += 1


def random_shapes(number, seed):
    """(counts, P, K), among them identities of exactly, nearly and far over T groups."""
    random = np.random.default_rng(seed)
    for _ in range(number):
        p, k = int(random.integers(2, 9)), int(random.integers(2, 6))
        size = p + int(random.integers(0, 12))
        counts = random.integers(2, random.choice([3, 6, 14, 30]), size)
        for _ in range(random.integers(0, 3)):
            counts[random.integers(size)] *= random.integers(1, 12)
        yield np.append(counts, random.integers(0, 2, 3)).tolist(), p, k


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("counts", [[7] * 40, HEAVY_TAIL])
def test_slices_of_all_ranks_are_the_global_batch_in_order(counts, world_size):
    plan = make_plan(counts, p=6, k=4, seed=3)
    for step in range(2 * plan.steps_per_epoch):
        whole = plan.global_batch(step)
        slices = [plan.batch(step, rank, world_size) for rank in range(world_size)]
        assert [len(part.samples) for part in slices] == [24 // world_size] * world_size
        assert np.concatenate([part.samples for part in slices]).tolist() == whole.samples.tolist()
        assert np.concatenate([part.visits for part in slices]).tolist() == whole.visits.tolist()
        assert {part.epoch for part in slices} == {whole.epoch} == {step // plan.steps_per_epoch}


def test_every_shape_gives_batches_of_p_different_identities_with_k_consecutive_images():
    for counts, p, k in random_shapes(150, seed=5):
        plan, owner = make_plan(counts, p, k, seed=p), owners(counts)
        for batch in epoch_of(plan, 0) + epoch_of(plan, 1):
            rows = owner[batch.samples].reshape(p, k)
            assert (rows == rows[:, :1]).all(), (counts, p, k)
            assert len(set(rows[:, 0].tolist())) == p, (counts, p, k)


def test_groups_show_as_many_different_images_as_they_can():
    for counts, p, k in random_shapes(40, seed=6):
        for batch in epoch_of(make_plan(counts, p, k), 0):
            for group, identity in zip(batch.samples.reshape(p, k), owners(counts)[batch.samples[::k]], strict=True):
                assert len(set(group.tolist())) == min(k, counts[identity])


def test_steps_per_epoch_equal_the_rule_tried_from_one_upwards():
    for counts, p, k in random_shapes(400, seed=7):
        assert make_plan(counts, p, k).steps_per_epoch == slow_steps_per_epoch(counts, p, k), (counts, p, k)


def test_no_other_number_of_steps_leaves_out_and_repeats_fewer_groups():
    for counts, p, k in random_shapes(200, seed=8):
        groups = groups_of(counts, k)
        cost = {}
        for steps in range(1, max(groups) + sum(groups) + 1):
            shown = sum(min(group, steps) for group in groups)
            if p * steps >= shown:
                cost[steps] = (p * steps - shown) + (sum(groups) - shown)
        steps = make_plan(counts, p, k).steps_per_epoch
        assert cost[steps] == min(cost.values()), (counts, p, k)
        assert steps == min(candidate for candidate in cost if cost[candidate] == cost[steps]), (counts, p, k)


@pytest.mark.parametrize(
    ("groups", "p", "summary"),
    [
        ([2, 2, 2, 2], 2, PlanSummary(4, 0, 4, 8, 0, 0)),
        ([1, 1, 1], 2, PlanSummary(3, 0, 2, 3, 1, 0)),  # 2 steps of 2 slots for 3 groups
        ([10, 1, 1, 1], 2, PlanSummary(4, 0, 3, 13, 0, 7)),  # 3 steps: the large one is in each, beside one other
        ([10, 1, 1, 1], 4, PlanSummary(4, 0, 1, 13, 0, 9)),
        ([5, 5, 5, 5], 4, PlanSummary(4, 0, 5, 20, 0, 0)),
        ([9, 9, 9, 1], 4, PlanSummary(4, 0, 9, 28, 8, 0)),  # three of four cannot be cut: the small one comes 9 times
        ([9, 9, 1, 1], 4, PlanSummary(4, 0, 1, 20, 0, 16)),  # two of four can
        ([3, 2, 2], 2, PlanSummary(3, 0, 4, 7, 1, 0)),
    ],
)
def test_steps_repeats_and_groups_left_out_by_hand(groups, p, summary):
    plan = make_plan([3 * count for count in groups], p, k=3)
    assert plan.summary() == summary
    assert plan.steps_per_epoch == summary.steps_per_epoch


def test_an_identitys_images_come_in_the_order_of_their_random_numbers():
    """Group by group through an epoch; identities of very different sizes, the largest first and last."""
    counts = [700, 2, 9, 64, 65, 3, 1024]
    plan = Plan(np.append(0, np.cumsum(counts)), PlanConfig(identities_per_batch=2, images_per_identity=4), seed=5)
    for identities in ([0], [1, 6], [6, 2, 0, 5], list(range(7))):
        found, sizes = plan._shuffled(3, np.array(identities, np.int32))
        wanted = []
        for identity in identities:
            samples = range(sum(counts[:identity]), sum(counts[: identity + 1]))
            wanted += sorted(samples, key=lambda sample: int(random_bits(5, 2, 3, sample)[0]))
        assert found.tolist() == wanted
        assert sizes.tolist() == [counts[identity] for identity in identities]


def test_an_epoch_draws_every_image_once_where_groups_come_out_even():
    plan = make_plan([8, 4, 12, 8, 4, 12], p=3, k=4)  # 12 groups, 4 steps; none has more than 4
    for epoch in range(3):
        batches = epoch_of(plan, epoch)
        assert len(batches) == 4
        assert sorted(np.concatenate([batch.samples for batch in batches]).tolist()) == list(range(48))
        assert not np.concatenate([batch.visits for batch in batches]).any()


def test_an_epoch_shows_each_image_as_often_as_its_identitys_groups_say():
    """g groups of K draws go round the n images: each is drawn floor or ceil of g*K/n times, so at least once if not cut."""
    for counts, p, k in random_shapes(80, seed=9):
        plan, owner = make_plan(counts, p, k, seed=1), owners(counts)
        batches = epoch_of(plan, 2)
        drawn = np.bincount(np.concatenate([batch.samples for batch in batches]), minlength=len(owner))
        groups = np.bincount(np.concatenate([owner[batch.samples[::k]] for batch in batches]), minlength=len(counts))
        for identity, count in enumerate(counts):
            each = drawn[owner == identity]
            assert each.sum() == groups[identity] * k
            if count >= 2:
                low, extra = divmod(int(groups[identity]) * k, count)
                assert sorted(each.tolist()) == [low] * (count - extra) + [low + 1] * extra
            else:
                assert not each.any()


def test_groups_shown_are_those_of_the_rule_and_slots_left_go_round_the_identities():
    for counts, p, k in random_shapes(80, seed=10):
        plan, owner = make_plan(counts, p, k, seed=4), owners(counts)
        steps = plan.steps_per_epoch
        own = np.array([-(-count // k) if count >= 2 else 0 for count in counts])
        expected, missing = np.minimum(own, steps), steps * p - np.minimum(own, steps).sum()
        can_grow = (own > 0) & (expected < steps)
        while can_grow.sum() <= missing and missing:  # whole rounds: one further group of everyone with room
            expected, missing = expected + can_grow, missing - can_grow.sum()
            can_grow &= expected < steps
        shown = np.bincount(np.concatenate([owner[b.samples[::k]] for b in epoch_of(plan, 0)]), minlength=len(counts))
        further = shown - expected
        assert further.sum() == missing, (counts, p, k)
        assert set(further[can_grow].tolist()) <= {0, 1}, (counts, p, k)
        assert not further[~can_grow].any(), (counts, p, k)


def test_at_most_k_minus_1_images_of_an_identity_come_twice():
    counts = [13, 9, 10, 12, 5, 6, 7]  # 4, 3, 3, 3, 2, 2, 2 groups of 4: 19 of 19 slots + 2 to fill 7 steps of 3
    plan, owner = make_plan(counts, p=3, k=4), owners(counts)
    assert plan.summary() == PlanSummary(7, 0, 7, 19, 2, 0)
    for epoch in range(4):
        samples = np.concatenate([batch.samples for batch in epoch_of(plan, epoch)])
        surplus = np.bincount(owner[samples]) - counts
        topped_up = [3, 3, 2, 0, 3, 2, 1]
        filled = [int(extra - own) for extra, own in zip(surplus, topped_up, strict=True)]
        assert sorted(filled) == [0, 0, 0, 0, 0, 4, 4]


@pytest.mark.parametrize("changing", ["epoch", "seed"])
def test_identities_that_fill_the_remaining_slots_change_with_epoch_and_seed(changing):
    counts = [4] * 9  # 9 groups in 5 steps of 2: one identity comes a second time
    chosen = set()
    for number in range(120):
        seed, epoch = (0, number) if changing == "epoch" else (number, 0)
        batches = epoch_of(make_plan(counts, p=2, k=4, seed=seed), epoch)
        shown = Counter(np.concatenate([owners(counts)[batch.samples[::4]] for batch in batches]).tolist())
        assert sorted(shown.values()) == [1] * 8 + [2]
        chosen.add(shown.most_common(1)[0][0])
    assert chosen == set(range(9))  # by chance one is missed with probability 1e-5


def test_an_identity_with_fewer_than_k_images_is_topped_up_with_its_own():
    plan = make_plan([2, 3, 2], p=3, k=4)
    batch = plan.global_batch(0)
    assert plan.steps_per_epoch == 1
    for row in range(3):
        samples, visits = batch.samples[4 * row : 4 * row + 4].tolist(), batch.visits[4 * row : 4 * row + 4].tolist()
        if 2 in samples:
            assert sorted(samples[:3]) == [2, 3, 4]
            assert (samples[3], visits) == (samples[0], [0, 0, 0, 1])
        else:
            assert set(samples[:2]) in ({0, 1}, {5, 6})
            assert (samples[2:], visits) == (samples[:2], [0, 0, 1, 1])


def test_identities_with_one_image_or_none_are_never_drawn():
    counts = [1, 4, 0, 4, 1, 6, 3, 1]
    plan = make_plan(counts, p=3, k=2)
    drawn = np.concatenate([batch.samples for epoch in range(5) for batch in epoch_of(plan, epoch)])
    assert set(owners(counts)[drawn].tolist()) == {1, 3, 5, 6}
    assert plan.summary()[:2] == (4, 3)


def test_visits_number_the_draws_of_a_sample_in_an_epoch():
    for counts, p, k in random_shapes(60, seed=11):
        batches = epoch_of(make_plan(counts, p, k), 1)
        visits = {}
        for batch in batches:
            for sample, visit in zip(batch.samples.tolist(), batch.visits.tolist(), strict=True):
                visits.setdefault(sample, []).append(visit)
        assert all(sorted(numbers) == list(range(len(numbers))) for numbers in visits.values()), (counts, p, k)


def test_a_dominating_identity_shows_other_images_in_every_epoch():
    counts = [100, 4, 4, 4, 4, 4]  # P = 3 > 2: T = 3 holds 3 groups of the large one and 1 of each other, and 1 more
    plan = make_plan(counts, p=3, k=4)
    assert plan.summary() == PlanSummary(6, 0, 3, 30, 1, 22)
    shown = []
    for epoch in range(30):
        samples = np.concatenate([batch.samples for batch in epoch_of(plan, epoch)])
        shown.append(frozenset(samples[samples < 100].tolist()))
        assert len(shown[-1]) == 12
    assert len(set(shown)) == 30
    assert len(frozenset.union(*shown)) > 90  # each image misses all with probability 0.88**30 = 0.02


def test_epochs_differ_in_order_company_and_groups():
    counts = [8] * 12
    plan = make_plan(counts, p=4, k=4)
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    orders = [[batch.samples[::4].tolist() for batch in epoch] for epoch in (first, second)]
    company = [[set((batch.samples[::4] // 8).tolist()) for batch in epoch] for epoch in (first, second)]
    groups = [
        {frozenset(g) for batch in epoch for g in batch.samples.reshape(4, 4).tolist()} for epoch in (first, second)
    ]
    assert orders[0] != orders[1]
    assert company[0] != company[1]
    assert len(groups[0] & groups[1]) < 6  # of 24: 8 images fall into the same two groups 1 time in 35


def test_an_identitys_groups_are_spread_over_the_epoch():
    """24 identities of 8 groups in 48 steps of 4: were the steps not shuffled, an identity's groups would follow each other."""
    counts = [32] * 24
    plan = make_plan(counts, p=4, k=4)
    rows = np.array([owners(counts)[batch.samples[::4]] for batch in epoch_of(plan, 0)])
    gaps = [b - a for i in range(24) for a, b in pairwise(np.flatnonzero((rows == i).any(1)).tolist())]
    assert 4.5 < np.mean(gaps) < 6  # 8 of 48 steps at random: 49/9 = 5.4
    assert np.mean(np.array(gaps) == 1) < 0.3  # 8/48 by chance


def test_an_identity_meets_many_others_in_one_epoch():
    """Each of 24 identities has 8 groups in 48 steps of 4: it sits beside 3 of the 18 in other rows 8 times."""
    plan = make_plan([32] * 24, p=4, k=4)
    rows = np.array([owners([32] * 24)[batch.samples[::4]] for batch in epoch_of(plan, 0)])
    met = [len(set(rows[(rows == i).any(1)].ravel().tolist()) - {i}) for i in range(24)]
    assert np.mean(met) > 11  # 3 * 6 * (1 - (5/6)**8) = 13.8 by chance; 3 to 6 if all rows were shuffled alike


def test_another_seed_gives_another_plan():
    company, groups = [], []
    for seed in (0, 1, 2**40):
        batches = epoch_of(make_plan([8] * 12, p=4, k=4, seed=seed), 0)
        company.append(tuple(frozenset((batch.samples[::4] // 8).tolist()) for batch in batches))
        groups.append({frozenset(group) for batch in batches for group in batch.samples.reshape(4, 4).tolist()})
    assert len(set(company)) == 3
    assert all(len(groups[i] & groups[j]) < 6 for i, j in ((0, 1), (0, 2), (1, 2)))  # of 24, by chance 24/35


def test_a_step_is_the_same_in_a_new_plan_and_in_any_order():
    steps = make_plan(HEAVY_TAIL, 6, 4).steps_per_epoch
    order = [4 * steps + 1, 0, 2 * steps, steps - 1, 4 * steps + 1, 1, 7 * steps + 2, 0]
    plan = make_plan(HEAVY_TAIL, 6, 4, seed=9)
    for step in order:
        fresh = make_plan(HEAVY_TAIL, 6, 4, seed=9).global_batch(step)
        again = plan.global_batch(step)
        assert again.epoch == fresh.epoch == step // steps
        assert again.samples.tolist() == fresh.samples.tolist()
        assert again.visits.tolist() == fresh.visits.tolist()


@pytest.mark.parametrize(("before", "after"), [(1, 4), (3, 2), (12, 1), (2, 24)])
def test_a_run_resumed_on_another_world_size_goes_on_with_the_next_draw(before, after):
    plan = make_plan(HEAVY_TAIL, 6, 4, seed=2)
    stop, last = plan.steps_per_epoch + 3, 2 * plan.steps_per_epoch + 5
    drawn = []
    for start, end, world_size in ((0, stop, before), (stop, last, after)):
        ranks = [plan.batches(start, rank, world_size, end) for rank in range(world_size)]
        for slices in zip(*ranks, strict=True):  # strict: every rank has the same number of steps
            drawn.append(np.concatenate([part.samples for part in slices]).tolist())
    assert drawn == [plan.global_batch(step).samples.tolist() for step in range(last)]


def test_batches_go_on_into_the_next_epochs_without_end():
    plan = make_plan([4] * 6, 3, 2)
    endless = plan.batches(plan.steps_per_epoch - 1, 0, 2)
    epochs = [next(endless).epoch for _ in range(2 * plan.steps_per_epoch + 1)]
    assert epochs == [0] + [1] * plan.steps_per_epoch + [2] * plan.steps_per_epoch


@pytest.mark.parametrize("world_size", [5, 7, 9, 48])
def test_a_world_size_that_does_not_divide_p_times_k_is_refused(world_size):
    plan = make_plan([7] * 9, p=6, k=4)
    message = rf"^plan: P\*K = 6 \* 4 = 24 is not divisible by the world size {world_size}$"
    with pytest.raises(ValueError, match=message):
        plan.batch(0, 0, world_size)
    with pytest.raises(ValueError, match=message):
        per_rank(plan.config, world_size)


def test_too_few_identities_with_two_images_are_refused():
    make_plan([2, 2, 2], p=3, k=2)
    with pytest.raises(
        ValueError, match=r"^plan.identities_per_batch is 3; the shards have 2 training identities with"
    ):
        make_plan([2, 2, 1, 1, 0], p=3, k=2)


@pytest.mark.parametrize("name", ["identities_per_batch", "images_per_identity"])
@pytest.mark.parametrize("value", [1, 0, -4])
def test_p_and_k_below_two_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^plan.{name} is {value}; batch-hard mining needs at least 2$"):
        PlanConfig(**{name: value})


@pytest.mark.parametrize("total", [0, 1, 2, 5, 6, 7, 100, 101])
def test_contiguous_slices_cover_a_range_once_in_order_and_evenly(total):
    for world_size in (1, 2, 3, 4, 6, 7, 12):
        slices = [contiguous_slice(total, rank, world_size) for rank in range(world_size)]
        assert [i for part in slices for i in part] == list(range(total))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1
