"""Which evaluation was best, and when training ends, by hand."""

import json

import pytest

from trainer.best import Best


def _seen(best: Best, values: list[float | None]) -> list[bool]:
    return [
        best.see(10 * (number + 1), {} if value is None else {best.metric: value})
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("metric", "values", "better", "step"),
    [
        ("rank1", [0.2, 0.5, 0.4, 0.5, 0.6], [True, True, False, False, True], 50),
        ("rank1", [0.5, 0.5], [True, False], 10),  # of equal ones the first
        ("triplet_loss", [0.9, 0.7, 0.8], [True, True, False], 20),  # less is better
        ("rank5", [None, 0.1, None], [False, True, False], 20),  # it was refused twice
        ("none", [0.1, 0.2], [False, False], 0),
    ],
)
def test_best(metric, values, better, step):
    best = Best(metric, patience=0)
    assert _seen(best, values) == better
    assert best.step == step
    assert not best.exhausted


def test_patience():
    best = Best("rank1", patience=2)
    _seen(best, [0.3, 0.2])
    assert not best.exhausted
    best.see(30, {"rank1": 0.3})
    assert best.exhausted
    assert best.farewell() == ("2 evaluations in a row without a better rank1 (best: 0.3000 at step 10): training ends")


def test_a_better_one_renews_the_patience():
    best = Best("rank1", patience=2)
    _seen(best, [0.3, 0.2, 0.4, 0.1])
    assert not best.exhausted


def test_a_resumed_run_decides_alike(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    lines = [{"step": 10, "rank1": 0.3}, {"step": 20, "rank1": 0.2}, {"step": 30, "rank1": 0.1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = Best("rank1", patience=2)
    best.see_log(path, until=20)
    assert (best.step, best.exhausted) == (10, False)
    assert not best.see(30, {"rank1": 0.1})
    assert best.exhausted


def test_a_new_run_has_no_log(tmp_path):
    best = Best("rank1", patience=1)
    best.see_log(tmp_path / "evaluations.jsonl", until=0)
    assert best.value is None
