"""Options that name further sets."""

import argparse
from pathlib import Path

import pytest

from trainer.cli_sets import add_set_options, sets_of
from trainer.evaluation.sets.judge import SetsConfig


def parsed(*options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    add_set_options(parser)
    return sets_of(parser.parse_args(options))


def test_no_option_is_no_set():
    assert parsed() == parsed("--seed", "3", "--folds", "5") == SetsConfig()


def test_every_option():
    options = (
        "--pairs a.txt b.csv --images p --bin lfw.bin cfp_fp.bin --ijb IJBB IJBC --ijb-detector-scores --ijb-ranks 5 1 "
    )
    found = parsed(*(options + "--distractors crowd --folds 5 --skip-missing --seed 3").split())
    assert found == SetsConfig(
        pairs=(Path("a.txt"), Path("b.csv")),
        images=Path("p"),
        bins=(Path("lfw.bin"), Path("cfp_fp.bin")),
        ijb=(Path("IJBB"), Path("IJBC")),
        ijb_detector_scores=True,
        ijb_ranks=(1, 5),
        distractors=Path("crowd"),
        folds=5,
        skip_missing=True,
        seed=3,
    )


def test_images_without_a_list():
    with pytest.raises(ValueError, match="no list of pairs that needs it"):
        parsed("--images", "x")
