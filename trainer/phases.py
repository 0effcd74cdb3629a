"""Where a step's time goes: `with phase("forward"):` in the step costs a fraction of a microsecond until a `Recorder` records.

A phase is a stretch of the timeline of the device: between two readings of the clock on a CPU, between two CUDA events on the
stream that computes on a GPU. So on a GPU nothing waits in the step, the host may run ahead, and waiting for data counts as far
as the device stood still for it, no further. A phase within another is taken out of it: shares add up to the step.

What two of them are, and are not:

- `gather_mining_loss` is the forward of all three and, of the backward, what comes before the gradient of the embeddings. The
  gather is where ranks meet first: a rank that is ahead waits there for the others.
- `all_reduce` is what DDP's averaging of the gradients adds to the backward: from the moment when this rank's last bucket is
  ready, which is the end of its own backward, until every bucket is averaged. It holds the wait for slower ranks, too. Its
  *total* is the time in which at least one bucket was under way; the rest of that lies beneath the backward. Not in either: that
  the backward itself is slower while gloo's threads add up on the same cores.

Not yet run, for want of a GPU: CUDA events and NVTX ranges.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

PHASES = ("wait", "copy", "forward", "gather_mining_loss", "backward", "all_reduce", "optimizer")
OTHER = "other"
"""Of a step, what lies in no phase: learning rate, telemetry, flags, the log."""


class Enough(Exception):
    """A recorder has seen the steps that it was made for."""


class Span(NamedTuple):
    """Seconds on the device's timeline, from the recorder's start."""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Step(NamedTuple):
    """One step of the loop, from its first line to that of the next."""

    whole: Span
    spans: list[Span]
    """Phases in it, in the order in which they ended, the longer around the shorter."""
    buckets: list[Span]
    """Gradient buckets under way among the ranks."""

    def seconds(self) -> dict[str, float]:
        """Of each phase without those within it, and of what is left of the step; they add up to the step."""
        found = dict.fromkeys((*PHASES, OTHER), 0.0) | exclusive([self.whole._replace(name=OTHER), *self.spans])
        return {name: max(0.0, value) for name, value in found.items()}

    def all_reduce_total(self) -> float:
        return covered(self.buckets)


class Recorder:
    """Records steps, `warmup` of them before those that count, then raises `Enough` where the loop asks for another.

    Args:
        device: on whose timeline; "cpu" or a CUDA device.
        nvtx: push NVTX ranges for Nsight; where not given, on CUDA alone.
        now: another clock, in seconds; for tests.
    """

    def __init__(
        self,
        steps: int,
        warmup: int = 0,
        device: torch.device | str = "cpu",
        nvtx: bool | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        self._device, self._left = torch.device(device), warmup + steps
        cuda = self._device.type == "cuda"
        self._warmup, self._nvtx = warmup, cuda if nvtx is None else nvtx
        self._now: Callable[[], Any] = now or (self._event if cuda else time.perf_counter)
        if cuda:
            torch.cuda.synchronize(self._device)
        self.started_at = time.time()
        """Seconds of the system's clock at the start, for timelines of several ranks."""
        self._start: Any = self._now()
        self._marks: list[Any] = []
        """Begins of the steps and, last, the end."""
        self._spans: list[list[tuple[str, Any, Any]]] = []
        self._buckets: list[list[tuple[str, Any, Any]]] = []
        self._open: list[tuple[str, Any, list[tuple[str, Any]]]] = []
        """Phases that have begun: name, begin, and what is to end with it."""

    def next_step(self) -> None:
        """A step begins, and the one before has ended.

        Raises:
            Enough: all have been recorded.
        """
        self._marks.append(self._now())
        if not self._left:
            raise Enough
        self._left -= 1
        self._spans.append([])
        self._buckets.append([])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin: Any = self._now()
        self._open.append((name, begin, []))
        if self._nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if self._nvtx:
                torch.cuda.nvtx.range_pop()
            end, (_, _, following) = self._now(), self._open.pop()
            for span in ((name, begin), *following):
                self._add(*span, end)

    def until_here(self, name: str) -> None:
        """What the innermost open phase has done so far was `name`; from any thread."""
        if self._open:
            self._add(name, self._open[-1][1], self._now())

    def from_here(self, name: str) -> None:
        """What the innermost open phase still does is `name`; from any thread."""
        if self._open:
            self._open[-1][2].append((name, self._now()))

    def bucket(self, last: bool) -> Callable[[], None]:
        """A gradient bucket sets out, the `last` of a backward or another; what is returned is called when it is averaged."""
        if not self._buckets:
            return lambda: None
        begin, buckets = self._now(), self._buckets[-1]
        if last:
            self.from_here("all_reduce")
        return lambda: buckets.append(("bucket", begin, self._now()))

    def steps(self) -> list[Step]:
        """Those that counted. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = []
        for number in range(self._warmup, len(self._marks) - 1):
            whole = self._resolved("step", self._marks[number], self._marks[number + 1])
            spans, buckets = ([self._resolved(*span) for span in kept[number]] for kept in (self._spans, self._buckets))
            found.append(Step(whole, spans, buckets))
        return found

    def _add(self, name: str, begin: Any, end: Any) -> None:
        if self._spans:
            self._spans[-1].append((name, begin, end))

    def _resolved(self, name: str, begin: Any, end: Any) -> Span:
        return Span(name, self._at(begin), self._at(end))

    def _at(self, mark: Any) -> float:
        if isinstance(mark, torch.cuda.Event):
            return self._start.elapsed_time(mark) / 1e3
        return float(mark - self._start)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


_recorder: Recorder | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Lets `recorder` see the phases of this process for a while; ends with the loop that it has seen enough of."""
    global _recorder
    assert _recorder is None, "one recorder at a time"
    _recorder = recorder
    try:
        yield recorder
    except Enough:
        pass
    finally:
        _recorder = None


def recorder() -> Recorder | None:
    """The one that records now."""
    return _recorder


def phase(name: str) -> AbstractContextManager[None]:
    """Around a phase of the step, one of `PHASES`."""
    return _NOTHING if _recorder is None else _recorder.phase(name)


def next_step() -> None:
    """At the first line of a step of the loop.

    Raises:
        Enough: a recorder has seen the steps that it was made for.
    """
    if _recorder is not None:
        _recorder.next_step()


def backward_until(values: Tensor, name: str) -> None:
    """Counts what a backward does before it has the gradient of `values` as `name`."""
    if _recorder is not None and values.requires_grad:
        recording = _recorder

        def told(_: Tensor) -> None:
            recording.until_here(name)

        values.register_hook(told)


def exclusive(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of each name without those of spans within, summed; spans lie one within the other or apart."""
    found: dict[str, float] = {}
    around: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        while around and around[-1].end <= span.begin:
            around.pop()
        end = min(span.end, around[-1].end) if around else span.end
        found[span.name] = found.get(span.name, 0.0) + end - span.begin
        if around:
            found[around[-1].name] -= end - span.begin
        around.append(span)
    return found


def covered(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of the spans was under way."""
    seconds, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.begin):
        seconds += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return seconds
