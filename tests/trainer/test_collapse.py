"""What the guard says and does, line by line of the log; a real collapse is in tests/distributed/test_faults.py."""

import pytest

from trainer.collapse import CollapseGuard
from trainer.config import GuardConfig
from trainer.metric.losses import Objective

ASKED = Objective(kind="margin", mining="batch_hard", margin=0.2, sharpness=10.0, squared=False, average="active")


def said(guard: CollapseGuard, *spreads: float) -> list[str]:
    return [guard.see(step, spread, 0.2) for step, spread in enumerate(spreads, start=1)]


def test_it_speaks_after_so_many_lines_in_a_row_and_when_it_is_over():
    lines = said(CollapseGuard(GuardConfig(action="warn", patience=2), {}), 0.05, 0.5, 0.05, 0.04, 0.3, 0.9)
    assert [bool(line) for line in lines] == [False, False, False, True, True, False]
    assert lines[3].startswith("step 4: the embeddings have collapsed (spread 0.040, loss 0.2000): begin again with ")
    assert lines[4] == "step 5: the embeddings spread again (0.300)"


@pytest.mark.parametrize(
    ("action", "kind", "mining", "margin"),
    [
        ("warn", "margin", "batch_hard", 0.2),
        ("lower_rate", "margin", "batch_hard", 0.2),
        ("smooth", "smooth", "batch_hard", 0.2),
        ("soft_margin", "soft_margin", "batch_hard", None),
        ("semi_hard", "margin", "semi_hard", 0.2),
        ("hardest_semi_hard", "margin", "hardest_semi_hard", 0.2),
    ],
)
def test_what_is_trained_with_after_it(action, kind, mining, margin):
    guard = CollapseGuard(GuardConfig(action=action, patience=1), {})
    assert guard.objective(ASKED) == ASKED
    said(guard, 0.01)
    found = guard.objective(ASKED)
    assert (found.kind, found.mining, found.margin) == (kind, mining, margin)


def test_the_rate_is_lowered_twice_at_most():
    guard, rates = CollapseGuard(GuardConfig(action="lower_rate", patience=1), {}), []
    for step in range(4):
        guard.see(step, 0.01, 0.2)
        rates.append(guard.rate)
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.01])


def test_a_resumed_run_goes_on_with_what_was_done():
    state = {}
    said(CollapseGuard(GuardConfig(action="smooth", patience=1), state), 0.01)
    assert CollapseGuard(GuardConfig(action="smooth", patience=1), dict(state)).objective(ASKED).kind == "smooth"
