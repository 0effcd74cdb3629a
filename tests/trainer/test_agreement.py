"""Ranks that differ are named, and in what; real ranks with different packages are in tests/distributed/test_faults.py."""

import dataclasses

import pytest

from data_shards.plan import PlanConfig
from trainer import agreement
from trainer.agreement import check_ranks_agree, comparable
from trainer.config import LossConfig, RunConfig, TrainConfig


def said(monkeypatch, *ranks: dict) -> str:
    """What the check says to ranks with these values; nothing where they agree."""
    everyone = [{name: str(value) for name, value in rank.items()} for rank in ranks]
    monkeypatch.setattr(agreement, "gather_objects", lambda mine: everyone)
    try:
        check_ranks_agree(ranks[0])
    except ValueError as error:
        return str(error)
    return ""


BASE = TrainConfig()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"loss": LossConfig(margin=0.3)}, "ranks differ in loss.margin: 0.3 on rank 1, 0.2 on the other 2"),
        (
            {"plan": PlanConfig(identities_per_batch=8)},
            "ranks differ in plan.identities_per_batch: 8 on rank 1, 64 on the other 2",
        ),
        ({"run": RunConfig(seed=1)}, "ranks differ in run.seed: 1 on rank 1, 0 on the other 2"),
    ],
)
def test_a_setting_that_differs_is_named_with_the_rank(monkeypatch, other, message):
    ours, theirs = comparable(BASE), comparable(dataclasses.replace(BASE, **other))
    assert said(monkeypatch, ours, theirs, ours) == message


@pytest.mark.parametrize("name", ["shards", "plan", "start"])
def test_shards_plan_and_step_must_be_the_same(monkeypatch, name):
    same = {"shards": "ab12", "plan": "3 steps", "start": 5}
    assert said(monkeypatch, same, same) == ""
    found = said(monkeypatch, same, same, same, same | {name: "other"})
    assert found == f"ranks differ in {name}: other on rank 3, {same[name]} on the other 3"


def test_every_package_that_decides_is_compared():
    names = {name for name in comparable(BASE) if name.startswith("version of ")}
    assert {f"version of {name}" for name in ("facescale", "torch", "nvidia-dali-cuda130", "accelerate")} <= names
    assert "not installed" not in {comparable(BASE)[name] for name in names}


def test_machines_may_keep_their_files_in_other_places(monkeypatch, tmp_path):
    elsewhere = dataclasses.replace(BASE, run=RunConfig(folder=tmp_path))
    assert said(monkeypatch, comparable(BASE), comparable(elsewhere)) == ""


def test_of_many_ranks_the_first_are_named(monkeypatch):
    ranks = [{"seed": 0}] * 30 + [{"seed": 1}] * 10
    assert (
        said(monkeypatch, *ranks)
        == "ranks differ in seed: 1 on rank 30, 31, 32, 33, 34, 35, 36, 37 and 2 more, 0 on the other 30"
    )
