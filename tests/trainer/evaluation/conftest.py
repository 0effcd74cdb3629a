"""Shards whose held-out identities are as many as those of `fake_runs`, so that these runs have pictures."""

from pathlib import Path

import pytest

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from tests.data_shards.collections_on_disk import draw_collection
from tests.trainer.evaluation.report.fake_runs import evaluate, train

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> ShardSet:
    """24 identities of 8 pictures, held out, and two for training."""
    root = tmp_path_factory.mktemp("held_out")
    names = [f"p{number:02d}" for number in range(24)]
    draw_collection(root / "pictures", dict.fromkeys(names, 8) | {"trained": 4, "trained too": 4})
    convert(root / "pictures", root / "shards", ConvertConfig(holdout_identities=tuple(names), workers=1))
    return ShardSet.open(root / "shards")


@pytest.fixture(scope="session")
def pictured(held_out, tmp_path_factory) -> Path:
    """A run whose evaluation has pictures; one of its identities is called a script. Read only."""
    run = tmp_path_factory.mktemp("pictured") / "run"
    train(run)
    split = held_out.split("unseen_identities")
    names = {0: SCRIPT, 1: "O'Neil & sons"} | {number: f"person {number}" for number in range(2, 24)}
    evaluate(run, split=split, names=names)
    return run


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A run of another margin, evaluated by an earlier version: no pictures, no bands, no histograms. Read only."""
    run = tmp_path_factory.mktemp("plain") / "plain"
    train(run, margin=0.5, speed=300)
    evaluate(run, margin=0.5, complete=False, spread=1.4)
    return run
