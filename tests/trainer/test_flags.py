"""Flags of a step become a verdict that is the same on every rank; on a CPU at once."""

import pytest
import torch

from trainer.flags import Flags, Verdict

CPU = torch.device("cpu")


def verdict(left_out: float, stop: float, *ranks: float) -> Verdict:
    (found,) = Flags(CPU).add(7, torch.tensor([left_out, stop, *ranks]))
    return found


def test_nothing_to_say():
    assert verdict(0, 0, 0, 0) == Verdict(7, left_out=False, stop=False, ranks=())
    assert Flags(CPU).settle() == []


def test_one_rank_that_is_asked_to_stop_is_enough():
    assert verdict(0, 1, 0, 0, 0).stop


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ((0, 2, 1, 1), "embeddings or loss of rank 1 are not finite"),
        ((0, 1, 0, 1), "embeddings or loss of rank 1, 3 are not finite"),
        ((0, 0, 0, 0), "a gradient is not finite (every rank's loss is)"),
        ((2,) * 10, "embeddings or loss of rank 0, 1, 2, 3, 4, 5, 6, 7 and 2 more are not finite"),
    ],
)
def test_the_ranks_where_it_began_are_named(ranks, named):
    """2: its embeddings are not finite; 1: its loss alone, for which another rank's embeddings can be the reason."""
    found = verdict(1, 0, *ranks)
    assert found.left_out
    assert found.reason() == f"step 7: {named}"
