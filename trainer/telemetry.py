"""What a run tells while it runs: loss, triplet health, throughput with data wait; as JSON lines and through trackers."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from trainer.collectives import all_reduce_sum, rank
from trainer.metric.losses import effective_rank, spread
from trainer.train_step import StepStats

LOG, EVALUATIONS, EVENTS = "log.jsonl", "evaluations.jsonl", "events.jsonl"


class Tracking(Protocol):
    """Trackers, as `trainer.trackers.Trackers` is; both methods return what is to be said of those that failed."""

    def log(self, values: dict[str, float], step: int) -> list[str]: ...
    def end(self) -> list[str]: ...


class Telemetry:
    """Adds up what the steps report, on the device, and writes it out at the steps that log.

    Args:
        folder: the run folder.
        global_batch: images of one step over all ranks.
        trackers: get the same figures.
        margin: of the loss, which it is told relative to; None for none.
        centres: of the softmax, over all ranks; 0 without.
    """

    def __init__(
        self,
        folder: Path,
        global_batch: int,
        trackers: Tracking,
        margin: float | None = None,
        centres: int = 0,
    ) -> None:
        self._centres = centres
        self._folder, self._global_batch, self._trackers, self._margin = folder, global_batch, trackers, margin
        self._embeddings: Tensor | None = None  # of the last step that was not left out
        self._skipped = 0
        self._restart()

    def _restart(self) -> None:
        self._sums: Tensor | None = None  # of _totals over the steps since the last line
        self._softmax_steps = 0
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times what runs inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def add(self, stats: StepStats) -> None:
        """Counts a step; nothing here waits for the device."""
        totals = _totals(stats)
        self._sums = totals if self._sums is None else self._sums + totals
        before = torch.zeros_like(stats.embeddings) if self._embeddings is None else self._embeddings
        self._embeddings = torch.where(stats.flags[0] == 0, stats.embeddings, before)
        self._steps += 1
        self._softmax_steps += stats.softmax is not None

    def skipped(self) -> None:
        """Counts an update that was left out."""
        self._skipped += 1

    def event(self, text: str, everywhere: bool = True) -> None:
        """Says something once, to people and in the log: every rank that calls it or, without `everywhere`, rank 0 alone."""
        if rank() and not everywhere:
            return
        print(f"facescale: {text}", file=sys.stderr)
        with (self._folder / EVENTS).open("a") as file:
            file.write(json.dumps({"rank": rank(), "event": text}) + "\n")

    def log(self, step: int, epoch: float, learning_rate: float, replaced: int = 0) -> dict[str, float]:
        """Writes one line on rank 0 for the steps since the last one; every rank calls it. Syncs with the device.

        Args:
            replaced: pictures of this rank that did not decode and were replaced, so far.
        """
        assert self._sums is not None, "log without a step"
        assert self._embeddings is not None
        sums = torch.cat([self._sums, self._sums.new_tensor([replaced])])
        loss, count, active, valid, d_ap, d_an, *softmax, replaced = all_reduce_sum(sums).tolist()
        seconds = time.perf_counter() - self._since
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "images_seen": step * self._global_batch,
            "loss": loss / max(count, 1),
            "active_fraction": active / max(valid, 1),
            "d_ap": d_ap / max(valid, 1),
            "d_an": d_an / max(valid, 1),
            "embedding_spread": float(spread(self._embeddings)),
            "effective_rank": float(effective_rank(self._embeddings)),
            "images_per_s": round(self._steps * self._global_batch / seconds, 2),
            "data_wait_percent": round(100 * self._waited / seconds, 2),
            "learning_rate": learning_rate,
            "updates_left_out": self._skipped,
            "pictures_replaced": int(replaced),
        }
        if self._margin is not None:
            line["loss_over_margin"] = line["loss"] / self._margin
        if self._softmax_steps:
            cross_entropy, cosine, images, sampled = softmax
            line["softmax_loss"] = cross_entropy / max(images, 1)
            line["cos_own_centre"] = cosine / max(images, 1)
            steps = images / self._global_batch  # without those that were left out
            line["centres_sampled"] = sampled / max(steps * self._centres, 1)
        self._write(LOG, line)
        self._track({f"train/{name}": value for name, value in line.items() if name != "step"}, step)
        self._restart()
        return line

    def evaluation(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the result of an evaluation on rank 0. The time that it took is not counted as training."""
        self._write(EVALUATIONS, {"step": step, "images_seen": step * self._global_batch, **scalars})
        self._track({f"evaluation/{name}": value for name, value in scalars.items()}, step)

    def end(self) -> None:
        """After the last word: waits for the trackers."""
        for said in self._trackers.end():
            self.event(said)

    def _track(self, values: dict[str, float], step: int) -> None:
        for said in self._trackers.log(values, step):
            self.event(said)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes what runs inside (evaluation, checkpoints) out of the training time."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def _write(self, name: str, line: dict[str, float]) -> None:
        if rank() == 0:
            with (self._folder / name).open("a") as file:
                file.write(json.dumps(line) + "\n")


def truncate(folder: Path, step: int) -> None:
    """Drops the lines beyond `step` that a run wrote before it stopped; resuming writes them anew."""
    for name in (LOG, EVALUATIONS):
        path = folder / name
        if path.is_file():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= step]
            path.write_text("".join(f"{line}\n" for line in lines))


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # cut short by a kill


def _totals(stats: StepStats) -> Tensor:
    """Loss, its count, active, valid, d_ap, d_an and the softmax's four of this rank, shape (10,), float64; zeros of a step that
    was left out."""
    parts = (stats.loss_sum, stats.divisor, stats.active, stats.valid, stats.d_ap, stats.d_an)
    totals = torch.stack([part.double() for part in parts])
    totals = torch.cat([totals, totals.new_zeros(4) if stats.softmax is None else stats.softmax])
    return totals.where(stats.flags[0] == 0, torch.zeros_like(totals))
