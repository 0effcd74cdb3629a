import json

import pytest
import torch

from trainer import telemetry
from trainer.telemetry import Telemetry, truncate
from trainer.train_step import StepStats


class Clock:
    """Stands in for `time`; goes when it is told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    return clock


def stats(
    loss: float, active: int, positive: list[float], negative: list[float], valid: list[bool], flags=(0, 0, 0)
) -> StepStats:
    kept = torch.tensor(valid)
    return StepStats(
        torch.tensor(loss),
        torch.tensor(2 * active),
        torch.tensor(active),
        kept.sum(),
        (torch.tensor(positive) * kept).sum(),
        (torch.tensor(negative) * kept).sum(),
        torch.tensor(flags, dtype=torch.float64),
        torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
    )


FIRST = stats(0.75, 2, [0.5, 0.25, 9.0], [1.0, 0.5, 9.0], [True, True, False])
SECOND = stats(0.25, 1, [1.0, 0.75, 0.5], [1.5, 0.25, 0.25], [True, True, True])
EASY = stats(0.0, 0, [9.0, 9.0], [9.0, 9.0], [False, False])


@pytest.fixture
def tracked():
    return []


class Tracked:
    """Trackers that keep what they are told."""

    def __init__(self, told, complaints=()):
        self.told, self.complaints = told, list(complaints)

    def log(self, values, step):
        self.told.append((values, step))
        return self.complaints

    def end(self):
        return self.complaints


@pytest.fixture
def report(tmp_path, clock, tracked):
    return Telemetry(tmp_path, 24, Tracked(tracked))


def lines(folder, name="log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_line_by_hand(tmp_path, report, clock):
    """Two steps of 24 images in 8 s, of which 2 s waiting; 3 active of 5 valid anchors; the invalid one's 9 is not used."""
    for step in (FIRST, SECOND):
        with report.waiting():
            clock.now += 1
        report.add(step)
        clock.now += 3
    line = report.log(7, 0.123456, 0.01)
    assert line == {
        "step": 7,
        "epoch": 0.1235,
        "images_seen": 7 * 24,
        "loss": pytest.approx((0.75 + 0.25) / (2 * 3)),
        "active_fraction": 3 / 5,
        "d_ap": (0.5 + 0.25 + 1.0 + 0.75 + 0.5) / 5,
        "d_an": (1.0 + 0.5 + 1.5 + 0.25 + 0.25) / 5,
        "images_per_s": 2 * 24 / 8,
        "data_wait_percent": 25.0,
        "embedding_spread": 1.0,
        "effective_rank": pytest.approx(1.0),
        "learning_rate": 0.01,
        "updates_left_out": 0,
        "pictures_replaced": 0,
    }
    assert lines(tmp_path) == [line]


def test_each_line_is_about_the_steps_since_the_last(tmp_path, report, clock):
    with report.waiting():
        clock.now += 10
    report.add(FIRST)
    report.log(1, 0.5, 0.1)
    report.add(SECOND)
    clock.now += 2
    second = report.log(2, 1.0, 0.1)
    assert (second["loss"], second["active_fraction"]) == (0.25 / 2, 1 / 3)
    assert (second["images_per_s"], second["data_wait_percent"]) == (12, 0)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_is_paused_counts_neither_as_training_nor_as_waiting(report, clock):
    report.add(FIRST)
    clock.now += 4
    with report.paused():
        clock.now += 1000
    line = report.log(1, 1, 0.1)
    assert (line["images_per_s"], line["data_wait_percent"]) == (6, 0)


def test_a_pause_behind_a_line_is_not_in_the_next(report, clock):
    """As in the loop: log, then evaluate and save, then the next step."""
    report.add(FIRST)
    clock.now += 1
    report.log(1, 1, 0.1)
    with report.paused():
        clock.now += 1000
    with report.waiting():
        clock.now += 1
    clock.now += 3
    report.add(FIRST)
    line = report.log(2, 1, 0.1)
    assert (line["images_per_s"], line["data_wait_percent"]) == (6, 25)


def test_no_valid_anchor_and_none_active_divide_by_nothing(report, clock):
    report.add(EASY)
    clock.now += 1
    line = report.log(1, 1, 0.1)
    assert [line[name] for name in ("loss", "active_fraction", "d_ap", "d_an")] == [0, 0, 0, 0]


def test_trackers_get_the_same_values_under_train_and_evaluation(report, clock, tracked):
    report.add(FIRST)
    clock.now += 1
    line = report.log(3, 1, 0.1)
    report.evaluation(3, {"rank1": 0.5, "knn": 0.25})
    (trained, at), (evaluated, evaluated_at) = tracked
    assert (at, evaluated_at) == (3, 3)
    assert trained == {f"train/{name}": value for name, value in line.items() if name != "step"}
    assert evaluated == {"evaluation/rank1": 0.5, "evaluation/knn": 0.25}


def test_evaluations_are_written_with_the_images_seen(tmp_path, report):
    report.evaluation(3, {"rank1": 0.5})
    report.evaluation(5, {"rank1": 0.75})
    assert lines(tmp_path, "evaluations.jsonl") == [
        {"step": 3, "images_seen": 72, "rank1": 0.5},
        {"step": 5, "images_seen": 120, "rank1": 0.75},
    ]


def test_other_ranks_write_nothing_but_compute_the_line(tmp_path, report, clock, monkeypatch):
    monkeypatch.setattr(telemetry, "rank", lambda: 1)
    report.add(FIRST)
    clock.now += 1
    assert report.log(1, 1, 0.1)["loss"] == 0.1875
    report.evaluation(1, {"rank1": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_counts_and_sums_are_those_of_all_ranks(report, clock, monkeypatch):
    """Rates are taken from summed counts, not averaged over ranks: 2 of 2 here and 0 of 8 there are 20 %."""
    there = torch.tensor([0.0, 4.0, 0.0, 8.0, 8 * 0.125, 8 * 0.75, 0, 0, 0, 0, 3], dtype=torch.float64)
    monkeypatch.setattr(telemetry, "all_reduce_sum", lambda sums: sums + there)
    report.add(FIRST)
    clock.now += 1
    line = report.log(1, 1, 0.1, replaced=2)
    assert line["active_fraction"] == 0.2
    assert line["pictures_replaced"] == 5
    assert line["loss"] == 0.75 / 8
    assert (line["d_ap"], line["d_an"]) == ((0.75 + 1) / 10, (1.5 + 6) / 10)


def test_a_step_that_was_left_out_counts_as_such_alone(report, clock):
    report.add(stats(float("nan"), 5, [float("nan")], [1.0], [True], flags=(1, 0, 2)))
    report.skipped()
    report.add(FIRST)
    clock.now += 1
    line = report.log(2, 1, 0.1)
    assert (line["loss"], line["updates_left_out"]) == (0.75 / 4, 1)


def test_the_loss_is_told_relative_to_the_margin(tmp_path, clock):
    report = Telemetry(tmp_path, 24, Tracked([]), margin=0.25)
    report.add(FIRST)
    clock.now += 1
    assert report.log(1, 1, 0.1)["loss_over_margin"] == 0.75 / 4 / 0.25


def test_what_a_tracker_complains_of_is_an_event(tmp_path, clock, capsys):
    report = Telemetry(tmp_path, 24, Tracked([], ["tracker wandb failed"]))
    report.add(FIRST)
    clock.now += 1
    report.log(1, 1, 0.1)
    report.end()
    assert [line["event"] for line in lines(tmp_path, "events.jsonl")] == ["tracker wandb failed"] * 2
    assert capsys.readouterr().err == "facescale: tracker wandb failed\n" * 2


def test_events_are_told_once_and_kept(tmp_path, report, capsys, monkeypatch):
    report.event("something", everywhere=False)
    monkeypatch.setattr(telemetry, "rank", lambda: 3)
    report.event("something", everywhere=False)
    report.event("a picture")
    assert lines(tmp_path, "events.jsonl") == [{"rank": 0, "event": "something"}, {"rank": 3, "event": "a picture"}]
    assert capsys.readouterr().err == "facescale: something\nfacescale: a picture\n"


def test_many_steps_add_up_without_rounding(report, clock):
    """In float32 a sum of 2**25 would not grow by 1 any more."""
    report.add(stats(2.0**25, 1, [1.0], [1.0], [True]))
    for _ in range(8):
        report.add(stats(1.0, 1, [1.0], [1.0], [True]))
    clock.now += 1
    assert report.log(9, 1, 0.1)["loss"] == (2**25 + 8) / 18


def write_log(folder, name, steps, tail=""):
    (folder / name).write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in steps) + tail)


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', "{", '{"loss": 1'])
def test_truncate_drops_what_was_written_beyond_the_checkpoint(tmp_path, tail):
    write_log(tmp_path, "log.jsonl", [1, 2, 3, 4], tail)
    write_log(tmp_path, "evaluations.jsonl", [2, 4])
    truncate(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"step": 2, "loss": 0.5}\n'


def test_truncate_drops_a_half_written_line_of_an_early_step_too(tmp_path):
    write_log(tmp_path, "log.jsonl", [1], '{"step": 2, "loss"')
    truncate(tmp_path, 5)
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_truncate_without_logs_makes_none(tmp_path):
    truncate(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []
