"""Search shared by real gloo processes: identical for 1, 2 and 3 of them, and equal to a slow oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.distributed.processes import in_processes
from tests.trainer.evaluation.search.search_oracle import assert_same, oracle, vectors
from tests.trainer.evaluation.test_protocols import people
from trainer.collectives import rank
from trainer.evaluation import index
from trainer.evaluation.protocols import ProtocolConfig, open_set
from trainer.evaluation.search.finder import Finder
from trainer.evaluation.search.rank_search import search, search_split_gallery, slice_of

Found = tuple[Tensor, Tensor]


def faces(gallery: int = 700) -> tuple[Tensor, Tensor]:
    """A gallery with duplicates on all slices, and probes."""
    rows = vectors(gallery)
    rows[50::100] = rows[7].clone() if gallery > 50 else rows[50::100]
    return rows, torch.cat([rows[[7, 8]], vectors(41, seed=1)])


def on_a_rank(folder: str) -> dict[str, Found]:
    gallery, probes = faces()
    mapped = np.load(Path(folder) / "gallery.npy", mmap_mode="r")
    begin, end = slice_of(len(gallery))
    few_begin, few_end = slice_of(2)
    return {
        "probes shared": search(gallery, probes, 6),
        "by faiss": search(gallery, probes, 6, engine="faiss"),
        "gallery split": search_split_gallery(gallery[begin:end], begin, probes, 6),
        "all of it": search_split_gallery(gallery[begin:end], begin, probes, len(gallery)),
        "mapped": search_split_gallery(mapped[begin:end], begin, probes, 6),
        "fewer rows than ranks": search_split_gallery(gallery[few_begin:few_end], few_begin, probes, 2),
        "fewer probes than ranks": search(gallery, probes[:1], 6),
        "no probes": search_split_gallery(gallery[begin:end], begin, probes[:0], 6),
        "evaluation": Finder("split")(gallery, probes, 6),
    }


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_finds_the_same(ranks, tmp_path):
    gallery, probes = faces()
    half = gallery.numpy().astype(np.float16)
    np.save(tmp_path / "gallery.npy", half)
    expected = oracle(gallery, probes, 6)
    for found in in_processes(ranks, on_a_rank, str(tmp_path)):
        for name in ("probes shared", "by faiss", "gallery split", "evaluation"):
            assert_same(found[name], expected)
        assert_same(found["all of it"], oracle(gallery, probes, len(gallery)))
        assert_same(found["mapped"], oracle(torch.from_numpy(half).float(), probes, 6))
        assert_same(found["fewer rows than ranks"], oracle(gallery[:2], probes, 2))
        assert_same(found["fewer probes than ranks"], oracle(gallery, probes[:1], 6))
        assert found["no probes"][1].shape == (0, 6)


def test_without_a_group_it_is_the_search_of_one_process(tmp_path):
    np.save(tmp_path / "gallery.npy", faces()[0].numpy().astype(np.float16))
    assert_same(on_a_rank(str(tmp_path))["probes shared"], oracle(*faces(), 6))


def refused() -> list[str]:
    """What each of some mistakes, made on one rank or on all, says on this rank."""
    gallery, probes = faces()
    begin, end = slice_of(len(gallery))
    last = gallery[begin:end].clone()
    last[-1, 0] = torch.nan if rank() == 1 else last[-1, 0]
    later = probes.clone()
    later[-1, 0] = torch.inf
    said = []
    for mistake in (
        lambda: search(gallery, later, 6),
        lambda: search(gallery, probes, 701),
        lambda: search_split_gallery(last, begin, probes, 6),
        lambda: search_split_gallery(gallery[begin:end, : 32 - rank()], begin, probes, 6),
        lambda: search_split_gallery(gallery[begin:end], begin, probes, 701),
        lambda: search_split_gallery(gallery[begin : end - 1], begin, probes, 6),
    ):
        try:
            mistake()
        except ValueError as reason:
            said.append(str(reason))
    return said


def test_a_mistake_on_one_rank_is_told_by_all():
    finite = "gallery or probes hold a number that is not finite; neighbours are not defined"
    most = "701 neighbours asked of a gallery of 700 images; allowed is 1 to its size"
    for said in in_processes(2, refused):
        assert said == [
            finite,
            most,
            f"rank 1: {finite}",
            "rank 1: gallery has shape (350, 31), probes have (43, 32); both must be (rows, d) with the same d",
            most,
            "rank 1's slice of the gallery begins at row 350; it must begin at row 349",
        ]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 700])
def test_slices_cover_all_once(world, count, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.search.rank_search.world_size", lambda: world)
    covered: list[Any] = []
    for number in range(world):
        monkeypatch.setattr("trainer.evaluation.search.rank_search.rank", lambda number=number: number)
        covered += range(*slice_of(count))
    assert covered == list(range(count))


def judged(method: str) -> dict[str, Any]:
    """A set judged with this search, without what it says of its search, and the sizes of the galleries searched here."""
    sizes = []
    inner = index.search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            index,
            "search",
            lambda gallery, *rest, **named: sizes.append(len(gallery)) or inner(gallery, *rest, **named),
        )
        config = ProtocolConfig(knn=(1, 5), search=method)
        scalars = open_set(*people(), margin=0.2, squared=False, config=config).scalars
    assert (scalars.pop("search"), scalars.pop("protocol")["search"]) == (method, method)
    return scalars | {"largest": max(sizes)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_split_gallery_judges_alike_and_a_rank_searches_its_slice(ranks):
    whole = judged("exact")
    assert whole.pop("largest") == 240
    for found in in_processes(ranks, judged, "split"):
        assert found.pop("largest") == 240 // ranks
        assert found == whole
