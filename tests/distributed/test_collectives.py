"""Gathers and sums in real gloo processes, and the identity in one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.processes import in_processes
from trainer import collectives
from trainer.collectives import (
    all_reduce_sum,
    gather,
    gather_labelled,
    gather_objects,
    gather_rows,
    gather_with_grad,
    rank,
    world_size,
)


def of_rank(number: int) -> Tensor:
    """Two rows of three values that no other rank has, shape (2, 3)."""
    return torch.arange(6, dtype=torch.float64).view(2, 3) + 10 * number


def weights(number: int, world: int) -> Tensor:
    """What rank `number` multiplies the gathered values by in its loss, shape (2W, 3)."""
    return torch.arange(6 * world, dtype=torch.float64).view(2 * world, 3) * (number + 1) + number


def rows_of(number: int) -> int:
    """Rank 0 has none."""
    return 3 * number % 5


def everything() -> dict[str, Any]:
    """What each function gives on this rank."""
    own = of_rank(rank())
    strided = own.repeat_interleave(2, 1)[:, ::2]
    assert not strided.is_contiguous()
    values = own.clone().requires_grad_()
    gathered = gather_with_grad(values)
    (gathered * weights(rank(), world_size())).sum().backward()
    collectives.barrier()
    count = torch.tensor(rank() + 1)
    summed = all_reduce_sum(count)
    labels = torch.tensor([-1 - rank(), 2**63 - 1 - rank()])
    labelled, doubles = own.float().clone().requires_grad_(), own.clone().requires_grad_()
    with_labels, with_labels_too = gather_labelled(labelled, labels), gather_labelled(doubles, labels)
    for gathered, _ in (with_labels, with_labels_too):
        (gathered * weights(rank(), world_size())).sum().backward()
    leaf = own.clone().requires_grad_()
    norm = nn.BatchNorm1d(2)
    norm.running_mean += rank() + 1
    norm.num_batches_tracked += rank() + 5
    norm.weight.data += rank()
    collectives.broadcast_buffers(norm)
    return {
        "norm": norm.state_dict(),
        "labelled": [value.detach() for value in (*with_labels, *with_labels_too)],
        "labelled gradients": [labelled.grad, doubles.grad],
        "objects": gather_objects({"rank": rank(), "text": "ä" * rank()}),
        "rank": (rank(), world_size()),
        "gather": gather(own),
        "gather strided": gather(strided),
        "gather labels": gather(torch.tensor([2**40 + rank(), -rank()])),
        "gather flags": gather(torch.tensor([True, rank() == 1])),
        "gather bf16": gather(own.bfloat16()),
        "gathered with gradient": gathered.detach(),
        "gradient": values.grad,
        "sum": summed,
        "argument of the sum": count,
        "sum of scalars": all_reduce_sum(torch.tensor(0.5, dtype=torch.float64)),
        "gradient through the sum": all_reduce_sum(leaf).requires_grad,
        "rows": gather_rows(torch.full((rows_of(rank()), 2), float(rank()))),
        "labels": gather_rows(torch.full((rows_of(rank()),), rank())),
        "no rows": gather_rows(torch.empty(0, 4)),
    }


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request) -> list[dict[str, Any]]:
    return in_processes(request.param, everything)


def all_equal(ranks: list[dict[str, Any]], name: str, expected: Tensor) -> bool:
    return all(found[name].dtype == expected.dtype and torch.equal(found[name], expected) for found in ranks)


def test_ranks_are_numbered(ranks):
    assert [found["rank"] for found in ranks] == [(number, len(ranks)) for number in range(len(ranks))]


def test_gather_is_in_rank_order_on_every_rank(ranks):
    expected = torch.cat([of_rank(number) for number in range(len(ranks))])
    assert all_equal(ranks, "gather", expected)
    assert all_equal(ranks, "gather strided", expected)
    assert all_equal(ranks, "gathered with gradient", expected)
    assert all_equal(ranks, "gather bf16", expected.bfloat16())


def test_gather_of_labels_and_flags_is_exact(ranks):
    labels = [value for number in range(len(ranks)) for value in (2**40 + number, -number)]
    assert all_equal(ranks, "gather labels", torch.tensor(labels))
    flags = [value for number in range(len(ranks)) for value in (True, number == 1)]
    assert all_equal(ranks, "gather flags", torch.tensor(flags))


def test_the_gradient_of_a_gather_is_summed_over_the_ranks_losses(ranks):
    """Loss of rank r: sum of all gathered values times weights(r). Rank q's values: rows 2q and 2q + 1 of each of them."""
    world = len(ranks)
    for number, found in enumerate(ranks):
        expected = torch.zeros(2, 3, dtype=torch.float64)
        for other in range(world):
            expected += weights(other, world)[2 * number : 2 * number + 2]
        assert torch.equal(found["gradient"], expected)


def test_embeddings_and_labels_travel_together(ranks):
    """float32 has no number for these labels: they must come through as bits."""
    world = len(ranks)
    embeddings = torch.cat([of_rank(number) for number in range(world)])
    labels = torch.tensor([value for number in range(world) for value in (-1 - number, 2**63 - 1 - number)])
    for found in ranks:
        single, its_labels, double, labels_too = found["labelled"]
        assert torch.equal(single, embeddings.float())
        assert torch.equal(double, embeddings)
        assert torch.equal(its_labels, labels)
        assert torch.equal(labels_too, labels)
        for gradient in found["labelled gradients"]:
            torch.testing.assert_close(gradient.double(), found["gradient"], rtol=1e-6, atol=0)


def test_objects_are_gathered_in_rank_order(ranks):
    expected = [{"rank": number, "text": "ä" * number} for number in range(len(ranks))]
    assert all(found["objects"] == expected for found in ranks)


def test_sums(ranks):
    world = len(ranks)
    assert all_equal(ranks, "sum", torch.tensor(world * (world + 1) // 2))
    assert all_equal(ranks, "sum of scalars", torch.tensor(0.5 * world, dtype=torch.float64))


def test_a_sum_leaves_its_argument_and_has_no_gradient(ranks):
    assert [int(found["argument of the sum"]) for found in ranks] == list(range(1, len(ranks) + 1))
    assert not any(found["gradient through the sum"] for found in ranks)


def test_gather_rows_takes_other_numbers_of_rows_from_each_rank(ranks):
    owners = [number for number in range(len(ranks)) for _ in range(rows_of(number))]  # 1, 1, 1 and then 2
    assert owners[:3] == [1, 1, 1]
    assert all_equal(ranks, "rows", torch.tensor(owners, dtype=torch.float32)[:, None].expand(-1, 2))
    assert all_equal(ranks, "labels", torch.tensor(owners))


def test_gather_rows_of_nothing_keeps_the_width(ranks):
    assert all_equal(ranks, "no rows", torch.empty(0, 4))


def test_buffers_become_those_of_rank_0_and_weights_stay(ranks):
    for number, found in enumerate(ranks):
        state = found["norm"]
        assert (state["running_mean"].tolist(), state["num_batches_tracked"].item()) == ([1, 1], 5)
        assert state["weight"].tolist() == [1 + number] * 2


def test_one_process_gets_its_own_values_back():
    assert (rank(), world_size()) == (0, 1)
    values = of_rank(0).requires_grad_()
    for function in (gather, gather_with_grad, gather_rows, all_reduce_sum):
        assert function(values) is values
    collectives.barrier()
    collectives.shutdown()  # there is no group to leave


def test_gloo_is_among_the_backends():
    assert "gloo" in collectives.backends()
    assert set(collectives.backends()) <= {"gloo", "nccl", "mpi"}
