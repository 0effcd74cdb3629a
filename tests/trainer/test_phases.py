"""Phases of a step on a clock that the test sets; every expected second is added up by hand."""

import timeit

import pytest
import torch

from trainer.phases import (
    OTHER,
    PHASES,
    Enough,
    Recorder,
    Span,
    backward_until,
    covered,
    exclusive,
    next_step,
    phase,
    recorder,
    recording,
)


class Clock:
    """Seconds that the test lets pass."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock():
    return Clock()


def only(**seconds: float) -> dict[str, float]:
    return dict.fromkeys((*PHASES, OTHER), 0.0) | seconds


def one_step(clock: Clock) -> None:
    """1 before any phase, 2 waiting with 1 of copy at its end, 4 forward, 1 between, 8 optimiser: 16 seconds."""
    next_step()
    clock.time += 1
    with phase("wait"):
        clock.time += 1
        with phase("copy"):
            clock.time += 1
    with phase("forward"):
        clock.time += 4
    clock.time += 1
    with phase("optimizer"):
        clock.time += 8


def test_seconds_of_a_step_are_its_own_and_add_up(clock):
    with recording(Recorder(1, now=clock)) as seen:
        one_step(clock)
        next_step()
    (step,) = seen.steps()
    assert step.seconds() == only(wait=1, copy=1, forward=4, optimizer=8, other=2)
    assert step.whole == Span("step", 0, 16)
    assert sum(step.seconds().values()) == step.whole.seconds


def test_warm_up_does_not_count_and_the_loop_ends_after_enough(clock):
    taken = 0
    with recording(Recorder(2, warmup=3, now=clock)) as seen:
        for taken in range(100):  # noqa: B007
            one_step(clock)
    assert taken == 5
    assert [step.whole.begin for step in seen.steps()] == [48, 64]
    assert recorder() is None


def test_enough_is_raised_where_the_next_step_would_begin(clock):
    seen = Recorder(1, now=clock)
    seen.next_step()
    with pytest.raises(Enough):
        seen.next_step()


def test_other_errors_leave_the_recorder_off(clock):
    def fails():
        with recording(Recorder(1, now=clock)):
            next_step()
            with phase("forward"):
                raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert recorder() is None


def test_phases_within_a_backward(clock):
    """3 seconds of the loss's backward, 5 of the network's, 2 in which the last bucket is awaited, 1 of another's forward."""
    seen = Recorder(1, now=clock)
    seen.next_step()
    with seen.phase("backward"):
        clock.time += 3
        seen.until_here("gather_mining_loss")
        with seen.phase("forward"):
            clock.time += 1
        first = seen.bucket(last=False)
        clock.time += 5
        first()
        last = seen.bucket(last=True)
        clock.time += 2
        last()
    with pytest.raises(Enough):
        seen.next_step()
    (step,) = seen.steps()
    assert step.seconds() == only(gather_mining_loss=3, forward=1, backward=5, all_reduce=2)
    assert step.all_reduce_total() == 7
    assert step.buckets == [Span("bucket", 4, 9), Span("bucket", 9, 11)]


def test_the_gradient_of_some_values_ends_a_part_of_the_backward(clock):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(context, value, seconds):
            context.seconds = seconds
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            clock.time += context.seconds
            return gradient, None

    weight = torch.ones(2, requires_grad=True)
    with recording(Recorder(1, now=clock)) as seen:
        next_step()
        embeddings = Slow.apply(weight, 5)
        backward_until(embeddings, "gather_mining_loss")
        loss = Slow.apply(embeddings, 3).sum()
        with phase("backward"):
            loss.backward()
        next_step()
    assert seen.steps()[0].seconds() == only(gather_mining_loss=3, backward=5)


def test_exclusive_takes_inner_spans_out_of_the_one_around_them_alone():
    spans = [Span("a", 0, 10), Span("b", 1, 7), Span("c", 2, 4), Span("b", 8, 9), Span("d", 10, 13)]
    assert exclusive(spans) == {"a": 3, "b": 5, "c": 2, "d": 3}
    assert exclusive(spans[::-1]) == exclusive(spans)


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [([], 0), ([(0, 2), (1, 4)], 4), ([(0, 9), (1, 2)], 9), ([(5, 6), (0, 1)], 2), ([(0, 1), (1, 2)], 2)],
)
def test_covered_counts_overlaps_once(spans, seconds):
    assert covered([Span("bucket", *span) for span in spans]) == seconds


def test_nothing_is_recorded_and_no_hook_is_left_when_off(clock):
    seen = Recorder(1, now=clock)
    next_step()
    with phase("forward"):
        clock.time += 1
    values = torch.ones(1, requires_grad=True)
    backward_until(values, "gather_mining_loss")
    assert seen.steps() == []
    assert not values._backward_hooks


def test_costs_next_to_nothing_when_off():
    """0.2 microseconds were seen; a step has some ten."""

    def step() -> None:
        with phase("forward"):
            pass

    assert min(timeit.repeat(step, number=10_000, repeat=5)) / 10_000 < 5e-6


def test_one_recorder_at_a_time(clock):
    with recording(Recorder(1, now=clock)):
        another = recording(Recorder(1, now=clock))
        with pytest.raises(AssertionError, match="one recorder"):
            another.__enter__()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_events_see_the_device_and_not_the_host():
    """A product that the host only queues is the device's time. Not yet run, for want of a GPU."""
    large = torch.randn(8192, 8192, device="cuda")
    with recording(Recorder(1, warmup=1, device="cuda")) as seen:
        while True:
            next_step()
            with phase("forward"):
                large @ large
    (step,) = seen.steps()
    found = step.seconds()
    assert sum(found.values()) == pytest.approx(step.whole.seconds, rel=1e-3)
    assert found["forward"] > 0.9 * step.whole.seconds
