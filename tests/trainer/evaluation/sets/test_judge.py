"""Lists of pairs and .bin sets from files on disk to results, through the conversion, the loader and DALI."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.convert import ConvertConfig, convert
from data_shards.index import ShardSet
from data_shards.loader import LoaderConfig
from data_shards.sources import insightface_bin
from tests.data_shards.collections_on_disk import ORL, draw_collection, encoded, needs_orl
from trainer.evaluation.embed import embed, raw_pixels
from trainer.evaluation.sets import set_shards
from trainer.evaluation.sets.judge import SetsConfig, judge_sets
from trainer.evaluation.sets.pair_lists import read_pairs

LFW = Path(__file__).parents[5] / "shared" / "data" / "lfw_pairs.txt"
DIRECTIONS = torch.nn.functional.normalize(torch.randn(6000, 16, generator=torch.Generator().manual_seed(0)))
CONFIG = LoaderConfig(image_size=16, decode_threads=1)


def pixels(split, samples):
    return embed(raw_pixels, split, CONFIG, samples=samples)


def judge(sets, work, source=None, embedders=(("raw pixels", pixels),)):
    return judge_sets(sets, source, embedders, work=work, image_size=32, margin=0.2, squared=False)


def labels_as_embeddings(split, samples):
    """Two images of an identity are equal, two of different ones never."""
    labels = torch.from_numpy(split.samples["identity"].astype(np.int64)[samples])
    return DIRECTIONS[labels], labels


PERFECT = (("facescale", labels_as_embeddings),)


@pytest.fixture(scope="module")
def lfw(tmp_path_factory) -> Path:
    """Every picture that the real list names, in the layout of lfw-deepfunneled."""
    if not LFW.is_file():
        pytest.skip(f"{LFW} is not here")
    root = tmp_path_factory.mktemp("lfw") / "lfw-deepfunneled"
    drawn = [encoded(number, size=(18, 18)) for number in range(64)]
    for number, name in enumerate(read_pairs(LFW).names()):
        path = root / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn[number % 64])
    return root


def test_the_real_list_of_lfw(lfw, tmp_path):
    (row,) = judge(SetsConfig(pairs=(LFW,), images=lfw), tmp_path, embedders=PERFECT)
    assert (row.set, row.embedder) == ("lfw_pairs.txt", "facescale")
    found = row.result.scalars
    assert found["verification_accuracy"] == 1
    assert (found["verification_pairs"], found["verification_folds"]) == (6000, 10)
    assert (found["genuine_pairs"], found["impostor_pairs"]) == (3000, 3000)
    assert found["samples"] == len(read_pairs(LFW).names()) == 7701
    assert found["folds_share_identities"] is False
    assert found["eer"] == 0
    assert found["auc"] == 1
    assert [point["tar"] for point in found["tar_at_far"]] == [1, 1, None]
    assert found["tar_at_far"][2]["refused"].startswith("3,000 impostor pairs at FAR 0.001 are 3 false accepts")
    assert found["pairs_left_out"] == 0


def test_pictures_that_lfw_lacks_are_named_or_left_out(lfw, tmp_path):
    gone = [f"{name}.jpg" for name in ("Abel_Pacheco/Abel_Pacheco_0001", "Zico/Zico_0003")]
    kept = {name: (lfw / name).read_bytes() for name in gone}
    named = sum(any(f"{name}.jpg" in gone for name in pair[:2]) for pair in read_pairs(LFW).pairs)
    try:
        for name in gone:
            (lfw / name).unlink()
        with pytest.raises(
            ValueError, match=r"names 2 images that .* does not have: Abel_Pacheco/Abel_Pacheco_0001, Zico/Z"
        ):
            judge(SetsConfig(pairs=(LFW,), images=lfw), tmp_path, embedders=PERFECT)
        (row,) = judge(SetsConfig(pairs=(LFW,), images=lfw, skip_missing=True), tmp_path, embedders=PERFECT)
        assert row.result.scalars["pairs_left_out"] == named > 2
        assert row.result.scalars["verification_pairs"] == 6000 - named
    finally:
        for name, data in kept.items():
            (lfw / name).write_bytes(data)
    assert len(list(tmp_path.iterdir())) == 1, "converted once for both, and nothing else is left"


def test_a_set_is_converted_again_only_when_it_has_changed(tmp_path, monkeypatch):
    root = draw_collection(tmp_path / "pictures", {"a": 3, "b": 3})
    (tmp_path / "pairs.csv").write_text(
        "first,second,same\na/000,a/001,1\nb/000,b/001,1\na/000,b/000,0\na/001,b/001,0\n"
    )
    done = []
    monkeypatch.setattr(set_shards, "convert", lambda *given: (done.append(given), convert(*given)))
    sets, work = SetsConfig(pairs=(tmp_path / "pairs.csv",), images=root, folds=2), tmp_path / "work"
    first, again = (judge(sets, work)[0].result for _ in range(2))
    assert len(done) == 1
    assert first.scalars == again.scalars
    (root / "a" / "000.jpg").write_bytes(encoded(77))
    changed = judge(sets, work)[0].result
    assert len(done) == 2
    assert changed.scalars["auc"] is not None
    assert [path.name for path in work.iterdir()] == [done[1][1].name]
    assert done[1][1].name.startswith("pictures-")


def test_shards_are_taken_as_they_are_and_pairs_may_cross_splits(tmp_path):
    root = draw_collection(tmp_path / "pictures", {f"id {n}": 4 for n in range(6)})
    convert(root, tmp_path / "shards", ConvertConfig(holdout_identities=("id 1", "id 4"), holdout_images=1, workers=1))
    source = ShardSet.open(tmp_path / "shards")
    assert len(source.splits) == 3
    rows = [
        f"id {a}/{i:03d}.jpg,part/id {b}/{j:03d},{int(a == b)}"
        for a in range(6)
        for b in range(6)
        for i, j in ((0, 3), (1, 2))
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["first,second,same", *rows]))
    perfect = judge(SetsConfig(pairs=(tmp_path / "pairs.csv",)), tmp_path / "work", source, PERFECT)[0].result.scalars
    assert perfect["verification_accuracy"] == 1
    assert perfect["folds_share_identities"] is True
    assert (perfect["genuine_pairs"], perfect["impostor_pairs"], perfect["samples"]) == (12, 60, 24)
    assert not (tmp_path / "work").exists(), "there was nothing to convert"


def write_bin(path, pictures, same):
    insightface_bin._load.cache_clear()
    with path.open("wb") as file:  # as insightface's lfw2pack.py does
        pickle.dump((pictures, same), file, protocol=pickle.HIGHEST_PROTOCOL)
    return path


def noisy_pairs(count, seed=0):
    """Pictures of pairs, the same again or another one."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 40, (count, 2))
    numbers[::2, 1] = numbers[::2, 0] + rng.integers(0, 2, len(numbers[::2]))
    same = [bool(n % 2 == 0) for n in range(count)]
    return [encoded(int(n), size=(20, 20)) for n in numbers.ravel()], same


def test_a_bin_set_keeps_its_pairs_and_its_folds(tmp_path):
    pictures, same = noisy_pairs(43)
    (row,) = judge(SetsConfig(bins=(write_bin(tmp_path / "lfw.bin", pictures, same),), fars=(0.5,)), tmp_path / "work")
    assert row.set == "lfw.bin"
    vectors = []
    for number, data in enumerate(pictures):  # each through DALI by itself, in the file's order
        (tmp_path / f"{number:03d}" / "x").mkdir(parents=True)
        (tmp_path / f"{number:03d}" / "x" / "1.jpg").write_bytes(data)
        convert(tmp_path / f"{number:03d}", tmp_path / f"s{number}", ConvertConfig(holdout_identities=1.0, workers=1))
        vectors.append(pixels(ShardSet.open(tmp_path / f"s{number}").split("unseen_identities"), None)[0][0])
    unit = torch.nn.functional.normalize(torch.stack(vectors)).double().numpy()
    scores, genuine = (unit[::2] * unit[1::2]).sum(1), np.array(same)
    accuracies = []
    for test in np.array_split(np.arange(43), 10):
        train = np.setdiff1d(np.arange(43), test)
        values = np.unique(scores[train])[::-1]
        limits = [np.inf, *((values[:-1] + values[1:]) / 2), -np.inf]
        best = limits[int(np.argmax([((scores[train] > at) == genuine[train]).sum() for at in limits]))]
        accuracies.append(((scores[test] > best) == genuine[test]).mean())
    assert row.result.scalars["verification_accuracy"] == pytest.approx(np.mean(accuracies))
    assert row.result.scalars["verification_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert row.result.scalars["folds_share_identities"] is None


def test_pictures_of_a_bin_that_do_not_decode(tmp_path):
    pictures, same = noisy_pairs(30)
    whole = judge(SetsConfig(bins=(write_bin(tmp_path / "lfw.bin", pictures, same),)), tmp_path / "work")[
        0
    ].result.scalars
    pictures[6] = b"no picture"
    pictures[9] = pictures[9][:300]
    path = write_bin(tmp_path / "lfw.bin", pictures, same)
    with pytest.raises(ValueError, match=r"2 pictures of .*lfw.bin cannot be used: image 6, image 9$"):
        judge(SetsConfig(bins=(path,)), tmp_path / "work")
    found = judge(SetsConfig(bins=(path,), skip_missing=True), tmp_path / "work")[0].result.scalars
    assert (found["pairs_left_out"], found["verification_pairs"]) == (2, 28)
    assert (whole["pairs_left_out"], whole["verification_pairs"]) == (0, 30)


@needs_orl
def test_orl_as_csv(tmp_path):
    people = sorted(path.name for path in ORL.iterdir() if path.is_dir())[:12]
    rows = [f"{a}/1.pgm,{b}/{2 + n}.pgm,{int(a == b)},{n}" for n in range(4) for a in people for b in people]
    (tmp_path / "orl.csv").write_text("\n".join(["first,second,same,fold", *rows]))
    (row,) = judge(SetsConfig(pairs=(tmp_path / "orl.csv",), images=ORL, fars=(0.1, 0.05)), tmp_path / "work")
    found = row.result.scalars
    assert (found["genuine_pairs"], found["impostor_pairs"], found["verification_folds"]) == (48, 528, 4)
    assert 0.9 < found["auc"] < 1, "raw pixels tell ORL's faces apart fairly well"
    assert found["verification_accuracy"] > 528 / 576 - 0.02


def written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ("first,second,same\na/000,a/001,1\nb/000,b/001,1\n", "pairs.csv has 2 genuine and 0 impostor pairs"),
        ("first,second,same\na/000,a/009,1\na/000,b/000,0\n", "names 1 images that .* does not have: a/009$"),
        (
            "first,second,same\na/000,c/000,0\nd/1,e/1,0\nd/2,e/2,0\nd/3,e/3,0\n",
            r"names 7 images .*: c/000, d/1, d/2, d/3, e/1 …$",
        ),
        ("first,second,same\na/000\n", "line 2: same is None; allowed is 1 or 0"),
        ("1\t300\nA\t1\t2\n", "says 1 x 2 x 300 = 600 pairs in line 1 and has 1"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path, pairs, said):
    root = draw_collection(tmp_path / "pictures", {"a": 2, "b": 2})
    sets = SetsConfig(pairs=(written(tmp_path / "pairs.csv", pairs),), images=root)
    with pytest.raises(ValueError, match=said) as caught:
        judge(sets, tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_nothing_is_left_without_the_missing_ones(tmp_path):
    root = draw_collection(tmp_path / "pictures", {"a": 2, "b": 2})
    sets = SetsConfig(
        pairs=(written(tmp_path / "p.csv", "first,second,same\nx/1,x/2,1\n"),), images=root, skip_missing=True
    )
    with pytest.raises(ValueError, match=r"names 2 images .*: x/1, x/2; no pair is left without them"):
        judge(sets, tmp_path / "work")


def test_sources_that_are_none(tmp_path):
    pairs = written(tmp_path / "p.csv", "first,second,same\nx/1,x/2,1\n")
    (tmp_path / "empty").mkdir()
    for images, said in ((tmp_path / "nowhere", "nowhere is not there"), (tmp_path / "empty", "holds no pictures")):
        with pytest.raises(ValueError, match=said):
            judge(SetsConfig(pairs=(pairs,), images=images), tmp_path / "work")
    with pytest.raises(ValueError, match="refused or no verification set"):
        judge(SetsConfig(bins=(pairs,)), tmp_path / "work")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"folds": 1}, "sets.folds is 1; it must be at least 2"),
        ({"fars": (0.1, 1.0)}, "sets.fars has 1.0; each must lie between 0 and 1"),
        ({"ijb_ranks": (5, 1)}, r"sets.ijb_ranks is \[5, 1\]; it must be ascending"),
        ({"images": Path("x")}, "sets.images is x, but there is no list of pairs"),
        (
            {"bins": (Path("a/lfw.bin"), Path("b/lfw.bin"))},
            "lfw.bin is there 2 times; results are told apart by the name",
        ),
    ],
)
def test_settings_that_are_wrong(wrong, said):
    with pytest.raises(ValueError, match=said):
        SetsConfig(**wrong)
