"""Further sets on 1, 2 and 3 real processes: the same results, converted once, and every rank ends with the same error."""

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.loader import LoaderConfig
from tests.data_shards.collections_on_disk import draw_collection, encoded
from tests.distributed.processes import in_processes
from tests.trainer.evaluation.sets.ijb_folder import write_ijb
from trainer.collectives import rank
from trainer.evaluation.embed import embed, raw_pixels
from trainer.evaluation.sets import set_shards
from trainer.evaluation.sets.judge import SetsConfig, judge_sets
from trainer.evaluation.sets.set_shards import on_all_ranks, on_first_rank

CONFIG = LoaderConfig(image_size=16, decode_threads=1)


def pixels(split, samples):
    return embed(raw_pixels, split, CONFIG, samples=samples)


def judged(folder: Path, work: Path) -> list[Any]:
    """Set, scalars and curves of every row; work is shared by the ranks."""
    sets = SetsConfig(
        pairs=(folder / "pairs.csv",),
        images=folder / "pictures",
        bins=(folder / "made.bin",),
        ijb=(folder / "IJBC",),
        ijb_ranks=(1, 2),
        distractors=folder / "crowd",
        fars=(0.2,),
        folds=3,
    )
    given = {"work": work, "image_size": 32, "margin": 0.2, "squared": False}
    rows = judge_sets(sets, ShardSet.open(folder / "shards"), [("raw pixels", pixels)], **given)
    return [(row.set, row.result.scalars, row.result.curves) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    draw_collection(root / "pictures", {f"a{n}": 4 for n in range(6)})
    names = [f"a{person}/{number:03d}" for person in range(6) for number in range(4)]
    rows = [f"{a},{b},{int(a[:2] == b[:2])}" for place, a in enumerate(names) for b in names[:place]]
    (root / "pairs.csv").write_text("\n".join(["first,second,same", *rows]))
    draw_collection(root / "run", {f"u{n}": 3 for n in range(7)} | {f"t{n}": 3 for n in range(3)})
    held = tuple(f"u{n}" for n in range(7))
    convert(root / "run", root / "shards", ConvertConfig(holdout_identities=held, workers=1))
    draw_collection(root / "crowd", {f"c{n}": 11 for n in range(10)})
    numbers = np.random.default_rng(0).integers(0, 30, 80)
    pictures = [encoded(int(number), size=(20, 20)) for number in numbers]
    with (root / "made.bin").open("wb") as file:
        pickle.dump((pictures, [bool(n % 3) for n in range(40)]), file)
    write_ijb(root / "IJBC")
    return root


def test_every_world_size_has_the_same_results(folder, tmp_path):
    alone = judged(folder, tmp_path / "1")
    assert [name for name, _, _ in alone] == ["pairs.csv", "made.bin", "IJB-C", "unseen identities among crowd"]
    for world_size in (2, 3):
        for found in in_processes(world_size, judged, folder, tmp_path / str(world_size)):
            for (name, scalars, curves), (other, expected, points) in zip(found, alone, strict=True):
                assert (name, scalars) == (other, expected)
                assert curves.keys() == points.keys()
                assert all(np.array_equal(curves[key], points[key]) for key in curves)
    assert len(list((tmp_path / "3").glob("*/manifest.json"))) == 4


def refused(folder: Path, work: Path) -> str:
    (work / "empty").mkdir(parents=True, exist_ok=True)
    try:
        sets = SetsConfig(pairs=(folder / "pairs.csv",), images=work / "empty")
        judge_sets(sets, None, [], work=work / "work", image_size=32, margin=0.2, squared=False)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_an_error_of_the_conversion_ends_all_ranks(folder, tmp_path):
    first, second = in_processes(2, refused, folder, tmp_path)
    assert first == second
    assert "holds no pictures" in first
    assert "\n" not in first


def meetings() -> list[Any]:
    """Rank 0 takes longer than the ranks wait for each other; then rank 1 alone fails, with each kind of error."""
    set_shards.MEET_S = 0.05
    done, found = [], []
    on_first_rank(lambda: (time.sleep(0.4), done.append(rank())))

    def fails(kind: type[Exception]) -> int:
        if rank() == 1:
            raise kind("rank 1 does not see it")
        return rank()

    for kind in (ValueError, OSError):
        try:
            on_all_ranks(lambda kind=kind: fails(kind))
        except (ValueError, OSError) as error:
            found.append((type(error).__name__, str(error)))
    for kind in (OSError, KeyError):
        try:
            on_first_rank(lambda kind=kind: (_ for _ in ()).throw(kind("gone")))
        except (ValueError, OSError, KeyError) as error:
            found.append((type(error).__name__, str(error)))
    return [done, on_all_ranks(rank), found]


def test_ranks_meet_until_rank_0_is_done():
    zero, one = in_processes(2, meetings)
    both = [("ValueError", "rank 1 does not see it"), ("OSError", "rank 1 does not see it"), ("OSError", "gone")]
    assert zero == [[0], 0, [*both, ("KeyError", "'gone'")]]
    assert one == [[], 1, [*both, ("ValueError", "'gone'")]]
